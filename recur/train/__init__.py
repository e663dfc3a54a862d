"""A small character-level trainer: one text, one process, resumed bit for bit on a CPU."""

from __future__ import annotations

from recur.train.data import Corpus, InputError, counting_losses, decode
from recur.train.settings import Settings
from recur.train.trainer import Training, evaluate, fit, load_model, prepare, sample

__all__ = [
    "Corpus",
    "InputError",
    "Settings",
    "Training",
    "counting_losses",
    "decode",
    "evaluate",
    "fit",
    "load_model",
    "prepare",
    "sample",
]
