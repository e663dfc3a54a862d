"""The door to the Triton kernels: the only module that imports them, inside a function."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from recur.primitives.forms import ScanOut
from recur.primitives.operators import transformed

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
WIDEST = {"K": 512, "N": 256}  # rows of a state that fit the registers of one program; columns are cut up
STEPPED = 2048  # rows of one that a step overwrites


def rows_of(keys: int, number: torch.dtype) -> int:
    """Rows that as many keys have in a state: two of each if it is complex, for real and imaginary parts."""
    return 2 * keys if number.is_complex else keys


def refusal(number: torch.dtype, device: torch.device, **sizes: int) -> str | None:
    """Why form="triton" cannot compute a scan whose states are of these numbers and sizes, in words that name a form
    which can; None if it can. K is counted in rows of the state: see `rows_of`."""
    lacks = ["forward-mode derivatives and torch.func transforms"] * transformed() + ["float64"] * (number in WIDE)
    for axis, size in sizes.items():
        rows = rows_of(size, number) if axis == "K" else size
        if rows > WIDEST[axis]:
            two = f", for a complex state {rows} rows" if rows > size else ""
            lacks.append(f"{axis}={size}{two}, more than {WIDEST[axis]}")
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


def takes_step(keys: int, state: Tensor) -> bool:
    """Whether one launch computes a step: on a GPU, nothing in float64 (the state would be), few enough rows, no
    forward-mode derivative and no torch.func transform."""
    if TRITON is None or TRITON < OLDEST or not state.is_cuda or state.dtype in WIDE:
        return False
    return rows_of(keys, state.dtype) <= STEPPED and not transformed()


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
    from recur.kernels.operators import recorded
    from recur.kernels.scan import scan_forward
    from recur.primitives.outer import to_heads
    from recur.primitives.within import joined, stacked

    dtype = v.dtype
    for x in (q, k):
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    if log_decay is not None:
        log_decay = log_decay if log_decay.ndim == 4 else log_decay.unsqueeze(-1)
        if k is None and beta is not None:
            k = -torch.expm1(log_decay.float()).expand(*v.shape[:3], -1)
            q = to_heads(q, v.shape[2])
    if bonus is not None:
        bonus = bonus.float().reshape(v.shape[2], -1).expand(-1, q.shape[-1])
    q, k, w = q.to(dtype), None if k is None else k.to(dtype), v.to(dtype)
    before, turned, now = bonus is not None, log_decay is not None and log_decay.is_complex(), None
    if log_decay is not None and turned:
        log_decay = torch.view_as_real(log_decay.to(torch.complex64).resolve_conj())
        initial_state = None if initial_state is None else stacked(initial_state)
        if bonus is not None and k is not None:  # of plain keys and queries
            now = (to_heads(q, v.shape[2]).float() * to_heads(k, v.shape[2]) * bonus).sum(-1, keepdim=True) * scale * w
            bonus = None
    initial_state = None if initial_state is None else initial_state.float()
    tensors = (q, k, w, log_decay, beta, bonus, initial_state)
    y, state, _ = scan_forward(*tensors, cu_seqlens, scale, reverse, before, recorded(*tensors))
    y = y if now is None else y + now
    return ScanOut(y.to(v.dtype), joined(state) if turned else state)
