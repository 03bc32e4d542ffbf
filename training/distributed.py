"""Several processes that train one model, each on its share of every batch.

    torchrun --nproc-per-node 2 run_llama.py --option finetune ...

starts them and tells each its rank by environment variables. PyTorch's DistributedDataParallel (Li
et al. 2020, arXiv 2006.15704) takes the mean of their gradients; what is said, agreed upon and
shared beside that is here. Started without torchrun all of it is `ALONE`, for which nothing happens
and nothing of torch.distributed is imported.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.interrupts import Stopped, held_back, ignore_all
from utils import differences

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets for each
CPU = torch.device("cpu")
PATIENCE = timedelta(minutes=5)  # for another rank to come to where this one waits


class MachineError(ValueError):
    """An error that all ranks of one machine meet, and none of another; their first prints it."""


class PeerLostError(Exception):
    """Another process of the run ended, or does not answer."""


class Ranks:
    """The processes of a run as one of them sees them: it is `rank` of `size`.

    All of them must call what exchanges something, in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device = CPU):
        self.rank = rank
        self.size = size
        self.device = device

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module, has_unused: bool = False) -> nn.Module:
        """The model, called as before, with gradients that are the mean over the ranks.

        `has_unused` says that some parameter never gets one.
        """
        if self.size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        with _peers():
            wrapped = DistributedDataParallel(
                model,
                gradient_as_bucket_view=True,
                find_unused_parameters=has_unused,
            )
        if hasattr(model, "reads_lengths"):
            wrapped.reads_lengths = model.reads_lengths
        return wrapped

    def rows(self, n: int) -> list[int]:
        """This rank's share of n rows, of which any two ranks' differ by one at most."""
        return list(range(self.rank, n, self.size))

    def sum(self, *values: float) -> list[float]:
        """Each value, summed over the ranks, in float64."""
        if self.size == 1:
            return [float(value) for value in values]
        return self.sum_of(torch.tensor(values, dtype=torch.float64)).tolist()

    def sum_of(self, values: torch.Tensor) -> torch.Tensor:
        """A tensor on the CPU, summed over the ranks."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        with _peers():
            values = values.to(self.device, copy=True)
            dist.all_reduce(values)
        return values.cpu()

    def gather(self, content: bytes) -> list[bytes]:
        """What each rank hands over, by rank."""
        if self.size == 1:
            return [content]
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(content)
        lengths = self.sum_of(lengths).tolist()
        table = torch.zeros(self.size, max(lengths), dtype=torch.uint8)
        if content:
            mine = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            table[self.rank, : len(content)] = mine
        rows = self.sum_of(table).numpy()
        return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """What goes wrong here with one rank goes wrong with all, and the first says it.

        What is in this context may not exchange anything.
        """
        if self.size == 1:
            yield
            return
        error = None
        try:
            yield
        except (ValueError, OSError) as caught:
            error = caught
        texts = [text.decode() for text in self.gather(_text(error).encode())]
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
            if text:
                raise ValueError(f"rank {rank}: {text}")

    def require_same(self, settings: dict[str, Any]) -> None:
        """ValueError on all ranks that names in what the settings of one are not the first's."""
        texts = [json.loads(text) for text in self.gather(json.dumps(settings).encode())]
        for rank, theirs in enumerate(texts):
            differing = differences(texts[0], theirs)
            if differing:
                differing = differing.replace(" there, ", " on rank 0, ")
                raise ValueError(
                    f"rank {rank} was started otherwise than rank 0: "
                    f"{differing.replace(' here', f' on rank {rank}')}"
                )

    @contextlib.contextmanager
    def copy_of(self, path: Path | str) -> Iterator[Path]:
        """A file that the first rank has, for as long as this context lasts."""
        if self.size == 1:
            yield Path(path)
            return
        import torch.distributed as dist

        content = Path(path).read_bytes() if self.is_first else b""
        (length, *_) = self.sum(len(content))
        buffer = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_first:
            buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        with _peers():
            buffer = buffer.to(self.device)
            dist.broadcast(buffer, 0)
        if self.is_first:
            yield Path(path)
            return
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / Path(path).name
            copy.write_bytes(buffer.cpu().numpy().tobytes())
            yield copy

    def random_states(self) -> list[torch.Tensor]:
        """Where the generator of dropout is, of each rank."""
        state = self._random_state()
        content = self.gather(state.numpy().tobytes())
        return [torch.frombuffer(bytearray(one), dtype=torch.uint8) for one in content]

    def _random_state(self) -> torch.Tensor:
        cuda = self.device.type == "cuda"
        return torch.cuda.get_rng_state(self.device) if cuda else torch.get_rng_state()

    def set_random_states(self, states: list[torch.Tensor], seed: int) -> None:
        """Goes back to what `random_states` gave; to numbers from `seed` if there were more ranks
        or fewer."""
        if len(states) != self.size:
            self.seed_apart(seed)
        elif self.device.type == "cuda":
            torch.cuda.set_rng_state(states[self.rank], self.device)
        else:
            torch.set_rng_state(states[self.rank])

    def seed_apart(self, seed: int) -> None:
        """Other dropout masks on every rank; the first goes on with its own."""
        if not self.is_first:
            torch.manual_seed((seed + 1_000_003 * self.rank) % 2**63)

    def of_first(self, *values: float) -> list[float]:
        """The first rank's values, for all."""
        return self.sum(*(value if self.is_first else 0.0 for value in values))

    @contextlib.contextmanager
    def exchanging(self, wrapped: nn.Module, is_last: bool = True) -> Iterator[None]:
        """The context of a pass forward and back: gradients are exchanged in the last of a step,
        those of a model that is cut in each."""
        if self.size == 1:
            yield
            return
        from torch.nn.parallel import DistributedDataParallel

        with contextlib.ExitStack() as stack:
            stack.enter_context(_peers())
            # A model that is cut exchanges in each pass, or every rank would hold a whole gradient.
            if isinstance(wrapped, DistributedDataParallel) and not is_last:
                stack.enter_context(wrapped.no_sync())
            yield

    @contextlib.contextmanager
    def signals(self) -> Iterator["Signals"]:
        """Of one process signals come as ever; of several they wait, so that no rank leaves the
        others waiting."""
        if self.size == 1:
            yield Signals(self)
            return
        with held_back() as waiting:
            yield Signals(self, waiting)


class Signals:
    """What a loop does about Ctrl-C and SIGTERM: `held_back` in a step, `heed` between steps."""

    def __init__(self, ranks: Ranks, waiting: list[int] | None = None):
        self.ranks = ranks
        self.waiting = waiting

    def held_back(self) -> contextlib.AbstractContextManager:
        return held_back() if self.waiting is None else contextlib.nullcontext()

    def heed(self) -> None:
        """`Stopped` on all ranks where a signal waits on one of them."""
        if self.waiting is not None and self.ranks.sum(bool(self.waiting))[0]:
            raise Stopped(self.waiting[0] if self.waiting else signal.SIGTERM)


def _text(error: Exception | None) -> str:
    """As `cli.run` would put it."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror or error}"
    return "" if error is None else str(error)


ALONE = Ranks()


def is_launched() -> bool:
    return all(name in os.environ for name in VARIABLES)


def require_alone(what: str) -> None:
    """ValueError, from one of them, where torchrun started several processes for what one does."""
    if is_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        if os.environ["RANK"] != "0":
            sys.exit(2)
        raise ValueError(f"{what} runs in one process; start it without torchrun")


@contextlib.contextmanager
def silent_but_first() -> Iterator[None]:
    """What all ranks would print is printed by the first alone."""
    if not is_launched() or os.environ["RANK"] == "0":
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            yield
        except (ValueError, OSError, Stopped) as error:  # which all ranks have, or are told
            if isinstance(error, MachineError) and os.environ.get("LOCAL_RANK") == "0":
                raise
            sys.exit(error.exit_code if isinstance(error, Stopped) else 2)


@contextlib.contextmanager
def joined(use_gpu: bool) -> Iterator[Ranks]:
    """The ranks that torchrun started, met; `ALONE` without it.

    Where another rank is lost the first one says so, in a ValueError.
    """
    if not is_launched():
        yield ALONE
        return
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), _meet(use_gpu))
    try:
        yield ranks
        _part()
    except PeerLostError as lost:
        raise ValueError(
            "another process of this run ended or does not answer; what was saved is kept, and the "
            "same command with --resume goes on from it"
        ) from lost


def _meet(use_gpu: bool) -> torch.device:
    import torch.distributed as dist

    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    device, group = torch.device("cpu"), {"backend": "gloo"}
    if use_gpu and torch.backends.mps.is_available():
        raise ValueError("--use_gpu: Apple's MPS serves one process; start it without torchrun")
    if use_gpu and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        n_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if n_ranks > torch.cuda.device_count():
            raise MachineError(
                f"processes on this machine: {n_ranks}, CUDA devices: {torch.cuda.device_count()}; "
                "each takes a device of its own, so lower --nproc-per-node"
            )
        torch.cuda.set_device(device)
        group = {"backend": "nccl", "device_id": device}  # else nccl guesses it, with a warning
    try:
        dist.init_process_group(**group, timeout=PATIENCE)
    except (dist.DistError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot meet the others at "
            f"{where}: {reason}; is the port free, and was every rank started?"
        ) from error
    return device


def _part() -> None:
    import torch.distributed as dist

    with _peers():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """Here the errors of the exchange are a PeerLostError: gloo's are told apart by their text.

    torchrun then sends SIGTERM to those who are left, which may come before they have said so.
    """
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            ignore_all()
            raise PeerLostError(str(error)) from error
        raise
