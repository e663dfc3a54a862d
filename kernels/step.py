"""One token of every recurrence in one launch: the state is read once and overwritten in place.

    S <- A ∘ S + k uᵀ        y = scale Re(S)ᵀ q, or with a bonus scale Re(S_before + diag(bonus) k vᵀ)ᵀ q

B batch, H heads, K rows and V columns of a state S. An operand has size 1 on axes over which it does not vary.
Operands come with strides, 0 where one entry serves all, so views cost nothing. A program owns all rows of BLOCK_V
columns of one state. Complex numbers are passed as int64 and computed in two planes.

    rule         gate A                          written u                   members
    outer        exp(log_a)                      v                           linear attention to GateLoop, S4D, HGRN
    delta        exp(log_a)                      rate (v − Re(A ∘ S)ᵀ k)     DeltaNet and its gated relatives
    exact        1                               eps (v − Sᵀ k)              Longhorn with the full matrix k kᵀ
    online       1 − eps k² = kept + eps others  eps v                       Longhorn; others_n = |k|² − k_n²
    selective    exp(rate log_a)                 rate v                      Mamba; rate is its delta

kept = 1 / (1 + rate |k|²), eps = rate kept. All is computed in float32, whatever the dtype of the state.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from recur.kernels.decay import tied_key
from recur.kernels.operators import cdiv, fake, operator, power_of_2, processors
from recur.kernels.tiles import LOG2E, constants, cos_sin, pack_complex, unpack_complex
from torch import Tensor


class ColumnStrides(NamedTuple):
    """Strides over columns of the state, known when the program is compiled: most are 0."""

    q: int
    k: int
    log_a: int
    rate: int


@triton.jit
def _load(ptr, rows, cols, K, V, stride_k, stride_v: tl.constexpr):
    """Planes of an operand, [K V] if it differs from column to column, else [K 1].

    Vectors are loaded with one axis, so that their layout in memory does not decide how lanes share the state.
    """
    if stride_v == 0:
        re, im = unpack_complex(tl.load(ptr + rows * stride_k, mask=rows < K, other=0))
        re, im = re[:, None], im[:, None]
    else:
        here = (rows < K)[:, None] & (cols < V)[None, :]
        re, im = unpack_complex(
            tl.load(ptr + (rows * stride_k)[:, None] + (cols * stride_v)[None, :], mask=here, other=0)
        )
    return re, im


@triton.jit
def _store(ptrs, re, im, mask):
    if ptrs.dtype.element_ty == tl.int64:
        tl.store(ptrs, pack_complex(re, im), mask=mask)
    else:
        tl.store(ptrs, re.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _other_squares(k_ptr, rows, stride_k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """[K 1]: |k|² − k_n² for each row n, as a sum over the other rows, which loses no digit by subtraction."""
    others, offs = tl.zeros([BLOCK_K], tl.float32), tl.arange(0, 16)
    for start in range(0, K, 16):
        slot = start + offs
        k = tl.load(k_ptr + slot * stride_k, mask=slot < K, other=0).to(tl.float32)
        others += tl.sum(tl.where(rows[:, None] == slot[None, :], 0.0, (k * k)[None, :]), 1)
    return others[:, None]


@triton.jit
def _step(
    state, q, k, v, log_a, rate, bonus,  # each a pointer, None if there is none, and strides, as unpacked below
    y_ptr, scale,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    RULE: tl.constexpr, TIED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program: all K rows and BLOCK_V columns of the state of one head; GROUP heads share q and k."""
    state_ptr, state_b, state_h, state_k, state_v = state
    q_ptr, q_b, q_h, q_k = q
    k_ptr, k_b, k_h, k_k = k
    v_ptr, v_b, v_h, v_v = v
    log_a_ptr, a_b, a_h, a_k = log_a
    rate_ptr, rate_b, rate_h = rate
    bonus_ptr, bonus_h, bonus_k = bonus
    pid = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    tile, b, h = pid % tiles, pid // tiles // H, pid // tiles % H
    g = h // GROUP
    rows, cols = tl.arange(0, BLOCK_K).to(tl.int64), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = cols < V
    here = (rows < K)[:, None] & in_v[None, :]
    state_ptrs = state_ptr + b * state_b + h * state_h + (rows * state_k)[:, None] + (cols * state_v)[None, :]
    COMPLEX: tl.constexpr = state_ptr.dtype.element_ty == tl.int64
    S, S_im = unpack_complex(tl.load(state_ptrs, mask=here, other=0))  # [K V]
    value, u_im = unpack_complex(tl.load(v_ptr + b * v_b + h * v_h + cols * v_v, mask=in_v, other=0))
    value, u_im = value[None, :], u_im[None, :]

    log_gate = value
    kept, kept_im = S, S_im
    if log_a_ptr is not None:
        log_gate, phase = _load(log_a_ptr + b * a_b + h * a_h, rows, cols, K, V, a_k, COLUMNS.log_a)
        if RULE != "selective":
            a = tl.exp2(log_gate * LOG2E)
            if log_a_ptr.dtype.element_ty == tl.int64:
                cos, sin = cos_sin(phase)
                gate, gate_im = a * cos, a * sin
                kept, kept_im = gate * S - gate_im * S_im, gate * S_im + gate_im * S
            else:
                kept, kept_im = a * S, a * S_im
    key, key_im = value, value
    if TIED:
        key = tied_key(log_gate)
    elif k_ptr is not None:
        key, key_im = _load(k_ptr + b * k_b + g * k_h, rows, cols, K, V, k_k, COLUMNS.k)

    u = value
    if rate_ptr is not None:
        eps = tl.load(rate_ptr + b * rate_b + h * rate_h + cols * COLUMNS.rate, mask=in_v, other=0)
        eps = eps.to(tl.float32)[None, :]
        if RULE == "selective":
            kept = tl.exp2(eps * (log_gate * LOG2E)) * S
        if RULE == "online" or RULE == "exact":
            kept_rate = 1 / (1 + eps * tl.sum(key * key, 0)[None, :])
            eps = eps * kept_rate
            if RULE == "online":
                kept = (kept_rate + eps * _other_squares(k_ptr + b * k_b + g * k_h, rows, k_k, K, BLOCK_K)) * S
        if RULE == "delta" or RULE == "exact":
            u = eps * (value - tl.sum(kept * key, 0)[None, :])
        else:
            u = eps * value

    new, new_im = kept + u, kept_im + u_im
    if TIED or k_ptr is not None:
        new = kept + key * u
        if COMPLEX:
            if k_ptr.dtype.element_ty == tl.int64:
                new, new_im = new - key_im * u_im, kept_im + key * u_im + key_im * u
            else:
                new_im = kept_im + key * u_im
    _store(state_ptrs, new, new_im, here)

    y_ptrs = y_ptr + (b * H + h) * V + cols
    if q_ptr is None:
        _store(y_ptrs, tl.sum(new, 0), tl.sum(new_im, 0), in_v)
    else:
        query, query_im = _load(q_ptr + b * q_b + g * q_h, rows, cols, K, V, q_k, COLUMNS.q)
        read = new
        if bonus_ptr is not None:
            weight = tl.load(bonus_ptr + h * bonus_h + rows * bonus_k, mask=rows < K, other=0).to(tl.float32)
            read = S + weight[:, None] * key * value
        read = query * read
        if q_ptr.dtype.element_ty == tl.int64:
            read -= query_im * new_im
        y = scale * tl.sum(read, 0)
        _store(y_ptrs, y, y, in_v)


class Plan(NamedTuple):
    """A program's tile of a state, and its warps."""

    block_k: int
    block_v: int
    warps: int


def plan(*, states: int, K: int, V: int, planes: int = 1, processors: int = 132) -> Plan:
    """Tiles of 2048 numbers, or of 32 columns (128 bytes of a row) where 4096 numbers hold them; twice as wide where
    every processor then still has 16 programs, narrower where it would have fewer than two. Complex numbers have two
    planes. Measured on an H100.
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
    """Strides over four axes, 0 where all positions share one entry."""
    return [0] * 4 if x is None else [0 if n == 1 else step for n, step in zip(x.shape, x.stride(), strict=True)]


def _as_int64(x: Tensor | None) -> Tensor | None:
    """Complex numbers as int64."""
    return x.resolve_conj().view(torch.int64) if x is not None and x.is_complex() else x


def _output(state: Tensor, q: Tensor | None, v: Tensor) -> Tensor:
    """Room for y; without q it is the state itself."""
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
    """One token by the rule of this name; the state is overwritten.

    Args: state [B H K V] float32, bfloat16 or complex64; q, k [B|1 G|1 K V|1], head h reads group h // (H/G), None for
        ones (with tied, k is 1 − exp(log_decay)); v [B H 1 V]; log_decay [B|1 H|1 K|1 V|1]; rate [B H 1 V|1];
        bonus [1 H K|1 1]. Any strides. Complex values need a complex state.
    Returns: y [B H V] of v's dtype; of the state's without q.
    """
    torch.autograd.graph.increment_version(state)
    (B, H, K, V), y = state.shape, _output(state, q, v)
    if y.numel() == 0:
        return y
    tile = plan(states=B * H, K=K, V=V, planes=1 + state.is_complex(), processors=processors(v.device))
    group = H // (H if q is None and k is None else max(1 if x is None else x.shape[1] for x in (q, k)))
    tensors = (state, q, k, v, log_decay, rate, bonus, y)
    (*qs, q_v), (*ks, k_v), (*vs, _, v_v), (*decays, a_v), (*rates, _, rate_v), (_, *weights, _) = map(
        _strides, tensors[1:-1]
    )
    if state.is_complex():
        tensors = tuple(map(_as_int64, tensors))  # type: ignore[assignment]
    _step[(cdiv(V, tile.block_v) * B * H,)](
        state=(tensors[0], *state.stride()), q=(tensors[1], *qs), k=(tensors[2], *ks), v=(tensors[3], *vs, v_v),
        log_a=(tensors[4], *decays), rate=(tensors[5], *rates), bonus=(tensors[6], *weights), y_ptr=tensors[7],
        scale=scale, COLUMNS=constants(ColumnStrides(q_v, k_v, a_v, rate_v)), GROUP=group, H=H, K=K, V=V, RULE=rule,
        TIED=tied, BLOCK_K=tile.block_k, BLOCK_V=tile.block_v, num_warps=tile.warps,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y


@fake("step")
def _(state, q, k, v, log_decay, rate, bonus, scale, rule, tied):
    return _output(state, q, v)
