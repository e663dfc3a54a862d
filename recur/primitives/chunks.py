"""Tokens in chunks, none of which spans two documents, and the state that is carried from chunk to chunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recur.primitives.diagonal import like_batch, linear_recurrence
from recur.primitives.forms import document_of


class Rows:
    """Whole rows [B T ...] in n chunks of C tokens, the last one padded with zeros.

    Logs of decays are split like everything else, so a token of zeros neither decays nor writes.
    """

    def __init__(self, length: int, size: int) -> None:
        self.length, self.size, self.n = length, size, -(-length // size)
        self.first = None  # [n] bool, the chunks that open a document: there are no further documents
        self.sealed = None  # [n] bool, the chunks after which a further document follows
        self.borders = None  # [documents+1] cu_seqlens of the row of chunks

    def split(self, tokens: Tensor) -> Tensor:
        """[B T ...] -> [B n C ...]. Tokens all alike, [B 1 ...], give [B 1 C ...] where nothing is padded."""
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
        """[n B ...]: what the chunk before holds; before the first `initial` [B ...], or zeros."""
        initial = torch.zeros_like(chunks[0]) if initial is None else initial
        return torch.cat([initial[None], chunks[:-1]])

    def openings(self, initial: Tensor) -> tuple[Tensor, Tensor | None]:
        """The state [B ...] that enters the first chunk, and what is added to those that leave chunks: nothing."""
        return initial, None

    def last(self, chunks: Tensor) -> Tensor:
        """[n B ...] -> [B ...]: the last chunk."""
        return chunks[-1]

    def settle(self, final: Tensor, initial: Tensor) -> Tensor:
        """The final state: `initial` where there was no token, and here there is one."""
        return final


class Documents:
    """One packed row [1 T ...] in n chunks of C tokens, every document padded with zeros to full chunks.

    n = T // C + documents is the most chunks that documents of T tokens can need. Those not needed come last and hold
    zeros. Everything is found on the device from cu_seqlens [documents + 1]; no value is read by the host.
    """

    def __init__(self, length: int, size: int, cu_seqlens: Tensor) -> None:
        documents, device = cu_seqlens.shape[0] - 1, cu_seqlens.device
        borders = cu_seqlens.long()
        lengths = borders[1:] - borders[:-1]
        through = ((lengths + size - 1) // size).cumsum(0)  # chunks up to and with this document
        start = through - (lengths + size - 1) // size
        self.length, self.size, self.n = length, size, length // size + documents
        self.final, self.empty = (through - 1).clamp(min=0), lengths == 0

        chunk = torch.arange(self.n, device=device)
        self.document = torch.searchsorted(through, chunk, right=True).clamp(max=documents - 1)
        self.first = chunk == start[self.document]
        self.sealed = self.first.roll(-1)  # what leaves these chunks belongs to no later one
        self.borders = F.pad(through[:-1], (1, 1))
        self.borders[-1] = self.n  # those not needed end the last document
        place = ((chunk - start[self.document]) * size)[:, None] + torch.arange(size, device=device)
        source = torch.where(place < lengths[self.document, None], borders[self.document, None] + place, length)
        self.source = source.flatten()  # where to read each slot; the zeros stand behind the last token

        owner = document_of(cu_seqlens, length)
        self.slot = start[owner] * size + torch.arange(length, device=device) - borders[owner]

    def split(self, tokens: Tensor) -> Tensor:
        """[1 T ...] -> [1 n C ...]."""
        tokens = tokens.expand(-1, self.length, *tokens.shape[2:])
        padded = F.pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, 1))
        return padded.index_select(1, self.source).unflatten(1, (self.n, self.size))

    def merge(self, chunks: Tensor) -> Tensor:
        """[1 n C ...] -> [1 T ...]."""
        return chunks.flatten(1, 2).index_select(1, self.slot)

    def delay(self, chunks: Tensor, initial: Tensor | None = None) -> Tensor:
        """[n 1 ...]: what the chunk before holds; before a document's first `initial` [documents ...], or zeros."""
        before = torch.cat([torch.zeros_like(chunks[:1]), chunks[:-1]])
        opening = 0 if initial is None else initial.index_select(0, self.document)[:, None]
        return torch.where(like_batch(self.first, chunks), opening, before)

    def openings(self, initial: Tensor) -> tuple[Tensor, Tensor | None]:
        """The state [1 ...] that enters the first chunk, and what is added to those that leave chunks [n 1 ...].

        That is the state [documents ...] of the document that follows, if one does.
        """
        own = initial.index_select(0, self.document)
        return own[:1], torch.where(like_batch(self.first, own), own, 0).roll(-1, 0)[:, None]

    def last(self, chunks: Tensor) -> Tensor:
        """[n 1 ...] -> [documents ...]: every document's last chunk."""
        return chunks[:, 0].index_select(0, self.final)

    def settle(self, final: Tensor, initial: Tensor) -> Tensor:
        """The final states [documents ...]: `initial` where the document is empty."""
        return torch.where(like_batch(self.empty, final), initial, final)


def cut(length: int, size: int, cu_seqlens: Tensor | None) -> Rows | Documents:
    """The chunks of `length` tokens, `size` tokens each."""
    return Rows(length, size) if cu_seqlens is None else Documents(length, size, cu_seqlens)


def carry(chunks: Rows | Documents, decay: Tensor, write: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """S_{j+1} = decay_j S_j + write_j over chunks [n B *]: the states [n B *] entering each, and the final ones [B *].

    Where a document starts, its own initial state is written and nothing kept.
    """
    kept, written = chunks.delay(decay)[None], chunks.delay(write, initial)[None]
    entering = linear_recurrence(kept, written, starts=chunks.first).squeeze(0)
    final = chunks.last(decay) * chunks.last(entering) + chunks.last(write)
    return entering, chunks.settle(final, initial)
