"""Diagonal plus low rank: any erase key and any removal key, beside a decay per key channel."""

from recur.blocks import Act, Decay, LowRank, Multiply, Norm, OutputGate, Project, WideScan
from recur.presets.delta_net import smooth_unit
from recur.recipe import Recipe


def dplr(*, heads: int | str = "max(4,D//128)", rank: int | str = 16, tau: float = 16.0) -> Recipe:
    """S_t = (diag(a_t) - b_t e_t^T) S_{t-1} + k_t v_t^T, y_t = norm(S_t^T q_t / sqrt(K)) * silu(g_t).

    |e| = 1 and b = r * e with r = sigmoid(z) per channel, which keeps what is removed no larger than what is there;
    log a = log sigmoid(z) / tau. Another b is an edit: any parts that write b [H K].

    Args:
        heads: H.
        rank: R, of the low-rank projections of the two gates.
        tau: divides the log decay at first: the larger, the slower a new gate forgets.

    Source: the form that RWKV-7 (Peng et al. 2025, arXiv:2503.14456) and others share.

    >>> y, _ = recur.Mixer(recur.presets.dplr(), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return Recipe(
        Project("x", q="H K", k="H K", e="H K", v="H V", g="H V"),
        Project("x", z=LowRank("H K", rank="R", bias=True), r=LowRank("H K", rank="R", bias=True)),
        Decay("z", tau=tau), Act("r", "sigmoid"),
        *smooth_unit("e"), Multiply("e", by="r", to="b"),
        WideScan(erase="e", erase_from="previous", remove="b", scale="1/sqrt(K)"),
        Norm("y", over="V"), OutputGate("g"),
        Project("y", y="D"),
        axes={"H": heads, "K": "D/H", "V": "D/H", "R": rank},
        source="Peng et al. 2025, arXiv:2503.14456",
    )  # fmt: skip
