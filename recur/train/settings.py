"""What decides the result of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on. `text` None is the documentation that CPython carries; `lr` is the peak."""

    preset: str
    text: str | None = None
    dim: int = 256
    depth: int = 2
    steps: int = 500
    batch: int = 16
    length: int = 128
    lr: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.0
    every: int = 100
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Point:
    """One step of the curve, in nats per character; the validation loss is known at checkpoints only."""

    step: int
    lr: float
    train: float
    validation: float | None
