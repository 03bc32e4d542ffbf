"""Reviews with ratings -> text that ends in a judgment, so that a model learns to answer in words.

An example is a review, or one to three sentences of it, then words that ask for the rating, then
the answer:

    A dull film . Is this movie awful, bad, average, good, or excellent? This movie is bad
    Don't bother. Is this movie bad or good? This movie is bad
    I have seen worse. Rating: 3/5
    A clever , tender film . It is very powerful

This is multi-task pretraining in the manner of FLAN (Wei et al. 2022, arXiv 2109.01652) and T0
(Sanh et al. 2022, arXiv 2110.08207): the tasks a model is asked about later, on other data.
"""

import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from classifier import prompt_suffix
from pretraining.corpus import Document, sentences
from tokenizer import Tokenizer
from training.templates import find_templates

FIVE = ("awful", "bad", "average", "good", "excellent")
TWO = ("bad", "good")
MAX_WEIGHT = 4.0  # of a review of a rare label
# Penn Treebank's spelling, in which SST is written (Marcus et al. 1993); the order matters.
TREEBANK = [
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        (r"[\u2018\u2019]", "'"),
        (r"[\u201c\u201d]", '"'),
        (r'(?<!\S)(\(?)"', r"\1 `` "),
        (r'"', " '' "),
        (r"\(", " -LRB- "),
        (r"\)", " -RRB- "),
        (r"(\.\.+|--+|[;?!])", r" \1 "),
        (r"([,:])(?!\d)", r" \1 "),
        (r"(?<=[^\s.])\.(?=(?:\s|''|-RRB-)*$)", " ."),
        (r"(?i)n't\b", lambda match: f" {match[0]}"),
        (r"(?i)(?<=\w)'(s|re|ve|ll|d|m)\b", r" '\1"),
        (r"(?<=s)'(?=\s)", " '"),
        (r"\s+", " "),
    )
]


class Example(NamedTuple):
    text: str  # up to the answer
    answer: str


def treebank_spelling(text: str) -> str:
    """Write a text as the treebank does: `It doesn't "work".` -> `` It does n't `` work '' . ``"""
    spelled = []
    for sentence in sentences(text):
        for pattern, spelling in TREEBANK:
            sentence = pattern.sub(spelling, sentence)
        spelled.append(sentence.strip())
    return " ".join(spelled)


def passage(review: str, rng: random.Random) -> str:
    """Return one to three sentences of a review's beginning or end, where it judges most."""
    parts = sentences(review)
    n = rng.randint(1, 3)
    return " ".join(part.strip() for part in (parts[:n] if rng.random() < 0.5 else parts[-n:]))


def label_of(rating: float) -> int:
    """Return 0 to 4: awful and excellent are the outer tenths, average is the middle fifth."""
    return bisect_right((0.1, 0.4, 0.6, 0.9), rating)


class Questions:
    """The ways to ask for a rating of `subject`, and their answers."""

    def __init__(self, subject: str):
        self.five = prompt_suffix(FIVE, subject).rstrip()
        self.two = prompt_suffix(TWO, subject).rstrip()
        self.templates = []
        for template in find_templates("sst", list(FIVE))[1:]:  # the first is the question
            words = template.after  # they say movie or film
            words = words if subject == "movie" else re.sub("movie|film", subject, words)
            self.templates.append((words, template.labels))

    def ask(self, rating: float, binary: bool, rng: random.Random) -> Example:
        """Return a question and its answer.

        A rating near the middle is not asked for as one of two. `binary` reviews are asked for that
        alone: their 0 and 1 mean bad and good, not the worst and the best.
        """
        label = label_of(rating)
        kind = "two" if binary else rng.choice(("five", "five", "two", "two", "rating", "template"))
        if kind == "two" and label != 2:
            return Example(self.two, TWO[label > 2])
        if kind == "rating":
            return Example("Rating:", f"{label + 1}/5")
        if kind == "template":
            after, words = rng.choice(self.templates)
            return Example(after, rng.choice(words[label]))
        return Example(self.five, FIVE[label])


def draw_passages(reviews: list[Document], n: int, rng: random.Random) -> list[Document]:
    """Draw n passages, each with the rating of its review.

    All labels are drawn equally often, since a model that cannot tell neighboring labels apart
    otherwise gives the more frequent one. But where a label is so rare that its reviews would weigh
    more than `MAX_WEIGHT`, with a mean weight of 1, they weigh that.
    """
    labels = [label_of(review.rating) for review in reviews]
    counts = Counter(labels)
    balanced = {label: len(labels) / len(counts) / count for label, count in counts.items()}
    drawn = rng.choices(reviews, [min(balanced[label], MAX_WEIGHT) for label in labels], k=n)
    return [Document(passage(review.text, rng), review.rating) for review in drawn]


def is_binary(reviews: list[Document]) -> bool:
    """Return whether all ratings are 0 or 1, and so say no more than bad or good."""
    return {review.rating for review in reviews} <= {0.0, 1.0}


def labeled_lines(reviews: list[Document], binary: bool) -> str:
    """Write whole reviews as `label ||| sentence` lines, the labels those of the questions."""
    return "".join(
        f"{int(rating) if binary else label_of(rating)} ||| {' '.join(text.split())}\n"
        for text, rating in reviews
    )


def ask(reviews: list[Document], subject: str, binary: bool, rng: random.Random) -> list[Example]:
    """Ask for the rating of each review; half of the texts get the treebank's spelling."""
    questions = Questions(subject)
    examples = []
    for text, rating in reviews:
        spelled = treebank_spelling(text) if rng.random() < 0.5 else text
        question, answer = questions.ask(rating, binary, rng)
        examples.append(Example(f"{spelled} {question}", answer))
    return examples


def encode_examples(
    tokenizer: Tokenizer, examples: Sequence[Example]
) -> list[tuple[np.ndarray, int]]:
    """Return the int32 token ids of each example, bos first, and how many are its answer's.

    Text and answer are encoded apart, as a prompt and a label are.
    """
    encoded = []
    for text, answer in examples:
        answer_ids = tokenizer.encode(answer, bos=False, eos=False)
        ids = tokenizer.encode(text, bos=True, eos=False) + answer_ids
        encoded.append((np.array(ids, np.int32), len(answer_ids)))
    return encoded
