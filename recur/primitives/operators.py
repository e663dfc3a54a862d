"""Operators of torch with all their derivatives: backward, forward mode, vmap, and in graphs that are compiled.

In a graph an operator is one node, however many tokens it loops over. Called eagerly it is a `torch.autograd.Function`,
which `torch.func` and `torch.autograd.forward_ad` understand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

RUNS: dict[str, Callable[..., Any]] = {}  # what operators run, by their names, for `recur.counting`


def transformed() -> bool:
    """Whether a torch.func transform is running, or a level of forward-mode differentiation is open."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def add_to(x: Tensor, y: Tensor) -> Tensor:
    """x + y for an x that nothing else reads: in its memory, unless under vmap, where only y may be batched."""
    return x + y if transformed() else x.add_(y)


def remember(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for the backward and for the jvp."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def schema_of(record: Any, *more: str, outputs: int | None = None) -> str:
    """The schema of an operator that takes the fields of a NamedTuple, then `more` tensors, and returns so many
    tensors, or a list of them."""
    fields = get_type_hints(record) | dict.fromkeys(more, Tensor)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=hint) for name, hint in fields.items()]

    def prototype() -> None: ...

    returned: Any = list[Tensor] if outputs is None else tuple[(Tensor,) * outputs]  # type: ignore[misc]
    prototype.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, mutates_args=())


def operator(
    name: str,
    run: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
    jvp: Callable[..., Any],
    vmap: Callable[..., Any],
    schema: str | None = None,
) -> Callable[..., Any]:
    """`run` as a function of its positional arguments with derivatives of any order, in graphs `torch.ops.<name>`.

    Args:
        run: takes and returns tensors; None and numbers, but no lists of tensors, are further arguments.
        fake: empty outputs of the same arguments.
        save: (ctx, inputs, output) saves by `remember` what the derivatives read.
        backward: (ctx, *gradients of the outputs) -> gradients of the inputs.
        jvp: (ctx, *tangents of the inputs) -> tangents of the outputs.
        vmap: (call, size, in_dims, *inputs) -> outputs, out_dims: one call, the vmapped axis a further batch axis.
        schema: of `schema_of`; read off the annotations of `run` when omitted.

    backward and jvp are made of differentiable operations, and out of place: under vmap any tensor may be batched.
    """
    node = torch.library.custom_op(name, run, mutates_args=(), schema=schema)
    RUNS[name] = run
    node.register_fake(fake)
    node.register_autograd(backward, setup_context=save)

    def over_calls(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return vmap(call, info.batch_size, in_dims, *inputs)

    # the node, because vmap as torch.autograd has it, which is not that of torch.func, falls back to a loop over nodes
    rules: dict[str, Any] = {
        "forward": node,
        "setup_context": save,
        "backward": backward,
        "jvp": jvp,
        "vmap": over_calls,
    }
    bases = (torch.autograd.Function,)
    function: Any = type(name.partition("::")[2], bases, {rule: staticmethod(f) for rule, f in rules.items()})

    def call(*inputs: Any) -> Any:
        plain = in_graph() or not (torch.is_grad_enabled() or transformed())
        return node(*inputs) if plain else function.apply(*inputs)

    return call


def one_node(
    name: str, run: Callable[..., Any], fake: Callable[..., Any], *, schema: str | None = None
) -> Callable[..., Any]:
    """`run` as it is, but in a graph a single node `torch.ops.<name>`, whatever `run` does with sizes.

    What depends on T in Python (the number of chunks, the filling of the last one) would make one graph per length. The
    backward of the node is a node too and computes the forward again.

    Args:
        run: takes tensors, lists of tensors, None, numbers and strings; returns a tuple or list of tensors, which in a
            graph are contiguous.
        fake: empty contiguous outputs of the same arguments.
        schema: of `schema_of`; read off the annotations of `run` when omitted.
    """

    def moving(leaves: Sequence[Any]) -> list[int]:
        return [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]

    def forward(*inputs: Any) -> Any:
        with torch.no_grad():
            made = run(*inputs)
            copies = [y.clone(memory_format=torch.contiguous_format) for y in made]
        return copies if isinstance(made, list) else tuple(copies)

    def slopes(*given: Any) -> list[Tensor]:
        *inputs, grads = given
        leaves, tree = tree_flatten(inputs)
        places = moving(leaves)

        def run_on(*tensors: Tensor) -> Any:
            replaced = dict(zip(places, tensors, strict=True))
            return tuple(run(*tree_unflatten([replaced.get(i, x) for i, x in enumerate(leaves)], tree)))

        with torch.no_grad():
            found = pullback(run_on, [leaves[i] for i in places], grads)
        return [slope.clone(memory_format=torch.contiguous_format) for slope in found]

    def fake_slopes(*given: Any) -> list[Tensor]:
        leaves = tree_leaves(given[:-1])
        return [torch.empty_like(leaves[i], memory_format=torch.contiguous_format) for i in moving(leaves)]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        leaves, ctx.tree = tree_flatten(inputs)
        ctx.others = [None if isinstance(x, Tensor) else x for x in leaves]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in leaves))

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        leaves = [other if x is None else x for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        inputs = tree_unflatten(leaves, ctx.tree)
        found = dict(zip(moving(leaves), node_slopes(*inputs, tree_leaves(grads)), strict=True))
        return tuple(tree_unflatten([found.get(i) for i in range(len(leaves))], ctx.tree))

    schema = schema or torch.library.infer_schema(run, mutates_args=())
    arguments = schema.rpartition(") -> ")[0]
    node = torch.library.custom_op(name, forward, mutates_args=(), schema=schema)
    schema = f"{arguments}, Tensor[] grads) -> Tensor[]"
    node_slopes = torch.library.custom_op(f"{name}_backward", slopes, mutates_args=(), schema=schema)
    node.register_fake(fake)
    node_slopes.register_fake(fake_slopes)
    node.register_autograd(backward, setup_context=save)
    node_slopes.register_autograd(_refuse)

    def call(*inputs: Any) -> Any:
        return node(*inputs) if in_graph() else run(*inputs)

    return call


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("in a graph this scan has first derivatives only; form='recurrent' has second ones")


def in_graph() -> bool:
    """Whether a graph is being made.   Raises: NotImplementedError if a torch.func transform is part of it."""
    if not torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "a torch.func transform inside torch.compile needs form='recurrent'; outside it every torch form has it"
        )
    return True


def batched_at(*axes: int | None, out: int | tuple[int, ...]) -> Callable[..., Any]:
    """A vmap rule for an operator whose tensors can have one more axis: where each input and each output has it.

    None is for an input that cannot be vmapped.   Raises: NotImplementedError if that one is.
    """

    def rule(call: Callable[..., Any], size: int, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        moved = [batch_axis(size, dim, x, axis) for dim, x, axis in zip(in_dims, inputs, axes, strict=True)]
        return call(*moved), out

    return rule


def batch_axis(size: int, dim: int | None, x: Any, axis: int | None) -> Any:
    """x with its vmapped axis `dim` at `axis`, expanded if it has none; as it is where `axis` is None."""
    if axis is None or not isinstance(x, Tensor):
        if dim is not None:
            raise NotImplementedError("borders of documents must be the same for all that is vmapped, got a batch")
        return x
    if dim is None:
        return x.unsqueeze(axis).expand(*x.shape[:axis], size, *x.shape[axis:])
    return x.movedim(dim, axis)


def pullback(run: Callable[..., Any], inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the inputs, from those of the outputs."""
    return torch.func.vjp(run, *inputs)[1](tuple(weights))


def pushforward(run: Callable[..., Any], inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tangents of the outputs, from those of the inputs: the transpose of the pullback, which is linear in the weights.

    torch.func.jvp would open a level of forward mode in one that is open, which torch does not allow.
    """
    outputs, pull = torch.func.vjp(run, *inputs)[:2]
    push = torch.func.vjp(pull, tuple(torch.zeros_like(y) for y in outputs))[1]
    return push(tuple(tangents))[0]
