"""GateLoop: a data-controlled complex gate; and its real, elementwise, simplest form."""

from recur.blocks import ComplexGate, Decay, GatedScan, Norm, OuterScan, OutputGate, Project, ScaleGrad
from recur.recipe import Recipe


def gateloop(
    *, heads: int | str = "I", inner: int | str = "D", law: str = "polar", gate_gradient: float = 0.9
) -> Recipe:
    """S_t = a_t S_{t-1} + k_t v_t^T with one complex gate a head, y_t = Re(S_t)^T q_t * silu(g_t).

    Args:
        heads:         H; "I", the default, gives every channel a head and a complex number of its own.
        inner:         I, width of q, k and v.
        law:           "polar", a = sigmoid(|c|) c/|c|, or "amplitude_phase", a = sigmoid(c_0) exp(i c_1).
        gate_gradient: fraction of the gradient that reaches the gate.

    Source: Katsch 2023, arXiv:2311.01927.
    """
    return Recipe(
        Project("x", q="H K", k="H K", v="H K"),
        Project("x", c="H 2", bias=True),
        ScaleGrad("c", gate_gradient),
        ComplexGate("c", law=law),
        OuterScan(rotates=True),
        Project("x", g="H K"),
        OutputGate("g"),
        Project("y", y="D"),
        axes={"I": inner, "H": heads, "K": "I/H"},
        source="Katsch 2023, arXiv:2311.01927",
    )


def simple_gateloop() -> Recipe:
    """h_t = sigmoid(z_t) * h_{t-1} + b_t, y_t = q_t * h_t, all channels apart.

    It normalises its own input, so a LanguageModel of it takes norm=None.

    Source: the simplified layer of the released PyTorch GateLoop, after Katsch 2023, arXiv:2311.01927.
    """
    return Recipe(
        Norm("x", kind="l2", eps=1e-12, to="n"),
        Project("n", q="D", b="D", z="D"),
        Decay("z"),
        GatedScan("b"),
        OutputGate("q", act="identity"),
        source="after Katsch 2023, arXiv:2311.01927",
    )
