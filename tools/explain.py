"""Show which words carried the prediction of a finetuned classifier.

    python -m tools.explain --checkpoint CHECKPOINT.pt "a warm and funny film"
    python -m tools.explain --checkpoint CHECKPOINT.pt --label good --out PAGE.html "a dull film"
    python -m tools.explain --checkpoint CHECKPOINT.pt --errors PREDICTIONS.jsonl --top 5

Two methods give each word, a piece between white space, a value in nats:

- leave-one-out: log p(label | sentence) - log p(label | sentence without the word) (Li, Monroe and
  Jurafsky 2016, arXiv 1612.08220). Two words with the same meaning stand in for each other, so both
  get a small value.
- gradient x input: the gradient of log p(label | sentence) by a token's embedding, times the
  embedding (Shrikumar et al. 2016, arXiv 1605.01713), summed over the tokens of a word. It takes
  one pass and is rougher: RMSNorm ignores the scale of an embedding, which this method measures.

All values are small if the model is confident: log p is then near 0 with and without any word.
"""

import argparse
import os
import re
import sys
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

import torch

from tools.lines import open_input, read_arguments
from tools.mistakes import find_mistakes
from tools.predict import Predictor, load_predictor
from tools.rendering import Explanation, page, table
from training.dataset import SentenceDataset
from training.evaluation import forward_pass
from training.options import positive_int, require_outputs
from utils import (
    ArgumentParser,
    InputError,
    atomic_write,
    brief,
    on_one_line,
    pick_device,
    printable,
    run_script,
)

BATCH_SIZE = 32
SMALLEST = torch.finfo(torch.float32).tiny  # stands for a probability that float32 rounds to 0


class Reading(NamedTuple):
    """A sentence, its tokens and its words."""

    sentence: str
    data: SentenceDataset  # the sentence alone: the tokens that the model reads, bos first
    spans: list[tuple[int, int]]  # the words, in characters
    word_of_token: list[int]  # without bos; len(spans) for a space after the last word

    @property
    def words(self) -> list[str]:
        return [self.sentence[begin:end] for begin, end in self.spans]

    @property
    def read_words(self) -> list[int]:
        """Indices of the words of which the model reads a token."""
        return sorted(set(self.word_of_token) & set(range(len(self.spans))))

    def without(self, word: int) -> str:
        """Return the sentence without a word and the white space after it (or before the last)."""
        if word + 1 < len(self.spans):
            return self.sentence[: self.spans[word][0]] + self.sentence[self.spans[word + 1][0] :]
        return self.sentence[: self.spans[word - 1][1]] if word else ""


def read(predictor: Predictor, sentence: str) -> Reading:
    """Tokenize a sentence and assign each token to the word that holds its last character.

    Raises InputError if the sentence has no word.
    """
    spans = [match.span() for match in re.finditer(r"\S+", sentence)]
    if not spans:
        raise InputError(f"the sentence {brief(sentence)} has no word")
    data, _ = predictor.encode([sentence])
    ends = [end for _, end in spans]
    encoded = predictor.tokenizer.sp_model.encode(sentence, return_type="offset_mapping")
    # A character that the vocabulary lacks is several byte tokens; all except the last are empty.
    last_characters = [max(begin, end - 1) for begin, end in encoded["offsets"]]
    word_of_token = [bisect_right(ends, character) for character in last_characters]
    return Reading(sentence, data, spans, word_of_token[: len(data.examples[0].tokens) - 1])


def explain(
    predictor: Predictor,
    sentence: str,
    label: int | None = None,
    gold: str | None = None,
) -> Explanation:
    """Explain a label (None: the predicted one) of a sentence that is alone in its batch.

    A word has the value None if the model reads none of its tokens, because finetuning or the
    model's positions cut the sentence.
    """
    reading = read(predictor, sentence)
    probs = predictor.probs(reading.data, 1)[0]  # (n_labels,)
    predicted = int(probs.argmax())
    label = predicted if label is None else label
    values = {}
    for method, attribute in METHODS.items():
        by_word = attribute(predictor, reading, label)
        values[method] = [by_word.get(word) for word in range(len(reading.spans))]
    names = predictor.label_names
    return Explanation(
        predicted=names[predicted],
        probability=probs[predicted].item(),
        label=names[label],
        label_probability=probs[label].item(),
        gold=gold,
        words=reading.words,
        values=values,
    )


def leave_one_out(predictor: Predictor, reading: Reading, label: int) -> dict[int, float]:
    """Return log p(label | sentence) - log p(label | sentence without the word) by word.

    A sentence without its only word is bos alone. In a truncated sentence, leaving out a word lets
    the model read later words.
    """
    words = reading.read_words
    shortened = [reading.sentence, *(reading.without(word) for word in words)]
    data, _ = predictor.encode(shortened)
    batch_size = BATCH_SIZE if predictor.model.reads_lengths else 1  # 1 has no padding to read
    probs = predictor.probs(data, batch_size)[:, label]
    log_probs = probs.clamp_min(SMALLEST).log()
    return dict(zip(words, (log_probs[0] - log_probs[1:]).tolist(), strict=True))


def gradient_x_input(predictor: Predictor, reading: Reading, label: int) -> dict[int, float]:
    """Return the sum of `token_gradients_x_input` over the tokens of each word."""
    sums = dict.fromkeys(reading.read_words, 0.0)
    values = token_gradients_x_input(predictor, reading, label)
    for word, value in zip(reading.word_of_token, values[1:], strict=True):
        if word in sums:
            sums[word] += value
    return sums


def token_gradients_x_input(predictor: Predictor, reading: Reading, label: int) -> list[float]:
    """Return the gradient of log p(label) by each token's embedding times the embedding, bos first.

    Their sum is d/ds log p(label) at s = 1, where s scales every embedding.
    """
    embeddings = []

    def make_leaf(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output.detach().requires_grad_())  # (1, T, dim)
        return embeddings[0]

    batch = reading.data.collate_fn(reading.data.examples)
    with predictor.model.llama.tok_embeddings.register_forward_hook(make_leaf):
        log_probs = forward_pass(predictor.model, batch, predictor.device)  # (1, n_labels)
    (gradient,) = torch.autograd.grad(log_probs[0, label], embeddings)
    return (gradient * embeddings[0].detach()).sum(dim=-1)[0].tolist()


METHODS = {"leave-one-out": leave_one_out, "gradient x input": gradient_x_input}


# ---------------------------------------------------------------- the command


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, prog="python -m tools.explain")
    add = parser.add_argument
    add("sentences", nargs="*", metavar="SENTENCE",
        help="sentence, or 'label ||| sentence' (default: the mistakes in --errors)")  # fmt: skip
    add("--checkpoint", metavar="FILE",
        help="finetuned checkpoint (default: none, --errors lists mistakes without explaining "
        "them)")  # fmt: skip
    add("--errors", metavar="FILE", help="output of tools.predict --format jsonl, whose mistakes "
        "to list and explain; - reads standard input (default: none)")  # fmt: skip
    add("--top", type=positive_int, default=10, metavar="N",
        help="mistakes to list, the most confident ones first (default: %(default)s)")  # fmt: skip
    add("--label", metavar="NAME", help="label to explain (default: the predicted one)")
    add("--out", metavar="FILE.html", help="HTML page to write as well (default: none)")
    add("--tokenizer_path", metavar="FILE",
        help="SentencePiece model (default: the one that the checkpoint records)")  # fmt: skip
    add("--use_gpu", action="store_true", help="use CUDA, else Apple's MPS (default: the CPU)")
    args = parser.parse_args(argv)
    if bool(args.sentences) == (args.errors is not None):
        parser.error("give either sentences or --errors FILE")
    explains = args.sentences or args.out or args.label or args.tokenizer_path or args.use_gpu
    if args.checkpoint is None and explains:
        parser.error("name --checkpoint, such as finetune-sst-5-2e-05.pt")
    if args.out is not None and not args.out.lower().endswith((".html", ".htm")):
        parser.error(f"--out {args.out}: must end in .html")
    return args


def read_mistakes(path: str, top: int) -> list[tuple[str, str, str]]:
    """Print the counts and return (heading, sentence, gold label) of the worst mistakes."""
    with open_input(path) as file:
        worst, n_mistakes, n_gold = find_mistakes(file, path, top)
    noun = "mistake" if n_mistakes == 1 else "mistakes"
    print(f"{n_mistakes:,} {noun} of {n_gold:,} with a gold label")
    return [
        (
            f"{one.probability:.3f} predicted {one.predicted}, gold {one.gold} | "
            f"line {one.line} | {one.sentence}",
            one.sentence,
            one.gold,
        )
        for one in worst
    ]


def read_labeled(sentences: list[str], names: list[str]) -> list[tuple[str, str, str | None]]:
    """Return ("", sentence, gold label) of the command line's sentences."""
    lines = read_arguments(sentences, names)
    if not lines:
        raise InputError("no sentence has a word; write one in quotation marks")
    return [("", line.sentence, None if line.gold is None else names[line.gold]) for line in lines]


def wants_color() -> bool:
    """Return whether standard output is a terminal with colors, without NO_COLOR (no-color.org)."""
    has_colors = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return has_colors and not os.environ.get("NO_COLOR")


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    predictor, label = None, None
    if args.out is not None:
        require_outputs([args.out], [args.checkpoint, args.errors, args.tokenizer_path])
    if args.checkpoint is not None:
        predictor = load_predictor(args.checkpoint, args.tokenizer_path, pick_device(args.use_gpu))
        if args.label is not None:
            label = label_index(args.label, predictor.label_names)
    if args.errors is not None:
        items = read_mistakes(args.errors, args.top)
    else:
        items = read_labeled(args.sentences, predictor.label_names)
    explanations = []
    for heading, sentence, gold in items:
        if heading:
            print(on_one_line(heading))
        if predictor is not None:
            explanations.append(explain(predictor, sentence, label, gold))
            print(table(explanations[-1], wants_color()), end="\n\n", flush=True)
    if args.out is not None:
        title = f"Which words carried the predictions of {Path(args.checkpoint).name}"
        with atomic_write(args.out) as file:
            file.write(page(explanations, title))
        print(f"wrote {args.out}")


def label_index(name: str, names: list[str]) -> int:
    if name not in names:
        known = printable(", ".join(names))
        raise InputError(f"--label {name}: the checkpoint's labels are {known}")
    return names.index(name)


if __name__ == "__main__":
    run_script(main)
