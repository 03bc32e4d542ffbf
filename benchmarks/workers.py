"""Contenders that take turns, each in a process of its own.

So neither memory nor allocator settings are shared, and a drift of the machine's speed meets all.
"""

import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Sequence
from typing import Any

PAUSE = 0.1  # s before a turn: the threads of the process before wait for work by spinning
SHORTEST = 0.3  # s of work in a turn; shorter work is done again, and the mean counts


class Worker:
    """A contender of one row in its own process; `run` has it work once and waits."""

    def __init__(self, maker: str, contender: str, options: dict[str, Any], threads: int):
        self.name = f"{maker}, {contender}"
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, maker, contender, options, threads), daemon=True
        )
        self.process.start()
        theirs.close()
        self._receive()  # built

    def run(self, point: Any = None) -> tuple[float, Any]:
        """(seconds, result)"""
        self.pipe.send(("run", point))
        return self._receive()

    def stop(self) -> float:
        """Ends the process; returns the most memory it held, in MB."""
        self.pipe.send(("stop", None))
        peak = self._receive()
        self.process.join()
        return peak

    def _receive(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError as error:
            raise RuntimeError(f"{self.name}: its process ended, see above") from error


def _work(
    pipe: multiprocessing.connection.Connection,
    maker: str,
    contender: str,
    options: dict[str, Any],
    threads: int,
) -> None:
    import torch

    from benchmarks import jobs
    from utils import forget_peak_memory, peak_memory_mb

    torch.set_num_threads(threads)
    job = getattr(jobs, maker)(contender, **options)
    forget_peak_memory()  # building may take more, such as a second copy of the weights
    pipe.send("built")
    while True:
        what, point = pipe.recv()
        if what == "stop":
            pipe.send(peak_memory_mb())
            return
        time.sleep(PAUSE)
        started = time.perf_counter()
        result, n_times = job(point), 1
        while time.perf_counter() - started < SHORTEST:
            job(point)
            n_times += 1
        pipe.send(((time.perf_counter() - started) / n_times, result))


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
