"""The original packages of GateLoop and GSS themselves: options drawn, weights both ways, same numbers (float64)."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from recur import convert

with warnings.catch_warnings():  # they script and checkpoint in ways that torch now warns about
    warnings.simplefilter("ignore")
    import gated_state_spaces_pytorch as gss
    import gateloop_transformer as gateloop
    from gated_state_spaces_pytorch.autoregressive_wrapper import AutoregressiveWrapper
    from gated_state_spaces_pytorch.dsconv import EfficientDsConv
    from gated_state_spaces_pytorch.gss import DSS
    from gated_state_spaces_pytorch.mhesa import MHESA
    from gateloop_transformer.gateloop_transformer import CausalFullAttention, GateLoopedAttention
    from gateloop_transformer.simplified_gate_loop import SimpleGateLoopLayer
    from rotary_embedding_torch import RotaryEmbedding

pytestmark = pytest.mark.filterwarnings("ignore")
EXAMPLES = max(1, settings().max_examples // 2)

flag, seeds = st.booleans(), st.integers(0, 2**31 - 1)
OF_GATE_LOOP = {
    "heads": st.sampled_from([None, 1, 2, 4]),
    "dim_inner": st.sampled_from([None, 8, 12]),
    "add_swish_gating": flag,
    "sub_ln": flag,
    "frac_gradient_state_transition": st.sampled_from([0.3, 0.9, 1.0]),
    "checkpoint_gate_looped_attn": st.just(False),
}
OF_ATTENTION = {
    "dim_head": st.integers(3, 7),
    "heads": st.integers(1, 3),
    "rotary_emb": flag,
    "add_swish_gating": flag,
    "data_dependent_rel_pos": flag,
    "softmax_normalize": st.sampled_from([None, False, True]),
}
OF_GATED = {"dim_expansion_factor": st.sampled_from([1, 1.7, 4])}
OF_GSS = {
    "dss_kernel_N": st.integers(1, 6),
    "dss_kernel_H": st.integers(1, 6),
    "dss_kernel_lambda_imag_exp": flag,
    **OF_GATED,
}
OF_MODEL = {"num_tokens": st.integers(2, 12), "depth": st.integers(1, 3)}
DIM = {"dim": st.sampled_from([4, 8])}
HEADS = {"heads": st.sampled_from([1, 2, 4])}
LAYERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "dss": (DSS, {**DIM, "kernel_N": st.integers(1, 6), "dss_kernel_lambda_imag_exp": flag}),
    "ds_conv": (EfficientDsConv, {**DIM, **HEADS}),
    "exponential_smoothing": (MHESA, {**DIM, **HEADS, "reverse_seq": flag}),
    "gated_ds_conv": (gss.GatedDsConv, {**DIM, **HEADS, **OF_GATED, "dim_dsconv": st.just(8), "reverse_seq": flag}),
    "gated_exponential_smoothing": (gss.GatedMHESA, {**DIM, **HEADS, **OF_GATED, "dim_mhesa": st.just(4)}),
    "gateloop_attention": (GateLoopedAttention, {**DIM, **OF_GATE_LOOP}),
    "gateloop_full_attention": (CausalFullAttention, {"dim": st.sampled_from([4, 8, 9]), **OF_ATTENTION}),
    "gss_block": (gss.GSS, {**DIM, **OF_GSS, "reverse_seq": flag}),
    "simple_gate_loop": (
        SimpleGateLoopLayer,
        {**DIM, "prenorm": flag, "post_ln": flag, "reverse": flag, "use_heinsen": flag},
    ),
}
OF_MIXERS = {
    "gate_loop_heads": OF_GATE_LOOP["heads"],
    "dim_gate_looped_attn": OF_GATE_LOOP["dim_inner"],
    "attn_add_swish_gating": flag,
    "attn_softmax_normalize": OF_ATTENTION["softmax_normalize"],
    "checkpoint_gate_looped_attn": st.just(False),
    "frac_gradient_state_transition": OF_GATE_LOOP["frac_gradient_state_transition"],
    **{name: OF_ATTENTION[name] for name in ("dim_head", "heads", "rotary_emb", "data_dependent_rel_pos")},
}
OF_TRANSFORMER = {
    "ff_mult": st.integers(1, 4),
    **dict.fromkeys(("use_gate_looped_attn", "ablate_complex", "ablate_state_transition"), flag),
    **dict.fromkeys(("post_ln_norm", "sub_ln"), flag),
    **OF_MIXERS,
}
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "gated_state_space_lm": (gss.GatedStateSpacesLM, {**DIM, **OF_MODEL, **OF_GSS}),
    "gateloop_transformer": (gateloop.Transformer, {**DIM, **OF_MODEL, **OF_TRANSFORMER}),
    "gated_exponential_smoothing_lm": (
        gss.GatedExponentialSmoothingLM,
        {**DIM, **OF_MODEL, **HEADS, **OF_GATED, "dim_mhesa": st.just(8)},
    ),
    "gated_ds_conv_lm": (gss.GatedDsConvLM, {**DIM, **OF_MODEL, **HEADS, **OF_GATED, "dim_dsconv": st.just(4)}),
}


def built(official: type[nn.Module], config: dict[str, Any]) -> nn.Module:
    """An official module in float64. The cache of its angles has the width of an even head alone: without it."""
    module = official(**config).double().eval()
    for part in module.modules():
        if isinstance(part, RotaryEmbedding):
            part.cache_if_possible = False
    return module


def drawn(data: st.DataObject, official: type[nn.Module], options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """An official module whose options are drawn, and they; constants moved away from their first values."""
    config = data.draw(st.fixed_dictionaries(options), label="options")
    if config.get("dim_inner", config.get("dim_gate_looped_attn")) and config.get("gate_loop_heads", 1) is None:
        config["gate_loop_heads"] = 4
    if config.get("data_dependent_rel_pos", False):
        config["dim_head"] *= 2  # its gates are one for a pair of channels
    torch.manual_seed(data.draw(seeds, label="seed"))
    module = built(official, config)
    for weight in module.parameters():
        if weight.requires_grad and weight.ndim == 1:
            weight.data += 0.1 * torch.randn_like(weight)
    return module, config


def agree(ours: Tensor, theirs: Tensor, config: dict[str, Any]) -> None:
    """Relative to the largest entry; wider where the original computes in float32, or saturates."""
    rough = config.get("rotary_emb", False) or config.get("data_dependent_rel_pos", False)
    limit = 1e-4 if config.get("use_heinsen", False) else 1e-6 if rough else 1e-9
    assert (ours - theirs).abs().max() <= limit * theirs.abs().max().clamp(min=1e-30)


def read_back(name: str, official: type[nn.Module], module: Any, config: dict[str, Any]) -> nn.Module:
    """The official module with the weights of ours, which have been changed."""
    for weight in module.parameters():
        weight.data = weight.data * 0.9 if weight.requires_grad else weight.data
    again = built(official, config)
    again.load_state_dict(convert.to_official(name, module))
    return again


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_layers_give_what_the_originals_give(name: str, data: st.DataObject) -> None:
    official, options = LAYERS[name]
    theirs, config = drawn(data, official, options)
    ablations = [key for key in inspect.signature(official.forward).parameters if key.startswith("ablate_")]
    call = {key: data.draw(flag, label=key) for key in ablations}
    ours = convert.from_official(name, theirs.state_dict(), {**config, **call})
    x = torch.randn(2, data.draw(st.integers(1, 40), label="T"), config["dim"]).double()
    x, y = x.requires_grad_(), x.clone().requires_grad_()
    got, wanted = ours(x).y, theirs(y, **call)
    agree(got, wanted, config)
    if not config.get("use_heinsen", False):  # its gradients are noise
        cotangent = torch.randn_like(wanted)
        agree(*(torch.autograd.grad(out, leaf, cotangent)[0] for out, leaf in ((got, x), (wanted, y))), config)
    again = read_back(name, official, ours, config)
    agree(ours(x).y, again(x, **call), config)


@pytest.mark.parametrize("softmax_normalize", [False, True])
@pytest.mark.parametrize("read", ["rotary_emb", "data_dependent_rel_pos", "nothing"])
def test_an_odd_head_rotates_the_pairs_that_fit(read: str, softmax_normalize: bool) -> None:
    """And a gate of a pair, which it cannot have, may be there where it is not read."""
    config = {"dim": 9, "dim_head": 5, "heads": 2, "softmax_normalize": softmax_normalize, "add_swish_gating": True}
    config |= {} if read == "nothing" else {read: True}
    call = {"ablate_state_transition": read == "data_dependent_rel_pos"}
    torch.manual_seed(0)
    theirs, x = built(CausalFullAttention, config), torch.randn(2, 11, 9).double()
    ours = convert.from_official("gateloop_full_attention", theirs.state_dict(), {**config, **call})
    with torch.no_grad():
        wanted = theirs(x, **call)
        agree(ours(x).y, wanted, config)
        state = ours.init_state(2)
        agree(torch.stack([ours.step(x[:, t], state) for t in range(11)], 1), wanted, config)
    again = convert.to_official("gateloop_full_attention", ours)
    assert {key: tensor.tolist() for key, tensor in again.items()} == {
        key: tensor.tolist() for key, tensor in theirs.state_dict().items()
    }


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_models_give_what_the_originals_give(name: str, data: st.DataObject) -> None:
    official, options = MODELS[name]
    theirs, config = drawn(data, official, options)
    ours = convert.from_official(name, theirs.state_dict(), config)
    ids = torch.randint(config["num_tokens"], (2, data.draw(st.integers(2, 40), label="T")))
    agree(ours(ids), theirs(ids), config)
    again = read_back(name, official, ours, config)
    agree(ours(ids), again(ids), config)
    loss = again(ids, return_loss=True) if name == "gateloop_transformer" else AutoregressiveWrapper(again)(ids)
    agree(ours.loss(ids), loss, config)


@settings(max_examples=EXAMPLES)
@given(seed=seeds, cut=st.integers(1, 19))
def test_the_simple_layer_goes_on_from_the_same_cache(seed: int, cut: int) -> None:
    torch.manual_seed(seed)
    theirs, x = SimpleGateLoopLayer(6).double(), torch.randn(3, 20, 6).double()
    ours = convert.from_official("simple_gate_loop", theirs.state_dict(), {"dim": 6})
    _, cache = theirs(x[:, :cut], return_cache=True)
    _, state = ours(x[:, :cut])
    agree(state["parts"]["gated_scan"].reshape(-1, 1), cache[1], {})
    wanted, cache = theirs(x[:, cut:], cache=cache, return_cache=True)
    y, state = ours(x[:, cut:], state)
    agree(y, wanted, {})
    agree(state["parts"]["gated_scan"].reshape(-1, 1), cache[1], {})


@settings(max_examples=max(1, EXAMPLES // 4))
@given(data=st.data(), window=st.integers(1, 12))
def test_the_most_likely_continuation_within_a_window_is_the_original_one(data: st.DataObject, window: int) -> None:
    theirs, config = drawn(data, gss.GatedStateSpacesLM, {**DIM, **OF_MODEL, **OF_GSS})
    ours = convert.from_official("gated_state_space_lm", theirs.state_dict(), config)
    ids, V = torch.randint(config["num_tokens"], (2, 5)), config["num_tokens"]
    wanted = AutoregressiveWrapper(theirs, max_seq_len=window).generate(ids, 12, filter_thres=1 - 1.5 / V)
    assert torch.equal(ours.generate(ids, 12, temperature=0, window=window)[:, 5:], wanted)
