"""Every law of recur.testing over one table of recipes: the presets and their options."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

import recur
from recur import presets
from recur.blocks import OnlineScan
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
    "longhorn": (presets.longhorn(state=5), {}, SMOOTH | {"steps"}),
    "longhorn, exact": (
        presets.longhorn(state=4).replace(OnlineScan, OnlineScan("u", diagonal=False)),
        {},
        SMOOTH | {"steps"},
    ),
    "mamba": (presets.mamba(state=5, conv=3), {}, SMOOTH | {"steps"}),
    "retnet": (presets.retnet(heads=2), {}, SMOOTH | {"steps"}),
    "simple_gateloop": (presets.simple_gateloop(), {}, SMOOTH | {"steps"}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_law_holds(name: str) -> None:
    recipe, options, further = CASES[name]
    assert set(check(recipe, dim=8, examples=EXAMPLES, seed=SEED, **options)) == COMMON | further


def test_the_table_has_every_preset() -> None:
    assert {name.split(",")[0] for name in CASES} == set(recur.presets.names())
