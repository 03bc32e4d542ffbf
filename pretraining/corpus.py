"""Plain text -> documents -> one stream of tokens -> windows, for language-model training.

A text file holds one document a line, plain or packed as `.xz` or `.gz`; a newline inside a
document is written as the two characters \\n. Documents are joined by bos.
"""

import codecs
import gzip
import hashlib
import lzma
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from sentencepiece import SentencePieceTrainer

from tokenizer import Tokenizer
from utils import InputError, atomic_write

_OPENERS = {".xz": lzma.open, ".gz": gzip.open}


def read_documents(path: str | os.PathLike) -> list[str]:
    """Return the documents of a file without blank ones; an InputError names file and line."""
    path = Path(path)
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
    documents = [line.rstrip("\r").replace("\\n", "\n") for line in text.split("\n")]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"{path}: holds no document; write one a line")
    return documents


def split_heldout(documents: list[str], n_heldout: int) -> tuple[list[str], list[str]]:
    """Return (train, held out): `n_heldout` documents at equal distances are held out."""
    chosen = {i * len(documents) // n_heldout for i in range(n_heldout)}
    train = [text for i, text in enumerate(documents) if i not in chosen]
    return train, [documents[i] for i in sorted(chosen)]


def ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    """Yield runs of n words in lower case, letters and digits alone; `does n't` is `doesn't`."""
    straight = text.lower().replace("\u2019", "'")
    joined = re.sub(r"\s*(n't|'(?:s|re|ve|ll|d|m))\b", r"\1", straight)
    joined = re.sub(r"(?<=\w)'(?=\w)", "", joined)
    words = re.findall(r"[^\W_]+", joined)
    return zip(*(words[i:] for i in range(n)), strict=False)


def without_overlap(documents: list[str], evaluation: Iterable[str], n: int) -> list[str]:
    """Drop each document that shares a run of n words with an evaluation text, so that no model is
    tested on what it has read (Brown et al. 2020, arXiv 2005.14165, appendix C)."""
    seen = {gram for text in evaluation for gram in ngrams(text, n)}
    return [text for text in documents if not seen or seen.isdisjoint(ngrams(text, n))]


def load_corpus(
    paths: list[str], n_heldout: int, exclude: list[str], exclude_words: int
) -> tuple[list[str], dict[str, list[str]]]:
    """Return (training documents, held-out documents of each file by its name).

    A file that is named twice is trained on twice an epoch. Of each file `n_heldout` documents are
    held out; a document that equals one held out, of any file, is not trained on.
    """
    evaluation = [text for path in exclude for text in read_documents(path)]
    evaluation = [text.partition(" ||| ")[2] or text for text in evaluation]
    kept, heldout, words = {}, {}, {}
    for path in dict.fromkeys(paths):
        documents = read_documents(path)
        clean = without_overlap(documents, evaluation, exclude_words)
        name = Path(path).name.split(".")[0]
        if name in heldout:
            raise InputError(f"--text: two files are called {name}; rename one")
        if n_heldout >= len(clean):
            raise InputError(
                f"{path}: --heldout {n_heldout} of {len(clean)} documents leaves none to train on"
            )
        kept[path], heldout[name] = split_heldout(clean, n_heldout)
        words[path] = f"{len(documents):,} documents, {len(documents) - len(clean):,} dropped"
    held = {text for texts in heldout.values() for text in texts}
    train = []
    for path, documents in kept.items():
        others = [text for text in documents if text not in held]
        if not others:
            raise InputError(f"{path}: all its documents are held out, or equal to one that is")
        repeats = paths.count(path)
        print(f"{path}: {words[path]} for overlap, {n_heldout:,} held out, "
              f"{len(others):,} to train on {repeats} times an epoch")  # fmt: skip
        train += others * repeats
    return train, heldout


def digest_of(documents: Iterable[str]) -> str:
    """Return the sha256 of the documents, as 64 hex digits."""
    digest = hashlib.sha256()
    for text in documents:
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


def windows(stream: np.ndarray, seq_len: int, start: int, count: int) -> torch.Tensor:
    """Return `count` windows of a token stream from window `start` on: (count, seq_len + 1).

    Neighboring windows share one token: one predicts it, the next begins with it.
    """
    offsets = np.arange(start, start + count)[:, None] * seq_len
    return torch.from_numpy(stream[offsets + np.arange(seq_len + 1)].astype(np.int64))


class TokenStream:
    """Batches of `n_rows` windows over documents that are shuffled anew each epoch.

    The batch of a step is a function of the step and `seed` alone, so that a resumed run needs no
    state of the stream. Windows at the end of an epoch that fill no batch are skipped.
    """

    def __init__(self, documents: list[np.ndarray], seq_len: int, n_rows: int, seed: int):
        self.documents = documents
        self.seq_len = seq_len
        self.n_rows = n_rows
        self.seed = seed
        self.epoch = -1
        n_windows = (sum(map(len, documents)) - 1) // seq_len
        self.batches_per_epoch = n_windows // n_rows
        if not self.batches_per_epoch:
            raise InputError(
                f"the text has {n_windows} windows of {seq_len} tokens, a batch takes {n_rows}; "
                "give more --text or a smaller --batch_tokens"
            )

    def batch(self, step: int) -> torch.Tensor:
        """Return the windows of a step (n_rows, seq_len + 1), whose first tokens are inputs only
        and whose last ones targets only."""
        epoch, index = divmod(step, self.batches_per_epoch)
        if epoch != self.epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))
            self.tokens = np.concatenate([self.documents[i] for i in order])
            self.epoch = epoch
        return windows(self.tokens, self.seq_len, index * self.n_rows, self.n_rows)
