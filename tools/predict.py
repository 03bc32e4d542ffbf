"""Label sentences with a finetuned checkpoint.

    python -m tools.predict --checkpoint CHECKPOINT.pt "a warm film" "a dull film"
    python -m tools.predict --checkpoint CHECKPOINT.pt --input data/demo-test.txt
    python -m tools.predict --checkpoint CHECKPOINT.pt --input FILE.csv --column text --format jsonl

A file holds a sentence on each line, or `label ||| sentence` on each line. With labels, standard
error shows accuracy, macro F1 and the confusion matrix. Predictions are written while lines arrive,
so memory does not grow with the input.
"""

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from classifier import LlamaEmbeddingClassifier
from fast.int8 import quantize_model, require_known
from fast.threads import USUAL_LENGTH, choose_threads
from tokenizer import Tokenizer, open_tokenizer
from tools.lines import Line, in_blocks, is_typed, read_arguments, read_input
from training.checkpoint import load_classifier
from training.dataset import SentenceDataset, encode_examples
from training.evaluation import predict_probs
from training.labeled import NO_GOLD_LABEL
from training.options import positive_int
from utils import ArgumentParser, InputError, pick_device, printable, run_script

CPU = torch.device("cpu")
BATCHES_PER_BLOCK = 32  # sorting by length needs several batches


@dataclass(frozen=True)
class Predictor:
    """A finetuned classifier in eval mode, and all that it needs to read a sentence."""

    model: LlamaEmbeddingClassifier
    tokenizer: Tokenizer
    label_names: list[str]
    max_sentence_len: int | None  # tokens that finetuning kept of a sentence
    device: torch.device

    def encode(self, sentences: list[str]) -> tuple[SentenceDataset, int]:
        """Return the tokens as finetuning read them, and the number of sentences that lose their
        end because they exceed the model's positions."""
        examples, n_truncated = encode_examples(
            [(sentence, NO_GOLD_LABEL) for sentence in sentences],
            self.tokenizer,
            max_tokens=self.model.llama.config.max_seq_len,
            max_sentence_len=self.max_sentence_len,
        )
        return SentenceDataset(examples, self.tokenizer.pad_id), n_truncated

    def probs(self, data: SentenceDataset, batch_size: int) -> torch.Tensor:
        """Return probabilities (N, n_labels) in the order of `data`."""
        return predict_probs(self.model, data, batch_size, self.device, description=None)


def load_predictor(
    checkpoint: str | os.PathLike,
    tokenizer_path: str | os.PathLike | None = None,
    device: torch.device = CPU,
    quantize: str | None = None,
) -> Predictor:
    """Read a finetuned checkpoint; `tokenizer_path` names a tokenizer that was moved.

    `quantize="int8"` stores the Llama's matrices as int8; the head stays float32.

    Raises InputError if the tokenizer is missing or differs from the one used in training.
    """
    require_known(quantize)
    model, saved = load_classifier(checkpoint)
    model.to(device)
    if quantize:  # on its device: a move would copy what tied matrices share
        quantize_model(model.llama)
    tokenizer = open_tokenizer(checkpoint, saved, tokenizer_path)
    tokenizer.require_vocab_size(model.llama.config.vocab_size)
    names = saved.get("label_names") or [str(label) for label in range(model.num_labels)]
    return Predictor(model, tokenizer, names, saved.get("max_sentence_len"), device)


# ---------------------------------------------------------------- writing


def writer(style: str, names: list[str]) -> Callable[[Line, int, list[float]], None]:
    """Return a function that prints a line's label and probabilities as text, jsonl or csv."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    if style != "text":  # programs expect UTF-8 in any locale
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    if style == "csv":
        columns = [f"p({name})" for name in names]
        table.writerow(["line", "label", "probability", *columns, "gold", "sentence"])

    def write(line: Line, label: int, probs: list[float]) -> None:
        predicted, probability = names[label], probs[label]
        gold = None if line.gold is None else names[line.gold]
        by_name = dict(zip(names, probs, strict=True))
        if style == "csv":
            table.writerow([line.number, predicted, probability, *probs, gold, line.sentence])
        elif style == "jsonl":
            row = {"line": line.number, "label": predicted, "probability": probability}
            row |= {"probabilities": by_name, "gold": gold, "sentence": line.sentence}
            print(json.dumps(row, ensure_ascii=False))
        else:
            wrong = "" if gold in (None, predicted) else f" (gold: {gold})"
            each = ", ".join(f"{name} {p:.3f}" for name, p in by_name.items())
            text = f"{predicted} {probability:.3f}{wrong} | {each} | {line.sentence}"
            print(printable(text))

    return write


def print_predictions(
    predictor: Predictor, blocks: Iterable[list[Line]], batch_size: int, style: str
) -> None:
    """Print predictions on standard output as blocks arrive, then a summary on standard error."""
    names, write = predictor.label_names, None
    confusion = np.zeros((len(names), len(names)), dtype=int)  # row: gold, column: predicted
    n_lines = n_truncated = 0
    started = time.monotonic()
    with tqdm(unit=" sentences", disable=sys.stdout.isatty() or None, leave=False) as bar:
        for block in blocks:
            data, n = predictor.encode([line.sentence for line in block])
            probs = predictor.probs(data, batch_size)  # (N, n_labels)
            labels, rounded = probs.argmax(dim=1).tolist(), probs.double().round(decimals=6)
            write = write or writer(style, names)
            for line, label, row in zip(block, labels, rounded.tolist(), strict=True):
                write(line, label, row)
                if line.gold is not None:
                    confusion[line.gold, label] += 1
            sys.stdout.flush()
            n_lines, n_truncated = n_lines + len(block), n_truncated + n
            bar.update(len(block))
    if not n_lines:
        raise InputError("there is no sentence to predict; write one per line")
    speed = n_lines / max(time.monotonic() - started, 1e-3)
    print(f"{n_lines:,} sentence{'s' * (n_lines != 1)}, {speed:.1f} per second", file=sys.stderr)
    if n_truncated:
        noun = "sentence was" if n_truncated == 1 else "sentences were"
        print(f"warning: {n_truncated:,} {noun} truncated to the model's context", file=sys.stderr)
    if confusion.any():
        print(summary(confusion, names), file=sys.stderr)


def summary(confusion: np.ndarray, names: list[str]) -> str:
    """Return accuracy, macro F1 and the confusion matrix, whose rows are the gold labels."""
    from sklearn.metrics import f1_score

    n_gold = confusion.sum()
    gold, predicted = np.nonzero(confusion)
    counts = confusion[gold, predicted]
    f1 = f1_score(gold, predicted, sample_weight=counts, average="macro", zero_division=0.0)
    lines = [f"acc :: {np.trace(confusion) / n_gold:.3f} of {n_gold:,}, macro f1 :: {f1:.3f}"]
    names = [printable(name) for name in names]
    rows = [[name, *map(str, row)] for name, row in zip(names, confusion.tolist(), strict=True)]
    table = [["gold \\ predicted", *names], *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *cells in table:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, prog="python -m tools.predict")
    add = parser.add_argument
    add("sentences", nargs="*", metavar="SENTENCE",
        help="sentence, or 'label ||| sentence' (default: the lines of --input)")  # fmt: skip
    add("--checkpoint", required=True, metavar="FILE",
        help="finetuned checkpoint of run_llama.py or advanced.run (required)")  # fmt: skip
    add("--input", default="-", metavar="FILE",
        help="file with a sentence, or 'label ||| sentence', on each line (default: -, which is "
        "standard input)")  # fmt: skip
    add("--column", metavar="NAME",
        help="column of sentences, if --input is CSV or a .tsv file (default: none, each line is "
        "a sentence)")  # fmt: skip
    add("--format", choices=("text", "jsonl", "csv"), default="text",
        help="format of the predictions (default: %(default)s)")  # fmt: skip
    add("--batch_size", type=positive_int, default=8, metavar="N",
        help="sentences in a batch (default: %(default)s)")  # fmt: skip
    add("--tokenizer_path", metavar="FILE",
        help="SentencePiece model (default: the one that the checkpoint records)")  # fmt: skip
    add("--quantize", choices=("int8",),
        help="round the Llama's weight matrices to int8 (default: float32)")  # fmt: skip
    add("--use_gpu", action="store_true", help="use CUDA, else Apple's MPS (default: the CPU)")
    args = parser.parse_args(argv)
    if args.sentences and (args.input != "-" or args.column is not None):
        parser.error("give sentences or --input, not both")
    if args.column is None and args.input.lower().endswith((".csv", ".tsv")):
        parser.error(f"--input {args.input}: name its column of sentences by --column NAME")
    return args


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    device = pick_device(args.use_gpu)
    predictor = load_predictor(args.checkpoint, args.tokenizer_path, device, args.quantize)
    choose_threads(predictor.model.llama, USUAL_LENGTH * args.batch_size)
    names, multiple_of = predictor.label_names, 1
    if args.sentences:
        lines = read_arguments(args.sentences, names)
    else:
        lines = read_input(args.input, args.column, names)
        if not predictor.model.reads_lengths and not is_typed(args.input):
            multiple_of = args.batch_size  # it reads padding: whole batches are reproducible
    blocks = in_blocks(lines, BATCHES_PER_BLOCK * args.batch_size, multiple_of)
    print_predictions(predictor, blocks, args.batch_size, args.format)


if __name__ == "__main__":
    run_script(main)
