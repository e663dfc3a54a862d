"""From a run of `recur train` to a folder that `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recur.hf.model import RecurForCausalLM
from recur.train import load_model
from recur.train.tokenize import Bytes, Characters


def from_run(folder: Path | str) -> tuple[RecurForCausalLM, PreTrainedTokenizerBase]:
    """The model and the tokenizer of the newest checkpoint in a run folder; both have `save_pretrained`.

    Args:
        folder: of the run.

    Raises: InputError if there is no checkpoint, it is damaged, or its task has no text.

    >>> from recur.hf import from_run
    >>> from_run("no-run")
    Traceback (most recent call last):
    recur.reading.InputError: ...
    """
    model, tokenizer = load_model(Path(folder))
    return RecurForCausalLM.wrap(model), tokenizer_for(tokenizer)


def tokenizer_for(tokenizer: Any) -> PreTrainedTokenizerBase:
    """A run's tokenizer for transformers, with equal ids; a token beyond the model's ends and pads, on the left.

    Args:
        tokenizer: of a run: characters, bytes, or one from the hub.

    >>> from recur.hf import tokenizer_for
    >>> from recur.train.tokenize import Bytes
    >>> tokenizer_for(Bytes())("hi").input_ids
    [104, 105]
    """
    if isinstance(tokenizer, Characters):
        made = Tokenizer(models.WordLevel({character: i for i, character in enumerate(tokenizer.vocabulary)}))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
    elif isinstance(tokenizer, Bytes):
        made = Tokenizer(models.BPE({letter: byte for byte, letter in enumerate(byte_letters())}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    else:
        return AutoTokenizer.from_pretrained(tokenizer.name)
    ends = {"eos_token": "<end>", "pad_token": "<end>", "padding_side": "left"}
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, **ends, model_input_names=names, clean_up_tokenization_spaces=False
    )


def byte_letters() -> list[str]:
    """The letter that stands for each byte: itself where it prints, else the next from 256 on, as in GPT-2's table."""
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]
