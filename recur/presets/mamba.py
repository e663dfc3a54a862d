"""Mamba: a state space whose time step, input and read-out depend on the token."""

from recur.blocks import LowRank, OutputGate, Project, SelectiveScan, ShortConv, Skip
from recur.recipe import Recipe


def mamba(
    *,
    state: int = 16,
    expand: int = 2,
    conv: int = 4,
    rank: int | str = "ceil(D/16)",
    conv_bias: bool = True,
    bias: bool = False,
) -> Recipe:
    """S_t = exp(delta_t A) * S_{t-1} + (delta_t u_t) B_t, y_t = S_t C_t + D u_t; delta = softplus(dt).

    Args:
        state: N, slots per channel.
        expand: inner width over D.
        conv: taps of the short convolution.
        rank: of the time step's projection.
        conv_bias: whether the short convolution has a bias.
        bias: of all projections.

    Source: Gu & Dao 2023, arXiv:2312.00752.

    >>> recur.Mixer(recur.presets.mamba(), dim=64).init_state(batch=1)["parts"]["selective_scan"].shape
    torch.Size([1, 128, 16])
    """
    return Recipe(
        Project("x", u="E", z="E", bias=bias, init="linear_zero"),
        ShortConv("u", width=conv, bias=conv_bias),
        Project("u", dt=LowRank("E", rank="R"), B="N", C="N"),
        SelectiveScan("u"),
        Skip("u"),
        OutputGate("z"),
        Project("y", y="D", bias=bias, init="residual"),
        axes={"E": f"{expand}*D", "N": state, "R": rank},
        source="Gu & Dao 2023, arXiv:2312.00752",
    )
