"""Training: one trainer on `accelerate`, tasks, comparisons; a run is resumed bit for bit on a CPU."""

from recur.train.config import InputError, Settings
from recur.train.run import TASKS, finish, load_model, start
from recur.train.trainer import Training, evaluate, fit, prepare

__all__ = ["TASKS", "InputError", "Settings", "Training", "evaluate", "finish", "fit", "load_model", "prepare", "start"]
