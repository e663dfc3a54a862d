"""HGRN2: a gated RNN whose state is expanded by an outer product, with nothing added to learn."""

from recur.blocks import Act, BoundedDecay, LowerBounds, Norm, OuterScan, Project
from recur.recipe import Recipe

HEADS_TOGETHER = Norm("y", eps=1e-6, affine="none")


def hgrn2(
    *,
    heads: int = 8,
    bias: bool = False,
    value_act: str = "identity",
    read_act: str = "silu",
    norm: Norm = HEADS_TOGETHER,
) -> Recipe:
    """S_t = diag(a_t) S_{t-1} + (1 - a_t) v_t^T, y_t = S_t^T q_t; a = g + (1 - g) sigmoid(z), g rising with depth.

    The forget gate is also the key, and the output gate is the query; each head keeps a square state, D / heads wide.

    Args: heads: H; bias: of all projections; value_act, read_act: activations of v and q; norm: of all heads together.
    Source: Qin et al. 2024, arXiv:2404.07904.
    """
    return Recipe(
        Project("x", v="H K", q="H K", z="H K", bias=bias, init="normal"),
        Act("v", value_act),
        Act("q", read_act),
        LowerBounds("H K"),
        BoundedDecay("z"),
        OuterScan(),
        norm,
        Project("y", y="D", bias=bias, init="normal"),
        axes={"H": heads, "K": "D/H"},
        source="Qin et al. 2024, arXiv:2404.07904",
    )
