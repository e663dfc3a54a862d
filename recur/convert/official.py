"""One record an official module: how to build ours from its constructor's arguments, and where its tensors lie."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from recur.convert.keys import Keys, renamed, views
from recur.weights import unwrapped


def _nothing(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {}


BOOKKEEPING = {
    # what transformers of any year writes into a config.json beside a model's own arguments: no number depends on it
    "add_cross_attention", "architectures", "attn_implementation", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "dtype", "eos_token_id",
    "finetuning_task", "id2label", "is_decoder", "is_encoder_decoder", "label2id", "model_type", "name_or_path",
    "num_labels", "output_attentions", "output_hidden_states", "pad_token_id", "prefix", "problem_type",
    "pruned_heads", "return_dict", "sep_token_id", "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "unk_token_id", "use_bfloat16",
    "use_cache", "use_return_dict",
    # options of `generate`, which lay in the same file before they had one of their own
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip
UNQUANTISED: dict[str, tuple[Any, ...]] = {"quantization_config": (None,)}


def no_others(unknown: Collection[str], known: Collection[str]) -> list[str]:
    """Of a plain constructor's unknown arguments: none is ignored, for it takes no others."""
    return []


def unless_misspelt(unknown: Collection[str], known: Collection[str]) -> list[str]:
    """Of a PretrainedConfig's unknown arguments, which it keeps and no model reads: all that resemble no known one."""
    return [key for key in unknown if not difflib.get_close_matches(key, known, 1, 0.9)]


@dataclass(frozen=True)
class Official:
    """An official module.

    build:   our module from the official arguments, each an attribute of what it is given.
    keys:    our parameters -> official tensors (recur.convert.keys), or a function of our parameters' names.
    needs:   arguments without a default.
    config:  arguments with their official defaults.
    prefix:  what a wrapper may have put before every key.
    base:    where its body lies, in a class from whose keys it is left out and which may have been saved instead.
    older:   keys by which the original also loads -> keys.
    derived: ends of the names of buffers that are computed and not learned.
    inert:   arguments that change no number of ours.
    only:    arguments of which these values alone are there.
    renamed: arguments' names of other years -> names.
    ignores: which of the arguments that it does not know (and of those that it does) the original ignores.
    infer:   arguments that show in a checkpoint, and not in the constructor's call.
    """

    build: Callable[[Any], nn.Module]
    keys: Keys | Callable[[Collection[str]], Keys]
    needs: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    base: str = ""
    older: Mapping[str, str] = field(default_factory=dict)
    derived: tuple[str, ...] = ()
    inert: tuple[str, ...] = ()
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    ignores: Callable[[Collection[str], Collection[str]], list[str]] = no_others
    infer: Callable[[Mapping[str, Tensor]], dict[str, Any]] = _nothing

    def make(self, name: str, config: Mapping[str, Any]) -> Any:
        """Our module for a config.

        Warns: UserWarning, one, that names all arguments which the original ignores.
        Raises: what `settle` does; ValueError for values of another kind; NotImplementedError for values not there.
        """
        config, ignored = self.settle(name, config)
        for key, values in self.only.items():
            if key in config and config[key] not in values:
                so_far = " or ".join(map(repr, values))
                raise NotImplementedError(f"{name}: {key} must be {so_far} so far, got {config[key]!r}")
        if ignored:
            warnings.warn(f"{name}: ignored, as the original ignores it: {', '.join(ignored)}", stacklevel=3)
        try:
            return self.build(SimpleNamespace(**{**self.config, **config}))
        except (TypeError, AttributeError, ArithmeticError) as error:  # a list where a number must be, heads of 0
            raise ValueError(f"{name}: config must hold values of the constructor's kinds: {error}") from error

    def settle(self, name: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The arguments of a config under today's names, and what the original ignores.

        Raises: ValueError naming all arguments that are unknown or lacking, or one that is there under two names.
        """
        for old, new in self.renamed.items():
            if old in config and config[old] != config.get(new, config[old]):
                raise ValueError(
                    f"{name}: config must hold {new} once, got {new}={config[new]!r} and {old}={config[old]!r}"
                )
        config = {self.renamed.get(key, key): value for key, value in config.items()}
        known = (*self.needs, *self.config, *self.only, *self.inert)
        beside = [key for key in config if key not in known]
        foreign = [key for key in beside if key not in BOOKKEEPING and not key.startswith("_")]
        ignored = self.ignores(foreign, known)
        unknown = [key for key in foreign if key not in ignored]
        lacking = [key for key in self.needs if key not in config]
        if unknown or lacking:
            raise ValueError(
                f"{name}: config must hold arguments of the constructor, which are {', '.join(known)}; "
                f"unknown: {', '.join(unknown) or 'none'}; lacking: {', '.join(lacking) or 'none'}"
            )
        return {key: value for key, value in config.items() if key not in ignored}, ignored

    def strip(self, names: Collection[str]) -> dict[str, str]:
        """Official name -> name in a checkpoint: without wrappers, prefix and derived buffers, with the base's name.

        Raises: ValueError for two names that are one official name.
        """
        plain = [unwrapped(name) for name in names]
        cut = len(self.prefix) if plain and all(name.startswith(self.prefix) for name in plain) else 0
        based = any(name.startswith(self.base, cut) for name in plain)

        def official(name: str) -> str:
            name = unwrapped(name)[cut:]
            name = name if based or name.startswith("lm_head.") else self.base + name
            return self.older.get(name, name)

        learned = (name for name in names if not unwrapped(name).endswith(self.derived))
        return renamed("from_official: state_dict", learned, official)

    def views(self, module: nn.Module) -> dict[str, Tensor]:
        """Official name -> view of our parameter. Raises: ValueError for a foreign module."""
        keys = self.keys
        return views(
            module, keys([unwrapped(name) for name, _ in module.named_parameters()]) if callable(keys) else keys
        )
