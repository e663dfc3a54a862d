"""The laws that every recurrence must satisfy: one function per law, named as the law; its docstring is the statement.

A law draws inputs and whatever else it needs, computes something in two ways, and raises LawBroken with the largest
difference if they are not equal. Equal means: in float64, values and the gradients to every input, to 1e-9 of the
largest entry. LAWS says which law applies to which subject.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import reject
from torch import Tensor

from recur.axes import RecipeError
from recur.primitives.summary import advance, combine
from recur.recipe import Recipe
from recur.testing.compare import (
    RELATIVE,
    ROUNDING,
    Inputs,
    LawBroken,
    Result,
    agree,
    finite,
    leaves_of,
    map_tensors,
    named,
    same,
    values,
    values_and_gradients,
    weighed,
)
from recur.testing.strategies import cuts, documents
from recur.testing.subjects import Layer, Subject, parts_of, plain

STEP = 1e-6  # of a difference quotient: its error, STEP^2 of the value, is then as small as rounding, 1e-16 / STEP
Draw = Callable[..., Any]  # draw(strategy, name): a value that the counter-example shows under this name


def forms(subject: Subject, draw: Draw) -> None:
    """All forms agree."""
    inputs = draw(subject.inputs)
    form = draw(st.sampled_from([form for form in subject.forms if form != "recurrent"]), "form")
    agree(
        inputs, (f"as {form}", "as recurrent"), partial(subject.run, form=form), partial(subject.run, form="recurrent")
    )


def splits(subject: Subject, draw: Draw) -> None:
    """Any split with carried state equals one run."""
    inputs = draw(subject.inputs)
    cut, form = draw(cuts(inputs.length), "cut"), _draw_form(subject, draw)

    def in_two(inputs: Inputs) -> Result:
        head = subject.run(inputs.between(0, cut), form=form)
        tail = subject.run(inputs.between(cut, inputs.length).replace(state=head.state), form=form)
        return Result(torch.cat([head.y, tail.y], dim=1), tail.state)

    agree(inputs, ("in two runs", "in one"), in_two, lambda inputs: subject.run(inputs, form=form))


def steps(subject: Subject, draw: Draw) -> None:
    """A step, which overwrites the state, is one token of the whole run."""
    inputs = draw(subject.inputs)
    inputs = inputs.between(0, min(inputs.length, 9))
    with torch.no_grad():
        whole = subject.run(inputs)
        start = subject.fresh(inputs) if inputs.state is None else inputs.state
        state = map_tensors(torch.clone, start)
        ys = [subject.run_step(inputs.between(t, t + 1), state) for t in range(inputs.length)]
        y = torch.stack(ys, dim=1) if ys else whole.y
    same(values(Result(y, state)), values(whole), ("step by step", "in one run"))


def packing(subject: Subject, draw: Draw) -> None:
    """Documents packed in one row equal separate runs, and so do their continuations from the returned states."""
    _packing(subject, draw)


def reversed_packing(subject: Subject, draw: Draw) -> None:
    """With reverse=True, too, documents packed in one row equal separate runs."""
    _packing(subject, draw, reverse=True)


def _packing(subject: Subject, draw: Draw, **reverse: Any) -> None:
    inputs = draw(subject.inputs)
    first = draw(documents(inputs.batch, inputs.length), "lengths")
    continued = not reverse and subject.causal and draw(st.booleans(), "continued")
    second = [inputs.length - length for length in first] if continued else []
    form = _draw_form(subject, draw, *reverse, "cu_seqlens")
    run: Callable[..., Result] = partial(subject.run, form=form, **reverse)

    def packed(inputs: Inputs) -> Result:
        ys, state = [], inputs.state
        for begin, lengths in (([0] * len(first), first), (first, second)):
            if lengths:
                row, borders = _pack(inputs, begin, lengths)
                y, state = run(row.replace(state=state), cu_seqlens=borders)
                ys.append(y)
        return Result(torch.cat(ys, dim=1), [_row(state, i) for i in range(inputs.batch)])

    def separate(inputs: Inputs) -> Result:
        ys: list[list[Tensor]] = [[], []]
        states = []
        for i in range(inputs.batch):
            document = inputs.rows(slice(i, i + 1))
            y, state = run(document.between(0, first[i]))
            ys[0].append(y)
            if second:
                y, state = run(document.between(first[i], inputs.length).replace(state=state))
                ys[1].append(y)
            states.append(state)
        return Result(torch.cat(ys[0] + ys[1], dim=1), states)

    agree(inputs, ("packed", "in separate runs"), packed, separate)


def causality(subject: Subject, draw: Draw) -> None:
    """The future never changes the past."""
    inputs = draw(subject.inputs)
    cut, form = draw(cuts(inputs.length), "cut"), _draw_form(subject, draw)
    other = inputs.each(lambda tensor: torch.cat([tensor[:, :cut], tensor.roll(1, dims=1)[:, cut:]], dim=1))
    with torch.no_grad():
        got, want = (subject.run(each, form=form).y[:, :cut] for each in (other, inputs))
    same({"y": got}, {"y": want}, ("with another future", "with the first"))


POISON = (math.nan, math.inf, -math.inf, 1e300)  # and a number whose square overflows


def containment(subject: Subject, draw: Draw) -> None:
    """What is not finite at one token reaches no earlier token, other row or other document, and does not vanish."""
    inputs = draw(subject.inputs.filter(lambda inputs: inputs.length > 0))
    name, row = draw(st.sampled_from(sorted(inputs.tokens)), "input"), draw(st.integers(0, inputs.batch - 1), "row")
    at, entry = draw(st.integers(0, inputs.length - 1), "token"), draw(st.integers(0, 11), "entry")
    poison = draw(st.sampled_from(POISON), "value")
    packed = subject.takes("cu_seqlens") and draw(st.booleans(), "packed")
    options = {"cu_seqlens"} if packed else set()
    found = [form for form in subject.forms_with(*options) if form != "triton"]  # which mixes the tokens of a chunk
    form = draw(st.sampled_from(found), "form") if found else None
    bad = inputs.tokens[name].clone()
    token = bad[row, at].reshape(-1)  # a view of it, or all of it for a token of one number
    token[entry % token.numel()] = poison
    poisoned = inputs.replace(tokens={**inputs.tokens, name: bad})
    lengths = [inputs.length] * inputs.batch

    def run(inputs: Inputs, form: str | None) -> Result:
        """With y [B T ...] again after packing."""
        if not packed:
            return subject.run(inputs, form=form)
        joined, borders = _pack(inputs, [0] * len(lengths), lengths)
        y, state = subject.run(joined, form=form, cu_seqlens=borders)
        return Result(y.unflatten(1, (inputs.batch, inputs.length))[0], state)

    def untouched(result: Result) -> Result:
        """What must not know of it: other rows, and of this one the tokens before."""
        others = [i for i in range(inputs.batch) if i != row]
        state = map_tensors(lambda leaf: leaf[others], result.state)
        before = result.y[row, :at] if subject.causal else result.y[row, :0]
        return Result(torch.cat([result.y[others].flatten(0, 1), before]), state)

    def contained(form: str | None) -> None:
        """Raise LawBroken unless this form holds it where it is."""
        got, want = (values_and_gradients(lambda each: untouched(run(each, form)), x) for x in (poisoned, inputs))
        shown = [key for key in want if not key.startswith("gradient")]
        same({key: got[key] for key in shown}, {key: want[key] for key in shown}, ("beside it", "without it"))
        for key in inputs.tokens:
            slopes = (found[f"gradient of {key}"] for found in (got, want))
            left, right = (torch.cat([slope[:row], slope[row + 1 :]]) for slope in slopes)
            same({f"gradient of {key}": left}, {f"gradient of {key}": right}, ("beside it", "without it"))
        met = at > 0 or inputs.state is not None  # the first gate meets a state of zeros, and forms may leave it out
        if met and form not in (None, "recurrent") and not math.isfinite(poison):
            with torch.no_grad():
                lost = ~run(poisoned, "recurrent").y.isfinite() & run(poisoned, form).y.isfinite()
            if lost.any():
                raise LawBroken(
                    f"y is not finite in the token loop at {lost.nonzero()[0].tolist()}, but as {form} it is"
                )

    def holds(form: str) -> bool:
        try:
            contained(form)
        except LawBroken:
            return False
        return True

    try:
        contained(form)
    except ValueError:  # refused, as a rate of more than 1 is
        reject()
    except LawBroken as broken:
        if form is None:
            raise
        holding = [f"form={other!r}" for other in found if other != form and holds(other)]
        raise LawBroken(f"{broken}; it holds with {' and '.join(holding) or 'none of its forms'}") from None


def linearity(subject: Subject, draw: Draw) -> None:
    """With the gates held fixed, outputs are linear in what is written and in the initial state together."""
    inputs = draw(subject.inputs)
    form = _draw_form(subject, draw)
    start = inputs.state if inputs.state is not None else _zero_state(subject, inputs)

    def at(weight: float, other_weight: float) -> Result:
        """The run on weight * these inputs + other_weight * others."""

        def mix(tensor: Tensor, salt: int) -> Tensor:
            return weight * tensor + other_weight * inputs.random(tensor, salt)

        written = {name: mix(inputs.tokens[name], salt) for salt, name in enumerate(inputs.linear, 2)}
        return subject.run(inputs.replace(tokens={**inputs.tokens, **written}, state=mix(start, 1)), form=form)

    with torch.no_grad():
        one, other, both = at(1, 0), at(0, 1), at(2, -3)
        summed = Result(2 * one.y - 3 * other.y, 2 * one.state - 3 * other.state)
    same(values(both), values(summed), ("for 2 a - 3 b", "as 2 (for a) - 3 (for b)"))


def chunk_sizes(subject: Subject, draw: Draw) -> None:
    """Chunk size does not matter."""
    inputs = draw(subject.inputs)
    small, large = draw(st.sampled_from([1, 2, 4, 8, 32]), "chunk"), draw(st.sampled_from([16, 64, 256]), "other chunk")
    ways = f"in chunks of {small}", f"in chunks of {large}"
    agree(inputs, ways, partial(subject.run, chunk_size=small), partial(subject.run, chunk_size=large))


def padding(subject: Subject, draw: Draw) -> None:
    """A token that keeps everything and writes nothing is the identity."""
    inputs = draw(subject.inputs)
    at, form = draw(cuts(inputs.length), "padding before"), _draw_form(subject, draw)

    def padded(inputs: Inputs) -> Result:
        def pad(name: str, tensor: Tensor) -> Tensor:
            idle = tensor.new_full((tensor.shape[0], 1, *tensor.shape[2:]), inputs.idle.get(name, 0.5))
            return torch.cat([tensor[:, :at], idle, tensor[:, at:]], dim=1)

        tokens = {name: pad(name, tensor) for name, tensor in inputs.tokens.items()}
        y, state = subject.run(inputs.replace(tokens=tokens), form=form)
        return Result(torch.cat([y[:, :at], y[:, at + 1 :]], dim=1), state)

    agree(inputs, ("with padding", "without"), padded, lambda inputs: subject.run(inputs, form=form))


def finiteness(subject: Subject, draw: Draw) -> None:
    """Outputs and gradients are finite whatever the gates are."""
    inputs = draw(subject.inputs)
    form = _draw_form(subject, draw)
    found = values_and_gradients(lambda inputs: subject.run(inputs, form=form), inputs)
    for name, tensor in found.items():
        finite(name, tensor, "in the run" if form is None else f"as {form}")


def resets(subject: Subject, draw: Draw) -> None:
    """A log decay of -inf forgets exactly, and its gradient is exactly 0."""
    inputs = draw(subject.inputs.filter(lambda inputs: inputs.length > 0))
    at, form = draw(st.integers(0, inputs.length - 1), "reset"), _draw_form(subject, draw)
    assert inputs.decay is not None
    log_decay = inputs.tokens[inputs.decay].clone()
    log_decay[:, at] = complex(-math.inf, 1) if log_decay.is_complex() else -math.inf
    forgetting = {name: inputs.tokens[name].clone() for name in inputs.forgets}
    for name, value in inputs.forgets.items():
        forgetting[name][:, at] = value
    inputs = inputs.replace(tokens={**inputs.tokens, **forgetting, inputs.decay: log_decay})
    found = values_and_gradients(lambda inputs: subject.run(inputs, form=form), inputs)
    slope = found[f"gradient of {inputs.decay}"][:, at]
    if not bool((slope == 0).all()):
        raise LawBroken(f"gradient of {inputs.decay} must be exactly 0 at a reset, got {slope.abs().max().item():.1e}")
    other = inputs.each(lambda tensor: torch.cat([tensor.roll(1, dims=1)[:, :at], tensor[:, at:]], dim=1))
    huge = 1e30 * inputs.random(_zero_state(subject, inputs))  # what is merely made small would show
    other = other.replace(state=huge) if subject.takes("initial_state") else other
    with torch.no_grad():
        got, want = (subject.run(each, form=form) for each in (other, inputs))
    after, other_after = (values(Result(y[:, at + 1 :], state)) for y, state in (got, want))
    same(after, other_after, ("after a reset, with one past", "with another"))


def gradients(subject: Subject, draw: Draw) -> None:
    """Gradients are the derivatives of the outputs: central differences in float64."""
    _slopes(subject, draw, lambda value, leaves: value)


def second_gradients(subject: Subject, draw: Draw) -> None:
    """Second gradients are the derivatives of the first."""

    def steepness(value: Tensor, leaves: list[Tensor]) -> Tensor:
        slopes = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
        return torch.stack([slope.abs().square().sum() for slope in slopes]).sum()

    _slopes(subject, draw, steepness)


def tangents(subject: Subject, draw: Draw) -> None:
    """Forward-mode derivatives are the transpose of the gradients, or are refused in words that name a form."""
    inputs = draw(subject.smooth_inputs)
    form = _draw_form(subject, draw)
    names, leaves, rebuild = leaves_of(inputs)
    directions = [inputs.random(leaf, 100 + i) for i, leaf in enumerate(leaves)]

    def number(*leaves: Tensor) -> Tensor:
        return weighed(inputs, values(subject.run(rebuild(leaves), form=form)))

    def departs(moving: Collection[str]) -> str:
        """What is wrong along the direction in which these inputs move; nothing if nothing is."""
        along = [direction * (name in moving) for name, direction in zip(names, directions, strict=True)]
        forward = torch.func.jvp(number, tuple(leaf.detach() for leaf in leaves), tuple(along))[1]
        terms = [(slope.conj() * step).real for slope, step in zip(slopes, along, strict=True)]
        claimed, size = (sum(float(f(term).sum()) for term in terms) for f in (torch.Tensor.double, torch.abs))
        right = abs(float(forward) - claimed) <= RELATIVE * size + ROUNDING * float(value.detach().abs())
        return "" if right else f"is {float(forward):.6g}, its gradient says {claimed:.6g}"

    value = number(*leaves)
    if value.requires_grad:
        slopes = torch.autograd.grad(value, leaves, materialize_grads=True)
    else:  # no token and a fresh state
        slopes = tuple(torch.zeros_like(leaf) for leaf in leaves)
    try:
        wrong = departs(names)
    except NotImplementedError as error:
        if "form" not in str(error):
            raise
        return
    if wrong:
        culprits = [(name, text) for name in names if (text := departs([name]))]
        name, wrong = culprits[0] if culprits else ("all inputs together", wrong)
        raise LawBroken(f"along a random direction the forward-mode derivative by {name} {wrong}")


def lengths(subject: Subject, draw: Draw) -> None:
    """Compiled with dynamic=True it is at most two graphs, whatever the length, and equals the plain run."""
    inputs = _as_long_as(draw(st.integers(65, 130), "T"), subject.sample)
    with torch.no_grad():
        want = plain(subject)(**inputs.tokens)
        got = subject.compiled(**inputs.tokens) if len(subject.graphs) <= 2 else None
    if got is None or len(subject.graphs) > 2:
        raise LawBroken(f"it is compiled anew for further lengths: {len(subject.graphs)} graphs so far")
    same(values(Result(*got)), values(Result(*want)), ("compiled", "run plainly"))


def low_precision(subject: Subject, draw: Draw) -> None:
    """In 16 bits no form errs more than twice as much as the definition with operands rounded at the same points."""
    inputs = draw(subject.inputs)
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16]), "dtype")
    form = draw(st.sampled_from([form for form in subject.forms if form != "recurrent"]), "form")
    low = subject.rounded(inputs, dtype)
    truth = values_and_gradients(subject.run, inputs.replace(state=inputs.state if low.state is not None else None))
    got = values_and_gradients(lambda low: subject.run(low, form=form), low)
    references = [values_and_gradients(definition, low) for definition in subject.definitions]
    terms = sum(tensor.numel() for tensor in (*inputs.tokens.values(), *inputs.constants.values()))
    for kind in (False, True):
        chosen = {name: exact for name, exact in truth.items() if name.startswith("gradient") is kind and exact.numel()}
        scale = max((float(exact.abs().max()) for exact in chosen.values()), default=0.0)
        noise = torch.finfo(torch.float32).eps * terms * scale  # of float32 sums, where what is exact is small or 0
        for name, exact in chosen.items():
            error, *allowed = (
                float((run[name].to(exact.dtype) - exact).abs().max()) for run in (got, *references)
            )  # not finite past the largest float16, for the definition as well
            if all(map(math.isfinite, allowed)) and not error <= 2 * max(allowed) + noise:
                raise LawBroken(f"{name} errs by {error:.2e} as {form}, but the definition only by {max(allowed):.2e}")


def rows(subject: Subject, draw: Draw) -> None:
    """Rows of a batch do not see each other."""
    inputs = draw(subject.inputs)
    order = draw(st.permutations(range(inputs.batch)), "order")
    row, form = draw(st.sampled_from(order), "row"), _draw_form(subject, draw)
    index = torch.tensor(order)
    with torch.no_grad():
        whole = subject.run(inputs, form=form)
        shuffled = subject.run(inputs.rows(index), form=form)
        alone = subject.run(inputs.rows(slice(row, row + 1)), form=form)
    want = Result(whole.y[index], map_tensors(lambda leaf: leaf[index], whole.state))
    same(values(shuffled), values(want), ("shuffled", "in order"))
    want = Result(whole.y[row : row + 1], _row(whole.state, row))
    same(values(alone), values(want), ("alone", "in a batch"))


def heads(subject: Subject, draw: Draw) -> None:
    """Heads do not see each other: one alone gives what it gives among others."""
    inputs = draw(subject.inputs.filter(lambda inputs: inputs.heads))
    given = {**inputs.tokens, **inputs.constants}
    count = min(tensor.shape[inputs.heads[name]] for name, tensor in given.items() if name in inputs.heads)
    unit, form = draw(st.integers(0, count - 1), "head"), _draw_form(subject, draw)

    def one(name: str, tensor: Tensor) -> Tensor:
        if name not in inputs.heads:
            return tensor
        axis = inputs.heads[name]
        each = tensor.shape[axis] // count
        return tensor.narrow(axis, unit * each, each)

    alone = inputs.replace(
        tokens={name: one(name, tensor) for name, tensor in inputs.tokens.items()},
        constants={name: one(name, tensor) for name, tensor in inputs.constants.items()},
        state=map_tensors(lambda leaf: one("state", leaf), inputs.state),
    )
    with torch.no_grad():
        whole = subject.run(inputs, form=form)
        got = subject.run(alone, form=form)
    same(values(got), {"y": one("y", whole.y), "state": one("state", whole.state)}, ("alone", "among others"))


def reversal(subject: Subject, draw: Draw) -> None:
    """reverse=True equals flip, scan, flip."""
    inputs = draw(subject.inputs)
    form = _draw_form(subject, draw, "reverse")

    def flipped(inputs: Inputs) -> Result:
        y, state = subject.run(inputs.each(lambda tensor: tensor.flip(1)), form=form)
        return Result(y.flip(1), state)

    reverse = partial(subject.run, form=form, reverse=True)
    agree(inputs, ("with reverse=True", "flipped by hand"), reverse, flipped)


def promises(subject: Subject, draw: Draw) -> None:
    """Outputs have the shape, dtype and device that are promised; states are at least float32 and can be fed back."""
    inputs = draw(subject.inputs)
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), "dtype")
    low = inputs if dtype == torch.float64 else subject.rounded(inputs, dtype)
    x = low.tokens[low.like]
    y, state = subject.run(low)
    shape = x.shape if low.shape is None else (*x.shape[:2], *low.shape)
    _promised("y", y, shape, low.output_dtype, x.device)
    want = named("state", subject.promised_state(inputs, state, dtype))
    for name, leaf in named("state", state).items():
        _promised(name, leaf, want[name].shape, want[name].dtype, x.device)
    if subject.causal:
        for name, leaf in named("state", subject.run(low.replace(state=state)).state).items():
            _promised(name, leaf, want[name].shape, want[name].dtype, x.device)


def summaries(subject: Subject, draw: Draw) -> None:
    """Summaries of neighbouring stretches combine, in any grouping, and advance a state as the scan does."""
    inputs = draw(subject.inputs.filter(lambda inputs: inputs.length >= 1))
    one, two = sorted((draw(cuts(inputs.length), "cut"), draw(cuts(inputs.length), "second cut")))
    start = inputs.state if inputs.state is not None else _zero_state(subject, inputs)
    summarise, reads, wide = subject.summary, ("k", "v", "log_decay", "beta"), ("erase", "remove", "write")
    assert summarise is not None

    def of(begin: int, end: int) -> Any:
        stretch = inputs.between(begin, end)
        given = {**stretch.tokens, **stretch.constants}
        return summarise(**{name: given.get(name) for name in (*reads, *(name for name in wide if name in given))})

    left, middle, right = of(0, one), of(one, two), of(two, inputs.length)
    grouped, other = combine(combine(left, middle), right), combine(left, combine(middle, right))
    for name in grouped._fields:
        same({name: getattr(grouped, name)}, {name: getattr(other, name)}, ("as (a b) c", "as a (b c)"))
    whole = subject.run(inputs.replace(state=start)).state
    same({"state": advance(grouped, start)}, {"state": whole}, ("by summaries", "by the scan"))


def serialisation(subject: Subject, draw: Draw) -> None:
    """A recipe's JSON round trip gives the same recipe and the same layer."""
    assert isinstance(subject, Layer)
    inputs, recipe = draw(subject.inputs), subject.recipe
    classes = {type(part) for part in parts_of(recipe.parts)}
    back = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())), parts=classes)
    if back != recipe:
        raise LawBroken(f"the recipe that came back differs:\n{back}\nfrom\n{recipe}")
    again = Layer(back, subject.dim, subject.depth)
    with torch.no_grad():
        same(values(again.run(inputs)), values(subject.run(inputs)), ("after the round trip", "before"))


def one_way(subject: Subject, draw: Draw) -> None:
    """A recipe that reads the future refuses to start from a state or to step."""
    assert isinstance(subject, Layer)
    inputs = draw(subject.inputs)
    state = subject.run(inputs).state
    refused = {
        "init_state": lambda: subject.module.init_state(inputs.batch),
        "a state": lambda: subject.run(inputs.replace(state=state)),
    }
    for what, call in refused.items():
        try:
            call()
        except RecipeError:
            continue
        raise LawBroken(f"{what} was accepted, though the recipe is not causal")


def _draw_form(subject: Subject, draw: Draw, *options: str) -> str | None:
    """A form that the subject has when it is called with these options."""
    found = subject.forms_with(*options)
    return draw(st.sampled_from(found), "form") if found else None


def _row(state: Any, row: int) -> Any:
    return map_tensors(lambda leaf: leaf[row : row + 1], state)


def _pack(inputs: Inputs, begin: list[int], lengths: list[int]) -> tuple[Inputs, Tensor]:
    """Tokens begin_i .. begin_i + length_i - 1 of every row i in one row, and their borders."""

    def pack(tensor: Tensor) -> Tensor:
        pieces = (tensor[i, b : b + length] for i, (b, length) in enumerate(zip(begin, lengths, strict=True)))
        return torch.cat(list(pieces))[None]

    return inputs.each(pack), torch.tensor([0, *accumulate(lengths)])


def _as_long_as(length: int, inputs: Inputs) -> Inputs:
    """The tokens over and over."""
    index = torch.arange(length) % inputs.length
    return inputs.each(lambda tensor: tensor[:, index])


def _zero_state(subject: Subject, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return torch.zeros_like(subject.run(inputs.replace(state=None)).state)


def _slopes(subject: Subject, draw: Draw, of: Callable[[Tensor, list[Tensor]], Tensor]) -> None:
    """Raise LawBroken unless the derivative of a number along a random direction is what its gradient says.

    The number is `of` a random linear function of the outputs for a few tokens.
    """
    inputs = draw(subject.smooth_inputs.filter(lambda inputs: inputs.length > 0)).rows(slice(0, 2))
    inputs = inputs.between(0, min(inputs.length, 3))
    form = _draw_form(subject, draw)
    names, leaves, rebuild = leaves_of(inputs)

    def number(leaves: list[Tensor]) -> Tensor:
        return of(weighed(inputs, values(subject.run(rebuild(leaves), form=form))), leaves)

    value = number(leaves)
    if not value.requires_grad:  # linear all the way: nothing is left to differentiate
        return
    slopes = torch.autograd.grad(value, leaves, materialize_grads=True)
    normal = [inputs.random(leaf, 100 + i) for i, leaf in enumerate(leaves)]
    directions = [STEP * direction / direction.abs().clamp(min=1) for direction in normal]  # no entry beyond STEP

    def departs(moving: Collection[str]) -> str:
        """What is wrong along the direction in which these inputs move; nothing if nothing is."""
        along = [direction * (name in moving) for name, direction in zip(names, directions, strict=True)]
        ahead = number([leaf + step for leaf, step in zip(leaves, along, strict=True)]).item()
        behind = number([leaf - step for leaf, step in zip(leaves, along, strict=True)]).item()
        terms = [(slope.conj() * step).real for slope, step in zip(slopes, along, strict=True)]
        measured, claimed = (ahead - behind) / 2, sum(float(term.sum()) for term in terms)
        allowed = 1e-6 * sum(float(term.abs().sum()) for term in terms) + 1e-7 * STEP * (abs(ahead) + abs(behind))
        if abs(measured - claimed) <= allowed:
            return ""
        return f"is {measured / STEP:.6g}, its gradient says {claimed / STEP:.6g}"

    if wrong := departs(names):
        culprits = [(name, text) for name in names if (text := departs([name]))]
        name, wrong = culprits[0] if culprits else ("all inputs together", wrong)
        raise LawBroken(f"along a random direction the derivative by {name} {wrong}")


def _promised(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    got, want = (tuple(tensor.shape), tensor.dtype, tensor.device), (tuple(shape), dtype, device)
    if got != want:
        raise LawBroken(f"{name} must be {want[0]} {want[1]} on {want[2]}, got {got[0]} {got[1]} on {got[2]}")


def _twice_differentiable(subject: Subject) -> bool:
    """Whether second gradients exist: torch says so itself where they do not (fused attention)."""
    inputs = subject.sample
    _, leaves, rebuild = leaves_of(inputs)
    slopes = torch.autograd.grad(
        weighed(inputs, values(subject.run(rebuild(leaves)))), leaves, create_graph=True, materialize_grads=True
    )
    try:
        torch.stack([slope.abs().sum() for slope in slopes]).sum().backward()
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        return False
    return True


def _serialisable(subject: Subject) -> bool:
    if not isinstance(subject, Layer):
        return False
    try:
        subject.recipe.to_dict()
    except RecipeError:
        return False
    return True


LAWS: dict[Callable[[Subject, Draw], None], Callable[[Subject], bool]] = {
    promises: lambda subject: True,
    forms: lambda subject: len(subject.forms) > 1,
    splits: lambda subject: subject.causal and subject.takes("initial_state"),
    steps: lambda subject: subject.causal and subject.step is not None,
    packing: lambda subject: subject.takes("cu_seqlens"),
    causality: lambda subject: subject.causal,
    containment: lambda subject: True,
    linearity: lambda subject: subject.draws("linear") and subject.takes("initial_state"),
    chunk_sizes: lambda subject: subject.takes("chunk_size"),
    padding: lambda subject: subject.draws("idle"),
    finiteness: lambda subject: True,
    resets: lambda subject: subject.draws("decay"),
    gradients: lambda subject: subject.exact_gradients,
    tangents: lambda subject: True,
    lengths: lambda subject: not (isinstance(subject, Layer) and subject.in_grid),
    second_gradients: lambda subject: subject.exact_gradients and _twice_differentiable(subject),
    low_precision: lambda subject: len(subject.forms) > 1 and "recurrent" in subject.forms,
    rows: lambda subject: True,
    heads: lambda subject: subject.draws("heads"),
    reversal: lambda subject: subject.takes("reverse"),
    reversed_packing: lambda subject: subject.takes("reverse") and subject.takes("cu_seqlens"),
    summaries: lambda subject: subject.summary is not None,
    serialisation: _serialisable,
    one_way: lambda subject: isinstance(subject, Layer) and not subject.causal,
}
