"""Find launch settings for the separable kernel on this GPU: every walk of a scan under every candidate, timed alone.

    python benchmarks/tiles.py 8,2048,16,128,128 keywise scalar > tiles.jsonl

One JSON line a walk, best settings first. Candidates are compiled by many processes before the timing starts.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import torch
from recur.kernels import chunk_scan as kernels

# BLOCK_C, BLOCK_V, warps, stages; a matmul of 64 rows keeps 4 warps busy
CANDIDATES = list(itertools.product((64,), (32, 64, 128), (4, 8), (1, 2, 3)))
CANDIDATES += itertools.product((128,), (64, 128), (8,), (1, 2))
WALK = kernels._walk
NAMES = WALK.arg_names


class Recorder(list):
    """Launches as usual and remembers the arguments."""

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.append((dict(zip(NAMES, args, strict=False)), options))
            WALK[grid](*args, **options)

        return launch


def recorded(shape: tuple[int, ...], family: str) -> list[tuple[dict, dict]]:
    from gpu import inputs, ours

    tensors, recorder = inputs(family, *shape), Recorder()
    kernels._walk = recorder
    y = ours(*tensors)
    torch.autograd.grad(y, [x for x in tensors if x is not None], torch.randn_like(y))
    kernels._walk = WALK
    for arguments, _ in recorder:
        dots = arguments["dots_ptr"]
        if dots is not None and arguments["V"] != dots.shape[-1]:  # one part a tile: room for the smallest tiles
            arguments["dots_ptr"] = torch.zeros(8, *dots.shape[1:], device="cuda")
            arguments["sums_ptr"] = arguments["sums_ptr"] if arguments["sums_ptr"] is None else arguments["dots_ptr"]
    return recorder


def launch(arguments: dict, options: dict, setting: tuple[int, int, int, int]) -> None:
    block_c, block_v, warps, stages = setting
    tiles = -(-arguments["V"] // block_v)
    heads = arguments["B"] * arguments["H"] if "H" in arguments else arguments["B"] * options["H"]
    WALK[(tiles * heads * arguments["segments"],)](
        **{**arguments, "tiles": tiles},
        **{**options, "BLOCK_C": block_c, "BLOCK_V": block_v, "STAGES": stages, "num_warps": warps},
    )


def fits(arguments: dict, setting: tuple[int, int, int, int]) -> bool:
    return setting[1] <= max(16, arguments["V"])


def compile_some(job: tuple[tuple[int, ...], str, tuple[int, int, int, int]]) -> None:
    shape, family, setting = job
    B, T, H, K, V = shape
    for arguments, options in recorded((1, min(T, 4096), H, K, V) if B * H < 64 else (B, 64, H, K, V), family):
        if fits(arguments, setting):
            try:
                launch(arguments, options, setting)
            except Exception:  # does not fit the machine: the timing says so
                continue


def main() -> None:
    from triton.testing import do_bench

    shape, families = tuple(int(size) for size in sys.argv[1].split(",")), sys.argv[2:]
    jobs = [(shape, family, setting) for family in families for setting in CANDIDATES]
    with torch.multiprocessing.get_context("spawn").Pool(14) as pool:
        pool.map(compile_some, jobs, chunksize=1)
    for family in families:
        for arguments, options in recorded(shape, family):
            found = []
            for setting in CANDIDATES:
                if fits(arguments, setting):
                    try:
                        call = lambda setting=setting: launch(arguments, options, setting)  # noqa: B023, E731
                        found.append((do_bench(call, warmup=5, rep=20, return_mode="median"), setting))
                    except Exception as error:
                        found.append((float("inf"), (*setting, type(error).__name__)))
            role = {
                name: options.get(name, arguments.get(name)) for name in ("DECAY", "REVERSE", "GRAD", "EMIT", "TIED")
            }
            print(
                json.dumps({"shape": shape, "family": family, **role, "ms": sorted(found, key=lambda x: x[0])[:8]}),
                flush=True,
            )


if __name__ == "__main__":
    main()
