"""Draws a training history: held-out bits per byte against tokens read.

    python -m results.history data/mini/history.csv data/mini/loss.png

Needs matplotlib, which `bash setup.sh --dev` installs.
"""

import csv
from pathlib import Path

import cli
from utils import atomic_write

BITS = " bits/byte"


def read_history(path: str) -> dict[str, list[float]]:
    """The columns of a history.csv, by their names."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or "tokens" not in rows[0]:
        raise ValueError(f"{path}: is no history of pretraining.run with a column tokens")
    try:
        return {name: [float(row[name]) for row in rows] for name in rows[0]}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: holds something that is no number ({error})") from error


def draw(history: dict[str, list[float]], path: Path) -> None:
    """A PNG with a line for every held-out set."""
    cli.require_packages("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    millions = [tokens / 1e6 for tokens in history["tokens"]]
    for name, values in history.items():
        if name.endswith(BITS):
            label = name.removesuffix(BITS)
            axes.plot(
                millions, values, marker="o", markersize=3, label=f"{label}: {values[-1]:.3f}"
            )
    axes.set_xlabel("tokens read (millions)")
    axes.set_ylabel("held-out bits per byte")
    axes.grid(alpha=0.3)
    figure.legend(title="held out, last value", loc="outside lower center", ncols=3)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = cli.ArgumentParser(prog="results.history", description=__doc__.split("\n")[0])
    parser.add_argument("history", help="history.csv of a run")
    parser.add_argument("png", type=Path)
    args = parser.parse_args(argv)
    draw(read_history(args.history), args.png)


if __name__ == "__main__":
    cli.run(main)
