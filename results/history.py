"""Plot a pretraining history: held-out bits per byte, and nats per answer, against tokens read.

    python -m results.history data/mini/history.csv LOSS.png
    python -m results.history DIR/history.csv DIR/loss.png
    python -m results.history DIR/history.old.csv LOSS.png

The command needs matplotlib, which `bash setup.sh --dev` installs.
"""

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from results.figures import new_figure, save
from training.options import require_outputs
from utils import ArgumentParser, InputError, run_script

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNITS = {"bits/byte": "held-out bits per byte", "nats/answer": "held-out nats per answer"}


def read_history(path: str | Path) -> dict[str, list[float]]:
    """Return the columns of a history.csv by their names."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = {name: [float(row[name]) for row in rows] for name in rows[0]}
        columns["tokens"]
    except (IndexError, KeyError, TypeError, ValueError, csv.Error) as error:
        wanted = "give a history.csv of pretraining.run: columns of numbers, among them `tokens`"
        raise InputError(f"{path}: not a history; {wanted}") from error
    return columns


def draw(history: dict[str, list[float]], path: Path) -> None:
    """Write a PNG with a panel per unit and in it a line per held-out text."""
    millions = [n_tokens / 1e6 for n_tokens in history["tokens"]]
    units = [unit for unit in UNITS if any(name.endswith(unit) for name in history)]
    units = units or ["bits/byte"]  # of a history without held-out texts: an empty panel
    figure, panels = new_figure(7.5, 3.8 * len(units), n_panels=len(units), are_stacked=True)
    from matplotlib import colormaps

    dark, light = colormaps["tab20"].colors[::2], colormaps["tab20"].colors[1::2]
    for unit, panel in zip(units, panels, strict=True):
        panel.set_prop_cycle(color=[*dark, *light])
        for name, values in history.items():
            if name.endswith(unit):
                label = f"{name.removesuffix(unit).strip()} {values[-1]:.3f}"
                panel.plot(millions, values, marker="o", markersize=3, label=label)
        panel.set(xlabel="tokens read (millions)", ylabel=UNITS[unit])
        _label_ends(panel)
    save(figure, path)


def _label_ends(panel: "Axes") -> None:
    """Write each line's label right of its end, moved up where ends lie close together."""
    low, high = panel.get_ylim()
    place = low
    for line in sorted(panel.lines, key=lambda line: line.get_ydata()[-1]):
        place = max(line.get_ydata()[-1], place + (high - low) / 18)
        panel.text(1.01, place, line.get_label(), transform=panel.get_yaxis_transform(),
                   va="center", fontsize=9, color=line.get_color())  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__, prog="python -m results.history")
    parser.add_argument("history", metavar="CSV", help="history.csv of a pretraining run")
    parser.add_argument("png", type=Path, metavar="PNG", help="picture to write")
    args = parser.parse_args(argv)
    require_outputs([str(args.png)], [args.history])
    draw(read_history(args.history), args.png)


if __name__ == "__main__":
    run_script(main)
