"""Times naive, ours and transformers side by side, and how far each is from the machine's limit.

python -m benchmarks.run [--plot]

The contenders of a row take turns, one run each, after a first run that does not count; the median
counts. Writes results/speed.json and prints a table; with --plot also times how a training step
grows with length and batch, and draws results/speed.png and results/growth.png. Rows whose names
begin with "scaling" take a training step on one process and on several, which torchrun starts;
`python -m benchmarks.projection` reckons with them. Wants a quiet machine and the development
packages.
"""

import argparse
import itertools
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cli
from benchmarks.jobs import SHAPES
from benchmarks.plot import plot
from benchmarks.ranks import ROWS
from benchmarks.report import Measured, check, others, table, with_limits
from benchmarks.rows import CONTENDERS, Counts, Row, all_rows
from benchmarks.scaling import PREFIX, measure_scaling, scaling_table
from benchmarks.scaling import key as scaling_key
from benchmarks.workers import take_turns
from utils import atomic_write

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = [(4, length) for length in (64, 128, 256, 512, 1024)]
SCALING = {PREFIX + name: name for name in ROWS}
BATCHES = [(n, 64) for n in (1, 2, 4, 8, 16, 32, 64)]


def measure_machine(repeats: int, threads: int) -> dict[str, float]:
    readers = ("read 256 MB", "one row, oneDNN")
    multipliers = ("multiply, BLAS", "multiply, oneDNN")
    measured = take_turns("machine", (*readers, *multipliers), {}, repeats, threads)
    seconds = {name: statistics.median(m["seconds"][0]) for name, m in measured.items()}
    rates = {f"{name}: operations_per_s": 2 * 2048**3 / seconds[name] for name in multipliers}
    best = max(rates.values())
    rates |= {f"{name}: bytes_per_s": 2**28 / seconds[name] for name in readers}
    return {"bytes_per_s": rates["read 256 MB: bytes_per_s"], "operations_per_s": best, **rates}


def measure_row(row: Row, counts: Counts, repeats: int, threads: int, command: str) -> Measured:
    options = {"shape": counts.shape, **row.options}
    measured = take_turns(row.maker, row.contenders, options, repeats, threads)
    results = {name: m.pop("result") for name, m in measured.items()}
    for m in measured.values():
        m["seconds"] = m["seconds"][0]
        m["median"] = statistics.median(m["seconds"])
    return {
        "shape": counts.shape,
        "row": row.name,
        "command": command,
        "threads": threads,
        "unit": row.unit,
        "amount": row.amount(counts),
        "rates": counts.rates,
        "ours_vs_naive": difference(results["ours"], results["naive"]),
        "contenders": measured,
    }


def difference(ours: Any, theirs: Any) -> str | None:
    """Whether two contenders came to the same: tokens and predictions, or losses."""
    if not isinstance(ours, list) or not ours:
        return None
    if isinstance(ours[0], float):
        largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        return f"losses differ by at most {largest:.1e}"
    n = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return f"{n} of {len(ours)} differ"


def measure_growth(shape: str, repeats: int, threads: int) -> dict[str, Any]:
    points = list(dict.fromkeys([*LENGTHS, *BATCHES]))
    options = {"shape": shape, "sizes": points}
    measured = take_turns("curve", CONTENDERS, options, repeats, threads, points)
    medians = {
        name: [statistics.median(seconds) for seconds in m["seconds"]]
        for name, m in measured.items()
    }
    return {"shape": shape, "points": points, "seconds": medians}


def main(argv: list[str] | None = None) -> None:
    parser = cli.ArgumentParser(description="Times naive, ours and transformers side by side.")
    parser.add_argument("--shapes", nargs="+", default=["stories42M", "mini", "stories260K"])
    parser.add_argument(
        "--rows", default="", help="whose name contains this; default: all but scaling"
    )
    parser.add_argument("--repeats", type=cli.positive_int, default=5)
    parser.add_argument("--threads", type=cli.positive_int, default=2)
    parser.add_argument("--out", default=str(ROOT / "results" / "speed.json"))
    parser.add_argument("--ranks", type=cli.positive_int, default=2, help="of the scaling rows")
    parser.add_argument("--use_gpu", action="store_true", help="for the scaling rows, a GPU a rank")
    parser.add_argument("--bf16", action="store_true", help="for the scaling rows")
    parser.add_argument("--plot", action="store_true", help="also draw it, and time the growth")
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given)
    for shape in args.shapes:
        if shape not in SHAPES:
            raise ValueError(f"--shapes {shape}: is not one of {', '.join(SHAPES)}")
    command = shlex.join(["python", "-m", "benchmarks.run", *given])
    out = Path(args.out)
    with tempfile.TemporaryDirectory() as scratch:
        speed_rows = {row.name: row for row in all_rows(scratch)}
        names = (*speed_rows, *SCALING) if args.rows else speed_rows
        chosen = [name for name in names if args.rows in name]
        if not chosen:
            names = "; ".join((*speed_rows, *SCALING))
            raise ValueError(f"--rows {args.rows!r}: is in none of the names {names}")
        lacks_threads = args.ranks > args.threads and not args.use_gpu
        if lacks_threads and any(name in SCALING for name in chosen):
            raise ValueError(f"--ranks {args.ranks}: one needs a thread, and --threads is fewer")
        is_speed = any(name in speed_rows for name in chosen)
        if is_speed or args.plot:
            cli.require_packages("transformers", "matplotlib")
        rates = _rates(args) if is_speed else {}
        for shape, name in itertools.product(args.shapes, chosen):
            if name in SCALING:
                one = _scaled(SCALING[name], shape, args, scratch, command)
                content, line = keep(out, scaled=[one]), scaling_table([one])
            else:
                counts = Counts(shape, rates)
                one = measure_row(speed_rows[name], counts, args.repeats, args.threads, command)
                content, line = keep(out, rows=[one]), table(with_limits([one]))
            print(line.splitlines()[-1], flush=True)
    if args.plot:
        content = keep(out, growth=measure_growth(args.shapes[0], args.repeats, args.threads))
    everything = with_limits(content["rows"])
    print(table(everything), others(everything), scaling_table(content["scaling"]), sep="\n\n")
    print(check(everything, {row.name: row.targets for row in all_rows("")}))
    print(f"wrote {args.out}")
    if args.plot:
        print("wrote", *plot(content, out.with_suffix("")))


def _rates(args: argparse.Namespace) -> dict[str, float]:
    rates = measure_machine(args.repeats, args.threads)
    print({name: f"{rate / 1e9:.1f}e9" for name, rate in rates.items()}, flush=True)
    return rates


def _scaled(
    row: str, shape: str, args: argparse.Namespace, scratch: str, command: str
) -> dict[str, Any]:
    threads = max(1, args.threads // args.ranks)
    how = (args.repeats, threads, args.use_gpu, args.bf16)
    return measure_scaling(row, shape, args.ranks, *how, scratch, command)


def keep(
    path: Path,
    rows: Sequence[Measured] = (),
    scaled: Sequence[Measured] = (),
    growth: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes and returns what the file holds, with what was measured in place of its own."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def renewed(name: str, key: Callable[..., tuple], measured: Sequence[Measured]) -> list:
        new = {key(row): row for row in measured}
        return [*(new.pop(key(row), row) for row in old.get(name, [])), *new.values()]

    content = {
        "rows": renewed("rows", lambda row: (row["shape"], row["row"]), rows),
        "scaling": renewed("scaling", scaling_key, scaled),
        "growth": growth or old.get("growth"),
    }
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1) + "\n")
    return content


if __name__ == "__main__":
    cli.run(main)
