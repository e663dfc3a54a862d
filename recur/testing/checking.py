"""Run the laws on a recipe or a scan, and put a broken one into words."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from recur.recipe import Recipe
from recur.testing.compare import Inputs, LawBroken


def check(
    subject: Recipe | Callable[..., Any],
    strategy: Any = None,
    *,
    dim: int = 32,
    depth: int = 1,
    step: Callable[..., Tensor] | None = None,
    summary: Callable[..., Any] | None = None,
    laws: Collection[str] | None = None,
    examples: int = 25,
    seed: int | None = 0,
    report: Callable[[str], object] | None = None,
) -> list[str]:
    """Try every law of `recur.testing.laws` that applies, on inputs drawn by hypothesis.

    A recipe is built at width `dim` in float64 with weights moved off their first values, so that no bias or gate is at
    a special point. A scan is a function (tokens by name, initial_state=, cu_seqlens=, reverse=, form=) -> (y, state),
    of which only what its signature has is asked.

    Args:
        subject:  a Recipe, or a scan.
        strategy: draws `Inputs` for a scan; `recur.testing.strategies` has one for each of recur's.
        dim:      D of a recipe.
        depth:    layers of it that hand tensors down to each other.
        step:     of a scan: one token, step(tokens by name, state=) -> y, state overwritten.
        summary:  of a scan: summary(k, v, log_decay, beta) -> Summary.
        laws:     names of the laws to try; all that apply when omitted.
        examples: how many inputs to try for each law.
        seed:     the same seed tries the same inputs; None tries new ones every time.
        report:   called with a line for each law as it is found to hold.

    Returns: the names of the laws that were tried and hold.
    Raises: LawBroken with the smallest counter-example found; ValueError for a law that does not exist or apply;
        ModuleNotFoundError if hypothesis is missing: pip install -e '.[test]' in a clone.

    >>> held = recur.testing.check(recur.presets.min_gru(), dim=4, laws=["splits"], examples=2)
    >>> held
    ['splits']
    """
    from recur.testing import laws as book  # draws with hypothesis, which `import recur` must not need
    from recur.testing.subjects import subject_of

    checked = subject_of(subject, strategy, dim, depth, step, summary)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are small
    try:
        known = {law.__name__: law for law in book.LAWS}
        if unknown := set(laws or ()) - set(known):
            raise ValueError(f"check: laws must be among {', '.join(known)}, got {', '.join(sorted(unknown))}")
        wanted = [law for name, law in known.items() if laws is None or name in laws]
        fitting = [law for law in wanted if book.LAWS[law](checked)]
        if laws is not None and len(fitting) < len(wanted):
            odd = ", ".join(law.__name__ for law in wanted if law not in fitting)
            raise ValueError(f"check: laws must be such that apply to {checked.name}, got {odd}")
        for law in fitting:
            _try(law, checked, examples, seed)
            if report is not None:
                report(f"{law.__name__}: {_statement(law)}")
    finally:
        torch.set_num_threads(threads)
    return [law.__name__ for law in fitting]


def _try(law: Callable[..., None], subject: Any, examples: int, seed: int | None) -> None:
    """Raise LawBroken, in words, for the smallest inputs found that break the law."""
    import hypothesis
    import hypothesis.strategies as st
    from hypothesis.errors import HypothesisException

    def attempt(data: st.DataObject) -> None:
        drawn: dict[str, Any] = {}

        def draw(strategy: st.SearchStrategy[Any], name: str = "inputs") -> Any:
            value = data.draw(strategy)
            drawn.update({**value.sizes, "seed": value.seed} if isinstance(value, Inputs) else {name: value})
            return value

        try:
            law(subject, draw)
        except HypothesisException:
            raise
        except Exception as error:  # a crash on valid inputs breaks the law as well
            said = str(error) if isinstance(error, LawBroken) else f"{type(error).__name__}: {error}"
            sizes = ", ".join(f"{name}={value}" for name, value in drawn.items())
            text = f"{subject.name} breaks the law of {law.__name__}: {_statement(law)}\n  with {sizes}\n  {said}"
            raise LawBroken(text) from error

    quiet = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        verbosity=hypothesis.Verbosity.quiet,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run = quiet(hypothesis.given(st.data())(attempt))
    if seed is not None:
        run = hypothesis.seed(seed)(run)
    try:
        run()
    except LawBroken as broken:
        raise LawBroken(str(broken)) from broken.__cause__


def _statement(law: Callable[..., None]) -> str:
    return (law.__doc__ or "").strip().splitlines()[0]
