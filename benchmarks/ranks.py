"""What one rank of a scaling row does: the same step alone, beside the others and with them.

    torchrun --nproc-per-node 2 -m benchmarks.ranks --shape mini --row pretrain --out FILE

All ways of a row take turns in one group of processes, so that a drift of the machine's speed meets
all. On CPUs the processes that have no part in a turn sleep. `benchmarks.run` starts this and puts
it into words; `benchmarks.projection` reckons with it.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import cli
from benchmarks import jobs
from benchmarks.rows import Counts
from config import LlamaConfig
from fast.linear import linear
from llama import Llama
from optimizer import AdamW
from pretraining.loop import lm_loss
from training import distributed
from training.distributed import ALONE, Ranks
from training.steps import precision, take_step
from utils import allow_tf32, atomic_write, keep_freed_memory, pick_device

SIZES = (2**12, 2**16, 2**18, 2**20, 2**22, 25 * 2**20)  # bytes exchanged alone
SUMS = 3  # of a few numbers over the ranks, in a step of training: the loss, who saves, signals
PARTS = ("forward", "backward", "update", "waited")  # the last a part of backward
N_WINDOWS, WINDOW = 8, 256


@dataclass(frozen=True)
class Work:
    """A model, how many rows its step has, and the loss of some of them: a sum over those rows of
    what is divided by the number of all."""

    model: nn.Module
    n_rows: int
    tokens_of_row: int
    loss_of: Callable[[nn.Module, list[int]], torch.Tensor]


def finetune(shape: str, device: torch.device) -> Work:
    """The assignment's batch of 80 sentences, padded, in full mode; no dropout."""
    n = 80
    (batch,) = jobs.in_order(jobs.make_data("sst", n, shape), n)
    ids, labels = batch["token_ids"].to(device), batch["labels"].to(device)
    model = jobs.make_classifier("ours", shape, "full")
    model.dropout.p = 0.0

    def loss_of(called: nn.Module, rows: list[int]) -> torch.Tensor:
        return F.nll_loss(called(ids[rows]), labels[rows], reduction="sum") / n

    return Work(model.to(device).train(), n, ids.shape[1], loss_of)


def pretrain(shape: str, device: torch.device) -> Work:
    """Next-token training on windows."""
    config = LlamaConfig(**jobs.SHAPES[shape], attention="causal")
    torch.manual_seed(jobs.SEED)
    model = Llama(config).to(device).train()
    windows = torch.randint(jobs.PAD + 1, config.vocab_size, (N_WINDOWS, WINDOW + 1)).to(device)

    def loss_of(called: nn.Module, rows: list[int]) -> torch.Tensor:
        return lm_loss(called, windows[rows]) * len(rows) / N_WINDOWS

    return Work(model, N_WINDOWS, WINDOW, loss_of)


ROWS = {"finetune": finetune, "pretrain": pretrain}


def operations(work: Work, row: str, shape: str) -> float:
    """Floating-point operations of all rows, three passes, without elementwise work."""
    is_causal = row == "pretrain"
    lengths = [work.tokens_of_row] * work.n_rows
    n_logits = sum(lengths) if is_causal else 0
    return 3 * Counts(shape, rates={}).forward(lengths, n_logits, causal=is_causal)


class Turns:
    """The ways to take a row's step, and what it is made of; all ranks take each together."""

    def __init__(self, row: str, shape: str, ranks: Ranks, threads: int, bf16: bool):
        self.ranks, self.threads, self.bf16 = ranks, threads, bf16
        self.work = ROWS[row](shape, ranks.device)
        n_rows = self.work.n_rows
        if ranks.size > n_rows:
            raise ValueError(f"{row} has {n_rows} rows, too few for {ranks.size} ranks")
        own, everything = ranks.rows(n_rows), list(range(n_rows))
        alone = self._stepping(self.work, self.work.model, ALONE)
        self.ways: dict[str, Callable[[], list[float]]] = {
            "one rank": lambda: self._by_first(lambda: alone(everything)),
            "product": lambda: self._by_first(self._product),
        }
        if ranks.size == 1:
            return
        shared = ROWS[row](shape, ranks.device)
        wrapped = ranks.wrap(shared.model)
        self.buckets: list[int] = []  # bytes of each, in the order of the last step
        self.handed = 0.0  # when the last of them was handed over
        wrapped.register_comm_hook(None, self._exchange_bucket)
        together = self._stepping(shared, wrapped, ranks)
        self.ways |= {
            "ranks": lambda: together(own),
            "one rank, a share": lambda: self._by_first(lambda: alone(own)),
            "one rank, all threads": lambda: self._by_first(
                lambda: alone(everything), threads * ranks.size
            ),
        }
        n_bytes = sum(weight.nbytes for weight in shared.model.parameters())
        self.buffer = torch.zeros(max(n_bytes, *SIZES) // 4, device=ranks.device)
        self.ways["exchange"] = lambda: [self._exchange(self.buckets)]
        for size in SIZES:
            self.ways[f"exchange {size}"] = functools.partial(self._exchange_often, size)

    def take(self, way: str) -> list[list[float]]:
        """What the way gives on each rank."""
        self.ranks.sum(0.0)  # all begin together
        mine = json.dumps(self.ways[way]()).encode()
        return [json.loads(text) for text in self.ranks.gather(mine)]

    def _by_first(self, work: Callable[[], list[float]], threads: int | None = None) -> list[float]:
        """What the first rank does alone while the others wait; they give nothing."""
        if not self.ranks.is_first:
            return []
        torch.set_num_threads(threads or self.threads)
        try:
            return work()
        finally:
            torch.set_num_threads(self.threads)

    def _stepping(
        self, work: Work, called: nn.Module, ranks: Ranks
    ) -> Callable[[list[int]], list[float]]:
        """A step of some rows: seconds of `PARTS`, and the loss."""
        optimizer = AdamW(work.model.parameters(), lr=jobs.LR)

        def step(rows: list[int]) -> list[float]:
            started = self._now()
            with ranks.exchanging(called):
                with precision(ranks.device, self.bf16):
                    loss = work.loss_of(called, rows)
                (value,) = ranks.sum(loss.item())  # as training does, and twice below
                forward = self._now()
                (loss * ranks.size).backward()
            backward = self._now()
            take_step([optimizer])
            for _ in range(SUMS - 1):
                ranks.sum(0.0)
            updated = self._now()
            waited = backward - self.handed if ranks.size > 1 else 0.0
            parts = [forward - started, backward - forward, updated - backward, waited]
            return [*parts, value]

        return step

    def _exchange_bucket(
        self, _state: None, bucket: dist.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        """What DDP does with a bucket of gradients by itself, their mean, but noted.

        On CUDA devices it is handed over before it is computed, so what is waited includes that.
        """
        self.handed = time.perf_counter()
        if bucket.index() == 0:
            self.buckets = []
        self.buckets.append(bucket.buffer().nbytes)
        handle = dist.all_reduce(bucket.buffer().div_(self.ranks.size), async_op=True)
        return handle.get_future().then(lambda future: future.value()[0])

    def _exchange_often(self, size: int) -> list[float]:
        n_times = max(1, min(50, 2**22 // size))
        return [sum(self._exchange([size]) for _ in range(n_times)) / n_times]

    def _exchange(self, sizes: Sequence[int]) -> float:
        """Seconds to sum buckets of so many bytes of float32 over the ranks."""
        pieces = self.buffer[: sum(sizes) // 4].split([size // 4 for size in sizes])
        self.ranks.sum(0.0)
        started = self._now()
        for handle in [dist.all_reduce(piece, async_op=True) for piece in pieces]:
            handle.wait()
        return self._now() - started

    def _product(self) -> list[float]:
        """Seconds of one large product, by the faster of the two ways there are."""
        device = self.ranks.device
        size = product_size(device)
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = []
        for multiply in (F.linear, linear):
            started = self._now()
            multiply(a, b)[0, 0].item()
            seconds.append(self._now() - started)
        return [min(seconds)]

    def _now(self) -> float:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
        return time.perf_counter()


def product_size(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 2048


def in_all(way: str, of_ranks: list[list[float]]) -> list[float]:
    """What a turn took: of a step the parts of the slowest rank and the least that one waited for
    gradients (the others also wait for that rank), else the first rank's seconds."""
    if way != "ranks":
        return of_ranks[0]
    slowest = max(of_ranks, key=lambda parts: sum(parts[:3]))
    return [*slowest[:3], min(parts[3] for parts in of_ranks), slowest[4]]


def measure(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    turns = Turns(args.row, args.shape, ranks, args.threads, args.bf16)

    def take(way: str) -> list[float]:
        return in_all(way, turns.take(way))

    both = [way for way in ("one rank", "ranks") if way in turns.ways]
    losses = {way: [take(way)[-1] for _ in range(2)] for way in both}
    for way in turns.ways:
        if way not in both:
            take(way)  # does not count
    seconds: dict[str, list[list[float]]] = {way: [] for way in turns.ways}
    for _ in range(args.repeats):
        for way in turns.ways:
            seconds[way].append(take(way)[: len(PARTS)])
    return {
        "shape": args.shape,
        "row": args.row,
        "device": ranks.device.type,
        "bf16": args.bf16,
        "n_cpus": os.cpu_count(),
        "n_ranks": ranks.size,
        "threads": args.threads,
        "n_rows": turns.work.n_rows,
        "tokens_of_row": turns.work.tokens_of_row,
        "operations": operations(turns.work, args.row, args.shape),
        "product_operations": 2 * product_size(ranks.device) ** 3,
        "gradient_bytes": sum(weight.nbytes for weight in turns.work.model.parameters()),
        "bucket_bytes": turns.buckets if ranks.size > 1 else [],
        "losses": losses,
        "seconds": seconds,
    }


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.ArgumentParser(prog="benchmarks.ranks", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", required=True, choices=tuple(jobs.SHAPES))
    parser.add_argument("--row", required=True, choices=tuple(ROWS))
    parser.add_argument("--repeats", type=cli.positive_int, default=5)
    parser.add_argument("--threads", type=cli.positive_int, default=1, help="of a rank")
    parser.add_argument("--use_gpu", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", required=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    torch.set_num_threads(args.threads)
    allow_tf32()
    keep_freed_memory()
    with distributed.silent_but_first():
        pick_device(args.use_gpu)  # or a line that says why not
        with distributed.joined(args.use_gpu) as ranks:
            if args.use_gpu and ranks.device.type != "cuda":
                raise ValueError("--use_gpu: several ranks are for CUDA devices; leave it out")
            measured = measure(args, ranks)
            if ranks.is_first:
                with atomic_write(args.out) as file:
                    file.write(json.dumps(measured) + "\n")


if __name__ == "__main__":
    cli.run(main)
