"""The one training loop, on `accelerate`: a single device, DDP or FSDP, whatever `accelerate launch` set up."""

from __future__ import annotations

import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recur import Recipe, own, presets
from recur.blocks.language_model import evaluating
from recur.train import checkpoint
from recur.train.config import InputError, Settings, known, path, plain, read_file, resolved
from recur.train.digest import changes, differences, digests
from recur.train.events import Events
from recur.train.lock import Held, hold
from recur.train.machine import backend, compile_layers
from recur.train.models import describe
from recur.train.task import Task, part
from recur.weights import decay_groups, parameter_count

Report = Callable[[float, float], None]
PEAK = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # bf16 FLOP/s
# What may change when a run is resumed: what alters no update, and with conditions the learning rate and the steps.
FREE = ("device", "threads", "keep", "seconds", "accumulate", "recompute", "compile", "every", "lr", "steps", "imports")

# Presets whose runs had feed-forward and norm of their paper when recipes held no frame; all others had an RMS norm.
FRAMED = ("gateloop", "gla", "gss", "hgrn", "hgrn2", "llama", "retnet", "rwkv", "simple_gateloop")


@dataclass
class Training:
    """A run under way, ready for the step after `curve`."""

    task: Task
    settings: Settings
    out: Path
    accelerator: Any
    model: nn.Module
    optimizer: Any
    curve: list[dict[str, Any]]
    data: dict[str, dict[str, str]]
    held: Held | None
    saved: Path | None = None  # the checkpoint from which the run would continue
    spare: Collection[Path] = ()  # damaged checkpoints that were passed over
    stopped: bool = False
    signal: int | None = None  # set it, and the run is saved and stops after the step under way
    _pending: list[tuple[float, Tensor]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return len(self.curve) + len(self._pending)

    @property
    def plain_model(self) -> nn.Module:
        """The model without the wrappers of `accelerate`."""
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)


def prepare(
    task: Task,
    settings: Settings,
    out: Path,
    *,
    resume: dict[str, Any] | None = None,
    say: checkpoint.Say = warnings.warn,
) -> Training:
    """Start a run in the folder `out`, or take up the one in it; the folder is locked until `fit` returns.

    Args:
        task:     what is learned.
        settings: model, optimiser and run.
        out:      the folder of the run; without a checkpoint unless the run is taken up.
        resume:   the choices, by option, that the run in `out` must agree with or may be changed by; None starts a run.
        say:      called with each line that a user should see: what changed, which checkpoint is damaged.

    Raises: InputError if a choice cannot be met, or contradicts the run that is taken up; or if another process has
        locked `out`.
    """
    if (out / checkpoint.RECORD).exists():
        raise InputError(f"--out must be the folder of a run, got one of its checkpoints: {out}")
    first, notes = _is_first_process(), list[str]()
    folder, record, held = None, None, None
    with ExitStack() as undo:
        if first and out.exists():
            held = undo.enter_context(hold(out, notes.append))
        if resume is not None:
            folder, record = checkpoint.read_record(out, say=notes.append)
            settings, task = _resumed(task, out, record, resume, notes.append)
        else:
            _check_no_run(out)
        task.open(settings)
        data = _data(task)
        if record is not None:
            _check_same(record, task, settings, data, out)
        accelerator = _accelerator(settings)
        if settings.batch % (accelerator.num_processes * settings.accumulate):
            spread = f"{accelerator.num_processes} processes times --accumulate {settings.accumulate}"
            raise InputError(f"--batch must be a multiple of {spread}, got {settings.batch}")
        backend(settings)
        torch.manual_seed(settings.seed)
        model = task.build(settings)
        if settings.init is not None and record is None:
            _initialise(model, Path(settings.init), task, settings, notes.append)
        if first and held is None:
            held = undo.enter_context(hold(out, notes.append))
            _check_no_run(out)  # since this process looked, another may have come and gone
        model.to(accelerator.device)
        compile_layers(model, settings)
        fused = accelerator.device.type == "cuda"
        groups = decay_groups(model, settings.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=fused)
        model, optimizer = accelerator.prepare(model, optimizer)
        torch.manual_seed(((settings.seed + 1) * 1000 + accelerator.process_index) % 2**63)  # of dropout
        run = Training(task, settings, out, accelerator, model, optimizer, [], data, held, folder)
        if folder is not None and record is not None:
            checkpoint.load_weights(folder, run.plain_model)
            checkpoint.load_trainer(folder, run.plain_model, optimizer.optimizer, accelerator.process_index)
            run.curve = record.curve
            found = checkpoint.checkpoints(out)
            run.spare = found[found.index(folder) + 1 :]
        if run.is_main:
            checkpoint.sweep(out)
            config = json.dumps({"task": task.name, **plain(settings, task)}, indent=1) + "\n"
            checkpoint.write_whole(out / checkpoint.CONFIG, config)
        undo.pop_all()
    for line in notes if first else ():
        say(line)
    return run


def fit(run: Training, report: Report = lambda loss, speed: None) -> None:
    """Train to the last step; a checkpoint and an evaluation every `settings.every` steps and at the end.

    Once `run.signal` is set, the run is saved and stops.

    Args:
        run: as `start` returns it.
        report: called with the mean loss and the speed in tokens per second after every step (every ten on a GPU, where
            looking at a number makes the processor wait).

    Raises: InputError, and saves nothing, once a loss, a weight or a moment of the optimiser is not finite.
    """
    if run.is_main and (run.held is None or not run.held.release.alive):
        run.held = hold(run.out)
    events = None
    try:
        events = Events(run.out / "tensorboard", run.step) if run.is_main else None
        _train(run, report, events)
    finally:
        if events is not None:
            events.close()
        if run.held is not None:
            run.held.release()


def _train(run: Training, report: Report, events: Events | None) -> None:
    settings, began = run.settings, time.perf_counter()
    look = 1 if run.accelerator.device.type == "cpu" else 10
    alone = run.accelerator.num_processes == 1
    started = began
    tokens = 0
    while run.step < settings.steps and not run.stopped:
        rate = learning_rate(settings, run.step)
        total, read = _update(run, rate)
        run._pending.append((rate, total))
        tokens += read
        due = run.step % settings.every == 0 or run.step == settings.steps
        if due or len(run._pending) == look or (alone and run.signal is not None):
            late = settings.seconds is not None and time.perf_counter() - began > settings.seconds
            fresh, (timed, signalled) = _settle(run, late, run.signal is not None)
            speed = tokens / (time.perf_counter() - started)
            run.stopped = timed or signalled
            if signalled and run.signal is None:  # another process had it
                run.signal = signal.SIGTERM
            if due or run.stopped:
                _check_finite(run)
            if due or timed:
                run.curve[-1] |= _validated(run)
            if due or run.stopped:
                save(run)
            if events is not None:
                events.add([*fresh[:-1], {**fresh[-1], "tokens_per_second": speed}])
            for point in fresh:
                report(point["loss"], speed)
            started, tokens = time.perf_counter(), 0


def learning_rate(settings: Settings, step: int) -> float:
    """The rate of update number `step`: linear from 0 over the warm-up, then by schedule from `lr` to `min_lr lr`.

    cosine: half a cosine; polynomial: (1 - progress)^power; inverse_sqrt: sqrt(warmup / step), no end; constant.
    """
    warm = max(1, settings.steps // 20 if settings.warmup is None else settings.warmup)
    if step < warm:
        return settings.lr * (step + 1) / warm
    if settings.schedule == "inverse_sqrt":
        return settings.lr * math.sqrt(warm / (step + 1))
    progress = (step - warm) / max(1, settings.steps - warm)
    shapes = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "polynomial": (1 - progress) ** settings.power}
    return settings.lr * (settings.min_lr + (1 - settings.min_lr) * shapes.get(settings.schedule, 1.0))


def leave(run: Training) -> None:
    """Leave the process group, if there is one, and keep the plain model.

    The wrapper of DDP goes first: were it the last to hold the group, it would wait for a thread of gloo that waits for
    the interpreter.
    """
    run.model = run.plain_model
    run.accelerator.free_memory()
    run.accelerator.end_training()


@torch.no_grad()
def evaluate(run: Training, split: str, *, full: bool = False) -> dict[str, float]:
    """The means over a split: loss and the task's metrics.

    Args:
        run: as `start` returns it.
        split: "train", or one of the task's.
        full: whether all rows are read, not at most `settings.evaluate`.
    """
    task, settings, accelerator = run.task, run.settings, run.accelerator
    have, model = task.rows(split), run.plain_model
    # a split without end is drawn from in whole batches
    wanted = settings.evaluate if have is None else have if full else min(have, settings.evaluate)
    rank, world = accelerator.process_index, accelerator.num_processes
    sums: Tensor | None = None
    with evaluating(model):
        for index in range(math.ceil(wanted / settings.batch)):
            batch = task.batch(split, index, min(settings.batch, wanted - index * settings.batch))
            own = part(batch, rank, world, settings.batch)
            idle = not len(next(iter(own.values())))  # every process must take part, even when rows run out
            scored = _score(run, model, part(batch, 0, 1, 1) if idle else own)
            scored |= {"weight": torch.tensor(float(task.weight(own)))}
            row = torch.stack([scored[name].to(accelerator.device).double() for name in sorted(scored)])
            row = row * (not idle)
            sums = row if sums is None else sums + row
    assert sums is not None
    found = dict(zip(sorted(["loss", "weight", *task.metrics]), _summed(run, sums).tolist(), strict=True))
    return {name: found[name] / found["weight"] for name in ("loss", *task.metrics)}


def save(run: Training) -> None:
    """Save a checkpoint of this step: the main process writes what all processes hold."""
    model, accelerator = run.plain_model, run.accelerator
    weights = {name: checkpoint.whole(weight) for name, weight in checkpoint.named(model).items()}
    trainer = checkpoint.trainer_tensors(model, run.optimizer.optimizer)
    rngs = [checkpoint.rng_tensors()]
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        rngs = gather_object(rngs)
    for rank, states in enumerate(rngs):
        trainer |= {f"rng{rank}|{kind}": state for kind, state in states.items()}
    if run.is_main:
        record = checkpoint.Record(
            config={"task": run.task.name, **plain(run.settings, run.task)},
            recipes=describe(run.task.recipes(run.settings)),
            task=run.task.record(),
            step=run.step,
            curve=run.curve,
            data=run.data,
        )
        try:
            run.saved = checkpoint.save(run.out, record, weights, trainer, run.settings.keep, run.spare)
        except InputError as error:
            raise InputError(f"{error}; {_last_good(run)}") from error
    accelerator.wait_for_everyone()


def mfu(run: Training, speed: float) -> float | None:
    """The share of the GPU's bf16 peak that 6 FLOPs a weight and token are; None where the peak is not known.

    State updates are not counted, nor the second forward pass of recomputed layers.
    """
    if run.accelerator.device.type != "cuda":
        return None
    card = torch.cuda.get_device_name()
    peak = next((peak for name, peak in PEAK.items() if name in card), None)
    size = parameter_count(run.plain_model)
    return None if peak is None else 6 * size * speed / (peak * run.accelerator.num_processes)


# ---------------------------------------------------------------------- one update


def _update(run: Training, rate: float) -> tuple[Tensor, int]:
    """One step of the optimiser: the batch's summed loss of this process over the weight of all, and tokens read."""
    task, settings, accelerator, optimizer = run.task, run.settings, run.accelerator, run.optimizer
    model = run.model.train()
    batch = task.batch("train", run.step, settings.batch)
    weight, read = task.weight(batch), task.tokens(batch)
    pieces = accelerator.num_processes * settings.accumulate
    total = torch.zeros((), device=accelerator.device)
    optimizer.zero_grad()
    for micro in range(settings.accumulate):
        own = part(batch, accelerator.process_index + micro * accelerator.num_processes, pieces, settings.batch)
        last = micro + 1 == settings.accumulate
        quiet: AbstractContextManager[Any] = nullcontext() if last else accelerator.no_sync(model)
        with quiet:
            loss = _score(run, model, own)["loss"] / max(weight, 1)
            accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over processes
        total += loss.detach()
    if settings.clip > 0:
        accelerator.clip_grad_norm_(model.parameters(), settings.clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return total, read


def _score(run: Training, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    device = run.accelerator.device
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=run.settings.precision == "bfloat16"):
        return run.task.score(model(**run.task.inputs(batch)), batch)


def _settle(run: Training, *wishes: bool) -> tuple[list[dict[str, Any]], list[bool]]:
    """Read the losses of the steps since the last look into the curve; and which wishes any process has.

    All processes must act alike, so a stop is sent with the losses.   Raises: InputError if a loss is not finite.
    """
    totals = [total for _, total in run._pending]
    numbers = torch.stack([*totals, *(totals[0].new_tensor(float(wish)) for wish in wishes)])
    losses = _summed(run, numbers).tolist()
    agreed = [losses.pop() > 0 for _ in wishes][::-1]
    rates, first = [rate for rate, _ in run._pending], len(run.curve)
    run._pending.clear()
    for rate, loss in zip(rates, losses, strict=True):
        if not math.isfinite(loss):
            step = len(run.curve) + 1
            raise InputError(f"the loss is {loss} at step {step}: try a smaller --lr; {_last_good(run)}")
        run.curve.append({"step": len(run.curve) + 1, "lr": rate, "loss": loss})
    return run.curve[first:], agreed


def _check_finite(run: Training) -> None:
    """Raise InputError if a weight or a moment of the optimiser is not finite.

    Cost: reads each of them once, on its device.
    """
    tensors: dict[str, Tensor] = {}
    for name, weight in checkpoint.named(run.plain_model).items():
        moments = run.optimizer.optimizer.state.get(weight, {}).items()
        tensors[name] = weight.detach()
        tensors |= {f"{key} of {name}": moment for key, moment in moments if key != "step"}
    shards = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors.values()]
    # a sum is finite only if every number is; it is one pass, and overflows only where numbers are near to it
    suspect = ~torch.stack([shard.sum().float() for shard in shards]).isfinite()
    names = [
        name
        for name, shard, doubtful in zip(tensors, shards, suspect.tolist(), strict=True)
        if doubtful and not shard.isfinite().all()
    ]
    if _summed(run, torch.tensor(float(len(names)), device=run.accelerator.device)) > 0:
        names = names or ["of another process"]
        listed = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        problem = f"weights or moments are not finite after step {run.step} ({listed})"
        raise InputError(f"{problem}: try a smaller --lr; {_last_good(run)}")


def _validated(run: Training) -> dict[str, float]:
    """The periodic evaluation, for the curve.   Raises: InputError if the loss is not finite."""
    found = evaluate(run, "valid")
    if not math.isfinite(found["loss"]):
        problem = f"the validation loss is {found['loss']} after step {run.step}"
        raise InputError(f"{problem}: try a smaller --lr; {_last_good(run)}")
    return {f"valid_{name}": value for name, value in found.items()}


def _last_good(run: Training) -> str:
    if run.saved is None:
        return "there is no checkpoint yet: start again"
    return f"the last good checkpoint is {run.saved}: continue from it with --resume"


def _summed(run: Training, tensor: Tensor) -> Tensor:
    return run.accelerator.reduce(tensor, "sum") if run.accelerator.num_processes > 1 else tensor


# ---------------------------------------------------------------------- surroundings


def _accelerator(settings: Settings) -> Any:
    """What `accelerate launch` set up, or this one process.   Raises: InputError if the device is not there."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not found.get(settings.device, False):
        there = ", ".join(name for name, here in found.items() if here)
        raise InputError(f"--device {settings.device} is not available; here: {there}")
    # DenseSSM's first layer has weights that nothing reads
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    made = Accelerator(cpu=settings.device == "cpu", mixed_precision="no", kwargs_handlers=[unused])
    if str(made.distributed_type).endswith("FSDP") and not made.is_fsdp2:
        raise InputError("FSDP needs --fsdp_version 2: the first version flattens weights, and decay groups with them")
    return made


def _is_first_process() -> bool:
    """Whether this is the main process of a launch, by the variables of launchers, before they are connected."""
    from accelerate.utils import get_int_from_env

    return bool(get_int_from_env(["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"], 0) == 0)


# ---------------------------------------------------------------------- what a run begins with


def _check_no_run(out: Path) -> None:
    if checkpoint.checkpoints(out):
        raise InputError(f"{out} already holds a run: continue it with --resume, or choose another --out")


def _resumed(
    task: Task, out: Path, record: checkpoint.Record, given: Mapping[str, Any], say: checkpoint.Say
) -> tuple[Settings, Task]:
    """Settings and task of the run in `out`, with what `given` or its config.json changes.

    Raises: InputError naming an option that may not change, with both values.
    """
    started = record.config["task"]
    if started != task.name:
        raise InputError(f"--resume: the run was started with task {started}, got {task.name}")
    options, chosen = known(Settings, type(task)), dict[str, tuple[Any, str]]()
    if (place := out / checkpoint.CONFIG).exists():
        try:
            chosen = {name: (value, f" in {place}") for name, value in read_file(place, options, task.name).items()}
        except InputError as error:
            say(f"ignoring the configuration of the run: {error}")
    chosen |= {name: (value, "") for name, value in given.items()}
    changed, said = dict[str, Any](), list[str]()
    for name, (value, source) in chosen.items():
        before = record.config.get(name, options[name].default)
        before = tuple(before) if isinstance(before, list) else before
        if value == before:
            continue
        if not _may_change(name, before, value, record):
            mistake = f"--resume: the run was started with {name} {before}, got {value}{source}"
            raise InputError(mistake + _remedy(name, record, out))
        changed[name] = value
        said.append(f"{name}: {before} -> {value}")
    settings = resolved(Settings, record.config, changed)
    if {"lr", "steps"} & changed.keys() and record.curve and record.step < settings.steps:
        rate = learning_rate(settings, record.step)
        said.append(f"learning rate of the next step: {record.curve[-1]['lr']:.3g} -> {rate:.3g}")
    if said:
        say(f"resuming after step {record.step} with {', '.join(said)}")
    return settings, resolved(type(task), record.config, changed)


def _may_change(name: str, before: Any, value: Any, record: checkpoint.Record) -> bool:
    if name == "lr":
        return bool(value < before)
    if name == "steps":
        return bool(value >= record.step)
    if name == "recipe":  # of two files the contents are compared
        return bool(before.startswith("@") and value.startswith("@"))
    if name in ("text", "data"):  # of two places the contents are compared, where digests of them are recorded
        return name in (record.data or {}) or "digest" in record.task
    return name in FREE


def _remedy(name: str, record: checkpoint.Record, out: Path) -> str:
    if name == "lr":
        return f"; a rate may only be lowered: begin a new run with these weights instead, --init {out}"
    return f"; it has taken {record.step} already" if name == "steps" else ""


def _data(task: Task) -> dict[str, dict[str, str]]:
    """Digests of the files that the task's options name."""
    places = {
        name: getattr(task, name) for name, option in known(type(task)).items() if option.metadata["read"] is path
    }
    found = {name: digests(Path(place)) for name, place in places.items() if place is not None}
    return {name: files for name, files in found.items() if files}


def _check_same(
    record: checkpoint.Record, task: Task, settings: Settings, data: Mapping[str, Mapping[str, str]], out: Path
) -> None:
    """Raise InputError if recipe or data are not what they were when the run began."""
    if found := _recipe_changes(record, task, settings, out):
        mistake = f"--resume: the recipe {settings.recipe} is not the one that the run in {out} began with"
        raise InputError(f"{mistake}: {_few(found)}")
    facts = json.loads(json.dumps(task.record()))
    found = list(differences(record.task, {name: fact for name, fact in facts.items() if name in record.task}))
    for name, files in (record.data or {}).items():
        found += [f"--{name}: {change}" for change in changes(files, data.get(name, {}))]
    if found:
        raise InputError(
            f"--resume needs the data that the run in {out} began with, got a different one: {_few(found)}"
        )


def _recipe_changes(record: checkpoint.Record, task: Task, settings: Settings, place: Path) -> list[str]:
    """Where the recipes of a run, with this version's defaults, differ from those of `settings`."""
    before, now = describe(recorded_recipes(record, place)), describe(task.recipes(settings))
    return list(differences(json.loads(json.dumps(before)), json.loads(json.dumps(now)), "recipe"))


def recorded_recipes(record: checkpoint.Record, place: Path, imports: str | Path | None = None) -> list[Recipe]:
    """The recipes of a run, with the parts in the file `imports` or in the one that the run names.

    Raises: InputError if that file is not there, or if another version of recur wrote what this one cannot read.
    """
    parts = own.of_run(place, record.config.get("imports") if imports is None else imports)
    try:
        return [Recipe.from_dict(recipe, parts) for recipe in _with_frames(record)]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"this version of recur cannot read the recipe of the run in {place}: {error}") from error


def _with_frames(record: checkpoint.Record) -> list[dict[str, Any]]:
    """The recipes of a run; those recorded without a frame get the one that their preset's name stood for then.

    The name of the first recipe decided feed-forward and norm of all layers.
    """
    words = [piece.partition(":")[0] for piece in str(record.config.get("recipe", "")).split("+")]
    found = []
    for i, recipe in enumerate(record.recipes):
        name = words[i] if i < len(words) else ""
        if "frame" not in recipe and (name in FRAMED if i == 0 else name in presets.names()):
            recipe = {**recipe, "frame": asdict(getattr(presets, name)().frame)}
        found.append(recipe)
    return found


def _initialise(model: nn.Module, place: Path, task: Task, settings: Settings, say: checkpoint.Say) -> None:
    """Fill `model` from a run, from one of its checkpoints, or from a file of `recur convert`.

    Raises: InputError listing what does not fit.
    """
    if place.is_dir():
        folder, record = checkpoint.read_record(place, say=say)
        tensors, own = checkpoint.load_tensors(folder), task.record()
        theirs = record.task.get("tokenizer")
        if theirs is not None and "tokenizer" in own and theirs != own["tokenizer"]:
            how = _few(list(differences(theirs, own["tokenizer"])))
            raise InputError(f"--init: the weights in {place} were trained with another tokenizer: {how}")
        if found := _recipe_changes(record, task, settings, place):
            say(f"the recipe is not the one of {place}: {_few(found)}")
    else:
        from recur.convert import read_checkpoint

        try:
            tensors, _ = read_checkpoint(place)
        except OSError as error:
            raise InputError(f"--init: {error}") from error
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise InputError(f"--init: the weights in {place} are not finite: {_few(wrong)}")
    checkpoint.fill(model, tensors, f"--init: the weights in {place} do not fit this model")


def _few(items: list[str]) -> str:
    """The first three."""
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
