"""Outputs, states and gradients recorded from the official code, reproduced by every form.

tests/golden holds the recorded files. Each names the module it came from; a table below says which of ours it is and
where its states lie. A file with parameters goes through recur.convert, one without is an operator.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

import recur
from recur.primitives.rotary import rotary_frequencies, rotate

FOLDER = Path(__file__).parent / "golden"
FILES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))


class Vectors:
    """One recorded file: tensors by their name, sections cut off, and the configuration."""

    def __init__(self, stem: str) -> None:
        with safe_open(FOLDER / f"{stem}.safetensors", "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)

    def section(self, name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): t for key, t in self.tensors.items() if key.startswith(f"{name}.")}

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return {key: t.requires_grad_(t.is_floating_point()) for key, t in self.section("input").items()}

    @cached_property
    def case(self) -> str:
        module = self.config.get("module")
        return (module.split(" ")[0] if module else self.config["case"]).removesuffix("_recurrent")

    @property
    def arguments(self) -> dict[str, Any]:
        return self.config.get("kwargs") or self.config.get("model_config") or {}

    @property
    def tolerance(self) -> float:
        """Relative to the largest entry. RetNet builds its angles and decays in float32, whatever it computes in."""
        if self.tensors["output"].dtype == torch.float32:
            return 2e-5
        return 1e-6 if self.case.startswith(("retnet", "densessm")) else 1e-9

    def compare(self, name: str, got: Tensor, want: Tensor) -> None:
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, recorded {tuple(want.shape)}"
        assert got.dtype == want.dtype, f"{name}: {got.dtype}, recorded {want.dtype}"
        error = (got - want).abs().max().item() / max(want.abs().max().item(), 1e-30)
        assert error <= self.tolerance, f"{name} is off by {error:.1e} of its largest entry"


# ---------------------------------------------------------------------- operators: recorded inputs -> y, states

Result = tuple[Tensor, dict[str, Tensor]]


def longhorn_op(form: str, u: Tensor, dt: Tensor, k: Tensor, q: Tensor, **extra: Tensor) -> Result:
    rate = torch.sigmoid(dt + extra["t_bias"][:, None] if extra else dt)
    y, state = recur.online_scan(u.mT, rate.mT, k.mT, q.mT, form=form)
    return skip_and_gate(y.mT, u, **extra), {"last": state}


def longhorn_exact_op(form: str, u: Tensor, dt: Tensor, k: Tensor, q: Tensor) -> Result:
    return recur.online_scan(u.mT, torch.sigmoid(dt).mT, k.mT, q.mT, diagonal=False, form=form).y.mT, {}


def mamba_op(form: str, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **extra: Tensor) -> Result:
    if extra:
        delta = F.softplus(delta + extra.pop("delta_bias")[:, None])
    B, C = (weight if weight.ndim == 2 else weight.movedim(-1, 1) for weight in (B, C))
    y, state = recur.selective_scan(u.mT, delta.mT, A, B, C, form=form)
    return skip_and_gate(y.mT, u, **extra), {"last": state}


def skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None = None, z: Tensor | None = None, **_: Tensor) -> Tensor:
    return y if D is None or z is None else (y + D[:, None] * u) * F.silu(z)


def gla_op(form: str, q: Tensor, k: Tensor, v: Tensor, gk: Tensor) -> Result:
    time_first = (tensor.transpose(1, 2) for tensor in (q, k, v, gk))
    y, state = recur.scan(*time_first, scale=q.shape[-1] ** -0.5, form=form)
    return y.transpose(1, 2), {"final": state}


def gateloop_complex(form: str, q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Result:
    log_a = torch.view_as_complex(a).log()
    y, _ = recur.scan(q[:, :, None], k[:, :, None], v[:, :, None], log_a[:, :, None], form=form)
    return y[:, :, 0], {}


def gateloop_real(form: str, q: Tensor, kv: Tensor, a: Tensor) -> Result:
    y, state = recur.gated_scan(kv, a.log(), form=form)
    return q * y, {"last_kv": state}


OPERATORS: dict[str, Callable[..., Result]] = {
    "longhorn_op": longhorn_op,
    "longhorn_exact_op": longhorn_exact_op,
    "mamba_op": mamba_op,
    "gla_op": gla_op,
    "gate_loop_operator": gateloop_complex,
    "simplified": gateloop_real,
}


# ---------------------------------------------------------------------- modules: states of the parts -> recorded states

Parts = Mapping[str, Tensor]


def elementwise(parts: Parts, _: int) -> dict[str, Tensor]:
    scan = parts["online_scan"] if "online_scan" in parts else parts["selective_scan"]
    return {"ssm": scan, "conv": parts["short_conv"].mT}


def matrix(parts: Parts, _: int) -> dict[str, Tensor]:
    return {"kv": parts["outer_scan"]}


def retention(parts: Parts, length: int) -> dict[str, Tensor]:
    """Recorded value first, and divided by the square root of how much a plain sum would have grown."""
    state = parts["outer_scan"].transpose(-1, -2)
    decay = 1 - 2.0 ** (-5 - torch.arange(state.shape[1], dtype=state.dtype))
    grown = (1 - decay**length) / (1 - decay)
    return {"kv": state / grown.sqrt()[:, None, None], "scale": grown}


def late_retention(parts: Parts, length: int) -> dict[str, Tensor]:
    """Recorded with keys turned one token less than ours."""
    states = retention(parts, length)
    before = torch.full(states["kv"].shape[:2], -1)
    frequencies = rotary_frequencies(states["kv"].shape[-1], inclusive=True)
    return {"kv": rotate(states["kv"], before, frequencies), "scale": states["scale"]}


def none(parts: Parts, _: int) -> dict[str, Tensor]:
    return {}


MODULES: dict[str, tuple[str, Callable[[Parts, int], dict[str, Tensor]]]] = {
    "longhorn_mixer": ("longhorn", elementwise),
    "longhorn_step": ("longhorn", elementwise),
    "longhorn_lm": ("longhorn_lm", elementwise),
    "mamba_mixer": ("mamba", elementwise),
    "mamba_lm": ("mamba_lm", elementwise),
    "gla_mixer": ("gla_mixer", matrix),
    "gla_lm": ("gla", matrix),
    "retnet_retention": ("retnet_retention", retention),
    "retnet_lm": ("retnet", retention),
    "hgrn2_hgru2_1d": ("hgru2_1d", matrix),
    "hgrn2_lm": ("hgrn2_lm", matrix),
    "densessm_retention": ("densessm_retention", late_retention),
    "densessm_lm": ("dense_gau_retnet", late_retention),
    "GateLoopedAttention": ("gateloop_attention", none),
    "Transformer": ("gateloop_transformer", none),
    "SimpleGateLoopLayer": ("simple_gate_loop", none),
    "gss.DSS": ("dss", none),
    "gss.GSS": ("gss_block", none),
    "gss.GatedStateSpacesLM": ("gated_state_space_lm", none),
}


class Recorded:
    """One of our modules with recorded weights, called in the recorded layout."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self.name, self.states_of = MODULES[vectors.case]
        self.module = recur.convert.from_official(self.name, vectors.section("param"), vectors.arguments)
        self.time_first = vectors.case == "hgrn2_hgru2_1d"

    def inputs(self) -> tuple[Tensor, dict[str, Tensor], tuple[dict[str, Tensor], ...]]:
        """x or ids, further inputs, and what a shallower layer published."""
        given = dict(self.vectors.inputs)
        first = next(key for key in ("0", "x", "hidden_states", "input_ids") if key in given)
        x, extra, past = given.pop(first), {}, ()
        if self.time_first:
            heads = self.module.recipe.site(self.module.dim).size("H K")
            bound = given.pop("lower_bound", torch.zeros(self.module.dim, dtype=x.dtype))
            x, extra = x.transpose(0, 1), {"bound": bound.view(1, 1, *heads)}
        if "k_feature.0" in given:
            heads = self.module.recipe.axes["H"]
            past = ({name: given[f"{name}_feature.0"].unflatten(-1, (heads, -1)) for name in "kv"},)
        return x, extra, past

    def start(self, batch: int) -> Any:
        """The recorded cache, or the state before the first token."""
        state = self.module.init_state(batch)
        if "conv_state" in self.vectors.inputs:
            given = self.vectors.inputs
            state["parts"] = {"short_conv": given["conv_state"][..., 1:].mT, "online_scan": given["ssm_state"]}
        return state

    def run(self, x: Tensor, state: Any, form: str, extra: Any, past: Any) -> tuple[Tensor, Any]:
        if isinstance(self.module, recur.LanguageModel):
            return self.module(x, state, return_state=True, form=form)
        flow, state = self.module.run(x, state, extra, form=form, past=past)
        return flow["y"], state

    def whole(self, form: str) -> Result:
        """All tokens at once (or in the recorded pieces)."""
        x, extra, past = self.inputs()
        state, pieces, outputs = None, self.vectors.config.get("chunks", [x.shape[1]]), {}
        ys = []
        for number, piece in enumerate(x.split(pieces, dim=1), 1):
            y, state = self.run(piece, state, form, extra, past)
            ys.append(y)
            if len(pieces) > 1:
                outputs[f"cache{number}_kv"] = state["parts"]["gated_scan"].reshape(-1, 1)
        y = torch.cat(ys, 1)
        return y.transpose(0, 1) if self.time_first else y, {**self.states(state, x.shape[1]), **outputs}

    @torch.no_grad()
    def stepped(self) -> Result:
        """Token by token."""
        x, extra, past = self.inputs()
        state, ys = self.start(x.shape[0]), []
        for t in range(x.shape[1]):
            if past:
                now = ({name: tensor[:, t : t + 1] for name, tensor in past[0].items()},)
                y, state = self.run(x[:, t : t + 1], state, "auto", extra, now)
                ys.append(y[:, 0])
            else:
                ys.append(self.module.step(x[:, t], state, **{key: tensor[:, 0] for key, tensor in extra.items()}))
        y = torch.stack(ys, 0 if self.time_first else 1)
        return y, self.states(state, x.shape[1])

    def states(self, state: Any, length: int) -> dict[str, Tensor]:
        if "layers" not in state:
            return self.states_of(state["parts"], length)
        layers = enumerate(self.states_of(layer["mixer"]["parts"], length) for layer in state["layers"])
        return {f"{key}.{i}": tensor for i, layer in layers for key, tensor in layer.items()}

    def gradients(self) -> dict[str, Tensor]:
        """Ours under official names: the converter cannot tell a gradient from a weight."""
        shadow = copy.deepcopy(self.module)
        for ours, weight in zip(shadow.parameters(), self.module.parameters(), strict=True):
            ours.data = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return recur.convert.to_official(self.name, shadow)


# ---------------------------------------------------------------------- the tests


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So many tensors so small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(vectors: Vectors, y: Tensor, states: Mapping[str, Tensor]) -> None:
    vectors.compare("output", y, vectors.tensors["output"])
    recorded = {**vectors.section("state"), **vectors.section("output")}
    for key, want in recorded.items():
        if key.startswith("conv"):
            want = want[..., 1:]  # the original keeps one input more than it needs
        if not key.endswith("_a"):  # running products of gates, which nothing reads
            vectors.compare(key, states[key], want)


def check_gradients(vectors: Vectors, parameters: Mapping[str, Tensor]) -> None:
    recorded = vectors.section("grad.input")
    if "grad.input" in vectors.tensors:  # of the only input
        recorded["0"] = vectors.tensors["grad.input"]
    for key, want in recorded.items():
        vectors.compare(f"gradient of {key}", vectors.inputs[key].grad, want)
    recorded = vectors.section("grad.param")
    for key, got in parameters.items():
        if key not in vectors.config.get("tied_keys", {}):
            vectors.compare(f"gradient of {key}", got, recorded.get(key, torch.zeros_like(got)))


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
@pytest.mark.parametrize("stem", [stem for stem in FILES if "_step_T" not in stem])
def test_outputs_states_and_gradients_are_those_recorded(stem: str, form: str) -> None:
    vectors = Vectors(stem)
    if vectors.case in OPERATORS:
        y, states = OPERATORS[vectors.case](form, **vectors.inputs)
    else:
        ours = Recorded(vectors)
        y, states = ours.whole(form)
    check(vectors, y, states)
    y.backward(vectors.tensors["cotangent"])
    check_gradients(vectors, {} if vectors.case in OPERATORS else ours.gradients())


@pytest.mark.parametrize("stem", [stem for stem in FILES if "_op_" not in stem and "_cache_" not in stem])
def test_token_by_token_gives_what_is_recorded(stem: str) -> None:
    vectors = Vectors(stem)
    y, states = Recorded(vectors).stepped()
    check(vectors, y, states)


def test_deeper_layers_are_handed_keys_and_values_before_fusion() -> None:
    vectors = Vectors("densessm_retention_recurrent_L16")
    ours = Recorded(vectors)
    x, extra, past = ours.inputs()
    flow, _ = ours.module.run(x, None, extra, past=past)
    for name in "kv":
        vectors.compare(name, flow.published[name].flatten(2), vectors.tensors[f"{name}_current"])
