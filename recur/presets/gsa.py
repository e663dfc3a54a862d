"""Gated slot attention: softmax attention over a fixed number of slots, filled and emptied by gates."""

from recur.blocks import Act, Decay, Norm, Project, SlotScan
from recur.recipe import Frame, Recipe


def gsa(
    *, heads: int | str = "max(4,D//256)", slots: int | str = 64, groups: int | str = "H", tau: float = 8.0
) -> Recipe:
    """P = P diag(a) + k s^T, R = diag(a) R + s v^T, y_t = norm(silu(R_t^T softmax(P_t^T q_t))); s = 1 - a.

    log a = log sigmoid(z) / tau, one gate per slot.

    Args:
        heads: H, by default of 256 channels.
        slots: M per head.
        groups: G, of keys and values; divides H.
        tau: divides the log decay at first: the larger, the slower a new gate forgets.

    Source: Zhang et al. 2024, arXiv:2409.07146.

    >>> y, _ = recur.Mixer(recur.presets.gsa(), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return Recipe(
        Project("x", q="H K", k="G K", v="G V", z="G M", name="enter"),
        Act("q k v"),
        Decay("z", tau=tau), SlotScan(write=None),
        Act("y"), Norm("y", over="H V"),
        Project("y", y="D", name="leave"),
        axes={"H": heads, "G": groups, "K": "D/H", "V": "D/H", "M": slots},
        source="Zhang et al. 2024, arXiv:2409.07146",
        frame=Frame(ffn="swiglu"),
    )  # fmt: skip
