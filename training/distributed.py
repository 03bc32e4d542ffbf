"""Train one model in several processes, each on its share of every batch.

Start them with `torchrun --nproc-per-node 2 run_llama.py --option finetune ...`. PyTorch's
DistributedDataParallel (Li et al. 2020, arXiv 2006.15704) averages their gradients. Without
torchrun every function here does nothing. All processes must call `all_sum`, `barrier`,
`require_same` and the wrapped model in the same order; rank 0 alone prints and writes files.
"""

import contextlib
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from utils import InputError, command_name

Item = TypeVar("Item")


def is_launched() -> bool:
    """Return whether torchrun started this process."""
    variables = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return dist.is_available() and variables <= os.environ.keys()


def rank() -> int:
    return int(os.environ["RANK"]) if is_launched() else 0


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def is_main() -> bool:
    """Return whether this process prints and writes files."""
    return rank() == 0


@contextlib.contextmanager
def process_group(use_gpu: bool) -> Iterator[None]:
    """Connect the processes that torchrun started; only rank 0 prints.

    An InputError is reported once for each machine. With `use_gpu` each process takes the CUDA
    device of its local rank.
    """
    if not is_launched():
        yield
        return
    with contextlib.ExitStack() as stack:
        if not is_main():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        # Imported later, as DistributedDataParallel does, its default arguments hold the group: the
        # threads of gloo would outlive it, and sometimes abort when Python exits.
        importlib.import_module("torch.distributed.nn")
        try:
            dist.init_process_group(_take_device() if use_gpu else "gloo")
            yield
        except InputError:
            if os.environ.get("LOCAL_RANK") != "0":  # every rank raises it; local rank 0 reports it
                sys.exit(2)
            raise
    dist.destroy_process_group()  # not after an error: nccl would wait for the others


def _take_device() -> str:
    """Take the CUDA device of the local rank, if there is CUDA; return the backend."""
    if not torch.cuda.is_available():
        return "gloo"
    n_processes, n_devices = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if n_processes > n_devices:
        raise InputError(
            f"{n_processes} processes for {n_devices} CUDA devices; each process needs one, so "
            "lower --nproc-per-node"
        )
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return "nccl"


def say(line: str) -> None:
    """Print `line` to standard error on rank 0."""
    if is_main():
        print(f"{command_name()}: {line}", file=sys.stderr)


def require_single_process(what: str) -> None:
    if world_size() > 1:
        raise InputError(f"{what} runs in one process; start it without torchrun")


def shard(items: Sequence[Item]) -> list[Item]:
    """Return this process's items; the shares of any two processes differ by one item at most."""
    return list(items[rank() :: world_size()])


def shard_batch(batch: dict[str, Any], masks_padding: bool) -> tuple[dict[str, Any], int]:
    """Return this process's rows of a batch and their weight, 1.

    A process without rows computes the first row with weight 0, because every process must take
    part in the exchange of gradients.
    """
    if world_size() == 1:
        return batch, 1
    rows = shard(range(len(batch["sents"])))
    chosen = rows or [0]
    own = {key: batch[key][chosen] for key in ("token_ids", "labels", "lengths")}
    if masks_padding:  # otherwise the padding of the whole batch is read
        own["token_ids"] = own["token_ids"][:, : int(own["lengths"].max())]
    return own, int(bool(rows))


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a CPU tensor over all processes."""
    if world_size() == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    values = values.to(device, copy=True)
    dist.all_reduce(values)
    return values.cpu()


def barrier() -> None:
    """Wait until every process is here."""
    all_sum(torch.zeros(1))


def wrap(model: nn.Module, has_unused_parameters: bool = False) -> nn.Module:
    """Return the model with gradients averaged over the processes in each backward pass.

    Set `has_unused_parameters` if some parameter never gets a gradient. Drop every reference to the
    wrapped model inside `process_group`: if it outlives the group, it may wait forever for the
    threads of gloo.
    """
    if world_size() == 1:
        return model
    wrapped = nn.parallel.DistributedDataParallel(
        model, find_unused_parameters=has_unused_parameters
    )
    if hasattr(model, "reads_lengths"):
        wrapped.reads_lengths = model.reads_lengths
    return wrapped


def require_same(settings: dict[str, Any]) -> None:
    """Raise InputError on every process if one was started with other settings or data."""
    if world_size() == 1:
        return
    text = json.dumps(settings, sort_keys=True, default=str)
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
    digests = torch.zeros(world_size(), dtype=torch.int64)
    digests[rank()] = digest
    digests = all_sum(digests)
    different = [i for i, other in enumerate(digests.tolist()) if other != digests[0]]
    if different:
        raise InputError(
            f"ranks {different} were started with options or data files that differ from rank 0's"
        )
