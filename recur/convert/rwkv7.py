"""RWKV-7: the official demo's time mix, channel mix and language model, and the layer and model of the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from recur.blocks import LanguageModel, Mixer, Norm, RemovalKeys
from recur.blocks.feedforward import key_mix
from recur.convert.keys import Keys, Place, merged, shaped, stack, tied, transposed, under
from recur.convert.official import UNQUANTISED, Official, unless_misspelt
from recur.presets.rwkv7 import HEAD_NORM, RESIDUAL, rwkv7
from recur.presets.rwkv7 import RANKS as PUBLISHED
from recur.recipe import Recipe

GATES = {"w": "project_4.{}", "a": "project_5.{}", "g": "project_6.{}", "v": "value_residual.{}"}


def vector(name: str) -> Place:
    return shaped(name, 1, 1, -1)


def low_rank(gate: str, down: Any, up: Any, bias: Any) -> Keys:
    """The two matrices of a gate and its bias, that of v being a part of its own."""
    ours = ("down", "up", "bias") if gate == "v" else ("weight", f"{gate}_up", f"{gate}_bias")
    return {GATES[gate].format(name): place for name, place in zip(ours, (down, up, bias), strict=True)}


MIXES: Keys = {f"token_shift.mu_x{letter}": vector(f"x_{letter}") for letter in "rwkvag"}
TIME: Keys = {
    **MIXES,
    **dict(zip(("project.*", "project_2.*", "project_3.*"), ("receptance.*", "key.*", "value.*"), strict=True)),
    **{ours: place for z in "wagv" for ours, place in low_rank(
        z, transposed(f"{z}1"), transposed(f"{z}2"), vector(f"{z}0")).items()},
    "removal_keys.k_k": vector("k_k"),
    "removal_keys.k_a": vector("k_a"),
    "norm.weight": merged("ln_x.weight"),
    "norm.bias": merged("ln_x.bias"),
    "self_term.weight": "r_k",
    "project_7.*": "output.*",
}  # fmt: skip
CHANNEL: Keys = {
    "token_shift.mu_xk": vector("x_k"),
    "project.*": "key.*",
    "project_2.*": "value.*",
}
KEYS: Keys = {
    "embedding.weight": "emb.weight",
    "embedding_norm.weights.*": "blocks.0.ln0.*",
    "head.weight": "head.weight",
    **stack(
        "blocks.*.",
        ("att.", under("parts.", "", TIME)),
        ("ffn.", under("parts.", "", CHANNEL)),
        ("ln1", "ln2"),
        "ln_out",
    ),
}


def recipe(c: Any, weights_from: int) -> Recipe:
    residual = replace(RESIDUAL, weights_from=weights_from)
    ranks = tuple(c.lora[name] for name in ("decay", "a", "v", "gate")) if c.lora else PUBLISHED
    return rwkv7(heads=c.n_embd // c.head_size, residual=residual, ranks=ranks)


def time_mix(c: Any) -> Mixer:
    depth = max(c.n_layer, c.layer_id + 1)
    return Mixer(recipe(c, c.residual_from), c.n_embd, depth=depth, layer=c.layer_id)


def channel(c: Any) -> Mixer:
    return Mixer(key_mix(hidden=str(c.dim_ffn or 4 * c.n_embd)), c.n_embd)


def model(c: Any) -> LanguageModel:
    return LanguageModel(
        recipe(c, c.residual_from),
        vocab_size=c.vocab_size,
        dim=c.n_embd,
        depth=c.n_layer,
        ffn=key_mix(hidden=str(c.dim_ffn or 4 * c.n_embd)),
        norm="layer",
        embed_norm="layer",
        tie=False,
        head_init="orthogonal_half",
        embed_std=1e-4,
        embed_law="uniform",
    )


def sizes(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """What the tensors of a time mix say of its sizes."""
    found: dict[str, Any] = {}
    if f"{prefix}r_k" in state:
        found = {"head_size": state[f"{prefix}r_k"].shape[1], "residual_from": int(f"{prefix}v0" not in state)}
    ranks = {name: f"{prefix}{letter}1" for name, letter in (("decay", "w"), ("a", "a"), ("v", "v"), ("gate", "g"))}
    # layer 0 has no rank of v where nothing uses it
    lora = {name: state[key].shape[1] if key in state else 1 for name, key in ranks.items()}
    return found | ({"lora": lora} if ranks["decay"] in state else {})


def sizes_of_model(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """All of them: official checkpoints have no configuration."""
    if not {"emb.weight", "blocks.0.ffn.key.weight"} <= set(state):
        return {}
    vocab_size, dim = state["emb.weight"].shape
    layers = {int(key.split(".")[1]) for key in state if key.startswith("blocks.")}
    rest = {"n_layer": max(layers) + 1, "dim_ffn": state["blocks.0.ffn.key.weight"].shape[0]}
    inner = sizes(state, "blocks.0.att.")
    if "lora" in inner and max(layers) > 0 and "blocks.1.att.v1" in state:
        inner["lora"]["v"] = state["blocks.1.att.v1"].shape[1]
    return {"vocab_size": vocab_size, "n_embd": dim, **rest, **inner}


CONFIG: dict[str, Any] = {"head_size": 64, "lora": None}
INERT = ("ctx_len", "my_testing", "load_model", "weight_decay")
TIME_MIX = Official(
    time_mix,
    under("parts.", "", TIME),
    ("n_embd",),
    {**CONFIG, "layer_id": 0, "n_layer": 12, "residual_from": 1},
    infer=sizes,
    inert=(*INERT, "vocab_size", "dim_ffn"),
    renamed={"head_size_a": "head_size"},
    only={"dim_att": (None,)},
)
CHANNEL_MIX = Official(
    channel,
    under("parts.", "", CHANNEL),
    ("n_embd",),
    {"dim_ffn": None},
    inert=(*INERT, "n_layer", "layer_id", "head_size", "head_size_a", "vocab_size"),
)
MODEL = Official(
    model,
    KEYS,
    ("n_embd", "n_layer", "vocab_size"),
    {**CONFIG, "dim_ffn": None, "residual_from": 0},
    infer=sizes_of_model,
    inert=INERT,
    renamed={"head_size_a": "head_size"},
)

# ---------------------------------------------------------------------- the hub's layer and model

HUB_LAYER: Keys = {
    **MIXES,
    **{f"project{n}.*": f"{z}_proj.*" for n, z in (("", "r"), ("_2", "k"), ("_3", "v"), ("_7", "o"))},
    **{ours: place for z in "wagv" for ours, place in low_rank(
        z, f"{z}_lora.lora.0.weight", f"{z}_lora.lora.2.weight", f"{z}_lora.lora.2.bias").items()},
    "removal_keys.*": "*",
    "norm.weight": merged("g_norm.weight"),
    "norm.bias": merged("g_norm.bias"),
    "self_term.weight": "r_k",
}  # fmt: skip
HUB_CHANNEL: Keys = {"token_shift.mu_xk": "x_k", "project.*": "key.*", "project_2.*": "value.*"}
HUB_KEYS: Keys = {
    "embedding.weight": tied("model.embeddings.weight", "lm_head.weight"),
    "embedding_norm.weights.*": "model.layers.0.pre_norm.*",
    "head.weight": "lm_head.weight",
    **stack(
        "model.layers.*.",
        ("attn.", under("parts.", "", HUB_LAYER)),
        ("ffn.", under("parts.", "", HUB_CHANNEL)),
        ("attn_norm", "ffn_norm"),
        "model.norm",
    ),
}


def hub_recipe(c: Any, value: int, affine: str) -> Recipe:
    D = c.hidden_size
    heads = D // c.head_dim if c.head_dim is not None else c.num_heads
    width = D // heads
    given = (c.decay_low_rank_dim, c.a_low_rank_dim, c.v_low_rank_dim, c.gate_low_rank_dim)
    wider = (width / 64, width / 64, width / 64, 1)
    shares = zip(given, (2.5, 2.5, 1.7, 5), wider, strict=True)
    ranks = tuple(max(32, 32 * round(share * D**0.5 * more / 32)) if r is None else r for r, share, more in shares)
    keys = RemovalKeys(norm="smooth_unit", eps=1e-6) if c.fuse_norm else RemovalKeys()
    norm = replace(HEAD_NORM, eps=width * c.norm_eps, affine=affine)
    return rwkv7(heads=heads, value=value, ranks=ranks, keys=keys, norm=norm)


def hub_layer(c: Any) -> Mixer:
    layer = 1 if c.layer_idx is None else c.layer_idx  # only the first one mixes no values
    value = c.hidden_size if c.value_dim is None else c.value_dim
    made = hub_recipe(c, value, "full" if c.elementwise_affine else "none")
    return Mixer(made, c.hidden_size, depth=max(c.num_hidden_layers or 1, layer + 1), layer=layer)


def hub_model(c: Any) -> LanguageModel:
    D, values = c.hidden_size, c.value_dim
    widths = {D} if values is None else {values} if isinstance(values, int) else set(values)
    if len(widths) != 1:
        raise NotImplementedError(f"rwkv7_hub: value_dim must be the same in all layers so far, got {values}")
    hidden = c.intermediate_size or 32 * -(-int(D * (c.hidden_ratio or 4)) // 32)
    norm = Norm("x", kind="layer", eps=c.norm_eps, affine="full" if c.norm_bias else "weight", to="y")
    return LanguageModel(
        hub_recipe(c, widths.pop(), "full"),
        vocab_size=c.vocab_size,
        dim=D,
        depth=c.num_hidden_layers,
        ffn=key_mix(hidden=str(hidden)),
        norm=norm,
        embed_norm=norm if c.norm_first else None,
        tie=c.tie_word_embeddings,
        head_init="orthogonal_half",
        embed_std=1e-4,
        embed_law="uniform",
        padding=c.pad_token_id,
    )


RANKS = ("decay_low_rank_dim", "gate_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim")
HUB_CONFIG = {"head_dim": 64, "num_heads": None, "norm_eps": 1e-5, "value_dim": None}
LAYER = Official(
    hub_layer,
    under("parts.", "", HUB_LAYER),
    config={
        **HUB_CONFIG, **dict.fromkeys(RANKS), "hidden_size": 1024, "elementwise_affine": True, "layer_idx": None,
        "fuse_norm": False, "num_hidden_layers": None,
    },
    inert=("mode",),
)  # fmt: skip
HUB = Official(
    hub_model,
    HUB_KEYS,
    config={
        **HUB_CONFIG, **dict(zip(RANKS, (64, 128, 64, 16), strict=True)), "hidden_size": 2048, "hidden_ratio": 4,
        "intermediate_size": None, "num_hidden_layers": 24, "norm_first": True, "norm_bias": True, "fuse_norm": True,
        "vocab_size": 32000, "tie_word_embeddings": False, "pad_token_id": None,
    },
    base="model.",
    inert=(
        *("attn_mode", "max_position_embeddings", "initializer_range"),
        *("fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp"),
    ),
    only={**UNQUANTISED, "hidden_act": ("sqrelu",), "attn": (None,), "model_type": ("rwkv7",)},
    ignores=unless_misspelt,
)  # fmt: skip
