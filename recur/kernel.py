"""Dispatch to the Triton kernels: the only module that imports them, inside its functions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from recur.primitives.forms import NO_GPU, Refusal, ScanOut, chosen
from recur.primitives.layout import as_complex, as_real, to_heads
from recur.primitives.operators import transformed
from recur.shapes import PLAIN

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


def device_of(x: Tensor) -> torch.device:
    """Where a call on x runs: the device of x, or the one that `recur.explain` asks about with tensors without data."""
    if torch.compiler.is_compiling() or type(x) in PLAIN:
        return x.device
    return getattr(getattr(x, "fake_mode", None), "asked", None) or x.device


def uncovered(number: torch.dtype) -> tuple[str, str] | None:
    """What the kernels do not cover, whatever the sizes, and the remedy; None if nothing stands against them."""
    if transformed():
        return (
            "forward-mode derivatives and torch.func transforms",
            "call it outside of them; first derivatives suffice",
        )
    if number in WIDE:
        return "float64", "pass float32, bfloat16 or float16"
    if TRITON is None:
        return "a machine without Triton", "pip install triton"
    if TRITON < OLDEST:
        return "Triton {}.{}, older than {}.{}".format(*TRITON, *OLDEST), "pip install -U triton"
    return None


def refusal(
    number: torch.dtype, device: torch.device, lacks: tuple[str, str] | None = None, **sizes: int
) -> Refusal | None:
    """Why form="triton" cannot compute a scan whose states are of these numbers and sizes; None if it can.

    `lacks` is what no kernel has, and the remedy. K is counted in rows of the state: see `rows_of`.
    """
    lacks = lacks or uncovered(number)
    for axis, size in sizes.items():
        if lacks is None and 2 * size <= WIDEST[axis]:
            continue
        rows = rows_of(size, number) if axis == "K" else size
        if lacks is None and rows > WIDEST[axis]:
            two = f", for a complex state {rows} rows" if rows > size else ""
            most = WIDEST[axis] * size // rows
            heads = ": more heads of fewer keys" if axis == "K" else ""
            lacks = f"{axis}={size}{two}, more than {WIDEST[axis]}", f"{axis} at most {most}{heads}"
    if lacks is not None:
        return Refusal(f"form='triton' does not cover {lacks[0]}", "form='chunked' does", lacks[1])
    if device.type != "cuda" and not _interpreted():
        return NO_GPU._replace(reason=f"{NO_GPU.reason}, got tensors on {device.type}")
    return None


def elementwise(rule: str, *inputs: Tensor | None, cu_seqlens: Tensor | None, reverse: bool) -> ScanOut:
    """The scan called `rule`, "selective", "online" or "diagonal": its inputs in order, then the initial state."""
    if rule == "diagonal":
        from recur.kernels.diagonal import diagonal as run
    elif rule == "online":
        from recur.kernels.elementwise import online as run
    else:
        from recur.kernels.elementwise import selective as run
    return ScanOut(*run(*inputs, cu_seqlens, reverse))


def takes_step(keys: int, state: Tensor, lacks: tuple[str, str] | None = None) -> bool:
    """Whether one launch computes a step: on a GPU, nothing that no kernel has, nothing in float64 (the state would
    be), few enough rows, no forward-mode derivative and no torch.func transform."""
    if device_of(state).type != "cuda":
        return False
    lacks, rows = lacks or uncovered(state.dtype), rows_of(keys, state.dtype)
    if lacks is None and rows > STEPPED:
        lacks = f"a step of states with {rows} rows, more than {STEPPED}", "more heads of fewer keys"
    return _covered("step", lacks, True)


def without(function: str, form: str, x: Tensor, why: str, remedy: str) -> None:
    """Say that a call on x runs in torch, in this form or as a "torch" formula, because no kernel computes it.

    Args: why: "no kernel ..."; remedy: what has one.
    """
    refused = Refusal(why, "the formula in torch does", remedy)
    chosen(function, form, refused, device_of(x).type == "cuda")


def _covered(function: str, lacks: tuple[str, str] | None, on_gpu: bool) -> bool:
    """Whether a kernel that is not a scan covers a call; if not, a warning says why and names the remedy."""
    if lacks is None:
        return True
    refused = Refusal(f"its kernel does not cover {lacks[0]}", "the formula in torch does", lacks[1])
    chosen(function, "torch", refused, on_gpu)
    return False


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
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    bonus: Tensor | None = None,
    erase: Tensor | None = None,
    *,
    previous: bool = False,
    scale: float = 1.0,
    reverse: bool = False,
) -> ScanOut:
    """`recur.scan` by the Triton kernel; arguments as there, already checked, log_decay [B|1 T|1 H] or with an axis K.
    T is at least 1. An erase key removes under k; `previous`: it reads the state before the gate.

    Operands are read in their own dtype, the widest of q, k and v, to which erase is rounded; states and gates are
    float32.
    """
    from recur.kernels.scan import Tensors, scan

    plain = beta is None and bonus is None and erase is None
    if log_decay is not None and q.shape[-1] == v.shape[-1] == 1 and plain:
        return _one_number(initial_state, cu_seqlens, q, k, v, log_decay, scale=scale, reverse=reverse)
    dtype = v.dtype
    if q.dtype != dtype or (k is not None and k.dtype != dtype):
        for x in (q, k):
            dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
        q, k = q.to(dtype), None if k is None else k.to(dtype)
    w = v if v.dtype == dtype else v.to(dtype)
    before, rotated, now = bonus is not None, False, None
    if log_decay is not None:
        rotated = log_decay.is_complex()
        log_decay = log_decay if log_decay.ndim == 4 else log_decay.unsqueeze(-1)
        if k is None and beta is not None:
            k = (-torch.expm1(log_decay.float()).expand(*v.shape[:3], -1)).to(dtype)
            q = to_heads(q, v.shape[2])
    if erase is not None and k is not None:
        erase = erase.to(dtype)
        if not q.shape[2] == k.shape[2] == erase.shape[2]:
            q, k, erase = (to_heads(x, v.shape[2]) for x in (q, k, erase))
    if bonus is not None:
        bonus = bonus.float().reshape(v.shape[2], -1).expand(-1, q.shape[-1])
    if log_decay is not None and rotated:
        log_decay = torch.view_as_real(log_decay.to(torch.complex64).resolve_conj())
        initial_state = None if initial_state is None else as_real(initial_state)
        if bonus is not None and k is not None:  # of plain keys and queries
            now = (to_heads(q, v.shape[2]).float() * to_heads(k, v.shape[2]) * bonus).sum(-1, keepdim=True) * scale * w
            bonus = None
    if initial_state is not None and initial_state.dtype != torch.float32:
        initial_state = initial_state.float()
    x = Tensors(q, w, k, log_decay, beta, bonus, erase, initial_state, cu_seqlens)
    y, state, _ = scan(x, scale, reverse, before, previous)
    if now is not None:
        y = y + now
    return ScanOut(y if y.dtype == v.dtype else y.to(v.dtype), as_complex(state) if rotated else state)


def _one_number(
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    reverse: bool,
) -> ScanOut:
    """`scan` of states of one number per head, as GateLoop's: the diagonal scan, whose tiles it fills.

    A tile of the matrix scan has 64 rows and 64 columns at least, of which one entry would be used.
    """
    gate = log_decay if log_decay.ndim == 4 else log_decay.unsqueeze(-1)
    key = -torch.expm1(gate.float()) if k is None else to_heads(k, v.shape[2])
    written = key.float() * v
    initial = None if initial_state is None else initial_state.squeeze(-1)
    h, state = elementwise(
        "diagonal", written, gate.expand(written.shape), initial, cu_seqlens=cu_seqlens, reverse=reverse
    )
    y = (h.real if h.is_complex() else h) * to_heads(q, v.shape[2])
    return ScanOut((y if scale == 1.0 else y * scale).to(v.dtype), state.unsqueeze(-1))


def steps_fused(x: Tensor) -> bool:
    """Whether a layer's parts may be one kernel in a step (recur.blocks.compose) that computes the token x."""
    return fused("auto", x)


def fused_step(
    x: Tensor, given: list[Tensor], written: list[Tensor], numbers: list[int], source: str, *sizes: int
) -> None:
    """Launch the kernel that is written in `source` for the token x; the rest is as in kernels/fused_step.py."""
    from recur.kernels import fused_step as kernels

    kernels.fused_step(x, given, written, kernels.kernel_of(source), numbers, *sizes)


GATES = ("identity", "silu", "sigmoid", "gelu")  # activations that kernels around the scans know
ROWS = "rows that are too long, or an eps per row that wants a gradient", "norm in groups, detach eps"
FUSED = (torch.float32, torch.bfloat16, torch.float16)


def fused(
    form: str, *tensors: Tensor | None, of: str = "", lacks: tuple[str, str] | None = None, compiler: bool = False
) -> bool:
    """Whether the kernels around the scans (norms, gates, short convolutions) compute a call.

    They do in form="auto" on a GPU and in form="triton" wherever kernels run, for real numbers up to float32. All other
    calls take the formula in torch, which has second derivatives and torch.func's transforms as well.

    Args:
        of:       the function that is called, for who asks what was taken; nothing is said without it.
        lacks:    what the kernel does not cover of this call, and the remedy.
        compiler: whether torch.compile does better with the formula, which it fuses with what surrounds it.
    """
    if form not in ("auto", "triton"):
        return False
    first = next(x for x in tensors if x is not None)
    on_gpu = device_of(first).type == "cuda"
    if not on_gpu and form == "auto":
        return False
    given, compiling = [x for x in tensors if x is not None], torch.compiler.is_compiling()
    if (compiling and compiler and on_gpu) or first.numel() == 0:
        return False
    other = next((x.dtype for x in given if x.dtype not in FUSED), None)
    if not on_gpu and (TRITON is None or TRITON < OLDEST or not _interpreted()):
        return False
    if lacks is None and (other is not None or not compiling):
        lacks = uncovered(torch.float32 if other is None else other)
    if lacks is None and other is not None:
        lacks = str(other).removeprefix("torch."), "pass float32, bfloat16 or float16"
    return _covered(of, lacks, on_gpu) if of else lacks is None


def lacks_act(act: str) -> tuple[str, str] | None:
    """For `fused`: of activations, what kernels do not cover."""
    return None if act in GATES else (f"act={act!r}", f"act one of {', '.join(GATES)}")


def _interpreted() -> bool:
    from recur.kernels.scan import INTERPRETED

    return INTERPRETED


def rows(x: Tensor, axes: int, groups: int, eps: float | Tensor) -> tuple[int, int] | None:
    """Channels of a token and entries of a row, where kernels/norm.py normalises the last `axes` of x in groups.

    None if it does not: where rows are longer than its widest, or where eps is neither a number nor one per row.
    """
    from recur.kernels.norm import WIDEST

    first = x.ndim - axes
    entries = x.shape[first:].numel() // groups
    if isinstance(eps, Tensor):
        each = eps.shape[: eps.ndim - axes]
        lead = x.shape[first - len(each) : first]
        constant = next((i for i, size in enumerate(each) if size != 1), len(each))
        per_row = (
            groups == 1 and 0 < len(each) <= first and each[constant:] == lead[constant:] and not eps.requires_grad
        )
        if not per_row or eps.shape[eps.ndim - axes :].numel() != 1:
            return None
    return (x.shape[min(2, first) :].numel(), entries) if 0 < entries <= WIDEST else None


def norm(x: Tensor, **options: Any) -> Tensor:
    """Skip, norm and gate of kernels/norm.py, whose arguments these are."""
    from recur.kernels.norm import norm

    return norm(x, **options)


def activate(z: Tensor, bias: Tensor | None, fn: str, scale: float = 1.0) -> Tensor:
    """scale f(z + b) in float32, f "sigmoid", "softplus" or "log_sigmoid"; z [B T *], b [*]."""
    from recur.kernels.pointwise import activate

    return activate(z, bias, fn, scale)


def polar(real: Tensor, imag: Tensor) -> Tensor:
    """log sigmoid |c| + i arg c, complex64, of c = real + i imag [B T *]."""
    from recur.kernels.pointwise import polar

    return polar(real, imag)


def bounded(z: Tensor, bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """log a in float32 and 1 - a in the dtype of z, for a = g + (1 - g) sigmoid(z); z [B T *], g [*]."""
    from recur.kernels.pointwise import bounded

    return bounded(z, bound)


def conv(
    xs: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    act: str,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The short convolution of kernels/conv.py, whose arguments these are."""
    from recur.kernels.conv import conv

    return conv(xs, weight, bias, initial, cu_seqlens, act)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-log softmax at the target of every row [N V], float32, 0 where that is negative; logits become its gradient."""
    from recur.kernels.loss import cross_entropy

    return cross_entropy(logits, target)


def rotate(x: Tensor, position: Tensor, frequencies: Tensor, halves: bool) -> Tensor:
    """x [B T H K] rotated by position [B|1 T] times float64 frequencies [K/2]; pairs are halves, or neighbours."""
    from recur.kernels.rotary import rotate

    y: Tensor = rotate(x, position, frequencies.double(), halves, False)
    return y


def weigh(u: Tensor, w: Tensor) -> Tensor:
    """w u in the dtype of u; u [B T H P], w [B T H]."""
    from recur.kernels.pointwise import weigh

    return weigh(u, w)
