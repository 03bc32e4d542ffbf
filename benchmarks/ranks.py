"""What one rank of a scaling row does: the same step alone, beside the others and with them.

    torchrun --nproc-per-node 2 -m benchmarks.ranks --shape mini --row pretrain --out FILE

All ways of a row take turns in one group of processes, so that a drift of the machine's speed meets
all; the processes that have no part in a turn sleep. `benchmarks.run` starts this and puts it into
words; `benchmarks.projection` reckons with it.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import cli
import distributed
from advanced.language_model import lm_loss
from benchmarks import jobs
from benchmarks.rows import Counts
from config import LlamaConfig
from distributed import ALONE, Ranks
from linear import linear
from llama import Llama
from optimizer import AdamW
from steps import precision, take_step
from utils import allow_tf32, atomic_write, keep_freed_memory, pick_device

BUCKET = 25 * 2**20  # bytes that DistributedDataParallel exchanges at once, its default
SIZES = (2**12, 2**16, 2**18, 2**20, 2**22, BUCKET)  # bytes exchanged alone
PARTS = ("forward", "backward", "update")
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
    """The ways to take a row's step, each of which a rank can be asked for again and again."""

    def __init__(self, make: Callable[[str, torch.device], Work], shape: str, ranks: Ranks,
                 threads: int, bf16: bool):  # fmt: skip
        self.ranks, self.threads, self.bf16 = ranks, threads, bf16
        self.work = make(shape, ranks.device)
        self.shared = make(shape, ranks.device) if ranks.size > 1 else self.work
        self.wrapped = ranks.wrap(self.shared.model)
        self.optimizers = {
            id(work): AdamW(work.model.parameters(), lr=jobs.LR)
            for work in (self.work, self.shared)
        }
        everything = list(range(self.work.n_rows))
        own = ranks.rows(self.work.n_rows)
        n, all_threads = ranks.size, threads * ranks.size
        self.ways: dict[str, Callable[[], list[float]]] = {
            "one rank": lambda: self._alone(everything, threads)
        }
        if n > 1:
            self.ways |= {
                "ranks": lambda: self._step(self.shared, self.wrapped, own, ranks),
                "apart": lambda: self._step(self.shared, self.wrapped, own, ranks, False),
                "one rank, a share": lambda: self._alone(own, threads),
                "one rank, all threads": lambda: self._alone(everything, all_threads),
            }
            weights = self.work.model.parameters()
            n_bytes = sum(weight.nbytes for weight in weights)
            self.ways["exchange"] = lambda: [self._exchange(n_bytes)]
            self.ways |= {f"exchange {size}": self._exchange_of(size) for size in SIZES}

    def take(self, way: str) -> list[float]:
        """Seconds of each part on the slowest rank, and of a step its loss over all ranks' rows."""
        self.ranks.sum(0.0)  # all begin together
        mine = self.ways[way]()
        each = [json.loads(text) for text in self.ranks.gather(json.dumps(mine).encode())]
        slowest = max(each, key=lambda parts: sum(parts[: len(PARTS)]))
        return slowest[: len(PARTS)] + ([sum(p[-1] for p in each)] if len(mine) > 1 else [])

    def _alone(self, rows: list[int], threads: int) -> list[float]:
        if not self.ranks.is_first:
            return [0.0] * (len(PARTS) + 1)
        torch.set_num_threads(threads)
        parts = self._step(self.work, self.work.model, rows, ALONE)
        torch.set_num_threads(self.threads)
        return parts

    def _step(self, work: Work, called: nn.Module, rows: list[int], ranks: Ranks,
              exchanged: bool = True) -> list[float]:  # fmt: skip
        started = self._now()
        with ranks.exchanging(called, is_last=exchanged):
            with precision(ranks.device, self.bf16):
                loss = work.loss_of(called, rows)
            forward = self._now()
            (loss * ranks.size).backward()
        backward = self._now()
        take_step([self.optimizers[id(work)]])
        updated = self._now()
        return [forward - started, backward - forward, updated - backward, loss.item()]

    def _exchange_of(self, n_bytes: int) -> Callable[[], list[float]]:
        return lambda: [self._exchange(n_bytes)]

    def _exchange(self, n_bytes: int) -> float:
        """Seconds to sum that many bytes of float32 over the ranks, bucket by bucket."""
        import torch.distributed as dist

        pieces = torch.zeros(n_bytes // 4, device=self.ranks.device).split(BUCKET // 4)
        started = self._now()
        for handle in [dist.all_reduce(piece, async_op=True) for piece in pieces]:
            handle.wait()
        return self._now() - started

    def _now(self) -> float:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
        return time.perf_counter()


def peak(device: torch.device, bf16: bool, repeats: int) -> float:
    """Operations per second of one large product, the best of the ways there are."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for multiply in (F.linear, linear):
        for _ in range(repeats + 1):
            started = time.perf_counter()
            multiply(a, b)[0, 0].item()
            best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def measure(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    turns = Turns(ROWS[args.row], args.shape, ranks, args.threads, args.bf16)
    first = {way: turns.take(way) for way in turns.ways}
    seconds: dict[str, list[list[float]]] = {way: [] for way in turns.ways}
    for _ in range(args.repeats):
        for way in turns.ways:
            seconds[way].append(turns.take(way)[: len(PARTS)])
    weights = dict(turns.work.model.named_parameters())
    (embedding,) = (weight for name, weight in weights.items() if "tok_embeddings" in name)
    rate = peak(ranks.device, args.bf16, args.repeats) if ranks.is_first else None
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
        "peak_operations_per_s": rate,
        "gradient_bytes": sum(weight.nbytes for weight in weights.values()),
        "embedding_bytes": embedding.nbytes,
        "losses": {way: first[way][-1] for way in ("one rank", "ranks") if way in first},
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
            measured = measure(args, ranks)
            if ranks.is_first:
                with atomic_write(args.out) as file:
                    file.write(json.dumps(measured) + "\n")


if __name__ == "__main__":
    cli.run(main)
