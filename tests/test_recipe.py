"""Recipes: checked when built, edited by value, printed, written as JSON; every error in words that help."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from dataclasses import dataclass

import pytest
import torch

import recur
from recur import Frame, LanguageModel, Mixer, Recipe, RecipeError, presets
from recur.axes import evaluate, size
from recur.blocks import (
    Act,
    AppendOne,
    Attention,
    ComplexGate,
    Decay,
    DeltaScan,
    DivideByLast,
    FixedScan,
    GatedScan,
    Loop,
    LowerBounds,
    Map,
    Multiply,
    Norm,
    OnlineScan,
    OuterScan,
    OutputGate,
    Project,
    RelPos,
    Rename,
    Reshape,
    Reverse,
    ShortConv,
    Skip,
    Smoothing,
    Sum,
    TapConv,
    TokenShift,
    Unbind,
)
from recur.fields import read_part
from recur.recipe import Flow, Part
from recur.weights import Param, matrix_init, ones

IN, OUT = Project("x", u="E"), Project("u", y="D")


def test_axes_are_expressions_over_each_other():
    axes = {"D": 64, "E": "2*D", "R": "ceil(D/16)", "F": "int(1.8*D)//H*H", "H": 4, "S": "1/sqrt(D)"}
    assert [size(axis, axes) for axis in ("E", "R", "F", "max(D//128,1)", "-3+D")] == [128, 4, 112, 1, 61]
    assert evaluate("S", axes) == 0.125


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("X", "mentions X, which is not among D, E, A"),
        ("A", "A is defined by itself"),
        ("__import__('os')", "must be built from numbers, axis letters"),
        ("2*", "'2\\*' is not an expression"),
        ("D/5", "must be a positive integer, got 12.8 with D=64"),
        ("D-64", "must be a positive integer, got 0"),
    ],
)
def test_axes_that_make_no_sense_are_refused(expression, words):
    with pytest.raises(RecipeError, match=words):
        size(expression, {"D": 64, "E": "2*D", "A": "A+1"})


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((IN, Act("v"), OUT), "part 2 Act reads 'v', which nobody wrote; available: x, u"),
        ((IN,), r"must write y \[D\], got no y; written: x, u"),
        ((IN, Project("u", y="E")), r"must write y \[D\], got y \[E\]"),
        ((IN, Project("u", y="D", z="Q")), r"part 2 Project writes z \[Q\], but Q is not an axis; axes are D, E, H, K"),
        ((Act("x"), OUT), "part 1 Act writes 'x', which every part may read and none may change"),
        (
            (Project("x", y="E", z="D"), OutputGate("z"), OUT),
            r"needs 'y' and 'z' of equal axes, got y \[E\] and z",
        ),
        ((Project("x", u="H K"), Skip("u"), OUT), "reads 'y'"),
        ((IN, Norm("u", over="K"), OUT), r"over must be the last axes of u \[E\], got 'K'"),
        ((IN, Norm("u", eps="x"), OUT), "eps 'x' must have the axes of u that are not normalised"),
        (
            (Project("x", c="H K"), ComplexGate("c"), OUT),
            r"reads pairs: c must begin or end with an axis of 2, got \[H K\]",
        ),
        (
            (Project("x", q="H K", k="H K", v="H K", log_a="K"), OuterScan(), OUT),
            r"needs a decay log_a \[H\] or \[H K\]",
        ),
        ((Project("x", q="K", k="K", v="H K"), OuterScan(decay=None), OUT), "needs 'q' with 2 or 3 axes after B T"),
        (
            (Project("x", q="H K", k="H K", v="H K", beta="K"), DeltaScan(decay=None), OUT),
            r"DeltaScan needs beta \[H\], got \[K\]",
        ),
        ((Project("x", q="H K", k="H E", v="H K"), Attention(), OUT), r"needs q \[H K\], k \[G K\], v \[G V\], got"),
        ((IN, Norm("u", name="a"), Project("u", y="D", name="a")), "is called 'a', as is a Norm"),
        ((Project("x", w="H K"), Unbind("w", "a b c"), OUT), r"needs an axis of 3 in w, got \[H K\]"),
        ((IN, Loop((Act("u"),), feed="h", axes="E"), OUT), r"Loop must write h \[E\] to feed it back, got nothing"),
        ((IN, Loop((Act("u"),), feed="u", axes="D"), OUT), r"Loop must write u \[D\] to feed it back, got \[E\]"),
        (
            (IN, Norm("u", name="a"), Reverse((Skip("u", out="u", name="a"),)), OUT),
            "has a Skip called 'a', as is a Norm",
        ),
        (
            (IN, Project("x", b="E"), Multiply("b", by="x"), OUT),
            r"part 3 Multiply needs b with first axes \[D\], got \[E\]",
        ),
        ((IN, Skip("u", out="u", over="D"), OUT), r"part 2 Skip needs u with the axes \[D\], got \[E\]"),
        (
            (Project("x", q="H K", k="H K", v="H K", b="K"), OuterScan(decay=None, bonus="b"), OUT),
            r"needs a bonus b \[H\] or \[H K\], got \[K\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(parts, words):
    with pytest.raises(RecipeError, match=words):
        Recipe(*parts, axes={"E": "2*D", "H": 2, "K": "D/H"})


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: presets.gated_linear_rnn(forget="never"), ValueError, "forget must be one of tied, own, got 'never'"),
        (lambda: RelPos(law="absolute"), RecipeError, 'law must be "intended" or "literal", got \'absolute\''),
        (lambda: Recipe("Project"), TypeError, "parts must be of class Part, got str"),
        (lambda: Recipe(IN, OUT, axes={"E": "2*Q"}), RecipeError, r"axis E=2\*Q mentions Q"),
        (
            lambda: Norm("y", kind="batch"),
            RecipeError,
            "kind must be one of rms, layer, l2, unit, smooth_unit, got 'batch'",
        ),
        (lambda: Norm("y", affine="bias"), RecipeError, "affine must be"),
        (lambda: ComplexGate(law="cartesian"), RecipeError, "law must be"),
        (lambda: FixedScan("u", frequency="log"), RecipeError, "frequency must be"),
        (
            lambda: TokenShift("x", to="a b c", init=("0", "1")),
            RecipeError,
            "init must have one .* each of a b c, got 2",
        ),
        (
            lambda: Mixer(Recipe(Norm("x", groups=3, to="y")), 8),
            RecipeError,
            "Norm: groups must divide the 8 entries, got 3",
        ),
        (lambda: Sum("h"), RecipeError, "Sum: names must be two tensors or more, got 'h'; Rename copies one"),
        (lambda: Act("u", "swish"), ValueError, "name must be one of identity, silu"),
        (lambda: matrix_init("orthodox", 1, 1, 1), ValueError, "law must be one of linear, residual"),
        (lambda: Part().shapes(None), NotImplementedError, "define shapes"),
        (lambda: Part()(None, None, None), NotImplementedError, "define __call__"),
    ],
)
def test_bad_arguments_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_width_that_does_not_divide_is_named_in_letters():
    with pytest.raises(RecipeError, match=r"K = D/H must be a positive integer, got 12\.5 with D=100, H=8"):
        Mixer(presets.hgrn2(heads=8), 100)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((Project("x", u="3"), Reshape("u", "D", to="y")), r"Reshape: u \[3\] must have as many channels as \[4\]"),
        (
            (Smoothing("x", heads="3"), GatedScan("b")),
            "Smoothing: heads must divide the channels of x, got H=3 and V",
        ),
        ((Project("x", tap="3"), TapConv("x")), "TapConv: taps must divide the channels of x, got H=3 and V=4"),
        (
            (Project("x", q="2 4", k="2 4", log_a="2 4"), RelPos(), Project("q", y="D")),
            r"RelPos: log_a must hold a gate for 2 channels of q \[2, 4\], got \[2, 4\]",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_when_the_layer_is_built(parts, words):
    with pytest.raises(RecipeError, match=words):
        Mixer(Recipe(*parts), 4)


def test_a_layer_that_stands_alone_may_change_the_width():
    recipe = presets.gated_linear_rnn(inner=3, width=5)
    assert Mixer(recipe, 4)(torch.randn(2, 6, 4)).y.shape == (2, 6, 5)
    with pytest.raises(RecipeError, match=r"must write y \[M\], got y \[D\]"):
        Recipe(Project("x", y="D"), axes={"M": 5}, out="M")


def test_a_reversed_recipe_reads_from_the_end():
    recipe, x = presets.longhorn(state=3), torch.randn(2, 6, 4)
    forward, backward = Mixer(recipe, 4), Mixer(recipe.reverse(), 4)
    backward.load_state_dict({f"parts.reverse.{key[6:]}": weight for key, weight in forward.state_dict().items()})
    torch.testing.assert_close(backward(x.flip(1)).y.flip(1), forward(x).y)


def test_edits_return_new_recipes_and_need_one_match():
    longhorn = presets.longhorn()
    exact = longhorn.replace(OnlineScan, OnlineScan("u", diagonal=False))
    assert exact != longhorn
    assert [type(part) for part in exact.parts] == [type(part) for part in longhorn.parts]
    assert len(longhorn.remove(ShortConv).parts) == len(longhorn.parts) - 1
    assert longhorn.insert_before("output_gate", Norm("y")).parts[-3] == Norm("y")
    assert longhorn.insert_after("skip", Norm("y")) == longhorn.insert_before("output_gate", Norm("y"))
    with pytest.raises(
        RecipeError, match="exactly one part must be Project, got 3 among project, short_conv, project_2"
    ):
        longhorn.remove(Project)
    with pytest.raises(RecipeError, match="exactly one part must be 'conv', got 0"):
        longhorn.remove("conv")


def test_a_recipe_is_frozen_hashable_and_copies_with_its_mixer():
    recipe = presets.gla()
    with pytest.raises(AttributeError, match="frozen"):
        recipe.source = "me"
    recipe.axes["H"] = 1000
    assert recipe.axes["H"] == "max(4,D//256)"
    assert hash(recipe) == hash(presets.gla())
    mixer = Mixer(recipe, 16)
    x = torch.randn(1, 5, 16)
    assert torch.equal(copy.deepcopy(mixer)(x).y, mixer(x).y)
    assert pickle.loads(pickle.dumps(recipe)) == recipe


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_survives_json(name):
    recipe = getattr(presets, name)()
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@dataclass(frozen=True)
class Leak(Part):
    """A part of your own: forget a learned share of a tensor."""

    source: str

    def shapes(self, axes):
        return {self.source: axes[self.source]}

    def params(self, site):
        return {"keep": Param(site.of(self.source), ones, decay=False)}

    def __call__(self, flow: Flow, weights, state):
        return flow.set(**{self.source: flow[self.source] * weights.keep}), state


def test_own_parts_are_passed_in_and_functions_are_refused():
    recipe = Recipe(IN, Leak("u"), OUT, axes={"E": 3})
    data = recipe.to_dict()
    assert Recipe.from_dict(data, parts=(Leak,)) == recipe
    with pytest.raises(RecipeError, match=r"'Leak' is not a part of recur; pass its class"):
        Recipe.from_dict(data)
    mapped = Recipe(IN, Map(torch.tanh, reads="u", out="v", axes="E"), Project("v", y="D"), axes={"E": 3})
    with pytest.raises(RecipeError, match="which JSON cannot hold"):
        mapped.to_dict()
    assert Mixer(mapped, 4)(torch.ones(1, 2, 4)).y.shape == (1, 2, 4)


def test_printing_shows_stages_equations_and_numbers():
    recipe = presets.longhorn()
    assert "S_t = (1 - eps k^2) * S_{t-1} + (eps u) k" in repr(recipe)
    assert "arXiv:2407.14207" in repr(recipe)
    table = repr(Mixer(recipe, 64))
    assert "30,592" in table  # parameters
    assert "9,728" in table  # bytes: 3 taps of 128 channels and 128 x 16 numbers, 4 bytes each


def test_names_share_weights_and_classes_number_them():
    shared = Recipe(IN, Norm("u", name="n"), Norm("u", name="n"), OUT, axes={"E": 8})
    own = Recipe(IN, Norm("u"), Norm("u"), OUT, axes={"E": 8})
    assert list(Mixer(shared, 4).parts) == ["project", "n", "project_2"]
    assert list(Mixer(own, 4).parts) == ["project", "norm", "norm_2", "project_2"]


def test_a_name_that_torch_uses_itself_is_refused():
    recipe = Recipe(IN, Norm("u", name="type"), OUT, axes={"E": 8})
    with pytest.raises(
        RecipeError, match="part 2 Norm is called 'type', as is a method of torch; give it another name="
    ):
        Mixer(recipe, 4)


def test_a_bidirectional_recipe_returns_states_but_does_not_stream():
    recipe = Recipe(
        Project("x", u="D", z="D"),
        Decay("z"),
        GatedScan("u", out="f"),
        Reverse((GatedScan("u", out="b"),)),
        Sum("f b"),
    )
    mixer, x = Mixer(recipe, 6).double(), torch.randn(2, 9, 6, dtype=torch.float64)
    y, state = mixer(x)
    flow, _ = mixer.run(x)
    log_a, u = flow["log_a"], flow["u"]
    forward, back = recur.gated_scan(u, log_a), recur.gated_scan(u, log_a, reverse=True)
    torch.testing.assert_close(y, forward.y + back.y)
    torch.testing.assert_close(state["parts"]["reverse"]["gated_scan"], back.state)
    with pytest.raises(RecipeError, match="not causal, so it has no state"):
        mixer.init_state(1)
    with pytest.raises(RecipeError, match="not causal, so it cannot continue"):
        mixer(x, state)
    assert "not causal" in repr(mixer)


def test_inputs_of_a_recipe_must_be_given():
    recipe = Recipe(
        Project("x", z="D", u="D"), Multiply("u", by="g", act="silu"), Project("u", y="D"), inputs={"g": "D"}, axes={}
    )
    mixer, x = Mixer(recipe, 4), torch.randn(2, 3, 4)
    mixer(x, g=torch.ones(2, 3, 4))
    with pytest.raises(TypeError, match="further inputs must be g, got none"):
        mixer(x)
    with pytest.raises(recur.ShapeError, match=r"g must be \[B T D\]"):
        mixer(x, g=torch.ones(2, 2, 4))


def test_mixers_check_their_input():
    mixer = Mixer(presets.gla(), 16)
    with pytest.raises(recur.ShapeError, match=r"Mixer: x must be \[B T D\] = \(2, 3, 16\), got shape \(2, 3, 8\)"):
        mixer(torch.ones(2, 3, 8))
    with pytest.raises(recur.ShapeError, match=r"Mixer: state\['position'\] must be \[B\] = \(3,\), got shape \(2,\)"):
        mixer(torch.ones(3, 3, 16), mixer.init_state(2))
    with pytest.raises(TypeError, match="recipe must be a Recipe, got function"):
        Mixer(presets.gla, 16)


def test_lower_bounds_are_one_table_a_model():
    model = recur.LanguageModel(presets.hgrn2(heads=2), vocab_size=5, dim=8, depth=3)
    assert [name for name in model.state_dict() if "lower_bounds" in name] == ["shared.lower_bounds.logits"]
    ids = torch.randint(0, 5, (1, 4))
    model(ids).sum().backward()
    grad = model.shared["lower_bounds"].logits.grad
    assert grad.shape == (3, 2, 4)
    assert grad[1:].abs().sum() > 0
    assert "lower_bounds" in Mixer(presets.hgrn2(heads=2), 8).shared
    assert LowerBounds("H K").scope == "model"


HELD = {"axes": {"H": 2, "K": "D/H"}, "inputs": {}, "source": ""}
QKV = Project("x", q="H K", k="H K", v="H K", b="H", g="H K", name="in")
LAST = Project("y", y="D")
# part as recipes were stored -> the parts of now that compute the same
STORED: dict[str, tuple[dict[str, object], Part]] = {
    "Weigh": ({"part": "Weigh", "source": "v", "by": "b", "to": None}, Multiply("v", by="b")),
    "OutputGate of a product": (
        {"part": "OutputGate", "gate": "k", "act": "identity", "out": "v"},
        Multiply("v", by="k"),
    ),
    "OutputGate of an input": (
        {"part": "OutputGate", "gate": "g", "act": "sigmoid", "out": "v", "name": "gate"},
        Multiply("v", by="g", act="sigmoid", name="gate"),
    ),
    "Sum of one": ({"part": "Sum", "names": "k", "out": "v"}, Rename("k", "v")),
}


@pytest.mark.parametrize("name", STORED)
def test_parts_stored_under_an_earlier_name(name: str) -> None:
    stored, part = STORED[name]
    scan = OuterScan(decay=None)
    entries = [QKV.to_dict(), stored, scan.to_dict(), LAST.to_dict()]
    found = Recipe.from_dict({**HELD, "parts": entries})
    assert found == Recipe(QKV, part, scan, LAST, axes=HELD["axes"])
    k, v, g = torch.randn(3, 1, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    flow = Flow({"k": k, "v": v, "b": k[..., 0], "g": g}, torch.zeros(1, dtype=torch.long))
    want = {"Weigh": v * k[..., :1], "OutputGate of a product": v * k, "OutputGate of an input": v * g.sigmoid()}
    want["Sum of one"] = k
    torch.testing.assert_close(part(flow, None, None)[0]["v"], want[name])


def test_a_stored_output_gate_of_y_and_a_stored_normaliser() -> None:
    gate = {"part": "OutputGate", "gate": "g", "act": "silu", "out": "y"}
    assert read_part(gate, {"OutputGate": OutputGate}, "parts[0]") == OutputGate("g")
    known = {"AppendOne": AppendOne, "DivideByLast": DivideByLast, "Reverse": Reverse}
    inner = [{"part": "Count", "source": "v"}, {"part": "Normalise", "floor": 1e-6, "source": "y"}]
    reverse = {"part": "Reverse", "parts": inner}
    assert read_part(reverse, known, "parts[0]") == Reverse((AppendOne("v"), DivideByLast()))


def test_a_part_of_ones_own_may_have_an_earlier_name_of_ours() -> None:
    @dataclass(frozen=True)
    class Count(Part):
        up_to: int = 3

    assert read_part({"part": "Count", "up_to": 4}, {"Count": Count}, "parts[0]") == Count(4)


FRAMED = {
    **dict.fromkeys(("gla", "hgrn", "hgrn2", "llama", "retnet"), Frame(ffn="swiglu")),
    **dict.fromkeys(("dss", "gated_smoothing", "gated_tap_conv", "gss", "smoothing", "tap_conv"), Frame(norm=None)),
    **dict.fromkeys(("comba", "gated_delta_net2", "mamba3", "mamba3_mimo"), Frame(ffn="swiglu")),
    **dict.fromkeys(("delta_product", "gated_delta_product", "gsa", "mesa_net"), Frame(ffn="swiglu")),
    **dict.fromkeys(("delta_net", "efla", "gated_delta_net", "kaczmarz", "kda"), Frame(ffn="swiglu")),
    **dict.fromkeys(("forgetting_transformer", "gated_oja", "momentum_delta_net"), Frame(ffn="swiglu")),
    "gateloop": Frame(ffn="gelu"),
    "rwkv": Frame(ffn="channel_mix", norm="layer"),
    "rwkv7": Frame(ffn="key_mix", norm="layer", embed_norm="layer"),
    "simple_gateloop": Frame(ffn="gelu", norm=None),
}


@pytest.mark.parametrize("name", presets.names())
def test_a_language_model_has_the_frame_of_its_paper(name: str) -> None:
    recipe, sizes = getattr(presets, name)(), {"vocab_size": 7, "dim": 64, "depth": 1, "tie": False}
    frame = FRAMED.get(name, Frame())
    assert recipe.frame == frame
    with torch.device("meta"):
        model = LanguageModel(recipe, **sizes)
        said = LanguageModel(recipe, **sizes, **dataclasses.asdict(frame))
    assert model.arguments == said.arguments
    assert list(model.state_dict()) == list(said.state_dict())
    assert (frame.ffn is None) == (model.blocks[0].ffn is None)
    assert (frame.norm is None) == (not any("norm.weights" in key for key in model.state_dict()))


def test_a_frame_is_read_from_the_first_recipe_unless_the_call_says_otherwise() -> None:
    sizes = {"vocab_size": 7, "dim": 64, "depth": 2}
    framed = presets.rwkv().like(*presets.rwkv().parts, frame=Frame(ffn="gelu", norm="l2", positions=9))
    model = LanguageModel([framed, presets.gla()], **sizes)
    assert [model.arguments[name] for name in ("ffn", "norm", "positions")] == ["gelu", "l2", 9]
    model = LanguageModel(framed, **sizes, ffn=None, norm="rms", positions=None)
    assert [model.arguments[name] for name in ("ffn", "norm", "positions")] == [None, "rms", None]


def test_a_frame_stays_in_edits_and_in_json() -> None:
    recipe = presets.gss().remove(Skip)
    assert recipe.frame == recipe.reverse().frame == Frame(norm=None)
    assert recipe != recipe.like(*recipe.parts, frame=Frame())
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    older = {key: value for key, value in recipe.to_dict().items() if key != "frame"}
    assert Recipe.from_dict(older).frame == Frame()
    for frame, words in (
        ({"fnn": None}, r"frame Frame has no 'fnn'; did you mean 'ffn'\?"),
        ({"norm": 3}, r"frame Frame: 'norm' must be .*, got 3"),
    ):
        with pytest.raises(RecipeError, match=words):
            Recipe.from_dict({**older, "frame": frame})
    with pytest.raises(TypeError, match="Recipe: frame must be a Frame, got dict"):
        Recipe(*recipe.parts, axes=recipe.axes, frame={"norm": None})
