"""One token of a layer in one launch: kernels compiled from source that `recur.blocks.compose` writes for a recipe.

Such source loads what its parts read, computes them one after another in float32, and overwrites their states. Its
programs each have all K rows and BLOCK_V columns of the state of one head, or BLOCK_V channels where there is no such
state. What wants all channels of a row (a norm, the shift of a short convolution common to heads) is done by the
program of that row that ends last: it takes the last ticket.

The functions here are what the source may call; tensors are tiles of two axes, [K 1], [1 V], or [rows entries].
"""

# Jitted functions take no annotations but constexpr, and join tuples with +.
# ruff: noqa: RUF005
# mypy: disable-error-code="no-untyped-def, assignment, misc"

from __future__ import annotations

import linecache
from hashlib import sha256
from threading import Lock
from typing import Any

import torch
import triton
import triton.language as tl
from recur.kernels.decay import tied_key
from recur.kernels.norm import normed
from recur.kernels.operators import cdiv, operator, power_of_2, processors
from recur.kernels.pointwise import act_and_slope, bounded_gate, log_sigmoid
from recur.kernels.rotary import rotation
from recur.kernels.step import plan
from recur.kernels.tiles import LOG2E
from torch import Tensor


@triton.jit
def activate(z, ACT: tl.constexpr):
    """The pointwise function of that name in recur.primitives.gates."""
    if ACT == "relu" or ACT == "relu2":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if ACT == "relu2":
            z = z * z
    elif ACT == "tanh":
        z = 2 * tl.sigmoid(2 * z) - 1
    elif ACT == "exp":
        z = tl.exp2(z * LOG2E)
    elif ACT == "-exp":
        z = -tl.exp2(z * LOG2E)
    elif ACT == "softplus":
        z = -log_sigmoid(-z)
    else:
        z, _ = act_and_slope(z, ACT)
    return z


@triton.jit
def lower_bound(ptr, at, here, layer, DEPTH: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr):
    """The sum of softmax(logits [DEPTH WIDTH]) over `layer` layers from FIRST on, for channels `at`."""
    logits = ()
    for j in tl.static_range(DEPTH):
        logits = logits + (tl.load(ptr + j * WIDTH + at, mask=here, other=0.0).to(tl.float32),)
    top = logits[0]
    for j in tl.static_range(1, DEPTH):
        top = tl.maximum(top, logits[j])
    total, below = tl.zeros_like(top), tl.zeros_like(top)
    for j in tl.static_range(DEPTH):
        weight = tl.exp2((logits[j] - top) * LOG2E)
        total += weight
        if j >= FIRST:
            below += tl.where(j < FIRST + layer, weight, 0.0)
    return below / total


@triton.jit
def _expm1(x):
    """exp(x) - 1 in float64, by its series near 0 where the difference would cancel."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(tl.abs(x) < 1e-2, series, tl.exp(x) - 1)


@triton.jit
def grown(log_a, position):
    """sum over s <= position of exp(log_a (position - s)), log_a in float64."""
    return (_expm1(log_a * (position + 1)) / _expm1(log_a)).to(tl.float32)


@triton.jit
def low_rank(ptr, x_ptr, at, here, RANK: tl.constexpr, ACT: tl.constexpr):
    """Rows `at` [K 1] or [1 V] of a matrix [* RANK] times act(x) [RANK]."""
    total = tl.zeros(at.shape, tl.float32)
    for r in tl.static_range(RANK):
        x = activate(tl.load(x_ptr + r).to(tl.float32), ACT)
        total += x * tl.load(ptr + at * RANK + r, mask=here, other=0.0).to(tl.float32)
    return total


@triton.jit
def other_squares(k):
    """[K 1]: |k|² − k_n² for each row n of k [K 1], as a sum over the other rows, which loses no digit."""
    rows = tl.arange(0, k.shape[0])
    return tl.sum(tl.where(rows[:, None] == rows[None, :], 0.0, tl.trans(k * k)), 1)[:, None]


@triton.jit
def attend(
    keys, values, seen, q, k, v, rows, cols, in_k, in_v, scale, BLOCK_L: tl.constexpr
):  # keys and values: pointer, strides over slots and channels
    """[1 V]: the softmax of q [K 1] over `seen` slots and the token's own k [K 1] and v [1 V]."""
    k_ptr, k_l, k_k = keys
    v_ptr, v_l, v_v = values
    query = tl.trans(q) * scale  # [1 K]
    top = tl.sum(tl.sum(query * tl.trans(k), 1), 0)
    y, total = v, top * 0 + 1.0
    for start in range(0, seen, BLOCK_L):
        slot = start + tl.arange(0, BLOCK_L)[:, None]
        here = slot < seen
        key = tl.load(k_ptr + slot * k_l + tl.trans(rows) * k_k, mask=here & tl.trans(in_k), other=0.0).to(tl.float32)
        score = tl.where(here, tl.sum(key * query, 1)[:, None], float("-inf"))
        value = tl.load(v_ptr + slot * v_l + cols * v_v, mask=here & in_v, other=0.0).to(tl.float32)
        higher = tl.maximum(top, tl.max(tl.max(score, 1), 0))
        weight, keep = tl.exp2((score - higher) * LOG2E), tl.exp2((top - higher) * LOG2E)
        y = y * keep + tl.sum(weight * value, 0)[None, :]
        total = total * keep + tl.sum(tl.sum(weight, 1), 0)
        top = higher
    return y / total


_CALLED = (activate, attend, bounded_gate, grown, log_sigmoid, low_rank, lower_bound, normed, other_squares, rotation)
NAMES: dict[str, Any] = {f.__name__: f for f in (*_CALLED, tied_key)} | {"tl": tl, "LOG2E": LOG2E}
_KERNELS: dict[str, Any] = {}
_LOCK = Lock()


def kernel_of(source: str) -> str:
    """The name of the kernel that the function `layer` in this source is, compiled once per source."""
    name = f"layer_{sha256(source.encode()).hexdigest()[:16]}"
    with _LOCK:
        if name not in _KERNELS:
            file = f"recur_fused_step_{name}.py"
            # Triton reads the source of what it compiles; entries without a time are never looked for on the disk
            linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
            names = {**NAMES, "__name__": __name__}
            exec(compile(source, file, "exec"), names)
            _KERNELS[name] = triton.jit(names["layer"], do_not_specialize=["layer_index"])
    return name


@operator("fused_step", (
    "(Tensor x, Tensor[] given, Tensor(a!)[] written, str name, int[] numbers, int states, int K, int V, int row) "
    "-> ()"
), mutates=("written",))  # fmt: skip
def fused_step(
    x: Tensor, given: list[Tensor], written: list[Tensor], name: str, numbers: list[int],
    states: int, K: int, V: int, row: int,
) -> None:  # fmt: skip
    """Launch a kernel of `kernel_of` for the token x.

    given, written, numbers: the arguments of its source, in order; states: of K rows and V columns each, K 0 where
    there are none but channels; row: the entries that the last program of a row has at once.
    """
    for tensor in written:
        torch.autograd.graph.increment_version(tensor)
    if states == 0:
        return
    if K:
        _, block, warps = plan(states=states, K=K, V=V, processors=processors(x.device))
    else:
        block, warps = min(256, power_of_2(V)), 2
    warps = max(warps, min(8, row // 512))
    _KERNELS[name][(states * cdiv(V, block),)](
        *given, *written, *numbers, BLOCK_V=block, num_warps=warps, enable_fp_fusion=True
    )
