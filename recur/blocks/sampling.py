"""One token per row from logits and one uniform number per row: tensor operations only, nothing is read by the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# splitmix64 (Steele, Lea and Flood 2014), in the two's complement of int64
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: from softmax(logits / temperature), cut to top_k, then top_p, then min_p.

    Args:
        temperature: 0 takes the most likely token.
        top_k:       keep the k most likely tokens.
        top_p:       keep the fewest tokens whose probabilities sum to top_p.
        min_p:       keep the tokens with at least min_p times the probability of the most likely.

    Raises: ValueError naming the setting that is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # NaN as well
            raise ValueError(f"generate: temperature must be >= 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"generate: top_k must be >= 1, got {self.top_k}")
        for name, share in (("top_p", self.top_p), ("min_p", self.min_p)):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"generate: {name} must lie in (0, 1], got {share}")

    @property
    def kind(self) -> str:
        """Which operations draw a token: "greedy", "plain" or "sorted"; settings of one kind differ in `numbers`."""
        if self.temperature == 0:
            return "greedy"
        return "plain" if self.top_k is None and self.top_p is None else "sorted"

    def numbers(self, device: torch.device) -> Tensor:
        """[4] float64: temperature, top_k, top_p and min_p, those not given as bounds that keep every token."""
        bounds = (self.temperature, self.top_k or torch.inf, self.top_p or torch.inf, self.min_p or 0.0)
        return torch.tensor(bounds, dtype=torch.float64, device=device)


def sample_token(kind: str, logits: Tensor, uniform: Tensor, numbers: Tensor) -> Tensor:
    """One token per row, by inversion of the cumulative distribution: the first whose cumulative probability exceeds
    the row's uniform number.

    Args:
        kind:    of a `Sampling`.
        logits:  [B vocab], the largest of a row finite.
        uniform: [B] float64 in [0, 1); not read by "greedy".
        numbers: [4] of a `Sampling` of this kind.

    Returns: [B] ids.
    """
    if kind == "greedy":
        return logits.argmax(-1)
    temperature, top_k, top_p, min_p = numbers.unbind()
    chance = ((logits.double() - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    token = None
    if kind == "sorted":
        chance, token = torch.sort(chance, dim=-1, descending=True, stable=True)
        chance = chance * (torch.arange(chance.shape[-1], device=chance.device) < top_k)
        chance = chance / chance.sum(-1, keepdim=True)
        chance = chance * (chance.cumsum(-1) - chance < top_p)
    chance = chance * (chance >= min_p * chance.amax(-1, keepdim=True))
    reached = chance.cumsum(-1)
    total = reached[:, -1:].contiguous()
    place = torch.searchsorted(reached, uniform[:, None] * total, right=True)
    last = torch.searchsorted(reached, total)  # rounding may take uniform * total up to the total
    place = torch.minimum(place, last).clamp(max=chance.shape[-1] - 1)  # NaN must not become an id out of range
    return (place if token is None else token.gather(-1, place))[:, 0]


def uniforms(seeds: Tensor, counts: Tensor) -> Tensor:
    """[n B] float64 in [0, 1): number counts[i] of the sequence of each seed, whatever else is drawn.

    Args:
        seeds:  [B] int64.
        counts: [n] int64.
    """
    mixed = _mixed(_mixed(seeds + _GOLDEN) + (counts[:, None] + 1) * _GOLDEN)
    return _shifted(mixed, 11).double() * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    for bits, factor in _MIX:
        x = (x ^ _shifted(x, bits)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """The 64 bits of x moved to the right, zeros coming in from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
