"""Plain text -> documents -> tokens, for language-model training.

A text file holds one document a line, plain or packed as `.xz` or `.gz`; a newline inside a
document is written as the two characters \\n. In a file of rated reviews a rating and a tab stand
before it.
"""

import gzip
import hashlib
import lzma
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from sentencepiece import SentencePieceTrainer

from tokenizer import Tokenizer
from training.labeled import decode
from utils import InputError, atomic_write, brief

_OPENERS = {".xz": lzma.open, ".gz": gzip.open}
Item = TypeVar("Item")


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
        try:
            rating, text = line.split("\t")
            if not (0.0 <= float(rating) <= 1.0 and text.strip()):
                raise ValueError
        except ValueError:
            raise InputError(
                f"{path}:{number}: {brief(line)} is not a rating from 0 to 1, one tab, and a text"
            ) from None
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
    lines = enumerate(decode(content, path).split("\n"), start=1)
    lines = [(number, line.replace("\\n", "\n")) for number, line in lines]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise InputError(f"{path}: holds no document; write one a line")
    return lines


def split_heldout(documents: list[Item], n_heldout: int) -> tuple[list[Item], list[Item]]:
    """Return (train, held out): `n_heldout` documents at equal distances are held out."""
    chosen = {i * len(documents) // n_heldout for i in range(n_heldout)}
    train = [document for i, document in enumerate(documents) if i not in chosen]
    return train, [documents[i] for i in sorted(chosen)]


def words_of(text: str) -> tuple[str, ...]:
    """Return the words in lower case, letters and digits alone.

    The treebank's spelling makes no difference: `does n't` is `doesn't`, `-LRB-` a parenthesis.
    """
    straight = re.sub(r"-[lr][rsc]b-", " ", text.lower().replace("\u2019", "'"))
    joined = re.sub(r"\s*(n't|'(?:s|re|ve|ll|d|m))\b", r"\1", straight)
    joined = re.sub(r"(?<=\w)'(?=\w)", "", joined)
    return tuple(re.findall(r"[^\W_]+", joined))


def ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Yield the runs of n words."""
    return zip(*(words[i:] for i in range(n)), strict=False)


SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"'\u2019\u201d)\]]))(?<!\b[A-Z]\.)(?<!\b[DM]r\.)(?<!\bMrs\.)\s+|\n+"
)


def sentences(text: str) -> list[str]:
    """Split after `.`, `!` or `?`, and a closing quote or bracket after it, and at line breaks."""
    return [part for part in SENTENCE_END.split(text) if part.strip()]


def sentence_runs(text: str, n_words: int) -> Iterator[tuple[str, ...]]:
    """Yield the words of neighboring whole sentences that have fewer than `n_words` together."""
    parts = [words_of(sentence) for sentence in sentences(text)]
    for start in range(len(parts)):
        words: tuple[str, ...] = ()
        for part in parts[start:]:
            words += part
            if len(words) >= n_words:
                break
            yield words


class Overlap:
    """What a text shares with evaluation texts, so that no model is tested on what it has read.

    A run of `n_words` words counts (Brown et al. 2020, arXiv 2005.14165, appendix C). A shorter
    evaluation text, of at least `SHORTEST` words, counts if it is one or more whole sentences.
    """

    SHORTEST = 4

    def __init__(self, evaluation: Iterable[str], n_words: int):
        texts = [words_of(text) for text in evaluation]
        self.n_words = n_words
        self.known = {run for words in texts for run in ngrams(words, n_words)}
        self.known |= {words for words in texts if self.SHORTEST <= len(words) < n_words}

    def found_in(self, text: str) -> str | None:
        """Return the first words that the text shares, or None."""
        if not self.known:  # nothing to compare with
            return None
        n = self.n_words
        runs = chain(ngrams(words_of(text), n), sentence_runs(text, n))
        return next((" ".join(run) for run in runs if run in self.known), None)


def name_of(path: str) -> str:
    """Return what a file is called in reports: "texts/films.2020.tsv.xz" -> "films.2020".

    Bytes that are not UTF-8 are escaped, because the reports are UTF-8.
    """
    name = Path(path)
    stem = (name.with_suffix("") if name.suffix.lower() in _OPENERS else name).stem
    return stem.encode("utf-8", "backslashreplace").decode("utf-8")


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


def train_tokenizer(documents: list[str], vocab_size: int, path: str | os.PathLike) -> None:
    """Train a SentencePiece BPE model on at most 20,000 documents at equal distances.

    With byte fallback and no normalization decode(encode(x)) is x, except for U+2581,
    SentencePiece's own sign for a space.
    """
    sample = documents[:: math.ceil(len(documents) / 20_000)]
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
