"""Write the tables of finetuning results and of speed into the documents.

    python -m results.report
    python -m results.report --plot
    python -m results.report > TABLES.md

Each table stands between two comment lines that name it. --plot also draws results/figures/ and
needs matplotlib.
"""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.report import markdown, speed_table
from results import figures, page
from results.page import MAJORITY_CLASS, p_value
from results.significance import Comparison
from results.studies import (
    BASELINES,
    PUBLISHED,
    Study,
    compare_with_plain,
    load,
    majority_share,
    mean_std,
    n_seeds,
    ranked,
    scores,
    select,
    signed,
    trained_percent,
)
from utils import ArgumentParser, atomic_write, run_script

FOLDER = Path(__file__).resolve().parent
PAGES = ("README.md", "README.zh-TW.md", "docs/results.md", "docs/performance.md")


# Name, data set, folds, split, and whether the column gets a test: not dev, which chose the epoch.
COLUMNS = (
    ("SST dev", "sst", None, "dev", False),
    ("SST test", "sst", None, "test", True),
    ("CFIMDB dev", "cfimdb", None, "dev", False),
    ("CFIMDB 5-fold", "cfimdb", 5, "dev", True),
)


GLANCE = {  # the rows of the short table, in the languages of the READMEs
    "zero_shot": ("no training, words chosen by training labels", "不訓練，依訓練標籤挑選提示用詞"),
    "assignment": ("finetuned in the assignment's mode", "照作業的做法微調"),
    "full_last": (
        "the same, padding masked, last real token",
        "同上，但遮住填充，讀最後一個真實詞元",
    ),
    "masked": ("causal, last real token", "因果注意力，讀最後一個真實詞元"),
    "plain": ("causal, mean of the real tokens", "因果注意力，讀真實詞元的平均"),
    "lora": ("LoRA", "LoRA"),
    "smart": ("SMART", "SMART"),
    "norms": ("only the gains of the norms and the head", "只訓練正規化的增益與分類頭"),
    "head": ("only the head", "只訓練分類頭"),
}
NAMED = ("{} (`{}`)", "{}（`{}`）")  # a row and its method
GLANCE_ENDS = (
    ("always the largest class", "一律猜樣本最多的類別"),
    (
        "the other methods measured, lowest and highest mean",
        "其他測過的方法，平均準確率的最低與最高值",
    ),
    (
        "for comparison: stories42M in the assignment's mode, published",
        "對照：stories42M 照作業的做法微調（作業公布的數字）",
    ),
)


class Column(NamedTuple):
    """A column of accuracies: its studies by method, and their comparisons with `plain`."""

    name: str
    split: str
    studies: dict[str, Study]
    comparisons: dict[str, Comparison] | None  # None for a column without a test

    def published(self) -> str:
        known = PUBLISHED.get(self.name)
        return "{:.3f} ({:.3f})".format(*known) if known else ""

    def majority(self) -> str:
        return f"{majority_share(list(self.studies.values()), self.split):.3f}"

    def accuracy(self, method: str) -> str:
        study = self.studies.get(method)
        return mean_std(scores(study, self.split)) if study else ""

    def marked(self, method: str) -> str:
        """Return the accuracy with an arrow if it differs significantly from that of `plain`."""
        comparison, arrow = self.comparisons.get(method), ""
        if comparison is not None and comparison.p < 0.05:
            arrow = " ↑" if comparison.difference > 0 else " ↓"
        return self.accuracy(method) + arrow

    def range_without(self, methods: Collection[str]) -> str:
        """Return the lowest and the highest mean of the other methods."""
        means = [
            np.mean(scores(study, self.split))
            for method, study in self.studies.items()
            if method not in methods
        ]
        return f"{min(means):.3f}–{max(means):.3f}" if means else ""

    def difference(self, method: str) -> str:
        comparison = self.comparisons.get(method)
        return f"{signed(comparison.difference)} ({p_value(comparison.p)})" if comparison else ""


def _columns(studies: list[Study]) -> list[Column]:
    """Return the columns with at least one method; its methods in the order of `ranked`."""
    columns = []
    for name, dataset, folds, split, is_compared in COLUMNS:
        group = [s for s in select(studies, dataset=dataset, folds=folds) if scores(s, split)]
        comparisons = compare_with_plain(group, split) if is_compared else None
        by_method = {study["method"]: study for study in ranked(group)}
        columns.append(Column(name, split, by_method, comparisons))
    return [column for column in columns if column.studies]


def table(studies: list[Study], model: str) -> str:
    """Return a row per method of `model` on all training data."""
    columns = _columns(select(studies, model=model, train_share=1.0))
    compared = [column for column in columns if column.comparisons is not None]
    head = [f"{model}, mean (std) over seeds", "trained %", *(column.name for column in columns)]
    head += [*(f"{column.name}, minus plain (p)" for column in compared), "seeds"]
    published, majority = [c.published() for c in columns], [c.majority() for c in columns]
    empty = [""] * len(compared)
    rows = [
        ["reference, stories42M, published", "100", *published, *empty, "10"],
        [MAJORITY_CLASS, "0", *majority, *empty, ""],
    ]
    for method in _methods(columns):
        accuracies = [column.accuracy(method) for column in columns]
        differences = [column.difference(method) for column in compared]
        found = {c.name: c.studies[method] for c in columns if method in c.studies}
        share = trained_percent(next(iter(found.values())))
        rows.append([method, share, *accuracies, *differences, _seeds_cell(found)])
    return markdown(head, rows)


def glance(studies: list[Study], language: int) -> str:
    """Return the short table of a README, for the bundled model on all training data.

    `language` is 0 for English, 1 for Chinese. An arrow marks a significant difference from
    `plain`: p < 0.05, corrected by Holm's method.
    """
    columns = _columns(select(studies, model=figures.MODEL, train_share=1.0))
    columns = [column for column in columns if column.comparisons is not None]
    largest, others, reference = (words[language] for words in GLANCE_ENDS)
    rows = [[largest, *(column.majority() for column in columns)]]
    for method, words in GLANCE.items():
        if any(method in column.studies for column in columns):
            name = NAMED[language].format(words[language], method)
            rows.append([name, *(column.marked(method) for column in columns)])
    rows.append([others, *(column.range_without(GLANCE) for column in columns)])
    rows.append([reference, *(column.published() for column in columns)])
    return markdown(["", *(column.name for column in columns)], rows)


def tables(studies: list[Study]) -> str:
    """Return a table per model, in the order of their names."""
    return "\n\n".join(table(studies, model) for model in sorted({s["model"] for s in studies}))


def _methods(columns: list[Column]) -> list[str]:
    """Return the methods in row order: baselines, then by SST dev, then those without SST dev."""
    found = [method for column in columns for method in column.studies]
    return [method for method in dict.fromkeys([*BASELINES, *found]) if method in found]


def _seeds_cell(found: dict[str, Study]) -> str:
    """Return "5", or "5 (CFIMDB 5-fold 2)" if a later column has another number of seeds."""
    counts = {name: n_seeds(study) for name, study in found.items()}
    first = next(iter(counts.values()))
    others = ", ".join(f"{name} {n}" for name, n in counts.items() if n != first)
    return f"{first} ({others})" if others else first


def all_tables(studies: list[Study]) -> dict[str, str]:
    """Return what stands between the marks in the documents, by the name in the marks."""
    return {
        "results.glance": glance(studies, 0),
        "results.glance.zh": glance(studies, 1),
        "results.report": tables(studies),
        "speed": speed_table(),
        "results.page": page.page(studies),
    }


def with_tables(text: str, new: dict[str, str]) -> str:
    """Replace what stands between the marks of each table; without marks `text` is unchanged."""
    for name, table in new.items():
        begin, end = f"<!-- {name} begins -->", f"<!-- {name} ends -->"
        if begin in text and end in text:
            before, after = text.split(begin, 1)[0], text.split(end, 1)[1]
            text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__, prog="python -m results.report")
    parser.add_argument("--plot", action="store_true",
        help="also draw the figures in results/figures/ (default: off)")  # fmt: skip
    args = parser.parse_args(argv)
    studies = load(FOLDER / "records")
    if args.plot:
        figures.draw_all(studies, FOLDER / "figures")
    new = all_tables(studies)
    print(new["results.report"], new["speed"], sep="\n\n")
    for path in (FOLDER.parent / name for name in PAGES):
        text = path.read_text(encoding="utf-8")
        with atomic_write(path) as file:
            file.write(with_tables(text, new))


if __name__ == "__main__":
    run_script(main)
