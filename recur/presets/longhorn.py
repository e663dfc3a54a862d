"""Longhorn: the state as an online learner."""

from recur.blocks import LowRank, Norm, OnlineScan, OutputGate, Project, Reverse, ShortConv, Skip, Sum
from recur.recipe import Recipe


def longhorn(
    *,
    state: int = 16,
    expand: int = 2,
    conv: int = 4,
    rank: int | str = "ceil(D/16)",
    conv_bias: bool = True,
    bias: bool = False,
    diagonal: bool = True,
    norm: tuple[Norm, ...] = (),
) -> Recipe:
    """S_t = (1 - eps_t k_t^2) * S_{t-1} + (eps_t u_t) k_t, y_t = S_t q_t + D u_t; eps = r / (1 + r |k|^2).

    r = sigmoid(rate). The diagonal of the closed-form answer to "store u under k without forgetting more than needed".

    Args:
        state: N, slots per channel.
        expand: inner width over D.
        conv: taps of the short convolution.
        rank: of the rate's projection.
        conv_bias: whether the short convolution has a bias.
        bias: of all projections.
        diagonal: False for the whole answer, S_t = (I - eps_t k_t k_t^T) S_{t-1} + ....
        norm: norms between read-out and gate, such as (Norm("y", eps=1e-6),).

    Source: Liu et al. 2024, arXiv:2407.14207.

    >>> recur.Mixer(recur.presets.longhorn(), dim=64).init_state(batch=1)["parts"]["online_scan"].shape
    torch.Size([1, 128, 16])
    """
    return Recipe(
        Project("x", u="E", z="E", bias=bias, init="linear_zero"),
        ShortConv("u", width=conv, bias=conv_bias),
        Project("u", rate=LowRank("E", rank="R"), k="N", q="N"),
        OnlineScan("u", diagonal=diagonal),
        Skip("u"),
        *norm,
        OutputGate("z"),
        Project("y", y="D", bias=bias, init="residual"),
        axes={"E": f"{expand}*D", "N": state, "R": rank},
        source="Liu et al. 2024, arXiv:2407.14207",
    )


def longhorn_bidirectional(
    *,
    state: int = 16,
    expand: int = 2,
    conv: int = 4,
    rank: int | str = "ceil(D/16)",
    conv_bias: bool = True,
    bias: bool = False,
) -> Recipe:
    """y_t = norm(forward read-out) + norm(backward read-out): Longhorn read both ways with shared weights, two norms.

    The short convolution stays causal.

    Args:
        state: N, slots per channel.
        expand: inner width over D.
        conv: taps of the short convolution.
        rank: of the rate's projection.
        conv_bias: whether the short convolution has a bias.
        bias: of all projections.

    Source: the released kernels of Liu et al. 2024, arXiv:2407.14207.

    >>> y, _ = recur.Mixer(recur.presets.longhorn_bidirectional(), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return Recipe(
        Project("x", u="E", z="E", bias=bias, init="linear_zero"),
        ShortConv("u", width=conv, bias=conv_bias),
        Project("u", rate=LowRank("E", rank="R"), k="N", q="N"),
        OnlineScan("u", out="ahead", name="online_scan"),
        Reverse((OnlineScan("u", out="behind", name="online_scan"),)),
        Skip("u", out="ahead", name="skip"),
        Skip("u", out="behind", name="skip"),
        Norm("ahead", eps=1e-6),
        Norm("behind", eps=1e-6),
        Sum("ahead behind"),
        OutputGate("z"),
        Project("y", y="D", bias=bias, init="residual"),
        axes={"E": f"{expand}*D", "N": state, "R": rank},
        source="after Liu et al. 2024, arXiv:2407.14207",
    )
