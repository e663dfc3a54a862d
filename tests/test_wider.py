"""The recurrences of 2025 and 2026: first values, equations written out as loops, checkpoints of the hub, refusals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from recur import LanguageModel, Mixer, Recipe, RecipeError, convert, presets
from recur.blocks import (
    DataRotary,
    FeedbackKey,
    ForgettingAttention,
    KeyedRate,
    MesaScan,
    Norm,
    Previous,
    Project,
    Repeat,
    Skip,
    SlotScan,
    Trapezoid,
    WideScan,
)
from recur.blocks.feedforward import key_mix
from recur.primitives.attention import forgetting_attention
from recur.primitives.columns import column_scan, oja_scan, slot_scan
from recur.primitives.gates import decayed_mean
from recur.primitives.log_linear import log_linear_scan
from recur.primitives.mesa import mesa_scan
from recur.primitives.momentum import momentum_scan
from recur.primitives.norms import normalise
from recur.primitives.trapezoid import accumulated_angle, rotate_by
from recur.shapes import ShapeError

# ---------------------------------------------------------------------- first values


@pytest.mark.parametrize(("depth", "layer"), [(1, 0), (3, 0), (3, 2)])
def test_the_first_values_of_rwkv7(depth: int, layer: int) -> None:
    """The trainer's table, channel by channel; a model of one layer counts as a first one."""
    C, H = 12, 3
    N = C // H
    with torch.random.fork_rng(devices=()):
        parts = Mixer(presets.rwkv7(heads=H, ranks=(4, 3, 2, 5)), C, depth=depth, layer=layer).parts
        mix = Mixer(key_mix(), C, depth=depth, layer=layer).parts
    rho, tau = layer / max(depth - 1, 1), 1 - layer / depth
    n = torch.arange(C, dtype=torch.float64)
    t = (n % N - (N - 1) / 2) / ((N - 1) / 2)
    z, lin = t * t.abs(), n / (C - 1) - 0.5
    wanted = {
        **{f"token_shift.mu_x{m}": 1 - (n / C) ** (0.2 * tau) for m in "rg"},
        **{f"token_shift.mu_x{m}": 1 - (n / C) ** (0.9 * tau) for m in "wa"},
        **{f"token_shift.mu_x{m}": 1 - (n / C) ** (0.7 * tau) for m in "kv"},
        "project_4.w_bias": -6 + 6 * (n / (C - 1)) ** (1 + rho**0.3) + 0.5 + 2.5 * z,
        "project_5.a_bias": -0.19 + 0.3 * z + 0.4 * lin,
        "removal_keys.k_k": 0.71 - 0.1 * lin,
        "removal_keys.k_a": torch.full((C,), 1.02),
        "self_term.weight": torch.full((H, N), -0.04),
        "norm.weight": torch.full((H, N), ((1 + layer) / depth) ** 0.7),
        **{f"project_{number}.weight": torch.zeros(rank, C) for number, rank in ((4, 4), (5, 3), (6, 5))},
        "project_7.weight": torch.zeros(C, C),
    }
    if layer:
        wanted |= {"value_residual.bias": 0.73 - 0.4 * lin, "value_residual.down": torch.zeros(2, C)}
    for name, value in wanted.items():
        assert_close(parts.get_parameter(name), value.float(), msg=lambda text, name=name: f"{name}: {text}")
    assert_close(mix.get_parameter("token_shift.mu_xk"), (1 - (n / C) ** tau**4).float())
    assert ("value_residual.up" in dict(parts.named_parameters())) == (layer > 0)


def test_the_first_matrices_of_rwkv7_are_orthogonal() -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        parts = Mixer(presets.rwkv7(heads=2, ranks=(4, 3, 2, 5)), 8, depth=2, layer=1).parts
        model = convert.build("rwkv7", {"n_embd": 8, "n_layer": 2, "vocab_size": 32, "head_size": 4})
    head, table = model.head.weight.detach(), model.embedding.weight.detach()
    for name, gain in (("project", 1.0), ("project_2", 0.1), ("project_3", 1.0)):
        weight = parts.get_parameter(f"{name}.weight")
        assert_close(weight @ weight.mT, gain**2 * torch.eye(8), atol=1e-5, rtol=1e-5)
    up = parts.get_parameter("project_4.w_up")  # [D rank], fewer ranks than channels
    assert_close(up.mT @ up, 0.01 * torch.eye(4), atol=1e-5, rtol=1e-5)
    assert 0.9e-4 < float(table.detach().abs().max()) < 1.00001e-4
    assert_close(head.mT @ head, 0.25 * 32 / 8 * torch.eye(8), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("width", "ranks"), [(768, (64, 64, 32, 128)), (1024, (64, 64, 64, 160))])
def test_the_published_ranks_of_rwkv7(width: int, ranks: tuple[int, ...]) -> None:
    site = presets.rwkv7().site(width)
    assert tuple(site.only(letter) for letter in ("RW", "RA", "RV", "RG")) == ranks


def test_the_first_ridge_of_the_mesa_layer_is_1() -> None:
    ridge = Mixer(presets.mesa_net(heads=2), 8).parts["mesa_scan"].ridge
    assert_close(torch.nn.functional.softplus(ridge) + 0.25, torch.ones(2, 4))


# ---------------------------------------------------------------------- equations as loops


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 2**31 - 1), st.integers(1, 9), st.booleans())
def test_ojas_rule_is_its_equation(seed: int, T: int, begun: bool) -> None:
    q, k, v, S = (
        drawn(seed, 2, T, 1, 3),
        drawn(seed + 1, 2, T, 1, 3),
        drawn(seed + 2, 2, T, 1, 4),
        drawn(seed + 3, 2, 1, 3, 4),
    )
    log_a, beta = -drawn(seed + 4, 2, T, 1, 4).abs(), drawn(seed + 5, 2, T, 1).sigmoid()
    v = v / v.norm(dim=-1, keepdim=True)
    out = oja_scan(q, k, v, log_a, beta, initial_state=S if begun else None)
    S = S if begun else torch.zeros_like(S)
    for t in range(T):
        S = S * log_a[:, t].exp()[..., None, :]
        error = k[:, t] - (S @ v[:, t][..., None])[..., 0]
        S = S + beta[:, t, :, None, None] * error[..., None] * v[:, t][..., None, :]
        assert_close(out.y[:, t], (S.mT @ q[:, t][..., None])[..., 0], rtol=1e-10, atol=1e-10)
    assert_close(out.state, S, rtol=1e-10, atol=1e-10)


@given(st.integers(0, 2**31 - 1), st.integers(1, 17))
def test_levels_are_the_blocks_of_a_binary_tree(seed: int, T: int) -> None:
    q, k, v = drawn(seed, 1, T, 1, 2), drawn(seed + 1, 1, T, 1, 2), drawn(seed + 2, 1, T, 1, 3)
    log_a, w = -drawn(seed + 3, 1, T, 1).abs(), drawn(seed + 4, 1, T, 1, 6)
    y = log_linear_scan(q, k, v, log_a, w).y
    for t in range(T):
        want = torch.zeros(3, dtype=torch.float64)
        for s in range(t + 1):
            kept = log_a[0, s + 1 : t + 1, 0].sum().exp()
            want += w[0, t, 0, (t ^ s).bit_length()] * kept * (q[0, t, 0] @ k[0, s, 0]) * v[0, s, 0]
        assert_close(y[0, t, 0], want, rtol=1e-10, atol=1e-10)


def test_angles_stay_exact_over_many_tokens() -> None:
    """Summed in float32 they would be off by 1e-3 after so many."""
    angle, step = torch.ones(1, 40_000, 1), torch.full((1, 40_000, 1), 0.37)
    theta, _ = accumulated_angle(angle, step)
    added = (math.pi * angle.tanh() * step).double()[0, 0, 0]
    want = torch.arange(1, 40_001, dtype=torch.float64) * added
    assert float((theta[0, :, 0, 0].double() - want).cos().min()) > 1 - 1e-9


def test_the_mean_of_a_decay_has_no_corner_at_0() -> None:
    x = torch.tensor([0.0, 1e-12, 1e-3 - 1e-9, 1e-3 + 1e-9, 3.0], dtype=torch.float64, requires_grad=True)
    assert_close(decayed_mean(x)[1:], -torch.expm1(-x[1:]) / x[1:])
    (slope,) = torch.autograd.grad(decayed_mean(x).sum(), x)
    assert_close(slope[:4], torch.full((4,), -0.5, dtype=torch.float64), rtol=1e-3, atol=1e-3)


def test_smooth_unit_vectors() -> None:
    x, weight = drawn(0, 2, 3, 4, 5), drawn(1, 5)
    want = x / (x.square().sum(-1, keepdim=True) + 1e-2).sqrt()
    assert_close(normalise(x, "smooth_unit", eps=1e-2), want)
    assert_close(normalise(x, "smooth_unit", eps=1e-2, weight=weight), want * weight)
    grouped = normalise(x.flatten(2), "smooth_unit", groups=4, eps=1e-2)
    assert_close(grouped, want.flatten(2))


def test_a_query_in_a_window_sees_as_many_tokens() -> None:
    """The last one of a window of 3 does not change with the token four before."""
    q, k, v, log_f = drawn(0, 1, 6, 2, 3), drawn(1, 1, 6, 1, 3), drawn(2, 1, 6, 1, 3), -drawn(3, 1, 6, 2).abs()
    got = forgetting_attention(q, k, v, log_f, window=3)[:, -1]
    assert_close(got, forgetting_attention(q[:, 3:], k[:, 3:], v[:, 3:], log_f[:, 3:])[:, -1])


# ---------------------------------------------------------------------- checkpoints


def hub_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The demo's tensors under the names of the hub, which lie transposed."""
    found, layers = {}, {"ln1": "attn_norm", "ln2": "ffn_norm", "ln0": "pre_norm"}
    ends = {"emb.weight": "model.embeddings.weight", "head.weight": "lm_head.weight"}
    for name, tensor in state.items():
        if name in ends or name.startswith("ln_out."):
            found[ends.get(name, name.replace("ln_out", "model.norm"))] = tensor
            continue
        _, layer, module, rest = name.split(".", 3)
        where = f"model.layers.{layer}."
        if module in layers:
            found[f"{where}{layers[module]}.{rest}"] = tensor
        elif module == "ffn":
            found[f"{where}ffn.{rest}"] = tensor.flatten() if rest == "x_k" else tensor
        elif re.fullmatch("[wavg][012]", rest):
            if layer == "0" and rest[0] == "v":
                continue
            kind = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[rest[1]]
            found[f"{where}attn.{rest[0]}_lora.lora.{kind}"] = tensor.flatten() if rest[1] == "0" else tensor.mT
        else:
            plain = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "ln_x": "g_norm"}
            head, _, tail = rest.partition(".")
            flat = tensor.flatten() if rest in ("k_k", "k_a") else tensor
            found[f"{where}attn.{plain.get(head, head)}{'.' if tail else ''}{tail}"] = flat
    return found


def test_the_hubs_rwkv7_is_the_demos_under_other_names() -> None:
    """At 64 channels per head, where its eps is the official one."""
    sizes = {"n_embd": 128, "n_layer": 2, "vocab_size": 11, "dim_ffn": 64}
    ranks = {"decay": 4, "a": 3, "v": 2, "gate": 5}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        demo = convert.build("rwkv7", {**sizes, "lora": ranks}).double()
        for weight in demo.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    config = {
        "hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 11, "intermediate_size": 64, "fuse_norm": False,
        "decay_low_rank_dim": 4, "a_low_rank_dim": 3, "v_low_rank_dim": 2, "gate_low_rank_dim": 5,
    }  # fmt: skip
    state = hub_names(convert.to_official("rwkv7", demo))
    hub = convert.from_official("rwkv7_hub", state, config)
    ids = torch.arange(9)[None]
    assert_close(hub(ids), demo(ids), rtol=1e-10, atol=1e-10)
    assert set(convert.to_official("rwkv7_hub", hub)) == set(state)


@pytest.mark.parametrize(("kind", "own"), [("comba", {}), ("gated_delta_product", {"use_forget_gate": True})])
def test_models_of_the_hub_are_made_of_its_layers(kind: str, own: dict[str, bool]) -> None:
    """What a model does not hand to its layers has their default, whatever its configuration says."""
    sizes = {"hidden_size": 16, "num_heads": 2, "head_dim": 4, "norm_eps": 1e-3, **own}
    reach = {} if kind == "comba" else {"num_householder": 3, "allow_neg_eigval": True}
    idle = {"use_output_correction": False} if kind == "comba" else {}
    config = {**sizes, **reach, **idle, "num_hidden_layers": 2, "vocab_size": 8}
    model = convert.build(f"{kind}_hub", config)
    prefix = "model.layers.1.attn."
    state = {
        name.removeprefix(prefix): t
        for name, t in convert.to_official(f"{kind}_hub", model).items()
        if name.startswith(prefix)
    }
    layer = convert.from_official(f"{kind}_hub_layer", state, {**sizes, **reach})
    x = drawn(0, 1, 6, 16).float()
    assert_close(layer(x).y, model.blocks[1].mixer(x).y)


def test_official_checkpoints_of_rwkv7_need_no_configuration() -> None:
    config = {"n_embd": 8, "n_layer": 3, "vocab_size": 9, "head_size": 4, "dim_ffn": 12}
    lora = {"decay": 4, "a": 3, "v": 2, "gate": 5}
    model = convert.build("rwkv7", {**config, "lora": lora})
    state = convert.to_official("rwkv7", model)
    again = convert.from_official("rwkv7", state, {})
    assert all(torch.equal(tensor, state[name]) for name, tensor in convert.to_official("rwkv7", again).items())
    without = {name: tensor for name, tensor in state.items() if not re.search(r"blocks\.0\.att\.v[012]$", name)}
    assert set(convert.to_official("rwkv7", convert.from_official("rwkv7", without, {}))) == set(without)


# ---------------------------------------------------------------------- refusals

QKV = Project("x", q="H K", k="H K", v="H V")
AXES = {"H": 2, "K": 4, "V": 3, "G": 3}


def built(*parts: object) -> Mixer:
    return Mixer(Recipe(Project("x", y="D"), *parts, axes=AXES), 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FeedbackKey(decay="fixed"), 'decay must be "learned" or "none", got \'fixed\''),
        (lambda: WideScan(erase_from="next"), 'erase_from must be "decayed" or "previous", got \'next\''),
        (lambda: WideScan(remove="b"), "remove must be None where nothing is erased, got 'b'"),
        (lambda: built(QKV, WideScan(decay=None, erase="v")), "needs erase v [H K], got [H V]"),
        (lambda: built(QKV, WideScan(decay=None, erase="k", write="k")), "needs write k [H] or [H V], got [H K]"),
        (lambda: built(QKV, Repeat("q")), "needs an axis G in q, got [H K]"),
        (lambda: built(Project("x", g="G K"), Repeat("g")), "G must divide H, got 3 and 2"),
        (lambda: Previous("k v", to="a"), "to must have a name for each of k v, got 'a'"),
        (lambda: DataRotary("q", layout="odd"), 'layout must be "interleaved" or "half", got \'odd\''),
        (
            lambda: built(QKV, Project("x", delta="H", angle="V"), DataRotary("q")),
            "q must have a pair of channels per angle, got 4 channels and A=3",
        ),
        (lambda: built(QKV, Project("x", delta="H", angle="G K"), DataRotary("q")), "needs angle [A] or [H A]"),
        (lambda: built(QKV, Project("x", delta="K", angle="1"), DataRotary("q")), "needs q [... K K], got [H K]"),
        (lambda: built(QKV, Project("x", trap="K"), Trapezoid()), "needs trap [H], got [K]"),
        (lambda: KeyedRate(law="exact"), "law must be one of exponential, projection, implicit, got 'exact'"),
        (lambda: MesaScan(solver="lu"), "solver must be one of exact, conjugate, conjugate_diagonal, got 'lu'"),
        (lambda: MesaScan(floor=1.0), "floor must be at least 0 and below 1, got 1.0"),
        (lambda: ForgettingAttention(window=0), "window must be at least 1, got 0"),
        (lambda: built(QKV, Skip("v", over="K")), "needs v with the axes [K], got [H V]"),
        (lambda: built(QKV, Project("x", s="G K", log_a="G V"), SlotScan()), "needs 's' and 'log_a' of equal axes"),
    ],
)
def test_parts_refuse_what_does_not_fit(make: Callable[[], object], words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        make()


A, B, G3 = torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 2), torch.zeros(1, 2, 3, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: slot_scan(A, G3, G3, G3, G3), ShapeError, "slot_scan: G must divide H, got G=3 (k) and H=2 (q)"),
        (lambda: column_scan(A, A, A, B), ShapeError, "column_scan: log_decay must be"),
        (lambda: forgetting_attention(A, G3, G3, B), ShapeError, "G must divide H, got G=3 (k) and H=2 (q)"),
        (lambda: mesa_scan(A, A, A, B, B, A[0, 0], solver="lu"), ValueError, "solver must be one of exact, conjugate"),
        (lambda: log_linear_scan(G3, G3, A, B, A), ShapeError, "G must divide H, got G=3 (q) and H=2 (v)"),
        (lambda: log_linear_scan(A, A, A, B, A[..., :1]), ValueError, "L=1 levels reach 1 tokens, got 2"),
        (lambda: log_linear_scan(A, A, A, B, A, form="triton"), NotImplementedError, "form='triton' is not available"),
        (
            lambda: log_linear_scan(A, A, A, B, A, form="parallel", position=torch.ones(1, dtype=torch.long)),
            NotImplementedError,
            "form='parallel' begins with an empty state",
        ),
        (
            lambda: momentum_scan(A, A, A, A, B, B, B, B, form="parallel"),
            NotImplementedError,
            "momentum_scan: form='parallel' is not available here; these are: recurrent, chunked",
        ),
        (lambda: rotate_by(A, torch.zeros(1, 2, 2, 2)), ShapeError, "at most K/2 angles, got A=2 and K=3"),
        (lambda: rotate_by(A, B[..., None], layout="odd"), ValueError, "layout must be one of interleaved, half"),
        (
            lambda: convert.build("mamba3", {"d_model": 8, "rope_fraction": 0.3}),
            ValueError,
            "must be 0.5 or 1.0, got 0.3",
        ),
        (
            lambda: convert.build("rwkv7_hub", {"num_hidden_layers": 2, "value_dim": [64, 128]}),
            NotImplementedError,
            "value_dim must be the same in all layers so far, got [64, 128]",
        ),
        (
            lambda: convert.build("comba_hub_layer", {"head_dim": 3, "expand_v": 1.5}),
            ValueError,
            "head_dim * expand_v must be an integer, got 3 * 1.5",
        ),
        (
            lambda: convert.build("comba_hub_layer", {"num_heads": 4, "num_v_heads": 6}),
            ValueError,
            "num_v_heads must be a multiple of num_heads=4, got 6",
        ),
    ],
)
def test_functions_refuse_what_does_not_fit(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        call()


def test_a_model_may_normalise_its_embedded_tokens() -> None:
    model = LanguageModel("rwkv7:heads=2", vocab_size=7, dim=8, depth=1, embed_norm=Norm("x", kind="layer", to="y"))
    assert model.embedding_norm.weights is not None
    ids, state = torch.arange(5)[None], model.init_state(1)
    steps = torch.stack([model.step(ids[:, t], state) for t in range(5)], 1)
    assert_close(steps, model(ids))
