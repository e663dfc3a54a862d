"""S4D: a diagonal state space with constant poles for every channel."""

from recur.blocks import Act, OutputGate, PoleScan, Project, Rename, Skip
from recur.recipe import Recipe


def s4d(*, state: int = 32) -> Recipe:
    """S_t = e^z S_{t-1} + x_t, y_t = gelu(Re sum_n 2 C_n dt (e^z - 1)/z S_t + D x_t), o_t = W y_t * sigmoid(W y_t).

    z = dt (-1/2 + i pi n) at first, n < state, one dt per channel.

    Args:
        state: N poles per channel, one of each conjugate pair.

    Source: Gu et al. 2022, arXiv:2206.11893.

    >>> recur.Mixer(recur.presets.s4d(state=16), dim=64).init_state(batch=1)["parts"]["pole_scan"].shape
    torch.Size([1, 64, 16])
    """
    return Recipe(
        Rename("x", "u"),
        PoleScan("u"),
        Skip("u", mean=0.0, std=1.0),
        Act("y", "gelu"),
        Project("y", y="D", g="D", bias=True),
        OutputGate("g", act="sigmoid"),
        axes={"N": state},
        source="Gu et al. 2022, arXiv:2206.11893",
    )
