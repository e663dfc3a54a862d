"""The separable kernel against the float64 token loop, in Triton's interpreter, chosen before Triton is loaded.

Laws run in a process of their own: `TRITON_INTERPRET=1 python tests/test_kernel_scan.py LAW...`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import Laws, allowed, off_by, run_laws, widen
from torch import Tensor

HARD = torch.tensor([0.0, -1e-9, -0.3, -5.0, -80.0, -700.0, -math.inf])
LEAKY = torch.tensor([0.0, -1e-9, -0.3, -5.0, -8.0])  # spans that a chunk cannot hold and a smaller tile can

LAWS = law = Laws()


def decays(axes: tuple[int, ...], kind: str) -> Tensor:
    if kind == "mild":
        return -torch.rand(axes)
    if kind == "complex":
        return torch.complex(-torch.rand(axes), 3 * torch.randn(axes))
    if kind.startswith("stretches"):  # of 24 tokens, that forget or keep
        forgets = torch.rand(axes[0], -(-axes[1] // 24), axes[2], *(1,) * len(axes[3:])) < 0.6
        forgets = forgets.repeat_interleave(24, 1)[:, : axes[1]]
        sizes = torch.where(forgets, -0.7 - 0.7 * torch.rand(axes), -0.02 * torch.rand(axes).round())
        return torch.complex(sizes, 3 * torch.randn(axes)) if kind == "stretches complex" else sizes
    values = LEAKY if kind == "leaky" else HARD
    sizes = values[torch.randint(len(values), axes)]
    return torch.complex(sizes, 3 * torch.randn(axes)) if kind == "hard complex" else sizes


def compare(
    B: int,
    T: int,
    H: int,
    G: int,
    K: int,
    V: int,
    axes: str | None,
    kind: str = "mild",
    *,
    tied: bool = False,
    initial: bool = True,
    reverse: bool = False,
    dtype: torch.dtype = torch.float32,
    borders: tuple[int, ...] | None = None,
    beta: bool = False,
    bonus: str | None = None,
    erase: str | None = None,
    previous: bool = False,
    remove: str | None = None,
    write: str | None = None,
    several: tuple[int, int] | None = None,
) -> None:
    """y, state and all gradients, both outputs weighted by noise; the gradient of a reset is exactly 0."""
    from recur import scan

    sizes = {"B": B, "T": T, "H": H, "K": K, "G": G, "V": V}
    writes, reads = ((B, T), (B, T)) if several is None else ((B, T, several[0]), (B, T, several[1]))
    torch.manual_seed(T + 7 * K + 31 * V)
    a = None if axes is None else decays(tuple(sizes[axis] for axis in axes.split()), kind)
    q, k, v = torch.randn(*reads, G, K), torch.randn(*writes, G, K) / K**0.5, torch.randn(*writes, H, V)

    def beside(axes: str | None, divisor: float = 1.0) -> Tensor | None:
        x = torch.randn(*writes, *(sizes[axis] for axis in axes.split())) / divisor if axes else None
        return None if x is None else x.to(dtype)

    number = torch.complex64 if a is not None and a.is_complex() else torch.float32
    inputs = [
        q.to(dtype),
        None if tied else k.to(dtype),
        v.to(dtype),
        a,
        torch.randn(B if borders is None else len(borders) - 1, H, K, V, dtype=number) if initial else None,
        torch.rand(*writes, H).round(decimals=1) if beta else None,
        torch.randn([sizes[axis] for axis in bonus.split()]) if bonus else None,
        beside(erase, 1.5 * K**0.5),  # or nothing is left after a few tokens but what explodes
        beside(remove, 1.5 * K**0.5),
        beside(write),
    ]
    named = ("q", "k", "v", "a", "initial", "beta", "bonus", "erase", "remove", "write")

    cu = None if borders is None else torch.tensor(borders)

    def gradients(run: Callable, wide: bool) -> list[Tensor]:
        leaves = [None if t is None else (widen(t) if wide else t).detach().clone().requires_grad_() for t in inputs]
        y, state = run(leaves)
        noise = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=noise, dtype=widen(t).dtype) for t in (y, state)]
        loss = (y * weights[0].to(dtype)).sum() + (state * weights[1]).real.sum()
        return [y, state, *torch.autograd.grad(loss, [t for t in leaves if t is not None])]

    def run(x: list[Tensor], form: str) -> tuple[Tensor, Tensor]:
        options = {
            "initial_state": x[4],
            "cu_seqlens": cu,
            "reverse": reverse,
            **dict(zip(named[5:], x[5:], strict=True)),
        }
        source = "previous" if previous else "decayed"
        return scan(*x[:4], **options, erase_from=source, scale=0.7, form=form)

    got, want = gradients(lambda x: run(x, "triton"), False), gradients(lambda x: run(x, "recurrent"), True)
    torchs = [gradients(lambda x, form=form: run(x, form), False) for form in ("recurrent", "chunked")]
    names = [
        "y",
        "state",
        *(f"d{n}" for n, x in zip(named, inputs, strict=True) if x is not None),
    ]
    case = f"{(B, T, H, G, K, V)} decay [{axes}] {kind}{' beta' * beta} bonus {bonus} reverse {reverse} {borders}"
    case += f" erase {erase}{' previous' * previous} remove {remove} write {write} several {several}"
    limits = {name: allowed(w, own, inputs) for name, w, *own in zip(names, want, *torchs, strict=True)}
    for name, g, w in zip(names, got, want, strict=True):
        assert g.isfinite().all(), f"{case}: {name} is not finite"
        error, limit = off_by(g, w), limits[name]
        if name == "da":  # q dq − k dk, summed over tokens
            error, limit = off_by(g, w, widen(inputs[0]) * want[2]), limit + limits["dq"] + limits.get("dk", 0.0)
        assert error <= limit, f"{case}: {name} is off by {error:.1e}, more than {limit:.1e}"
        if name == "da" and a is not None and kind.startswith("hard"):
            assert (g[a.real <= -700] == 0).all(), f"{case}: a reset has a gradient"


AXES = (None, "H", "H K", "B T H", "B T H K")


def drawn(T: st.SearchStrategy[int], examples: int, rules: tuple[str, ...]) -> None:
    """`compare` on drawn structure."""

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        draw = data.draw
        G = draw(st.integers(1, 2), "G")
        rule = draw(st.sampled_from(rules), "rule")
        axes = draw(st.sampled_from(AXES[2::2] if "tied" in rule else AXES), "axes")
        kinds = ["mild", "leaky", "hard"] if axes else ["mild"]
        if axes and "tied" not in rule:
            kinds.append("complex")
        length, wide = draw(T, "T"), {}
        if rule.startswith("wide"):
            keys = st.sampled_from(["G K", "H K"])
            erases = "beta" in rule or "erase" in rule
            wide["erase"] = draw(keys, "erase") if "erase" in rule else None
            wide["remove"] = draw(st.none() | keys, "remove") if erases else None
            wide["previous"] = erases and draw(st.booleans(), "previous")
            wide["write"] = draw(st.sampled_from([None, "H", "H V"]), "write") if "beta" not in rule else None
            if "tied" not in rule:
                wide["several"] = draw(st.none() | st.tuples(*[st.integers(1, 2)] * 2), "several")
        borders = None
        if draw(st.booleans(), "packed"):
            borders = (0, *sorted(draw(st.lists(st.integers(0, length), max_size=3), "borders")), length)
        compare(
            1 if borders else draw(st.integers(1, 2), "B"), length, G * draw(st.integers(1, 2), "heads per group"), G,
            draw(st.integers(1, 9), "K"), draw(st.integers(1, 9), "V"), axes, draw(st.sampled_from(kinds), "gates"),
            tied="tied" in rule, beta="beta" in rule, bonus="H K" if rule == "bonus" else None,
            initial=draw(st.booleans(), "initial"), reverse=draw(st.booleans(), "reverse"), borders=borders, **wide,
        )  # fmt: skip

    run()


@law
def every_structure() -> None:
    drawn(st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 40]), 45, ("", "beta", "bonus", "tied"))


@law
def every_wide_structure() -> None:
    """Erase and removal keys, write gates, several writes and reads."""
    rules = ("wide erase", "wide erase", "wide erase", "wide", "wide beta", "wide tied erase", "wide tied")
    drawn(st.sampled_from([1, 2, 9, 17]), 18, rules)


@law
def long_ones() -> None:
    for T, axes in ((65, None), (130, "B T H"), (70, "B T H K")):
        compare(1, T, 1, 1, 3, 5, axes, beta=T == 70)
    compare(1, 33, 1, 1, 70, 66, "B T H K", beta=True)  # more than one tile of rows and of columns
    compare(1, 33, 1, 1, 70, 66, "B T H K", "hard", bonus="H")
    compare(1, 33, 1, 1, 32, 66, "B T H K", "complex")  # a tile of rows lies in one half of them


@law
def states_of_any_size() -> None:
    """More columns than a program of the gradient has, rows in several parts, complex rows that are two."""
    compare(1, 20, 2, 1, 3, 260, "B T H K", "hard", bonus="H K")
    compare(1, 20, 1, 1, 3, 515, "B T H", beta=True, borders=(0, 4, 20))
    compare(1, 20, 1, 1, 5, 300, "B T H K", tied=True, reverse=True)
    compare(1, 40, 1, 1, 300, 3, "B T H K", "leaky", beta=True)
    compare(1, 20, 1, 1, 300, 260, "B T H K", erase="H K", previous=True)
    compare(1, 20, 1, 1, 512, 2, "B T H", bonus="H")
    compare(1, 20, 1, 1, 390, 3, None, beta=True, reverse=True)
    compare(1, 20, 1, 1, 200, 260, "B T H K", "hard complex", beta=True)
    compare(1, 20, 1, 1, 256, 2, "B T H", "complex")


@law
def hard_gates() -> None:
    for axes in ("B T H", "B T H K", "H K"):
        for more in ({}, {"beta": True}, {"bonus": "H K", "reverse": True}):
            compare(1, 21, 2 if axes == "B T H" else 1, 1, 5, 7, axes, "hard", **more)
    compare(1, 50, 1, 1, 5, 7, "B T H K", "leaky", beta=True)
    compare(1, 34, 1, 1, 5, 7, "B T H K", "leaky", erase="H K", previous=True)
    compare(1, 20, 1, 1, 6, 7, "B T H K", "hard", tied=True, reverse=True)
    for more in ({}, {"beta": True}, {"bonus": "H K", "reverse": True}, {"borders": (0, 0, 30, 40)}):
        compare(1, 40, 2, 1, 5, 7, "B T H K", "hard complex", **more)


@law
def float16_keeps_its_digits() -> None:
    for axes in (None, "B T H", "B T H K"):
        compare(1, 40, 2, 1, 8, 8, axes, dtype=torch.float16, beta=axes == "B T H")
    compare(1, 20, 2, 1, 8, 8, "B T H K", dtype=torch.float16, erase="G K", remove="G K", previous=True)


@law
def segments_side_by_side() -> None:
    from recur.kernels import scan

    whole = scan.plan

    def cut(*, T: int, **sizes: Any) -> scan.Plan:
        segments = max(1, -(-T // 32))
        return whole(T=T, **sizes)._replace(segments=segments, span=32)

    scan.plan = cut
    for axes in (None, "B T H", "B T H K"):
        compare(1, 75, 2, 1, 5, 7, axes, bonus="H" if axes == "B T H" else None)
    compare(1, 66, 1, 1, 5, 7, "B T H K", tied=True, initial=False, reverse=True)
    compare(1, 70, 1, 1, 4, 4, "B T H K", "hard")
    compare(1, 70, 1, 1, 4, 4, "B T H", "hard", reverse=True)
    compare(1, 75, 2, 1, 5, 7, None, beta=True, initial=False)
    compare(2, 97, 1, 1, 7, 5, "B T H", beta=True, reverse=True)
    compare(1, 99, 1, 1, 3, 4, "B T H K", "complex", beta=True)
    compare(1, 70, 1, 1, 4, 4, "B T H K", "hard", beta=True, initial=False, reverse=True)
    compare(1, 70, 1, 1, 4, 4, "B T H", "hard", beta=True)
    compare(1, 65, 1, 1, 66, 3, "B T H K", beta=True)  # more than one tile of the action's columns
    compare(1, 70, 1, 1, 5, 7, "B T H", "hard", erase="H K", previous=True, reverse=True)
    compare(1, 70, 2, 1, 5, 4, "B T H K", erase="G K", remove="G K", write="H V", previous=True)
    compare(1, 40, 1, 1, 260, 2, "B T H K", "hard", beta=True)
    compare(1, 40, 1, 1, 260, 3, "B T H", reverse=True)


@law
def segments_begin_where_gates_forget() -> None:
    """Chunks of 16 tokens in segments of two, in rows and in documents: some borders have a warm-up, others do not."""
    from recur.kernels import scan

    whole, chunk_of, warm_up, found = scan.plan, scan.chunk_of, scan._Launcher._warm_up, set()

    def cut(*, T: int, **sizes: Any) -> scan.Plan:
        return whole(T=T, **sizes)._replace(chunk=16, segments=max(1, -(-T // 32)), span=32)

    def seen(self: Any) -> Tensor:
        warm: Tensor = warm_up(self)
        found.update(warm[:, 1:].flatten().tolist())
        return warm

    scan.plan, scan.chunk_of, scan._Launcher._warm_up = cut, lambda dtype: 16, seen
    compare(1, 150, 1, 1, 4, 5, "B T H", "stretches", beta=True)
    compare(1, 120, 2, 1, 3, 2, "B T H", "stretches", reverse=True, borders=(0, 0, 33, 97, 120))
    compare(1, 75, 1, 1, 3, 2, "B T H K", "stretches", beta=True, reverse=True, borders=(0, 3, 75, 75))
    compare(1, 100, 1, 1, 3, 2, "B T H K", "stretches complex")
    compare(1, 75, 2, 1, 3, 4, None, beta=True, borders=(0, 70, 75), initial=False)
    assert {-1, 1, 2} <= found, f"the gates drawn give {sorted(found)}"
    scan.plan, scan.chunk_of, scan._Launcher._warm_up = whole, chunk_of, warm_up


@law
def chunks_do_not_grow_more_than_is_said() -> None:
    """The norm of what a chunk of the delta rule does to a state, of keys of any length, against its bound."""
    from recur.kernels import scan

    whole = scan.plan
    scan.plan = lambda **sizes: whole(**sizes)._replace(segments=2, span=32)
    for axes in ("B T H", "B T H K"):
        q, k, a = (
            torch.randn(1, 64, 1, 3),
            2 * torch.randn(1, 64, 1, 3),
            decays((1, 64, 1, 3)[: 3 + axes.count("K")], "mild"),
        )
        beta = torch.rand(1, 64, 1)
        gates = a if a.ndim == 4 else a[..., None]
        run = scan._Launcher(scan.Tensors(q=q, v=q, k=k, log_decay=gates, beta=beta), 1.0, False, False, False)
        for chunk, bound in enumerate(run.made["log_norm"].flatten().tolist()):
            product = torch.eye(3, dtype=torch.float64)
            for t in range(32 * chunk, 32 * chunk + 32):
                key = k[0, t, 0].double()
                erase = torch.eye(3) - beta[0, t, 0] * key[:, None] * key
                product = erase @ (gates[0, t, 0].double().exp().expand(3)[:, None] * product)
            assert torch.linalg.matrix_norm(product, 2).log2() <= bound + 1e-4
            assert bound < torch.linalg.matrix_norm(product, 2).log2() + 100
    scan.plan = whole


@law
def phases_of_many_turns() -> None:
    """More tiles of tokens than one looks back at, and documents that end in the midst of them."""
    from recur.kernels import rotate

    rotate.WINDOW = 2
    compare(1, 300, 1, 1, 3, 2, "B T H K", "complex")
    compare(1, 150, 2, 1, 3, 2, "B T H", "complex", bonus="H K", reverse=True, borders=(0, 0, 70, 150))


@law
def flags_that_nobody_wrote_are_not_read() -> None:
    from recur.kernels import scan

    new = scan._Launcher.new

    def dirty(self: Any, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        fresh: Tensor = new(self, *shape, dtype=dtype)
        return fresh if dtype.is_floating_point else fresh.fill_(-1)

    scan._Launcher.new = dirty
    compare(1, 40, 1, 1, 5, 7, "B T H K", "hard", borders=(0, 0, 22, 40))
    scan._Launcher.new = new


@law
def second_order_is_refused() -> None:
    from recur import scan

    q, v = torch.randn(1, 4, 1, 3, requires_grad=True), torch.randn(1, 4, 1, 3)
    y = scan(q, v, v, form="triton").y
    (first,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(first.sum(), q)


@law
def what_is_saved_is_read_once() -> None:
    """Or a checkpoint, whose hooks unpack once, refuses."""
    from torch.utils.checkpoint import checkpoint

    from recur import scan

    q, k, v, a = (torch.randn(1, 9, 2, 4, requires_grad=True) for _ in range(4))

    def run(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        return scan(q, k, v, -a.square(), form="triton").y

    plain = torch.autograd.grad(run(q, k, v, a).sum(), (q, k, v, a))
    again = torch.autograd.grad(checkpoint(run, q, k, v, a, use_reentrant=False).sum(), (q, k, v, a))
    assert all(torch.equal(first, second) for first, second in zip(plain, again, strict=True))


@law
def two_runs_are_one() -> None:
    from recur import scan

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        q, k, v, a = (torch.randn(1, 40, 2, 5).requires_grad_() for _ in range(4))
        y, state = scan(q, k, v, -a.square(), form="triton")
        return [y, state, *torch.autograd.grad(y.sum() + state.sum(), (q, k, v, a))]

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@law
def operators_keep_the_rules_of_torch() -> None:
    from recur.kernels import scan  # noqa: F401, it registers them

    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    q, k, v, e = (torch.randn(1, 9, 2, 4, requires_grad=True) for _ in range(4))
    rotated = torch.randn(1, 9, 2, 4, 2, requires_grad=True)
    a, beta, cu = -torch.rand(1, 9, 2, 4), torch.rand(1, 9, 2), torch.tensor([0, 4, 9])
    for arguments in (
        (q, v, k, a.requires_grad_(), None, None, None, None, None, 1.0, False, False, False, True),
        (q, v, k, None, beta, None, None, torch.randn(2, 2, 4, 4), cu, 0.5, True, False, False, True),
        (q, v, k, rotated, beta, None, None, None, None, 1.0, False, False, False, True),
        (q, v, k, rotated, None, None, e, None, None, 1.0, False, False, True, True),
        (
            q,
            v,
            k,
            torch.randn(1, 1, 2, 1, 2),
            None,
            None,
            None,
            torch.randn(2, 2, 8, 4),
            cu,
            1.0,
            False,
            True,
            False,
            True,
        ),
    ):
        torch.library.opcheck(torch.ops.recur.scan, arguments, test_utils=checks)


@law
def what_it_lacks_is_named() -> None:
    from recur import scan

    q, wide, rotated = torch.randn(1, 4, 1, 3), torch.randn(1, 4, 1, 513), decays((1, 4, 1), "complex")
    for arguments, match in (
        ((q.double(), q, q), "float64; form='chunked' does"),
        ((wide, wide, q), "K=513, more than 512; form"),
        ((wide[..., :257], wide[..., :257], q, rotated), "K=257, for a complex state 514 rows, more than 512; form"),
    ):
        with pytest.raises(NotImplementedError, match=match):
            scan(*arguments, form="triton")
    assert scan(q[:, :0], q[:, :0], q[:, :0], form="triton").state.shape == (1, 1, 3, 3)


GROUPS = [
    ["every_structure"],
    ["every_wide_structure"],
    ["states_of_any_size"],
    [
        "long_ones",
        "float16_keeps_its_digits",
        "second_order_is_refused",
        "what_is_saved_is_read_once",
        "two_runs_are_one",
        "flags_that_nobody_wrote_are_not_read",
        "operators_keep_the_rules_of_torch",
        "what_it_lacks_is_named",
    ],
    ["hard_gates", "segments_side_by_side", "phases_of_many_turns"],
    ["segments_begin_where_gates_forget", "chunks_do_not_grow_more_than_is_said"],
]


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_kernel_agrees_with_the_token_loop(names: list[str]) -> None:
    pytest.importorskip("triton")
    run_laws(__file__, names)


def test_a_compiled_model_equals_the_eager_one() -> None:
    """torch.compile(fullgraph=True) over a language model whose scans are the kernel's."""
    pytest.importorskip("triton")
    run_laws(str(Path(__file__).with_name("gpu_compile.py")), ["triton", "retnet"])


@pytest.mark.parametrize(
    ("found", "words"), [(None, "a machine without Triton"), ((3, 3), "Triton 3.3, older than 3.4")]
)
def test_a_triton_that_cannot_is_named(monkeypatch: pytest.MonkeyPatch, found: Any, words: str) -> None:
    from recur import kernel, scan

    q = torch.randn(1, 2, 1, 2)
    monkeypatch.setattr(kernel, "TRITON", found)
    with pytest.raises(NotImplementedError, match=f"does not cover {words}; form='chunked' does"):
        scan(q, q, q, form="triton")
    assert not kernel.takes_step(2, q)


def test_the_installed_triton_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from recur import kernel

    assert kernel.installed() == tuple(int(part) for part in triton.__version__.split(".")[:2])

    def nothing(name: str) -> str:
        raise kernel.PackageNotFoundError

    monkeypatch.setattr(kernel, "version", nothing)
    assert kernel.installed() is None


def test_every_law_is_run() -> None:
    assert sorted(LAWS) == sorted(name for names in GROUPS for name in names)


def test_plan_fills_the_machine() -> None:
    """Heads alone where they give most processors a program, else segments of at least 512 tokens."""
    pytest.importorskip("triton")
    from recur.kernels.scan import plan

    sizes = {"K": 128, "V": 128, "dtype": torch.bfloat16, "processors": 132}
    assert plan(heads=128, T=2048, **sizes).segments == 1
    long = plan(heads=16, T=32768, **sizes)
    assert long.segments == 8  # of 32 programs each: two for nearly every processor
    assert long.segments * long.span >= 32768
    assert long.span % long.chunk == 0
    erasing = plan(heads=16, T=32768, delta=True, decay="none", **sizes)
    assert erasing.segments == 3  # 96 programs at once, twice; four would be 160, then 128
    assert erasing.segments * erasing.span >= 32768 > 2 * erasing.span
    assert plan(heads=16, T=32768, delta=True, **sizes).segments == 8  # where gates forget there are no maps
    assert plan(heads=33, T=1 << 20, delta=True, decay="none", **sizes).segments == 1  # maps would take as long
    assert plan(heads=1, T=3071, delta=True, decay="none", **sizes).segments == 1  # of two one would wait
    assert plan(heads=1, T=0, delta=True, **sizes).segments == 1
    assert plan(heads=1, T=256, **sizes).segments == 1
    assert plan(heads=1, T=0, **sizes).segments == 1
    assert "segments=8" in repr(long)


def test_plan_of_wide_states() -> None:
    """Rows in parts of 128 where a program would not hold 256, then in float16's arithmetic; blocks of 256 columns."""
    pytest.importorskip("triton")
    from recur.kernels.scan import plan

    wide = plan(heads=8, T=4096, K=384, V=1536, dtype=torch.bfloat16)
    assert (wide.part, wide.blocks, wide.block_v, wide.forward.parts, wide.backward_inputs.parts) == (
        128,
        6,
        256,
        96,
        24,
    )
    assert wide == plan(heads=8, T=4096, K=384, V=1536, dtype=torch.float16)
    narrow = plan(heads=8, T=4096, K=256, V=200, dtype=torch.bfloat16)
    assert (narrow.part, narrow.blocks, narrow.block_v) == (256, 1, 256)


if __name__ == "__main__":
    LAWS.main()
