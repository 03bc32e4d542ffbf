"""Times naive, ours and transformers side by side, and says how far each is from the machine's limit.

python -m benchmarks.run [--plot]

Every contender of a row lives in a process of its own, so that neither memory nor allocator settings
are shared. They take turns, one run each, after a first run that does not count; the median counts.
Writes results/speed.json and prints a table; with --plot also results/speed.png and
results/growth.png. Wants a quiet machine, and the development packages for transformers.
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cli
from utils import atomic_write

ROOT = Path(__file__).resolve().parent.parent
THREE = ("naive", "ours", "transformers")
LENGTHS = [(4, length) for length in (64, 128, 256, 512, 1024)]
BATCHES = [(n, 64) for n in (1, 2, 4, 8, 16, 32, 64)]
PAUSE = 0.1  # s before a turn: the threads of the process before wait for work by spinning
SHORTEST = 0.3  # s of work in a turn; shorter work is done again, and the mean counts


# ---------------------------------------------------------------- one contender, one process


class Worker:
    """A contender of one row in its own process; `run` has it work once and waits."""

    def __init__(self, maker: str, contender: str, options: dict[str, Any], threads: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, maker, contender, options, threads), daemon=True
        )
        self.process.start()
        theirs.close()
        self.pipe.recv()  # built

    def run(self, point: Any = None) -> tuple[float, Any]:
        """(seconds, result)"""
        self.pipe.send(("run", point))
        return self.pipe.recv()

    def stop(self) -> float:
        """Ends the process; returns the most memory it held, in MB."""
        self.pipe.send(("stop", None))
        peak = self.pipe.recv()
        self.process.join()
        return peak


def _work(
    pipe: multiprocessing.connection.Connection,
    maker: str,
    contender: str,
    options: dict[str, Any],
    threads: int,
) -> None:
    import torch

    from benchmarks import jobs

    torch.set_num_threads(threads)
    job = getattr(jobs, maker)(contender, **options)
    pipe.send("built")
    while True:
        what, point = pipe.recv()
        if what == "stop":
            pipe.send(_peak_mb())
            return
        time.sleep(PAUSE)
        started = time.perf_counter()
        result, n_times = job(point), 1
        while time.perf_counter() - started < SHORTEST:
            job(point)
            n_times += 1
        pipe.send(((time.perf_counter() - started) / n_times, result))


def _peak_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would count the parent's memory before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes


def take_turns(
    maker: str,
    contenders: Sequence[str],
    options: dict[str, Any],
    repeats: int,
    threads: int,
    points: Sequence[Any] = (None,),
) -> dict[str, dict[str, Any]]:
    """Contender -> seconds (a list for each point), first result of the first point, peak MB."""
    workers = {name: Worker(maker, name, options, threads) for name in contenders}
    first = {name: [worker.run(point)[1] for point in points] for name, worker in workers.items()}
    seconds = {name: [[] for _ in points] for name in contenders}
    for _ in range(repeats):
        for i, point in enumerate(points):
            for name, worker in workers.items():
                seconds[name][i].append(worker.run(point)[0])
    return {
        name: {"seconds": seconds[name], "result": first[name][0], "peak_mb": worker.stop()}
        for name, worker in workers.items()
    }


# ---------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Row:
    """What is timed for a shape; `limit` gives the seconds that the machine cannot go below."""

    name: str
    maker: str
    options: dict[str, Any]
    unit: str  # of `amount`, per second; "s" for the seconds themselves
    amount: Callable[["Counts"], float]
    limit: Callable[["Counts"], float]
    contenders: tuple[str, ...] = THREE
    targets: dict[str, float] = field(default_factory=dict)  # of the stories42M shape, see `check`


class Counts:
    """Multiplications and bytes that a row cannot avoid, on a machine of known rates."""

    def __init__(self, shape: str, rates: dict[str, float]):
        from benchmarks import jobs
        from config import LlamaConfig
        from llama import Llama

        import torch  # isort: skip

        self.jobs, self.shape, self.rates = jobs, shape, rates
        self.config = LlamaConfig(**jobs.SHAPES[shape])
        with torch.device("meta"):
            model = Llama(self.config)
        self.n_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.n_in_layers = self.n_parameters - model.output.weight.numel()

    def forward(self, lengths: Sequence[int], n_logits: int = 0) -> float:
        """Floating-point operations of one pass over sequences, without elementwise work."""
        c = self.config
        attention = 4 * c.n_layers * c.dim * sum(n * n for n in lengths)
        logits = 2 * n_logits * c.vocab_size * c.dim
        return 2 * self.n_in_layers * sum(lengths) + attention + logits

    def seconds(self, operations: float) -> float:
        return operations / self.rates["operations_per_s"]

    def reading(self, n_bytes: float) -> float:
        return n_bytes / self.rates["bytes_per_s"]

    def data(self, options: dict[str, Any], padded: bool, **more: Any) -> list[int]:
        """Lengths of a row's sentences, as they are or as their batches pad them."""
        size = options["batch_size"]
        n = size * options["n_batches"]
        data = self.jobs.make_data(options["dataset"], n, self.shape, **more)
        if not padded:
            return [len(example.tokens) for example in data.examples]
        batches = self.jobs.in_order(data, size)
        return [batch["token_ids"].shape[1] for batch in batches for _ in batch["lengths"]]


def generate_row(attention: str, contenders: tuple[str, ...], targets: dict[str, float]) -> Row:
    def limit(counts: Counts) -> float:
        start, n = counts.jobs.N_PROMPT, counts.jobs.N_NEW
        if attention == "causal":  # every weight is read for every token
            return counts.reading(4 * counts.n_parameters * n)
        return counts.seconds(sum(counts.forward([start + i], 1) for i in range(n)))

    return Row(
        f"generate, {attention}", "generate", {"attention": attention}, "tokens/s",
        lambda counts: counts.jobs.N_NEW, limit, contenders, targets,
    )  # fmt: skip


def steps_row(dataset: str, batch_size: int, n_batches: int) -> Row:
    options = {"dataset": dataset, "batch_size": batch_size, "n_batches": n_batches}
    return Row(
        f"finetune, full, {dataset} x {batch_size}", "steps", options, "padded tokens/s",
        lambda counts: sum(counts.data(options, padded=True)),
        lambda counts: counts.seconds(3 * counts.forward(counts.data(options, padded=True))),
        targets={"naive": 1.25, "transformers": 1.1, "memory": 0.8},
    )  # fmt: skip


def epoch_row(dataset: str, batch_size: int, n_batches: int, naive: float) -> Row:
    options = {"dataset": dataset, "batch_size": batch_size, "n_batches": n_batches}
    return Row(
        f"epoch, masked, {dataset} x {batch_size}", "epoch", options, "sentences/s",
        lambda counts: batch_size * n_batches,
        lambda counts: counts.seconds(4 * counts.forward(counts.data(options, padded=False))),
        targets={"naive": naive, "memory": 0.8},
    )  # fmt: skip


def prompt_row(dataset: str, batch_size: int, n_batches: int) -> Row:
    options = {"dataset": dataset, "batch_size": batch_size, "n_batches": n_batches}

    def limit(counts: Counts) -> float:
        lengths = counts.data(options, padded=False, longer_by=counts.jobs.QUESTION)
        return counts.seconds(counts.forward(lengths, len(lengths)))

    return Row(
        f"prompt, masked, {dataset} x {batch_size}", "prompt", options, "sentences/s",
        lambda counts: batch_size * n_batches, limit, targets={"naive": 2.0},
    )  # fmt: skip


def all_rows(scratch: str) -> list[Row]:
    return [
        generate_row("causal", THREE, {"naive": 4.0, "transformers": 1.7, "limit": 0.75}),
        generate_row("full", ("naive", "ours"), {"naive": 1.3}),
        steps_row("sst", 80, 2),
        steps_row("cfimdb", 10, 2),
        epoch_row("sst", 80, 5, naive=2.5),
        epoch_row("cfimdb", 10, 5, naive=2.0),
        prompt_row("sst", 10, 20),
        Row(
            "AdamW step", "adamw", {}, "s", lambda counts: 1,
            # theta, gradient, m and v are read, theta, m and v written
            lambda counts: counts.reading(7 * 4 * counts.n_parameters),
            ("naive", "ours", "torch", "torch fused"), {"naive": 5.0, "torch fused": 1 / 1.3},
        ),
        Row(
            "start-up to first token", "start_up", {"scratch": scratch}, "s", lambda counts: 1,
            lambda counts: 0.0,  # what `import torch` and reading take is measured beside it
            (*THREE, "import torch", "read file"),
        ),
    ]  # fmt: skip


# ---------------------------------------------------------------- measuring


def measure_machine(repeats: int, threads: int) -> dict[str, float]:
    contenders = ("read 256 MB", "multiply, BLAS", "multiply, oneDNN")
    measured = take_turns("machine", contenders, {}, repeats, threads)
    seconds = {name: statistics.median(m["seconds"][0]) for name, m in measured.items()}
    rates = {f"{name}: operations_per_s": 2 * 2048**3 / seconds[name] for name in contenders[1:]}
    best = max(rates.values())
    return {"bytes_per_s": 2**28 / seconds[contenders[0]], "operations_per_s": best, **rates}


def measure_row(row: Row, counts: Counts, repeats: int, threads: int) -> dict[str, Any]:
    options = {"shape": counts.shape, **row.options}
    measured = take_turns(row.maker, row.contenders, options, repeats, threads)
    results = {name: m.pop("result") for name, m in measured.items()}
    for m in measured.values():
        m["seconds"] = m["seconds"][0]
        m["median"] = statistics.median(m["seconds"])
    return {
        "shape": counts.shape,
        "row": row.name,
        "unit": row.unit,
        "amount": row.amount(counts),
        "limit_seconds": row.limit(counts),
        "ours_vs_naive": difference(results["ours"], results["naive"]),
        "contenders": measured,
    }


def difference(ours: Any, theirs: Any) -> str | None:
    """Whether two contenders came to the same: tokens and predictions, or losses."""
    if not isinstance(ours, list) or not ours:
        return None
    if isinstance(ours[0], float):
        return f"losses differ by at most {max(abs(a - b) for a, b in zip(ours, theirs)):.1e}"  # noqa: B905
    n = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return f"{n} of {len(ours)} differ"


def measure_growth(shape: str, repeats: int, threads: int) -> dict[str, Any]:
    points = [*LENGTHS, *BATCHES]
    options = {"shape": shape, "sizes": points}
    measured = take_turns("curve", THREE, options, repeats, threads, points)
    medians = {
        name: [statistics.median(seconds) for seconds in m["seconds"]]
        for name, m in measured.items()
    }
    return {"shape": shape, "points": points, "seconds": medians}


# ---------------------------------------------------------------- reporting


def speedup(measured: dict[str, Any], other: str) -> float | None:
    """How many times faster ours is than another contender."""
    contenders = measured["contenders"]
    if other not in contenders:
        return None
    return contenders[other]["median"] / contenders["ours"]["median"]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: rates, ratios, distance from the limit, memory."""
    lines = [
        "| shape | row | naive | ours | transformers | / naive | / transformers | of the limit "
        "| memory / naive |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["shape"], f"{row['row']} ({row['unit']})"]
        for name in THREE:
            m = row["contenders"].get(name)
            cells.append(_shown(row["amount"] / m["median"], row["unit"]) if m else "")
        for name in ("naive", "transformers"):
            ratio = speedup(row, name)
            cells.append(f"{ratio:.2f}" if ratio else "")
        share = row["limit_seconds"] / row["contenders"]["ours"]["median"]
        cells.append(f"{share:.2f}" if share else "")
        memory = {name: m["peak_mb"] for name, m in row["contenders"].items()}
        is_process_itself = row["row"].startswith("start-up")
        cells.append("" if is_process_itself else f"{memory['ours'] / memory['naive']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(rate: float, unit: str) -> str:
    if unit == "s":
        return f"{1 / rate:.3f}"
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def others(rows: list[dict[str, Any]]) -> str:
    """What the table has no column for."""
    lines = []
    for row in rows:
        named = [name for name in row["contenders"] if name not in THREE]
        if named:
            seconds = (f"{name} {row['contenders'][name]['median']:.4f} s" for name in named)
            lines.append(f"{row['shape']}, {row['row']}: {', '.join(seconds)}")
        if row["ours_vs_naive"]:
            lines.append(f"{row['shape']}, {row['row']}: ours and naive: {row['ours_vs_naive']}")
    return "\n".join(lines)


def check(rows: list[dict[str, Any]], targets: dict[str, dict[str, float]]) -> str:
    """The targets of the stories42M shape, each met or missed."""
    lines = []
    for row in rows:
        for against, least in targets.get(row["row"], {}).items():
            if row["shape"] != "stories42M":
                continue
            if against == "memory":
                memory = {name: m["peak_mb"] for name, m in row["contenders"].items()}
                reached = memory["ours"] / memory["naive"]
                met = reached <= least
            else:
                limit = row["limit_seconds"] / row["contenders"]["ours"]["median"]
                reached = limit if against == "limit" else speedup(row, against)
                met = reached >= least
            verdict = "met" if met else "MISSED"
            lines.append(f"{verdict}: {row['row']}, {against}: {reached:.2f} (target {least:.2f})")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = cli.ArgumentParser(description="Times naive, ours and transformers side by side.")
    parser.add_argument("--shapes", nargs="+", default=["stories42M", "mini", "stories260K"])
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--repeats", type=cli.positive_int, default=5)
    parser.add_argument("--threads", type=cli.positive_int, default=2)
    parser.add_argument("--out", default=str(ROOT / "results" / "speed.json"))
    parser.add_argument("--plot", action="store_true", help="also draw it, and time the growth")
    args = parser.parse_args(argv)
    from benchmarks.jobs import SHAPES

    for shape in args.shapes:
        if shape not in SHAPES:
            raise ValueError(f"--shapes {shape}: is not one of {', '.join(SHAPES)}")
    rates = measure_machine(args.repeats, args.threads)
    print({name: f"{rate / 1e9:.1f}e9" for name, rate in rates.items()}, flush=True)
    measured, growth = [], None
    with tempfile.TemporaryDirectory() as scratch:
        rows = [row for row in all_rows(scratch) if args.rows in row.name]
        for shape in args.shapes:
            counts = Counts(shape, rates)
            for row in rows:
                measured.append(measure_row(row, counts, args.repeats, args.threads))
                print(table(measured[-1:]).splitlines()[-1], flush=True)
    if args.plot:
        growth = measure_growth(args.shapes[0], args.repeats, args.threads)
    content = {
        "command": " ".join(["python -m benchmarks.run", *(sys.argv[1:] if argv is None else argv)]),
        "threads": args.threads,
        "repeats": args.repeats,
        "rates": rates,
        "rows": measured,
        "growth": growth,
    }
    with atomic_write(args.out) as file:
        file.write(json.dumps(content, indent=1) + "\n")
    print(table(measured), others(measured), sep="\n\n")
    print(check(measured, {row.name: row.targets for row in rows}))
    print(f"wrote {args.out}")
    if args.plot:
        from benchmarks.plot import plot

        print("wrote", *plot(content, Path(args.out).with_suffix("")))


if __name__ == "__main__":
    cli.run(main)
