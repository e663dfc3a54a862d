"""Tokens out of a language model: prompts are read in one pass, then every token costs one step.

The loop of sampling and stepping works on buffers of fixed address and size, and the host waits for it only once every
BLOCK tokens. On a GPU it is therefore captured as one CUDA graph per model and batch size, and replayed.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from recur.blocks.mixer import Mixer
from recur.blocks.sampling import Sampling, sample_token, uniforms
from recur.blocks.state import overwrite
from recur.primitives.forms import SlowPath
from recur.reading import unknown
from recur.recipe import State
from recur.shapes import bind

if TYPE_CHECKING:
    from recur.blocks.language_model import LanguageModel

BLOCK = 16  # tokens between two looks of the host at what has been generated
KEPT = 4  # captured graphs per model; the least recently used is freed
ROOM = 256  # caches of attention are a multiple of this long, so that prompts of about one length share a graph


@dataclass
class Request:
    """The checked arguments of `generate` and `stream`."""

    ids: Tensor
    own: Tensor
    ragged: bool
    max_new_tokens: int
    sampling: Sampling
    eos: int | None
    seed: int | None
    window: int | None
    stops: Stops | None


class Options(TypedDict, total=False):
    """The options of `generate` and `stream`, all with a default; LanguageModel.generate says what each does."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    eos: int | None
    seed: int | None
    lengths: Tensor | None
    window: int | None
    stop: Sequence[str]
    decode: Callable[[list[int]], str] | None


def request(model: LanguageModel, ids: Tensor, max_new_tokens: int, options: Options) -> Request:
    """Raises: TypeError, ValueError or ShapeError in the letters of `generate`."""
    for name in options.keys() - Options.__annotations__.keys():
        raise TypeError(f"generate: {unknown('option', name, Options.__annotations__)}")
    eos, lengths, window = options.get("eos"), options.get("lengths"), options.get("window")
    stop, decode = options.get("stop", ()), options.get("decode")
    bind("generate", ids=(ids, "B T"))
    B, T = ids.shape
    if T == 0 or max_new_tokens < 0:
        raise ValueError(f"generate: needs a prompt and max_new_tokens >= 0, got {T} tokens and {max_new_tokens}")
    if eos is not None and not (isinstance(eos, int) and 0 <= eos < model.vocab_size):
        raise ValueError(f"generate: eos must be one id in 0 .. {model.vocab_size - 1}, got {eos!r}")
    if window is not None and window < 1:
        raise ValueError(f"generate: window must be at least 1, got {window}")
    if isinstance(stop, str) or not all(isinstance(word, str) and word for word in stop):
        raise ValueError(f"generate: stop must be a list of strings, none of them empty, got {stop!r}")
    if stop and decode is None:
        raise ValueError("generate: stop needs decode, a function from a list of ids to a string; a tokenizer has one")
    cuts = options.get("top_k"), options.get("top_p"), options.get("min_p")
    sampling = Sampling(options.get("temperature", 1.0), *cuts)
    if lengths is not None:
        check_lengths("generate", lengths)
    own = torch.full((B,), T, device=ids.device) if lengths is None else lengths.to(ids.device)
    if B and (tuple(own.shape) != (B,) or int(own.min()) < 1 or int(own.max()) > T):
        raise ValueError(f"generate: lengths must be [B] within 1 .. T={T}, got {own.tolist()}")
    inside = torch.arange(T, device=ids.device) < own[:, None]
    if B:
        model._check_ids(ids.where(inside, 0))  # padding is not read
    stops = Stops(stop, decode, B) if stop and decode is not None else None
    return Request(ids, own, lengths is not None, max_new_tokens, sampling, eos, options.get("seed"), window, stops)


def check_lengths(function: str, lengths: Tensor) -> None:
    """Raises: TypeError."""
    if not (isinstance(lengths, Tensor) and lengths.dtype in (torch.int32, torch.int64)):
        raise TypeError(f"{function}: lengths must be an int32 or int64 tensor [B], got {lengths!r}")


@torch.no_grad()
def generate(model: LanguageModel, r: Request) -> Tensor:
    """[B T + max_new_tokens]: each row its prompt, its new tokens, then `eos` or 0."""
    text = _framed(r)
    if len(text) == 0:
        return text
    rows = torch.arange(len(text), device=text.device)[:, None]
    for new, loop in _run(model, r, text):
        n = new % BLOCK + 1
        if n == BLOCK or new + 1 == r.max_new_tokens:
            tokens = loop.tokens[:n].T
            if r.stops is not None:
                tokens = r.stops.cut(tokens, loop)
            at = r.own[:, None] + torch.arange(new + 1 - n, new + 1, device=text.device)
            text[rows, at] = tokens.to(text.dtype)
    return text


@torch.no_grad()
def stream(model: LanguageModel, r: Request) -> Iterator[Tensor]:
    """[B] ids on the CPU, one after the other; on a GPU the next step is under way while one is looked at."""
    text = _framed(r)
    if len(text) == 0:
        return
    late: tuple[Tensor, torch.cuda.Event, Loop] | None = None

    def arrived(tokens: Tensor, loop: Loop) -> Tensor:
        tokens = tokens.to(r.ids.dtype)
        return tokens if r.stops is None else r.stops.cut(tokens[:, None], loop)[:, 0]

    running = _run(model, r, text)
    try:
        for new, loop in running:
            tokens = loop.tokens[new % BLOCK]
            if not tokens.is_cuda:
                yield arrived(tokens.clone(), loop)
            else:
                if late is not None:
                    late[1].synchronize()
                    yield arrived(late[0], late[2])
                host = torch.empty_like(tokens, device="cpu", pin_memory=True).copy_(tokens, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
                late = host, event, loop
            if r.stops is not None and r.stops.all():
                return
        if late is not None:
            late[1].synchronize()
            yield arrived(late[0], late[2])
    finally:
        running.close()


def _framed(r: Request) -> Tensor:
    """[B T + max_new_tokens]: the prompts, and what stands where nothing is generated."""
    B, T = r.ids.shape
    text = torch.full((B, T + r.max_new_tokens), r.eos or 0, device=r.ids.device, dtype=r.ids.dtype)
    inside = torch.arange(T, device=r.ids.device) < r.own[:, None]
    text[:, :T] = torch.where(inside, r.ids, text[:, :T])
    return text


def _run(model: LanguageModel, r: Request, text: Tensor) -> Generator[tuple[int, Loop], None, None]:
    """Number `new` of every token, as soon as it is under way to loop.tokens[new % BLOCK]; ends when all rows have."""
    B, T = r.ids.shape
    if r.max_new_tokens == 0:
        return
    windowed = r.window is not None and r.window < T + r.max_new_tokens - 1
    grows = any(leaf is bool for leaf in tree_leaves(model.layout()))  # a cache of attention
    room = -(-(T + r.max_new_tokens) // ROOM) * ROOM if grows and not windowed else None
    first = int(torch.randint(2**63 - 1, (), device="cpu")) if r.seed is None else r.seed
    seeds = torch.tensor([(first + (row << 32)) % 2**63 for row in range(B)], device=text.device)
    last = last_tokens(text, r.own, r.window or T, r.ragged)
    logits, state = model.prefill(*last, max_len=room)
    loop = Loop.taken(model, B, room, r.sampling.kind, logits, captures=not windowed)
    try:
        loop.begin(r.sampling, r.eos, None if windowed else state)
        for new in range(r.max_new_tokens):
            if new % BLOCK == 0:
                if new and loop.ended():
                    return
                loop.refill(seeds, new)
            if new == 0:
                loop.draw(logits)
            elif not windowed:
                loop.replay(model)
            else:
                assert r.window is not None
                text.scatter_(1, (r.own + new - 1)[:, None], loop.token[:, None].to(text.dtype))
                if int(r.own.max()) + new <= r.window:
                    logits = model.step(loop.token, state)
                else:
                    logits, state = model.prefill(*last_tokens(text, r.own + new, r.window, r.ragged))
                loop.draw(logits)
            yield new, loop
        loop.ended()
    finally:
        loop.give_back(model)


def last_tokens(text: Tensor, length: Tensor, window: int, ragged: bool) -> tuple[Tensor, Tensor | None]:
    """The last `window` tokens of each row of text [B L], of which `length` [B] are there; how many, if they differ."""
    begin, W = (length - window).clamp(min=0), min(window, int(length.max()))
    index = (begin[:, None] + torch.arange(W, device=text.device)).clamp(max=text.shape[1] - 1)
    return text.gather(1, index), length.clamp(max=window) if ragged else None


class Loop:
    """The buffers of a loop that steps and draws, and the CUDA graph of one iteration, if there is one.

    A loop is used by one call at a time: `taken` hands it out, `give_back` keeps it for the next call.
    """

    _kept: ClassVar[WeakKeyDictionary[nn.Module, list[Loop]]] = WeakKeyDictionary()
    _lock = threading.Lock()

    def __init__(self, batch: int, kind: str, device: torch.device) -> None:
        self.key: Any = None
        self.kind, self.filler = kind, 0
        self.graph: Any = None  # of `iterate`
        self.state: State = None  # that of the call; with a graph, the one that it overwrites
        self.token = torch.zeros(batch, dtype=torch.long, device=device)
        self.tokens = torch.zeros(BLOCK, batch, dtype=torch.long, device=device)
        self.uniform = torch.zeros(BLOCK, batch, dtype=torch.float64, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.numbers = Sampling().numbers(device)
        self.eos, self.fill = torch.full((2, 1), -1, device=device)
        self.done = torch.zeros(batch, dtype=torch.bool, device=device)
        self.broken = torch.zeros((), dtype=torch.bool, device=device)

    @classmethod
    def taken(
        cls, model: LanguageModel, batch: int, room: int | None, kind: str, logits: Tensor, *, captures: bool
    ) -> Loop:
        """A loop kept from an earlier call with the same weights, or a new one, on a GPU with its graph."""
        if not has_graphs(logits.device):
            return cls(batch, kind, logits.device)
        reason = _uncapturable(model) if captures else "its window is shorter than the text, which is read anew"
        if reason is not None:
            _warn(reason)
            return cls(batch, kind, logits.device)
        for module in model.modules():
            if isinstance(module, Mixer):
                module.prepare_step()  # before it counts where weights lie
        weights = tuple(weight.data_ptr() for weight in chain(model.parameters(), model.buffers()))
        key = (batch, room, kind, logits.device, logits.dtype, weights)
        with cls._lock:
            kept = cls._kept.setdefault(model, [])
            kept[:] = [loop for loop in kept if loop.key[-1] == weights]  # weights that moved: their graphs are freed
            for loop in kept:
                if loop.key == key:
                    kept.remove(loop)
                    return loop
        loop = cls(batch, kind, logits.device)
        loop.capture(model, room)
        loop.key = key
        return loop

    def give_back(self, model: nn.Module) -> None:
        if self.graph is not None:
            with self._lock:
                kept = self._kept.setdefault(model, [])
                kept.insert(0, self)
                del kept[KEPT:]

    def begin(self, sampling: Sampling, eos: int | None, state: State | None) -> None:
        """Take the settings of a call, and the state after its prompts."""
        self.numbers.copy_(sampling.numbers(self.numbers.device))
        self.eos.fill_(-1 if eos is None else eos)
        self.filler = eos or 0
        self.fill.fill_(self.filler)
        self.done.zero_()
        self.broken.zero_()
        if state is not None and self.graph is None:
            self.state = state
        elif state is not None:
            overwrite(self.state, state)

    def refill(self, seeds: Tensor, new: int) -> None:
        """Random numbers for the next block of tokens."""
        if self.kind != "greedy":
            self.uniform.copy_(uniforms(seeds, torch.arange(new, new + BLOCK, device=seeds.device)))
        self.at.zero_()

    def draw(self, logits: Tensor) -> None:
        """A token per row from its logits [B vocab]; a row that has ended repeats its end."""
        uniform = self.uniform.index_select(0, self.at)[0]
        token = sample_token(self.kind, logits, uniform, self.numbers)
        token = torch.where(self.done, self.fill, token)
        self.done |= token == self.eos
        self.broken |= ~logits.amax(-1).isfinite().all()  # the largest is NaN if one is there
        self.token.copy_(token)
        self.tokens.index_copy_(0, self.at, token[None])
        self.at += 1

    def iterate(self, model: LanguageModel) -> None:
        """One step of the model, and the token drawn from it."""
        self.draw(model.step(self.token, self.state))

    def replay(self, model: LanguageModel) -> None:
        if self.graph is None:
            self.iterate(model)
        else:
            self.graph.replay()

    def ended(self) -> bool:
        """Whether every row has ended.   Raises: ValueError if logits were not numbers. The host waits here."""
        done, broken = torch.stack([self.done.all(), self.broken]).tolist()
        if broken:
            raise ValueError("generate: logits must be numbers, the largest of a row finite, got NaN or infinities")
        return done

    def capture(self, model: LanguageModel, room: int | None) -> None:
        """Capture one iteration; if that fails, the loop runs without a graph, and a warning says why."""
        self.state = model.init_state(len(self.token), room)
        before = _places(self.state)
        try:
            graph = graph_of(lambda: self.iterate(model), self.token.device)
        except RuntimeError as error:
            reason = f"its step cannot be captured: {str(error).splitlines()[0]}"
        else:
            if _places(self.state) == before:
                self.graph = graph
                return
            reason = "one of its parts returns a new state from a step in place of overwriting the one it was given"
        _warn(reason)


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def graph_of(call: Callable[[], None], device: torch.device) -> Any:
    """The CUDA graph of what a call launches, which runs three times: twice so that kernels are compiled and work
    spaces allocated before."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()
    return graph


def _warn(reason: str) -> None:
    warnings.warn(f"generate: it runs without a CUDA graph, because {reason}", SlowPath, stacklevel=2)


def _places(state: State) -> list[int]:
    return [leaf.data_ptr() for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


def _uncapturable(model: nn.Module) -> str | None:
    """Why a replayed step would not do what the model does when it is called; None if it does."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has a forward hook, which a graph would call once and not for every token"
    return None


class Stops:
    """Rows end with the token that completes one of the strings `stop` in what they have generated."""

    def __init__(self, stop: Sequence[str], decode: Callable[[list[int]], str], rows: int) -> None:
        self.stop, self.decode = tuple(stop), decode
        self.tail = 4 * max(map(len, stop)) + 8  # tokens that can hold a string: each has a byte, but special ones
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.ended = [False] * rows

    def all(self) -> bool:
        return all(self.ended)

    def cut(self, tokens: Tensor, loop: Loop) -> Tensor:
        """The next tokens [B n], those after an end replaced; rows that have ended are marked in the loop."""
        fill, cut = loop.filler, tokens.tolist()
        for row, new in enumerate(cut):
            for i, token in enumerate(new):
                if self.ended[row]:
                    new[i] = fill
                    continue
                self.tokens[row] = [*self.tokens[row][-self.tail :], token]
                text = self.decode(self.tokens[row])
                self.ended[row] = any(word in text for word in self.stop)
        loop.done |= torch.tensor(self.ended, device=loop.done.device)
        return torch.tensor(cut, dtype=tokens.dtype, device=tokens.device)
