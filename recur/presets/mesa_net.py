"""MesaNet: each token reads the least-squares map from all keys so far to their values."""

from recur.blocks import Act, Decay, MesaScan, Norm, Project, ShortConv
from recur.presets.delta_net import smooth_unit
from recur.recipe import Frame, Part, Recipe


def mesa_net(
    *,
    heads: int | str = "max(1,D//128)",
    conv: int = 4,
    read: MesaScan = MesaScan(solver="conjugate"),  # noqa: B008 - a frozen record
    leave: tuple[Part, ...] = (Norm("y", over="K", name="read_norm"),),
) -> Recipe:
    """H_t = a_t H + beta_t k_t k_t^T, S_t = a_t S + beta_t k_t v_t^T, y_t = norm(S_t^T (H_t + diag(ridge))^-1 q_t).

    Args:
        heads: H, by default of 128 channels, as published.
        conv: taps of the short convolution of q and k.
        read: solver and iterations (see `MesaScan`), the same for whole sequences and for steps.
        leave: the parts between the scan and the last projection.

    Source: von Oswald et al. 2025, arXiv:2506.05233.

    >>> y, _ = recur.Mixer(recur.presets.mesa_net(), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return Recipe(
        Project("x", q="H K", k="H K", v="H K", name="enter"),
        Project("x", z="H", beta="H", bias=True, name="gates"),
        ShortConv("q k", width=conv, bias=False),
        Decay("z"), Act("beta", "sigmoid"),
        *smooth_unit("q", "k"),
        read,
        *leave,
        Project("y", y="D", name="leave"),
        axes={"H": heads, "K": "D/H"},
        source="von Oswald et al. 2025, arXiv:2506.05233",
        frame=Frame(ffn="swiglu"),
    )  # fmt: skip
