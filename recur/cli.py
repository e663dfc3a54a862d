"""The command line: recur list, show, check, convert, train, generate, bench; each with examples under --help."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NoReturn

import torch

import recur
from recur import train
from recur.convert import files
from recur.train import InputError, Settings

EXTRA = {"tqdm": "demo", "matplotlib": "demo", "hypothesis": "test"}  # what brings each optional package
SETTINGS = {field.name: field.default for field in fields(Settings)}


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


def _train(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from recur.train.plot import draw_curve, write_curve

    choices = {name: value for name, value in vars(arguments).items() if name in SETTINGS}
    out = arguments.out or Path("runs") / arguments.preset
    run = train.prepare(out, choices, resume=arguments.resume)
    settings, corpus = run.settings, run.corpus
    unigram, bigram = train.counting_losses(corpus)
    print(run.recipe)
    parameters = sum(weight.numel() for weight in run.model.parameters())
    characters = len(corpus.train) + len(corpus.valid)
    print(f"\ndepth {settings.depth}, width {settings.dim}: {parameters:,} parameters")
    print(f"{characters:,} characters of text, {len(corpus.vocabulary)} different; the last tenth is for validation\n")
    with tqdm(desc=settings.preset, total=settings.steps, initial=run.step, unit="step") as bar:

        def report(loss: float, speed: float) -> None:
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()

        train.fit(run, out, report)
    validation = train.evaluate(run, corpus.valid)
    write_curve(out / "curve.csv", run.curve)
    title = f"{settings.preset}, {parameters / 1e6:.2f}M parameters"
    draw_curve(out / "curve.png", run.curve, title=title, unigram=unigram, bigram=bigram)
    print(f"\nvalidation loss {validation:.3f} nats per character over {len(corpus.valid):,} characters")
    print(f"counting alone reaches {unigram:.3f} (single characters) and {bigram:.3f} (pairs)\n")
    prompt = train.decode(corpus.valid[:64], corpus.vocabulary)
    options = {"max_new_tokens": 300, "temperature": 0.7, "seed": settings.seed}
    print(f"{'-' * 80}\n{train.sample(run.model, corpus.vocabulary, prompt, **options)}\n{'-' * 80}\n")
    print(f"loss curve: {out / 'curve.png'}\ncheckpoint: {out} (recur generate {out} --prompt 'The ')")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    model, vocabulary = train.load_model(arguments.folder)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    print(train.sample(model, vocabulary, arguments.prompt, **{name: getattr(arguments, name) for name in names}))
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
    if unknown := set(arguments.families) - set(benchmark.FAMILIES):
        raise InputError(f"--families must be of {', '.join(benchmark.FAMILIES)}, got {', '.join(sorted(unknown))}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda is not available here; --device cpu --form chunked tries the script")
    benchmark.run(arguments)
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"recur: error: {' '.join(message.split())}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="recur", description="Linear-recurrence sequence models, from recipes.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str, examples: str) -> _Parser:
        lines = "\n".join(f"  {line}" for line in examples.split("; "))
        layout = argparse.RawDescriptionHelpFormatter
        made = commands.add_parser(
            name, help=about, description=about, epilog=f"examples:\n{lines}", formatter_class=layout
        )
        made.set_defaults(command=run)
        return made

    command("list", _list, "Name every preset.", "recur list")

    show = command(
        "show", _show, "Print a preset's stages and equation.", "recur show hgrn2; recur show hgrn2 --dim 256"
    )
    show.add_argument("preset", metavar="NAME", type=_preset)
    show.add_argument("--dim", type=_count, help="width; adds the number of parameters and the bytes of state")

    check = command("check", _check, "Run every law that applies to a preset.", "recur check longhorn")
    check.add_argument("preset", metavar="NAME", type=_preset)

    files.add(command)

    about = "Train a character-level language model on a text."
    fresh, again = (
        "recur train gla --text book.txt --steps 2000 --out runs/book",
        "recur train gla --out runs/book --resume",
    )
    trainer = command("train", _train, about, f"recur train longhorn; {fresh}; {again}")
    trainer.add_argument("preset", metavar="PRESET", type=_preset)
    trainer.add_argument("--out", metavar="FOLDER", type=Path, help="where the run is kept (runs/PRESET)")
    trainer.add_argument("--resume", action="store_true", help="continue the run in --out with its own settings")

    def setting(name: str, type: Callable[[str], Any], about: str, **options: Any) -> None:
        shown = about if SETTINGS[name] is None else f"{about} ({SETTINGS[name]})"
        flag = f"--{name.replace('_', '-')}"
        trainer.add_argument(flag, type=type, default=argparse.SUPPRESS, help=shown, **options)

    setting("text", _path, "a UTF-8 text (the documentation inside CPython)", metavar="FILE")
    setting("dim", _count, "width")
    setting("depth", _count, "layers")
    setting("steps", _count, "updates of the weights")
    setting("batch", _count, "windows of text in an update")
    setting("length", _count, "characters in a window")
    setting("lr", _rate, "peak learning rate")
    setting("weight_decay", _fraction, "of AdamW, on the weights that decay")
    setting("dropout", _fraction, "probability")
    setting("every", _count, "steps from one checkpoint and validation to the next")
    setting("seed", _seed, "of weights, batches and the sample")
    setting("device", str, "cpu, cuda, mps")

    about = "Continue a prompt with a trained model."
    prompt = "recur generate runs/longhorn --prompt 'The '"
    writer = command("generate", _generate, about, f"{prompt}; {prompt} --temperature 0.5 --top-k 20 --seed 3")
    writer.add_argument("folder", metavar="FOLDER", type=Path, help="the --out of recur train")
    writer.add_argument("--prompt", metavar="TEXT", required=True)
    writer.add_argument("--max-new-tokens", type=_count, default=300, help="characters to write (300)")
    writer.add_argument("--temperature", type=_temperature, default=0.7, help="0 takes the likeliest character (0.7)")
    writer.add_argument("--top-k", type=_count, help="draw among the k likeliest characters only")
    writer.add_argument("--top-p", type=_share, help="draw among the likeliest characters that hold this probability")
    writer.add_argument("--seed", type=_seed, default=0, help="the same seed writes the same text (0)")

    about = "Measure scans and steps against every installed peer: gpu.json, gpu.md and gpu.png in a checkout."
    small = "recur bench --families scalar tied --shapes 8,2048,16,128,128 --seconds 300"
    tried = "recur bench --device cpu --form chunked --families scalar --shapes 1,64,2,8,8 --out runs/bench"
    bench = command("bench", _bench, about, f"recur bench; {small}; {tried}")
    bench.add_argument("--families", metavar="NAME", nargs="+", default=[], help="recurrences (all)")
    bench.add_argument("--shapes", metavar="B,T,...", type=_shape, nargs="+", default=[], help="instead of its own")
    bench.add_argument("--seconds", type=_rate, default=3600.0, help="start no case after this long (3600)")
    bench.add_argument("--out", metavar="FOLDER", type=Path, default=Path("benchmarks/results"), help="for the results")
    bench.add_argument(
        "--have", metavar="JSON", type=Path, nargs="+", default=[], help="results to keep and go on from"
    )
    bench.add_argument("--candidates", type=_count, default=8, help="a peer's autotuner tries this many a kernel (8)")
    bench.add_argument("--growth", action="store_true", help="also time and memory from 1024 tokens up")
    bench.add_argument("--longest", type=_count, default=2**20, help="of --growth (1048576)")
    bench.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the script (cuda)")
    bench.add_argument("--form", default="triton", help="of our scans (triton)")
    return parser


def _shape(text: str) -> tuple[int, ...]:
    return tuple(_count(size) for size in text.split(","))


def _preset(name: str) -> str:
    names = recur.presets.names()
    if name not in names:
        near = difflib.get_close_matches(name, names)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known presets: {', '.join(names)}"
        raise argparse.ArgumentTypeError(f"no preset is called {name!r}; {hint}")
    return name


def _path(text: str) -> str:
    return str(Path(text).resolve())  # a run may be resumed from another folder


def _number(kind: type, rule: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A reader of one number, which names `rule` when the text is no such number."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        return value

    return read


_count = _number(int, "a whole number of at least 1", lambda n: n >= 1)
_seed = _number(int, "a whole number from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63)
_rate = _number(float, "a positive number", lambda x: 0 < x < float("inf"))
_temperature = _number(float, "a number of at least 0", lambda x: 0 <= x < float("inf"))
_fraction = _number(float, "a number from 0 up to but not including 1", lambda x: 0 <= x < 1)
_share = _number(float, "a number above 0 and at most 1", lambda x: 0 < x <= 1)
