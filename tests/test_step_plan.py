"""A step in few launches computes what its parts do one by one.

Laws run in Triton's interpreter, in a process of their own: `python tests/test_step_plan.py LAW...`.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from interpreted import Laws, run_laws
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from recur import LanguageModel, Recipe, kernel, presets
from recur.blocks import Attention, Project, Rotary
from recur.blocks.step_plan import Fused, StepPlan
from recur.explain import explain
from recur.recipe import State

LAWS = law = Laws()


def model(recipe: Recipe | str, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    lm = LanguageModel(recipe, **{"vocab_size": 7, "dim": 64, "depth": 1, **options})
    with torch.no_grad():
        for weight in lm.parameters():  # none at 0 or 1, where an error would not be seen
            weight.add_(0.1 * torch.randn_like(weight))
    return lm


def stepped(lm: LanguageModel, ids: Tensor, fused: bool) -> tuple[Tensor, State]:
    """Logits of all tokens, and the state after them, which is where it was before."""
    kernel.steps_fused = lambda x: fused and x.dtype in kernel.FUSED
    state = lm.init_state(len(ids), max_len=ids.shape[1] + 2)
    places = [leaf.data_ptr() for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    logits = torch.stack([lm.step(token, state) for token in ids.unbind(1)], 1)
    if fused:
        assert places == [leaf.data_ptr() for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    return logits, state


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.to(exact.dtype) - exact).norm() / exact.norm().clamp(min=1e-3)).item()


def same(lm: LanguageModel, tokens: int, *dtypes: torch.dtype, batch: int = 3) -> None:
    """Beside a step in float64, the kernel is off at most twice as far as the parts are one by one."""
    ids = torch.randint(7, (batch, tokens))
    for dtype in dtypes:
        small = copy.deepcopy(lm).to(dtype)
        exact, after = stepped(copy.deepcopy(small).double(), ids, False)
        whole = copy.deepcopy(small).double()(ids)
        torch.testing.assert_close(exact, whole, rtol=1e-6, atol=1e-6)
        (plain, there), (fused, here) = (stepped(small, ids, one) for one in (False, True))
        floor = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
        assert error(fused, exact) < 2 * error(plain, exact) + floor, (error(fused, exact), error(plain, exact))
        for a, b, c in zip(*map(tree_leaves, (here, there, after)), strict=True):
            if isinstance(c, Tensor) and c.dtype == torch.int64:
                assert torch.equal(a, c)
            elif isinstance(c, Tensor):
                assert error(a, c) < 2 * error(b, c) + floor


NAMES = [name for name in presets.names() if getattr(presets, name)().causal]


@law
def presets_step_alike() -> None:
    for name in NAMES:
        lm = model(getattr(presets, name)(), dim=32)
        if any(isinstance(stage, Fused) and len(stage.keys) > 2 for stage in stages(lm)):
            same(lm, 2, torch.float32, batch=int(torch.randint(1, 4, ())))


@law
def many_heads_groups_and_layers_step_alike() -> None:
    """Several tiles of columns, heads that share keys, states of odd sizes, every layer's own bound, half precision."""
    attention = Project("x", q="H K", k="G K", v="G K"), Rotary("q k", layout="half"), Attention(), Project("y", y="D")
    llama = Recipe(*attention, axes={"H": 6, "G": 2, "K": 8}, frame=presets.llama().frame)
    same(model(presets.gla(heads=1, rank=5), dim=48), 3, torch.float32)
    same(model(presets.hgrn2(heads=3), dim=24, depth=3), 2, torch.float32)
    same(model(presets.mamba2(state=5, head=6, groups=2), dim=24), 5, torch.float16)
    same(model(presets.longhorn(state=3, diagonal=False), dim=24), 2, torch.float32)
    same(model(presets.gated_delta_net(heads=2), dim=48), 3, torch.float16)
    same(model(llama, dim=48), 4, torch.float16)


def stages(lm: LanguageModel, layer: int = 0) -> list[Any]:
    """Those of a layer on a GPU."""
    mixer = lm.blocks[layer].mixer
    plan = StepPlan.of(mixer, mixer._weights())
    return [] if plan is None else plan.fused


GROUPS = [["presets_step_alike"], ["many_heads_groups_and_layers_step_alike"]]


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_one_kernel_computes_what_the_parts_do(names: list[str]) -> None:
    pytest.importorskip("triton")
    run_laws(__file__, names)


def test_every_law_is_run() -> None:
    assert sorted(LAWS) == sorted(name for names in GROUPS for name in names)


def test_weights_of_one_product_are_seen_when_they_change(tmp_path: Path) -> None:
    """In place, replaced, loaded, copied: a step always uses those that the model has."""
    lm = model("gla:heads=2", depth=2)
    ids = torch.arange(3)

    def agree(lm: LanguageModel) -> None:
        torch.testing.assert_close(lm.step(ids, lm.init_state(3)), lm(ids[:, None])[:, 0])

    agree(lm)
    first, second, *_ = (lm.blocks[0].mixer.parts[key] for key in ("project", "project_2"))
    assert first.weight.untyped_storage()._cdata == second.weight.untyped_storage()._cdata
    with torch.no_grad():
        second.weight.mul_(2)
        first.weight.data.add_(0.1)
    agree(lm)
    second.weight = torch.nn.Parameter(torch.randn_like(second.weight))
    agree(lm)
    other = copy.deepcopy(lm)
    save_file(lm.state_dict(), tmp_path / "weights.safetensors")
    with torch.no_grad():
        for weight in lm.parameters():
            weight.zero_()
    agree(other)
    lm.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    agree(lm)
    assert torch.equal(lm(ids[:, None]), other(ids[:, None]))
    lm(ids[:, None]).sum().backward()
    torch.optim.AdamW(lm.parameters()).step()
    agree(lm.double())


def test_a_part_that_something_wants_to_be_called_is_called() -> None:
    lm, seen = model("gla:heads=2"), []
    state = lm.init_state(1)
    with torch.inference_mode():
        wanted = lm.step(torch.tensor([1]), copy.deepcopy(state))
    parts = lm.blocks[0].mixer.parts
    hook = parts["project_2"].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(lm.step(torch.tensor([1]), copy.deepcopy(state)), wanted)
    assert seen == [1]
    hook.remove()
    lm.blocks[0].mixer.register_forward_hook(lambda module, given, out: seen.append(out.y.norm().item()))
    torch.testing.assert_close(lm.step(torch.tensor([1]), state), wanted)
    assert len(seen) == 2
    torch.nn.utils.parametrizations.weight_norm(parts["project"], "weight")
    assert StepPlan.of(lm.blocks[0].mixer, lm.blocks[0].mixer._weights()) is None


def test_explain_says_where_a_kernel_ends() -> None:
    pytest.importorskip("triton")
    found = explain("kaczmarz:heads=2", dim=32, length=4, device="cuda")
    reasons = [
        str(choice.refusal.reason) for choice in found.choices if choice.function.startswith("step of keyed_rate")
    ]
    assert reasons == ["in a step its kernel ends here: keyed_rate: KeyedRate gives no code"]
    whole = explain("gated_delta_net:heads=2", dim=32, length=4, device="cuda")
    names = "short_conv, act, step_decay, norm, norm_2, delta_scan, norm_3, output_gate"
    assert any((choice.function, choice.form) == (f"step of {names}", "triton") for choice in whole.choices)
    assert whole.phase("step").kernels == {"fused_step.layer": 1}


if __name__ == "__main__":
    LAWS.main()
