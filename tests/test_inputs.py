"""Files and words as people have them: what is read, and one line for what is invalid, before anything is made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import recur
from recur import LanguageModel, Mixer, RecipeError, presets
from recur.cli import main
from recur.presets import words
from recur.reading import InputError, read_bytes, read_json, read_text
from recur.train.config import Settings, file_or_folder, known, read_file
from recur.train.data import Stream, check_ids, hub_documents, open_corpus, unescaped, write_bins
from recur.train.machine import idle_threads, with_threads
from recur.train.tasks import LM
from recur.train.tokenize import Bytes, tokenizer_of

OPTIONS = known(Settings, LM)
LINE = "the state reads a key and writes a value\n"


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that `recur argv` leaves on stderr."""
    with pytest.raises(SystemExit) as leaving:
        main([str(word) for word in argv])
    said = capsys.readouterr().err
    assert leaving.value.code == 2
    assert re.fullmatch(r"recur: error: [^\n]{1,2100}\n", said), said
    return said


# ---------------------------------------------------------------------- text files


def ids_of(file: Path, tokenizer: str, **options: Any) -> tuple[Any, Any]:
    corpus = open_corpus(str(file), tokenizer, length=4, **options)
    return corpus, np.concatenate([corpus.train.ids, corpus.valid.ids])


@pytest.mark.parametrize(
    "content", [b"a line\r\n", b"a line\r", b"\xef\xbb\xbfa line\n", b"caf\xe9 \0 \xff\n", b"\r\n\n\r"]
)
def test_bytes_are_those_of_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t").write_bytes(content * 40 + b"x")
    assert bytes(ids_of(tmp_path / "t", "byte")[1].tolist()) == content * 40 + b"x"


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfone\r\ntwo\rthree\n", b"one\ntwo\nthree\n"])
def test_characters_have_one_line_end_and_no_mark(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t").write_bytes(content + b"one\r\ntwo\n" * 40)
    corpus, ids = ids_of(tmp_path / "t", "char")
    assert corpus.tokenizer.decode(ids.tolist()) == "one\ntwo\nthree\n" + "one\ntwo\n" * 40
    assert "\r" not in corpus.tokenizer.vocabulary
    assert "\ufeff" not in corpus.tokenizer.vocabulary


SEPARATORS = {
    "§": "§",
    "。": "。",
    "🙂": "🙂",
    r"\n\n": "\n\n",
    r"\t": "\t",
    r"é\n": "é\n",
    r"\xa7": "§",
    r"\u3002": "。",
}
SEPARATORS |= {r"\U0001f642": "🙂", r"\\": "\\", "<|end|>": "<|end|>", "'": "'", '"': '"', r"a\\n": r"a\n"}


@pytest.mark.parametrize("given", SEPARATORS)
@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_separators_of_any_script(tmp_path: Path, given: str, tokenizer: str) -> None:
    (tmp_path / "t").write_bytes(f"a document{SEPARATORS[given]}".encode() * 40)
    corpus, ids = ids_of(tmp_path / "t", tokenizer, separator=given)
    assert len(corpus.train.starts) + len(corpus.valid.starts) == 40
    first = ids[: corpus.train.starts[1]].tolist()
    assert corpus.tokenizer.decode(first) == f"a document{SEPARATORS[given]}"


@pytest.mark.parametrize("given", ["\\", r"\x", r"\x9", r"\u12", r"\q", r"\N{BULLET}", r"\U00110000", "\\\\\\"])
def test_a_backslash_that_begins_no_escape(given: str) -> None:
    with pytest.raises(InputError, match=r"--separator .* has a backslash that starts none of"):
        unescaped(given)


def test_separators_that_cannot_be_met(tmp_path: Path) -> None:
    (tmp_path / "t").write_text(LINE * 40)
    with pytest.raises(InputError, match=r"--separator '§' does not occur in .*; without it the text is one document"):
        open_corpus(str(tmp_path / "t"), "char", length=4, separator="§")
    with pytest.raises(InputError, match="--separator must be text that UTF-8 can hold"):
        open_corpus(str(tmp_path / "t"), "byte", length=4, separator=r"\ud800")
    with pytest.raises(InputError, match="--separator is for a text file"):
        open_corpus(str(tmp_path), "byte", length=4, separator="x")


@pytest.mark.parametrize(
    ("valid", "test"), [(0.0, 0.0), (0.5, 0.5), (0.6, 0.6), (0.0, 0.1), (float("nan"), 0.0)], ids=str
)
def test_shares_that_leave_nothing(tmp_path: Path, valid: float, test: float) -> None:
    (tmp_path / "t").write_text(LINE * 40)
    with pytest.raises(InputError, match="--valid must be above 0, and --valid plus --test below 1, got"):
        open_corpus(str(tmp_path / "t"), "char", length=4, valid=valid, test=test)


def test_a_test_part_that_is_too_short_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "t").write_text(LINE * 40)
    with pytest.raises(InputError, match="the text must have at least 50000 tokens"):
        open_corpus(str(tmp_path / "t"), "char", length=4, test=1e-4)
    np.zeros(400, np.uint16).tofile(tmp_path / "t.bin")
    with pytest.raises(InputError, match="--test is for a text file"):
        open_corpus(str(tmp_path / "t.bin"), "byte", length=4, test=0.1)


def test_files_by_one_rule(tmp_path: Path) -> None:
    file = tmp_path / "f"
    for encoding, name in (("utf-16", "UTF-16"), ("utf-32", "UTF-32")):
        file.write_bytes("a: 1".encode(encoding))
        with pytest.raises(
            InputError, match=f"f must be UTF-8 text, got the byte-order mark of {name}: save it as UTF-8"
        ):
            read_text(file)
    file.write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(InputError, match="f must be UTF-8 text, got other bytes at offset 5"):
        read_text(file)
    with pytest.raises(InputError, match="it is a folder"):
        read_bytes(tmp_path)
    with pytest.raises(InputError, match="it is not a regular file"):
        read_bytes(Path("/dev/null"))
    with pytest.raises(InputError, match=r"cannot read a.b: embedded null"):
        read_bytes(Path("a\0b"))
    file.write_text("[" * 100_000)
    with pytest.raises(InputError, match="f is not valid JSON: "):
        read_json(file)


# ---------------------------------------------------------------------- bins and streams


def test_bins_of_no_use(tmp_path: Path) -> None:
    file = tmp_path / "t.bin"
    for content, said in ((b"\0" * 2001, "numbers of 16 bits, got 2001 bytes"), (b"", "of 16 bits, got 0 bytes")):
        file.write_bytes(content)
        with pytest.raises(InputError, match=said):
            open_corpus(str(file), "byte", length=8)
    ids = np.full(2000, 5, np.uint16)
    ids[1950] = 256
    ids.tofile(file)
    with pytest.raises(InputError, match=r"t\.bin must hold ids below 256, as its tokenizer has, got 256 at 1950"):
        open_corpus(str(file), "byte", length=8)
    with pytest.raises(InputError, match="holds numbers: name the tokenizer that wrote them, --tokenizer byte"):
        open_corpus(str(file), "char", length=8)
    with pytest.raises(InputError, match=r"cannot read .*u.bin: no such file"):
        open_corpus(str(tmp_path / "u.bin"), "byte", length=8)


def test_ids_are_looked_at_everywhere_and_not_without_need(tmp_path: Path) -> None:
    ids = np.zeros(10, np.uint16)
    ids[9] = 7
    with pytest.raises(InputError, match="below 7, as its tokenizer has, got 7 at 9"):
        check_ids(ids, 7, tmp_path, at_once=4)
    check_ids(ids, 8, tmp_path, at_once=4)

    class Unread(np.ndarray):
        def __getitem__(self, at: Any) -> Any:
            raise AssertionError("no number of 16 bits is too large for this vocabulary")

    check_ids(ids.view(Unread), 2**16, tmp_path)


@pytest.mark.parametrize("kind", ["dtype", "tokenizer", "vocabulary", "starts", "ids", "meta", "order"])
def test_a_folder_of_damaged_tokens(tmp_path: Path, kind: str) -> None:
    (tmp_path / "text").write_text(LINE * 40)
    out = tmp_path / "bins"
    write_bins(out, str(tmp_path / "text"), "char", report=lambda tokens: None)
    meta = json.loads((out / "meta.json").read_text())
    wrong: dict[str, Any] = {"dtype": {"dtype": "object"}, "tokenizer": {"tokenizer": {"kind": 3}}}
    wrong |= {"vocabulary": {"tokenizer": {"kind": "char", "vocabulary": 5}}, "meta": {"tokenizer": [1]}}
    (out / "meta.json").write_text(json.dumps({**meta, **wrong.get(kind, {})}))
    if kind == "starts":
        (out / "train.starts.npy").write_bytes(b"")
    if kind == "order":
        np.save(out / "train.starts.npy", np.array([5, 3]))
    if kind == "ids":
        (out / "train.bin").write_bytes(b"\xff" * 1000)
    with pytest.raises(InputError, match="holds no tokens: make them with recur data SOURCE --out") as said:
        open_corpus(str(out), "ignored", length=4)
    assert "\n" not in str(said.value)


def test_tokens_made_before_outlive_a_source_that_fails(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(LINE * 40)
    write_bins(tmp_path / "bins", str(tmp_path / "text"), "byte", report=lambda tokens: None)
    before = {file.name: file.read_bytes() for file in (tmp_path / "bins").iterdir()}
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text('{"text": "a"}\n' * 5)
    with pytest.raises(InputError, match=r"the validation part of hub:.* must have tokens, got none; without"):
        write_bins(tmp_path / "bins", f"hub:{tmp_path / 'hub'}", "byte", report=lambda tokens: None)
    assert {file.name: file.read_bytes() for file in (tmp_path / "bins").iterdir()} == before
    with pytest.raises(InputError, match="recur data reads a text file or hub:NAME, got"):
        write_bins(tmp_path / "bins", str(tmp_path / "bins"), "byte", report=lambda tokens: None)


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        (['{"text": "words"}'] * 5, "validation"),
        (['{"text": ""}'] * 400, "training"),
        (['{"text": ""}'] * 400, "validation"),
    ],
)
def test_streams_without_tokens_end(tmp_path: Path, rows: list[str], part: str) -> None:
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    name = {"validation": "valid", "training": "train"}[part]
    for use in (lambda stream: stream.batch(0, 2, 8), lambda stream: stream.check()):
        with pytest.raises(InputError, match=f"the {part} part of hub:.* must have tokens, got none"):
            use(Stream(str(tmp_path), Bytes(), name))


def test_a_stream_is_checked_before_training(tmp_path: Path) -> None:
    from recur import train

    (tmp_path / "train.jsonl").write_text('{"text": "words"}\n' * 5)
    choices = {"text": f"hub:{tmp_path}", "stream": "on", "tokenizer": "byte"}
    with pytest.raises(InputError, match="the validation part of hub:"):
        train.start("lm", tmp_path / "run", choices)
    assert not (tmp_path / "run").exists()
    for more in ({"test": 0.1}, {"separator": "x"}):
        with pytest.raises(InputError, match="a hub corpus, which has no --test part and no --separator here"):
            train.start("lm", tmp_path / "run", {**choices, **more})
    with pytest.raises(
        InputError, match="extrapolation reads its validation text at several lengths: leave --stream off"
    ):
        train.start("extrapolation", tmp_path / "run", choices)


def test_a_document_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": 1}\n' * 5)
    with pytest.raises(InputError, match=r"document 0 of .* must have text in 'text', got 1"):
        next(hub_documents(str(tmp_path), "train"))


def test_text_that_utf8_cannot_hold() -> None:
    assert Bytes().encode("a\udcff").tolist() == [97, 255]  # a byte of the command line
    with pytest.raises(InputError, match=r"text must be what UTF-8 can hold, got '\\ud800'"):
        Bytes().encode("a\ud800")
    for kind in ("", " ", 3):
        with pytest.raises(InputError, match="a tokenizer must be char, byte, or a name or folder of one, got"):
            tokenizer_of(kind)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- configuration


def written(tmp_path: Path, content: str | bytes) -> Path:
    file = tmp_path / "c.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def test_words_of_yaml_are_words(tmp_path: Path) -> None:
    for text in ("stream: off", "stream: 'off'", "\ufeffstream: off", "stream: off\r\n"):
        assert read_file(written(tmp_path, text), OPTIONS, "lm") == {"stream": "off"}
    assert read_file(written(tmp_path, "stream: on\nwarmup: ~\nmin-lr: 1e-1\n"), OPTIONS, "lm") == {
        "stream": "on", "warmup": None, "min_lr": 0.1,
    }  # fmt: skip


BAD_YAML = {
    "1: 2": "no option is called '1'",
    "null: 2": "keys must be names of options, got None",
    "[" * 5000: "is not valid YAML: ",
    "steps: " + "9" * 5000: "steps must be a whole number of at least 1, got '999",
    "steps: !!int " + "9" * 5000: "is not valid YAML: ",
    "steps: 4294967296": "steps must be a whole number below 2147483648",
    "steps: nan": "steps must be a whole number",
    "lr: .inf": "lr must be a positive number, got '.inf'",
    "depth: 10001": "depth must be a whole number below 10000",
    "betas: [[0.9], 0.9]": "betas must be a word, a number or a flat list of them",
    "text: {a: b}": "text must be a word, a number or a flat list of them",
    "text: ''": "text must be the name of a file or a folder, got an empty one",
    "a: &a [x]\nsteps: [*a, *a]": "no option is called 'a'",
    "task: [1]": "is of another task than lm, got ['1']",
    "": "must hold keys and values, got NoneType",
}


@pytest.mark.parametrize("content", BAD_YAML, ids=lambda content: content[:12])
def test_yaml_of_no_use(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match=re.escape(BAD_YAML[content])) as said:
        read_file(written(tmp_path, content), OPTIONS, "lm")
    assert "\n" not in str(said.value)
    assert len(str(said.value)) < 1000


def test_names_that_are_none() -> None:
    import argparse

    for name in ("", "  ", "a\0b", "~nobody-at-all/x"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be the name of a file or a folder, got"):
            file_or_folder(name)


# ---------------------------------------------------------------------- recipes by words


def test_a_model_and_a_layer_by_name() -> None:
    model = LanguageModel("mamba", vocab_size=11, dim=16, depth=1)
    assert model.arguments["recipe"] == [presets.mamba()]
    hybrid = LanguageModel("gla:heads=2+llama:heads=2", vocab_size=11, dim=16, depth=2)
    assert [block.mixer.recipe for block in hybrid.blocks] == [presets.gla(heads=2), presets.llama(heads=2)]
    listed = LanguageModel(["gla:heads=2", presets.llama(heads=2)], vocab_size=11, dim=16, depth=2)
    assert [block.mixer.recipe for block in listed.blocks] == [presets.gla(heads=2), presets.llama(heads=2)]
    assert Mixer("gla:heads=2", 16).recipe == presets.gla(heads=2)
    with pytest.raises(RecipeError, match="no preset is called 'mambo'; did you mean"):
        LanguageModel("mambo", vocab_size=11, dim=16, depth=1)
    with pytest.raises(RecipeError, match="a layer has one recipe, got 2 in 'gla\\+llama'"):
        Mixer("gla+llama", 16)
    with pytest.raises(ValueError, match="depth must be at most 10,000, got 1000000000000"):
        LanguageModel("mamba", vocab_size=11, dim=16, depth=10**12)


def test_options_are_of_their_kind() -> None:
    with pytest.raises(RecipeError, match="gla cannot be built with tau=x: Decay: 'tau' must be float, got 'x'"):
        words.read("gla:tau=x")
    with pytest.raises(RecipeError, match="hgrn2 cannot be built with heads=\\[\\[\\["):
        words.read("hgrn2:heads=" + "[" * 20_000)
    with pytest.raises(RecipeError, match="gla cannot be built with heads=9999"):
        words.read("gla:heads=" + "9" * 5000)
    assert words.read("hgrn2:scan=in_grid") == [presets.hgrn2(scan=recur.blocks.in_grid)]


OWN = '''
from __future__ import annotations
from dataclasses import dataclass
from recur import Flow, Part, Recipe, presets
from recur.recipe import Axes
from recur.blocks import OutputGate


@dataclass(frozen=True)
class Halve(Part):
    """y <- by y"""
    by: float = 0.5

    def shapes(self, axes: Axes):
        return {"y": axes["y"]}

    def __call__(self, flow: Flow, weights, state):
        return flow.set(y=flow["y"] * self.by), None


def halved(*, heads: int = 2) -> Recipe:
    return presets.gla(heads=heads).insert_before(OutputGate, Halve())


quartered = halved().replace(Halve, Halve(0.25))
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "my_parts.py").write_text(OWN)
    return tmp_path / "my_parts.py"


def test_parts_of_ones_own_everywhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: Path, text_file: str
) -> None:
    small = ["--text", text_file, "--dim", "16", "--depth", "1", "--steps", "2", "--batch", "2", "--length", "16"]
    small += ["--evaluate", "2"]
    assert main(["show", "halved:heads=4", "--import", str(own)]) == 0
    assert "halve " in capsys.readouterr().out
    from recur.own import load

    described = load(own).recipes["quartered"]().to_dict()
    (tmp_path / "own.json").write_text(json.dumps(described))
    assert main(["show", f"@{tmp_path / 'own.json'}", "--dim", "16", "--import", str(own)]) == 0
    assert "halve " in capsys.readouterr().out
    assert "'Halve' is not a part of recur" in refused(capsys, "show", f"@{tmp_path / 'own.json'}")
    tried: list[Any] = []
    monkeypatch.setattr(recur.testing, "check", lambda recipe, report: tried.append(recipe))
    assert main(["check", "quartered", "--import", str(own)]) == 0
    assert tried == [load(own).recipes["quartered"]()]
    out = tmp_path / "run"
    assert main(["train", f"@{tmp_path / 'own.json'}", "--import", str(own), *small, "--out", str(out)]) == 0
    assert main(["train", f"@{tmp_path / 'own.json'}", "--resume", "--out", str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["imports"] == str(own)
    assert main(["compare", "halved", "gla:heads=2", "--import", str(own), *small, "--out", str(tmp_path / "c")]) == 0
    assert main(["generate", str(out), "--prompt", "the ", "--max-new-tokens", "3"]) == 0
    written = capsys.readouterr().out
    own.rename(tmp_path / "moved.py")
    load.__globals__["_load"].cache_clear()  # as in another process
    said = refused(capsys, "generate", out, "--prompt", "the ")
    assert f"has parts of {own}: --import needs a Python file with parts or recipes, and there is no file {own}" in said
    moved = ["--import", str(tmp_path / "moved.py")]
    assert main(["generate", str(out), "--prompt", "the ", "--max-new-tokens", "3", *moved]) == 0
    assert written.endswith(capsys.readouterr().out)


def test_files_of_ones_own_of_no_use(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name, content, said in (
        ("a.py", "1/0", "fails: ZeroDivisionError: division by zero"),
        ("b.py", "raise SystemExit(3)", "fails: SystemExit: 3"),
        ("c.py", "def (", "fails: SyntaxError: "),
        ("d.py", "x = 1", "must define classes of Part, recipes, or functions annotated -> Recipe"),
        ("e.py", "import recur\ngla = recur.presets.llama()", "defines gla, which presets are called"),
        ("f.txt", "", "needs a Python file with parts or recipes"),
    ):
        (tmp_path / name).write_text(content)
        assert said in refused(capsys, "show", "gla", "--import", tmp_path / name)
    assert "argument --import: must be the name of a file" in refused(capsys, "show", "gla", "--import", "")


def test_show_and_check_take_what_train_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["show", "gla:heads=2+llama"]) == 0
    assert capsys.readouterr().out == f"{presets.gla(heads=2)}\n{presets.llama()}\n"
    (tmp_path / "r.json").write_text(json.dumps(presets.gla(heads=2).to_dict()))
    assert main(["show", f"@{tmp_path / 'r.json'}", "--dim", "1000000"]) == 0  # a width that no memory holds
    assert "total" in capsys.readouterr().out
    assert "gla:heads=3 cannot be built at width 32" in refused(capsys, "check", "gla:heads=3")


# ---------------------------------------------------------------------- trained models


def test_a_trained_model_by_its_place(capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: str) -> None:
    from recur import train
    from recur.convert.files import CheckpointError, save_module
    from recur.convert.load import build

    choices: dict[str, Any] = {"recipe": "gla:heads=2", "text": text_file, "dim": 16, "depth": 1, "steps": 1}
    train.fit(train.start("lm", tmp_path / "run", {**choices, "batch": 2, "length": 16, "evaluate": 2}))
    model, tokenizer = recur.load_model(str(tmp_path / "run"))
    assert not model.training
    assert model(torch.from_numpy(tokenizer.encode("the "))[None]).shape == (1, 4, tokenizer.size)
    save_module(tmp_path / "m.safetensors", "longhorn", {"d_model": 8}, build("longhorn", {"d_model": 8}))
    loaded = recur.load_model(tmp_path / "m.safetensors")
    assert isinstance(loaded.model, Mixer)
    assert loaded.tokenizer is None
    with pytest.raises(InputError, match="no checkpoint in"):
        recur.load_model(tmp_path / "nowhere")
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"must end in \.safetensors"):
        recur.load_model(tmp_path / "x.txt")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == f"recur {recur.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", recur.__version__)


def test_no_message_names_a_package_index() -> None:
    top = Path(__file__).parent.parent
    for file in [*top.glob("recur/**/*.py"), *top.glob("*.md"), *top.glob("docs/*.md")]:
        assert not re.search(r"pip install '?recur", file.read_text(encoding="utf-8")), file


# ---------------------------------------------------------------------- the command line


def commands(tmp_path: Path, text_file: str) -> dict[str, tuple[list[object], str]]:
    """Input of no use for every command, and what is said."""
    text, junk, gone = ["--text", text_file, "--length", 16], tmp_path / "junk", tmp_path / "gone"
    junk.write_bytes(b"\x80\x02\xff hello \0")
    (tmp_path / "config.json").write_text('{"d_model": [1]}')
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": torch.zeros(1)}, tmp_path / "ok.pt")
    out = ["--out", tmp_path / "out"]
    listops, official = ["task", "listops", "gla", *out], [tmp_path / "o.safetensors", "--from", "longhorn"]
    return {
        "show nothing": (["show", ""], "no preset is called ''"),
        "show a file that is none": (["show", f"@{gone}"], "cannot read a recipe from"),
        "show a folder": (["show", f"@{tmp_path}"], "it is a folder"),
        "show junk": (["show", f"@{junk}"], "must be UTF-8 text"),
        "show dim": (["show", "gla", "--dim", "9" * 5000], "argument --dim: must be a whole number"),
        "check": (["check", "gla:heads=0"], "must be a positive integer, got 0"),
        "train on a folder": (["train", "gla", "--text", tmp_path, *out], "holds no tokens"),
        "train on nothing": (["train", "gla", "--text", "", *out], "must be the name of a file or a folder"),
        "train on a device": (["train", "gla", "--text", "/dev/zero", *out], "it is not a regular file"),
        "train into nothing": (["train", "gla", *text, "--out", ""], "argument --out: must be the name of a file"),
        "train nan": (["train", "gla", "--lr", "nan", *out], "must be a positive number, got 'nan'"),
        "train depth": (["train", "gla", "--depth", 10**6, *out], "must be a whole number below 10000"),
        "train batch": (["train", "gla", "--batch", 10**12, *out], "must be a whole number below 2147483648"),
        "train tokenizer": (["train", "gla", *text, "--tokenizer", "", *out], "a tokenizer must be char, byte"),
        "train setup": (["train", "gla", "--setup=--", *text, *out], "task lm has no setup '--'"),
        "train dashes": (["train", "gla", "--dim=--", *text, *out], "must be a whole number of at least 1, got '--'"),
        "train config": (["train", "gla", "--config", junk, *out], "must be UTF-8 text"),
        "train backend": (["train", "gla", *text, "--compile", "inductr", *out], "no backend is called 'inductr'"),
        "train dim": (["train", "gla", *text, "--dim", 2**26, *out], "not enough memory"),
        "task": (["task", "mqar", "gla", "--vocabulary", 2**31 - 2, *out], "not enough memory"),
        "task data": ([*listops, "--data", junk], "--data must be a folder"),
        "task nesting": ([*listops, "--nesting", 10**5], "must be a whole number below 101"),
        "task lengths": ([*listops, "--shortest", 50, "--longest", 50], "must be at least 2 above"),
        "compare": (["compare", "gla", "glb", *text, *out], "no preset is called 'glb'; did you mean gla"),
        "compare device": (["compare", "gla", *text, "--device", "tpu", *out], "--device tpu is not available"),
        "compare recipes": (["compare", "gla", "gla:heads=3", *text, *out], "gla:heads=3 cannot be built"),
        "data": (["data", tmp_path, *out], "recur data reads a text file or hub:NAME"),
        "generate": (["generate", junk, "--prompt", "a"], "no checkpoint in"),
        "convert text": (["convert", tmp_path / "text.pt", *official], "is damaged"),
        "convert config": (["convert", tmp_path / "ok.pt", *official], "[1]"),
        "bench": (["bench", "--device", "cpu", "--shapes", "1,2"], "--shapes must be of"),
        "bench have": (["bench", "--device", "cpu", "--have", junk], "must be UTF-8 text"),
        "nothing": ([""], "invalid choice: ''"),
    }  # fmt: skip


def test_no_input_ends_in_a_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: str) -> None:
    for name, (argv, said) in commands(tmp_path, text_file).items():
        assert said in refused(capsys, *argv), name
    kept = list((tmp_path / "out").glob("[!.]*"))  # a lock may stay
    assert kept == []


def test_the_largest_seed(tmp_path: Path, text_file: str) -> None:
    from recur import train

    tiny = {"recipe": "gla:heads=2", "dim": 16, "depth": 1, "steps": 1, "batch": 2, "length": 16, "text": text_file}
    train.start("lm", tmp_path, {**tiny, "seed": 2**63 - 1})


# ---------------------------------------------------------------------- threads


def test_threads_leave_busy_processors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [idle_threads(8, 8, load) for load in (0.0, 0.4, 3.0, 7.6, 20.0)] == [8, 8, 5, 1, 1]
    assert idle_threads(2, 64, 10.0) == 2
    monkeypatch.setattr("recur.train.machine._load", lambda: 100.0)
    assert with_threads(Settings()).threads == 1
    assert with_threads(Settings(threads=3)).threads == 3
    assert with_threads(Settings(device="cuda")).threads == 0
