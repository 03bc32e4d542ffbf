"""Draw results/figures/ from the studies: accuracy by method, and by training-set size.

Points are means over seeds, bars one sample standard deviation.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from results.studies import PUBLISHED, Study, mean_std, scores, select
from utils import atomic_write, require_package

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODEL = "mini"  # the bundled model; tables show the other ones
# A method of each kind: what the head reads, few trained parameters, prompts, regularization.
METHODS = (
    *("zero_shot", "assignment", "masked", "plain", "attention_pool", "lora"),
    *("adapter", "norms", "head", "prompt", "smart"),
)


def draw_all(studies: list[Study], folder: Path) -> None:
    """Write both figures into `folder` as PNG files."""
    studies = select(studies, model=MODEL)
    for name, draw in (("accuracy", accuracy), ("train_size", train_size)):
        path = folder / f"{name}-{MODEL}.png"
        save(draw(studies), path)
        print(f"wrote {path}")


def accuracy(studies: list[Study]) -> "Figure":
    """Plot a row per method, on SST test and in five folds of CFIMDB."""
    studies = select(studies, train_share=1.0)
    figure, panels = new_figure(9, 4.2, n_panels=2)
    _accuracy_panel(panels[0], select(studies, dataset="sst", folds=None), "test", "SST test")
    folds = select(studies, dataset="cfimdb", folds=5)
    _accuracy_panel(panels[1], folds, "dev", "CFIMDB 5-fold")
    panels[1].tick_params(labelleft=False)
    return figure


def _accuracy_panel(panel: "Axes", group: list[Study], split: str, title: str) -> None:
    measured = {study["method"]: scores(study, split) for study in group}
    for row, method in enumerate(METHODS):
        values = measured.get(method, [])
        if values:
            panel.errorbar(np.mean(values), row, xerr=_std(values), fmt="o", color="C0", capsize=2)
        text = mean_std(values) or "not measured"
        panel.text(1.02, row, text, transform=panel.get_yaxis_transform(), va="center", fontsize=8)
        if method == "plain" and values:
            panel.axvline(np.mean(values), color="black", linewidth=0.8, zorder=0)
    if title in PUBLISHED:
        panel.axvline(PUBLISHED[title][0], color="gray", linestyle="--", linewidth=1, zorder=0)
    panel.set_yticks(range(len(METHODS)), METHODS)
    panel.set_ylim(len(METHODS) - 0.5, -0.5)
    panel.set(title=title, xlabel="accuracy")


def train_size(studies: list[Study]) -> "Figure":
    """Plot SST test accuracy against the training share, a line per method with several shares."""
    studies = sorted(select(studies, dataset="sst"), key=lambda study: study["train_share"])
    small = {study["method"] for study in studies if study["train_share"] < 1}
    figure, (panel,) = new_figure(5, 4)
    for method in sorted(small):
        line = [s for s in select(studies, method=method) if scores(s, "test")]
        values = [scores(study, "test") for study in line]
        panel.errorbar(
            [100 * study["train_share"] for study in line],
            [np.mean(v) for v in values],
            yerr=[_std(v) for v in values],
            marker="o",
            capsize=2,
            label=method,
        )
    shares = sorted({100 * study["train_share"] for study in studies})
    panel.set_xscale("log")
    panel.set_xticks(shares, [f"{share:g}" for share in shares])
    panel.set_xticks([], minor=True)
    panel.set(xlabel="share of the training sentences (%, log scale)", ylabel="SST test accuracy")
    panel.legend(frameon=False)
    return figure


def new_figure(width: float, height: float, n_panels: int = 1) -> tuple["Figure", list["Axes"]]:
    """Return a figure of panels side by side, size in inches, without pyplot's global state."""
    require_package("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(1, n_panels, squeeze=False).flat)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def save(figure: "Figure", path: Path) -> None:
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110)


def _std(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
