"""What the laws are about: a scan, which is a function, or a layer, which is a recipe with weights."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from random import Random
from typing import Any

import hypothesis
import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn
from torch.func import functional_call

from recur.blocks.glue import Along
from recur.blocks.mixer import Mixer
from recur.recipe import Part, Recipe
from recur.testing import strategies
from recur.testing.compare import Inputs, Result, map_tensors, wide

FORMS = ("recurrent", "chunked", "parallel", "triton")


class _Subject:
    """What laws ask of a scan and of a layer alike."""

    inputs: SearchStrategy[Inputs]
    takes: Callable[[str], bool]  # whether a call has this argument

    @functools.cached_property
    def sample(self) -> Inputs:
        """Some inputs of at least two tokens."""
        return _find(self.inputs, lambda inputs: inputs.length >= 2)

    @functools.cached_property
    def graphs(self) -> list[torch.fx.GraphModule]:
        """What `compiled` has been compiled into so far."""
        return []

    @functools.cached_property
    def compiled(self: Any) -> Callable[..., Any]:
        """`plain` compiled for any length into whole graphs."""

        def keep(graph: torch.fx.GraphModule, examples: Any) -> Callable[..., Any]:
            self.graphs.append(graph)
            return graph.forward

        torch.compiler.reset()  # other subjects have filled the cache of the same code
        return torch.compile(plain(self), backend=keep, fullgraph=True, dynamic=True)

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms it has; a layer, those that all its scans have."""
        return self.forms_with()

    @functools.lru_cache  # noqa: B019 - a subject lives as long as its check
    def forms_with(self, *options: str) -> tuple[str, ...]:
        """The forms it has with these options, found by asking for each."""
        return tuple(form for form in FORMS if _works(self, form, options)) if self.takes("form") else ()


@dataclass(frozen=True, eq=False)
class Scan(_Subject):
    """A function (tensors by name, initial_state=, cu_seqlens=, reverse=, form=, chunk_size=) -> (y, state).

    Only what its signature has is asked of it. `step` and `summary` belong to it and are checked against it:
    step(one token of each argument, state=) -> y, and summary(the arguments it shares with the scan) -> Summary.
    """

    function: Callable[..., Any]
    inputs: SearchStrategy[Inputs]
    step: Callable[..., Tensor] | None = None
    summary: Callable[..., Any] | None = None
    causal: bool = True
    exact_gradients = True

    @property
    def smooth_inputs(self) -> SearchStrategy[Inputs]:
        """Inputs near which outputs are smooth."""
        return self.inputs

    @property
    def name(self) -> str:
        function = getattr(self.function, "func", self.function)  # of a partial
        return getattr(function, "__name__", type(function).__name__)

    def takes(self, option: str) -> bool:
        """Whether its signature has this argument."""
        return option in inspect.signature(self.function).parameters

    def draws(self, field: str) -> bool:
        """Whether some of its inputs have this field."""
        try:
            _find(self.inputs, lambda inputs: bool(getattr(inputs, field)))
        except hypothesis.errors.NoSuchExample:
            return False
        return True

    def run(self, inputs: Inputs, **options: Any) -> Result:
        """One call."""
        if self.takes("initial_state"):
            options["initial_state"] = inputs.state
        options = {name: value for name, value in options.items() if value is not None}
        y, state = self.function(**inputs.tokens, **inputs.constants, **options)
        return Result(y, state)

    def run_step(self, inputs: Inputs, state: Any) -> Tensor:
        """The first token; `state` is overwritten."""
        assert self.step is not None
        return self.step(
            **{name: tensor[:, 0] for name, tensor in inputs.tokens.items()}, **inputs.constants, state=state
        )

    def fresh(self, inputs: Inputs) -> Any:
        """The state before the first token, which a step may overwrite."""
        return torch.zeros_like(self.run(inputs.replace(state=None)).state)

    def rounded(self, inputs: Inputs, dtype: torch.dtype) -> Inputs:
        """The same call in low precision, the state in float32."""

        def low(tensor: Tensor) -> Tensor:
            return tensor.to(torch.complex64 if tensor.is_complex() else dtype)

        constants = {name: low(tensor) for name, tensor in inputs.constants.items()}
        state = map_tensors(_low, inputs.state)
        return inputs.each(low).replace(constants=constants, state=state)

    @property
    def definitions(self) -> tuple[Callable[[Inputs], Result], ...]:
        """The token loop on inputs of low precision: as it is, and in float64 with its results rounded as promised."""

        def widened(low: Inputs) -> Result:
            constants = {name: wide(tensor) for name, tensor in low.constants.items()}
            given = low.each(wide).replace(constants=constants, state=map_tensors(wide, low.state))
            y, state = self.run(given, form="recurrent")
            return Result(y.to(low.output_dtype), map_tensors(_low, state))

        return functools.partial(self.run, form="recurrent"), widened

    def promised_state(self, inputs: Inputs, state: Any, dtype: torch.dtype) -> Any:
        """A state of the shape and dtype that inputs of this dtype must leave: float32, or float64 for float64."""
        fitting = state if inputs.state is None else inputs.state
        shape = (inputs.batch, *fitting.shape[1:])
        real = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.empty(shape, dtype=real.to_complex() if fitting.is_complex() else real)


class Layer(_Subject):
    """The layer of a recipe, or `depth` of them in a residual stack that hand tensors down, in float64."""

    summary = None

    def __init__(self, recipe: Recipe, dim: int, depth: int = 1) -> None:
        self.recipe, self.dim, self.depth = recipe, dim, depth
        self.step = self.run_step if depth == 1 else None
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.module = _Stack(recipe, dim, depth).double().eval()
        site = recipe.site(dim)
        self.reads = {"x": (dim,), **{name: site.of(name) for name in recipe.inputs}}
        self.causal = recipe.causal
        self.name = f"this recipe ({recipe.source})" if recipe.source else "this recipe"
        parts = list(parts_of(recipe.parts))
        self.exact_gradients = all(part.exact_gradients for part in parts)
        self.in_grid = any(isinstance(part, Along) for part in parts)
        self.inputs = strategies.layers(self)
        self.smooth_inputs = strategies.layers(self, loudness=("plain",))  # silence is a corner of norms

    def takes(self, option: str) -> bool:
        return option in ("initial_state", "form") or (option == "cu_seqlens" and not self.in_grid)

    def draws(self, field: str) -> bool:
        """Nothing is known of what its parts do to a token."""
        return False

    def run(self, inputs: Inputs, **options: Any) -> Result:
        """One call with the weights that the inputs hold; in a grid as square as it can be, if it reads one."""
        options = {name: value for name, value in options.items() if value is not None}
        if self.in_grid:
            rows = max((n for n in range(1, math.isqrt(inputs.length) + 1) if inputs.length % n == 0), default=1)
            options["grid"] = (rows, inputs.length // rows)
        return Result(
            *functional_call(self.module, dict(inputs.constants), (dict(inputs.tokens), inputs.state), options)
        )

    def run_step(self, inputs: Inputs, state: Any) -> Tensor:
        """The first token; `state` is overwritten."""
        tokens = {name: tensor[:, 0] for name, tensor in inputs.tokens.items()}
        return functional_call(self.module, dict(inputs.constants), (tokens, state), {"one": True})

    def fresh(self, inputs: Inputs) -> Any:
        """The state before the first token, which a step may overwrite."""
        return self.module.init_state(inputs.batch)

    def rounded(self, inputs: Inputs, dtype: torch.dtype) -> Inputs:
        """The same call in low precision from the start, the weights cast as `module.to` casts them."""
        low = dict(_Stack(self.recipe, self.dim, self.depth).to(dtype).named_parameters())
        constants = {name: tensor.to(low[name].dtype) for name, tensor in inputs.constants.items()}
        return inputs.each(lambda tensor: tensor.to(dtype)).replace(constants=constants, state=None)

    @property
    def definitions(self) -> tuple[Callable[[Inputs], Result], ...]:
        """The token loop in low precision, which rounds between its parts where every other form does."""
        return (functools.partial(self.run, form="recurrent"),)

    def promised_state(self, inputs: Inputs, state: Any, dtype: torch.dtype) -> Any:
        """What `init_state` gives in this dtype; what a recipe that is not causal leaves is not promised."""
        return _Stack(self.recipe, self.dim, self.depth).to(dtype).init_state(inputs.batch) if self.causal else state


Subject = Scan | Layer


def plain(subject: Subject) -> Callable[..., Any]:
    """The call of tokens by name alone, everything else as in the subject's sample."""
    sample = subject.sample
    if isinstance(subject, Scan):
        state = {"initial_state": sample.state} if subject.takes("initial_state") else {}
        return functools.partial(subject.function, **sample.constants, **state)
    module, before = subject.module, sample.state
    return lambda **tokens: module(tokens, before)


class _Stack(nn.Module):
    """Layers of one recipe: the first alone, deeper ones added to what came before."""

    def __init__(self, recipe: Recipe, dim: int, depth: int) -> None:
        super().__init__()
        self.shared = nn.ModuleDict()
        mixers = [Mixer(recipe, dim, depth=depth, layer=layer, shared=self.shared) for layer in range(depth)]
        self.mixers: Any = nn.ModuleList(mixers)

    def forward(self, tokens: Mapping[str, Tensor], state: Any = None, one: bool = False, **options: Any) -> Any:
        """The whole run; or, with `one`, one step."""
        x, further = tokens["x"], {name: tensor for name, tensor in tokens.items() if name != "x"}
        if one:
            return self.mixers[0].step(x, state["0"], **further)
        states = {}
        past: tuple[Mapping[str, Tensor], ...] = ()
        for layer, mixer in enumerate(self.mixers):
            before = None if state is None else state[str(layer)]
            flow, states[str(layer)] = mixer.run(x, before, further, past=past, **options)
            x, past = flow["y"] if layer == 0 else x + flow["y"], (*past, flow.published)
        return x, states

    def init_state(self, batch: int) -> Any:
        return {str(layer): mixer.init_state(batch) for layer, mixer in enumerate(self.mixers)}


def parts_of(value: Any) -> Iterator[Part]:
    """All parts in a recipe's parts, those inside others included."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from parts_of(item)
    elif isinstance(value, Part):
        yield value
        for field in fields(value):
            yield from parts_of(getattr(value, field.name))


def subject_of(
    subject: Recipe | Callable[..., Any], strategy: SearchStrategy[Inputs] | None, dim: int, depth: int, *own: Any
) -> Scan | Layer:
    """What `check` was given, as something laws can be run on. Raises: TypeError saying what is missing."""
    if isinstance(subject, Recipe):
        return Layer(subject, dim, depth)
    if not callable(subject):
        raise TypeError(f"check: subject must be a Recipe or a scan, got {type(subject).__name__}")
    if strategy is None:
        raise TypeError(
            "check: a scan needs a strategy that draws its inputs, such as recur.testing.strategies.scans()"
        )
    return Scan(subject, strategy, *own)


def _find(inputs: SearchStrategy[Inputs], fits: Callable[[Inputs], bool]) -> Inputs:
    quick = hypothesis.settings(database=None, deadline=None, phases=[hypothesis.Phase.generate], max_examples=50)
    return hypothesis.find(inputs, fits, settings=quick, random=Random(0))


def _works(subject: Any, form: str, options: Collection[str]) -> bool:
    """Whether the subject has this form: it says so by NotImplementedError."""
    row = subject.sample.rows(slice(0, 1))
    given = {"cu_seqlens": torch.tensor([0, row.length]), "reverse": True}
    try:
        with torch.no_grad():
            subject.run(row, form=form, **{name: given[name] for name in options})
    except NotImplementedError:
        return False
    return True


def _low(state: Tensor) -> Tensor:
    return state.to(torch.complex64 if state.is_complex() else torch.float32)
