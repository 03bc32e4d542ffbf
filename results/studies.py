"""The files that `python -m advanced.run` leaves in results/: a method on a data set from a model.

A JSON file with the key "method" is a study; other files (speed.json, fuzz.json) are not. A study
is read whole or not at all: what is missing, or contradicts the rest, is a ValueError.
"""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# What the other methods are read against.
FIRST = ("zero_shot", "assignment", "full_last", "masked", "plain", "plain_fp32", "plain_gpu")
# Published with the assignment for stories42M.pt, finetuned in its unmasked mode: mean and
# deviation of ten seeds.
PUBLISHED = {
    ("sst", "dev"): (0.414, 0.014),
    ("sst", "test"): (0.418, 0.017),
    ("cfimdb", "dev"): (0.800, 0.115),
}
KEYS = (
    *("dataset", "method", "model", "train_share", "folds", "n_labels", "command", "settings"),
    *("files", "search", "chosen", "runs"),
)
_KINDS = {"runs": list, "files": dict, "settings": dict, "chosen": dict | None}
RUN_KEYS = (
    *("seed", "fold", "hyperparameters", "versions", "history", "best_epoch", "dev", "test"),
    *("seconds", "threads", "trainable_parameters", "parameters", "peak_memory_mb"),
)
EVALUATION_KEYS = (
    "n_sentences",
    "accuracy",
    "macro_f1",
    "confusion",
    "right",
    "reliability",
    "ece",
)

# Of which a study's name of its data set or model stands for one file.
_SAME_FILES = {f"{split}_sha256": "dataset" for split in ("train", "dev", "test")}
_SAME_FILES["pretrained_model_path_sha256"] = "model"

Study = dict[str, Any]


def load(folder: Path) -> list[Study]:
    """Every study in `folder`, in the order of file names; each learns its "file"."""
    found: dict[tuple, Study] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            study = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: is no JSON ({error}); delete it or run it again") from error
        if not isinstance(study, dict) or "method" not in study:
            continue
        try:
            _check(study)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        except (TypeError, AttributeError, KeyError) as error:  # a list for a number, and the like
            remedy = "delete it or run it again"
            raise ValueError(f"{path}: is not of a study's form ({error}); {remedy}") from error
        study["file"] = path.name
        kind = tuple(study[key] for key in ("dataset", "method", "model", "train_share", "folds"))
        if kind in found:
            raise ValueError(f"{path}: is of the same kind as {found[kind]['file']}; keep one")
        found[kind] = study
    _check_same_files(list(found.values()))
    _check_same_gold(list(found.values()))
    return list(found.values())


def select(studies: list[Study], **wanted: Any) -> list[Study]:
    """Those whose keys have these values: select(studies, dataset="sst", folds=None)."""
    return [s for s in studies if all(s[key] == value for key, value in wanted.items())]


def by_seed(study: Study) -> dict[int, list[dict[str, Any]]]:
    """The runs of each finished seed, in the order of their folds."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for run in sorted(study["runs"], key=lambda run: (run["seed"], run["fold"] or 0)):
        groups.setdefault(run["seed"], []).append(run)
    return {seed: runs for seed, runs in groups.items() if len(runs) == (study["folds"] or 1)}


def unfinished(study: Study) -> Iterator[str]:
    """A line for each thing that no table counts yet."""
    if not study["runs"]:
        yield f"{study['file']}: has no run yet"
    for seed in sorted({run["seed"] for run in study["runs"]} - by_seed(study).keys()):
        n_folds = sum(run["seed"] == seed for run in study["runs"])
        yield (
            f"{study['file']}: seed {seed} has {n_folds} of {study['folds']} folds and is left out"
        )


def published(dataset: str, folds: int | None, split: str) -> tuple[float, float] | None:
    """Of PUBLISHED, where nothing is of folds."""
    return None if folds else PUBLISHED.get((dataset, split))


def measured(study: Study, split: str, key: str = "accuracy") -> list[float]:
    """A value for each finished seed; of folds the mean, weighted by their sentences. Empty where
    a split has no gold labels or was not evaluated."""
    values = []
    for runs in by_seed(study).values():
        evaluations = [run[split] for run in runs]
        if any(e is None or e["accuracy"] is None for e in evaluations):
            return []
        weights = [e["n_sentences"] for e in evaluations]
        values.append(float(np.average([e[key] for e in evaluations], weights=weights)))
    return values


def mean_std(values: list[float]) -> str:
    """0.812 (0.004): mean and sample standard deviation; one value has none, no value no cell."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else ""
    return f"{statistics.mean(values):.3f} ({statistics.stdev(values):.3f})"


def right(study: Study, split: str) -> np.ndarray:
    """Which sentences each finished seed answered rightly: (n_seeds, N) of 0 and 1."""
    rows = ["".join(run[split]["right"] for run in runs) for runs in by_seed(study).values()]
    return np.array([[character == "1" for character in row] for row in rows], dtype=np.int8)


def gold_counts(study: Study, split: str) -> np.ndarray | None:
    """How many sentences each class has: (n_labels,); None where none has a gold label."""
    runs = next(iter(by_seed(study).values()), [])
    if not runs or any(run[split] is None or run[split]["accuracy"] is None for run in runs):
        return None
    return np.sum([np.sum(run[split]["confusion"], axis=1) for run in runs], axis=0)


def ranked(studies: list[Study], split: str = "dev") -> list[Study]:
    """FIRST in its order, then the best first; those without a number last, by name."""

    def rank(study: Study) -> tuple:
        if study["method"] in FIRST:
            return (0, FIRST.index(study["method"]), "")
        values = measured(study, split)
        return (1, -np.mean(values), study["method"]) if values else (2, 0, study["method"])

    return sorted(studies, key=rank)


def _check(study: Study) -> None:
    _require(study, KEYS, "study")
    for key, kind in _KINDS.items():
        if not isinstance(study[key], kind):
            raise ValueError(f"its {key} are of another type; run `advanced.run` again")
    _require(study["settings"], ("device",), "list of settings")
    seen = set()
    for run in study["runs"]:
        _require(run, RUN_KEYS, "run")
        place = f"seed {run['seed']}, fold {run['fold']}"
        if (run["fold"] is None) != (study["folds"] is None) or (
            run["fold"] is not None and run["fold"] not in range(study["folds"])
        ):
            raise ValueError(f"{place}: is no fold of {study['folds']}; run it again")
        if place in seen:
            raise ValueError(f"{place}: stands there twice; delete one")
        seen.add(place)
        for key, value in (study["chosen"] or {}).items():
            if run["hyperparameters"].get(key, value) != value:
                raise ValueError(
                    f"{place}: {key} is {run['hyperparameters'][key]}, chosen was {value}; "
                    "run it again"
                )
        if run["dev"] is None:
            raise ValueError(f"{place}: has no dev; run it again")
        for split in ("dev", "test"):
            if run[split] is not None:
                _check_evaluation(run[split], study["n_labels"], f"{place}, {split}")


def _require(record: Any, keys: tuple[str, ...], what: str) -> None:
    missing = [key for key in keys if key not in record]
    if missing:
        raise ValueError(f"a {what} lacks {', '.join(missing)}; run `advanced.run` again")


def _check_evaluation(evaluation: dict[str, Any], n_labels: int, place: str) -> None:
    _require(evaluation, ("n_sentences", "accuracy"), f"{place} evaluation")
    if evaluation["accuracy"] is None:
        return
    _require(evaluation, EVALUATION_KEYS, f"{place} evaluation")
    n, answers = evaluation["n_sentences"], evaluation["right"]
    confusion = np.array(evaluation["confusion"])
    n_right = answers.count("1")
    if confusion.shape != (n_labels, n_labels):
        raise ValueError(f"{place}: confusion is {confusion.shape}, labels are {n_labels}")
    if set(answers) - {"0", "1"} or not len(answers) == n == confusion.sum():
        raise ValueError(
            f"{place}: {n} sentences, {len(answers)} answers of 0 or 1 and a confusion matrix of "
            f"{confusion.sum()} do not agree"
        )
    if n_right != np.trace(confusion) or abs(n_right / n - evaluation["accuracy"]) > 1e-6:
        raise ValueError(
            f"{place}: {n_right} right answers, {np.trace(confusion)} on the diagonal and accuracy "
            f"{evaluation['accuracy']} do not agree"
        )


def _check_same_files(studies: list[Study]) -> None:
    """Answers are compared sentence by sentence, so a name stands for one file in all studies."""
    known: dict[tuple[str, str], tuple[str, str]] = {}
    for study in studies:
        for key in filter(study["files"].get, _SAME_FILES):
            name, sha256 = study[_SAME_FILES[key]], study["files"][key]
            first, file = known.setdefault((key, name), (sha256, study["file"]))
            if sha256 != first:
                raise ValueError(
                    f"{study['file']}: {key} of {name} is {sha256[:12]}, in {file} {first[:12]}; "
                    "run both on the same file"
                )


def _check_same_gold(studies: list[Study]) -> None:
    """Answers are compared sentence by sentence, so all of a split must be to the same ones."""
    known: dict[tuple, tuple[list[int], str]] = {}
    for study in studies:
        for run in study["runs"]:
            for split in ("dev", "test"):
                if run[split] is None or run[split]["accuracy"] is None:
                    continue
                counts = np.sum(run[split]["confusion"], axis=1).tolist()
                kind = (study["dataset"], study["folds"], run["fold"], split)
                first, file = known.setdefault(kind, (counts, study["file"]))
                if counts != first:
                    raise ValueError(
                        f"{study['file']}: {split} has {counts} sentences a class, "
                        f"{file} {first}; evaluate both on the same sentences"
                    )
