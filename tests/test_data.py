"""Tokens: what a text gives, where documents start, bins and hub corpora; packing does not change a loss."""

from __future__ import annotations

import itertools
import json
import math
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recur import LanguageModel, presets
from recur.train import InputError, start
from recur.train.config import Settings
from recur.train.data import Corpus, Stream, Tokens, counting_losses, hub_documents, open_corpus, pack, write_bins
from recur.train.models import around
from recur.train.task import cross_entropy_and_hits
from recur.train.tokenize import Bytes, Characters, tokenizer_of

DOCUMENTS = [f"document {i} holds {'much ' * (i % 4)}of {i * i}.\n" for i in range(40)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus as the hub stores it: JSON lines with a text field, a training and a validation part."""
    place = tmp_path_factory.mktemp("hub") / "corpus"
    place.mkdir()
    for part, documents in (("train", DOCUMENTS), ("validation", DOCUMENTS[::5])):
        lines = [json.dumps({"text": text, "meta": "ignored"}) + "\n" for text in documents]
        (place / f"{part}.jsonl").write_text("".join(lines))
    return str(place)


def tokens(n: int, starts: list[int]) -> Tokens:
    return Tokens(np.arange(n), np.asarray(starts, np.int64))


def test_characters_come_back(text: str, text_file: str) -> None:
    corpus = open_corpus(text_file, "char", length=16)
    assert len(corpus.valid) == len(text) // 10
    assert corpus.tokenizer.decode([*corpus.train.ids, *corpus.valid.ids]) == text


def test_bytes_come_back() -> None:
    assert Bytes().decode(Bytes().encode("naïve – text").tolist()) == "naïve – text"
    assert tokenizer_of("byte").size == 256


def test_shares_for_validation_and_test(text: str, text_file: str) -> None:
    corpus = open_corpus(text_file, "byte", length=16, valid=0.05, test=0.1)
    assert corpus.test is not None
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [1700, 100, 200]
    assert np.array_equal(np.concatenate([corpus.train.ids, corpus.valid.ids, corpus.test.ids]), Bytes().encode(text))


def test_windows_ask_for_every_token_but_the_first_once() -> None:
    made = tokens(11, [])
    assert made.count(3) == 3  # the eleventh starts a window that is not whole
    batch = made.windows(0, 5, 3)
    assert batch["ids"].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_batches_depend_on_seed_and_step_alone() -> None:
    made = tokens(1000, [])
    drawn = {}
    for seed, step in itertools.product(range(3), range(3)):
        batch, again = made.sample(4, 8, seed, step), made.sample(4, 8, seed, step)
        assert torch.equal(batch["ids"], again["ids"])
        assert torch.equal(batch["ids"] + 1, batch["labels"])
        drawn[seed, step] = tuple(batch["ids"][:, 0].tolist())
    assert len(set(drawn.values())) == 9


def test_batches_reach_both_ends() -> None:
    assert {int(tokens(5, []).sample(1, 3, 0, step)["ids"][0, 0]) for step in range(50)} == {0, 1}


def test_counting_losses_by_hand() -> None:
    none = np.zeros(0, np.int64)
    train, valid = Tokens(np.array([0, 1, 0, 1, 0]), none), Tokens(np.array([0, 1, 1]), none)
    p_b = (2 + 1) / (5 + 2)
    b_after_a, b_after_b = (2 + p_b) / (2 + 1), (0 + p_b) / (2 + 1)
    unigram, bigram = counting_losses(Corpus(Characters("ab"), train, valid, None, ""))
    assert unigram == pytest.approx(-math.log(p_b))
    assert bigram == pytest.approx(-(math.log(b_after_a) + math.log(b_after_b)) / 2)


# ---------------------------------------------------------------------- documents


def test_documents_start_after_their_separator(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one\n\ntwo\n\nthree\n\n" * 20)
    corpus = open_corpus(str(file), "char", length=4, separator=r"\n\n")
    ids, starts = corpus.train.ids, corpus.train.starts
    assert starts[0] == 0
    words = [corpus.tokenizer.decode(ids[a:b]) for a, b in itertools.pairwise(starts)]
    assert set(words) == {"one\n\n", "two\n\n", "three\n\n"}
    assert words[:3] == ["one\n\n", "two\n\n", "three\n\n"]


def test_packing_by_hand() -> None:
    batch = tokens(9, [0, 3, 7]).rows(np.array([0, 4]), 4)  # tokens 0 1 2 | 3, and 4 5 6 | 7
    packed = pack(batch)
    assert packed["ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert packed["cu_seqlens"].tolist() == [0, 3, 4, 7, 8]
    assert packed["labels"].tolist() == [[1, 2, -100, 4, 5, 6, -100, 8]]


CAUSAL = [name for name in presets.names() if getattr(presets, name)().causal]


@pytest.mark.parametrize("name", CAUSAL)
def test_packed_loss_equals_that_of_separate_documents(name: str) -> None:
    torch.manual_seed(0)
    arguments = around(Settings(recipe=name, dim=32, depth=2))
    model = LanguageModel(getattr(presets, name)(), vocab_size=50, **arguments).double()
    batch = tokens(49, [0, 5, 6, 17, 30, 31]).rows(np.array([0, 24]), 24)
    packed = pack(batch)
    labels = packed.pop("labels")
    together = cross_entropy_and_hits(model(**packed).double(), labels)["loss"]
    apart = []
    for first, last in itertools.pairwise(packed["cu_seqlens"].tolist()):
        document = packed["ids"][:, first:last]
        apart.append(cross_entropy_and_hits(model(document).double(), labels[:, first:last])["loss"])
    assert together.item() == pytest.approx(torch.stack(apart).sum().item(), rel=1e-6)
    assert int((labels != -100).sum()) == 43  # of 48 targets, those that open one of five later documents ask nothing


def test_training_on_packed_documents_counts_their_targets(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a tale\n" * 100)
    choices: dict[str, Any] = {"recipe": "gla:heads=2", "dim": 16, "depth": 1, "steps": 1, "batch": 4, "length": 16}
    run = start("lm", tmp_path / "run", {**choices, "text": str(file), "separator": "\\n", "packing": "documents"})
    batch = run.task.batch("train", 0, 4)
    assert run.task.weight(batch) == int((~batch["starts"][:, 1:]).sum()) < 64


# ---------------------------------------------------------------------- bins


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_bins_hold_the_text(tmp_path: Path, text_file: str, tokenizer: str) -> None:
    out, heard = tmp_path / "bins", []
    write_bins(out, text_file, tokenizer, report=heard.append)
    straight, mapped = open_corpus(text_file, tokenizer, length=8), open_corpus(str(out), "ignored", length=8)
    assert isinstance(mapped.train.ids, np.memmap)
    assert mapped.train.ids.dtype == np.uint8
    assert mapped.tokenizer == straight.tokenizer
    for name in ("train", "valid"):
        one, other = getattr(straight, name), getattr(mapped, name)
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.starts, other.starts)
    assert sum(heard) == len(straight.train) + len(straight.valid)


def test_a_plain_bin_of_uint16(tmp_path: Path) -> None:
    np.arange(200, dtype=np.uint16).tofile(tmp_path / "train.bin")
    corpus = open_corpus(str(tmp_path / "train.bin"), "byte", length=8)
    assert (len(corpus.train), len(corpus.valid)) == (180, 20)
    assert corpus.valid.ids[0] == 180


def test_a_folder_without_tokens(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no tokens: make them with recur data"):
        open_corpus(str(tmp_path), "byte", length=8)


def test_a_part_that_is_too_short(tmp_path: Path) -> None:
    np.arange(200, dtype=np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(InputError, match="validation part of the text must have at least 51 tokens"):
        open_corpus(str(tmp_path / "train.bin"), "byte", length=50)


# ---------------------------------------------------------------------- hub


def test_hub_documents_arrive_in_their_order(hub: str) -> None:
    assert list(hub_documents(hub, "train")) == DOCUMENTS
    assert list(hub_documents(hub, "valid")) == DOCUMENTS[::5]


def test_a_hub_corpus_without_a_validation_part_keeps_some_documents_apart(tmp_path: Path) -> None:
    lines = [json.dumps({"text": str(i)}) + "\n" for i in range(401)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    valid = list(hub_documents(str(tmp_path), "valid"))
    assert valid == ["199", "399"]
    assert len(list(hub_documents(str(tmp_path), "train"))) == 399


def test_a_hub_corpus_in_memory_and_in_bins(hub: str, tmp_path: Path) -> None:
    straight = open_corpus(f"hub:{hub}", "byte", length=8)
    assert straight.tokenizer.decode(straight.train.ids.tolist()) == "".join(DOCUMENTS)
    assert len(straight.train.starts) == len(DOCUMENTS)
    write_bins(tmp_path, f"hub:{hub}", "byte", report=lambda tokens: None)
    mapped = open_corpus(str(tmp_path), "ignored", length=8)
    assert np.array_equal(mapped.train.ids, straight.train.ids)
    assert np.array_equal(mapped.valid.starts, straight.valid.starts)
    with pytest.raises(InputError, match="a hub corpus needs --tokenizer byte"):
        write_bins(tmp_path, f"hub:{hub}", "char", report=lambda tokens: None)


def test_a_stream_is_the_corpus_in_rows_and_can_be_taken_up(hub: str) -> None:
    stream, every = Stream(hub, Bytes()), "".join(DOCUMENTS)
    first, second = stream.batch(0, 2, 9), stream.batch(1, 2, 9)
    seen = torch.cat([torch.cat([b["ids"], b["labels"][:, -1:]], 1).flatten() for b in (first, second)])
    assert Bytes().decode(seen.tolist()) == every[:40]
    again = Stream(hub, Bytes()).batch(1, 2, 9)  # a new process reads up to its place
    for name, tensor in second.items():
        assert torch.equal(tensor, again[name]), name
    assert torch.equal(stream.batch(0, 2, 9)["ids"], first["ids"])  # and an older place is read anew
    assert bool(first["starts"][0, 0])
    far = stream.batch(len(every) // 20 + 1, 2, 9)  # past the end: the next epoch
    assert far["ids"].shape == (2, 9)


def test_streaming_trains_and_resumes(hub: str, tmp_path: Path) -> None:
    from recur import train

    choices = {"recipe": "gla:heads=2", "dim": 16, "depth": 1, "batch": 2, "length": 16, "every": 2, "evaluate": 2}
    choices |= {"text": f"hub:{hub}", "stream": "on", "tokenizer": "byte", "steps": 4}
    whole, broken = (start("lm", tmp_path / name, choices) for name in ("whole", "broken"))
    train.fit(whole)

    def crash(loss: float, speed: float) -> None:
        if broken.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.fit(broken, crash)
    resumed = start("lm", tmp_path / "broken", {}, resume=True)
    train.fit(resumed)
    assert resumed.curve == whole.curve


def test_streaming_needs_a_hub_corpus_and_a_known_vocabulary(tmp_path: Path, text_file: str) -> None:
    with pytest.raises(InputError, match="--stream on needs --text hub:NAME and a tokenizer other than char"):
        start("lm", tmp_path / "run", {"text": text_file, "stream": "on"})


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets that cannot be opened, and no waiting for them."""

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.mark.usefixtures("no_network")
def test_a_missing_network_is_one_clear_line() -> None:
    with pytest.raises(InputError, match=r"cannot read Skylion007/openwebtext from the hub, give a local file") as err:
        next(hub_documents("openwebtext", "train"))
    assert "\n" not in str(err.value)
    with pytest.raises(InputError, match=r"the tokenizer gpt2 is neither a folder here nor reachable") as err:
        tokenizer_of("gpt2")
    assert "\n" not in str(err.value)


def test_a_tokenizer_of_a_folder_ends_documents(tmp_path: Path, hub: str) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in DOCUMENTS for word in text.split()})
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(["<end>", "<unk>", *words])}, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unk>").save_pretrained(tmp_path)
    corpus = open_corpus(f"hub:{hub}", str(tmp_path), length=4)
    assert corpus.tokenizer.size == len(words) + 2
    starts = corpus.train.starts
    assert (corpus.train.ids[starts[1:] - 1] == 0).all()
    assert corpus.tokenizer.decode(corpus.train.ids[: starts[1] - 1].tolist()) == DOCUMENTS[0].strip()
