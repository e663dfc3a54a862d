"""On a GPU: views as arguments, and documents that are not finite: `python tests/gpu_laws.py`.

The laws of test_kernel_strides.py and test_kernel_isolation.py, which Triton's interpreter runs elsewhere; one line a
law. Exits with 1 if one fails.
"""

from __future__ import annotations

import sys

import test_kernel_isolation
import test_kernel_strides
import torch

LAWS = {**test_kernel_strides.LAWS, **test_kernel_isolation.LAWS}


def attempt(name: str) -> bool:
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    try:
        LAWS[name]()
        print("ok ", name, flush=True)
    except Exception as error:
        print("BAD", name, f"{type(error).__name__}: {str(error)[:500]}", flush=True)
        return False
    return True


if __name__ == "__main__":
    # compiling takes longer than running, so the laws share the processors of the host
    with torch.multiprocessing.get_context("spawn").Pool(len(LAWS)) as pool:
        good = pool.map(attempt, LAWS, chunksize=1)
    print(f"{sum(good)} of {len(good)} good")
    sys.exit(not all(good))
