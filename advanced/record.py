"""What runs leave behind: one JSON file for each data set, method and model.

Every seed and fold is an entry, written when it is finished, so that nothing is run twice. Of the
data nothing is kept: for each sentence only whether it was classified right.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from training.labelled import NO_GOLD_LABEL
from training.loop import macro_f1
from utils import atomic_write, differences

N_BINS = 10


def figures(
    predictions: list[int], labels: list[int], confidences: list[float], n_labels: int
) -> dict[str, Any]:
    """Accuracy, macro F1, confusion matrix (row: gold), calibration, of the sentences that have a
    gold label; None where none has.

    The expected calibration error is sum_b n_b / N |accuracy_b - confidence_b| over ten bins of
    equal width (Guo et al. 2017, arXiv 1706.04599, equation 3).
    """
    known = np.array(labels) != NO_GOLD_LABEL
    if not known.any():
        return {"n_sentences": len(labels), "accuracy": None, "macro_f1": None}
    gold, predicted, sure = (np.array(v)[known] for v in (labels, predictions, confidences))
    confusion = np.zeros((n_labels, n_labels), dtype=int)
    np.add.at(confusion, (gold, predicted), 1)
    right = gold == predicted
    bins = np.minimum((sure * N_BINS).astype(int), N_BINS - 1)
    reliability: dict[str, list] = {"count": [], "confidence": [], "accuracy": []}
    ece = 0.0
    for b in range(N_BINS):
        here = bins == b
        confidence = float(np.mean(sure[here])) if here.any() else None
        accuracy = float(np.mean(right[here])) if here.any() else None
        reliability["count"].append(int(here.sum()))
        reliability["confidence"].append(confidence)
        reliability["accuracy"].append(accuracy)
        if here.any():
            ece += float(here.mean()) * abs(accuracy - confidence)
    return {
        "n_sentences": len(gold),
        "accuracy": float(right.mean()),
        "macro_f1": macro_f1(confusion),
        "confusion": confusion.tolist(),
        "right": "".join("01"[int(is_right)] for is_right in right),
        "reliability": reliability,
        "ece": ece,
    }


class Record:
    """The file at `path`: read if it is there, begun if not.

    `identity` is all that decides a result but seed, fold and what `chosen` says; a file with
    another one is a ValueError, as its runs and new ones would not compare.
    """

    def __init__(self, path: Path, identity: dict[str, Any], command: str):
        self.path = path
        identity = json.loads(json.dumps(identity))  # as it reads in the file
        self.content = {**identity, "command": command, "search": [], "chosen": None}
        self.content |= {"trials": [], "runs": []}
        if not path.exists():
            return
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            _require_entries(saved)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: is no record of runs; move it away") from error
        differing = differences(saved, identity)
        if differing:
            raise ValueError(
                f"{path}: is of other runs ({differing}); move it away or give these a --name"
            )
        self.content = {**saved, "command": command}

    def find(
        self, where: str, hyperparameters: dict[str, Any], seed: int, fold: int | None = None
    ) -> dict[str, Any] | None:
        """The entry among "runs" or "trials" of these hyperparameters, seed and fold."""
        for run in self.content[where]:
            if (run["hyperparameters"], run["seed"], run["fold"]) == (hyperparameters, seed, fold):
                return run
        return None

    def add(self, where: str, run: dict[str, Any]) -> None:
        self.content[where].append(run)
        if where == "runs":
            self.content["runs"].sort(key=lambda run: (run["seed"], run["fold"] or 0))
        self.write()

    def choose(self, seed: int) -> dict[str, Any]:
        """Of the seed's trials the one of the highest dev accuracy, the first of equals, becomes
        its run. Of one that diverged the accuracy is None."""
        trials = [run for run in self.content["trials"] if run["seed"] == seed]
        ended = [run for run in trials if run["dev"]["accuracy"] is not None]
        if not ended:
            raise ValueError(f"{self.path}: every trial of the grid diverged; try lower rates")
        best = max(ended, key=lambda run: run["dev"]["accuracy"])
        self.content["search"] = [
            {**run["hyperparameters"], "dev_accuracy": run["dev"]["accuracy"]} for run in trials
        ]
        self.content["chosen"] = best["hyperparameters"]
        self.content["trials"] = []
        self.add("runs", best)
        return best["hyperparameters"]

    def write(self) -> None:
        with atomic_write(self.path) as file:
            json.dump(self.content, file, indent=1)
            file.write("\n")


def _require_entries(saved: Any) -> None:
    """KeyError, TypeError or ValueError where a file has not the form of a record."""
    if not isinstance(saved["chosen"], (dict, type(None))):
        raise ValueError("chosen")
    for run in [*saved["trials"], *saved["runs"]]:
        _ = run["seed"], run["fold"], run["hyperparameters"], run["dev"]["accuracy"]
