"""GateLoop: a data-controlled complex gate; its real, elementwise, simplest form; the attention it is compared to."""

from recur.blocks import (
    Attention,
    ComplexGate,
    Decay,
    GatedScan,
    Norm,
    OuterScan,
    OutputGate,
    Project,
    RelPos,
    ScaleGrad,
)
from recur.recipe import Frame, Part, Recipe

SOFTMAX = Attention()
LINEAR = OuterScan(decay=None, scale="1/sqrt(K)")  # no softmax
RELATIVE_LINEAR = OuterScan(scale="1/sqrt(K)", rotates=True)


def gateloop(
    *, heads: int | str = "I", inner: int | str = "D", law: str = "polar", gate_gradient: float = 0.9
) -> Recipe:
    """S_t = a_t S_{t-1} + k_t v_t^T with one complex gate per head, y_t = Re(S_t)^T q_t * silu(g_t).

    Args:
        heads:         H; "I", the default, gives every channel a head and a complex number of its own.
        inner:         I, width of q, k and v.
        law:           of the gate (ComplexGate): "polar", "amplitude_phase" or "signed".
        gate_gradient: fraction of the gradient that reaches the gate.

    Source: Katsch 2023, arXiv:2311.01927.

    >>> recur.Mixer(recur.presets.gateloop(heads=4), dim=64).init_state(batch=1)["parts"]["outer_scan"].shape
    torch.Size([1, 4, 16, 16])
    """
    return Recipe(
        Project("x", q="H K", k="H K", v="H K"),
        Project("x", c="H 2", bias=True),
        ScaleGrad("c", gate_gradient),
        ComplexGate("c", law=law),
        OuterScan(rotates=True),
        Project("x", g="H K", name="gate"),
        OutputGate("g"),
        Project("y", y="D", name="out"),
        axes={"I": inner, "H": heads, "K": "I/H"},
        source="Katsch 2023, arXiv:2311.01927",
        frame=Frame(ffn="gelu"),
    )


def simple_gateloop() -> Recipe:
    """h_t = sigmoid(z_t) * h_{t-1} + b_t, y_t = q_t * h_t, all channels apart.

    Source: the simplified layer of the released PyTorch GateLoop, after Katsch 2023, arXiv:2311.01927.

    >>> recur.Mixer(recur.presets.simple_gateloop(), dim=64).init_state(batch=1)["parts"]["gated_scan"].shape
    torch.Size([1, 64])
    """
    return Recipe(
        Norm("x", kind="l2", eps=1e-12, to="n"),
        Project("n", q="D", b="D", z="D"),
        Decay("z"),
        GatedScan("b"),
        OutputGate("q", act="identity"),
        source="after Katsch 2023, arXiv:2311.01927",
        frame=Frame(ffn="gelu", norm=None),  # it normalises its own input
    )


def relative(*, law: str = "intended", gate: str = "polar", gate_gradient: float = 0.5) -> tuple[Part, ...]:
    """Positions for gateloop_attention that the data decide: RelPos of this law, from a ComplexGate of that law."""
    return (
        Project("x", c="H K/2 2", name="position"),
        ScaleGrad("c", gate_gradient),
        ComplexGate("c", law=gate),
        RelPos(law=law),
    )


def gateloop_attention(
    *, heads: int = 8, width: int | str = "D/H", positions: tuple[Part, ...] = (), read: Part = SOFTMAX
) -> Recipe:
    """y_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(K)) v_s * silu(g_t), the mixer that GateLoop is compared to.

    Args:
        heads: H.
        width: K, channels of a head.
        positions: parts that put them into q and k: none, Rotary("q k"), or `relative()`.
        read: SOFTMAX, or LINEAR, the sum without softmax; after relative() positions as intended, GatedAttention() or
            RELATIVE_LINEAR.

    Source: the comparison model of the released PyTorch GateLoop, after Katsch 2023, arXiv:2311.01927.

    >>> y, _ = recur.Mixer(recur.presets.gateloop_attention(heads=4), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return Recipe(
        Project("x", q="H K", k="H K", v="H K"),
        *positions,
        read,
        Project("x", g="H K", name="gate"),
        OutputGate("g"),
        Project("y", y="D", bias=True, name="out"),
        axes={"H": heads, "K": width},
        source="after Katsch 2023, arXiv:2311.01927",
    )
