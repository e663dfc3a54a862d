"""Tokens in chunks, none of which spans two documents, and the state that is carried from chunk to chunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recur.primitives.diagonal import like_batch, linear_recurrence
from recur.primitives.forms import document_of


class Rows:
    """Whole rows [B T ...] in chunks [B n C ...]; the last chunk is filled up with zeros, which neither decay nor write.

    Logs of decays are split like everything else, so a filled-up token leaves the state alone.
    """

    def __init__(self, length: int, size: int) -> None:
        self.length, self.size, self.n = length, size, -(-length // size)

    def split(self, tokens: Tensor) -> Tensor:
        """[B T ...] -> [B n C ...]. Tokens all alike, [B 1 ...], stay shared by the chunks where none is filled up."""
        missing = self.n * self.size - self.length
        if tokens.shape[1] != self.length:
            if missing == 0:
                return tokens[:, None].expand(-1, -1, self.size, *tokens.shape[2:])
            tokens = tokens.expand(-1, self.length, *tokens.shape[2:])
        if missing > 0:
            tokens = F.pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, missing))
        return tokens.unflatten(1, (self.n, self.size))

    def merge(self, chunks: Tensor) -> Tensor:
        """[B n C ...] -> [B T ...]."""
        return chunks.flatten(1, 2)[:, : self.length]

    def delay(self, chunks: Tensor, initial: Tensor | None = None) -> Tensor:
        """[B n ...]: what the chunk before holds; `initial` [B ...] (or zeros) before the first."""
        initial = torch.zeros_like(chunks[:, 0]) if initial is None else initial
        return torch.cat([initial[:, None], chunks[:, :-1]], 1)

    def enter(self, j: int, state: Tensor, initial: Tensor) -> Tensor:
        """The state that enters chunk j, `state` being the one that left the chunk before."""
        return initial if j == 0 else state

    def last(self, chunks: Tensor) -> Tensor:
        """[B n ...] -> [B ...]: the last chunk."""
        return chunks[:, -1]

    def settle(self, final: Tensor, initial: Tensor) -> Tensor:
        """The final state: `initial` where there was no token, and here there is one."""
        return final


class Documents:
    """One packed row [1 T ...] in chunks [1 n C ...], every document filled up with zeros to whole chunks.

    n = T // C + documents is the most chunks that documents of T tokens can need; those not needed come last and hold
    zeros. Everything is found on the device from cu_seqlens [documents + 1], without reading a value on the host.
    """

    def __init__(self, length: int, size: int, cu_seqlens: Tensor) -> None:
        documents = cu_seqlens.shape[0] - 1
        borders = cu_seqlens.long()
        lengths = borders[1:] - borders[:-1]
        needed = (lengths + size - 1) // size
        through = needed.cumsum(0)
        start = through - needed
        self.length, self.size, self.n = length, size, length // size + documents
        chunk, token = (torch.arange(count, device=cu_seqlens.device) for count in (self.n, length))
        self.document = torch.searchsorted(through, chunk, right=True).clamp(max=documents - 1)
        self.first = chunk == start[self.document]
        within = ((chunk - start[self.document]) * size)[:, None] + torch.arange(size, device=cu_seqlens.device)
        place = borders[self.document, None] + within
        # zeros stand at place T
        self.source = torch.where(within < lengths[self.document, None], place, length).flatten()
        owner = document_of(cu_seqlens, length)
        self.slot = start[owner] * size + token - borders[owner]
        self.final, self.empty = (through - 1).clamp(min=0), lengths == 0

    def split(self, tokens: Tensor) -> Tensor:
        """[1 T ...] -> [1 n C ...]."""
        tokens = tokens.expand(-1, self.length, *tokens.shape[2:])
        padded = F.pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, 1))
        return padded.index_select(1, self.source).unflatten(1, (self.n, self.size))

    def merge(self, chunks: Tensor) -> Tensor:
        """[1 n C ...] -> [1 T ...]."""
        return chunks.flatten(1, 2).index_select(1, self.slot)

    def delay(self, chunks: Tensor, initial: Tensor | None = None) -> Tensor:
        """[1 n ...]: what the chunk before holds; `initial` [documents ...] (or zeros) before a document's first."""
        before = torch.cat([torch.zeros_like(chunks[:, :1]), chunks[:, :-1]], 1)
        first = like_batch(self.first, chunks[0])
        return torch.where(first, 0 if initial is None else initial.index_select(0, self.document), before)

    def enter(self, j: int, state: Tensor, initial: Tensor) -> Tensor:
        """[1 ...]: the state that enters chunk j, `state` being the one that left the chunk before."""
        own = initial.index_select(0, self.document[j : j + 1])
        return own if j == 0 else torch.where(self.first[j], own, state)

    def last(self, chunks: Tensor) -> Tensor:
        """[1 n ...] -> [documents ...]: every document's last chunk."""
        return chunks[0].index_select(0, self.final)

    def settle(self, final: Tensor, initial: Tensor) -> Tensor:
        """The final states [documents ...]: `initial` where the document is empty."""
        return torch.where(like_batch(self.empty, final), initial, final)


def cut(length: int, size: int, cu_seqlens: Tensor | None) -> Rows | Documents:
    """The chunks of `length` tokens, `size` tokens each."""
    return Rows(length, size) if cu_seqlens is None else Documents(length, size, cu_seqlens)


def carry(chunks: Rows | Documents, decay: Tensor, write: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """The states [B n *] entering each chunk and the final states [B *] of S_{j+1} = decay_j S_j + write_j.

    Where a document starts its own initial state is written and nothing kept.
    """
    entering = linear_recurrence(chunks.delay(decay), chunks.delay(write, initial))
    final = chunks.last(decay) * chunks.last(entering) + chunks.last(write)
    return entering, chunks.settle(final, initial)
