"""Tokens of several writes and reads as more tokens, of one write and one read each: what the kernel computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recur.primitives.layout import to_heads


class Places(NamedTuple):
    """Where the writes and reads of a token lie among its L sub-tokens: writes from the first on, reads up to the last,
    the first read at the last write.

    The token's gate is that of its first sub-token; the others keep all of the state. Where nothing is written or read
    there are zeros. From right to left the first sub-token is the rightmost one.
    """

    writes: int
    reads: int
    reverse: bool

    @property
    def length(self) -> int:
        """L."""
        return self.writes + self.reads - 1

    def spread(self, x: Tensor, first: int = 0) -> Tensor:
        """[B T n *] -> [B T·L *], from sub-token number `first` on."""
        after = self.length - first - x.shape[2]
        if first or after:
            x = F.pad(x, (0, 0) * (x.ndim - 3) + (first, after))
        return (x.flip(2) if self.reverse and self.length > 1 else x).flatten(1, 2)

    def gate(self, log_decay: Tensor, tokens: int) -> Tensor:
        """[B|1 T|1 H *] -> [B|1 T·L H *], as it is if L is 1."""
        if self.length == 1:
            return log_decay
        return self.spread(log_decay.expand(-1, tokens, *log_decay.shape[2:]).unsqueeze(2))

    def reads_of(self, y: Tensor) -> Tensor:
        """[B T·L H V] -> [B T R H V]."""
        y = y.unflatten(1, (-1, self.length))
        return (y.flip(2) if self.reverse and self.length > 1 else y)[:, :, self.writes - 1 :]


class SubTokens(NamedTuple):
    """What `kernel.scan` takes: q, k, erase [B T·L G K]; v [B T·L H V]; log_decay [B|1 T·L|1 H *]; beta [B T·L H]."""

    q: Tensor
    k: Tensor | None
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    bonus: Tensor | None
    erase: Tensor | None


def sub_tokens(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    bonus: Tensor | None = None,
    erase: Tensor | None = None,
    remove: Tensor | None = None,
    write: Tensor | None = None,
    *,
    previous: bool = False,
    reverse: bool = False,
) -> tuple[SubTokens, Places]:
    """The inputs of `recur.scan`, log_decay [B|1 T|1 H] or with an axis K, as those of sub-tokens, and their places.

    A write is one sub-token; with a removal key it is two, one that erases and one that writes:

        S ← S' − b (Ŝᵀ e)ᵀ        S ← S + k (w ⊙ v)ᵀ

    The write gate is multiplied into v; so is beta, and into the keys, unless it means the delta rule. Products, and
    removal keys, have the dtype of v and k. Cost: where a token has more than one sub-token a copy of every tensor.

    >>> k, v = torch.eye(2)[None, :, None], torch.ones(1, 2, 1, 1)
    >>> found, places = sub_tokens(k, k, v, erase=k, remove=k)
    >>> places.length, found.k.shape, found.v.flatten()
    (2, torch.Size([1, 4, 1, 2]), tensor([0., 1., 0., 1.]))
    """
    several, (heads, T) = v.ndim == 5, (v.shape[-2], v.shape[1])
    if k is None and log_decay is not None and (q.ndim == 5 or beta is not None or erase is not None):
        dtype = torch.promote_types(q.dtype, v.dtype)
        k = -torch.expm1(log_decay.float()).expand(*v.shape[:3], -1).to(dtype)
    if write is not None:
        write = write if write.ndim == v.ndim else write.unsqueeze(-1)
    q = q if q.ndim == 5 else q.unsqueeze(2)

    def each(x: Tensor | None) -> Tensor | None:
        """With an axis M."""
        return x if x is None or several else x.unsqueeze(2)

    v, (k, beta, erase, remove, write) = v if several else v.unsqueeze(2), map(each, (k, beta, erase, remove, write))
    if beta is not None and k is not None and (previous or remove is not None):
        write, beta = beta.unsqueeze(-1), None
        erase = (write * to_heads(k, heads)).to(k.dtype)
    if write is not None:
        v = (write * v).to(v.dtype)
    if remove is not None and erase is not None and k is not None:
        if remove.shape[-2] != k.shape[-2]:
            remove, k = to_heads(remove, heads), to_heads(k, heads)
        k = torch.stack((remove.to(k.dtype), k), 3).flatten(2, 3)
        erase = F.pad(erase.unsqueeze(3), (0, 0, 0, 0, 0, 1)).flatten(2, 3)
        v = F.pad(v.unsqueeze(3), (0, 0, 0, 0, 1, 0)).flatten(2, 3)
    places = Places(v.shape[2], q.shape[2], reverse)
    found = SubTokens(
        places.spread(q, places.writes - 1),
        None if k is None else places.spread(k),
        places.spread(v),
        None if log_decay is None else places.gate(log_decay, T),
        None if beta is None else places.spread(beta),
        bonus,
        None if erase is None else places.spread(erase),
    )
    return found, places
