"""How long the assignment's sentences are, as numbers, so that a benchmark needs none of them.

python -m benchmarks.lengths writes lengths.json from the training files and the Llama tokenizer.
"""

import json
from pathlib import Path

import numpy as np

import cli
from tokenizer import Tokenizer
from training.dataset import encode_examples
from training.labelled import read_sentences
from utils import atomic_write

PATH = Path(__file__).with_name("lengths.json")
DATASETS = ("sst", "cfimdb")
FAR = 10**9  # no sentence is cut


def draw_lengths(dataset: str, n: int, seed: int, longest: int) -> list[int]:
    """n numbers of tokens, bos included, distributed as in `dataset`, `longest` at most."""
    percentiles = json.loads(PATH.read_text(encoding="utf-8"))[dataset]
    where = np.random.default_rng(seed).uniform(0, len(percentiles) - 1, n)
    drawn = np.interp(where, range(len(percentiles)), percentiles)
    return [min(round(length), longest) for length in drawn]


def main() -> None:
    percentiles = {}
    for dataset in DATASETS:
        rows = read_sentences(f"data/{dataset}-train.txt")
        examples, _ = encode_examples(rows, Tokenizer(), max_tokens=FAR)
        lengths = [len(example.tokens) for example in examples]
        percentiles[dataset] = [float(q) for q in np.percentile(lengths, range(101))]
    with atomic_write(PATH) as file:
        file.write(json.dumps(percentiles) + "\n")


if __name__ == "__main__":
    cli.run(main)
