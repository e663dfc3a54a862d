"""From a run of `recur train` to a folder that `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recur.hf.model import RecurForCausalLM
from recur.train import load_model


def from_run(folder: Path | str) -> tuple[RecurForCausalLM, PreTrainedTokenizerFast]:
    """The model and the tokenizer of the newest checkpoint in a run folder; both have `save_pretrained`.

    Raises: InputError if there is no checkpoint or it is damaged.
    """
    model, vocabulary = load_model(Path(folder))
    return RecurForCausalLM.wrap(model), character_tokenizer(vocabulary)


def character_tokenizer(vocabulary: str) -> PreTrainedTokenizerFast:
    """Character i of `vocabulary` is token i; one token more ends and pads (on the left), and is never read."""
    tokenizer = Tokenizer(models.WordLevel({character: i for i, character in enumerate(vocabulary)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", padding_side="left", model_input_names=names,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
