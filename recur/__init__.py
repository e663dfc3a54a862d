"""Composable primitives for linear-recurrence sequence models: everything public."""

import recur.presets.words  # noqa: F401, which reads recipes named by words
from recur import convert, presets, testing
from recur.axes import RecipeError
from recur.blocks import LanguageModel, Mixer, detach
from recur.explain import Explanation, explain
from recur.loading import load_model
from recur.primitives.diagonal import gated_scan, gated_step
from recur.primitives.elementwise import online_scan, online_step, selective_scan, selective_step
from recur.primitives.fixed import fixed_scan, fixed_step
from recur.primitives.forms import ScanOut, SlowPath
from recur.primitives.scan import scan, step
from recur.primitives.summary import Summary, advance, combine, summary
from recur.recipe import Axes, Flow, Frame, Part, Recipe, Site
from recur.shapes import ShapeError
from recur.weights import Param

__version__ = "0.2.0"

__all__ = [
    "Axes",
    "Explanation",
    "Flow",
    "Frame",
    "LanguageModel",
    "Mixer",
    "Param",
    "Part",
    "Recipe",
    "RecipeError",
    "ScanOut",
    "ShapeError",
    "Site",
    "SlowPath",
    "Summary",
    "advance",
    "combine",
    "convert",
    "detach",
    "explain",
    "fixed_scan",
    "fixed_step",
    "gated_scan",
    "gated_step",
    "load_model",
    "online_scan",
    "online_step",
    "presets",
    "scan",
    "selective_scan",
    "selective_step",
    "step",
    "summary",
    "testing",
]
