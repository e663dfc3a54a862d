"""Axis expressions of a recipe: "2*D", "ceil(D/16)", "int(1.8*D)//H*H". Parsed, never evaluated as code."""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping

Spec = tuple[str, ...]  # the trailing axes of a tensor [B T ...], one expression each

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
OPERATORS |= {ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow}
FUNCTIONS: dict[str, Callable[..., int | float]] = {
    "ceil": math.ceil,
    "int": int,
    "max": max,
    "min": min,
    "sqrt": math.sqrt,
}


class RecipeError(ValueError):
    """A recipe whose parts, names or axes do not fit."""


def spec(axes: str) -> Spec:
    """The axes of a pattern such as "H K"; each is an integer, a letter or an expression without spaces."""
    return tuple(axes.split())


def letters(expression: str | int | float) -> set[str]:
    """The axis letters an expression mentions. Raises: RecipeError if it is none."""
    return {node.id for node in ast.walk(_parse(expression)) if isinstance(node, ast.Name)} - set(FUNCTIONS)


def evaluate(expression: str | int | float, axes: Mapping[str, str | int]) -> int | float:
    """The value of an expression, axis letters being looked up (and evaluated in their turn) in `axes`.

    Raises: RecipeError for an unknown letter, for anything that is not + - * / // ** and FUNCTIONS, or for a cycle.
    """

    def value(node: ast.AST, pending: frozenset[str]) -> int | float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.Name(id=name):
                if name not in axes:
                    raise RecipeError(f"axes: {expression!r} mentions {name}, which is not among {', '.join(axes)}")
                if name in pending:
                    raise RecipeError(f"axes: {name} is defined by itself")
                return value(_parse(axes[name]), pending | {name})
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left, pending), value(right, pending))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand, pending)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
                return FUNCTIONS[name](*(value(argument, pending) for argument in args))
        raise RecipeError(
            f"axes: {expression!r} must be built from numbers, axis letters, + - * / // ** {', '.join(FUNCTIONS)}"
        )

    return value(_parse(expression), frozenset())


def size(expression: str | int, axes: Mapping[str, str | int]) -> int:
    """The size of one axis. Raises: RecipeError unless it is a positive integer."""
    result = evaluate(expression, axes)
    if result != int(result) or result < 1:
        known = ", ".join(f"{name}={definition}" for name, definition in axes.items() if name != expression)
        rule = f"{expression} = {axes[str(expression)]}" if expression in axes else expression
        raise RecipeError(f"axes: {rule} must be a positive integer, got {result:g} with {known}")
    return int(result)


@functools.lru_cache(maxsize=1024)
def _parse(expression: str | int | float) -> ast.expr:
    try:
        return ast.parse(str(expression), mode="eval").body
    except SyntaxError:
        raise RecipeError(f"axes: {expression!r} is no expression") from None
