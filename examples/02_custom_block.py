"""Write a part of your own and edit a published recipe with it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from recur import Flow, Mixer, Part, Recipe, presets
from recur.blocks import Decay, OuterScan, ShortConv
from recur.primitives.gates import sigmoid_decay
from recur.weights import Param


@dataclass(frozen=True)
class SpreadDecay(Part):
    """Heads that forget at different speeds, and learn how fast: log_a = log(sigmoid(z)) / tau_h, tau_h = exp(theta_h)."""

    source: str = "z"
    slowest: float = 64.0

    def shapes(self, axes):  # what it writes, from the axes of what it reads
        return {"log_a": axes.rank(self.source, 2)}

    def params(self, site) -> Mapping[str, Param]:  # its weights; heads start between tau = 1 and tau = slowest
        (H, _) = site.of(self.source)
        return {"theta": Param((H,), lambda theta: theta.copy_(torch.linspace(0, 1, H) * torch.tensor(self.slowest).log()))}

    def __call__(self, flow: Flow, weights, state):  # [B T H K] -> [B T H K]; it has no state to pass on
        return flow.set(log_a=sigmoid_decay(flow[self.source]) / weights.theta.exp()[:, None]), None

    def formula(self) -> str:
        return f"log_a = log sigmoid({self.source}) / exp(theta_h)"


recipe = (
    presets.gla(heads=4)
    .replace(Decay, SpreadDecay("z"))
    .insert_before(OuterScan, ShortConv("v", width=4))
    .remove("scale")
)
print(recipe, end="\n\n")
print(Mixer(recipe, dim=64), end="\n\n")

# A part that only speaks of one token keeps every promise of the recipe: any cut of the text gives the same result.
torch.manual_seed(0)
layer = Mixer(recipe, dim=64)
x = torch.randn(2, 100, 64)
whole, _ = layer(x)
head, state = layer(x[:, :37])
tail, _ = layer(x[:, 37:], state)
print(f"largest difference, cut at 37: {(whole - torch.cat([head, tail], 1)).abs().max():.1e}")

# Recipes are values: they compare, and survive JSON. Classes of one's own are handed in, never looked up by name.
print("equal after JSON:", Recipe.from_dict(recipe.to_dict(), parts=(SpreadDecay,)) == recipe)

# A mistake is found when the recipe is built, not when it runs.
try:
    presets.gla().remove(Decay)
except ValueError as error:
    print("without a decay:", error)
