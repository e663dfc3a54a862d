"""Elementwise kernels against the float64 token loop, in Triton's interpreter, chosen before Triton is loaded.

Laws run in processes of their own: `TRITON_INTERPRET=1 python tests/test_kernel_elementwise.py LAW...`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from interpreted import Laws, allowed, off_by, run_laws, widen
from torch import Tensor

from recur import ScanOut, fixed_scan, gated_scan, online_scan, selective_scan

HARD = torch.tensor([0.0, -1e-9, -0.3, -5.0, -80.0, -700.0, -math.inf])

LAWS = law = Laws()


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape) * scale


def gradients(scan: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor | None]) -> list[Tensor]:
    """y, state and the gradient of every input, the outputs weighed by fixed noise."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    outputs = scan(*leaves)
    noise = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=noise, dtype=torch.float64) for t in outputs]
    loss = sum((t * w).sum().real for t, w in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(loss, [t for t in leaves if t is not None])]


def compare(name: str, kernel: Callable, loop: Callable, inputs: list[Tensor | None]) -> None:
    got, exact = gradients(kernel, inputs), gradients(loop, [widen(t) for t in inputs])
    for i, (g, w, other) in enumerate(zip(got, exact, gradients(loop, inputs), strict=True)):
        assert g.isfinite().all(), f"{name}: output {i} is not finite"
        error, limit = off_by(g, w), allowed(w, [other], inputs)
        assert error <= limit, f"{name}: output {i} is off by {error:.1e}, more than {limit:.1e}"


def scans(
    scan: Callable, name: str, inputs: list[Tensor], lengths: tuple[int, ...], reverse: bool, **kind: object
) -> None:
    """The kernel against the token loop; the last input is the initial state; lengths of packed documents, if any."""
    cu = torch.tensor([0, *lengths]).cumsum(0) if lengths else None

    def form(form: str) -> Callable:
        def call(*tensors: Tensor) -> ScanOut:
            *tensors, state = tensors if len(tensors) == len(inputs) else (*tensors, None)
            return scan(*tensors, initial_state=state, cu_seqlens=cu, reverse=reverse, form=form)

        return call

    run(name, form("triton"), form("recurrent"), inputs, **kind)


def selective(
    name: str,
    B: int,
    T: int,
    V: int,
    G: int,
    N: int,
    *lengths: int,
    fixed: str = "",
    reverse: bool = False,
    **kind: object,
) -> None:
    """Rates of decay from 0 to those that forget within a token. `fixed` names weights that do not change in time."""
    a = -torch.tensor([0.0, 1e-9, 0.3, 5.0, 80.0, 700.0])[torch.randint(0, 6, (V, N))]
    weights = [randn(V, N) if w in fixed else randn(B, T, G, N) for w in "BC"]
    inputs = [randn(B, T, V), torch.rand(B, T, V), a, *weights, randn(len(lengths) or B, V, N)]
    scans(selective_scan, name, inputs, lengths, reverse, **kind)


def online(
    name: str, B: int, T: int, V: int, G: int, N: int, *lengths: int, reverse: bool = False, **kind: object
) -> None:
    """Keys from tiny to so large that one token overwrites the slot; rates of exactly 0 and 1."""
    rate = torch.rand(B, T, V).where(torch.rand(B, T, V) < 0.7, torch.randint(0, 2, (B, T, V)).float())
    keys = randn(B, T, G, N) * torch.tensor([1e-3, 1.0, 1.0, 30.0])[torch.randint(0, 4, (B, T, 1, 1))]
    inputs = [randn(B, T, V), rate, keys, randn(B, T, G, N), randn(len(lengths) or B, V, N)]
    scans(online_scan, name, inputs, lengths, reverse, **kind)


def diagonal(
    name: str, B: int, T: int, D: int, *lengths: int, rotating: bool = False, reverse: bool = False, **kind: object
) -> None:
    x, log, state = randn(B, T, D), HARD[torch.randint(0, 7, (B, T, D))], randn(len(lengths) or B, D)
    if rotating:
        x, log, state = (torch.complex(t, randn(*t.shape, scale=s)) for t, s in ((x, 1), (log, 20), (state, 1)))
    scans(gated_scan, name, [x, log, state], lengths, reverse, **kind)


def run(
    name: str, kernel: Callable, loop: Callable, inputs: list[Tensor], *, half: bool = False, fresh: bool = False
) -> None:
    """With `half` in float16 but for the state, the last input; with `fresh` from no state at all."""
    if half:
        inputs = [t.half() for t in inputs[:-1]] + inputs[-1:]
    compare(name, kernel, loop, inputs[:-1] if fresh else inputs)


@law
def selective_is_the_token_loop() -> None:
    selective("odd sizes", 1, 5, 7, 1, 3)
    selective("a stretch and a token, right to left", 1, 9, 3, 1, 4, reverse=True)
    selective("groups", 2, 2, 6, 3, 2)
    selective("one slot, fresh", 2, 17, 5, 1, 1, fresh=True)
    selective("many slots", 1, 7, 9, 1, 33)
    selective("float16", 1, 8, 20, 1, 16, half=True)
    selective("constant B", 2, 9, 6, 3, 2, fixed="B")
    selective("constant C, right to left", 1, 5, 7, 1, 3, fixed="C", reverse=True)


@law
def a_machine_that_is_full_is_the_token_loop() -> None:
    """Of one processor, so that eight programs are many: Mamba's forward pass has its wide tiles."""
    from recur.kernels import elementwise

    elementwise.processors = lambda device: 1
    selective("wide tiles", 8, 9, 36, 1, 5)
    selective("wide tiles, groups, float16", 4, 5, 80, 2, 16, half=True)


@law
def online_is_the_token_loop() -> None:
    online("odd sizes", 1, 5, 7, 1, 3)
    online("a stretch and a token, right to left", 1, 9, 3, 1, 4, reverse=True)
    online("groups", 2, 2, 6, 3, 2)
    online("one slot, fresh", 2, 17, 5, 1, 1, fresh=True)
    online("many slots", 1, 7, 9, 1, 33)
    online("float16", 1, 8, 20, 1, 16, half=True)


@law
def diagonal_is_the_token_loop() -> None:
    for T in (1, 2, 15, 16, 17, 63, 64, 65, 130):
        diagonal(f"T={T}", 2, T, 5, reverse=T % 2 == 0)
    diagonal("chain", 1, 520, 3)
    diagonal("fresh, float16", 1, 40, 3, fresh=True, half=True)


@law
def complex_diagonal_is_the_token_loop() -> None:
    for T in (1, 17, 64, 130):
        diagonal(f"T={T}", 2, T, 3, rotating=True, reverse=T % 2 == 0)
    diagonal("chain, fresh", 1, 520, 2, rotating=True, fresh=True)


@law
def chain_is_the_token_loop() -> None:
    """Tiles of two rows of two tokens, so that every other segment publishes a state."""
    from recur.kernels import diagonal as home

    def plan(B: int, T: int, D: int, **options: object) -> home.DiagonalPlan:
        return shipped(B, T, D, **options)._replace(ROWS=2, UNROLL=2, segments=-(-T // 4), length=4)

    shipped, home.plan_diagonal = home.plan_diagonal, plan
    for T in (4, 5, 8, 9, 23):
        diagonal(f"T={T}", 2, T, 3, reverse=T % 2 == 0)
        diagonal(f"complex, T={T}", 2, T, 3, rotating=True, reverse=T % 2 == 1)
    diagonal("fresh, float16", 1, 23, 70, fresh=True, half=True)
    diagonal("packed", 1, 23, 3, 0, 7, 0, 1, 14, 1)
    diagonal("packed, complex, fresh, right to left", 1, 23, 3, 9, 0, 14, rotating=True, reverse=True, fresh=True)


@law
def loops_are_the_token_loop() -> None:
    """On a machine of one processor: many tiles in one program."""
    from recur.kernels import diagonal as home

    home.processors = lambda device: 1
    diagonal("real", 3, 520, 3)
    diagonal("complex, packed, right to left", 1, 520, 2, 250, 0, 269, 1, rotating=True, reverse=True)


@law
def packed_documents_are_the_token_loop() -> None:
    selective("borders in stretches, empty documents", 1, 20, 3, 1, 2, 0, 5, 0, 0, 11, 4, 0)
    selective("a border between segments, right to left", 1, 20, 2, 1, 2, 8, 3, 9, 0, reverse=True)
    selective("constant weights, fresh", 1, 20, 3, 1, 2, 4, 16, fixed="BC", fresh=True)
    online("one document over three segments", 1, 20, 2, 1, 2, 2, 16, 2)
    online("right to left", 1, 20, 4, 2, 3, 7, 0, 13, reverse=True)
    diagonal("borders in tiles", 1, 40, 3, 0, 7, 0, 1, 32, 0)
    diagonal("chain, right to left", 1, 520, 3, 250, 0, 269, 1, reverse=True)
    diagonal("complex", 1, 40, 2, 9, 31, rotating=True)
    diagonal("complex, fresh, right to left", 1, 40, 2, 9, 0, 31, rotating=True, reverse=True, fresh=True)


@law
def fixed_poles_are_the_token_loop() -> None:
    """Chunks in torch, the scan over them by the kernel."""
    log = torch.complex(HARD[torch.randint(0, 7, (2, 3))], randn(2, 3))
    for lengths in ((), (0, 130, 3, 0)):
        inputs = [randn(1, 133, 2), log, randn(2, 3).to(log.dtype), randn(len(lengths) or 1, 2, 3).to(log.dtype)]
        scans(fixed_scan, f"complex {lengths}", inputs, lengths, reverse=bool(lengths))
        inputs = [randn(1, 133, 2), HARD[torch.randint(0, 7, (3,))], randn(2, 3), randn(len(lengths) or 1, 2, 3)]
        scans(fixed_scan, f"real {lengths}", inputs, lengths, reverse=not lengths)


@law
def one_segment_of_stretches_is_the_token_loop() -> None:
    """On a busy machine, where it is not cut into segments."""
    from recur.kernels import elementwise

    elementwise.processors = lambda device: 0
    selective("20", 1, 20, 2, 1, 2)
    online("packed, right to left", 1, 20, 2, 1, 2, 3, 17, reverse=True)


@law
def nothing_to_scan_returns_the_state() -> None:
    x, k, a, state = randn(2, 0, 3), randn(2, 0, 4), -torch.rand(3, 4), randn(2, 3, 4)
    given = {"initial_state": state, "form": "triton"}
    for y, last in (selective_scan(x, x, a, k, k, **given), online_scan(x, x, k, k, **given)):
        assert y.shape == x.shape
        assert torch.equal(last, state)
    y, last = gated_scan(x, x, initial_state=state[..., 0], form="triton")
    assert y.shape == x.shape
    assert torch.equal(last, state[..., 0])


@law
def the_gate_of_a_reset_has_no_gradient() -> None:
    log = torch.full((1, 9, 3), -0.5)
    log[:, 4] = -math.inf
    x, log = randn(1, 9, 3).requires_grad_(), log.requires_grad_()
    y, _ = gated_scan(x, log, form="triton")
    assert torch.equal(y[:, 4], x[:, 4])
    (dlog,) = torch.autograd.grad(y.sum(), log)
    assert dlog[:, 4].eq(0).all()


@law
def second_order_is_refused() -> None:
    x, k, log = randn(1, 3, 2).requires_grad_(), randn(1, 3, 2), -torch.rand(1, 3, 2)
    for y, _ in (online_scan(x, torch.rand(1, 3, 2), k, k, form="triton"), gated_scan(x, log, form="triton")):
        (dx,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            dx.sum().backward()


@law
def float64_and_wide_states_are_refused() -> None:
    x, k = randn(1, 3, 2), randn(1, 3, 257)
    with pytest.raises(NotImplementedError, match="does not cover float64; form='chunked' does"):
        gated_scan(x.double(), x.double(), form="triton")
    with pytest.raises(NotImplementedError, match="does not cover N=257, more than 256"):
        online_scan(x, x.abs().clamp(max=1), k, k, form="triton")


@law
def operators_keep_the_promises_of_torch() -> None:
    """Fakes, schemas, autograd registrations."""
    from recur.kernels import diagonal, elementwise  # noqa: F401, registers them

    x, k, q, a, state = randn(1, 9, 3), randn(1, 9, 1, 2), randn(3, 2), -torch.rand(3, 2), randn(2, 2, 3)
    rate, cu = torch.rand(1, 9, 3), torch.tensor([0, 4, 9])
    leaves = [t.requires_grad_() for t in (x, rate, a, k, q, state)]
    dy, kept = randn(1, 9, 3), torch.zeros(1, 2, 2, 3)
    calls = (
        (torch.ops.recur.elementwise, (*leaves, cu, True, True)),
        (torch.ops.recur.elementwise, (x, rate, None, k, k, None, None, False, True)),
        (torch.ops.recur.elementwise_backward, (dy, None, x, rate, None, k, k, None, None, kept, False)),
        (torch.ops.recur.diagonal, (x, rate, None, cu, False, True)),
        (torch.ops.recur.diagonal_backward, (dy, None, rate, x, None, cu, False, True)),
    )
    for operator, inputs in calls:
        given = [t.detach() if "backward" in operator.__name__ and isinstance(t, Tensor) else t for t in inputs]
        torch.library.opcheck(operator, given)


SLOW = [name for name in LAWS if name.endswith("the_token_loop")]
QUICK = [name for name in LAWS if name not in SLOW]


@pytest.mark.parametrize("names", [*([name] for name in SLOW), QUICK], ids=[*SLOW, "quick"])
def test_laws(names: list[str]) -> None:
    run_laws(__file__, names)


def test_plan_cuts_time_only_where_the_machine_would_idle() -> None:
    from recur.kernels.elementwise import STRETCH, plan

    assert plan(64, 4096, 4096, 1, 16).segments == 1
    long = plan(1, 1 << 20, 1024, 1, 16)
    assert long.segments > 1
    assert long.length % STRETCH == 0
    assert (long.segments - 1) * long.length < 1 << 20 <= long.segments * long.length


def test_forward_plan_lets_all_programs_of_a_full_machine_run_at_once() -> None:
    """A quarter of a processor has 16384 registers, and a warp takes all of its 32 threads' at once."""
    from recur.kernels.elementwise import plan

    for key_gated in (False, True):
        p = plan(8, 2048, 4096, 1, 16, key_gated=key_gated)
        assert p.segments == 1
        assert 8 * p.tiles * p.warps <= 132 * 4 * (16384 // (32 * p.registers))


def test_diagonal_plan_takes_a_chain_only_where_a_loop_would_leave_processors_idle() -> None:
    from recur.kernels.diagonal import plan_diagonal

    for backward in (False, True):
        for B, T, D in ((8, 2048, 2048), (8, 2048, 1024), (32, 1024, 4096), (1, 8, 1024)):
            assert plan_diagonal(B, T, D, backward=backward).segments == 1
        chain = plan_diagonal(1, 65536, 1024, backward=backward)
        assert chain.length == chain.ROWS * chain.UNROLL
        assert (chain.segments - 1) * chain.length < 65536 <= chain.segments * chain.length


def test_plan_reads_neighbours_at_once_only_where_they_are_of_one_group() -> None:
    from recur.kernels.elementwise import plan

    assert plan(1, 64, 4096, 1, 16)[:4] == (2, 4, 16, 8)
    assert plan(8, 64, 4096, 1, 16)[:4] == (4, 4, 16, 8)
    assert plan(1, 64, 30, 2, 6, backward=True)[:4] == (1, 2, 8, 8)
    assert all(plan(1, 64, V, 1, N).R * plan(1, 64, V, 1, N).W * 4 >= 32 for V in (1, 64) for N in (1, 256))


if __name__ == "__main__":
    from recur.kernels import elementwise

    elementwise.STRETCH = 8  # several stretches and segments in few tokens
    LAWS.main()
