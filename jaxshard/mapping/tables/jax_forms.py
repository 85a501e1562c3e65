"""Common forms of weights in JAX programs.

    nnx       model.layers.0.self_attn.q_proj.kernel (in, out), norms .scale, .embedding
    linen     the same under params, layers_0
    …-scan    layers stacked along a new first dim
    maxtext   a tree like MaxText's: heads apart, layers stacked along dim 1
    tunix     a tree like Tunix's: heads apart, layers apart

Only names and shapes are mapped. Some programs also keep other values (a query scaled by
1/√d, rotary halves in another order); those are theirs to convert.
"""

from __future__ import annotations

from ...errors import LayoutError
from ..group_ops import Stack
from ..mapping import Mapping
from ..ops import Drop, Expect, Op, Rename, Split, Transpose
from .families import Facts

_LAYER = "model.layers.{layer}."


def nnx(facts: Facts) -> Mapping:
    """Kernels instead of weights."""
    return Mapping((*_before(facts), *_kernels(facts), Expect(_kernel_names(facts), "nnx")))


def linen(facts: Facts) -> Mapping:
    """As ``nnx``, with the names that Linen gives."""
    layers = facts.family.layers
    inside = layers.replace(".{layer}.", "_{layer}.")
    rules = (
        (layers + "{x*}", "params." + inside + "{x*}"),
        ("{x*}", "params.{x*}"),
    )
    names = tuple("params." + n.replace(layers, inside) for n in _kernel_names(facts))
    return Mapping((*_before(facts), *_kernels(facts), Rename(rules), Expect(names, "linen")))


def nnx_scan(facts: Facts) -> Mapping:
    """As ``nnx``, all layers in one.

    The first, if they have no experts, are one of their own; those after the last, which predict
    further tokens and have more weights than others, stay apart.
    """
    names = Expect(_stacked_names(facts), "nnx-scan")
    return Mapping((*_before(facts), *_kernels(facts), *_stacked(facts), names))


def linen_scan(facts: Facts) -> Mapping:
    """As ``nnx_scan``, under params."""
    names = tuple("params." + n for n in _stacked_names(facts))
    rename = Rename((("{x*}", "params.{x*}"),))
    ops = nnx_scan(facts).ops[:-1]
    return Mapping((*ops, rename, Expect(names, "linen-scan")))


def maxtext(facts: Facts) -> Mapping:
    """A tree like MaxText's, of a model whose layers are scanned along dim 1."""
    _check_llama(facts, "maxtext")
    layer = "params.decoder.layers."
    attention = {"q": "query", "k": "key", "v": "value"}
    apart = {
        **{
            f"self_attn.{a}_proj.kernel": f"self_attention.{b}.kernel" for a, b in attention.items()
        },
        "self_attn.o_proj.kernel": "self_attention.out.kernel",
        "self_attn.q_norm.scale": "self_attention.query_norm.scale",
        "self_attn.k_norm.scale": "self_attention.key_norm.scale",
        "mlp.gate_proj.kernel": "mlp.wi_0.kernel",
        "mlp.up_proj.kernel": "mlp.wi_1.kernel",
        "mlp.down_proj.kernel": "mlp.wo.kernel",
        "input_layernorm.scale": "pre_self_attention_layer_norm.scale",
        "post_attention_layernorm.scale": "post_self_attention_layer_norm.scale",
        **{f"self_attn.{a}_proj.bias": f"self_attention.{b}.bias" for a, b in attention.items()},
    }
    rules = (
        ("model.embed_tokens.embedding", "params.token_embedder.embedding"),
        ("model.norm.scale", "params.decoder.decoder_norm.scale"),
        ("lm_head.kernel", "params.decoder.logits_dense.kernel"),
    )
    biases = tuple(_LAYER + f"self_attn.{x}_proj.bias" for x in "qkv")
    stacks = [Stack(_LAYER + a, layer + b, dim=1) for a, b in apart.items()]
    return Mapping(
        (
            *_before(facts),
            *_kernels(facts),
            *_heads_apart(facts),
            Split(biases[:1], 0, (facts.heads, -1)),
            Split(biases[1:], 0, (facts.kv_heads, -1)),
            *stacks,
            Rename(rules),
            Expect((*(layer + b for b in apart.values()), *(b for _, b in rules)), "llama-maxtext"),
        )
    )


def tunix(facts: Facts) -> Mapping:
    """A tree like Tunix's."""
    _check_llama(facts, "tunix")
    attn = "layers.{layer}.attn."
    rules = (
        ("model.embed_tokens.embedding", "embedder.input_embedding"),
        ("model.norm.scale", "final_norm.w"),
        ("lm_head.kernel", "lm_head.w"),
        *((f"{_LAYER}self_attn.{x}_proj.kernel", f"{attn}{x}_proj.w") for x in "qkvo"),
        *((f"{_LAYER}self_attn.{x}_norm.scale", f"{attn}{x}_norm.w") for x in "qk"),
        *((f"{_LAYER}self_attn.{x}_proj.bias", f"{attn}{x}_bias") for x in "qkv"),
        (_LAYER + "mlp.{x}.kernel", "layers.{layer}.mlp.{x}.kernel"),
        (_LAYER + "{x}.scale", "layers.{layer}.{x}.w"),
    )
    made = tuple(b for _, b in rules)
    return Mapping(
        (
            *_before(facts),
            *_kernels(facts),
            *_heads_apart(facts),
            Rename(rules),
            Expect(made, "llama-tunix"),
        )
    )


def _before(facts: Facts) -> tuple[Op, ...]:
    family = facts.family
    return (Drop(family.buffers, rebuilt=True), Expect(family.names, f"{family.name}-hf"))


def _kernels(facts: Facts) -> tuple[Op, ...]:
    family = facts.family
    linear = tuple(m + ".weight" for m in family.linear)
    rules = (
        *((m + ".weight", m + ".kernel") for m in (*family.linear, *family.kernels)),
        *((m + ".weight", m + ".scale") for m in family.norms),
        *((m + ".weight", m + ".embedding") for m in family.embeddings),
    )
    return (Transpose(linear), Rename(rules))


def _kernel_names(facts: Facts) -> tuple[str, ...]:
    family = facts.family
    kernels = (*family.linear, *family.kernels)
    return (
        *(m + ".kernel" for m in kernels),
        *(m + ".scale" for m in family.norms),
        *(m + ".embedding" for m in family.embeddings),
        *(m + ".bias" for m in (*kernels, *family.norms)),
        *family.plain,
    )


def _stacked_names(facts: Facts) -> tuple[str, ...]:
    layers = facts.family.layers
    one = layers.replace("{layer}.", "")
    plain = [n.replace("{expert}.", "") for n in _kernel_names(facts)]
    names = [n.replace(layers, one) for n in plain]
    if facts.dense_layers:
        names += [n.replace(layers, _kind(one, "dense")) for n in plain]
    if facts.predictions:
        names += [n.replace(layers, _kind(layers, "mtp")) for n in plain]
    return tuple(dict.fromkeys(names))


def _kind(layers: str, kind: str) -> str:
    """The name of layers of another kind."""
    return layers.replace("layers.", f"{kind}_layers.")


def _heads_apart(facts: Facts) -> tuple[Op, ...]:
    """(hidden, heads·d) as (hidden, heads, d), and (heads·d, hidden) as (heads, d, hidden)."""
    names = {x: _LAYER + f"self_attn.{x}_proj.kernel" for x in "qkvo"}
    return (
        Split((names["q"],), 1, (facts.heads, -1)),
        Split((names["k"], names["v"]), 1, (facts.kv_heads, -1)),
        Split((names["o"],), 0, (facts.heads, -1)),
    )


def _stacked(facts: Facts) -> tuple[Op, ...]:
    layers = facts.family.layers
    one = layers.replace("{layer}.", "")
    experts: tuple[Op, ...] = tuple(
        Stack(
            layers + f"{x}.experts.{{expert}}.{{rest*}}",
            layers + f"{x}.experts.{{rest*}}",
            "expert",
        )
        for x in ("mlp", "block_sparse_moe")
        if facts.family.name in ("qwen3_moe", "mixtral", "deepseek_v3")
    )
    stacks = [*experts]
    if facts.predictions:
        stacks.append(_predictions_apart(facts))
    dense = facts.dense_layers
    if dense:
        stacks.append(Stack(layers + "{rest*}", _kind(one, "dense") + "{rest*}", count=dense))
    return (*stacks, Stack(layers + "{rest*}", one + "{rest*}", first=dense))


def _predictions_apart(facts: Facts) -> Rename:
    """Layers after the last, numbered by themselves."""
    layers = facts.family.layers
    first, apart = facts.layers, _kind(layers, "mtp")
    return Rename(
        tuple(
            (
                layers.replace("{layer}", str(first + i)) + "{rest*}",
                apart.replace("{layer}", str(i)) + "{rest*}",
            )
            for i in range(facts.predictions)
        )
    )


def _check_llama(facts: Facts, form: str) -> None:
    if facts.family.name != "llama":
        raise LayoutError(
            f"there is no {form} table for {facts.family.name}, only for llama's relatives (llama, "
            "mistral, qwen2, qwen3, gemma). Give a mapping in TOML, or use nnx or nnx-scan."
        )
