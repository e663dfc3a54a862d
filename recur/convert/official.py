"""One record an official module: how to build ours from its constructor's arguments, and where its tensors lie."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
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

    build:   our module from the official arguments, which it names with their official defaults.
    keys:    our parameters -> official tensors (recur.convert.keys), or a function of our parameters' names.
    prefix:  what a wrapper may have put before every key.
    derived: ends of the names of buffers that are computed and not learned.
    inert:   arguments that change no number of ours.
    only:    arguments of which these values alone are there.
    infer:   arguments that show in a checkpoint, and not in the constructor's call.
    """

    build: Callable[..., nn.Module]
    keys: Keys | Callable[[Collection[str]], Keys]
    prefix: str = ""
    derived: tuple[str, ...] = ()
    inert: tuple[str, ...] = ()
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    infer: Callable[[Mapping[str, Tensor]], dict[str, Any]] = _nothing

    def make(self, name: str, config: Mapping[str, Any]) -> Any:
        """Our module for a config.

        Raises: ValueError naming all arguments that are unknown or lacking, NotImplementedError for values not there.
        """
        known = inspect.signature(self.build).parameters
        given = {key: value for key, value in config.items() if key not in self.inert}
        unknown = [key for key in given if key not in known and key not in self.only]
        lacking = [key for key, p in known.items() if p.default is p.empty and key not in given]
        if unknown or lacking:
            there = ", ".join([*known, *self.only, *self.inert])
            raise ValueError(
                f"{name}: config must hold arguments of the constructor, which are {there}; "
                f"unknown: {', '.join(unknown) or 'none'}; lacking: {', '.join(lacking) or 'none'}"
            )
        for key, values in self.only.items():
            if key in given and given.pop(key) not in values:
                so_far = " or ".join(map(repr, values))
                raise NotImplementedError(f"{name}: {key} must be {so_far} so far, got {config[key]!r}")
        return self.build(**given)

    def strip(self, names: Collection[str]) -> dict[str, str]:
        """Plain name -> name, without prefix and derived buffers."""
        cut = len(self.prefix) if names and all(name.startswith(self.prefix) for name in names) else 0
        return {name[cut:]: name for name in names if not name.endswith(self.derived)}

    def views(self, module: nn.Module) -> dict[str, Tensor]:
        """Official name -> view of our parameter. Raises: ValueError for a foreign module."""
        keys = self.keys
        return views(module, keys([name for name, _ in module.named_parameters()]) if callable(keys) else keys)
