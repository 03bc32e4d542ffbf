"""Time naive, ours and transformers side by side, and compare ours with the machine's limit.

    python -m benchmarks.run
    python -m benchmarks.run --shapes mini --rows finetune --repeats 3
    python -m benchmarks.run --llama2c FOLDER --out OUT.json

The contenders of a row take turns, each in a process of its own, after a first run that does not
count. So they share no memory, and a drift of the machine's speed affects all of them. The
benchmark needs a quiet machine and the development packages. Each processor has a file,
results/speed-<processor>.json, which `python -m benchmarks.report` prints and draws.

In a row "beside a busy process" each contender also runs beside looping processes, one for each
core except one.
"""

import contextlib
import itertools
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import fast
from benchmarks import llama2c
from benchmarks.contenders import SEED, SHAPES, make_llama
from benchmarks.report import BESIDE, all_tables, keep, output_file
from benchmarks.rows import (
    MACHINE,
    Row,
    Work,
    adamw,
    all_rows,
    epoch,
    finetune,
    generate,
    prompt,
)
from fast.linear import chosen_library
from fast.memory import keep_freed_memory, peak_memory_mb, reset_peak_memory
from fast.threads import USUAL_LENGTH, choose_threads, generation_rows
from training.options import positive_int
from utils import ArgumentParser, InputError, require_package, run_script, seed_everything

SHORTEST = 0.3  # s of work in a turn; shorter work is repeated, and the mean counts
PAUSE = 0.1  # s before a turn: the threads of the last process spin while they wait for work
TRAINING = (finetune, epoch, adamw)

_work: Work  # of this worker process


def _build(row: Row, contender: str, shape: str, threads: int) -> None:
    """Prepare a worker process."""
    global _work
    torch.set_num_threads(threads)
    contender = contender.removesuffix(BESIDE)
    if contender.startswith("ours"):
        _start_as_commands_do(row, contender, shape)
    else:
        for name in fast.VARIABLES:  # see `environment`; our modules have set them again
            os.environ.pop(name, None)
    _work = row.build(contender, shape, *row.args)
    reset_peak_memory()  # building may take more, such as a second copy of the weights


def _start_as_commands_do(row: Row, contender: str, shape: str) -> None:
    """Prepare a worker of ours as run_llama.py prepares its process."""
    seed_everything(SEED)
    if row.build in TRAINING:
        keep_freed_memory()
    if row.build is generate:
        llama = make_llama(contender, shape, row.args[0])
        choose_threads(llama, generation_rows(llama))
    elif row.build in (*TRAINING, prompt):
        batch_size = 80 if row.build is adamw else row.args[1]
        choose_threads(make_llama(contender, shape, "causal"), USUAL_LENGTH * batch_size)


def _first_run() -> tuple[Any, Work]:
    """Return the result to compare, and the counts of the work."""
    return _work.run(), _work._replace(run=None)


def _take_turn() -> float:
    """Return the seconds of one run."""
    time.sleep(PAUSE)
    started, results = time.perf_counter(), []
    while not results or time.perf_counter() - started < SHORTEST:
        results.append(_work.run())
    if _work.times_itself:  # then a result is its seconds
        return statistics.mean(results)
    return (time.perf_counter() - started) / len(results)


def _peak_mb() -> float | None:
    return None if _work.times_itself else peak_memory_mb()  # a program has a process of its own


def _choices() -> dict[str, Any]:
    """Return the choices of a worker of ours: threads, and the library that multiplies matrices."""
    library = {"one row": chosen_library(1), "many rows": chosen_library(256)}
    return {"library": library, "ours_threads": torch.get_num_threads()}


@contextlib.contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """Keep n processes looping during the block."""
    processes = [subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def environment(contender: str) -> Iterator[None]:
    """Start the processes of others without the variables that importing `fast` has set."""
    names = () if contender.startswith("ours") else fast.VARIABLES
    removed = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(removed)


def take_turns(
    row: Row, shape: str, repeats: int, threads: int
) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[Any, Work]], dict[str, Any]]:
    """Return by contender: seconds, median and peak memory; first result and counts.

    The third value holds the choices of ours, see `_choices`.
    """
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools, first = {}, {}
        for name in row.contenders:
            pool = ProcessPoolExecutor(1, context, _build, (row, name, shape, threads))
            pools[name] = stack.enter_context(pool)
            with environment(name):  # the process starts here
                first[name] = pool.submit(_first_run).result()
        seconds: dict[str, list[float]] = {name: [] for name in pools}
        for _ in range(repeats):
            for name, pool in pools.items():
                n_busy = max(os.cpu_count() - 1, 1) if name.endswith(BESIDE) else 0
                with busy_processes(n_busy):
                    seconds[name].append(pool.submit(_take_turn).result())
        measured = {
            name: {
                "seconds": seconds[name],
                "median": statistics.median(seconds[name]),
                "peak_mb": pool.submit(_peak_mb).result(),
            }
            for name, pool in pools.items()
        }
        choices = pools["ours"].submit(_choices).result() if "ours" in pools else {}
    return measured, first, choices


def measure_machine(repeats: int, threads: int) -> dict[str, float]:
    """Return the best rates of this machine."""
    measured, first, _ = take_turns(MACHINE, "", repeats, threads)
    counts = {name: work.operations or work.bytes for name, (_, work) in first.items()}
    rates = {name: count / measured[name]["median"] for name, count in counts.items()}
    fastest = max(rates["multiply, BLAS"], rates["multiply, ours"])
    return {"bytes_per_s": rates["read 256 MB"], "operations_per_s": fastest, **rates}


def measure_row(
    row: Row, shape: str, rates: dict[str, float], repeats: int, threads: int
) -> dict[str, Any]:
    measured, first, choices = take_turns(row, shape, repeats, threads)
    results = {name: result for name, (result, _) in first.items()}
    _, work = first["ours"]
    limit = work.operations / rates["operations_per_s"] + work.bytes / rates["bytes_per_s"]
    return {
        "shape": shape,
        "row": row.name,
        **choices,
        "threads": threads,
        "unit": row.unit,
        "amount": work.amount,
        "limit_seconds": limit,
        "rates": rates,
        "ours_vs_naive": difference(results["ours"], results.get("naive")),
        "contenders": measured,
    }


def difference(ours: Any, theirs: Any) -> str | None:
    """Say how far two lists of tokens, predictions or losses differ; None for anything else."""
    if not isinstance(ours, list) or theirs is None:
        return None
    if isinstance(ours[0], float):
        largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        return f"losses differ by at most {largest:.1e}"
    n_different = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return f"{n_different} of {len(ours)} differ"


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__, prog="python -m benchmarks.run")
    add = parser.add_argument
    add("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES,
        help="models to time, with random weights (default: all)")  # fmt: skip
    add("--rows", default="", metavar="WORDS",
        help="text in the names of the rows to time (default: all rows)")  # fmt: skip
    add("--repeats", type=positive_int, default=5, metavar="N",
        help="turns of each contender (default: %(default)s)")  # fmt: skip
    add("--threads", type=positive_int, default=2, metavar="N",
        help="threads of each contender (default: %(default)s)")  # fmt: skip
    add("--llama2c", type=Path, metavar="FOLDER", help="checkout of llama2.c, whose run.c and "
        "runq.c take part in generation (default: none)")  # fmt: skip
    add("--out", type=Path, metavar="FILE",
        help="file to add the times to (default: results/speed-<this processor>.json)")  # fmt: skip
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given)
    command = shlex.join(["python", "-m", "benchmarks.run", *given])
    out = output_file(args.out)
    require_package("transformers")
    with tempfile.TemporaryDirectory() as folder:
        programs = llama2c.PROGRAMS if args.llama2c else ()
        if programs:
            llama2c.compile_programs(args.llama2c, Path(folder))
        every = all_rows(folder, programs)
        chosen = [row for row in every if args.rows in row.name]
        if not chosen:
            names = "; ".join(row.name for row in every)
            raise InputError(f"--rows {args.rows!r}: no name contains it; the rows are {names}")
        rates = measure_machine(args.repeats, args.threads)
        for shape, row in itertools.product(dict.fromkeys(args.shapes), chosen):
            measured = measure_row(row, shape, rates, args.repeats, args.threads)
            measured["command"] = command
            keep(out, "rows", measured)
            last_lines = [text.splitlines()[-1] for text in all_tables([measured])]
            print(*last_lines, measured["ours_vs_naive"] or "", sep="\n", flush=True)
    print(f"wrote {out}; python -m benchmarks.report prints and draws it")


if __name__ == "__main__":
    run_script(main)
