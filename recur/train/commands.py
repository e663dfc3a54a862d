"""The commands `recur train | task | compare | data | generate`."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from recur import own
from recur.blocks.quantise import quantised
from recur.train import checkpoint, config
from recur.train.config import InputError, Settings, known
from recur.train.lock import hold
from recur.train.machine import use_compiler, use_threads, with_threads
from recur.train.models import read_recipes
from recur.train.run import TASKS, chosen, configured, finish, load_model, report, setup
from recur.train.tokenize import pieces
from recur.train.trainer import Training, fit, leave, mfu, prepare
from recur.weights import parameter_count

Command = Callable[[str, Callable[[argparse.Namespace], int], str, str], argparse.ArgumentParser]
LAUNCH = "on many devices: accelerate launch -m recur train gla --device cuda"


def add(command: Command, nested: Callable[[argparse.ArgumentParser], Command]) -> None:
    """Register the commands; `command` makes one, `nested` a maker of commands below one."""
    about = "Train a language model on a text."
    fresh, again = (
        "recur train gla --text book.txt --steps 2000 --out runs/book",
        "recur train gla --out runs/book --resume",
    )
    _run_flags(command("train", _task, about, f"recur train longhorn; {fresh}; {again}; {LAUNCH}"), "lm")

    mqar, parity = "recur task mqar longhorn --pairs 4", "recur task tracking mamba --group s5"
    tasks = nested(command("task", _task, "Train a recipe on one of the papers' tasks.", f"{mqar}; {parity}"))
    for name, task in TASKS.items():
        example = f"recur task {name} longhorn"
        examples = "; ".join([example, *(f"{example} --setup {setup}" for setup in task.setups)])
        _run_flags(tasks(name, _task, task.about, examples), name)

    pair = "recur compare longhorn mamba llama --task mqar --seeds 3 --parameters 200000"
    compare = command(
        "compare",
        _compare,
        "Train recipes under the same conditions and compare them.",
        f"{pair}; {pair} --widths 32,64,128",
    )
    compare.add_argument("recipes", metavar="RECIPE", nargs="+", help=known(Settings)["recipe"].metadata["about"])
    compare.add_argument("--task", choices=TASKS, default="lm", help="task to train on (lm)")
    compare.add_argument("--seeds", type=config.count, default=1, help="runs of each, seeds 0, 1, ... (1)")
    compare.add_argument("--parameters", type=config.count, help="parameters of each; widths are chosen to match")
    compare.add_argument(
        "--widths", type=config.several(config.count), help="instead of --parameters: train each recipe at each width"
    )
    compare.add_argument(
        "--out", metavar="FOLDER", type=config.file_or_folder, help="folder for tables and plots (runs/compare-TASK)"
    )
    _config_flags(compare)
    made = {name: option for task in TASKS.values() for name, option in known(task).items()}
    config.add_flags(compare, {**made, **_settings()}, {})

    data = command("data", _data, "Tokenise a text or a hub corpus once.", "recur data hub:openwebtext --out owt")
    data.add_argument("source", metavar="SOURCE", type=config.path, help="a text file or hub:NAME")
    data.add_argument("--tokenizer", default="gpt2", help="char, byte, or a Hugging Face tokenizer (gpt2)")
    data.add_argument(
        "--out",
        metavar="FOLDER",
        type=config.file_or_folder,
        required=True,
        help="folder for train.bin, valid.bin, meta.json",
    )

    about = "Continue a prompt with a trained model."
    prompt = "recur generate runs/longhorn --prompt 'The '"
    writer = command("generate", _generate, about, f"{prompt}; {prompt} --temperature 0.5 --top-k 20 --seed 3")
    writer.add_argument("folder", metavar="FOLDER", type=config.file_or_folder, help="the --out of recur train")
    writer.add_argument("--prompt", metavar="TEXT", required=True)
    writer.add_argument("--max-new-tokens", type=config.count, default=300, help="tokens to write (300)")
    writer.add_argument(
        "--temperature", type=config.at_least_0, default=0.7, help="0 takes the most likely token (0.7)"
    )
    writer.add_argument("--top-k", type=config.count, help="sample among the k most likely tokens only")
    writer.add_argument(
        "--top-p", type=config.share, help="sample among the most likely tokens with this total probability"
    )
    writer.add_argument("--stop", metavar="TEXT", nargs="+", help="end with the token that completes one of these")
    writer.add_argument(
        "--quantize", metavar="KIND", choices=("int8", "fp8"), help="weights of projections in 8 bits: int8 or fp8"
    )
    writer.add_argument(
        "--checkpoint", metavar="WHICH", type=_which, default="newest", help="best, newest or a step (newest)"
    )
    writer.add_argument(
        "--import", metavar="FILE", dest="imports", type=config.path, help="if the file recorded by the run has moved"
    )
    writer.add_argument("--seed", type=config.seed, default=0, help="seed of the sampling (0)")


def _settings() -> dict[str, Any]:
    return {name: option for name, option in known(Settings).items() if name != "recipe"}


def _run_flags(parser: argparse.ArgumentParser, task: str) -> None:
    parser.set_defaults(task=task)
    parser.add_argument("recipe", metavar="RECIPE", help=known(Settings)["recipe"].metadata["about"])
    parser.add_argument("--out", metavar="FOLDER", type=config.file_or_folder, help="folder of the run (runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out with its recorded options")
    _config_flags(parser)
    config.add_flags(parser, {**known(TASKS[task]), **_settings()}, TASKS[task].defaults)


def _config_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--setup", metavar="NAME", help="a set of options from a paper; flags override it")
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=config.file_or_folder,
        help="options in a YAML or JSON file; flags override them",
    )


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that reads recipes by words and trains nothing."""
    options = known(Settings)
    parser.add_argument("recipe", metavar="RECIPE", help=options["recipe"].metadata["about"])
    imports = options["imports"].metadata
    parser.add_argument("--import", metavar="FILE", dest="imports", type=imports["read"], help=imports["about"])


def _check_recipe(text: str, settings: Settings) -> None:
    try:
        read_recipes(text, own.load(settings.imports))
    except InputError as error:
        raise InputError(f"argument RECIPE: {error}") from error


def _which(text: str) -> str:
    if text in ("best", "newest"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be best, newest or a step, got {text!r}")
    return str(int(text))


def _choices(arguments: argparse.Namespace) -> dict[str, Any]:
    options = known(Settings, TASKS[arguments.task])
    return {name: value for name, value in vars(arguments).items() if name in options}


def _below(arguments: argparse.Namespace) -> list[Any]:
    """What lies below the flags: the setup, then the file."""
    options = known(Settings, TASKS[arguments.task])
    file = {} if arguments.config is None else config.read_file(arguments.config, options, arguments.task)
    return [setup(arguments.task, arguments.setup), file]


def _task(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    layers = [*_below(arguments), _choices(arguments)]
    settings, task = configured(arguments.task, *layers)
    if not arguments.resume:
        _check_recipe(arguments.recipe, settings)
        settings = with_threads(settings)
    name = arguments.recipe.replace(":", "-").replace("/", "-")
    out = arguments.out or Path("runs") / (name if arguments.task == "lm" else f"{arguments.task}-{name}")
    run = prepare(task, settings, out, resume=chosen(arguments.task, *layers) if arguments.resume else None, say=_say)
    settings, task = run.settings, run.task
    machine = use_threads(settings) + use_compiler(settings)
    show: Callable[..., None] = print if run.is_main else lambda *words: None
    again = f"continue with: {_resuming(arguments, out)}"
    for recipe in task.recipes(settings):
        show(recipe)
    show(f"\ndepth {settings.depth}, width {settings.dim}: {parameter_count(run.plain_model):,} parameters{machine}\n")
    with tqdm(
        total=settings.steps, desc=settings.recipe, initial=run.step, unit="step", disable=not run.is_main
    ) as bar:

        def advance(loss: float, speed: float) -> None:
            used = mfu(run, speed)
            share = "" if used is None else f", {used:.1%} MFU"
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s{share}", refresh=False)
            bar.update()

        try:
            with _saved_on_signals(run):
                fit(run, advance)
        except KeyboardInterrupt:  # a second one
            run.signal = signal.SIGINT
    if run.signal is not None:
        kept = "nothing is kept" if run.saved is None else f"{run.saved} is kept; {again}"
        show(f"\nstopped by {signal.Signals(run.signal).name} at step {run.step} of {settings.steps}: {kept}")
        return 128 + run.signal
    if run.stopped:
        show(f"\nstopped after --seconds {settings.seconds:g}, at step {run.step} of {settings.steps}; {again}")
    finals = finish(run)
    show("\n" + report(run, finals))
    if run.is_main:
        sharded = getattr(run.accelerator, "is_fsdp2", False)  # one process cannot write with its shard alone
        with torch.compiler.set_stance("force_eager"):  # a sample is shorter than the compilation of a step
            sample = task.epilogue(
                load_model(out, imports=settings.imports)[0]
                if sharded and "tokenizer" in task.record()
                else run.plain_model
            )
        if sample:
            show(f"\n{'-' * 80}\n{sample}\n{'-' * 80}")
    show(f"\nloss curve: {out / 'curve.png'}\ncheckpoint: {out}")
    best = checkpoint.lowest_loss(checkpoint.checkpoints(out), run.curve)
    if best is not None and best != run.saved:
        show(f"lowest validation loss: step {checkpoint.number(best)}, kept in {best}")
    leave(run)
    return 0


def _say(line: str) -> None:
    print(f"recur: {line}", file=sys.stderr)


def _resuming(arguments: argparse.Namespace, out: Path) -> str:
    """The command that takes the run up."""
    command = ["train"] if arguments.task == "lm" else ["task", arguments.task]
    return shlex.join(["recur", *command, arguments.recipe, "--out", str(out), "--resume"])


@contextmanager
def _saved_on_signals(run: Training) -> Iterator[None]:
    """SIGINT and SIGTERM have the run saved and stopped; a second SIGINT interrupts at once.

    Launchers of several processes send each signal twice, and end by force what does not stop: there every one is the
    first.
    """

    alone = run.accelerator.num_processes == 1
    again = b"; Ctrl-C again stops at once" if alone else b""

    def stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and run.signal is not None and alone:
            raise KeyboardInterrupt
        run.signal = number
        if run.is_main:  # print may be what was interrupted
            os.write(2, b"\nrecur: saving and stopping after this step" + again + b"\n")

    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _compare(arguments: argparse.Namespace) -> int:
    from recur.train.compare import compare

    out = arguments.out or Path("runs") / f"compare-{arguments.task}"
    sizes = {"parameters": arguments.parameters, "widths": arguments.widths, "seeds": arguments.seeds}
    layers = [*_below(arguments), _choices(arguments)]
    threads = use_threads(with_threads(configured(arguments.task, *layers)[0]))
    print(f"{arguments.task}: {', '.join(arguments.recipes)}{threads}", flush=True)
    with hold(out, _say):
        compared = compare(
            arguments.task, arguments.recipes, layers, out, **sizes, report=lambda line: print(line, flush=True)
        )
    print(compared)
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from recur.train.data import write_bins

    with hold(arguments.out, _say), tqdm(unit="token", unit_scale=True, delay=1) as bar:
        write_bins(arguments.out, arguments.source, arguments.tokenizer, report=bar.update)
    print(f"tokens: {arguments.out} (recur train RECIPE --text {arguments.out})")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    model, tokenizer = load_model(arguments.folder, arguments.checkpoint, _say, imports=arguments.imports)
    if not arguments.prompt:
        raise InputError("the prompt must have at least one character, got an empty one")
    ids = torch.from_numpy(tokenizer.encode(arguments.prompt))[None]
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    options = {name: getattr(arguments, name) for name in names}
    stop = {"stop": arguments.stop, "decode": tokenizer.decode} if arguments.stop else {}
    whole, written = model, list[int]()
    if arguments.quantize:
        model = quantised(model, arguments.quantize)
    new = (int(token) for token in model.stream(ids, **options, **stop))
    for piece in pieces(_noted(chain(ids[0].tolist(), new), written), tokenizer.decode):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    if arguments.quantize and len(written) > 1:
        with torch.no_grad():
            before, after = (float(one.loss(torch.tensor([written]))) for one in (whole, model))
        _say(f"{arguments.quantize}: loss per token of this text {after:.4f}, {before:.4f} as trained")
    return 0


def _noted(tokens: Iterable[int], written: list[int]) -> Iterator[int]:
    """The tokens, each added to what was written."""
    for token in tokens:
        written.append(token)
        yield token
