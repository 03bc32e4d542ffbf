"""Keep measurements in results/speed.json, print them as tables, and draw the speed-ups.

python -m benchmarks.report [--plot results/figures/speed.png]
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils import ArgumentParser, atomic_write, require_package, run_script

SPEED = Path(__file__).resolve().parent.parent / "results" / "speed.json"
CONTENDERS = ("naive", "ours", "transformers")
COLORS = {"ours": "#c0392b", "transformers": "#2c6fbb"}
Measured = dict[str, Any]  # an entry of results/speed.json


def keep(path: Path, kind: str, measured: Measured) -> None:
    """Write a measurement to the file, in place of the last one of the same name."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    name = ("shape", "row", "device", "bf16", "n_ranks")
    rows = content.setdefault(kind, [])
    same = [all(row.get(key) == measured.get(key) for key in name) for row in rows]
    place = same.index(True) if any(same) else len(rows)
    rows[place : place + 1] = [measured]
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1) + "\n")


def speed_table(path: Path = SPEED, shape: str = "stories42M") -> str:
    """Return the rows of one shape as a Markdown table."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return table([row for row in rows if row["shape"] == shape])


def markdown(head: Sequence[str], rows: list[Sequence[str]]) -> str:
    lines = [head, *rows]
    text = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([text[0], "|---" * len(head) + "|", *text[1:]])


def table(rows: list[Measured]) -> str:
    """Return rates, ratios, the distance from the limit, and memory."""
    head = ["shape", "row", *CONTENDERS, "/ naive", "/ transformers", "of the limit"]
    lines = []
    for row in rows:
        of = row["contenders"]
        median = {name: measured["median"] for name, measured in of.items()}
        cells = [row["shape"], f"{row['row']} ({row['unit']})"]
        cells += [_rate(row, median[name]) if name in of else "" for name in CONTENDERS]
        for name in ("naive", "transformers"):
            cells.append(f"{median[name] / median['ours']:.2f}" if name in of else "")
        share = row["limit_seconds"] / median["ours"]
        cells.append(f"{share:.2f}" if share else "")
        memory = of["ours"]["peak_mb"] / of["naive"]["peak_mb"]
        is_other_process = row["row"].startswith("start-up")
        lines.append([*cells, "" if is_other_process else f"{memory:.2f}"])
    return markdown([*head, "memory / naive"], lines)


def _rate(row: Measured, seconds: float) -> str:
    if row["unit"] == "s":
        return f"{seconds:.3f}"
    rate = row["amount"] / seconds
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def seconds_of(row: Measured, way: str, parts: Sequence[int] = (0, 1, 2)) -> float:
    """Return the median seconds of a step, or of some parts: 0 forward, 1 backward, 2 update."""
    return statistics.median(sum(turn[i] for i in parts) for turn in row["seconds"][way])


def ranks_table(rows: list[Measured]) -> str:
    """Return what several ranks gain; one process with all their threads beside it."""
    head = ["shape", "step", "device", "tokens/s, one rank", "two ranks", "two ranks / one"]
    lines = []
    for row in rows:
        n_tokens, alone = row["n_rows"] * row["tokens_of_row"], seconds_of(row, "one rank")
        device = f"{row['device']}{', bf16' * row['bf16']}"
        cells = [row["shape"], row["row"], device, f"{n_tokens / alone:,.0f}", "", "", ""]
        if row["n_ranks"] == 2:
            together = seconds_of(row, "ranks")
            all_threads = seconds_of(row, "one rank, all threads")
            cells[4:] = [f"{n_tokens / together:,.0f}", f"{alone / together:.2f}"]
            cells.append(f"{alone / all_threads:.2f}")
        lines.append(cells)
    return markdown([*head, "all threads / one rank"], lines)


def plot(rows: list[Measured], path: Path) -> None:
    """Draw a panel for each shape and a pair of bars for each row, on one scale."""
    require_package("matplotlib")
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(2 + 3.6 * len(shapes), 4.6), layout="constrained")
    panels = figure.subplots(1, len(shapes), sharex=True, sharey=True, squeeze=False)[0]
    for panel, shape in zip(panels, shapes, strict=True):
        here = [row for row in rows if row["shape"] == shape][::-1]
        for offset, name in ((0.2, "ours"), (-0.2, "transformers")):
            places = [i + offset for i, row in enumerate(here) if name in row["contenders"]]
            medians = [row["contenders"] for row in here if name in row["contenders"]]
            ratios = [of["naive"]["median"] / of[name]["median"] for of in medians]
            bars = panel.barh(places, ratios, height=0.38, color=COLORS[name], label=name)
            panel.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        panel.axvline(1.0, color="#888888", linewidth=1, zorder=0)
        panel.set_yticks(range(len(here)), [row["row"] for row in here])
        panel.set_title(shape, fontsize=10)
        panel.margins(x=0.12)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(loc="lower right", frameon=False)
    figure.supxlabel("times as fast as the naive solution", fontsize=10)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("--speed", type=Path, default=SPEED, help="default: results/speed.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw FILE, a PNG")
    args = parser.parse_args(argv)
    content = json.loads(args.speed.read_text(encoding="utf-8"))
    rows = content.get("rows", [])
    print(table(rows), ranks_table(content.get("ranks", [])), sep="\n\n")
    if args.plot:
        plot(rows, args.plot)
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    run_script(main)
