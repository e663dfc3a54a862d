"""DeltaProduct: several delta writes per token, whose transitions multiply to any rotation; with a gate or without."""

from recur.blocks import Act, DeltaScan, Norm, OutputGate, Project, ShortConv, StepDecay
from recur.presets.delta_net import REFLECTING, smooth_unit
from recur.recipe import Frame, Part, Recipe

CONV = ShortConv("q k v", bias=False)
LEAVE = (Project("x", g="H V", name="gate"), Norm("y", over="V", name="read_norm"), OutputGate("g"))


def delta_product(
    *,
    writes: int = 2,
    heads: int | str = "max(4,D//256)",
    groups: int | str = "H",
    key: int | str = "D//H",
    value: int | str = "2*K",
    enter: Part = CONV,
    reach: tuple[Part, ...] = REFLECTING,
    leave: tuple[Part, ...] = LEAVE,
) -> Recipe:
    """S_m = S_{m-1} + beta_m k_m (v_m - S_{m-1}^T k_m)^T for m = 1 .. M, y_t = norm(S_M^T q_t / sqrt(K)) * silu(g_t).

    Args:
        writes: M per token.
        heads: H, of values.
        groups: G, of keys; divides H.
        key: K, key channels per head.
        value: V, value channels per head.
        enter: the part that q, k and v pass through, by default a short convolution.
        reach: parts that change beta; by default it reaches (0, 2), so that eigenvalues reach -1.
        leave: the parts between the scan and the last projection.

    Source: Siems et al. 2025, arXiv:2502.10297.

    >>> y, _ = recur.Mixer(recur.presets.delta_product(), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return Recipe(
        Project("x", q="G K", k="M G K", v="M H V", beta="M H", name="enter"),
        enter,
        Act("beta", "sigmoid"), *reach,
        *smooth_unit("q", "k"),
        DeltaScan(decay=None, scale="1/sqrt(K)"),
        *leave,
        Project("y", y="D", name="leave"),
        axes={"M": writes, "H": heads, "G": groups, "K": key, "V": value},
        source="Siems et al. 2025, arXiv:2502.10297",
        frame=Frame(ffn="swiglu"),
    )  # fmt: skip


def gated_delta_product(
    *,
    writes: int = 2,
    heads: int | str = "max(4,D//256)",
    groups: int | str = "H",
    key: int | str = "D//H",
    value: int | str = "2*K",
    enter: Part = CONV,
    reach: tuple[Part, ...] = REFLECTING,
    leave: tuple[Part, ...] = LEAVE,
) -> Recipe:
    """S_0 = a_t S_{t-1}, S_m = S_{m-1} + beta_m k_m (v_m - S_{m-1}^T k_m)^T for m = 1 .. M, y = norm(S_M^T q) silu(g).

    `delta_product` with a decay before the first write, log a = -exp(A) softplus(dt + b).

    Args:
        writes: M per token.
        heads: H, of values.
        groups: as in `delta_product`.
        key: as in `delta_product`.
        value: as in `delta_product`.
        enter: as in `delta_product`.
        reach: as in `delta_product`.
        leave: as in `delta_product`.

    Source: Siems et al. 2025, arXiv:2502.10297.

    >>> y, _ = recur.Mixer(recur.presets.gated_delta_product(), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    plain = delta_product(
        writes=writes, heads=heads, groups=groups, key=key, value=value, enter=enter, reach=reach, leave=leave
    )
    decay = (Project("x", dt="H", name="decay"), StepDecay(rates=(0.0, 16.0)))
    return plain.replace(DeltaScan, *decay, DeltaScan(scale="1/sqrt(K)"))
