"""Compare a model with float32 and with int8 weights: perplexity, accuracy and file size.

    python -m benchmarks.int8
    python -m benchmarks.int8 --model data/mini/model.pt --documents 50
    python -m benchmarks.int8 --data FILE --label-names FILE --classifier CHECKPOINT.pt

The output is a Markdown table. Perplexity has two rows, because fast/int8.py has two products: one
for many rows, and one for few rows, which generation uses and which rounds activations to bfloat16.
"""

import argparse
import io
import math
from types import SimpleNamespace
from unittest import mock

import torch

from classifier import LlamaZeroShotClassifier, label_room, prompt_suffix
from fast import int8
from llama import load_pretrained
from pretraining.corpus import read_documents, split_heldout
from pretraining.loop import HeldOut
from tokenizer import Tokenizer, find_tokenizer_model
from tools.export import weights_of
from tools.predict import load_predictor
from training.dataset import SentenceDataset, encode_examples
from training.evaluation import evaluate
from training.labeled import read_label_names, read_sentences
from training.options import DEMO_DATA, fill_model, positive_int
from training.state import ROOT
from utils import ArgumentParser, run_script

CPU, WINDOW, BATCH_SIZE = torch.device("cpu"), 256, 8


def measure_model(args: argparse.Namespace, quantize: str | None) -> dict[str, str]:
    """Measure the pretrained model, causal as it was trained, on --text and --data."""
    path, names = args.pretrained_model_path, read_label_names(args.label_names)
    model = load_pretrained(path, attention="causal", quantize=quantize)
    tokenizer = Tokenizer(tokenizer_model=find_tokenizer_model(path))
    tokenizer.require_vocab_size(model.config.vocab_size)
    documents = [line.partition(" ||| ")[2] or line for line in read_documents(args.text)]
    if args.documents < len(documents):
        documents = split_heldout(documents, args.documents)[1]
    text = HeldOut.texts("text", documents, tokenizer, min(WINDOW, model.config.max_seq_len))
    measured = {}
    for products, max_rows in (("many", 0), ("few", 10**9)):
        with mock.patch.object(int8, "MAX_ROWS", max_rows):
            nats = text.measure(model, max_tokens=1)["text nats/token"]
        name = f"perplexity of {text.divisors['nats/token']:,} tokens, products of {products} rows"
        measured[name] = f"{math.exp(nats):.3f}"
    file = io.BytesIO()
    torch.save({"model": weights_of(model), "model_args": model.config.to_dict()}, file)

    classifier = LlamaZeroShotClassifier(
        SimpleNamespace(num_labels=len(names)), tokenizer, names, model
    )
    max_tokens = model.config.max_seq_len - label_room(tokenizer, names)
    rows, question = read_sentences(args.data, len(names)), prompt_suffix(names).rstrip()
    examples, _ = encode_examples(rows, tokenizer, max_tokens=max_tokens, suffix=question)
    result = evaluate(classifier, SentenceDataset(examples, tokenizer.pad_id), BATCH_SIZE, CPU)
    name = f"zero-shot accuracy of {len(rows):,} sentences"
    return {**measured, name: f"{result.accuracy:.3f}", "file": f"{file.tell() / 1e6:.2f} MB"}


def measure_classifier(args: argparse.Namespace, quantize: str | None) -> dict[str, str]:
    """Measure a finetuned checkpoint on --data."""
    predictor = load_predictor(args.classifier, quantize=quantize)
    rows = read_sentences(args.data, len(predictor.label_names))
    data, _ = predictor.encode([sentence for sentence, _ in rows])
    pairs = zip(data.examples, rows, strict=True)
    data.examples = [example._replace(label=label) for example, (_, label) in pairs]
    accuracy = evaluate(predictor.model, data, BATCH_SIZE, CPU).accuracy
    return {"finetuned accuracy": f"{accuracy:.3f}"}


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__, prog="python -m benchmarks.int8")
    add, demo = parser.add_argument, {key: str(ROOT / path) for key, path in DEMO_DATA.items()}
    add("--model", dest="pretrained_model_path", metavar="FILE",
        help="pretrained checkpoint (default: stories42M.pt, else data/mini/model.pt)")  # fmt: skip
    add("--text", default=demo["test"], metavar="FILE", help="text for the perplexity, a document "
        f"on each line (default: {DEMO_DATA['test']})")  # fmt: skip
    add("--documents", type=positive_int, default=200, metavar="N",
        help="documents of --text to read (default: %(default)s)")  # fmt: skip
    add("--data", default=demo["test"], metavar="FILE", help="`label ||| sentence` on each line, "
        f"for the accuracies (default: {DEMO_DATA['test']})")  # fmt: skip
    add("--label-names", default=demo["label_names"], metavar="FILE",
        help=f"JSON list of the label names (default: {DEMO_DATA['label_names']})")  # fmt: skip
    add("--classifier", metavar="FILE", help="finetuned checkpoint to measure (default: none)")
    args = parser.parse_args(argv)
    fill_model(args)
    columns = [measure_model(args, quantize) for quantize in (None, "int8")]
    if args.classifier:
        for column, quantize in zip(columns, (None, "int8"), strict=True):
            column |= measure_classifier(args, quantize)
    print("| | float32 | int8 |\n|---|---|---|")
    for name in columns[0]:
        print(f"| {name} | {columns[0][name]} | {columns[1][name]} |")


if __name__ == "__main__":
    run_script(main)
