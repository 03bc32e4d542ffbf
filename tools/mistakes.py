"""Find the most confident mistakes in the output of `python -m tools.predict --format jsonl`."""

import heapq
import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from training.labeled import decode
from utils import InputError, brief


class Mistake(NamedTuple):
    line: int  # in the file of sentences
    predicted: str
    probability: float
    gold: str
    sentence: str


def find_mistakes(lines: Iterable[bytes], name: str, top: int) -> tuple[list[Mistake], int, int]:
    """Return the `top` most confident mistakes, and the numbers of mistakes and of gold labels.

    Ties keep the file's order. Memory holds no other predictions. Raises InputError for a line that
    is not a prediction, and for a file without gold labels.
    """
    n_gold = n_mistakes = 0

    def mistakes() -> Iterator[Mistake]:
        nonlocal n_gold, n_mistakes
        for number, line in enumerate(lines, start=1):
            text = decode(line, name, number).strip()
            prediction = parse_prediction(text, f"{name}:{number}") if text else None
            if prediction is not None:
                n_gold += 1
                if prediction.predicted != prediction.gold:
                    n_mistakes += 1
                    yield prediction

    worst = heapq.nlargest(top, mistakes(), key=lambda mistake: mistake.probability)
    if not n_gold:
        raise InputError(f"{name}: has no gold labels; predict 'label ||| sentence' lines")
    return worst, n_mistakes, n_gold


def parse_prediction(text: str, place: str) -> Mistake | None:
    """Return a jsonl line's content, or None if it has no gold label. Raises InputError."""
    try:
        row = json.loads(text)
        predicted, gold, sentence = (row[key] for key in ("label", "gold", "sentence"))
        line, probability = int(row["line"]), float(row["probability"])
        f"{predicted}{sentence}{gold}".encode()  # fails at a lone surrogate
        if not (isinstance(predicted, str) and isinstance(sentence, str) and 0 <= probability <= 1):
            raise ValueError("label, sentence or probability")
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{place}: {brief(text)} is not a prediction; write the file with "
            "`python -m tools.predict --format jsonl`"
        ) from error
    return None if gold is None else Mistake(line, predicted, probability, str(gold), sentence)
