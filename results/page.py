"""Build results/README.md: scores, tests against `plain`, cost and command of every study."""

import statistics
from typing import Any

from results.figures import CAPTIONS
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
    trained_percent,
)

INTRODUCTION = """\
# Results

`python -m results.report` writes this page from `records/*.json`; edits are lost.

Each cell is the mean (sample standard deviation) over seeds, and empty if nothing was measured.
`plain` is the baseline. Scores belong to the weights that the method ends with: usually those of
the best epoch on dev, in cross-validation those of the last epoch. ECE is the expected calibration
error in ten bins. In cross-validation macro F1 and ECE are means over folds.

Seconds and memory say how much a run takes, not which of two methods takes less: the runs used
different processors, in float32 or, if the command has `--bf16`, bfloat16. Up to fifteen runs
shared one GPU (`cuda`, TF32); their memory is the device's.

The column "minus plain" compares each method with `plain`:

- The split is test, which had no part in any choice. CFIMDB's test has no gold labels, so there it
  is dev, which chose epochs, learning rates and the members of averages.
- p is two-sided, from a paired bootstrap with 10,000 resamples of sentences and of seeds; if each
  side has one run, p is McNemar's exact test. Holm's method corrects it for the methods in the
  column, so with m methods the smallest bootstrap p is m / 10,001.
- Brackets hold the bootstrap's 95 % interval, not corrected.

Limits of these tests:

- The bootstrap draws the seeds of both sides independently, although some share data or even
  weights (`wise_ft`, soups). This makes p larger.
- A soup is one run. Its spread over other sets of seeds is unknown, so its p is too small. The same
  holds for a method with one seed; with two or three seeds p is rough.
- In cross-validation all seeds use the same folds, and the sentences of a fold share a model. Dev
  chose the learning rate, and its sentences are among those of the folds.

"""
COMMANDS = """\
The records of these runs are in `records/`, so the commands print what is stored and train nothing.
Add `--results_dir runs/again --runs_dir runs/again` to train again; `--dev_out` and `--test_out`
need that, too.
"""
MAJORITY_CLASS = "always the split's largest class"


def page(studies: list[Study]) -> str:
    """Return the text of results/README.md."""
    parts = [INTRODUCTION]
    keys = ("model", "dataset", "folds", "train_share")
    for group in sorted({tuple(s[key] for key in keys) for s in studies}, key=_group_order):
        members = ranked(select(studies, **dict(zip(keys, group, strict=True))))
        members = [study for study in members if finished_seeds(study)]
        if members:
            parts.append(f"\n## {_title(*group)}\n\n{_score_table(members)}\n")
            parts.append(f"\n{_cost_table(members)}\n")
    parts.append("\n## Figures\n")
    parts += [f"\n![{text}](figures/{name})\n\n{text}\n" for name, text in CAPTIONS.items()]
    commands = "\n".join(f"# {study['file']}\n{study['command']}" for study in studies)
    parts.append(f"\n## Commands\n\n{COMMANDS}\n```bash\n{commands}\n```\n")
    return "".join(parts)


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
    compared = splits[-1]  # test, if it has gold labels: it chose nothing
    head, majority = ["method"], [MAJORITY_CLASS]
    for split in splits:
        head += [names[split], f"{names[split]} macro F1", f"{names[split]} ECE"]
        majority += [f"{majority_share(members, split):.3f}", "", ""]
    head += [f"{names[compared]}, minus plain", "seeds"]
    rows = [[*majority, "", ""]]
    comparisons = compare_with_plain(members, compared)
    for study in members:
        cells = [
            mean_std(scores(study, split, key))
            for split in splits
            for key in ("accuracy", "macro_f1", "ece")
        ]
        difference = _difference(comparisons.get(study["method"]))
        rows.append([study["method"], *cells, difference, n_seeds(study)])
    return markdown_table(head, rows)


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
    return markdown_table(head, rows)


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


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _difference(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    difference, low, high, p = comparison
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}] p {p_value(p)}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
