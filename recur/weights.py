"""How weights are declared: shape, first value, and what an optimiser or a cast may do with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recur.axes import evaluate
from recur.shapes import pick

Init = Callable[[Tensor], Any]  # fills a tensor in place


@dataclass(frozen=True)
class Param:
    """One weight.

    Args:
        shape: its sizes.
        init: a function that fills it in place. It travels with the module: pickle wants a function of a module, or a
            functools.partial of one, not a lambda.
        decay: whether weight decay applies: matrices yes; gates, time constants, norms and biases no.
        float32: kept at least float32 when the module is cast to half precision.
        trainable: False for what is loaded and frozen.

    >>> recur.Param((4,), torch.nn.init.ones_, decay=False).shape
    (4,)
    """

    shape: tuple[int, ...]
    init: Init
    decay: bool = True
    float32: bool = False
    trainable: bool = True


class Weights(nn.Module):
    """The parameters of one part, each remembering its declaration, and `facts`: numbers that its sizes fix.

    A part runs by calling this module with its function, so that hooks, pruning, wrappers and `compile()` take effect.
    """

    def __init__(self, params: Mapping[str, Param], facts: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.__dict__.update(facts or {})
        self.declared = dict(params)
        for name, param in self.declared.items():
            kind = torch.promote_types(torch.get_default_dtype(), torch.float32) if param.float32 else None
            weight = torch.empty(param.shape, dtype=kind)
            self.register_parameter(name, nn.Parameter(weight, requires_grad=param.trainable))
        self.reset_parameters()

    if TYPE_CHECKING:  # parameters are looked up by name

        def __getattr__(self, name: str) -> Any: ...

    def declared_or_none(self, name: str) -> Tensor | None:
        """The weight of that name, if it is declared."""
        return getattr(self, name) if name in self.declared else None

    def reset_parameters(self) -> None:
        """Draw every weight anew from its declared law."""
        with torch.no_grad():
            for name, param in self.declared.items():
                param.init(getattr(self, name))

    def forward(self, act: Callable[..., Any], flow: Any, state: Any, *tensors: Tensor) -> Any:
        if not tensors:
            return act(flow, self, state)
        before = flow.set(**dict(zip(flow.tensors, tensors, strict=True)))
        after, state = act(before, self, state)
        written = {name: tensor for name, tensor in after.tensors.items() if tensor is not before.tensors.get(name)}
        return *written.values(), tuple(written), after, state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Weights:
        pinned = [weight for weight, param in _own(self) if param.float32]
        for name, param in self.declared.items():
            if param.float32 and parametrize.is_parametrized(self, name):
                pinned += self.parametrizations[name].buffers()
        kept = {id(tensor): tensor for weight in pinned for tensor in (weight, weight.grad) if tensor is not None}

        def cast(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            if id(tensor) in kept and made.dtype in (torch.float16, torch.bfloat16):  # move, but keep the numbers
                return tensor.to(device=made.device, dtype=torch.float32)
            return made

        super()._apply(cast, recurse)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{name} {list(param.shape)}" for name, param in self.declared.items())


class Linear(Weights):
    """y = W x (+ b), of a `weight` and maybe a `bias` that are declared."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, self.declared_or_none("bias"))


class Embedding(Weights):
    """Rows of a declared `weight` [rows D] by their ids; the row `padding`, if any, learns nothing by being read."""

    def __init__(self, weight: Param, padding: int | None = None) -> None:
        super().__init__({"weight": weight}, {"padding": padding})

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        return F.embedding(ids, self.weight, self.padding)


def call(module: nn.Module, act: Callable[..., Any], flow: Any, state: Any) -> tuple[Any, Any]:
    """(flow, state) after `act` of these, through the module of a part, so that its hooks run.

    Backward hooks see the tensors among arguments and results alone. If there are any, the tensors of the flow are
    further arguments, and the results begin with the tensors that the part writes. Parts that read none of them, such
    as Learned, have a gradient of outputs alone, which a backward pre-hook sees.
    """
    if not (module._backward_hooks or module._backward_pre_hooks):
        return module(act, flow, state)
    *written, names, after, state = module(act, flow, state, *flow.tensors.values())
    return replace(after, tensors={**flow.tensors, **dict(zip(names, written, strict=True))}), state


def watched(module: nn.Module) -> bool:
    """Whether this module must be called: it has a hook, compile(), a wrapper or another forward.

    Who computes with its weights in another way must then call it instead.
    """
    return not isinstance(module, Weights) or hooked(module)


def hooked(module: nn.Module) -> bool:
    """Whether a hook, compile() or a forward that replaces its own changes what a call of this module does."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )


# What torch's wrappers call the module inside: torch.compile, DDP, FSDP, activation checkpointing.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrapped(name: str) -> str:
    """A key without the names of wrappers, at any depth: "_orig_mod.layers.0.module.weight" is "layers.0.weight"."""
    *modules, tensor = name.split(".")
    return ".".join([*(module for module in modules if module not in WRAPPERS), tensor])


def parameter_count(module: nn.Module) -> int:
    """The number of parameters of a module."""
    return sum(weight.numel() for weight in module.parameters())


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: weight decay where it is declared, none on gates, norms and biases.

    Only weights that require a gradient are listed.   Raises: TypeError if one of them is not declared.
    """
    decays = {id(weight): param.decay for weight, param in declared(module)}
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    if undeclared := [name for name, weight in weights.items() if id(weight) not in decays]:
        raise TypeError(f"decay_groups: every weight must be declared by a Param, got {', '.join(undeclared)}")
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for weight in weights.values():
        groups[decays[id(weight)]].append(weight)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def declared(module: nn.Module) -> Iterator[tuple[nn.Parameter, Param]]:
    """Every declared parameter of a module with its declaration, each once.

    Of a weight that torch.nn.utils.parametrize or prune has replaced, the parameters that it is computed from.
    """
    seen = set()
    for owner in module.modules():
        if isinstance(owner, Weights):
            for weight, param in _own(owner):
                if id(weight) not in seen:
                    seen.add(id(weight))
                    yield weight, param


def _own(owner: Weights) -> Iterator[tuple[nn.Parameter, Param]]:
    """The parameters behind each declared weight of one module."""
    for name, param in owner.declared.items():
        for suffix in ("", "_orig", "_g", "_v"):  # torch.nn.utils: prune and spectral_norm; weight_norm
            weight = owner._parameters.get(name + suffix)
            if weight is not None and (not suffix or name + suffix not in owner.declared):
                yield weight, param
        if parametrize.is_parametrized(owner, name):
            for weight in owner.parametrizations[name].parameters():
                yield weight, param


# ---------------------------------------------------------------------- laws of initialisation


# Functions of this module and partials of them, which pickle with the module that they have filled.


def _fill(weight: Tensor, value: float) -> None:
    weight.fill_(value)


def _normal(weight: Tensor, mean: float, std: float) -> None:
    weight.normal_(mean, std)


def _uniform(weight: Tensor, low: float, high: float) -> None:
    weight.uniform_(low, high)


def _cut_normal(weight: Tensor, std: float) -> None:
    # by the inverse of its distribution; nn.init.trunc_normal_ draws again until all fit, which fake tensors cannot
    within = math.erf(2**0.5)  # the share of N(0, 1) between -2 and 2
    weight.uniform_(-within, within).erfinv_().mul_(std * 2**0.5).clamp_(-2 * std, 2 * std)


def _by_index(weight: Tensor, expression: str, place: Mapping[str, Any]) -> None:
    values = [evaluate(expression, {**place, "i": i}) for i in range(weight.shape[-1])]
    weight.copy_(torch.tensor(values, dtype=torch.float64, device=weight.device))


def _orthogonal(weight: Tensor, gain: float) -> None:
    torch.nn.init.orthogonal_(weight, gain)


def constant(value: float) -> Init:
    return partial(_fill, value=value)


zeros, ones = constant(0.0), constant(1.0)


def normal(std: float = 1.0, mean: float = 0.0) -> Init:
    return partial(_normal, mean=mean, std=std)


def uniform(bound: float) -> Init:
    return between(-bound, bound)


def between(low: float, high: float) -> Init:
    """Uniform from `low` to `high`."""
    return partial(_uniform, low=low, high=high)


def cut_normal(std: float) -> Init:
    """A normal distribution truncated at two standard deviations, of standard deviation `std` after truncation."""
    return partial(_cut_normal, std=std / 0.87962566103423978)  # the deviation of N(0, 1) between -2 and 2


def orthogonal(gain: float) -> Init:
    """Rows or columns, whichever are fewer, orthogonal and of length `gain`."""
    return partial(_orthogonal, gain=gain)


def by_index(expression: str, site: Any) -> Init:
    """The value of an expression over the index i along the last axis, the axes, `layer` and `depth` of a Site."""
    return partial(_by_index, expression=expression, place={**site.sizes, "layer": site.layer, "depth": site.depth})


def spread_time_constants(bias: Tensor, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> None:
    """Fill with b so that softplus(b) is log-uniform in [low, high] and at least floor."""
    delta = torch.empty_like(bias).uniform_(math.log(low), math.log(high)).exp_().clamp_(min=floor)
    bias.copy_(delta + torch.log(-torch.expm1(-delta)))


def matrix_init(law: str, fan_in: int, fan_out: int, depth: int) -> Init:
    """The first weights that a projection can name.

    "linear":   U(-b, b), b = 1/sqrt(fan_in), as torch's Linear, biases too.
    "residual": the same divided by sqrt(depth), for what adds to the residual stream; biases are 0, as of all others.
    "residual_twice": the same for what adds to it twice per layer.
    "linear_zero": "linear" with biases of 0.
    "normal":   N(0, 0.02^2).
    "normal_residual": N(0, 0.02^2 / (2 depth)), for what adds to the residual stream twice per layer.
    "xavier":   uniform Xavier with gain 2^-2.5.
    "glorot":   uniform Xavier.
    "lecun":    N(0, 1/fan_in) cut off at two deviations, as Flax's Dense.
    "unscaled": N(0, 1).
    "orthogonal": orthogonal; "orthogonal_tenth": 0.1 max(1, sqrt(fan_in/fan_out)) times that; "orthogonal_half":
                0.5 max(1, sqrt(fan_out/fan_in)) times that.
    "zeros":    0.

    Raises: ValueError for another name.
    """
    laws = {
        "linear": uniform(fan_in**-0.5),
        "residual": uniform((fan_in * depth) ** -0.5),
        "residual_twice": uniform((fan_in * 2 * depth) ** -0.5),
        "linear_zero": uniform(fan_in**-0.5),
        "normal": normal(0.02),
        "normal_residual": normal(0.02 * (2 * depth) ** -0.5),
        "xavier": uniform(2**-2.5 * math.sqrt(6 / (fan_in + fan_out))),
        "glorot": uniform(math.sqrt(6 / (fan_in + fan_out))),
        "lecun": cut_normal(fan_in**-0.5),
        "unscaled": normal(),
        "orthogonal": orthogonal(1.0),
        "orthogonal_tenth": orthogonal(0.1 * max(1, (fan_in / fan_out) ** 0.5)),
        "orthogonal_half": orthogonal(0.5 * max(1, (fan_out / fan_in) ** 0.5)),
        "zeros": zeros,
    }
    return pick("init", "law", law, laws)


def bias_init(law: str, fan_in: int) -> Init:
    """The law of the bias beside a matrix of such a law: as torch's Linear, N(0, 1) or 0."""
    laws = {"linear": uniform(fan_in**-0.5), "unscaled": normal()}
    return laws.get(law, zeros)
