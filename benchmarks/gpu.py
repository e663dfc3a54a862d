"""Scans and steps on a GPU: ours and every installed peer in one process, on the shapes of the field.

`recur bench --help` lists the options and has examples; `python benchmarks/gpu.py OPTIONS` is the same.

Time: medians of Triton's do_bench with the L2 flushed, `plain` (what a caller waits for) and `graph` (one call replayed
from a CUDA graph, no host in it); steps are timed among twenty in a graph. Forward runs without gradients, `both` is
forward plus the gradient of every input. peak: memory above the inputs during `both`. floor: every input read once and
every output written once (`both`: inputs twice, the output's gradient once, then all outputs and gradients written) at
the copy rate of this run, or the chunked algorithm's products at its matmul rate, whichever is longer. Errors: relative
to the float64 token loop on the same inputs at T = 256, the worst gradient of all inputs.
Writes gpu.json, gpu.md and gpu.png to --out after every case; what --have already holds is not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import recur

BF16 = torch.bfloat16
Tensors = list[Tensor | None]
MATRIX = [
    (8, 2048, 16, 128, 128),
    (1, 32768, 16, 128, 128),
    (4, 8192, 32, 64, 64),
    (2, 8192, 8, 256, 256),
    (1, 256, 16, 128, 128),
]
# States of more than 256 rows or columns, each before as many heads of 128 x 128 as have its entries.
WIDE = [
    *((2, 8192, 8, 256, 512), (2, 8192, 64, 128, 128)),
    *((2, 4096, 4, 512, 1024), (2, 4096, 128, 128, 128)),
    *((2, 4096, 4, 384, 1536), (2, 4096, 144, 128, 128)),
]
# FlashQLA hands few heads to several programs as well; then q and k shared by two heads each, [B T G H K V]
GATED_DELTA = [*MATRIX, (1, 2048, 16, 128, 128), (1, 131072, 8, 128, 128)]
GROUPED = [(1, 8192, 4, 8, 128, 128)]
PACKED = [(1, 32768, 16, 128, 128), (1, 131072, 8, 128, 128)]  # documents of `mixed` lengths
# Of scans with erase and removal keys, or several writes per token.
ERASING = [(8, 2048, 16, 64, 64), (8, 2048, 16, 128, 128), (1, 32768, 16, 64, 64), (1, 32768, 16, 128, 128)]
CHANNELS = [(8, 2048, 4096, 16), (1, 32768, 4096, 16), (4, 8192, 2048, 16)]
DIAGONAL = [(8, 2048, 2048), (1, 65536, 1024), (16, 8192, 1024), (32, 1024, 4096)]
DECODE = [(1, 16, 128, 128), (64, 16, 128, 128), (256, 16, 128, 128)]
CHECKED = 256  # tokens of the runs whose errors are reported


class Peer(NamedTuple):
    """Another package's function of the same tensors; its module `needs` is looked for, not imported.

    prepare, untimed, gives it its own layout; answer converts its output to ours; grads: whether those compare;
    backward: whether it has one; takes: whether it takes a shape.
    """

    needs: str
    call: Callable[..., Tensor]
    prepare: Callable[..., Tensors] = lambda *tensors: list(tensors)
    answer: Callable[[Tensor], Tensor] = lambda y: y
    grads: bool = True
    backward: bool = True
    takes: Callable[[tuple[int, ...]], bool] = lambda shape: True


class Family(NamedTuple):
    """One recurrence: its shapes, inputs, our call, the peers, and the products of its chunked algorithm a token."""

    shapes: list[tuple[int, ...]]
    inputs: Callable[..., Tensors]
    ours: Callable[..., Tensor]
    peers: Callable[[], dict[str, Peer]] = dict
    flops: Callable[..., tuple[float, float]] = lambda *shape: (0.0, 0.0)
    absent: tuple[str, ...] = ()  # peers that were not run here
    like: int = 0  # which input the output is like
    step: bool = False


def rand(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def gates(*shape: int, shift: float = 0.0, slow: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
    """Log sigmoids, the slower the larger `slow` and `shift`."""
    return (F.logsigmoid(torch.randn(*shape) + shift) / slow).to(dtype).requires_grad_()


# Matrix states, [B T H K V]; tensors are q, k, v, log_decay, beta, bonus


def matrix(
    B: int, T: int, H: int, K: int, V: int, *, gate: Callable[..., Tensor | None] = lambda *shape: None,
    tied: bool = False, delta: bool = False, bonus: bool = False,
) -> Tensors:  # fmt: skip
    k = F.normalize(torch.randn(B, T, H, K), dim=-1).to(BF16).requires_grad_() if delta else rand(B, T, H, K)
    beta = torch.rand(B, T, H).to(BF16).requires_grad_() if delta else None
    weight = rand(H, K, dtype=torch.float32) if bonus else None
    return [rand(B, T, H, K), None if tied else k, rand(B, T, H, V), gate(B, T, H, K), beta, weight]


def matrix_scan(form: str, q: Tensor, k: Any, v: Tensor, g: Any = None, beta: Any = None, bonus: Any = None) -> Tensor:
    return recur.scan(q, k, v, g, beta=beta, bonus=bonus, scale=q.shape[-1] ** -0.5, form=form).y


def chunked_products(B: int, T: int, H: int, K: int, V: int) -> tuple[float, float]:
    """Forward, and with backward, in chunks of 64 tokens."""
    forward = 2 * 64 * (K + V) + 4 * K * V
    return B * T * H * forward, B * T * H * (forward + 64 * (6 * K + 4 * V) + 10 * K * V)


def delta_products(B: int, T: int, H: int, K: int, V: int) -> tuple[float, float]:
    forward = 64 * (6 * K + 4 * V) + 64 * 64 + 6 * K * V
    return B * T * H * forward, 3.5 * B * T * H * forward


def slopes(H: int, steepest: float) -> Tensor:
    """[H] log decays that rise with the head."""
    return (-steepest / H * torch.arange(H)).float().requires_grad_()


def retention(B: int, T: int, H: int, K: int) -> Tensor:
    return torch.log(1 - 2.0 ** (-5.0 - torch.arange(H))).float().requires_grad_()


def fla(name: str) -> Any:
    import fla.ops.common.chunk_o as guard

    guard.TRITON_ABOVE_3_7_1 = True  # its refusal of Hopper's gated backward; the errors here show whether it was right
    module, _, function = f"fla.ops.{name}".rpartition(".")
    return getattr(import_module(module), function)


def fla_peer(name: str, call: Callable[..., Any]) -> dict[str, Peer]:
    return {f"fla {name}": Peer("fla", lambda *tensors: call(fla(name), *tensors)[0])}


# The same with erase and removal keys, write gates and several writes per token


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1).to(BF16).requires_grad_()


def strengths(*shape: int) -> Tensor:
    return torch.rand(*shape).to(BF16).requires_grad_()


def low_rank(B: int, T: int, H: int, K: int, V: int) -> Tensors:
    """q, k, v, log_decay, erase, remove; gates as RWKV-7 bounds them."""
    decay = (-math.exp(-0.5) * torch.sigmoid(torch.randn(B, T, H, K) - 1)).to(BF16).requires_grad_()
    e = unit(B, T, H, K)
    b = (e.detach() * torch.rand(B, T, H, K)).to(BF16).requires_grad_()
    return [rand(B, T, H, K), unit(B, T, H, K), rand(B, T, H, V), decay, e, b]


def low_rank_scan(form: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, e: Tensor, b: Tensor) -> Tensor:
    options: Any = {"erase_from": "previous", "scale": q.shape[-1] ** -0.5, "form": form}
    return recur.scan(q, k, v, g, erase=e, remove=b, **options).y


def comba(B: int, T: int, H: int, K: int, V: int) -> Tensors:
    """q, k, v, log_decay, p, beta."""
    k = unit(B, T, H, K)
    p = (k.detach() * torch.rand(H, 1)).to(BF16).requires_grad_()
    return [rand(B, T, H, K), k, rand(B, T, H, V), by_head(B, T, H, K), p, strengths(B, T, H)]


def comba_scan(form: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, p: Tensor, beta: Tensor) -> Tensor:
    options: Any = {"erase_from": "previous", "scale": q.shape[-1] ** -0.5, "form": form}
    return recur.scan(q, k, v, g, erase=beta.unsqueeze(-1) * p, write=beta, **options).y


def gated_keys(B: int, T: int, H: int, K: int, V: int) -> Tensors:
    """q, k, v, log_decay, and the gates that erase and write."""
    gate = gates(B, T, H, K, shift=2.0)
    return [rand(B, T, H, K), unit(B, T, H, K), rand(B, T, H, V), gate, strengths(B, T, H, K), strengths(B, T, H, V)]


def gated_keys_scan(form: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor) -> Tensor:
    return recur.scan(q, k, v, g, erase=b * k, write=w, scale=q.shape[-1] ** -0.5, form=form).y


def delta_product(B: int, T: int, H: int, K: int, V: int, *, writes: int) -> Tensors:
    """q, k, v, log_decay, beta."""
    several = (B, T, writes, H)
    gate = by_head(B, T, H, K)
    return [rand(B, T, H, K), unit(*several, K), rand(*several, V), gate, strengths(*several)]


def sub_tokens(writes: int) -> Callable[..., tuple[float, float]]:
    """Products where every token is so many."""
    return lambda B, T, *sizes: delta_products(B, writes * T, *sizes)


def fla_product(run: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
    return run(q, k.flatten(1, 2), v.flatten(1, 2), g, beta.flatten(1, 2), k.shape[2])


def mlstm(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    from mlstm_kernels.torch.chunkwise import mlstm_siging_chunkwise__xl_chunk as run

    return run(q, k, v, i, f, normalize=False, chunk_size=128, autocast_kernel_dtype=BF16)


def to_mlstm(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *_: None) -> Tensors:
    """Heads before time, an input gate that is open, and the logit of the forget gate."""
    heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v, g)]
    logit = (heads_first[3] - torch.log(-torch.expm1(heads_first[3]))).detach().requires_grad_()
    return [*heads_first[:3], torch.full_like(logit, 30.0).requires_grad_(), logit]


def heads_of_128(shape: tuple[int, ...]) -> bool:
    return shape[-2:] == (128, 128)


def flash_qla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *_: Any, **packed: Tensor) -> Tensor:
    from flash_qla import chunk_gated_delta_rule

    return chunk_gated_delta_rule(q, k, v, g, beta, **packed)[0]


def to_flashinfer(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *_: Any) -> Tensors:
    """Rows one after the other, and gates themselves, in float32."""
    rows = torch.arange(len(q) + 1) * q.shape[1]
    return [*(x.detach().flatten(0, 1) for x in (q, k, v, g.float().exp(), beta.float())), rows]


def flashinfer(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, rows: Tensor, **packed: Tensor) -> Tensor:
    from flashinfer.gdn_prefill import chunk_gated_delta_rule

    y = chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens=packed.get("cu_seqlens", rows))
    return y.unflatten(0, (len(rows) - 1, -1))


@cache
def mixed(T: int) -> Tensor:
    """Borders of documents of T / 2, T / 4, ... T / 64 and T / 64 tokens, the longest in the middle."""
    return torch.tensor([0, *accumulate(T // part for part in (8, 32, 2, 64, 4, 64, 16))])


def gated_delta_peers(packed: bool = False) -> dict[str, Peer]:
    """fla hands this rule to FlashQLA where that is installed, unless the process runs with its FLA_FLASH_QLA=0."""

    def options(T: int) -> dict[str, Tensor]:
        return {"cu_seqlens": mixed(T)} if packed else {}

    found = fla_peer(
        "chunk_gated_delta_rule",
        lambda run, q, k, v, g, beta, *_: run(q, k, v, g, beta, **options(q.shape[1])),
    )
    found["FlashQLA"] = Peer(
        "flash_qla", lambda q, *tensors: flash_qla(q, *tensors, **options(q.shape[1])), takes=heads_of_128
    )
    found["FlashInfer"] = Peer(
        "flashinfer", lambda q, *tensors: flashinfer(q, *tensors, **options(len(q))), to_flashinfer, grads=False,
        backward=False, takes=heads_of_128,
    )  # fmt: skip
    return found


def grouped(B: int, T: int, G: int, H: int, K: int, V: int) -> Tensors:
    """Gated delta whose q and k are shared by H / G heads."""
    q, k = matrix(B, T, G, K, V, delta=True)[:2]
    return [q, k, *matrix(B, T, H, K, V, gate=by_head, delta=True)[2:]]


def packed_scan(form: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *_: None) -> Tensor:
    scale, cu_seqlens = q.shape[-1] ** -0.5, mixed(q.shape[1])
    return recur.scan(q, k, v, g, beta=beta, scale=scale, cu_seqlens=cu_seqlens, form=form).y


SIGMOID = Peer("mlstm_kernels", mlstm, to_mlstm, lambda y: y.transpose(1, 2), grads=False)


def log_to_gate(x: Tensor, g: Tensor) -> Tensors:
    """[B T D] with log gates -> plain gates and inputs [B D T]."""
    return [t.detach().mT.contiguous().requires_grad_() for t in (g.exp(), x)]


def accelerated(module: str, a: Tensor, x: Tensor) -> Tensor:
    return import_module(f"accelerated_scan.{module}").scan(a, x)


def gateloop(a: Tensor, x: Tensor) -> Tensor:
    from gateloop_transformer.associative_scan import associative_scan
    from gateloop_transformer.simplified_gate_loop import binary_operator

    return associative_scan(binary_operator, (a, x))[1]


def diagonal_peers(module: str, with_fla: bool) -> dict[str, Peer]:
    accelerated_peer = Peer(
        "accelerated_scan", partial(accelerated, module), log_to_gate, lambda y: y.mT, grads=False,
        takes=lambda shape: shape[0] * shape[2] < 2**16,  # beyond, it reads what is not there
    )  # fmt: skip
    tree = Peer(
        "gateloop_transformer",
        gateloop,
        lambda x, g: [t.detach().requires_grad_() for t in (g.exp(), x)],
        grads=False,
    )
    hgrn: dict[str, Peer] = {}
    for name in ("hgrn.chunk_hgrn", "fused_recurrent_hgrn") if with_fla else ():
        hgrn |= fla_peer(name, lambda run, x, g: run(x, g))
    return hgrn | {f"accelerated_scan {module}": accelerated_peer, "gateloop_transformer associative_scan": tree}


def complex_gates(*shape: int) -> Tensor:
    return torch.complex(F.logsigmoid(torch.randn(*shape) + 2), torch.randn(*shape)).requires_grad_()


# Elementwise states, [B T V N], and steps, [B H K V]


def channels(B: int, T: int, V: int, N: int, *, mamba: bool) -> Tensors:
    rate = (F.softplus if mamba else torch.sigmoid)(torch.randn(B, T, V) - 2).to(BF16).requires_grad_()
    A = (-torch.rand(V, N) * 4 - 0.1).requires_grad_() if mamba else None
    return [rand(B, T, V), rate, A, rand(B, T, N), rand(B, T, N)]


def token(B: int, H: int, K: int, V: int, *, gate: Callable[..., Tensor], delta: bool = False) -> Tensors:
    beta = torch.rand(B, H).to(BF16) if delta else None
    tensors = rand(B, H, K), F.normalize(rand(B, H, K), dim=-1), rand(B, H, V), gate(B, H, K), beta
    return [None if x is None else x.detach() for x in (*tensors, torch.randn(B, H, K, V))]


def matrix_step(form: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Any, state: Tensor) -> Tensor:
    return recur.step(q, k, v, g, state, beta=beta, scale=q.shape[-1] ** -0.5)


def fla_step(name: str, *names: str) -> Callable[[], dict[str, Peer]]:
    """Its kernel for one token writes a new state and does not overwrite the old one."""

    def call(run: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Any, state: Tensor) -> Any:
        named = {n: x[:, None] for n, x in zip(names, (g, beta), strict=False)}
        y, new = run(q[:, None], k[:, None], v[:, None], **named, initial_state=state, output_final_state=True)
        return y[:, 0], new

    return lambda: fla_peer(name, call)


def by_key(**options: float) -> Callable[..., Tensor]:
    return lambda *shape: gates(*shape, **options)


def by_head(*shape: int) -> Tensor:
    return gates(*shape[:-1], shift=2.0, dtype=torch.float32)


def no_peers() -> dict[str, Peer]:
    return {}


def separable(peers: Callable[[], dict[str, Peer]], flops: Any = chunked_products, **options: Any) -> Family:
    return Family(MATRIX, partial(matrix, **options), matrix_scan, peers, flops, like=2)


def wide(flops: Any = chunked_products, **options: Any) -> Family:
    return separable(no_peers, flops, **options)._replace(shapes=WIDE)


def erasing(name: str, call: Callable[..., Any], inputs: Any, ours: Any, writes: int = 1, like: int = 2) -> Family:
    return Family(ERASING, inputs, ours, lambda: fla_peer(name, call), sub_tokens(writes), like=like)


FAMILIES = {
    "keywise": separable(
        lambda: fla_peer("chunk_gla", lambda run, q, k, v, g, *_: run(q, k, v, g)), gate=by_key(slow=16.0)
    ),
    "scalar": separable(
        lambda: fla_peer("chunk_simple_gla", lambda run, q, k, v, g, *_: run(q, k, v, g))
        | {"mlstm_kernels siging": SIGMOID},
        gate=by_head,
    ),
    "tied": separable(
        lambda: fla_peer("chunk_gla", lambda run, q, k, v, g, *_: run(q, 1 - g.exp(), v, g)),
        gate=by_key(shift=3.0), tied=True,
    ),
    "none": separable(
        lambda: fla_peer("chunk_linear_attn", lambda run, q, k, v, *_: run(q, k, v, normalize=False))
    ),
    "constant": separable(
        lambda: fla_peer("chunk_retention", lambda run, q, k, v, *_: run(q, k, v)), gate=retention
    ),
    "lightning": separable(
        lambda: fla_peer(
            "chunk_lightning_attn", lambda run, q, k, v, *_: run(q, k, v, layer_idx=0, num_layers=12)
        ),
        gate=lambda B, T, H, K: slopes(H, 8.0),
    ),
    "gated_delta": separable(
        gated_delta_peers, delta_products, gate=by_head, delta=True
    )._replace(shapes=GATED_DELTA),
    "gated_delta grouped": Family(
        GROUPED, grouped, matrix_scan, gated_delta_peers, lambda B, T, G, *sizes: delta_products(B, T, *sizes), like=2
    ),
    "gated_delta packed": separable(
        partial(gated_delta_peers, packed=True), delta_products, gate=by_head, delta=True
    )._replace(shapes=PACKED, ours=packed_scan),
    "delta": separable(
        lambda: fla_peer("chunk_delta_rule", lambda run, q, k, v, g, beta, *_: run(q, k, v, beta)),
        delta_products, delta=True,
    ),
    "kda": separable(
        lambda: fla_peer(
            "chunk_kda", lambda run, q, k, v, g, beta, *_: run(q, k, v, g, beta, safe_gate=True, lower_bound=-5)
        ),
        delta_products, gate=lambda *shape: gates(*shape, shift=2.0).detach().clamp_min(-5).requires_grad_(),
        delta=True,
    ),
    "bonus": separable(
        lambda: fla_peer("chunk_rwkv6", lambda run, q, k, v, g, beta, bonus: run(q, k, v, g, bonus)),
        gate=by_key(slow=16.0), bonus=True,
    ),
    "complex": separable(no_peers, gate=complex_gates),
    "rwkv7": erasing(
        "chunk_rwkv7", lambda run, q, k, v, g, e, b: run(q, g, k, v, -e, b, scale=q.shape[-1] ** -0.5), low_rank,
        low_rank_scan, 2,
    ),
    "dplr": erasing(
        "chunk_dplr_delta_rule", lambda run, q, k, v, g, e, b: run(q, k, v, -e, b, g), low_rank, low_rank_scan, 2
    ),
    "comba": erasing("chunk_comba", lambda run, q, k, v, g, p, beta: run(q, k, v, p, g, beta), comba, comba_scan),
    "gated_delta_net2": erasing("gdn2.chunk_gdn2", lambda run, *tensors: run(*tensors), gated_keys, gated_keys_scan),
    **{
        f"delta_product {writes}": erasing(
            "gated_delta_product.chunk_gated_delta_product", fla_product, partial(delta_product, writes=writes),
            matrix_scan, writes, 0,
        )
        for writes in (2, 3)
    },
    "wide keywise": wide(gate=by_key(slow=16.0)),
    "wide scalar": wide(gate=by_head),
    "wide gated_delta": wide(delta_products, gate=by_head, delta=True),
    "wide kda": wide(delta_products, gate=by_key(shift=2.0), delta=True),
    "mamba": Family(
        CHANNELS, partial(channels, mamba=True),
        lambda form, x, rate, A, k, q: recur.selective_scan(x, rate, A, k, q, form=form).y,
        absent=("mamba_ssm selective_scan_fn",),
    ),
    "longhorn": Family(
        CHANNELS, partial(channels, mamba=False),
        lambda form, x, rate, _, k, q: recur.online_scan(x, rate, k, q, form=form).y,
        absent=("longhorn_cuda selective_scan_online7_fn",),
    ),
    "diagonal": Family(
        DIAGONAL, lambda *shape: [rand(*shape), gates(*shape, shift=2.0)],
        lambda form, x, g: recur.gated_scan(x, g, form=form).y, lambda: diagonal_peers("scalar", True),
    ),
    "diagonal float32": Family(
        DIAGONAL, lambda *shape: [rand(*shape, dtype=torch.float32), gates(*shape, shift=2.0, dtype=torch.float32)],
        lambda form, x, g: recur.gated_scan(x, g, form=form).y, lambda: diagonal_peers("scalar", True),
    ),
    "diagonal complex": Family(
        DIAGONAL, lambda *shape: [torch.randn(*shape, dtype=torch.complex64).requires_grad_(), complex_gates(*shape)],
        lambda form, x, g: recur.gated_scan(x, g, form=form).y, lambda: diagonal_peers("complex", False),
    ),
    "decode keywise": Family(
        DECODE, partial(token, gate=by_key(slow=16.0)), matrix_step, fla_step("fused_recurrent_gla", "gk"), step=True
    ),
    "decode gated_delta": Family(
        DECODE, partial(token, gate=by_head, delta=True), matrix_step,
        fla_step("fused_recurrent_gated_delta_rule", "g", "beta"), step=True,
    ),
    "decode scalar": Family(
        DECODE, partial(token, gate=by_head), matrix_step, step=True, absent=("mamba_ssm selective_state_update",)
    ),
}  # fmt: skip


# Measuring


def on_gpu() -> bool:
    return torch.get_default_device().type == "cuda"


def fewer_candidates(most: int) -> None:
    """Let a peer's autotuner try at most so many of its candidates per kernel, evenly chosen, each for a short time."""
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    prune = Autotuner.prune_configs

    def some(self: Any, kwargs: Any) -> Any:
        found = prune(self, kwargs)
        return found[:: math.ceil(len(found) / most)]

    Autotuner.prune_configs = some
    Autotuner.do_bench = property(lambda self: partial(do_bench, warmup=4, rep=14))


def median_ms(call: Callable[[], object]) -> float:
    if on_gpu():
        from triton.testing import do_bench

        return do_bench(call, warmup=20, rep=80, return_mode="median")
    spent = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent) * 1e3


def timed(name: str, call: Callable[[], object], times: int = 1) -> dict[str, Any]:
    """Plain and, on a GPU, in a CUDA graph."""
    figures: dict[str, Any] = {f"{name}_ms": median_ms(call)}
    if on_gpu():
        try:
            figures[f"{name}_graph_ms"] = graphed_ms(call, times)
        except RuntimeError as error:  # what reads the GPU from the host cannot be captured
            figures["graph_failed"] = str(error)[:100]
    return figures


def graphed_ms(call: Callable[[], object], times: int) -> float:
    """One call of a CUDA graph of so many; with one the L2 is flushed, with more it is what the calls leave."""
    from triton.testing import do_bench

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(times)]
    if times == 1:
        median = do_bench(graph.replay, warmup=20, rep=80, return_mode="median")
    else:
        spent = []
        for _ in range(40):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            spent.append(start.elapsed_time(stop) / times)
        median = statistics.median(spent)
    del kept
    return median


def launches(call: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages())


def settle() -> None:
    gc.collect()
    if on_gpu():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def measure_step(call: Callable[[], Tensor]) -> dict[str, float]:
    start = time.perf_counter()
    call()
    settle()
    first = time.perf_counter() - start
    return {"first_call_s": first, **timed("forward", call, 20)}


def measure(run: Callable[..., Tensor], tensors: Tensors, short: bool, backward: bool = True) -> dict[str, float]:
    leaves = [x for x in tensors if x is not None]

    def forward() -> Tensor:
        with torch.no_grad():
            return run(*tensors)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(*tensors), leaves, dy, allow_unused=True)

    start = time.perf_counter()
    dy = torch.randn_like(forward())
    if backward:
        both()
    settle()
    figures: dict[str, float] = {"first_call_s": time.perf_counter() - start}
    if not backward:
        return figures | timed("forward", forward)
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        figures["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        if short:
            figures["forward_launches"] = launches(forward)
    return figures | timed("forward", forward) | timed("both", both)


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.to(want.dtype) - want).norm() / want.norm().clamp_min(1e-300)).item()


def errors(family: Family, peer: Peer | None, form: str, shape: tuple[int, ...]) -> dict[str, Any]:
    if family.step:
        shape = (min(shape[0], 2), *shape[1:])
    else:
        shape = (min(shape[0], 2), min(shape[1], CHECKED), *shape[2:])
    tensors = family.inputs(*shape)
    wide = [x if x is None else x.detach().to(torch.complex128 if x.is_complex() else torch.float64) for x in tensors]
    wide = [x if x is None or family.step else x.requires_grad_() for x in wide]
    want = family.ours("recurrent", *wide)
    inputs = peer.prepare(*tensors) if peer else tensors
    y = peer.call(*inputs) if peer else family.ours(form, *inputs)
    result: dict[str, Any] = {"y_error": relative(peer.answer(y) if peer else y, want)}
    if not family.step and (peer is None or peer.grads):
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, [x for x in inputs if x is not None], dy, allow_unused=True)
        exact = torch.autograd.grad(want, [x for x in wide if x is not None], dy.to(want.dtype))
        result["grad_errors"] = [relative(g, e) for g, e in zip(got, exact, strict=True) if g is not None]
        result["grad_error"] = max(result["grad_errors"])
    return result


def rates() -> dict[str, float]:
    """Bytes a second of a copy and FLOP a second of a bfloat16 product, here and now."""
    size, bits = (4096, 31) if on_gpu() else (256, 24)
    x, m = torch.empty(2, 2**bits, dtype=torch.uint8), torch.randn(size, size).bfloat16()
    copy, product = median_ms(lambda: x[1].copy_(x[0])), median_ms(lambda: m @ m)
    return {"copy": 2 * x[0].numel() / copy * 1e3, "matmul": 2 * size**3 / product * 1e3}


def floors(family: Family, tensors: Tensors, shape: tuple[int, ...], rate: dict[str, float]) -> dict[str, float]:
    moved = sum(x.numel() * x.element_size() for x in tensors if x is not None)
    if family.step:
        state = tensors[-1]
        assert state is not None
        return {"forward_floor_ms": 2e3 * state.numel() * state.element_size() / rate["copy"]}
    like = tensors[family.like]
    assert like is not None
    out, flops = like.numel() * like.element_size(), family.flops(*shape)
    return {
        "forward_floor_ms": 1e3 * max((moved + out) / rate["copy"], flops[0] / rate["matmul"]),
        "both_floor_ms": 1e3 * max((3 * moved + 2 * out) / rate["copy"], flops[1] / rate["matmul"]),
    }


def case(
    name: str, what: str, peer: Peer | None, form: str, shape: tuple[int, ...], rate: dict[str, float]
) -> dict[str, Any]:
    """One line of the table."""
    family, record = FAMILIES[name], {"family": name, "shape": list(shape), "what": what}
    record["version"] = "" if peer is None else installed(peer.needs)
    torch.manual_seed(0)
    try:
        tensors = family.inputs(*shape)
        record |= floors(family, tensors, shape, rate)
        run = peer.call if peer else partial(family.ours, form)
        inputs = peer.prepare(*tensors) if peer else tensors
        if family.step:
            with torch.no_grad():
                record |= measure_step(lambda: run(*inputs)) | errors(family, peer, form, shape)
        else:
            backward = peer is None or peer.backward
            record |= measure(run, inputs, shape[1] <= 256, backward) | errors(family, peer, form, shape)
    except Exception as error:  # what cannot run here is a result too
        record["failed"] = f"{type(error).__name__}: {error}"[:300]
    settle()
    return record


def installed(module: str) -> str:
    """The version of the package that a module belongs to."""
    names = packages_distributions().get(module, [])
    return version(names[0]) if names else ""


def growth(form: str, longest: int) -> list[dict[str, Any]]:
    """Forward plus backward of one row from 1024 tokens up: what time and memory a token do as T grows."""
    rows = []
    cases = {"keywise": (4, 64, 64), "scalar": (4, 64, 64), "mamba": (256, 16), "diagonal": (256,)}
    for name, sizes in cases.items():
        for T in [2**i for i in range(10, 21, 2) if 2**i <= longest]:
            tensors = FAMILIES[name].inputs(1, T, *sizes)
            result = measure(partial(FAMILIES[name].ours, form), tensors, False)
            rows.append({"family": name, "T": T, "ms": result["both_ms"], "peak_mib": result.get("peak_mib")})
            print(json.dumps(rows[-1]), flush=True)
            settle()
    return rows


# Results


def table(found: dict[str, Any]) -> str:
    columns = (
        "family|shape|what|forward ms (graph)|× floor|both ms (graph)|× floor|peak MiB|error y|of gradients|first s"
    )
    rates = ", ".join(f"{name} {value / 1e12:.3g} T/s" for name, value in found["rates"].items())
    lines = [
        f"{found['device']}; torch {found['torch']}, Triton {found.get('triton', '')}; {rates}",
        "",
        "| " + columns.replace("|", " | ") + " |",
        "|---" * 3 + "|--:" * 8 + "|",
    ]
    for r in found["records"]:
        cells = [r["family"], "×".join(map(str, r["shape"])), f"{r['what']} {r.get('version', '')}".rstrip()]
        if "failed" in r:
            cells += [r["failed"].splitlines()[0][:80].replace("|", "/"), *[""] * 7]
        else:
            for name in ("forward", "both"):
                plain, graph = r.get(f"{name}_ms"), best_ms(r, name)
                if plain is None or graph is None:
                    cells += ["", ""]
                else:
                    cells += [f"{plain:.4g} ({graph:.4g})", f"{graph / r[f'{name}_floor_ms']:.2f}"]
            cells.append(f"{r['peak_mib']:.0f}" if "peak_mib" in r else "")
            cells += [f"{r[name]:.1e}" if name in r else "" for name in ("y_error", "grad_error")]
            cells.append(f"{r['first_call_s']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    if found["growth"]:
        lines += ["", "| family | T | forward + backward ms | ns per token | peak MiB |", "|---|--:|--:|--:|--:|"]
        for r in found["growth"]:
            peak = "" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}"
            lines.append(f"| {r['family']} | {r['T']} | {r['ms']:.4g} | {r['ms'] / r['T'] * 1e6:.3g} | {peak} |")
    return "\n".join(lines) + "\n"


def best_ms(record: dict[str, Any], name: str) -> float | None:
    """The time in a CUDA graph, the plain one where that failed."""
    return record.get(f"{name}_graph_ms", record.get(f"{name}_ms"))


def leads(records: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Family and shape, and how many times the best peer's time ours fits in: forward, forward plus backward."""
    rows = []
    good = [r for r in records if "failed" not in r]
    for mine in (r for r in good if r["what"] == "recur"):
        rivals = [r for r in good if (r["family"], r["shape"]) == (mine["family"], mine["shape"]) and r is not mine]
        if rivals:
            forward, both = (
                min((time for r in rivals if (time := best_ms(r, name))), default=math.nan)
                / (best_ms(mine, name) or math.nan)
                for name in ("forward", "both")
            )
            rows.append((f"{mine['family']} {'×'.join(map(str, mine['shape']))}", forward, both))
    return rows


def draw(path: Path, records: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = leads(records)
    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(rows) + 1.2), layout="constrained")
    at = range(len(rows))
    axes.barh([i - 0.2 for i in at], [r[1] for r in rows], 0.4, label="forward", color="#4477aa")
    axes.barh([i + 0.2 for i in at], [r[2] for r in rows], 0.4, label="forward + backward", color="#ee7733")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(list(at), [r[0] for r in rows])
    axes.invert_yaxis()
    axes.set_xlabel("time of the best peer / time of recur, in a CUDA graph")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write(out: Path, found: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(found, indent=1))
    (out / "gpu.md").write_text(table(found))
    draw(out / "gpu.png", found["records"])


def run(options: argparse.Namespace) -> None:
    """Measure what the options of `recur bench` ask for."""
    with torch.device(options.device):
        _run(options)


def _run(options: argparse.Namespace) -> None:
    begin = time.time()
    if on_gpu():
        fewer_candidates(options.candidates)
    before = [json.loads(path.read_text()) for path in options.have]
    known = [r for run in before for r in run["records"] if "failed" not in r]
    done = {(r["family"], tuple(r["shape"]), r["what"]) for r in known}
    name = torch.cuda.get_device_name() if on_gpu() else "CPU"
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "triton": installed("triton")}
    found["rates"] = rates()
    found |= {"records": known, "growth": [r for run in before for r in run["growth"]]}
    if options.growth:
        found["growth"] = growth(options.form, options.longest)
    write(options.out, found)  # what cannot be written or drawn fails now
    for family in options.families or FAMILIES:
        rank = len(FAMILIES[family].shapes[0])
        for shape in [s for s in options.shapes or FAMILIES[family].shapes if len(s) == rank]:
            peers = {"recur": None, **FAMILIES[family].peers()}
            for what, peer in peers.items():
                missing = peer is not None and (find_spec(peer.needs) is None or not peer.takes(shape))
                if missing or (family, shape, what) in done or time.time() - begin > options.seconds:
                    continue
                record = case(family, what, peer, options.form, shape, found["rates"])
                found["records"].append(record)
                print(json.dumps(record), flush=True)
                write(options.out, found)
            for what in FAMILIES[family].absent:
                if (family, shape, what) not in done:
                    note = {"family": family, "shape": list(shape), "what": what, "failed": "not run here"}
                    found["records"].append(note)
    write(options.out, found)
    print(table(found))


if __name__ == "__main__":
    from recur.cli import main

    sys.exit(main(["bench", *sys.argv[1:]]))
