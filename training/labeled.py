"""Read lines of `label ||| sentence`, and lists of label names."""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from config import MAX_LABELS
from utils import InputError, brief, printable

SEPARATOR = " ||| "
NO_GOLD_LABEL = -1
# The published cfimdb-test.txt: every label in it is 0, a placeholder.
PLACEHOLDER_SIZE = 2**20  # bytes; the file has half as many
PLACEHOLDER_SHA256 = "8ad2f6da7bfb0e8fc36cf89eda47c574cc9c35d6347e665f31bc904d9ecfe0a7"


def read_label_names(path: str | os.PathLike) -> list[str]:
    """Read the names of the labels 0, 1, 2, ...: a JSON list of at least two different strings."""
    text = decode(_read_bytes(Path(path)), path)
    example = 'such as ["bad", "good"]'
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else path
        raise InputError(f"{place}: is not JSON; label names are a JSON list {example}") from error
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) and name.strip() for name in names)
        or not 2 <= len({name.strip() for name in names}) == len(names)
    ):
        shown = " ".join(text.split())[:100]
        raise InputError(f"{path}: is not a JSON list of different names {example}, but {shown}")
    if len(names) > MAX_LABELS:
        raise InputError(f"{path}: has {len(names)} names, more than {MAX_LABELS}")
    for name in names:
        if re.search("[\ud800-\udfff]", name):  # JSON can hold it, UTF-8 cannot
            raise InputError(
                f"{path}: {brief(ascii(name))} has a lone surrogate, which is not text"
            )
    return [name.strip() for name in names]


def read_sentences(
    path: str | os.PathLike,
    n_labels: int | None = None,
    unlabeled: bool = False,
    label_names: Sequence[str] = (),
) -> list[tuple[str, int]]:
    """Read (sentence, label) from every line that is not blank, in the file's order.

    Lines are UTF-8 and read `label ||| sentence`, split at the first separator. Labels lie in
    [0, n_labels); None sets no upper bound. With `unlabeled`, for test files, -1 is an unknown
    label, and placeholder labels are read as -1. Raises InputError with file, line and value for
    any other line. With `label_names` the message for a name gives the number to write.
    """
    path = Path(path)
    content = _read_bytes(path)
    rows = [
        parse_line(line, f"{path}:{number}", n_labels, unlabeled, label_names)
        for number, line in enumerate(decode(content, path).split("\n"), start=1)
        if line.strip()
    ]
    if not rows:
        raise InputError(f"{path}: has no sentences; write 'label{SEPARATOR}sentence' lines")
    if has_placeholder_labels(content):
        if not unlabeled:
            raise InputError(f"{path}: has placeholder labels; use it for --test only")
        rows = [(sentence, NO_GOLD_LABEL) for sentence, _ in rows]
    return rows


def has_placeholder_labels(content: bytes) -> bool:
    """Return whether this is the published cfimdb-test.txt, with any line endings."""
    if len(content) > PLACEHOLDER_SIZE:
        return False
    lines = content.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").rstrip(b"\n")
    return hashlib.sha256(lines + b"\n").hexdigest() == PLACEHOLDER_SHA256


def _read_bytes(path: Path) -> bytes:
    if not path.exists():
        raise InputError(f"{path}: no such file; `bash setup.sh` downloads the data")
    if not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: is a pipe or a device, and data are read twice; make it a file")
    return path.read_bytes()


def decode(content: bytes, path: str | os.PathLike, first: int = 1) -> str:
    """Return UTF-8 text with "\\n" line endings and no byte order mark; `first` is the number of
    the content's first line in its file."""
    if first == 1:
        content = content.removeprefix(codecs.BOM_UTF8)
    content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + first
        raise InputError(
            f"{path}:{number}: byte 0x{content[error.start]:02x} is not UTF-8; convert it"
        ) from error


def parse_line(
    line: str,
    place: str,
    n_labels: int | None,
    unlabeled: bool = False,
    label_names: Sequence[str] = (),
    accepts_names: bool = False,
) -> tuple[str, int]:
    """Return (sentence, label) of one line; `place` begins its error messages.

    With `accepts_names` a label may also be written by its name.
    """
    cut = repr(line if len(line) <= 60 else line[:57] + "...")
    # The added space replaces one that an editor took from a line without a sentence.
    label_text, separator, sentence = f"{line} ".partition(SEPARATOR)
    if not separator:
        raise InputError(f"{place}: {cut} has no separator; write 'label{SEPARATOR}sentence'")
    label_text, sentence = label_text.strip(), sentence.strip()
    known, kind = "0, 1, 2, ..." if n_labels is None else f"0 to {n_labels - 1}", "an integer"
    if accepts_names:
        known, kind = f"{known} or {', '.join(map(printable, label_names))}", "a label"
    if re.fullmatch(r"-?[0-9]{1,9}", label_text):
        label = int(label_text)
    elif label_text in label_names:
        label = label_names.index(label_text)
        if not accepts_names:
            raise InputError(f"{place}: label {label_text!r} is not an integer; write {label}")
    else:
        raise InputError(f"{place}: label {label_text[:60]!r} is not {kind}; labels are {known}")
    if label == NO_GOLD_LABEL and not unlabeled:
        raise InputError(f"{place}: label -1 (unknown) is allowed in test files only")
    if label < NO_GOLD_LABEL or (n_labels is not None and label >= n_labels):
        raise InputError(f"{place}: label {label} does not exist; labels are {known}")
    if not sentence:
        raise InputError(f"{place}: {cut} has an empty sentence; write one or delete the line")
    return sentence, label
