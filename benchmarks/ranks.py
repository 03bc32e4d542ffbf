"""Time a finetuning step on one rank and on several, and keep it in the file of this processor.

    torchrun --nproc-per-node 2 -m benchmarks.ranks
    torchrun --nproc-per-node 2 -m benchmarks.ranks --shape mini --repeats 3
    torchrun --nproc-per-node 2 -m benchmarks.ranks --use_gpu --out OUT.json

One rank and all ranks take turns in one group of processes. A rank is a process with one thread, or
with one GPU.
"""

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.contenders import SHAPES, batches_of, make_classifier, make_data, make_optimizer
from benchmarks.report import Measured, keep, output_file, ranks_table
from fast.memory import keep_freed_memory
from training import distributed
from training.options import positive_int
from utils import ArgumentParser, pick_device, run_script

N_ROWS = 80  # sentences of a step: the assignment's batch


def make_step(
    shape: str, device: torch.device, is_alone: bool
) -> tuple[Callable[[], tuple[list[float], float]], int, int]:
    """Return a step in full mode without dropout, tokens of a row, and bytes of the gradients.

    A step returns the seconds of the forward pass, the backward pass and the update, and the loss
    of its rows.
    """
    (batch,) = batches_of(make_data("sst", N_ROWS, shape), N_ROWS)
    rows = list(range(N_ROWS)) if is_alone else distributed.shard(range(N_ROWS))
    ids, labels = (batch[key][rows].to(device) for key in ("token_ids", "labels"))
    model = make_classifier("ours", shape, "full").to(device).train()
    model.dropout.p = 0.0
    trained = model if is_alone else distributed.wrap(model)
    scale = 1 if is_alone else distributed.world_size()  # DDP takes the mean over ranks
    optimizer = make_optimizer("ours", model.parameters())

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def step() -> tuple[list[float], float]:
        times = [now()]
        loss = F.nll_loss(trained(ids), labels, reduction="sum") / N_ROWS
        times.append(now())
        (scale * loss).backward()
        times.append(now())
        optimizer.step()
        optimizer.zero_grad()
        times.append(now())
        return [end - start for start, end in itertools.pairwise(times)], loss.item()

    return step, ids.shape[1], sum(parameter.nbytes for parameter in model.parameters())


def measure(shape: str, repeats: int, device: torch.device) -> Measured:
    """Time each way to take a step; the wrapped model ends with this function (see `wrap`)."""
    n_ranks = distributed.world_size()
    alone, tokens_of_row, gradient_bytes = make_step(shape, device, is_alone=True)
    together, *_ = make_step(shape, device, is_alone=False)
    ways = {"one rank": (alone, 1)}
    if n_ranks > 1:
        ways |= {"ranks": (together, 1), "one rank, all threads": (alone, n_ranks)}
    seconds: dict[str, list[list[float]]] = {way: [] for way in ways}
    losses: dict[str, list[float]] = {way: [] for way in ways}
    for turn, way in itertools.product(range(1 + repeats), ways):
        distributed.barrier()  # all begin together
        (step, threads), loss = ways[way], 0.0
        torch.set_num_threads(threads)
        if distributed.is_main() or way == "ranks":
            parts, loss = step()
            seconds[way] += [parts] if turn else []  # the first turn does not count
        losses[way].append(distributed.all_sum(torch.tensor(loss)).item())
    return {
        "shape": shape, "row": "finetune", "device": device.type, "bf16": False,
        "n_cpus": os.cpu_count(), "n_ranks": n_ranks, "threads": 1, "n_rows": N_ROWS,
        "tokens_of_row": tokens_of_row, "gradient_bytes": gradient_bytes,
        "losses": losses, "seconds": seconds,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__, prog="python -m benchmarks.ranks")
    add = parser.add_argument
    add("--shape", default="stories42M", choices=SHAPES,
        help="model to time, with random weights (default: %(default)s)")  # fmt: skip
    add("--repeats", type=positive_int, default=5, metavar="N",
        help="turns of one rank and of all (default: %(default)s)")  # fmt: skip
    add("--use_gpu", action="store_true", help="use a GPU for each rank (default: the CPU)")
    add("--out", type=Path, metavar="FILE",
        help="file to add the times to (default: results/speed-<this processor>.json)")  # fmt: skip
    args = parser.parse_args(argv)
    keep_freed_memory()
    with distributed.process_group(args.use_gpu):
        out = output_file(args.out)
        measured = measure(args.shape, args.repeats, pick_device(args.use_gpu))
        measured["command"] = (
            f"torchrun --nproc-per-node {distributed.world_size()} -m benchmarks.ranks "
            f"--shape {args.shape} --repeats {args.repeats}{' --use_gpu' * args.use_gpu}"
        )
        if distributed.is_main():
            keep(out, "ranks", measured)
            print(ranks_table([measured]))


if __name__ == "__main__":
    run_script(main)
