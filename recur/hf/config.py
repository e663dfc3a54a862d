"""The arguments of a LanguageModel as a JSON configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import PretrainedConfig

from recur import LanguageModel, Recipe, presets
from recur.blocks import Norm

ELSEWHERE = ("recipe", "tie", "checkpoint")  # arguments of a LanguageModel that are not settings of a RecurConfig
SIZES = {"vocab_size": 256, "dim": 256, "depth": 2}


class RecurConfig(PretrainedConfig):
    """What `LanguageModel` is built from.

    Args:
        recipe: the mixer: a preset's name, {"preset": name, option: value, ...}, a Recipe or its dict; or a list of
            these, cycled over the depth. Kept as dicts, so that a checkpoint outlives a change of a preset.
        tie_word_embeddings: whether the head is the embedding.
        settings: all other arguments of `LanguageModel`, by its names and with its defaults (vocab_size 256, dim 256,
            depth 2); a feed-forward may be given like a recipe. What is none of them goes to PretrainedConfig.
        logits_in_training: whether a call with labels returns logits in training mode too, for trainers that read them.

    Recipes with parts of your own load once these are listed: RecurConfig.parts = (MyPart,).
    Raises: ValueError for a preset that is not there; RecipeError for a recipe that does not fit.

    >>> from recur.hf import RecurConfig
    >>> RecurConfig(recipe={"preset": "hgrn2", "heads": 4}, vocab_size=256, dim=64, depth=2).hidden_size
    64
    """

    model_type = "recur"
    attribute_map = {"hidden_size": "dim", "num_hidden_layers": "depth"}  # noqa: RUF012
    keys_to_ignore_at_inference = ["state"]  # noqa: RUF012
    parts: ClassVar[tuple[type, ...]] = ()

    def __init__(
        self,
        recipe: Any = None,
        tie_word_embeddings: bool = True,
        *,
        logits_in_training: bool = False,
        **settings: Any,
    ) -> None:
        self.logits_in_training = logits_in_training
        several = isinstance(recipe, Sequence) and not isinstance(recipe, str)
        self.recipe = [self._plain(one) for one in recipe] if several else self._plain(recipe)
        given = {name: settings.pop(name, default) for name, default in _settings().items()}
        given |= {name: _norm(given[name]) for name in ("norm", "final_norm", "embed_norm")}
        given["ffn"] = given["ffn"] if isinstance(given["ffn"], str) else self._plain(given["ffn"])
        for name, value in given.items():
            setattr(self, name, value)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **settings)

    def build(self) -> LanguageModel:
        """The model it describes.   Raises: ValueError if it names no recipe."""
        if self.recipe is None:
            raise ValueError(
                "RecurConfig: recipe must be a preset's name, a Recipe, its dict or a list of them, got None"
            )
        plain: Any = self.recipe
        recipe = [self._recipe(one) for one in plain] if isinstance(plain, list) else self._recipe(plain)
        settings = {name: getattr(self, name) for name in _settings()}
        settings |= {name: self._norm(settings[name]) for name in ("norm", "final_norm", "embed_norm")}
        settings["ffn"] = self._recipe(settings["ffn"]) if isinstance(settings["ffn"], dict) else settings["ffn"]
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        return LanguageModel(recipe, tie=self.tie_word_embeddings, **settings)

    @classmethod
    def of(cls, model: LanguageModel) -> RecurConfig:
        """The configuration that a model was built from."""
        settings = {name: value for name, value in model.arguments.items() if name not in ELSEWHERE}
        return cls(model.arguments["recipe"], model.arguments["tie"], **settings)

    def _plain(self, given: Any) -> Any:
        """A recipe as a dict."""
        if isinstance(given, str):
            given = {"preset": given}
        if isinstance(given, Mapping) and "preset" in given:
            options = dict(given)
            name = options.pop("preset")
            if name not in presets.names():
                raise ValueError(f"RecurConfig: preset must be one of {', '.join(presets.names())}, got {name!r}")
            given = getattr(presets, name)(**options)
        return given.to_dict() if isinstance(given, Recipe) else given

    def _recipe(self, plain: Mapping[str, Any]) -> Recipe:
        return Recipe.from_dict(plain, self.parts)

    def _norm(self, plain: Any) -> Any:
        return self._recipe(plain).parts[0] if isinstance(plain, dict) else plain


def _norm(norm: Any) -> Any:
    """A norm as a word, None, or the dict of a recipe of this one part."""
    return Recipe(norm).to_dict() if isinstance(norm, Norm) else norm


def _settings() -> dict[str, Any]:
    """The arguments of a LanguageModel that a configuration holds by their names, with defaults."""
    known = inspect.signature(LanguageModel).parameters.values()
    return {p.name: SIZES.get(p.name, p.default) for p in known if p.name not in ELSEWHERE}
