"""A recipe with weights: one layer that maps [B T D] to [B T D], whole, in pieces, or token by token."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recur.axes import RecipeError
from recur.blocks.state import POSITION, Layout, fitting, layout, nbytes, overwrite, passed
from recur.blocks.step_plan import StepPlan
from recur.primitives.forms import check_packing, state_count
from recur.recipe import Common, Flow, Recipe, State, read_one
from recur.shapes import bind, expect
from recur.weights import declared, parameter_count


class MixerOut(NamedTuple):
    """What a layer returns: `y` [B T D] and the `state` to continue from.

    >>> y, state = recur.Mixer("min_gru", dim=8)(torch.randn(1, 3, 8))
    >>> y.shape
    torch.Size([1, 3, 8])

    Attributes:
        y: [B T D].
        state: a nested dict of tensors [B ...].
    """

    y: Tensor
    state: State


class Published:
    """Filled by a layer's call with the tensors that it hands down to deeper layers.

    No dict, which hooks that move arguments between devices would copy.
    """

    def __init__(self) -> None:
        self.tensors: Mapping[str, Tensor] = {}


class Mixer(nn.Module):
    """The layer a recipe describes, at width `dim`.

    Args:
        recipe: what to build, or the name of a preset such as "mamba" or "gla:heads=2".
        dim:    D.
        depth:  layers of the model it stands in, for what depends on that (residual initialisation, lower bounds).
        layer:  which of them it is, from 0.
        shared: weights of parts that the whole model shares; the model passes one ModuleDict to all its layers.

    Call: y, state = mixer(x, state, cu_seqlens=...); x [B T D]. `state` None starts afresh, and
    mixer(x[:, :5]) followed by mixer(x[:, 5:], state) equals mixer(x). With cu_seqlens [n+1], B is 1 and the row holds
    n documents, each with its own state. Further inputs the recipe names are given by keyword, [B T ...] or [B 1 ...].
    A state may have been made in another precision; one that does not fit is refused by the name of its entry.

    >>> layer, x = recur.Mixer("hgrn2:heads=2", dim=32), torch.randn(1, 10, 32)
    >>> whole, _ = layer(x)
    >>> first, state = layer(x[:, :4])
    >>> rest, state = layer(x[:, 4:], state)
    >>> torch.allclose(whole, torch.cat([first, rest], 1), atol=1e-5)
    True
    """

    def __init__(
        self, recipe: Recipe | str, dim: int, *, depth: int = 1, layer: int = 0, shared: nn.ModuleDict | None = None
    ) -> None:
        super().__init__()
        if isinstance(recipe, str):
            recipe = read_one(recipe)
        if not isinstance(recipe, Recipe):
            raise TypeError(f"Mixer: recipe must be a Recipe, got {type(recipe).__name__}")
        if taken := sorted(set(recipe.inputs) & set(inspect.signature(self.forward).parameters)):
            raise RecipeError(
                f"Mixer: inputs of a recipe must not be called as its own arguments, got {', '.join(taken)}"
            )
        self.recipe, self.dim, self.depth, self.layer = recipe, dim, depth, layer
        self._layout: Layout = None
        site = recipe.site(dim, depth=depth, layer=layer)
        for name in recipe.axes:
            site.size(name)
        self._input_sizes = {name: site.of(name) for name in recipe.inputs}
        own = nn.ModuleDict() if shared is None else shared
        self.parts = recipe.body.build(site, own)
        recipe.body.prepare()
        if shared is None:
            self.shared = own
        self._lent = (own,)  # in a tuple: the model owns and registers what its layers share

    def forward(
        self,
        x: Tensor,
        state: State = None,
        *,
        cu_seqlens: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        form: str = "auto",
        past: tuple[Mapping[str, Tensor], ...] = (),
        published: Published | None = None,
        in_place: bool = False,
        evaluate: bool = False,
        layer: Tensor | None = None,
        common: Common | None = None,
        positions: tuple[Tensor, Tensor] | None = None,
        residual: Tensor | None = None,
        **inputs: Tensor,
    ) -> MixerOut:
        """For models: the last eight are those of `run`; `published` is filled with what is handed down."""
        options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "grid": grid, "form": form, "past": past}
        options |= {"in_place": in_place, "evaluate": evaluate}
        options |= {"layer": layer, "common": common, "positions": positions, "residual": residual}
        flow, state = self.run(x, state, inputs, **options)
        if published is not None:
            published.tensors = flow.published
        return MixerOut(flow["y"], state)

    def run(
        self,
        x: Tensor,
        state: State = None,
        inputs: Mapping[str, Tensor] | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        form: str = "auto",
        past: tuple[Mapping[str, Tensor], ...] = (),
        in_place: bool = False,
        evaluate: bool = False,
        layer: Tensor | None = None,
        common: Common | None = None,
        positions: tuple[Tensor, Tensor] | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Flow, State]:
        """The whole flow after the last part, for what wants more than "y" (tests).

        in_place: x is one token [B 1 D], and parts may overwrite the state they are given, which has been checked.
        evaluate: no dropout, even in training mode.
        layer, common: as in Flow.
        positions: [B] those before and after these tokens, where a model has found them for all its layers.
        residual: in a step, [B 1 D], what "y" is added to.
        """
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != self.dim:
            B, T = (bind("Mixer", x=(x, "B T D"))[letter] for letter in "BT")
            expect("Mixer", "x", x, "B T D", (B, T, self.dim))
        B, T, _ = x.shape
        check_packing("Mixer", cu_seqlens, B, T)
        inputs = inputs or {}
        self._check_inputs(inputs, B, T)
        rows = state_count(B, cu_seqlens)
        if state is not None and not in_place and not torch.compiler.is_compiling():
            letter = "B" if cu_seqlens is None else "n"
            state = fitting("Mixer", self.layout(), state, rows, x, step=False, letter=letter)
        if positions is None:
            before = x.new_zeros(rows, dtype=torch.long) if state is None else state["position"]
        else:
            before, _ = positions
        at = self.layer if layer is None else layer
        flow = Flow({"x": x, **inputs}, before, form, cu_seqlens, at, grid, past, in_place, evaluate, common)
        weights, before_parts = self._weights(), (state or {}).get("parts")
        plan = StepPlan.of(self, weights) if in_place and not torch.compiler.is_compiling() else None
        if plan is not None:
            flow, parts = plan(flow, weights, before_parts, residual)
        else:
            flow, parts = self.recipe.body(flow, weights, before_parts)
            flow = flow if residual is None else flow.set(y=residual + flow["y"].to(residual.dtype))
        after = passed(before, T, cu_seqlens, in_place) if positions is None else positions[1]
        return flow, {"position": after, "parts": parts}

    def _weights(self) -> dict[str, nn.Module]:
        """The module of every part, own and shared."""
        return {**self.parts._modules, **self._lent[0]._modules}

    def _check_inputs(self, inputs: Mapping[str, Tensor], B: int, T: int) -> None:
        if set(inputs) != set(self.recipe.inputs):
            wanted, got = ", ".join(self.recipe.inputs) or "none", ", ".join(inputs) or "none"
            raise TypeError(f"Mixer: further inputs must be {wanted}, got {got}")
        for name, tensor in inputs.items():
            sizes = self._input_sizes[name]
            if tensor.ndim != 2 + len(sizes) or tuple(tensor.shape[2:]) != sizes or tensor.shape[1] not in (1, T):
                letters = f"B T {self.recipe.inputs[name]}"
                expect("Mixer", name, tensor, letters, (B, T, *sizes))

    def init_state(self, batch: int, max_len: int | None = None) -> State:
        """The state before the first token.

        Args:
            batch:   B, number of sequences.
            max_len: fixes the length of attention caches, which otherwise grow; nothing else needs it.

        Returns: the state.   Raises: RecipeError if the recipe is not causal.

        >>> recur.Mixer("gla:heads=2", dim=16).init_state(batch=3)["parts"]["outer_scan"].shape
        torch.Size([3, 2, 4, 8])
        """
        if not self.recipe.causal:
            raise RecipeError("init_state: this recipe is not causal, so it has no state to stream from")
        pinned = {id(weight) for weight, param in declared(self) if param.float32}
        weights = sorted(self.parameters(), key=lambda weight: id(weight) in pinned)  # those of the model's dtype first
        weight = weights[0] if weights else torch.zeros(())
        site = self.recipe.site(self.dim, depth=self.depth, layer=self.layer, dtype=weight.dtype, device=weight.device)
        position = torch.zeros(batch, dtype=torch.long, device=weight.device)
        return {"position": position, "parts": self.recipe.body.init_state(site, batch, max_len)}

    @torch.no_grad()
    def step(self, x: Tensor, state: State, **inputs: Tensor) -> Tensor:
        """One token per sequence; `state` is overwritten, no gradient and no dropout.

        Args:
            x:      [B D].
            state:  of `init_state`, or of a call.
            inputs: further tensors that the recipe reads, [B ...].

        Returns: [B D].
        Raises: TypeError, ValueError or ShapeError for a state that does not fit, before anything is overwritten.

        >>> layer = recur.Mixer("gla:heads=2", dim=16)
        >>> layer.step(torch.randn(3, 16), layer.init_state(batch=3)).shape
        torch.Size([3, 16])
        """
        bind("Mixer.step", x=(x, "B D"))
        ready = state
        if not torch.compiler.is_compiling():
            ready = fitting("Mixer.step", self.layout(), state, len(x), x, step=True)
        given = {name: tensor[:, None] for name, tensor in inputs.items()}
        y, new = self(x[:, None], ready, in_place=True, evaluate=True, **given)
        overwrite(state, new)
        return y[:, 0]

    def prepare_step(self) -> None:
        """Move the weights to where a step wants them, which the first step does otherwise."""
        weights = self._weights()
        if (plan := StepPlan.of(self, weights)) is not None:
            plan.prepare(weights)

    def layout(self) -> Layout:
        """What a state of this layer must look like.   Raises: RecipeError if the recipe is not causal."""
        if self._layout is None:
            if not self.recipe.causal:
                raise RecipeError("Mixer: this recipe is not causal, so it cannot continue from a state")
            site = self.recipe.site(self.dim, depth=self.depth, layer=self.layer)
            self._layout = {"position": POSITION, "parts": layout(self.recipe.body, site)}
        return self._layout

    def __repr__(self) -> str:
        """Every stage: sizes, parameters and bytes of state per sequence (a growing attention cache counts 0)."""
        site = self.recipe.site(self.dim, depth=self.depth, layer=self.layer)
        weights = self._weights()
        rows = [("", "writes", "parameters", "state bytes")]
        for (key, part, place), (_, _, wrote) in zip(
            self.recipe.body.sites(site), self.recipe.body.walk(site.axes), strict=True
        ):
            writes = ", ".join(f"{name} {list(site.size(axes))}" for name, axes in wrote.items())
            state = nbytes(part.init_state(place, 1, None)) if part.causal else 0
            rows.append((key, writes, f"{parameter_count(weights[key]):,}", f"{state:,}"))
        total = sum(int(row[3].replace(",", "")) for row in rows[1:])
        rows.append(("total", "", f"{parameter_count(self):,}", f"{total:,}" if self.recipe.causal else "not causal"))
        wide = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c:>{wide[2]}}  {d:>{wide[3]}}" for a, b, c, d in rows]
        return f"Mixer at D={self.dim}\n" + "\n".join(lines)
