"""The door to the Triton kernels: the only module that imports them, inside a function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from recur.primitives.forms import ScanOut

OLDEST = (3, 4)  # the first Triton that compiles all kernels


def installed() -> tuple[int, ...] | None:
    """The version of Triton, by the names it is packaged under."""
    for name in ("triton", "pytorch-triton"):
        try:
            return tuple(int(part) for part in version(name).split(".")[:2])
        except PackageNotFoundError:
            pass
    return None


TRITON = installed()
WIDE = (torch.float64, torch.complex128)
WIDEST = 256  # rows and columns of a state that fit the registers of one program


def refusal(number: torch.dtype, device: torch.device, **sizes: int) -> str | None:
    """Why form="triton" cannot compute a scan whose states are of these numbers and sizes, in words that name a form
    which can; None if it can."""
    wide = [f"{axis}={size}, more than {WIDEST}" for axis, size in sizes.items() if size > WIDEST]
    lacks = ["float64"] * (number in WIDE) + wide
    if TRITON is None:
        lacks.append("a machine without Triton")
    elif TRITON < OLDEST:
        lacks.append("Triton {}.{}, older than {}.{}".format(*TRITON, *OLDEST))
    if lacks:
        return f"form='triton' does not cover {lacks[0]}; form='chunked' does"
    if device.type != "cuda":
        from recur.kernels.scan import INTERPRETED

        if not INTERPRETED:
            return f"form='triton' needs a GPU, got tensors on {device.type}; form='chunked' runs anywhere"
    return None


def elementwise(rule: str, *inputs: Tensor | None, cu_seqlens: Tensor | None, reverse: bool) -> ScanOut:
    """The scan called `rule`, "selective", "online" or "diagonal": its inputs in order, then the initial state."""
    from recur.kernels import diagonal, walk

    scans = {"selective": walk.selective, "online": walk.online, "diagonal": diagonal.diagonal}
    return ScanOut(*scans[rule](*inputs, cu_seqlens, reverse))


def takes_step(rows: int, state: Tensor) -> bool:
    """Whether one launch computes a step: on a GPU, nothing in float64 (the state would be), at most 1024 rows."""
    return TRITON is not None and TRITON >= OLDEST and state.is_cuda and state.dtype not in WIDE and rows <= 1024


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

    with torch.no_grad():
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
    """`recur.scan` by the Triton kernel; arguments as there, already checked, log_decay [B|1 T|1 H] or with an axis K.
    T is at least 1.

    Operands are read in their own dtype, the widest of q, k and v; states and gates are float32.
    """
    from recur.primitives.outer import to_heads

    dtype = v.dtype
    for x in (q, k):
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    if log_decay is not None:
        log_decay = log_decay if log_decay.ndim == 4 else log_decay.unsqueeze(-1)
        if k is None and beta is not None:
            k = -torch.expm1(log_decay.float()).expand(*v.shape[:3], -1)
            q = to_heads(q, v.shape[2])
    if bonus is not None:
        bonus = bonus.float().reshape(v.shape[2], -1).expand(-1, q.shape[-1]).contiguous()
    q, k, w = q.to(dtype), None if k is None else k.to(dtype), v.to(dtype)
    run = partial(_run, cu_seqlens, scale, reverse, v=w, beta=beta)
    if log_decay is not None and log_decay.is_complex() and k is not None:
        out = _turned(run, initial_state, cu_seqlens, scale, reverse, q, k, w, log_decay, bonus)
    else:
        out = run(initial_state, q=q, k=k, log_decay=log_decay, bonus=bonus)
    return ScanOut(out.y.to(v.dtype), out.state)


def _turned(
    run: Callable[..., ScanOut],
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
) -> ScanOut:
    """A complex gate is a real one on states twice as wide whose keys and queries are rotated by the phases so far."""
    from recur.kernels.turn import turned
    from recur.primitives.outer import to_heads
    from recur.primitives.within import joined, stacked

    pairs = torch.view_as_real(log_decay.to(torch.complex64).resolve_conj().contiguous())
    told, write, wide, turns, whole, _ = turned(
        q.contiguous(), k.contiguous(), pairs, cu_seqlens, bonus is not None, reverse
    )
    if not wide.numel():
        wide = log_decay.real if log_decay.shape[-1] == 1 else torch.cat([log_decay.real, log_decay.real], -1)
    if initial is not None:
        initial = stacked(initial * torch.complex(whole.cos(), -whole.sin()).unsqueeze(-1))
    none = None if bonus is None else torch.zeros_like(bonus).repeat(1, 2)
    y, state = run(initial, q=told, k=write, log_decay=wide, bonus=none, turns=turns)
    if bonus is not None:
        q, k = (to_heads(x, v.shape[2]).float() for x in (q, k))
        y = y + (q * k * bonus).sum(-1, keepdim=True) * scale * v
    return ScanOut(y, joined(state))


def _run(
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    initial: Tensor | None,
    *,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    bonus: Tensor | None,
    turns: Tensor | None = None,
) -> ScanOut:
    from recur.kernels.operators import recorded
    from recur.kernels.scan import scan_forward

    k, log_decay, beta = (None if x is None else x.contiguous() for x in (k, log_decay, beta))
    initial = None if initial is None else initial.float().contiguous()
    tensors = (q.contiguous(), k, v.contiguous(), log_decay, beta, bonus, initial, turns)
    y, state, *_ = scan_forward(*tensors, cu_seqlens, scale, reverse, recorded(*tensors))
    return ScanOut(y, state)
