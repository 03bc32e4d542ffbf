"""The figures with lines: over epochs, alphas, the amount of training data, and confidence.

As in figures.py, a function returns None where what it shows was not measured. Bands and bars are
one sample standard deviation over seeds.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from results import style
from results.studies import Study, by_seed, measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curves = tuple[np.ndarray, list[list[float]]]  # places (n,), and a row for each seed

FEW = 10  # sentences, below which the accuracy of a bin says nothing


def training(found: list[Study]) -> "Figure | None":
    """Dev accuracy after each epoch, plain and the best on dev."""
    shown = [one for one in style.splits(found, with_folds=False) if one.split == "dev"]

    def curves(study: Study) -> Curves | None:
        histories = [runs[0]["history"] for runs in by_seed(study).values()]
        if not histories or not all(histories):
            return None
        epochs = np.array([epoch["epoch"] for epoch in min(histories, key=len)])
        return epochs, [[e["dev_accuracy"] for e in history] for history in histories]

    return _bands(shown, curves, "epoch", "dev accuracy", whole_steps=True)


def wise_ft(found: list[Study]) -> "Figure | None":
    """Dev accuracy along the line from the pretrained weights to the finetuned ones."""
    shown = [one for one in style.splits(found, with_folds=False) if one.split == "dev"]

    def curves(study: Study) -> Curves | None:
        points = [runs[0].get("alphas") for runs in by_seed(study).values()]
        if not points or not all(points):
            return None
        alphas = np.array([point["alpha"] for point in points[0]])
        return alphas, [[point["dev_accuracy"] for point in row] for row in points]

    return _bands(shown, curves, "alpha (0: pretrained, 1: finetuned)", "dev accuracy")


def _bands(
    shown: list[style.Shown],
    curves: Callable[[Study], Curves | None],
    x_label: str,
    y_label: str,
    whole_steps: bool = False,
) -> "Figure | None":
    """A panel for each split, in it a mean and a band for each study that has curves."""
    drawn = []
    for one in shown:
        lines = [(study, curves(study)) for study in style.leading(one)]
        lines = [(study, line) for study, line in lines if line is not None][: style.N_LINES]
        drawn += [(one, lines)] if lines else []
    if not drawn:
        return None
    figure, axes = style.panels(len(drawn), 4.6, 3.8)
    for panel, (one, lines) in zip(axes, drawn, strict=True):
        for study, (places, rows) in lines:
            look = style.method_style(study["method"])
            mean, std = style.mean_and_std(rows)
            panel.plot(places, mean, label=study["method"], markersize=4, **look)
            panel.fill_between(
                places, mean - std, mean + std, color=look["color"], alpha=0.15, linewidth=0
            )
        if whole_steps:
            panel.xaxis.get_major_locator().set_params(integer=True)
        style.label(panel, one.title, x_label, y_label)
    style.legend(figure, axes)
    return figure


def train_size(found: list[Study]) -> "Figure | None":
    """Accuracy against the share of the training data, for methods measured at several."""
    drawn = []
    for one in style.last_splits(found, share=None):
        lines = {}
        for study in sorted(one.members, key=lambda study: study["train_share"]):
            lines.setdefault(study["method"], []).append(study)
        lines = {method: members for method, members in lines.items() if len(members) > 1}
        drawn += [(one, lines)] if lines else []
    if not drawn:
        return None
    figure, axes = style.panels(len(drawn), 4.6, 3.8)
    for panel, (one, lines) in zip(axes, drawn, strict=True):
        for method, members in lines.items():
            columns = [one.values(study) for study in members]
            stds = [style.sample_std(column) for column in columns]
            panel.errorbar(
                [100 * study["train_share"] for study in members],
                [np.mean(column) for column in columns], yerr=stds, capsize=2, label=method,
                **style.method_style(method),
            )  # fmt: skip
        ticks = sorted({100 * study["train_share"] for of in lines.values() for study in of})
        panel.set_xscale("log")
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_xticks([], minor=True)
        style.label(panel, one.title, "share of the training data (%, log scale)", "accuracy")
    style.legend(figure, axes)
    return figure


def reliability(found: list[Study]) -> "Figure | None":
    """Accuracy against confidence in ten bins over all seeds; the diagonal is calibrated.

    A bin of a few sentences jumps with each of them and is left out; the error counts all.
    """
    shown = [one for one in style.last_splits(found) if style.leading(one)]
    if not shown:
        return None
    figure, axes = style.panels(len(shown), 4.6, 4.6)
    for panel, one in zip(axes, shown, strict=True):
        panel.plot([0, 1], [0, 1], color="#aaaaaa", linewidth=1, label="calibrated")
        for study in style.leading(one)[: style.N_LINES]:
            look = style.method_style(study["method"])
            confidence, right, count = _bins(study, one.split)
            panel.plot(confidence, right, color=look["color"], linestyle=look["linestyle"])
            ece = np.mean(measured(study, one.split, "ece"))
            panel.scatter(
                confidence, right, s=8 + 150 * count / count.sum(), color=look["color"],
                marker=look["marker"], alpha=0.8, label=f"{study['method']}: {ece:.3f}",
            )  # fmt: skip
        panel.set(xlim=(0, 1.03), ylim=(0, 1.03), xlabel="confidence", ylabel="accuracy")
        panel.set_title(one.title, fontsize=10)
        panel.legend(title="ECE", fontsize=8, loc="upper left", frameon=False, markerscale=0.6)
        panel.grid(alpha=0.3)
    return figure


def _bins(study: Study, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence, accuracy and count of each bin that holds `FEW` sentences of all seeds."""
    tables = [run[split]["reliability"] for runs in by_seed(study).values() for run in runs]
    counts = np.array([table["count"] for table in tables], dtype=np.float64)
    total = counts.sum(axis=0)
    full = total >= FEW
    means = []
    for key in ("confidence", "accuracy"):
        values = np.array([[value or 0.0 for value in table[key]] for table in tables])
        means.append((counts * values).sum(axis=0)[full] / total[full])
    return means[0], means[1], total[full]
