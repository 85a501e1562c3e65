"""Text models inside multimodal models, and their other parts.

    model.visual.…                    a tower of its own: whole, on the first stage
    model.language_model.layers.0.…   the text model: by the table of its family
    lm_head.weight

The names of a tower's layers are often those of a decoder's, so no rule of a text model may
be asked for them. This module knows names and ``config.json``; it knows no shapes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

_NESTED = (
    ("text_config",),
    ("llm_config",),
    ("language_config",),
    ("thinker_config", "text_config"),
)
_TOWER = re.compile(  # a word of a name's part
    r"(?:^|_)(?:visual|vision|vit|vpm|image|img|video|audio|speech|apm|sound|projector|connector|"
    r"resampler|perceiver|aligner|talker|token2wav|code2wav|tts)(?:_|$)|^mlp1$"
)
#: A prefix of names that only the text part of a larger model has.
TEXT_MODEL = re.compile(r"(?:^|\.)(?:language_model|text_model|llm|thinker)\.")
_LAYER = re.compile(r"(.*?)(?:layers|h)\.\d+\.")
_ROOT = re.compile(r"(.*?)(?:(?:layers|h)\.\d+\.|(?:embed_tokens|wte|tok_embeddings)\.)")
_EMBEDDING = re.compile(r"(.*?)(?:embed_tokens|wte|tok_embeddings)\.")
_HEADS = frozenset({"lm_head", "mtp", "score", "classifier"})


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of ``config.json`` that is about the text model, or all of it.

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


def text_type(config: Mapping[str, Any]) -> str | None:
    """Return the ``model_type`` of the text model that ``config.json`` names, if it is a text.

    >>> text_type({"text_config": {"model_type": "gemma3_text"}}), text_type({"model_type": []})
    ('gemma3_text', None)
    """
    kind = text_config(config).get("model_type")
    return kind if isinstance(kind, str) and kind else None


def text_root(names: Iterable[str]) -> str | None:
    """What the names of a text model's layers and embedding begin with; None if unknown.

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
    """Patterns of the names that are not the text model's; none if all of them are.

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
    """Whether a part of ``name`` says so; in a layer of the text model none does."""
    layer = _LAYER.match(name)
    return any(map(_TOWER.search, (layer[1] if layer else name).split(".")))


def _is_text(name: str, root: str | None) -> bool:
    if _in_tower(name):
        return False
    return root is None or name.startswith(root) or not _HEADS.isdisjoint(name.split("."))


def _branch(name: str, root: str) -> str:
    """The pattern of what hangs on the same branch as ``name``, off the path to ``root``."""
    parts, path = name.split("."), root.split(".")
    shared = next((i for i, (a, b) in enumerate(zip(parts, path, strict=False)) if a != b), 0)
    word = next((i for i, part in enumerate(parts) if _TOWER.search(part)), shared)
    end = max(shared, word) + 1
    branch = ("*" if part.isdigit() else part for part in parts[:end])  # layers alike
    return ".".join(branch) + (".*" if end < len(parts) else "")
