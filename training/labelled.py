"""The lines `label ||| sentence` and the lists of label names, as the files have them.

Without PyTorch, so that `prepare_submit.py` reads both in any Python.
"""

import codecs
import hashlib
import json
import os
import re
from pathlib import Path

from config import MAX_LABELS, shown

SEPARATOR = " ||| "
NO_GOLD_LABEL = -1
# cfimdb-test.txt as it is published: every label is 0, a placeholder.
PLACEHOLDER_SIZE = 2**20  # bytes; it has half as many
PLACEHOLDER_SHA256 = frozenset({"8ad2f6da7bfb0e8fc36cf89eda47c574cc9c35d6347e665f31bc904d9ecfe0a7"})


def read_label_names(path: str | os.PathLike) -> list[str]:
    """The names of the labels 0, 1, 2, ...: a JSON list of at least two different strings."""
    return parse_label_names(_read_bytes(Path(path)), path)


def parse_label_names(content: bytes, path: str | os.PathLike) -> list[str]:
    """What `read_label_names` returns for a file of this content; `path` is for its errors."""
    text = decode(content, path)
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else path
        raise ValueError(
            f'{place}: is not JSON; label names are a JSON list such as ["bad", "good"]'
        ) from error
    is_list_of_names = isinstance(names, list) and all(
        isinstance(name, str) and name.strip() for name in names
    )
    if not is_list_of_names or len(set(names)) != len(names) or len(names) < 2:
        raise ValueError(
            f"{path}: is not a JSON list of at least two different names "
            f'such as ["bad", "good"], but {" ".join(text.split())[:100]}'
        )
    if len(names) > MAX_LABELS:
        raise ValueError(f"{path}: holds {len(names)} names, more than {MAX_LABELS}")
    for name in names:
        if re.search("[\ud800-\udfff]", name):  # JSON can write half a letter, UTF-8 cannot
            raise ValueError(f"{path}: {shown(ascii(name))} has a lone surrogate, which is no text")
    return names


def read_sentences(
    path: str | os.PathLike, n_labels: int | None = None, unlabelled: bool = False
) -> list[tuple[str, int]]:
    """(sentence, label) of every line but blank ones, in the file's order.

    Lines read `label ||| sentence`, split at the first separator; UTF-8, where a byte order mark
    and CRLF do no harm. Labels lie in [0, n_labels) (None: no upper bound). With `unlabelled`, for
    test files, -1 says that a label is not known, and placeholder labels are read as -1. Raises
    ValueError naming file, line and value for anything else.
    """
    path = Path(path)
    rows = []
    content = _read_bytes(path)
    for number, line in enumerate(decode(content, path).split("\n"), start=1):
        if line.strip():
            rows.append(parse_line(line, f"{path}:{number}", n_labels, unlabelled))
    if not rows:
        raise ValueError(f"{path}: holds no example; lines read 'label{SEPARATOR}sentence'")
    if are_placeholders(content):
        if not unlabelled:
            raise ValueError(f"{path}: carries placeholder labels, fit for --test alone")
        rows = [(sentence, NO_GOLD_LABEL) for sentence, _ in rows]
    return rows


def are_placeholders(content: bytes) -> bool:
    """Whether a file of this content is one whose labels are placeholders, whatever the ends of its
    lines."""
    if len(content) > PLACEHOLDER_SIZE:
        return False
    lines = content.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").rstrip(b"\n")
    return hashlib.sha256(lines + b"\n").hexdigest() in PLACEHOLDER_SHA256


def _read_bytes(path: Path) -> bytes:
    if not path.exists():
        raise FileNotFoundError(2, "no such file; `bash setup.sh` downloads the data", str(path))
    return path.read_bytes()


def decode(content: bytes, path: str | os.PathLike, first: int = 1) -> str:
    """The text without byte order mark, lines ending in "\\n"; ValueError at a byte not UTF-8.

    `first` is the number of the content's first line in its file.
    """
    if first == 1:
        content = content.removeprefix(codecs.BOM_UTF8)
    content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + first
        raise ValueError(
            f"{path}:{number}: byte 0x{content[error.start]:02x} is not UTF-8; convert the file"
        ) from error


def parse_line(
    line: str, place: str, n_labels: int | None, unlabelled: bool, by: str = "--label-names"
) -> tuple[str, int]:
    """(sentence, label) of one line, as `read_sentences` says; `place` begins its errors, and `by`
    is what the number of labels is from."""
    cut = repr(line if len(line) <= 60 else line[:57] + "...")
    # The space stands for one that an editor took from the end of a line without a sentence.
    label_text, separator, sentence = f"{line} ".partition(SEPARATOR)
    if not separator:
        raise ValueError(f"{place}: {cut} has no separator; write 'label{SEPARATOR}sentence'")
    label_text, sentence = label_text.strip(), sentence.strip()
    if not re.fullmatch(r"-?[0-9]{1,9}", label_text):
        raise ValueError(
            f"{place}: label {label_text[:60]!r} is not an integer; labels are 0, 1, 2, ..."
        )
    label = int(label_text)
    if label == NO_GOLD_LABEL and not unlabelled:
        raise ValueError(f"{place}: label -1 (not known) is allowed in test files only")
    if label < NO_GOLD_LABEL or (n_labels is not None and label >= n_labels):
        known = "0, 1, 2, ..." if n_labels is None else f"0 to {n_labels - 1} by {by}"
        raise ValueError(f"{place}: label {label} does not exist; labels are {known}")
    if not sentence:
        raise ValueError(f"{place}: {cut} has an empty sentence; write one or delete the line")
    return sentence, label
