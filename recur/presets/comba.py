"""Comba: a delta rule in a closed loop, whose state is corrected by one key and whose query by the same."""

from recur.blocks import Act, FeedbackKey, Multiply, Norm, OutputGate, Project, Repeat, ShortConv, StepDecay, WideScan
from recur.presets.delta_net import smooth_unit
from recur.recipe import Frame, Part, Recipe

CONV = ShortConv("q k v", bias=False)
FEEDBACK = FeedbackKey()
GATED = (Project("x", g="H V", name="gate"), Norm("y", over="V", name="read_norm"), OutputGate("g", act="sigmoid"))


def comba(
    *,
    heads: int | str = "max(4,D//256)",
    groups: int | str = "H",
    key: int | str = "D//H",
    value: int | str = "2*K",
    enter: Part = CONV,
    feedback: FeedbackKey = FEEDBACK,
    leave: tuple[Part, ...] = GATED,
) -> Recipe:
    """S_t = a_t S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T, y_t = norm(S_t^T q_t / sqrt(K)) * sigmoid(g_t).

    p = sigmoid(d) k and q <- q - D p before q, k and p are made vectors of length 1; log a = -exp(A) softplus(dt + b).
    The error is read in the state before the decay, as in the published kernels.

    Args:
        heads: H, of values.
        groups: G, of keys; divides H.
        key: K, key channels per head.
        value: V, value channels per head.
        enter: the part that q, k and v pass through, by default a short convolution.
        feedback: makes p, and takes its share off the query.
        leave: the parts between the scan and the last projection.

    Source: Hu et al. 2025, arXiv:2506.02475.

    >>> y, _ = recur.Mixer(recur.presets.comba(), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return Recipe(
        Project("x", q="G K", k="G K", v="H V", beta="H", dt="H", name="enter"),
        enter, feedback,
        Act("beta", "sigmoid"), StepDecay(rates=(0.0, 16.0)),
        *smooth_unit("q", "k", "p"),
        Repeat("p", "H"), Multiply("p", by="beta", to="e"),
        WideScan(erase="e", erase_from="previous", write="beta", scale="1/sqrt(K)"),
        *leave,
        Project("y", y="D", name="leave"),
        axes={"H": heads, "G": groups, "K": key, "V": value},
        source="Hu et al. 2025, arXiv:2506.02475",
        frame=Frame(ffn="swiglu"),
    )  # fmt: skip
