"""results/README.md: every number of every study, its test against plain, its cost, its command."""

import statistics
from pathlib import Path
from typing import Any

from results import figures, significance, studies, style
from results.significance import Comparison
from results.studies import Study, by_seed, mean_std, measured, right, select

INTRODUCTION = """\
# Results

Written by `python -m results.report` from the JSON files beside it; edits are lost. Mean (sample
standard deviation) over seeds; `plain` is the baseline. A number is of the weights that the method
ends in: usually the best epoch's on dev, in cross-validation the last epoch's. Macro F1 and ECE
(expected calibration error, ten bins) of folds are the folds' mean. A cell is empty where nothing
was measured. Seconds and memory are of runs on different processors, in float32 or, where the
command has it, bfloat16, and of GPU runs (`cuda`) of which up to fifteen shared one, in TF32, the
memory that of the device: they say how much a run takes, not which of two methods takes less.

"""
HOW_P = (
    "p compares a method with `plain` on the test split, which had no part in any choice; where "
    "that has no gold labels (CFIMDB), on dev, which chose epochs, learning rates and what is "
    "averaged. It is of a paired bootstrap, two-sided, of 10,000 resamples of sentences and of "
    "seeds, or of McNemar's exact test where each side has one run, corrected by Holm over the "
    "column's methods; in brackets the bootstrap's 95 % interval, uncorrected. Seeds of both sides "
    "are drawn apart, although some share their data or even their weights (`wise_ft`, soups), "
    "which makes p larger. A soup is one run, whose spread over other sets of seeds is not known, "
    "so its p is too small; so is that of a method with one seed, and over two or three it is "
    "rough. In cross-validation one partition serves all seeds, the sentences of a fold share a "
    "model, and the learning rate is what dev had chosen, whose sentences are among those of the "
    "folds. A bootstrap's p over m methods is m / 10,001 at least.\n"
)
HOW_AGAIN = (
    "The records of these runs lie beside this file, so as they stand the commands print what is "
    "stored and train nothing; `--results_dir runs/again --runs_dir runs/again` runs them anew, "
    "which `--dev_out` and `--test_out` need, too.\n"
)
LARGEST = "always the split's largest class"  # the name of that row


def compare(study: Study, plain: Study, split: str) -> Comparison:
    """`study` minus `plain` on the sentences of one split, p not yet corrected."""
    a, b = right(study, split), right(plain, split)
    compared = significance.paired_bootstrap(a, b)
    if len(a) == len(b) == 1:
        return compared._replace(p=significance.mcnemar(a[0], b[0]))
    return compared


def compare_with_plain(group: list[Study], split: str) -> dict[str, Comparison]:
    """By method, with Holm's p over them. `group` is of one model, data set, share and folds;
    empty where plain was not measured on the split."""
    with_gold = {study["method"]: study for study in group if measured(study, split)}
    plain = with_gold.pop("plain", None)
    if plain is None:
        return {}
    found = {method: compare(study, plain, split) for method, study in with_gold.items()}
    corrected = significance.holm([compared.p for compared in found.values()])
    return {
        method: compared._replace(p=p)
        for (method, compared), p in zip(found.items(), corrected, strict=True)
    }


def majority_share(group: list[Study], split: str) -> float | None:
    """The share of the split's largest class, from any study of one data set with gold labels."""
    for study in group:
        counts = studies.gold_counts(study, split)
        if counts is not None:
            return float(counts.max() / counts.sum())
    return None


def seeds_of(study: Study) -> str:
    """How many a study has finished; of a soup how many of them it kept, such as 2 of 5."""
    for run in study["runs"]:
        if "ingredients" in run:
            return f"{len(run['ingredients'])} of {len(run['seeds'])}"
    return str(len(by_seed(study)))


def trained_percent(of_method: list[Study]) -> str:
    """Three digits of the share, of SST where it was run: data sets differ by their heads alone."""
    sst_first = sorted(of_method, key=lambda study: study["dataset"] != "sst")
    for run in (run for study in sst_first for run in study["runs"]):
        return f"{100 * run['trainable_parameters'] / run['parameters']:.3g}"
    return ""


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def page(found: list[Study], folder: Path) -> str:
    """The text of results/README.md; `folder` is where its figures lie."""
    parts = [INTRODUCTION, HOW_P]
    keys = ("model", "dataset", "folds", "train_share")
    groups = sorted({tuple(study[key] for key in keys) for study in found}, key=_group_order)
    for group in groups:
        members = studies.ranked(select(found, **dict(zip(keys, group, strict=True))))
        members = [study for study in members if by_seed(study)]
        if members:
            parts.append(f"\n## {_title(*group)}\n\n{_accuracy_table(members)}\n")
            parts.append(f"\n{_cost_table(members)}\n")
    drawn = [
        (name, caption)
        for name, caption in figures.captions(found).items()
        if (folder / name).exists()
    ]
    if drawn:
        parts.append("\n## Figures\n")
        parts += [f"\n![{caption}]({name})\n\n{caption}\n" for name, caption in drawn]
    if found:
        commands = "\n".join(f"# {study['file']}\n{study['command']}" for study in found)
        parts.append(f"\n## Commands\n\n{HOW_AGAIN}\n```bash\n{commands}\n```\n")
    return "".join(parts)


def _group_order(group: tuple) -> tuple:
    model, dataset, folds, share = group
    return (model, dataset != "sst", dataset, folds or 0, -share)


def _title(model: str, dataset: str, folds: int | None, share: float) -> str:
    title = f"{model}, {style.dataset_name(dataset)}"
    title += f", {folds}-fold cross-validation" if folds else ""
    return title + (f", {100 * share:.3g}% of the training data" if share != 1 else "")


def _accuracy_table(members: list[Study]) -> str:
    splits = [s for s in ("dev", "test") if any(measured(study, s) for study in members)]
    judge = splits[-1]  # which, where there is a choice, has not chosen anything
    names = {s: "held out" if members[0]["folds"] else s for s in splits}
    head = ["method"]
    for s in splits:
        head += [names[s], f"{names[s]} macro F1", f"{names[s]} ECE"]
    head += [f"{names[judge]}, minus plain", "seeds"]
    lines = [line(head), "|---" * len(head) + "|"]
    majority = [majority_share(members, s) for s in splits]
    cells = [cell for share in majority for cell in (_number(share), "", "")]
    lines.append(line([LARGEST, *cells, "", ""]))
    differences = compare_with_plain(members, judge)
    for study in members:
        cells = [
            mean_std(measured(study, s, key))
            for s in splits
            for key in ("accuracy", "macro_f1", "ece")
        ]
        cells.append(_difference(differences.get(study["method"])))
        lines.append(line([study["method"], *cells, seeds_of(study)]))
    return "\n".join(lines)


def _cost_table(members: list[Study]) -> str:
    head = ["method", "trained parameters", "trained %", "chosen", "search trials"]
    head += ["device", "seconds a run", "peak memory (MB)"]
    lines = [line(head), "|---" * len(head) + "|"]
    for study in members:
        runs = [run for runs in by_seed(study).values() for run in runs]
        chosen = ", ".join(
            f"{key} {_short(value)}" for key, value in (study["chosen"] or {}).items()
        )
        memory = [run["peak_memory_mb"] for run in runs if run["peak_memory_mb"] is not None]
        cells = [study["method"], f"{runs[0]['trainable_parameters']:,}", trained_percent([study])]
        cells += [chosen, str(len(study["search"] or [])), study["settings"]["device"]]
        seconds = [run["seconds"] for run in runs if run["seconds"] is not None]
        took = [f"{statistics.mean(seconds):.0f}"] if seconds else []
        before = max(run.get("pretrain_seconds") or 0.0 for run in runs)
        is_shared = study["train_share"] == 1 and not study["folds"]  # else each has its own split
        often = "once" if is_shared else "each"
        cells.append(" + ".join([*took, *([f"{before:.0f} {often}"] if before else [])]))
        lines.append(line([*cells, f"{max(memory):.0f}" if memory else ""]))
    return "\n".join(lines)


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _difference(compared: Comparison | None) -> str:
    if compared is None:
        return ""
    low, high = compared.low, compared.high
    return f"{compared.difference:+.3f} [{low:+.3f}, {high:+.3f}] p {p_value(compared.p)}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
