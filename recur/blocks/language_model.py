"""A language model: embedding, a stack of residual blocks, a head; trained whole, run token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recur.axes import RecipeError
from recur.blocks import generation
from recur.blocks.feedforward import feedforward
from recur.blocks.glue import Norm
from recur.blocks.mixer import Mixer, Published
from recur.blocks.state import POSITION, Layout, detach, fitting, overwrite, passed
from recur.primitives.forms import check_packing, state_count
from recur.primitives.loss import linear_cross_entropy
from recur.recipe import Axes, Common, Flow, Frame, Recipe, Site, State, named
from recur.shapes import accumulation_dtype, bind, expect, pick, readable
from recur.weights import (
    Embedding,
    Init,
    Linear,
    Param,
    bias_init,
    call,
    decay_groups,
    hooked,
    matrix_init,
    normal,
    parameter_count,
    uniform,
    watched,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Block(nn.Module):
    """A residual layer: x + mixer(norm(x)), then x + ffn(norm(x)) if there is a feed-forward.

    Args:
        recipe: the mixer.
        dim: D.
        ffn: the feed-forward, or none.
        order: "pre" normalises what each branch reads; "post" normalises each sum instead: norm(x + mixer(x)).
        norm: the norm, or none.
        dropout: of mixer and feed-forward.
        drop: "branch" zeroes what they add, "sum" the residual stream after it was added.
        depth: layers of the model.
        layer: which of them it is, from 0.
        shared: weights that all layers share, as in `Mixer`.

    >>> layer = recur.blocks.Block(recur.presets.gla(heads=2), dim=32)
    >>> layer(torch.randn(1, 5, 32))[0].shape
    torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        recipe: Recipe,
        dim: int,
        *,
        ffn: Recipe | None = None,
        order: str = "pre",
        norm: Norm | None = None,
        dropout: tuple[float, float] = (0.0, 0.0),
        drop: str = "branch",
        depth: int = 1,
        layer: int = 0,
        shared: nn.ModuleDict | None = None,
    ) -> None:
        super().__init__()
        if order not in ("pre", "post"):
            raise RecipeError(f'Block: order must be "pre" or "post", got {order!r}')
        if drop not in ("branch", "sum"):
            raise RecipeError(f'Block: drop must be "branch" or "sum", got {drop!r}')
        for kind, part in (("mixer", recipe), ("ffn", ffn)):
            if part is not None and (width := part.site(dim).size(part.out)) != (dim,):
                raise RecipeError(f"Block: {kind} must write y [D] to be added to x, got {list(width)} for D={dim}")
        self.order, self.dropout, self.drop, self.layers_below = order, dropout, drop, recipe.layers_below
        self.mixer = Mixer(recipe, dim, depth=depth, layer=layer, shared=shared)
        self.mixer_norm = StreamNorm(norm, dim)
        self.ffn = None if ffn is None else Mixer(ffn, dim, depth=depth, layer=layer, shared=shared)
        self.ffn_norm = None if ffn is None else StreamNorm(norm, dim)

    def forward(
        self,
        x: Tensor,
        state: State = None,
        *,
        evaluate: bool = False,
        positions: tuple[Tensor, ...] | None = None,
        **options: Any,
    ) -> tuple[Tensor, State, Mapping[str, Tensor]]:
        """The stream after this layer, its state, and what it publishes for deeper layers.

        positions: [B] those before these tokens, and after them, of the mixer and of the feed-forward.
        """
        after: dict[str, State] = {}
        published = Published()
        options["evaluate"] = evaluate
        p, q = self.dropout
        lane = {**options, "published": published}
        if positions is not None:
            lane["positions"], options["positions"] = positions[:2], (positions[0], positions[-1])
        before = None if state is None else state["mixer"]
        x, after["mixer"] = self._branch(self.mixer, self.mixer_norm, p, x, before, lane)
        if self.ffn is not None:
            options = {**options, "past": ()}
            before = None if state is None else state["ffn"]
            x, after["ffn"] = self._branch(self.ffn, self.ffn_norm, q, x, before, options)
        return x, after, published.tensors

    def _branch(
        self, branch: Mixer, norm: nn.Module | None, p: float, x: Tensor, state: State, options: dict[str, Any]
    ) -> tuple[Tensor, State]:
        assert norm is not None
        drops, form = self.training and not options["evaluate"], options.get("form", "auto")
        read = norm(x, form) if self.order == "pre" else x
        if options.get("in_place") and not drops and isinstance(branch, Mixer) and not hooked(branch):
            x, state = branch(read, state, residual=x, **options)
            return (x if self.order == "pre" else norm(x, form)), state
        y, state = branch(read, state, **options)
        y = F.dropout(y, p) if drops and p and self.drop == "branch" else y
        x = x + y.to(x.dtype)
        x = F.dropout(x, p) if drops and p and self.drop == "sum" else x
        return (x if self.order == "pre" else norm(x, form)), state

    def layout(self) -> Layout:
        """What a state of this layer must look like."""
        mixer = {"mixer": self.mixer.layout()}
        return mixer if self.ffn is None else mixer | {"ffn": self.ffn.layout()}

    def init_state(self, batch: int, max_len: int | None = None) -> State:
        state = {"mixer": self.mixer.init_state(batch, max_len)}
        return state if self.ffn is None else state | {"ffn": self.ffn.init_state(batch, max_len)}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every submodule's own mode afterwards, whatever happens in between."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _caller(number: int) -> Callable[..., Any]:
    """Calls a module, by code of its own: torch limits the graphs of each code object, not of each module."""

    def run(block: nn.Module, *args: Any, **options: Any) -> Any:
        return block._call_impl(*args, **options)

    run.__code__ = run.__code__.replace(co_name=f"layer_of_kind_{number}")
    return run


class StreamNorm(nn.Module):
    """A Norm part applied to the residual stream; the identity when there is none."""

    def __init__(self, norm: Norm | None, dim: int) -> None:
        super().__init__()
        self.norm = norm
        self.weights = (
            None if norm is None else norm.build(Site({"D": dim}, Axes({"x": ("D",)}, "LanguageModel: norm")))
        )

    def forward(self, x: Tensor, form: str = "auto") -> Tensor:
        if self.norm is None:
            return x
        assert self.weights is not None
        flow = Flow({"x": x}, x, form)  # norms read no positions: any tensor stands in their place
        flow, _ = call(self.weights, self.norm.__call__, flow, None)
        return flow[self.norm.to or "x"]


def stream_norm(norm: Norm | str | None) -> Norm | None:
    """The norm of the residual stream that a short name stands for: "rms", "layer", "l2", or a Norm of "x"."""
    return Norm("x", kind=norm, to="y") if isinstance(norm, str) else norm


def embedding_init(std: float, padding: int | None, law: str = "normal") -> Init:
    """N(0, std^2), or with "uniform" U(-std, std), and 0 for the token that pads, if there is one."""
    fill = pick("embedding_init", "law", law, {"normal": normal(std), "uniform": uniform(std)})
    return partial(_fill_embedding, fill=fill, padding=padding)


def _fill_embedding(weight: Tensor, fill: Init, padding: int | None) -> None:
    fill(weight)
    if padding is not None:
        weight[padding] = 0


class LanguageModel(nn.Module):
    """Token ids [B T] to logits [B T vocab_size].

    Args:
        recipe:     the mixer of every layer, or a list cycled over the depth (a hybrid); a string names presets, such
                    as "mamba" or "gla:heads=2+llama".
        vocab_size: number of tokens.
        dim:        D, width of the residual stream.
        depth:      number of layers.
        ffn:        feed-forward of every layer: None, "gelu", "swiglu", "gated", "channel_mix", "key_mix", or any
                    recipe; "paper", like "paper" below, is what the frame of the (first) recipe says.
        block:      "pre" or "post": which side of the residual sum is normalised.
        norm:       "paper", "rms", "layer", "l2", a Norm("x", to="y", ...), or None for recipes that normalise by
                    themselves.
        final_norm: the norm before the head; by default `norm` for "pre" and none for "post".
        tie:        whether the head is the embedding.
        outputs:    number of logits, where a head of its own has another number than one per token.
        positions:  "paper", None, "sinusoidal", or the number of learned positions.
        dropout:    of the embedding and of every branch, or three numbers: of the embedding, mixers, feed-forwards.
        drop:       "branch", or "sum" to zero the stream after every branch was added to it.
        checkpoint: recompute each layer in the backward pass instead of keeping its activations.
        embed_std:  standard deviation of the embedding's first values.
        embed_law:  "normal", or "uniform" for values between -embed_std and embed_std.
        embed_scale: factor on embedded tokens.
        embed_norm: norm of embedded tokens, as `norm`; None for none.
        padding:    a token that embeds as zero at first, and learns nothing by being read.
        head_init:  law of a head of its own (recur.weights.matrix_init).
        head_bias:  whether it has a bias.
        frozen:     embedding and head are loaded and stay as they are.

    >>> model = recur.LanguageModel("longhorn", vocab_size=256, dim=32, depth=2, ffn="swiglu")
    >>> ids = torch.zeros(1, 5, dtype=torch.long)
    >>> model(ids).shape, model.generate(ids, max_new_tokens=3, seed=0).shape
    (torch.Size([1, 5, 256]), torch.Size([1, 8]))
    """

    def __init__(
        self,
        recipe: Recipe | str | Sequence[Recipe | str],
        *,
        vocab_size: int,
        dim: int,
        depth: int,
        ffn: Recipe | str | None = "paper",
        block: str = "pre",
        norm: Norm | str | None = "paper",
        final_norm: Norm | str | None = "same",
        tie: bool = True,
        outputs: int | None = None,
        positions: str | int | None = "paper",
        dropout: float | tuple[float, float, float] = 0.0,
        drop: str = "branch",
        checkpoint: bool = False,
        embed_std: float = 0.02,
        embed_law: str = "normal",
        embed_scale: float = 1.0,
        embed_norm: Norm | str | None = "paper",
        padding: int | None = None,
        head_init: str = "lecun",
        head_bias: bool = False,
        frozen: bool = False,
    ) -> None:
        recipe = recipe if isinstance(recipe, Recipe) else named(recipe)
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        recipes = [recipe] if isinstance(recipe, Recipe) else list(recipe)
        frame = recipes[0].frame if recipes else Frame()
        framed = {field.name: getattr(frame, field.name) for field in fields(Frame)}
        framed = {name: value for name, value in framed.items() if arguments[name] == "paper"}
        self.arguments = arguments | framed  # all of them, to build its like
        ffn, norm, positions, embed_norm = (self.arguments[field.name] for field in fields(Frame))
        for name, number in (("vocab_size", vocab_size), ("dim", dim), ("depth", depth), ("recipes", len(recipes))):
            if number < 1:
                raise ValueError(f"LanguageModel: {name} must be at least 1, got {number}")
        if depth > 10_000:
            raise ValueError(f"LanguageModel: depth must be at most 10,000, got {depth}")
        if padding is not None and not 0 <= padding < vocab_size:
            raise ValueError(f"LanguageModel: padding must be an id in 0 .. {vocab_size - 1}, got {padding}")
        self.vocab_size, self.dim, self.depth, self.checkpoint = vocab_size, dim, depth, checkpoint
        self.embed_scale, self.padding = embed_scale, padding
        self._dropped, *inside = dropout if isinstance(dropout, (tuple, list)) else (dropout,) * 3
        table = Param((vocab_size, dim), embedding_init(embed_std, padding, embed_law), trainable=not frozen)
        self.embedding = Embedding(table, padding)
        self.embedding_norm = StreamNorm(stream_norm(embed_norm), dim)
        if not (positions is None or positions == "sinusoidal" or isinstance(positions, int)):
            raise ValueError(f'LanguageModel: positions must be None, "sinusoidal" or a number, got {positions!r}')
        self.sinusoidal = positions == "sinusoidal"
        self.positions = Embedding(Param((positions, dim), normal(embed_std))) if isinstance(positions, int) else None
        between = stream_norm(norm)
        self.shared = nn.ModuleDict()
        layers, self.period = range(depth), len(recipes)  # of a hybrid: its like is so many layers below
        common: dict[str, Any] = {"ffn": feedforward(ffn), "order": block, "norm": between}
        common |= {"dropout": tuple(inside), "drop": drop, "depth": depth, "shared": self.shared}
        self.blocks = nn.ModuleList(Block(recipes[i % len(recipes)], dim, layer=i, **common) for i in layers)
        last = (between if block == "pre" else None) if final_norm == "same" else stream_norm(final_norm)
        self.final_norm = StreamNorm(last, dim)
        if tie and (outputs is not None or head_bias):
            raise ValueError("LanguageModel: outputs and head_bias need a head of its own: tie=False")
        logits = vocab_size if outputs is None else outputs
        head = {"weight": Param((logits, dim), matrix_init(head_init, dim, logits, 1), trainable=not frozen)}
        if head_bias:
            head["bias"] = Param((logits,), bias_init(head_init, dim), decay=False, trainable=not frozen)
        self.head = None if tie else Linear(head)

    @property
    def causal(self) -> bool:
        return all(block.mixer.recipe.causal for block in self._layers())

    def _layers(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def forward(
        self,
        ids: Tensor,
        state: State = None,
        *,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        form: str = "auto",
        targets: Tensor | None = None,
        reduction: str = "mean",
    ) -> Any:
        """Logits [B T vocab_size]; with return_state also the next state. cu_seqlens [n+1] packs n documents.

        With targets [B T], the classes to predict, their cross-entropy in float32 or wider, its "mean" or its "sum",
        takes the place of the logits, of which there is only a chunk of tokens at a time (recur.primitives.loss), or
        all if a hook wants a head of its own to be called. Targets of -100 do not count.

        Raises: ShapeError, TypeError if ids are no [B T] integers, ValueError for an id out of vocabulary (on a CPU).
        """
        if targets is not None:
            bind("LanguageModel", targets=(targets, "B T"))
            expect("LanguageModel", "targets", targets, "B T", tuple(ids.shape))
        x, state = self._hidden(ids, state, cu_seqlens=cu_seqlens, form=form)
        y = self._logits(x) if targets is None else self._loss(x.flatten(0, 1), targets.flatten(), reduction)
        return (y, state) if return_state else y

    def _hidden(self, ids: Tensor, state: State, **options: Any) -> tuple[Tensor, State]:
        """The normalised stream after the last layer [B T D], and the state after the last token."""
        self._check_ids(ids)
        x = self.embedding(ids)
        x = self.embedding_norm(x if self.embed_scale == 1 else x * self.embed_scale, options.get("form", "auto"))
        return self.hidden(x, state, **options)

    def hidden(
        self,
        x: Tensor,
        state: State = None,
        *,
        cu_seqlens: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        form: str = "auto",
        in_place: bool = False,
        evaluate: bool = False,
    ) -> tuple[Tensor, State]:
        """The blocks alone: embedded tokens [B T D] to the normalised stream [B T D], and the state.

        in_place: T is 1, and the state may be overwritten; evaluate: no dropout, even in training mode.
        """
        B, T, _ = x.shape
        check_packing("LanguageModel", cu_seqlens, B, T)
        rows = state_count(B, cu_seqlens)
        if (state is not None or in_place) and not torch.compiler.is_compiling():
            letter = "B" if cu_seqlens is None else "n"
            state = fitting("LanguageModel", self.layout(), state, rows, x, step=in_place, letter=letter)
        position = torch.zeros(rows, dtype=torch.long, device=x.device) if state is None else state["position"]
        x = self._add_positions(x, position, cu_seqlens)
        x = F.dropout(x, self._dropped) if self._dropped and self.training and not evaluate else x
        past: tuple[Mapping[str, Tensor], ...] = ()
        layers: list[State] = []
        options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "grid": grid, "form": form}
        options |= {"in_place": in_place, "evaluate": evaluate}
        own = self._own(position, T, cu_seqlens, state, in_place)
        for layer, block in enumerate(self._layers()):
            before = None if state is None else state["layers"][layer]
            options |= {name: each[layer] for name, each in own.items()}
            options["past"] = past[max(0, len(past) - block.layers_below * self.period) :]
            if self.checkpoint and torch.is_grad_enabled():
                x, after, published = checkpoint(block, x, before, use_reentrant=False, **options)
            else:
                x, after, published = block(x, before, **options)
            past += (published,)
            layers.append(after)
        if in_place and "positions" in own:  # those of all layers at once
            torch._foreach_add_([position, *(rows for each in own["positions"] for rows in each[1:])], T)
            return self.final_norm(x, form), {"position": position, "layers": layers}
        return self.final_norm(x, form), {"position": passed(position, T, cu_seqlens, in_place), "layers": layers}

    def _own(
        self, position: Tensor, T: int, cu_seqlens: Tensor | None, state: State, in_place: bool
    ) -> dict[str, Sequence[Any]]:
        """Further arguments of each layer's call: what layers have in common, what would set one apart in a graph.

        In a step they read one position, and their own are overwritten after the last of them.
        """
        if torch.compiler.is_compiling():
            return {}
        own: dict[str, Sequence[Any]] = {"common": [Common()] * self.depth}
        if any(block._compiled_call_impl is not None for block in self.blocks):
            own = {"layer": torch.arange(self.depth, device=position.device).unbind(0)}
        if state is None:
            seen = passed(position, T, cu_seqlens, False)
            rows = seen.expand(2 * self.depth, -1).clone().unbind(0)  # a step overwrites each
            own["positions"] = [(position, *rows[2 * i : 2 * i + 2]) for i in range(self.depth)]
        elif in_place:
            own["positions"] = [
                (position, *(branch["position"] for branch in layer.values())) for layer in state["layers"]
            ]
        return own

    def _loss(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Cross-entropy at the targets [N] of what the head makes of x [N D]."""
        if self.head is not None and watched(self.head):  # whose logits are there at once
            logits = self.head(x)
            return F.cross_entropy(logits.to(accumulation_dtype(logits)), targets.long(), reduction=reduction)
        head = self.embedding if self.head is None else self.head
        bias = getattr(self.head, "bias", None)
        return linear_cross_entropy(x, head.weight, targets, bias, reduction=reduction)

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x)

    def _add_positions(self, x: Tensor, position: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if self.positions is None and not self.sinusoidal:
            return x
        at = Flow({"x": x}, position, cu_seqlens=cu_seqlens).positions()
        if self.positions is not None:
            room = self.positions.weight.shape[0]
            if readable(at) and int(at.max()) >= room:
                raise ValueError(
                    f"LanguageModel: it has {room} learned positions, got a sequence of {int(at.max()) + 1} tokens"
                )
            return x + self.positions(at)
        rate = 10000.0 ** -(torch.arange(0, self.dim, 2, dtype=torch.float64, device=x.device) / self.dim)
        angle = at[..., None] * rate
        wave = torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., : self.dim]
        return x + wave.to(x.dtype)

    def _check_ids(self, ids: Tensor) -> None:
        bind("LanguageModel", ids=(ids, "B T"))
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"LanguageModel: ids must be int32 or int64, got {ids.dtype}")
        if readable(ids):
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= self.vocab_size:
                bad = low if low < 0 else high
                raise ValueError(f"LanguageModel: ids must lie in 0 .. {self.vocab_size - 1}, got {bad}")

    # ------------------------------------------------------------------ token by token

    def init_state(self, batch: int, max_len: int | None = None) -> State:
        """The state before the first token.

        Args:
            batch:   B, number of sequences.
            max_len: fixes the length of attention caches, which otherwise grow.

        Returns: the state, of every layer.   Raises: RecipeError if a recipe is not causal.

        >>> model = recur.LanguageModel("gla:heads=2", vocab_size=11, dim=16, depth=1)
        >>> state = model.init_state(batch=2)
        >>> model.step(torch.tensor([3, 5]), state).shape  # the state is overwritten
        torch.Size([2, 11])
        """
        weight = self.embedding.weight
        position = torch.zeros(batch, dtype=torch.long, device=weight.device)
        return {"position": position, "layers": [block.init_state(batch, max_len) for block in self._layers()]}

    def compile_layers(self, **options: Any) -> LanguageModel:
        """Compile one layer and use it for all of its kind, so that start-up does not grow with the depth.

        A hybrid has one graph per recipe, DenseSSM one per number of layers below. Weights keep their names; gradients,
        hooks and generation work as before. `torch.compile(model)` and `model.compile()` would compile all layers into
        one graph instead.

        Args:
            options: of torch.compile: backend, mode, dynamic, ...

        Returns: the model itself.
        Cost: the first call of every kind compiles, as does one of another mode (training, no gradient, one token), or
            of another length, after which lengths are dynamic. torch compiles at most
            torch._dynamo.config.recompile_limit graphs of each kind, and runs what is beyond them eagerly.

        >>> lm = recur.LanguageModel("gla", vocab_size=10, dim=16, depth=4).compile_layers(backend="eager")
        >>> lm(torch.zeros(1, 3, dtype=torch.long)).shape
        torch.Size([1, 3, 10])
        """
        kinds: dict[Any, Callable[..., Any]] = {}
        for layer, block in enumerate(self._layers()):
            ffn = None if block.ffn is None else block.ffn.recipe
            kind = block.mixer.recipe, ffn, min(layer, block.layers_below)
            call_it = kinds.setdefault(kind, _caller(len(kinds)))
            block._compiled_call_impl = torch.compile(MethodType(call_it, block), **options)  # as Module.compile does
        return self

    def layout(self) -> Layout:
        """What a state of this model must look like."""
        return {"position": POSITION, "layers": [block.layout() for block in self._layers()]}

    @torch.no_grad()
    def step(self, ids: Tensor, state: State) -> Tensor:
        """One token per sequence; `state` is overwritten, no gradient and no dropout.

        Args:
            ids:   [B] tokens.
            state: of `init_state`, `prefill` or a call with return_state.

        Returns: logits [B vocab_size].
        Raises: TypeError, ValueError or ShapeError for a state that is not of this model, before anything is written.

        >>> model = recur.LanguageModel("gla:heads=2", vocab_size=11, dim=16, depth=1)
        >>> model.step(torch.tensor([3]), model.init_state(batch=1)).shape
        torch.Size([1, 11])
        """
        if not (isinstance(ids, Tensor) and ids.ndim == 1):
            bind("LanguageModel.step", ids=(ids, "B"))
        x, new = self._hidden(ids[:, None], state, in_place=True, evaluate=True)
        overwrite(state, new)
        return self._logits(x[:, 0])

    @torch.no_grad()
    def prefill(
        self, ids: Tensor, lengths: Tensor | None = None, *, max_len: int | None = None
    ) -> tuple[Tensor, State]:
        """Read prompts in one pass. No gradient and no dropout.

        Args:
            ids:     [B T] prompts, right-padded if `lengths` are given.
            lengths: [B] tokens of each prompt; all of them when omitted.
            max_len: fixes the length of attention caches.

        Returns: logits [B vocab_size] after the last token of each prompt, and the state.

        >>> model = recur.LanguageModel("gla:heads=2", vocab_size=11, dim=16, depth=1)
        >>> logits, state = model.prefill(torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1]))
        >>> logits.shape, state["position"]
        (torch.Size([2, 11]), tensor([3, 1]))
        """
        fresh = None if max_len is None else self.init_state(len(ids), max_len)
        if lengths is None:
            x, state = self._hidden(ids, fresh, evaluate=True)
            return self._logits(x[:, -1]), detach(state)
        bind("prefill", ids=(ids, "B T"))
        generation.check_lengths("prefill", lengths)
        inside = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        borders = F.pad(lengths.cumsum(0), (1, 0))
        x, state = self._hidden(ids[inside][None], fresh, cu_seqlens=borders, evaluate=True)
        return self._logits(x[0, borders[1:] - 1]), detach(state)

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int, **options: Unpack[generation.Options]) -> Tensor:
        """Continue prompts: each prompt is read in one pass, then every new token costs one step. No dropout is used.

        On a GPU one step with its sampling is captured as a CUDA graph, at the first call for each batch size, and
        replayed for every token. Weights changed in place take effect; weights that were replaced are captured anew.
        What cannot be captured (forward hooks, a window shorter than the sequence) runs step by step, with a warning.

        The mode of the model is neither read nor changed, so several threads may generate at once. A module or hook of
        your own that depends on the training mode needs model.eval() first.

        Args:
            ids: [B T] prompts, right-padded (with anything) if `lengths` gives their own lengths.
            max_new_tokens: number of tokens to add.
            options: any of

                - temperature: 1.0 by default; 0 takes the most likely token.
                - top_k: keep the k most likely tokens.
                - top_p: keep the fewest tokens with total probability p, after top_k.
                - min_p: keep tokens with at least min_p times the probability of the most likely one, after top_p.
                - eos: a row that has produced this token repeats it.
                - seed: row i draws from its own sequence (seed, i), so a batch gives what its rows give alone; by
                  default a seed from torch's own generator, which torch.manual_seed sets.
                - lengths: [B] tokens of each prompt; all T by default.
                - window: read at most so many tokens of context: the last `window`, again for each new token.
                - stop: strings; a row ends with the token that completes one of them in what it has generated.
                - decode: from a list of ids to a string, as tokenizers have it; `stop` needs it.

        Returns: [B T + max_new_tokens], each row its prompt, its new tokens, then (for shorter prompts) `eos` or 0.
        Raises: ShapeError, TypeError or ValueError for invalid arguments, before any token is sampled.
        Cost: one pass over the prompts and one step per token; only caches of attention grow with the sequence.

        >>> model = recur.LanguageModel("gla:heads=2", vocab_size=11, dim=16, depth=1)
        >>> model.generate(torch.tensor([[1, 2, 3]]), 5, seed=0).shape
        torch.Size([1, 8])
        """
        return generation.generate(self, generation.request(self, ids, max_new_tokens, options))

    def stream(self, ids: Tensor, max_new_tokens: int, **options: Unpack[generation.Options]) -> Iterator[Tensor]:
        """The tokens of `generate`, each as soon as it is computed.

        Args:
            ids:            [B T] prompts.
            max_new_tokens: the largest number of tokens to add.
            options:        those of `generate`.

        Yields: [B] ids on the CPU; a row that has ended repeats its end; nothing more when all rows have.
        Raises: as `generate`, at the call.

        >>> model = recur.LanguageModel("gla:heads=2", vocab_size=11, dim=16, depth=1)
        >>> len([tokens for tokens in model.stream(torch.tensor([[1, 2, 3]]), 5)])
        5
        """
        return generation.stream(self, generation.request(self, ids, max_new_tokens, options))

    # ------------------------------------------------------------------ training

    def loss(self, ids: Tensor, **options: Any) -> Tensor:
        """Mean cross-entropy, in nats, of every token but the first, given those before it.

        Args:
            ids:     [B T] tokens.
            options: of a call of the model, such as cu_seqlens and form.

        Returns: a number, float32.

        >>> model = recur.LanguageModel("gla:heads=2", vocab_size=11, dim=16, depth=1)
        >>> model.loss(torch.zeros(1, 5, dtype=torch.long)).dtype
        torch.float32
        """
        self._check_ids(ids)
        loss: Tensor = self(ids[:, :-1], targets=ids[:, 1:], **options)
        return loss

    def decay_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser: weight decay where it is declared, none on gates, norms and biases.

        Args:
            weight_decay: of the weights that have one.

        Returns: two groups, for torch.optim.   Raises: TypeError if a weight with a gradient is not declared.

        >>> model = recur.LanguageModel("gla:heads=2", vocab_size=11, dim=16, depth=1)
        >>> [group["weight_decay"] for group in torch.optim.AdamW(model.decay_groups(0.1)).param_groups]
        [0.1, 0.0]
        """
        return decay_groups(self, weight_decay)

    def extra_repr(self) -> str:
        return f"D={self.dim}, {self.depth} layers, {parameter_count(self):,} parameters"
