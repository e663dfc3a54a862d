"""The GateLoop author's later unit: a gated recurrence of real numbers, linear or not."""

from recur.blocks import Act, Decay, GatedScan, Loop, Multiply, OutputGate, Project, Rename, Scale, Sum
from recur.recipe import Part, Recipe
from recur.shapes import pick

FORGET: dict[str, tuple[str, tuple[Part, ...]]] = {  # projections, and how log a comes from them
    "tied": ("z i o", (Scale("i", "-1"), Decay("i"))),
    "own": ("z i f o", (Decay("f"),)),
}


def gated_linear_rnn(
    *,
    inner: int | str = "2*D",
    width: int | str = "D",
    forget: str = "tied",
    input_act: str = "tanh",
    hidden_act: str = "tanh",
) -> Recipe:
    """h_t = a_t * h_{t-1} + sigmoid(i_t) * tanh(z_t), y_t = W (sigmoid(o_t) * tanh(h_t)).

    Args:
        inner: width of h.
        width: of y.
        forget: "tied", a = 1 - sigmoid(i), or "own", a = sigmoid(f).
        input_act: of z.
        hidden_act: of h.

    Source: the author's code after Katsch 2023, arXiv:2311.01927.

    >>> recur.Mixer(recur.presets.gated_linear_rnn(), dim=64).init_state(batch=1)["parts"]["gated_scan"].shape
    torch.Size([1, 128])
    """
    names, decay = pick("gated_linear_rnn", "forget", forget, FORGET)
    return Recipe(
        Project("x", tuple((name, "E") for name in names.split()), bias=True, init="lecun"),
        Act("z", input_act),
        Multiply("z", by="i", act="sigmoid"),
        *decay,
        GatedScan("z", out="h"),
        Rename("h", "y"),
        Act("y", hidden_act),
        OutputGate("o", act="sigmoid"),
        Project("y", y="M", bias=True, init="lecun"),
        axes={"E": inner, "M": width},
        source="after Katsch 2023, arXiv:2311.01927",
        out="M",
    )


def gated_rnn(**options: int | str) -> Recipe:
    """gated_linear_rnn with h_{t-1} in every gate: [z i o]_t + W h_{t-1}, token by token; W starts at 0.

    Args:
        options: those of gated_linear_rnn, whose function it is until W has learned something.

    Source: the author's code after Katsch 2023, arXiv:2311.01927.

    >>> y, _ = recur.Mixer(recur.presets.gated_rnn(), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    linear = gated_linear_rnn(**options)  # type: ignore[arg-type]
    first, *unit, last = linear.parts
    names = FORGET[str(options.get("forget", "tied"))][0].split()
    again = Project("last", tuple((f"{name}_last", "E") for name in names), init="zeros", name="recurrent")
    added = (Sum(f"{name} {name}_last", out=name) for name in names)
    loop = Loop((again, *added, *unit), feed="h", axes="E")
    return linear.like(first, loop, last)
