"""Feed-forward layers, which are recipes as well."""

from __future__ import annotations

from recur.axes import RecipeError
from recur.blocks.gates import OutputGate
from recur.blocks.glue import Act, Project
from recur.recipe import Recipe


def gelu(*, hidden: str = "4*D", bias: bool = True, init: str = "linear", act: str = "gelu") -> Recipe:
    """y = W2 gelu(W1 x), width 4 D."""
    return Recipe(
        Project("x", h="F", bias=bias, init=init),
        Act("h", act),
        Project("h", y="D", bias=bias, init=init),
        axes={"F": hidden},
    )


def gated(*, hidden: str, bias: bool = False, act: str = "silu", init: str = "linear") -> Recipe:
    """y = W3 (act(W1 x) * W2 x); act "identity" is the bilinear unit.  Shazeer 2020, arXiv:2002.05202."""
    return Recipe(
        Project("x", z="F", h="F", bias=bias, init=init),
        OutputGate("z", act=act, out="h"),
        Project("h", y="D", bias=bias, init=init),
        axes={"F": hidden},
        source="arXiv:2002.05202",
    )


def swiglu(*, hidden: str = "256*ceil(int(8*D/3)/256)", init: str = "linear") -> Recipe:
    """y = W3 (silu(W1 x) * W2 x), width 8 D / 3 rounded up to a multiple of 256."""
    return gated(hidden=hidden, act="silu", init=init)


def feedforward(ffn: Recipe | str | None) -> Recipe | None:
    """The recipe a short name stands for: None, "gelu", "swiglu" or "gated" (GELU gate, width 2 D), or itself."""
    if ffn is None or isinstance(ffn, Recipe):
        return ffn
    named = {"gelu": gelu, "swiglu": swiglu, "gated": lambda: gated(hidden="2*D", act="gelu")}
    if ffn not in named:
        raise RecipeError(f"feedforward: ffn must be None, a Recipe or one of {', '.join(named)}, got {ffn!r}")
    return named[ffn]()
