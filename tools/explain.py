"""Which words carried a decision of a finetuned classifier.

    python -m tools.explain --checkpoint FILE "a sentence" "another" [--out page.html]
    python -m tools.explain --errors predictions.jsonl [--checkpoint FILE]

Two attributions to the words of a sentence, those between white space, both in nats:

- leave-one-out: log p(label | sentence) - log p(label | sentence without the word), the difference
  of which Li, Monroe and Jurafsky (2016, arXiv 1612.08220) take the share. Two words that say the
  same cover for each other, and both get little.
- gradient x input: the gradient of log p(label | sentence) by a token's embedding, times that
  embedding (Shrikumar et al. 2016, arXiv 1605.01713), summed over the tokens of a word. Over all
  tokens, bos too, it sums to d/ds log p at s = 1, where s scales every embedding. RMSNorm does not
  see that scale: what is left is how an embedding weighs against what the layers add to it, so of
  the two this is the rougher, and the faster by as many passes as there are words.

Of a sentence that the model is sure of all values are small: log p has nearly reached its upper end
at 0, with any word and without. The shares, which the colors show, are then what there is to read.
"""

import argparse
import os
import re
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import cli
from config import shown
from tokenizer import Tokenizer
from tools import picture, rendering
from tools.mistakes import find_mistakes
from tools.predict import Predictor, load_predictor, open_lines
from tools.rendering import Explanation, printable
from training.dataset import Example, SentenceDataset
from training.labelled import NO_GOLD_LABEL
from training.loop import log_probs_of
from training.options import require_folder
from utils import pick_device

METHODS = {"leave_one_out": "leave-one-out", "gradient": "gradient x input"}
BATCH_SIZE = 32
TOP = 10
SMALLEST = torch.finfo(torch.float32).tiny  # a probability below it counts as it


class Reading(NamedTuple):
    """How a model reads a sentence: its words, and the words that each token covers."""

    sentence: str
    spans: list[tuple[int, int]]  # of the words, in characters
    example: Example  # bos first
    covered: list[range]  # for each token but bos, indices of words

    @property
    def words(self) -> list[str]:
        return [self.sentence[begin:end] for begin, end in self.spans]

    @property
    def read_words(self) -> list[int]:
        """Indices of the words of which the model reads a token."""
        return sorted({word for words in self.covered for word in words})

    def without(self, word: int) -> str:
        """The sentence less a word and the white space behind it, or before it at the end."""
        if word + 1 < len(self.spans):
            return self.sentence[: self.spans[word][0]] + self.sentence[self.spans[word + 1][0] :]
        return self.sentence[: self.spans[word - 1][1]] if word else ""


def read(predictor: Predictor, sentence: str) -> Reading:
    """ValueError where the sentence has no word."""
    spans = [match.span() for match in re.finditer(r"\S+", sentence)]
    if not spans:
        raise ValueError(f"the sentence {shown(sentence)} has no word")
    data, _ = predictor.encode([sentence])
    covered = words_of_tokens(predictor.tokenizer, sentence, spans)
    return Reading(sentence, spans, data[0], covered[: len(data[0].tokens) - 1])


def words_of_tokens(
    tokenizer: Tokenizer, sentence: str, spans: list[tuple[int, int]]
) -> list[range]:
    """For each token of the sentence, which bos is not, the words it covers: indices of `spans`.

    A space goes with the word behind it, and one behind the last word with none. The bytes of a
    letter that the vocabulary lacks stand where that letter stands.
    """
    begins, ends = zip(*spans, strict=True)
    offsets = tokenizer.sp_model.encode(sentence, return_type="offset_mapping")["offsets"]
    covered = []
    for begin, end in offsets:  # in characters; of a letter's bytes all but the last are empty
        first = bisect_right(ends, begin)
        behind = max(bisect_left(begins, end), first + 1)
        covered.append(range(first, min(behind, len(spans))))
    return covered


def explain(
    predictor: Predictor,
    sentence: str,
    label: int | None = None,
    gold: str | None = None,
    methods: Iterable[str] = tuple(METHODS),
) -> Explanation:
    """What the classifier says of a sentence, alone in its batch, and why.

    `label` is the one to explain, None the predicted one. A word of which the model reads no
    token, since it lies behind what finetuning or the model's positions keep, has the value None.
    ValueError where the sentence has no word.
    """
    reading = read(predictor, sentence)
    probs = predictor.probs(_dataset(predictor, reading.example), 1)[0].tolist()
    predicted = max(range(len(probs)), key=probs.__getitem__)
    label = predicted if label is None else label
    attribute = {"leave_one_out": leave_one_out, "gradient": gradient_x_input}
    values = {}
    for method in methods:
        found = attribute[method](predictor, reading, label)
        values[METHODS[method]] = [found.get(word) for word in range(len(reading.spans))]
    names = predictor.label_names
    return Explanation(
        names[predicted], probs[predicted], names[label], probs[label], gold, reading.words, values
    )


def leave_one_out(predictor: Predictor, reading: Reading, label: int) -> dict[int, float]:
    """log p(label | sentence) - log p(label | sentence without the word), of each word read.

    Without its only word bos alone is left. Where the model reads but the beginning of a sentence,
    what follows moves up.
    """
    (whole,) = _log_probs(predictor, [reading.sentence], label)
    words, values = reading.read_words, []
    for start in range(0, len(words), BATCH_SIZE):
        shortened = [reading.without(word) for word in words[start : start + BATCH_SIZE]]
        values += [whole - log_p for log_p in _log_probs(predictor, shortened, label)]
    return dict(zip(words, values, strict=True))


def _log_probs(predictor: Predictor, sentences: list[str], label: int) -> list[float]:
    """log p(label | sentence) of each; a model that reads its padding gets none of it."""
    data, _ = predictor.encode(sentences)
    probs = predictor.probs(data, BATCH_SIZE if predictor.model.reads_lengths else 1)
    return probs[:, label].clamp_min(SMALLEST).log().tolist()


def gradient_x_input(predictor: Predictor, reading: Reading, label: int) -> dict[int, float]:
    """The sum over its tokens, of each word read; a token of several words is shared alike."""
    sums = dict.fromkeys(reading.read_words, 0.0)
    by_token = token_gradients_x_input(predictor, reading.example, label)
    for value, words in zip(by_token[1:], reading.covered, strict=True):
        for word in words:
            sums[word] += value / len(words)
    return sums


def token_gradients_x_input(predictor: Predictor, example: Example, label: int) -> list[float]:
    """The gradient of log p(label | example) by each token's embedding, times it; bos first."""
    embeddings = []

    def cut(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output.detach().requires_grad_())  # (1, T, dim)
        return embeddings[0]

    batch = _dataset(predictor, example).collate_fn([example])
    hook = predictor.model.llama.tok_embeddings.register_forward_hook(cut)
    try:
        log_probs = log_probs_of(predictor.model, batch, predictor.device)  # (1, n_labels)
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(log_probs[0, label], embeddings)
    return (gradient * embeddings[0].detach()).sum(dim=-1)[0].tolist()


def _dataset(predictor: Predictor, example: Example) -> SentenceDataset:
    return SentenceDataset([example], predictor.tokenizer.pad_id)


# ---------------------------------------------------------------- the command


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.ArgumentParser(prog="tools.explain", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("sentences", nargs="*", metavar="SENTENCE", help="or all `label ||| sentence`")
    add("--checkpoint", help="what run_llama.py --option finetune, or advanced.run, left")
    add("--label", metavar="NAME", help="explain this label (default: the predicted one)")
    add("--method", choices=("both", *METHODS), help="default both")
    add("--out", metavar="FILE", help="a page FILE.html, or a picture FILE.png")
    add("--errors", metavar="FILE",
        help="list the mistakes in what --option predict wrote as jsonl or csv, - is standard "
        "input; --checkpoint explains them")  # fmt: skip
    add("--top", type=cli.positive_int, metavar="N", help=f"mistakes to list (default {TOP})")
    add("--tokenizer_path", help="default: where it was when the checkpoint was trained")
    add("--use_gpu", action="store_true", help="CUDA, else Apple MPS")
    args = parser.parse_args(argv)
    if bool(args.sentences) == (args.errors is not None):
        parser.error("give either sentences or --errors FILE")
    if args.sentences and args.top is not None:
        parser.error("--top goes with --errors")
    if args.sentences and args.checkpoint is None:
        parser.error("sentences need --checkpoint, such as finetune-sst-5-2e-05.pt")
    for name in ("label", "method", "out", "tokenizer_path", "use_gpu"):
        if args.checkpoint is None and getattr(args, name) not in (None, False):
            parser.error(f"--{name} needs --checkpoint")
    if args.out is not None and Path(args.out).suffix.lower() not in (".html", ".png"):
        parser.error(f"--out {args.out}: ends in neither .html nor .png")
    return args


def _is_picture(out: str) -> bool:
    return out.lower().endswith(".png")


def listed(names: list[str]) -> str:
    return ", ".join(map(printable, names))


def label_named(name: str, names: list[str]) -> int:
    if name not in names:
        raise ValueError(f"--label {name}: the checkpoint's labels are {listed(names)}")
    return names.index(name)


def print_explanation(explanation: Explanation) -> None:
    """Followed by an empty line."""
    as_text = rendering.colored if is_colored() else rendering.table
    print(as_text(explanation), end="\n\n", flush=True)


def is_colored() -> bool:
    """A terminal that has colors, and no wish for none (https://no-color.org)."""
    has_colors = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return has_colors and not os.environ.get("NO_COLOR")


def explain_sentences(
    sentences: list[str], names: list[str], explain_one: Callable[..., Explanation]
) -> Iterator[Explanation]:
    """Each printed when it is done; ValueError where none has a word."""
    with open_lines(sentences, None, len(names), None) as blocks:
        lines = [line for block in blocks for line in block]
    if not lines:
        raise ValueError("no sentence has a word; write one in quotation marks")
    for line in lines:
        gold = None if line.gold in (None, NO_GOLD_LABEL) else names[line.gold]
        explanation = explain_one(line.sentence, gold=gold)
        print_explanation(explanation)
        yield explanation


def explain_mistakes(
    path: str, names: list[str], top: int, explain_one: Callable[..., Explanation] | None
) -> Iterator[Explanation]:
    """Lists the mistakes, each followed by its explanation, if there is what explains; `names` are
    then its labels, and ValueError says that the file is of others."""
    if path == "-":
        found = find_mistakes(cli.standard_input(), "standard input", top)
    else:
        with open(path, "rb") as file:
            found = find_mistakes(file, path, top)
    print(f"{found.n_mistakes:,} mistakes of {found.n_gold:,} with a gold label")
    for one in found.worst:
        predicted, gold = printable(one.predicted), printable(one.gold)
        judged = f"{one.probability:.3f} predicted {predicted}, gold {gold}"
        print(f"{judged} | line {one.line} | {printable(one.sentence)}")
        if explain_one is not None:
            if not {one.predicted, one.gold} <= set(names):
                raise ValueError(
                    f"{path}: its labels are not the checkpoint's, {listed(names)}; name the "
                    "checkpoint that predicted it"
                )
            explanation = explain_one(one.sentence, gold=one.gold)
            print_explanation(explanation)
            yield explanation


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    if args.out is not None:
        require_folder(args.out)
        if _is_picture(args.out):
            cli.require_packages("matplotlib", or_else=", or name a .html")
    explain_one, names = None, []
    if args.checkpoint is not None:
        predictor = load_predictor(args.checkpoint, args.tokenizer_path, pick_device(args.use_gpu))
        names = predictor.label_names
        label = None if args.label is None else label_named(args.label, names)
        methods = tuple(METHODS) if args.method in (None, "both") else (args.method,)
        explain_one = partial(explain, predictor, label=label, methods=methods)
        if is_colored():
            print(rendering.colored_legend(), end="\n\n")
    if args.errors is not None:
        explanations = list(explain_mistakes(args.errors, names, args.top or TOP, explain_one))
    else:
        explanations = list(explain_sentences(args.sentences, names, explain_one))
    if args.out is not None:
        title = f"Which words carried the decisions of {Path(args.checkpoint).name}"
        write = picture.write_picture if _is_picture(args.out) else rendering.write_page
        write(args.out, explanations, title)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
