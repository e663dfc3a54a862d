"""Delta networks: each write corrects what the state would have said; with a gate per head, or per key channel."""

from recur.blocks import Act, DeltaScan, KeyedRate, LowRank, Norm, OutputGate, Project, Scale, ShortConv, StepDecay
from recur.recipe import Frame, Part, Recipe

REFLECTING = (Scale("beta", "2"),)


def _unit(name: str) -> Norm:
    """Vectors of length 1 in every head."""
    return Norm(name, kind="unit", over="K", eps=1e-6, affine="none")


def smooth_unit(*names: str) -> tuple[Norm, ...]:
    """Vectors of length 1 in every head, their smallness within the root as much published code has it."""
    return tuple(Norm(name, kind="smooth_unit", over="K", eps=1e-6, affine="none") for name in names)


def delta_net(*, heads: int | str = "max(4,D//128)", conv: int = 4, reach: tuple[Part, ...] = ()) -> Recipe:
    """S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T, y_t = norm(S_t^T q_t) / sqrt(K); |q| = |k| = 1.

    Args:
        heads: H, by default of 128 key channels, as published.
        conv: taps of the short convolution.
        reach: parts that change beta; REFLECTING takes it to (0, 2), so that eigenvalues reach -1 (arXiv:2411.12537).

    Source: Schlag et al. 2021, arXiv:2102.11174; Yang et al. 2024, arXiv:2406.06484.

    >>> recur.Mixer(recur.presets.delta_net(heads=4), dim=64).init_state(batch=1)["parts"]["delta_scan"].shape
    torch.Size([1, 4, 16, 16])
    """
    return Recipe(
        Project("x", q="H K", k="H K", v="H V", beta="H"),
        ShortConv("q k v", width=conv, bias=False),
        Act("beta", "sigmoid"),
        *reach,
        _unit("q"),
        _unit("k"),
        DeltaScan(decay=None, scale="1/sqrt(K)"),
        Norm("y", over="V"),
        Project("y", y="D"),
        axes={"H": heads, "K": "D/H", "V": "D/H"},
        source="Yang et al. 2024, arXiv:2406.06484",
        frame=Frame(ffn="swiglu"),
    )


def gated_delta_net(*, heads: int | str = "max(4,D//128)", conv: int = 4, reach: tuple[Part, ...] = ()) -> Recipe:
    """S' = a_t S_{t-1}, S_t = S' + k_t (beta_t (v_t - S'^T k_t))^T, y_t = norm(S_t^T q_t) * silu(g_t); one a per head.

    log a = -exp(A) softplus(dt + b).

    Args:
        heads: H, by default of 128 key and 256 value channels, recur's default.
        conv: taps of the short convolution.
        reach: as in `delta_net`.

    Source: Yang et al. 2024, arXiv:2412.06464.

    >>> recur.Mixer(recur.presets.gated_delta_net(heads=4), dim=64).init_state(batch=1)["parts"]["delta_scan"].shape
    torch.Size([1, 4, 16, 32])
    """
    return Recipe(
        Project("x", q="H K", k="H K", v="H V", beta="H", g="H V", dt="H"),
        ShortConv("q k v", width=conv, bias=False),
        Act("beta", "sigmoid"),
        *reach,
        StepDecay(),
        _unit("q"),
        _unit("k"),
        DeltaScan(scale="1/sqrt(K)"),
        Norm("y", over="V"),
        OutputGate("g"),
        Project("y", y="D"),
        axes={"H": heads, "K": "D/H", "V": "2*D/H"},
        source="Yang et al. 2024, arXiv:2412.06464",
        frame=Frame(ffn="swiglu"),
    )


def kda(*, heads: int | str = "max(4,D//128)", conv: int = 4, reach: tuple[Part, ...] = ()) -> Recipe:
    """S' = diag(a_t) S_{t-1}, S_t = S' + k_t (beta_t (v_t - S'^T k_t))^T, y_t = norm(S_t^T q_t) * sigmoid(g_t).

    log a = -exp(A) softplus(dt + b), one per key channel; dt and g through V channels.

    Args:
        heads: H, by default of 128 key channels.
        conv: taps of the short convolution.
        reach: as in `delta_net`.

    Source: Kimi Team 2025, arXiv:2510.26692.

    >>> recur.Mixer(recur.presets.kda(heads=4), dim=64).init_state(batch=1)["parts"]["delta_scan"].shape
    torch.Size([1, 4, 16, 16])
    """
    return Recipe(
        Project("x", q="H K", k="H K", v="H V", beta="H", g=LowRank("H V", rank="V"), dt=LowRank("H K", rank="V")),
        ShortConv("q k v", width=conv, bias=False),
        Act("beta", "sigmoid"),
        *reach,
        StepDecay(),
        _unit("q"),
        _unit("k"),
        DeltaScan(scale="1/sqrt(K)"),
        Norm("y", over="V"),
        OutputGate("g", act="sigmoid"),
        Project("y", y="D"),
        axes={"H": heads, "K": "D/H", "V": "D/H"},
        source="Kimi Team 2025, arXiv:2510.26692",
        frame=Frame(ffn="swiglu"),
    )


def efla(*, heads: int | str = "max(4,D//128)", conv: int = 4) -> Recipe:
    """`delta_net` with the error's exact decay over a time beta: beta <- (1 - exp(-beta |k|^2)) / |k|^2, for any k.

    Args:
        heads: H, by default of 128 key channels.
        conv: taps of the short convolution.

    Source: arXiv:2512.12602.

    >>> y, _ = recur.Mixer(recur.presets.efla(), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return delta_net(heads=heads, conv=conv).replace("norm_2", KeyedRate(law="exponential"))


def kaczmarz(*, heads: int | str = "max(4,D//128)", conv: int = 4) -> Recipe:
    """`delta_net` with Kaczmarz steps: beta <- beta / |k|^2, so that beta = 1 projects onto what the key demands.

    Args:
        heads: H, by default of 128 key channels.
        conv: taps of the short convolution.

    Source: arXiv:2605.08587.

    >>> y, _ = recur.Mixer(recur.presets.kaczmarz(), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return delta_net(heads=heads, conv=conv).replace("norm_2", KeyedRate(law="projection"))
