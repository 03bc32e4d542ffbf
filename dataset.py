"""`label ||| sentence` files -> examples -> right-padded batches that carry their lengths."""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from config import MAX_LABELS, shown
from tokenizer import Tokenizer

SEPARATOR = " ||| "
NO_GOLD_LABEL = -1
# cfimdb-test.txt as it is published: every label is 0, a placeholder.
PLACEHOLDER_SHA256 = frozenset({"8ad2f6da7bfb0e8fc36cf89eda47c574cc9c35d6347e665f31bc904d9ecfe0a7"})


class Example(NamedTuple):
    sentence: str
    label: int
    tokens: list[int]


def read_label_names(path: str | os.PathLike) -> list[str]:
    """The names of the labels 0, 1, 2, ...: a JSON list of at least two different strings."""
    text = _decode(_read_bytes(Path(path)), Path(path))
    try:
        names = json.loads(text)
        described = json.dumps(names)[:100]
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
            f'such as ["bad", "good"], but {described}'
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
    for number, line in enumerate(_decode(content, path).split("\n"), start=1):
        if line.strip():
            rows.append(_parse_line(line, f"{path}:{number}", n_labels, unlabelled))
    if not rows:
        raise ValueError(f"{path}: holds no example; lines read 'label{SEPARATOR}sentence'")
    if hashlib.sha256(content).hexdigest() in PLACEHOLDER_SHA256:
        if not unlabelled:
            raise ValueError(f"{path}: carries placeholder labels, fit for --test alone")
        rows = [(sentence, NO_GOLD_LABEL) for sentence, _ in rows]
    return rows


def _read_bytes(path: Path) -> bytes:
    if not path.exists():
        raise FileNotFoundError(2, "no such file; `bash setup.sh` downloads the data", str(path))
    return path.read_bytes()


def _decode(content: bytes, path: Path) -> str:
    content = content.removeprefix(codecs.BOM_UTF8)
    content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{number}: byte 0x{content[error.start]:02x} is not UTF-8; convert the file"
        ) from error


def _parse_line(line: str, place: str, n_labels: int | None, unlabelled: bool) -> tuple[str, int]:
    shown = repr(line if len(line) <= 60 else line[:57] + "...")
    # The space stands for one that an editor took from the end of a line without a sentence.
    label_text, separator, sentence = f"{line} ".partition(SEPARATOR)
    if not separator:
        raise ValueError(f"{place}: {shown} has no separator; write 'label{SEPARATOR}sentence'")
    label_text, sentence = label_text.strip(), sentence.strip()
    if not re.fullmatch(r"-?[0-9]{1,9}", label_text):
        raise ValueError(
            f"{place}: label {label_text[:60]!r} is not an integer; labels are 0, 1, 2, ..."
        )
    label = int(label_text)
    if label == NO_GOLD_LABEL and not unlabelled:
        raise ValueError(f"{place}: label -1 (not known) is allowed in test files only")
    if label < NO_GOLD_LABEL or (n_labels is not None and label >= n_labels):
        known = "0, 1, 2, ..." if n_labels is None else f"0 to {n_labels - 1} by --label-names"
        raise ValueError(f"{place}: label {label} does not exist; labels are {known}")
    if not sentence:
        raise ValueError(f"{place}: {shown} has an empty sentence; write one or delete the line")
    return sentence, label


def encode_examples(
    rows: list[tuple[str, int]],
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    max_sentence_len: int | None = None,
    suffix: str | None = None,
) -> tuple[list[Example], int]:
    """Tokenizes each sentence once: bos, sentence, and with `suffix` a space and that.

    A sentence keeps its first `max_sentence_len` tokens, or fewer where the whole would exceed
    `max_tokens`; the suffix, the question of a prompt, is kept whole. Also returns how many
    sentences `max_tokens` cut. ValueError where it leaves a sentence no token.
    """
    n_suffix = len(tokenizer.encode(suffix, bos=False, eos=False)) if suffix else 0
    if max_tokens < n_suffix + 2:  # bos and one token of the sentence
        raise ValueError(
            f"a question of {n_suffix} tokens leaves the sentence no room in the model's "
            f"{max_tokens} positions; shorten the label names"
        )

    def cut(ids: list[int], length: int) -> list[int]:
        return ids[: length - n_suffix] + ids[len(ids) - n_suffix :]

    examples, n_truncated = [], 0
    for sentence, label in rows:
        text = f"{sentence} {suffix}" if suffix else sentence
        ids = tokenizer.encode(text, bos=True, eos=False)
        if max_sentence_len is not None and len(ids) > 1 + max_sentence_len + n_suffix:
            ids = cut(ids, 1 + max_sentence_len + n_suffix)
        if len(ids) > max_tokens:
            ids = cut(ids, max_tokens)
            n_truncated += 1
        examples.append(Example(sentence, label, ids))
    return examples, n_truncated


class SentenceDataset(Dataset):
    """Examples and how to batch them."""

    def __init__(self, examples: list[Example], pad_id: int):
        self.examples = examples
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def collate_fn(self, batch: list[Example]) -> dict[str, Any]:
        """token_ids (B, T) padded on the right, labels (B,), lengths (B,), sents (B strings)."""
        lengths = [len(example.tokens) for example in batch]
        width = max(lengths)
        padded = [e.tokens + [self.pad_id] * (width - len(e.tokens)) for e in batch]
        return {
            "token_ids": torch.tensor(padded),
            "labels": torch.tensor([example.label for example in batch]),
            "lengths": torch.tensor(lengths),
            "sents": [example.sentence for example in batch],
        }


class SimilarLengths(Sampler[list[int]]):
    """Shuffled batches of sentences of similar length, drawn anew each epoch.

    All examples are shuffled and cut into pools of 50 batches; each pool is sorted by length and
    cut into batches; then the batches are shuffled. So there is little padding, while which
    sentences meet in a batch, and when, still changes from epoch to epoch.
    """

    POOL = 50

    def __init__(self, lengths: list[int], batch_size: int, generator: torch.Generator):
        self.lengths = lengths
        self.batch_size = batch_size
        self.generator = generator

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.lengths), generator=self.generator).tolist()
        by_length = []
        for start in range(0, len(order), self.POOL * self.batch_size):
            pool = order[start : start + self.POOL * self.batch_size]
            by_length += sorted(pool, key=self.lengths.__getitem__)
        batches = [
            by_length[start : start + self.batch_size]
            for start in range(0, len(by_length), self.batch_size)
        ]
        for i in torch.randperm(len(batches), generator=self.generator).tolist():
            yield batches[i]


def make_loader(
    dataset: SentenceDataset,
    batch_size: int,
    shuffle_by: torch.Generator | None = None,
    similar_lengths: bool = False,
) -> DataLoader:
    """Batches in the file's order, or shuffled anew each epoch by the given generator.

    `similar_lengths` is for models that mask padding: shuffled as `SimilarLengths` does, or from
    the longest to the shortest, in which case the loader's `sampler` is the list of indices.
    """
    lengths = [len(example.tokens) for example in dataset.examples]
    options: dict[str, Any] = {"generator": shuffle_by, "collate_fn": dataset.collate_fn}
    if shuffle_by is not None and similar_lengths:
        batches = SimilarLengths(lengths, batch_size, shuffle_by)
        return DataLoader(dataset, batch_sampler=batches, **options)
    if similar_lengths:
        by_length = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        return DataLoader(dataset, batch_size=batch_size, sampler=by_length, **options)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle_by is not None, **options)
