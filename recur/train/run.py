"""A run from choices to its report, as `recur train` and `recur task` make it; and its model afterwards."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recur import LanguageModel
from recur.train import checkpoint
from recur.train.config import InputError, Settings, checked, known, resolved
from recur.train.models import language_model
from recur.train.tasks import TASKS
from recur.train.tokenize import Tokenizer, tokenizer_of
from recur.train.trainer import Training, evaluate, prepare, recorded_recipes
from recur.weights import parameter_count


def start(task: str, out: Path, choices: Mapping[str, Any], *, resume: bool = False) -> Training:
    """Start the run of a task in the empty folder `out`, or take up the one in it; `choices` are options by name.

    Args:
        task: a name of `TASKS`.
        out: the folder of the run, empty unless it is resumed.
        choices: options by name, as on the command line.
        resume: whether the run in `out` goes on.

    Raises: InputError if a choice cannot be met, or contradicts the run that is taken up.

    >>> from pathlib import Path
    >>> from recur.train import finish, fit, start
    >>> toy = {"recipe": "min_gru", "dim": 8, "depth": 1, "steps": 2, "length": 8, "evaluate": 2, "device": "cpu"}
    >>> run = start("lm", Path("run"), toy)
    >>> fit(run)
    >>> sorted(finish(run))
    ['valid']
    """
    settings, made = configured(task, choices)
    return prepare(made, settings, out, resume=chosen(task, choices) if resume else None)


def configured(task: str, *layers: Mapping[str, Any]) -> tuple[Settings, Any]:
    """Settings and task from choices, later layers above earlier ones and all above the task's own defaults."""
    cls = TASKS[task]
    given = chosen(task, cls.defaults, *layers)
    return resolved(Settings, given), resolved(cls, given)


def chosen(task: str, *layers: Mapping[str, Any]) -> dict[str, Any]:
    """The choices of all layers by option, each read by the option's rule, later layers above earlier ones."""
    options = known(Settings, TASKS[task])
    return {name: value for layer in layers for name, value in checked(layer, options, f"task {task}").items()}


def setup(task: str, name: str | None) -> Mapping[str, Any]:
    """A task's named choices.   Raises: InputError naming those there are."""
    setups = TASKS[task].setups
    if name is not None and name not in setups:
        raise InputError(f"task {task} has no setup {name!r}; there are: {', '.join(setups) or 'none'}")
    return {} if name is None else setups[name]


def finish(run: Training) -> dict[str, dict[str, float]]:
    """The final evaluations, split by split; the history and the picture in the run's folder.

    Args:
        run: which has been fitted.
    """
    task = run.task
    finals = {split: evaluate(run, split, full=task.rows(split) is not None) for split in task.finals}
    if run.is_main:
        try:
            _write_report(run, finals)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise InputError(f"cannot write the report in {run.out}: {reason}; --resume writes it again") from error
    return finals


def _write_report(run: Training, finals: Mapping[str, Mapping[str, float]]) -> None:
    """The history and the pictures."""
    from recur.train.plot import draw_comparison, draw_curve, write_history

    task = run.task
    write_history(run.out, run.curve, finals)
    size = parameter_count(run.plain_model)
    title = f"{task.name}: {run.settings.recipe}, {size / 1e6:.2f}M parameters"
    look: dict[str, Any] = {"title": title, "unit": task.unit, "metrics": task.metrics, "levels": task.levels()}
    look |= {"chance": task.chance(), "rows": run.settings.evaluate, "final": finals.get("valid")}
    draw_curve(run.out / "curve.png", run.curve, **look)
    lengths = [(run.settings.length * int(split[:-1]), split) for split in finals if split.endswith("x")]
    if lengths:
        shown = task.metrics[0] if task.metrics else "loss"
        points = [(length, finals[split][shown]) for length, split in lengths]
        labels = {"title": title, "x": "tokens read at once", "y": task.unit if shown == "loss" else shown}
        look = {**labels, "log": True, "chance": task.chance()}
        draw_comparison(run.out / "lengths.png", {run.settings.recipe: [points]}, **look)


def report(run: Training, finals: Mapping[str, Mapping[str, float]]) -> str:
    """The final evaluations in words, one line per split."""
    lines = []
    for split, values in finals.items():
        bits = f" ({values['loss'] / math.log(2):.3f} bits)" if run.task.unit.startswith("nats") else ""
        rest = "".join(f", {name} {values[name]:.1%}" for name in run.task.metrics)
        lines.append(f"{split}: loss {values['loss']:.3f} {run.task.unit}{bits}{rest}")
    levels = ", ".join(f"{name} {level:.3f}" for name, level in run.task.levels().items())
    return "\n".join([*lines, *([f"to compare with: {levels}"] if levels else [])])


def load_model(
    out: Path, which: str = "newest", say: checkpoint.Say = warnings.warn, *, imports: str | Path | None = None
) -> tuple[LanguageModel, Tokenizer]:
    """The language model of a checkpoint in `out`, on the CPU, and its tokenizer.

    Args:
        out:     the folder of a run, or of one checkpoint.
        which:   "newest", "best" (of the lowest validation loss), or a step.
        say:     called with a line that names the damaged checkpoints that were passed over.
        imports: a file with your own parts, if it is not the one that the run names.

    Raises: InputError if there is none, none is whole, its task has no text, or that file is not there.

    >>> from pathlib import Path
    >>> from recur.train import load_model
    >>> load_model(Path("no-run"))
    Traceback (most recent call last):
    recur.reading.InputError: ...
    """
    folder, record = checkpoint.read_record(out, which, say)
    if "tokenizer" not in record.task:
        raise InputError(f"{out} holds a run of task {record.config['task']}, which writes no text")
    settings = resolved(Settings, {**record.config, "recompute": "none"})
    tokenizer = tokenizer_of(**record.task["tokenizer"])
    model = language_model(recorded_recipes(record, folder, imports), settings, tokenizer.size)
    checkpoint.load_weights(folder, model)
    return model.eval(), tokenizer
