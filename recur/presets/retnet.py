"""RetNet: attention with rotation and a constant decay in place of softmax."""

from recur.blocks import FixedDecay, Norm, OuterScan, OutputGate, Project, RetentionScale, Rotary, Scale
from recur.recipe import Frame, Recipe


def retnet(
    *,
    heads: int | str = "max(4,D//256)",
    value: int | str = "2*D",
    eps: float = 1e-6,
    scale: tuple[RetentionScale, ...] = (),
) -> Recipe:
    """S_t = a_h S_{t-1} + k_t v_t^T, y_t = norm(S_t^T q_t) * silu(g_t); a_h = 1 - 2^(-5-h), q and k rotated.

    Args:
        heads: H, by default of 256 key and 512 value channels, as published.
        value: width of all values together.
        eps: of the head norm, before its scale is divided out.
        scale: (RetentionScale(),) divides by the scores as the published parallel form does before that norm, and
            (RetentionScale(chunk=512),) as the chunkwise one; both change y in its fifth digit, and do not stream.

    Source: Sun et al. 2023, arXiv:2307.08621.

    >>> recur.Mixer(recur.presets.retnet(heads=4), dim=64).init_state(batch=1)["parts"]["outer_scan"].shape
    torch.Size([1, 4, 16, 32])
    """
    return Recipe(
        Project("x", q="H K", k="H K", v="H V", g="H V", init="normal"),
        Scale("k", "1/sqrt(K)"),
        Rotary("q k", inclusive=True),
        FixedDecay(eps=eps),
        *scale,
        OuterScan(),
        Norm("y", over="V", eps="eps", affine="none"),
        OutputGate("g"),
        Project("y", y="D", init="normal"),
        axes={"H": heads, "K": "D/H", "E": value, "V": "E/H"},
        source="Sun et al. 2023, arXiv:2307.08621",
        frame=Frame(ffn="swiglu"),
    )
