"""Matching: the spec of each name, asked of the patterns once per kind of name.

Ninety thousand names are a few dozen kinds that differ in layer and expert numbers:

    model.layers.17.mlp.experts.203.up_proj.weight
    model.layers.#.mlp.experts.#.up_proj.weight       its template

Some names follow another tensor's rule: optimizer states, scales of quantised weights
and adapters (LoRA). This module knows no sizes and no ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .quantization import is_setting
from .table import Glob, Rules, Spec

#: Optimizer states and gradients lie as the weight does whose name follows.
OPTIMIZER_PREFIXES = (
    "adam_m.",
    "adam_v.",
    "accu_grads.",
    "moment1.",
    "moment2.",
    "exp_avg.",
    "exp_avg_sq.",
)
_STATE = re.compile("|".join(map(re.escape, OPTIMIZER_PREFIXES)))
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a dotted name
_SENSITIVE = re.compile(r"(?:^|[.*])\d+(?:$|[.*])")  # a pattern that could tell two numbers apart
_ADAPTER = re.compile(  # as peft, MindFormers and mindpet call them, in files and in memory
    r"(?P<base>.+?)\."
    r"(?P<part>lora_embedding_[AB]|lora_magnitude_vector|lora_[AB]|(?:mindpet_delta_)?lora_[ab])"
    r"(?:\.[^.]+)?(?:\.weight)?"
)
_SCALE = re.compile(r"(?P<base>.+)_scale_inv")


def weight_name(name: str) -> str:
    """``name`` without the prefix of an optimizer state.

    >>> weight_name("adam_m.lm_head.weight")
    'lm_head.weight'
    """
    state = _STATE.match(name)
    return name[state.end() :] if state else name


def is_part_of_adapter(name: str) -> bool:
    """Whether ``name`` is a matrix of a low-rank adapter, or an optimizer state of one.

    >>> is_part_of_adapter("adam_m.layers.0.wq.lora_a"), is_part_of_adapter("lora.wq.weight")
    (True, False)
    """
    return _ADAPTER.fullmatch(weight_name(name)) is not None


def template(name: str) -> str:
    """``name`` with ``#`` for its numbers; ``w1`` is a word, not a number.

    >>> template("layers.3.feed_forward.w1.weight")
    'layers.#.feed_forward.w1.weight'
    """
    return _NUMBER.sub("#", name)


class Patterns:
    """An ordered list of patterns, each asked once per template.

    A pattern with a number in it (``layers.0.*``) can tell names of one template apart,
    so those few are asked every time.

    Attributes:
        num_asked: how many times a pattern was compared with a name.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        compiled = [(i, Glob(p), bool(_SENSITIVE.search(p))) for i, p in enumerate(patterns)]
        self._plain = [(i, p) for i, p, sensitive in compiled if not sensitive]
        self._sensitive = [(i, p) for i, p, sensitive in compiled if sensitive]
        self._known: dict[str, int | None] = {}
        self.num_asked = 0

    def find(self, name: str, kind: str) -> int | None:
        """The number of the first pattern that matches ``name``, whose template is ``kind``."""
        if kind not in self._known:
            self._known[kind] = self._ask(self._plain, name)
        plain = self._known[kind]
        if not self._sensitive:
            return plain
        special = self._ask(self._sensitive, name)
        return min((i for i in (plain, special) if i is not None), default=None)

    def _ask(self, patterns: list[tuple[int, Glob]], name: str) -> int | None:
        for i, pattern in patterns:
            self.num_asked += 1
            if pattern.matches(name):
                return i
        return None


class Matcher:
    """The spec that a table of rules gives to each name.

    Attributes:
        patterns: the patterns asked.
        used: the numbers of those that decided something.
    """

    def __init__(self, rules: Rules) -> None:
        self._specs = rules.parsed
        self.patterns = Patterns(pattern for pattern, _ in rules.specs)
        self.used: set[int] = set()

    def find(self, name: str, kind: str) -> Spec | None:
        """The spec of the weight ``name`` whose template is ``kind``, or None.

        A rule that names an adapter or a scale goes before the rule of its weight.
        """
        spec = self.direct(name, kind)
        if spec is not None:
            return spec
        if is_setting(name):
            return Spec(buffer=True)
        scale, adapter = _SCALE.fullmatch(name), _ADAPTER.fullmatch(name)
        if scale:
            base = scale["base"]
            return self.direct(base, template(base))
        if adapter:
            base = adapter["base"] + ".weight"
            return _adapter_spec(self.direct(base, template(base)), adapter["part"])
        base = name.replace(".base_layer.", ".")  # how peft calls the weight it adapts
        if base.endswith(".weight_packed"):  # (out, in), several inputs in an element
            base = base.removesuffix("_packed")
        return self.direct(base, template(base)) if base != name else None

    def direct(self, name: str, kind: str) -> Spec | None:
        """The spec of the rule that names ``name`` itself, or None."""
        at = self.patterns.find(name, kind)
        if at is None:
            return None
        self.used.add(at)
        return self._specs[at]


def _adapter_spec(base: Spec | None, part: str) -> Spec | None:
    """The spec of a part of an adapter of a weight (out, in): A is (r, in), B is (out, r).

    The rank r is small and never split; vectors, and adapters of a whole weight, are whole.
    """
    if base is None or len(base.dims) != 2 or part == "lora_magnitude_vector":
        return base and Spec()
    out, into = base.dims
    if part.startswith("lora_embedding"):  # an embedding is (in, out)
        out, into = into, out
    return Spec(((), into)) if part[-1] in "aA" else Spec((out, ()))
