"""Plot a pretraining history: held-out bits per byte, and nats per answer, against tokens read.

    python -m results.history data/mini/history.csv data/mini/loss.png

Needs matplotlib, which `bash setup.sh --dev` installs.
"""

import csv
from pathlib import Path

from results.figures import new_figure, save
from utils import ArgumentParser, InputError, run_script

UNITS = {"bits/byte": "held-out bits per byte", "nats/answer": "held-out nats per answer"}


def read_history(path: str | Path) -> dict[str, list[float]]:
    """Return the columns of a history.csv by their names."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        columns = {name: [float(row[name]) for row in rows] for name in rows[0]}
        columns["tokens"]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        wanted = "give a history.csv of pretraining.run: columns of numbers, among them `tokens`"
        raise InputError(f"{path}: not a history; {wanted}") from error
    return columns


def draw(history: dict[str, list[float]], path: Path) -> None:
    """Write a PNG with a panel per unit and in it a line per held-out text."""
    millions = [n_tokens / 1e6 for n_tokens in history["tokens"]]
    units = [unit for unit in UNITS if any(name.endswith(unit) for name in history)]
    units = units or ["bits/byte"]  # of a history without held-out texts: an empty panel
    figure, panels = new_figure(1 + 5 * len(units), 5, n_panels=len(units))
    for unit, panel in zip(units, panels, strict=True):
        for name, values in history.items():
            if name.endswith(unit):
                label = f"{name.removesuffix(unit).strip()}: {values[-1]:.3f}"
                panel.plot(millions, values, marker="o", markersize=3, label=label)
        panel.set(xlabel="tokens read (millions)", ylabel=UNITS[unit])
        if panel.lines:
            panel.legend(title="last value", fontsize=8, ncols=1 + len(panel.lines) // 6)
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="results.history", description=__doc__.split("\n")[0])
    parser.add_argument("history", help="history.csv of a pretraining run")
    parser.add_argument("png", type=Path, help="where to write the plot")
    args = parser.parse_args(argv)
    draw(read_history(args.history), args.png)


if __name__ == "__main__":
    run_script(main)
