"""Mamba-2: a selective state space with one decay per head, shared by the matrix products."""

from typing import Any

from recur.blocks import Multiply, Norm, OuterScan, OutputGate, Project, ShortConv, Skip, StepDecay
from recur.recipe import Part, Recipe

GATE_THEN_NORM = (OutputGate("z"), Norm("y", groups="G"))


def mamba2(
    *,
    state: int = 128,
    expand: int = 2,
    inner: int | str | None = None,
    head: int = 64,
    groups: int = 1,
    conv: int = 4,
    conv_bias: bool = True,
    bias: bool = False,
    limit: tuple[float, float] | None = None,
    rates: tuple[float, float] = (1.0, 16.0),
    skip: str = "H",
    leave: tuple[Part, ...] = GATE_THEN_NORM,
) -> Recipe:
    """S_t = a_t S_{t-1} + B_t (delta_t u_t)^T, y_t = norm((S_t^T C_t + D u_t) * silu(z_t)); a = exp(-exp(A) delta).

    delta = softplus(dt + b), one per head.

    Args:
        state: N, key channels per head.
        expand: inner width over D.
        inner: the inner width itself, in place of expand.
        head: P, value channels per head.
        groups: G; the heads of one group share B and C.
        conv: taps of the short convolution over u, B and C.
        conv_bias: whether the short convolution has a bias.
        bias: of all projections.
        limit: least and greatest delta.
        rates: exp(A) starts uniform between these.
        skip: axes of D, "H" or "H P".
        leave: how y leaves, before the last projection.

    Source: Dao & Gu 2024, arXiv:2405.21060.

    >>> recur.Mixer(recur.presets.mamba2(), dim=64).init_state(batch=1)["parts"]["outer_scan"].shape
    torch.Size([1, 2, 128, 64])
    """
    return Recipe(
        Project("x", z="H P", u="H P", B="G N", C="G N", dt="H", bias=bias, init="linear_zero", name="enter"),
        ShortConv("u B C", width=conv, bias=conv_bias),
        StepDecay(limit=limit, rates=rates),
        Multiply("u", by="delta", to="v"),
        OuterScan(q="C", k="B"),
        Skip("u", over=skip),
        *leave,
        Project("y", y="D", bias=bias, init="residual", name="leave"),
        axes={"E": inner or f"{expand}*D", "P": head, "H": "E/P", "G": groups, "N": state},
        source="Dao & Gu 2024, arXiv:2405.21060",
    )


def mamba2_mlp(*, mlp: int | str = "D", bias: bool = False, **options: Any) -> Recipe:
    """Mamba-2 beside a gated unit of the same token: its last projection reads [silu(g) * m, y].

    Args:
        mlp: width of g and m.
        bias: of all projections.
        options: those of `mamba2`.

    Source: the released code of Dao & Gu 2024, arXiv:2405.21060.

    >>> recur.Mixer(recur.presets.mamba2_mlp(), dim=64).init_state(batch=1)["parts"]["outer_scan"].shape
    torch.Size([1, 2, 128, 64])
    """
    alone = mamba2(bias=bias, **options)
    enter = Project(
        "x", g="M", m="M", z="H P", u="H P", B="G N", C="G N", dt="H", bias=bias, init="linear_zero", name="enter"
    )
    leave = Project("m y", y="D", bias=bias, init="residual", name="leave")
    parts = (enter, *alone.parts[1:-1], Multiply("m", by="g", act="silu"), leave)
    return alone.like(*parts, axes={**alone.axes, "M": mlp})
