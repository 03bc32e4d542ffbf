"""What 8, 64 and 1,024 devices would give, reckoned from what one and two of them took.

    python -m benchmarks.projection [--link GBIT_S MICROSECONDS]

writes benchmarks/README.md from the scaling rows of results/speed.json; with --link it prints the
tables for links of one's own instead. Nothing here is timed.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import cli
from benchmarks.ranks import ROWS, SIZES, SUMS
from benchmarks.scaling import Measured, name_of, parts_of, scaling_table, seconds_of
from utils import atomic_write

ROOT = Path(__file__).resolve().parent.parent
SHAPE = "stories42M"
DEVICES = (8, 64, 1024)
FASTER = {"as measured": (1, 1), "fast": (1000, 200)}  # times the products, times the memory
SST_SENTENCES = 8544
PRETRAIN_WINDOWS = 2048  # of 256 tokens


@dataclass(frozen=True)
class Link:
    """What every device can send and receive at once, and what a message takes beside its bytes."""

    bytes_per_s: float
    latency: float  # s

    @classmethod
    def of(cls, gbit_s: float, microseconds: float) -> "Link":
        return cls(gbit_s * 1e9 / 8, microseconds * 1e-6)

    def __str__(self) -> str:
        gbit_s, microseconds = self.bytes_per_s * 8 / 1e9, self.latency * 1e6
        return f"{gbit_s:,.{0 if gbit_s >= 10 else 1}f} Gbit/s, {microseconds:,.0f} µs"


LINKS = (Link.of(1, 50), Link.of(10, 20), Link.of(100, 5), Link.of(400, 3))


def all_reduce_seconds(n: int, buckets: Sequence[int], link: Link) -> float:
    """To sum buckets of so many bytes over n devices, by recursive halving and doubling (Thakur,
    Rabenseifner and Gropp 2005, Int. J. High Perform. Comput. Appl. 19): the bytes of a ring, in
    2 log2(n) messages a bucket where a ring has 2 (n - 1)."""
    n_messages = 2 * math.ceil(math.log2(n)) * len(buckets)
    return 2 * (n - 1) / n * sum(buckets) / link.bytes_per_s + n_messages * link.latency


@dataclass(frozen=True)
class Step:
    """A step on one device: seconds of its parts for `n_rows` rows, and the gradients' buckets."""

    forward: float
    backward: float
    update: float
    n_rows: int
    buckets: tuple[int, ...]  # bytes of each, as the backward pass completes them

    @classmethod
    def measured(cls, row: Measured) -> "Step":
        parts = parts_of(row, "one rank")
        seconds = (parts[name] for name in ("forward", "backward", "update"))
        return cls(*seconds, row["n_rows"], tuple(row["bucket_bytes"]))

    def on_faster(self, products: float, memory: float) -> "Step":
        """On a device of so many times the products, and for the update the bytes, a second."""
        forward, backward = self.forward / products, self.backward / products
        return replace(self, forward=forward, backward=backward, update=self.update / memory)

    def seconds(self, n_rows: int, n: int, link: Link, hidden: bool) -> float:
        """With n_rows shared by n devices; the exchange hidden behind the backward pass or not.

        The device with the most rows decides. What is hidden is at most the backward pass long, and
        never the last bucket. The sums of a few numbers are one message each.
        """
        share = math.ceil(n_rows / n) / self.n_rows
        exchange = all_reduce_seconds(n, self.buckets, link)
        if hidden:
            last = all_reduce_seconds(n, self.buckets[-1:], link)
            exchange = last + max(0.0, exchange - last - share * self.backward)
        sums = all_reduce_seconds(n, [0] * SUMS, link)
        return share * (self.forward + self.backward) + self.update + exchange + sums


@dataclass(frozen=True)
class Plan:
    """A training with steps of `n_rows` rows in all, or of so many for each device but `most`."""

    title: str
    step: Step
    n_rows: int
    most: int | None = None

    def rows(self, n: int) -> int:
        return self.n_rows if self.most is None else min(self.n_rows * n, self.most)

    def speedup(self, n: int, link: Link, hidden: bool) -> float:
        """Rows a second of n devices over those of one."""
        seconds = [self.step.seconds(self.rows(k), k, link, hidden) for k in (1, n)]
        return self.rows(n) / seconds[1] / (self.rows(1) / seconds[0])

    def most_devices(self, link: Link) -> int:
        """The largest power of two, 4,096 at most, that gives half its number, nothing hidden."""
        n = 1
        while n < 4096 and self.speedup(2 * n, link, hidden=False) >= n:
            n *= 2
        return n


def fit_link(row: Measured) -> Link:
    """The link between the ranks of a row: least relative squares over the sizes exchanged.

    ValueError where larger ones did not take longer.
    """
    n = row["n_ranks"]
    seconds = np.array([seconds_of(row, f"exchange {size}") for size in SIZES])
    a_byte, a_message = Link(1.0, 0.0), Link(math.inf, 1.0)
    terms = [
        [all_reduce_seconds(n, [size], link) for link in (a_byte, a_message)] for size in SIZES
    ]
    ones = np.ones(len(SIZES))
    (per_byte, latency), *_ = np.linalg.lstsq(np.array(terms) / seconds[:, None], ones, rcond=None)
    if per_byte <= 0:
        raise ValueError(f"{name_of(row)}: exchanging more took no longer; measure again")
    return Link(1 / float(per_byte), max(0.0, float(latency)))


def table(plan: Plan, links: Sequence[Link]) -> str:
    """Markdown: times the rows a second of one device, from nothing hidden to all that can be."""
    lines = ["| devices | " + " | ".join(map(str, links)) + " |", "|---" * (len(links) + 1) + "|"]
    for n in DEVICES:
        bounds = [[plan.speedup(n, link, hidden) for hidden in (False, True)] for link in links]
        lines.append(f"| {n:,} | " + " | ".join(_range(*pair) for pair in bounds) + " |")
    most = [plan.most_devices(link) for link in links]
    lines.append("| half of each up to | " + " | ".join(f"{n:,}" for n in most) + " |")
    return "\n".join(lines)


def _range(low: float, high: float) -> str:
    low, high = (f"{value:,.0f}" if value >= 9.95 else f"{value:.2g}" for value in (low, high))
    return low if low == high else f"{low} to {high}"


def plans(rows: list[Measured], products: float, memory: float) -> list[Plan]:
    steps = {row["row"]: Step.measured(row).on_faster(products, memory) for row in rows}
    finetune, pretrain = steps["finetune"], steps["pretrain"]
    each = "Finetuning, 80 sentences a step for each device, all of SST at most"
    return [
        Plan("Finetuning, 80 sentences a step", finetune, 80),
        Plan(each, finetune, 80, most=SST_SENTENCES),
        Plan("Pretraining, 2,048 windows of 256 tokens a step", pretrain, PRETRAIN_WINDOWS),
    ]


def tables(rows: list[Measured], links: Sequence[Link]) -> str:
    parts = []
    for device, factors in FASTER.items():
        for plan in plans(rows, *factors):
            parts += [f"**{plan.title}; devices {device}**", table(plan, links)]
    return "\n\n".join(parts)


PAGE = """# Several devices

Written by `python -m benchmarks.projection` from the scaling rows of
[results/speed.json](../results/speed.json); edits are lost. With `--link 25 10` it prints the
tables below for a link of 25 Gbit/s and 10 µs instead.

## Measured

{measured}

On CPUs a rank is a process of {threads} on a machine of {cores}; gradients go through gloo over the
loopback device. All ways of a row take turns in one group of processes, {repeats} times after a
turn that does not count; medians. `finetune` reads the assignment's 80 sentences as one padded
batch in full mode, `pretrain` 8 windows of 256 tokens; tokens include padding.

- *of the peak*: the rate of the model's products over that of one large product.
- *strong*: how many times faster the ranks take the step that one takes alone.
- *weak*: the time of one rank, alone, for its share, over that of all for theirs.
- *one process, all threads*: how many times faster that takes the step, without ranks.
- *exchange*: the time to sum the gradients with nothing beside it, as a part of the ranks' step.
- *waited*: from the last bucket of gradients handed over to the end of the backward pass, on the
  rank that waited least (the other waits for that one, too), as a part of the step. It is what the
  exchange costs beyond what the backward pass hides.

In two steps the losses of one rank and of all together differ by {largest_difference:.0e} at most.
Measured by

```bash
{commands}
```

{on_gpus}

## Reckoned

A step of $B$ rows on $n$ devices, of which the busiest has $b = \\lceil B / n \\rceil$, takes

$$t(n) = b\\,(f + g) + u + x(n) + 2\\,s\\,\\lceil\\log_2 n\\rceil\\,\\alpha, \\qquad
r(n) = \\frac{{2 (n - 1)}}{{n}} \\frac{{S}}{{\\beta}} + 2\\,k\\,\\lceil\\log_2 n\\rceil\\,\\alpha$$

where $f$ and $g$ are the seconds of a row forward and back, $u$ those of the update, and $r$ those
of the exchange of $S$ bytes in $k$ buckets, over links of $\\beta$ bytes/s and $\\alpha$ seconds a
message; $x$ is what of $r$ is not hidden, and $s$ = {n_sums} sums of a few numbers go with every
step of training. For the shape of stories42M $S$ = {gradient_mb:.0f} MB in $k$ = {n_buckets}
buckets, of which the last, with the embedding, has {last_mb:.0f} MB.

{parts}

The columns from *half the rows* on say how far to trust it: the time of half the rows over that of
all, where the formula has 0.5; the link between the two ranks, fitted to exchanges of 4 kB to 26
MB; and $r(2)$ and $t(2)$ with that link, nothing hidden, over what was measured. Two ranks on one
memory say nothing about $\\log_2 n$, and little about separate devices.

Assumed is:

1. Devices are alike, none is late, and the network carries what all send at once.
2. A row takes as long however many there are.
3. Every device makes the whole update, in the time that one rank alone takes for it.
4. Sums are taken by recursive halving and doubling (Thakur, Rabenseifner and Gropp 2005, Int. J.
   High Perform. Comput. Appl. 19), each device sending and receiving at the full rate, one bucket
   after the other. A ring sends the same bytes in $2 (n - 1)$ messages, not
   $2 \\lceil\\log_2 n\\rceil$: for 1,024 devices, {n_buckets} buckets and 3 µs it waits
   {ring_ms:.0f} ms for them, not {tree_ms:.1f}.
5. A cell's first number hides nothing of the exchange, $x = r$. Its second hides behind the
   backward pass all that fits there but the last bucket.
6. The links are examples: kinds of Ethernet and InfiniBand; their latencies are estimates.
7. "As measured" a device is one core: {own_gflops} GFLOP/s in the passes, {own_gbytes:.0f} GB/s in
   the update. A "fast" one has 1,000 times the first and 200 times the second, some
   {fast_tflops:.0f} TFLOP/s and {fast_tbytes:.1f} TB/s. None like that was measured.
8. Evaluation, reading data and writing files are not counted.

A cell is how many times the rows a second of one device all of them have. The last row is the
largest power of two, 4,096 at most, at which each device still does half of what one does alone,
nothing hidden.

{tables}

What follows:

- Where the batch stays at the assignment's 80 sentences, devices beyond 80 have no work, 64 take no
  less than two sentences' time, and the update, which every device makes in full, weighs the more
  the fewer rows each has. (Pretraining with `--shard` shares the update, too; that was not timed.)
- Where every device has 80 sentences of its own, SST's {n_sentences:,} are one step of {most_each}
  devices, and {n_steps} of 8. That is fast, but leaves hardly a step to
  learn in, and larger batches want other learning rates (Goyal et al. 2017, arXiv 1706.02677). This
  data wants one machine.
- Half a million tokens a step are what many devices are for. How many pay depends on the link:
  slow ones already limit devices as fast as those measured, and all of them limit fast devices.
"""

ON_GPUS = (
    "Rows of GPUs: a rank is a process of one device, and several exchange through nccl (one\n"
    "alone exchanges nothing); float32 is multiplied in TF32, the large product, too."
)
NOT_ON_GPUS = "On GPUs nothing was measured; there the same command takes `--use_gpu` and `--bf16`."
NUMBERS_MOVED = 7  # a parameter, by AdamW: theta, gradient, m and v read, theta, m and v written


def page(rows: list[Measured]) -> str:
    """benchmarks/README.md."""
    several = reckonable(rows)
    ours = [row for row in several if row["shape"] == SHAPE]
    buckets = ours[0]["bucket_bytes"]
    many, link = DEVICES[-1], LINKS[-1]
    per_message = len(buckets) * link.latency
    rates = [_passes_per_s(row) for row in ours]
    update = statistics.median(parts_of(row, "one rank")["update"] for row in ours)
    moved = NUMBERS_MOVED * ours[0]["gradient_bytes"] / update
    return PAGE.format(
        measured=scaling_table(rows),
        repeats=len(several[0]["seconds"]["one rank"]),
        largest_difference=max(_difference(row["losses"]) for row in several),
        commands="\n".join(dict.fromkeys(row["command"] for row in rows)),
        on_gpus=ON_GPUS if any(row["device"] == "cuda" for row in rows) else NOT_ON_GPUS,
        threads=_counted(several[0]["threads"], "thread"),
        cores=_counted(several[0]["n_cpus"], "core"),
        parts=parts_table(several),
        n_sums=SUMS,
        n_buckets=len(buckets),
        gradient_mb=sum(buckets) / 1e6,
        last_mb=buckets[-1] / 1e6,
        ring_ms=1e3 * 2 * (many - 1) * per_message,
        tree_ms=1e3 * 2 * math.log2(many) * per_message,
        own_gflops=" and ".join(f"{rate / 1e9:.0f}" for rate in rates),
        own_gbytes=moved / 1e9,
        fast_tflops=FASTER["fast"][0] * statistics.mean(rates) / 1e12,
        fast_tbytes=FASTER["fast"][1] * moved / 1e12,
        tables=tables(ours, LINKS),
        n_sentences=SST_SENTENCES,
        most_each=math.ceil(SST_SENTENCES / 80),
        n_steps=math.ceil(SST_SENTENCES / (80 * DEVICES[0])),
    )


def parts_table(rows: list[Measured]) -> str:
    """Markdown: what the formula stands on, and how near it comes to two ranks."""
    columns = ("shape", "row", "$f$ (ms)", "$g$ (ms)", "$u$ (ms)", "half the rows", "link")
    columns += ("$r(2)$ / measured", "$t(2)$ / measured")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        parts, link, step = parts_of(row, "one rank"), fit_link(row), Step.measured(row)
        n, n_rows = row["n_ranks"], row["n_rows"]
        cells = [f"{1e3 * parts[name] / n_rows:.2f}" for name in ("forward", "backward")]
        cells += [f"{1e3 * parts['update']:.0f}"]
        half = seconds_of(row, "one rank, a share") / seconds_of(row, "one rank")
        exchange = all_reduce_seconds(n, row["bucket_bytes"], link)
        exchange /= seconds_of(row, "exchange")
        whole = step.seconds(n_rows, n, link, hidden=False) / seconds_of(row, "ranks")
        cells += [f"{half:.2f}", str(link), f"{exchange:.2f}", f"{whole:.2f}"]
        lines.append(f"| {row['shape']} | {name_of(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _passes_per_s(row: Measured) -> float:
    parts = parts_of(row, "one rank")
    return row["operations"] / (parts["forward"] + parts["backward"])


def _difference(losses: dict[str, list[float]]) -> float:
    pairs = zip(losses["one rank"], losses["ranks"], strict=True)
    return max(abs(alone - together) for alone, together in pairs)


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def reckonable(rows: list[Measured]) -> list[Measured]:
    """Those of two ranks on a CPU, in float32; ValueError where they were not measured alike, or
    what the page is about is missing."""
    rows = [row for row in rows if row["device"] == "cpu" and not row["bf16"]]
    rows = [row for row in rows if row["n_ranks"] == 2]
    found = {row["row"] for row in rows if row["shape"] == SHAPE}
    if absent := [name for name in ROWS if name not in found]:
        raise ValueError(
            f"there is no scaling row {' and '.join(absent)} of two ranks for {SHAPE}; measure "
            "with python -m benchmarks.run --rows scaling"
        )
    how = {(row["threads"], row["n_cpus"], len(row["seconds"]["ranks"])) for row in rows}
    if len(how) > 1:
        raise ValueError(
            "the scaling rows differ in threads, cores or repeats; measure all of them again"
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = cli.ArgumentParser(prog="benchmarks.projection", description=__doc__.split("\n")[0])
    parser.add_argument("--link", nargs=2, type=cli.positive_float, action="append",
        metavar=("GBIT_S", "MICROSECONDS"), help="print the tables for this link")  # fmt: skip
    parser.add_argument("--speed", default=str(ROOT / "results" / "speed.json"))
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "README.md"))
    args = parser.parse_args(argv)
    rows = json.loads(Path(args.speed).read_text(encoding="utf-8")).get("scaling", [])
    try:
        several = reckonable(rows)
    except ValueError as error:
        raise ValueError(f"{args.speed}: {error}") from error
    if args.link:
        links = [Link.of(*numbers) for numbers in args.link]
        print(tables([row for row in several if row["shape"] == SHAPE], links))
        return
    with atomic_write(args.out) as file:
        file.write(page(rows))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
