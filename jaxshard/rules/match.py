"""Tensor names: matching against rules, optimizer states, adapters, and towers.

Some tensors follow the rule of another: optimizer states, scales of quantized weights and
adapters (LoRA). Towers of other modalities have names like a decoder's, so they are found
before rules are applied. This module does not depend on sizes or ranks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from ..core.layout import MeshAxes
from ..core.patterns import Patterns, template
from ..errors import LayoutError, format_list
from ..models.facts import text_config
from .table import Rules, Spec

#: Optimizer states and gradients: prefixes of the weight's name, and the power of the gradient
#: that their values are sums or averages of.
STATE_ORDERS = {
    "adam_m.": 1,
    "adam_v.": 2,
    "accu_grads.": 1,
    "moment1.": 1,
    "moment2.": 2,
    "exp_avg.": 1,
    "exp_avg_sq.": 2,
}
#: They are placed like the weight whose name follows.
OPTIMIZER_PREFIXES = tuple(STATE_ORDERS)
_STATE = re.compile("|".join(map(re.escape, OPTIMIZER_PREFIXES)))
_ADAPTER = re.compile(  # names in peft, MindFormers and mindpet, in files and in memory
    r"(?P<base>.+?)\."
    r"(?P<part>lora_embedding_[AB]|lora_magnitude_vector|lora_[AB]|(?:mindpet_delta_)?lora_[ab])"
    r"(?:\.[^.]+)?(?:\.weight)?"
)
_SCALE = re.compile(r"(?P<base>.+)_scale_inv")
#: Numbers about a layer, which are whole on every rank.
_SETTING = re.compile(
    r".+\.(?:weight_shape|(?:input|output|activation)(?:_global)?_scale|[qkv]_scale)"
)


def weight_name(name: str) -> str:
    """Return ``name`` without the prefix of an optimizer state.

    >>> weight_name("adam_m.lm_head.weight")
    'lm_head.weight'
    """
    state = _STATE.match(name)
    return name[state.end() :] if state else name


def is_setting(name: str) -> bool:
    """Return whether ``name`` is a number about a quantized layer, whole on every rank."""
    return _SETTING.fullmatch(name) is not None


def is_part_of_adapter(name: str) -> bool:
    """Return whether ``name`` is a matrix of a low-rank adapter, or an optimizer state of one.

    >>> is_part_of_adapter("adam_m.layers.0.wq.lora_a"), is_part_of_adapter("lora.wq.weight")
    (True, False)
    """
    return _ADAPTER.fullmatch(weight_name(name)) is not None


def base_name(name: str) -> str:
    """Return the name of the weight whose adapter, scale, or packed form is ``name``.

    >>> base_name("h.0.q_proj.lora_A.default.weight"), base_name("h.0.q_proj.base_layer.weight")
    ('h.0.q_proj.weight', 'h.0.q_proj.weight')
    """
    if scale := _SCALE.fullmatch(name):
        return scale["base"]
    if adapter := _ADAPTER.fullmatch(name):
        return adapter["base"] + ".weight"
    base = name.replace(".base_layer.", ".")  # an adapted weight in peft
    return base.removesuffix("_packed") if base.endswith(".weight_packed") else base


class Matcher:
    """Finds the spec of each name in a table of rules.

    Attributes:
        patterns: the patterns of the rules.
        used: the indices of those that matched.
    """

    def __init__(self, rules: Rules) -> None:
        self._specs = rules.parsed
        self.patterns = Patterns(pattern for pattern, _ in rules.specs)
        self.used: set[int] = set()

    def find(self, name: str, kind: str) -> Spec | None:
        """Return the spec of the weight ``name`` whose template is ``kind``, or None.

        A rule for an adapter or a scale takes precedence over that of its weight.
        """
        spec = self.direct(name, kind)
        if spec is not None:
            return spec
        if is_setting(name):
            return Spec(buffer=True)
        base, adapter = base_name(name), _ADAPTER.fullmatch(name)
        if base == name:
            return None
        found = self.direct(base, template(base))
        return _adapter_spec(found, adapter["part"]) if adapter else found

    def direct(self, name: str, kind: str) -> Spec | None:
        """Return the spec of the rule that matches ``name`` itself, or None."""
        at = self.patterns.find(name, kind)
        if at is None:
            return None
        self.used.add(at)
        return self._specs[at]


def _adapter_spec(base: Spec | None, part: str) -> Spec | None:
    """Return the spec of a part of an adapter of a weight (out, in): A (r, in) or B (out, r).

    The rank r is small and never split; vectors, and adapters of a whole weight, are whole.
    """
    if base is None or len(base.dims) != 2 or part == "lora_magnitude_vector":
        return base and Spec()
    out, into = base.dims
    if part.startswith("lora_embedding"):  # an embedding is (in, out)
        out, into = into, out
    return Spec(((), into)) if part[-1] in "aA" else Spec((out, ()))


# --- Deviations from the rules, collected for one report

Policy = Literal["error", "replicate"]
Unmatched = Literal["error", "replicate", "largest"]

_NOTES = {
    "apart": "not of the text model, whole on the ranks of the first stage: {}: {}.",
    "unmatched": "no rule matches {}, whole on every rank of the stage: {}.",
    "largest": "no rule matches {}, split by their shapes alone: {}.",
    "units": "cut within what ranks need whole to compute: {}: {}.",
    "uneven": "left whole, because it does not divide: {}: {}.",
    "no stage": "without a stage, so held by every stage: {}: {}.",
    "unsplit": "not split over fsdp, which divides no dim: {}: {}.",
    "no shard": "not split by the optimizer shard, which does not fit: {}: {}.",
}


def check_policy(name: str, value: str, known: object = Policy) -> None:
    """Refuse a policy that is not one of ``known``, a ``Literal``.

    Raises:
        LayoutError: with the known ones.
    """
    words = get_args(known)
    if value not in words:
        expected = " or ".join(f'"{word}"' for word in words)
        raise LayoutError(f"{name}={value!r} must be {expected}.")


class PlacementProblems:
    """Tensor names by problem and by kind of name.

    Attributes:
        sharded: whether the optimizer shard fits any tensor.
    """

    def __init__(self) -> None:
        self._names: dict[str, dict[tuple[str, str], list[str]]] = {}
        self.sharded = False

    def add(self, what: str, name: str, numbers: str) -> None:
        """Record the problem ``what`` of tensor ``name``."""
        kind = (template(name), numbers)
        self._names.setdefault(what, {}).setdefault(kind, []).append(name)

    def refuse(
        self, rules: Rules, mesh: MeshAxes, unmatched: str, uneven: str, *, computes: bool
    ) -> None:
        """Raise the first kind of problem that the policies forbid.

        Raises:
            LayoutError: all problems of one kind.
        """
        if unmatched == "error" and "unmatched" in self._names:
            raise LayoutError(
                f"none of the rules {rules.name} matches {self._count('unmatched')}: "
                f"{self._lines('unmatched')}. {self._remedy(rules)}, "
                'or pass unmatched="largest" (--unmatched largest) to split them by their shapes, '
                'or unmatched="replicate" for whole copies on every rank of the stage.'
            )
        if "order" in self._names:
            first = next(iter(self._names["order"]))[0].replace("#", "*")
            raise LayoutError(
                f"the order of the dims of {self._count('order')} is unknown: "
                f"{self._lines('order')}. Correct config.json, or write one of the two as a rule "
                f'for "{first}" (rules=, --rules).'
            )
        if "misfit" in self._names:
            raise LayoutError(
                f"the rule does not have the dims of {self._count('misfit')}: "
                f'{self._lines("misfit")}. Write one part for each dim, or a single "-" for whole.'
            )
        if uneven == "error" and "uneven" in self._names:
            first = next(iter(self._names["uneven"]))[0].replace("#", "*")
            raise LayoutError(
                f"{mesh} does not divide {self._count('uneven')}: "
                f"{self._lines('uneven')}. Use a strategy that divides them, leave the tensor "
                f'whole with the rule "{first}" = "-" (rules=, --rules), or, in a conversion, '
                'every such dim with uneven="replicate" (--uneven replicate).'
            )
        if computes and "units" in self._names:
            first = next(iter(self._names["units"]))[0].replace("#", "*")
            raise LayoutError(
                f"{mesh} splits what ranks need whole to compute, in {self._count('units')}: "
                f'{self._lines("units")}. Repeating is a mapping (op = "repeat", names=); a rule '
                f'of your own, such as "{first}" = "-" for whole, is always applied (rules=).'
            )
        if "no shard" in self._names and not self.sharded:
            raise LayoutError(
                f"{mesh}: the optimizer shard fits no tensor: {self._lines('no shard', 2)}. "
                "Use a number of ways that divides the replicas, or -1 for all of them."
            )

    def notes(self) -> tuple[str, ...]:
        """Return notes for the user on problems that are not errors."""
        return tuple(
            text.format(self._count(what), self._lines(what))
            for what, text in _NOTES.items()
            if what in self._names
        )

    def _count(self, what: str) -> str:
        number = sum(map(len, self._names[what].values()))
        return f"{number} {'dim' if what == 'uneven' else 'tensor'}{'s' if number > 1 else ''}"

    def _lines(self, what: str, limit: int = 5) -> str:
        """List for each kind the first name, its numbers, and the count of the others."""
        return format_list(
            (
                f"{names[0]} {numbers}".rstrip()
                + (f" (and {len(names) - 1} like it)" if len(names) > 1 else "")
                for (_, numbers), names in self._names[what].items()
            ),
            limit,
        )

    def _remedy(self, rules: Rules) -> str:
        """Suggest a rule that fits the first name, and the closest existing one."""
        from difflib import get_close_matches  # noqa: PLC0415 - only when something is wrong

        (_, shape), names = next(iter(self._names["unmatched"].items()))
        name = weight_name(names[0])
        whole = ",".join("-" for n in shape.strip("()").split(",") if n.strip()) or "-"
        close = get_close_matches(name, [p for p, _ in rules.specs], n=1, cutoff=0.8)
        nearly = f'The rule "{close[0]}" is close. ' if close else ""
        pattern = template(name).replace("#", "*")
        return f'{nearly}Write rules, such as "{pattern}" = "{whole}" for whole'


# --- Text models inside multimodal models
#
#     model.visual.…                    a tower: whole, on the first stage
#     model.language_model.layers.0.…   the text model: by the table of its family
#     lm_head.weight

_TOWER = re.compile(  # a word of a name's part
    r"(?:^|_)(?:visual|vision|vit|vpm|image|img|video|audio|speech|apm|sound|projector|connector|"
    r"resampler|perceiver|aligner|talker|token2wav|code2wav|tts)(?:_|$)|^mlp1$"
)
#: A prefix of names of the text part of a multimodal model.
TEXT_MODEL = re.compile(r"(?:^|\.)(?:language_model|text_model|llm|thinker)\.")
_LAYER = re.compile(r"(.*?)(?:layers|h)\.\d+\.")
_ROOT = re.compile(r"(.*?)(?:(?:layers|h)\.\d+\.|(?:embed_tokens|wte|tok_embeddings)\.)")
_EMBEDDING = re.compile(r"(.*?)(?:embed_tokens|wte|tok_embeddings)\.")
_HEADS = frozenset({"lm_head", "mtp", "score", "classifier"})


def text_root(names: Iterable[str]) -> str | None:
    """Return the common prefix of a text model's layers and embedding, or None if unknown.

    >>> text_root(["model.visual.layers.0.q.weight", "model.language_model.layers.0.q.weight"])
    'model.language_model.'
    """
    text = [n for n in names if not _in_tower(n)]
    roots = Counter(match[1] for n in text if (match := _ROOT.match(n)))
    named = {root for root in roots if TEXT_MODEL.search(root)}
    embeddings = {match[1] for n in text if (match := _EMBEDDING.match(n))}
    for chosen in (named & embeddings, named, embeddings & roots.keys(), roots.keys()):
        if chosen:
            return max(chosen, key=lambda root: roots[root])
    return None


def towers(names: Iterable[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return patterns of the names outside the text model.

    >>> towers(["visual.blocks.0.q.weight", "model.layers.0.q.weight"], {})
    ('visual.*',)
    """
    names = list(names)
    if text_config(config) is config and not any(map(_in_tower, names)):
        return ()
    root = text_root(names)
    found: dict[str, None] = {}
    for name in names:
        if not _is_text(name, root):
            found[_branch(name, root or "")] = None
    return tuple(found)


def _in_tower(name: str) -> bool:
    """Return whether a part of ``name`` before its layer is a tower's."""
    layer = _LAYER.match(name)
    return any(map(_TOWER.search, (layer[1] if layer else name).split(".")))


def _is_text(name: str, root: str | None) -> bool:
    if _in_tower(name):
        return False
    return root is None or name.startswith(root) or not _HEADS.isdisjoint(name.split("."))


def _branch(name: str, root: str) -> str:
    """Return the pattern of the subtree of ``name`` outside the path to ``root``."""
    parts, path = name.split("."), root.split(".")
    shared = next((i for i, (a, b) in enumerate(zip(parts, path, strict=False)) if a != b), 0)
    word = next((i for i, part in enumerate(parts) if _TOWER.search(part)), shared)
    end = max(shared, word) + 1
    branch = ("*" if part.isdigit() else part for part in parts[:end])  # one pattern for all layers
    return ".".join(branch) + (".*" if end < len(parts) else "")
