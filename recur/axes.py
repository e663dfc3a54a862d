"""Axis expressions of a recipe: "2*D", "ceil(D/16)", "int(1.8*D)//H*H". Parsed, never evaluated as code, bounded."""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping
from numbers import Real

Spec = tuple[str, ...]  # the trailing axes of a tensor [B T ...], one expression each

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
OPERATORS |= {ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow}
FUNCTIONS: dict[str, Callable[..., int | float]] = {
    "ceil": math.ceil,
    "int": int,
    "max": max,
    "min": min,
    "round": round,
    "sqrt": math.sqrt,
}
# A recipe may come from a file that someone else wrote. Characters of an expression, letters of a recipe, letters and
# operators inside one another, and the largest number: with all four bounded, so is the work.
LONGEST, LETTERS, DEEPEST, LARGEST = 200, 100, 100, 2**63


class RecipeError(ValueError):
    """A recipe whose parts, names or axes do not fit.

    >>> recur.Recipe(recur.blocks.Project("u", y="D"))
    Traceback (most recent call last):
    recur.axes.RecipeError: part 1 Project reads 'u', which nobody wrote; available: x
    """


def spec(axes: str) -> Spec:
    """The axes of a pattern such as "H K"; each is an integer, a letter or an expression without spaces.

    Raises: RecipeError if the pattern is not a string.
    """
    if not isinstance(axes, str):
        raise RecipeError(f'axes: a pattern must be a string such as "H K", got {shown(axes)}')
    return tuple(axes.split())


def letters(expression: str | int | float) -> set[str]:
    """The axis letters an expression mentions. Raises: RecipeError if it is none."""
    return {node.id for node in ast.walk(parse(expression)) if isinstance(node, ast.Name)} - set(FUNCTIONS)


def evaluate(expression: str | int | float, axes: Mapping[str, str | int]) -> int | float:
    """The value of an expression, with axis letters looked up in `axes`, whose own values may be expressions.

    Cost: every letter is evaluated once.
    Raises: RecipeError for an unknown letter, for anything that is not + - * / // ** and FUNCTIONS, for a cycle, for a
        value that is not a real number (an integer below 2^63, or a finite float), and for what is too long or deep.
    """
    values: dict[str, int | float] = {}

    def letter(name: str, inside: str, depth: int, pending: frozenset[str]) -> int | float:
        if name not in axes:
            raise RecipeError(f"axes: {inside} mentions {name}, which is not among {', '.join(axes)}")
        if name in pending:
            raise RecipeError(f"axes: {name} is defined by itself, {name} = {shown(axes[name])}")
        if name not in values:
            values[name] = value(parse(axes[name]), shown(axes[name]), depth, pending | {name})
        return values[name]

    def value(node: ast.AST, inside: str, depth: int, pending: frozenset[str]) -> int | float:
        if depth > DEEPEST:
            raise RecipeError(f"axes: {inside} must have at most {DEEPEST} letters and operators inside one another")

        def argument(of: ast.AST) -> int | float:
            return value(of, inside, depth + 1, pending)

        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return _bounded(number, inside)
            case ast.Name(id=name):
                return letter(name, inside, depth + 1, pending)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return _applied(OPERATORS[type(op)], (argument(left), argument(right)), inside)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -argument(operand)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
                return _applied(FUNCTIONS[name], tuple(map(argument, args)), inside)
        raise RecipeError(
            f"axes: {inside} must be built from numbers, axis letters, + - * / // ** {', '.join(FUNCTIONS)}"
        )

    return value(parse(expression), shown(expression), 0, frozenset())


def size(expression: str | int, axes: Mapping[str, str | int]) -> int:
    """The size of one axis. Raises: RecipeError unless it is a positive integer."""
    result = evaluate(expression, axes)
    if result != int(result) or result < 1 or result >= LARGEST:
        known = ", ".join(f"{name}={definition}" for name, definition in axes.items() if name != expression)
        rule = f"{expression} = {axes[str(expression)]}" if expression in axes else expression
        raise RecipeError(f"axes: {rule} must be a positive integer, got {result:g} with {known}")
    return int(result)


def shown(value: object) -> str:
    """What stands in a message for something of any length or kind."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep; an integer of too many digits to print
        text = f"a {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:60]} ... {text[-20:]}"


def parse(expression: str | int | float) -> ast.expr:
    """The tree of an expression.   Raises: RecipeError if it is none, or longer than allowed."""
    if isinstance(expression, float) and not math.isfinite(expression):
        raise RecipeError(f"axes: {expression} is not a size; a number must be finite")
    if isinstance(expression, bool) or not isinstance(expression, (str, Real)):
        raise RecipeError(f'axes: {shown(expression)} is not an expression; give a number or a string such as "D/H"')
    try:
        text = str(expression)
    except ValueError:  # an integer of more digits than Python prints
        raise RecipeError("axes: a number must be below 2^63, got one of thousands of digits") from None
    if len(text) > LONGEST:
        raise RecipeError(f"axes: {shown(text)} must have at most {LONGEST} characters, got {len(text)}")
    return _parse(text)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # zero bytes; the parser's own limits of depth
        raise RecipeError(f"axes: {text!r} is not an expression") from None


def _applied(function: Callable[..., int | float], arguments: tuple[int | float, ...], inside: str) -> int | float:
    """The result of an operator or a function.   Raises: RecipeError if there is none, or none below 2^63."""
    if function is operator.pow:
        base, exponent = arguments
        whole = isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1
        if whole and exponent * int(base).bit_length() > 128:  # |base| >= 2^(bits / 2): above 2^64, perhaps endless
            _bounded(math.inf, inside)
    try:
        result = function(*arguments)
    except (ArithmeticError, ValueError, TypeError) as error:  # 1/0, sqrt(-1), max(1)
        raise RecipeError(f"axes: {inside} has no value: {error}") from None
    if not isinstance(result, (int, float)):
        raise RecipeError(f"axes: {inside} has no real value, got {result}")  # (-1)**0.5
    return _bounded(result, inside)


def _bounded(number: int | float, inside: str) -> int | float:
    if abs(number) < LARGEST if isinstance(number, int) else math.isfinite(number):
        return number
    raise RecipeError(f"axes: {inside} must stay below 2^63 and finite, also between its operations")
