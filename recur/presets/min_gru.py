"""minGRU: a GRU whose gate does not look at the state."""

from recur.blocks import Decay, GatedScan, Multiply, Project, Scale
from recur.recipe import Recipe


def min_gru(*, expand: int = 1) -> Recipe:
    """h_t = (1 - z_t) * h_{t-1} + z_t * u_t, y_t = W h_t; z = sigmoid(W x).

    Args:
        expand: inner width over D.

    Source: Feng et al. 2024, arXiv:2410.01201.

    >>> recur.Mixer(recur.presets.min_gru(), dim=64).init_state(batch=1)["parts"]["gated_scan"].shape
    torch.Size([1, 64])
    """
    return Recipe(
        Project("x", z="E", u="E"),
        Multiply("u", by="z", act="sigmoid"),
        Scale("z", "-1"),
        Decay("z"),
        GatedScan("u"),
        Project("y", y="D"),
        axes={"E": f"{expand}*D"},
        source="Feng et al. 2024, arXiv:2410.01201",
    )
