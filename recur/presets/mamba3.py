"""Mamba-3: two writes per token by the trapezoidal rule, rotations that tokens bring, several inputs and outputs."""

from collections.abc import Mapping

from recur.blocks import (
    DataDecay,
    DataRotary,
    Gather,
    Learned,
    Norm,
    OuterScan,
    OutputGate,
    Project,
    Repeat,
    Skip,
    Spread,
    Sum,
    Trapezoid,
)
from recur.recipe import Frame, Part, Recipe

GATE = (OutputGate("z"),)
NORM_THEN_GATE = (Norm("y", over="H P", groups="H", name="read_norm"), OutputGate("z"))


def mamba3(
    *,
    state: int = 128,
    expand: int = 2,
    head: int = 64,
    groups: int = 1,
    rope: float = 0.5,
    floor: float = 1e-4,
    leave: tuple[Part, ...] = GATE,
) -> Recipe:
    """S_t = a_t S_{t-1} + (1 - l) delta a_t k_{t-1} u_{t-1}^T + l delta k_t u_t^T, y_t = (S_t^T q_t + D u_t) * silu(z).

    q, k = R(theta)(norm(C), norm(B) + biases), theta_t = theta_{t-1} + pi tanh(angle) delta, l = sigmoid(trap).

    Args:
        state: N.
        expand: inner width over D.
        head: P channels per head.
        groups: G, whose heads share B and C.
        rope: fraction of the channels of q and k that are rotated.
        floor: the least rate of decay.
        leave: the parts between the scan and the last projection.

    Source: Lahoti et al. 2026, arXiv:2603.15569.

    >>> y, _ = recur.Mixer(recur.presets.mamba3(), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return _recipe(
        (),
        (DataRotary("q k"), Trapezoid(v="u"), OuterScan(k="keys", v="values"), Skip("u", over="H"), *leave),
        {"P": head, "H": f"{expand}*D/P", "G": groups, "N": state, "A": f"int(N*{rope})//2"},
        floor,
    )


def mamba3_mimo(
    *,
    rank: int = 4,
    state: int = 128,
    expand: int = 2,
    head: int = 64,
    groups: int = 1,
    rope: float = 0.5,
    floor: float = 1e-4,
    layout: str = "half",
    leave: tuple[Part, ...] = GATE,
) -> Recipe:
    """`mamba3` with R inputs and outputs per head: u_r = x_r * u, R keys and queries, y = sum_r o_r y_r silu(z_r z).

    Args:
        rank: R inputs and outputs per head.
        state: N.
        expand: inner width over D.
        head: P channels per head.
        groups: G, whose heads share B and C.
        rope: fraction of the channels of q and k that are rotated.
        floor: the least rate of decay.
        layout: which channels are rotated together (see `DataRotary`), "half" as in the published kernels.
        leave: the parts between the scan and the last projection.

    Source: Lahoti et al. 2026, arXiv:2603.15569.

    >>> y, _ = recur.Mixer(recur.presets.mamba3_mimo(), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return _recipe(
        ("R",),
        (
            Spread("u", to="v", first="1/R", name="mimo_x"), Spread("z", name="mimo_z"),
            DataRotary("q k", layout=layout), Trapezoid(), OuterScan(k="keys", v="values"), Skip("v", over="H"),
            *leave, Gather(first="1/R", name="mimo_o"),
        ),
        {"P": head, "H": f"{expand}*D/P", "G": groups, "R": rank, "N": state, "A": f"int(N*{rope})//2"},
        floor,
    )  # fmt: skip


def _recipe(several: tuple[str, ...], scan: tuple[Part, ...], axes: Mapping[str, int | str], floor: float) -> Recipe:
    """What both share: projections, decay, normed keys and queries with biases; `several` are the axes before G."""
    lead = " ".join((*several, ""))
    return Recipe(
        Project(
            "x", z="H P", u="H P", B=f"{lead}G N", C=f"{lead}G N", dt="H", rate="H", trap="H", angle="A", name="enter"
        ),
        DataDecay(floor=floor),
        Norm("B", over="N", name="B_norm"), Norm("C", over="N", name="C_norm"), Repeat("B C"),
        Learned("B_bias", f"{lead}H N", init="1", name="B_bias"), Sum("B B_bias", out="k"),
        Learned("C_bias", f"{lead}H N", init="1", name="C_bias"), Sum("C C_bias", out="q"),
        *scan,
        Project("y", y="D", name="leave"),
        axes=axes,
        source="Lahoti et al. 2026, arXiv:2603.15569",
        frame=Frame(ffn="swiglu"),
    )  # fmt: skip
