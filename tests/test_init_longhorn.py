"""First values of Longhorn and of the models of its repository: the laws their references state, by statistics."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from recur import convert

Law = Callable[[Tensor], None]


def uniform(bound: float) -> Law:
    def check(weight: Tensor) -> None:
        assert weight.abs().max() <= bound * (1 + 1e-6)
        spread(weight, bound / math.sqrt(3))

    return check


def normal(std: float) -> Law:
    def check(weight: Tensor) -> None:
        assert weight.abs().max() > 2 * std  # beyond a uniform law of that spread
        spread(weight, std)

    return check


def spread(weight: Tensor, std: float) -> None:
    """Mean 0 and this deviation, within five standard errors."""
    error = 5 / math.sqrt(weight.numel())
    assert abs(weight.mean()) <= std * error
    assert abs(weight.std() / std - 1) <= error


def exactly(values: float | list[float]) -> Law:
    def check(weight: Tensor) -> None:
        want = torch.as_tensor(values, dtype=weight.dtype).expand_as(weight)
        assert torch.allclose(weight, want, rtol=1e-6, atol=1e-7)

    return check


def time_constants(bias: Tensor) -> None:
    """softplus(b) log-uniform from 0.001 to 0.1."""
    logs = torch.nn.functional.softplus(bias).log()
    low, high = math.log(1e-3), math.log(1e-1)
    assert low - 1e-3 <= logs.min()
    assert logs.max() <= high + 1e-3
    spread(logs - (low + high) / 2, (high - low) / math.sqrt(12))


def rates(A_log: Tensor) -> None:
    """exp(A_log) uniform from 1 to 16."""
    A = A_log.exp()
    assert A.min() >= 1 - 1e-4
    assert A.max() <= 16 + 1e-4
    spread(A - 8.5, 15 / math.sqrt(12))


NORM = exactly(1.0)
ZERO = exactly(0.0)
EMBEDDING = {"backbone.embedding.weight": normal(0.02), "lm_head.weight": normal(0.02), "*norm*.weight": NORM}
D, E, N, R, LAYERS = 96, 192, 16, 6, 3  # d_model, inner width, state, rank, layers
MIXER = {
    "*in_proj.weight": uniform(D**-0.5),
    "*_proj.bias": ZERO,
    "*conv1d.*": uniform(4**-0.5),
    "*x_proj.weight": uniform(E**-0.5),
    "*.D": exactly(1.0),
    "*out_proj.weight": uniform((E * LAYERS) ** -0.5),
}
MIXER_2 = {pattern: law for pattern, law in MIXER.items() if "x_proj" not in pattern}
MAMBA_LM = {"d_model": D, "n_layer": LAYERS, "vocab_size": 200}
SMALL = normal(0.02)


def f(power: float) -> list[float]:
    return [(i / D) ** power for i in range(D)]


def shares(layer: int) -> dict[str, Law]:
    """RWKV's shares of the token before, its decays and bonuses in one layer of three."""
    r0, r1, H = layer / 2, 1 - layer / 3, 4
    keys = exactly([1 - x for x in f(r1)])
    gates = exactly([1 - x for x in f(r1 / 2)])
    here = f"*.h.{layer}.tmix."
    return {
        f"{here}time_maa_k": keys,
        f"{here}time_maa_v": exactly([1 - (x + 0.3 * r0) for x in f(r1)]),
        f"{here}time_maa_[rg]": gates,
        f"*.h.{layer}.cmix.time_maa_[kr]": keys,
        f"{here}time_decay": lambda w: exactly([-6 + 5 * (h / (H - 1)) ** (0.7 + 1.3 * r0) for h in range(H)])(w[:, 0]),
        f"{here}time_faaaa": lambda w: exactly([r0 * (1 - h / (H - 1)) for h in range(H)])(w[:, 0]),
    }


def xavier(fan_in: int, fan_out: int) -> Law:
    return uniform(2**-2.5 * math.sqrt(6 / (fan_in + fan_out)))


# official name, config, the law of each key: the first pattern that fits counts
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Law]]] = {
    "longhorn": (
        "longhorn_lm",
        {**MAMBA_LM, "ssm_cfg": {"bias": True}},
        {**EMBEDDING, "*dt_head.weight": uniform(R**-0.5), "*dt_head.bias": ZERO, **MIXER},
    ),
    "mamba": (
        "mamba_lm",
        {**MAMBA_LM, "ssm_cfg": {"bias": True}},
        {
            **EMBEDDING,
            "*dt_proj.weight": uniform(R**-0.5),
            "*dt_proj.bias": time_constants,
            "*A_log": exactly([math.log(n + 1) for n in range(N)]),
            **MIXER,
        },
    ),
    "mamba2": (
        "mamba_lm",
        {**MAMBA_LM, "ssm_cfg": {"layer": "Mamba2", "headdim": 2, "d_state": N, "bias": True}},
        {**EMBEDDING, "*dt_bias": time_constants, "*A_log": rates, **MIXER_2},
    ),
    "retnet": (
        "retnet",
        {"vocab_size": 200, "decoder_layers": 2, "decoder_embed_dim": D, "decoder_retention_heads": 4}
        | {"decoder_value_embed_dim": 160, "decoder_ffn_embed_dim": 160},
        {"*norm.weight": NORM, "*": SMALL},
    ),
    "gla": (
        "gla",
        {"vocab_size": 200, "d_model": D, "n_head": 4, "n_layer": 2},
        {
            "*.ln_*": NORM,
            "*[qk]_proj.weight": xavier(D, D // 2),
            "*k_gate.0.weight": xavier(D, 16),
            "*k_gate.1.weight": xavier(16, D // 2),
            "*.bias": ZERO,
            "*": SMALL,
        },
    ),
    "llama": (
        "llama",
        {"vocab_size": 200, "n_embd": D, "n_head": 4, "n_layer": LAYERS, "bias": True},
        {"*.ln_*": NORM, "*.bias": ZERO, "*c_proj.weight": normal(0.02 / math.sqrt(2 * LAYERS)), "*": SMALL},
    ),
    "rwkv": (
        "rwkv",
        {"vocab_size": 200, "n_embd": D, "n_head": 4, "n_layer": 3, "block_size": 32, "bias": True},
        {
            **shares(0),
            **shares(1),
            **shares(2),
            "*ln_*.weight": NORM,
            "*.bias": ZERO,
            "*tmix.output.weight": normal(0.02 / math.sqrt(2 * 3)),
            "*": SMALL,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_first_values_follow_their_laws(case: str) -> None:
    name, config, laws = CASES[case]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        state = convert.to_official(name, convert.build(name, config))
    used = set()
    for key, weight in state.items():
        pattern = next(pattern for pattern in laws if fnmatch.fnmatch(key, pattern))
        used.add(pattern)
        laws[pattern](weight.double())
    assert used == set(laws)


def test_two_branches_per_layer_divide_by_both() -> None:
    """With a feed-forward beside it, what leaves the mixer and what leaves the feed-forward count as two."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        config = {**MAMBA_LM, "d_intermediate": 128}
        state = convert.to_official("mamba_lm", convert.build("mamba_lm", config))
    branches = 2 * config["n_layer"]
    for end in ("mixer.out_proj.weight", "mlp.fc2.weight"):
        found = [weight for key, weight in state.items() if key.endswith(end)]
        assert len(found) == config["n_layer"]
        for weight in found:
            uniform((weight.shape[1] * branches) ** -0.5)(weight.double())


def test_one_layer_and_one_head_divide_by_nothing() -> None:
    model = convert.build("rwkv", {"vocab_size": 8, "n_embd": 8, "n_head": 1, "n_layer": 1, "block_size": 4})
    assert all(weight.isfinite().all() for weight in model.parameters())
