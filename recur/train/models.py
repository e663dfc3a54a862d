"""Models from settings: a language model, or a stack with other layers in and out; the width that a size needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recur import LanguageModel, Recipe, RecipeError
from recur.own import Own
from recur.presets import words
from recur.train.config import InputError, Settings
from recur.train.machine import check_memory
from recur.weights import Linear, Param, normal, parameter_count, zeros


def read_recipes(text: str, own: Own | None = None) -> list[Recipe]:
    """The recipes that "hgrn2:heads=4+llama" or "@recipe.json" names (recur.presets.words).   Raises: InputError."""
    try:
        return words.read(text, own)
    except RecipeError as error:
        raise InputError(str(error)) from error


def around(settings: Settings) -> dict[str, Any]:
    """The arguments of LanguageModel that settings decide; "paper" is what the recipe's frame says."""
    framed = {name: getattr(settings, name) for name in ("ffn", "norm", "positions")}
    return {
        "dim": settings.dim,
        "depth": settings.depth,
        **{name: None if value == "none" else value for name, value in framed.items()},
        "block": settings.block,
        "dropout": settings.dropout,
        "checkpoint": settings.recompute == "layers",
    }


def language_model(recipes: Sequence[Recipe], settings: Settings, vocab_size: int, **more: Any) -> LanguageModel:
    """A LanguageModel by settings.   Raises: InputError if the recipe does not fit the width, or the memory."""
    arguments = {**around(settings), "tie": settings.head == "tied", **more}
    try:
        with torch.device("meta"):
            size = parameter_count(LanguageModel(recipes, vocab_size=vocab_size, **arguments))
    except ValueError as error:  # a width that does not divide, said in the recipe's letters
        raise InputError(f"{settings.recipe} cannot be built with --dim {settings.dim}: {error}") from error
    check_memory(size, f"{settings.recipe} with --dim {settings.dim} and --depth {settings.depth}")
    return LanguageModel(recipes, vocab_size=vocab_size, **arguments)


class SequenceModel(nn.Module):
    """A stack between a linear or embedding input layer and a linear output layer.

    Args:
        inputs:  channels of a continuous input x [B T inputs] (a constant channel is added), or with
        tokens:  their number, for ids [B T].
        outputs: numbers predicted.
        pool:    "token" for one prediction per token [B T outputs]; "mean" for one per row [B outputs], over the tokens
                 within `lengths` [B]; "pair" for rows that are two sequences [B 2 T]: from [u, v, u - v, u v].
    """

    def __init__(
        self,
        recipes: Sequence[Recipe],
        settings: Settings,
        *,
        outputs: int,
        inputs: int = 0,
        tokens: int = 0,
        pool: str = "mean",
    ) -> None:
        super().__init__()
        channels = tokens or inputs + 1
        std = 0.02 if tokens else channels**-0.5
        self.body = language_model(recipes, settings, channels, tie=True, embed_std=std, embed_norm=None)
        self.pool, self.tokens, dim = pool, tokens, settings.dim
        wide = 4 * dim if pool == "pair" else dim
        between = {"weight": Param((dim, wide), normal(wide**-0.5)), "bias": Param((dim,), zeros, decay=False)}
        self.between = Linear(between) if pool == "pair" else None
        out = {"weight": Param((outputs, dim), normal(dim**-0.5)), "bias": Param((outputs,), zeros, decay=False)}
        self.out = Linear(out)

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, grid: tuple[int, ...] | None = None, **options: Any
    ) -> Tensor:
        if self.pool == "pair":
            u, v = (
                self._pooled(x.flatten(0, 1), None if lengths is None else lengths.flatten(), grid)
                .unflatten(0, (-1, 2))
                .unbind(1)
            )
            assert self.between is not None
            h = F.gelu(self.between(torch.cat([u, v, u - v, u * v], -1)))
        else:
            h = self._hidden(x, grid, **options) if self.pool == "token" else self._pooled(x, lengths, grid)
        return self.out(h)

    def _hidden(self, x: Tensor, grid: tuple[int, ...] | None = None, **options: Any) -> Tensor:
        embedding = self.body.embedding
        embedded = embedding(x) if self.tokens else F.pad(x, (0, 1), value=1.0) @ embedding.weight
        return self.body.hidden(embedded, grid=grid, **options)[0]

    def _pooled(self, x: Tensor, lengths: Tensor | None, grid: tuple[int, ...] | None) -> Tensor:
        h = self._hidden(x, grid)
        if lengths is None:
            return h.mean(1)
        inside = (torch.arange(h.shape[1], device=h.device) < lengths[:, None])[..., None]
        return torch.where(inside, h, 0).sum(1) / lengths[:, None].to(h.dtype)


def solve_width(task: Any, settings: Settings, target: int) -> Settings:
    """The settings with the width, even below 64 and a multiple of 8 above, whose model is nearest to `target`.

    Raises: InputError if no width of the recipe comes within a tenth of it.
    """

    def size(dim: int) -> int | None:
        try:
            with torch.device("meta"):
                return parameter_count(task.build(replace(settings, dim=dim)))
        except InputError:
            return None

    widths = (*range(4, 64, 2), *range(64, 8193, 8))
    # in strides to the first that is too large, then one by one (two strides back: a width may not divide)
    high = next((at for at in range(0, len(widths), 8) if (size(widths[at]) or 0) > target), len(widths) - 1)
    sizes = {dim: found for dim in widths[max(0, high - 15) : high + 1] if (found := size(dim)) is not None}
    nearest = sorted(sizes, key=lambda dim: abs(sizes[dim] - target))
    for dim in nearest:
        if abs(sizes[dim] - target) <= target / 10 and _runs(task, replace(settings, dim=dim)):
            return replace(settings, dim=dim)
    near = f"the nearest is {sizes[nearest[0]]:,} at width {nearest[0]}" if nearest else "none fits"
    raise InputError(f"no width of {settings.recipe} has about {target:,} parameters: {near}")


def _runs(task: Any, settings: Settings) -> bool:
    """Whether a model of this width reads a row: some parts find only then that an axis must be even."""
    try:
        with torch.no_grad():
            task.build(settings)(**task.inputs(task.batch("valid", 0, 1)))
    except ValueError:
        return False
    return True


def with_paper_depth(settings: Settings, recipes: Sequence[Recipe]) -> Settings:
    """Twice the layers where there is no feed-forward: a mixer and a feed-forward count as two."""
    ffn = recipes[0].frame.ffn if settings.ffn == "paper" else settings.ffn
    return replace(settings, depth=2 * settings.depth) if ffn in (None, "none") else settings


def describe(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """The recipes as JSON values."""
    return [recipe.to_dict() for recipe in recipes]
