"""Longhorn: the state as an online learner."""

from recur.blocks import LowRank, OnlineScan, OutputGate, Project, ShortConv, Skip
from recur.recipe import Recipe


def longhorn(
    *,
    state: int = 16,
    expand: int = 2,
    conv: int = 4,
    rank: int | str = "ceil(D/16)",
    conv_bias: bool = True,
    bias: bool = False,
) -> Recipe:
    """S_t = (1 - eps_t k_t^2) * S_{t-1} + (eps_t u_t) k_t, y_t = S_t q_t + D u_t; eps = r / (1 + r |k|^2).

    r = sigmoid(rate). The diagonal of the closed-form answer to "store u under k without forgetting more than needed".

    Args: state: N slots a channel; expand: inner width over D; conv: taps of the short convolution;
        rank: of the rate's projection.
    Source: Liu et al. 2024, arXiv:2407.14207.
    """
    return Recipe(
        Project("x", u="E", z="E", bias=bias),
        ShortConv("u", width=conv, bias=conv_bias),
        Project("u", rate=LowRank("E", rank="R"), k="N", q="N"),
        OnlineScan("u"),
        Skip("u"),
        OutputGate("z"),
        Project("y", y="D", bias=bias, init="residual"),
        axes={"E": f"{expand}*D", "N": state, "R": rank},
        source="Liu et al. 2024, arXiv:2407.14207",
    )
