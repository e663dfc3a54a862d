"""Feed-forward layers, which are recipes as well."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from recur.axes import RecipeError
from recur.blocks.gates import OutputGate
from recur.blocks.glue import Act, Multiply, Project, TokenShift
from recur.recipe import Recipe

SHARE = "1-(i/D)**(1-layer/depth)"  # of the token before: more for early channels, less in every deeper layer


def gelu(*, hidden: str = "4*D", bias: bool = True, init: str = "linear", act: str = "gelu") -> Recipe:
    """y = W2 gelu(W1 x), width 4 D."""
    return Recipe(
        Project("x", h="F", bias=bias, init=init),
        Act("h", act),
        Project("h", y="D", bias=bias, init=init),
        axes={"F": hidden},
    )


def gated(
    *, hidden: str, bias: bool = False, act: str = "silu", init: str = "linear", out_init: str | None = None
) -> Recipe:
    """y = W3 (act(W1 x) * W2 x); act "identity" is the bilinear unit.  Shazeer 2020, arXiv:2002.05202."""
    return Recipe(
        Project("x", z="F", h="F", bias=bias, init=init),
        Multiply("h", by="z", act=act),
        Project("h", y="D", bias=bias, init=out_init or init),
        axes={"F": hidden},
        source="arXiv:2002.05202",
    )


def swiglu(*, hidden: str = "256*ceil(int(8*D/3)/256)", init: str = "linear", out_init: str | None = None) -> Recipe:
    """y = W3 (silu(W1 x) * W2 x), width 8 D / 3 rounded up to a multiple of 256."""
    return gated(hidden=hidden, act="silu", init=init, out_init=out_init)


def channel_mix(*, hidden: str = "3*D", bias: bool = False) -> Recipe:
    """y_t = sigmoid(W_r r_t) * W_v relu(W_k k_t)^2, k and r being x mixed with the token before: RWKV's, with state.

    Source: Peng et al. 2023, arXiv:2305.13048.
    """
    return Recipe(
        TokenShift("x", to="xk xr", init=(SHARE,)),
        Project("xk", h="F", bias=bias, init="normal"),
        Act("h", "relu2"),
        Project("h", y="D", bias=bias, init="normal"),
        Project("xr", r="D", bias=bias, init="normal"),
        OutputGate("r", act="sigmoid"),
        axes={"F": hidden},
        source="arXiv:2305.13048",
    )


def key_mix(*, hidden: str = "4*D") -> Recipe:
    """y_t = W_v relu(W_k k_t)^2, k being x mixed with the token before: RWKV-7's channel mix, with state.

    Source: Peng et al. 2025, arXiv:2503.14456.
    """
    return Recipe(
        TokenShift("x", to="xk", init=("1-(i/D)**((1-layer/depth)**4)",)),
        Project("xk", h="F", init="orthogonal"),
        Act("h", "relu2"),
        Project("h", y="D", init="zeros"),
        axes={"F": hidden},
        source="arXiv:2503.14456",
    )


def feedforward(ffn: Recipe | str | None) -> Recipe | None:
    """A recipe, or the one a name stands for: "gelu", "swiglu", "gated" (GELU gate, width 2 D), "channel_mix",
    "key_mix".
    """
    if ffn is None or isinstance(ffn, Recipe):
        return ffn
    wide = partial(gated, hidden="2*D", act="gelu")
    named: dict[str, Callable[[], Recipe]] = {"gelu": gelu, "swiglu": swiglu, "gated": wide}
    named |= {"channel_mix": channel_mix, "key_mix": key_mix}
    if ffn not in named:
        raise RecipeError(f"feedforward: ffn must be None, a Recipe or one of {', '.join(named)}, got {ffn!r}")
    return named[ffn]()
