"""Draw results/figures/ from the studies: attention modes, accuracy by method and by data size.

Points are means over seeds, bars one sample standard deviation.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from results.studies import PUBLISHED, Study, compare_with_plain, mean_std, scores, select
from utils import atomic_write, require_package

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODEL = "mini"  # the bundled model; tables show the other ones
# A method of each kind: what the head reads, few trained parameters, prompts, regularization.
METHODS = (
    *("zero_shot", "assignment", "full_last", "masked", "plain", "prompt"),
    *("smart", "lora", "adapter", "norms", "head"),
)

TOKENS = ("<s>", "a", "warm", "film", "pad", "pad")
N_TOKENS, N_REAL = len(TOKENS), 4
GRIDS = {  # method: title, and the rows that the head reads
    "assignment": ("assignment:\nno mask, last column", [5]),
    "full_last": ("full_last:\npadding masked, last real token", [3]),
    "masked": ("masked:\ncausal, last real token", [3]),
    "plain": ("plain:\ncausal, mean of real tokens", [0, 1, 2, 3]),
}


def draw_all(studies: list[Study], folder: Path) -> None:
    """Write the figures into `folder` as PNG files."""
    studies = select(studies, model=MODEL)
    figures = {"attention": attention_grids, "accuracy": accuracy, "train_size": train_size}
    for name, draw in figures.items():
        path = folder / f"{name}-{MODEL}.png"
        save(draw(studies), path)
        print(f"wrote {path}")


def attention_grids(studies: list[Study]) -> "Figure":
    """Plot which positions read which in the four modes, and the accuracy of each mode.

    A row is a position that reads, a column one that is read; the last two of the six are padding.
    Dark cells are read with weight, light ones not at all. The head reads the framed rows.
    """
    studies = select(studies, train_share=1.0)
    sst = {study["method"]: study for study in select(studies, dataset="sst", folds=None)}
    cfimdb = {study["method"]: study for study in select(studies, dataset="cfimdb", folds=5)}
    figure, panels = new_figure(10, 3.4, n_panels=len(GRIDS))
    for panel, (method, (title, rows)) in zip(panels, GRIDS.items(), strict=True):
        allowed = _allowed(method)
        shade = np.where(allowed, 0.65, 0.06)
        panel.imshow(shade, cmap="Blues", vmin=0, vmax=1)
        panel.axvspan(N_REAL - 0.5, N_TOKENS - 0.5, color="gray", alpha=0.35)
        panel.axhspan(N_REAL - 0.5, N_TOKENS - 0.5, color="gray", alpha=0.35)
        for row in rows:
            panel.axhspan(row - 0.5, row + 0.5, fill=False, edgecolor="C1", linewidth=2)
        scores_of = [
            f"{name} {mean_std(scores(group[method], split)) or 'not measured'}"
            for name, group, split in (("SST", sst, "test"), ("CFIMDB", cfimdb, "dev"))
            if method in group
        ]
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("\n".join(scores_of), fontsize=9)
        panel.set_xticks(range(N_TOKENS), TOKENS, rotation=60, fontsize=8)
        panel.set_yticks(range(N_TOKENS), TOKENS if panel is panels[0] else [""] * N_TOKENS)
        panel.tick_params(length=0, labelsize=8)
        panel.grid(False)
    return figure


def _allowed(method: str) -> np.ndarray:
    """Return True where a position (row) reads another (column), (N_TOKENS, N_TOKENS)."""
    allowed = np.ones((N_TOKENS, N_TOKENS), dtype=bool)
    if method in ("masked", "plain"):
        allowed = np.tril(allowed)
    if method == "full_last":
        allowed[:, N_REAL:] = False
    return allowed


def accuracy(studies: list[Study]) -> "Figure":
    """Plot a row per method of METHODS that was run, on SST test and in five folds of CFIMDB."""
    studies = select(studies, train_share=1.0)
    groups = {
        ("SST test", "test"): select(studies, dataset="sst", folds=None),
        ("CFIMDB 5-fold", "dev"): select(studies, dataset="cfimdb", folds=5),
    }
    groups = {name: group for name, group in groups.items() if group}
    measured = {study["method"] for group in groups.values() for study in group}
    methods = [method for method in METHODS if method in measured]
    figure, panels = new_figure(9, 1 + 0.3 * len(methods), n_panels=len(groups))
    for panel, ((title, split), group) in zip(panels, groups.items(), strict=True):
        _accuracy_panel(panel, methods, group, split, title)
        panel.tick_params(labelleft=panel is panels[0])
    legend = (
        "black line: plain; dashed: stories42M, published; red: significantly different from plain"
    )
    figure.supxlabel(f"accuracy ({legend})", fontsize=9)
    return figure


def _accuracy_panel(
    panel: "Axes", methods: list[str], group: list[Study], split: str, title: str
) -> None:
    measured = {study["method"]: scores(study, split) for study in group}
    comparisons = compare_with_plain(group, split)
    for row, method in enumerate(methods):
        values = measured.get(method, [])
        if values:
            differs = method in comparisons and comparisons[method].p < 0.05
            color = "C3" if differs else "C0"
            panel.errorbar(np.mean(values), row, xerr=_std(values), fmt="o", color=color, capsize=2)
        text = mean_std(values) or "not measured"
        panel.text(1.02, row, text, transform=panel.get_yaxis_transform(), va="center", fontsize=8)
        if method == "plain" and values:
            panel.axvline(np.mean(values), color="black", linewidth=0.8, zorder=0)
    if title in PUBLISHED:
        panel.axvline(PUBLISHED[title][0], color="gray", linestyle="--", linewidth=1, zorder=0)
    panel.set_yticks(range(len(methods)), methods)
    panel.set_ylim(len(methods) - 0.5, -0.5)
    panel.set(title=title)


def train_size(studies: list[Study]) -> "Figure":
    """Plot SST test accuracy against the training share, a line per method with several shares."""
    studies = sorted(select(studies, dataset="sst"), key=lambda study: study["train_share"])
    studies = [study for study in studies if scores(study, "test")]
    small = {study["method"] for study in studies if study["train_share"] < 1}
    shares = sorted({100 * study["train_share"] for study in studies})
    figure, (panel,) = new_figure(6, 4)
    first: dict[str, float] = {}  # accuracy with the fewest sentences
    for method in sorted(small):
        line = select(studies, method=method)
        values = [scores(study, "test") for study in line]
        panel.errorbar(
            [100 * study["train_share"] for study in line],
            [np.mean(v) for v in values],
            yerr=[_std(v) for v in values],
            marker="o",
            capsize=2,
        )
        share, mean = 100 * line[0]["train_share"], np.mean(values[0])
        if share == shares[0]:
            first[method] = mean
        panel.annotate(
            method, (share, mean), (-8, 0), textcoords="offset points", ha="right", va="center"
        )
    panel.set_xscale("log")
    panel.set_xticks(shares, [f"{share:g}" for share in shares])
    panel.set_xticks([], minor=True)
    panel.set(xlabel="share of the training sentences (%, log scale)", ylabel="SST test accuracy")
    panel.margins(x=0.18)
    if first:
        best = max(first, key=first.get)
        panel.set_title(
            f"with {shares[0]:g} % of the sentences {best} has the highest mean", fontsize=10
        )
    return figure


def new_figure(
    width: float, height: float, n_panels: int = 1, are_stacked: bool = False
) -> tuple["Figure", list["Axes"]]:
    """Return a figure of panels side by side, or one above the other, without pyplot's global
    state; its size is in inches."""
    require_package("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    shape = (n_panels, 1) if are_stacked else (1, n_panels)
    panels = list(figure.subplots(*shape, squeeze=False).flat)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def save(figure: "Figure", path: Path) -> None:
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110)


def _std(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
