"""A delta rule whose errors gather momentum before they reach the state."""

from recur.blocks import Act, Decay, MomentumScan, Norm, OutputGate, Project, ShortConv
from recur.presets.delta_net import smooth_unit
from recur.recipe import Frame, Recipe


def momentum_delta_net(*, heads: int | str = "max(4,D//128)", conv: int = 4) -> Recipe:
    """M_t = m_t M - eta_t k_t (v_t - S_{t-1}^T k_t)^T, S_t = a_t S_{t-1} - beta_t M_t, y_t = norm(S_t^T q_t) * silu(g).

    a and m are sigmoids of z and u, beta and eta of their own, all per head.

    Args:
        heads: H, by default of 128 channels.
        conv: taps of the short convolution.

    Source: the rule of released code (flash-linear-attention) in the layer of Yang et al. 2024, arXiv:2412.06464.

    >>> y, _ = recur.Mixer(recur.presets.momentum_delta_net(), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return Recipe(
        Project("x", q="H K", k="H K", v="H V", g="H V"),
        Project("x", z="H", u="H", beta="H", eta="H", bias=True),
        ShortConv("q k v", width=conv, bias=False),
        Decay("z"), Decay("u", out="log_m"), Act("beta eta", "sigmoid"),
        *smooth_unit("q", "k"),
        MomentumScan(p="k", scale="1/sqrt(K)"),
        Norm("y", over="V"), OutputGate("g"),
        Project("y", y="D"),
        axes={"H": heads, "K": "D/H", "V": "D/H"},
        source="flash-linear-attention, in the layer of Yang et al. 2024, arXiv:2412.06464",
        frame=Frame(ffn="swiglu"),
    )  # fmt: skip
