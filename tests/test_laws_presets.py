"""Every law of recur.testing over one table of recipes: the presets and their options."""

from __future__ import annotations

from typing import Any

import pytest
from applying import applying
from hypothesis import settings

import recur
from recur import presets
from recur.blocks import (
    ComplexGate,
    FeedbackKey,
    GatedAttention,
    MesaScan,
    Norm,
    OuterScan,
    OutputGate,
    Reshape,
    RetentionScale,
    Rotary,
    Scale,
    both_ways,
    down_and_right,
    in_grid,
    in_series,
)
from recur.blocks.feedforward import channel_mix, key_mix
from recur.presets.delta_net import REFLECTING
from recur.presets.dense import dense, dense_states
from recur.presets.gateloop import LINEAR, RELATIVE_LINEAR, relative
from recur.presets.hgrn import without_bounds
from recur.presets.mamba3 import NORM_THEN_GATE
from recur.recipe import Recipe
from recur.testing import check

EXAMPLES = max(1, settings().max_examples // 2)
SEED = 0 if settings().derandomize else None
COMMON = {"promises", "forms", "containment", "finiteness", "low_precision", "rows", "serialisation", "tangents"}
CAUSAL = COMMON | {"splits", "packing", "causality"}
SMOOTH = {"gradients", "second_gradients"}
ANY_WAY = COMMON | {"one_way"}  # of a recipe that is not causal
IN_GRID = ("hgrn_complex, down and right", "hgrn2, in a grid", "hgrn2, in series")

# recipe, options of check, laws beyond the common ones
CASES: dict[str, tuple[Recipe, dict[str, Any], set[str]]] = {
    "comba": (presets.comba(heads=2), {}, SMOOTH | {"steps"}),
    "comba, groups, no correction": (
        presets.comba(heads=4, groups=2, key=3, value=2, feedback=FeedbackKey(decay="none", correct=None)),
        {},
        SMOOTH | {"steps"},
    ),
    "delta_net": (presets.delta_net(heads=2), {}, SMOOTH | {"steps"}),
    "delta_product": (presets.delta_product(heads=2), {}, SMOOTH | {"steps"}),
    "dense_mamba": (presets.dense_mamba(state=3), {"depth": 2}, SMOOTH),
    "dense_mamba, carried on": (presets.dense_mamba(state=3, carry=True), {"depth": 3}, SMOOTH),
    "dense_mamba, one layer": (presets.dense_mamba(state=2), {}, SMOOTH | {"steps"}),
    "dense_retnet": (presets.dense_retnet(heads=2), {"depth": 2}, SMOOTH),
    "dense_retnet, two below": (presets.dense_retnet(heads=2, layers=2), {"depth": 3}, SMOOTH),
    "dense_retnet, three below": (presets.dense_retnet(heads=2, layers=3), {"depth": 4}, SMOOTH),
    "dense_retnet, one layer": (presets.dense_retnet(heads=2), {}, SMOOTH | {"steps"}),
    "dense_retnet, parallel scale": (presets.dense_retnet(heads=2, scale=(RetentionScale(),)), {"depth": 2}, set()),
    "dplr": (presets.dplr(heads=2, rank=3), {}, SMOOTH | {"steps"}),
    "dss": (presets.dss(state=4), {}, SMOOTH | {"steps"}),
    "delta_net, negative eigenvalues": (presets.delta_net(heads=2, reach=REFLECTING), {}, SMOOTH | {"steps"}),
    "efla": (presets.efla(heads=2), {}, SMOOTH | {"steps"}),
    "forgetting_transformer": (presets.forgetting_transformer(heads=2), {}, SMOOTH | {"steps"}),
    "forgetting_transformer, window, groups": (
        presets.forgetting_transformer(heads=4, groups=2, window=3, bias=True),
        {},
        SMOOTH | {"steps"},
    ),
    "gated_delta_net": (presets.gated_delta_net(heads=2, conv=2), {}, SMOOTH | {"steps"}),
    "gated_delta_net2": (presets.gated_delta_net2(heads=2), {}, SMOOTH | {"steps"}),
    "gated_delta_net2, groups, negative eigenvalues": (
        presets.gated_delta_net2(heads=4, groups=2, key=3, value=2, reach=(Scale("b", "2"),)),
        {},
        SMOOTH | {"steps"},
    ),
    "gated_delta_product": (presets.gated_delta_product(heads=2), {}, SMOOTH | {"steps"}),
    "gated_delta_product, three writes, groups": (
        presets.gated_delta_product(writes=3, heads=4, groups=2, key=3, value=2, reach=()),
        {},
        SMOOTH | {"steps"},
    ),
    "gated_linear_rnn": (presets.gated_linear_rnn(inner=5), {}, SMOOTH | {"steps"}),
    "gated_linear_rnn, a forget gate of its own": (presets.gated_linear_rnn(forget="own"), {}, {"steps"} | SMOOTH),
    "gated_oja": (presets.gated_oja(heads=2), {}, SMOOTH | {"steps"}),
    "gated_rnn": (presets.gated_rnn(inner=3), {}, SMOOTH | {"steps"}),
    "gated_smoothing": (presets.gated_smoothing(heads=2, expand=1.5), {}, SMOOTH | {"steps"}),
    "gated_tap_conv": (presets.gated_tap_conv(heads=2, width=6), {}, SMOOTH | {"steps"}),
    "gateloop_attention": (presets.gateloop_attention(heads=2, positions=(Rotary("q k"),)), {}, {"gradients", "steps"}),
    "gateloop_attention, relative": (
        presets.gateloop_attention(heads=2, positions=relative(gate_gradient=1.0), read=GatedAttention()),
        {},
        SMOOTH | {"steps"},
    ),
    "gateloop_attention, relative, no softmax": (
        presets.gateloop_attention(heads=2, positions=relative(gate="amplitude_phase"), read=RELATIVE_LINEAR),
        {},
        {"steps"},
    ),
    "gateloop_attention, literal, no softmax": (
        presets.gateloop_attention(heads=2, positions=relative(law="literal"), read=LINEAR),
        {},
        {"steps"},
    ),
    "gateloop": (presets.gateloop(), {}, {"steps"}),  # trains its gate slower, so its gradients are no derivatives
    "gateloop, plain gradients": (presets.gateloop(heads=4, gate_gradient=1.0), {}, SMOOTH | {"steps"}),
    "gateloop, amplitude and phase": (presets.gateloop(heads=4, law="amplitude_phase"), {}, {"steps"}),
    "gateloop, normed before the gate": (
        presets.gateloop(heads=2, inner=6, gate_gradient=1.0).insert_before("gate", Norm("y", kind="layer")),
        {},
        SMOOTH | {"steps"},
    ),
    "gateloop, no gate and no transition": (
        presets.gateloop(heads=4)
        .remove(OutputGate)
        .remove("gate")
        .replace("out", Reshape("y", "D"))
        .replace(OuterScan, OuterScan(decay=None))
        .remove(ComplexGate),
        {},
        {"steps"},
    ),
    "gateloop, signed": (presets.gateloop(heads=2, law="signed"), {}, {"steps"}),
    "gla": (presets.gla(heads=2, rank=4), {}, SMOOTH | {"steps"}),
    "gss": (presets.gss(state=6), {}, SMOOTH | {"steps"}),
    "gss, linear frequencies": (presets.gss(state=5, frequency="linear"), {}, SMOOTH | {"steps"}),
    "gss, right to left": (presets.gss(state=3).reverse(), {}, SMOOTH),
    "gsa": (presets.gsa(heads=2, slots=3), {}, SMOOTH | {"steps"}),
    "gsa, groups": (presets.gsa(heads=4, groups=2, slots=2), {}, SMOOTH | {"steps"}),
    "hgrn": (presets.hgrn(expand=2, bounds="skip_last"), {"depth": 2}, SMOOTH),
    "hgrn, one layer": (presets.hgrn(leave=(OutputGate("g"), Norm("y"))), {}, SMOOTH | {"steps"}),
    "hgrn, both ways": (presets.hgrn(scan=both_ways), {}, SMOOTH),
    "hgrn_complex": (presets.hgrn_complex(), {"depth": 2}, SMOOTH),
    "hgrn_complex, low rank": (without_bounds(presets.hgrn_complex(rank=2, bias=True)), {}, SMOOTH | {"steps"}),
    "hgrn_complex, two phases": (
        presets.hgrn_complex(scan=both_ways, phases=("turn", "turn_back")),
        {},
        SMOOTH,
    ),
    "hgrn_complex, down and right": (presets.hgrn_complex(scan=down_and_right), {}, SMOOTH),
    "hgrn2": (presets.hgrn2(heads=4), {"depth": 3}, SMOOTH),
    "hgrn2, dense values": (dense(presets.hgrn2(heads=2), "v"), {"depth": 3}, SMOOTH),
    "hgrn2, dense states": (dense_states(presets.hgrn2(heads=2)), {"depth": 3}, SMOOTH),
    "hgrn2, one layer": (presets.hgrn2(heads=2, bias=True), {}, SMOOTH | {"steps"}),
    "hgrn2, expanded by 1": (presets.hgrn2(heads="D", norm=()), {}, SMOOTH | {"steps"}),
    "hgrn2, in a grid": (presets.hgrn2(heads=2, scan=in_grid), {}, SMOOTH),
    "hgrn2, in series": (in_series(presets.hgrn2(heads=2, scan=both_ways)), {}, SMOOTH),
    "kaczmarz": (presets.kaczmarz(heads=2), {}, SMOOTH | {"steps"}),
    "kda": (presets.kda(heads=2, conv=3), {}, SMOOTH | {"steps"}),
    "linear_attention": (presets.linear_attention(heads=2), {}, SMOOTH | {"steps"}),
    "llama": (presets.llama(heads=2, bias=True), {}, {"gradients", "steps"}),
    "log_linear_attention": (presets.log_linear_attention(heads=2, state=3, levels=12), {}, SMOOTH | {"steps"}),
    "longhorn": (presets.longhorn(state=5), {}, SMOOTH | {"steps"}),
    "longhorn, dense keys and inputs": (dense(presets.longhorn(state=3), "k u"), {"depth": 2}, SMOOTH),
    "longhorn, dense states": (dense_states(presets.longhorn(state=3)), {"depth": 3}, SMOOTH),
    "longhorn, exact": (presets.longhorn(state=4, diagonal=False), {}, SMOOTH | {"steps"}),
    "longhorn, norm before the gate": (presets.longhorn(state=3, bias=True, norm=(Norm("y"),)), {}, SMOOTH | {"steps"}),
    "longhorn_bidirectional": (presets.longhorn_bidirectional(state=4), {}, SMOOTH),
    "mamba": (presets.mamba(state=5, conv=3), {}, SMOOTH | {"steps"}),
    "mamba, dense inputs": (dense(presets.mamba(state=3), "u", layers=2), {"depth": 3}, SMOOTH),
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
    "mamba3": (presets.mamba3(state=4, head=4), {}, SMOOTH | {"steps"}),
    "mamba3, groups, normed": (
        presets.mamba3(state=5, head=4, groups=2, rope=1.0, leave=NORM_THEN_GATE),
        {},
        SMOOTH | {"steps"},
    ),
    "mamba3_mimo": (presets.mamba3_mimo(rank=2, state=4, head=4), {}, SMOOTH | {"steps"}),
    "mesa_net": (presets.mesa_net(heads=2, read=MesaScan(solver="conjugate", iterations=2)), {}, SMOOTH | {"steps"}),
    "mesa_net, exact": (presets.mesa_net(heads=2, read=MesaScan()), {}, SMOOTH | {"steps"}),
    "min_gru": (presets.min_gru(expand=2), {}, SMOOTH | {"steps"}),
    "mlstm": (presets.mlstm(heads=2), {}, SMOOTH | {"steps"}),
    "momentum_delta_net": (presets.momentum_delta_net(heads=2), {}, SMOOTH | {"steps"}),
    "retnet": (presets.retnet(heads=2), {}, SMOOTH | {"steps"}),
    "retnet, parallel scale": (presets.retnet(heads=2, scale=(RetentionScale(),)), {}, set()),
    "retnet, chunkwise scale": (presets.retnet(heads=2, scale=(RetentionScale(chunk=4),)), {}, set()),
    "rg_lru": (presets.rg_lru(expand=1.5, conv=2), {}, SMOOTH | {"steps"}),
    "rwkv": (presets.rwkv(heads=2), {}, SMOOTH | {"steps"}),
    "rwkv, biases": (presets.rwkv(heads=4, bias=True), {"depth": 2}, SMOOTH),
    "rwkv7": (presets.rwkv7(heads=2, ranks=(2, 3, 2, 3)), {}, SMOOTH | {"steps"}),
    "rwkv7, two layers": (presets.rwkv7(heads=2, ranks=(2, 3, 2, 3)), {"depth": 2}, SMOOTH),
    "rwkv7, wide values": (presets.rwkv7(heads=4, value=12, ranks=(2, 2, 2, 2)), {}, SMOOTH | {"steps"}),
    "s4d": (presets.s4d(state=3), {}, SMOOTH | {"steps"}),
    "simple_gateloop": (presets.simple_gateloop(), {}, SMOOTH | {"steps"}),
    "simple_gateloop, normed, right to left": (
        presets.simple_gateloop().insert_after("output_gate", Norm("y", kind="layer")).reverse(),
        {},
        SMOOTH,
    ),
    "smoothing": (presets.smoothing(heads=2), {}, SMOOTH | {"steps"}),
    "tap_conv": (presets.tap_conv(heads=4), {}, SMOOTH | {"steps"}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_law_holds(name: str) -> None:
    recipe, options, further = CASES[name]
    laws = (CAUSAL if recipe.causal else ANY_WAY if name in IN_GRID else ANY_WAY | {"packing"}) | further
    examples = EXAMPLES if "," not in name else max(1, EXAMPLES // 3)  # an option shares most with its preset
    assert set(check(recipe, dim=8, laws=laws, examples=examples, seed=SEED, **options)) == laws
    assert applying(recipe, dim=8, **options) - {"lengths"} == laws


@pytest.mark.parametrize("name", [name for name in CASES if "," not in name])
def test_lengths_share_graphs(name: str) -> None:
    recipe, options, _ = CASES[name]
    assert check(recipe, dim=8, laws=["lengths"], examples=4, seed=SEED, **options) == ["lengths"]


def test_every_law_holds_for_a_feed_forward_with_state() -> None:
    laws = CAUSAL | SMOOTH | {"steps", "lengths"}
    for ffn in (channel_mix(hidden="6"), key_mix(hidden="6")):
        assert set(check(ffn, dim=8, examples=EXAMPLES, seed=SEED)) == laws


def test_the_table_has_every_preset() -> None:
    assert {name.split(",")[0] for name in CASES} == set(recur.presets.names())
