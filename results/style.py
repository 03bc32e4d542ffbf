"""What the figures of finetuning share: which studies they show, one color and marker for each
method, panels, and saving."""

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import cli
from results import studies
from results.studies import Study, measured, select
from utils import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which people with any color vision tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS, _LINES = "os^DvPX", ("-", "--", ":", "-.")
_METHODS = (
    *("lora", "prompt", "pretrain", "smart", "wise_ft", "mixout"),
    *("adapter", "norms", "head", "l2sp", "soup", "last_epochs"),
    *("attention_pool", "last_mean", "layer_mix", "r_drop", "label_smoothing", "pretrain+lora"),
    *("wise_ft+soup", "prompt+soup", "lora+soup", "pretrain+soup", "prompt+wise_ft"),
    *("prompt+wise_ft+soup", "layer_decay"),
)
_FIXED = {
    "plain": {"color": "#000000", "marker": "o", "linestyle": "-"},
    "plain_fp32": {"color": "#333333", "marker": "v", "linestyle": "--"},
    "plain_gpu": {"color": "#666666", "marker": "X", "linestyle": ":"},
    "zero_shot": {"color": "#999999", "marker": "s", "linestyle": ":"},
    "assignment": {"color": "#777777", "marker": "^", "linestyle": "--"},
    "full_last": {"color": "#888888", "marker": "P", "linestyle": "-."},
    "masked": {"color": "#555555", "marker": "D", "linestyle": "-."},
}
N_LINES = 5  # methods in a figure whose lines would otherwise cover each other
DATASETS = {"sst": "SST", "cfimdb": "CFIMDB"}


class Shown(NamedTuple):
    """A split of a data set and the studies with a number there, `plain` and its like first."""

    members: list[Study]
    split: str

    @property
    def title(self) -> str:
        return split_name(self.members[0], self.split)

    def values(self, study: Study) -> list[float]:
        return measured(study, self.split)

    def named(self, method: str) -> list[Study]:
        return select(self.members, method=method)


def splits(found: list[Study], with_folds: bool = True, share: float | None = 1.0) -> list[Shown]:
    """What has numbers: SST dev and test, CFIMDB dev and 5-fold, other data sets behind."""
    groups = sorted(
        {(study["dataset"], study["folds"]) for study in found},
        key=lambda group: (group[0] != "sst", group[0], group[1] or 0),
    )
    shown = []
    for dataset, folds in groups:
        if folds and not with_folds:
            continue
        of_group = select(found, dataset=dataset, folds=folds)
        of_group = of_group if share is None else select(of_group, train_share=share)
        for split in ("dev", "test"):
            members = [s for s in studies.ranked(of_group, "dev") if measured(s, split)]
            if members:
                shown.append(Shown(members, split))
    return shown


def last_splits(found: list[Study], share: float | None = 1.0) -> list[Shown]:
    """Of each data set without folds the test split, or dev where test has no gold labels."""
    return list({s.members[0]["dataset"]: s for s in splits(found, False, share)}.values())


def leading(shown: Shown) -> list[Study]:
    """`plain`, then the other finetunings, the best on dev first, whatever the split shown."""
    others = [study for study in shown.members if study["method"] not in studies.FIRST]
    return [*shown.named("plain"), *others]


def round_numbers(low: int, high: int) -> list[int]:
    """1, 2 and 5 times powers of ten from `low` to `high`."""
    powers = range(len(str(high)))
    every = [digit * 10**power for power in powers for digit in (1, 2, 5)]
    return [number for number in every if low <= number <= high]


def method_style(method: str) -> dict[str, str]:
    """Color, marker and line of a method, the same in all figures; unknown names may share one."""
    if method in _FIXED:
        return _FIXED[method]
    known = method in _METHODS
    place = _METHODS.index(method) if known else zlib.crc32(method.encode())
    row = place // len(_COLORS)
    return {
        "color": _COLORS[place % len(_COLORS)],
        "marker": _MARKERS[row % len(_MARKERS)],
        "linestyle": _LINES[row % len(_LINES)],
    }


def dataset_name(dataset: str) -> str:
    return DATASETS.get(dataset, dataset)


def split_name(study: Study, split: str) -> str:
    """SST test, or CFIMDB 5-fold."""
    folds = study["folds"]
    return f"{dataset_name(study['dataset'])} {f'{folds}-fold' if folds else split}"


def panels(
    n_panels: int, width: float, height: float, n_rows: int = 1
) -> tuple["Figure", list["Axes"]]:
    """A figure of panels side by side, sizes in inches; apart from pyplot and its global state."""
    cli.require_packages("matplotlib")
    from matplotlib.figure import Figure

    n_columns = n_panels // n_rows
    figure = Figure(figsize=(width * n_columns, height * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def sample_std(values: list[float]) -> float:
    """Of a single value 0."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def label(panel: "Axes", title: str, x_label: str, y_label: str) -> None:
    panel.set_xlabel(x_label)
    panel.set_ylabel(y_label)
    panel.set_title(title, fontsize=10)
    panel.grid(alpha=0.3)


def legend(figure: "Figure", axes: list["Axes"]) -> None:
    """One legend under all panels, each label once."""
    handles: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", frameon=False,
            ncols=min(3 * len(axes), len(handles)), fontsize=9,
        )  # fmt: skip


def mean_and_std(rows: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Over the first axis, (n_seeds, n) to two of (n,); the sample deviation, of one row 0.

    Rows of unequal length are cut to the shortest, so that every mean is over the same seeds.
    """
    shortest = min(map(len, rows))
    values = np.array([row[:shortest] for row in rows], dtype=np.float64)
    std = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(shortest)
    return values.mean(axis=0), std


def save(figure: "Figure", path: Path) -> None:
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110)
