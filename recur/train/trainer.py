"""The one training loop, on `accelerate`: a single device, DDP or FSDP, whatever `accelerate launch` set up."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recur.blocks.language_model import evaluating
from recur.train import checkpoint
from recur.train.config import InputError, Settings, plain, resolved
from recur.train.models import describe, parameters
from recur.train.task import Task, part
from recur.weights import declared

Report = Callable[[float, float], None]
PEAK = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # bf16 FLOP/s
FREE = ("device", "keep", "seconds", "accumulate", "recompute", "compile")  # may change when a run is resumed


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
    stopped: bool = False
    _pending: list[tuple[float, Tensor]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return len(self.curve) + len(self._pending)

    @property
    def plain_model(self) -> nn.Module:
        """The model without what `accelerate` wraps around it."""
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)


def prepare(task: Task, settings: Settings, out: Path, *, resume: dict[str, Any] | None = None) -> Training:
    """Start a run in the empty folder `out`, or take up the one in it if `resume` holds the choices to agree with.

    Raises: InputError if a choice cannot be met, or contradicts the run that is taken up.
    """
    if resume is not None:
        folder, record = checkpoint.read_record(out)
        _agree(resume, record.config)
        given = {name: value for name, value in resume.items() if name in FREE}
        settings = resolved(Settings, record.config | given)
        task = resolved(type(task), record.config | resume)
    elif checkpoint.checkpoints(out):
        raise InputError(f"{out} already holds a run: continue it with --resume, or choose another --out")
    task.open(settings)
    if resume is not None and task.record() != record.task:
        raise InputError(f"--resume needs the data that the run in {out} began with, got a different one")
    accelerator = _accelerator(settings)
    if settings.batch % (accelerator.num_processes * settings.accumulate):
        spread = f"{accelerator.num_processes} processes times --accumulate {settings.accumulate}"
        raise InputError(f"--batch must be a multiple of {spread}, got {settings.batch}")
    torch.manual_seed(settings.seed)
    model = task.build(settings)
    _check_writable(out)
    model.to(accelerator.device)
    if settings.compile != "none":
        model.compile(backend=settings.compile, dynamic=False)
    fused = accelerator.device.type == "cuda"
    groups = decay_groups(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=fused)
    model, optimizer = accelerator.prepare(model, optimizer)
    torch.manual_seed((settings.seed + 1) * 1000 + accelerator.process_index)  # of dropout
    run = Training(task, settings, out, accelerator, model, optimizer, [])
    if resume is not None:
        checkpoint.load_weights(folder, run.plain_model)
        checkpoint.load_trainer(folder, run.plain_model, optimizer.optimizer, accelerator.process_index)
        run.curve = record.curve
    if run.is_main:
        config = json.dumps({"task": task.name, **plain(settings, task)}, indent=1) + "\n"
        (out / checkpoint.CONFIG).write_text(config, encoding="utf-8")
    return run


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on what is declared so, none on gates, time constants, norms and biases.

    Raises: TypeError if a weight is not declared.
    """
    decays = {id(weight): param.decay for weight, param in declared(model)}
    undeclared = [name for name, weight in model.named_parameters() if id(weight) not in decays]
    if undeclared:
        raise TypeError(f"decay_groups: every weight must be declared by a Param, got {', '.join(undeclared)}")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return [
        {"params": [w for w in weights if decays[id(w)]], "weight_decay": weight_decay},
        {"params": [w for w in weights if not decays[id(w)]], "weight_decay": 0.0},
    ]


def fit(run: Training, report: Report = lambda loss, speed: None) -> None:
    """Train to the last step; a checkpoint and an evaluation every `settings.every` steps and at the end.

    `report` hears the mean loss and the speed in tokens per second after every step (every ten on a GPU, where looking
    at a number makes the processor wait).
    """
    settings, began = run.settings, time.perf_counter()
    look = 1 if run.accelerator.device.type == "cpu" else 10
    writer = _tensorboard(run)
    started = began
    tokens = 0
    while run.step < settings.steps and not run.stopped:
        rate = learning_rate(settings, run.step)
        total, read = _update(run, rate)
        run._pending.append((rate, total))
        tokens += read
        due = run.step % settings.every == 0 or run.step == settings.steps
        if due or len(run._pending) == look:
            fresh = _settle(run)
            speed = tokens / (time.perf_counter() - started)
            if settings.seconds is not None:
                run.stopped = _agreed(run, time.perf_counter() - began > settings.seconds)
            if due or run.stopped:
                run.curve[-1] |= {f"valid_{name}": value for name, value in evaluate(run, "valid").items()}
                save(run)
            _write(writer, fresh, speed)
            for point in fresh:
                report(point["loss"], speed)
            started, tokens = time.perf_counter(), 0
    if writer is not None:
        writer.close()


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


@torch.no_grad()
def evaluate(run: Training, split: str, *, full: bool = False) -> dict[str, float]:
    """The means over a split (over at most `settings.evaluate` rows unless `full`): loss and the task's metrics."""
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
    """A checkpoint of this step, by the main process, of what all of them hold."""
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
        )
        checkpoint.save(run.out, record, weights, trainer, run.settings.keep)
    accelerator.wait_for_everyone()


def mfu(run: Training, speed: float) -> float | None:
    """The share of the GPU's bf16 peak that 6 FLOPs a weight and token are; None where the peak is not known.

    State updates are not counted, nor the second forward pass of recomputed layers.
    """
    if run.accelerator.device.type != "cuda":
        return None
    card = torch.cuda.get_device_name()
    peak = next((peak for name, peak in PEAK.items() if name in card), None)
    size = parameters(run.plain_model)
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


def _settle(run: Training) -> list[dict[str, Any]]:
    """Read the losses of the steps since the last look into the curve.   Raises: InputError if one is no number."""
    losses = _summed(run, torch.stack([total for _, total in run._pending])).tolist()
    rates, first = [rate for rate, _ in run._pending], len(run.curve)
    run._pending.clear()
    for rate, loss in zip(rates, losses, strict=True):
        if not math.isfinite(loss):
            step = len(run.curve) + 1
            raise InputError(f"the loss is {loss} at step {step}: try a smaller --lr; checkpoints before it are kept")
        run.curve.append({"step": len(run.curve) + 1, "lr": rate, "loss": loss})
    return run.curve[first:]


def _summed(run: Training, tensor: Tensor) -> Tensor:
    return run.accelerator.reduce(tensor, "sum") if run.accelerator.num_processes > 1 else tensor


def _agreed(run: Training, wish: bool) -> bool:
    """Whether any process wishes so: all must stop at the same step."""
    return bool(_summed(run, torch.tensor(float(wish), device=run.accelerator.device)) > 0)


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


def _check_writable(out: Path) -> None:
    """Raise InputError now, not at the first checkpoint, unless `out` is a folder that takes files."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"cannot write to --out {out}: {(error.strerror or str(error)).lower()}") from error


def _agree(choices: dict[str, Any], recorded: dict[str, Any]) -> None:
    """Raise InputError if a choice contradicts the recorded configuration; what FREE lists may change."""
    for name, value in choices.items():
        known = recorded[name]
        if name not in (*FREE, "text", "data") and value != (tuple(known) if isinstance(known, list) else known):
            raise InputError(f"--resume: the run was started with {name} {known}, got {value}")


def _tensorboard(run: Training) -> Any:
    if not run.is_main:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run.out / "tensorboard"), purge_step=run.step + 1 if run.curve else None)


def _write(writer: Any, points: list[dict[str, Any]], speed: float) -> None:
    if writer is None:
        return
    for point in points:
        for name, value in point.items():
            if name != "step":
                writer.add_scalar(name, value, point["step"])
    writer.add_scalar("tokens_per_second", speed, points[-1]["step"])
