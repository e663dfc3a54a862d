"""What the decay does inside one chunk: between two tokens, from its start to a token, and from a token to its end.

Gates are multiplied. No logs are subtracted and nothing is divided, so every factor is at most 1: gates of exactly 0,
however many, are exact, and there is nothing to overflow or to branch on.

A chunk has C tokens. A reader, q or the erase key e, has n rows per token, [... C·n K], and reads the state; a writer,
k or the removal key b, has m rows per token, [... C·m K], and is added to it. Rows of a reader that read the state
before the gate of their token skip that gate: the first `skips` rows of each token do.
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


class ChunkDecays(NamedTuple):
    """One chunk of readers q and e and writers k and b; what belongs to an e or b that is None is None.

    A_qk, A_ek, A_qb, A_eb: [... C·n C·m] decayed products, Σ_K reader_t writer_s Π_{s<r≤t} a_r, without a_t for a row
        that skips it. A query sees the writes up to its token, or up to the one before if it skips the gate; an erase
        key sees all writes before its own: of A_ek and A_eb only what is below the diagonal counts.
    q_in, e_in: [... C·n K] the readers, decayed from the start of the chunk: they read the state that enters it.
    k_out, b_out: [... C·m K] the writers, decayed to the end of the chunk: they are added to the state that leaves it.
    decay_total: [... K | 1] the product of all gates.
    """

    A_qk: Any
    A_ek: Any
    A_qb: Any
    A_eb: Any
    q_in: Any
    e_in: Any
    k_out: Any
    b_out: Any
    decay_total: Tensor


def lay_out(chunks: Rows | Documents, tokens: Tensor, groups: int) -> Tensor:
    """[B T n H *] -> [N B G H/G C·n *], the axes of every tensor inside one of N chunks."""
    return rearrange(chunks.split(tokens), "B N C n (G r) K -> N B G r (C n) K", G=groups).contiguous()


def chunk_decays(
    q: Tensor,
    k: Tensor,
    e: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    *,
    tokens: int,
    q_skips: int = 0,
    e_skips: int = 0,
) -> ChunkDecays:
    """For a chunk of so many tokens with no gate, one per token [... C 1], or one per token and key [... C K]."""
    if log_decay is not None and log_decay.shape[-1] == k.shape[-1]:
        return _key_wise(q, k, e, b, gate(log_decay), q_skips, e_skips)
    pairs = _pairs(q, k, e, b, q_skips, e_skips)
    if log_decay is None:
        qk, ek, qb, eb = (pair and _seen(pair, pair.reader @ pair.writer.mT, tokens) for pair in pairs)
        return ChunkDecays(qk, ek, qb, eb, q, e, k, b, torch.ones_like(k[..., 0, :1]))
    decay_in, decay_out, *scores = _scores(log_decay, q, k, e, b, q_skips, e_skips)
    qk, ek, qb, eb = (pair and score for pair, score in zip(pairs, scores, strict=True))
    return ChunkDecays(
        qk,
        ek,
        qb,
        eb,
        q * per_row(decay_in, q, q_skips, 1.0),
        None if e is None else e * per_row(decay_in, e, e_skips, 1.0),
        k * per_row(decay_out, k),
        None if b is None else b * per_row(decay_out, b),
        decay_in[..., -1, :],
    )


def lower_product(lower: Tensor, x: Tensor, tokens: int | None = None) -> Tensor:
    """lower [... C·n C·m] @ x [... C·m V] for a lower triangular matrix, of single rows, or of so many tokens: what is
    not finite in x stays out of earlier ones.

    A plain product spreads it upwards, because 0 times NaN is NaN. Here it is left out of the product and makes NaN of
    its column from its own row, or token, on.
    """
    if all_finite(x):
        return lower @ x
    zero = x.detach() * 0  # NaN where x is not finite
    mark = zero.cumsum(-2)
    if tokens is not None and lower.shape[-2:] != (tokens, tokens):
        last = mark.unflatten(-2, (tokens, -1))[..., -1:, :]
        mark = last.expand(*last.shape[:-2], lower.shape[-2] // tokens, -1).flatten(-3, -2)
    return lower @ torch.where(zero == 0, x, 0) + mark


def per_row(x: Tensor, rows: Tensor, skips: int = 0, first: float = 0.0) -> Tensor:
    """x [... C *], one per token, for each of the rows [... C·n *]: [... C·n *].

    Rows that skip the gate of their token have what belongs to the token before, the chunk's first one `first`.
    """
    n = rows.shape[-2] // x.shape[-2]
    if n == 1 and skips == 0:
        return x
    each = x.unsqueeze(-2).expand(*x.shape[:-1], n - skips, x.shape[-1])
    if skips > 0:
        before = F.pad(x[..., :-1, :], (0, 0, 1, 0), value=first).unsqueeze(-2)
        each = torch.cat([before.expand(*x.shape[:-1], skips, x.shape[-1]), each], -2)
    return each.flatten(-3, -2)


def _per_token(x: Tensor, tokens: int, skips: int) -> Tensor:
    """The transpose of `per_row`, by x: [... C·n *] -> [... C *]."""
    if x.shape[-2] == tokens and skips == 0:
        return x
    each = x.unflatten(-2, (tokens, -1))
    before = F.pad(each[..., 1:, :skips, :].sum(-2), (0, 0, 0, 1))
    return each[..., skips:, :].sum(-2) + before


class _Pair(NamedTuple):
    """A reader and a writer [... C·n K], [... C·m K]."""

    reader: Tensor
    skips: int
    erases: bool
    writer: Tensor


def _pairs(q: Tensor, k: Tensor, e: Tensor | None, b: Tensor | None, q_skips: int, e_skips: int) -> list[_Pair | None]:
    """In the order of `ChunkDecays`: q k, e k, q b, e b."""
    readers, writers = ((q, q_skips, False), (e, e_skips, True)), (k, b)
    return [
        None if reader is None or writer is None else _Pair(reader, skips, erases, writer)
        for writer in writers
        for reader, skips, erases in readers
    ]


def _seen(pair: _Pair, scores: Tensor, tokens: int) -> Tensor:
    """Scores [... C·n C·m], 0 where the reader does not see the write: what overflows there would be NaN times 0."""
    if pair.erases:
        return scores.tril()
    if scores.shape[-2:] == (tokens, tokens):
        return scores.tril(-pair.skips)
    row, column = (torch.arange(n, device=scores.device) // (n // tokens) for n in scores.shape[-2:])
    return scores.masked_fill(row[:, None] < column, 0)


# One gate per token: the decays from the start and to the end of the chunk [... C 1], and the scores of all pairs, of
# size 0 where there is no e or b. The decays between tokens are not kept for backward but made again, and the products
# with them are the scores.


def _run_scores(
    log_decay: Tensor, q: Tensor, k: Tensor, e: Tensor | None, b: Tensor | None, q_skips: int, e_skips: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _scores_of(_run_between(log_decay), log_decay, _pairs(q, k, e, b, q_skips, e_skips))


def _fake_scores(
    log_decay: Tensor, q: Tensor, k: Tensor, e: Tensor | None, b: Tensor | None, q_skips: int, e_skips: int
) -> tuple[Tensor, ...]:
    return _scores_of(_fake_between(log_decay), log_decay, _pairs(q, k, e, b, q_skips, e_skips))


def _scores_of(
    between: Tensor, log_decay: Tensor, pairs: list[_Pair | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    decay_in, decay_out = between[..., :1] * gate(log_decay[..., :1, :]), between[..., -1:, :].mT.contiguous()
    none = between.new_empty(*between.shape[:-2], 0, 0)
    qk, ek, qb, eb = (none.clone() if pair is None else _score(pair, between) for pair in pairs)
    return decay_in, decay_out, qk, ek, qb, eb


def _score(pair: _Pair, between: Tensor) -> Tensor:
    return _seen(pair, pair.reader @ pair.writer.mT * _for_rows(between, pair), between.shape[-1])


def _for_rows(between: Tensor, pair: _Pair) -> Tensor:
    """[... C C] -> [... C·n C·m]: what stands between two tokens, for the rows of each."""
    return per_row(per_row(between, pair.reader, pair.skips).mT, pair.writer).mT


def _for_tokens(scores: Tensor, pair: _Pair, tokens: int) -> Tensor:
    """The transpose of `_for_rows`: [... C·n C·m] -> [... C C]."""
    return _per_token(_per_token(scores.mT, tokens, 0).mT, tokens, pair.skips)


def _save_scores(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.q_skips, ctx.e_skips = inputs
    remember(ctx, *tensors, *output)


def _gradients_scores(ctx: Any, grad_in: Tensor, grad_out: Tensor, *given: Tensor) -> tuple[Tensor | None, ...]:
    log_decay, q, k, e, b, decay_in, decay_out, *scores = ctx.saved_tensors
    between, tokens = _between(log_decay), log_decay.shape[-2]
    grad_q = grad_k = grad_e = grad_b = None
    grad_between: list[Tensor] = []
    readers: list[list[Tensor]] = [[], []]
    writers: list[list[Tensor]] = [[], []]
    for i, pair in enumerate(_pairs(q, k, e, b, ctx.q_skips, ctx.e_skips)):
        if pair is None:
            continue
        reader, _, erases, writer = pair
        shape = torch.broadcast_shapes(reader.shape[:-2], writer.shape[:-2])
        plain = given[i] * _for_rows(between, pair)
        plain = plain.tril() if erases and plain.shape[-1] > tokens else plain  # within a token no gate is 0
        plain = plain.sum_to_size(*shape, *plain.shape[-2:])
        readers[i % 2].append((plain @ writer).sum_to_size(reader.shape))
        writers[i // 2].append((plain.mT @ reader).sum_to_size(writer.shape))
        grad_between.append(_for_tokens(given[i] * scores[i], pair, tokens))
    grad_q, grad_e, grad_k, grad_b = (reduce(torch.add, x) if x else None for x in (*readers, *writers))
    grad_log = _crossed(reduce(torch.add, grad_between)).sum_to_size(log_decay.shape)
    grad_log = grad_log + (grad_in * decay_in).flip(-2).cumsum(-2).flip(-2)
    grad_log = grad_log + F.pad((grad_out * decay_out)[..., :-1, :].cumsum(-2), (0, 0, 1, 0))
    return grad_log, grad_q, grad_k, grad_e, grad_b, None, None


def _tangent_scores(ctx: Any, dlog: Tensor, dq: Tensor, dk: Tensor, de: Any, db: Any, *_: None) -> Any:
    log_decay, q, k, e, b, decay_in, decay_out, *scores = ctx.saved_tensors
    between, spread, tokens = _between(log_decay), _spread(dlog), log_decay.shape[-2]
    later = F.pad(dlog[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)
    moved = [torch.zeros_like(score) for score in scores]
    for i, pair in enumerate(_pairs(q, k, e, b, ctx.q_skips, ctx.e_skips)):
        if pair is not None:
            dreader, dwriter = (dq, de)[i % 2], (dk, db)[i // 2]
            plain = (dreader @ pair.writer.mT + pair.reader @ dwriter.mT) * _for_rows(between, pair)
            moved[i] = _seen(pair, plain, tokens) + scores[i] * _for_rows(spread, pair)
    return decay_in * dlog.cumsum(-2), decay_out * later, *moved


_scores = operator(
    "recur::decayed_scores",
    _run_scores,
    fake=_fake_scores,
    save=_save_scores,
    backward=_gradients_scores,
    jvp=_tangent_scores,
    vmap=batched_at(0, 0, 0, 0, 0, None, None, out=0),
)


# log_decay [... C 1] -> Π_{s<r≤t} a_r at (t, s) of [... C C], 1 on the diagonal and 0 above it. Blocks are joined two
# by two: below the diagonal of a pair stands the decay from a token of the left block to the border times the decay
# from the border to a token of the right block.


def _run_between(log_decay: Tensor) -> Tensor:
    decay_in, decay_out = gate(log_decay), torch.ones_like(log_decay)
    between = torch.diag_embed(decay_out.squeeze(-1))
    for m in (1 << level for level in range(log_decay.shape[-2].bit_length() - 1)):
        left_in, right_in = decay_in.unflatten(-2, (-1, 2, m)).unbind(-3)
        left_out, right_out = decay_out.unflatten(-2, (-1, 2, m)).unbind(-3)
        crossings(between, m).copy_(right_in * left_out.mT)
        decay_in = torch.stack([left_in, right_in * left_in[..., -1:, :]], -3).flatten(-4, -2)
        decay_out = torch.stack([left_out * right_in[..., -1:, :], right_out], -3).flatten(-4, -2)
    return between


def _fake_between(log_decay: Tensor) -> Tensor:
    return log_decay.new_empty(*log_decay.shape[:-1], log_decay.shape[-2])


def _save_between(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    remember(ctx, output)


def _gradients_between(ctx: Any, grad: Tensor) -> Tensor:
    (between,) = ctx.saved_tensors
    return _crossed(grad * between)


def _tangent_between(ctx: Any, dlog: Tensor) -> Tensor:
    (between,) = ctx.saved_tensors
    return between * _spread(dlog)


_between = operator(
    "recur::decay_between",
    _run_between,
    fake=_fake_between,
    save=_save_between,
    backward=_gradients_between,
    jvp=_tangent_between,
    vmap=batched_at(0, out=0),
)


def _spread(logs: Tensor) -> Tensor:
    """[... C 1] -> [... C C]: at (t, s) the sum over s < r <= t, without differences; the transpose of `_crossed`."""
    square = logs.expand(*logs.shape[:-1], logs.shape[-2])
    return square.new_ones(square.shape[-2:]).tril() @ square.tril(-1)


def _crossed(between: Tensor) -> Tensor:
    """[... C C] -> [... C 1]: for every r the sum over s < r <= t, the pairs whose decay holds the gate of r.

    A sum of sums, without differences: where all of them are 0, as they are for a gate of 0, so is the sum.
    """
    later = between.new_ones(between.shape[-2:]).triu()
    return (later @ between).tril(-1).sum(-1, keepdim=True)


def crossings(square: Tensor, m: int) -> Tensor:
    """View of [... C C]: of every pair of neighbouring blocks of m, rows in the right one, columns in the left one."""
    blocks = square.unflatten(-1, (-1, 2, m)).unflatten(-4, (-1, 2, m)).diagonal(dim1=-6, dim2=-3)  # [... 2 m 2 m n]
    return blocks[..., 1, :, 0, :, :].movedim(-1, -3)


def _key_wise(
    q: Tensor, k: Tensor, e: Tensor | None, b: Tensor | None, gates: Tensor, q_skips: int, e_skips: int
) -> ChunkDecays:
    """Blocks of one token are joined two by two until one is left.

    A reader in the right block meets a writer in the left one at the border between them: the reader has decayed since
    the border, the writer until it.
    """
    tokens = gates.shape[-2]
    lead = torch.broadcast_shapes(gates.shape[:-2], *(x.shape[:-2] for x in (q, k, e, b) if x is not None))

    def blocks(x: Tensor) -> Tensor:
        """[... C·n K] -> [... C n K]"""
        return x.unflatten(-2, (tokens, -1)).expand(*lead, tokens, x.shape[-2] // tokens, -1)

    total = blocks(gates)
    pairs = [pair and pair._replace(reader=blocks(pair.reader), writer=blocks(pair.writer)) for pair in
             _pairs(q, k, e, b, q_skips, e_skips)]  # fmt: skip
    scores = [pair and _own_token(pair) for pair in pairs]
    ins = [None if x is None else _own_gate(blocks(x), total, n) for x, n in ((q, q_skips), (e, e_skips))]
    outs = [None if x is None else blocks(x) for x in (k, b)]
    while total.shape[-3] > 1:
        halves = [x if x is None else _halves(x) for x in (*ins, *outs)]
        for i, score in enumerate(scores):
            reader, writer = halves[i % 2], halves[2 + i // 2]
            if score is not None and reader is not None and writer is not None:
                (top, bottom), cross = _halves(score), reader[1] @ writer[0].mT
                above = torch.cat([top, torch.zeros_like(top)], -1)
                scores[i] = torch.cat([above, torch.cat([cross, bottom], -1)], -2)
        left_total, right_total = _halves(total)
        ins = [x if x is None else torch.cat([x[0], x[1] * left_total], -2) for x in halves[:2]]
        outs = [x if x is None else torch.cat([x[0] * right_total, x[1]], -2) for x in halves[2:]]
        total = left_total * right_total
    qk, ek, qb, eb, q_in, e_in, k_out, b_out = (x if x is None else x.squeeze(-3) for x in (*scores, *ins, *outs))
    return ChunkDecays(qk, ek, qb, eb, q_in, e_in, k_out, b_out, total.squeeze(-3).squeeze(-2))


def _own_token(pair: _Pair) -> Tensor:
    """[... C n m]: the scores of every token with itself, in which no gate stands."""
    n, m = pair.reader.shape[-2], pair.writer.shape[-2]
    if (pair.erases and n == 1) or pair.skips == n:
        return pair.reader.new_zeros(*pair.reader.shape[:-1], m)
    scores = (pair.reader.unsqueeze(-2) * pair.writer.unsqueeze(-3)).sum(-1)
    return scores.tril(-1) if pair.erases else scores


def _own_gate(reader: Tensor, gates: Tensor, skips: int) -> Tensor:
    """[... C n K] times the gate of their own token [... C 1 K], but for the rows that skip it."""
    if skips == 0:
        return reader * gates
    return torch.cat([reader[..., :skips, :], reader[..., skips:, :] * gates], -2)


def _halves(blocks: Tensor) -> tuple[Tensor, ...]:
    """[... n m K] -> the n/2 left and the n/2 right blocks."""
    return blocks.unflatten(-3, (-1, 2)).unbind(-3)


class Rotated(NamedTuple):
    """A chunk made real: readers and writers [... C·n 2K], the log of the gates' size, and e^{iΦ} [... K | 1] at the
    chunk's end."""

    q: Tensor
    k: Tensor
    e: Tensor | None
    b: Tensor | None
    log_decay: Tensor | None
    rotation: Tensor | None


def rotated(
    q: Tensor,
    k: Tensor,
    e: Tensor | None,
    b: Tensor | None,
    log_decay: Tensor | None,
    *,
    q_skips: int = 0,
    e_skips: int = 0,
) -> Rotated:
    """Rotate readers and writers by the phase Φ summed since the chunk began; the scan of [Re, Im] is then real.

    q̃ = [q cos Φ, −q sin Φ], k̃ = [k cos Φ, −k sin Φ]; the state [2K V] holds real above imaginary part.
    """
    if log_decay is None or not log_decay.is_complex():
        return Rotated(q, k, e, b, log_decay, None)
    size, phase = log_decay.real, log_decay.imag
    phase = phase.masked_fill(gate(size) == 0, 0)  # a state that is forgotten need not be rotated
    phase = phase - (phase / (2 * torch.pi)).round().detach() * (2 * torch.pi)  # whole turns only cost digits
    phase = phase.cumsum(-2)
    cos, sin = phase.cos(), phase.sin()

    def rotate(x: Tensor, skips: int = 0) -> Tensor:
        return torch.cat([x * per_row(cos, x, skips, 1.0), -x * per_row(sin, x, skips)], -1)

    return Rotated(
        rotate(q, q_skips),
        rotate(k),
        None if e is None else rotate(e, e_skips),
        None if b is None else rotate(b),
        size if size.shape[-1] == 1 else torch.cat([size, size], -1),
        torch.complex(cos[..., -1, :], sin[..., -1, :]),
    )
