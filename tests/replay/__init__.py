"""Recorded vectors and how ours runs on them: what tests/golden.py and tests/test_golden.py share.

A file of vectors names the module or operator it was recorded from; each family has a file here with a table
`CASES` from that name to a `Case`. A module goes through recur.convert, an operator through the public scans.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

import recur

Result = tuple[Tensor, dict[str, Tensor]]
FLAGS = ("ablate_complex", "ablate_state_transition", "frozen_shared_embedding", "to_logits_layernorm_patch")


class Vectors:
    """One recorded file: its configuration, and its tensors by section ("param", "input", "state", "grad.param")."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, "pt") as file:
            self.config = json.loads(file.metadata()["config"])

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return recur.convert.read_checkpoint(self.path)[0]

    def section(self, name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): t for key, t in self.tensors.items() if key.startswith(f"{name}.")}

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """Leaves that collect gradients, if they are no ids."""
        return {key: t.requires_grad_(t.is_floating_point()) for key, t in self.section("input").items()}

    @property
    def case(self) -> str:
        """The recorded module without its explanation, or the recorded case."""
        return self.config["module"].partition(" (")[0] if "module" in self.config else self.config["case"]

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the recorded module's constructor, and options of the call or made after construction."""
        flags = {flag: self.config[flag] for flag in FLAGS if flag in self.config}
        constructor = self.config.get("kwargs") or self.config.get("model_config") or {}
        return {**constructor, **flags, **self.config.get("call_kwargs", {})}

    @property
    def results(self) -> dict[str, Tensor]:
        """Everything recorded that a run must give: "output", "output.*", "state.*" and further named tensors."""
        known = ("param.", "input.", "grad.", "cotangent")
        return {key: tensor for key, tensor in self.tensors.items() if not key.startswith(known)}


@dataclass
class Run:
    """What ours gave: results under recorded names, and after `backward` gradients.

    gradients: of recorded parameters; weights: of recorded inputs that are weights of ours.
    """

    results: Mapping[str, Tensor]
    gradients: Callable[[], Mapping[str, Tensor]] = dict
    weights: Callable[[], Mapping[str, Tensor]] = dict


@dataclass(frozen=True)
class Case:
    """How one recorded module or operator runs on ours.

    unread:  endings of the names of results that nothing of ours holds.
    streams: whether it runs token by token.
    """

    unread: tuple[str, ...] = field(default=(), kw_only=True)
    streams: bool = field(default=False, kw_only=True)

    def whole(self, vectors: Vectors, form: str) -> Run:
        """All tokens at once."""
        raise NotImplementedError

    def stepped(self, vectors: Vectors) -> Run:
        """Token by token, without gradients."""
        raise NotImplementedError

    def streams_in(self, vectors: Vectors) -> bool:
        """Whether it does so in this file."""
        return self.streams

    def recorded(self, key: str, tensor: Tensor) -> Tensor:
        """What ours is compared with."""
        return tensor


@dataclass(frozen=True)
class Operator(Case):
    """A function of the form and the recorded inputs by name: the output, and further results by name.

    options: entries of the configuration that it takes as well.
    """

    function: Callable[..., Result]
    options: tuple[str, ...] = ()

    def whole(self, vectors: Vectors, form: str) -> Run:
        y, more = self.function(form, **vectors.inputs, **{key: vectors.config[key] for key in self.options})
        return Run({"output": y, **more})


@dataclass(frozen=True)
class Streaming(Operator):
    """An operator that goes on from the states that it leaves.

    carried: recorded states -> the inputs that they are for the next token; constant: inputs that have no time.
    """

    carried: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    constant: tuple[str, ...] = field(default=(), kw_only=True)
    streams: bool = field(default=True, kw_only=True)

    @torch.no_grad()
    def stepped(self, vectors: Vectors) -> Run:
        given, options = dict(vectors.inputs), {key: vectors.config[key] for key in self.options}
        fixed = {key: given.pop(key) for key in (*self.constant, *self.carried.values()) if key in given}
        states, ys = fixed, []
        for t in range(next(iter(given.values())).shape[1]):
            token = {key: tensor[:, t : t + 1] for key, tensor in given.items()}
            y, more = self.function("recurrent", **token, **states, **options)
            states = {**states, **{theirs: more[ours] for ours, theirs in self.carried.items() if ours in more}}
            ys.append(y)
        return Run({"output": torch.cat(ys, 1), **more})


@dataclass(frozen=True)
class Module(Case):
    """A module that recur.convert knows as `name`.

    states: of the parts of one layer, and the number of tokens -> recorded states.
    """

    name: str
    states: Callable[[Mapping[str, Any], int], dict[str, Tensor]] = lambda parts, length: {}
    streams: bool = field(default=True, kw_only=True)

    def recorded(self, key: str, tensor: Tensor) -> Tensor:
        return tensor[..., 1:] if key.startswith("state.conv") else tensor  # one input more than a convolution needs

    def arguments(self, vectors: Vectors) -> dict[str, Any]:
        """The configuration from which ours is built."""
        return vectors.arguments

    def make(self, vectors: Vectors) -> Any:
        module = recur.convert.from_official(self.name, vectors.section("param"), self.arguments(vectors))
        return module.eval()  # recorded without dropout

    def inputs(self, vectors: Vectors, module: Any) -> tuple[Tensor, dict[str, Tensor], tuple[dict[str, Tensor], ...]]:
        """x or ids, batch first; further inputs; what shallower layers published."""
        given = dict(vectors.inputs)
        first = next(key for key in ("0", "x", "hidden_states", "input_ids") if key in given)
        return given[first], {}, ()

    def output(self, vectors: Vectors, y: Tensor) -> Tensor:
        """In the recorded layout."""
        return y

    def start(self, vectors: Vectors, module: Any, batch: int) -> Any:
        """The state before the first token."""
        return module.init_state(batch)

    def given(self, vectors: Vectors, module: Any) -> Any:
        """The recorded state that a whole run starts from."""
        return None

    def run(self, module: Any, x: Tensor, state: Any, form: str, extra: Any, past: Any) -> tuple[Tensor, Any, Any]:
        """The output, the state, and what the layer published."""
        if isinstance(module, recur.LanguageModel):
            return *module(x, state, return_state=True, form=form), {}
        flow, state = module.run(x, state, extra, form=form, past=past)
        return flow["y"], state, flow.published

    def all_states(self, vectors: Vectors, state: Any, length: int) -> dict[str, Tensor]:
        if "layers" not in state:
            return {f"state.{key}": tensor for key, tensor in self.states(state["parts"], length).items()}
        layers = enumerate(self.states(layer["mixer"]["parts"], length) for layer in state["layers"])
        return {f"state.{key}.{i}": tensor for i, layer in layers for key, tensor in layer.items()}

    def further(self, vectors: Vectors, y: Tensor, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Recorded results that are neither output nor state: a language model's loss."""
        if "loss" not in vectors.results:
            return {}
        loss = F.cross_entropy(y[:, :-1].flatten(0, 1), vectors.inputs["input_ids"][:, 1:].flatten())
        return {"loss": loss.view(vectors.results["loss"].shape)}

    def whole(self, vectors: Vectors, form: str) -> Run:
        module = self.make(vectors)
        x, extra, past = self.inputs(vectors, module)
        y, state, published = self.run(module, x, self.given(vectors, module), form, extra, past)
        states = self.all_states(vectors, state, x.shape[1])
        results = {"output": self.output(vectors, y), **states, **self.further(vectors, y, published)}
        return Run(results, lambda: gradients(self.name, module))

    @torch.no_grad()
    def stepped(self, vectors: Vectors) -> Run:
        module = self.make(vectors)
        x, extra, past = self.inputs(vectors, module)
        state, ys = self.start(vectors, module, x.shape[0]), []
        for t in range(x.shape[1]):
            if past:
                now = tuple({name: tensor[:, t : t + 1] for name, tensor in layer.items()} for layer in past)
                y, state, _ = self.run(module, x[:, t : t + 1], state, "auto", extra, now)
                ys.append(y[:, 0])
            else:
                ys.append(module.step(x[:, t], state, **{key: tensor[:, 0] for key, tensor in extra.items()}))
        states = self.all_states(vectors, state, x.shape[1])
        return Run({"output": self.output(vectors, torch.stack(ys, 1)), **states})


def gradients(name: str, module: Any) -> dict[str, Tensor]:
    """Ours under official names: the converter treats a gradient like a weight."""
    shadow = copy.deepcopy(module)
    for ours, weight in zip(shadow.parameters(), module.parameters(), strict=True):
        ours.data = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return recur.convert.to_official(name, shadow)


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference relative to the largest entry. Raises: Mismatch for another shape or dtype."""
    if got.shape != want.shape or got.dtype != want.dtype:
        raise Mismatch(f"{got.dtype} {list(got.shape)}, recorded {want.dtype} {list(want.shape)}")
    if not want.numel():
        return 0.0
    error = (got.double() - want.double()).abs().max().item()
    return 0.0 if error == 0 else error / max(want.double().abs().max().item(), 1e-30)


class Mismatch(Exception):
    """Something recorded that ours does not have, or has in another shape."""


def compare(case: Case, vectors: Vectors, run: Run, *, only: Collection[str] | None = None) -> dict[str, float]:
    """Every recorded result, and every gradient if there are cotangents (of the output, of states), to its distance
    from ours.

    only: the results to look at, for a run that has no others (and no gradients).
    """
    found = {}
    for key, want in vectors.results.items():
        if key.endswith(case.unread) or (only is not None and key not in only):
            continue
        found[key] = _distance(key, run.results.get(key), case.recorded(key, want))
    if only is not None or "cotangent" not in vectors.tensors:
        return found
    cotangents = {f"state.{key}": tensor for key, tensor in vectors.section("cotangent").items()}
    cotangents["output"] = vectors.tensors["cotangent"]
    torch.autograd.backward([run.results[key] for key in cotangents], list(cotangents.values()))
    wanted = vectors.section("grad.input")
    if "grad.input" in vectors.tensors:
        wanted["0"] = vectors.tensors["grad.input"]  # of the only input
    weights = run.weights()
    for key, want in wanted.items():
        got = weights[key] if key in weights else vectors.inputs[key].grad
        found[f"grad.input.{key}"] = _distance(f"grad.input.{key}", got, want)
    wanted, tied = vectors.section("grad.param"), vectors.config.get("tied_keys", {})
    ours = {key: grad for key, grad in run.gradients().items() if key not in tied}
    for key in {**wanted, **ours}:
        want = wanted.get(key, torch.zeros_like(ours[key]) if key in ours else None)
        found[f"grad.param.{key}"] = _distance(f"grad.param.{key}", ours.get(key), want)
    return found


def _distance(key: str, got: Tensor | None, want: Tensor) -> float:
    if got is None:
        raise Mismatch(f"{key} is recorded, and ours has none")
    try:
        return distance(got.detach(), want)
    except Mismatch as error:
        raise Mismatch(f"{key} is {error}") from None
