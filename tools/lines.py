"""Read sentences from files, pipes, CSV columns and the command line, as they arrive."""

import csv
import io
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from training.labeled import (
    NO_GOLD_LABEL,
    PLACEHOLDER_SIZE,
    SEPARATOR,
    decode,
    has_placeholder_labels,
    parse_line,
)
from utils import InputError, brief, printable

READ_SIZE = 2**16
LONGEST_LINE = 2**20


class Line(NamedTuple):
    number: int  # in its file, from 1
    sentence: str
    gold: int | None  # None if it is unknown


def arriving_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str] | None]:
    """Yield (number, line) without line ends; None says that reading the next line may block."""
    first, rest = 1, b""
    while block := file.read1(READ_SIZE):
        complete, newline, rest = (rest + block).rpartition(b"\n")
        if newline:
            *lines, _ = decode(complete + newline, name, first).split("\n")
            yield from enumerate(lines, first)
            first += len(lines)
        if len(rest) > LONGEST_LINE:
            place = f"{name}:{first}"
            raise InputError(f"{place}: is longer than {LONGEST_LINE:,} bytes; split the sentence")
        yield None
    if rest:
        yield from enumerate(decode(rest, name, first).split("\n"), first)


def read_lines(
    file: BinaryIO, name: str, label_names: list[str], has_placeholders: bool = False
) -> Iterator[Line | None]:
    """Yield the lines that are not blank. Either every line reads `label ||| sentence` or none.

    None says that reading the next line may block. Placeholder labels count as unknown. Raises
    InputError with file, line number and value.
    """
    is_labeled = None
    for numbered in arriving_lines(file, name):
        if numbered is None:
            yield None
            continue
        number, text = numbered
        if not text.strip():
            continue
        place = f"{name}:{number}"
        has_label = SEPARATOR in f"{text} "  # an editor may have cut the last space
        is_labeled = has_label if is_labeled is None else is_labeled
        if is_labeled:
            sentence, gold = parse_line(
                text, place, len(label_names), True, label_names, accepts_names=True
            )
            is_known = gold != NO_GOLD_LABEL and not has_placeholders
            yield Line(number, sentence, gold if is_known else None)
        elif not has_label:
            yield Line(number, text.strip(), None)
        else:
            raise InputError(
                f"{place}: {brief(text)} has '{SEPARATOR}' but the first line does not; write a "
                "label on every line or on none"
            )


def read_column(file: BinaryIO, name: str, column: str) -> Iterator[Line]:
    """Yield the cells of a CSV column that are not blank; a name in .tsv means tabs.

    Raises InputError that lists the columns if there is no such column.
    """
    texts = (f"{numbered[1]}\n" for numbered in arriving_lines(file, name) if numbered)
    delimiter = "\t" if name.lower().endswith(".tsv") else ","
    reader = csv.DictReader(texts, delimiter=delimiter, strict=True)
    try:
        columns = reader.fieldnames or []
        if column not in columns:
            listed = printable(", ".join(columns)) or "none, the file is empty"
            raise InputError(f"{name}: has no column {brief(column)}; its columns are {listed}")
        for row in reader:
            sentence = one_line(row[column] or "")
            if sentence:
                yield Line(reader.line_num, sentence, None)
    except csv.Error as error:
        kind = "TSV" if delimiter == "\t" else "CSV"
        raise InputError(
            f"{name}:{reader.reader.line_num}: is not {kind} ({error}); put a cell with quotation "
            "marks between quotation marks, and double those in it"
        ) from error


def one_line(text: str) -> str:
    """Join the lines of a text; blanks inside a line stay, as in a file of sentences."""
    return " ".join(filter(None, (line.strip() for line in text.splitlines())))


def read_arguments(sentences: list[str], label_names: list[str]) -> list[Line]:
    """Return the sentences of a command line; they may all read `label ||| sentence`."""
    content = "\n".join(map(one_line, sentences))
    lines = read_lines(io.BytesIO(os.fsencode(content)), "sentence", label_names)
    return [line for line in lines if line is not None]


def in_blocks(
    lines: Iterable[Line | None], size: int, multiple_of: int = 1
) -> Iterator[list[Line]]:
    """Yield blocks of `size` lines, and a shorter one if reading the next line may block.

    All blocks except the last have a multiple of `multiple_of` lines.
    """
    block: list[Line] = []
    for line in lines:
        if line is not None:
            block.append(line)
        is_waiting = line is None and len(block) % multiple_of == 0
        if block and (is_waiting or len(block) == size):
            yield block
            block = []
    if block:
        yield block


def read_input(path: str, column: str | None, label_names: list[str]) -> Iterator[Line | None]:
    """Read a file, or standard input if the path is "-"; `column` names a column of a CSV file."""
    if is_typed(path):
        print("one sentence per line; Ctrl-D ends", file=sys.stderr)
    with open_input(path) as file:
        if column is not None:
            yield from read_column(file, file.name, column)
            return
        is_small = path != "-" and 0 < Path(path).stat().st_size <= PLACEHOLDER_SIZE  # 0: a pipe
        has_placeholders = is_small and has_placeholder_labels(Path(path).read_bytes())
        yield from read_lines(file, file.name, label_names, has_placeholders)


def open_input(path: str) -> BinaryIO:
    """Open a file, or standard input if the path is "-"."""
    if path != "-":
        return open(path, "rb")
    if sys.stdin is None:
        raise InputError("standard input is closed; name a file instead of -")
    return sys.stdin.buffer


def is_typed(path: str) -> bool:
    """Return whether `read_input` reads from a keyboard."""
    return path == "-" and sys.stdin is not None and sys.stdin.isatty()
