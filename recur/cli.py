"""The command line: `recur list | show | check | convert`, and the commands of training; each with examples."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import recur
from recur.convert import files
from recur.train import commands as commands_of_training
from recur.train.config import InputError, count, unknown

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
    return parser


def _preset(name: str) -> str:
    if name not in recur.presets.names():
        raise argparse.ArgumentTypeError(unknown("preset", name, recur.presets.names()))
    return name
