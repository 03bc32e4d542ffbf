"""The most confident mistakes in what `run_llama.py --option predict` wrote of labelled sentences.

Reads --format jsonl and csv, told apart by content, a line at a time. Of the predictions it keeps
the mistakes that are to be listed.
"""

import csv
import heapq
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from config import shown
from training.labelled import decode

LONGEST_LINE = 2**23  # a sentence of predict's longest line, with escapes
KEYS = ("line", "label", "probability", "sentence")
REMEDY = "write it by run_llama.py --option predict --format jsonl"


class Judged(NamedTuple):
    """A prediction of a sentence."""

    line: int  # in the file of sentences
    predicted: str
    probability: float
    gold: str | None  # None: not known
    sentence: str


class Mistakes(NamedTuple):
    worst: list[Judged]  # the most confident first, equal ones in the file's order
    n_mistakes: int
    n_gold: int


def find_mistakes(file: BinaryIO, name: str, top: int) -> Mistakes:
    """The `top` most confident predictions that differ from the gold label, and the counts of all.

    `name` is for errors: ValueError with file, line and value for what is no prediction file, or
    holds no prediction, or none with a gold label.
    """
    n_read = n_gold = n_mistakes = 0

    def mistakes() -> Iterator[Judged]:
        nonlocal n_read, n_gold, n_mistakes
        for one in read_predictions(file, name):
            n_read += 1
            n_gold += one.gold is not None
            if one.gold not in (None, one.predicted):
                n_mistakes += 1
                yield one

    worst = heapq.nlargest(top, mistakes(), key=lambda one: one.probability)
    if not n_read:
        raise ValueError(f"{name}: holds no prediction; {REMEDY}")
    if not n_gold:
        raise ValueError(
            f"{name}: none of its {n_read:,} predictions has a gold label, since the input was "
            "unlabelled; predict for a file of `label ||| sentence`"
        )
    return Mistakes(worst, n_mistakes, n_gold)


def read_predictions(file: BinaryIO, name: str) -> Iterator[Judged]:
    lines = _lines(file, name)
    first = next(((number, text) for number, text in lines if text.strip()), None)
    if first is None:
        return
    number, text = first
    lines = itertools.chain([first], lines)
    if text.lstrip().startswith("{"):
        yield from _read_jsonl(lines, name)
    elif text.startswith("line,label,probability,"):
        yield from _read_csv(lines, name)
    else:
        raise ValueError(
            f"{name}:{number}: {shown(text.strip())} is not of --format jsonl or csv; {REMEDY}"
        )


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """(number, line), with its end."""
    for number in itertools.count(1):
        line = file.readline(LONGEST_LINE + 1)
        if not line:
            return
        if len(line) > LONGEST_LINE:
            raise ValueError(f"{name}:{number}: is longer than {LONGEST_LINE:,} bytes; {REMEDY}")
        yield number, decode(line, name, number)


def _read_jsonl(lines: Iterator[tuple[int, str]], name: str) -> Iterator[Judged]:
    for number, text in lines:
        if not text.strip():
            continue
        place = f"{name}:{number}"
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: {shown(text.strip())} is not JSON; {REMEDY}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}: {shown(row)} is not an object of JSON; {REMEDY}")
        yield _judged(row, place)


def _read_csv(lines: Iterator[tuple[int, str]], name: str) -> Iterator[Judged]:
    csv.field_size_limit(LONGEST_LINE)  # of the whole process, which reads no other CSV
    number, header_text = next(lines)
    before = number - 1
    texts = itertools.chain([header_text], (text for _, text in lines))
    reader = csv.reader(texts, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            place = f"{name}:{before + reader.line_num}"
            if not header:
                header = cells
                continue
            if not cells:
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{place}: has {len(cells)} cells for {len(header)} columns; {REMEDY}"
                )
            row: dict[str, Any] = dict(zip(header, cells, strict=True))
            for key, kind in (("line", int), ("probability", float)):
                row[key] = _number(row[key], kind)
            yield _judged({**row, "gold": row.get("gold") or None}, place)
    except csv.Error as error:
        place = f"{name}:{before + reader.line_num}"
        raise ValueError(f"{place}: is not CSV, {error}; {REMEDY}") from error


def _number(text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text  # what is no number is said where JSON's are looked at, too


def _judged(row: dict[str, Any], place: str) -> Judged:
    absent = [key for key in KEYS if key not in row]
    if absent:
        raise ValueError(f"{place}: has no {', '.join(absent)}; {REMEDY}")
    probability, line, gold = row["probability"], row["line"], row.get("gold")
    if type(probability) not in (int, float) or not 0 <= probability <= 1:
        raise ValueError(
            f"{place}: probability {shown(probability)} is not a number in [0, 1]; {REMEDY}"
        )
    if type(line) is not int or line < 1:
        raise ValueError(f"{place}: line {shown(line)} is not 1, 2, 3, ...; {REMEDY}")
    texts = {"label": row["label"], "sentence": row["sentence"]}
    for key, text in {**texts, "gold": "-" if gold is None else gold}.items():
        if not isinstance(text, str) or not text.strip() or re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{place}: {key} {shown(text)} is not a text; {REMEDY}")
    return Judged(line, row["label"], float(probability), gold, row["sentence"])
