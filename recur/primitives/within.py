"""What the decay does inside one chunk: to every pair of tokens, since the chunk began, and until it ends.

Gates are multiplied. No logs are subtracted and nothing is divided, so every factor is at most 1: gates of exactly 0,
however many, are exact, and there is nothing to overflow or to branch on.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from recur.primitives.chunks import Documents, Rows
from recur.primitives.diagonal import gate
from recur.primitives.operators import batched_at, operator, remember
from recur.shapes import all_finite


class Within(NamedTuple):
    """One chunk. `rows` are the tensors that read: q, and for the delta rule k as well.

    scores: for each of rows [... C C], Σ_k row_t key_s Π_{s<r≤t} a_r at (t, s) for s <= t and 0 above.
    rows: each [... C K], row_t Π_{r≤t} a_r, which meets the state that enters the chunk.
    key: [... C K], key_s Π_{r>s} a_r, which writes the state that leaves it.
    total: [... K | 1], the product of all gates.
    """

    scores: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]
    key: Tensor
    total: Tensor


def lay_out(chunks: Rows | Documents, tokens: Tensor, groups: int) -> Tensor:
    """[B T H *] -> [n B G H/G C *], the axes of every tensor inside a chunk."""
    return rearrange(chunks.split(tokens), "B n C (G r) K -> n B G r C K", G=groups).contiguous()


def within(rows: tuple[Tensor, ...], key: Tensor, log_decay: Tensor | None) -> Within:
    """Decayed pairs of one chunk, for no gate, one a token [... C 1] or one a token and key [... C K]."""
    if log_decay is None:
        return Within(tuple((row @ key.mT).tril() for row in rows), rows, key, torch.ones_like(key[..., 0, :1]))
    if log_decay.shape[-1] == key.shape[-1]:
        return _key_wise(rows, key, gate(log_decay))
    since, until, *scores = _scalar(log_decay, key, rows[0], rows[1] if len(rows) > 1 else None)
    return Within(tuple(scores[: len(rows)]), tuple(row * since for row in rows), key * until, since[..., -1, :])


def lower_product(lower: Tensor, x: Tensor) -> Tensor:
    """lower [... C C] @ x [... C V] for a lower triangular matrix; what is not finite in x stays out of earlier rows.

    A plain product spreads it upwards, because 0 times NaN is NaN. Here it is left out of the product and makes NaN of
    its column from its own row on.
    """
    if all_finite(x):
        return lower @ x
    zero = x.detach() * 0  # NaN where x is not finite
    return lower @ torch.where(zero == 0, x, 0) + zero.cumsum(-2)


# One gate per token: Π_{r≤t} a_r and Π_{r>s} a_r [... C 1], and for each of rows [... C K] its scores [... C C]. The
# pairs of gates are not kept for backward but made again, and the products with them are those of the scores.


def _run_scalar(
    log_decay: Tensor, key: Tensor, row: Tensor, other: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _scalar_of(_run_products(log_decay), log_decay, key, row, other)


def _fake_scalar(log_decay: Tensor, key: Tensor, row: Tensor, other: Tensor | None) -> tuple[Tensor, ...]:
    return _scalar_of(_fake_products(log_decay), log_decay, key, row, other)


def _scalar_of(
    pairs: Tensor, log_decay: Tensor, key: Tensor, row: Tensor, other: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    since, until = pairs[..., :1] * gate(log_decay[..., :1, :]), pairs[..., -1:, :].mT.contiguous()
    scores = [(x @ key.mT * pairs).tril() for x in (row, other) if x is not None]  # an overflow times 0 is NaN
    none = pairs.new_empty(*scores[0].shape[:-2], 0, 0)
    return since, until, scores[0], none if other is None else scores[1]


def _save_scalar(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    remember(ctx, *inputs, *output)


def _gradients_scalar(ctx: Any, grad_since: Tensor, grad_until: Tensor, *given: Tensor) -> tuple[Tensor | None, ...]:
    log_decay, key, row, other, since, until, *saved = ctx.saved_tensors
    rows = [row] if other is None else [row, other]
    scores, grads = saved[: len(rows)], given[: len(rows)]
    pairs = _products(log_decay)
    shape = (*torch.broadcast_shapes(key.shape[:-2], row.shape[:-2]), *pairs.shape[-2:])
    plain = [(grad * pairs).sum_to_size(shape) for grad in grads]
    grad_rows = [(grad @ key).sum_to_size(row.shape) for row, grad in zip(rows, plain, strict=True)]
    grad_key = reduce(torch.add, [grad.mT @ row for row, grad in zip(rows, plain, strict=True)])
    grad_pairs = reduce(torch.add, [grad * score for score, grad in zip(scores, grads, strict=True)])
    grad_log = _crossed(grad_pairs).sum_to_size(log_decay.shape) + (grad_since * since).flip(-2).cumsum(-2).flip(-2)
    grad_log = grad_log + F.pad((grad_until * until)[..., :-1, :].cumsum(-2), (0, 0, 1, 0))
    return grad_log, grad_key.sum_to_size(key.shape), grad_rows[0], None if other is None else grad_rows[1]


def _tangent_scalar(ctx: Any, dlog: Tensor, dkey: Tensor, drow: Tensor, dother: Tensor | None) -> tuple[Tensor, ...]:
    log_decay, key, row, other, since, until, scores, other_scores = ctx.saved_tensors
    pairs, between = _products(log_decay), _spread(dlog)
    later = F.pad(dlog[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)

    def moved(row: Tensor, drow: Tensor, scores: Tensor) -> Tensor:
        return (drow @ key.mT + row @ dkey.mT) * pairs + scores * between

    further = torch.zeros_like(other_scores) if dother is None else moved(other, dother, other_scores)
    return since * dlog.cumsum(-2), until * later, moved(row, drow, scores), further


_scalar = operator(
    "recur::decayed_scores",
    _run_scalar,
    fake=_fake_scalar,
    save=_save_scalar,
    backward=_gradients_scalar,
    jvp=_tangent_scalar,
    vmap=batched_at(0, 0, 0, 0, out=0),
)


# log_decay [... C 1] -> Π_{s<r≤t} a_r at (t, s) of [... C C], 1 on the diagonal and 0 above it. Blocks are joined two
# by two: below the diagonal of a pair stands what is left of the left block's tokens at the border times what is left
# since the border in the right block.


def _run_products(log_decay: Tensor) -> Tensor:
    since, until = gate(log_decay), torch.ones_like(log_decay)
    pairs = torch.diag_embed(until.squeeze(-1))
    for m in (1 << level for level in range(log_decay.shape[-2].bit_length() - 1)):
        left_since, right_since = since.unflatten(-2, (-1, 2, m)).unbind(-3)
        left_until, right_until = until.unflatten(-2, (-1, 2, m)).unbind(-3)
        crossings(pairs, m).copy_(right_since * left_until.mT)
        since = torch.stack([left_since, right_since * left_since[..., -1:, :]], -3).flatten(-4, -2)
        until = torch.stack([left_until * right_since[..., -1:, :], right_until], -3).flatten(-4, -2)
    return pairs


def _fake_products(log_decay: Tensor) -> Tensor:
    return log_decay.new_empty(*log_decay.shape[:-1], log_decay.shape[-2])


def _save_products(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    remember(ctx, output)


def _gradients_products(ctx: Any, grad: Tensor) -> Tensor:
    (pairs,) = ctx.saved_tensors
    return _crossed(grad * pairs)


def _tangent_products(ctx: Any, dlog: Tensor) -> Tensor:
    (pairs,) = ctx.saved_tensors
    return pairs * _spread(dlog)


_products = operator(
    "recur::decay_products",
    _run_products,
    fake=_fake_products,
    save=_save_products,
    backward=_gradients_products,
    jvp=_tangent_products,
    vmap=batched_at(0, out=0),
)


def _spread(logs: Tensor) -> Tensor:
    """[... C 1] -> [... C C]: at (t, s) the sum over s < r <= t, without differences; the transpose of `_crossed`."""
    square = logs.expand(*logs.shape[:-1], logs.shape[-2])
    return square.new_ones(square.shape[-2:]).tril() @ square.tril(-1)


def _crossed(pairs: Tensor) -> Tensor:
    """[... C C] -> [... C 1]: for every r the sum over pairs s < r <= t, those whose decay holds the gate of r.

    A sum of sums, without differences: where all of them are 0, as they are for a gate of 0, so is the sum.
    """
    later = pairs.new_ones(pairs.shape[-2:]).triu()
    return (later @ pairs).tril(-1).sum(-1, keepdim=True)


def crossings(square: Tensor, m: int) -> Tensor:
    """View of [... C C]: of every pair of neighbouring blocks of m, rows in the right one, columns in the left one."""
    blocks = square.unflatten(-1, (-1, 2, m)).unflatten(-4, (-1, 2, m)).diagonal(dim1=-6, dim2=-3)  # [... 2 m 2 m n]
    return blocks[..., 1, :, 0, :, :].movedim(-1, -3)


def _key_wise(rows: tuple[Tensor, ...], key: Tensor, gates: Tensor) -> Within:
    """Blocks of one token are joined two by two until one is left.

    A row in the right block meets a key in the left one at the border between them: the row has decayed since the
    border, the key until it.
    """
    shape = torch.broadcast_shapes(gates.shape, key.shape)
    rows, key = tuple(row.expand(shape) for row in rows), key.expand(shape)
    scores = [(row * key).sum(-1)[..., None, None] for row in rows]  # [... C 1 1]
    since = [(row * gates).unsqueeze(-2) for row in rows]  # [... C 1 K]
    until, total = key.unsqueeze(-2), gates.unsqueeze(-2)
    while total.shape[-3] > 1:
        left_total, right_total = _halves(total)
        left_until, right_until = _halves(until)
        for i, (score, row) in enumerate(zip(scores, since, strict=True)):
            left, right = _halves(row)
            top, bottom = _halves(score)
            cross = right @ left_until.mT
            scores[i] = torch.cat([torch.cat([top, torch.zeros_like(top)], -1), torch.cat([cross, bottom], -1)], -2)
            since[i] = torch.cat([left, right * left_total], -2)
        until = torch.cat([left_until * right_total, right_until], -2)
        total = left_total * right_total
    whole_scores, whole_since = (tuple(x.squeeze(-3) for x in blocks) for blocks in (scores, since))
    return Within(whole_scores, whole_since, until.squeeze(-3), total.squeeze(-3).squeeze(-2))


def _halves(blocks: Tensor) -> tuple[Tensor, ...]:
    """[... n m K] -> the n/2 left and the n/2 right blocks."""
    return blocks.unflatten(-3, (-1, 2)).unbind(-3)


class Turned(NamedTuple):
    """A chunk made real: q and k [... C 2K], the log of the gate's size, and e^{iΦ} [... K | 1] at the chunk's end."""

    q: Tensor
    k: Tensor
    log_decay: Tensor | None
    turn: Tensor | None


def turned(q: Tensor, k: Tensor, log_decay: Tensor | None) -> Turned:
    """Rotate q and k [... C K] by the phase Φ summed since the chunk began; the scan of [Re, Im] is then real.

    q̃ = [q cos Φ, −q sin Φ], k̃ = [k cos Φ, −k sin Φ]; the state [2K V] holds real above imaginary part.
    """
    if log_decay is None or not log_decay.is_complex():
        return Turned(q, k, log_decay, None)
    size, phase = log_decay.real, log_decay.imag
    phase = phase.masked_fill(gate(size) == 0, 0)  # what is forgotten need not be turned, and owes the phase nothing
    phase = phase - (phase / (2 * torch.pi)).round().detach() * (2 * torch.pi)  # whole turns only cost digits
    since = phase.cumsum(-2)
    cos, sin = since.cos(), since.sin()
    q, k = (torch.cat([x * cos, -x * sin], -1) for x in (q, k))
    turn = torch.complex(cos[..., -1, :], sin[..., -1, :])
    return Turned(q, k, size if size.shape[-1] == 1 else torch.cat([size, size], -1), turn)


def joined(state: Tensor) -> Tensor:
    """Real above imaginary part [... 2K V] -> complex [... K V]."""
    return torch.complex(*state.chunk(2, -2))


def stacked(state: Tensor) -> Tensor:
    """Complex [... K V] -> real above imaginary part [... 2K V]."""
    return torch.cat([state.real, state.imag], -2)
