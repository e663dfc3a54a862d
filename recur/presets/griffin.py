"""Griffin's recurrent layer: a gated diagonal recurrence whose gates are powers of learned constants."""

from recur.blocks import GatedScan, Multiply, OutputGate, PowerDecay, Project, ShortConv
from recur.recipe import Recipe


def rg_lru(*, expand: float = 1, conv: int = 4, power: float = 8.0) -> Recipe:
    """h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * sigmoid(i_t) * u_t, y_t = h_t * gelu(g_t).

    log a = -c softplus(L) sigmoid(r), L learned: a constant gate to a power in (0, c).

    Args:
        expand: inner width over D.
        conv: taps of the short convolution.
        power: c.

    Source: De et al. 2024, arXiv:2402.19427.

    >>> recur.Mixer(recur.presets.rg_lru(), dim=64).init_state(batch=1)["parts"]["gated_scan"].shape
    torch.Size([1, 64])
    """
    return Recipe(
        Project("x", u="E", g="E", init="lecun"),
        ShortConv("u", width=conv, act="identity"),
        Project("u", r="E", i="E", bias=True, init="lecun"),
        PowerDecay("r", power=power),
        Multiply("u", by="i", act="sigmoid"),
        Multiply("u", by="k"),
        GatedScan("u"),
        OutputGate("g", act="gelu"),
        Project("y", y="D", init="lecun"),
        axes={"E": f"int({expand}*D)"},
        source="De et al. 2024, arXiv:2402.19427",
    )
