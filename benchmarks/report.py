"""Print the measured times of each processor as tables, and draw the speed-ups.

    python -m benchmarks.report
    python -m benchmarks.report FILE.json
    python -m benchmarks.report --plot results/figures/speed.png

Each processor has a file, to which `keep` adds measurements.
"""

import json
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from benchmarks.processor import describe, processor_name, speed_file, speed_files
from training.options import require_outputs
from utils import ArgumentParser, InputError, atomic_write, require_package, run_script

CONTENDERS = ("naive", "ours", "transformers")
BESIDE = ", beside"  # ends the name of a contender whose turns busy processes disturb
COLORS = {"ours": "#c0392b", "transformers": "#2c6fbb"}
SHAPE = "stories42M"  # of the table and the picture in the documents
PLOTTED = {
    "generate, causal": "generate",
    "prompt, masked, sst x 10": "prompt, SST",
    "finetune, full, sst x 80": "finetune, the assignment's mode",
    "epoch, masked, sst x 80": "an epoch, padding masked",
}
Measured = dict[str, Any]  # an entry of a file


def keep(path: Path, kind: str, measured: Measured) -> None:
    """Write a measurement to the file; it replaces an earlier one of the same name."""
    content = read_kept(path)
    name = ("shape", "row", "device", "bf16", "n_ranks")
    rows = [*content.get(kind, []), measured]
    content[kind] = list({tuple(map(row.get, name)): row for row in rows}.values())
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1) + "\n")


def read_kept(path: Path) -> dict[str, Any]:
    """Return the file's content, without measurements if there is no file.

    Raises InputError if the file belongs to another processor or PyTorch.
    """
    here = describe()
    content = read(path) if path.exists() else {"processor": here}
    if content["processor"] != here:
        before, now = described(content["processor"]), described(here)
        raise InputError(f"{path}: holds times of {before}, not of {now}; name another --out")
    return content


def output_file(given: Path | None) -> Path:
    """Return `given` or the file of this processor.

    Raises InputError, before anything is measured, if the file cannot take this processor's times.
    """
    path = given or speed_file(processor_name())
    require_outputs([str(path)], [])
    read_kept(path)
    return path


def read(path: Path) -> dict[str, Any]:
    """Return the content of a file of measurements; raise InputError for any other file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        described(content["processor"])
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: is not an output of benchmarks.run or .ranks") from error
    return content


def speed_table(paths: Sequence[Path] | None = None) -> str:
    """Return a table of the rows of SHAPE, with the processors side by side under letters.

    Each processor has three columns: our rate, and its ratios to naive and to transformers.
    """
    contents = _with_rows([read(path) for path in paths or speed_files()])
    legend, head, by_row, others = [], ["row"], {}, []
    for i, (letter, content) in enumerate(zip(ascii_uppercase, contents, strict=False)):
        processor = content["processor"]
        legend.append(f"- {letter}: {described(processor, content['rows'])}")
        head += [f"{letter}: ours", f"{letter} / naive", f"{letter} / transformers"]
        rows = [row for row in content["rows"] if row["shape"] == SHAPE]
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


def _with_rows(contents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out the files that have measurements of benchmarks.ranks alone."""
    return [content for content in contents if content.get("rows")]


def described(processor: dict[str, Any], rows: Sequence[Measured] = ()) -> str:
    """Return the name of a processor, with the numbers of threads of its rows, its PyTorch, and
    the vector instructions that PyTorch uses."""
    threads = [f"{n} threads" for n in sorted({row["threads"] for row in rows})]
    vectors = [processor["vectors"]] if "vectors" in processor else []
    return ", ".join([processor["name"], *threads, f"PyTorch {processor['torch']}", *vectors])


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
    """Return a table of tokens per second, ours and llama2.c's, and their ratios."""
    names = ("ours", "run.c", "ours int8", "runq.c")
    head = ["shape", *names, "ours / run.c", "ours int8 / runq.c", "ours int8 / ours"]
    pairs = (("ours", "run.c"), ("ours int8", "runq.c"), ("ours int8", "ours"))
    lines = [
        [row["shape"], *(_rate_of(row, name) for name in names), *(_ratio(row, *p) for p in pairs)]
        for row in rows
    ]
    return markdown(head, lines)


def beside_table(rows: list[Measured]) -> str:
    """Return a table of times beside busy processes divided by the times alone."""
    head = ["shape", "row", "ours alone", "ours, times as long", "transformers, times as long"]
    lines = []
    for row in rows:
        cells = [row["shape"], f"{row['row']} ({row['unit']})", _rate_of(row, "ours")]
        lines.append(cells + [_ratio(row, name, name + BESIDE) for name in CONTENDERS[1:]])
    return markdown(head, lines)


def _rate_of(row: Measured, name: str) -> str:
    if name not in row["contenders"]:
        return ""
    seconds = row["contenders"][name]["median"]
    if row["unit"] == "s":
        return f"{seconds:.3f}"
    rate = row["amount"] / seconds
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def _ratio(row: Measured, fast: str, slow: str) -> str:
    """Return how many times as fast as `slow` the contender `fast` is, if both were measured."""
    of = row["contenders"]
    return f"{of[slow]['median'] / of[fast]['median']:.2f}" if fast in of and slow in of else ""


def _ratios(row: Measured) -> list[str]:
    return [_ratio(row, "ours", name) for name in ("naive", "transformers")]


def seconds_of(row: Measured, way: str, parts: Sequence[int] = (0, 1, 2)) -> float:
    """Return the median seconds of a step, or of some parts: 0 forward, 1 backward, 2 update."""
    return statistics.median(sum(turn[i] for i in parts) for turn in row["seconds"][way])


def ranks_table(rows: list[Measured]) -> str:
    """Return a table of tokens per second with one rank and with all, and the gains."""
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


def plot(contents: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the speed-ups over the naive solution: a panel for each processor, on one scale."""
    require_package("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 + 3.2 * len(contents), 3.2), layout="constrained")
    panels = figure.subplots(1, len(contents), sharex=True, sharey=True, squeeze=False)[0]
    for panel, letter, content in zip(panels, ascii_uppercase, contents, strict=False):
        rows = {
            row["row"]: row["contenders"]
            for row in content["rows"]
            if row["row"] in PLOTTED and row["shape"] == SHAPE and "naive" in row["contenders"]
        }
        for offset, name in ((-0.2, "ours"), (0.2, "transformers")):
            drawn = {row: of for row, of in rows.items() if name in of}
            places = [list(PLOTTED).index(row) + offset for row in drawn]
            ratios = [of["naive"]["median"] / of[name]["median"] for of in drawn.values()]
            bars = panel.barh(places, ratios, height=0.38, color=COLORS[name], label=name)
            panel.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
        panel.axvline(1.0, color="#888888", linewidth=1, zorder=0)
        name = textwrap.fill(content["processor"]["name"], 36)
        panel.set_title(f"{letter}: {name}", fontsize=10)
        panel.margins(x=0.12)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(PLOTTED)), PLOTTED.values())
    panels[0].invert_yaxis()
    panels[0].legend(loc="lower right", frameon=False)
    figure.supxlabel(f"times as fast as the naive solution, {SHAPE}'s shape", fontsize=10)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__, prog="python -m benchmarks.report")
    add = parser.add_argument
    add("files", type=Path, nargs="*", metavar="FILE",
        help="output of benchmarks.run or .ranks (default: results/speed-*.json)")  # fmt: skip
    add("--plot", type=Path, metavar="PNG",
        help="draw the speed-ups of each FILE (default: no picture)")  # fmt: skip
    args = parser.parse_args(argv)
    files = args.files or speed_files()
    contents = [read(path) for path in files]
    timed = _with_rows(contents)
    if args.plot:
        require_outputs([str(args.plot)], files)
        if not timed:
            raise InputError("nothing to draw: no FILE has rows of benchmarks.run")
    for content in contents:
        rows = content.get("rows", [])
        texts = [described(content["processor"], rows), *all_tables(rows)]
        if "ranks" in content:
            texts.append(ranks_table(content["ranks"]))
        print(*texts, sep="\n\n", end="\n\n")
    if args.plot:
        plot(timed, args.plot)
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    run_script(main)
