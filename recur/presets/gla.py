"""GLA: linear attention with a data-dependent decay for every key channel."""

from recur.blocks import Decay, LowRank, Norm, OuterScan, OutputGate, Project, Scale
from recur.recipe import Frame, Recipe


def gla(*, heads: int | str = "max(4,D//256)", rank: int = 16, tau: float = 16.0) -> Recipe:
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, y_t = norm(S_t^T q_t) * silu(g_t); log a = log sigmoid(z) / tau.

    Args:
        heads: H, by default of 128 key and 256 value channels, the published 340M model's.
        rank: of the gate's projection.
        tau: the larger, the slower a new gate forgets.

    Source: Yang et al. 2023, arXiv:2312.06635.

    >>> recur.Mixer(recur.presets.gla(heads=4), dim=64).init_state(batch=1)["parts"]["outer_scan"].shape
    torch.Size([1, 4, 8, 16])
    """
    return Recipe(
        Project("x", q="H K", k="H K", init="xavier"),
        Project("x", v="H V", init="normal"),
        Project("x", z=LowRank("H K", rank="R", bias=True, init="xavier"), init="xavier"),
        Project("x", g="H V", bias=True, init="normal"),
        Decay("z", tau=tau),
        Scale("k", "1/sqrt(V)"),
        OuterScan(scale="1/sqrt(K)"),
        Norm("y", kind="layer", over="V", affine="none"),
        OutputGate("g"),
        Project("y", y="D", init="normal"),
        axes={"H": heads, "K": "D/2/H", "V": "D/H", "R": rank},
        source="Yang et al. 2023, arXiv:2312.06635",
        frame=Frame(ffn="swiglu"),
    )
