"""On a GPU: tensors of more than 2³¹ elements; what lies beyond them equals a scan of that part alone.

`python tests/gpu_large.py` prints one line a scan and exits with 1 if one differs. Takes up to 60 GiB.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import recur

T, LIMIT = 2**20, 1e-2  # a rounding to bfloat16 is 4e-3


def tokens(*sizes: int) -> Tensor:
    return torch.randn(1, T, *sizes, dtype=torch.bfloat16)


def gates(*sizes: int) -> Tensor:
    return torch.nn.functional.logsigmoid(tokens(*sizes) + 2)


def compare(name: str, run: Callable[..., Tensor], inputs: list[Tensor], at: int, backward: bool) -> bool:
    """The scan of all heads or channels, and of those from `at` on; y and the gradient of the last input."""

    def outputs(*tensors: Tensor) -> list[Tensor]:
        leaves = [x.requires_grad_(backward) for x in tensors]
        y = run(*leaves)
        y = y[:, :, at if y.shape[2] > at else 0 :]
        return [y.detach(), *(torch.autograd.grad(y.sum(), leaves[-1:]) if backward else ())]

    whole = [x[:, :, at:].contiguous() if x.shape[2] > at else x.clone() for x in inputs]
    found = outputs(*inputs)
    found[1:] = [x[:, :, at:].clone() for x in found[1:]]
    del inputs
    torch.cuda.empty_cache()
    off = max(
        ((x.float() - y.float()).norm() / y.float().norm()).item() for x, y in zip(found, outputs(*whole), strict=True)
    )
    print("ok " if off < LIMIT else "BAD", name, f"{off:.1e}", flush=True)
    return off < LIMIT


def main() -> int:
    heads, channels = 17, 2080
    scans = {
        "none": (lambda q, k, v: recur.scan(q, k, v, form="triton").y, (), True),
        "one gate per head": (lambda q, k, g, v: recur.scan(q, k, v, g, form="triton").y, (heads,), True),
        "one gate per key channel": (lambda q, k, g, v: recur.scan(q, k, v, g, form="triton").y, (heads, 128), False),
    }
    good = []
    for name, (run, gate, backward) in scans.items():
        inputs = [tokens(heads, 128), tokens(heads, 128) / 11, *([gates(*gate)] if gate else []), tokens(heads, 128)]
        good.append(compare(name, run, inputs, heads - 1, backward))
    inputs = [tokens(1, 16), tokens(1, 16), torch.sigmoid(tokens(channels)), tokens(channels)]
    good.append(
        compare("online", lambda k, q, r, x: recur.online_scan(x, r, k, q, form="triton").y, inputs, 2048, True)
    )
    inputs = [gates(channels), tokens(channels)]
    good.append(compare("diagonal", lambda g, x: recur.gated_scan(x, g, form="triton").y, inputs, 2048, True))
    return int(not all(good))


if __name__ == "__main__":
    with torch.device("cuda"):
        sys.exit(main())
