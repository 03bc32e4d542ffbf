"""Plain text -> documents -> tokens -> rows -> batches, for language-model training.

A text file holds one document a line, plain or packed as `.xz` or `.gz`; a newline inside a
document is written as the two characters \\n. In a file of rated reviews a rating and a tab stand
before it. Documents are joined by bos.
"""

import codecs
import gzip
import hashlib
import lzma
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sentencepiece import SentencePieceTrainer
from torch.nn.utils.rnn import pad_sequence

from tokenizer import Tokenizer
from utils import InputError, atomic_write, brief

_OPENERS = {".xz": lzma.open, ".gz": gzip.open}


class Document(NamedTuple):
    text: str
    rating: float | None = None  # from 0, the worst, to 1, the best; None: not rated


def read_documents(path: str | os.PathLike) -> list[str]:
    """Return the documents of a file without blank ones; an InputError names file and line."""
    return [document for _, document in _read_lines(Path(path))]


def read_reviews(path: str | os.PathLike) -> list[Document]:
    """Return the rated documents of a file, `rating TAB text` a line, the rating in [0, 1]."""
    reviews = []
    for number, line in _read_lines(Path(path)):
        rating, tab, text = line.partition("\t")
        try:
            is_valid = 0.0 <= float(rating) <= 1.0 and bool(tab and text.strip())
        except ValueError:
            is_valid = False
        if not is_valid:
            raise InputError(
                f"{path}:{number}: {brief(line)} is not a rating from 0 to 1, a tab, and a text"
            )
        reviews.append(Document(text, float(rating)))
    return reviews


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """Return (number, content) of the lines that are not blank."""
    if not path.is_file():
        raise FileNotFoundError(2, "no such text file; one document a line", str(path))
    try:
        with _OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            content = file.read()
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path}: is damaged ({error}); make or copy it again") from error
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{number}: is not UTF-8; convert the file") from error
    lines = enumerate(text.split("\n"), start=1)
    lines = [(number, line.rstrip("\r").replace("\\n", "\n")) for number, line in lines]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise InputError(f"{path}: holds no document; write one a line")
    return lines


def split_heldout(documents: list[Document], n_heldout: int) -> tuple[list, list]:
    """Return (train, held out): `n_heldout` documents at equal distances are held out."""
    chosen = {i * len(documents) // n_heldout for i in range(n_heldout)}
    train = [document for i, document in enumerate(documents) if i not in chosen]
    return train, [documents[i] for i in sorted(chosen)]


def words_of(text: str) -> tuple[str, ...]:
    """Return the words in lower case, letters and digits alone; `does n't` is `doesn't`."""
    straight = text.lower().replace("\u2019", "'")
    joined = re.sub(r"\s*(n't|'(?:s|re|ve|ll|d|m))\b", r"\1", straight)
    joined = re.sub(r"(?<=\w)'(?=\w)", "", joined)
    return tuple(re.findall(r"[^\W_]+", joined))


def ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Yield the runs of n words."""
    return zip(*(words[i:] for i in range(n)), strict=False)


SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))(?<!\b[A-Z]\.)(?<!\b[DM]r\.)(?<!\bMrs\.)\s+|\n+"
)


def sentences(text: str) -> list[str]:
    """Split a text behind `.`, `!` and `?`, a closing sign behind them, and at line breaks."""
    return [part for part in SENTENCE_END.split(text) if part.strip()]


class Overlap:
    """What a text shares with evaluation texts, so that no model is tested on what it has read.

    A run of `n_words` words counts (Brown et al. 2020, arXiv 2005.14165, appendix C), and so does a
    whole sentence that is an evaluation text of at least `SHORTEST` words.
    """

    SHORTEST = 4

    def __init__(self, evaluation: Iterable[str], n_words: int):
        texts = [words_of(text) for text in evaluation]
        self.n_words = n_words
        self.runs = {run for words in texts for run in ngrams(words, n_words)}
        self.wholes = {words for words in texts if self.SHORTEST <= len(words) < n_words}

    def found_in(self, text: str) -> str | None:
        """Return the first words that the text shares, or None."""
        runs = ngrams(words_of(text), self.n_words)
        shared = next((run for run in runs if run in self.runs), None)
        if shared is None and self.wholes:
            wholes = map(words_of, sentences(text))
            shared = next((words for words in wholes if words in self.wholes), None)
        return shared and " ".join(shared)


def name_of(path: str) -> str:
    """Return what a file is called in reports: "texts/films.tsv.xz" -> "films"."""
    return Path(path).name.split(".")[0]


def load_corpus(
    paths: Sequence[str],
    rated: Sequence[str],
    n_heldout: int,
    exclude: Sequence[str],
    exclude_words: int,
) -> tuple[dict[str, list[Document]], dict[str, list[Document]]]:
    """Return the documents of each file to train on, and those that are held out.

    `rated` are files of reviews. Of each file `n_heldout` documents are held out; a document that
    equals one held out, of any file, is not trained on. Prints what is dropped.
    """
    evaluation = [text for path in exclude for text in read_documents(path)]
    overlap = Overlap((text.partition(" ||| ")[2] or text for text in evaluation), exclude_words)
    kept, heldout, counts = {}, {}, {}
    path_of: dict[str, str] = {}
    for path in [*paths, *rated]:
        if path_of.setdefault(name_of(path), path) != path:
            raise InputError(f"--text, --rated: two files are called {name_of(path)}; rename one")
    for path in path_of.values():
        if path in rated:
            documents = read_reviews(path)
        else:
            documents = [Document(text) for text in read_documents(path)]
        clean = []
        for document in documents:
            if shared := overlap.found_in(document.text):
                print(f"{path}: dropped {brief(document.text)}, which has {shared!r}")
            else:
                clean.append(document)
        if n_heldout >= len(clean):
            raise InputError(
                f"{path}: --heldout {n_heldout} of {len(clean)} documents leaves none to train on"
            )
        kept[path], heldout[path] = split_heldout(clean, n_heldout)
        counts[path] = f"{len(documents):,} documents, {len(documents) - len(clean):,} dropped"
    held = {document.text for documents in heldout.values() for document in documents}
    for path, documents in kept.items():
        kept[path] = [document for document in documents if document.text not in held]
        if not kept[path]:
            raise InputError(f"{path}: all its documents are held out, or equal to one that is")
        print(f"{path}: {counts[path]} for overlap, {n_heldout:,} held out, "
              f"{len(kept[path]):,} to train on")  # fmt: skip
    return kept, heldout


def digest_of(documents: Iterable[str | tuple[str, ...]]) -> str:
    """Return the sha256 of texts, or of tuples of texts, as 64 hex digits."""
    digest = hashlib.sha256()
    for document in documents:
        for text in (document,) if isinstance(document, str) else document:
            digest.update(text.encode("utf-8") + b"\0")
    return digest.hexdigest()


def train_tokenizer(
    documents: list[str], vocab_size: int, path: str | os.PathLike, n_documents: int = 20_000
) -> None:
    """Train a SentencePiece BPE model on at most `n_documents` documents at equal distances.

    With byte fallback and no normalization decode(encode(x)) is x, except for U+2581,
    SentencePiece's own sign for a space.
    """
    sample = documents[:: math.ceil(len(documents) / n_documents)]
    with atomic_write(path, "wb") as file:
        try:
            SentencePieceTrainer.train(
                sentence_iterator=(line for text in sample for line in text.split("\n") if line),
                model_writer=file,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                split_digits=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                character_coverage=0.9995,
                max_sentence_length=1_000_000,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"--vocab_size {vocab_size}: {reason}") from error


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> list[np.ndarray]:
    """Return each document as int32 token ids, bos first."""
    ids = (tokenizer.encode(text, bos=True, eos=False) for text in documents)
    return [np.array(document, dtype=np.int32) for document in ids]


def windows(stream: np.ndarray, seq_len: int) -> list[np.ndarray]:
    """Cut a stream into windows of `seq_len + 1` tokens; the last one may be shorter.

    Neighboring windows share one token: one predicts it, the next begins with it.
    """
    return [stream[i : i + seq_len + 1] for i in range(0, len(stream) - 1, seq_len)]


def shortened(ids: np.ndarray, n: int) -> np.ndarray:
    """Return at most n token ids: the first one, bos, and the last ones."""
    return ids if len(ids) <= n else np.append(ids[:1], ids[len(ids) - n + 1 :])


class Row(NamedTuple):
    """Token ids that a model reads by themselves, and what the prediction of each counts."""

    ids: torch.Tensor  # (n,), int64
    weights: torch.Tensor  # (n,), float32; the first token is an input only, its weight is not used


def row_of(ids: np.ndarray, n_answer: int, weight: float = 1.0, other: float = 1.0) -> Row:
    """Return a row whose last `n_answer` tokens weigh `weight`, all before them `other`."""
    weights = torch.full((len(ids),), other)
    weights[len(ids) - n_answer :] = weight
    return Row(torch.from_numpy(ids.astype(np.int64)), weights)


def padded(rows: Sequence[Row], max_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the rows as ids and weights (N, T + 1), padded with tokens of weight 0.

    N * T is at most `max_tokens` if N > 1, and at most a quarter of a row is padding. The rows must
    be in order, the longest first.
    """
    start = 0
    while start < len(rows):
        longest = len(rows[start].ids) - 1
        fitting = rows[start : start + max(1, max_tokens // longest)]
        part = [row for row in fitting if len(row.ids) - 1 >= 0.75 * longest]
        ids, weights = zip(*part, strict=True)
        yield pad_sequence(ids, batch_first=True), pad_sequence(weights, batch_first=True)
        start += len(part)


class Batches:
    """Batches of about `batch_tokens` tokens over documents that are shuffled anew each epoch.

    Documents are joined and cut into windows of `seq_len + 1` tokens. A document whose last
    `n_answer[i]` tokens are an answer is a row of its own, since what stands before it in a window
    would only disturb the answer (Zhao et al. 2024, arXiv 2402.13991); of a longer one than a
    window the bos and the end are kept. The answer's tokens weigh `answer_weight` in the loss, all
    others 1. The batch of a step is a function of the step and `seed` alone, so that a resumed run
    needs no state. Rows at the end of an epoch that fill no batch are skipped.
    """

    GROUPS = 8  # of rows of about the same length, in a batch

    def __init__(
        self,
        documents: list[np.ndarray],
        seq_len: int,
        batch_tokens: int,
        seed: int,
        n_answer: Sequence[int] = (),
        answer_weight: float = 1.0,
    ):
        n_answer = n_answer or [0] * len(documents)
        pairs = list(zip(documents, n_answer, strict=True))
        self.texts = [ids for ids, n in pairs if not n]
        self.examples = [(shortened(ids, seq_len + 1), n) for ids, n in pairs if n]
        self.seq_len = seq_len
        self.batch_tokens = batch_tokens
        self.answer_weight = answer_weight
        self.seed = seed
        self.epoch = -1
        n_targets = max(0, sum(map(len, self.texts)) - 1)
        n_targets += sum(len(ids) - 1 for ids, _ in self.examples)
        self.batches_per_epoch = n_targets // batch_tokens
        if not self.batches_per_epoch:
            raise InputError(
                f"the text has {n_targets:,} tokens to predict, a batch takes {batch_tokens:,}; "
                "give more --text or a smaller --batch_tokens"
            )

    def batch(self, step: int) -> list[Row]:
        """Return the rows of a step, the longest first."""
        epoch, index = divmod(step, self.batches_per_epoch)
        if epoch != self.epoch:
            self._shuffle(epoch)
            self.epoch = epoch
        edges = index * self.batch_tokens, (index + 1) * self.batch_tokens
        first, last = np.searchsorted(self.starts, edges)
        rows = sorted(self.rows[first:last], key=lambda row: len(row[0]), reverse=True)
        return [row_of(ids, n, self.answer_weight) for ids, n in rows]

    def _shuffle(self, epoch: int) -> None:
        """Draw the order of an epoch. Rows of one length stay in groups, to need no padding."""
        rng = np.random.default_rng([self.seed, epoch])
        rows = list(self.examples)
        if self.texts:
            stream = np.concatenate([self.texts[i] for i in rng.permutation(len(self.texts))])
            rows += [(ids, 0) for ids in windows(stream, self.seq_len)]
        rows = [rows[i] for i in rng.permutation(len(rows))]
        rows.sort(key=lambda row: len(row[0]))
        ends = np.cumsum([len(ids) - 1 for ids, _ in rows])
        group = ends // (self.batch_tokens // self.GROUPS + 1)
        place = rng.permutation(group[-1] + 1)[group]
        self.rows = [rows[i] for i in np.argsort(place, kind="stable")]
        n_targets = [len(ids) - 1 for ids, _ in self.rows]
        self.starts = np.cumsum([0, *n_targets[:-1]])  # tokens that are predicted before each row
