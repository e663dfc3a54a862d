"""Write a part of your own and edit a published recipe with it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recur import Flow, Mixer, Part, Recipe, presets
from recur.blocks import Decay, OuterScan, ShortConv
from recur.primitives.gates import sigmoid_decay
from recur.recipe import Axes, Site
from recur.weights import Param


@dataclass(frozen=True)
class SpreadDecay(Part):
    """Heads that forget at different speeds, and learn how fast: log_a = log(sigmoid(z)) / tau_h."""

    source: str = "z"
    slowest: float = 64.0

    def shapes(self, axes: Axes) -> dict[str, tuple[str, ...]]:
        """What it writes, from the axes of what it reads; RecipeError if z has not two axes."""
        return {"log_a": axes.rank(self.source, 2)}

    def params(self, site: Site) -> dict[str, Param]:
        """Its weights, log tau_h: the heads start between 1 and `slowest`."""
        heads, _ = site.of(self.source)

        def spread(log_tau: Tensor) -> None:
            log_tau.copy_(torch.linspace(0, math.log(self.slowest), heads))

        return {"log_tau": Param((heads,), spread, decay=False, float32=True)}

    def __call__(self, flow: Flow, weights: nn.Module, state: None) -> tuple[Flow, None]:
        """[B T H K] -> [B T H K]; it remembers nothing, so there is no state to hand on."""
        return flow.set(log_a=sigmoid_decay(flow[self.source]) / weights.log_tau.exp()[:, None]), None

    def formula(self) -> str:
        return f"log_a = log sigmoid({self.source}) / tau_h"


recipe = (
    presets.gla(heads=4)
    .replace(Decay, SpreadDecay("z"))
    .insert_before(OuterScan, ShortConv("v", width=4))
    .remove("scale")
)
print(recipe, end="\n\n")
print(Mixer(recipe, dim=64), end="\n\n")

# Wherever the sequence is cut, the result is the same, as with every recipe.
torch.manual_seed(0)
layer = Mixer(recipe, dim=64)
x = torch.randn(2, 100, 64)
whole, _ = layer(x)
head, state = layer(x[:, :37])
tail, _ = layer(x[:, 37:], state)
print(f"cut at token 37, largest difference: {(whole - torch.cat([head, tail], 1)).abs().max():.1e}")

# Recipes are values: they compare, and go through JSON. Classes of your own are handed in, never looked up by name.
print("equal after JSON:", Recipe.from_dict(recipe.to_dict(), parts=(SpreadDecay,)) == recipe)

# A mistake is found when the recipe is built, not when it runs.
try:
    presets.gla().remove(Decay)
except ValueError as error:
    print("without a decay:", error)
