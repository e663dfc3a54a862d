"""The door to the Triton kernels: the only module that imports them, inside a function."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from recur.primitives.forms import ScanOut

TRITON = find_spec("triton") is not None
WIDEST = 256  # rows and columns of a state that fit the registers of one program


def refusal(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    bonus: Tensor | None,
    initial_state: Tensor | None,
) -> str | None:
    """Why form="triton" cannot compute this scan, in words that name a form which can; None if it can."""
    given = [x for x in (q, k, v, log_decay, initial_state) if x is not None]
    rows = q.shape[-1] * (2 if log_decay is not None and log_decay.is_complex() else 1)
    rules = (
        (any(x.dtype in (torch.float64, torch.complex128) for x in given), "float64"),
        (beta is not None, "beta"),
        (bonus is not None, "bonus"),
        (rows > WIDEST, f"K={q.shape[-1]}, {rows} real rows of state, more than {WIDEST}"),
        (v.shape[-1] > WIDEST, f"V={v.shape[-1]}, more than {WIDEST}"),
    )
    return _first(rules, v.device)


def elementwise_refusal(cu_seqlens: Tensor | None, weights: tuple[Tensor, ...], *inputs: Tensor | None) -> str | None:
    """The same for the elementwise scans; weights are what writes and reads N slots, [B T N] | [B T G N]."""
    given = [x for x in (*inputs, *weights) if x is not None]
    rules = (
        (any(x.dtype in (torch.float64, torch.complex128) for x in given), "float64"),
        (cu_seqlens is not None, "cu_seqlens"),
        (any(x.ndim == 2 for x in weights), "weights [V N] that do not change in time"),
        (any(x.shape[-1] > WIDEST for x in weights), f"N above {WIDEST}"),
    )
    return _first(rules, given[0].device)


def _first(rules: tuple[tuple[bool, str], ...], device: torch.device) -> str | None:
    """The first broken rule in words."""
    for broken, what in (*rules, (not TRITON, "a machine without Triton")):
        if broken:
            return f"form='triton' does not cover {what}; form='chunked' does"
    if device.type != "cuda":
        from recur.kernels.chunk_scan import INTERPRETED

        if not INTERPRETED:
            return f"form='triton' needs a GPU, got tensors on {device.type}; form='chunked' runs anywhere"
    return None


def elementwise(rule: str, *inputs: Tensor | None, reverse: bool) -> ScanOut:
    """The scan called `rule`, "selective", "online" or "diagonal": its inputs in order, then the initial state."""
    from recur.kernels import walk

    return ScanOut(*getattr(walk, rule)(*inputs, reverse))


def takes_step(rows: int, state: Tensor, *given: Tensor | None) -> bool:
    """Whether one launch computes a step of these tensors: on a GPU, nothing in float64, at most 1024 rows of state."""
    narrow = all(x is None or x.dtype not in (torch.float64, torch.complex128) for x in (state, *given))
    return TRITON and state.is_cuda and narrow and rows <= 1024


def step(
    rule: str,
    state: Tensor,
    v: Tensor,
    *,
    q: Tensor | None = None,
    k: Tensor | None = None,
    log_decay: Tensor | None = None,
    rate: Tensor | None = None,
    bonus: Tensor | None = None,
    scale: float = 1.0,
    tied: bool = False,
) -> Tensor:
    """One token by the rule of that name in kernels/step.py, whose axes these are; the state is overwritten."""
    from recur.kernels import step as kernels

    return kernels.step(state, q, k, v, log_decay, rate, bonus, scale, rule, tied)


def scan(
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    bonus: Tensor | None = None,
    scale: float = 1.0,
    reverse: bool = False,
) -> ScanOut:
    """`recur.scan` by the Triton kernel; arguments as there, already checked. T is at least 1.

    Operands are read in their own dtype, the widest of q, k and v; states and gates are float32.
    """
    from recur.primitives.diagonal import right_to_left

    dtype = v.dtype
    for x in (q, k):
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    tokens = {"q": q.to(dtype), "v": v.to(dtype)}
    if k is not None:
        tokens["k"] = k.to(dtype)
    if log_decay is not None:
        if log_decay.ndim <= 2:
            log_decay = log_decay[None, None]
        tokens["log_decay"] = log_decay if log_decay.ndim == 4 else log_decay.unsqueeze(-1)

    def run(initial: Tensor | None, cu_seqlens: Tensor | None, **tokens: Tensor) -> ScanOut:
        return _turned(initial, cu_seqlens, scale, **tokens)

    y, state = (right_to_left(run) if reverse else run)(initial_state, cu_seqlens, **tokens)
    return ScanOut(y.to(v.dtype), state)


def _turned(
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    *,
    q: Tensor,
    v: Tensor,
    k: Tensor | None = None,
    log_decay: Tensor | None = None,
) -> ScanOut:
    """A complex gate is a real one on states twice as wide whose keys and queries are rotated by the phases so far."""
    from recur.primitives.outer import joined, stacked, to_heads

    if k is None or log_decay is None or not log_decay.is_complex():
        return _run(initial, cu_seqlens, scale, q=q, k=k, v=v, log_decay=log_decay)
    real, phase = log_decay.real, log_decay.imag
    # what is forgotten need not be turned, and owes the phase no gradient
    phase = phase.masked_fill(real.exp() == 0, 0).expand(-1, v.shape[1], -1, -1)
    # float64: the sum of many turns is known to their fraction only
    since = F.pad(phase.double().cumsum(1), (0, 0, 0, 0, 1, 0))
    since = (since - (since / (2 * torch.pi)).round().detach() * (2 * torch.pi)).float()
    cos, sin = since.cos(), since.sin()
    q, k = (to_heads(x, v.shape[2]).float() for x in (q, k))
    q, k = (torch.cat([x * cos[:, 1:], -x * sin[:, 1:]], -1).to(v.dtype) for x in (q, k))
    wide = real if real.shape[-1] == 1 else torch.cat([real, real], -1)
    turn = torch.complex(cos, sin).unsqueeze(-1)
    if cu_seqlens is None:
        first, last = turn[:, 0], turn[:, -1]
    else:
        first, last = turn[0].index_select(0, cu_seqlens[:-1]), turn[0].index_select(0, cu_seqlens[1:])
    initial = None if initial is None else stacked(initial * first.conj())
    y, state = _run(initial, cu_seqlens, scale, q=q, k=k, v=v, log_decay=wide)
    return ScanOut(y, joined(state) * last)


def _run(
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    *,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None,
) -> ScanOut:
    from recur.kernels.chunk_scan import chunk_scan

    k = None if k is None else k.contiguous()
    initial = None if initial is None else initial.float().contiguous()
    log_decay = None if log_decay is None else log_decay.contiguous()
    return ScanOut(*chunk_scan(q.contiguous(), k, v.contiguous(), log_decay, initial, cu_seqlens, scale))
