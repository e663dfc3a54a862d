"""RWKV: tokens mixed with the one before, and a constant decay per head that the current token is exempt from."""

from recur.blocks import Act, Learned, Norm, OuterScan, OutputGate, Project, TokenShift
from recur.blocks.feedforward import SHARE
from recur.recipe import Frame, Recipe

SHARE_OF_VALUES = f"{SHARE}-0.3*layer/max(depth-1,1)"
SHARE_OF_GATES = "1-(i/D)**((1-layer/depth)/2)"
DECAY = "-6+5*(i/max(H-1,1))**(0.7+1.3*layer/max(depth-1,1))"
BONUS = "layer/max(depth-1,1)*(1-i/max(H-1,1))"


def rwkv(*, heads: int | str = "max(8,D//64)", bias: bool = False, eps: float = 64e-5) -> Recipe:
    """S_t = a_h S_{t-1} + k_t v_t^T, y_t = norm((S_{t-1} + b_h k_t v_t^T)^T r_t) * silu(g_t); a_h = exp(-exp(w_h)).

    RWKV-5.1a: one decay and one bonus per head, learned and the same at every token; every input is mixed with the
    token before.

    Args:
        heads: H, by default of 64 channels, as published.
        bias: of all projections.
        eps: of the head norm.

    Source: Peng et al. 2024, arXiv:2404.05892, before its heads became key-wise.

    >>> recur.Mixer(recur.presets.rwkv(heads=4), dim=64).init_state(batch=1)["parts"]["outer_scan"].shape
    torch.Size([1, 4, 16, 16])
    """
    return Recipe(
        TokenShift("x", to="xk xv xr xg", init=(SHARE, SHARE_OF_VALUES, SHARE_OF_GATES, SHARE_OF_GATES)),
        Project("xr", r="H K", bias=bias, init="normal"),
        Project("xk", k="H K", bias=bias, init="normal"),
        Project("xv", v="H K", bias=bias, init="normal"),
        Project("xg", g="H K", bias=bias, init="normal"),
        Learned("log_a", "H", init=DECAY, name="decay"),
        Act("log_a", "-exp"),
        Learned("bonus", "H", init=BONUS, name="bonus"),
        OuterScan(q="r", bonus="bonus"),
        Norm("y", kind="layer", groups="H", eps=eps),
        OutputGate("g"),
        Project("y", y="D", bias=bias, init="normal_residual"),
        axes={"H": heads, "K": "D/H"},
        source="Peng et al. 2024, arXiv:2404.05892",
        frame=Frame(ffn="channel_mix", norm="layer"),
    )
