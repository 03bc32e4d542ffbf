"""From tokens to batches: every token is read once, examples are rows of their own."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from pretraining.batches import Batches, padded, row_of
from utils import InputError


def numbered_documents(lengths=(7, 1, 12, 5, 9, 3, 14, 2)) -> list[np.ndarray]:
    """53 tokens, each another number."""
    return np.split(np.arange(sum(lengths), dtype=np.int32), np.cumsum(lengths)[:-1])


def test_rows_are_padded_with_weight_0_in_passes_of_a_bounded_size():
    rows = [row_of(np.arange(n), 1, weight=9.0) for n in (9, 7, 6, 3, 2, 2)]
    passes = list(padded(rows, max_tokens=16))
    assert [tuple(ids.shape) for ids, _ in passes] == [(2, 9), (1, 6), (1, 3), (2, 2)]
    for ids, weights in passes:
        assert ids.dtype == torch.int64 and weights.shape == ids.shape
    read = [
        (ids[: int((weights > 0).sum())].tolist(), weights.tolist())
        for batch in passes
        for ids, weights in zip(*batch, strict=True)
    ]
    for (ids, weights), row in zip(read, rows, strict=True):
        n = len(row.ids)
        assert ids == row.ids.tolist()
        assert weights == [1.0] * (n - 1) + [9.0] + [0.0] * (len(weights) - n)
    assert [len(ids) for ids, _ in padded(rows, max_tokens=1)] == [1] * 6


@pytest.mark.parametrize(("seq_len", "batch_tokens"), [(1, 1), (4, 20), (5, 13)])
def test_an_epoch_reads_no_token_twice_and_predicts_the_one_behind_it(seq_len, batch_tokens):
    documents = numbered_documents()
    batches = Batches(documents, [], seq_len, batch_tokens, seed=3)
    n_batches = 52 // batch_tokens
    orders = []
    for epoch in range(3):
        read = []
        for step in range(epoch * n_batches, (epoch + 1) * n_batches):
            rows = [row.ids.tolist() for row in batches.batch(step)]
            n_targets = sum(len(row) - 1 for row in rows)
            assert abs(n_targets - batch_tokens) < seq_len
            read += rows
        assert all(len(row) <= seq_len + 1 for row in read)
        inputs = [token for row in read for token in row[:-1]]
        assert len(set(inputs)) == len(inputs) > 52 - batch_tokens - seq_len
        starts = {int(document[0]) for document in documents}
        breaks = {b for row in read for a, b in pairwise(row) if b != a + 1}
        assert breaks <= starts  # documents stay whole
        orders.append(tuple(inputs))
    assert len(set(orders)) == 3


def test_an_example_is_a_row_of_its_own_whose_answer_weighs_more():
    documents = numbered_documents()
    texts, examples = [], []
    for ids, n in zip(documents, [0, 1, 3, 0, 2, 0, 9, 1], strict=True):
        texts += [ids] * (n == 0)
        examples += [(ids, n)] * (n > 0)
    batches = Batches(texts, examples, 6, 7, 2, answer_weight=5.0)
    n_targets = (7 + 5 + 3) - 1 + (0 + 6 + 6 + 6 + 1)  # of the joined texts, of the examples
    assert batches.batches_per_epoch == n_targets // 7
    seen = {}
    for step in range(20 * batches.batches_per_epoch):
        rows = batches.batch(step)
        assert [len(row.ids) for row in rows] == sorted(
            (len(row.ids) for row in rows), reverse=True
        )
        seen |= {tuple(row.ids.tolist()): row.weights.tolist() for row in rows}
    for ids, n in examples:
        ids = ids.tolist()
        short = ids if len(ids) <= 7 else [ids[0], *ids[-6:]]
        expected = [5.0 if token in ids[-n:] else 1.0 for token in short]
        assert seen.pop(tuple(short))[1:] == expected[1:]
    for ids, weights in seen.items():
        assert set(ids) <= set(np.concatenate(texts)) and set(weights) == {1.0}


def test_the_rows_of_a_batch_need_little_padding_and_have_many_lengths():
    rng = np.random.default_rng(0)
    examples = [(np.arange(n), 1) for n in rng.integers(4, 60, 3000)]
    batches = Batches([], examples, 60, 1000, 1)
    n_real, n_read, n_lengths = 0, 0, []
    for step in range(batches.batches_per_epoch):
        rows = batches.batch(step)
        n_lengths.append(len({len(row.ids) for row in rows}))
        n_real += sum(len(row.ids) - 1 for row in rows)
        n_read += sum(ids[:, 1:].numel() for ids, _ in padded(rows, 250))
    assert n_read < 1.1 * n_real
    assert np.mean(n_lengths) > 8


def test_a_batch_is_a_function_of_seed_and_step_alone():
    def read(batches: Batches, step: int) -> list[list[int]]:
        return [row.ids.tolist() for row in batches.batch(step)]

    def batches(seed: int) -> Batches:
        *texts, one, other = numbered_documents()
        return Batches(texts, [(one, 2), (other, 1)], 4, 8, seed)

    whole = batches(9)
    expected = [read(whole, step) for step in range(30)]
    for step in (29, 3, 17):
        assert read(batches(9), step) == expected[step]
        assert read(batches(8), step) != expected[step]


def test_a_text_too_small_for_a_batch_is_refused():
    Batches(numbered_documents(), [], 8, 52, seed=0)
    with pytest.raises(InputError, match="52 tokens to predict, a batch takes 53"):
        Batches(numbered_documents(), [], 8, 53, seed=0)
