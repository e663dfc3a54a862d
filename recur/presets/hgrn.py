"""HGRN: gated recurrences whose forget gates have a floor that rises with depth; real, or rotated by fixed angles."""

from collections.abc import Callable
from dataclasses import replace

from recur.blocks import (
    Act,
    BoundedDecay,
    Complex,
    GatedScan,
    LowerBounds,
    LowRank,
    Multiply,
    Norm,
    OutputGate,
    Phase,
    Project,
    RealImag,
    one_way,
)
from recur.recipe import Frame, Part, Recipe

NORM_THEN_GATE = (Norm("y", kind="layer"), OutputGate("g"))


def hgrn(
    *,
    expand: int = 1,
    bias: bool = False,
    init: str = "normal",
    act: str = "silu",
    bounds: str = "skip_first",
    scan: Callable[..., tuple[Part, ...]] = one_way,
    leave: tuple[Part, ...] = NORM_THEN_GATE,
) -> Recipe:
    """h_t = a_t * h_{t-1} + (1 - a_t) * silu(i_t), y_t = norm(h_t) * silu(g_t); a = b + (1 - b) sigmoid(z).

    Args:
        expand: inner width over D.
        bias: of all projections.
        init: law of the first weights of all projections.
        act: of the input.
        bounds: law of LowerBounds.
        scan: which way it reads: one_way, both_ways or in_grid of recur.blocks.
        leave: how y leaves, before the last projection.

    Source: Qin et al. 2023, arXiv:2311.04823, without its angles.

    >>> recur.Mixer(recur.presets.hgrn(), dim=64).init_state(batch=1)["parts"]["gated_scan"].shape
    torch.Size([1, 64])
    """
    return Recipe(
        Project("x", i="E", g="E", z="E", bias=bias, init=init),
        Act("i", act),
        LowerBounds("E", law=bounds),
        BoundedDecay("z"),
        Multiply("i", by="k"),
        *scan(GatedScan("i")),
        *leave,
        Project("y", y="D", bias=bias, init=init),
        axes={"E": f"{expand}*D"},
        source="Qin et al. 2023, arXiv:2311.04823",
        frame=Frame(ffn="swiglu"),
    )


def hgrn_complex(
    *,
    bias: bool = False,
    init: str = "linear",
    rank: int | None = None,
    act: str = "silu",
    bounds: str = "skip_last",
    phases: tuple[str, ...] = ("turn",),
    scan: Callable[..., tuple[Part, ...]] = one_way,
    leave: tuple[Part, ...] = NORM_THEN_GATE,
) -> Recipe:
    """h_t = a_t e^(i theta) * h_{t-1} + (1 - a_t) * c_t, y_t = norm([Re h_t, Im h_t]) * silu(g_t); theta [D] learned.

    Args:
        bias: of all projections.
        init: law of the first weights of all projections.
        rank: of the projections of both gates, full when omitted.
        act: of the input.
        bounds: law of LowerBounds.
        phases: one theta for all scans, or a second for the backward scan, ("turn", "turn_back").
        scan: which way it reads: one_way, both_ways or in_grid of recur.blocks.
        leave: how y leaves, before the last projection.

    Source: Qin et al. 2023, arXiv:2311.04823.

    >>> recur.Mixer(recur.presets.hgrn_complex(), dim=64).init_state(batch=1)["parts"]["gated_scan"].shape
    torch.Size([1, 64])
    """
    gates = {"z": "D", "g": "2 D"}
    low = {name: LowRank(axes, rank=str(rank), bias=bias, init=init) for name, axes in gates.items()}
    return Recipe(
        Project("x", c="D 2", bias=bias, init=init, **(low if rank else gates)),
        Act("c", act),
        LowerBounds("D", law=bounds),
        BoundedDecay("z", out="log_f"),
        Complex("c"),
        Multiply("c", by="k"),
        *(Phase("log_f", out=name) for name in phases),
        *scan(*(GatedScan("c", decay=name, rotates=True) for name in phases)),
        RealImag("y"),
        *leave,
        Project("y", y="D", bias=bias, init=init),
        source="Qin et al. 2023, arXiv:2311.04823",
    )


def without_bounds(recipe: Recipe) -> Recipe:
    """The ablation: forget gates that may fall to 0 in every layer."""
    (gate,) = (part for part in recipe.parts if isinstance(part, BoundedDecay))
    return recipe.replace(BoundedDecay, replace(gate, bound=None)).remove(LowerBounds)
