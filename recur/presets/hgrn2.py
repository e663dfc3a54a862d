"""HGRN2: a gated RNN whose state is expanded by an outer product, without further parameters."""

from collections.abc import Callable

from recur.blocks import Act, BoundedDecay, LowerBounds, Norm, OuterScan, Project, one_way
from recur.recipe import Frame, Part, Recipe

HEADS_TOGETHER = (Norm("y", eps=1e-6, affine="none"),)


def hgrn2(
    *,
    heads: int | str = "max(8,D//128)",
    bias: bool = False,
    init: str = "normal",
    value_act: str = "identity",
    read_act: str = "silu",
    scale: float | str = 1.0,
    bounds: str = "skip_first",
    scan: Callable[..., tuple[Part, ...]] = one_way,
    norm: tuple[Norm, ...] = HEADS_TOGETHER,
) -> Recipe:
    """S_t = diag(a_t) S_{t-1} + (1 - a_t) v_t^T, y_t = S_t^T q_t; a = g + (1 - g) sigmoid(z), g rising with depth.

    The forget gate is also the key, and the output gate is the query; each head keeps a square state, D / heads wide.

    Args:
        heads: H, by default an expansion by 128 from D = 1024 on, as published; "D/e" for an expansion by e.
        bias: of all projections.
        init: law of the first weights of all projections.
        value_act: activation of v.
        read_act: activation of q.
        scale: of the read-out.
        bounds: law of LowerBounds.
        scan: which way it reads: one_way, both_ways or in_grid of recur.blocks; for series see recur.blocks.in_series.
        norm: of all heads together, or none, ().

    Source: Qin et al. 2024, arXiv:2404.07904.

    >>> recur.Mixer(recur.presets.hgrn2(heads=4), dim=64).init_state(batch=1)["parts"]["outer_scan"].shape
    torch.Size([1, 4, 16, 16])
    """
    return Recipe(
        Project("x", v="H K", q="H K", z="H K", bias=bias, init=init),
        Act("v", value_act),
        Act("q", read_act),
        LowerBounds("H K", law=bounds),
        BoundedDecay("z"),
        *scan(OuterScan(scale=scale)),
        *norm,
        Project("y", y="D", bias=bias, init=init),
        axes={"H": heads, "K": "D/H"},
        source="Qin et al. 2024, arXiv:2404.07904",
        frame=Frame(ffn="swiglu"),
    )
