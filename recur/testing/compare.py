"""Two ways to compute the same thing, compared: values, all gradients, and words for the largest difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map, tree_unflatten

RELATIVE = 1e-9  # of the largest entry of a tensor: how far float64 sums in another order may drift apart
ROUNDING = 1e-13  # of the largest entry among all tensors compared: what is left where large terms cancel


class LawBroken(AssertionError):
    """A law does not hold; the message names the law, the sizes, the seed and the largest difference.

    >>> raise recur.testing.LawBroken("splits: y differs by 0.5 at B=1, T=2")
    Traceback (most recent call last):
    recur.testing.compare.LawBroken: splits: y differs by 0.5 at B=1, T=2
    """


class Result(NamedTuple):
    """What a subject returns."""

    y: Tensor
    state: Any


@dataclass(frozen=True, repr=False)
class Inputs:
    """One valid call of a subject, and what the laws may know of it.

    Args:
        tokens: [B T ...] by argument name.
        constants: what all rows and tokens share, by argument name: a constant decay, the weights of a layer.
        state: [B ...] before the first token, a tensor or a tree of them; None starts afresh.
        sizes: what a counter-example reports: sizes by letter, the regime.
        seed: of the tensors, and of random numbers that a law needs.
        like: the token whose dtype, and shape, y takes.
        shape: of y after B T, where it is not that of this token.
        rotates: whether y is complex although that token is real.
        linear: tokens in which, together with the state, y is linear; none if unknown.
        idle: values that make a token leave the state alone; none if there are no such values.
        decay: the token that holds the log decay, -inf being an exact reset; None if there is none.
        forgets: values that a token needs besides to forget all before it.
        heads: the axis along which tokens, constants ("state", "y" too) are n independent recurrences, by name.

    >>> x = torch.ones(1, 3, 2, dtype=torch.float64)
    >>> recur.testing.Inputs({"x": x, "log_decay": -x}, linear=("x",), decay="log_decay").sizes
    {}
    """

    tokens: Mapping[str, Tensor]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    state: Any = None
    sizes: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    like: str = "x"
    shape: tuple[int, ...] | None = None
    rotates: bool = False
    linear: tuple[str, ...] = ()
    idle: Mapping[str, float] = field(default_factory=dict)
    decay: str | None = None
    forgets: Mapping[str, float] = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in {**self.sizes, "seed": self.seed}.items())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would print every tensor

    @property
    def batch(self) -> int:
        return self.tokens[self.like].shape[0]

    @property
    def length(self) -> int:
        return self.tokens[self.like].shape[1]

    def replace(self, **changes: Any) -> Inputs:
        return dataclasses.replace(self, **changes)

    @property
    def output_dtype(self) -> torch.dtype:
        """The dtype that is promised of y."""
        dtype = self.tokens[self.like].dtype
        if not self.rotates:
            return dtype
        return torch.complex128 if dtype == torch.float64 else torch.complex64

    def each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """With every token tensor changed."""
        return self.replace(tokens={name: change(tensor) for name, tensor in self.tokens.items()})

    def between(self, first: int, last: int) -> Inputs:
        """Tokens first .. last - 1."""
        return self.each(lambda tensor: tensor[:, first:last])

    def rows(self, index: Any) -> Inputs:
        """Those rows of the batch, in that order; index is a slice or a tensor."""
        return self.each(lambda tensor: tensor[index]).replace(state=map_tensors(lambda s: s[index], self.state))

    def random(self, like: Tensor, salt: int = 1) -> Tensor:
        """Normal numbers of this shape and dtype, fixed by the seed; up to rounding the same in every precision."""
        generator = torch.Generator().manual_seed(self.seed + (salt << 32))
        dtype = torch.complex128 if like.is_complex() else torch.float64
        return torch.randn(like.shape, generator=generator, dtype=dtype).to(like.dtype)


def map_tensors(change: Callable[[Tensor], Tensor], state: Any) -> Any:
    """A state with every tensor changed."""
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, state)


def named(prefix: str, state: Any) -> dict[str, Tensor]:
    """The tensors of a state by their path, attention caches apart.

    A cache (a state with the key "grows") has room for more tokens than it holds; it is judged by what is read from it.
    """
    if isinstance(state, dict) and "grows" in state:
        return {}
    if isinstance(state, Tensor):
        return {prefix: state}
    below = state if isinstance(state, dict) else dict(enumerate(state)) if isinstance(state, (list, tuple)) else {}
    return {path: leaf for key, value in below.items() for path, leaf in named(f"{prefix}.{key}", value).items()}


def values(result: Result) -> dict[str, Tensor]:
    """Outputs by name."""
    return {"y": result.y, **named("state", result.state)}


def weighed(inputs: Inputs, outputs: Mapping[str, Tensor]) -> Tensor:
    """A random linear function of the outputs, one real number, fixed by the seed."""
    total = torch.zeros((), dtype=torch.float64)
    for salt, tensor in enumerate(outputs.values(), 2):
        if _moves(tensor):
            total = total + (tensor * inputs.random(tensor, salt).conj()).sum().real
    return total


def leaves_of(inputs: Inputs) -> tuple[list[str], list[Tensor], Callable[[Sequence[Tensor]], Inputs]]:
    """Everything differentiable in the inputs as named leaves, and the inputs as a function of them."""
    state, tree = tree_flatten_with_path(inputs.state)
    parts = {**inputs.tokens, **inputs.constants, **{f"state{keystr(path)}": leaf for path, leaf in state}}
    names = [name for name, leaf in parts.items() if isinstance(leaf, Tensor) and _moves(leaf)]

    def rebuild(leaves: Sequence[Tensor]) -> Inputs:
        moved = {**parts, **dict(zip(names, leaves, strict=True))}
        return inputs.replace(
            tokens={name: moved[name] for name in inputs.tokens},
            constants={name: moved[name] for name in inputs.constants},
            state=tree_unflatten([moved[f"state{keystr(path)}"] for path, _ in state], tree),
        )

    leaves = [parts[name].detach().clone(memory_format=torch.contiguous_format) for name in names]
    return names, [leaf.requires_grad_() for leaf in leaves], rebuild


def values_and_gradients(run: Callable[[Inputs], Result], inputs: Inputs) -> dict[str, Tensor]:
    """Outputs by name, and the gradients of a random linear function of them to every input, as "gradient of q"."""
    names, leaves, rebuild = leaves_of(inputs)
    outputs = values(run(rebuild(leaves)))
    loss = weighed(inputs, outputs)
    if loss.requires_grad:
        slopes = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    else:  # no token and a fresh state
        slopes = tuple(torch.zeros_like(leaf) for leaf in leaves)
    found = {f"gradient of {name}": slope for name, slope in zip(names, slopes, strict=True)}
    return {name: tensor.detach() for name, tensor in {**outputs, **found}.items()}


def agree(
    inputs: Inputs, ways: tuple[str, str], one: Callable[[Inputs], Result], other: Callable[[Inputs], Result]
) -> None:
    """Raise LawBroken unless both ways have the same outputs and gradients in float64."""
    same(values_and_gradients(one, inputs), values_and_gradients(other, inputs), ways)


def same(got: Mapping[str, Tensor], want: Mapping[str, Tensor], ways: tuple[str, str]) -> None:
    """Raise LawBroken, naming the largest difference and where it is, unless all tensors are finite and equal.

    `ways` says in words how each was computed.
    """
    largest = max((_largest(tensor) for name, tensor in want.items() if not name.startswith("gradient")), default=0.0)
    steepest = max((_largest(tensor) for name, tensor in want.items() if name.startswith("gradient")), default=0.0)
    for name, right in want.items():
        left = got[name]
        if left.shape != right.shape:
            raise LawBroken(f"{name} has shape {tuple(left.shape)} {ways[0]} but {tuple(right.shape)} {ways[1]}")
        for tensor, way in ((left, ways[0]), (right, ways[1])):
            finite(name, tensor, way)
        if left.numel() == 0:
            continue
        difference = (wide(left) - wide(right)).abs()
        group = steepest if name.startswith("gradient") else largest
        if difference.max() > RELATIVE * _largest(right) + ROUNDING * group:
            at = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
            raise LawBroken(
                f"{name} differs by {difference.max().item():.1e} at {list(at)}: {_number(left[at])} {ways[0]}, "
                f"{_number(right[at])} {ways[1]} (largest entry {_largest(right):.1e})"
            )


def finite(name: str, tensor: Tensor, way: str) -> None:
    """Raise LawBroken naming the first entry that is not a finite number."""
    bad = ~torch.isfinite(tensor)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise LawBroken(f"{name} is {_number(tensor[at])} at {list(at)} {way}")


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _moves(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def wide(tensor: Tensor) -> Tensor:
    """In float64, or complex of that width."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _number(entry: Tensor) -> str:
    value = entry.item()
    return f"{value}" if isinstance(value, (int, bool)) else f"{value:.6g}"
