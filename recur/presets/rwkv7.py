"""RWKV-7: a state that decays per key channel and forgets one key per token while it writes another."""

from recur.blocks import (
    Act,
    FlooredDecay,
    LowRank,
    Norm,
    OutputGate,
    Project,
    RemovalKeys,
    SelfTerm,
    TokenShift,
    ValueResidual,
    WideScan,
)
from recur.recipe import Frame, Recipe

MIXES = tuple(f"1-(i/D)**({share}*(1-layer/depth))" for share in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2))  # r w k v a g
RISING = "(2*(i-i//K*K)-K+1)/max(K-1,1)"  # from -1 to 1 in each head
ZIGZAG, SLOPE = f"{RISING}*max({RISING},-{RISING})", "(i/max(D-1,1)-0.5)"
FIRST_W = f"-5.5+6*(i/max(D-1,1))**(1+(layer/max(depth-1,1))**0.3)+2.5*{ZIGZAG}"
FIRST_A = f"-0.19+0.3*{ZIGZAG}+0.4*{SLOPE}"
FIRST_V = f"0.73-0.4*{SLOPE}"
KEYS = RemovalKeys()
HEAD_NORM = Norm("y", kind="layer", groups="H", eps=64e-5, first="((1+layer)/depth)**0.7")
RESIDUAL = ValueResidual("v", "xv", rank="RV", first=FIRST_V)
RANKS = tuple(f"max(32,32*round({share}*sqrt(D)/32))" for share in (2.5, 2.5, 1.7, 5))


def _gate(axes: str, rank: str, first: str, act: str = "identity") -> LowRank:
    return LowRank(axes, rank=rank, bias=True, act=act, init="orthogonal_tenth", first=first)


def rwkv7(
    *,
    heads: int | str = "max(1,D//64)",
    value: int | str = "D",
    ranks: tuple[int | str, ...] = RANKS,
    keys: RemovalKeys = KEYS,
    norm: Norm = HEAD_NORM,
    residual: ValueResidual = RESIDUAL,
) -> Recipe:
    """S_t = diag(w_t) S_{t-1} - b_t (S_{t-1}^T e_t)^T + k_t v_t^T, y_t = (norm(S_t^T r_t) + (r_t . u k_t) v_t) * g_t.

    w = exp(-e^{-1/2} sigmoid(z)), e = unit(k * k_k), b = a e, then k <- k (1 + (a - 1) k_a); v mixed with layer 0's.

    Args:
        heads: H, by default of 64 channels, as published.
        value: E, width of the values of all heads.
        ranks: of the low-rank projections of w, a, v and g.
        keys: how e is normalised (see `RemovalKeys`).
        norm: of y in each head.
        residual: how v is mixed with that of layer 0 (see `ValueResidual`).

    Source: Peng et al. 2025, arXiv:2503.14456.

    >>> y, _ = recur.Mixer(recur.presets.rwkv7(), dim=64)(torch.randn(1, 5, 64))
    >>> y.shape
    torch.Size([1, 5, 64])
    """
    return Recipe(
        TokenShift("x", to="xr xw xk xv xa xg", init=MIXES),
        Project("xr", r="H K", init="orthogonal"),
        Project("xk", k="H K", init="orthogonal_tenth"),
        Project("xv", v="H V", init="orthogonal"),
        Project("xw", w=_gate("H K", "RW", FIRST_W, "tanh"), init="zeros"),
        Project("xa", a=_gate("H K", "RA", FIRST_A), init="zeros"),
        Project("xg", g=LowRank("H V", rank="RG", act="sigmoid", init="orthogonal_tenth"), init="zeros"),
        FlooredDecay("w"), Act("a", "sigmoid"), residual, keys,
        WideScan(q="r", erase="e", erase_from="previous", remove="b"),
        norm, SelfTerm(q="r", first="-0.04"), OutputGate("g", act="identity"),
        Project("y", y="D", init="zeros"),
        axes={"H": heads, "K": "D/H", "E": value, "V": "E/H",
              "RW": ranks[0], "RA": ranks[1], "RV": ranks[2], "RG": ranks[3]},
        source="Peng et al. 2025, arXiv:2503.14456",
        frame=Frame(ffn="key_mix", norm="layer", embed_norm="layer"),
    )  # fmt: skip
