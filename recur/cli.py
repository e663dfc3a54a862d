"""The command line: `recur list | show | check | convert | bench`, and the commands of training; with examples."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import NoReturn

import torch

import recur
from recur.convert import files
from recur.train import commands as commands_of_training
from recur.train.config import InputError, count, positive, several, unknown

# what brings each optional package
TRAIN = ("accelerate", "datasets", "matplotlib", "sklearn", "tensorboard", "tqdm", "transformers", "yaml")
EXTRA = {**dict.fromkeys(TRAIN, "train"), "hypothesis": "test"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 1 if a law was broken, 130 if interrupted; input that is no use exits with 2."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except (InputError, OSError) as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        parser.error(f"{error.name} is not installed: pip install 'recur-primitives[{EXTRA[error.name]}]'")
    except KeyboardInterrupt:
        print("recur: interrupted", file=sys.stderr)
        return 130


def _list(arguments: argparse.Namespace) -> int:
    names = recur.presets.names()
    for name in names:
        summary = (getattr(recur.presets, name).__doc__ or "").strip().splitlines()[0]
        print(f"{name:<{max(map(len, names))}}  {summary}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    recipe = getattr(recur.presets, arguments.preset)()
    if arguments.dim is None:
        print(recipe)
        return 0
    try:
        print(recur.Mixer(recipe, arguments.dim))
    except ValueError as error:
        raise InputError(f"{arguments.preset} cannot be built with --dim {arguments.dim}: {error}") from error
    return 0


def _check(arguments: argparse.Namespace) -> int:
    import recur.testing

    try:
        recur.testing.check(getattr(recur.presets, arguments.preset)(), report=print)
    except AssertionError as error:
        print(f"{arguments.preset} breaks a law:\n{error}", file=sys.stderr)
        return 1
    print(f"{arguments.preset}: every law that applies holds")
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
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda is not available here; --device cpu --form chunked tries the script")
    benchmark.run(arguments)
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"recur: error: {' '.join(message.split())}\n")


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
    command = _maker(parser, "COMMAND")
    command("list", _list, "Name every preset.", "recur list")

    show = command(
        "show", _show, "Print a preset's stages and equation.", "recur show hgrn2; recur show hgrn2 --dim 256"
    )
    show.add_argument("preset", metavar="NAME", type=_preset)
    show.add_argument("--dim", type=count, help="width; adds the number of parameters and the bytes of state")

    check = command("check", _check, "Run every law that applies to a preset.", "recur check longhorn")
    check.add_argument("preset", metavar="NAME", type=_preset)

    files.add(command)
    commands_of_training.add(command, lambda parser: _maker(parser, "TASK"))

    about = "Measure scans and steps against every installed peer: gpu.json, gpu.md and gpu.png in a checkout."
    small = "recur bench --families scalar tied --shapes 8,2048,16,128,128 --seconds 300"
    tried = "recur bench --device cpu --form chunked --families scalar --shapes 1,64,2,8,8 --out runs/bench"
    bench = command("bench", _bench, about, f"recur bench; {small}; {tried}")
    bench.add_argument("--families", metavar="NAME", nargs="+", default=[], help="recurrences (all)")
    bench.add_argument("--shapes", metavar="B,T,...", type=several(count), nargs="+", default=[], help="not its own")
    bench.add_argument("--seconds", type=positive, default=3600.0, help="start no case after this long (3600)")
    bench.add_argument("--out", metavar="FOLDER", type=Path, default=Path("benchmarks/results"), help="for the results")
    bench.add_argument("--have", metavar="JSON", type=Path, nargs="+", default=[], help="results to go on from")
    bench.add_argument("--candidates", type=count, default=8, help="a peer's autotuner tries this many a kernel (8)")
    bench.add_argument("--growth", action="store_true", help="also time and memory from 1024 tokens up")
    bench.add_argument("--longest", type=count, default=2**20, help="of --growth (1048576)")
    bench.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the script (cuda)")
    bench.add_argument("--form", default="triton", help="of our scans (triton)")
    return parser


def _preset(name: str) -> str:
    if name not in recur.presets.names():
        raise argparse.ArgumentTypeError(unknown("preset", name, recur.presets.names()))
    return name
