"""How much a layer launches and keeps for its backward, around its scan, does not grow unseen.

`python tests/test_launches.py` prints the table of all models and the operators they are made of.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from launches import layer

from recur import LanguageModel, Recipe, explain, presets

TOKENS = 8 * 2048
MODELS: dict[str, tuple[Recipe, str | None, int, int, int]] = {  # at most: forward, backward, bytes per token
    "gla": (presets.gla(heads=4), "swiglu", 17, 32, 42_000),
    "hgrn2": (presets.hgrn2(heads=8), "swiglu", 15, 22, 50_000),
    "gated_delta_net": (presets.gated_delta_net(heads=8), "swiglu", 19, 27, 62_000),
    "retnet": (presets.retnet(heads=8), "swiglu", 14, 20, 54_000),
    "dense_retnet": (presets.dense_retnet(), None, 28, 37, 57_000),
    "gateloop": (presets.gateloop(), "swiglu", 19, 36, 62_000),
    "mamba2": (presets.mamba2(), None, 12, 19, 31_000),
    "mamba": (presets.mamba(), None, 12, 20, 42_000),
    "longhorn": (presets.longhorn(), None, 10, 18, 42_000),
    "llama": (presets.llama(heads=16), "swiglu", 30, 22, 36_000),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_launches_and_keeps_no_more_than_it_did(name: str) -> None:
    recipe, ffn, forward, backward, kept = MODELS[name]
    made = layer(recipe, ffn)
    assert sum(made.forward.values()) <= forward, made.forward
    assert sum(made.backward.values()) <= backward, made.backward
    assert made.kept / TOKENS <= kept


def step(recipe: Recipe, ffn: str | None) -> Counter[str]:
    """What one layer more adds to a step on a GPU."""
    found = []
    for depth in (1, 2):
        with torch.device("meta"):
            lm = LanguageModel(recipe, vocab_size=64, dim=1024, depth=depth, ffn=ffn).to(torch.bfloat16)
        found.append(Counter(one.name for one in explain(lm, batch=2, length=4, device="cuda").phase("step").launches))
    return found[1] - found[0]


@pytest.mark.parametrize("name", ["gla", "hgrn2", "gated_delta_net", "retnet", "mamba2", "mamba", "longhorn", "llama"])
def test_a_step_launches_at_most_eight_times_per_layer(name: str) -> None:
    pytest.importorskip("triton")
    made = step(*MODELS[name][:2])
    assert sum(made.values()) <= 8, made


if __name__ == "__main__":
    for name, (recipe, ffn, *_) in MODELS.items():
        made, one = layer(recipe, ffn), step(recipe, ffn)
        sums = [sum(made.forward.values()), sum(made.backward.values()), round(made.kept / TOKENS)]
        print(name, *sums, dict(made.forward), dict(made.backward), sum(one.values()), dict(one))
