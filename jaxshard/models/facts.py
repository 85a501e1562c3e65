"""Numbers of ``config.json``, and expressions of them: lengths of axes, ranges of layers.

hidden_size / num_attention_heads           exact: the divisor must divide
head_dim or hidden_size / num_attention_heads
rope_scaling.rope_type == 'llama3' and not use_mla
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

from ..core.runtime import cached
from ..errors import FormatError, LayoutError

Config = Mapping[str, Any]
Value = int | float | str | bool | None
#: Returns the value of a name that is not a key of the configuration, or None.
Lookup = Callable[[str], Value]

_MAX_CHARACTERS = 500
_NESTED = (
    ("text_config",),
    ("llm_config",),
    ("language_config",),
    ("thinker_config", "text_config"),
    ("vlm_config", "text_config"),
)
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], int | float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def text_config(config: Config) -> Config:
    """Return the part of ``config.json`` for the text model, or all of it.

    >>> text_config({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})
    {'model_type': 'gemma3_text'}
    """
    for path in _NESTED:
        found: Any = config
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping):
            return found
    return config


def text_type(config: Config) -> str | None:
    """Return the ``model_type`` of the text model in ``config.json``, if it is a string.

    >>> text_type({"text_config": {"model_type": "gemma3_text"}}), text_type({"model_type": []})
    ('gemma3_text', None)
    """
    kind = text_config(config).get("model_type")
    return kind if isinstance(kind, str) and kind else None


def evaluate(text: str, config: Config, lookup: Lookup = lambda name: None) -> Value:
    """Return the value of an expression; None if it needs a key that is missing.

    Args:
        text: keys of ``config`` (dotted for nested ones), numbers, texts in quotes,
            ``+ - * / // %``, comparisons, ``and``, ``or``, ``not``, ``min``, ``max``, ``sqrt``.
        config: ``config.json``.
        lookup: the value of a name that is not a key of ``config``.

    Raises:
        LayoutError: not such an expression.
        FormatError: ``config.json`` has a value that does not fit.

    >>> evaluate("head_dim or hidden_size / heads", {"hidden_size": 32, "heads": 4})
    8
    """
    return _Evaluation(text, config, lookup).of(_parsed(text))


def number(
    text: str, config: Config, lookup: Lookup = lambda name: None, least: int = 0
) -> int | None:
    """Return the value of ``text`` as an integer of ``least`` or more; None if a key is missing.

    Raises:
        LayoutError, FormatError: as ``evaluate``, and for a value that is not a length.
    """
    found = evaluate(text, config, lookup)
    if found is None or (type(found) is int and found >= least):
        return found
    raise FormatError(
        f"config.json: {text} is {str(found)[:40]}, not a number of {least} or more. "
        "Fetch it again."
    )


def names_in(text: str) -> tuple[str, ...]:
    """Return the names in an expression: keys of ``config.json`` and others.

    >>> names_in("head_dim or hidden_size / num_attention_heads")
    ('head_dim', 'hidden_size', 'num_attention_heads')
    """
    found = (ast.unparse(n) for n in ast.walk(_parsed(text)) if isinstance(n, ast.Name))
    return tuple(dict.fromkeys(found))


@cached(1024)
def _parsed(text: str) -> ast.expr:
    try:
        if len(text) > _MAX_CHARACTERS:
            raise SyntaxError
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise LayoutError(
            f"{text[:80]!r} is not an expression of keys of config.json and numbers, such as "
            "hidden_size / num_attention_heads."
        ) from None


class _Evaluation:
    """Evaluates one expression."""

    def __init__(self, text: str, config: Config, lookup: Lookup) -> None:
        self._text, self._config, self._lookup = text, config, lookup

    def of(self, node: ast.expr) -> Value:
        found: Value
        match node:
            case ast.Constant(value=int() | float() | str() | None as value):
                found = value
            case ast.Name() | ast.Attribute():
                found = self._named(ast.unparse(node))
            case ast.UnaryOp(op=ast.Not()):
                found = not self.of(node.operand)
            case ast.BoolOp():
                found = self._either(node)
            case ast.Compare(ops=[op], comparators=[other]) if type(op) in _COMPARISONS:
                found = self._compared(type(op), self.of(node.left), other)
            case ast.BinOp():
                found = self._computed(node)
            case ast.Call(func=ast.Name(id="min" | "max" | "sqrt" as name), keywords=[]):
                found = self._called(name, [self.of(a) for a in node.args])
            case _:
                raise LayoutError(f"{self._text!r}: {ast.unparse(node)[:60]!r} is not supported.")
        return found

    def _named(self, name: str) -> Value:
        found: Any = self._config
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is None:
            return self._lookup(name)
        if type(found) is int and found < 0:
            raise FormatError(
                f"config.json: {name} is {found}, not a number of 0 or more. Fetch it again."
            )
        if isinstance(found, int | float | str):
            return found
        return len(found) if isinstance(found, list | tuple) else True

    def _either(self, node: ast.BoolOp) -> Value:
        found: Value = None
        for value in node.values:
            found = self.of(value)
            is_missing = found is None or found is False  # 0 is a number
            if is_missing != isinstance(node.op, ast.Or):
                break
        return found

    def _compared(self, op: type[ast.cmpop], left: Value, other: ast.expr) -> bool:
        right: Any
        if isinstance(other, ast.Tuple | ast.List):
            right = [self.of(x) for x in other.elts]
        else:
            right = self.of(other)
        try:
            return _COMPARISONS[op](left, right)
        except TypeError:
            return False

    def _computed(self, node: ast.BinOp) -> int | float | None:
        left, right = self._numeric(node.left), self._numeric(node.right)
        if left is None or right is None:
            return None
        if isinstance(node.op, ast.Div):
            return self._quotient(left, right)
        if type(node.op) not in _ARITHMETIC:
            raise LayoutError(f"{self._text!r}: write + - * / // % between numbers.")
        if not right and isinstance(node.op, ast.FloorDiv | ast.Mod):
            raise FormatError(f"config.json: {self._text} divides by 0. Fetch it again.")
        return _ARITHMETIC[type(node.op)](left, right)

    def _quotient(self, left: int | float, right: int | float) -> int:
        if not right or left % right:
            raise FormatError(
                f"config.json: {self._text}: {left} is not divisible by {right}. Fetch it again."
            )
        return int(left // right)

    def _numeric(self, node: ast.expr) -> int | float | None:
        found = self.of(node)
        if found is None or isinstance(found, int | float):
            return found
        raise FormatError(
            f"config.json: {ast.unparse(node)} is {found[:40]!r}, not a number. Fetch it again."
        )

    def _called(self, name: str, values: list[Value]) -> int | float | None:
        numbers = [v for v in values if isinstance(v, int | float)]
        if len(numbers) < len(values) or not numbers:
            return None
        if name == "sqrt":
            return sqrt(numbers[0])
        return min(numbers) if name == "min" else max(numbers)
