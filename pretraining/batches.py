"""Tokens -> rows -> batches, for language-model training."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from utils import InputError


def windows(stream: np.ndarray, seq_len: int) -> list[np.ndarray]:
    """Cut a stream into windows of `seq_len + 1` tokens; the last one may be shorter.

    Neighboring windows share one token: one predicts it, the next begins with it.
    """
    return [stream[i : i + seq_len + 1] for i in range(0, len(stream) - 1, seq_len)]


def shortened(ids: np.ndarray, n: int) -> np.ndarray:
    """Return at most n token ids: the first one, bos, and the last ones."""
    return ids if len(ids) <= n else np.append(ids[:1], ids[len(ids) - n + 1 :])


class Row(NamedTuple):
    """Token ids that a model reads by themselves, and the weight of each in the loss."""

    ids: torch.Tensor  # (n,), int64
    weights: torch.Tensor  # (n,), float32; the first is not used, since nothing predicts its token


def row_of(ids: np.ndarray, n_answer: int, weight: float = 1.0, other: float = 1.0) -> Row:
    """Return a row whose last `n_answer` tokens weigh `weight`, all before them `other`."""
    weights = torch.full((len(ids),), other)
    weights[max(0, len(ids) - n_answer) :] = weight
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
    """Batches of about `batch_tokens` tokens, in an order that is drawn anew for each epoch.

    Texts are joined and cut into windows of `seq_len + 1` tokens. An example, token ids and how
    many of them at the end are its answer, is a row of its own, since what stands before it in a
    window would only disturb the answer (Zhao et al. 2024, arXiv 2402.13991); one longer than a
    window keeps its bos and its end. The answer's tokens weigh `answer_weight` in the loss, all
    others 1. The batch of a step is a function of the step and `seed` alone, so that a resumed run
    needs no state. Rows at the end of an epoch that fill no batch are skipped.
    """

    GROUPS = 8  # a batch holds about so many groups of rows, each of one length

    def __init__(
        self,
        texts: list[np.ndarray],
        examples: Sequence[tuple[np.ndarray, int]],
        seq_len: int,
        batch_tokens: int,
        seed: int,
        answer_weight: float = 1.0,
    ):
        self.texts = texts
        self.examples = [(shortened(ids, seq_len + 1), n_answer) for ids, n_answer in examples]
        self.seq_len = seq_len
        self.batch_tokens = batch_tokens
        self.answer_weight = answer_weight
        self.seed = seed
        self.epoch = -1
        n_targets = max(0, sum(map(len, texts)) - 1)
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
        begin = index * self.batch_tokens
        first, last = np.searchsorted(self.starts, [begin, begin + self.batch_tokens])
        rows = sorted(self.rows[first:last], key=lambda row: len(row[0]), reverse=True)
        return [row_of(ids, n_answer, self.answer_weight) for ids, n_answer in rows]

    def _shuffle(self, epoch: int) -> None:
        """Draw the order of an epoch, of groups of rows of one length, which need no padding."""
        rng = np.random.default_rng([self.seed, epoch])
        rows = list(self.examples)
        if self.texts:
            stream = np.concatenate([self.texts[i] for i in rng.permutation(len(self.texts))])
            rows += [(ids, 0) for ids in windows(stream, self.seq_len)]
        rows = [rows[i] for i in rng.permutation(len(rows))]
        rows.sort(key=lambda row: len(row[0]))
        ends = np.cumsum([len(ids) - 1 for ids, _ in rows])
        group = ends // (self.batch_tokens // self.GROUPS + 1)
        order = rng.permutation(group[-1] + 1)
        self.rows = [rows[i] for i in np.argsort(order[group], kind="stable")]
        n_targets = [len(ids) - 1 for ids, _ in self.rows]
        self.starts = np.cumsum([0, *n_targets[:-1]])  # tokens that are predicted before each row
