"""One record an official module: how to build ours from its constructor's arguments, and where its tensors lie."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from recur.convert.keys import Keys, views


def _nothing(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {}


OF_A_FILE = (  # what a config.json of transformers holds besides, none of which changes a number of ours
    *("_name_or_path", "architectures", "auto_map", "model_type", "transformers_version", "dtype", "torch_dtype"),
    *("return_dict", "output_hidden_states", "output_attentions", "use_cache", "chunk_size_feed_forward"),
    *("is_encoder_decoder", "id2label", "label2id", "problem_type", "bos_token_id", "eos_token_id"),
)


@dataclass(frozen=True)
class Official:
    """An official module.

    build:   our module from the official arguments, each an attribute of what it is given.
    keys:    our parameters -> official tensors (recur.convert.keys), or a function of our parameters' names.
    needs:   arguments without a default.
    config:  arguments with their official defaults.
    prefix:  what a wrapper may have put before every key.
    derived: ends of the names of buffers that are computed and not learned.
    inert:   arguments that change no number of ours.
    only:    arguments of which these values alone are there.
    infer:   arguments that show in a checkpoint, and not in the constructor's call.
    """

    build: Callable[[Any], nn.Module]
    keys: Keys | Callable[[Collection[str]], Keys]
    needs: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    derived: tuple[str, ...] = ()
    inert: tuple[str, ...] = ()
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    infer: Callable[[Mapping[str, Tensor]], dict[str, Any]] = _nothing

    def make(self, name: str, config: Mapping[str, Any]) -> Any:
        """Our module for a config.

        Raises: ValueError naming all arguments that are unknown or lacking, or for values of another kind;
            NotImplementedError for values not there.
        """
        known = (*self.needs, *self.config, *self.only, *self.inert)
        unknown = [key for key in config if key not in known]
        lacking = [key for key in self.needs if key not in config]
        if unknown or lacking:
            raise ValueError(
                f"{name}: config must hold arguments of the constructor, which are {', '.join(known)}; "
                f"unknown: {', '.join(unknown) or 'none'}; lacking: {', '.join(lacking) or 'none'}"
            )
        for key, values in self.only.items():
            if key in config and config[key] not in values:
                so_far = " or ".join(map(repr, values))
                raise NotImplementedError(f"{name}: {key} must be {so_far} so far, got {config[key]!r}")
        try:
            return self.build(SimpleNamespace(**{**self.config, **config}))
        except (TypeError, AttributeError, ArithmeticError) as error:  # a list where a number must be, heads of 0
            raise ValueError(f"{name}: config must hold values of the constructor's kinds: {error}") from error

    def strip(self, names: Collection[str]) -> dict[str, str]:
        """Plain name -> name, without prefix and derived buffers."""
        cut = len(self.prefix) if names and all(name.startswith(self.prefix) for name in names) else 0
        return {name[cut:]: name for name in names if not name.endswith(self.derived)}

    def views(self, module: nn.Module) -> dict[str, Tensor]:
        """Official name -> view of our parameter. Raises: ValueError for a foreign module."""
        keys = self.keys
        return views(module, keys([name for name, _ in module.named_parameters()]) if callable(keys) else keys)
