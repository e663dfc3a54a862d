"""`recur convert`: official files in, ours out, and back; one clear line for each file that is invalid."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recur import LanguageModel, convert, presets
from recur.cli import main
from recur.convert.files import CheckpointError

CONFIG = {"d_model": 8, "n_layer": 2, "vocab_size": 10, "ssm_cfg": {"d_state": 2}}


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    return convert.to_official("mamba_lm", LanguageModel(presets.mamba(state=2), vocab_size=16, dim=8, depth=2))


@pytest.fixture
def folder(tmp_path: Path, official: dict[str, Tensor]) -> Path:
    torch.save(official, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_there_and_back(
    ending: str, folder: Path, official: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    ours, back = folder / "ours.safetensors", folder / f"back.{ending}"
    assert main(["convert", str(folder / "pytorch_model.bin"), str(ours), "--from", "mamba_lm"]) == 0
    assert re.fullmatch(
        r".*ours\.safetensors: mamba_lm as a module of recur, [\d,]+ parameters\n", capsys.readouterr().out
    )
    name, config, module = convert.load_module(ours)
    assert (name, config) == ("mamba_lm", CONFIG)
    ids = torch.arange(10)[None]
    assert torch.equal(module(ids), convert.from_official("mamba_lm", official, CONFIG)(ids))
    assert main(["convert", str(ours), str(back), "--to", "mamba_lm"]) == 0
    assert same(convert.read_checkpoint(back)[0], official)
    assert not list(folder.glob(".*"))


def test_from_one_official_layout_to_another(folder: Path, official: dict[str, Tensor]) -> None:
    source, target = folder / "pytorch_model.bin", folder / "model.safetensors"
    assert main(["convert", str(source), str(target), "--from", "mamba_lm", "--to", "mamba_hf"]) == 0
    renamed = {key.replace(".embedding.", ".embeddings."): tensor for key, tensor in official.items()}
    assert same(load_file(target), renamed)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_training_script_may_have_wrapped_it(key: str, tmp_path: Path, official: dict[str, Tensor]) -> None:
    torch.save({key: official, "step": 7}, tmp_path / "last.pt")
    assert same(convert.read_checkpoint(tmp_path / "last.pt")[0], official)


def test_tensors_are_read_to_where_complex_numbers_may_lie(tmp_path: Path) -> None:
    """A tensor at 8 bytes, the first or the second of two headers' lengths; at 9 after one byte more."""
    numbers = torch.randn(5, 2, dtype=torch.float64)
    for more in range(0, 16, 3):
        head = {"pairs": {"dtype": "F64", "shape": [5, 2], "data_offsets": [0, 80]}}
        head["one"] = {"dtype": "F64", "shape": [], "data_offsets": [80, 88]}
        text = json.dumps(head).encode()
        text += b" " * (-len(text) % 16 + more)
        path = tmp_path / f"{more}.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + numbers.numpy().tobytes() + struct.pack("<d", 3.0))
        tensors, _ = convert.read_checkpoint(path)
        assert [tensor.data_ptr() % 16 for tensor in tensors.values()] == [0, 0]
        assert torch.equal(tensors["pairs"], numbers)
        assert tensors["one"] == 3
        assert torch.equal(torch.view_as_complex(tensors["pairs"]).exp(), torch.view_as_complex(numbers).exp())


# ---------------------------------------------------------------------- wrappers, shards


def test_a_module_of_ours_is_written_and_read_without_wrappers(folder: Path, official: dict[str, Tensor]) -> None:
    module, path = convert.from_official("mamba_lm", official, CONFIG), folder / "ours.safetensors"
    convert.save_module(path, "mamba_lm", {**CONFIG, "architectures": ["A"]}, torch.compile(module, backend="eager"))
    tensors, metadata = convert.read_checkpoint(path)
    assert set(tensors) == set(dict(module.named_parameters()))
    convert.write_checkpoint(path, {f"module.{key}": tensor for key, tensor in tensors.items()}, metadata)
    assert same(dict(convert.load_module(path)[2].named_parameters()), tensors)
    twice = {"module.final_norm.weights.weight": torch.ones(8), **tensors}
    convert.write_checkpoint(path, twice, metadata)
    with pytest.raises(CheckpointError, match=r"ours\.safetensors must hold final_norm\.weights\.weight once, got "):
        convert.load_module(path)


def shards(
    folder: Path, official: dict[str, Tensor], ending: str = "safetensors", stem: str = "model"
) -> tuple[Path, list[str]]:
    """Three files of one checkpoint, and their index: its path and their names."""
    names = [f"{stem}-{i:05d}-of-00003.{ending}" for i in (1, 2, 3)]
    keys = list(official)
    for i, name in enumerate(names):
        convert.write_checkpoint(folder / name, {key: official[key] for key in keys[i::3]})
    index = folder / f"{stem}.{ending}.index.json"
    weight_map = {key: names[i % 3] for i, key in enumerate(keys)}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index, names


@pytest.mark.parametrize(
    ("ending", "stem"),
    [("safetensors", "model"), ("bin", "pytorch_model"), ("pt", "weights"), ("safetensors", "model.fp16")],
)
def test_shards_are_read_by_their_index_and_by_their_folder(
    ending: str, stem: str, tmp_path: Path, official: dict[str, Tensor]
) -> None:
    index, _ = shards(tmp_path, official, ending, stem)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for source in (index, tmp_path):
        assert same(convert.read_checkpoint(source)[0], official)
        target = tmp_path.with_suffix(".safetensors")
        assert main(["convert", str(source), str(target), "--from", "mamba_lm"]) == 0
        assert same(convert.to_official("mamba_lm", convert.load_module(target)[2]), official)
    index.unlink()
    assert same(convert.read_checkpoint(tmp_path)[0], official)


def test_a_folder_with_one_checkpoint_is_that_checkpoint(folder: Path, official: dict[str, Tensor]) -> None:
    assert same(convert.read_checkpoint(folder)[0], official)
    convert.write_checkpoint(folder / "other.safetensors", {"a": torch.ones(1)})
    assert same(convert.read_checkpoint(folder)[0], official)  # the name that transformers gives goes first
    shards(folder, {"b": torch.ones(2), "c": torch.ones(2), "d": torch.ones(2)})
    assert set(convert.read_checkpoint(folder)[0]) == {"b", "c", "d"}  # and safetensors before pickles


def test_a_tensor_in_two_shards_is_the_one_of_the_index(tmp_path: Path, official: dict[str, Tensor]) -> None:
    index, (first, second, _) = shards(tmp_path, official)
    key = next(iter(official))
    there = convert.read_checkpoint(tmp_path / second)[0]
    convert.write_checkpoint(tmp_path / second, {**there, key: torch.zeros(1)})
    assert same(convert.read_checkpoint(index)[0], official)
    index.unlink()
    with pytest.raises(CheckpointError, match=f"must hold every key once, in several shards: {re.escape(key)}"):
        convert.read_checkpoint(tmp_path)
    assert first


def indexed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A change of an index's content."""

    def change_file(index: Path) -> None:
        content = json.loads(index.read_text())
        changed = change(content)
        index.write_text(json.dumps(content if changed is None else changed))

    return change_file


def redirected(name: str) -> Callable[[Path], object]:
    return indexed(lambda content: content["weight_map"].update({"backbone.norm_f.weight": name}))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda index: index.unlink(), r"there is no file .*model\.safetensors\.index\.json"),
        (lambda index: index.write_text("{"), r"index\.json is not valid JSON"),
        (lambda index: index.write_text("[]"), r"index\.json must hold an object, got list"),
        (lambda index: index.write_text("{}"), r"index\.json must hold a weight_map from keys to files"),
        (indexed(lambda content: {"weight_map": {"a": 1}}), "must hold a weight_map from keys to files"),
        (
            lambda index: index.with_name("model-00002-of-00003.safetensors").unlink(),
            r"must hold all 3 shards of the checkpoint, missing: model-00002-of-00003\.safetensors$",
        ),
        (
            indexed(
                lambda content: content["weight_map"].update(
                    {f"k{i}": "model-00001-of-00003.safetensors" for i in range(10)}
                )
            ),
            "must hold every key of its index, in no shard: k0, k1, k2, k3, k4, k5, k6, k7 and 2 more$",
        ),
        (redirected("../secret.safetensors"), r"must name files of the same folder, got \.\./secret\.safetensors"),
        (redirected("/etc/secret.safetensors"), "must name files of the same folder, got /etc/secret"),
        (redirected("..\\secret.safetensors"), "must name files of the same folder, got "),
        (redirected("a/../../secret.bin"), "must name files of the same folder, got a/"),
        (redirected(".."), r"must name files of the same folder, got \.\."),
        (redirected("config.json"), r"config\.json must end in \.safetensors, \.pt, \.pth, \.bin or \.index\.json"),
    ],
)
def test_an_index_that_is_no_use_is_named(
    harm: Callable[[Path], object], words: str, tmp_path: Path, official: dict[str, Tensor]
) -> None:
    (tmp_path / "in").mkdir()
    index, _ = shards(tmp_path / "in", official)
    (tmp_path / "in" / "config.json").write_text("{}")
    convert.write_checkpoint(tmp_path / "secret.safetensors", {"backbone.norm_f.weight": torch.zeros(8)})
    harm(index)
    with pytest.raises(CheckpointError, match=words):
        convert.read_checkpoint(index)


def test_a_folder_that_is_no_use_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, empty, two = folder / "out.safetensors", folder / "empty", folder / "two"
    for path in (empty, two):
        path.mkdir()
    mamba = ("--from", "mamba_lm")
    assert "name the constructor's arguments with --config" in refused(capsys, empty, out, *mamba)
    config = ("--config", folder / "config.json")
    assert "empty must hold one checkpoint, got nothing" in refused(capsys, empty, out, *mamba, *config)
    for name in ("a.pt", "b.safetensors"):
        convert.write_checkpoint(two / name, {"a": torch.ones(1)})
    assert "two must hold one checkpoint, got a.pt, b.safetensors" in refused(capsys, two, out, *mamba, *config)
    (two / "a.pt").unlink()
    (two / "b.safetensors").rename(two / "b-2-of-2.safetensors")
    assert "2 shards of the checkpoint, missing: b-1-of-2.safetensors" in refused(capsys, two, out, *mamba, *config)


def test_what_a_configuration_has_besides_is_said_in_a_line_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 8, "lucky_number": 7, "top_k": 3}
    with pytest.warns(UserWarning, match="lucky_number"):
        model = convert.build("hgrn_hub", config)
    convert.write_checkpoint(tmp_path / "model.safetensors", convert.to_official("hgrn_hub", model))
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert main(["convert", str(tmp_path), str(tmp_path / "ours.safetensors"), "--from", "hgrn_hub"]) == 0
    assert capsys.readouterr().err == "recur: hgrn_hub: ignored, as the original ignores it: lucky_number\n"
    _, kept, _ = convert.load_module(tmp_path / "ours.safetensors")
    assert kept == {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 8, "top_k": 3, "norm_eps": 1e-5}


# ---------------------------------------------------------------------- files that are no use


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    with pytest.raises(SystemExit) as leaving:
        main(["convert", *map(str, argv)])
    printed = capsys.readouterr()
    assert leaving.value.code == 2
    assert re.fullmatch(r"recur: error: [^\n]+\n", printed.err), printed.err
    return printed.err


def test_what_does_not_fit_is_listed_and_nothing_is_written(
    folder: Path, official: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    partial = {key: tensor for key, tensor in official.items() if not key.endswith("norm_f.weight")}
    save_file({**partial, "extra": torch.zeros(1)}, folder / "odd.safetensors")
    said = refused(capsys, folder / "odd.safetensors", folder / "out.safetensors", "--from", "mamba_lm")
    assert "missing: backbone.norm_f.weight unexpected: extra" in said
    assert not (folder / "out.safetensors").exists()


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("it ran",))


def test_a_pickle_that_runs_code_is_not_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Payload()}, folder / "bad.pt")
    said = refused(capsys, folder / "bad.pt", folder / "out.safetensors", "--from", "mamba_lm")
    assert "must hold tensors and nothing that runs" in said


def test_files_that_are_no_use_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, out, mamba = folder / "pytorch_model.bin", folder / "out.safetensors", ("--from", "mamba_lm")
    (folder / "torn.safetensors").write_bytes(b"\x10")
    (folder / "torn.bin").write_bytes(good.read_bytes()[:100])
    torch.save([1, 2], folder / "list.pt")
    (folder / "list.json").write_text("[]")
    (folder / "text.json").write_text("{")
    cases = {
        (folder / "none.pt", out, *mamba): "there is no file .*none.pt",
        (folder / "model.gguf", out, *mamba): r"must end in \.safetensors, \.pt, \.pth, \.bin",
        (folder / "torn.safetensors", out, *mamba): r"torn\.safetensors is damaged",
        (folder / "torn.bin", out, *mamba): r"torn\.bin is damaged",
        (folder / "list.pt", out, *mamba): "must hold a state_dict, or one under state_dict, model_state_dict, model",
        (good, folder / "out.txt", *mamba): r"must end in \.safetensors to hold a module of recur",
        (good, folder / "out.txt", *mamba, "--to", "mamba_hf"): r"must end in \.safetensors, \.pt",
        (good, out, *mamba, "--config", folder / "none.json"): "name the constructor's arguments with --config",
        (good, out, *mamba, "--config", folder / "list.json"): "must hold an object, got list",
        (good, out, *mamba, "--config", folder / "text.json"): "is not valid JSON",
        (good, out): "is not a module of recur; say what it is with --from",
        (good, out, *mamba, "--to", "longhorn_lm"): "every parameter must have an official place",
    }
    for argv, words in cases.items():
        assert re.search(words, refused(capsys, *argv)), argv


def test_a_module_of_ours_must_fit_its_own_name(folder: Path, official: dict[str, Tensor]) -> None:
    module = convert.from_official("mamba_lm", official, CONFIG)
    convert.save_module(folder / "ours.safetensors", "mamba_lm", {**CONFIG, "n_layer": 1}, module)
    with pytest.raises(CheckpointError, match=r"does not fit mamba_lm: blocks\.1\.mixer"):
        convert.load_module(folder / "ours.safetensors")


def test_a_write_that_fails_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = folder / "model.pt"
    target.write_text("precious")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        convert.write_checkpoint(target, {"a": torch.zeros(1)})
    assert target.read_text() == "precious"
    assert not list(folder.glob(".*"))
