"""A LanguageModel that speaks the protocol of `transformers`: forward, generate, save and load, checkpointing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.utils import ModelOutput

from recur import LanguageModel
from recur.blocks.glue import Projection
from recur.hf.config import RecurConfig
from recur.recipe import State
from recur.weights import Weights

CACHE = ALL_CACHE_NAMES[0]  # what this version of generate calls a cache: past_key_values, later cache
LAYERS = ("output_attentions", "output_hidden_states")  # results of every layer, which are refused


class StateCache:
    """The state of every row, which `generate` passes from one call to the next.

    Args:
        state: of the model.
        length: columns of tokens and padding that every row has read.
        earlier: how many of the first of them are not among the ids that `generate` was given.

    >>> from recur.hf import StateCache
    >>> model = recur.LanguageModel("min_gru", vocab_size=9, dim=4, depth=1)
    >>> StateCache(model.init_state(2), length=3).get_seq_length()
    3
    """

    is_compileable = False

    def __init__(self, state: State, length: int, earlier: int = 0) -> None:
        self.state, self.length, self.earlier = state, length, earlier

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from what was row beam_idx[i], as beam search wants it."""
        self.state = tree_map(lambda x: x[beam_idx.to(x.device)] if isinstance(x, Tensor) else x, self.state)

    def repeated(self, times: int) -> StateCache:
        """A copy with every row `times` times in succession."""
        state = tree_map(lambda x: x.repeat_interleave(times, 0) if isinstance(x, Tensor) else x, self.state)
        return StateCache(state, self.length, self.earlier)


def _same_state(**named: Any) -> StateCache | None:
    """The state, which may have come under any of its names.   Raises: TypeError for another cache, or two states."""
    given = {name: value for name, value in named.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, StateCache):
            kind = type(value).__name__
            raise TypeError(f"RecurForCausalLM: {name} must be a StateCache, as use_cache=True returns it, got {kind}")
    if len({id(value) for value in given.values()}) > 1:
        raise TypeError(f"RecurForCausalLM: the state must come under one name, got two as {' and '.join(given)}")
    return next(iter(given.values()), None)


@dataclass
class CausalLMOutput(ModelOutput):
    """loss (with labels), logits [B T vocab_size], state (with use_cache) to continue from, also as attributes of
    transformers' names.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: StateCache | None = None

    @property
    def past_key_values(self) -> StateCache | None:
        return self.state

    @property
    def cache(self) -> StateCache | None:
        return self.state


class RecurForCausalLM(PreTrainedModel, GenerationMixin):
    """A LanguageModel for `transformers`: RecurForCausalLM(RecurConfig(recipe="hgrn2", dim=512, depth=12)).

    `model` is the LanguageModel itself. Raises: ValueError for a recipe that looks ahead.

    Args:
        config: what it is built from.

    >>> from recur.hf import RecurConfig, RecurForCausalLM
    >>> model = RecurForCausalLM(RecurConfig(recipe="min_gru", vocab_size=256, dim=16, depth=1))
    >>> model(torch.zeros(1, 3, dtype=torch.long)).logits.shape
    torch.Size([1, 3, 256])
    """

    config_class = RecurConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch, when a Trainer accumulates gradients
    _is_stateful = True  # a state cannot be taken back, so there is no assisted generation

    def __init__(self, config: RecurConfig) -> None:
        super().__init__(config)
        self.model = config.build()
        if not self.model.causal:
            raise ValueError("RecurForCausalLM: recipe must be causal, got one with parts that read ahead")
        self.post_init()

    @classmethod
    def wrap(cls, model: LanguageModel) -> RecurForCausalLM:
        """This very model, of recur or of `convert.from_official`, no copy."""
        with torch.device("meta"):
            wrapped = cls(cls.config_class.of(model))
        wrapped.model = model
        return wrapped.train(model.training)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        state: StateCache | None = None,
        past_key_values: StateCache | None = None,
        cache: StateCache | None = None,
        use_cache: bool | None = False,
        logits_to_keep: int | Tensor = 0,
        num_logits_to_keep: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Logits, the loss if there are labels, and the state if `use_cache`.

        The loss is recur's own, of a chunk of logits at a time. While training with labels there are no logits, unless
        logits_to_keep or the configuration's `logits_in_training` asks for them.

        Args:
            input_ids:      [B T].
            attention_mask: [B T], or [B L + T] after L columns in `state`; a token under 0 is not there: no state, no
                position and no other token knows of it, wherever in the row it stands.
            labels:         [B T], input_ids themselves or -100 where nothing is to be learnt; shifted here.
            state:          what `use_cache` returned for the columns before; a single token, without gradients and with
                `use_cache`, overwrites it. `past_key_values` and `cache` are other names of it.
            logits_to_keep: how many of the last columns get logits, or which; 0 for all. `num_logits_to_keep` is its
                older name.
            return_dict:    False for a tuple of what there is; None for what the configuration says.
            others:         what callers of transformers hand to every model, None or False (inputs_embeds, ...).

        Raises: NotImplementedError for another argument, or one that the configuration asks for; TypeError for a cache
            that is no StateCache.
        """
        state = _same_state(state=state, past_key_values=past_key_values, cache=cache)
        logits_to_keep = logits_to_keep if num_logits_to_keep is None else num_logits_to_keep
        return_dict = self.config.return_dict if return_dict is None else return_dict
        others = {name: getattr(self.config, name) for name in LAYERS} | others
        if asked := [name for name, value in others.items() if value is not None and value is not False]:
            raise NotImplementedError(
                f"RecurForCausalLM: {', '.join(asked)} must be left out, as recipes have no such thing"
            )
        there = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :].bool()
        if (
            use_cache
            and state is not None
            and there is None
            and labels is None
            and input_ids.shape[1] == 1
            and not torch.is_grad_enabled()
        ):
            logits: Tensor | None = self.model.step(input_ids[:, 0], state.state)[:, None]
            after, loss = state.state, None
        else:
            x, after = self._read(input_ids, there, None if state is None else state.state, bool(use_cache))
            loss = None if labels is None else self._loss(x, labels, num_items_in_batch)
            every = isinstance(logits_to_keep, int) and logits_to_keep == 0
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            unread = loss is not None and self.training and every and not self.config.logits_in_training
            logits = None if unread else self.model._logits(x[:, kept])
        before, earlier = (0, 0) if state is None else (state.length, state.earlier)
        read = StateCache(after, before + input_ids.shape[1], earlier) if use_cache else None
        output = CausalLMOutput(loss, logits, read)
        return output if return_dict else output.to_tuple()

    def _loss(self, x: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
        """Cross-entropy of the next labels, from the hidden [B T D]: their mean, or their sum over `count`.

        As transformers computes it, with your own function if `loss_function` was set.
        """
        if (own := getattr(self, "_loss_function", None)) is not None:
            logits = self.model._logits(x)
            made: Tensor = own(logits=logits, labels=labels, vocab_size=logits.shape[-1], num_items_in_batch=count)
            return made
        following = F.pad(labels[:, 1:], (0, 1), value=-100).to(x.device)
        loss = self.model._loss(x.flatten(0, 1), following.flatten(), "mean" if count is None else "sum")
        return loss if count is None else loss / (count.to(loss.device) if isinstance(count, Tensor) else count)

    def _read(self, ids: Tensor, there: Tensor | None, state: State, use_cache: bool) -> tuple[Tensor, State]:
        """Hidden [B T D] and state. With padding the rows are packed: what is not there is not read."""
        borders = None
        if there is not None and not bool(there.all()):
            if use_cache or bool((there[:, 1:] > there[:, :-1]).any()):
                ids, borders = ids[there][None], F.pad(there.sum(1).cumsum(0), (1, 0))
            else:
                ids = ids.masked_fill(~there, 0)  # all on the right: nothing reads it
        x, state = self.model._hidden(ids, state, cu_seqlens=borders, form="auto")
        if there is None or borders is None:
            return x, state
        return x.new_zeros(*there.shape, x.shape[-1]).index_put((there,), x[0]), state

    # ------------------------------------------------------------------ generate

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`. It goes on from `state`, which may also be called past_key_values or cache.

        With a state, the ids are those of all columns; or, if attention_mask has all columns, the last ones.
        Raises: ValueError if the ids do not continue from the state; NotImplementedError for what `forward` refuses;
            TypeError for a cache that is no StateCache.
        """
        # every version wants a cache of its own kind under its own name, and leaves `state` alone
        state = _same_state(**{name: kwargs.pop(name, None) for name in ("state", "past_key_values", "cache")})
        ids, mask = kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("attention_mask")
        if state is not None and ids is not None:
            columns = (ids if mask is None else mask).shape[1]
            if not 0 < columns - state.length <= ids.shape[1]:
                raise ValueError(
                    f"generate: input_ids or attention_mask must have the {state.length} columns that state has read, "
                    f"and new ones, got {ids.shape[1]} and {columns}"
                )
            kwargs["state"] = StateCache(state.state, state.length, columns - ids.shape[1])
        return super().generate(inputs, *args, **kwargs)

    def _expand_inputs_for_generation(self, *args: Any, expand_size: int = 1, **kwargs: Any) -> Any:
        """Rows for beams and for several sequences of a prompt: the state's too."""
        ids, kwargs = super()._expand_inputs_for_generation(*args, expand_size=expand_size, **kwargs)
        state = kwargs.get("state")
        return ids, kwargs if state is None or expand_size == 1 else kwargs | {"state": state.repeated(expand_size)}

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        state: StateCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 1,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The columns that the state has not read."""
        returned = kwargs.get(CACHE) is not None  # by the pass before
        state = _same_state(state=state, past_key_values=kwargs.get("past_key_values"), cache=kwargs.get("cache"))
        new = input_ids if state is None else input_ids[:, state.length - state.earlier :]
        if returned and new.shape[1] == 1:
            attention_mask = None  # a token just drawn is there
        inputs = {"input_ids": new, "attention_mask": attention_mask, "state": state}
        asked = {name: kwargs[name] for name in LAYERS if name in kwargs}
        return inputs | asked | {"use_cache": bool(use_cache), "logits_to_keep": logits_to_keep}

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """None: the first pass returns the state."""
        if generation_config.cache_implementation is not None:
            kind = generation_config.cache_implementation
            raise NotImplementedError(
                f"generate: cache_implementation must be None, as recipes have their own, got {kind!r}"
            )

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.state is None:  # without use_cache every pass goes on from the state that was given
            return updated
        updated.pop("state", None)
        return updated | {CACHE: outputs.state}

    # ------------------------------------------------------------------ what transformers asks of a model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.head

    def _init_weights(self, module: nn.Module) -> None:
        """Draw what no checkpoint brought from its declared law."""
        if isinstance(module, Weights):
            for name, param in module.declared.items():
                weight = getattr(module, name)
                if not getattr(weight, "_is_hf_initialized", False):
                    param.init(weight.data)

    @property
    def gradient_checkpointing(self) -> bool:
        return self.model.checkpoint

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.model.checkpoint = enable


def projections(model: nn.Module) -> list[str]:
    """The matrices of every Project by name, for LoRA: LoraConfig(target_parameters=projections(model)).

    Args:
        model: a RecurForCausalLM or a LanguageModel.

    >>> from recur.hf import projections
    >>> projections(recur.Mixer("min_gru", dim=8))
    ['parts.project.weight', 'parts.project_2.weight']
    """
    return [
        f"{name}.{matrix}"
        for name, module in model.named_modules()
        if isinstance(module, Projection)
        for matrix, weight in module.named_parameters(recurse=False)
        if weight.ndim == 2
    ]


AutoConfig.register("recur", RecurConfig, exist_ok=True)
AutoModelForCausalLM.register(RecurConfig, RecurForCausalLM, exist_ok=True)
