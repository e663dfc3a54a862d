"""On a GPU nothing takes a slower form in silence: said once per reason, with the remedy; on a CPU never.

No GPU is needed: what is asked for a form is the device, which enters as an argument or is that of `kernel.device_of`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import recur
from recur import Mixer, Part, kernel, presets
from recur.counting import Asked, blank, copied
from recur.primitives import forms
from recur.primitives.conv import causal_conv
from recur.primitives.fixed import tap_conv
from recur.primitives.forms import Choice, choose_form
from recur.primitives.gates import biased, lower_bounded_decay, output_gate, sigmoid_decay, weigh
from recur.primitives.loss import linear_cross_entropy
from recur.primitives.mesa import mesa_scan
from recur.primitives.norms import normalise
from recur.primitives.rotary import rotate
from recur.recipe import inside

GPU = torch.device("cuda")
FORMS = ("recurrent", "chunked", "triton")
randn = torch.randn


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process, with a Triton that covers what it can."""
    monkeypatch.setattr(forms, "_warned", set())
    monkeypatch.setattr(kernel, "TRITON", kernel.OLDEST)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a CPU count as tensors of a GPU for who chooses a form."""
    monkeypatch.setattr(kernel, "device_of", lambda x: GPU)


def said(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    assert all(issubclass(warning.category, recur.SlowPath) for warning in caught)
    return [str(warning.message) for warning in caught]


def choose(device: torch.device = GPU, number: torch.dtype = torch.float32, **sizes: int) -> str:
    return choose_form("scan", "auto", FORMS, device, partial(kernel.refusal, number, **sizes))


REASONS: dict[str, tuple[torch.dtype, dict[str, int], str]] = {
    "keys": (torch.float32, {"K": 600}, "K=600, more than 512. Remedy: K at most 512: more heads of fewer keys"),
    "complex keys": (
        torch.complex64,
        {"K": 300},
        "K=300, for a complex state 600 rows, more than 512. Remedy: K at most 256: more heads of fewer keys",
    ),
    "slots": (torch.float32, {"N": 257}, "N=257, more than 256. Remedy: N at most 256"),
    "float64": (torch.float64, {"K": 4}, "float64. Remedy: pass float32, bfloat16 or float16"),
}


@pytest.mark.parametrize("name", REASONS)
def test_auto_names_the_reason_and_the_remedy_once(name: str) -> None:
    number, sizes, words = REASONS[name]
    assert said(partial(choose, GPU, number, **sizes)) == [
        f"scan: form=\"auto\" is 'chunked' here: form='triton' does not cover {words}"
    ]
    assert said(partial(choose, GPU, number, **sizes)) == []


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "a machine without Triton. Remedy: pip install triton"),
        ((3, 3), "Triton 3.3, older than 3.4. Remedy: pip install -U triton"),
    ],
)
def test_a_triton_that_is_missing_or_old(monkeypatch: pytest.MonkeyPatch, found: Any, words: str) -> None:
    monkeypatch.setattr(kernel, "TRITON", found)
    (message,) = said(partial(choose, K=4))
    assert message.endswith(f"does not cover {words}")


def test_transforms_are_a_reason() -> None:
    (message,) = said(lambda: torch.func.vmap(lambda x: (choose(K=4), x)[1])(randn(3)))
    assert "torch.func transforms. Remedy: call it outside of them" in message


def test_nothing_is_said_on_a_cpu_nor_where_the_kernel_runs_nor_of_a_form_asked_for() -> None:
    assert said(partial(choose, torch.device("cpu"), torch.float64, K=600)) == []
    assert said(partial(choose, K=512)) == []
    assert choose(K=512) == "triton"
    named = lambda: choose_form("scan", "chunked", FORMS, GPU, partial(kernel.refusal, torch.float64))  # noqa: E731
    assert said(named) == []


def test_one_reason_is_said_once_whoever_meets_it(on_a_gpu: None) -> None:
    x = randn(1, 3, 2, 4, dtype=torch.float64)
    (message,) = said(lambda: (recur.scan(x, x, x), recur.gated_scan(x, x.sigmoid().log()), normalise(x)))
    assert message.startswith("scan: ")


def step_of_wide_states() -> Tensor:
    q = randn(1, 1, 2049)
    return recur.step(q, q, q[..., :1], None, torch.zeros(1, 1, 2049, 1))


GLUE: dict[str, tuple[Callable[[], Any], str]] = {
    "conv width": (lambda: causal_conv(randn(1, 3, 4), randn(4, 9)), "causal_conv: .* W=9, more than 8"),
    "conv act": (lambda: causal_conv(randn(1, 3, 4), randn(4, 2), act="relu"), "act='relu'. Remedy: act one of ident"),
    "gate act": (lambda: output_gate(randn(1, 3, 4), randn(1, 3, 4), act="relu"), "output_gate: .* act='relu'"),
    "norm rows": (lambda: normalise(randn(1, 2, 20000)), "normalise: .* rows that are too long"),
    "float64 norm": (lambda: normalise(randn(1, 2, 4).double()), "normalise: .* float64. Remedy: pass float32"),
    "bias": (lambda: biased("sigmoid", randn(1, 3, 2, 4), randn(4)), "biased: .* a bias that is not one per channel"),
    "bound": (lambda: lower_bounded_decay(randn(1, 3, 2, 4), torch.rand(4)), "a bound that is not one per channel"),
    "decay": (lambda: sigmoid_decay(randn(1, 3, 4).double()), "sigmoid_decay: .* float64"),
    "weigh": (lambda: weigh(randn(1, 3, 2, 2048), randn(1, 3, 2)), "weigh: .* P=2048"),
    "rotate": (
        lambda: rotate(randn(1, 3, 1, 4), torch.arange(3)[None], torch.rand(2, requires_grad=True)),
        "rotate: .* frequencies that want a gradient",
    ),
    "loss": (
        lambda: linear_cross_entropy(randn(6, 4).double(), randn(10, 4).double(), torch.arange(6), chunk=2),
        "linear_cross_entropy: .* float64",
    ),
    "step": (step_of_wide_states, "step: .* a step of states with 2049 rows, more than 2048"),
    "fixed": (
        lambda: recur.fixed_scan(randn(1, 3, 2), -torch.rand(4), randn(2, 4)),
        "fixed_scan: form=\"auto\" is 'parallel' here: no kernel computes the convolution by FFT, .*form='triton'",
    ),
    "taps": (
        lambda: tap_conv(randn(1, 3, 2), randn(1, 3, 2)),
        "tap_conv: .* no kernel has as many taps as tokens. Rem",
    ),
    "float64 step": (
        lambda: recur.gated_step(randn(1, 2).double(), -torch.rand(2).double(), torch.zeros(1, 2).double()),
        "step: the formula in torch runs here: its kernel does not cover float64",
    ),
}


RUNS = {  # by the class of a part with a state, the function that says what it runs on a GPU
    "OuterScan": "scan",
    "DeltaScan": "scan",
    "WideScan": "scan",
    "OjaScan": "scan",
    "SlotScan": "scan",
    "MesaScan": "scan",
    "GatedScan": "gated_scan",
    "SelectiveScan": "selective_scan",
    "DenseRead": "selective_scan",
    "OnlineScan": "online_scan",
    "FixedScan": "fixed_scan",
    "PoleScan": "fixed_scan",
    "TapConv": "tap_conv",
    "LogLinearScan": "log_linear_scan",
    "MomentumScan": "momentum_scan",
    "ForgettingAttention": "forgetting_attention",
    "DataRotary": "accumulated_angle",
    "Loop": "Loop",
}
# torch's own attention and elementwise formulas, and what says so itself where its kernel is not taken
FUSED = {"Attention", "ShortConv", "TokenShift", "Trapezoid", "Stabilise"}


def test_every_part_of_every_preset_says_what_it_runs() -> None:
    """On a GPU that is not there, with tensors without data; what is not a kernel has a reason and a remedy."""
    seen = set[str]()
    for preset in presets.PRESETS:
        name, recipe = preset.__name__, preset()
        parts = [*recipe.parts, *(one for part in recipe.parts for one in inside(part))]
        kinds = {type(part).__name__ for part in parts if type(part).init_state is not Part.init_state}
        if kinds <= seen:
            continue
        seen |= kinds
        found = choices_of(Mixer(recipe, 64))
        assert kinds <= {*RUNS, *FUSED}, (name, kinds)
        assert {RUNS[kind] for kind in kinds - FUSED} <= {choice.function for choice in found}, (name, found)
        for choice in found - {Choice("gated_scan", "chunked", None)}:  # by name, in accumulated_angle, which says so
            assert choice.form == "triton" or (choice.refusal is not None and choice.refusal.remedy), (name, choice)
    assert seen == {*RUNS, *FUSED}


def test_an_equation_per_token_has_no_kernel() -> None:
    def solve() -> None:
        x, ones = torch.empty(1, 2, 1, 2), torch.empty(1, 2, 1)
        mesa_scan(x, x, x, ones, ones, torch.empty(1, 2))

    (found,) = (choice for choice in noted(solve) if choice.function == "mesa_scan")
    assert found.form == "chunked"
    assert found.refusal is not None
    assert found.refusal.reason == "no kernel solves an equation per token"
    assert found.refusal.remedy == "solver='conjugate', whose products are scans by the kernel"


def choices_of(layer: Mixer) -> set[Choice]:
    def run() -> None:
        inputs = {name: torch.empty(1, 2, *sizes) for name, sizes in layer._input_sizes.items()}
        copied(layer, blank)(torch.empty(1, 2, layer.dim), **inputs)

    return noted(run)


def noted(run: Callable[[], None]) -> set[Choice]:
    """What calls choose on a GPU that is not there."""
    found = set[Choice]()
    token = forms.listener.set(found.add)
    try:
        with Asked(GPU):
            run()
    finally:
        forms.listener.reset(token)
    return found


@pytest.mark.parametrize("name", GLUE)
def test_so_do_the_kernels_around_the_scans(on_a_gpu: None, name: str) -> None:
    run, words = GLUE[name]
    with pytest.warns(recur.SlowPath, match=words):
        run()
    assert said(run) == []


def test_a_graph_is_not_broken_and_says_it_while_it_is_traced() -> None:
    pytest.importorskip("torch._dynamo")

    def run(x: Tensor) -> Tensor:
        return x + (1 if choose(K=600) == "chunked" else 2)

    x = randn(3)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    (message,) = said(lambda: torch.testing.assert_close(compiled(x), x + 1))
    assert "K=600, more than 512" in message
    assert said(lambda: compiled(x)) == []
    torch._dynamo.reset()


def test_so_does_a_graph_of_the_kernels_around_the_scans(on_a_gpu: None) -> None:
    torch._dynamo.reset()
    x, weight = randn(1, 3, 4), randn(4, 9)
    compiled = torch.compile(lambda: causal_conv(x, weight).y, fullgraph=True, backend="eager")
    (message,) = said(compiled)
    assert "W=9, more than 8" in message
    torch._dynamo.reset()


def test_it_is_a_warning_that_can_be_silenced() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", recur.SlowPath)
        choose(K=600)
