"""The figures of finetuning, from the studies in results/ alone.

Each function takes the studies of one model and returns a matplotlib Figure, or None where what it
shows was not measured. Bars are one sample standard deviation over seeds.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from results import curves, studies, style
from results.studies import Study, by_seed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NARROW = 0.005  # methods may be as near as that and still fill an axis
LABELS = {"sst": ("awful", "bad", "average", "good", "excellent"), "cfimdb": ("bad", "good")}


def accuracy(found: list[Study]) -> "Figure | None":
    """A dot with a bar for each method, plain and its like above, then the best on dev first.

    A split on which one method alone was measured has nothing to compare, and stays in the tables.
    """
    shown = [one for one in style.splits(found) if len(one.members) > 1]
    if not shown:
        return None
    n_rows = max(len(one.members) for one in shown)
    figure, axes = style.panels(len(shown), 3.4, 1.2 + 0.24 * n_rows)
    for panel, one in zip(axes, shown, strict=True):
        for place, study in enumerate(one.members):
            _dot(panel, study["method"], one.values(study), place)
        names = [study["method"] for study in one.members]
        panel.set_yticks(range(len(names)), names, fontsize=9)
        panel.set_ylim(n_rows - 0.5, -0.5)
        _mark_references(panel, one, names)
        panel.set_title(one.title, fontsize=10)
        panel.grid(axis="x", alpha=0.3)
    style.legend(figure, axes)
    return figure


def _dot(panel: "Axes", method: str, values: list[float], place: int) -> None:
    look = style.method_style(method)
    std = style.sample_std(values)
    panel.errorbar(
        np.mean(values), place, xerr=std, color=look["color"], marker=look["marker"],
        markersize=5, capsize=2,
    )  # fmt: skip


def _mark_references(panel: "Axes", one: style.Shown, names: list[str]) -> None:
    """Lines at plain and at the published, on an axis as wide as most finetuned methods need.

    What lies outside is written: a method in its row, the published below the axis.
    """
    means = {study["method"]: float(np.mean(one.values(study))) for study in one.members}
    bars = {study["method"]: style.sample_std(one.values(study)) for study in one.members}
    trained = [name for name in means if name != "zero_shot"] or list(means)
    low, high = _limits([(means[name], bars[name]) for name in trained])
    panel.set_xlim(low, high)
    panel.set_xlabel("accuracy", fontsize=9)
    if "plain" in means:
        panel.axvline(means["plain"], color="#000000", linewidth=0.8, zorder=0, label="plain")
    for study in one.members:
        mean, number = means[study["method"]], studies.mean_std(one.values(study))
        if low <= mean <= high:
            continue
        words, x, align = f"\u2190 {number}", 0.02, "left"
        if mean > high:
            words, x, align = f"{number} \u2192", 0.98, "right"
        panel.text(
            x, names.index(study["method"]), words, transform=panel.get_yaxis_transform(),
            ha=align, va="center", fontsize=8, color="#555555",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    known = studies.published(one.members[0]["dataset"], one.members[0]["folds"], one.split)
    if known is not None and low <= known[0] <= high:
        panel.axvline(known[0], color="#777777", linestyle="--", label="published, stories42M")
    elif known is not None:
        panel.set_xlabel(f"accuracy\n(published {known[0]:.3f}, off the axis)", fontsize=9)


def _limits(dots: list[tuple[float, float]]) -> tuple[float, float]:
    """Of an axis that has the dots (mean, bar) which do not lie far out, with their bars.

    Far out is what is more than three times the interquartile range from the quartiles (Tukey 1977,
    Exploratory Data Analysis). A dot that the axis holds nonetheless has its bar on it, too.
    """
    first, third = np.quantile([mean for mean, _ in dots], [0.25, 0.75])
    reach = 3 * max(third - first, NARROW)
    low, high, n_held = first - reach, third + reach, 0
    while n_held < len(held := [(m, bar) for m, bar in dots if low <= m <= high]):
        n_held = len(held)
        left, right = min(m - bar for m, bar in held), max(m + bar for m, bar in held)
        pad = 0.08 * max(right - left, NARROW)
        low, high = float(left - pad), float(right + pad)
    return low, high


def confusion(found: list[Study]) -> "Figure | None":
    """plain and the best method on dev: shares of each gold class, counts summed over seeds."""
    pairs = []
    for one in style.last_splits(found):
        compared = style.leading(one)[:2]
        if one.named("plain") and len(compared) == 2:
            pairs += [(one, study) for study in compared]
    if not pairs:
        return None
    figure, axes = style.panels(len(pairs), 4.2, 3.9, n_rows=len(pairs) // 2)
    for panel, (one, study) in zip(axes, pairs, strict=True):
        runs = [run for runs in by_seed(study).values() for run in runs]
        counts = np.sum([run[one.split]["confusion"] for run in runs], axis=0)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), share in np.ndenumerate(shares):
            panel.text(
                column, row, f"{share:.0%}\n{counts[row, column]}", ha="center", va="center",
                fontsize=8, color="white" if share > 0.5 else "black",
            )  # fmt: skip
        names = LABELS.get(study["dataset"], ())
        names = names if len(names) == len(counts) else range(len(counts))
        panel.set_xticks(range(len(counts)), names, fontsize=8)
        panel.set_yticks(range(len(counts)), names, fontsize=8)
        panel.set_xlabel("predicted", fontsize=9)
        panel.set_ylabel("gold", fontsize=9)
        panel.set_title(f"{one.title}, {study['method']}", fontsize=10)
    return figure


def parameters(found: list[Study]) -> "Figure | None":
    """Accuracy against the number of trained parameters; those that train all share gray dots."""
    shown = [
        style.Shown([s for s in one.members if _n_trained(s) > 0], one.split)
        for one in style.last_splits(found)
    ]
    shown = [one for one in shown if len({_n_trained(study) for study in one.members}) > 1]
    if not shown:
        return None
    figure, axes = style.panels(len(shown), 4.8, 4.2)
    for panel, one in zip(axes, shown, strict=True):
        for study in one.members:
            values = one.values(study)
            look, label = style.method_style(study["method"]), study["method"]
            if _trains_all(study) and study["method"] != "plain":
                look, label = {"color": "#aaaaaa", "marker": "o"}, "others that train all weights"
            std = style.sample_std(values)
            panel.errorbar(
                _n_trained(study), np.mean(values), yerr=std, color=look["color"], capsize=2,
                marker=look["marker"], linestyle="none", label=label,
                zorder=3 if study["method"] == "plain" else 2,
            )  # fmt: skip
        panel.set_xscale("log")
        n_trained = [_n_trained(study) for study in one.members]
        ticks = style.round_numbers(min(n_trained), max(n_trained))
        if 2 <= len(ticks) <= 5:  # of fewer decades, in which powers of ten alone say too little
            panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            panel.set_xticks([], minor=True)
        style.label(panel, one.title, "trained parameters (log scale)", "accuracy")
    style.legend(figure, axes)
    return figure


def _n_trained(study: Study) -> int:
    return study["runs"][0]["trainable_parameters"]


def _trains_all(study: Study) -> bool:
    return _n_trained(study) >= 0.95 * study["runs"][0]["parameters"]


class Drawing(NamedTuple):
    draw: "Callable[[list[Study]], Figure | None]"
    caption: str
    needs: str


FIGURES = {
    "accuracy": Drawing(
        accuracy,
        "Accuracy of each method, mean and standard deviation over seeds; one far from the others "
        "is written as a number.",
        "two methods on a split",
    ),
    "confusion": Drawing(
        confusion,
        "Confusion of the baseline and of the best method on dev: share of each gold class, and "
        "sentences summed over seeds.",
        "plain and another method",
    ),
    "training": Drawing(
        curves.training,
        "Dev accuracy after each epoch, mean and standard deviation over seeds.",
        "plain or another finetuning with a history",
    ),
    "parameters": Drawing(
        parameters,
        "Accuracy against the number of parameters that a method trains.",
        "two methods that train different numbers of parameters",
    ),
    "train_size": Drawing(
        curves.train_size,
        "Accuracy against the share of the training data.",
        "a method with two train_share",
    ),
    "wise_ft": Drawing(
        curves.wise_ft,
        "Dev accuracy along the line from the pretrained weights to the finetuned ones (WiSE-FT).",
        "a run with alphas",
    ),
    "reliability": Drawing(
        curves.reliability,
        "Accuracy against confidence: marker sizes are shares of sentences, numbers the expected "
        "calibration error. Bins of fewer than ten sentences are not drawn.",
        "plain or another finetuning",
    ),
}


def captions(found: list[Study]) -> dict[str, str]:
    """The file name of each figure of each model, and the sentence under it."""
    models = sorted({study["model"] for study in found})
    return {
        f"{name}-{model}.png": drawing.caption
        for model in models
        for name, drawing in FIGURES.items()
    }


def draw_all(found: list[Study], folder: Path) -> Iterator[str]:
    """Writes every figure that has data into `folder`, deletes an earlier one that has none any
    more, and yields a line for each."""
    for model in sorted({study["model"] for study in found}):
        finished = [study for study in studies.select(found, model=model) if by_seed(study)]
        for name, drawing in FIGURES.items():
            path = folder / f"{name}-{model}.png"
            figure = drawing.draw(finished)
            if figure is None:
                path.unlink(missing_ok=True)
                yield f"{path.name}: skipped, needs {drawing.needs}"
            else:
                style.save(figure, path)
                yield f"wrote {path}"
