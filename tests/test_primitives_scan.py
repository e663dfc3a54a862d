"""Laws of the scan with a matrix state, in float64 against a token loop written here from the equations alone."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import recur.primitives.chunked as chunked
from recur.primitives.scan import scan, step
from recur.primitives.sub_tokens import sub_tokens
from recur.primitives.summary import advance, combine, summary
from recur.shapes import ShapeError

INF = float("inf")
LOGS = (
    0.0,
    -1e-9,
    -0.3,
    -5.0,
    -80.0,
    -700.0,
    -INF,
    -1e9,
    -0.5,
)  # keeps, leaks, forgets; -1e9 then -0.5 cancels if summed
LENGTHS = (1, 2, 7, 16, 17, 31, 33, 63, 64, 65, 127, 200)  # chunk sizes, primes, and one off
DECAYS = ("none", "H", "H K", "B T H", "B T H K", "tied H K", "tied B T H K")
EXACT = {"rtol": 0.0, "atol": 1e-11}  # of the largest number, which `close` divides by
close = partial(assert_close, **EXACT)


class Inputs(NamedTuple):
    """Arguments of one scan. `borders` are the documents of a packed row, all of [0, T] if it is not packed."""

    tensors: dict[str, Tensor]
    borders: list[int] | None
    reverse: bool

    def arguments(self) -> dict[str, Any]:
        return {
            **{"k": None, "log_decay": None, **self.tensors},
            "cu_seqlens": None if self.borders is None else torch.tensor(self.borders),
            "reverse": self.reverse,
            "scale": 0.7,
        }


def loop(q: Tensor, v: Tensor, initial: Tensor, k: Tensor | None = None, log_decay: Tensor | None = None, **extra: Any):
    """One document: S_t = A_t S_{t-1} + k_t u_tᵀ, head by head and token by token."""
    beta, bonus, (B, T, H, _) = extra.get("beta"), extra.get("bonus"), v.shape
    if log_decay is not None and log_decay.ndim <= 2:
        log_decay = log_decay.expand(B, T, *log_decay.shape)
    y, state = torch.zeros_like(v), initial.clone()
    for b in range(B):
        for h in range(H):
            S = initial[b, h]
            for t in range(T):
                before = S
                query = q[b, t, h * q.shape[2] // H]
                if log_decay is not None:
                    log = log_decay[b, t, h].reshape(-1, 1)
                    size = log.real.exp()
                    S = (torch.complex(size * log.imag.cos(), size * log.imag.sin()) if log.is_complex() else size) * S
                key = -torch.expm1(log.squeeze(1)) if k is None else k[b, t, h * k.shape[2] // H]
                u = v[b, t, h]
                if beta is not None:
                    u = beta[b, t, h] * (u - S.real.T @ key)
                S = S + torch.outer(key, u)
                read = S.real if bonus is None else before.real + torch.outer(bonus[h] * key, u)
                y = y.index_put(tuple(torch.tensor(i) for i in (b, t, h)), 0.7 * read.T @ query)
            state = state.index_put(tuple(torch.tensor(i) for i in (b, h)), S)
    return y, state


def definition(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The loop over every document, from its end if reversed."""
    tensors = dict(inputs.tensors)
    initial, length = tensors.pop("initial_state"), tensors["v"].shape[1]
    timed = {name for name in tensors if name in ("q", "k", "v", "beta") or tensors[name].ndim > 2}
    ys, states = [], []
    borders = inputs.borders or [0, length]
    for n, (start, end) in enumerate(pairwise(borders)):
        one = {name: tensor[:, start:end] if name in timed else tensor for name, tensor in tensors.items()}
        if inputs.reverse:
            one = {name: tensor.flip(1) if name in timed else tensor for name, tensor in one.items()}
        y, state = loop(**one, initial=initial if inputs.borders is None else initial[n : n + 1])
        ys.append(y.flip(1) if inputs.reverse else y)
        states.append(state)
    return torch.cat(ys, 1), torch.cat(states)


@st.composite
def inputs(draw: st.DrawFn, decay: str, mode: str, lengths: tuple[int, ...] = LENGTHS, packed: bool = True) -> Inputs:
    """Sizes, gates mixed from LOGS, documents (some empty) and a direction; numbers from a drawn seed."""
    T = draw(st.sampled_from(lengths), "T")
    K, V, r = (draw(st.integers(1, 4), name) for name in ("K", "V", "H/G"))
    G, tied, is_complex = draw(st.integers(1, 2), "G"), decay.startswith("tied "), decay.startswith("complex ")
    shape = decay.split()[1:] if tied or is_complex else decay.split()
    borders = None
    if packed and draw(st.booleans(), "packed"):
        borders = [0, *sorted(draw(st.lists(st.integers(0, T), max_size=4), "borders")), T]
    B, H = 1 if borders else draw(st.integers(1, 2), "B"), G * r
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1), "seed"))
    normal = partial(torch.randn, generator=rng, dtype=torch.float64)
    tensors = {"q": normal(B, T, G, K), "v": normal(B, T, H, V)}
    if not tied:
        tensors["k"] = torch.nn.functional.normalize(normal(B, T, G, K), dim=-1)
    if decay != "none":
        sizes = [{"B": B, "T": T, "H": H, "K": K}[letter] for letter in shape]
        # short of the half of LOGS that a seed leaves out, so that some runs forget nothing
        some = torch.tensor(LOGS, dtype=torch.float64)[torch.randperm(len(LOGS), generator=rng)[:5]]
        log = some[torch.randint(5, sizes, generator=rng)]
        tensors["log_decay"] = torch.complex(log, 4 * normal(*sizes)) if is_complex else log
    if mode == "delta":
        tensors["beta"] = torch.rand(B, T, H, generator=rng, dtype=torch.float64)
    if mode == "bonus":
        tensors["bonus"] = normal(H, K)
    state = normal(len(borders) - 1 if borders else B, H, K, V)
    tensors["initial_state"] = torch.complex(state, normal(*state.shape)) if is_complex else state
    return Inputs(tensors, borders, draw(st.booleans(), "reverse"))


def with_gradients(tensors: dict[str, Tensor], y: Tensor, state: Tensor) -> dict[str, Tensor]:
    """y, the state, and the gradient of every input through both, all over their largest number."""
    weight = torch.linspace(-1, 1, y.numel() + state.numel(), dtype=y.dtype)
    total = (weight[: y.numel()] * y.flatten()).sum() + (weight[y.numel() :] * state.flatten()).sum().real
    if state.is_complex():
        total = total + (weight[y.numel() :].flip(0) * state.flatten().imag).sum()
    gradients = torch.autograd.grad(total, list(tensors.values()), materialize_grads=True)
    outputs = {"y": y, "state": state, **dict(zip(tensors, gradients, strict=True))}
    return {name: x.detach() / x.detach().abs().max().clamp(min=1) if x.numel() else x for name, x in outputs.items()}


KINDS = [(decay, mode) for decay in DECAYS for mode in ("plain", "delta", "bonus")]
KINDS += [(f"complex {decay}", mode) for decay in DECAYS[1:5] for mode in ("plain", "delta", "bonus")]
each_kind = pytest.mark.parametrize(("decay", "mode"), KINDS)


@each_kind
@given(st.data())
def test_every_form_is_the_loop_in_values_and_gradients(decay: str, mode: str, data: st.DataObject) -> None:
    given_inputs = data.draw(inputs(decay, mode, lengths=(1, 2, 5, 8, 9, 17)))
    for tensor in given_inputs.tensors.values():
        tensor.requires_grad_()
    want = with_gradients(given_inputs.tensors, *definition(given_inputs))
    for form in ("recurrent", "chunked", "parallel"):
        got = with_gradients(given_inputs.tensors, *scan(**given_inputs.arguments(), form=form))
        for name in want:
            close(got[name], want[name], msg=lambda text, name=name, form=form: f"{name}, {form}: {text}")


@each_kind
@given(st.data())
def test_chunks_of_any_size_are_the_token_loop(decay: str, mode: str, data: st.DataObject) -> None:
    given_inputs = data.draw(inputs(decay, mode))
    want = scan(**given_inputs.arguments(), form="recurrent")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK", data.draw(st.sampled_from([64, 1, 2, 16, 128]), "chunk"))
        got = scan(**given_inputs.arguments())
    for one, other in zip(got, want, strict=True):
        close(one / other.abs().max().clamp(min=1), other / other.abs().max().clamp(min=1))


@each_kind
def test_second_derivatives(decay: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK", 4 if mode == "delta" else 2)  # two tokens per chunk
    torch.manual_seed(1)
    B, T, G, H, K, V = 1, 3, 1, 2, 2, 1
    shape = decay.removeprefix("tied ").removeprefix("complex ")
    tensors = {"q": torch.randn(B, T, G, K), "v": torch.randn(B, T, H, V), "initial_state": torch.randn(B, H, K, V)}
    if not decay.startswith("tied"):
        tensors["k"] = torch.randn(B, T, G, K)
    if decay != "none":
        log = -torch.rand([{"B": B, "T": T, "H": H, "K": K}[letter] for letter in shape.split()]) - 0.1
        is_complex = decay.startswith("complex")
        tensors["log_decay"] = torch.complex(log, torch.randn_like(log)) if is_complex else log
    tensors |= {"delta": {"beta": torch.rand(B, T, H)}, "bonus": {"bonus": torch.randn(H, K)}, "plain": {}}[mode]
    wide = [x.to(torch.complex128 if x.is_complex() else torch.float64).requires_grad_() for x in tensors.values()]

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        return scan(**{"k": None, "log_decay": None, **dict(zip(tensors, values, strict=True))})

    assert gradcheck(run, wide)
    assert gradgradcheck(run, wide)


@each_kind
@given(st.data())
def test_steps_are_the_scan(decay: str, mode: str, data: st.DataObject) -> None:
    given_inputs = data.draw(inputs(decay, mode, lengths=(1, 2, 7), packed=False))
    arguments = given_inputs.arguments() | {"reverse": False}
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    B, _, H, _ = tensors["v"].shape
    assume(not decay.endswith("H K") or "B T" in decay or (H, tensors["q"].shape[-1]) != (B, H))  # [H K] would be [B H]
    want = scan(**arguments)
    state, log_decay, fixed = tensors.pop("initial_state").clone(), tensors.pop("log_decay", None), {}
    if mode == "bonus":
        fixed["bonus"] = tensors.pop("bonus")
    ys = []
    for t in range(tensors["v"].shape[1]):
        token = {"k": None, **{name: x[:, t] for name, x in tensors.items()}}
        log = log_decay[:, t] if log_decay is not None and log_decay.ndim > 2 else log_decay
        ys.append(step(log_decay=log, state=state, scale=0.7, **token, **fixed))
    close(torch.stack(ys, 1), want.y)
    close(state, want.state)


@pytest.mark.parametrize("decay", [*DECAYS, *(f"complex {decay}" for decay in DECAYS[1:5])])
@pytest.mark.parametrize("mode", ["plain", "delta"])
@given(st.data())
def test_summaries_combine_and_advance_like_the_scan(mode: str, decay: str, data: st.DataObject) -> None:
    given_inputs = data.draw(inputs(decay, mode, lengths=(2, 7, 33), packed=False))
    arguments = {"k": None, **given_inputs.tensors}
    cuts = sorted(data.draw(st.integers(0, arguments["v"].shape[1]), "cut") for _ in range(2))
    log_decay, initial = arguments.get("log_decay"), arguments["initial_state"]

    def part(start: int | None, end: int | None) -> Any:
        log = log_decay[:, start:end] if log_decay is not None and log_decay.ndim > 2 else log_decay
        k, v, beta = (None if arguments.get(x) is None else arguments[x][:, start:end] for x in ("k", "v", "beta"))
        return summary(k, v, log, beta)

    first, second, third = part(None, cuts[0]), part(cuts[0], cuts[1]), part(cuts[1], None)
    left, right = combine(combine(first, second), third), combine(first, combine(second, third))
    for one, other in zip(left, right, strict=True):
        close(one, other)
    close(
        advance(left, initial),
        scan(log_decay=log_decay, **{x: arguments[x] for x in arguments if x != "log_decay"}).state,
    )


@pytest.mark.parametrize("mode", ["plain", "delta", "bonus"])
@pytest.mark.parametrize("decay", ["H K", "B T H", "B T H K", "complex B T H", "complex B T H K"])
def test_a_reset_forgets_and_its_gate_has_no_gradient(decay: str, mode: str) -> None:
    torch.manual_seed(0)
    sizes = {"B": 1, "T": 80, "H": 2, "K": 3}
    log = torch.full([sizes[letter] for letter in decay.removeprefix("complex ").split()], -INF)
    log = torch.complex(log, torch.ones_like(log)) if decay.startswith("complex") else log
    q, k, v = (torch.randn(1, 80, 2, 3) for _ in range(3))
    extra = {"delta": {"beta": torch.rand(1, 80, 2)}, "bonus": {"bonus": torch.rand(2)}, "plain": {}}[mode]
    y, state = scan(q, k, v, log.requires_grad_(), initial_state=torch.ones(1, 2, 3, 3, dtype=log.dtype), **extra)
    (grad,) = torch.autograd.grad(y.square().sum() + state.abs().square().sum(), log)
    assert_close(
        state.real,
        k[:, -1, :, :, None] * v[:, -1, :, None] * (extra["beta"][:, -1, :, None, None] if mode == "delta" else 1),
    )
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("mode", ["plain", "delta", "bonus"])
@pytest.mark.parametrize("decay", ["none", "B T H", "B T H K", "complex B T H", "complex B T H K"])
@given(st.data())
def test_float32_keeps_six_digits_whatever_the_gates(decay: str, mode: str, data: st.DataObject) -> None:
    wide = data.draw(inputs(decay, mode, packed=False)).tensors
    narrow = {name: x.to(torch.complex64 if x.is_complex() else torch.float32) for name, x in wide.items()}
    for tensor in narrow.values():
        tensor.requires_grad_()
    exact = {name: x.detach().to(wide[name].dtype).requires_grad_() for name, x in narrow.items()}
    want = with_gradients(exact, *scan(**{"k": None, "log_decay": None, **exact}))
    got = with_gradients(narrow, *scan(**{"k": None, "log_decay": None, **narrow}))
    for name, tensor in want.items():
        # phases alone are sums of up to 64 angles, which cost a digit
        tolerance = 2e-5 if decay.startswith("complex") else 5e-6
        assert_close(got[name].to(tensor.dtype), tensor, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_wide_and_outputs_are_of_the_values_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 70, 2, 3).to(dtype) for _ in range(3))
    log_decay = -torch.rand(2, 70, 2).to(dtype)
    y, state = scan(q, k, v, log_decay)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (y.dtype, state.dtype) == (dtype, wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scan(q, k, v, log_decay).state, state)
    assert torch.equal(y, scan(*(x.to(wide) for x in (q, k, v, log_decay))).y.to(dtype))
    assert scan(q, k, v, log_decay + 0j if wide == torch.float64 else log_decay.float() + 0j).state.is_complex()


def test_no_tokens_leave_the_state_alone() -> None:
    q, v, state = torch.zeros(1, 0, 2, 3), torch.zeros(1, 0, 2, 5), torch.randn(1, 2, 3, 5)
    for form in ("recurrent", "chunked", "parallel"):
        out = scan(q, q, v, initial_state=state, form=form)
        assert out.y.shape == (1, 0, 2, 5)
        assert torch.equal(out.state, state)
    out = scan(q, q, v, cu_seqlens=torch.tensor([0, 0, 0]), initial_state=torch.cat([state, 2 * state]))
    assert torch.equal(out.state, torch.cat([state, 2 * state]))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_the_scan_compiles_whole() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, 3, requires_grad=True) for _ in range(3))
    more = {"beta": torch.rand(1, 70, 2), "cu_seqlens": torch.tensor([0, 3, 3, 70])}
    log_decay = -torch.rand(1, 70, 2)
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    out, want = compiled(q, k, v, log_decay, **more), scan(q, k, v, log_decay, **more)
    assert_close(out.y, want.y)
    assert_close(*(torch.autograd.grad(y.sum(), k)[0] for y in (out.y, want.y)))


q_, v_ = torch.zeros(2, 4, 2, 3), torch.zeros(2, 4, 4, 5)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"v": torch.zeros(2, 5, 4, 5)}, ShapeError, "T=4"),
    ({"v": torch.zeros(2, 4, 3, 5)}, ShapeError, "G must divide H, got G=2"),
    ({"q": torch.zeros(2, 4, 3)}, ShapeError, r"q must be \[B T G K\]"),
    ({"log_decay": torch.zeros(2, 4)}, ShapeError, "H=2"),
    ({"initial_state": torch.zeros(2, 4, 5, 3)}, ShapeError, "K=3"),
    ({"cu_seqlens": torch.tensor([0, 4])}, ShapeError, "B must be 1"),
    ({"k": q_.long()}, TypeError, "k must be real and floating"),
    ({"log_decay": torch.zeros(4).long()}, TypeError, "log_decay must be floating or complex"),
    ({"initial_state": torch.zeros(2, 4, 3, 5) + 0j}, TypeError, "initial_state must be real"),
    ({"k": None}, ValueError, "k=None is 1 − exp"),
    ({"k": None, "log_decay": torch.zeros(2, 4, 4)}, ValueError, "k=None is 1 − exp"),
    ({"beta": torch.zeros(2, 4, 4), "bonus": torch.zeros(4)}, ValueError, "bonus must be None with beta"),
    ({"form": "fast"}, ValueError, "form must be one of"),
    ({"k": torch.zeros(2, 4, 3, 2, 3)}, ShapeError, r"v must be \[B T M H V\], got shape"),
    ({"v": torch.zeros(2, 4, 3, 4, 5)}, ShapeError, r"v must be \[B T H V\], got shape"),
    ({"q": torch.zeros(2, 4, 0, 2, 3)}, ShapeError, r"must be written and read at least once, got M=1 \(k\) and R=0"),
    ({"erase": torch.zeros(2, 4, 3, 3)}, ShapeError, r"q has G=2 but erase has G=3; .* erase: \[B T G K \| B T H K\]"),
    ({"erase": torch.zeros(2, 4, 3)}, ShapeError, r"erase must be \[B T G K \| B T H K\], got shape"),
    ({"remove": torch.zeros(2, 4, 4, 2), "erase": q_}, ShapeError, "q has K=3 but remove has K=2"),
    ({"write": torch.zeros(2, 4, 4, 3)}, ShapeError, r"v has V=5 but write has V=3; .* write: \[B T H \| B T H V\]"),
    ({"write": torch.zeros(2, 4, 2)}, ShapeError, "v has H=4 but write has H=2"),
    ({"beta": torch.zeros(2, 4, 2, 4)}, ShapeError, r"beta must be \[B T H\]"),
    ({"erase": q_.long()}, TypeError, "erase must be real and floating"),
    ({"erase": q_, "remove": q_ + 0j}, TypeError, "remove must be real and floating"),
    ({"write": v_[..., 0].long()}, TypeError, "write must be real and floating"),
    ({"erase": 1.0}, TypeError, "erase must be a tensor"),
    ({"erase": q_, "erase_from": "both"}, ValueError, "erase_from must be one of decayed, previous, got 'both'"),
    ({"remove": q_}, ValueError, "remove must be None without erase or beta"),
    *(
        ({"beta": torch.zeros(2, 4, 4), name: x}, ValueError, f"beta must be None with {name}: it stands for erase")
        for name, x in (("erase", q_), ("write", v_))
    ),
    *(
        ({"bonus": torch.zeros(4), **more}, ValueError, f"bonus must be None with {name}: it is read before")
        for name, more in (
            ("erase", {"erase": q_}),
            ("write", {"write": v_}),
            ("several writes per token", {"k": q_[:, :, None], "v": v_[:, :, None]}),
            ("several reads per token", {"q": q_[:, :, None]}),
        )
    ),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input_is_refused_in_the_letters_of_the_docstring(change: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        scan(**{"q": q_, "k": q_, "v": v_, **change})
    scan(q_, q_, v_)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"erase": torch.zeros(2, 3, 3)}, r"step: q has G=2 but erase has G=3; .* erase: \[B G K \| B H K\]"),
        ({"k": torch.zeros(2, 3, 2, 3)}, r"step: v must be \[B M H V\]"),
        ({"beta": torch.zeros(2, 4), "write": torch.zeros(2, 4)}, "step: beta must be None with write"),
        ({"erase_from": "now"}, "step: erase_from must be one of decayed, previous, got 'now'"),
    ],
)
def test_a_step_refuses_in_its_own_letters(change: dict[str, Any], words: str) -> None:
    given = {"q": q_[:, 0], "k": q_[:, 0], "v": v_[:, 0], "log_decay": None, "state": torch.zeros(2, 4, 3, 5)}
    with pytest.raises(ValueError, match=words):
        step(**{**given, **change})
    step(**given)


@pytest.mark.parametrize("decay", ["B T H", "B T H K"])
@pytest.mark.parametrize("form", ["recurrent", "chunked", "parallel"])
def test_what_is_erased_from_the_previous_state_meets_no_gate_of_its_token(decay: str, form: str) -> None:
    """Gates of exactly 0 and of e^-300 (0 in float32 once multiplied): no quotient, no NaN, and the exact result."""
    torch.manual_seed(0)
    q, k, e, b = (torch.randn(1, 40, 2, 3) / 2 for _ in range(4))
    v, state = torch.randn(1, 40, 2, 4), torch.randn(1, 2, 3, 4)
    log = torch.where(torch.rand(1, 40, 2, 3) < 0.3, -INF, -300.0)[..., : 3 if decay.endswith("K") else 1]
    log = (log if decay.endswith("K") else log.squeeze(-1)).requires_grad_()
    y, final = scan(q, k, v, log, erase=e, remove=b, erase_from="previous", initial_state=state, form=form)
    # whatever was in the state but one token before is gone
    S, want = state, []
    for t in range(40):
        found = torch.einsum("bhkv,bhk->bhv", S, e[:, t])
        S = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t]) - torch.einsum("bhk,bhv->bhkv", b[:, t], found)
        want.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    assert_close(y, torch.stack(want, 1))
    assert_close(final, S)
    (grad,) = torch.autograd.grad(y.sum() + final.sum(), log)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("removes", [False, True])
def test_sub_tokens_compute_what_their_tokens_do(removes: bool, reverse: bool) -> None:
    torch.manual_seed(0)
    normal = partial(torch.randn, dtype=torch.float64)
    q, k, v, w = normal(2, 5, 2, 1, 3), normal(2, 5, 3, 1, 3) / 3, normal(2, 5, 3, 2, 4), normal(2, 5, 3, 2, 4)
    log, e, b = -normal(2, 3).abs(), normal(2, 5, 3, 2, 3) / 3, normal(2, 5, 3, 1, 3) / 3 if removes else None
    options: Any = {"erase_from": "previous", "reverse": reverse}
    y, state = scan(q, k, v, log, erase=e, remove=b, write=w, **options)
    found, places = sub_tokens(q, k, v, log[None, None], None, None, e, b, w, previous=True, reverse=reverse)
    assert places.length == (7 if removes else 4)
    assert found.log_decay is not None
    decay = found.log_decay.expand(2, -1, -1, -1)  # which is one for all rows
    got, final = scan(found.q, found.k, found.v, decay, erase=found.erase, **options)
    assert_close(places.reads_of(got), y)
    assert_close(final, state)


def test_several_writes_are_tokens_that_share_a_gate_and_several_reads_are_queries() -> None:
    torch.manual_seed(0)
    normal = partial(torch.randn, dtype=torch.float64)
    q, k, v = normal(2, 5, 2, 1, 3), normal(2, 5, 3, 1, 3) / 3, normal(2, 5, 3, 2, 4)
    beta, log = normal(2, 5, 3, 2).sigmoid(), -normal(2, 5, 2).abs()
    y, state = scan(q, k, v, log, beta=beta)
    later = torch.stack([log, torch.zeros_like(log), torch.zeros_like(log)], 2).flatten(1, 2)
    flat = [x.flatten(1, 2) for x in (k, v)]
    for r in range(2):
        each = q[:, :, r].repeat_interleave(3, 1)
        one = scan(each, *flat, later, beta=beta.flatten(1, 2))
        close(y[:, :, r], one.y[:, 2::3])
    close(state, one.state)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (None, "step: state must be a tensor, got None"),
        (torch.zeros(2, 4, 3, 5).half(), "step: state must be torch.float32 for these inputs, got torch.float16"),
        (torch.zeros(2, 4, 3, 5) + 0j, "step: state must be torch.float32"),
    ],
)
def test_a_step_wants_a_state_it_can_overwrite(state: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        step(q_[:, 0], q_[:, 0], v_[:, 0], None, state)
