"""The weights that a run may end in, while it trains: of its best epoch, or of its last ones.

They are files beside the run's own, so that an interrupted run still has them.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from formats.checkpoint import load_torch_file
from utils import save_torch_file

State = dict[str, torch.Tensor]


class Candidates:
    """With `n_last` the last so many epochs are kept, with 0 the best one."""

    def __init__(self, path: Path, n_last: int):
        self.path = path
        self.n_last = n_last

    def offer(self, epoch: int, is_best: bool, state: Callable[[], State]) -> None:
        """Keeps the weights of an epoch, of which `state` is called only if they are wanted."""
        if self.n_last:
            save_torch_file(self._of(f"epoch-{epoch}"), state())
            self._of(f"epoch-{epoch - self.n_last}").unlink(missing_ok=True)
        elif is_best:
            save_torch_file(self._of("best"), state())

    def states(self, n_epochs: int) -> Iterator[State]:
        """What is kept of a run of `n_epochs`, one at a time."""
        kept = [f"epoch-{epoch}" for epoch in range(max(0, n_epochs - self.n_last), n_epochs)]
        return (load_torch_file(self._of(name)) for name in (kept if self.n_last else ["best"]))

    def clear(self) -> None:
        for path in self.path.parent.glob(self.path.with_suffix(".epoch-*.pt").name):
            path.unlink()
        self._of("best").unlink(missing_ok=True)

    def _of(self, name: str) -> Path:
        return self.path.with_suffix(f".{name}.pt")
