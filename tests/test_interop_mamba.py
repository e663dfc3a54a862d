"""Mamba and Mamba-2 next to transformers itself: the same logits, gradients and states, weights both ways."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from recur import convert

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "state_size": 4}
HEADS = {**SMALL, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
# official name, class, arguments
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mamba": ("mamba_hf", "Mamba", SMALL),
    "mamba, all options": (
        "mamba_hf",
        "Mamba",
        {**SMALL, "expand": 3, "conv_kernel": 3, "use_bias": True, "use_conv_bias": False, "time_step_rank": 5}
        | {"layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
    ),
    "mamba2": ("mamba2_hf", "Mamba2", HEADS),
    "mamba2, all options": (
        "mamba2_hf",
        "Mamba2",
        {**HEADS, "expand": 4, "num_heads": 8, "conv_kernel": 3, "use_bias": True, "use_conv_bias": False}
        | {"layer_norm_epsilon": 1e-3, "tie_word_embeddings": True, "time_step_limit": (0.01, 0.2)},
    ),
}


def theirs(kind: str, arguments: dict[str, Any]) -> nn.Module:
    """A model of transformers in float32, no weight of which is where it starts."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**arguments))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.train(False)


def near(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_theirs(case: str) -> None:
    name, kind, arguments = CASES[case]
    model = theirs(kind, arguments)
    ours = convert.from_official(name, model.state_dict(), json.loads(model.config.to_json_string(use_diff=False)))
    ids, cotangent = torch.randint(40, (2, 21)), torch.randn(2, 21, 40)
    got, want = ours(ids), model(input_ids=ids, use_cache=False).logits
    near(got, want)
    got.backward(cotangent)
    want.backward(cotangent)
    for weight in ours.parameters():
        weight.data = weight.grad
    gradients = convert.to_official(name, ours)
    for key, weight in model.named_parameters():
        near(gradients[key], weight.grad)


@pytest.mark.parametrize("case", CASES)
def test_keys_that_they_load_are_loaded(case: str) -> None:
    """An older name of the embedding, and what their class without a head has saved."""
    name, kind, arguments = CASES[case]
    model, ids = theirs(kind, arguments), torch.randint(40, (2, 5))
    state = model.state_dict()
    older = {key.replace("embeddings.", "embedding."): tensor for key, tensor in state.items()}
    model.load_state_dict(dict(older))
    bare = {**model.backbone.state_dict(), "lm_head.weight": state["lm_head.weight"]}
    bare_older = {key.replace("embeddings.", "embedding."): tensor for key, tensor in bare.items()}
    for given in (older, bare, bare_older):
        with torch.no_grad():
            near(convert.from_official(name, given, arguments)(ids), model(input_ids=ids, use_cache=False).logits)
    with pytest.raises(ValueError, match=r"must hold backbone\.embeddings\.weight once, got backbone\.embedding"):
        convert.from_official(name, {**older, **state}, arguments)


@pytest.mark.parametrize("case", CASES)
def test_token_by_token_gives_their_logits(case: str) -> None:
    name, kind, arguments = CASES[case]
    model = theirs(kind, arguments)
    ours = convert.from_official(name, model.state_dict(), json.loads(model.config.to_json_string(use_diff=False)))
    ids, state = torch.randint(40, (2, 9)), ours.init_state(2)
    with torch.no_grad():
        near(torch.stack([ours.step(ids[:, t], state) for t in range(9)], 1), model(input_ids=ids).logits)


@pytest.mark.parametrize("case", CASES)
def test_what_ours_learned_loads_there(case: str) -> None:
    name, kind, arguments = CASES[case]
    model, ours = theirs(kind, arguments), convert.build(name, arguments)
    outcome = model.load_state_dict(convert.to_official(name, ours), strict=True)
    assert not outcome.missing_keys
    ids = torch.randint(40, (2, 21))
    with torch.no_grad():
        near(ours(ids), model(input_ids=ids, use_cache=False).logits)


def test_heads_must_make_up_the_inner_width() -> None:
    with pytest.raises(ValueError, match=r"num_heads \* head_dim must be expand \* hidden_size = 32, got 4 \* 4"):
        convert.build("mamba2_hf", {**HEADS, "head_dim": 4})
