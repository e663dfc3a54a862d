"""Log-linear attention: a state per level of a binary tree over the past, each read with a weight of its own."""

from recur.blocks import Act, LogLinearScan, Multiply, Norm, OutputGate, Project, ShortConv, StepDecay
from recur.recipe import Recipe


def log_linear_attention(
    *, heads: int | str = "max(4,D//64)", groups: int | str = 1, state: int = 64, levels: int = 16, conv: int = 4
) -> Recipe:
    """y_t = norm(sum_{s<=t} w_t[l(t, s)] exp(sum_{s<r<=t} log a_r) (q_t . k_s) delta_s v_s) * silu(g_t), after Mamba-2.

    l(t, s) is the bit length of (t xor s); w = softplus(W x); log a = -exp(A) delta, delta = softplus(dt + b).

    Args:
        heads: H, by default of 64 channels.
        groups: G, which share q and k; divides H.
        state: K.
        levels: L, which reach 2^(L - 1) tokens.
        conv: taps of the short convolution.

    Source: Guo et al. 2025, arXiv:2506.04761.

    >>> y, _ = recur.Mixer(recur.presets.log_linear_attention(), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return Recipe(
        Project("x", q="G K", k="G K", v="H V", g="H V", dt="H", w="H L"),
        ShortConv("q k v", width=conv),
        StepDecay(), Multiply("v", by="delta"), Act("w", "softplus"),
        LogLinearScan(),
        Norm("y", over="V"), OutputGate("g"),
        Project("y", y="D"),
        axes={"H": heads, "G": groups, "K": state, "V": "D/H", "L": levels},
        source="Guo et al. 2025, arXiv:2506.04761",
    )  # fmt: skip
