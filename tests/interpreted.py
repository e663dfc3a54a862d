"""Laws that need Triton's interpreter, which is chosen before Triton is loaded: they run in a process of their own."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

Law = Callable[[], None]


class Laws(dict[str, Law]):
    """The laws of a file by name. Decorates one; `main` runs those that the command line names."""

    def __call__(self, law: Law) -> Law:
        self[law.__name__] = law
        return law

    def main(self) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        masks_are_bool()
        patched_once()
        torch.use_deterministic_algorithms(True)  # and fresh memory holds NaN
        for name in sys.argv[1:]:
            self[name]()


def masks_are_bool() -> None:
    """Triton 3.9 refuses masks that are no bool, and its interpreter keeps comparisons of two scalars as int32."""
    from triton.runtime.interpreter import InterpreterBuilder

    def patched(name: str, place: int) -> None:
        run = getattr(InterpreterBuilder, name)

        def call(builder: Any, *args: Any, **kwargs: Any) -> Any:
            args[place].data = args[place].data.astype(bool)
            return run(builder, *args, **kwargs)

        setattr(InterpreterBuilder, name, call)

    patched("create_masked_load", 1)
    patched("create_masked_store", 2)


def patched_once() -> None:
    """The interpreter replaces some 300 members of triton.language at every call of a function, and makes a table of
    dtypes at every operation: once does, and takes 0.6 of the time. The members stay replaced."""
    from triton.runtime import interpreter

    find, found = interpreter._get_np_dtype, dict[str, Any]()

    def known(dtype: Any) -> Any:
        if dtype.scalar.name not in found:
            found[dtype.scalar.name] = find(dtype)
        return found[dtype.scalar.name]

    interpreter._get_np_dtype = known
    patch, seen = interpreter._patch_lang, dict[int, Any]()

    def once(fn: Any) -> Any:
        if id(fn.__globals__) not in seen:
            seen[id(fn.__globals__)] = fn, patch(fn)
        return type(seen[id(fn.__globals__)][1])()  # nothing to undo

    interpreter._patch_lang = once


PRODUCTS = 4  # decays (sums of logs), scores, what they read, and the state: each is rounded in float32


def widen(x: Any) -> Any:
    """A tensor in float64 or complex128; anything else as it is."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64) if isinstance(x, torch.Tensor) else x


def off_by(got: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor | None = None) -> float:
    """The error relative to what is exact, or to terms of which that is the difference: they may cancel."""
    got, exact = got.detach(), exact.detach()
    sizes = [x.detach().norm().clamp_min(1e-3) for x in (exact, terms) if x is not None]
    return float((got.to(exact.dtype) - exact).norm() / max(sizes))


def allowed(exact: torch.Tensor, others: Sequence[torch.Tensor], inputs: Iterable[torch.Tensor | None]) -> float:
    """How far a kernel may be off: twice as far as torch is in the same dtype, and the rounding of its own sums.

    Args:
        exact: an output of the token loop in float64.
        others: the same output of forms in torch, given the same inputs as the kernel.
        inputs: of the kernel: the widest rounding among them, and, for sums in another order, that of float32 times the
            square root of the longest axis, once for each of the PRODUCTS from an input to a gradient.
    """
    given = [x for x in inputs if x is not None and (x.is_floating_point() or x.is_complex())]
    rounding = max(torch.finfo(x.dtype).eps for x in given)
    terms = max(size for x in given for size in (1, *x.shape))
    sums = PRODUCTS * torch.finfo(torch.float32).eps * terms**0.5
    errors = [off_by(other, exact) for other in others]  # not finite where torch has a limit that the kernel has not
    return 2 * max(filter(math.isfinite, errors), default=0.0) + rounding + sums


def run_laws(file: str, names: list[str]) -> None:
    """Run `file` as a script with these laws as its arguments; fail with what it printed."""
    done = subprocess.run(
        [sys.executable, file, *names],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
