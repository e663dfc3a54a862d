"""One token of every recurrence in one launch: the state is read once and overwritten in place.

    S <- A ∘ S + k uᵀ        y = scale Re(S)ᵀ q, or scale Re(S_before + diag(bonus) k vᵀ)ᵀ q

Legend. B batch, H heads, K rows and V columns of a state S. What varies over some of them only has size 1 elsewhere.
Operands come with strides, 0 where one entry serves all, so views cost nothing. A program owns all rows of BLOCK_V
columns of one state. Complex numbers travel as int64 and are computed in two planes.

    rule         gate A                          write u                     members
    outer        exp(log_a)                      v                           linear attention to GateLoop, S4D, HGRN
    delta        exp(log_a)                      rate (v − Re(A ∘ S)ᵀ k)     DeltaNet and its gated relatives
    exact        1                               eps (v − Sᵀ k)              Longhorn with the whole k kᵀ
    online       1 − eps k² = kept + eps others  eps v                       Longhorn; others_n = |k|² − k_n²
    selective    exp(rate log_a)                 rate v                      Mamba; rate is its delta

kept = 1 / (1 + rate |k|²), eps = rate kept. All is computed in float32, whatever the state is kept in.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from recur.kernels.operators import cdiv, fake, operator, power_of_2, processors
from recur.kernels.tiles import cos_sin, tied
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _planes(x):
    """Real and imaginary part."""
    if x.dtype == tl.int64:
        re = x.to(tl.int32).to(tl.float32, bitcast=True)
        im = (x >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        re = x.to(tl.float32)
        im = tl.zeros_like(re)
    return re, im


@triton.jit
def _load(ptr, rows, cols, K, V, stride_k, stride_v: tl.constexpr):
    """Planes of an operand, [K V] if it differs from column to column and [K 1] if it does not.

    Vectors are loaded with one axis, so that their way into memory does not decide how the lanes share the state.
    """
    if stride_v == 0:
        re, im = _planes(tl.load(ptr + rows * stride_k, mask=rows < K, other=0))
        re, im = re[:, None], im[:, None]
    else:
        here = (rows < K)[:, None] & (cols < V)[None, :]
        re, im = _planes(tl.load(ptr + (rows * stride_k)[:, None] + (cols * stride_v)[None, :], mask=here, other=0))
    return re, im


@triton.jit
def _store(ptrs, re, im, mask):
    if ptrs.dtype.element_ty == tl.int64:
        low, high = re.to(tl.uint32, bitcast=True).to(tl.uint64), im.to(tl.uint32, bitcast=True).to(tl.uint64)
        tl.store(ptrs, (low | (high << 32)).to(tl.int64, bitcast=True), mask=mask)
    else:
        tl.store(ptrs, re.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _others(k_ptr, rows, stride_k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """[K 1], the sum of the other rows' k². Summed, not subtracted: no digit is lost."""
    others, offs = tl.zeros([BLOCK_K], tl.float32), tl.arange(0, 16)
    for start in range(0, K, 16):
        slot = start + offs
        k = tl.load(k_ptr + slot * stride_k, mask=slot < K, other=0).to(tl.float32)
        others += tl.sum(tl.where(rows[:, None] == slot[None, :], 0.0, (k * k)[None, :]), 1)
    return others[:, None]


@triton.jit
def _step(
    state_ptr, q_ptr, k_ptr, v_ptr, log_a_ptr, rate_ptr, bonus_ptr, y_ptr,
    state_b, state_h, state_k, state_v, q_b, q_h, q_k, k_b, k_h, k_k, v_b, v_h, v_v, a_b, a_h, a_k,  # strides
    rate_b, rate_h, bonus_h, bonus_k, scale,
    q_v: tl.constexpr, k_v: tl.constexpr, a_v: tl.constexpr, rate_v: tl.constexpr,  # strides, most of them 0
    GROUP: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,  # GROUP heads share q and k
    RULE: tl.constexpr, TIED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: all K rows and BLOCK_V columns of the state of one head."""
    pid = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    tile, b, h = pid % tiles, pid // tiles // H, pid // tiles % H
    g = h // GROUP
    rows, cols = tl.arange(0, BLOCK_K).to(tl.int64), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = cols < V
    here = (rows < K)[:, None] & in_v[None, :]
    state_ptrs = state_ptr + b * state_b + h * state_h + (rows * state_k)[:, None] + (cols * state_v)[None, :]
    COMPLEX: tl.constexpr = state_ptr.dtype.element_ty == tl.int64
    S, S_im = _planes(tl.load(state_ptrs, mask=here, other=0))  # [K V]
    v, u_im = _planes(tl.load(v_ptr + b * v_b + h * v_h + cols * v_v, mask=in_v, other=0))
    v, u_im = v[None, :], u_im[None, :]

    log_a = v
    kept, kept_im = S, S_im
    if log_a_ptr is not None:
        log_a, phase = _load(log_a_ptr + b * a_b + h * a_h, rows, cols, K, V, a_k, a_v)
        if RULE != "selective":
            a = tl.exp2(log_a * LOG2E)
            if log_a_ptr.dtype.element_ty == tl.int64:
                cos, sin = cos_sin(phase)
                turn, turn_im = a * cos, a * sin
                kept, kept_im = turn * S - turn_im * S_im, turn * S_im + turn_im * S
            else:
                kept, kept_im = a * S, a * S_im
    k, k_im = v, v
    if TIED:
        k = tied(log_a)
    elif k_ptr is not None:
        k, k_im = _load(k_ptr + b * k_b + g * k_h, rows, cols, K, V, k_k, k_v)

    u = v
    if rate_ptr is not None:
        rate = tl.load(rate_ptr + b * rate_b + h * rate_h + cols * rate_v, mask=in_v, other=0).to(tl.float32)[None, :]
        if RULE == "selective":
            kept = tl.exp2(rate * (log_a * LOG2E)) * S
        if RULE == "online" or RULE == "exact":
            share = 1 / (1 + rate * tl.sum(k * k, 0)[None, :])
            rate = rate * share
            if RULE == "online":
                kept = (share + rate * _others(k_ptr + b * k_b + g * k_h, rows, k_k, K, BLOCK_K)) * S
        if RULE == "delta" or RULE == "exact":
            u = rate * (v - tl.sum(kept * k, 0)[None, :])
        else:
            u = rate * v

    new, new_im = kept + u, kept_im + u_im
    if TIED or k_ptr is not None:
        new = kept + k * u
        if COMPLEX:
            if k_ptr.dtype.element_ty == tl.int64:
                new, new_im = new - k_im * u_im, kept_im + k * u_im + k_im * u
            else:
                new_im = kept_im + k * u_im
    _store(state_ptrs, new, new_im, here)

    y_ptrs = y_ptr + (b * H + h) * V + cols
    if q_ptr is None:
        _store(y_ptrs, tl.sum(new, 0), tl.sum(new_im, 0), in_v)
    else:
        q, q_im = _load(q_ptr + b * q_b + g * q_h, rows, cols, K, V, q_k, q_v)
        read = new
        if bonus_ptr is not None:
            bonus = tl.load(bonus_ptr + h * bonus_h + rows * bonus_k, mask=rows < K, other=0).to(tl.float32)
            read = S + bonus[:, None] * k * v
        read = q * read
        if q_ptr.dtype.element_ty == tl.int64:
            read -= q_im * new_im
        y = scale * tl.sum(read, 0)
        _store(y_ptrs, y, y, in_v)


class Plan(NamedTuple):
    """A program's tile of a state, and its warps."""

    block_k: int
    block_v: int
    warps: int


def plan(*, states: int, K: int, V: int, planes: int = 1, processors: int = 132) -> Plan:
    """Tiles of 2048 numbers, or of 32 columns (128 bytes of a row) where 4096 numbers hold them; twice as wide where
    every processor then still has 16 programs, narrower where it has not two. Complex numbers have two planes.

    By trial on an H100.
    """
    block_k = power_of_2(K)
    block_v = min(power_of_2(V), max(32, 2048 // block_k), max(1, 4096 // block_k // planes), 1024)
    warps = min(4, max(1, block_k * block_v // 256))
    if 2 * block_v <= V and states * cdiv(V, 2 * block_v) >= 16 * processors:
        return Plan(block_k, 2 * block_v, 2 * warps)
    while block_v > 16 and states * cdiv(V, block_v) < 2 * processors:
        block_v //= 2
    return Plan(block_k, block_v, min(warps, max(1, block_k * block_v // 256)))


def _strides(x: Tensor | None) -> list[int]:
    """What to add for the next entry along each of four axes: nothing where all share one."""
    return [0] * 4 if x is None else [0 if n == 1 else step for n, step in zip(x.shape, x.stride(), strict=True)]


def _numbers(x: Tensor | None) -> Tensor | None:
    """Complex numbers as int64."""
    return x.resolve_conj().view(torch.int64) if x is not None and x.is_complex() else x


def _answer(state: Tensor, q: Tensor | None, v: Tensor) -> Tensor:
    """Room for y: a state that is not read is the answer itself."""
    dtype = state.dtype if q is None and state.is_complex() else v.dtype
    return torch.empty(state.shape[0], state.shape[1], state.shape[3], dtype=dtype, device=state.device)


@operator("step", mutates=("state",))
def step(
    state: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None,
    rate: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    rule: str,
    tied: bool,
) -> Tensor:
    """One token by the rule of that name; the state is overwritten.

    Args: state [B H K V] float32, bfloat16 or complex64; q, k [B|1 G|1 K V|1], head h reads group h // (H/G), None for
        ones (with tied, k is 1 − exp(log_decay)); v [B H 1 V]; log_decay [B|1 H|1 K|1 V|1]; rate [B H 1 V|1];
        bonus [1 H K|1 1]. Any strides. Complex values need a complex state.
    Returns: y [B H V] of v's dtype; of the state's without q.
    """
    torch.autograd.graph.increment_version(state)
    (B, H, K, V), y = state.shape, _answer(state, q, v)
    if y.numel() == 0:
        return y
    tile = plan(states=B * H, K=K, V=V, planes=1 + state.is_complex(), processors=processors(v.device))
    group = H // (H if q is None and k is None else max(1 if x is None else x.shape[1] for x in (q, k)))
    tensors = (state, q, k, v, log_decay, rate, bonus, y)
    (*qs, q_v), (*ks, k_v), (*vs, _, v_v), (*decays, a_v), (*rates, _, rate_v), (_, *weights, _) = map(
        _strides, tensors[1:-1]
    )
    _step[(cdiv(V, tile.block_v) * B * H,)](
        *(map(_numbers, tensors) if state.is_complex() else tensors), *state.stride(), *qs, *ks, *vs, v_v, *decays,
        *rates, *weights, scale, q_v, k_v, a_v, rate_v,
        group, H, K, V, RULE=rule, TIED=tied, BLOCK_K=tile.block_k, BLOCK_V=tile.block_v, num_warps=tile.warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y


@fake("step")
def _(state, q, k, v, log_decay, rate, bonus, scale, rule, tied):
    return _answer(state, q, v)
