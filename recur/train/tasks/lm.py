"""Language modelling, length extrapolation and distillation: tokens in, the next token out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recur import LanguageModel
from recur.reading import InputError, one_line
from recur.train.config import Settings, count, fraction, one_of, option, path, positive
from recur.train.data import Batch, Stream, counting_losses, open_corpus, pack
from recur.train.models import language_model
from recur.train.task import Task
from recur.train.tokenize import Tokenizer, tokenizer_of


@dataclass
class LM(Task):
    """Predict the next token of a text."""

    text: str | None = option(None, path, "a text, a folder of bins, or hub:NAME (the documentation inside CPython)")
    tokenizer: str = option("char", str, "char, byte, or the name or folder of a Hugging Face tokenizer")
    separator: str = option("", str, "what stands between the documents of a text file, such as '\\n\\n'")
    packing: str = option("none", one_of("none", "documents"), "documents: nothing is read across a document's start")
    stream: str = option("off", one_of("off", "on"), "on: a hub corpus is read as it arrives, in its order")
    valid: float = option(0.1, fraction, "share of a text kept for validation")
    test: float = option(0.0, fraction, "share of a text kept for a test")

    name: ClassVar[str] = "lm"
    about: ClassVar[str] = "Train a language model on a text."
    metrics: ClassVar[tuple[str, ...]] = ()
    setups: ClassVar[dict[str, dict[str, Any]]] = {
        # Longhorn's repository; twice the layers where there is no feed-forward
        "shakespeare": {"tokenizer": "char", "length": 256, "batch": 64, "steps": 5000, "dim": 384, "depth": 6}
        | {"lr": 1e-3, "min_lr": 0.1, "warmup": 100, "betas": "0.9,0.99", "weight_decay": 0.1, "every": 250},
        # the enwik8 scripts of the GateLoop and GSS packages
        "enwik8-gateloop": {"text": "hub:enwik8", "tokenizer": "byte", "length": 256, "batch": 16, "accumulate": 4}
        | {"steps": 100_000, "dim": 512, "depth": 6, "lr": 1e-4, "schedule": "constant", "warmup": 0, "clip": 0.5}
        | {"betas": "0.9,0.99", "weight_decay": 0.0, "head": "own", "valid": 0.05, "test": 0.05},
        "enwik8-gss": {"text": "hub:enwik8", "tokenizer": "byte", "length": 4096, "batch": 16, "accumulate": 4}
        | {"steps": 100_000, "dim": 512, "depth": 8, "lr": 2e-4, "schedule": "constant", "warmup": 0, "clip": 0.5}
        | {"betas": "0.9,0.999", "weight_decay": 0.0, "head": "own", "valid": 0.05, "test": 0.05},
        # HGRN2
        "wikitext-103": {"text": "hub:wikitext-103", "tokenizer": "gpt2", "length": 512, "batch": 128}
        | {"steps": 50_000, "dim": 512, "depth": 6, "lr": 5e-4, "schedule": "inverse_sqrt", "warmup": 4000}
        | {"betas": "0.9,0.98", "weight_decay": 0.1, "dropout": 0.1, "precision": "bfloat16", "every": 1000},
        # Longhorn's repository, 120M parameters
        "openwebtext": {"text": "hub:openwebtext", "length": 1024, "batch": 480, "accumulate": 40, "steps": 5000}
        | {"dim": 768, "depth": 12, "warmup": 250, "weight_decay": 0.1, "precision": "bfloat16", "every": 500}
        | {"tokenizer": "gpt2", "betas": "0.9,0.95", "lr": 6e-4, "min_lr": 0.1, "clip": 1.0, "stream": "on"},
        # DenseSSM, 350M parameters
        "pile": {"text": "hub:pile", "tokenizer": "huggyllama/llama-7b", "length": 2048, "batch": 256, "steps": 28_600}
        | {"accumulate": 16, "dim": 1536, "depth": 16, "lr": 6e-4, "schedule": "polynomial", "min_lr": 0.0}
        | {"warmup": 429, "weight_decay": 0.01, "betas": "0.9,0.98", "precision": "bfloat16", "every": 1000}
        | {"stream": "on"},
        "slimpajama": {"text": "hub:slimpajama", "tokenizer": "gpt2", "length": 2048, "batch": 256, "steps": 50_000}
        | {"accumulate": 16, "dim": 1024, "depth": 24, "lr": 6e-4, "warmup": 1000, "precision": "bfloat16"}
        | {"every": 1000, "stream": "on"},
    }

    def open(self, settings: Settings) -> None:
        super().open(settings)
        self._stream: Stream | None = None
        if self.stream == "on":
            if self.text is None or not self.text.startswith("hub:") or self.tokenizer == "char":
                raise InputError("--stream on needs --text hub:NAME and a tokenizer other than char")
            self._stream = Stream(self.text[4:], tokenizer_of(self.tokenizer))
            if self.test or self.separator:
                raise InputError("--stream on reads a hub corpus, which has no --test part and no --separator here")
            self.corpus_tokenizer: Tokenizer = self._stream.tokenizer
            self._held_out = Stream(self.text[4:], self._stream.tokenizer, "valid")
            for stream in (self._stream, self._held_out):
                stream.check()
            return
        shares: dict[str, Any] = {"valid": self.valid, "test": self.test, "separator": self.separator}
        self.corpus = open_corpus(self.text, self.tokenizer, length=settings.length, **shares)
        self.corpus_tokenizer = self.corpus.tokenizer
        unit = {"char": "character", "byte": "byte"}.get(self.tokenizer, "token")
        self.unit = f"nats per {unit}"  # type: ignore[misc]

    def build(self, settings: Settings) -> nn.Module:
        model = language_model(self.recipes(settings), settings, self.corpus_tokenizer.size)
        if not model.causal:
            raise InputError(f"{settings.recipe} reads right to left as well, so it cannot predict the next token")
        return model

    def batch(self, split: str, index: int, rows: int) -> Batch:
        length = self.settings.length
        if self._stream is not None:
            return (self._stream if split == "train" else self._held_out).batch(index, rows, length)
        if split == "train":
            return self.corpus.train.sample(rows, length, self.settings.seed, index)
        tokens = self.corpus.test if split == "test" else self.corpus.valid
        assert tokens is not None
        return tokens.windows(index * self.settings.batch, rows, length)

    def rows(self, split: str) -> int | None:
        if self._stream is not None:
            return None
        tokens = self.corpus.test if split == "test" else self.corpus.valid
        return None if tokens is None else tokens.count(self.settings.length)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        learn = {"targets": self._labels(batch), "reduction": "sum"}
        if self.packing == "documents":
            packed = pack(batch)
            return {"ids": packed["ids"], "cu_seqlens": packed["cu_seqlens"], **learn}
        return {"ids": batch["ids"], **learn}

    def weight(self, batch: Batch) -> int:
        return int((self._labels(batch) != -100).sum())

    def score(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"loss": outputs}

    def _labels(self, batch: Batch) -> Tensor:
        return pack(batch)["labels"] if self.packing == "documents" else batch["labels"]

    @property
    def finals(self) -> Sequence[str]:
        return ("valid", "test") if self.test else ("valid",)

    def record(self) -> dict[str, Any]:
        digest = {} if self._stream is not None else {"digest": self.corpus.digest}
        return {"tokenizer": self.corpus_tokenizer.to_dict(), **digest}

    def levels(self) -> dict[str, float]:
        if self._stream is not None or self.corpus_tokenizer.size > 1024:  # a table of pairs is small
            return {}
        return dict(zip(("single-token entropy", "pair entropy"), counting_losses(self.corpus), strict=True))

    def chance(self) -> float | None:
        """The loss of single-token frequencies."""
        return self.levels().get("single-token entropy")

    def epilogue(self, model: nn.Module) -> str:
        """A prompt from the validation text that ends with a whole line, and 400 tokens that the model writes after it.

        Prose, for a small model goes on with the spaces of an indented line; a low temperature, for what the model is
        surest of reads best.
        """
        assert isinstance(model, LanguageModel)
        prompt = prose(self.corpus_tokenizer, self.batch("valid", 0, self.settings.evaluate)["ids"].tolist())
        given = torch.tensor([prompt], device=next(model.parameters()).device)
        options: dict[str, Any] = {"max_new_tokens": 400, "temperature": 0.5, "seed": self.settings.seed}
        written = model.generate(given, **options)[0].tolist()[len(prompt) :]
        decode = self.corpus_tokenizer.decode
        shown = (decode(ids).strip("\n") for ids in (prompt, written))
        return "prompt, of the validation text:\n\n{}\n\nwritten by the model:\n\n{}".format(*shown)


def prose(tokenizer: Tokenizer, rows: Sequence[Sequence[int]]) -> list[int]:
    """The whole lines of the row that has the most letters in them."""
    return max(
        (whole_lines(tokenizer, ids) for ids in rows), key=lambda ids: sum(map(str.isalpha, tokenizer.decode(ids)))
    )


def whole_lines(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The tokens from the first whole line on to the end of the last one; all of them if no line is whole."""
    ends = [i + 1 for i, token in enumerate(ids) if tokenizer.decode([token]).endswith("\n")]
    return list(ids[ends[0] : ends[-1]] if len(ends) > 1 else ids)


@dataclass
class Extrapolation(LM):
    """Train at one length, evaluate at longer ones, on the same text: loss per token at 1x, 2x, 4x ... of it."""

    factor: int = option(16, count, "longest evaluation over --length; powers of two up to it are evaluated")

    name: ClassVar[str] = "extrapolation"
    about: ClassVar[str] = "Train a language model at one length, evaluate it at 1x to 16x of it."
    source: ClassVar[str] = "Liu et al. 2024, arXiv:2407.14207 (trained at 2048, evaluated to 32768)"

    def open(self, settings: Settings) -> None:
        if self.stream == "on":
            raise InputError("extrapolation reads its validation text at several lengths: leave --stream off")
        super().open(settings)
        longest = settings.length * self.factor
        if len(self.corpus.valid) <= longest:
            raise InputError(
                f"the validation text must have more than {longest} tokens for --factor {self.factor}, "
                f"got {len(self.corpus.valid)}"
            )

    def _length(self, split: str) -> int:
        return self.settings.length * int(split.removesuffix("x")) if split.endswith("x") else self.settings.length

    def batch(self, split: str, index: int, rows: int) -> Batch:
        if not split.endswith("x"):
            return super().batch(split, index, rows)
        return self.corpus.valid.windows(index * self.settings.batch, rows, self._length(split))

    def rows(self, split: str) -> int | None:
        if not split.endswith("x"):
            return super().rows(split)
        # about the same tokens at every length
        few = max(1, self.settings.evaluate * self.settings.length // self._length(split))
        return min(self.corpus.valid.count(self._length(split)), few)

    @property
    def finals(self) -> Sequence[str]:
        return [f"{2**i}x" for i in range(int(math.log2(self.factor)) + 1)]


@dataclass
class Distillation(LM):
    """Steps alternate between cross-entropy and the divergence from a teacher: tau^2 KL(p_teacher || p_student)."""

    teacher: str = option("gpt2", str, "name or folder of a causal language model of transformers")
    temperature: float = option(1.0, positive, "tau, of both distributions")
    alternate: int = option(2, count, "every so many steps is one of the teacher's; 1 leaves no cross-entropy")

    name: ClassVar[str] = "distillation"
    about: ClassVar[str] = "Teach a recipe from a causal language model, alternating with cross-entropy."
    source: ClassVar[str] = "after the model card of the GSS checkpoint (Mehta et al. 2022, arXiv:2206.13947)"
    setups: ClassVar[dict[str, dict[str, Any]]] = {
        "gss": {"teacher": "gpt2-xl", "tokenizer": "gpt2", "length": 128, "batch": 32, "accumulate": 4}
        | {"steps": 557_000, "lr": 2e-5, "schedule": "constant", "warmup": 0, "clip": 1.0, "every": 1000}
    }

    def open(self, settings: Settings) -> None:
        if self.packing == "documents":
            raise InputError("distillation reads whole rows: leave --packing none")
        super().open(settings)
        from transformers import AutoModelForCausalLM

        import recur.hf.model  # noqa: F401, whose models can teach too

        try:
            teacher = AutoModelForCausalLM.from_pretrained(self.teacher)
        except Exception as error:  # of transformers, safetensors, json or requests, each in its own way
            raise InputError(
                f"the teacher {self.teacher} is not a folder here and not on the hub: {one_line(error)}"
            ) from error
        self._teacher = teacher.eval().requires_grad_(False)
        size, wanted = teacher.config.vocab_size, self.corpus_tokenizer.size
        if size < wanted:
            raise InputError(f"the teacher knows {size} tokens, the tokenizer makes {wanted}: give --tokenizer its own")

    def batch(self, split: str, index: int, rows: int) -> Batch:
        batch = super().batch(split, index, rows)
        taught = split == "train" and index % self.alternate == self.alternate - 1
        return batch | {"taught": torch.full((len(batch["ids"]),), taught)}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"ids": batch["ids"]} if bool(batch["taught"].any()) else super().inputs(batch)

    def score(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        if not bool(batch["taught"].any()):
            return super().score(outputs, batch)
        self._teacher.to(outputs.device)
        with torch.no_grad():
            taught = self._teacher(batch["ids"]).logits[..., : outputs.shape[-1]].float() / self.temperature
        student = F.log_softmax(outputs.float() / self.temperature, -1)
        gap = F.kl_div(student, F.log_softmax(taught, -1), log_target=True, reduction="sum")
        return {"loss": gap * self.temperature**2}
