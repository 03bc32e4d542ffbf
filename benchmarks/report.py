"""Keep measurements in a file for each processor, print them as tables, and draw the speed-ups.

python -m benchmarks.report [FILE ...] [--plot results/figures/speed.png]
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from benchmarks.processor import speed_files
from utils import ArgumentParser, InputError, atomic_write, require_package, run_script

CONTENDERS = ("naive", "ours", "transformers")
BESIDE = ", beside"  # ends the name of a contender whose turns busy processes disturb
COLORS = {"ours": "#c0392b", "transformers": "#2c6fbb"}
Measured = dict[str, Any]  # an entry of a file


def keep(path: Path, kind: str, measured: Measured, processor: dict[str, Any]) -> None:
    """Write a measurement to the file, in place of the last one of the same name.

    Raises InputError if the file is of another processor or PyTorch.
    """
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    before = content.get("processor", processor)
    if before != processor:
        now = described(processor)
        raise InputError(f"{path}: is of {described(before)}, not of {now}; name another --out")
    content = {"processor": processor} | content
    name = ("shape", "row", "device", "bf16", "n_ranks")
    rows = content.setdefault(kind, [])
    same = [all(row.get(key) == measured.get(key) for key in name) for row in rows]
    place = same.index(True) if any(same) else len(rows)
    rows[place : place + 1] = [measured]
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1) + "\n")


def speed_table(paths: Sequence[Path] | None = None, shape: str = "stories42M") -> str:
    """Return the rows of one shape, the processors side by side, each named by a letter.

    For each: our rate, and how many times as fast as naive and transformers that is.
    """
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in paths or speed_files()]
    legend, head, by_row, others = [], ["row"], {}, []
    for i, (letter, content) in enumerate(zip(ascii_uppercase, contents, strict=False)):
        processor = content["processor"]
        legend.append(f"- {letter}: {described(processor, content.get('rows', []))}")
        head += [f"{letter}: ours", f"{letter} / naive", f"{letter} / transformers"]
        rows = [row for row in content.get("rows", []) if row["shape"] == shape]
        for row in rows:
            if "naive" in row["contenders"]:
                cells = by_row.setdefault(f"{row['row']} ({row['unit']})", {})
                cells[i] = [_rate_of(row, "ours"), *_ratios(row)]
        others += [f"{letter}:\n\n{text}" for text in more_tables(rows)]
    empty = [""] * 3
    lines = [
        [name, *(cell for i in range(len(contents)) for cell in cells.get(i, empty))]
        for name, cells in by_row.items()
    ]
    return "\n\n".join(["\n".join(legend), markdown(head, lines), *others])


def described(processor: dict[str, Any], rows: Sequence[Measured] = ()) -> str:
    """Name a processor, and the numbers of threads of the rows that were measured on it."""
    threads = [f"{n} threads" for n in sorted({row["threads"] for row in rows})]
    return ", ".join([processor["name"], *threads, f"PyTorch {processor['torch']}"])


def markdown(head: Sequence[str], rows: list[Sequence[str]]) -> str:
    lines = [head, *rows]
    text = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([text[0], "|---" * len(head) + "|", *text[1:]])


def all_tables(rows: list[Measured]) -> list[str]:
    """Return the tables that have at least one of the rows."""
    main_rows = [row for row in rows if "naive" in row["contenders"]]
    return ([table(main_rows)] if main_rows else []) + more_tables(rows)


def more_tables(rows: list[Measured]) -> list[str]:
    kinds = (
        (generation_table, [row for row in rows if "ours int8" in row["contenders"]]),
        (beside_table, [row for row in rows if f"ours{BESIDE}" in row["contenders"]]),
    )
    return [make(chosen) for make, chosen in kinds if chosen]


def table(rows: list[Measured]) -> str:
    """Return rates, ratios, the distance from the limit, and memory."""
    head = ["shape", "row", *CONTENDERS, "/ naive", "/ transformers", "of the limit"]
    lines = []
    for row in rows:
        of = row["contenders"]
        cells = [row["shape"], f"{row['row']} ({row['unit']})"]
        cells += [_rate_of(row, name) for name in CONTENDERS] + _ratios(row)
        share = row["limit_seconds"] / of["ours"]["median"]
        cells.append(f"{share:.2f}" if share else "")
        memory = of["ours"]["peak_mb"] / of["naive"]["peak_mb"]
        is_other_process = row["row"].startswith("start-up")
        lines.append([*cells, "" if is_other_process else f"{memory:.2f}"])
    return markdown([*head, "memory / naive"], lines)


def generation_table(rows: list[Measured]) -> str:
    """Return tokens per second, ours beside llama2.c's programs, and how many times theirs."""
    names = ("ours", "run.c", "ours int8", "runq.c")
    head = ["shape", *names, "ours / run.c", "ours int8 / runq.c", "ours int8 / ours"]
    pairs = (("ours", "run.c"), ("ours int8", "runq.c"), ("ours int8", "ours"))
    lines = [
        [row["shape"], *(_rate_of(row, name) for name in names), *(_ratio(row, *p) for p in pairs)]
        for row in rows
    ]
    return markdown(head, lines)


def beside_table(rows: list[Measured]) -> str:
    """Return how many times as long a run takes beside busy processes as alone."""
    head = ["shape", "row", "ours alone", "ours, times as long", "transformers, times as long"]
    lines = []
    for row in rows:
        cells = [row["shape"], f"{row['row']} ({row['unit']})", _rate_of(row, "ours")]
        lines.append(cells + [_ratio(row, name, name + BESIDE) for name in CONTENDERS[1:]])
    return markdown(head, lines)


def _rate_of(row: Measured, name: str) -> str:
    measured = row["contenders"].get(name)
    return _rate(row, measured["median"]) if measured else ""


def _ratio(row: Measured, fast: str, slow: str) -> str:
    """Return how many times as fast as `slow` a contender is, if both were measured."""
    of = row["contenders"]
    return f"{of[slow]['median'] / of[fast]['median']:.2f}" if fast in of and slow in of else ""


def _ratios(row: Measured) -> list[str]:
    return [_ratio(row, "ours", name) for name in ("naive", "transformers")]


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
    head = ["shape", "step", "device", "tokens/s, one rank", "all ranks", "all ranks / one"]
    lines = []
    for row in rows:
        n_tokens, alone = row["n_rows"] * row["tokens_of_row"], seconds_of(row, "one rank")
        device = f"{row['device']}{', bf16' * row['bf16']}"
        cells = [row["shape"], row["row"], device, f"{n_tokens / alone:,.0f}", "", "", ""]
        if "ranks" in row["seconds"]:
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
    names = list(dict.fromkeys(row["row"] for row in rows))[::-1]  # not every shape has each
    figure = Figure(figsize=(2 + 3.6 * len(shapes), 4.6), layout="constrained")
    panels = figure.subplots(1, len(shapes), sharex=True, sharey=True, squeeze=False)[0]
    for panel, shape in zip(panels, shapes, strict=True):
        here = [row for row in rows if row["shape"] == shape]
        for offset, name in ((0.2, "ours"), (-0.2, "transformers")):
            drawn = [row for row in here if name in row["contenders"]]
            places = [names.index(row["row"]) + offset for row in drawn]
            medians = [row["contenders"] for row in drawn]
            ratios = [of["naive"]["median"] / of[name]["median"] for of in medians]
            bars = panel.barh(places, ratios, height=0.38, color=COLORS[name], label=name)
            panel.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        panel.axvline(1.0, color="#888888", linewidth=1, zorder=0)
        panel.set_yticks(range(len(names)), names)
        panel.set_title(shape, fontsize=10)
        panel.margins(x=0.12)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(loc="lower right", frameon=False)
    figure.supxlabel("times as fast as the naive solution", fontsize=10)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="benchmarks.report", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("files", type=Path, nargs="*", metavar="FILE", help="default: results/speed-*.json")
    add("--plot", type=Path, metavar="PNG", help="also draw the first FILE")
    args = parser.parse_args(argv)
    files = args.files or speed_files()
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    for content in contents:
        rows = content.get("rows", [])
        texts = [described(content["processor"], rows), *all_tables(rows)]
        if "ranks" in content:
            texts.append(ranks_table(content["ranks"]))
        print(*texts, sep="\n\n", end="\n\n")
    if args.plot:
        rows = contents[0].get("rows", [])
        plot([row for row in rows if "naive" in row["contenders"]], args.plot)
        print(f"wrote {args.plot}, of {files[0]}")


if __name__ == "__main__":
    run_script(main)
