"""GSS: a gated unit around a diagonal state space with constant poles; and its companions with other cores."""

from recur.blocks import Act, FixedScan, GatedScan, Norm, OutputGate, Project, Skip, Smoothing, TapConv
from recur.recipe import Frame, Part, Recipe

GSS = "Mehta et al. 2022, arXiv:2206.13947"
TAPS = Project("v", tap="H", name="taps")
NORMED = Frame(norm=None)  # each normalises its own input


def gated_unit(*core: Part, width: int | str, expand: float, source: str, **axes: int | str) -> Recipe:
    """y = W core(gelu(W_v x)) * gelu(W_u x): a narrow branch v that mixes tokens, a wide one u that gates.

    Args: core: from v [V] to y [V], its own norm included; width: V; expand: width of u over D.
    """
    return Recipe(
        Norm("x", kind="layer", to="n"),
        Project("n", u="F", v="V"),
        Act("u v", "gelu"),
        *core,
        Skip("v", mean=0.0, std=1.0),
        Project("y", y="F"),
        OutputGate("u", act="identity"),
        Project("y", y="D", bias=True),
        axes={"F": f"int({expand}*D)", "V": width, **axes},
        source=source,
        frame=NORMED,
    )


def gss(*, state: int = 512, width: int | str = "max(D//2,1)", expand: float = 4, frequency: str = "exp") -> Recipe:
    """S_t = e^z S_{t-1} + v_t, y_t = W (Re sum_n C_n (e^z - 1)/z S_t + D v_t) * gelu(W_u x_t); z = -exp(rho) + i omega.

    Args:
        state: N poles, shared by all channels.
        width: of the narrow branch v.
        expand: width of the wide branch over D.
        frequency: "exp", omega = exp(eta), or "linear", omega = eta.

    Source: Mehta et al. 2022, arXiv:2206.13947.

    >>> recur.Mixer(recur.presets.gss(state=16), dim=64).init_state(batch=1)["parts"]["fixed_scan"].shape
    torch.Size([1, 32, 16])
    """
    core = Norm("v", kind="layer"), FixedScan("v", frequency=frequency)
    return gated_unit(*core, width=width, expand=expand, N=state, source=GSS)


def gated_smoothing(*, heads: int = 8, width: int | str = "H*max(D//2//H,1)", expand: float = 4) -> Recipe:
    """GSS around dampened exponential smoothing: h_t = (1 - alpha) damp h_{t-1} + alpha v_t, one pair per head.

    Args:
        heads: H.
        width: of the narrow branch, as in `gss`.
        expand: width of the wide branch over D.

    Source: Woo et al. 2022, arXiv:2202.01381; Ma et al. 2022, arXiv:2209.10655 (the dampening).

    >>> recur.Mixer(recur.presets.gated_smoothing(heads=4), dim=64).init_state(batch=1)["parts"]["gated_scan"].shape
    torch.Size([1, 32])
    """
    core = Norm("v", kind="layer"), Smoothing("v"), GatedScan("b")
    return gated_unit(*core, width=width, expand=expand, H=heads, source="after " + GSS)


def gated_tap_conv(*, heads: int = 8, width: int | str = "H*max(D//2//H,1)", expand: float = 4) -> Recipe:
    """GSS around a convolution whose tap for lag s is read from token s: y_t = sum_{s<=t} tap_s v_{t-s}.

    Args:
        heads: H taps per token.
        width: of the narrow branch, as in `gss`.
        expand: width of the wide branch over D.

    Source: the ds-conv of the released PyTorch GSS, after Mehta et al. 2022, arXiv:2206.13947.

    >>> y, _ = recur.Mixer(recur.presets.gated_tap_conv(heads=4), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    core = TAPS, Norm("v", kind="layer"), TapConv("v")
    return gated_unit(*core, width=width, expand=expand, H=heads, source="after " + GSS)


def dss(*, state: int = 512, frequency: str = "exp") -> Recipe:
    """The state space of gss alone, on the normalised input n: y_t = Re sum_n C_n (e^z - 1)/z S_t + D n_t.

    Args:
        state: N poles, shared by all channels.
        frequency: "exp", omega = exp(eta), or "linear", omega = eta.

    Source: Gupta et al. 2022, arXiv:2203.14343.

    >>> recur.Mixer(recur.presets.dss(state=16), dim=64).init_state(batch=1)["parts"]["fixed_scan"].shape
    torch.Size([1, 64, 16])
    """
    return _alone(FixedScan("v", frequency=frequency), N=state, source="Gupta et al. 2022, arXiv:2203.14343")


def smoothing(*, heads: int = 8) -> Recipe:
    """The smoothing of gated_smoothing alone: h_t = (1 - alpha) damp h_{t-1} + alpha n_t, y_t = h_t + D n_t.

    Args:
        heads: H, each with an alpha and a dampening of its own.

    Source: Woo et al. 2022, arXiv:2202.01381.

    >>> recur.Mixer(recur.presets.smoothing(heads=4), dim=64).init_state(batch=1)["parts"]["gated_scan"].shape
    torch.Size([1, 64])
    """
    return _alone(Smoothing("v"), GatedScan("b"), H=heads, source="Woo et al. 2022, arXiv:2202.01381")


def tap_conv(*, heads: int = 8) -> Recipe:
    """The convolution of gated_tap_conv alone: y_t = sum_{s<=t} (W x_s) n_{t-s} + D n_t.

    Args:
        heads: H taps per token.

    Source: the ds-conv of the released PyTorch GSS.

    >>> y, _ = recur.Mixer(recur.presets.tap_conv(heads=4), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return _alone(Project("x", tap="H", name="taps"), TapConv("v"), H=heads, source="after " + GSS)


def _alone(*core: Part, source: str, **axes: int | str) -> Recipe:
    """A core on the normalised input, with its skip."""
    norm, skip = Norm("x", kind="layer", to="v"), Skip("v", mean=0.0, std=1.0)
    return Recipe(norm, *core, skip, axes=axes, source=source, frame=NORMED)
