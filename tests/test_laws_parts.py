"""Every law of recur.testing over one table of parts, each alone in the smallest recipe that holds it."""

from __future__ import annotations

from typing import Any

import pytest
from applying import applying
from hypothesis import settings

from recur import blocks
from recur.blocks import (
    Act,
    Along,
    AppendOne,
    Attention,
    BoundedDecay,
    Complex,
    ComplexGate,
    DataDecay,
    DataRotary,
    Decay,
    DeltaScan,
    DenseCarry,
    DenseFusion,
    DenseRead,
    DivideByLast,
    Dropout,
    FeedbackKey,
    FixedDecay,
    FixedScan,
    FlooredDecay,
    ForgettingAttention,
    GatedAttention,
    GatedScan,
    Gather,
    KeyedRate,
    Learned,
    LogLinearScan,
    Loop,
    LowerBounds,
    LowRank,
    Map,
    MesaScan,
    MomentumScan,
    Multiply,
    Norm,
    OjaScan,
    OnlineScan,
    OuterScan,
    OutputGate,
    Phase,
    PoleScan,
    PositionTaps,
    PowerDecay,
    Previous,
    Project,
    RealImag,
    RelPos,
    RemovalKeys,
    Rename,
    Repeat,
    Reshape,
    RetentionScale,
    Reverse,
    Rotary,
    Scale,
    ScaleGrad,
    SelectiveScan,
    SelfTerm,
    ShortConv,
    Skip,
    SlotScan,
    Smoothing,
    Spread,
    Stabilise,
    StepDecay,
    Sum,
    TapConv,
    TokenShift,
    Trapezoid,
    Unbind,
    ValueResidual,
    WideScan,
)
from recur.recipe import Chain, Part, Recipe
from recur.testing import check

EXAMPLES = max(1, settings().max_examples * 2 // 5)
SEED = 0 if settings().derandomize else None
HEADS = {"H": 2, "K": 4, "V": 3, "G": 1, "N": 3}
ANY = {"promises", "forms", "packing", "containment", "finiteness", "low_precision", "rows", "tangents"}
CAUSAL = ANY | {"splits", "steps", "causality"}
SMOOTH = {"gradients", "second_gradients"}
USUAL = CAUSAL | SMOOTH | {"serialisation"}


def recipe(*parts: Part, out: str = "y") -> Recipe:
    """These parts after a projection of x called u, and a projection of what they write to y."""
    return Recipe(Project("x", u="D"), *parts, Project(out, y="D"), axes=HEADS)


QKV = Project("x", q="H K", k="H K", v="H V")
GROUPED = Project("x", q="G K", k="G K", v="H V")
PAIRS = (Project("x", c="H K//2 2"), ComplexGate("c"))
UNIT_KEYS = (Norm("k", kind="l2", over="K", affine="none"), Scale("k", "1/sqrt(K)"))
SMALL_E = Norm("e", kind="unit", over="K", eps=1e-6, affine="none")
STEP = Project("x", delta="H")
GATES_OF_MESA = Project("x", z="H", b="H")
RETAINED = (OuterScan(), Norm("y", over="V", eps="eps"))
WHOLE = ANY | {"serialisation", "one_way"}  # its scale has no gradient, and its norm no second one
CASES: dict[str, tuple[Recipe, set[str]]] = {
    "Project": (recipe(Project("u", y="H K", bias=True)), USUAL),
    "LowRank": (recipe(Project("u", y=LowRank("H V", rank="N", bias=True, act="tanh"))), USUAL),
    "ShortConv": (recipe(ShortConv("u"), out="u"), USUAL),
    "ShortConv, one tap": (recipe(ShortConv("u", width=1, bias=False, act="identity"), out="u"), USUAL),
    "ShortConv, heads": (recipe(QKV, ShortConv("v", width=3), out="v"), USUAL),
    "ShortConv, several": (recipe(QKV, ShortConv("q v", width=3), out="q v"), USUAL),
    "TokenShift": (recipe(TokenShift("u", to="y")), USUAL),
    "TokenShift, several": (recipe(TokenShift("u", to="r y", init=("0.3", "i/D")), Sum("r y")), USUAL),
    "Norm": (recipe(Norm("u"), out="u"), USUAL),
    "Norm, layer": (recipe(Norm("u", kind="layer", to="y")), USUAL),
    "Norm, l2 of heads": (recipe(QKV, Norm("v", kind="l2", over="V", affine="weight"), out="v"), USUAL),
    "Norm, groups": (recipe(QKV, Norm("v", kind="layer", groups="H"), out="v"), USUAL),
    "Act": (recipe(Act("u", "gelu"), out="u"), USUAL),
    "Scale": (recipe(QKV, Scale("k", "1/sqrt(K)"), out="k"), USUAL),
    "Reverse, weights of a name": (
        recipe(Skip("x", out="u", name="s"), Reverse((Skip("x", out="u", name="s"),)), out="u"),
        ANY | SMOOTH | {"serialisation", "one_way"},
    ),
    "ScaleGrad": (recipe(ScaleGrad("u", 0.5), out="u"), USUAL - SMOOTH),
    "Skip": (recipe(Project("u", y="D"), Skip("u")), USUAL),
    "Reshape": (recipe(QKV, Reshape("v", "H*V", to="y")), USUAL),
    "Unbind": (recipe(Project("x", w="H 3 K"), Unbind("w", "a b y")), USUAL),
    "PositionTaps": (recipe(PositionTaps("H", length=999), TapConv("u")), USUAL),
    "TapConv": (recipe(Project("x", tap="H"), TapConv("u")), USUAL),
    "Smoothing": (recipe(Smoothing("u"), GatedScan("b")), USUAL),
    "Loop": (
        recipe(Loop((Project("last", r="D"), Sum("u r", out="h"), ShortConv("h", act="tanh")), "h", "D"), out="h"),
        USUAL,
    ),
    "Loop, scan inside": (
        recipe(Loop((Project("last", z="D"), Decay("z"), GatedScan("u")), feed="y", axes="D")),
        USUAL,
    ),
    "Skip, heads": (recipe(QKV, Project("u", y="H V"), Skip("v", over="H")), USUAL),
    "Multiply": (recipe(QKV, Project("x", b="H"), Multiply("v", by="b", to="y")), USUAL),
    "Sum": (recipe(Project("x", w="D"), Sum("u w")), USUAL),
    "Dropout": (recipe(Dropout("u", 0.5), out="u"), USUAL),
    "Map": (recipe(Map(lambda u: u.sin(), reads="u", out="y", axes="D")), USUAL - {"serialisation"}),
    "Chain": (recipe(Chain((ShortConv("u"), TokenShift("u", to="y")))), USUAL),
    "Reverse": (
        recipe(Reverse((ShortConv("u"), Project("u", y="D")))),
        ANY | SMOOTH | {"serialisation", "one_way"},
    ),
    "Reverse, scan": (
        recipe(Project("x", z="D"), Decay("z"), Reverse((GatedScan("u"),))),
        ANY | SMOOTH | {"serialisation", "one_way"},
    ),
    "Decay": (recipe(QKV, Project("x", z="H K"), Decay("z", tau=4.0), OuterScan()), USUAL),
    "LowerBounds and BoundedDecay": (
        recipe(QKV, Project("x", z="H K"), LowerBounds("H K"), BoundedDecay("z"), OuterScan()), USUAL - {"steps"}
    ),
    "Learned": (recipe(QKV, Learned("log_a", "H", init="i/H"), Act("log_a", "-exp"), OuterScan()), USUAL),
    "StepDecay": (recipe(QKV, Project("x", dt="H"), StepDecay(), Multiply("v", by="delta"), OuterScan()), USUAL),
    "StepDecay, limits": (recipe(QKV, Project("x", dt="H K"), StepDecay(limit=(0.01, 0.2)), OuterScan()), USUAL),
    "RetentionScale": (recipe(QKV, FixedDecay(), RetentionScale(eps=1e-2), *RETAINED), WHOLE),
    "RetentionScale, chunks": (recipe(QKV, FixedDecay(), RetentionScale(chunk=3, eps=1e-2), *RETAINED), WHOLE),
    "FixedDecay": (recipe(QKV, FixedDecay(), OuterScan()), USUAL),
    "FixedDecay, eps": (recipe(QKV, FixedDecay(eps=1e-2), OuterScan(), Norm("y", over="V", eps="eps")), USUAL),
    "BoundedDecay, no bound": (recipe(QKV, Project("x", z="H K"), BoundedDecay("z", bound=None), OuterScan()), USUAL),
    "Along": (
        recipe(Project("x", z="D"), Decay("z"), Along(0, (GatedScan("u"),)), Along(1, (GatedScan("u", out="y"),))),
        (ANY | SMOOTH | {"serialisation", "one_way"}) - {"packing"},
    ),
    "Along, another x": (
        recipe(Along(1, (ShortConv("u"), Reverse((TokenShift("x", to="s"),))), reads="u"), out="s"),
        (ANY | SMOOTH | {"serialisation", "one_way"}) - {"packing"},
    ),
    "Complex, Phase and RealImag": (
        recipe(
            Project("x", z="D", c="D 2"),
            Decay("z", out="log_f"),
            Phase(),
            Complex("c"),
            GatedScan("c", rotates=True),
            RealImag(),
        ),
        USUAL,
    ),
    "AppendOne and DivideByLast": (
        recipe(QKV, Act("q k", "1+elu"), AppendOne("v"), OuterScan(decay=None), DivideByLast()), USUAL),
    "Stabilise": (
        recipe(
            QKV, Project("x", i="H", z="H"), Decay("z"), Stabilise(), AppendOne(), OuterScan(), DivideByLast("floor")
        ),
        USUAL,
    ),
    "PowerDecay": (recipe(Project("x", r="D"), PowerDecay(), Multiply("u", by="k", act="silu"), GatedScan("u")), USUAL),
    "PoleScan": (recipe(PoleScan("u")), USUAL),
    "ComplexGate": (recipe(QKV, Project("x", c="H K 2"), ComplexGate("c"), OuterScan(rotates=True)), USUAL),
    "ComplexGate, amplitude and phase": (
        recipe(QKV, Project("x", c="H 2"), ComplexGate("c", law="amplitude_phase"), OuterScan(rotates=True)),
        USUAL,
    ),
    "ComplexGate, signed, halves": (
        recipe(QKV, Project("x", c="2 H"), ComplexGate("c", law="signed"), OuterScan(rotates=True)),
        USUAL,
    ),
    "OutputGate": (recipe(Project("x", z="D", y="D"), OutputGate("z")), USUAL),
    "Rename": (recipe(Rename("x", "y")), USUAL),
    "Multiply, equal axes": (recipe(Project("x", z="D"), Multiply("u", by="z", act="silu"), out="u"), USUAL),
    "GatedScan": (recipe(Project("x", z="D"), Decay("z"), GatedScan("u")), USUAL),
    "OuterScan": (recipe(QKV, OuterScan(decay=None)), USUAL),
    "OuterScan, groups": (recipe(GROUPED, Project("x", z="H"), Decay("z"), OuterScan(scale="1/sqrt(K)")), USUAL),
    "OuterScan, bonus": (recipe(QKV, Learned("b", "H K", init="i"), FixedDecay(), OuterScan(bonus="b")), USUAL),
    "OuterScan, tied": (recipe(QKV, Project("x", z="H K"), Decay("z"), OuterScan(k=None)), USUAL),
    "DeltaScan, several writes": (
        recipe(Project("x", q="G K", k="3 G K", v="3 H V", b="3 H"), *UNIT_KEYS, Act("b", "sigmoid"),
               DeltaScan(decay=None, beta="b")),
        USUAL,
    ),
    "OuterScan, several writes and reads": (
        recipe(Project("x", q="2 H K", k="3 H K", v="3 H V", z="H K"), Decay("z"), OuterScan()), USUAL,
    ),
    "WideScan": (
        recipe(QKV, Project("x", e="H K", b="H K", w="H V", z="H K"), SMALL_E, Decay("z"),
               WideScan(erase="e", remove="b", write="w")),
        USUAL,
    ),
    "WideScan, previous state": (
        recipe(GROUPED, Project("x", e="G K", w="H", z="H"), SMALL_E, Decay("z"),
               WideScan(erase="e", erase_from="previous", write="w")),
        USUAL,
    ),
    "WideScan, several writes": (
        recipe(Project("x", q="2 H K", k="2 H K", v="2 H V", e="2 H K", z="H"), SMALL_E, Decay("z"),
               WideScan(erase="e", erase_from="previous")),
        USUAL,
    ),
    "ValueResidual": (recipe(QKV, ValueResidual("v", rank="G", first="i"), out="v"), USUAL - {"steps"}),
    "RemovalKeys": (recipe(QKV, Project("x", a="H K"), RemovalKeys(), Sum("e b k")), USUAL),
    "FeedbackKey": (recipe(QKV, FeedbackKey(), Sum("q p")), USUAL),
    "SelfTerm": (recipe(QKV, Project("x", y="H V"), SelfTerm(first="i")), USUAL),
    "Repeat": (recipe(Project("x", y="G K"), Repeat("y")), USUAL),
    "Previous": (recipe(QKV, Previous("k v", to="a b"), out="a b"), USUAL),
    "FlooredDecay": (recipe(QKV, Project("x", z="H K"), FlooredDecay(), OuterScan()), USUAL),
    "KeyedRate": (recipe(QKV, Project("x", b="H"), Act("b", "sigmoid"), KeyedRate("b"), Multiply("k", by="b", to="y")),
                  USUAL),
    "KeyedRate, implicit": (
        recipe(QKV, Project("x", b="H"), Act("b", "sigmoid"), KeyedRate("b", law="implicit"),
               Multiply("k", by="b", to="y")),
        USUAL,
    ),
    "DataDecay": (recipe(QKV, Project("x", dt="H", rate="H"), DataDecay(), OuterScan()), USUAL),
    "DataRotary": (recipe(QKV, STEP, Project("x", a="H 2"), DataRotary("q", angle="a"), out="q"), USUAL),
    "DataRotary, half": (recipe(QKV, STEP, Project("x", a="G"), DataRotary("q", "a", layout="half"), out="q"), USUAL),
    "Trapezoid": (
        recipe(
            QKV, STEP, Project("x", t="H", z="H"), Decay("z"), Trapezoid(trap="t"), OuterScan(k="keys", v="values")
        ),
        USUAL,
    ),
    "Spread and Gather": (recipe(Project("x", y="D"), Spread("y", axis="N", first="i"), Gather()), USUAL),
    "SlotScan": (
        recipe(Project("x", q="H K", k="G K", v="G V", s="G N", z="G N"), Decay("z"), SlotScan(scale="1/K")), USUAL,
    ),
    "OjaScan": (
        recipe(QKV, Norm("v", kind="l2", over="V", affine="none"), Scale("v", "1/sqrt(V)"),
               Project("x", z="H V", b="H"), Act("b", "sigmoid"), Decay("z"), OjaScan(beta="b")),
        USUAL,
    ),
    "MesaScan": (recipe(QKV, GATES_OF_MESA, Decay("z"), Act("b", "sigmoid"), MesaScan(beta="b")), USUAL),
    "MesaScan, conjugate gradients": (
        recipe(QKV, GATES_OF_MESA, Decay("z"), Act("b", "sigmoid"),
               MesaScan(beta="b", solver="conjugate_diagonal", iterations=2)),
        USUAL,
    ),
    "MomentumScan": (
        recipe(QKV, Project("x", z="H", m="H", b="H", n="H"), Decay("z"), Decay("m", out="log_m"),
               Act("b n", "sigmoid"), *UNIT_KEYS, MomentumScan(p="k", beta="b", eta="n")),
        USUAL,
    ),
    "LogLinearScan": (
        recipe(GROUPED, Project("x", z="H", w="H 12"), Decay("z"), LogLinearScan()), USUAL,
    ),
    "ForgettingAttention": (recipe(QKV, Project("x", f="H"), Decay("f", out="log_f"), ForgettingAttention()), USUAL),
    "ForgettingAttention, window": (
        recipe(Project("x", q="H K", k="G K", v="G V", f="H"), Decay("f", out="log_f"), ForgettingAttention(window=2)),
        USUAL,
    ),
    "DeltaScan": (
        recipe(QKV, *UNIT_KEYS, Project("x", b="H", z="H K"), Act("b", "sigmoid"), Decay("z"), DeltaScan(beta="b")),
        USUAL,
    ),
    "OnlineScan": (recipe(Project("x", rate="D", k="N", q="N"), OnlineScan("u")), USUAL),
    "OnlineScan, exact": (recipe(Project("x", rate="D", k="N", q="N"), OnlineScan("u", diagonal=False)), USUAL),
    "SelectiveScan": (recipe(Project("x", dt="D", B="N", C="N"), SelectiveScan("u")), USUAL),
    "FixedScan": (recipe(FixedScan("u")), USUAL),
    "FixedScan, linear": (recipe(FixedScan("u", frequency="linear")), USUAL),
    "Rotary": (recipe(QKV, Rotary("q k"), OuterScan(decay=None)), USUAL),
    "Rotary, half": (recipe(QKV, Rotary("q k", layout="half", inclusive=True), OuterScan(decay=None)), USUAL),
    "Rotary, stored": (recipe(QKV, Rotary("q k", stored=True), OuterScan(decay=None)), USUAL),
    "RelPos": (recipe(QKV, *PAIRS, RelPos(), OuterScan(rotates=True)), USUAL),
    "RelPos, literal": (recipe(QKV, *PAIRS, RelPos(law="literal"), OuterScan(decay=None)), USUAL),
    "GatedAttention": (recipe(QKV, *PAIRS, RelPos(), GatedAttention()), USUAL),
    "Attention, all scores": (recipe(QKV, Attention(fused=False)), USUAL),
    "Attention": (recipe(QKV, Attention()), USUAL),
    "Attention, groups": (
        recipe(Project("x", q="H K", k="G K", v="G V"), Rotary("q k"), Attention()),
        USUAL,
    ),
    "DenseRead": (
        recipe(QKV, Project("x", g="H V", z="H"), Decay("z"), DenseRead(OuterScan(), gate="g")), USUAL - {"steps"}
    ),
    "DenseRead, tied keys": (
        recipe(QKV, Project("x", g="H V", z="H K"), Decay("z"), DenseRead(OuterScan(k=None), gate="g", layers=1)),
        USUAL - {"steps"},
    ),
    "DenseCarry": (
        recipe(Project("x", dt="D", B="N", C="N", g="D"), DenseCarry(SelectiveScan("u"), gate="g")), USUAL - {"steps"}
    ),
    "DenseFusion": (
        recipe(QKV, Project("x", g="H K"), DenseFusion("k", gate="g", layers=2), OuterScan(decay=None)),
        USUAL - {"steps"},
    ),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "ValueResidual": {"depth": 3},
    "DenseCarry": {"depth": 3},
    "DenseRead": {"depth": 3},
    "DenseRead, tied keys": {"depth": 2},
    "DenseFusion": {"depth": 3},
    "LowerBounds and BoundedDecay": {"depth": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_every_law_holds(name: str) -> None:
    part, laws = CASES[name]
    options = OPTIONS.get(name, {})
    assert set(check(part, dim=6, laws=laws, examples=EXAMPLES, seed=SEED, **options)) == laws
    assert applying(part, dim=6, **options) - {"lengths"} == laws


@pytest.mark.parametrize("name", ["Loop", "Loop, scan inside", "TapConv"])
def test_lengths_share_graphs(name: str) -> None:
    """Of the parts that a graph cannot hold as they are; the presets show it for all others."""
    assert check(CASES[name][0], dim=6, laws=["lengths"], examples=4, seed=SEED) == ["lengths"]


def test_the_table_has_every_part() -> None:
    tried = {word.strip(",") for name in CASES for word in name.split()}
    assert {part.__name__ for part in blocks.PARTS} <= tried


def test_inputs_of_a_recipe_are_drawn_too() -> None:
    scanned = Recipe(Project("x", u="D"), Decay("z"), GatedScan("u"), axes={}, inputs={"z": "D"})
    assert set(check(scanned, dim=5, examples=EXAMPLES, seed=SEED)) == USUAL | {"lengths"}
