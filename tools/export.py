"""Checkpoints for other programs, and theirs for ours: transformers' folders, llama2.c's files.

    python -m tools.export CHECKPOINT --to hf FOLDER
    python -m tools.export CHECKPOINT --to llama2c OUT.bin
    python -m tools.export FOLDER --from hf OUT.pt

CHECKPOINT is anything that `run_llama.py`, `advanced.run` or llama2.c wrote. Of a finetuned one the
Llama is exported and the rest named on standard error; so is all else that a format cannot hold.

What cannot be is refused by name: of a transformers model what this Llama does not compute (other
angles, biases, another activation or head size, quantized weights), of ours bottleneck adapters,
which no plain Llama computes.
"""

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cli
from config import LlamaConfig
from formats.checkpoint import BIN_HEADER, bin_layout, listed, load_torch_file, read_checkpoint
from formats.huggingface import THETA, hf_config, hf_weights, llama_from_hf
from formats.safetensors_file import read_folder, read_json, write_safetensors
from formats.tokenizers import (
    tokenizer_bin,
    tokenizer_config,
    tokenizer_json,
    unknown_to_llama2c,
)
from llama import Llama
from tokenizer import Tokenizer, open_tokenizer
from training.locks import sole_writer
from training.options import require_folder
from utils import atomic_write, hidden_neighbor, real_path, save_torch_file, sha256_of

BIN_EPS = 1e-5  # run.c's, as a .bin has none
Weights = dict[str, torch.Tensor]
READERS = {"hf": "transformers", "llama2c": "llama2.c"}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.ArgumentParser(prog="tools.export", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a checkpoint, .pt or .bin; with --from hf a folder")
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", choices=tuple(READERS), help="the format of OUT")
    direction.add_argument("--from", dest="origin", choices=("hf",), help="the format of SOURCE")
    add("out", metavar="OUT", help="must not exist yet: with --to hf a folder; with --to llama2c "
        "a .bin, its tokenizer goes to OUT.tokenizer.bin; with --from hf a .pt")  # fmt: skip
    add("--tokenizer_path", help="default: what a finetuned checkpoint recorded, else the .model "
        "file beside SOURCE, else at the root; with --from hf that of the folder")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    require_new(args.out, is_folder=args.to == "hf")
    if args.origin:
        notes = import_hf(Path(args.source), args.out, args.tokenizer_path)
    else:
        export = {"hf": export_hf, "llama2c": export_llama2c}[args.to]
        model, tokenizer, notes = read_ours(args.source, args.tokenizer_path, READERS[args.to])
        notes += export(model, tokenizer, args.out)
    for note in notes:
        note = note if note.isprintable() else ascii(note)  # names come from files
        print(f"{Path(sys.argv[0]).name}: {note}", file=sys.stderr)


def require_new(out: str, is_folder: bool) -> None:
    """A ValueError before the work where OUT is there already, or cannot be made."""
    path = Path(out)
    if out and is_folder and path.is_dir() and not any(path.iterdir()):
        return
    if out and (path.exists() or path.is_symlink()):
        raise ValueError(f"{out}: is there already; remove it, or name another OUT")
    require_folder(out)


# ---------------------------------------------------------------- our checkpoints


def read_ours(
    checkpoint: str, tokenizer_path: str | None, reader: str
) -> tuple[Llama, Tokenizer, list[str]]:
    """The Llama in a checkpoint of any kind, its tokenizer, and in words what `reader` lacks of it.

    ValueErrors name the file.
    """
    saved = _read_plain_data(checkpoint)
    if any(".adapter." in name for name in saved.get("model", ())):
        raise ValueError(
            f"{checkpoint}: has bottleneck adapters, layers of their own within the residual "
            f"stream: {reader} knows no such Llama, and no merge makes it a plain one"
        )
    model_args, weights = read_checkpoint(checkpoint)
    weights, dropped = _backbone(weights)
    try:
        model = Llama.from_weights(LlamaConfig(**model_args), weights)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error
    notes = []
    if dropped:
        labels = f" (labels: {listed(saved['label_names'])})" if "label_names" in saved else ""
        notes.append(f"{checkpoint}: {reader} gets the Llama, without {listed(dropped)}{labels}")
    if model.config.attention != "causal":
        recorded = "recorded" if "attention" in model_args else "none recorded"
        notes.append(
            f"{checkpoint}: read here with attention='full' ({recorded}); {reader} computes "
            "causal attention, as --attention causal does"
        )
    tokenizer = open_tokenizer(checkpoint, saved, tokenizer_path)
    tokenizer.require_vocab_size(model.config.vocab_size)
    return model, tokenizer, notes


def _read_plain_data(checkpoint: str) -> dict[str, Any]:
    """All that a file of this project's holds; {} for one of another form, or none."""
    if Path(checkpoint).is_file():
        with open(checkpoint, "rb") as file:
            if file.read(4) == b"PK\x03\x04":  # a zip
                return load_torch_file(checkpoint)
    return {}


def _backbone(weights: Weights) -> tuple[Weights, list[str]]:
    """(the Llama's tensors, the names of the others), of a finetuned checkpoint or a plain one.

    They are told apart by their content: in a finetuned one the Llama's names begin with "llama.".
    """
    prefix = "llama."
    if not any(name.startswith(prefix) for name in weights):
        return weights, []
    llama = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    dropped = [name for name in weights if name not in llama]
    return {name.removeprefix(prefix): tensor for name, tensor in llama.items()}, dropped


def _hidden_dim(model: Llama) -> int:
    return model.layers[0].feed_forward.w1.weight.shape[0]


def _is_tied(model: Llama) -> bool:
    return model.output.weight is model.tok_embeddings.weight


# ---------------------------------------------------------------- to llama2.c


def export_llama2c(model: Llama, tokenizer: Tokenizer, out: str) -> list[str]:
    """The fp32 .bin that run.c reads, and beside it the tokenizer for its option -z.

    Returns in words what is not in them.
    """
    beside = Path(out).with_name(f"{Path(out).name.removesuffix('.bin')}.tokenizer.bin")
    require_new(str(beside), is_folder=False)
    with sole_writer(out, beside), atomic_write(beside, "wb") as file:
        file.write(tokenizer_bin(tokenizer))
        write_bin(model, out)  # within, so that where it fails both names stay free
    print(f"wrote {out} and {beside}")
    eps, unknown = model.config.layer_norm_eps, unknown_to_llama2c(tokenizer)
    notes = [f"{out}: has no layer_norm_eps={eps}, llama2.c takes {BIN_EPS}"] * (eps != BIN_EPS)
    if unknown:
        notes.append(
            f"{tokenizer.model_path}: has {unknown}, which llama2.c does not know; it may split a "
            "text otherwise"
        )
    return notes


def write_bin(model: Llama, out: str) -> None:
    """See `checkpoint.bin_layout`; the tables are formed in float32, as llama2.c does."""
    c = model.config
    vocab_size = c.vocab_size if _is_tied(model) else -c.vocab_size
    sizes = (c.dim, _hidden_dim(model), c.n_layers, c.n_heads, c.n_kv_heads, vocab_size)
    header = (*sizes, c.max_seq_len)
    before, per_layer, after = bin_layout(*header)
    names = [name for name, _ in before]
    names += [f"layers.{i}.{name}.weight" for name, _ in per_layer for i in range(c.n_layers)]
    names += [name for name, _ in after]
    frequencies = 1.0 / THETA ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim)  # (D/2,)
    angles = torch.outer(torch.arange(c.max_seq_len).float(), frequencies)  # (length, D/2)
    tables = {"freqs_cos": angles.cos(), "freqs_sin": angles.sin()}
    weights = {**model.state_dict(), **tables}
    with atomic_write(out, "wb") as file:
        file.write(BIN_HEADER.pack(*header))
        for name in names:
            file.write(np.ascontiguousarray(weights[name].numpy(), "<f4"))


# ---------------------------------------------------------------- to transformers


def export_hf(model: Llama, tokenizer: Tokenizer, out: str) -> list[str]:
    """A folder for AutoModelForCausalLM and AutoTokenizer, whole or not at all.

    Returns in words what is not in it.
    """
    special = {
        f"{kind}_token_id": getattr(tokenizer, f"{kind}_id") for kind in ("bos", "eos", "pad")
    }
    files = {"config.json": {**hf_config(model), **special}, "generation_config.json": special}
    notes = []
    try:
        files["tokenizer.json"] = tokenizer_json(tokenizer)
    except ValueError as error:
        notes.append(
            f"{tokenizer.model_path}: has {error}, which tokenizer.json cannot hold exactly; "
            "transformers is left to read tokenizer.model, if it can"
        )
    files["tokenizer_config.json"] = tokenizer_config(
        tokenizer, model.config.max_seq_len, "tokenizer.json" in files
    )
    tokenizer_model = Path(tokenizer.model_path).read_bytes()
    with _whole_folder(out) as folder:
        for name, content in files.items():
            with atomic_write(folder / name) as file:
                json.dump(content, file, ensure_ascii=False, indent=2)
                file.write("\n")
        with atomic_write(folder / "tokenizer.model", "wb") as file:
            file.write(tokenizer_model)
        write_safetensors(folder / "model.safetensors", hf_weights(model))
    print(f"wrote {out}: {', '.join(sorted([*files, 'model.safetensors', 'tokenizer.model']))}")
    return notes


@contextlib.contextmanager
def _whole_folder(out: str) -> Iterator[Path]:
    """A hidden neighbor of `out`, which becomes it where the block ends well, else is removed."""
    path = real_path(out)
    partial = hidden_neighbor(path, "partial")
    with sole_writer(path):
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process
        try:
            partial.mkdir()
            yield partial
            if path.is_dir():  # and empty, or this is an error: Windows replaces no folder
                path.rmdir()
            partial.replace(path)
        except OSError as error:
            error.filename = out  # the name that the caller knows
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


# ---------------------------------------------------------------- from transformers


def import_hf(folder: Path, out: str, tokenizer_path: str | None) -> list[str]:
    """A causal checkpoint of ours from a folder of transformers, and its tokenizer.model beside.

    Returns in words what is not there.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: is no folder; --from hf reads one with config.json")
    beside = Path(out).absolute().with_name("tokenizer.model")
    tokenizer = _hf_tokenizer(folder, tokenizer_path, beside)
    config = read_json(folder / "config.json")
    weights = read_folder(folder)
    try:
        model = llama_from_hf(config, weights)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if tokenizer is not None:
        tokenizer.require_vocab_size(model.config.vocab_size)
    weights = model.state_dict()
    if _is_tied(model):
        del weights["output.weight"]
    with sole_writer(out, beside), contextlib.ExitStack() as writing:
        if tokenizer is not None and not beside.exists():
            file = writing.enter_context(atomic_write(beside, "wb"))
            file.write(Path(tokenizer.model_path).read_bytes())
        save_torch_file(out, {"model": weights, "model_args": model.config.to_dict()})
    if tokenizer is not None:
        print(f"wrote {out}; its tokenizer is {beside.name} beside it")
        return []
    print(f"wrote {out}")
    return [
        f"{folder}: has no tokenizer.model (tokenizer.json is not read); {out} needs its tokenizer "
        "beside it, or named by --tokenizer_path"
    ]


def _hf_tokenizer(folder: Path, given: str | None, beside: Path) -> Tokenizer | None:
    """The given tokenizer, else the folder's; ValueError where another would be replaced by it."""
    path = given or folder / "tokenizer.model"
    if given is None and not path.exists():
        return None
    tokenizer = Tokenizer(tokenizer_model=path)
    if beside.exists() and sha256_of(beside) != sha256_of(path):
        raise ValueError(f"{beside}: is another tokenizer than {path}; name an OUT elsewhere")
    return tokenizer


if __name__ == "__main__":
    cli.run(main)
