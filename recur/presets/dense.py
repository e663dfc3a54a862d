"""Dense hidden connections of layers, as edits of any recipe, and DenseMamba."""

from typing import Any

from recur.axes import RecipeError, Spec
from recur.blocks import DenseCarry, DenseFusion, DenseRead, LowRank, Project
from recur.blocks.scans import StateScan
from recur.presets.mamba import mamba
from recur.recipe import Axes, Part, Recipe


def _scan_of(recipe: Recipe) -> tuple[str, StateScan, Axes]:
    """The key, the part, and what is there before it, of its one scan with a query."""
    parts = zip(recipe.body.keys(), recipe.body.walk(recipe.site(1).axes), strict=True)
    found = [(key, part, axes) for key, (part, axes, _) in parts if isinstance(part, StateScan)]
    if len(found) != 1:
        raise RecipeError(f"dense: the recipe must have one scan that a query reads, got {len(found)}")
    return found[0]


def _gates(**names: Spec) -> Project:
    """A gate from the input of the layer, through few channels, of each of these axes."""
    low = ((f"{name}_dense", LowRank(" ".join(axes), rank="max(D//32,1)", act="silu")) for name, axes in names.items())
    return Project("x", tuple(low), name="dense_gates")


def dense(recipe: Recipe, names: str, *, layers: int = 1) -> Recipe:
    """The recipe with these tensors fused, before its scan, with those of the layers below: one gate per name.

    Args: names: such as "k v"; layers: how many layers below.
    Source: He et al. 2024, arXiv:2403.00818.
    """
    key, _, axes = _scan_of(recipe)
    fusions = (DenseFusion(name, gate=f"{name}_dense", layers=layers) for name in names.split())
    return recipe.insert_before(key, _gates(**{name: axes[name] for name in names.split()}), *fusions)


def dense_states(recipe: Recipe, *, layers: int = 2, carry: bool = False) -> Recipe:
    """The recipe whose scan also holds the states of the layers below: S_t + silu(F x) * sum_i S_t of layer l-i.

    Args: layers: how many layers below; carry: False, fused states are only read; True (Mamba's scan), they are carried
        on to the next token.
    Source: after He et al. 2024, arXiv:2403.00818, of which there is no code.
    """
    key, scan, axes = _scan_of(recipe)
    (read,) = scan.shapes(axes).values()
    fused: Part = (DenseCarry if carry else DenseRead)(scan, gate="state_dense", layers=layers)
    return recipe.replace(key, _gates(state=read), fused)


def dense_mamba(*, layers: int = 2, carry: bool = False, **options: Any) -> Recipe:
    """S_t = exp(delta_t A) * S_{t-1} + (delta_t u_t) B_t, y_t = (S_t + z_t * sum_i S_t of layer l-i) C_t + D u_t.

    z = silu(W2 silu(W1 x)), one per channel. A reconstruction: the paper has no code of it, and its two figures differ
    in whether the fused state is carried on to the next token.

    Args:
        layers: how many layers below are read.
        carry: whether fused states are carried on to the next token.
        options: those of `mamba`.

    Source: after He et al. 2024, arXiv:2403.00818.

    >>> recur.Mixer(recur.presets.dense_mamba(layers=2), dim=64).init_state(batch=1)["parts"]["dense_read"].shape
    torch.Size([1, 128, 16])
    """
    recipe = dense_states(mamba(**options), layers=layers, carry=carry)
    return recipe.like(*recipe.parts, source="after He et al. 2024, arXiv:2403.00818")
