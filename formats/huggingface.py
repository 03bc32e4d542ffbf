"""A Llama as transformers describes it: its config.json, its tensors' names and order of rows.

Rotary embeddings turn pairs of numbers of a query or key by an angle. Ours are neighbors, (2i,
2i + 1), as in Meta's code and llama2.c; in transformers they are half a head apart, (i, i + D/2).
A dot product does not depend on the order of its terms, so the two models compute the same if the
rows of both matrices are brought from one order to the other.
"""

import re
from typing import Any

import torch

import cli
from config import LlamaConfig, shown
from formats.checkpoint import listed
from llama import Llama

THETA = 10000.0
_ARGS = {  # transformers' name -> ours
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "layer_norm_eps",
}
_DEFAULTS = {"num_key_value_heads": None, "rms_norm_eps": 1e-6}  # what old files leave out
_OUTER = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.compute_query": "self_attn.q_proj",
    "attention.compute_key": "self_attn.k_proj",
    "attention.compute_value": "self_attn.v_proj",
    "attention.compute_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_OUTER_BACK = {theirs: ours for ours, theirs in _OUTER.items()}
_LAYER_BACK = {theirs: ours for ours, theirs in _LAYER.items()}
_DERIVED = re.compile(r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq")  # in old files


def hf_config(model: Llama) -> dict[str, Any]:
    """The config.json of LlamaForCausalLM, without the ids of special tokens."""
    c = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(c, ours) for theirs, ours in _ARGS.items()},
        "intermediate_size": model.layers[0].feed_forward.w1.weight.shape[0],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": THETA,  # for version 4; the next is for version 5
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "tie_word_embeddings": model.output.weight is model.tok_embeddings.weight,
        "dtype": "float32",
    }


def hf_weights(model: Llama) -> dict[str, torch.Tensor]:
    """All tensors under transformers' names and in its order of rows; a tied output is left out."""
    weights = {}
    for name, tensor in model.state_dict().items():
        layer = re.fullmatch(r"layers\.([0-9]+)\.(.+)\.weight", name)
        theirs = f"model.layers.{layer[1]}.{_LAYER[layer[2]]}.weight" if layer else _OUTER[name]
        n_heads = _n_turned_heads(model.config, name)
        weights[theirs] = _reordered(tensor, n_heads, (-1, 2)) if n_heads else tensor
    if model.output.weight is model.tok_embeddings.weight:
        del weights["lm_head.weight"]
    return weights


def llama_from_hf(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Llama:
    """The causal Llama of a config.json and its tensors, whose memory it may take.

    ValueError for a model that ours cannot compute, and for missing, unexpected and misshapen
    tensors.
    """
    _require_computable(config)
    absent = [name for name in _ARGS if name not in {**_DEFAULTS, **config}]
    if absent:
        raise ValueError(f"config.json has no {', '.join(absent)}")
    args = {ours: {**_DEFAULTS, **config}[theirs] for theirs, ours in _ARGS.items()}
    c = LlamaConfig(**args, attention="causal")
    weights = {name: tensor for name, tensor in weights.items() if not _DERIVED.fullmatch(name)}
    _require_same_tie(config, weights)
    ours = {name: _our_name(name) for name in weights}
    if None in ours.values():
        unknown = listed(cli.shown(name) for name in weights if ours[name] is None)
        raise ValueError(f"unexpected: {unknown}; only a plain LlamaForCausalLM is read")
    model = Llama.from_weights(c, {ours[name]: tensor for name, tensor in weights.items()})
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if n_heads := _n_turned_heads(c, name):
                tensor.copy_(_reordered(tensor, n_heads, (2, -1)))
    return model


def _require_computable(config: dict[str, Any]) -> None:
    """ValueError that lists all of a config.json that this Llama cannot compute."""
    wanted: dict[str, Any] = {
        "model_type": "llama",
        "hidden_act": "silu",
        "quantization_config": None,
    }
    wanted |= {"attention_bias": False, "mlp_bias": False, "rope_theta": THETA}
    found = {**wanted, "model_type": None, **{k: config[k] for k in wanted if k in config}}
    if config.get("head_dim") is not None:
        sizes = config.get("hidden_size"), config.get("num_attention_heads")
        if all(type(size) is int and size > 0 for size in sizes):
            wanted["head_dim"], found["head_dim"] = sizes[0] // sizes[1], config["head_dim"]
    rope_wanted = {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 1.0}
    for key in ("rope_scaling", "rope_parameters"):  # versions 4 and 5
        rope = config.get(key) or {}
        rope = rope if isinstance(rope, dict) else {"rope_type": rope}
        rope = {"rope_type": rope.get("type", "default"), **rope}
        for name, value in rope_wanted.items():
            wanted[f"{key}.{name}"], found[f"{key}.{name}"] = value, rope.get(name, value)
    faults = [
        f"{key}={shown(found[key])} (only {shown(value)})"
        for key, value in wanted.items()
        if found[key] != value
    ]
    if faults:
        raise ValueError(f"config.json wants what this Llama cannot compute: {', '.join(faults)}")


def _require_same_tie(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """ValueError where config.json and the tensors disagree on whether there is an output matrix,
    as then transformers draws one at random or, by its version, ignores the one that is there."""
    is_tied = config.get("tie_word_embeddings", False)
    output, embedding = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    if output is None and not is_tied:
        raise ValueError("missing: lm_head.weight, and tie_word_embeddings is not set")
    if output is not None and embedding is not None and is_tied and not output.equal(embedding):
        raise ValueError("tie_word_embeddings is set, but lm_head.weight is not the embedding")


def _our_name(name: str) -> str | None:
    """model.layers.0.self_attn.q_proj.weight -> layers.0.attention.compute_query.weight"""
    layer = re.fullmatch(r"model\.layers\.([0-9]+)\.(.+)\.weight", name)
    if layer and layer[2] in _LAYER_BACK:
        return f"layers.{layer[1]}.{_LAYER_BACK[layer[2]]}.weight"
    return _OUTER_BACK.get(name)


def _n_turned_heads(c: LlamaConfig, name: str) -> int:
    """The heads that a matrix's rows belong to, if rotary embeddings turn what it computes."""
    if name.endswith("compute_query.weight"):
        return c.n_heads
    return c.n_kv_heads if name.endswith("compute_key.weight") else 0


def _reordered(weight: torch.Tensor, n_heads: int, pairs: tuple[int, int]) -> torch.Tensor:
    """The rows of (heads * D, dim), of each head: pairs (-1, 2) from neighbors to halves, (2, -1)
    back."""
    split = weight.view(n_heads, *pairs, weight.shape[1])  # (H, D/2, 2, dim), or (H, 2, D/2, dim)
    return split.transpose(1, 2).reshape(weight.shape)
