"""The command line: `recur list | show | explain | check | convert | bench`, and those of training; with examples."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NoReturn

import torch

import recur
from recur import own
from recur.convert import files
from recur.explain import CARDS
from recur.presets import words
from recur.reading import InputError, one_line, read_json, reason
from recur.train import commands as commands_of_training
from recur.train.config import count, file_or_folder, positive, several

# what brings each optional package
TRAIN = ("accelerate", "datasets", "matplotlib", "sklearn", "tensorboard", "tqdm", "transformers", "yaml")
EXTRA = {**dict.fromkeys(TRAIN, "train"), "hypothesis": "test", "torchao": "quantize"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 1 if a law was broken, 130 if interrupted; invalid input exits with 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal of few characters shows others by their numbers
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        status = int(arguments.command(arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads the output wants no more of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, recur.RecipeError, files.CheckpointError) as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename}: {reason(error)}" if error.filename else str(error))
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _out_of_memory(error):
            raise
        parser.error(f"there is not enough memory for these sizes: {one_line(error)}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        remedy = f"pip install -e '.[{EXTRA[package]}]' in a clone of recur"
        parser.error(f"{package} is not installed: {remedy}")
    except KeyboardInterrupt:
        print("recur: interrupted", file=sys.stderr)
        return 130


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate; on a CPU it says so in words alone."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in said or "calculation overflowed" in said


def _list(arguments: argparse.Namespace) -> int:
    names = recur.presets.names()
    for name in names:
        summary = (getattr(recur.presets, name).__doc__ or "").strip().splitlines()[0]
        print(f"{name:<{max(map(len, names))}}  {summary}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    for recipe in words.read(arguments.recipe, own.load(arguments.imports)):
        if arguments.dim is None:
            print(recipe)
            continue
        try:
            with torch.device("meta"):  # shapes alone: no width is too large to look at
                print(recur.Mixer(recipe, arguments.dim))
        except ValueError as error:
            raise InputError(f"{arguments.recipe} cannot be built with --dim {arguments.dim}: {error}") from error
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    options = {"batch": arguments.batch, "length": arguments.length, "dtype": dtype, "device": arguments.device}
    recipes = words.read(arguments.recipe, own.load(arguments.imports))
    try:
        with torch.device("meta"):  # shapes alone, as in `show`
            if arguments.depth is None:
                targets: list[recur.Mixer | recur.LanguageModel] = [recur.Mixer(r, arguments.dim) for r in recipes]
            else:
                sizes = {"vocab_size": arguments.vocab, "dim": arguments.dim, "depth": arguments.depth}
                targets = [recur.LanguageModel(recipes, ffn=arguments.ffn, **sizes)]
    except ValueError as error:
        raise InputError(f"{arguments.recipe} cannot be built with --dim {arguments.dim}: {error}") from error
    for number, target in enumerate(targets):
        print("\n" * (number > 0) + str(recur.explain(target, card=arguments.card, **options)))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    import recur.testing

    name = arguments.recipe
    for recipe in words.read(name, own.load(arguments.imports)):
        try:
            with torch.device("meta"):
                recur.Mixer(recipe, 32)
        except ValueError as error:
            raise InputError(f"{name} cannot be built at width 32, where laws are tried: {error}") from error
        try:
            recur.testing.check(recipe, report=print)
        except AssertionError as error:
            print(f"{name} breaks a law:\n{error}", file=sys.stderr)
            return 1
    print(f"{name}: every law that applies holds")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    path = Path(recur.__file__).parents[1] / "benchmarks" / "gpu.py"
    if not path.exists():
        raise InputError(f"bench needs a checkout of the source: there is no {path}")
    found = spec_from_file_location("recur_benchmarks_gpu", path)
    assert found is not None
    assert found.loader is not None
    benchmark = module_from_spec(found)
    found.loader.exec_module(benchmark)
    if others := set(arguments.families) - set(benchmark.FAMILIES):
        raise InputError(f"--families must be of {', '.join(benchmark.FAMILIES)}, got {', '.join(sorted(others))}")
    ranks = {len(family.shapes[0]) for family in benchmark.FAMILIES.values()}
    if odd := [shape for shape in arguments.shapes if len(shape) not in ranks]:
        wanted = " or ".join(map(str, sorted(ranks)))
        raise InputError(f"--shapes must be of {wanted} numbers, got {','.join(map(str, odd[0]))}")
    for results in arguments.have:
        if not isinstance(found := read_json(results), dict) or not {"records", "growth"} <= found.keys():
            raise InputError(f"--have {results} holds no results of recur bench")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda is not available here; --device cpu --form chunked tries the script")
    benchmark.run(arguments)
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line of moderate length and exits with 2. A value may be "--", as in --prompt=--."""

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if not action.option_strings or arg_strings != ["--"]:
            return super()._get_values(action, arg_strings)
        value = self._get_value(action, "--")  # argparse drops it, and an empty list is left, of no type
        self._check_value(action, value)
        return value if action.nargs is None else [value]

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        self.exit(2, f"recur: error: {line if len(line) < 2000 else line[:2000] + ' ...'}\n")


def _maker(parser: argparse.ArgumentParser, metavar: str) -> commands_of_training.Command:
    """What adds a command below a parser: its name, what it runs, what it is for, examples separated by "; "."""
    commands = parser.add_subparsers(required=True, metavar=metavar)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], about: str, examples: str
    ) -> argparse.ArgumentParser:
        lines = "\n".join(f"  {line}" for line in examples.split("; "))
        layout = argparse.RawDescriptionHelpFormatter
        made = commands.add_parser(
            name, help=about, description=about, epilog=f"examples:\n{lines}", formatter_class=layout
        )
        made.set_defaults(command=run)
        return made

    return command


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="recur", description="Linear-recurrence sequence models, from recipes.")
    parser.add_argument("--version", action="version", version=f"recur {recur.__version__}")
    command = _maker(parser, "COMMAND")
    command("list", _list, "List every preset with its equation.", "recur list")

    sizes = "recur show hgrn2 --dim 256; recur show @recipe.json --import my_parts.py"
    show = command("show", _show, "Print a recipe's stages and equation.", f"recur show gla:heads=2; {sizes}")
    commands_of_training.add_recipe(show)
    show.add_argument("--dim", type=count, help="width; adds the number of parameters and the bytes of state")

    layer = "recur explain hgrn2:heads=4 --dim 512 --batch 8 --length 2048 --device cuda --dtype bfloat16"
    model = "recur explain gla --dim 1024 --depth 24 --vocab 32000 --ffn swiglu --card H200"
    about = "Print which forms run on a device and why, with launches, bytes, FLOPs and memory; nothing is run."
    explained = command("explain", _explain, about, f"{layer}; {model}")
    commands_of_training.add_recipe(explained)
    explained.add_argument("--dim", type=count, required=True, help="width of the layer")
    explained.add_argument("--batch", type=count, default=1, help="sequences (1)")
    explained.add_argument("--length", type=count, default=1024, help="tokens of each (1024)")
    explained.add_argument(
        "--depth", type=count, help="number of layers: explain a language model instead of one layer"
    )
    explained.add_argument("--vocab", type=count, default=32000, help="size of the vocabulary of the model (32000)")
    explained.add_argument("--ffn", help="feed-forward of a model's layers: gelu, swiglu, gated, channel_mix (none)")
    explained.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="device to ask about; it need not be present (cuda)"
    )
    kinds = ("bfloat16", "float16", "float32", "float64")
    explained.add_argument("--dtype", choices=kinds, default="bfloat16", help="of weights and inputs (bfloat16)")
    explained.add_argument("--card", choices=tuple(CARDS), help="estimate times for this card")

    mine = "recur check my_recipe --import my_parts.py"
    check = command("check", _check, "Run every law that applies to a recipe.", f"recur check longhorn; {mine}")
    commands_of_training.add_recipe(check)

    files.add(command)
    commands_of_training.add(command, lambda parser: _maker(parser, "TASK"))

    about = "Measure scans and steps against every installed peer: gpu.json, gpu.md and gpu.png in a checkout."
    small = "recur bench --families scalar tied --shapes 8,2048,16,128,128 --seconds 300"
    tried = "recur bench --device cpu --form chunked --families scalar --shapes 1,64,2,8,8 --out runs/bench"
    bench = command("bench", _bench, about, f"recur bench; {small}; {tried}")
    bench.add_argument("--families", metavar="NAME", nargs="+", default=[], help="recurrences to measure (all)")
    bench.add_argument(
        "--shapes", metavar="B,T,...", type=several(count), nargs="+", default=[], help="instead of the default shapes"
    )
    bench.add_argument("--seconds", type=positive, default=3600.0, help="start no new case after this time (3600)")
    bench.add_argument(
        "--out", metavar="FOLDER", type=file_or_folder, default="benchmarks/results", help="where results go"
    )
    bench.add_argument(
        "--have", metavar="JSON", type=file_or_folder, nargs="+", default=[], help="earlier results to continue from"
    )
    bench.add_argument(
        "--candidates", type=count, default=8, help="configurations per kernel that the autotuner of a peer tries (8)"
    )
    bench.add_argument("--growth", action="store_true", help="also measure time and memory for growing lengths")
    bench.add_argument("--longest", type=count, default=2**20, help="largest length of --growth (1048576)")
    bench.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the script (cuda)")
    forms = ("triton", "chunked", "recurrent", "parallel")
    bench.add_argument("--form", choices=forms, default="triton", help="of our scans (triton)")
    return parser
