"""Every law of recur.testing over one table of scans, and each form against a loop in plain Python."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor

import recur
from recur.primitives import chunked as scan_module
from recur.primitives import diagonal, fixed, segments
from recur.testing import check, strategies
from recur.testing.compare import Inputs, same

EXAMPLES = max(1, settings().max_examples // 2)
SEED = 0 if settings().derandomize else None
COMMON = {"promises", "forms", "splits", "packing", "causality", "linearity", "finiteness", "gradients"} | {
    "second_gradients", "low_precision", "rows", "heads", "reversal", "reversed_packing", "containment"} | {
    "tangents", "lengths"
}  # fmt: skip


# ---------------------------------------------------------------------- the definitions, one number at a time


def exp(log: complex) -> complex:
    return 0.0 if log.real == float("-inf") else cmath.exp(log)


def entry(tensor: list[Any] | None, *index: int, default: complex = 0.0) -> complex:
    """tensor[index], or the default if there is no tensor."""
    if tensor is None:
        return default
    for i in index:
        tensor = tensor[i]
    return complex(tensor)


def token(tensor: Tensor | None, b: int, t: int, leading: int) -> Any:
    """The lists of row b, token t; of a constant, which lacks these axes, all of it."""
    if tensor is None:
        return None
    return (tensor[b, t] if tensor.ndim == leading + 2 else tensor).tolist()


def loop_scan(
    q: Tensor,
    v: Tensor,
    k: Tensor | None = None,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    bonus: Tensor | None = None,
    erase: Tensor | None = None,
    remove: Tensor | None = None,
    write: Tensor | None = None,
    initial_state: Tensor | None = None,
    previous: bool = False,
) -> dict[str, Tensor]:
    """S' = A S; S = S' + k (w v)^T - b (Re(S' or S)^T e)^T, write after write; y = Re(S)^T q for every read.

    beta is e = beta k and w = beta; with a bonus y is read before the write.
    """
    H, K, V = v.shape[-2], q.shape[-1], v.shape[-1]
    reads, (B, T) = q.ndim == 5, q.shape[:2]
    writes = v.ndim == 5
    M, R = v.shape[2] if writes else 1, q.shape[2] if reads else 1
    per_key = log_decay is not None and log_decay.shape[-2:] == (H, K) and log_decay.ndim in (2, 4)
    ys, states = torch.zeros(B, T, R, H, V, dtype=torch.float64), []

    def at(x: Tensor | None, b: int, t: int) -> Any:
        """The lists [M ...] of a token."""
        return None if x is None else x[b, t].tolist() if writes else [x[b, t].tolist()]

    for b in range(B):
        S = [[[entry(None if initial_state is None else initial_state[b].tolist(), h, i, j) for j in range(V)]
              for i in range(K)] for h in range(H)]  # fmt: skip
        for t in range(T):
            q_t = q[b, t].tolist() if reads else [q[b, t].tolist()]
            k_t, v_t, beta_t, e_t, b_t, w_t = (at(x, b, t) for x in (k, v, beta, erase, remove, write))
            a_t = token(log_decay, b, t, leading=2 if per_key else 1)

            def of(x: Any, h: int) -> Any:
                """What belongs to head h, of heads or groups."""
                return x[h * len(x) // H]

            for h in range(H):
                a = [1.0 if a_t is None else exp(entry(a_t, h, i) if per_key else entry(a_t, h)) for i in range(K)]
                for j in range(V):
                    before = [S[h][i][j] for i in range(K)]
                    after = [a[i] * before[i] for i in range(K)]
                    for m in range(M):
                        key = [-math.expm1(a_t[h][i]) for i in range(K)] if k_t is None else of(k_t[m], h)
                        strength = 1.0 if beta_t is None else beta_t[m][h]
                        eraser = [0.0] * K if beta is None and erase is None else key if e_t is None else of(e_t[m], h)
                        removal = key if b_t is None else of(b_t[m], h)
                        gate = 1.0 if w_t is None else w_t[m][h] if write.ndim < v.ndim else w_t[m][h][j]
                        seen = before if previous and m == 0 else after
                        found = strength * sum(seen[i].real * eraser[i] for i in range(K))
                        u = strength * gate * v_t[m][h][j]
                        after = [after[i] + key[i] * u - removal[i] * found for i in range(K)]
                    for r in range(R):
                        query = of(q_t[r], h)
                        y = sum(after[i].real * query[i] for i in range(K))
                        if bonus is not None:
                            w = bonus[h].expand(K).tolist()
                            y = sum((before[i] + w[i] * key[i] * u).real * query[i] for i in range(K))
                        ys[b, t, r, h, j] = complex(y).real
                    for i in range(K):
                        S[h][i][j] = after[i]
        states.append(S)
    rotates = log_decay is not None and log_decay.is_complex()
    state = torch.tensor(states, dtype=torch.complex128).reshape(B, H, K, V)
    return {"y": ys if reads else ys.squeeze(2), "state": state if rotates else state.real}


def loop_gated_scan(x: Tensor, log_decay: Tensor, initial_state: Tensor | None = None) -> dict[str, Tensor]:
    """h = a h + x, one channel after another."""
    B, T, *trailing = x.shape
    log_decay = log_decay if log_decay.ndim == x.ndim else log_decay.expand(x.shape)
    rotates = x.is_complex() or log_decay.is_complex()
    ys, state = torch.zeros(B, T, x[0, :1].numel() if T else 0, dtype=torch.complex128), []
    for b in range(B):
        h = torch.zeros(trailing, dtype=torch.complex128) if initial_state is None else initial_state[b]
        h = [complex(number) for number in h.flatten().tolist()]
        for t in range(T):
            for i, (log, write) in enumerate(
                zip(log_decay[b, t].flatten().tolist(), x[b, t].flatten().tolist(), strict=True)
            ):
                h[i] = exp(log) * h[i] + write
            ys[b, t] = torch.tensor(h, dtype=torch.complex128)
        state.append(h)
    y, final = ys.reshape(x.shape), torch.tensor(state, dtype=torch.complex128).reshape(B, *trailing)
    return {"y": y if rotates else y.real, "state": final if rotates else final.real}


def loop_matrix_scan(
    initial_state: Tensor | None,
    shape: tuple[int, ...],
    gate: Callable[..., complex],
    write: Callable[..., complex],
    read: Callable[..., complex],
    rotates: bool = False,
) -> dict[str, Tensor]:
    """S[v, n] = gate S[v, n] + write, y[v] = Re sum_n read S[v, n], for shape B T V N."""
    B, T, V, N = shape
    ys, states = torch.zeros(B, T, V, dtype=torch.float64), torch.zeros(B, V, N, dtype=torch.complex128)
    for b in range(B):
        for v in range(V):
            S = [0.0] * N if initial_state is None else initial_state[b, v].tolist()
            for t in range(T):
                S = [gate(b, t, v, n) * S[n] + write(b, t, v, n) for n in range(N)]
                ys[b, t, v] = sum(complex(read(b, t, v, n) * S[n]).real for n in range(N))
            states[b, v] = torch.tensor(S, dtype=torch.complex128)
    return {"y": ys, "state": states if rotates else states.real}


def weight(tensor: Tensor, b: int, t: int, v: int, V: int, n: int) -> float:
    """B or C (k or q) at channel v, whichever of [B T N], [B T G N] and [V N] it is."""
    if tensor.ndim == 2:
        return tensor[v, n].item()
    if tensor.ndim == 3:
        return tensor[b, t, n].item()
    return tensor[b, t, v // (V // tensor.shape[2]), n].item()


def loop_selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> dict[str, Tensor]:
    """S[v, n] = exp(delta A) S + delta x B, y = sum_n C S."""
    V = x.shape[2]
    return loop_matrix_scan(
        initial_state,
        (*x.shape, A.shape[1]),
        lambda b, t, v, n: exp(delta[b, t, v].item() * A[v, n].item()),
        lambda b, t, v, n: delta[b, t, v].item() * x[b, t, v].item() * weight(B, b, t, v, V, n),
        lambda b, t, v, n: weight(C, b, t, v, V, n),
    )


def loop_online_scan(
    x: Tensor, rate: Tensor, k: Tensor, q: Tensor, initial_state: Tensor | None = None
) -> dict[str, Tensor]:
    """S[v, n] = (1 - eps k_n^2) S + eps x k_n with eps = rate / (1 + rate |k|^2), y = sum_n q_n S."""
    V, N = x.shape[2], k.shape[-1]

    def eps(b: int, t: int, v: int) -> float:
        r = rate[b, t, v].item()
        return r / (1 + r * sum(weight(k, b, t, v, V, n) ** 2 for n in range(N)))

    return loop_matrix_scan(
        initial_state,
        (*x.shape, N),
        lambda b, t, v, n: 1 - eps(b, t, v) * weight(k, b, t, v, V, n) ** 2,
        lambda b, t, v, n: eps(b, t, v) * x[b, t, v].item() * weight(k, b, t, v, V, n),
        lambda b, t, v, n: weight(q, b, t, v, V, n),
    )


def loop_exact_online_scan(
    x: Tensor, rate: Tensor, k: Tensor, q: Tensor, initial_state: Tensor | None = None
) -> dict[str, Tensor]:
    """S[v] = S[v] + eps (x - S[v] k) k with eps = rate / (1 + rate |k|^2), y[v] = S[v] q."""
    (B, T, V), N = x.shape, k.shape[-1]
    ys, states = torch.zeros(B, T, V, dtype=torch.float64), torch.zeros(B, V, N, dtype=torch.float64)
    for b in range(B):
        for v in range(V):
            S = [0.0] * N if initial_state is None else initial_state[b, v].tolist()
            for t in range(T):
                key = [weight(k, b, t, v, V, n) for n in range(N)]
                r = rate[b, t, v].item()
                eps = r / (1 + r * sum(number**2 for number in key))
                error = x[b, t, v].item() - sum(S[n] * key[n] for n in range(N))
                S = [S[n] + eps * error * key[n] for n in range(N)]
                ys[b, t, v] = sum(weight(q, b, t, v, V, n) * S[n] for n in range(N))
            states[b, v] = torch.tensor(S, dtype=torch.float64)
    return {"y": ys, "state": states}


def loop_fixed_scan(
    x: Tensor, log_decay: Tensor, readout: Tensor, write: Tensor | None = None, initial_state: Tensor | None = None
) -> dict[str, Tensor]:
    """S[v, n] = exp(log_decay) S + write x, y = Re sum_n readout S."""
    poles = log_decay.expand(readout.shape)
    writes = torch.ones(()).expand(readout.shape) if write is None else write.expand(readout.shape)
    return loop_matrix_scan(
        initial_state,
        (*x.shape, readout.shape[1]),
        lambda b, t, v, n: exp(poles[v, n].item()),
        lambda b, t, v, n: writes[v, n].item() * x[b, t, v].item(),
        lambda b, t, v, n: readout[v, n].item(),
        rotates=poles.is_complex() or writes.is_complex(),
    )


# ---------------------------------------------------------------------- the table


class Case(NamedTuple):
    """A scan, inputs for it, its definition, and what belongs to it."""

    scan: Callable[..., Any]
    inputs: SearchStrategy[Inputs]
    loop: Callable[..., dict[str, Tensor]]
    step: Callable[..., Tensor] | None = None
    summary: Callable[..., Any] | None = None
    further: tuple[str, ...] = ()  # laws beyond the common ones


def outer(*further: str, step: bool = True, **options: Any) -> Case:
    """A row for recur.scan; `recur.step` reads a constant [H K] as [B H] where both fit, so there it has no part."""
    left_out: dict[str, Any] = {"k": None} if options.get("tied") else {}
    left_out |= {"log_decay": None} if options.get("decay", "") is None else {}
    mode = {"erase_from": "previous"} if options.get("previous") else {}
    left_out |= mode
    summary = None if "bonus" in options else partial(recur.summary, **mode)
    return Case(
        partial(recur.scan, **left_out),
        strategies.scans(**options),
        partial(loop_scan, previous=bool(mode)),
        partial(recur.step, **left_out) if step else None,
        summary,
        (*further, *(("steps",) if step else ()), *(("summaries",) if summary else ())),
    )


CASES = {
    "scan, no decay": outer("padding", decay=None),
    "scan, decay H": outer(decay="H"),
    "scan, decay H K": outer(decay="H K", step=False),
    "scan, decay B T H": outer("padding", "resets", decay="B T H"),
    "scan, decay B T H K": outer("padding", "resets"),
    "scan, tied": outer("padding", "resets", tied=True),
    "scan, bonus H": outer("padding", "resets", decay="B T H", bonus="H"),
    "scan, bonus H K": outer("padding", "resets", bonus="H K"),
    "scan, complex B T H": outer("padding", "resets", decay="B T H", complex=True),
    "scan, complex B T H K": outer("padding", "resets", complex=True),
    "scan, complex bonus": outer("padding", "resets", complex=True, bonus="H K"),
    "delta rule": outer("padding", decay=None, delta=True),
    "gated delta rule": outer("padding", "resets", decay="B T H", delta=True),
    "key-wise delta rule": outer("padding", "resets", delta=True),
    "complex delta rule": outer("padding", "resets", delta=True, complex=True),
    "erase key": outer("padding", "resets", erase="G", decay="B T H"),
    "erase key from the previous state": outer("padding", "resets", erase="H", previous=True),
    "delta rule on the previous state": outer("padding", "resets", delta=True, previous=True, decay="B T H"),
    "delta rule with a removal key": outer("padding", "resets", delta=True, remove="H"),
    "removal key, previous, scalar": outer(
        "padding", "resets", erase="G", remove="H", previous=True, decay="B T H", write="H"
    ),
    "removal key, previous, key-wise": outer("padding", "resets", erase="H", remove="G", previous=True),
    "removal key, constant decay": outer(erase="H", remove="G", decay="H K", write="V", step=False),
    "erase key without a decay": outer("padding", erase="G", decay=None, write="V"),
    "complex removal key, previous": outer(
        "padding", "resets", erase="H", remove="H", previous=True, complex=True, write="V"
    ),
    "write gate": outer("padding", "resets", write="V", decay="B T H"),
    "several writes and reads": outer("padding", "resets", several=True, write="H"),
    "several writes and reads, complex": outer("padding", "resets", several=True, decay="B T H", complex=True),
    "delta product": outer("padding", "resets", delta=True, several=True, decay="B T H"),
    "several erasing writes, previous": outer(
        "padding", "resets", erase="H", remove="G", previous=True, several=True, decay="B T H"
    ),
    "several erasing writes, previous, key-wise": outer(
        "padding", "resets", erase="G", remove="H", write="V", previous=True, several=True
    ),
    "several erasing writes, previous, complex": outer(
        "padding", "resets", erase="G", previous=True, several=True, complex=True
    ),
    "gated": Case(
        recur.gated_scan,
        strategies.gated_scans(),
        loop_gated_scan,
        recur.gated_step,
        further=("padding", "resets", "steps"),
    ),
    "gated, constant": Case(
        recur.gated_scan, strategies.gated_scans(constant=True), loop_gated_scan, recur.gated_step, further=("steps",)
    ),
    "gated, complex": Case(
        recur.gated_scan,
        strategies.gated_scans(complex=True),
        loop_gated_scan,
        recur.gated_step,
        further=("padding", "resets", "steps"),
    ),
    "gated, complex input": Case(
        recur.gated_scan,
        strategies.gated_scans(complex_input=True),
        loop_gated_scan,
        recur.gated_step,
        further=("padding", "resets", "steps"),
    ),
    "selective": Case(
        recur.selective_scan,
        strategies.selective_scans(),
        loop_selective_scan,
        recur.selective_step,
        further=("padding", "steps"),
    ),
    "selective, groups": Case(
        recur.selective_scan,
        strategies.selective_scans(weights="B T G N"),
        loop_selective_scan,
        recur.selective_step,
        further=("padding", "steps"),
    ),
    "selective, constant weights": Case(
        recur.selective_scan, strategies.selective_scans(weights="V N"), loop_selective_scan, further=("padding",)
    ),
    "online": Case(
        recur.online_scan, strategies.online_scans(), loop_online_scan, recur.online_step, further=("padding", "steps")
    ),
    "online, exact groups": Case(
        partial(recur.online_scan, diagonal=False),
        strategies.online_scans(groups=True),
        loop_exact_online_scan,
        partial(recur.online_step, diagonal=False),
        further=("padding", "steps"),
    ),
    "online, groups": Case(
        recur.online_scan,
        strategies.online_scans(groups=True),
        loop_online_scan,
        recur.online_step,
        further=("padding", "steps"),
    ),
    "fixed": Case(recur.fixed_scan, strategies.fixed_scans(), loop_fixed_scan, recur.fixed_step, further=("steps",)),
    "fixed, real": Case(
        recur.fixed_scan, strategies.fixed_scans(complex=False), loop_fixed_scan, recur.fixed_step, further=("steps",)
    ),
    "fixed, poles per channel": Case(
        recur.fixed_scan,
        strategies.fixed_scans(poles="V N", write=True),
        loop_fixed_scan,
        recur.fixed_step,
        further=("steps",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_law_holds(name: str) -> None:
    case = CASES[name]
    options = {"step": case.step, "summary": case.summary, "examples": EXAMPLES, "seed": SEED}
    held = check(case.scan, case.inputs, **options)
    assert set(held) == COMMON | set(case.further)


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
def test_every_form_is_the_plain_loop(name: str, data: st.DataObject) -> None:
    case = CASES[name]
    inputs = data.draw(case.inputs)
    inputs = inputs.between(0, min(inputs.length, 9))
    arguments = {**inputs.tokens, **inputs.constants, "initial_state": inputs.state}
    want = case.loop(**arguments)
    for form in ("recurrent", "chunked", "auto"):
        y, state = case.scan(**arguments, form=form)
        same({"y": y, "state": state}, want, (f"as {form}", "in the plain loop"))


def sized(function: Callable[..., Any], module: ModuleType, constant: str) -> Callable[..., Any]:
    """The scan with its module's constant as an argument; it stays, because a backward pass may read it."""

    def run(*, chunk_size: int = 64, initial_state: Tensor | None = None, **tensors: Tensor) -> Any:
        setattr(module, constant, chunk_size)
        return function(**tensors, initial_state=initial_state)

    return run


CHUNKED = {
    "scan": (recur.scan, scan_module, "CHUNK", strategies.scans()),
    "scan, complex": (recur.scan, scan_module, "CHUNK", strategies.scans(decay="B T H", complex=True)),
    "scan, bonus": (recur.scan, scan_module, "CHUNK", strategies.scans(bonus="H K")),
    "delta rule": (recur.scan, scan_module, "CHUNK", strategies.scans(delta=True)),
    "several erasing writes": (
        partial(recur.scan, erase_from="previous"),
        scan_module,
        "CHUNK",
        strategies.scans(erase="H", remove="G", previous=True, several=True),
    ),
    "gated": (recur.gated_scan, diagonal, "SIDE_BY_SIDE", strategies.gated_scans()),
    "selective": (recur.selective_scan, segments, "SEGMENT", strategies.selective_scans()),
    "online": (recur.online_scan, segments, "SEGMENT", strategies.online_scans()),
    "fixed": (partial(recur.fixed_scan, form="chunked"), fixed, "CHUNK", strategies.fixed_scans()),
}


@pytest.mark.parametrize("name", CHUNKED)
def test_chunk_size_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, module, constant, inputs = CHUNKED[name]
    monkeypatch.setattr(module, constant, getattr(module, constant))  # put back afterwards
    assert check(sized(function, module, constant), inputs, laws=["chunk_sizes"], examples=EXAMPLES, seed=SEED)


@pytest.mark.parametrize("form", ["recurrent", "chunked", "parallel"])
def test_scale_multiplies_the_outputs_alone(form: str) -> None:
    q, k, v = torch.randn(3, 2, 7, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain, scaled = recur.scan(q, k, v, form=form), recur.scan(q, k, v, scale=0.5, form=form)
    assert torch.allclose(scaled.y, plain.y / 2)
    assert torch.equal(scaled.state, plain.state)
