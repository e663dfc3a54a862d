"""The experiments that the family's papers are argued with, one class per task: `recur task NAME`."""

from recur.train.task import Task
from recur.train.tasks.images import Images
from recur.train.tasks.lm import LM, Distillation, Extrapolation
from recur.train.tasks.lra import ArenaImage, ArenaText, ListOps, Pathfinder, Retrieval
from recur.train.tasks.synthetic import MQAR, Regression, SelectiveCopying, StateTracking

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        LM, MQAR, ListOps, ArenaText, Retrieval, ArenaImage, Pathfinder, Images, SelectiveCopying, StateTracking,
        Extrapolation, Distillation, Regression,
    )
}  # fmt: skip

__all__ = ["TASKS", *(task.__name__ for task in TASKS.values())]
