"""Time naive, ours and transformers side by side, and how far each is from the machine's limit.

    python -m benchmarks.run [--shapes mini] [--rows finetune]

The contenders of a row take turns, each in a process of its own, after a first run that does not
count. So they share no memory, and a drift of the machine's speed meets all. Needs a quiet machine
and the development packages. `python -m benchmarks.report` prints and draws what was measured.
"""

import contextlib
import itertools
import multiprocessing
import shlex
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import SHAPES
from benchmarks.report import SPEED, keep, table
from benchmarks.rows import MACHINE, Row, Work, adamw, all_rows, epoch, finetune
from fast.memory import forget_peak_memory, keep_freed_memory, peak_memory_mb
from training.options import positive_int
from utils import ArgumentParser, InputError, require_package, run_script

SHORTEST = 0.3  # s of work in a turn; shorter work is repeated, and the mean counts
PAUSE = 0.1  # s before a turn: the threads of the process before wait for work by spinning

_work: Work  # of this worker process


def _build(row: Row, contender: str, shape: str, threads: int) -> None:
    """Prepare a worker process."""
    global _work
    torch.set_num_threads(threads)
    if contender == "ours" and row.build in (finetune, epoch, adamw):
        keep_freed_memory()  # as every training command does
    _work = row.build(contender, shape, *row.args)
    forget_peak_memory()  # building may take more, such as a second copy of the weights


def _first_run() -> tuple[Any, Work]:
    """Return the result to compare, and the counts of the work."""
    return _work.run(), _work._replace(run=None)


def _take_turn() -> float:
    """Return the seconds of one run."""
    time.sleep(PAUSE)
    started, n_runs = time.perf_counter(), 0
    while n_runs == 0 or time.perf_counter() - started < SHORTEST:
        _work.run()
        n_runs += 1
    return (time.perf_counter() - started) / n_runs


def take_turns(
    row: Row, shape: str, repeats: int, threads: int
) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[Any, Work]]]:
    """Return by contender: seconds, median and peak memory; first result and counts."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = {}
        for name in row.contenders:
            pool = ProcessPoolExecutor(1, context, _build, (row, name, shape, threads))
            pools[name] = stack.enter_context(pool)
        first = {name: pool.submit(_first_run).result() for name, pool in pools.items()}
        seconds: dict[str, list[float]] = {name: [] for name in pools}
        for _ in range(repeats):
            for name, pool in pools.items():
                seconds[name].append(pool.submit(_take_turn).result())
        measured = {
            name: {
                "seconds": seconds[name],
                "median": statistics.median(seconds[name]),
                "peak_mb": pool.submit(peak_memory_mb).result(),
            }
            for name, pool in pools.items()
        }
    return measured, first


def measure_machine(repeats: int, threads: int) -> dict[str, float]:
    """Return the best rates of this machine."""
    measured, first = take_turns(MACHINE, "", repeats, threads)
    counts = {name: work.operations or work.bytes for name, (_, work) in first.items()}
    rates = {name: count / measured[name]["median"] for name, count in counts.items()}
    fastest = max(rates["multiply, BLAS"], rates["multiply, oneDNN"])
    return {"bytes_per_s": rates["read 256 MB"], "operations_per_s": fastest, **rates}


def measure_row(
    row: Row, shape: str, rates: dict[str, float], repeats: int, threads: int
) -> dict[str, Any]:
    measured, first = take_turns(row, shape, repeats, threads)
    results = {name: result for name, (result, _) in first.items()}
    _, work = first["ours"]
    limit = work.operations / rates["operations_per_s"] + work.bytes / rates["bytes_per_s"]
    return {
        "shape": shape,
        "row": row.name,
        "threads": threads,
        "unit": row.unit,
        "amount": work.amount,
        "limit_seconds": limit,
        "rates": rates,
        "ours_vs_naive": difference(results["ours"], results["naive"]),
        "contenders": measured,
    }


def difference(ours: Any, theirs: Any) -> str | None:
    """Say how far two lists of tokens, predictions or losses differ; None for anything else."""
    if not isinstance(ours, list):
        return None
    if isinstance(ours[0], float):
        largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        return f"losses differ by at most {largest:.1e}"
    n_different = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return f"{n_different} of {len(ours)} differ"


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="benchmarks.run", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES, help="default: all")
    add("--rows", default="", help="time only rows whose name contains this (default: all)")
    add("--repeats", type=positive_int, default=5, help="turns of each contender (default: 5)")
    add("--threads", type=positive_int, default=2, help="of each contender (default: 2)")
    add("--out", type=Path, default=SPEED, help="default: results/speed.json")
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given)
    command = shlex.join(["python", "-m", "benchmarks.run", *given])
    require_package("transformers")
    with tempfile.TemporaryDirectory() as folder:
        chosen = [row for row in all_rows(folder) if args.rows in row.name]
        if not chosen:
            names = "; ".join(row.name for row in all_rows(folder))
            raise InputError(f"--rows {args.rows!r}: no name contains it; the rows are {names}")
        rates = measure_machine(args.repeats, args.threads)
        for shape, row in itertools.product(args.shapes, chosen):
            measured = measure_row(row, shape, rates, args.repeats, args.threads)
            keep(args.out, "rows", {**measured, "command": command})
            print(table([measured]).splitlines()[-1], measured["ours_vs_naive"] or "", flush=True)
    print(f"wrote {args.out}; python -m benchmarks.report prints and draws it")


if __name__ == "__main__":
    run_script(main)
