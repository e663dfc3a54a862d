"""The laws can fail: a broken scan or part for each, caught by that law, in words; and value checks of inputs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import recur
from recur.axes import Spec
from recur.blocks import Decay, GatedScan, Map, Project, Reverse
from recur.primitives.gates import scale_gradient
from recur.recipe import Axes, Flow, Part, Recipe, State
from recur.testing import LawBroken, check, check_inputs, laws, strategies

Gated = Callable[..., tuple[Tensor, Tensor]]


def gated(change: Callable[..., Any]) -> Gated:
    """recur.gated_scan with one thing changed: change(scan, x, log_decay, **options)."""

    def scan(
        x: Tensor,
        log_decay: Tensor,
        *,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        reverse: bool = False,
        form: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        options = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "reverse": reverse, "form": form}
        return change(recur.gated_scan, x, log_decay, **options)

    return scan


@gated
def decays_off_by_one(scan: Gated, x: Tensor, log_decay: Tensor, form: str, **options: Any) -> Any:
    late = log_decay.roll(1, dims=1) if form == "chunked" else log_decay
    return scan(x, late, form=form, **options)


@gated
def forgets_the_state(scan: Gated, x: Tensor, log_decay: Tensor, initial_state: Tensor | None, **options: Any) -> Any:
    return scan(x, log_decay, initial_state=None, **options)


@gated
def leaks_between_documents(scan: Gated, x: Tensor, log_decay: Tensor, **options: Any) -> Any:
    y, state = scan(x, log_decay, **options)
    return (y if options["cu_seqlens"] is None else y + 1e-3 * y.cumsum(1)), state


@gated
def reads_the_future(scan: Gated, x: Tensor, log_decay: Tensor, **options: Any) -> Any:
    y, state = scan(x, log_decay, **options)
    return y + 1e-3 * torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1), state


@gated
def squares(scan: Gated, x: Tensor, log_decay: Tensor, **options: Any) -> Any:
    y, state = scan(x, log_decay, **options)
    return y + y.square(), state


@gated
def always_forgets_a_little(scan: Gated, x: Tensor, log_decay: Tensor, **options: Any) -> Any:
    return scan(x, log_decay - 1e-3, **options)


@gated
def divides_by_gates(scan: Gated, x: Tensor, log_decay: Tensor, **options: Any) -> Any:
    y, state = scan(x, log_decay, **options)
    return y + 0 / log_decay.exp(), state


@gated
def clamps_resets(scan: Gated, x: Tensor, log_decay: Tensor, **options: Any) -> Any:
    return scan(x, log_decay.clamp(min=-50), **options)


@gated
def halves_a_gradient(scan: Gated, x: Tensor, log_decay: Tensor, **options: Any) -> Any:
    return scan(scale_gradient(x, 0.5), log_decay, **options)


class Square(torch.autograd.Function):
    """x^2, whose gradient is right and whose second gradient is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * grad * x.detach()


@gated
def loses_second_gradients(scan: Gated, x: Tensor, log_decay: Tensor, **options: Any) -> Any:
    return scan(Square.apply(x), log_decay, **options)


class Lost(torch.autograd.Function):
    """x, with its gradient and without its tangent."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return torch.zeros_like(tangent)


@gated
def loses_tangents(scan: Gated, x: Tensor, log_decay: Tensor, **options: Any) -> Any:
    return scan(Lost.apply(x), log_decay, **options)


@gated
def adds_nothing_of_all_tokens(scan: Gated, x: Tensor, log_decay: Tensor, **options: Any) -> Any:
    y, state = scan(x, log_decay, **options)
    return y + 0 * x.sum(1, keepdim=True), state


@gated
def asks_how_long_it_is(scan: Gated, x: Tensor, log_decay: Tensor, **options: Any) -> Any:
    return scan(x * sum(1 for _ in range(x.shape[1])), log_decay, **options)


@gated
def rounds_its_products(scan: Gated, x: Tensor, log_decay: Tensor, form: str, **options: Any) -> Any:
    coarse = x.dtype not in (torch.float64, torch.float32) and form == "chunked"
    return scan(4 * (x / 4 + 1) - 4 if coarse else x, log_decay, form=form, **options)


@gated
def keeps_a_narrow_state(scan: Gated, x: Tensor, log_decay: Tensor, **options: Any) -> Any:
    y, state = scan(x, log_decay, **options)
    return y, state.to(x.dtype)


@gated
def mixes_rows(scan: Gated, x: Tensor, log_decay: Tensor, **options: Any) -> Any:
    y, state = scan(x, log_decay, **options)
    return y + 1e-3 * y.mean(0), state


@gated
def mixes_channels(scan: Gated, x: Tensor, log_decay: Tensor, **options: Any) -> Any:
    y, state = scan(x, log_decay, **options)
    return (y + 1e-3 * y.sum(2, keepdim=True) if y.ndim > 2 else y), state


@gated
def cannot_go_back(scan: Gated, x: Tensor, log_decay: Tensor, reverse: bool, **options: Any) -> Any:
    return scan(x, log_decay, **options)


@gated
def mixes_up_documents_going_back(scan: Gated, x: Tensor, log_decay: Tensor, **options: Any) -> Any:
    y, state = scan(x, log_decay, **options)
    return y, state.flip(0) if options["reverse"] and options["cu_seqlens"] is not None else state


def chunks_that_forget(x: Tensor, log_decay: Tensor, *, chunk_size: int = 16) -> Any:
    """Every chunk starts afresh."""
    y = [recur.gated_scan(*pair).y for pair in zip(x.split(chunk_size, 1), log_decay.split(chunk_size, 1), strict=True)]
    return torch.cat(y, dim=1), x[:, :0].sum(1)


def lazy_step(x: Tensor, log_decay: Tensor, *, state: Tensor) -> Tensor:
    """Leaves the state as it was."""
    return recur.gated_step(x, log_decay, state.clone())


def summary_without_decay(k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> recur.Summary:
    whole = recur.summary(k, v, log_decay, beta)
    return recur.Summary(torch.ones_like(whole.transition), whole.state)


BROKEN: dict[str, Gated] = {
    "forms": decays_off_by_one,
    "splits": forgets_the_state,
    "packing": leaks_between_documents,
    "causality": reads_the_future,
    "linearity": squares,
    "padding": always_forgets_a_little,
    "finiteness": divides_by_gates,
    "resets": clamps_resets,
    "gradients": halves_a_gradient,
    "second_gradients": loses_second_gradients,
    "tangents": loses_tangents,
    "containment": adds_nothing_of_all_tokens,
    "low_precision": rounds_its_products,
    "promises": keeps_a_narrow_state,
    "rows": mixes_rows,
    "heads": mixes_channels,
    "reversal": cannot_go_back,
    "reversed_packing": mixes_up_documents_going_back,
    "chunk_sizes": chunks_that_forget,
}


@pytest.mark.parametrize("law", BROKEN)
def test_each_law_catches_what_breaks_it(law: str) -> None:
    with pytest.raises(LawBroken, match=rf"^\w+ breaks the law of {law}: .*\n  with .*B=\d.*T=\d.*seed=\d+"):
        check(BROKEN[law], strategies.gated_scans(), laws=[law])


def test_the_law_of_containment_names_the_forms_that_hold_it() -> None:
    leaking = ["chunked"]

    def leaks(x: Tensor, log_decay: Tensor, form: str = "auto", **options: Any) -> Any:
        scan = adds_nothing_of_all_tokens if form in leaking else recur.gated_scan
        return scan(x, log_decay, form=form, **options)

    for words in ("form='recurrent'$", "none of its forms$"):
        with pytest.raises(LawBroken, match=rf"breaks the law of containment: .*\n.*\n.*; it holds with {words}"):
            check(leaks, strategies.gated_scans(), laws=["containment"])
        leaking.append("recurrent")


def test_the_law_of_steps_catches_a_lazy_step() -> None:
    with pytest.raises(LawBroken, match="breaks the law of steps"):
        check(recur.gated_scan, strategies.gated_scans(), step=lazy_step, laws=["steps"])


def test_the_law_of_summaries_catches_a_wrong_one() -> None:
    with pytest.raises(LawBroken, match="breaks the law of summaries"):
        check(recur.scan, strategies.scans(), summary=summary_without_decay, laws=["summaries"])


def test_the_law_of_lengths_catches_a_graph_per_length() -> None:
    with pytest.raises(
        LawBroken, match=r"breaks the law of lengths: .*\n  with T=\d+\n  it is compiled anew .*: 3 graphs"
    ):
        check(asks_how_long_it_is, strategies.gated_scans(), laws=["lengths"])


def test_a_right_scan_breaks_no_law() -> None:
    held = check(
        gated(lambda scan, *tensors, **options: scan(*tensors, **options)), strategies.gated_scans(), examples=5
    )
    assert set(held) >= set(BROKEN) - {"chunk_sizes"}


# ---------------------------------------------------------------------- parts


@dataclass(frozen=True)
class Peek(Part):
    """y_t = u_t + u_{t+1}, while it says that it is causal."""

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {"y": axes["u"]}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        u = flow["u"]
        return flow.set(y=u + torch.cat([u[:, 1:], torch.zeros_like(u[:, :1])], dim=1)), None


@dataclass(frozen=True)
class BatchMean(Part):
    """Subtracts the mean of the batch."""

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {"y": axes["u"]}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        return flow.set(y=flow["u"] - flow["u"].mean(0)), None


@dataclass(frozen=True)
class Forgetful(GatedScan):
    """Leaves the state of its first call for ever."""

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        flow, new = super().__call__(flow, weights, state)
        return flow, new if state is None else state


@dataclass(frozen=True)
class Unpacked(GatedScan):
    """Reads packed documents as one."""

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        y, new = recur.gated_scan(
            flow[self.source],
            flow[self.decay],
            initial_state=state if len(flow.position) == flow["x"].shape[0] else None,
        )
        return flow.set(y=y), new.expand(len(flow.position), -1)


@dataclass(frozen=True)
class Swollen(Part):
    """Has a field that its JSON loses."""

    by: float = 1.0

    def shapes(self, axes: Axes) -> Mapping[str, Spec]:
        return {"y": axes["u"]}

    def to_dict(self) -> dict[str, Any]:
        return {"part": "Swollen"}

    def __call__(self, flow: Flow, weights: Any, state: State) -> tuple[Flow, State]:
        return flow.set(y=self.by * flow["u"]), None


@dataclass(frozen=True)
class Backwards(Reverse):
    """Reads the future, and takes a state all the same."""

    causal = True  # type: ignore[assignment]


GATED = (Project("x", u="D", z="D"), Decay("z"))
BROKEN_PARTS = {
    "causality": [Peek(), Backwards((Project("u", y="D"), Decay("z"), GatedScan("u")))],
    "rows": [BatchMean()],
    "splits": [Forgetful("u"), Peek()],
    "steps": [Forgetful("u")],
    "packing": [Unpacked("u")],
    "serialisation": [Swollen(by=2.0)],
    "gradients": [Map(lambda u: u + u.detach().square(), reads="u", out="y", axes="D")],
}


@pytest.mark.parametrize(("law", "part"), [(law, part) for law, parts in BROKEN_PARTS.items() for part in parts])
def test_each_law_catches_a_broken_part(law: str, part: Part) -> None:
    with pytest.raises(LawBroken, match=rf"^this recipe breaks the law of {law}: .*\n  with .*D=4.*seed=\d+"):
        check(Recipe(*GATED, part), dim=4, laws=[law])


def test_every_law_but_one_is_seen_to_fail() -> None:
    """one_way is kept by the Mixer whatever a part does; summaries and lengths have tests of their own."""
    named = {law.__name__ for law in laws.LAWS}
    assert named - set(BROKEN) - set(BROKEN_PARTS) == {"summaries", "one_way", "lengths"}


# ---------------------------------------------------------------------- what a broken law says


def test_a_counter_example_is_small_and_in_words() -> None:
    with pytest.raises(LawBroken) as broken:
        check(decays_off_by_one, strategies.gated_scans(), laws=["forms"])
    law, sizes, difference = str(broken.value).split("\n")
    assert law == "scan breaks the law of forms: All forms agree."
    assert sizes.startswith("  with B=1, T=2, *=(), regime=")
    assert sizes.endswith("seed=0, form=chunked")
    number = r"-?[\d.e+-]+"
    words = (
        rf"  .* differs by {number} at \[0, \d\]: {number} as chunked, {number} as recurrent \(largest entry {number}\)"
    )
    assert re.fullmatch(words, difference), difference


def test_a_crash_breaks_a_law() -> None:
    def short_sighted(x: Tensor, log_decay: Tensor) -> Any:
        if x.shape[1] == 3:
            raise RuntimeError("three is a crowd")
        return recur.gated_scan(x, log_decay)

    with pytest.raises(LawBroken, match=r"T=3, .*\n  RuntimeError: three is a crowd"):
        check(short_sighted, strategies.gated_scans())


def test_the_same_seed_finds_the_same_counter_example() -> None:
    said = []
    for _ in range(2):
        with pytest.raises(LawBroken) as broken:
            check(mixes_rows, strategies.gated_scans(), laws=["rows"], seed=7)
        said.append(str(broken.value))
    assert said[0] == said[1]


def test_laws_are_reported_as_they_hold() -> None:
    lines: list[str] = []
    held = check(recur.presets.simple_gateloop(), dim=4, examples=2, report=lines.append)
    assert [line.split(":")[0] for line in lines] == held
    assert "splits: Any split with carried state equals one run." in lines


def test_what_cannot_be_checked_is_refused() -> None:
    with pytest.raises(TypeError, match="check: subject must be a Recipe or a scan, got str"):
        check("longhorn")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="check: a scan needs a strategy"):
        check(recur.gated_scan)
    with pytest.raises(ValueError, match=r"check: laws must be among promises, .*, got gravity"):
        check(recur.presets.gla(), laws=["gravity"])
    with pytest.raises(ValueError, match=r"check: laws must be such that apply to this recipe .*, got linearity"):
        check(recur.presets.simple_gateloop(), dim=4, laws=["linearity"])


def test_a_new_recurrence_is_checked_in_one_line() -> None:
    def leaky(x: Tensor, *, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = x[:, :0].sum(1) if initial_state is None else initial_state
        ys = [h := 0.5 * h + x[:, t] for t in range(x.shape[1])]
        return (torch.stack(ys, dim=1) if ys else x), h

    inputs = strategies.gated_scans().map(
        lambda inputs: inputs.replace(tokens={"x": inputs.tokens["x"]}, decay=None, idle={})
    )
    held = check(leaky, inputs, laws=["splits", "causality", "linearity", "gradients", "rows", "heads"], examples=5)
    assert "splits" in held


@pytest.mark.parametrize(
    "use", ["recur.testing.check(recur.presets.gla())", "recur.testing.strategies", "recur.testing.laws"]
)
def test_without_hypothesis_recur_imports_and_says_what_to_install(use: str) -> None:
    script = f"import sys; sys.modules['hypothesis'] = None; import recur; {use}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: recur.testing" in done.stderr
    assert "needs hypothesis: pip install -e '.[test]' in a clone" in done.stderr


# ---------------------------------------------------------------------- values


def test_good_values_pass() -> None:
    check_inputs(
        log_decay=torch.tensor([0.0, -1.0, -torch.inf]),
        rate=torch.tensor([0.5]),
        delta=torch.tensor([0.5]),
        A=torch.tensor([-1.0]),
        cu_seqlens=torch.tensor([0, 0, 4]),
        length=4,
        ids=torch.tensor([[0, 4]]),
        vocab_size=5,
        v=torch.ones(3),
        state=None,
    )
    check_inputs(log_decay=torch.complex(torch.tensor([-torch.inf]), torch.tensor([3.0])))


NAN = torch.tensor([[1.0, float("nan")]])
BAD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "growth": ({"log_decay": torch.tensor([-1.0, 0.5])}, r"log_decay must be <= 0, got 0.5 at \[1\]"),
    "no decay": ({"log_decay": -NAN}, r"log_decay must be <= 0, got nan at \[0, 1\]"),
    "complex growth": (
        {"log_decay": torch.tensor([1 + 1j])},
        r"log_decay must be <= 0 in its real part, got \(1\+1j\)",
    ),
    "no phase": (
        {"log_decay": torch.complex(-torch.ones(1), torch.tensor([torch.inf]))},
        "finite in its imaginary part",
    ),
    "rate": ({"rate": torch.tensor([0.5, 1.0])}, r"rate must be within \(0, 1\), got 1.0 at \[1\]"),
    "delta": ({"delta": torch.tensor([0.0])}, r"delta must be positive and finite, got 0.0 at \[0\]"),
    "A": ({"A": torch.tensor([0.0])}, r"A must be negative, got 0.0 at \[0\]"),
    "falling borders": ({"cu_seqlens": torch.tensor([0, 3, 2])}, r"cu_seqlens must be rising, got 2 at \[2\]"),
    "late start": ({"cu_seqlens": torch.tensor([1, 3])}, "cu_seqlens must start with 0, got 1"),
    "early end": ({"cu_seqlens": torch.tensor([0, 3]), "length": 4}, "cu_seqlens must end with T=4, got 3"),
    "no borders": ({"cu_seqlens": torch.zeros(2, 2)}, r"cu_seqlens must be \[n\+1\], got shape \(2, 2\)"),
    "ids": ({"ids": torch.tensor([[0, 5]]), "vocab_size": 5}, r"ids must be within 0 .. 4, got 5 at \[0, 1\]"),
    "further": ({"v": NAN}, r"v must be finite, got nan at \[0, 1\]"),
}


@pytest.mark.parametrize("kind", BAD_VALUES)
def test_bad_values_are_named(kind: str) -> None:
    inputs, words = BAD_VALUES[kind]
    with pytest.raises(ValueError, match=f"^check_inputs: .*{words}"):
        check_inputs(**inputs)


def test_ids_need_a_vocabulary() -> None:
    with pytest.raises(TypeError, match="vocab_size must be given with ids"):
        check_inputs(ids=torch.tensor([[0]]))
