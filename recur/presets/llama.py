"""LLaMA: softmax attention with rotated queries and keys, the model that recurrences are compared with."""

from recur.blocks import Attention, Project, Rotary
from recur.recipe import Frame, Recipe


def llama(*, heads: int | str = "max(8,D//128)", bias: bool = False) -> Recipe:
    """y_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(K)) v_s, q and k rotated by their positions.

    Args:
        heads: H, by default of 128 channels from D = 1024 on, as published.
        bias: of all projections.

    Source: Touvron et al. 2023, arXiv:2302.13971.

    >>> y, _ = recur.Mixer(recur.presets.llama(heads=4), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return Recipe(
        Project("x", q="H K", k="H K", v="H K", bias=bias, init="normal"),
        Rotary("q k", layout="half"),
        Attention(),
        Project("y", y="D", bias=bias, init="normal_residual"),
        axes={"H": heads, "K": "D/H"},
        source="Touvron et al. 2023, arXiv:2302.13971",
        frame=Frame(ffn="swiglu"),
    )
