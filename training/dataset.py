"""Labelled sentences -> examples -> right-padded batches that carry their lengths."""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from tokenizer import Tokenizer


class Example(NamedTuple):
    sentence: str
    label: int
    tokens: list[int]


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
        if not suffix:
            raise ValueError(f"a model of {max_tokens} positions has no room for a sentence")
        raise ValueError(
            f"a question of {n_suffix} tokens leaves the sentence no room in the {max_tokens} "
            "positions that the model has for it; shorten the label names"
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


def warn_of_truncation(n_truncated: int, n: int, max_tokens: int, path: str | None = None) -> None:
    """A line on standard error if any of n sentences, those of `path`, lost its end."""
    if n_truncated:
        print(
            f"warning: {'' if path is None else f'{path}: '}{n_truncated} of {n} sentences do not "
            f"fit the {max_tokens} positions that the model has for them and lose their end",
            file=sys.stderr,
        )


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
    # Without one of its own a loader draws from the global generator, and evaluating once more or
    # less would change the dropout of all later training.
    generator = shuffle_by or torch.Generator()
    options: dict[str, Any] = {"generator": generator, "collate_fn": dataset.collate_fn}
    if shuffle_by is not None and similar_lengths:
        batches = SimilarLengths(lengths, batch_size, shuffle_by)
        return DataLoader(dataset, batch_sampler=batches, **options)
    if similar_lengths:
        by_length = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        return DataLoader(dataset, batch_size=batch_size, sampler=by_length, **options)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle_by is not None, **options)
