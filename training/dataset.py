"""Turn labeled sentences into examples, and these into right-padded batches with lengths."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from tokenizer import Tokenizer
from training import distributed
from utils import InputError


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
    """Tokenize each sentence: bos, the sentence, and with `suffix` a space and the suffix.

    A sentence keeps its first `max_sentence_len` tokens, or fewer if the whole would exceed
    `max_tokens`; the suffix, the question of a prompt, is kept whole. Also return the number of
    sentences that `max_tokens` truncated. Raises InputError if no token of a sentence would fit.
    """
    n_suffix = len(tokenizer.encode(suffix, bos=False, eos=False)) if suffix else 0
    if max_tokens < n_suffix + 2:  # bos and one token of the sentence
        raise InputError(
            f"the model's {max_tokens} positions leave no room for a sentence beside a question of "
            f"{n_suffix} tokens; shorten the label names"
        )
    most = max_tokens
    if max_sentence_len is not None:
        most = min(most, 1 + max_sentence_len + n_suffix)

    examples, n_truncated = [], 0
    for sentence, label in rows:
        text = f"{sentence} {suffix}" if suffix else sentence
        ids = tokenizer.encode(text, bos=True, eos=False)
        if len(ids) > most:
            n_truncated += most == max_tokens
            ids = ids[: most - n_suffix] + ids[len(ids) - n_suffix :]
        examples.append(Example(sentence, label, ids))
    return examples, n_truncated


def warn_of_truncation(n_truncated: int, n: int, max_tokens: int, path: str | None = None) -> None:
    """Print a line on standard error if any of the n sentences of `path` was truncated."""
    if n_truncated:
        distributed.say(
            f"warning: {'' if path is None else f'{path}: '}{n_truncated} of {n} sentences are "
            f"longer than the model's context of {max_tokens} tokens and are truncated"
        )


class SentenceDataset(Dataset):
    """Examples and their batches."""

    def __init__(self, examples: list[Example], pad_id: int):
        self.examples = examples
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def collate_fn(self, batch: list[Example]) -> dict[str, Any]:
        """Return token_ids (B, T) padded on the right, labels (B,), lengths (B,) and sents."""
        lengths = [len(example.tokens) for example in batch]
        width = max(lengths)
        padded = [e.tokens + [self.pad_id] * (width - len(e.tokens)) for e in batch]
        return {
            "token_ids": torch.tensor(padded),
            "labels": torch.tensor([example.label for example in batch]),
            "lengths": torch.tensor(lengths),
            "sents": [example.sentence for example in batch],
        }

    def eval_batches(self, batch_size: int, similar_lengths: bool) -> list[list[int]]:
        """Return the indices of each batch: in order, or from the longest to the shortest."""
        order = list(range(len(self)))
        if similar_lengths:
            order.sort(key=lambda i: len(self.examples[i].tokens), reverse=True)
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class SimilarLengths(Sampler[list[int]]):
    """Shuffled batches of sentences of similar length, drawn anew each epoch.

    All examples are shuffled and cut into pools of 50 batches; each pool is sorted by length and
    cut into batches; then the batches are shuffled. So batches hold little padding, while their
    members and their order still change from epoch to epoch.
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


def make_train_loader(
    dataset: SentenceDataset, batch_size: int, generator: torch.Generator, similar_lengths: bool
) -> DataLoader:
    """Return batches shuffled anew each epoch by `generator`.

    `similar_lengths`, for models that mask padding, saves work and changes no evaluation.
    """
    options: dict[str, Any] = {"generator": generator, "collate_fn": dataset.collate_fn}
    if similar_lengths:
        lengths = [len(example.tokens) for example in dataset.examples]
        batches = SimilarLengths(lengths, batch_size, generator)
        return DataLoader(dataset, batch_sampler=batches, **options)
    return DataLoader(dataset, batch_size=batch_size, shuffle=True, **options)
