"""The training loop: AdamW, linear warm-up then cosine, gradients clipped to norm 1."""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from recur import LanguageModel, Recipe, presets
from recur.train import checkpoint
from recur.train.data import Corpus, InputError, decode, encode, python_documentation, random_batch, read_text, windows
from recur.train.settings import Point, Settings


@dataclass
class Training:
    """A run under way, ready for the step after `curve`."""

    settings: Settings
    recipe: Recipe
    corpus: Corpus
    text_sha256: str
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    curve: list[Point]

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return len(self.curve)


def prepare(out: Path, choices: dict[str, Any], *, resume: bool = False) -> Training:
    """Start a run in the empty folder `out`, or take up the one in it; `choices` are fields of Settings.

    Raises: InputError if a choice cannot be met, or contradicts the run that is taken up.
    """
    if resume:
        folder, record = checkpoint.read_record(out)
        settings = _agreeing(choices, record.settings)
    else:
        if checkpoint.checkpoints(out):
            raise InputError(f"{out} already holds a run: continue it with --resume, or choose another --out")
        settings = Settings(**choices)
    text = python_documentation() if settings.text is None else read_text(Path(settings.text))
    digest = hashlib.sha256(text.encode()).hexdigest()
    if resume and digest != record.text_sha256:
        raise InputError(f"--resume needs the text that the run in {out} began with, got a different one")
    recipe: Recipe = getattr(presets, settings.preset)()
    corpus = Corpus.from_text(text, length=settings.length)
    torch.manual_seed(settings.seed)
    model = _build(recipe, settings, corpus.vocabulary)
    _check_writable(out)
    groups = model.decay_groups(settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))
    training = Training(settings, recipe, corpus, digest, model, optimizer, [])
    if resume:
        checkpoint.load_weights(folder, model)
        checkpoint.load_trainer(folder, optimizer)
        training.curve = record.curve
    return training


def fit(training: Training, out: Path, report: Callable[[float, float], None] = lambda loss, speed: None) -> None:
    """Train to the last step; a checkpoint and a validation loss every `settings.every` steps and at the end.

    `report` hears the loss in nats per character and the speed in tokens per second after every step.
    """
    settings = training.settings
    some = training.corpus.valid[: 16 * settings.length + 1]
    while training.step < settings.steps:
        started, step = time.perf_counter(), training.step
        rate = learning_rate(settings, step)
        loss = _update(training, rate)
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} at step {step + 1}: try a smaller --lr; checkpoints before it are kept"
            )
        due = (step + 1) % settings.every == 0 or step + 1 == settings.steps
        training.curve.append(Point(step + 1, rate, loss, evaluate(training, some) if due else None))
        if due:
            _save(training, out)
        report(loss, settings.batch * settings.length / (time.perf_counter() - started))


def learning_rate(settings: Settings, step: int) -> float:
    """Linear from 0 over the first twentieth of the steps, then half a cosine down to a tenth of `settings.lr`."""
    warm = max(1, settings.steps // 20)
    if step < warm:
        return settings.lr * (step + 1) / warm
    progress = (step - warm) / max(1, settings.steps - warm)
    return settings.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(training: Training, ids: Tensor) -> float:
    """Nats per character over all whole windows of `ids` [T]; each window starts with an empty state."""
    settings, model = training.settings, training.model.eval()
    inputs, targets = windows(ids, settings.length)
    total = 0.0
    for x, y in zip(inputs.split(settings.batch), targets.split(settings.batch), strict=True):
        logits = model(x.to(settings.device))
        total += cross_entropy(logits.flatten(0, 1), y.flatten().to(settings.device), reduction="sum").item()
    return total / targets.numel()


def sample(model: LanguageModel, vocabulary: str, prompt: str, **sampling: Any) -> str:
    """`prompt` and what the model writes after it, one step a character; `sampling` goes to model.generate."""
    if not prompt:
        raise InputError("the prompt must have at least one character, got an empty one")
    ids = encode(prompt, vocabulary).to(next(model.parameters()).device)
    return decode(model.eval().generate(ids[None], **sampling)[0], vocabulary)


def load_model(out: Path) -> tuple[LanguageModel, str]:
    """The model of the newest checkpoint in `out`, on the CPU, and its vocabulary."""
    folder, record = checkpoint.read_record(out)
    settings = replace(record.settings, device="cpu")
    model = _build(Recipe.from_dict(record.recipe), settings, record.vocabulary)
    checkpoint.load_weights(folder, model)
    return model.eval(), record.vocabulary


def _build(recipe: Recipe, settings: Settings, vocabulary: str) -> LanguageModel:
    try:
        model = LanguageModel(
            recipe, vocab_size=len(vocabulary), dim=settings.dim, depth=settings.depth, dropout=settings.dropout
        )
    except ValueError as error:  # a width that does not divide, told in the recipe's letters
        raise InputError(f"{settings.preset} cannot be built with --dim {settings.dim}: {error}") from error
    try:
        return model.to(settings.device)
    except (RuntimeError, AssertionError) as error:  # torch's two ways to miss a device
        raise InputError(f"--device {settings.device} is not available: {str(error).splitlines()[0]}") from error


def _check_writable(out: Path) -> None:
    """Raise InputError now, not at the first checkpoint, unless `out` is a folder that takes files."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"cannot write to --out {out}: {(error.strerror or str(error)).lower()}") from error


def _agreeing(choices: dict[str, Any], recorded: Settings) -> Settings:
    """The recorded settings, once no choice contradicts them; the device may change."""
    for name, value in choices.items():
        known = getattr(recorded, name)
        if value != known and name not in ("device", "text"):
            raise InputError(f"--resume: the run was started with {name} {known}, got {value}")
    return replace(recorded, **choices)


def _update(training: Training, rate: float) -> float:
    settings, model, optimizer = training.settings, training.model.train(), training.optimizer
    sizes = {"batch": settings.batch, "length": settings.length}
    x, y = random_batch(training.corpus.train, **sizes, seed=settings.seed, step=training.step)
    loss = cross_entropy(model(x.to(settings.device)).flatten(0, 1), y.flatten().to(settings.device))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return loss.item()


def _save(training: Training, out: Path) -> None:
    record = checkpoint.Record(
        settings=training.settings,
        recipe=training.recipe.to_dict(),
        vocabulary=training.corpus.vocabulary,
        text_sha256=training.text_sha256,
        step=training.step,
        curve=training.curve,
    )
    checkpoint.save(out, record, training.model, training.optimizer)
