"""The arguments of a LanguageModel as a JSON configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import PretrainedConfig

from recur import LanguageModel, Recipe, presets
from recur.blocks import Norm

SHARED = (
    "vocab_size",
    "dim",
    "depth",
    "dropout",
    "embed_scale",
    "padding",
)  # which a LanguageModel keeps by these names


class RecurConfig(PretrainedConfig):
    """What `LanguageModel` is built from.

    Args:
        recipe: the mixer: a preset's name, {"preset": name, option: value, ...}, a Recipe or its dict; or a list of
            these, cycled over the depth. Kept as dicts, so that a checkpoint outlives a change of a preset.
        vocab_size, dim, depth, ffn, block, norm, final_norm, positions, dropout, embed_std, head_std, embed_scale,
            padding: as for `LanguageModel`; a feed-forward may be given like a recipe.
        tie_word_embeddings: whether the head is the embedding.

    Recipes with parts of one's own load once these are listed: RecurConfig.parts = (MyPart,).
    Raises: ValueError for a preset that is not there; RecipeError for a recipe that does not fit.
    """

    model_type = "recur"
    attribute_map = {"hidden_size": "dim", "num_hidden_layers": "depth"}  # noqa: RUF012
    keys_to_ignore_at_inference = ["state"]  # noqa: RUF012
    parts: ClassVar[tuple[type, ...]] = ()

    def __init__(
        self,
        recipe: Any = None,
        vocab_size: int = 256,
        dim: int = 256,
        depth: int = 2,
        ffn: Any = None,
        block: str = "pre",
        norm: Any = "rms",
        final_norm: Any = "same",
        positions: str | int | None = None,
        dropout: float = 0.0,
        embed_std: float = 0.02,
        head_std: float | None = None,
        embed_scale: float = 1.0,
        padding: int | None = None,
        tie_word_embeddings: bool = True,
        **others: Any,
    ) -> None:
        several = isinstance(recipe, Sequence) and not isinstance(recipe, str)
        self.recipe = [self._plain(one) for one in recipe] if several else self._plain(recipe)
        self.ffn = ffn if ffn is None or isinstance(ffn, str) else self._plain(ffn)
        self.norm, self.final_norm = _norm(norm), _norm(final_norm)
        self.vocab_size, self.dim, self.depth = vocab_size, dim, depth
        self.block, self.positions, self.dropout = block, positions, dropout
        self.embed_std, self.head_std, self.embed_scale, self.padding = embed_std, head_std, embed_scale, padding
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)

    def build(self) -> LanguageModel:
        """The model it describes.   Raises: ValueError if it names no recipe."""
        if self.recipe is None:
            raise ValueError(
                "RecurConfig: recipe must be a preset's name, a Recipe, its dict or a list of them, got None"
            )
        recipe = (
            [self._recipe(one) for one in self.recipe] if isinstance(self.recipe, list) else self._recipe(self.recipe)
        )
        return LanguageModel(
            recipe,
            ffn=self._recipe(self.ffn) if isinstance(self.ffn, dict) else self.ffn,
            norm=self._norm(self.norm),
            final_norm=self._norm(self.final_norm),
            tie=self.tie_word_embeddings,
            **{name: getattr(self, name) for name in (*SHARED, "block", "positions", "embed_std", "head_std")},
        )

    @classmethod
    def of(cls, model: LanguageModel) -> RecurConfig:
        """The configuration that a model was built from."""
        layers: list[Any] = list(model.blocks)
        first = layers[0]
        return cls(
            [layer.mixer.recipe for layer in layers],
            ffn=None if first.ffn is None else first.ffn.recipe,
            block=first.order,
            norm=first.mixer_norm.norm,
            final_norm=model.final_norm.norm,
            positions="sinusoidal"
            if model.sinusoidal
            else None
            if model.positions is None
            else len(model.positions.weight),
            tie_word_embeddings=model.head is None,
            **{name: getattr(model, name) for name in SHARED},
        )

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
