"""What the decay does inside one chunk: to every pair of tokens, since the chunk began, and until it ends.

Gates are multiplied. No logs are subtracted and nothing is divided, so every factor is at most 1: gates of exactly 0,
however many, are exact, and there is nothing to overflow or to branch on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from recur.primitives.chunks import Documents, Rows


class Within(NamedTuple):
    """One chunk. `rows` are the tensors that read: q, and for the delta rule k as well.

    scores: for each of rows [... C C] with Σ_k row_t key_s Π_{s<r≤t} a_r at (t, s) for s <= t and 0 above.
    rows: each [... C K], row_t Π_{r≤t} a_r, which meets the state that enters the chunk.
    key: [... C K], key_s Π_{r>s} a_r, which writes the state that leaves it.
    total: [... K | 1], the product of all gates.
    """

    scores: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]
    key: Tensor
    total: Tensor


def within(rows: tuple[Tensor, ...], key: Tensor, gate: Tensor | None, *, before: bool = False) -> Within:
    """Decayed pairs of one chunk, for no gate, one a token [... C 1] or one a token and key [... C K].

    With `before` rows read the state their own token has not touched yet: products run to t - 1 and s < t.
    """
    if gate is None:
        scores = tuple((row @ key.mT).tril(-1 if before else 0) for row in rows)
        return Within(scores, rows, key, torch.ones_like(key[..., 0, :1]))
    if gate.shape[-1] == key.shape[-1]:
        return _pairs(rows, key, gate, before)
    one = torch.ones_like(gate)
    (pairs,), (since,), until, total = _pairs((one,), one, gate, before)
    return Within(
        tuple(row @ key.mT * pairs for row in rows), tuple(row * since for row in rows), key * until, total
    )


def _pairs(rows: tuple[Tensor, ...], key: Tensor, gate: Tensor, before: bool) -> Within:
    """Blocks of one token are joined two by two until one is left.

    A row in the right block meets a key in the left one at the border between them: the row has decayed since the
    border, the key until it.
    """
    shape = torch.broadcast_shapes(gate.shape, key.shape)
    rows, key = tuple(row.expand(shape) for row in rows), key.expand(shape)
    owns = [(row * key).sum(-1, keepdim=True) for row in rows]
    scores = [(torch.zeros_like(own) if before else own).unsqueeze(-2) for own in owns]  # [... C 1 1]
    since = [(row if before else row * gate).unsqueeze(-2) for row in rows]  # [... C 1 K]
    until, total = key.unsqueeze(-2), gate.unsqueeze(-2)
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
    return Within(
        tuple(score.squeeze(-3) for score in scores),
        tuple(row.squeeze(-3) for row in since),
        until.squeeze(-3),
        total.squeeze(-3).squeeze(-2),
    )


def _halves(blocks: Tensor) -> tuple[Tensor, ...]:
    """[... n m K] -> the n/2 left and the n/2 right blocks."""
    return blocks.unflatten(-3, (-1, 2)).unbind(-3)


def lay_out(chunks: Rows | Documents, tokens: Tensor, groups: int) -> Tensor:
    """[B T H *] -> [B n G H/G C *], the axes of every tensor inside a chunk."""
    return rearrange(chunks.split(tokens), "B n C (G r) K -> B n G r C K", G=groups).contiguous()


class Turned(NamedTuple):
    """A chunk whose complex gates are made real: q and k [... C 2K], gates real, `turn` e^{iΦ} [... K | 1] at its end."""

    q: Tensor
    k: Tensor
    gate: Tensor | None
    turn: Tensor | None


def turned(q: Tensor, k: Tensor, log_decay: Tensor | None, *, before: bool = False) -> Turned:
    """Rotate q and k [... C K] by the phase Φ summed since the chunk began; the scan of [Re, Im] is then real.

    q̃ = [q cos Φ, −q sin Φ], k̃ = [k cos Φ, −k sin Φ], the state [2K V] holds real and imaginary part. With `before`
    q reads before its own token turns the state.
    """
    if log_decay is None:
        return Turned(q, k, None, None)
    if not log_decay.is_complex():
        return Turned(q, k, log_decay.exp(), None)
    gate, phase = log_decay.real.exp(), log_decay.imag
    phase = phase.masked_fill(gate == 0, 0)  # what is forgotten need not be turned, and owes the phase no gradient
    phase = phase - (phase / (2 * torch.pi)).round().detach() * (2 * torch.pi)  # whole turns only cost digits
    since = phase.cumsum(-2)
    cos, sin = since.cos(), since.sin()
    k, turn = torch.cat([k * cos, -k * sin], -1), torch.complex(cos[..., -1, :], sin[..., -1, :])
    if before:
        cos, sin = (since - phase).cos(), (since - phase).sin()
    q = torch.cat([q * cos, -q * sin], -1)
    return Turned(q, k, gate if gate.shape[-1] == 1 else torch.cat([gate, gate], -1), turn)
