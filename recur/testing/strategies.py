"""Hypothesis strategies that draw structure (sizes, regimes, split points) and a seed; tensors are made from the seed.

Every strategy yields `Inputs` in float64: B from 1, T from 0 through primes to chunk borders, odd G, H, K, V, a state
or none. Smaller comes first, so that a counter-example shrinks to short rows, gates that keep everything and seed 0.
A strategy for a scan of your own is a function like those below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from recur.testing.compare import Inputs

CHUNK_EDGES = (15, 16, 17, 31, 63, 64, 65, 97)  # around the powers of two that chunks are made of
MIXED = (0.0, 1e-9, 0.3, 5.0, 80.0, 700.0, math.inf)

# -log of a gate, made from normal and from uniform numbers of the wanted shape; simplest first
REGIMES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "keeps all": lambda normal, uniform: torch.zeros_like(normal),
    "leaks": lambda normal, uniform: 0.1 * normal.abs(),
    "forgets": lambda normal, uniform: 50 * normal.abs(),
    "resets": lambda normal, uniform: torch.where(uniform < 0.3, math.inf, 0.1 * normal.abs()),
    "near 1": lambda normal, uniform: 1e-9 * uniform,
    "1e-30": lambda normal, uniform: torch.full_like(normal, -math.log(1e-30)),
    "mixed": lambda normal, uniform: torch.tensor(MIXED, dtype=normal.dtype)[(uniform * len(MIXED)).long()],
}


class Numbers:
    """Random tensors in float64, one after another from one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def number(self, *shape: int, complex: bool) -> Tensor:
        """Normal numbers, real or complex."""
        return torch.complex(self.normal(*shape), self.normal(*shape)) if complex else self.normal(*shape)

    def log_decay(self, regime: str, *shape: int, complex: bool = False) -> Tensor:
        """A log decay <= 0 of that regime; if complex, with phases of some whole turns."""
        real = -REGIMES[regime](self.normal(*shape), self.uniform(*shape))
        return torch.complex(real, 4 * self.normal(*shape)) if complex else real


def seeds() -> SearchStrategy[int]:
    """What tensors are made from."""
    return st.integers(0, 2**31 - 1)


def batches(most: int = 3) -> SearchStrategy[int]:
    """B."""
    return st.integers(1, most)


def lengths(edges: tuple[int, ...] = CHUNK_EDGES) -> SearchStrategy[int]:
    """T: 0, 1, small primes and others, and the borders of chunks."""
    return st.one_of(st.integers(0, 9), st.sampled_from(edges))


def regimes() -> SearchStrategy[str]:
    """A name among REGIMES."""
    return st.sampled_from(list(REGIMES))


def cuts(length: int) -> SearchStrategy[int]:
    """Where to split T tokens, the ends included."""
    return st.integers(0, length)


def documents(rows: int, length: int) -> SearchStrategy[list[int]]:
    """How many tokens each of `rows` documents has: 0 (empty) to `length`."""
    return st.lists(st.integers(0, length), min_size=rows, max_size=rows)


def _axis(most: int = 4) -> SearchStrategy[int]:
    return st.integers(1, most)


@st.composite
def scans(
    draw: DrawFn,
    *,
    decay: str | None = "B T H K",
    complex: bool = False,
    tied: bool = False,
    delta: bool = False,
    bonus: str | None = None,
    erase: str | None = None,
    previous: bool = False,
    remove: str | None = None,
    write: str | None = None,
    several: bool = False,
) -> Inputs:
    """Arguments of `recur.scan`.

    Args:
        decay: its axes, None, "H", "H K", "B T H" or "B T H K".
        complex: whether the gate rotates.
        tied: without k, which is 1 - exp(log_decay).
        delta: with beta in (0, 1) and keys of length at most 1.
        bonus: its axes, "H" or "H K".
        erase: "G" or "H", an erase key per group or per head.
        previous: for a scan with erase_from="previous".
        remove: "G" or "H", a removal key per group or per head.
        write: "H" or "V", a write gate per head or per channel.
        several: several writes and reads per token.

    >>> from recur.testing import strategies
    >>> recur.testing.check(recur.scan, strategies.scans(decay="B T H"), laws=["splits"], examples=2)
    ['splits']
    """
    B, T, G = draw(batches()), draw(lengths()), draw(st.integers(1, 3))
    H, K, V = G * draw(st.integers(1, 3)), draw(_axis()), draw(_axis())
    M, R = ([draw(st.integers(1, 3))] if several else [] for _ in range(2))
    regime = "none" if decay is None else draw(regimes())
    numbers = Numbers(draw(seeds()))
    sizes = {"B": B, "T": T, "H": H, "G": G, "K": K, "V": V}
    q, k, v = numbers.normal(B, T, *R, G, K), numbers.normal(B, T, *M, G, K), numbers.normal(B, T, *M, H, V)
    if delta or erase is not None:
        k = _shortened(k, 1)
    writes, reads = 2 + len(M), 2 + len(R)  # where the heads are
    tokens, heads = {"q": q, "v": v}, {"q": reads, "v": writes, "state": 1, "y": reads}
    constants: dict[str, Tensor] = {}
    if not tied:
        tokens["k"], heads["k"] = k, writes
    if decay is not None:
        log_decay = numbers.log_decay(regime, *(sizes[letter] for letter in decay.split()), complex=complex)
        (tokens if decay.startswith("B T") else constants)["log_decay"] = log_decay
        heads["log_decay"] = decay.split().index("H")
    if delta:
        tokens["beta"], heads["beta"] = numbers.uniform(B, T, *M, H), writes
    if bonus is not None:
        constants["bonus"], heads["bonus"] = numbers.normal(*(sizes[letter] for letter in bonus.split())), 0
    for name, axis in (("erase", erase), ("remove", remove)):
        if axis is not None:
            tokens[name], heads[name] = _shortened(numbers.normal(B, T, *M, sizes[axis], K), 1.5), writes
    if write is not None:
        tokens["write"], heads["write"] = numbers.normal(B, T, *M, H, *([V] if write == "V" else [])), writes
    state = numbers.number(B, H, K, V, complex=complex) if draw(st.booleans()) else None
    varies, erases = "log_decay" in tokens, {"erase": 0.0} if erase is not None else {}
    idle = ({"log_decay": 0.0} if varies else {}) | ({"beta": 0.0} if delta else {} if tied else {"k": 0.0} | erases)
    forgets = ({"beta": 0.0} if delta else erases) if previous else {}
    known: dict[str, Any] = {"idle": {} if "log_decay" in constants else idle, "heads": heads, "forgets": forgets}
    known |= {"like": "v", "linear": ("v",), "decay": "log_decay" if varies else None}
    known |= {"shape": (*R, H, V) if several else None}
    shown: dict[str, Any] = sizes | {"regime": regime} | ({"M": M[0], "R": R[0]} if several else {})
    return Inputs(tokens, constants, state, shown, numbers.seed, **known)


def _shortened(keys: Tensor, divisor: float) -> Tensor:
    """Keys no longer than 1 / divisor: longer ones would make a scan that erases explode."""
    return keys / (divisor * keys.norm(dim=-1, keepdim=True).clamp(min=1))


@st.composite
def gated_scans(draw: DrawFn, *, constant: bool = False, complex: bool = False, complex_input: bool = False) -> Inputs:
    """Arguments of `recur.gated_scan`, with no, one or two axes after B T.

    Args:
        constant: whether the decay is the same at every token.
        complex: whether it rotates.
        complex_input: whether x is complex.

    >>> from recur.testing import strategies
    >>> recur.testing.check(recur.gated_scan, strategies.gated_scans(), laws=["splits"], examples=2)
    ['splits']
    """
    B, T, regime = draw(batches()), draw(lengths()), draw(regimes())
    trailing = tuple(draw(st.lists(_axis(), max_size=2)))
    numbers = Numbers(draw(seeds()))
    log_decay = numbers.log_decay(regime, *(trailing if constant else (B, T, *trailing)), complex=complex)
    x = numbers.number(B, T, *trailing, complex=complex_input)
    tokens, constants = ({"x": x}, {"log_decay": log_decay}) if constant else ({"x": x, "log_decay": log_decay}, {})
    sizes = {"B": B, "T": T, "*": trailing, "regime": regime}
    state = numbers.number(B, *trailing, complex=complex or complex_input) if draw(st.booleans()) else None
    heads = {"x": 2, "log_decay": 0 if constant else 2, "state": 1, "y": 2} if trailing else {}
    known: dict[str, Any] = {} if constant else {"idle": {"log_decay": 0.0, "x": 0.0}, "decay": "log_decay"}
    known |= {"linear": ("x",), "heads": heads, "rotates": complex and not complex_input}
    return Inputs(tokens, constants, state, sizes, numbers.seed, **known)


@st.composite
def selective_scans(draw: DrawFn, *, weights: str = "B T N") -> Inputs:
    """Arguments of `recur.selective_scan`.

    Args:
        weights: axes of B and C, "B T N", "B T G N" or "V N".

    >>> from recur.testing import strategies
    >>> recur.testing.check(recur.selective_scan, strategies.selective_scans(), laws=["splits"], examples=2)
    ['splits']
    """
    B, T, G = draw(batches()), draw(lengths()), draw(st.integers(1, 3)) if weights == "B T G N" else 1
    V, N = G * draw(st.integers(1, 3)), draw(_axis())
    regime = draw(st.sampled_from(["leaks", "keeps all", "forgets", "mixed"]))
    numbers = Numbers(draw(seeds()))
    sizes: dict[str, Any] = {"B": B, "T": T, "G": G, "V": V, "N": N}
    delta = REGIMES[regime](numbers.normal(B, T, V), numbers.uniform(B, T, V)).clamp(1e-12, 700)
    A = -0.1 - numbers.normal(V, N).abs()
    write, read = (numbers.normal(*(sizes[letter] for letter in weights.split())) for _ in range(2))
    tokens, constants = {"x": numbers.normal(B, T, V), "delta": delta}, {"A": A}
    heads = {"x": 2, "delta": 2, "A": 0, "state": 1, "y": 2}
    (constants if weights == "V N" else tokens).update(B=write, C=read)
    if weights != "B T N":
        heads |= {"B": weights.split().index(weights.split()[-2]), "C": weights.split().index(weights.split()[-2])}
    state = numbers.normal(B, V, N) if draw(st.booleans()) else None
    sizes |= {"regime": regime}
    return Inputs(tokens, constants, state, sizes, numbers.seed, linear=("x",), idle={"delta": 0.0}, heads=heads)


@st.composite
def online_scans(draw: DrawFn, *, groups: bool = False) -> Inputs:
    """Arguments of `recur.online_scan`; keys short, long or 0.

    Args:
        groups: whether k and q are [B T G N]; else [B T N].

    >>> from recur.testing import strategies
    >>> recur.testing.check(recur.online_scan, strategies.online_scans(), laws=["splits"], examples=2)
    ['splits']
    """
    B, T, G = draw(batches()), draw(lengths()), draw(st.integers(1, 3)) if groups else 1
    V, N = G * draw(st.integers(1, 3)), draw(_axis())
    regime = draw(st.sampled_from(["medium", "no keys", "hardly writes", "long keys", "fast"]))
    numbers = Numbers(draw(seeds()))
    rate = numbers.uniform(B, T, V).clamp(0.2, 0.8)
    rate = {"hardly writes": 1e-5 * rate, "fast": 1 - 1e-5 * rate}.get(regime, rate)
    axes = (G, N) if groups else (N,)
    k, q = numbers.normal(B, T, *axes), numbers.normal(B, T, *axes)
    k = k * {"no keys": 0.0, "long keys": 100.0}.get(regime, 1.0)
    heads = {"x": 2, "rate": 2, "state": 1, "y": 2} | ({"k": 2, "q": 2} if groups else {})
    tokens = {"x": numbers.normal(B, T, V), "rate": rate, "k": k, "q": q}
    state = numbers.normal(B, V, N) if draw(st.booleans()) else None
    sizes = {"B": B, "T": T, "G": G, "V": V, "N": N, "regime": regime}
    return Inputs(tokens, {}, state, sizes, numbers.seed, linear=("x",), idle={"k": 0.0}, heads=heads)


@st.composite
def fixed_scans(draw: DrawFn, *, poles: str = "N", write: bool = False, complex: bool = True) -> Inputs:
    """Arguments of `recur.fixed_scan`.

    Args:
        poles: their axes, "N" or "V N".
        write: whether there are write weights [V N].
        complex: whether the poles rotate.

    >>> from recur.testing import strategies
    >>> recur.testing.check(recur.fixed_scan, strategies.fixed_scans(), laws=["splits"], examples=2)
    ['splits']
    """
    B, T, V, N, regime = draw(batches()), draw(lengths()), draw(_axis()), draw(_axis()), draw(regimes())
    numbers = Numbers(draw(seeds()))
    sizes: dict[str, Any] = {"B": B, "T": T, "V": V, "N": N}
    constants = {
        "log_decay": numbers.log_decay(regime, *(sizes[letter] for letter in poles.split()), complex=complex),
        "readout": numbers.number(V, N, complex=complex),
    }
    heads = {"x": 2, "readout": 0, "state": 1, "y": 2} | ({"log_decay": 0} if poles == "V N" else {})
    if write:
        constants["write"], heads["write"] = numbers.number(V, N, complex=complex), 0
    x = numbers.normal(B, T, V)
    state = numbers.number(B, V, N, complex=complex) if draw(st.booleans()) else None
    sizes |= {"regime": regime}
    return Inputs({"x": x}, constants, state, sizes, numbers.seed, linear=("x",), heads=heads)


# of what a layer reads; loud saturates its gates
LOUDNESS = {"plain": 1.0, "silent": 0.0, "faint": 1e-30, "loud": 30.0}


@st.composite
def layers(draw: DrawFn, layer: Any, loudness: tuple[str, ...] = tuple(LOUDNESS)) -> Inputs:
    """Inputs of a `recur.testing.subjects.Layer`: weights off their first values, a state after some tokens or none."""
    B, T = draw(batches()), draw(lengths(edges=(16, 17, 65)))
    before = draw(st.integers(0, 3)) if layer.causal else 0
    volume = draw(st.sampled_from(loudness))
    numbers = Numbers(draw(seeds()))
    weights = {name: weight.detach() for name, weight in layer.module.named_parameters()}
    weights = {name: weight + 0.1 * numbers.normal(*weight.shape) for name, weight in weights.items()}

    def tokens(length: int) -> dict[str, Tensor]:
        return {name: LOUDNESS[volume] * numbers.normal(B, length, *axes) for name, axes in layer.reads.items()}

    sizes = {"B": B, "T": T, "D": layer.dim, "tokens before": before, "input": volume}
    inputs = Inputs(tokens(T), weights, None, sizes, numbers.seed)
    if before:
        with torch.no_grad():
            inputs = inputs.replace(state=layer.run(inputs.replace(tokens=tokens(before))).state)
    return inputs
