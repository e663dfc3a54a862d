"""Several documents in one packed row: document n holds the tokens cu_seqlens[n] to cu_seqlens[n + 1].

Needs torch alone: the kernels and `recur.primitives` both stand on it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def state_count(batch: int, cu_seqlens: Tensor | None) -> int:
    """Number of states that a scan begins and ends with: one per row, or one per document of the packed row."""
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


def mirror(cu_seqlens: Tensor | None, length: int) -> Tensor | None:
    """Document borders of the row read from its end."""
    return None if cu_seqlens is None else length - cu_seqlens.flip(0)


def document_of(cu_seqlens: Tensor, length: int) -> Tensor:
    """[T]: the document that each token lies in."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.to(tokens.dtype)[1:].contiguous(), tokens, right=True)


def document_starts(cu_seqlens: Tensor, length: int) -> Tensor:
    """[T] bool: whether a document starts at this token."""
    document = document_of(cu_seqlens, length)
    return torch.cat([document.new_full((1,), -1), document])[:length] != document
