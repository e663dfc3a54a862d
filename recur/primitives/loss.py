"""Cross-entropy of a linear head, whose logits are never all there at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recur import kernel
from recur.primitives.operators import operator, pullback, pushforward, remember, transformed
from recur.shapes import accumulation_dtype, bind, pick

LOGITS = 1 << 26  # at once: 256 MiB in float32


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore: int = -100,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy, in nats, of softmax(W x + b) at the targets: mean_i (log sum_v exp(z_iv) - z_i,target).

    Args:
        x: [N D] what the head reads.
        weight: [V D] of the head.
        target: [N] classes; those equal to `ignore` do not count.
        bias: [V] of the head.
        ignore: the target that does not count.
        reduction: "mean" over the targets that count, or their "sum".
        chunk: rows whose logits are there at once; by default as many as have 2^26 logits together.

    Returns: a number, float32 or wider; the mean is NaN if nothing counts, the sum 0.
    Raises: ShapeError, TypeError, ValueError.
    Cost: the logits once and, where gradients are wanted, two more products of that size, at once in the forward, one
        chunk after another; kept are the gradient of x and, in float32, those of weight and bias. So it is in graphs of
        torch.compile and under torch.func as well. Second derivatives, and tangents of gradients, form all logits.

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
    mean = pick("linear_cross_entropy", "reduction", reduction, {"mean": True, "sum": False})
    chunk = max(1, LOGITS // max(1, weight.shape[0])) if chunk is None else chunk
    kind = x.device.type
    cast = kind != "meta" and torch.is_autocast_enabled(kind)
    compute = torch.get_autocast_dtype(kind) if cast else x.dtype  # of the product
    every, grad = transformed(), torch.is_grad_enabled()
    wanted = [given is not None and (every or (grad and given.requires_grad)) for given in (x, weight, bias)]
    found = _loss(x, weight, target, bias, ignore, chunk, compute, *wanted)
    total: Tensor = found[0]
    if not mean:
        return total
    kept = (target != ignore).sum()
    return torch.where(kept > 0, total / kept.clamp(min=1), torch.nan)  # whose gradients are 0, not NaN


def _formula(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore: int, compute: torch.dtype
) -> Tensor:
    """The sum, from all logits."""
    logits = _linear(x, weight, bias, compute)
    options: dict[str, Any] = {"ignore_index": ignore, "reduction": "sum"}
    return F.cross_entropy(logits.to(accumulation_dtype(x)), target.long(), **options)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> Tensor:
    return F.linear(x.to(compute), weight.to(compute), None if bias is None else bias.to(compute))


# ---------------------------------------------------------------------- the sum, and its gradients


def _run(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore: int,
    chunk: int,
    compute: torch.dtype,
    wants_x: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, and those of its gradients by x, weight and bias that are wanted, one chunk of logits after another."""
    total, dx, dweight, dbias = _outputs(x, weight, bias, wants_x, wants_weight, wants_bias)
    total.zero_()
    dweight.zero_()
    dbias.zero_()
    counts, narrow = target != ignore, weight.to(compute)
    for first in range(0, len(x), chunk):
        rows = slice(first, first + chunk)
        logits = _linear(x[rows], narrow, bias, compute)
        losses = _into_gradient(logits, target[rows], counts[rows], wants_x or wants_weight or wants_bias)
        total += losses.sum()
        if wants_x:
            dx[rows] = logits @ narrow
        if wants_weight:
            dweight += logits.mT @ x[rows].to(compute)
        if wants_bias:
            dbias += logits.sum(0, dtype=total.dtype)
    return total, dx, dweight, dbias


def _outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, wants_x: bool, wants_weight: bool, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty: the sum and its gradients, those that are not wanted without entries."""
    wide = accumulation_dtype(x)
    dx = x.new_empty(x.shape if wants_x else (0,))
    dweight = x.new_empty(weight.shape if wants_weight else (0,), dtype=wide)
    dbias = x.new_empty(weight.shape[:1] if wants_bias and bias is not None else (0,), dtype=wide)
    return x.new_empty((), dtype=wide), dx, dweight, dbias


def _into_gradient(logits: Tensor, target: Tensor, counts: Tensor, wanted: bool) -> Tensor:
    """The loss of every row [N], 0 where it does not count; logits [N V] become their gradient if that is wanted."""
    if kernel.fused("auto", logits, of="linear_cross_entropy"):
        return kernel.cross_entropy(logits, target.where(counts, -1))
    target = target.long().where(counts, 0)[:, None]
    log_p = logits.log_softmax(-1, dtype=accumulation_dtype(logits))
    losses = -log_p.gather(1, target)[:, 0] * counts
    if wanted:
        p = log_p.exp_()
        p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
        logits.copy_(p.mul_(counts[:, None]))
    return losses


def _fake(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    return _outputs(x, weight, bias, *options[3:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, target, bias, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    remember(ctx, x, weight, target, bias, *output[1:])


def _backward(ctx: Any, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    ignore, _, compute, *wanted = ctx.options
    dx, dweight, dbias = _scaled(dtotal, *ctx.saved_tensors, ignore, compute)
    dx, dweight, dbias = (d if want else None for d, want in zip((dx, dweight, dbias), wanted, strict=True))
    return dx, dweight, None, dbias, *[None] * 6


def _tangent(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients times the tangents."""
    *_, dx, dweight, dbias = ctx.saved_tensors
    moved = zip((dx, dweight, dbias), (tangents[0], tangents[1], tangents[3]), strict=True)
    terms = [(d.to(dweight.dtype) * tangent).sum() for d, tangent in moved if tangent is not None]
    return sum(terms, torch.zeros_like(dweight.sum())), None, None, None


def _one_by_one(call: Any, size: int, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
    """vmap as a loop, so that there are still no more logits than a chunk's."""

    def at(i: int) -> list[Any]:
        return [x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)]

    calls = [call(*at(i)) for i in range(size)]
    return tuple(torch.stack(column) for column in zip(*calls, strict=True)), (0,) * len(calls[0])


# ---------------------------------------------------------------------- the gradients, scaled by that of the sum


def _run_scaled(
    dtotal: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    ignore: int,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by x, weight and bias in their dtypes; without entries where they were not wanted."""
    kept = ((dx, x), (dweight, weight), (dbias, weight if bias is None else bias))
    made = [(d * dtotal).to(given.dtype) for d, given in kept]
    return made[0], made[1], made[2]


def _fake_scaled(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, x, weight, _, bias, dx, dweight, dbias, *_ = inputs
    kept = ((dx, x), (dweight, weight), (dbias, weight if bias is None else bias))
    made = [torch.empty_like(d, dtype=given.dtype) for d, given in kept]
    return made[0], made[1], made[2]


def _save_scaled(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.ignore, ctx.compute = inputs
    remember(ctx, *tensors)


def _gradients(ctx: Any) -> tuple[Any, list[Tensor]]:
    """(dtotal, x, weight, bias) -> the gradients by formula, and these four (bias if there is one)."""
    dtotal, x, weight, target, bias, dx, dweight, dbias = ctx.saved_tensors
    unwanted = [d.numel() < given.numel() for d, given in ((dx, x), (dweight, weight))]

    def gradients(dtotal: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        def loss(*inputs: Tensor) -> Tensor:
            x, weight, *rest = inputs
            return _formula(x, weight, rest[0] if rest else None, target, ctx.ignore, ctx.compute)

        found = torch.func.vjp(loss, *inputs)[1](dtotal)
        return tuple(
            d.new_zeros(0) if none else d for d, none in zip(found, [*unwanted, dbias.numel() == 0], strict=False)
        )

    return gradients, [dtotal, x, weight] if bias is None else [dtotal, x, weight, bias]


def _backward_scaled(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    gradients, inputs = _gradients(ctx)
    dtotal, x, weight, *bias = pullback(gradients, inputs, grads[: len(inputs) - 1])
    return dtotal, x, weight, None, bias[0] if bias else None, *[None] * 5


def _tangent_scaled(ctx: Any, dtotal: Tensor, *tangents: Tensor | None) -> tuple[Tensor, ...]:
    gradients, inputs = _gradients(ctx)
    given = [dtotal, tangents[0], tangents[1], tangents[3]][: len(inputs)]
    moved = [torch.zeros_like(x) if tangent is None else tangent for x, tangent in zip(inputs, given, strict=True)]
    found = pushforward(gradients, inputs, moved)
    return (*found, *[inputs[1].new_zeros(0)] * (3 - len(found)))


_scaled = operator(
    "recur::linear_cross_entropy_gradients",
    _run_scaled,
    fake=_fake_scaled,
    save=_save_scaled,
    backward=_backward_scaled,
    jvp=_tangent_scaled,
    vmap=_one_by_one,
)

_loss = operator(
    "recur::linear_cross_entropy", _run, fake=_fake, save=_save, backward=_backward, jvp=_tangent, vmap=_one_by_one
)
