"""What a scan, a layer or a model does on a device: which forms run and why, what they launch, move, keep and cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from recur.blocks import LanguageModel, Mixer
from recur.blocks.state import nbytes
from recur.counting import Asked, Launch, Trained, blank, copied, outline, steps, train, wanting
from recur.primitives.forms import Choice, listener
from recur.recipe import Recipe, read_one


@dataclass(frozen=True)
class Card:
    """What a GPU was measured to reach: bytes per second of memory, FLOPs per second of bfloat16 matrix products."""

    name: str
    bandwidth: float
    matmul: float
    source: str


CARDS = {"H200": Card("NVIDIA H200", 4.2e12, 713e12, "measured on one: 4.2 TB/s, 713 TFLOP/s in bfloat16")}

FORMS = ("recurrent", "chunked", "parallel", "triton")


@dataclass(frozen=True)
class Phase:
    """The launches of one "forward", "backward" or "step", and the bytes at least: weights, inputs and outputs once."""

    name: str
    launches: tuple[Launch, ...]
    floor: int

    @property
    def kernels(self) -> Counter[str]:
        """Launches of recur's kernels, by name."""
        return Counter(launch.name for launch in self.launches if launch.kind == "kernel")

    @property
    def operators(self) -> Counter[str]:
        """Operators of torch that touch memory, by name."""
        return Counter(launch.name for launch in self.launches if launch.kind == "torch")

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)

    @property
    def flops(self) -> int:
        return sum(launch.flops for launch in self.launches)

    def seconds(self, card: Card) -> float:
        """At least, on such a card: every launch takes the longer of its bytes and its matrix products."""
        return sum(max(launch.bytes / card.bandwidth, launch.flops / card.matmul) for launch in self.launches)


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; print it, or read its fields.

    Args:
        target: what was asked about.
        device: on which device.
        dtype: of weights and inputs.
        batch: B.
        length: T.
        choices: every scan with the form that runs and, if it is not the kernel, why; norms, gates and steps too,
            without a form of their own.
        phases: "forward" and "backward" of a training step, "step" of one token, as far as they exist.
        state: bytes per sequence; None without a state.
        memory: bytes of a training step: "weights", "gradients", "optimiser" (two moments per weight, as AdamW keeps),
            "activations" between forward and backward, "peak" of all but the optimiser's.
        activations: bytes, by the part that makes them.
        card: the GPU that times are computed for; None leaves them out.

    >>> found = recur.explain("gla:heads=2", dim=32, length=128, device="cpu")
    >>> found.batch, found.memory["weights"] == found.memory["gradients"]
    (1, True)
    """

    target: str
    device: str
    dtype: str
    batch: int
    length: int
    choices: dict[Choice, int]
    phases: tuple[Phase, ...]
    state: int | None
    memory: dict[str, int]
    activations: dict[str, int] = field(default_factory=dict)
    card: Card | None = None

    def phase(self, name: str) -> Phase:
        """The phase of that name.   Raises: KeyError if there is none."""
        return {phase.name: phase for phase in self.phases}[name]

    @property
    def remedies(self) -> list[str]:
        """What would make it faster, one line per reason."""
        found = {c.refusal.remedy: c.function for c in self.choices if c.refusal and c.refusal.remedy}
        return [f"{function}: {remedy}" for remedy, function in found.items()]

    @property
    def not_a_number(self) -> list[str]:
        """How far a NaN reaches, one line per scan and form."""
        stays = "from its own token on"
        wide = (
            'also earlier tokens of its chunk, of 64 in bfloat16 and 32 in other dtypes; form="chunked" keeps it later'
        )
        pairs = dict.fromkeys((c.function, c.form) for c in self.choices if c.form in FORMS)
        return [f"{f} by {form}: {wide if (f, form) == ('scan', 'triton') else stays}" for f, form in pairs]

    def __str__(self) -> str:
        lines = [f"{self.target}", f"{self.device}, {self.dtype}, batch {self.batch} x {self.length} tokens", ""]
        rows: list[tuple[str, ...]] = [("runs", "form", "times", "why")]
        for choice, times in self.choices.items():
            rows.append((choice.function, choice.form, str(times), choice.refusal.reason if choice.refusal else ""))
        lines += [*_table(rows), ""]
        times = self.card is not None
        rows = [("phase", "launches", "of kernels", "bytes", "floor", "FLOPs", *("at least",) * times)]
        for phase in self.phases:
            counts = (str(len(phase.launches)), str(phase.kernels.total()))
            row = (phase.name, *counts, binary(phase.bytes), binary(phase.floor), decimal(phase.flops))
            rows.append((*row, duration(phase.seconds(self.card))) if self.card is not None else row)
        lines += [*_table(rows, right=range(1, 7)), ""]
        for phase in self.phases:
            names = [f"{name} {count}" if count > 1 else name for name, count in phase.kernels.most_common()]
            names += [f"torch {phase.operators.total()}"] if phase.operators else []
            lines.append(f"{phase.name}: {', '.join(names)}")
        lines.append("")
        if self.memory:
            rows = [("memory of a training step", "")]
            rows += [(name, binary(size)) for name, size in self.memory.items()]
            largest = sorted(self.activations.items(), key=lambda item: -item[1])
            at = next((i for i, row in enumerate(rows) if row[0] == "activations"), 0)
            rows[at + 1 : at + 1] = [(f"  {name or 'other'}", binary(size)) for name, size in largest if size >= 1024]
            lines += [*_table(rows, right=range(1, 2)), ""]
        if self.state is not None:
            lines.append(f"state: {binary(self.state)} per sequence")
        lines += [f"NaN: {words}" for words in self.not_a_number]
        lines += [f"faster: {remedy}" for remedy in self.remedies]
        if self.card is not None:
            lines.append(f"times: {self.card.name}, {self.card.source}")
        return "\n".join(lines).rstrip()


def _table(rows: list[tuple[str, ...]], right: Iterable[int] = ()) -> list[str]:
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    flush = set(right)

    def cell(i: int, text: str) -> str:
        return text.rjust(wide[i]) if i in flush else text.ljust(wide[i])

    return ["  ".join(cell(i, text) for i, text in enumerate(row)).rstrip() for row in rows]


def binary(size: float) -> str:
    """Bytes in the largest unit of 1024 that leaves at least 1."""
    if size < 1024:
        return f"{size:.0f} B"
    power = min(int(math.log2(size)) // 10, 4)
    return f"{size / 1024**power:.1f} {('', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def decimal(count: float) -> str:
    """A number in thousands, millions, ...: 1.5 G."""
    if count < 1000:
        return f"{count:.0f}"
    power = min(int(math.log10(count)) // 3, 5)
    return f"{count / 1000**power:.1f} {' kMGTP'[power]}"


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def explain(
    target: Any,
    *args: Any,
    dim: int | None = None,
    batch: int = 1,
    length: int = 1024,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    card: Card | str | None = None,
    **options: Any,
) -> Explanation:
    """Which form a call takes on a device and why, its launches, bytes and memory, counted without running it.

    The call is made with tensors that hold no data: what is counted is what the code does, not a model of it. An
    operator of torch counts as one launch.

    Args:
        target: a scan (recur.scan, ...), a Mixer, a LanguageModel; or, with dim, a Recipe or the name of a preset.
        args: of a scan its arguments, of a Mixer its further inputs; only shapes, dtypes and strides count.
        dim: D of a recipe.
        batch: B of a layer or model; a scan's tensors have their own.
        length: T of a layer or model.
        dtype: of weights and inputs; by default the target's.
        device: "cuda", "cpu", ...; by default the target's. "cuda" is possible on a machine without a GPU: an H100 is
            assumed, and the installed Triton.
        card: a Card, or the name of one in CARDS ("H200"), for times; by default this machine's, if it is known.
        options: further arguments by name, as `args`.

    Returns: Explanation, to be printed or read.
    Raises: TypeError for another target, ValueError for a card that is not known.
    Cost: the Python of one training step and one step.

    >>> layer = recur.Mixer("hgrn2:heads=4", 64)
    >>> found = recur.explain(layer, batch=8, length=256, device="cpu")
    >>> found.state, [phase.name for phase in found.phases]
    (4104, ['forward', 'backward', 'step'])
    """
    if isinstance(target, str):
        target = read_one(target)
    if isinstance(target, Recipe):
        if dim is None:
            raise TypeError("explain: dim must be given with a recipe, got None")
        with torch.device("meta"):
            target = Mixer(target, dim)
    tensors = [x for x in tree_leaves((args, options)) if isinstance(x, Tensor)]
    if isinstance(target, nn.Module):
        tensors = [*target.parameters(), *tensors]
    elif not callable(target) or not tensors:
        raise TypeError(
            f"explain: target must be a scan with its tensors, a layer, a model or a recipe, got {target!r}"
        )
    own = tensors[0].device if tensors else torch.device("cpu")
    on = torch.device(device) if device is not None else torch.device("cuda") if own.type == "meta" else own
    known = _card(card, on)
    if isinstance(target, nn.Module) and not isinstance(target, (Mixer, LanguageModel)):
        raise TypeError(f"explain: target must be a Mixer or a LanguageModel, got {type(target).__name__}")
    module = outline(target, dtype) if isinstance(target, nn.Module) else None
    choices: Counter[Choice] = Counter()
    token = listener.set(lambda choice: choices.update([choice]))
    try:
        with Asked(on):
            if module is None:
                found, about = _scan(on, target, args, options, dtype)
            else:
                found, about = _layer(on, copied(module, blank), batch, length, options)
    finally:
        listener.reset(token)
    chosen = {choice: times for choice, times in choices.items() if choice.form != "torch" or choice.refusal}
    return Explanation(device=_named(on), choices=chosen, card=known, **about, **found)


def _named(device: torch.device) -> str:
    there = device.type == "cuda" and torch.cuda.is_available()
    return f"{device.type} ({torch.cuda.get_device_name(device)})" if there else device.type


def _card(card: Card | str | None, device: torch.device) -> Card | None:
    if isinstance(card, str):
        if card not in CARDS:
            raise ValueError(f"explain: card must be one of {', '.join(CARDS)}, or a Card, got {card!r}")
        return CARDS[card]
    if card is None and device.type == "cuda" and torch.cuda.is_available():
        return {known.name: known for known in CARDS.values()}.get(torch.cuda.get_device_name(device))
    return card


Found = tuple[dict[str, Any], dict[str, Any]]


def _scan(device: torch.device, scan: Callable[..., Any], args: Any, options: Any, dtype: torch.dtype | None) -> Found:
    args, options = (wanting(tree_map(lambda x: blank(x, dtype), given)) for given in (args, options))
    leaves = [x for x in tree_leaves((args, options)) if isinstance(x, Tensor)]
    first = next(x for x in leaves if x.is_floating_point())
    out: list[Any] = []

    def run() -> Tensor:
        y, state = scan(*args, **options)
        out[:] = [y.nbytes, state.numel() * state.element_size() // state.shape[0]]
        y_: Tensor = y
        return y_

    made = train(device, run, leaves)
    given = sum(x.nbytes for x in leaves)
    phases = (Phase("forward", made.forward, given + out[0]), Phase("backward", made.backward, 2 * given + out[0]))
    memory = {"inputs": given, "gradients": made.gradients, "activations": sum(made.kept.values())}
    memory["peak"] = given + made.peak
    name = getattr(scan, "__name__", str(scan))
    about = {"target": f"recur.{name}", "dtype": _short(first.dtype), "batch": first.shape[0], "length": first.shape[1]}
    return {"phases": phases, "state": out[1], "memory": memory}, about


def _layer(device: torch.device, module: nn.Module, batch: int, length: int, options: dict[str, Any]) -> Found:
    assert isinstance(module, (Mixer, LanguageModel))
    weights = list(module.parameters())
    kind = weights[0].dtype if weights else torch.get_default_dtype()
    for weight in weights:  # those that are kept in float32 are few
        kind = kind if weight.ndim < 2 or weight.dtype == torch.float32 else weight.dtype
    held = sum({id(w): w.nbytes for w in [*weights, *module.buffers()]}.values())
    trained = sum(weight.nbytes for weight in weights if weight.requires_grad)
    step: Callable[[], Any]
    if isinstance(module, LanguageModel):
        ids = torch.empty(batch, length, dtype=torch.long)
        inputs, causal, sent = [ids], module.causal, batch * 4
        run = lambda: module(ids, targets=ids)  # noqa: E731
        step = lambda: module.step(ids[:, 0], state)  # noqa: E731
        leaving = batch * module.vocab_size * kind.itemsize
        recipes = len({block.mixer.recipe for block in module._layers()})
        target = f"LanguageModel at D={module.dim}, {module.depth} layers of {recipes} kinds"
    else:
        x = torch.empty(batch, length, module.dim, dtype=kind, requires_grad=True)
        further = {name: torch.empty(batch, length, *size, dtype=kind) for name, size in module._input_sizes.items()}
        further |= {name: blank(given) for name, given in options.items()}
        inputs, causal, sent = [x, *further.values()], module.recipe.causal, x.nbytes
        run = lambda: module(x, **further).y  # noqa: E731
        step = lambda: module.step(x[:, 0], state, **{name: given[:, 0] for name, given in further.items()})  # noqa: E731
        leaving = batch * module.dim * kind.itemsize
        target = f"Mixer at D={module.dim}: {module.recipe.source or 'a recipe'}"
    made: Trained = train(device, run, weights)
    given = sum(x.nbytes for x in inputs)
    phases = [
        Phase("forward", made.forward, held + given + sent),
        Phase("backward", made.backward, held + trained + 2 * given + sent),
    ]
    size = None
    if causal:
        state = module.init_state(batch, length)
        size = nbytes(state) // batch
        unheard = listener.set(lambda choice: None)
        steps(device, step)  # the first prepares what all others use
        listener.reset(unheard)
        launches = steps(device, step)
        phases.append(Phase("step", launches, held + 2 * nbytes(state) + 2 * leaving))
    kept = sum(made.kept.values())
    memory = {"weights": held, "gradients": made.gradients, "optimiser": 2 * trained, "activations": kept}
    memory["peak"] = held + given + made.peak
    about = {"target": target, "dtype": _short(kind), "batch": batch, "length": length}
    return {"phases": tuple(phases), "state": size, "memory": memory, "activations": made.kept}, about


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
