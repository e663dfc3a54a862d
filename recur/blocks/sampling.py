"""One token from logits, every row by its own generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sample_token(
    logits: Tensor,
    generators: Sequence[torch.Generator],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Draw one token a row: softmax(logits / temperature), cut to top_k, then top_p, then min_p.

    Args:
        logits:     [B vocab].
        generators: one a row; a row's draw does not depend on the others.

    Returns: [B] ids.   Raises: ValueError naming the setting that is out of range.
    """
    if not temperature >= 0:  # NaN as well
        raise ValueError(f"sample_token: temperature must be >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"sample_token: top_k must be >= 1, got {top_k}")
    for name, share in (("top_p", top_p), ("min_p", min_p)):
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"sample_token: {name} must lie in (0, 1], got {share}")
    best = logits.amax(-1, keepdim=True)  # NaN if one is there
    if not bool(torch.isfinite(best).all()):
        raise ValueError("sample_token: logits must be numbers, the largest of a row finite, got NaN or infinities")
    if temperature == 0:
        return logits.argmax(-1)
    chance = ((logits.double() - best) / temperature).softmax(-1)
    chance, token = torch.sort(chance, dim=-1, descending=True, stable=True)
    keep = torch.ones_like(chance, dtype=torch.bool)
    if top_k is not None:
        keep[:, top_k:] = False
    chance = chance * keep
    if top_p is not None:
        chance = chance / chance.sum(-1, keepdim=True)
        chance = chance * (chance.cumsum(-1) - chance < top_p)
    if min_p is not None:
        chance = chance * (chance >= min_p * chance[:, :1])
    reached = chance.cumsum(-1)
    draw = torch.cat([torch.rand(1, generator=g, dtype=torch.float64, device=g.device) for g in generators]).to(
        logits.device
    )
    place = torch.searchsorted(reached, draw[:, None] * reached[:, -1:], right=True)
    last = (chance > 0).sum(-1, keepdim=True) - 1
    return token.gather(-1, torch.minimum(place, last))[:, 0]
