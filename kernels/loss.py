"""Cross-entropy of rows of logits; the gradient overwrites the logits.

    loss_i = log sum_v exp(z_iv) - z_i,target        dz_iv = softmax(z_i)_v - [v = target]

A program reads its row twice, from the cache the second time. Arithmetic is float32.
"""

# Jitted functions take no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from recur.kernels.operators import fake, operator, power_of_2
from recur.kernels.tiles import LOG2E
from torch import Tensor

BLOCK = 4096


@triton.jit(do_not_specialize=["V"])
def _cross_entropy(z_ptr, target_ptr, loss_ptr, V, stride, BLOCK_V: tl.constexpr):
    """One row, in units of log 2: its greatest logit and the sum of exponentials, block by block, then its gradient."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    target = tl.load(target_ptr + row)
    greatest, total = tl.full((BLOCK_V,), float("-inf"), tl.float32), tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        z = tl.load(z_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32) * LOG2E
        above = tl.maximum(greatest, z)
        base = tl.where(above == float("-inf"), 0.0, above)  # of a lane without a finite logit
        total = total * tl.exp2(greatest - base) + tl.exp2(z - base)
        greatest = above
    top = tl.max(greatest, 0)
    base = tl.where(greatest == float("-inf"), 0.0, greatest)
    total = tl.where(greatest == float("-inf"), total, total * tl.exp2(base - top))
    log_total = top + tl.log2(tl.sum(total, 0))
    counts = target >= 0
    at = tl.load(z_ptr + tl.maximum(target, 0)).to(tl.float32) * LOG2E
    tl.store(loss_ptr + row, tl.where(counts, (log_total - at) / LOG2E, 0.0))
    for first in range(0, V, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        z = tl.load(z_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32) * LOG2E
        dz = tl.exp2(z - log_total) - tl.where(v == target, 1.0, 0.0)
        tl.store(z_ptr + v, tl.where(counts, dz, 0.0), mask=v < V)


@operator("cross_entropy", mutates=("logits",))
def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The loss of every row [N V] in float32, 0 where the target is negative; the gradient overwrites logits."""
    N, V = logits.shape
    losses = _fake(logits, target)
    block = min(BLOCK, power_of_2(V))
    _cross_entropy[(N,)](
        z_ptr=logits, target_ptr=target, loss_ptr=losses, V=V, stride=logits.stride(0), BLOCK_V=block,
        num_warps=max(4, block // 512), enable_fp_fusion=True,
    )  # fmt: skip
    return losses


@fake("cross_entropy")
def _fake(logits: Tensor, target: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.float32)
