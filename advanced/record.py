"""The JSON files of finished runs: one for each data set, method and model.

Each seed and fold adds an entry when it is finished, so that no run is repeated. Of the data the
file holds only whether each sentence was classified correctly.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from training.evaluation import Evaluation
from training.labeled import NO_GOLD_LABEL
from training.state import differences
from utils import InputError, atomic_write

Run = dict[str, Any]
N_BINS = 10


def metrics_of(result: Evaluation, n_labels: int) -> dict[str, Any]:
    """Return accuracy, macro F1, confusion matrix (rows: gold) and calibration, of the sentences
    with a gold label.

    The expected calibration error is sum_b n_b / N |accuracy_b - confidence_b| over ten bins of
    equal width (Guo et al. 2017, arXiv 1706.04599, equation 3).
    """
    known = np.array(result.labels) != NO_GOLD_LABEL
    if not known.any():
        return {"n_sentences": len(known), "accuracy": None, "macro_f1": None}
    gold, predicted = np.array(result.labels)[known], np.array(result.predictions)[known]
    confidences = np.array(result.confidences)[known]
    is_correct = gold == predicted
    bins = np.minimum((confidences * N_BINS).astype(int), N_BINS - 1)
    counts = np.bincount(bins, minlength=N_BINS)
    sums = {
        "confidence": np.bincount(bins, confidences, N_BINS),
        "accuracy": np.bincount(bins, is_correct, N_BINS),
    }
    means = {
        key: [float(total / n) if n else None for total, n in zip(values, counts, strict=True)]
        for key, values in sums.items()
    }
    gaps = np.abs(sums["accuracy"] - sums["confidence"])  # n_b |accuracy_b - confidence_b|
    return {
        "n_sentences": len(gold),
        "accuracy": result.accuracy,
        "macro_f1": result.macro_f1,
        "confusion": confusion_matrix(gold, predicted, labels=range(n_labels)).tolist(),
        "right": "".join("01"[int(correct)] for correct in is_correct),
        "reliability": {"count": counts.tolist(), **means},
        "ece": float(gaps.sum() / len(gold)),
    }


def flattened(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity with its settings and files among its keys, for `differences`."""
    rest = {key: value for key, value in identity.items() if key not in ("settings", "files")}
    return {**rest, **identity["settings"], **identity["files"]}


class Record:
    """The file at `path`, read if it exists.

    `identity` is everything that decides a result except seed, fold and the values in `chosen`.
    Raise InputError for a file with another identity, whose runs would not be comparable.
    """

    def __init__(self, path: Path, identity: dict[str, Any], command: str):
        self.path = path
        identity = json.loads(json.dumps(identity))  # tuples become lists, as in the file
        self.content = {**identity, "search": [], "chosen": None, "trials": [], "runs": []}
        if path.exists():
            try:
                self.content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{path}: is not JSON ({error}); move it away") from error
            parts = {"settings": dict, "files": dict, "runs": list, "trials": list}
            is_record = isinstance(self.content, dict) and all(
                isinstance(self.content.get(key), kind) for key, kind in parts.items()
            )
            if not is_record:
                raise InputError(f"{path}: is not a record of advanced.run; move it away")
            saved = {key: self.content.get(key) for key in identity}
            differing = differences(flattened(saved), flattened(identity))
            if differing:
                what = "; ".join(f"{key}: {words}" for key, words in differing.items())
                raise InputError(
                    f"{path}: holds other runs ({what}); move it away, or give these a --name"
                )
        self.content["command"] = command

    @property
    def runs(self) -> list[Run]:
        return self.content["runs"]

    def find(
        self, key: str, hyperparameters: dict[str, Any], seed: int, fold: int | None = None
    ) -> Run | None:
        """Return the entry among "runs" or "trials", if there is one."""
        for run in self.content[key]:
            if (run["hyperparameters"], run["seed"], run["fold"]) == (hyperparameters, seed, fold):
                return run
        return None

    def add(self, key: str, run: Run) -> None:
        self.content[key].append(run)
        if key == "runs":
            self.runs.sort(key=lambda run: (run["seed"], run["fold"] or 0))
        self.write()

    def choose(self, seed: int) -> dict[str, Any]:
        """Make the seed's trial with the highest dev accuracy (the first of equals) its run.

        Return its hyperparameters. A trial that diverged has the accuracy None.
        """
        trials = [run for run in self.content["trials"] if run["seed"] == seed]
        finished = [run for run in trials if run["dev"]["accuracy"] is not None]
        if not finished:
            raise InputError(f"{self.path}: every trial of the grid diverged; try lower rates")
        best = max(finished, key=lambda run: run["dev"]["accuracy"])
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
