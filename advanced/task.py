"""The data of an experiment: its files, and which of them a seed or a fold trains on."""

import argparse
from collections import Counter

from sklearn.model_selection import StratifiedKFold, train_test_split

from training.labelled import read_label_names, read_sentences
from training.options import dataset_name

Rows = list[tuple[str, int]]  # sentence, label


class Task:
    """The three splits that `args` names, read and checked."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.dataset = dataset_name(args.train)
        self.label_names = read_label_names(args.label_names)
        self.n_labels = len(self.label_names)
        self.train: Rows = read_sentences(args.train, self.n_labels)
        self.dev: Rows = read_sentences(args.dev, self.n_labels)
        self.test: Rows = read_sentences(args.test, self.n_labels, unlabelled=True)

    def splits(self, seed: int, fold: int | None) -> tuple[Rows, Rows]:
        """(train, dev) of a run. Folds are the same for all seeds, shares are drawn for each."""
        share, rows = self.args.train_share, self.train
        if fold is not None:
            rows = self.train + self.dev
            folds = StratifiedKFold(self.args.folds, shuffle=True, random_state=0)
            parts = list(folds.split(rows, [label for _, label in rows]))[fold]
            train, dev = ([rows[i] for i in part] for part in parts)
            return train, dev
        if share < 1.0:
            labels = [label for _, label in rows]
            rows, _ = train_test_split(rows, train_size=share, stratify=labels, random_state=seed)
        return rows, self.dev

    def require_enough(self) -> None:
        """ValueError where a label has too few sentences for the folds or the share."""
        args = self.args
        if args.folds:
            fewest = min(Counter(label for _, label in self.train + self.dev).values())
            if fewest < args.folds:
                raise ValueError(
                    f"--folds {args.folds}: a label has only {fewest} sentences; take fewer folds"
                )
        elif args.train_share < 1.0:
            for seed in args.seeds:
                self._require_every_label(seed)

    def _require_every_label(self, seed: int) -> None:
        wanted = {label for _, label in self.train}
        try:
            kept = {label for _, label in self.splits(seed, None)[0]}
        except ValueError:  # scikit-learn's: one side has too few sentences for the labels
            kept = set()
        if kept != wanted:
            raise ValueError(
                f"--train_share {self.args.train_share:g} of {len(self.train)} sentences leaves a "
                "label none among those kept or among the rest; take another share"
            )
