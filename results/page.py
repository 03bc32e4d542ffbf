"""Build the detailed tables of docs/results.md: scores, tests against `plain`, cost."""

import statistics
from typing import Any

from benchmarks.report import markdown
from results.significance import Comparison
from results.studies import (
    DATASET_NAMES,
    Study,
    compare_with_plain,
    finished_seeds,
    majority_share,
    mean_std,
    n_seeds,
    ranked,
    scores,
    select,
    signed,
    trained_percent,
)

MAJORITY_CLASS = "always the split's largest class"


def page(studies: list[Study]) -> str:
    """Return two tables per model, data set, number of folds and training share, with headings."""
    parts = []
    keys = ("model", "dataset", "folds", "train_share")
    for group in sorted({tuple(s[key] for key in keys) for s in studies}, key=_group_order):
        members = ranked(select(studies, **dict(zip(keys, group, strict=True))))
        members = [study for study in members if finished_seeds(study)]
        if members:
            parts += [f"### {_title(*group)}", _score_table(members), _cost_table(members)]
    return "\n\n".join(parts)


def _group_order(group: tuple) -> tuple:
    model, dataset, folds, share = group
    return (model, dataset != "sst", dataset, folds or 0, -share)


def _title(model: str, dataset: str, folds: int | None, share: float) -> str:
    title = f"{model}, {DATASET_NAMES.get(dataset, dataset)}"
    title += f", {folds}-fold cross-validation" if folds else ""
    return title + (f", {100 * share:.3g}% of the training data" if share != 1 else "")


def _score_table(members: list[Study]) -> str:
    splits = [split for split in ("dev", "test") if any(scores(s, split) for s in members)]
    names = {split: "held out" if members[0]["folds"] else split for split in splits}
    # Compare on test or on held-out folds: dev chose epochs and learning rates.
    compared = splits[-1]
    is_tested = compared == "test" or members[0]["folds"] is not None
    comparisons = compare_with_plain(members, compared) if is_tested else {}
    head, majority = ["method"], [MAJORITY_CLASS]
    for split in splits:
        head += [names[split], f"{names[split]} macro F1", f"{names[split]} ECE"]
        majority += [f"{majority_share(members, split):.3f}", "", ""]
    head += [f"{names[compared]}, minus plain"] * is_tested + ["seeds"]
    rows = [[*majority, *[""] * is_tested, ""]]
    for study in members:
        cells = [
            mean_std(scores(study, split, key))
            for split in splits
            for key in ("accuracy", "macro_f1", "ece")
        ]
        difference = [_difference(comparisons.get(study["method"]))] * is_tested
        rows.append([study["method"], *cells, *difference, n_seeds(study)])
    return markdown(head, rows)


def _cost_table(members: list[Study]) -> str:
    head = ["method", "trained parameters", "trained %", "chosen", "search trials"]
    head += ["device", "seconds a run", "peak memory (MB)"]
    rows = []
    for study in members:
        runs = [run for runs in finished_seeds(study).values() for run in runs]
        memory = [run["peak_memory_mb"] for run in runs if run["peak_memory_mb"] is not None]
        rows.append([
            study["method"],
            f"{runs[0]['trainable_parameters']:,}",
            trained_percent(study),
            ", ".join(f"{key} {_short(value)}" for key, value in (study["chosen"] or {}).items()),
            str(len(study["search"] or [])),
            study["settings"]["device"],
            _seconds(study, runs),
            f"{max(memory):.0f}" if memory else "",
        ])  # fmt: skip
    return markdown(head, rows)


def _seconds(study: Study, runs: list[dict[str, Any]]) -> str:
    """Return the mean seconds of a run, plus those of pretraining on the training split.

    All seeds share that pretraining unless each has its own split (folds, a share of the data).
    """
    seconds = [run["seconds"] for run in runs if run["seconds"] is not None]
    parts = [f"{statistics.mean(seconds):.0f}"] if seconds else []
    pretraining = max(run.get("pretrain_seconds") or 0 for run in runs)
    if pretraining:
        is_shared = study["train_share"] == 1 and not study["folds"]
        parts.append(f"{pretraining:.0f} {'once' if is_shared else 'each'}")
    return " + ".join(parts)


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _difference(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    difference, low, high, p = comparison
    return f"{signed(difference)} [{signed(low)}, {signed(high)}] p {p_value(p)}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
