"""Convert a checkpoint to transformers, llama2.c or int8, or from transformers.

    python -m tools.export CHECKPOINT.pt --to hf FOLDER
    python -m tools.export data/mini/model.pt --to llama2c OUT.bin
    python -m tools.export FOLDER --from hf OUT.pt

A checkpoint is a file that `run_llama.py`, `advanced.run`, `pretraining.run` or llama2.c wrote.
Only the Llama of a finetuned checkpoint is exported; standard error names the parts that a format
cannot hold.
"""

import argparse
import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from config import LlamaConfig
from fast.int8 import quantize_model
from formats import huggingface, llama2c
from formats.checkpoint import parse_checkpoint, read_checkpoint
from formats.torch_file import is_torch_file, listed, load_torch_file, save_torch_file
from llama import Llama
from tokenizer import Tokenizer, find_tokenizer_model, open_tokenizer
from training.checkpoint import label_names_of
from utils import ArgumentParser, InputError, atomic_write, on_one_line, run_script, sha256_of

READERS = {"hf": "transformers", "llama2c": "llama2.c", "int8": "the int8 file"}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, prog="python -m tools.export")
    add = parser.add_argument
    add("source", metavar="SOURCE",
        help="checkpoint to read, .pt or .bin; a transformers folder with --from hf")  # fmt: skip
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--to", choices=tuple(READERS),
        help="format to write: a transformers folder, a .bin of llama2.c, or a .pt of int8 "
        "weights (required, unless --from is given)")  # fmt: skip
    direction.add_argument("--from", dest="origin", choices=("hf",),
        help="format to read; OUT is then a .pt (required, unless --to is given)")  # fmt: skip
    add("out", metavar="OUT",
        help="file or folder to write, which must not exist yet; --to llama2c also writes its "
        "tokenizer, as NAME.tokenizer.bin for NAME.bin")  # fmt: skip
    add("--tokenizer_path", metavar="FILE",
        help="SentencePiece model (default: the one that a finetuned checkpoint records, else the "
        ".model file beside SOURCE or in its folder, else the project's)")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    out = Path(args.out)
    require_new(out)
    if args.origin:
        notes = import_hf(Path(args.source), out, args.tokenizer_path)
    else:
        model, tokenizer, notes = read_ours(args.source, args.tokenizer_path, READERS[args.to])
        export = {"hf": export_hf, "llama2c": export_llama2c, "int8": export_int8}[args.to]
        notes += export(model, tokenizer, out)
    for note in notes:
        print(f"tools.export: note: {on_one_line(note)}", file=sys.stderr)


def require_new(out: Path) -> None:
    """Raise InputError before the work if OUT exists or its folder does not."""
    if out.exists() or out.is_symlink():
        raise InputError(f"{out}: exists already; remove it, or name another OUT")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: its folder does not exist")


def read_ours(
    checkpoint: str, tokenizer_path: str | None, reader: str
) -> tuple[Llama, Tokenizer, list[str]]:
    """Return the Llama of a checkpoint, its tokenizer, and notes on parts that `reader` lacks."""
    is_file = Path(checkpoint).is_file()
    saved = load_torch_file(checkpoint) if is_file and is_torch_file(checkpoint) else {}
    model_args, weights = (
        parse_checkpoint(checkpoint, saved) if saved else read_checkpoint(checkpoint)
    )
    notes = []
    if any(name.startswith("llama.") for name in weights):  # a finetuned classifier
        if any(".adapter." in name for name in weights):
            raise InputError(f"{checkpoint}: has adapters, for which {reader} has no place")
        dropped = [name for name in weights if not name.startswith("llama.")]
        weights = {n.removeprefix("llama."): w for n, w in weights.items() if n not in dropped}
        labels = listed(label_names_of(checkpoint, saved) or ["not recorded"])
        notes.append(
            f"{checkpoint}: {reader} gets the Llama without {listed(dropped)} (labels: {labels})"
        )
    try:
        model = Llama.from_weights(LlamaConfig(**model_args), weights)
    except InputError as error:
        raise InputError(f"{checkpoint}: {error}") from error
    if model.config.attention != "causal" and reader != READERS["int8"]:  # int8 records the mode
        notes.append(
            f"{checkpoint}: has full attention here; {reader} computes causal attention, as "
            "--attention causal does"
        )
    tokenizer = open_tokenizer(checkpoint, saved, tokenizer_path)
    tokenizer.require_vocab_size(model.config.vocab_size)
    return model, tokenizer, notes


def weights_of(model: Llama) -> dict[str, torch.Tensor]:
    """Return a model's weights, without an output matrix that is tied to the embedding."""
    weights = model.state_dict()
    if model.output.weight is model.tok_embeddings.weight:
        weights = {name: t for name, t in weights.items() if not name.startswith("output.")}
    return weights


def export_llama2c(model: Llama, tokenizer: Tokenizer, out: Path) -> list[str]:
    """Write the .bin that run.c reads and the tokenizer for its option -z; return notes."""
    beside = out.with_name(f"{out.name.removesuffix('.bin')}.tokenizer.bin")
    require_new(beside)
    weights = weights_of(model)
    llama2c.write_tokenizer(beside, tokenizer)
    try:
        llama2c.write_bin(out, llama2c.sizes_of(model.config, weights), weights)
    except BaseException:
        beside.unlink()
        raise
    print(f"wrote {out} and {beside}")
    notes, sp = [], tokenizer.sp_model
    if model.config.layer_norm_eps != llama2c.EPS:
        eps = model.config.layer_norm_eps
        notes.append(f"{out}: has no place for layer_norm_eps={eps}; run.c takes {llama2c.EPS}")
    ids = (tokenizer.bos_id, tokenizer.eos_id, sp.piece_to_id("<0x00>"))
    if ids != (1, 2, 3) or sp.normalize(" a  b") != "▁▁a▁▁b":
        notes.append(
            f"{tokenizer.model_path}: run.c may split texts differently: it expects bos, eos and "
            "<0x00> at 1, 2 and 3, a space before a text, and no removal of spaces"
        )
    return notes


def export_int8(model: Llama, tokenizer: Tokenizer, out: Path) -> list[str]:
    """Write a checkpoint of int8 matrices, a float32 scale for each row, and float32 norms."""
    quantize_model(model)
    save_torch_file(out, {"model": weights_of(model), "model_args": model.config.to_dict()})
    print(f"wrote {out}")
    try:
        found = find_tokenizer_model(out)
    except InputError:  # several other ones are there
        found = None
    if found and found.is_file() and sha256_of(found) == sha256_of(tokenizer.model_path):
        return []
    return [f"{out}: its tokenizer is {tokenizer.model_path}; copy it beside {out.name}"]


def export_hf(model: Llama, tokenizer: Tokenizer, out: Path) -> list[str]:
    """Write a folder for AutoModelForCausalLM and AutoTokenizer; leave nothing after an error."""
    notes = []
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".export-") as temporary:
        folder = Path(temporary, "folder")
        folder.mkdir()
        try:
            shutil.copyfile(tokenizer.model_path, folder / "tokenizer.model")
            huggingface.write_model(folder, model.config, weights_of(model), tokenizer)
            has_same = huggingface.write_tokenizer(folder, tokenizer, model.config.max_seq_len)
        except Exception as error:  # each library has its own for a full disk
            full = os.strerror(errno.ENOSPC)
            if full not in str(error):
                raise
            raise OSError(errno.ENOSPC, full, str(out)) from error
        if not has_same:
            notes.append(
                f"{tokenizer.model_path}: transformers' tokenizer.json cannot split texts as it "
                f"does, so {out} has only tokenizer.model"
            )
        folder.replace(out)
    print(f"wrote {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return notes


def import_hf(folder: Path, out: Path, tokenizer_path: str | None) -> list[str]:
    """Write a causal checkpoint from a transformers folder, and its tokenizer.model beside it."""
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder; --from hf reads a folder with config.json")
    try:
        model = Llama.from_weights(*huggingface.read_model(folder))
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    tokenizer_model = Path(tokenizer_path or folder / "tokenizer.model")
    beside = out.absolute().with_name("tokenizer.model")
    has_tokenizer = tokenizer_path is not None or tokenizer_model.exists()
    if has_tokenizer:
        n_words, vocab_size = Tokenizer(tokenizer_model=tokenizer_model).n_words, model.vocab_size
        if n_words != vocab_size:
            raise InputError(
                f"{folder}: its embedding has {vocab_size} rows, {tokenizer_model} has {n_words} "
                "tokens; if tokens were added in transformers, call "
                f"`model.resize_token_embeddings({n_words})` and save it again"
            )
        if beside.exists() and sha256_of(beside) != sha256_of(tokenizer_model):
            raise InputError(f"{beside}: is another tokenizer; name an OUT in another folder")
        if not beside.exists():
            with atomic_write(beside, "wb") as file:
                file.write(tokenizer_model.read_bytes())
    save_torch_file(out, {"model": weights_of(model), "model_args": model.config.to_dict()})
    if not has_tokenizer:
        print(f"wrote {out}")
        return [f"{folder}: has no tokenizer.model; name one for {out} by --tokenizer_path"]
    print(f"wrote {out}; its tokenizer is {beside.name} beside it")
    return []


if __name__ == "__main__":
    run_script(main)
