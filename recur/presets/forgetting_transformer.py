"""The forgetting transformer: softmax attention whose scores a gate per head lets fade."""

from recur.blocks import Decay, ForgettingAttention, Project
from recur.recipe import Frame, Part, Recipe


def forgetting_transformer(
    *,
    heads: int | str = "max(1,D//64)",
    groups: int | str = "H",
    window: int | None = None,
    bias: bool = False,
    norm: tuple[Part, ...] = (),
    leave: tuple[Part, ...] = (),
) -> Recipe:
    """y_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(K) + sum_{s<r<=t} log f_r) v_s, f = sigmoid(W x + b), one per head.

    Args:
        heads: H, by default of 64 channels.
        groups: G, of keys and values; divides H.
        window: how many tokens a query sees; None sees all before it.
        bias: whether the projections of q, k and v have one.
        norm: norms of q and k, none by default.
        leave: the parts between the attention and the last projection.

    Source: Lin et al. 2025, arXiv:2503.02130.

    >>> y, _ = recur.Mixer(recur.presets.forgetting_transformer(), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return Recipe(
        Project("x", q="H K", k="G K", v="G K", bias=bias, name="enter"),
        Project("x", f="H", bias=True, name="forget"),
        *norm,
        Decay("f", out="log_f"), ForgettingAttention(window=window),
        *leave,
        Project("y", y="D", name="leave"),
        axes={"H": heads, "G": groups, "K": "D/H"},
        source="Lin et al. 2025, arXiv:2503.02130",
        frame=Frame(ffn="swiglu"),
    )  # fmt: skip
