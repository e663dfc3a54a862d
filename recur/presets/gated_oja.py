"""Gated Oja: a delta rule of transposed roles, whose values are directions and whose keys are what they stand for."""

from recur.blocks import Act, Norm, OjaScan, OutputGate, Project, ShortConv, StepDecay
from recur.recipe import Frame, Recipe


def gated_oja(*, heads: int | str = "max(4,D//128)", conv: int = 4) -> Recipe:
    """S' = S_{t-1} diag(a_t), S_t = S' + beta_t (k_t - S' v_t) v_t^T, y_t = norm(S_t^T q_t) * silu(g_t); |v| = 1.

    log a = -exp(A) softplus(dt + b), one per value channel.

    Args:
        heads: H, by default of 128 channels.
        conv: taps of the short convolution.

    Source: Oja 1982, doi:10.1007/BF00275687; the layer is that of Yang et al. 2024, arXiv:2412.06464.

    >>> y, _ = recur.Mixer(recur.presets.gated_oja(), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return Recipe(
        Project("x", q="H K", k="H K", v="H V", beta="H", dt="H V", g="H V"),
        ShortConv("q k v", width=conv, bias=False),
        Act("beta", "sigmoid"), StepDecay(),
        Norm("v", kind="smooth_unit", over="V", eps=1e-6, affine="none"),
        OjaScan(scale="1/sqrt(K)"),
        Norm("y", over="V"), OutputGate("g"),
        Project("y", y="D"),
        axes={"H": heads, "K": "D/H", "V": "D/H"},
        source="Oja 1982, in the layer of Yang et al. 2024, arXiv:2412.06464",
        frame=Frame(ffn="swiglu"),
    )  # fmt: skip
