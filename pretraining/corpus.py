"""Plain text -> documents -> one stream of tokens -> windows, for language-model training.

A text file holds one document a line, plain or packed as `.xz` or `.gz`; a newline inside a
document is written as the two characters \\n. Documents are joined by bos.
"""

import gzip
import hashlib
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from sentencepiece import SentencePieceTrainer

from tokenizer import Tokenizer
from utils import atomic_write

_OPENERS = {".xz": lzma.open, ".gz": gzip.open}


def read_documents(path: str | os.PathLike) -> list[str]:
    """The documents of a file; blank lines are none. ValueError names file and line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(2, "no such text file; one document a line", str(path))
    documents = []
    try:
        with _OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path}:{number}: is not UTF-8; convert the file") from error
                text = text.rstrip("\r\n").replace("\\n", "\n")
                if text.strip():
                    documents.append(text)
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: is damaged ({error}); make or copy it again") from error
    if not documents:
        raise ValueError(f"{path}: holds no document; write one a line")
    return documents


def split_heldout(documents: list[str], n_heldout: int) -> tuple[list[str], list[str]]:
    """(train, held out): `n_heldout` documents at equal distances are held out."""
    if n_heldout >= len(documents):
        raise ValueError(f"{n_heldout} held-out documents of {len(documents)} leave none to train")
    chosen = {i * len(documents) // n_heldout for i in range(n_heldout)}
    train = [text for i, text in enumerate(documents) if i not in chosen]
    return train, [documents[i] for i in sorted(chosen)]


def ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    """Runs of n words: lower case, letters and digits alone, `does n't` read as `doesn't`."""
    straight = text.lower().replace("\u2019", "'")
    joined = re.sub(r"\s*(n't|'(?:s|re|ve|ll|d|m))\b", r"\1", straight)
    joined = re.sub(r"(?<=\w)'(?=\w)", "", joined)
    words = re.findall(r"[^\W_]+", joined)
    return zip(*(words[i:] for i in range(n)), strict=False)


def without_overlap(documents: list[str], evaluation: Iterable[str], n: int) -> list[str]:
    """Drops each document that shares a run of n words with an evaluation text.

    What a model is tested on it must not have read (Brown et al. 2020, arXiv 2005.14165,
    appendix C).
    """
    seen = {gram for text in evaluation for gram in ngrams(text, n)}
    return [text for text in documents if seen.isdisjoint(ngrams(text, n))]


def train_tokenizer(
    documents: list[str], vocab_size: int, path: str | os.PathLike, n_documents: int = 20_000
) -> None:
    """Trains a SentencePiece BPE model on at most `n_documents` documents at equal distances.

    With byte fallback, single digits and no normalization nothing is ever lost:
    decode(encode(x)) is x, but for U+2581, SentencePiece's own sign for a space.
    """
    sample = documents[:: max(1, -(-len(documents) // n_documents))]
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
            raise ValueError(f"--vocab_size {vocab_size}: {reason}") from error


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> list[np.ndarray]:
    """Each document as int32 tokens, bos first."""
    encoded = []
    for start in range(0, len(documents), 1000):
        pieces = tokenizer.sp_model.encode(documents[start : start + 1000])
        encoded += [np.array([tokenizer.bos_id, *ids], dtype=np.int32) for ids in pieces]
    return encoded


def windows(stream: np.ndarray, seq_len: int, start: int, count: int) -> torch.Tensor:
    """`count` windows of a stream of tokens, from window `start` on: (count, seq_len + 1).

    Neighboring windows share one token, which one predicts and the other begins with.
    """
    offsets = np.arange(start, start + count)[:, None] * seq_len
    return torch.from_numpy(stream[offsets + np.arange(seq_len + 1)].astype(np.int64))


def digest_of(encoded: list[np.ndarray]) -> str:
    """The sha256 of the tokens of all documents."""
    digest = hashlib.sha256()
    for document in encoded:
        digest.update(document.tobytes())
    return digest.hexdigest()


class TokenStream:
    """Batches of windows over documents that are shuffled anew each epoch, from a position on.

    The order is a function of `seed` and the epoch alone, so `position` (epoch, window) is all that
    a resumed run needs. What an epoch's end leaves of a batch is skipped.
    """

    def __init__(
        self,
        documents: list[np.ndarray],
        seq_len: int,
        seed: int,
        position: tuple[int, int] = (0, 0),
    ):
        self.documents = documents
        self.seq_len = seq_len
        self.seed = seed
        self.epoch, self.window = position
        self.n_windows = (sum(map(len, documents)) - 1) // seq_len
        self.stream = self._shuffled()

    @property
    def position(self) -> tuple[int, int]:
        return self.epoch, self.window

    def _shuffled(self) -> np.ndarray:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.documents))
        return np.concatenate([self.documents[i] for i in order])

    def require(self, n_rows: int) -> None:
        """A ValueError where the text is shorter than a batch."""
        if n_rows > self.n_windows:
            raise ValueError(
                f"the text has {self.n_windows} windows of {self.seq_len} tokens, a batch takes "
                f"{n_rows}; give more --text or a smaller --batch_tokens"
            )

    def next_batch(self, n_rows: int) -> torch.Tensor:
        """(n_rows, seq_len + 1): inputs are all but the last column, targets all but the first."""
        self.require(n_rows)
        if self.window + n_rows > self.n_windows:
            self.epoch, self.window = self.epoch + 1, 0
            self.stream = self._shuffled()
        batch = windows(self.stream, self.seq_len, self.window, n_rows)
        self.window += n_rows
        return batch
