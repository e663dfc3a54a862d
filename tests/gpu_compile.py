"""torch.compile(fullgraph=True) over whole language models with the Triton kernels: `python tests/gpu_compile.py`.

One line per preset: by how much loss and gradients of the compiled model differ from those of the eager one, and the
seconds its first call took, compilation included. Exits with 1 if a graph breaks or a difference passes LIMIT.
`python tests/gpu_compile.py FORM [PRESET...]` runs aot_eager on a CPU by that form ("triton" in Triton's interpreter).
"""

from __future__ import annotations

import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from recur import LanguageModel, presets

PRESETS = (
    "kda", "gateloop", "longhorn", "gated_delta_net", "mamba", "hgrn2", "rwkv", "gla", "gss", "retnet", "min_gru",
    "linear_attention",
)  # fmt: skip
LIMIT = 1e-4  # of float32, whose sums a compiler reorders


def learn(model: torch.nn.Module, ids: Tensor, form: str) -> dict[str, Tensor]:
    """The loss of the next token, and the gradient of every weight."""
    model.zero_grad()
    loss = F.cross_entropy(model(ids[:, :-1], form=form).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def attempt(job: tuple[str, str, str]) -> bool:
    name, form, device = job
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # the presets share the processors
    torch.manual_seed(0)
    lm = LanguageModel(getattr(presets, name)(), vocab_size=32, dim=64, depth=1, ffn="swiglu").to(device)
    ids = torch.randint(32, (2, 81), device=device)
    said, good = [], True
    try:
        want = learn(lm, ids, form)
        total = torch.stack([x.norm() for x in want.values()]).norm()
        for backend in ("aot_eager", "inductor") if device == "cuda" else ("aot_eager",):
            torch.compiler.reset()
            compiled, start = torch.compile(lm, fullgraph=True, backend=backend), time.perf_counter()
            got = learn(compiled, ids, form)
            seconds = time.perf_counter() - start
            got = {key.removeprefix("_orig_mod."): x for key, x in got.items()}
            assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
            errors = {key: float((got[key] - x).norm() / max(x.norm(), 1e-3 * total)) for key, x in want.items()}
            worst = max(errors, key=errors.__getitem__)
            good &= errors[worst] < LIMIT
            said.append(f"{backend} {seconds:.1f} s, loss {errors['loss']:.1e}, {worst} {errors[worst]:.1e}")
    except Exception as error:
        good = False
        said.append(f"{type(error).__name__}: {str(error)[:500]}")
    print("ok " if good else "BAD", name, "; ".join(said), flush=True)
    return good


def main(form: str = "", *names: str) -> int:
    jobs = [(name, form or "triton", "cpu" if form else "cuda") for name in names or PRESETS]
    with torch.multiprocessing.get_context("spawn").Pool(2 if form else 14) as pool:
        good = pool.map(attempt, jobs, chunksize=1)
    print(f"{sum(good)} of {len(good)} good")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
