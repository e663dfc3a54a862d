"""Every tensor that a kernel is given may be any view, gradients too: results are those of contiguous copies.

Laws run in a process of their own, in Triton's interpreter: `TRITON_INTERPRET=1 python tests/test_kernel_strides.py
LAW...`; gpu_laws.py runs them on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import Laws, run_laws
from torch import Tensor

import recur
from recur import kernel

LAWS = law = Laws()
B, T, H, G, K, V = 2, 5, 4, 2, 3, 2  # no two neighbours alike, so that a transposed view has other strides
BORDERS = [0, 2, 2, 5]
EXAMPLES = 6


def transposed(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def every_second_column(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]


def from_the_second_entry(x: Tensor) -> Tensor:
    """Contiguous, but begins where no load of several numbers may."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


def part_of_a_wider_row(x: Tensor) -> Tensor:
    return torch.cat([torch.full_like(x, torch.nan), x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]]


def expanded(x: Tensor, axis: int) -> Tensor:
    """One entry for all of an axis, with stride 0."""
    return x.narrow(axis, 0, 1).expand(x.shape)


def one_number(x: Tensor) -> Tensor:
    """As the gradient of a sum is."""
    return x.flatten()[0].expand(x.shape)


def negated(x: Tensor) -> Tensor:
    """Negated, or conjugated, only when it is read."""
    return x.conj().resolve_conj().conj() if x.is_complex() else torch.complex(x, -x).conj().imag


WAYS: list[Callable[[Tensor], Tensor]] = [
    transposed, every_second_column, from_the_second_entry, part_of_a_wider_row, one_number, negated,
    *(partial(expanded, axis=axis) for axis in (0, 1, -2, -1)),
]  # fmt: skip


def views(draw: Callable[..., Any], tensors: dict[str, Tensor], kept: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Every tensor seen one way or as it is; `kept` ones are only laid out otherwise, for they are written to."""
    found = {}
    for name, x in tensors.items():
        ways = [
            way for way in WAYS[: 4 if name in kept else None] if getattr(way, "keywords", {}).get("axis", 0) < x.ndim
        ]
        ways = [way for way in ways if x.ndim > 1 or not isinstance(way, partial)]
        way = draw(st.sampled_from([None, *ways]), name)
        found[name] = x if way is None else way(x)
    return found


def drawn(run: Callable[[Callable[..., Any]], None], examples: int = EXAMPLES) -> None:
    @settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @given(st.data())
    def law(data: st.DataObject) -> None:
        torch.manual_seed(0)
        run(data.draw)

    law()


def plain(x: Tensor) -> Tensor:
    return x.resolve_neg().resolve_conj().clone(memory_format=torch.contiguous_format)


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, x in got.items():
        assert x.isfinite().all(), f"{name} is not finite"
        assert torch.equal(x, want[name]), f"{name} is off by {(x - want[name]).abs().max():.1e}"


def scan(draw: Callable[..., Any], run: Callable[..., recur.ScanOut], tensors: dict[str, Tensor], rows: int) -> None:
    """y, state and all gradients of a scan of views, with gradients of y and of the state that are views."""
    packed, reverse = draw(st.booleans(), "packed"), draw(st.booleans(), "reverse")
    if packed:
        tensors = {name: x[:1] if x.shape[:2] == (B, T) else x for name, x in tensors.items()}
        tensors["initial_state"] = torch.cat([tensors["initial_state"], tensors["initial_state"][:1]])
    cu = torch.tensor(BORDERS) if packed else None
    seen = views(draw, tensors)

    def outputs(change: Callable[[Tensor], Tensor], gradients: dict[str, Tensor] | None) -> Any:
        leaves = {name: change(x).detach().requires_grad_() for name, x in seen.items()}
        borders = cu if cu is None or change is plain else torch.stack([cu, cu], 1)[:, 0]
        out = run(**leaves, cu_seqlens=borders, reverse=reverse, form="triton")._asdict()
        if gradients is None:
            gradients = views(draw, {name: torch.randn(x.shape, dtype=x.dtype) for name, x in out.items()})
        given = [change(gradients[name]) for name in out]
        found = torch.autograd.grad(list(out.values()), list(leaves.values()), given)
        return {**out, **{f"d{name}": x for name, x in zip(leaves, found, strict=True)}}, gradients

    got, gradients = outputs(lambda x: x, None)
    want, _ = outputs(plain, gradients)
    same(got, want)


GATES = {"H": (H,), "H K": (H, K), "B T H": (B, T, H), "B T H K": (B, T, H, K)}


def gates(shape: tuple[int, ...], rotated: bool) -> Tensor:
    return torch.complex(-torch.rand(shape), torch.randn(shape)) if rotated else -torch.rand(shape)


@law
def scans_with_a_matrix_state() -> None:
    def run(draw: Callable[..., Any]) -> None:
        gate = draw(st.sampled_from([None, *GATES]), "gates")
        tied = ["tied"] if gate in ("H K", "B T H K") else []
        write = draw(st.sampled_from(["plain", "delta", "bonus", "wide", *tied]))
        rotated = gate is not None and write != "tied" and draw(st.booleans(), "complex")
        tensors = {"q": torch.randn(B, T, G, K), "k": torch.randn(B, T, G, K), "v": torch.randn(B, T, H, V)}
        tensors["initial_state"] = torch.randn(B, H, K, V, dtype=torch.complex64 if rotated else torch.float32)
        if gate is not None:
            tensors["log_decay"] = gates(GATES[gate], rotated)
        if write == "delta":
            tensors["beta"] = torch.rand(B, T, H)
        if write == "bonus":
            tensors["bonus"] = torch.randn(H, K)
        if write == "wide":
            tensors |= {"erase": torch.randn(B, T, H, K), "remove": torch.randn(B, T, G, K)}
            tensors |= {"write": torch.randn(B, T, H, V)}
        if write == "tied":
            del tensors["k"]

        def call(k: Tensor | None = None, **tensors: Any) -> recur.ScanOut:
            return recur.scan(k=k, scale=0.5, **tensors)

        scan(draw, call, tensors, H)

    drawn(run, 3 * EXAMPLES)


@law
def elementwise_scans() -> None:
    def run(draw: Callable[..., Any]) -> None:
        selective = draw(st.booleans(), "selective")
        x, rate, state = torch.randn(B, T, H), torch.rand(B, T, H), torch.randn(B, H, K)
        k, q = torch.randn(B, T, G, K), torch.randn(B, T, G, K)
        if selective:
            fixed = draw(st.sampled_from(["", "B", "C", "BC"]), "fixed")
            k, q = (torch.randn(H, K) if name in fixed else w for name, w in (("B", k), ("C", q)))
            tensors = {"x": x, "delta": rate, "A": -torch.rand(H, K), "B": k, "C": q}
        else:
            tensors = {"x": x, "rate": rate, "k": k, "q": q}
        scan(draw, recur.selective_scan if selective else recur.online_scan, {**tensors, "initial_state": state}, H)

    drawn(run)


@law
def diagonal_scans() -> None:
    def run(draw: Callable[..., Any]) -> None:
        rotated = draw(st.booleans(), "complex")
        x, state = torch.randn(B, T, H, K), torch.randn(B, H, K, dtype=torch.complex64 if rotated else torch.float32)
        log_decay = gates(draw(st.sampled_from([(B, T, H, K), (H, K)]), "gates"), rotated)
        scan(draw, recur.gated_scan, {"x": x, "log_decay": log_decay, "initial_state": state}, 1)

    drawn(run)


def step(draw: Callable[..., Any], run: Callable[..., Tensor], tensors: dict[str, Tensor]) -> None:
    """y and the state, which is overwritten where it lies."""
    seen = views(draw, tensors, kept=("state",))
    copies = {name: plain(x) for name, x in seen.items()}
    got, want = run(**seen), run(**copies)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seen["state"], copies["state"], rtol=1e-6, atol=1e-6)


@law
def steps() -> None:
    def matrix(draw: Callable[..., Any]) -> None:
        gate = draw(st.sampled_from(["none", (H,), (H, K), (B, H), (B, H, K)]), "gates")
        rotated = gate != "none" and draw(st.booleans(), "complex")
        tensors = {"q": torch.randn(B, G, K), "k": torch.randn(B, G, K), "v": torch.randn(B, H, V)}
        tensors["state"] = torch.randn(B, H, K, V, dtype=torch.complex64 if rotated else torch.float32)
        if gate != "none":
            tensors["log_decay"] = gates(gate, rotated)
        write = draw(st.sampled_from(["plain", "delta", "bonus"]))
        tensors |= {"delta": {"beta": torch.rand(B, H)}, "bonus": {"bonus": torch.randn(H, K)}}.get(write, {})

        def call(log_decay: Tensor | None = None, **tensors: Tensor) -> Tensor:
            return recur.step(log_decay=log_decay, **tensors)

        step(draw, call, tensors)

    def channels(draw: Callable[..., Any]) -> None:
        rule = draw(st.sampled_from(["selective", "online", "exact", "diagonal", "fixed"]))
        x, state = torch.randn(B, H), torch.randn(B, H, K)
        rate, k, q = torch.rand(B, H), torch.randn(B, G, K), torch.randn(B, G, K)
        if rule == "diagonal":
            step(draw, recur.gated_step, {"x": x, "log_decay": gates((B, H), False), "state": state[..., 0].clone()})
        elif rule == "fixed":
            poles, readout = gates((H, K), True), torch.randn(H, K, dtype=torch.complex64)
            tensors = {"x": x, "log_decay": poles, "readout": readout, "state": state.to(torch.complex64)}
            step(draw, recur.fixed_step, tensors)
        elif rule == "selective":
            tensors = {"x": x, "delta": rate, "A": -torch.rand(H, K), "B": k, "C": q, "state": state}
            step(draw, recur.selective_step, tensors)
        else:
            tensors = {"x": x, "rate": rate, "k": k, "q": q, "state": state}
            step(draw, partial(recur.online_step, diagonal=rule == "online"), tensors)

    drawn(matrix, 2 * EXAMPLES)
    drawn(channels, 2 * EXAMPLES)


@law
def what_is_saved_is_contiguous() -> None:
    """Views are copied once, not again in the backward."""
    seen: list[Tensor] = []
    q, k, v = torch.randn(3, B, T, H, V, requires_grad=True)[..., ::2].unbind()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x):
        y = recur.scan(q, k, v, form="triton").y
    assert len(seen) == 3
    assert all(x.is_contiguous() for x in seen)
    y.sum().backward()


@pytest.mark.parametrize("name", LAWS)
def test_views_give_what_copies_give(name: str) -> None:
    pytest.importorskip("triton")
    run_laws(__file__, [name])


def test_a_step_refuses_a_state_whose_entries_share_memory() -> None:
    x, k = torch.randn(2, 3), torch.randn(2, 4)
    steps = {
        "gated_step": lambda S: recur.gated_step(x, x, S[..., 0]),
        "online_step": lambda S: recur.online_step(x, x.sigmoid(), k, k, S),
        "step": lambda S: recur.step(k[:, None], k[:, None], k[:, None], None, S[:, None, :, :1].expand(2, 1, 4, 4)),
    }
    for name, run in steps.items():
        state = torch.ones(1, 3, 4) if name != "step" else torch.ones(1, 4, 4)
        with pytest.raises(ValueError, match=rf"{name}: state is overwritten, .* expanded .*; pass state.clone\(\)"):
            run(state.expand(2, -1, -1))
        assert state.eq(1).all()


if __name__ == "__main__":

    def takes_step(rows: int, state: Tensor, lacks: tuple[str, str] | None = None) -> bool:
        return lacks is None and state.dtype not in kernel.WIDE

    kernel.takes_step = takes_step
    LAWS.main()
