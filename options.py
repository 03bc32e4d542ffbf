"""The command line of `run_llama.py`: its options, their defaults, and where it may write."""

import argparse
import os
from pathlib import Path

import cli
from config import ATTENTION_MODES, POOLINGS


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses and prints the options; a usage error is one line and exit code 2."""
    parser = cli.ArgumentParser(
        description="Generate text, classify by prompting, or finetune a classifier with Llama 2."
    )
    add = parser.add_argument
    add("--train", default="data/cfimdb-train.txt")
    add("--dev", default="data/cfimdb-dev.txt")
    add("--test", default="data/cfimdb-test.txt")
    add("--label-names", default="data/cfimdb-label-mapping.json", help="JSON list of names")
    add("--pretrained-model-path", default="stories42M.pt", help=".pt or llama2.c .bin")
    add("--max_sentence_len", type=cli.positive_int, help="tokens kept of a sentence")
    add("--seed", type=cli.seed_int, default=1337)
    add("--epochs", type=cli.positive_int, default=5)
    add(
        "--option",
        choices=("generate", "prompt", "finetune"),
        default="generate",
        help="prompt leaves the Llama frozen, finetune trains it",
    )
    add("--use_gpu", action="store_true", help="CUDA, else Apple MPS")
    add("--generated_sentence_low_temp_out", default="generated-sentence-temp-0.txt")
    add("--generated_sentence_high_temp_out", default="generated-sentence-temp-1.txt")
    add("--dev_out", default="cfimdb-dev-prompting-output.txt")
    add("--test_out", default="cfimdb-test-prompting-output.txt")
    add("--batch_size", type=cli.positive_int, default=8)
    add("--hidden_dropout_prob", type=cli.probability_below_one, default=0.3)
    add("--lr", type=cli.positive_float, default=2e-5)
    add(
        "--attention",
        choices=ATTENTION_MODES,
        help="default: what the checkpoint records, else full (the assignment: no mask)",
    )
    add(
        "--pooling",
        choices=POOLINGS,
        help="state that is read; default: position with full attention, last with causal",
    )
    add("--tokenizer_path", help="default: the .model file beside the checkpoint, else at the root")
    args = parser.parse_args(argv)
    print(f"args: {vars(args)}")
    return args


def checkpoint_path(args: argparse.Namespace) -> str:
    """`args.filepath` if a script set it, else a name that carries option, data set, epochs, lr."""
    train = Path(args.train).resolve()
    dataset = train.parent.name if train.stem == "train" else train.stem.removesuffix("-train")
    return getattr(args, "filepath", None) or f"{args.option}-{dataset}-{args.epochs}-{args.lr}.pt"


def require_folder(outfile: str) -> None:
    """A ValueError before the work, not after it, where `outfile` cannot be written."""
    folder = Path(outfile).resolve().parent
    if not outfile or Path(outfile).is_dir():
        raise ValueError(f"{outfile!r}: is no name for an output file")
    if not folder.is_dir():
        raise ValueError(f"{outfile}: its folder does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{outfile}: its folder may not be written to")


def require_output_names(args: argparse.Namespace, kind: str) -> None:
    for split in ("dev", "test"):
        name, ending = getattr(args, f"{split}_out"), f"{split}-{kind}-output.txt"
        if not name.endswith(ending):
            raise ValueError(f"--{split}_out {name}: must end in {ending}, as <dataset>-{ending}")
        require_folder(name)
