"""Cross-entropy of a linear head, whose logits are never all there at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recur import kernel
from recur.primitives.operators import transformed
from recur.shapes import accumulation_dtype, bind

LOGITS = 1 << 26  # at once: 256 MiB in float32


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore: int = -100,
    chunk: int | None = None,
) -> Tensor:
    """Mean cross-entropy, in nats, of softmax(W x + b) at the targets: mean_i (log sum_v exp(z_iv) - z_i,target).

    Args:
        x: [N D] what the head reads.
        weight: [V D] of the head.
        target: [N] classes; those equal to `ignore` do not count.
        bias: [V] of the head.
        ignore: the target that does not count.
        chunk: rows whose logits are there at once; by default as many as have 2^26 logits together.

    Returns: a number, float32 or wider; NaN if nothing counts.   Raises: ShapeError, TypeError.
    Cost: the logits once and, where gradients are wanted, two more products of that size, at once in the forward, one
        chunk after another; kept are the gradient of x and, in float32, that of the weight. In one chunk, and where
        torch.compile or torch.func transforms the call, all logits are kept. Second derivatives form all logits.

    >>> from recur.primitives.loss import linear_cross_entropy
    >>> x, weight = torch.randn(6, 4), torch.randn(10, 4)
    >>> linear_cross_entropy(x, weight, torch.arange(6), chunk=2).shape
    torch.Size([])
    """
    bind("linear_cross_entropy", x=(x, "N D"), weight=(weight, "V D"), target=(target, "N"), bias=(bias, "V"))
    if target.is_floating_point() or target.is_complex():
        raise TypeError(f"linear_cross_entropy: target must be integers, got {target.dtype}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk must be at least 1, got {chunk}")
    chunk = max(1, LOGITS // max(1, weight.shape[0])) if chunk is None else chunk
    formula = torch.compiler.is_compiling() or transformed()
    narrow = x.dtype in (torch.bfloat16, torch.float16)  # whose softmax is float32 one chunk at a time
    if formula or (len(x) <= chunk and not narrow):
        return _whole(x, weight, target, bias, ignore)
    loss: Tensor = _Chunked.apply(x, weight, target, bias, ignore, chunk)
    return loss


def _whole(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore: int) -> Tensor:
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits.to(accumulation_dtype(logits)), target.long(), ignore_index=ignore)


class _Chunked(torch.autograd.Function):
    """Gradients are made in the forward, where the logits of a chunk are at hand, and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore: int, chunk: int
    ) -> Tensor:
        wanted = ctx.needs_input_grad
        counts = target != ignore
        total, kept = x.new_zeros((), dtype=accumulation_dtype(x)), counts.sum()
        dx = torch.empty_like(x) if wanted[0] else None
        dweight = torch.zeros_like(weight, dtype=total.dtype) if wanted[1] else None
        dbias = torch.zeros_like(bias, dtype=total.dtype) if bias is not None and wanted[3] else None
        for first in range(0, len(x), chunk):
            rows = slice(first, first + chunk)
            logits = F.linear(x[rows], weight, bias)
            losses = _into_gradient(logits, target[rows], counts[rows], any(wanted))
            total += losses.sum()
            if dx is not None:
                dx[rows] = logits @ weight.to(logits.dtype)
            if dweight is not None:
                dweight += logits.mT @ x[rows].to(logits.dtype)
            if dbias is not None:
                dbias += logits.sum(0, dtype=total.dtype)
        ctx.save_for_backward(x, weight, target, bias, dx, dweight, dbias, kept)
        ctx.ignore = ignore
        return total / kept

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, target, bias, *made, kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative will be asked for
            loss, inputs = _whole(x, weight, target, bias, ctx.ignore), (x, weight, bias)
            needed = [t for t, d in zip(inputs, made, strict=True) if d is not None]
            found = iter(torch.autograd.grad(loss, needed, grads[0], create_graph=True))
            made = [None if d is None else next(found) for d in made]
        else:
            scale = grads[0] / kept.clamp(min=1)
            given = (x, weight, bias)
            made = [None if d is None else (d * scale).to(t.dtype) for d, t in zip(made, given, strict=True)]
        dx, dweight, dbias = made
        return dx, dweight, None, dbias, None, None


def _into_gradient(logits: Tensor, target: Tensor, counts: Tensor, wanted: bool) -> Tensor:
    """The loss of every row [N], 0 where it does not count; logits [N V] become their gradient if that is wanted."""
    if kernel.fused("auto", logits):
        return kernel.cross_entropy(logits, target.where(counts, -1))
    target = target.long().where(counts, 0)[:, None]
    log_p = logits.log_softmax(-1, dtype=accumulation_dtype(logits))
    losses = -log_p.gather(1, target)[:, 0] * counts
    if wanted:
        p = log_p.exp_()
        p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
        logits.copy_(p.mul_(counts[:, None]))
    return losses
