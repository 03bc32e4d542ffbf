"""Read the records of `python -m advanced.run`: one JSON file per method, data set and model.

A study is a method's runs on one data set from one pretrained model, one run per seed, or per
seed and fold of a cross-validation. Only seeds with all their folds count.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from results.significance import Comparison, holm, mcnemar, paired_bootstrap
from utils import InputError

# Baselines: tables list them first, in this order. `plain` is the one that others are tested
# against.
BASELINES = ("zero_shot", "assignment", "full_last", "masked", "plain")
# Published with the assignment for stories42M.pt, finetuned in its unmasked mode: mean and standard
# deviation of ten seeds.
PUBLISHED = {
    "SST dev": (0.414, 0.014),
    "SST test": (0.418, 0.017),
    "CFIMDB dev": (0.800, 0.115),
}
DATASET_NAMES = {"sst": "SST", "cfimdb": "CFIMDB"}

Study = dict[str, Any]


def load(folder: Path) -> list[Study]:
    """Return every study in `folder` in the order of file names, its file name under "file"."""
    paths = sorted(folder.glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) | {"file": path.name} for path in paths]


def select(studies: list[Study], **wanted: Any) -> list[Study]:
    """Return the studies whose keys have these values: select(studies, dataset="sst")."""
    return [s for s in studies if all(s[key] == value for key, value in wanted.items())]


def finished_seeds(study: Study) -> dict[int, list[dict[str, Any]]]:
    """Return the runs of each seed that has all folds, in the order of the folds."""
    seeds: dict[int, list[dict[str, Any]]] = {}
    for run in sorted(study["runs"], key=lambda run: (run["seed"], run["fold"] or 0)):
        seeds.setdefault(run["seed"], []).append(run)
    return {seed: runs for seed, runs in seeds.items() if len(runs) == (study["folds"] or 1)}


def scores(study: Study, split: str, key: str = "accuracy") -> list[float]:
    """Return one value per finished seed, the mean over folds weighted by their sentences.

    Empty if a run has no evaluation of `split`, or if `split` has no gold labels.
    """
    values = []
    for runs in finished_seeds(study).values():
        evaluations = [run[split] for run in runs]
        if any(e is None or e["accuracy"] is None for e in evaluations):
            return []
        weights = [e["n_sentences"] for e in evaluations]
        values.append(float(np.average([e[key] for e in evaluations], weights=weights)))
    return values


def mean_std(values: list[float]) -> str:
    """Format as "0.812 (0.004)", mean and sample standard deviation; of one value the mean only."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else ""
    return f"{statistics.mean(values):.3f} ({statistics.stdev(values):.3f})"


def signed(difference: float) -> str:
    """Format as "+0.012"; what rounds to zero is "+0.000" on either side."""
    return f"{round(difference, 3) + 0.0:+.3f}"


def correct_answers(study: Study, split: str) -> np.ndarray:
    """Return 1 for each sentence that a seed classified correctly, else 0: (n_seeds, N)."""
    seeds = finished_seeds(study).values()
    return np.array([[int(c) for run in runs for c in run[split]["right"]] for runs in seeds])


def majority_share(group: list[Study], split: str) -> float:
    """Return the share of the largest class, from any study of the group with gold labels."""
    study = next(study for study in group if scores(study, split))
    runs = next(iter(finished_seeds(study).values()))
    counts = np.sum([run[split]["confusion"] for run in runs], axis=(0, 2))  # of each class
    return float(counts.max() / counts.sum())


def ranked(studies: list[Study]) -> list[Study]:
    """Return BASELINES in their order, then the other studies, the best on dev first."""

    def rank(study: Study) -> tuple:
        method, values = study["method"], scores(study, "dev")
        if method in BASELINES:
            return (0, BASELINES.index(method), "")
        return (1, -np.mean(values), method) if values else (2, 0, method)

    return sorted(studies, key=rank)


def compare_with_plain(group: list[Study], split: str) -> dict[str, Comparison]:
    """Compare each method with `plain`, the p-values Holm-corrected over the group.

    `group` has one model, data set, training share and number of folds. Return {} if `plain` has no
    score on `split`. One run against one run is McNemar's test, otherwise p is the bootstrap's.
    """
    scored = {study["method"]: study for study in group if scores(study, split)}
    plain = scored.pop("plain", None)
    if plain is None:
        return {}
    comparisons = {method: _compare(study, plain, split) for method, study in scored.items()}
    corrected = holm([comparison.p for comparison in comparisons.values()])
    pairs = zip(comparisons.items(), corrected, strict=True)
    return {method: comparison._replace(p=p) for (method, comparison), p in pairs}


def _compare(study: Study, plain: Study, split: str) -> Comparison:
    for name in ("train", "dev") if study["folds"] else (split,):
        if study["files"][f"{name}_sha256"] != plain["files"][f"{name}_sha256"]:
            raise InputError(
                f"{study['file']} and {plain['file']} are of different {name} files; run both "
                "methods on the same files"
            )
    a, b = correct_answers(study, split), correct_answers(plain, split)
    comparison = paired_bootstrap(a, b)
    return comparison._replace(p=mcnemar(a[0], b[0])) if len(a) == len(b) == 1 else comparison


def n_seeds(study: Study) -> str:
    """Return the number of finished seeds; of a greedy soup how many it kept, as in "2 of 5"."""
    for run in study["runs"]:
        if "ingredients" in run:
            return f"{len(run['ingredients'])} of {len(run['seeds'])}"
    return str(len(finished_seeds(study)))


def trained_percent(study: Study) -> str:
    """Return the share of the parameters that the method trains, with three digits."""
    run = study["runs"][0]
    return f"{100 * run['trainable_parameters'] / run['parameters']:.3g}"
