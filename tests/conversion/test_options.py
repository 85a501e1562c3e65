"""Options of a conversion: divided between planning and execution, and known by their names."""

from __future__ import annotations

import inspect

import pytest

from jaxshard.conversion.execute import execute
from jaxshard.conversion.prepare import ConvertOptions, prepare, split, takes_options


def test_every_option_is_an_argument_of_prepare_or_of_execute():
    names = ConvertOptions.__optional_keys__
    plan, run = split(dict.fromkeys(names))
    assert plan.keys() | run.keys() == names
    assert not plan.keys() & run.keys()
    assert plan.keys() <= inspect.signature(prepare).parameters.keys()
    assert run.keys() <= inspect.signature(execute).parameters.keys()


def test_an_unknown_option_is_an_error_of_the_function_that_was_called():
    @takes_options(prepare, execute)
    def verb(source, **options):
        return options

    assert verb("a", overwrite=True) == {"overwrite": True}
    with pytest.raises(TypeError, match=r"^verb\(\) got an unexpected .* 'max_shard'"):
        verb("a", max_shard=1)
