"""The demo data set: balanced, without twins, and in the form of the assignment's files."""

import itertools
import re

import pytest

from conftest import ROOT, shared_asset
from training.labeled import read_label_names, read_sentences

SPLITS = {"train": 400, "dev": 100, "test": 100}


def rows_of(split):
    return read_sentences(ROOT / f"data/demo-{split}.txt", n_labels=5)


def words_of(sentence):
    return re.findall(r"[a-z]+", sentence.lower())


def runs(words, n):
    return set(zip(*(words[i:] for i in range(n)), strict=False))


@pytest.mark.parametrize(("split", "n"), SPLITS.items())
def test_splits_are_balanced(split, n):
    labels = [label for _, label in rows_of(split)]
    assert sorted(labels) == [label for label in range(5) for _ in range(n // 5)]


def test_labels_are_those_of_sst():
    sst = read_label_names(ROOT / "data/sst-label-mapping.json")
    assert read_label_names(ROOT / "data/demo-label-mapping.json") == sst


def test_no_sentence_occurs_twice_or_almost_twice():
    sentences = [words_of(sentence) for split in SPLITS for sentence, _ in rows_of(split)]
    for one, other in itertools.combinations(map(set, sentences), 2):
        assert len(one & other) <= 0.5 * len(one | other)
    seen = set()
    for words in sentences:
        assert seen.isdisjoint(runs(words, 5)), " ".join(words)
        seen |= runs(words, 5)


@pytest.mark.parametrize("name", ["sst-train", "sst-dev", "sst-test", "cfimdb-train", "cfimdb-dev"])
def test_nothing_is_taken_from_the_assignments_data(name):
    rows = read_sentences(shared_asset(f"data/{name}.txt"))
    theirs = {run for sentence, _ in rows for run in runs(words_of(sentence), 8)}
    for split in SPLITS:
        for sentence, _ in rows_of(split):
            assert theirs.isdisjoint(runs(words_of(sentence), 8)), sentence
