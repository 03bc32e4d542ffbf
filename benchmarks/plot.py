"""results/speed.png and results/growth.png, from results/speed.json alone.

python -m benchmarks.plot [results/speed.json]
"""

import json
import sys
from pathlib import Path
from typing import Any

import cli
from utils import atomic_write

COLORS = {"naive": "#888888", "ours": "#c0392b", "transformers": "#2c6fbb"}


def plot(content: dict[str, Any], stem: Path) -> list[str]:
    """Writes STEM.png and, where growth was timed, growth.png beside it; returns their names."""
    cli.require_packages("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    written = []
    if content["rows"]:
        written.append(str(stem.with_suffix(".png")))
        _plot_speedups(content["rows"], written[-1])
    if content["growth"]:
        written.append(str(stem.with_name("growth.png")))
        _plot_growth(content["growth"], written[-1])
    return written


def _plot_speedups(rows: list[dict[str, Any]], path: str) -> None:
    """How many times faster than naive, a panel for each shape, a pair of bars for each row."""
    from matplotlib import pyplot as plt

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, panels = plt.subplots(
        1, len(shapes), figsize=(2 + 3.6 * len(shapes), 4.6), sharey=True, squeeze=False
    )
    for panel, shape in zip(panels[0], shapes, strict=True):
        here = [row for row in rows if row["shape"] == shape][::-1]
        for place, row in enumerate(here):
            naive = row["contenders"]["naive"]["median"]
            for offset, name in ((0.2, "ours"), (-0.2, "transformers")):
                if name in row["contenders"]:
                    ratio = naive / row["contenders"][name]["median"]
                    panel.barh(place + offset, ratio, height=0.38, color=COLORS[name])
                    panel.annotate(
                        f"{ratio:.1f}", (ratio, place + offset), (3, 0), textcoords="offset points",
                        va="center", fontsize=8,
                    )  # fmt: skip
        panel.axvline(1.0, color=COLORS["naive"], linewidth=1, zorder=0)
        panel.set_yticks(range(len(here)), [row["row"] for row in here])
        panel.set_title(shape, fontsize=10)
        panel.margins(x=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in ("ours", "transformers")]
    figure.legend(handles, ["ours", "transformers"], loc="lower right", frameon=False, ncols=2)
    figure.supxlabel("times as fast as the naive solution", fontsize=10)
    figure.tight_layout()
    _save(figure, path)


def _plot_growth(growth: dict[str, Any], path: str) -> None:
    """Seconds of a training step against the length at a fixed batch, and against the batch."""
    from matplotlib import pyplot as plt

    points = [tuple(point) for point in growth["points"]]
    fixed_batch, fixed_length = points[0][0], points[-1][1]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2))
    for panel, axis, fixed, words in (
        (panels[0], 1, fixed_batch, f"tokens of each of {fixed_batch} sentences"),
        (panels[1], 0, fixed_length, f"sentences of {fixed_length} tokens"),
    ):
        places = [i for i, point in enumerate(points) if point[1 - axis] == fixed]
        for name, seconds in growth["seconds"].items():
            drawn = sorted({points[i][axis]: seconds[i] for i in places}.items())
            panel.plot(*zip(*drawn, strict=True), "o-", color=COLORS[name], label=name)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.set_xlabel(words)
        panel.grid(alpha=0.3, which="both")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds of a training step")
    panels[0].legend(frameon=False)
    figure.suptitle(f"{growth['shape']} shape, full attention (transformers: causal)", fontsize=10)
    figure.tight_layout()
    _save(figure, path)


def _save(figure: Any, path: str) -> None:
    from matplotlib import pyplot as plt

    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    default = Path(__file__).resolve().parent.parent / "results" / "speed.json"
    given = sys.argv[1:] if argv is None else argv
    path = Path(given[0]) if given else default
    print("wrote", *plot(json.loads(path.read_text(encoding="utf-8")), path.with_suffix("")))


if __name__ == "__main__":
    cli.run(main)
