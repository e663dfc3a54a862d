"""The diagonal, elementwise and fixed scans against loops written out here, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.autograd import gradgradcheck

from recur.primitives import diagonal, fixed, segments
from recur.primitives.diagonal import gated_scan, gated_step, linear_recurrence
from recur.primitives.elementwise import online_scan, online_step, selective_scan, selective_step
from recur.primitives.fixed import fixed_scan, fixed_step
from recur.shapes import ShapeError

LOGS = torch.tensor(
    [0.0, -1e-9, -0.3, -5.0, -80.0, -700.0, -torch.inf], dtype=torch.float64
)  # keeps all ... forgets all
LENGTHS = st.sampled_from([0, 1, 2, 7, 16, 17, 64, 65, 127, 200])
B, V, N, G = 2, 6, 5, 3
Tensors = tuple[Tensor, ...]


class Numbers:
    """Tensors from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(*shape, generator=self.rng, dtype=dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.rng, dtype=torch.float64)

    def logs(self, *shape: int, rotating: bool = False) -> Tensor:
        size = LOGS[torch.randint(0, len(LOGS), shape, generator=self.rng)]
        return torch.complex(size, self.normal(*shape)) if rotating else size


seeds = st.integers(0, 2**31 - 1).map(Numbers)


# ------------------------------------------------------------------------------------------------- the definitions


def gate_of(log: Tensor) -> Tensor:
    return torch.polar(log.real.exp(), log.imag) if log.is_complex() else log.exp()


def stack(ys: list[Tensor], x: Tensor) -> Tensor:
    return torch.stack(ys, 1) if ys else x


def loop_gated(x: Tensor, log_decay: Tensor, h: Tensor) -> Tensors:
    hs = []
    for t in range(x.shape[1]):
        h = gate_of(log_decay[:, t] if log_decay.ndim == x.ndim else log_decay) * h + x[:, t]
        hs.append(h)
    return stack(hs, x.to(h.dtype)), h


def each(weights: Tensor, t: int) -> Tensor:
    """[B|1 V N] of token t: groups repeated for their channels."""
    if weights.ndim == 2:
        return weights[None]
    weights = weights[:, t] if weights.ndim == 4 else weights[:, t, None]
    return weights.repeat_interleave(V // weights.shape[1], 1)


def loop_selective(x: Tensor, delta: Tensor, A: Tensor, k: Tensor, q: Tensor, S: Tensor) -> Tensors:
    ys = []
    for t in range(x.shape[1]):
        S = torch.exp(delta[:, t, :, None] * A) * S + (delta * x)[:, t, :, None] * each(k, t)
        ys.append((S * each(q, t)).sum(-1))
    return stack(ys, x), S


def loop_online(diagonal: bool, x: Tensor, rate: Tensor, k: Tensor, q: Tensor, S: Tensor) -> Tensors:
    ys = []
    for t in range(x.shape[1]):
        key = each(k, t)
        eps = (rate[:, t] / (1 + rate[:, t] * key.square().sum(-1)))[..., None]
        erased = key.square() * S if diagonal else key * (key * S).sum(-1, keepdim=True)
        S = S - eps * erased + eps * x[:, t, :, None] * key
        ys.append((S * each(q, t)).sum(-1))
    return stack(ys, x), S


def loop_fixed(x: Tensor, log_decay: Tensor, readout: Tensor, write: Tensor, S: Tensor) -> Tensors:
    ys = []
    for t in range(x.shape[1]):
        S = gate_of(log_decay) * S + write * x[:, t, :, None]
        ys.append((readout * S).sum(-1).real)
    return stack(ys, x), S


# ------------------------------------------------------------------------------------- the table: inputs and callables


class Case:
    """A scan, its loop, and inputs (tokens and constants, the initial state last)."""

    def __init__(self, scan: Callable[..., Any], loop: Callable[..., Tensors], make: Callable[..., Tensors]) -> None:
        self.scan, self.loop, self.make = scan, loop, make


def make_gated(numbers: Numbers, rows: int, T: int, states: int, rotating: bool, constant: bool) -> Tensors:
    log_decay = numbers.logs(*(() if constant else (rows, T)), V, N, rotating=rotating)
    return numbers.normal(rows, T, V, N), log_decay, numbers.normal(states, V, N, dtype=log_decay.dtype)


def slots(numbers: Numbers, rows: int, T: int, kind: str) -> Tensor:
    return numbers.normal(*{"shared": (rows, T, N), "groups": (rows, T, G, N), "constant": (V, N)}[kind])


def make_selective(numbers: Numbers, rows: int, T: int, states: int, kinds: tuple[str, str]) -> Tensors:
    A, delta = -numbers.normal(V, N).exp(), -numbers.logs(rows, T, V).clamp(min=-1000)
    k, q = (slots(numbers, rows, T, kind) for kind in kinds)
    return numbers.normal(rows, T, V), delta, A, k, q, numbers.normal(states, V, N)


def make_online(numbers: Numbers, rows: int, T: int, states: int, kinds: tuple[str, str]) -> Tensors:
    k, q = (slots(numbers, rows, T, kind) for kind in kinds)
    return numbers.normal(rows, T, V), numbers.uniform(rows, T, V), k, q, numbers.normal(states, V, N)


def make_fixed(numbers: Numbers, rows: int, T: int, states: int, rotating: bool, shared: bool) -> Tensors:
    poles = (N,) if shared else (V, N)
    log_decay = numbers.logs(*poles, rotating=rotating)
    readout, write = numbers.normal(V, N, dtype=torch.complex128), numbers.normal(*poles)
    return numbers.normal(rows, T, V), log_decay, readout, write, numbers.normal(states, V, N, dtype=log_decay.dtype)


def call(scan: Callable[..., Any], *inputs: Tensor, **options: Any) -> Tensors:
    return scan(*inputs[:-1], initial_state=inputs[-1], **options)


def call_fixed(x: Tensor, log_decay: Tensor, readout: Tensor, write: Tensor, S: Tensor, **options: Any) -> Tensors:
    return fixed_scan(x, log_decay, readout, write=write, initial_state=S, **options)


CASES = {
    f"gated, {'complex' if rotating else 'real'}, {'constant' if constant else 'by token'}": Case(
        partial(call, gated_scan), loop_gated, partial(make_gated, rotating=rotating, constant=constant)
    )
    for rotating in (False, True)
    for constant in (False, True)
}
for kinds in (("shared", "shared"), ("groups", "groups"), ("constant", "groups"), ("groups", "constant")):
    make = partial(make_selective, kinds=kinds)
    CASES[f"selective, {kinds[0]}, {kinds[1]}"] = Case(partial(call, selective_scan), loop_selective, make)
for kinds in (("shared", "shared"), ("groups", "shared")):
    for whole in (True, False):
        CASES[f"online, {'diagonal' if whole else 'exact'}, {kinds[0]}"] = Case(
            partial(call, partial(online_scan, diagonal=whole)),
            partial(loop_online, whole),
            partial(make_online, kinds=kinds),
        )
for rotating in (False, True):
    for shared in (False, True):
        CASES[f"fixed, {'complex' if rotating else 'real'}, {'shared' if shared else 'own'}"] = Case(
            call_fixed, loop_fixed, partial(make_fixed, rotating=rotating, shared=shared)
        )
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def forms_of(case: Case) -> tuple[str, ...]:
    return ("recurrent", "chunked", "parallel", "auto") if case.scan is call_fixed else ("recurrent", "chunked")


def tokens_of(inputs: Tensors, T: int) -> list[bool]:
    """Which inputs have a time axis: those [B T ...], never the state."""
    rows = inputs[0].shape[0]
    return [tensor.ndim >= 3 and tensor.shape[:2] == (rows, T) for tensor in inputs[:-1]] + [False]


def assert_same(
    numbers: Numbers, ours: Callable[..., Tensors], theirs: Callable[..., Tensors], *inputs: Tensor
) -> None:
    """Values, and the gradients of a random projection of y and state, to 1e-12 of the largest entry."""
    inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    results = [tuple(ours(*inputs)), tuple(theirs(*inputs))]
    weights = [numbers.normal(*tensor.shape, dtype=tensor.dtype) for tensor in results[1]]
    for result in results:
        total = sum((w * tensor).sum() for w, tensor in zip(weights, result, strict=True)).abs()
        result += torch.autograd.grad(total, inputs, materialize_grads=True)
    for got, want in zip(*map(list, (results[0], results[1])), strict=True):
        assert_close(got, want)


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert torch.isfinite(torch.view_as_real(got.resolve_conj()) if got.is_complex() else got).all()
    if want.numel():
        assert (got - want).abs().max() <= tolerance * max(1.0, want.abs().max().item())


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which 200 tokens are many chunks and many segments."""
    monkeypatch.setattr(diagonal, "SIDE_BY_SIDE", 300)
    monkeypatch.setattr(segments, "SEGMENT", 1)
    monkeypatch.setattr(fixed, "CHUNK", 16)
    monkeypatch.setattr(fixed, "TRANSFORM", 2000)


# ---------------------------------------------------------------------------------------------------------- the laws


@every_case
@given(numbers=seeds, T=LENGTHS, data=st.data())
def test_every_form_is_the_loop(case: Case, numbers: Numbers, T: int, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(forms_of(case)), label="form")
    inputs = case.make(numbers, B, T, B)
    ours, theirs = partial(case.scan, form=form), case.loop
    if data.draw(st.booleans(), label="reverse"):
        timed = tokens_of(inputs, T)

        def theirs(*inputs: Tensor) -> Tensors:
            y, state = case.loop(*(x.flip(1) if token else x for x, token in zip(inputs, timed, strict=True)))
            return y.flip(1), state

        ours = partial(ours, reverse=True)
    assert_same(numbers, ours, theirs, *inputs)


@every_case
@given(numbers=seeds, lengths=st.lists(st.sampled_from([0, 1, 3, 16, 21]), min_size=1, max_size=5), data=st.data())
def test_packed_documents_are_separate_loops(
    case: Case, numbers: Numbers, lengths: list[int], data: st.DataObject
) -> None:
    form = data.draw(st.sampled_from([form for form in forms_of(case) if form != "parallel"]), label="form")
    T, n = sum(lengths), len(lengths)
    inputs = case.make(numbers, 1, T, n)
    timed = tokens_of(inputs, T)
    borders = torch.tensor([0, *lengths]).cumsum(0)

    def theirs(*inputs: Tensor) -> Tensors:
        ys, states = [], []
        for i in range(n):
            document = slice(int(borders[i]), int(borders[i + 1]))
            own = [x[:, document] if token else x for x, token in zip(inputs[:-1], timed, strict=False)]
            y, state = case.loop(*own, inputs[-1][i : i + 1])
            ys.append(y)
            states.append(state)
        return torch.cat(ys, 1), torch.cat(states)

    assert_same(numbers, partial(case.scan, cu_seqlens=borders, form=form), theirs, *inputs)
    with_zeros = (*inputs[:-1], torch.zeros_like(inputs[-1]))
    without = case.scan(*inputs[:-1], None, cu_seqlens=borders, form=form)
    for got, want in zip(without, theirs(*with_zeros), strict=True):
        assert_close(got, want)


@given(numbers=seeds, T=LENGTHS, complex_=st.booleans(), data=st.data())
def test_the_recurrence_is_the_loop_whatever_is_shared(
    numbers: Numbers, T: int, complex_: bool, data: st.DataObject
) -> None:
    dtype = torch.complex128 if complex_ else torch.float64
    shape = [B, T, V, N]
    decay = [1 if size and data.draw(st.booleans(), label="shared") else size for size in shape]
    a = torch.where(numbers.uniform(*decay) < 0.2, 0, numbers.uniform(*decay).to(dtype))

    def loop(a: Tensor, x: Tensor, h: Tensor) -> Tensors:
        hs, a = [], a.expand(x.shape)
        for t in range(T):
            h = a[:, t] * h + x[:, t]
            hs.append(h)
        return (stack(hs, x),)

    inputs = a, numbers.normal(*shape, dtype=dtype), numbers.normal(B, V, N, dtype=dtype)
    assert_same(numbers, lambda *inputs: (linear_recurrence(*inputs),), loop, *inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_recurrence_is_twice_differentiable(dtype: torch.dtype) -> None:
    numbers = Numbers(0)
    a, x, h = (numbers.normal(*shape, dtype=dtype) for shape in ((1, 19, 2), (1, 19, 2), (1, 2)))
    a[:, 3] = 0
    assert gradgradcheck(linear_recurrence, [tensor.requires_grad_() for tensor in (a, x, h)])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["selective, groups, constant", "online, diagonal, groups", "fixed, complex, shared"])
def test_chunked_forms_are_twice_differentiable(name: str, packed: bool) -> None:
    case, borders = CASES[name], torch.tensor([0, 3, 3, 18]) if packed else None
    *inputs, state = case.make(Numbers(0), 1, 18, 3 if packed else 1)
    inputs = [x.clamp(-1, 1) if not x.is_complex() else x.real.clamp(-1, 1) + 1j * x.imag for x in inputs]
    inputs = [x.detach().requires_grad_() for x in (*inputs, state)]
    scan = partial(case.scan, form="chunked", cu_seqlens=borders)
    assert gradgradcheck(lambda *inputs: tuple(scan(*inputs)), inputs, fast_mode=True)


@given(numbers=seeds, rotating=st.booleans(), form=st.sampled_from(["recurrent", "chunked"]))
def test_a_reset_forgets_exactly_and_has_no_gradient(numbers: Numbers, rotating: bool, form: str) -> None:
    x, log_decay, h = make_gated(numbers, B, 9, B, rotating=rotating, constant=False)
    log_decay[:, 4] = complex(-torch.inf, 1.0) if rotating else -torch.inf
    log_decay = log_decay.requires_grad_()
    y = gated_scan(x, log_decay, initial_state=h, form=form).y
    assert torch.equal(y[:, 4], x[:, 4].to(y.dtype))
    y.abs().sum().backward()
    assert torch.equal(log_decay.grad[:, 4], torch.zeros_like(log_decay.grad[:, 4]))


STEPS = {
    "gated, real, by token": gated_step,
    "gated, complex, constant": gated_step,
    "selective, constant, groups": selective_step,
    "selective, groups, groups": selective_step,
    "online, diagonal, shared": online_step,
    "online, exact, groups": partial(online_step, diagonal=False),
    "fixed, complex, own": lambda x, log_decay, readout, write, S: fixed_step(x, log_decay, readout, S, write=write),
}


@pytest.mark.parametrize("name", STEPS)
@given(numbers=seeds)
def test_a_step_is_a_scan_of_one_token_and_overwrites_the_state(name: str, numbers: Numbers) -> None:
    case = CASES[name]
    inputs = case.make(numbers, B, 1, B)
    y, state = case.loop(*inputs)
    token = [x[:, 0] if timed else x for x, timed in zip(inputs, tokens_of(inputs, 1), strict=True)]
    got = STEPS[name](*(x.requires_grad_() for x in token[:-1]), token[-1])
    assert not got.requires_grad
    assert_close(got, y[:, 0])
    assert_close(token[-1], state)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_outputs_have_the_dtypes_promised(case: Case, dtype: torch.dtype) -> None:
    inputs = case.make(Numbers(0), B, 9, B)
    low = [x.to(torch.complex64 if x.is_complex() else dtype) for x in inputs]
    wide = torch.complex64 if inputs[-1].is_complex() else torch.float32
    for form in forms_of(case):
        y, state = case.scan(*low, form=form)
        assert y.dtype == (wide if case.loop is loop_gated and wide.is_complex else dtype)
        assert state.dtype == wide


@every_case
def test_the_state_is_no_view_of_y(case: Case) -> None:
    inputs = case.make(Numbers(0), B, 5, B)
    for form in forms_of(case):
        y, state = case.scan(*inputs, form=form)
        before = y.clone()
        state.zero_()
        assert torch.equal(y, before)


def test_large_keys_cost_no_digits() -> None:
    """1 - eps k² near 0 is formed as a sum of positive terms: float32 agrees with float64 to a few roundings."""
    numbers = Numbers(0)
    x, rate, k, q, S = make_online(numbers, B, 16, B, ("shared", "shared"))
    k = 1e4 * k
    wide = call(online_scan, x, rate, k, q, S)
    low = call(online_scan, *(tensor.float() for tensor in (x, rate, k, q, S)))
    assert_close(low.state.double(), wide.state, 2e-5)


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
@pytest.mark.parametrize("diagonal", [True, False])
@given(numbers=seeds, size=st.sampled_from([1.0, 1e2, 1e4, 1e6]))
def test_gradients_of_long_keys_keep_their_digits(form: str, diagonal: bool, numbers: Numbers, size: float) -> None:
    """Four digits of float32's seven are left; a difference of steps of the closed form would leave none."""
    keys = size * numbers.normal(2, 5, 3) * torch.tensor([1.0, 1e-2, 1.0])
    given = [numbers.normal(2, 5, 4), numbers.uniform(2, 5, 4), keys, numbers.normal(2, 5, 3), numbers.normal(2, 4, 3)]

    def slopes(dtype: torch.dtype, form: str) -> list[Tensor]:
        x, rate, k, q, h = (tensor.float().to(dtype).requires_grad_() for tensor in given)
        y, state = online_scan(x, rate, k, q, initial_state=h, diagonal=diagonal, form=form)
        return list(torch.autograd.grad((y.sum() + state.sum()), (x, rate, k, q, h)))

    for exact, got in zip(slopes(torch.float64, "recurrent"), slopes(torch.float32, form), strict=True):
        error = (got.double() - exact).abs().max() / exact.abs().max()
        assert error < 1000 * torch.finfo(torch.float32).eps


@given(numbers=seeds, T=st.sampled_from([2, 17, 64, 200, 1000]), scale=st.sampled_from([1.0, 1e2, 1e4, 1e8]))
def test_the_future_moves_the_past_of_a_transform_by_rounding_alone(numbers: Numbers, T: int, scale: float) -> None:
    """Within eps log2(2T) |x|₂ |h|₁, as the docstring promises; the forms without a transform of the row not at all."""
    x, cut = numbers.normal(1, T, V).float(), 1 + T // 3
    louder = torch.cat([x[:, :cut], scale * x[:, cut:]], 1)
    poles = torch.complex(-0.01 * numbers.uniform(N), 3 * numbers.normal(N)).to(torch.complex64)
    readout = torch.complex(numbers.normal(V, N), numbers.normal(V, N)).to(torch.complex64)
    impulse = torch.zeros(1, T, V, dtype=torch.float64)
    impulse[:, 0] = 1
    response = fixed_scan(impulse, poles, readout, form="recurrent").y
    moved = {}
    for form in ("parallel", "recurrent"):
        y, other = (fixed_scan(x, poles, readout, form=form).y[:, :cut] for x in (x, louder))
        moved[form] = (y - other).abs().amax((0, 1))
    eps = torch.finfo(torch.float32).eps
    assert bool((moved["parallel"] <= eps * math.log2(2 * T) * louder[0].norm(dim=0) * response[0].abs().sum(0)).all())
    assert bool((moved["recurrent"] == 0).all())


@pytest.mark.parametrize("form", ["parallel", "chunked"])
def test_phases_hold_over_long_sequences(form: str) -> None:
    """Slow decay and fast phases: the phase of 4096 tokens, 2e5 radians, rounds to 0.02 in float32 if not reduced."""
    numbers = Numbers(0)
    log_decay = torch.complex(torch.full((8,), -3e-4, dtype=torch.float64), numbers.uniform(8).mul(4).exp())
    log_decay = log_decay.to(torch.complex64)
    x, readout = numbers.normal(1, 4096, V).float(), numbers.normal(V, 8).float()
    want = fixed_scan(x.double(), log_decay.to(torch.complex128), readout.double())
    assert_close(fixed_scan(x, log_decay, readout, form=form).y.double(), want.y, 1e-4)


def test_forms_compile_into_one_graph() -> None:
    """The recurrences are single operators, so a graph does not grow with T."""
    numbers = Numbers(0)
    for name in ("gated, complex, by token", "selective, groups, constant", "fixed, complex, shared"):
        case = CASES[name]
        inputs = case.make(numbers, B, 33, B)
        compiled = torch.compile(lambda *inputs: case.scan(*inputs, form="chunked"), backend="eager", fullgraph=True)  # noqa: B023
        for got, want in zip(compiled(*inputs), case.scan(*inputs, form="chunked"), strict=True):
            assert_close(got, want)


def test_bad_input_is_named_in_letters() -> None:
    x, k, S = torch.zeros(2, 9, 6), torch.zeros(2, 9, 5), torch.zeros(2, 6, 5)
    A, two = torch.zeros(6, 5), torch.tensor([0, 4, 9])
    with pytest.raises(ShapeError, match=r"gated_scan: x has T=9 but log_decay has T=3"):
        gated_scan(x, x[:, :3])
    with pytest.raises(ShapeError, match=r"gated_scan: initial_state must be \[n \.\.\.\] with n=2 documents"):
        gated_scan(x[:1], x[:1], cu_seqlens=two, initial_state=torch.zeros(1, 6))
    with pytest.raises(TypeError, match=r"gated_scan: initial_state must be real because x and log_decay are"):
        gated_scan(x, x, initial_state=torch.zeros(2, 6, dtype=torch.complex64))
    with pytest.raises(NotImplementedError, match="gated_scan: form='parallel'"):
        gated_scan(x, x, form="parallel")
    with pytest.raises(TypeError, match=r"gated_step: state must be torch.float32 for these inputs, got torch.float16"):
        gated_step(x[:, 0], x[:, 0], torch.zeros(2, 6, dtype=torch.float16))
    with pytest.raises(ShapeError, match=r"selective_scan: x has V=6 but A has V=5"):
        selective_scan(x, x, A.T, k, k)
    with pytest.raises(ShapeError, match=r"selective_scan: G must divide V, got G=4 and V=6"):
        selective_scan(x, x, A, torch.zeros(2, 9, 4, 5), k)
    with pytest.raises(ValueError, match=r"online_scan: rate must lie in \[0, 1\]"):
        online_scan(x, x + 2, k, k)
    with pytest.raises(ShapeError, match=r"online_step: .* V=6 but state has V=5"):
        online_step(x[:, 0], x[:, 0], k[:, 0], k[:, 0], S.mT)
    with pytest.raises(NotImplementedError, match="fixed_scan: form='parallel'"):
        fixed_scan(x[:1], A, A, cu_seqlens=two, form="parallel")
    with pytest.raises(TypeError, match=r"fixed_scan: log_decay must be floating or complex, got torch.int64"):
        fixed_scan(x, A.long(), A)
    with pytest.raises(TypeError, match=r"fixed_scan: readout must be a tensor, got None"):
        fixed_scan(x, A, None)
    with pytest.raises(TypeError, match=r"selective_scan: B must be a tensor, got None"):
        selective_scan(x, x, A, None, k)
