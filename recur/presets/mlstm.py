"""mLSTM: a matrix memory with exponential input gates."""

from recur.blocks import (
    AppendOne,
    Decay,
    DivideByLast,
    Learned,
    Norm,
    OuterScan,
    OutputGate,
    Project,
    Scale,
    Stabilise,
    Sum,
)
from recur.recipe import Recipe


def mlstm(*, heads: int | str = "max(4,D//256)") -> Recipe:
    """C_t = f_t C_{t-1} + i_t k_t v_t^T, n_t = f_t n_{t-1} + i_t k_t, y_t = norm(C_t^T q_t / max(|n_t . q_t|, 1)) o_t.

    i = exp(z), f and o are sigmoids; C and n are kept divided by their largest weight. At first f = sigmoid(3 ... 6)
    over the heads, and i = 1.

    Args:
        heads: H, by default the published 4 up to D = 1024, then of 256 channels, as the keys of the 7B model have
            (arXiv:2503.13427).

    Source: Beck et al. 2024, arXiv:2405.04517.

    >>> recur.Mixer(recur.presets.mlstm(heads=4), dim=64).init_state(batch=1)["parts"]["outer_scan"].shape
    torch.Size([1, 4, 16, 17])
    """
    return Recipe(
        Project("x", q="H K", k="H K", v="H K", o="H K"),
        Project("x", i="H", f="H", init="zeros"),
        Learned("b", "H", init="3+3*i/max(H-1,1)"),
        Sum("f b", out="f"),
        Decay("f"),
        Scale("k", "1/sqrt(K)"),
        Stabilise(), AppendOne("v"), OuterScan(), DivideByLast("floor"),
        Norm("y", kind="layer", over="K", affine="weight"),
        OutputGate("o", act="sigmoid"),
        Project("y", y="D"),
        axes={"H": heads, "K": "D/H"},
        source="Beck et al. 2024, arXiv:2405.04517",
    )  # fmt: skip
