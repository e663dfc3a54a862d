"""What `recur.explain` counts is what happens: on a CPU beside a counter, kernels beside Triton's interpreter."""

from __future__ import annotations

import gc
import os
import re
import shlex
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from interpreted import Laws, run_laws
from launches import FREE
from tiers import quick
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import recur
from recur import LanguageModel, Mixer, presets
from recur.blocks.state import nbytes
from recur.cli import main
from recur.explain import CARDS, Card, binary, decimal, duration, explain
from recur.primitives.operators import RUNS

LAWS = law = Laws()
randn = torch.randn
B, T, D = 2, 70, 32
SUITE = ("dense_retnet", "gated_delta_net", "hgrn2", "llama", "log_linear_attention", "mamba", "mamba3", "s4d")


def layer(name: str) -> tuple[Mixer, Tensor]:
    torch.manual_seed(0)
    return Mixer(getattr(presets, name)(), D), randn(B, T, D, requires_grad=True)


class Operators(TorchDispatchMode):
    """Counts what is no view of its input and touches memory, also inside operators of our own."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if name in RUNS:
            with self:
                return RUNS[name](*args, **kwargs)
        aliases = [value.alias_info for value in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        if not view and (short := name.split("::")[-1]) not in FREE and func.namespace != "prim":
            self.found[short] += 1
        return func(*args, **kwargs)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are not looked at, as on a GPU: where they may be, those that are finite take a shorter way."""
    for name, module in list(sys.modules.items()):
        if name.startswith("recur.") and hasattr(module, "readable"):
            monkeypatch.setattr(module, "readable", lambda tensor: False)


@pytest.mark.parametrize("name", quick(presets.names(), SUITE))
def test_operators_are_those_that_a_counter_finds(unread: None, name: str) -> None:
    mixer, x = layer(name)
    found = explain(mixer, batch=B, length=T)
    with Operators() as forward:
        y = mixer(x).y
    dy = torch.empty_like(y)
    with Operators() as backward:
        y.backward(dy)
    assert found.phase("forward").operators == forward.found
    assert found.phase("backward").operators == backward.found
    assert found.phase("forward").kernels == found.phase("backward").kernels == Counter()
    if mixer.recipe.causal:
        state = mixer.init_state(B, T)
        mixer.step(x[:, 0].detach(), state)  # which prepares what all later ones use
        with Operators() as step:
            mixer.step(x[:, 0].detach(), state)
        assert found.phase("step").operators == step.found
        assert found.state == nbytes(state) // B
    assert found.memory["weights"] == sum(weight.nbytes for weight in mixer.parameters())
    assert found.memory["gradients"] == sum(w.grad.nbytes for w in mixer.parameters() if w.grad is not None)


@pytest.mark.parametrize("name", quick(presets.names(), SUITE))
def test_activations_are_those_that_hooks_see(unread: None, name: str) -> None:
    mixer, x = layer(name)
    found = explain(mixer, batch=B, length=T)
    own = {t.untyped_storage()._cdata for t in (x, *mixer.parameters(), *mixer.buffers())}
    kept: dict[int, weakref.ref[Any]] = {}  # what only the state was made of is gone with it

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = weakref.ref(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = mixer(x).y
    gc.collect()
    there = [(key, storage) for key, held in kept.items() if (storage := held()) is not None]
    others = own | {y.untyped_storage()._cdata}
    saved = sum(storage.nbytes() for key, storage in there if key not in others)
    assert 0.99 * saved <= found.memory["activations"] <= saved  # hooks also hold a few small tensors by themselves


def test_a_model_is_explained_like_its_training_step(unread: None) -> None:
    model = LanguageModel(["hgrn2:heads=2", "mamba"], vocab_size=50, dim=D, depth=2)
    ids = torch.zeros(B, T, dtype=torch.long)
    found = explain(model, batch=B, length=T)
    with Operators() as forward:
        loss = model(ids, targets=ids)
    assert found.phase("forward").operators == forward.found
    loss.backward()
    gradients = sum(w.grad.nbytes for w in model.parameters() if w.grad is not None)
    assert found.memory["gradients"] == gradients
    optimiser = torch.optim.AdamW(model.parameters())
    optimiser.step()
    moments = [state[key] for state in optimiser.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert found.memory["optimiser"] == sum(moment.nbytes for moment in moments)
    assert {"mixer.outer_scan", "mixer.selective_scan", "norm", "head and loss"} <= set(found.activations)
    assert [choice.function for choice in found.choices] == ["scan", "selective_scan"]
    assert sum(found.activations.values()) == found.memory["activations"] < found.memory["peak"]


def test_recomputed_layers_keep_less() -> None:
    sizes = {"vocab_size": 50, "dim": D, "depth": 3}
    plain, again = (explain(LanguageModel("gla", checkpoint=c, **sizes), batch=B, length=T) for c in (False, True))
    assert again.memory["activations"] < plain.memory["activations"] / 2
    assert len(again.phase("backward").launches) > len(plain.phase("backward").launches)


def test_a_gpu_is_asked_about_where_there_is_none() -> None:
    pytest.importorskip("triton")
    q = torch.empty(32, 2048, 4, 128, dtype=torch.bfloat16, device="meta")  # heads enough for one segment each
    found = explain(recur.scan, q, q, q, card="H200")
    assert (found.device, found.dtype, found.batch, found.length) == ("cuda", "bfloat16", 32, 2048)
    assert [(choice.form, choice.refusal) for choice in found.choices] == [("triton", None)]
    assert found.state == 4 * 128 * 128 * 4
    forward = found.phase("forward")
    assert (forward.floor, forward.kernels) == (4 * q.nbytes, Counter(["chunk_forward.forward"]))  # three are read
    assert forward.bytes == 4 * q.nbytes + 32 * found.state
    assert forward.seconds(CARDS["H200"]) == max(forward.bytes / 4.2e12, forward.flops / 713e12)
    assert not found.remedies


def test_the_slow_path_has_its_reason_and_remedy() -> None:
    q = torch.empty(1, 64, 1, 600, device="meta")
    found = explain(recur.scan, q, q, q)
    assert found.remedies == ["scan: K at most 512: more heads of fewer keys"]
    assert "scan  chunked  1      form='triton' does not cover K=600, more than 512" in str(found)
    on_cpu = explain(recur.scan, *(torch.randn(1, 5, 1, 2) for _ in range(3)))
    assert on_cpu.remedies == ["scan: move the tensors to a GPU"]
    norm = explain("gla:heads=1", dim=16, length=4, dtype=torch.float64, device="cuda")
    assert {choice.function for choice in norm.choices} >= {"scan", "normalise", "sigmoid_decay", "step"}


def test_explaining_leaves_no_trace() -> None:
    mixer = Mixer("gla:heads=2", 16)
    x, before = randn(1, 4, 16), [weight.clone() for weight in mixer.parameters()]
    y = mixer(x).y
    explain(mixer, length=4, dtype=torch.bfloat16, device="cuda")
    for weight, old in zip(mixer.parameters(), before, strict=True):
        torch.testing.assert_close(weight.detach(), old.detach())
        assert weight.grad is None
    torch.testing.assert_close(mixer(x).y, y)


def test_what_cannot_be_explained_is_refused() -> None:
    with pytest.raises(TypeError, match="explain: dim must be given with a recipe, got None"):
        explain("gla")
    with pytest.raises(TypeError, match="explain: target must be a scan with its tensors, a layer"):
        explain(recur.scan)
    with pytest.raises(TypeError, match="explain: target must be a Mixer or a LanguageModel, got Linear"):
        explain(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="explain: card must be one of H200, or a Card, got 'H100'"):
        explain("gla", dim=16, card="H100")


def test_numbers_are_printed_in_their_units() -> None:
    assert [binary(n) for n in (0, 1023, 1536, 5 << 20, 3 << 30, 1 << 50)] == [
        "0 B", "1023 B", "1.5 KiB", "5.0 MiB", "3.0 GiB", "1024.0 TiB",
    ]  # fmt: skip
    assert [decimal(n) for n in (0, 999, 1500, 2e9, 3e18)] == ["0", "999", "1.5 k", "2.0 G", "3000.0 P"]
    assert [duration(s) for s in (1.5e-6, 2e-3)] == ["1.5 µs", "2.00 ms"]
    card = Card("mine", 1e12, 1e14, "by hand")
    assert "times: mine, by hand" in str(explain("gla:heads=2", dim=16, length=8, device="cuda", card=card))


def test_its_page_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    page = (Path(__file__).parents[1] / "docs" / "explain.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    ran = 0
    with warnings.catch_warnings():
        for (language, code), (following, text) in pairwise([*blocks, ("", "")]):
            if language == "bash":
                assert main(shlex.split(code)[1:]) == 0
            elif language == "python":
                exec(code, names)
            printed = capsys.readouterr().out
            if following == "text":
                assert printed == text
                ran += 1
    assert ran == 2


def test_the_command_explains_models_and_refuses_widths(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--dim", "16", "--depth", "2", "--vocab", "50", "--ffn", "swiglu", "--length", "8", "--device", "cpu"]
    assert main(["explain", "gla:heads=2+mamba", *sizes, "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.startswith(
        "LanguageModel at D=16, 2 layers of 2 kinds\ncpu, float32, batch 1 x 8 tokens"
    )
    with pytest.raises(SystemExit, match="2"):
        main(["explain", "gla:heads=3", "--dim", "16"])
    assert "gla:heads=3 cannot be built with --dim 16" in capsys.readouterr().err


# ---------------------------------------------------------------------- kernels, in Triton's interpreter


def launched(run: Callable[[], Any]) -> tuple[Counter[str], int]:
    """Kernels that Triton is asked to run, and the FLOPs of their products."""
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    found: Counter[str] = Counter()
    flops = [0]
    launch, dot = InterpretedFunction.run, InterpreterBuilder.create_dot

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        found[f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__.lstrip('_')}"] += 1
        return launch(self, *args, **options)

    def product(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        flops[0] += 2 * a.data.size * b.data.shape[-1]
        return dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", counted)
        patch.setattr(InterpreterBuilder, "create_dot", product)
        run()
    return found, flops[0]


def agrees(scan: Callable[..., Any], *args: Any, flops: bool = False, **options: Any) -> None:
    """Launches of a scan, its backward included, are those that `explain` names for a GPU."""
    found = explain(scan, *args, device="cuda", **options)
    assert {choice.form for choice in found.choices} == {"triton"}
    leaves = [
        x.requires_grad_() for x in (*args, *options.values()) if isinstance(x, Tensor) and x.dtype.is_floating_point
    ]
    assert leaves
    out: list[Tensor] = []
    for phase, run in (
        ("forward", lambda: out.append(scan(*args, **options, form="triton")[0])),
        ("backward", lambda: out[0].backward(torch.ones_like(out[0]))),
    ):
        kernels, counted = launched(run)
        assert found.phase(phase).kernels == kernels, (phase, found.phase(phase).kernels, kernels)
        if flops:
            assert found.phase(phase).flops == counted, (phase, found.phase(phase).flops, counted)


@law
def launches_of_a_scan_are_those_that_are_made() -> None:
    q, v = randn(1, 70, 2, 8), randn(1, 70, 2, 5)
    agrees(recur.scan, q.clone(), q.clone(), v.clone(), flops=True)
    agrees(recur.scan, q.clone(), q.clone(), v.clone(), -torch.rand(1, 70, 2))
    agrees(recur.scan, q.clone(), q.clone(), v.clone(), -torch.rand(1, 70, 2, 8), initial_state=randn(1, 2, 8, 5))
    agrees(recur.scan, q.clone(), None, v.clone(), -torch.rand(1, 70, 2, 8))
    agrees(recur.scan, q.clone(), q.clone(), v.clone(), -torch.rand(1, 70, 2), bonus=randn(2))
    agrees(recur.scan, q.clone(), q.clone(), v.clone(), -torch.rand(1, 70, 2, 8), beta=torch.rand(1, 70, 2))
    agrees(recur.scan, q.clone(), q.clone(), v.clone(), erase=q.clone(), remove=q.clone(), write=torch.rand(1, 70, 2))
    agrees(recur.scan, q.clone(), q.clone(), v.clone(), cu_seqlens=torch.tensor([0, 30, 70]))


@law
def launches_in_segments_are_those_that_are_made() -> None:
    q = randn(1, 1024, 1, 4)
    agrees(recur.scan, q.clone(), q.clone(), q.clone(), flops=True)


@law
def launches_of_elementwise_scans_are_those_that_are_made() -> None:
    x, rate, k = randn(1, 40, 6), torch.rand(1, 40, 6), randn(1, 40, 4)
    agrees(recur.gated_scan, x.clone(), -rate.clone())
    agrees(recur.online_scan, x.clone(), rate.clone(), k.clone(), k.clone())
    agrees(recur.selective_scan, x.clone(), rate.clone(), -torch.rand(6, 4), k.clone(), k.clone())


@law
def a_nan_reaches_the_tokens_that_are_named() -> None:
    q, v = randn(1, 40, 1, 4), randn(1, 40, 1, 4)
    v[0, 20] = torch.nan
    found = explain(recur.scan, q, q, v, device="cuda")
    assert "also earlier tokens of its chunk" in found.not_a_number[0]
    assert recur.scan(q, q, v, form="triton").y[0, :20].isnan().any()
    assert not recur.scan(q, q, v, form="chunked").y[0, :20].isnan().any()


GROUPS = [[name] for name in LAWS]


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_kernels_are_those_that_are_launched(names: list[str]) -> None:
    pytest.importorskip("triton")
    run_laws(__file__, names)


if __name__ == "__main__":
    LAWS.main()
