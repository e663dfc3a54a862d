"""DenseRetNet: RetNet whose keys and values also hold those of the layers below."""

from recur.blocks import (
    Act,
    DenseFusion,
    Dropout,
    FixedDecay,
    LowRank,
    Norm,
    OuterScan,
    OutputGate,
    Project,
    RetentionScale,
    Rotary,
    Scale,
)
from recur.recipe import Recipe


def dense_retnet(
    *,
    heads: int | str = "max(4,D//640)",
    layers: int = 1,
    dropout: float = 0.0,
    eps: float = 1e-6,
    scale: tuple[RetentionScale, ...] = (),
) -> Recipe:
    """S_t = a_h S_{t-1} + k_t v_t^T, y_t = norm(S_t^T q_t) * silu(g_t); k <- norm(k + silu(G x) * sum past k), v too.

    One block type, no feed-forward.

    Args:
        heads: H, by default of 320 key and 1280 value channels from D = 2560 on, the published 1.3B model's.
        layers: how many layers below are fused in.
        dropout: of the output.
        eps: of every norm inside.
        scale: (RetentionScale(),) as the released parallel form has it, see `retnet`.

    Source: He et al. 2024, arXiv:2403.00818.

    >>> recur.Mixer(recur.presets.dense_retnet(heads=4), dim=64).init_state(batch=1)["parts"]["outer_scan"].shape
    torch.Size([1, 4, 8, 32])
    """
    return Recipe(
        Project("x", q="H K", k="H K", v="H V", g="H V", init="normal"),
        Act("q k v", "silu"),
        Scale("k", "1/sqrt(K)"),
        Project(
            "x",
            k_gate=LowRank("H K", rank="R", act="silu", init="normal"),
            v_gate=LowRank("H V", rank="R", act="silu", init="normal"),
            init="normal",
        ),
        DenseFusion("k", gate="k_gate", layers=layers, eps=eps),
        DenseFusion("v", gate="v_gate", layers=layers, eps=eps),
        Rotary("q k", inclusive=True),
        FixedDecay(eps=eps),
        *scale,
        OuterScan(),
        Norm("y", over="V", eps="eps"),
        OutputGate("g"),
        Project("y", y="D", init="normal"),
        Dropout("y", dropout),
        axes={"H": heads, "K": "D/2/H", "V": "2*D/H", "R": "max(D//32,1)"},
        source="He et al. 2024, arXiv:2403.00818",
    )
