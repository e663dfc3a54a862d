"""A language model: embedding, a stack of residual blocks, a head; trained whole, run token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recur.axes import RecipeError
from recur.blocks.feedforward import feedforward
from recur.blocks.glue import Norm
from recur.blocks.mixer import Mixer, Published
from recur.blocks.sampling import sample_token
from recur.blocks.state import POSITION, Layout, detach, fitting, overwrite, passed
from recur.primitives.forms import check_packing, state_count
from recur.primitives.loss import linear_cross_entropy
from recur.recipe import Flow, Recipe, State
from recur.shapes import accumulation_dtype, bind, expect, pick, readable
from recur.weights import Embedding, Init, Linear, Param, bias_init, declared, matrix_init, normal, uniform, watched


class Block(nn.Module):
    """A residual layer: x + mixer(norm(x)), then x + ffn(norm(x)) if there is a feed-forward.

    order "pre" normalises what each branch reads; "post" normalises each sum instead: norm(x + mixer(x)).
    dropout: of mixer and feed-forward; drop "branch" zeroes what they add, "sum" the stream after it was added.
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
        self.order, self.dropout, self.drop = order, dropout, drop
        self.mixer = Mixer(recipe, dim, depth=depth, layer=layer, shared=shared)
        self.mixer_norm = StreamNorm(norm, dim)
        self.ffn = None if ffn is None else Mixer(ffn, dim, depth=depth, layer=layer, shared=shared)
        self.ffn_norm = None if ffn is None else StreamNorm(norm, dim)

    def forward(
        self, x: Tensor, state: State = None, *, evaluate: bool = False, **options: Any
    ) -> tuple[Tensor, State, Mapping[str, Tensor]]:
        """The stream after this layer, its state, and what it publishes for deeper layers."""
        after: dict[str, State] = {}
        published = Published()
        options["evaluate"] = evaluate
        p, q = self.dropout
        lane = {**options, "published": published}
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
        y, state = branch(norm(x, form) if self.order == "pre" else x, state, **options)
        y = y if self.drop == "sum" else F.dropout(y, p, drops)
        x = x + y.to(x.dtype)
        x = x if self.drop == "branch" else F.dropout(x, p, drops)
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


def _check_lengths(function: str, lengths: Tensor) -> None:
    if not (isinstance(lengths, Tensor) and lengths.dtype in (torch.int32, torch.int64)):
        raise TypeError(f"{function}: lengths must be an int32 or int64 tensor [B], got {lengths!r}")


def _last(text: Tensor, length: Tensor, window: int, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The last `window` tokens of each row of text [B L], of which `length` [B] are there; how many, if they differ."""
    begin, W = (length - window).clamp(min=0), min(window, int(length.max()))
    index = (begin[:, None] + torch.arange(W, device=text.device)).clamp(max=text.shape[1] - 1)
    return text.gather(1, index), None if lengths is None else length.clamp(max=window)


class StreamNorm(nn.Module):
    """A Norm part applied to the residual stream; the identity when there is none."""

    def __init__(self, norm: Norm | None, dim: int) -> None:
        super().__init__()
        self.norm = norm
        self.weights = None if norm is None else norm.build(Recipe(norm, Norm("x", to="y")).site(dim))

    def forward(self, x: Tensor, form: str = "auto") -> Tensor:
        if self.norm is None:
            return x
        nowhere = x.new_empty(0, dtype=torch.long)  # norms read no positions
        assert self.weights is not None
        flow, _ = self.weights(self.norm.__call__, Flow({"x": x}, nowhere, form), None)
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


def _recipes(recipes: str | Sequence[Recipe | str]) -> list[Recipe]:
    """Recipes, those that are words read."""
    from recur.presets.words import named  # presets are built from blocks

    return named(recipes)


class LanguageModel(nn.Module):
    """Token ids [B T] to logits [B T vocab_size].

    Args:
        recipe:     the mixer of every layer, or a list cycled over the depth (a hybrid); a string names presets, such
                    as "mamba" or "gla:heads=2+llama".
        vocab_size: number of tokens.
        dim:        D, width of the residual stream.
        depth:      number of layers.
        ffn:        feed-forward of every layer: None, "gelu", "swiglu", "gated", "channel_mix", "key_mix", or any
                    recipe.
        block:      "pre" or "post": which side of the residual sum is normalised.
        norm:       "rms", "layer", "l2", a Norm("x", to="y", ...), or None for recipes that normalise by themselves.
        final_norm: the norm before the head; by default `norm` for "pre" and none for "post".
        tie:        whether the head is the embedding.
        outputs:    number of logits, where a head of its own has others than one a token.
        positions:  None, "sinusoidal", or the number of learned positions.
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
    """

    def __init__(
        self,
        recipe: Recipe | str | Sequence[Recipe | str],
        *,
        vocab_size: int,
        dim: int,
        depth: int,
        ffn: Recipe | str | None = None,
        block: str = "pre",
        norm: Norm | str | None = "rms",
        final_norm: Norm | str | None = "same",
        tie: bool = True,
        outputs: int | None = None,
        positions: str | int | None = None,
        dropout: float | tuple[float, float, float] = 0.0,
        drop: str = "branch",
        checkpoint: bool = False,
        embed_std: float = 0.02,
        embed_law: str = "normal",
        embed_scale: float = 1.0,
        embed_norm: Norm | str | None = None,
        padding: int | None = None,
        head_init: str = "lecun",
        head_bias: bool = False,
        frozen: bool = False,
    ) -> None:
        recipe = recipe if isinstance(recipe, Recipe) else _recipes(recipe)
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.arguments = arguments  # all of them, to build its like
        recipes = [recipe] if isinstance(recipe, Recipe) else list(recipe)
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
        layers = range(depth)
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
    ) -> Any:
        """Logits [B T vocab_size]; with return_state also the state to go on from. cu_seqlens [n+1] packs n documents.

        With targets [B T], the classes to predict, their mean cross-entropy in float32 or wider takes the place of the
        logits, of which there is only a chunk of tokens at a time (recur.primitives.loss), or all if a hook wants a
        head of its own to be called. Targets of -100 do not count.

        Raises: ShapeError, TypeError if ids are no [B T] integers, ValueError for an id out of vocabulary (on a CPU).
        """
        if targets is not None:
            bind("LanguageModel", targets=(targets, "B T"))
            expect("LanguageModel", "targets", targets, "B T", tuple(ids.shape))
        x, state = self._hidden(ids, state, cu_seqlens=cu_seqlens, form=form)
        y = self._logits(x) if targets is None else self._loss(x.flatten(0, 1), targets.flatten())
        return (y, state) if return_state else y

    def _hidden(self, ids: Tensor, state: State, **options: Any) -> tuple[Tensor, State]:
        """The normalised stream after the last layer [B T D], and the state after the last token."""
        self._check_ids(ids)
        x = self.embedding_norm(self.embedding(ids) * self.embed_scale, options.get("form", "auto"))
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
        """The stack without its doors: embedded tokens [B T D] to the normalised stream [B T D], and the state.

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
        x = F.dropout(x, self._dropped, self.training and not evaluate)
        past: tuple[Mapping[str, Tensor], ...] = ()
        layers = []
        options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "grid": grid, "form": form}
        options |= {"in_place": in_place, "evaluate": evaluate}
        for layer, block in enumerate(self._layers()):
            before = None if state is None else state["layers"][layer]
            options["past"] = past
            if self.checkpoint and torch.is_grad_enabled():
                x, after, published = checkpoint(block, x, before, use_reentrant=False, **options)
            else:
                x, after, published = block(x, before, **options)
            past += (published,)
            layers.append(after)
        return self.final_norm(x, form), {"position": passed(position, T, cu_seqlens, in_place), "layers": layers}

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy at the targets [N] of what the head makes of x [N D]."""
        if self.head is not None and watched(self.head):  # whose logits are there at once
            logits = self.head(x)
            return F.cross_entropy(logits.to(accumulation_dtype(logits)), targets.long())
        head = self.embedding if self.head is None else self.head
        return linear_cross_entropy(x, head.weight, targets, getattr(self.head, "bias", None))

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
                    f"LanguageModel: it has {room} learned positions, got a text of {int(at.max()) + 1} tokens"
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
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.vocab_size:
                bad = low if low < 0 else high
                raise ValueError(f"LanguageModel: ids must lie in 0 .. {self.vocab_size - 1}, got {bad}")

    # ------------------------------------------------------------------ token by token

    def init_state(self, batch: int, max_len: int | None = None) -> State:
        """The state before the first token; `max_len` fixes the length of attention caches."""
        weight = self.embedding.weight
        position = torch.zeros(batch, dtype=torch.long, device=weight.device)
        return {"position": position, "layers": [block.init_state(batch, max_len) for block in self._layers()]}

    def layout(self) -> Layout:
        """What a state of this model must look like."""
        return {"position": POSITION, "layers": [block.layout() for block in self._layers()]}

    @torch.no_grad()
    def step(self, ids: Tensor, state: State) -> Tensor:
        """One token a sequence: ids [B] to logits [B vocab_size]; `state` is overwritten, no gradient and no dropout.

        Raises: TypeError, ValueError or ShapeError for a state that is not of this model, before anything is written.
        """
        if not (isinstance(ids, Tensor) and ids.ndim == 1):
            bind("LanguageModel.step", ids=(ids, "B"))
        x, new = self._hidden(ids[:, None], state, in_place=True, evaluate=True)
        overwrite(state, new)
        return self._logits(x[:, 0])

    @torch.no_grad()
    def prefill(self, ids: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """Read prompts [B T] in one pass, right-padded if `lengths` [B] are given: last logits and state.

        No gradient and no dropout.
        """
        if lengths is None:
            x, state = self._hidden(ids, None, evaluate=True)
            return self._logits(x[:, -1]), detach(state)
        bind("prefill", ids=(ids, "B T"))
        _check_lengths("prefill", lengths)
        inside = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        borders = F.pad(lengths.cumsum(0), (1, 0))
        x, state = self._hidden(ids[inside][None], None, cu_seqlens=borders, evaluate=True)
        return self._logits(x[0, borders[1:] - 1]), detach(state)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        eos: int | None = None,
        seed: int | None = None,
        lengths: Tensor | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Continue prompts: the prompt is read in one pass, then every token costs one step. Nothing is dropped.

        The mode of the model is neither asked nor changed, so threads may generate side by side; a module or hook of
        one's own that asks whether it is in training mode wants model.eval() first.

        Args:
            ids:            [B T] prompts, right-padded (with anything) if `lengths` [B] gives their own lengths.
            max_new_tokens: how many tokens to add.
            temperature:    0 takes the likeliest token.
            top_k, top_p, min_p: keep the k likeliest tokens, the fewest with probability p together, those with at
                            least min_p of the likeliest; applied in this order, after the temperature.
            eos:            a row that has produced this token repeats it.
            window:         forget what lies more than so many tokens back: the last `window` are read anew each time.
            seed:           row i draws from its own generator (seed, i), so a batch equals its rows; None takes a seed
                            from torch's own generator, which torch.manual_seed sets.

        Returns: [B T + max_new_tokens], each row its prompt, its new tokens, then (for shorter prompts) `eos` or 0.
        """
        bind("generate", ids=(ids, "B T"))
        if ids.shape[1] == 0 or max_new_tokens < 0:
            raise ValueError(
                f"generate: needs a prompt and max_new_tokens >= 0, got {ids.shape[1]} tokens and {max_new_tokens}"
            )
        if eos is not None and not (isinstance(eos, int) and 0 <= eos < self.vocab_size):
            raise ValueError(f"generate: eos must be one id in 0 .. {self.vocab_size - 1}, got {eos!r}")
        if window is not None and window < 1:
            raise ValueError(f"generate: window must be at least 1, got {window}")
        if lengths is not None:
            _check_lengths("generate", lengths)
        own = torch.full((len(ids),), ids.shape[1], device=ids.device) if lengths is None else lengths.to(ids.device)
        if len(ids) == 0:
            return ids.new_zeros(0, ids.shape[1] + max_new_tokens)
        if tuple(own.shape) != (len(ids),) or int(own.min()) < 1 or int(own.max()) > ids.shape[1]:
            raise ValueError(f"generate: lengths must be [B] within 1 .. T={ids.shape[1]}, got {own.tolist()}")
        rows, length = torch.arange(len(ids), device=ids.device), ids.shape[1]
        inside = torch.arange(length, device=ids.device) < own[:, None]
        self._check_ids(ids.where(inside, 0))  # whatever pads is not read
        first = int(torch.randint(2**63 - 1, (), device="cpu")) if seed is None else seed
        draws = [torch.Generator("cpu").manual_seed((first + (row << 32)) % 2**63) for row in range(len(ids))]
        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        text = torch.full((len(ids), length + max_new_tokens), eos or 0, device=ids.device, dtype=ids.dtype)
        text[:, :length] = torch.where(inside, ids, text[:, :length])
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        logits, state = self.prefill(*_last(text, own, window or length, lengths))
        for new in range(max_new_tokens):
            token = sample_token(logits, draws, **options).to(ids.dtype)
            if eos is not None:
                token = torch.where(done, eos, token)
                done |= token == eos
            text[rows, own + new] = token
            if bool(done.all()) or new + 1 == max_new_tokens:
                break
            if window is None or int(own.max()) + new + 1 <= window:
                logits = self.step(token, state)
            else:
                logits, state = self.prefill(*_last(text, own + new + 1, window, lengths))
        return text

    # ------------------------------------------------------------------ training

    def loss(self, ids: Tensor, **options: Any) -> Tensor:
        """Mean cross-entropy, in nats, of every token of ids [B T] but the first, given those before it."""
        self._check_ids(ids)
        loss: Tensor = self(ids[:, :-1], targets=ids[:, 1:], **options)
        return loss

    def decay_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser: weight decay on what is declared so, none on gates, norms and biases.

        Raises: TypeError if a weight that wants a gradient is not declared.
        """
        known = {id(weight) for weight, _ in declared(self)}
        undeclared = [n for n, weight in self.named_parameters() if weight.requires_grad and id(weight) not in known]
        if undeclared:
            raise TypeError(f"decay_groups: every weight must be declared by a Param, got {', '.join(undeclared)}")
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for weight, param in declared(self):
            if param.trainable:
                groups[param.decay].append(weight)
        return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]

    def extra_repr(self) -> str:
        return f"D={self.dim}, {self.depth} layers, {sum(weight.numel() for weight in self.parameters()):,} parameters"
