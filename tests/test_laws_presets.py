"""Every law of recur.testing over one table of recipes: the presets and their options."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

import recur
from recur import presets
from recur.blocks import Norm, OutputGate, RetentionScale
from recur.blocks.feedforward import channel_mix
from recur.recipe import Recipe
from recur.testing import check

EXAMPLES = max(1, settings().max_examples // 2)
SEED = 0 if settings().derandomize else None
COMMON = {"promises", "forms", "splits", "packing", "causality", "finiteness", "low_precision", "rows", "serialisation"}
SMOOTH = {"gradients", "second_gradients"}

# recipe, options of check, laws beyond the common ones
CASES: dict[str, tuple[Recipe, dict[str, Any], set[str]]] = {
    "dense_retnet": (presets.dense_retnet(heads=2), {"depth": 3}, SMOOTH),
    "dense_retnet, one layer": (presets.dense_retnet(heads=2), {}, SMOOTH | {"steps"}),
    "gateloop": (presets.gateloop(), {}, {"steps"}),  # trains its gate slower, so its gradients are no derivatives
    "gateloop, plain gradients": (presets.gateloop(heads=4, gate_gradient=1.0), {}, SMOOTH | {"steps"}),
    "gateloop, amplitude and phase": (presets.gateloop(heads=4, law="amplitude_phase"), {}, {"steps"}),
    "gla": (presets.gla(heads=2, rank=4), {}, SMOOTH | {"steps"}),
    "gss": (presets.gss(state=6), {}, SMOOTH | {"steps"}),
    "gss, linear frequencies": (presets.gss(state=5, frequency="linear"), {}, SMOOTH | {"steps"}),
    "hgrn2": (presets.hgrn2(heads=4), {"depth": 3}, SMOOTH),
    "hgrn2, one layer": (presets.hgrn2(heads=2, bias=True), {}, SMOOTH | {"steps"}),
    "llama": (presets.llama(heads=2, bias=True), {}, {"gradients", "steps"}),
    "longhorn": (presets.longhorn(state=5), {}, SMOOTH | {"steps"}),
    "longhorn, exact": (presets.longhorn(state=4, diagonal=False), {}, SMOOTH | {"steps"}),
    "longhorn, norm before the gate": (presets.longhorn(state=3, bias=True, norm=(Norm("y"),)), {}, SMOOTH | {"steps"}),
    "longhorn_bidirectional": (presets.longhorn_bidirectional(state=4), {}, SMOOTH),
    "mamba": (presets.mamba(state=5, conv=3), {}, SMOOTH | {"steps"}),
    "mamba2": (presets.mamba2(state=5, head=4, groups=2, conv=3), {}, SMOOTH | {"steps"}),
    "mamba2, norm before the gate": (
        presets.mamba2(state=3, inner=6, head=2, skip="H P", bias=True, leave=(Norm("y", groups="G"), OutputGate("z"))),
        {},
        SMOOTH | {"steps"},
    ),
    "mamba2, limits and no norm": (
        presets.mamba2(state=3, head=8, limit=(0.01, 0.2), conv_bias=False, leave=(OutputGate("z"),)),
        {},
        SMOOTH | {"steps"},
    ),
    "mamba2_mlp": (presets.mamba2_mlp(mlp=6, state=3, head=4), {}, SMOOTH | {"steps"}),
    "retnet": (presets.retnet(heads=2), {}, SMOOTH | {"steps"}),
    "retnet, parallel scale": (presets.retnet(heads=2, scale=(RetentionScale(),)), {}, set()),
    "retnet, chunkwise scale": (presets.retnet(heads=2, scale=(RetentionScale(chunk=4),)), {}, set()),
    "rwkv": (presets.rwkv(heads=2), {}, SMOOTH | {"steps"}),
    "rwkv, biases": (presets.rwkv(heads=4, bias=True), {"depth": 2}, SMOOTH),
    "simple_gateloop": (presets.simple_gateloop(), {}, SMOOTH | {"steps"}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_law_holds(name: str) -> None:
    recipe, options, further = CASES[name]
    laws = COMMON | further if recipe.causal else COMMON - {"causality", "splits"} | {"one_way"} | further
    assert set(check(recipe, dim=8, examples=EXAMPLES, seed=SEED, **options)) == laws


def test_every_law_holds_for_a_feed_forward_with_state() -> None:
    assert set(check(channel_mix(hidden="6"), dim=8, examples=EXAMPLES, seed=SEED)) == COMMON | SMOOTH | {"steps"}


def test_the_table_has_every_preset() -> None:
    assert {name.split(",")[0] for name in CASES} == set(recur.presets.names())
