"""What 8, 64 and 1,024 devices would give, reckoned from what one and two of them took.

    python -m benchmarks.projection [--link GBIT_S MICROSECONDS]

writes benchmarks/README.md from the scaling rows of results/speed.json; with --link it prints the
tables for links of one's own instead. Nothing here is timed.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import cli
from benchmarks.ranks import BUCKET, ROWS, SIZES
from benchmarks.scaling import parts_of, scaling_table, seconds_of
from utils import atomic_write

ROOT = Path(__file__).resolve().parent.parent
SHAPE = "stories42M"
DEVICES = (8, 64, 1024)
FACTORS = (1, 1000)  # how many times as fast as the measured one a device is
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


LINKS = (Link.of(1, 50), Link.of(10, 20), Link.of(100, 5), Link.of(3600, 3))


@dataclass(frozen=True)
class Step:
    """A step on one device: seconds of its parts for `n_rows` rows, and what is exchanged of it."""

    forward: float
    backward: float
    update: float
    n_rows: int
    gradient_bytes: int
    late_bytes: int  # of these, what is only known at the end of the backward pass

    @classmethod
    def measured(cls, row: dict[str, Any]) -> "Step":
        parts = parts_of(row, "one rank")
        sizes = row["gradient_bytes"], row["embedding_bytes"]
        return cls(**parts, n_rows=row["n_rows"], gradient_bytes=sizes[0], late_bytes=sizes[1])

    def on_faster(self, factor: float) -> "Step":
        """On a device that does each part that many times as fast."""
        parts = self.forward / factor, self.backward / factor, self.update / factor
        return replace(self, forward=parts[0], backward=parts[1], update=parts[2])

    def seconds(self, n_rows: int, n: int, link: Link, hidden: bool) -> float:
        """With n_rows shared by n devices; the exchange hidden behind the backward pass or not.

        The device with the most rows decides. What is hidden is at most the backward pass long, and
        never `late_bytes`.
        """
        share = math.ceil(n_rows / n) / self.n_rows
        exchange = all_reduce_seconds(n, self.gradient_bytes, link)
        if hidden:
            late = all_reduce_seconds(n, self.late_bytes, link)
            exchange = late + max(0.0, exchange - late - share * self.backward)
        return share * (self.forward + self.backward) + self.update + exchange


@dataclass(frozen=True)
class Plan:
    """A training with steps of `n_rows` rows: of all devices or, with `is_each`, of each."""

    title: str
    step: Step
    n_rows: int
    is_each: bool = False

    def rows(self, n: int) -> int:
        return self.n_rows * n if self.is_each else self.n_rows

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


def all_reduce_seconds(n: int, n_bytes: int, link: Link) -> float:
    """Of a ring: each bucket goes round in 2 (n - 1) messages of 1 / n of it (Patarasuk and Yuan
    2009, J. Parallel Distrib. Comput. 69)."""
    messages = 2 * (n - 1)
    n_buckets = math.ceil(n_bytes / BUCKET)
    return messages / n * n_bytes / link.bytes_per_s + n_buckets * messages * link.latency


def fit_link(row: dict[str, Any]) -> Link:
    """The link between the two ranks of a row: least relative squares over the sizes exchanged."""
    seconds = np.array([seconds_of(row, f"exchange {size}") for size in SIZES])
    n = row["n_ranks"]
    terms = np.array([[2 * (n - 1), 2 * (n - 1) / n * size] for size in SIZES])
    (latency, per_byte), *_ = np.linalg.lstsq(
        terms / seconds[:, None], np.ones(len(SIZES)), rcond=None
    )
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
    low, high = (f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}" for value in (low, high))
    return low if low == high else f"{low} to {high}"


def plans(rows: list[dict[str, Any]], factor: float) -> list[Plan]:
    steps = {row["row"]: Step.measured(row).on_faster(factor) for row in rows}
    finetune, pretrain = steps["finetune"], steps["pretrain"]
    return [
        Plan("Finetuning, 80 sentences a step", finetune, 80),
        Plan("Finetuning, 80 sentences a step for each device", finetune, 80, is_each=True),
        Plan("Pretraining, 2,048 windows of 256 tokens a step", pretrain, PRETRAIN_WINDOWS),
    ]


def tables(rows: list[dict[str, Any]], links: Sequence[Link]) -> str:
    parts = []
    for factor in FACTORS:
        device = "as measured" if factor == 1 else f"{factor:,} times as fast"
        for plan in plans(rows, factor):
            parts += [f"**{plan.title}; a device is {device}**", table(plan, links)]
    return "\n\n".join(parts)


PAGE = """# Several devices

Written by `python -m benchmarks.projection` from the scaling rows of
[results/speed.json](../results/speed.json); edits are lost. With `--link 25 10` it prints the
tables below for a link of 25 Gbit/s and 10 µs instead.

## Measured

{measured}

A rank is a process of {threads} on a machine of {cores}; gradients go through gloo over the
loopback device. All ways of a row take turns in one group of processes, {repeats} times after a
turn that does not count; medians. `finetune` reads the assignment's 80 sentences as one padded
batch in full mode, `pretrain` 8 windows of 256 tokens; tokens include padding.

- *of the peak*: the rate of the model's products over that of one large product.
- *strong*: how many times faster the ranks take the step that one takes alone.
- *weak*: the time of one rank, alone, for its share, over that of all for theirs.
- *one process, all threads*: how many times faster that takes the step, without ranks.
- *exchange*: the time to sum the gradients alone, as a part of the ranks' step.
- *not hidden*: what the step gets shorter if nothing is exchanged, as a part of it. Below 0 it is
  the machine's noise.

The losses of one rank and of all together differ by {largest_difference:.0e} at most. Measured by

```bash
{commands}
```

On GPUs nothing was measured; there the same command takes `--use_gpu` and `--bf16`.

## Reckoned

A step of $B$ rows on $n$ devices, of which the busiest has $b = \\lceil B / n \\rceil$, takes

$$t(n) = b\\,(f + g) + u + x(n), \\qquad
r(n) = \\frac{{2 (n - 1)}}{{n}} \\frac{{S}}{{\\beta}} + 2 (n - 1)\\,k\\,\\alpha$$

where $f$ and $g$ are the seconds of a row forward and back, $u$ those of the update, and $r$ those
of the exchange of $S$ bytes in $k$ buckets, over links of $\\beta$ bytes/s and $\\alpha$ seconds a
message. Measured on one rank, for the shape of stories42M:

{parts}

and $S$ = {gradient_mb:.0f} MB, of which the embedding has {late_mb:.0f}. Assumed:

1. Devices are alike, none is late, and the network carries what all send at once.
2. A row takes as long however many there are. (Measured: half of the rows took {halves} of
   the time of all.)
3. Every device makes the whole update, in the time measured.
4. The exchange is a ring in buckets of 25 MiB of float32; each device sends and receives at the
   full rate (Patarasuk and Yuan 2009, J. Parallel Distrib. Comput. 69).
5. A cell's first number hides nothing of the exchange, $x = r$. Its second hides behind the
   backward pass all that fits there but the embedding's gradient, which is known only at its end.
6. The links are examples: bandwidths of two kinds of Ethernet, of InfiniBand, and of one direction
   of an H100's NVLink as its maker publishes it (900 GB/s both ways). Latencies are estimates.
7. A device of 1,000 times the measured one does each part 1,000 times as fast. None was measured.
8. Evaluation, reading data and writing files are not counted.

How far to trust it: with the link between the two ranks as it was measured
({own_links}) the formula gives {checks} of the
time that two ranks took. They share one memory, which separate devices do not.

A cell is how many times the rows a second of one device all of them have. The last row is the
largest power of two, 4,096 at most, whose devices have half of that each, nothing hidden.

{tables}

What follows:

- Where the batch stays at the assignment's 80 sentences, devices beyond 80 have no work, and the
  update, which every device makes in full, weighs the more the fewer rows each has. (Pretraining
  with `--shard` shares the update, too; that was not timed.)
- Where every device has 80 sentences of its own, SST's {n_sentences:,} give {steps} steps an
  epoch on {devices} devices: fast, but with hardly a step left to learn in, and
  larger batches want other learning rates (Goyal et al. 2017, arXiv 1706.02677). This data wants
  one machine.
- Half a million tokens a step are what many devices are for. The limits there are the update and,
  once devices are fast, the link.
"""


def page(rows: list[dict[str, Any]]) -> str:
    """benchmarks/README.md."""
    ours = [row for row in rows if row["shape"] == SHAPE]
    pairs = [row["losses"] for row in rows if len(row["losses"]) == 2]
    shares = [seconds_of(r, "one rank, a share") / seconds_of(r, "one rank") for r in ours]
    n_steps = [math.ceil(SST_SENTENCES / (80 * n)) for n in DEVICES]
    links = [fit_link(row) for row in ours]
    reckoned = [_two_ranks(r, link) for r, link in zip(ours, links, strict=True)]
    return PAGE.format(
        measured=scaling_table(rows),
        repeats=len(rows[0]["seconds"]["one rank"]),
        largest_difference=max(abs(pair["one rank"] - pair["ranks"]) for pair in pairs),
        commands="\n".join(dict.fromkeys(row["command"] for row in rows)),
        threads=_counted(rows[0]["threads"], "thread"),
        cores=_counted(rows[0]["n_cpus"], "core"),
        parts="\n".join(f"- {row['row']}: {_parts_in_words(row)}" for row in ours),
        gradient_mb=ours[0]["gradient_bytes"] / 1e6,
        late_mb=ours[0]["embedding_bytes"] / 1e6,
        halves=_listed(f"{share:.2f}" for share in shares),
        own_links="; ".join(map(str, links)),
        checks=_listed(f"{low:.2f} to {high:.2f}" for low, high in reckoned),
        tables=tables(ours, LINKS),
        n_sentences=SST_SENTENCES,
        steps=_listed(map(str, n_steps)),
        devices=_listed(f"{n:,}" for n in DEVICES),
    )


def _parts_in_words(row: dict[str, Any]) -> str:
    parts, n = parts_of(row, "one rank"), row["n_rows"]
    f, g, u = (1e3 * parts[name] for name in ("forward", "backward", "update"))
    return f"$f$ = {f / n:.1f} ms, $g$ = {g / n:.1f} ms, $u$ = {u:.0f} ms"


def _two_ranks(row: dict[str, Any], link: Link) -> list[float]:
    """What the formula gives for the ranks of a row over what they took: nothing hidden, all."""
    step, n, took = Step.measured(row), row["n_ranks"], seconds_of(row, "ranks")
    bounds = [step.seconds(row["n_rows"], n, link, hidden) / took for hidden in (False, True)]
    return sorted(bounds)


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def scaling_rows(path: Path) -> list[dict[str, Any]]:
    """Those of several ranks on a CPU; ValueError where what the page is about is missing."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in content.get("scaling", []) if row["device"] == "cpu" and not row["bf16"]]
    rows = [row for row in rows if row["n_ranks"] == 2]
    measured = {row["row"] for row in rows if row["shape"] == SHAPE}
    if absent := [name for name in ROWS if name not in measured]:
        raise ValueError(
            f"{path}: has no scaling row {_listed(absent)} of two ranks for {SHAPE}; measure with "
            "python -m benchmarks.run --rows scaling"
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = cli.ArgumentParser(prog="benchmarks.projection", description=__doc__.split("\n")[0])
    parser.add_argument("--link", nargs=2, type=cli.positive_float, action="append",
        metavar=("GBIT_S", "MICROSECONDS"), help="print the tables for this link")  # fmt: skip
    parser.add_argument("--speed", default=str(ROOT / "results" / "speed.json"))
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "README.md"))
    args = parser.parse_args(argv)
    rows = scaling_rows(Path(args.speed))
    if args.link:
        links = [Link.of(*numbers) for numbers in args.link]
        print(tables([row for row in rows if row["shape"] == SHAPE], links))
        return
    with atomic_write(args.out) as file:
        file.write(page(rows))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
