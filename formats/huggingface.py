"""Write and read a transformers folder of LlamaForCausalLM, with `transformers` (an extra).

Rotary embeddings rotate pairs of a head's numbers. The pairs are neighbors (2i, 2i + 1) here, as in
Meta's code and llama2.c, and (i, i + D/2) in transformers. So the rows of the query and key
matrices are permuted.

Shapes: H heads, D head size.
"""

import random
import shutil
from pathlib import Path
from typing import Any

import torch

from config import LlamaConfig
from formats.torch_file import listed
from tokenizer import Tokenizer
from utils import InputError, brief, require_package

_ARGS = {  # ours -> transformers'
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "max_seq_len": "max_position_embeddings",
    "layer_norm_eps": "rms_norm_eps",
}
_OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
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
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}


def write_model(
    folder: Path, config: LlamaConfig, weights: dict[str, torch.Tensor], tokenizer: Tokenizer
) -> None:
    """Write config.json, generation_config.json and model.safetensors.

    Without output.weight in `weights` the output layer is tied to the embedding.
    """
    require_package("transformers")
    import transformers

    args = {theirs: getattr(config, ours) for ours, theirs in _ARGS.items()}
    args["intermediate_size"] = len(weights["layers.0.feed_forward.w1.weight"])
    is_tied = "output.weight" not in weights
    their_config = transformers.LlamaConfig(
        **args,
        tie_word_embeddings=is_tied,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=_pad_id(tokenizer),
    )
    names = _names(config.n_layers)
    theirs = {names[name]: _permuted(config, name, w, (-1, 2)) for name, w in weights.items()}
    if is_tied:
        theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"]
    with torch.device("meta"):  # shapes without memory
        model = transformers.LlamaForCausalLM(their_config)
    model.load_state_dict(theirs, strict=True, assign=True)
    model.tie_weights()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # else its owner's alone


def read_model(folder: Path) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    """Return a causal config, and the weights under CMU names.

    Reads only safetensors, runs no code of the folder, and uses no network. Raises InputError,
    without the folder's name, for a model that our Llama cannot compute.
    """
    require_package("transformers")
    import transformers

    weights = _read_safetensors(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # OSError, ValueError, TypeError, ArithmeticError and others
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"its config.json cannot be read: {reason[:300]}") from error
    _require_computable(config)
    if config.num_hidden_layers > len(weights):  # too many to list their names
        n_layers = config.num_hidden_layers
        raise InputError(f"{n_layers} layers, but only {len(weights)} tensors")
    names = {theirs: ours for ours, theirs in _names(config.num_hidden_layers).items()}
    if config.tie_word_embeddings and "lm_head.weight" not in weights:
        del names["lm_head.weight"]
    missing = [name for name in names if name not in weights]
    unexpected = [name for name in weights if name not in names]
    if missing or unexpected:
        raise InputError(
            f"is not a plain LlamaForCausalLM; missing: {listed(missing) or 'nothing'}; "
            f"unexpected: {listed(unexpected) or 'nothing'}"
        )
    args = {ours: getattr(config, theirs) for ours, theirs in _ARGS.items()}
    c = LlamaConfig(**args, attention="causal")
    return c, {o: _permuted(c, o, weights[t], (2, -1)) for t, o in names.items()}


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_seq_len: int) -> bool:
    """Write tokenizer.json and tokenizer_config.json, if they split texts as SentencePiece does.

    Return whether they do, for texts of random pieces of the vocabulary. Both run byte-pair
    encoding (Sennrich et al. 2016, arXiv 1508.07909): SentencePiece merges the pair whose piece has
    the highest score, `tokenizers` the pair that comes first in a list. Unigram models differ.
    """
    require_package("transformers")
    import transformers

    sp = tokenizer.sp_model
    pieces = [sp.id_to_piece(i) for i in range(len(sp))]
    pad_id = _pad_id(tokenizer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_byte_pair_encoding(tokenizer, pieces),
        unk_token=pieces[sp.unk_id()],
        bos_token=pieces[tokenizer.bos_id],
        eos_token=pieces[tokenizer.eos_id],
        pad_token=None if pad_id is None else pieces[pad_id],
        split_special_tokens=True,  # "<s>" in a text is three characters
        clean_up_tokenization_spaces=False,
        model_max_length=max_seq_len,
        model_input_names=["input_ids", "attention_mask"],
    )
    rng = random.Random(0)
    texts = ["", "  a  b  ", "a\nb", "\u00e9\u6f22\U0001f600", "\ufb01\u00a0x", "<s>", "-- ... --"]
    texts += ["".join(rng.choices(pieces, k=8)).replace("▁", " ") for _ in range(500)]
    if any(
        fast(text)["input_ids"] != tokenizer.encode(text, bos=True, eos=False) for text in texts
    ):
        return False
    fast.save_pretrained(folder)
    return True


def _byte_pair_encoding(tokenizer: Tokenizer, pieces: list[str]) -> Any:
    """Return a SentencePiece model as a `tokenizers.Tokenizer`: pieces, merges, spaces."""
    from tokenizers import Regex, decoders, models, normalizers, processors
    from tokenizers import Tokenizer as FastTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    sp = tokenizer.sp_model
    is_special = [sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) for i in range(len(sp))]
    ids = {piece: i for i, piece in enumerate(pieces)}
    normal = {piece: i for piece, i in ids.items() if not is_special[i]}
    merges = generate_merges(normal, {piece: sp.get_score(i) for piece, i in normal.items()})
    fallback = _pad_id(tokenizer) is not None
    unk, bos = pieces[sp.unk_id()], pieces[tokenizer.bos_id]
    fast = FastTokenizer(
        models.BPE(ids, merges, unk_token=unk, fuse_unk=True, byte_fallback=fallback)
    )
    replace = normalizers.Replace
    steps, n_stripped = [replace(" ", "▁")], 0
    if sp.normalize("a").startswith("▁"):  # a space before a text
        steps, n_stripped = [normalizers.Prepend("▁"), *steps], 1
    if "▁▁" not in sp.normalize("a  b"):  # further spaces are removed
        before = [replace(Regex(r"\A +"), ""), replace(Regex(" {2,}"), " ")]
        steps, n_stripped = [*before, *steps, replace(Regex(r"▁+\z"), "")], 2**20
    fast.normalizer = normalizers.Sequence(steps)
    strip = decoders.Strip(" ", n_stripped, 0)
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    fast.post_processor = processors.TemplateProcessing(
        f"{bos} $A", f"{bos} $A {bos}:1 $B:1", [(bos, tokenizer.bos_id)]
    )
    return fast


def _pad_id(tokenizer: Tokenizer) -> int | None:
    try:
        return tokenizer.pad_id
    except InputError:  # no byte fallback
        return None


def _names(n_layers: int) -> dict[str, str]:
    """Return {our name: transformers' name} of every tensor."""
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in _OUTER.items()}
    for i in range(n_layers):
        for ours, theirs in _LAYER.items():
            names[f"layers.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
    return names


def _permuted(
    config: LlamaConfig, name: str, weight: torch.Tensor, pairs: tuple[int, int]
) -> torch.Tensor:
    """Reorder the rows (H D, dim) of a query or key matrix within each head.

    pairs (-1, 2) goes from neighbors to halves, (2, -1) back.
    """
    heads = {"compute_query": config.n_heads, "compute_key": config.n_kv_heads}
    n_heads = heads.get(name.split(".")[-2])
    if n_heads is None or len(weight) % (2 * n_heads):  # a misshapen matrix is reported on loading
        return weight
    return weight.unflatten(0, (n_heads, *pairs)).transpose(1, 2).reshape(weight.shape)


def _read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("model.safetensors")) or sorted(folder.glob("model-*.safetensors"))
    if not files and list(folder.glob("pytorch_model*.bin")):
        raise InputError(
            "has only pytorch_model.bin, a pickle, which is not read; load it in transformers and "
            "call `save_pretrained`, which writes model.safetensors"
        )
    if not files:
        raise InputError("has no model.safetensors")
    weights = {}
    for file in files:
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            message = f"{file.name}: is not a safetensors file, or is damaged: {error}"
            raise InputError(message) from error
    return {name: w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}


def _require_computable(config: Any) -> None:
    """Raise InputError that lists every setting of a config that our Llama lacks."""
    if config.model_type != "llama":
        raise InputError(f"its model_type is {brief(config.model_type)}, not 'llama'")
    found = {
        "hidden_act": (config.hidden_act, "silu"),
        "attention_bias": (config.attention_bias, False),
        "mlp_bias": (config.mlp_bias, False),
        "head_dim": (config.head_dim, config.hidden_size // config.num_attention_heads),
        "quantization_config": (getattr(config, "quantization_config", None), None),
        **{key: (config.rope_parameters.get(key, value), value) for key, value in _ROPE.items()},
    }
    faults = [f"{k}={brief(v)} (only {brief(w)})" for k, (v, w) in found.items() if v != w]
    if faults:
        raise InputError(f"config.json has settings that our Llama lacks: {listed(faults)}")
