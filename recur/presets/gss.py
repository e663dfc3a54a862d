"""GSS: a gated unit around a diagonal state space with constant poles."""

from recur.blocks import Act, FixedScan, Norm, OutputGate, Project, Skip
from recur.recipe import Recipe


def gss(*, state: int = 512, width: int | str = "max(D//2,1)", expand: float = 4, frequency: str = "exp") -> Recipe:
    """S_t = e^z S_{t-1} + v_t, y_t = W (Re sum_n C_n (e^z - 1)/z S_t + D v_t) * gelu(W_u x_t); z = -exp(rho) + i omega.

    It normalises its own input, so a LanguageModel of it takes norm=None.

    Args: state: N poles, shared by all channels; width: of the narrow branch v; expand: width of the wide branch over
        D; frequency: "exp", omega = exp(eta), or "linear", omega = eta.
    Source: Mehta et al. 2022, arXiv:2206.13947.
    """
    return Recipe(
        Norm("x", kind="layer", to="n"),
        Project("n", u="F", v="V"),
        Act("u v", "gelu"),
        Norm("v", kind="layer"),
        FixedScan("v", frequency=frequency),
        Skip("v", mean=0.0, std=1.0),
        Project("y", y="F"),
        OutputGate("u", act="identity"),
        Project("y", y="D", bias=True),
        axes={"F": f"int({expand}*D)", "V": width, "N": state},
        source="Mehta et al. 2022, arXiv:2206.13947",
    )
