"""Keyword arguments of a conversion: what they may be, and functions that pass them on."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ParamSpec, TypedDict, TypeVar, cast

if TYPE_CHECKING:
    from ..mapping import Mapping
    from ..rules import Policy, Rules
    from .open import PathLike

_P = ParamSpec("_P")
_R = TypeVar("_R")


class ResultOptions(TypedDict, total=False):
    """Options that decide a conversion's result and its plan; ``prepare`` documents them."""

    src_strategy: PathLike | None
    suffix: str | None
    rules: Rules | None
    names: Mapping | str | None
    unmatched: Policy
    uneven: Policy
    include: Iterable[str]
    exclude: Iterable[str]
    drop_prefix: Iterable[str]
    keep_accu_grads: bool
    rank: int | Iterable[int] | None
    max_shard_size: int | str | None
    prefix: str
    step: str | None
    remove_redundancy: bool
    format: str | None
    crc: bool
    checksums: bool
    workers: int | None
    host_bytes: int | str | None


class RunOptions(TypedDict, total=False):
    """Options that decide how a plan is carried out; ``execute`` documents them."""

    resume: bool
    overwrite: bool
    fsync: bool
    process_index: int | str | None
    process_count: int | str | None
    check_replicas: bool


class ConvertOptions(ResultOptions, RunOptions, total=False):
    """All options of a conversion."""


def split(options: ConvertOptions) -> tuple[ResultOptions, RunOptions]:
    """Divide ``options`` into those of ``prepare`` and those of ``execute``.

    >>> split({"overwrite": True, "exclude": "lora"})
    ({'exclude': 'lora'}, {'overwrite': True})
    """
    result = {n: v for n, v in options.items() if n in ResultOptions.__optional_keys__}
    run = {n: v for n, v in options.items() if n in RunOptions.__optional_keys__}
    return cast("ResultOptions", result), cast("RunOptions", run)


def takes_options(
    *documented: Callable[..., object],
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Let a function's ``**options`` be ``ConvertOptions``, whose defaults ``documented`` have.

    ``help`` and editors then show every option with its default, and an unknown one is a TypeError
    with the name of the function that the caller typed, not of one that it calls.
    """
    known = {n: p for f in documented for n, p in inspect.signature(f).parameters.items()}
    options = {n: known[n] for n in known if n in ConvertOptions.__optional_keys__}

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        bare = inspect.signature(function)
        own = {n: p for n, p in bare.parameters.items() if p.kind is not p.VAR_KEYWORD}
        signature = bare.replace(parameters=[*own.values(), *options.values()])

        @functools.wraps(function)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            for name in kwargs:
                if name not in signature.parameters:
                    raise TypeError(
                        f"{function.__name__}() got an unexpected keyword argument {name!r}"
                    )
            return function(*args, **kwargs)

        cast("Any", checked).__signature__ = signature
        return checked

    return decorate
