"""Gated DeltaNet-2: what is erased and what is written have gates of their own, per key and per value channel."""

from recur.blocks import Act, LowRank, Multiply, Norm, OutputGate, Project, Repeat, ShortConv, StepDecay, WideScan
from recur.presets.delta_net import smooth_unit
from recur.recipe import Frame, Part, Recipe

CONV = ShortConv("q k v", bias=False)


def gated_delta_net2(
    *,
    heads: int | str = "max(4,D//128)",
    groups: int | str = "H",
    key: int | str = "D//H",
    value: int | str = "K",
    enter: Part = CONV,
    reach: tuple[Part, ...] = (),
    eps: float = 1e-5,
) -> Recipe:
    """S' = diag(a_t) S_{t-1}, S_t = S' + k_t (w_t * v_t - S'^T (b_t * k_t))^T, y_t = norm(S_t^T q_t) * sigmoid(g_t).

    b = sigmoid(z) per key channel erases, w = sigmoid(z) per value channel writes; log a = -exp(A) softplus(dt + b).

    Args:
        heads: H, of values.
        groups: G, of keys; divides H.
        key: K, key channels per head.
        value: V, value channels per head.
        enter: the part that q, k and v pass through, by default a short convolution.
        reach: (Scale("b", "2"),) takes the erase gate b to (0, 2), so that eigenvalues reach -1.
        eps: of the norm of y.

    Source: arXiv:2605.22791.

    >>> y, _ = recur.Mixer(recur.presets.gated_delta_net2(), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return Recipe(
        Project("x", q="G K", k="G K", v="H V", b="G K", w="H V", name="enter"),
        Project("x", g=LowRank("H V", rank="V", bias=True), dt=LowRank("G K", rank="V"), name="gates"),
        enter,
        Act("b w", "sigmoid"), *reach, StepDecay(),
        *smooth_unit("q", "k"),
        Multiply("k", by="b", to="e"), Repeat("log_a", "H"),
        WideScan(erase="e", write="w", scale="1/sqrt(K)"),
        Norm("y", over="V", eps=eps, name="read_norm"), OutputGate("g", act="sigmoid"),
        Project("y", y="D", name="leave"),
        axes={"H": heads, "G": groups, "K": key, "V": value},
        source="arXiv:2605.22791",
        frame=Frame(ffn="swiglu"),
    )  # fmt: skip
