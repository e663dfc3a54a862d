"""Linear attention: softmax replaced by a positive feature of queries and keys."""

from recur.blocks import Act, AppendOne, DivideByLast, OuterScan, Project
from recur.recipe import Recipe


def linear_attention(*, heads: int | str = "max(4,D//32)", feature: str = "1+elu", eps: float = 1e-6) -> Recipe:
    """S_t = S_{t-1} + k_t v_t^T, n_t = n_{t-1} + k_t, y_t = S_t^T q_t / max(n_t . q_t, eps); q, k = 1 + elu(W x).

    Args:
        heads: H, by default of 32 channels, as published.
        feature: activation of q and k.
        eps: the least to divide by.

    Source: Katharopoulos et al. 2020, arXiv:2006.16236.

    >>> recur.Mixer(recur.presets.linear_attention(heads=4), dim=64).init_state(batch=1)["parts"]["outer_scan"].shape
    torch.Size([1, 4, 16, 17])
    """
    return Recipe(
        Project("x", q="H K", k="H K", v="H K"),
        Act("q k", feature),
        AppendOne("v"),
        OuterScan(decay=None),
        DivideByLast(floor=eps),
        Project("y", y="D"),
        axes={"H": heads, "K": "D/H"},
        source="Katharopoulos et al. 2020, arXiv:2006.16236",
    )
