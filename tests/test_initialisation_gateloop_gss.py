"""First values are those of the originals: every tensor's law, by its statistics over many entries."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recur import convert

Law = Callable[[Tensor], bool]


def close(value: Tensor, wanted: float, weight: Tensor) -> bool:
    """Within six deviations of an estimate from so many entries."""
    return abs(float(value) - wanted) <= 6 * float(weight.std()) / weight.numel() ** 0.5


def constant(value: float) -> Law:
    return lambda weight: bool((weight == value).all())


def normal(std: float, cut: float = 6.0) -> Law:
    """Nothing lies beyond `cut` deviations, and something near."""

    def law(weight: Tensor) -> bool:
        far = float(weight.abs().max())
        return close(weight.mean(), 0, weight) and close(weight.std(), std, weight) and 1.5 * std < far <= cut * std

    return law


def uniform(bound: float) -> Law:
    """Up to the bound, and the whole of it."""

    def law(weight: Tensor) -> bool:
        far = float(weight.abs().max())
        return (
            close(weight.mean(), 0, weight) and close(weight.std(), bound / 3**0.5, weight) and 0.9 < far / bound <= 1
        )

    return law


def lecun(fan_in: int) -> Law:
    """Normal of variance 1/fan_in after a cut at two deviations of what was cut."""
    return normal(fan_in**-0.5, cut=2 / 0.8796)


GSS = {
    "token_emb.weight": normal(1),
    "to_logits.weight|.*to_[uv].0.weight": uniform(64**-0.5),
    ".*to_gate.weight": uniform(48**-0.5),
    ".*to_out.*": uniform(128**-0.5),
    ".*norm.weight": constant(1),
    ".*norm.bias": constant(0),
}
MODEL = {"num_tokens": 80, "dim": 64, "depth": 4}
UNIT = {**MODEL, "dim_expansion_factor": 2}
FF = {".*1.fn.0.*": uniform(64**-0.5), ".*1.fn.2.*": uniform(128**-0.5), ".*gamma": constant(1)}
FRAME = {"token_emb.weight": normal(1), "to_logits.1.weight": uniform(64**-0.5), **FF}
DENSE = {
    ".*dense_layers_0.kernel|.*[^v]_?proj.kernel|head.kernel": lecun(64),
    ".*dense_layers_1.kernel": lecun(96),
    ".*scale": constant(1),
    ".*bias": constant(0),
    ".*embedding": normal(1 / 8),
}
AUTHOR = {"n_layer": 3, "d_model": 64, "d_channel_mixing": 96, "d_h": 64, "max_seq_length": 100}
AUTHOR |= {"input_vocab_size": 80, "output_vocab_size": 80}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Law]]] = {
    "gss": ("gated_state_space_lm", {**UNIT, "dss_kernel_H": 48}, {".*dss.(Lambda|C|param).*": normal(1), **GSS}),
    "exponential smoothing": (
        "gated_exponential_smoothing_lm",
        {**UNIT, "dim_mhesa": 48, "heads": 48},
        {".*(alphas|dampen_factors|param_D)": normal(1), **GSS},
    ),
    "ds-conv": (
        "gated_ds_conv_lm",
        {**UNIT, "dim_dsconv": 48},
        {".*param_D": normal(1), ".*to_weight.weight": uniform(48**-0.5), **GSS},
    ),
    "gateloop": ("gateloop_transformer", {**MODEL, "ff_mult": 2}, {".*fn.to_.*": uniform(64**-0.5), **FRAME}),
    "gateloop's attention": (
        "gateloop_transformer",
        {**MODEL, "ff_mult": 2, "use_gate_looped_attn": False, "data_dependent_rel_pos": True, "dim_head": 8},
        {".*fn.to_.*": uniform(64**-0.5), **FRAME},
    ),
    "gateloop, JAX": (
        "gateloop_jax_transformer",
        MODEL,
        {".*gamma": constant(1), "embedding": normal(0.02), ".*w[qkvago]|.*proj_(in|out).*": normal(1)},
    ),
    "gated linear RNN": ("gated_linear_rnn_lm", AUTHOR, DENSE),
    "gated RNN": (
        "gated_linear_rnn_lm",
        {**AUTHOR, "use_true_recurrence": True, "positional_encoding_mode": "learned"},
        {".*recurrent_proj.kernel": constant(0), **DENSE},
    ),
    "the author's transformer": (
        "gateloop_author_transformer",
        {**AUTHOR, "n_head": 4},
        {".*qkv_proj.kernel": uniform((6 / (64 + 192)) ** 0.5), **DENSE},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_starts_by_its_law(case: str) -> None:
    name, config, laws = CASES[case]
    torch.manual_seed(0)
    state = convert.to_official(name, convert.build(name, config))
    families: dict[str, list[Tensor]] = {}
    for key, tensor in state.items():  # the same tensor of all layers together
        pattern = next(pattern for pattern in laws if re.fullmatch(pattern, key))
        families.setdefault(f"{pattern} {re.sub('[0-9]+', '*', key)}", []).append(tensor.flatten())
    wrong = [key for key, tensors in families.items() if not laws[key.split(" ")[0]](torch.cat(tensors))]
    assert wrong == []
