"""Every law of recur.testing over one table of recipes: the presets and their options."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

import recur
from recur import presets
from recur.blocks import Norm, OnlineScan, OutputGate, both_ways, down_and_right, in_grid, in_series
from recur.presets.hgrn import without_bounds
from recur.recipe import Recipe
from recur.testing import check

EXAMPLES = max(1, settings().max_examples // 2)
SEED = 0 if settings().derandomize else None
COMMON = {"promises", "forms", "finiteness", "low_precision", "rows", "serialisation"}
CAUSAL = COMMON | {"splits", "packing", "causality"}
SMOOTH = {"gradients", "second_gradients"}
ANY_WAY = SMOOTH | {"one_way"}  # of a recipe that is not causal

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
    "hgrn": (presets.hgrn(expand=2, bounds="skip_last"), {"depth": 2}, SMOOTH),
    "hgrn, one layer": (presets.hgrn(leave=(OutputGate("g"), Norm("y"))), {}, SMOOTH | {"steps"}),
    "hgrn, both ways": (presets.hgrn(scan=both_ways), {}, ANY_WAY | {"packing"}),
    "hgrn_complex": (presets.hgrn_complex(), {"depth": 2}, SMOOTH),
    "hgrn_complex, low rank": (without_bounds(presets.hgrn_complex(rank=2, bias=True)), {}, SMOOTH | {"steps"}),
    "hgrn_complex, two phases": (
        presets.hgrn_complex(scan=both_ways, phases=("turn", "turn_back")),
        {},
        ANY_WAY | {"packing"},
    ),
    "hgrn_complex, down and right": (presets.hgrn_complex(scan=down_and_right), {}, ANY_WAY),
    "hgrn2": (presets.hgrn2(heads=4), {"depth": 3}, SMOOTH),
    "hgrn2, one layer": (presets.hgrn2(heads=2, bias=True), {}, SMOOTH | {"steps"}),
    "hgrn2, expanded by 1": (presets.hgrn2(heads="D", norm=()), {}, SMOOTH | {"steps"}),
    "hgrn2, in a grid": (presets.hgrn2(heads=2, scan=in_grid), {}, ANY_WAY),
    "hgrn2, in series": (in_series(presets.hgrn2(heads=2, scan=both_ways)), {}, ANY_WAY),
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
    laws = (CAUSAL if recipe.causal else COMMON) | further
    examples = EXAMPLES if "," not in name else max(1, EXAMPLES // 3)  # an option shares most with its preset
    assert set(check(recipe, dim=8, examples=examples, seed=SEED, **options)) == laws


def test_the_table_has_every_preset() -> None:
    assert {name.split(",")[0] for name in CASES} == set(recur.presets.names())
