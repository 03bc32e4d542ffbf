"""What a finetuning run needs in order to go on, and the file that keeps it.

The file lies beside the run's checkpoint until its last output is written, is plain data, and is
replaced whole. What is drawn at random is where it was, too, so that a resumed run ends in the same
weights as an uninterrupted one, bit for bit (on the same machine, with as many threads).
"""

import copy
import itertools
import os
import shutil
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from formats.checkpoint import load_torch_file, require_finite
from training.distributed import ALONE, Ranks
from utils import differences, random_state, real_path, save_torch_file, set_random_state


@dataclass(frozen=True)
class EpochReport:
    epoch: int
    train_loss: float  # mean over batches of what was minimized: NLL summed / batch size, and more
    train_accuracy: float
    dev_accuracy: float

    def in_words(self) -> str:
        return (
            f"epoch {self.epoch}: train loss :: {self.train_loss:.3f}, "
            f"train acc :: {self.train_accuracy:.3f}, dev acc :: {self.dev_accuracy:.3f}"
        )


@dataclass
class Place:
    """How far a run is. An epoch whose batches are all trained on has yet to be evaluated."""

    epoch: int = 0
    n_batches: int = 0  # of this epoch that were trained on
    loss_sum: float = 0.0  # over them
    n_right: int = 0  # examples among them that were classified right while training
    order: torch.Tensor | None = None  # the shuffling generator's state when the epoch began
    history: list[dict[str, Any]] = field(default_factory=list)  # a report for each epoch before

    @classmethod
    def of_file(cls, values: dict[str, Any]) -> "Place":
        """What `vars` gave before it was saved; an error of _WRONG for anything else."""
        place = cls(**values)
        reports = [EpochReport(**report) for report in place.history]
        counts = [place.epoch, place.n_batches, place.n_right, *(one.epoch for one in reports)]
        measured = [(one.train_loss, one.train_accuracy, one.dev_accuracy) for one in reports]
        numbers = [place.loss_sum, *itertools.chain.from_iterable(measured)]
        if any(type(n) is not int or n < 0 for n in counts):
            raise ValueError("counts below 0, or no counts")
        if any(type(x) is not float for x in numbers):
            raise TypeError("a loss or an accuracy that is no number")
        torch.Generator().set_state(place.order)
        return place


def state_path(checkpoint: str | os.PathLike) -> Path:
    """finetune-sst-5-2e-05.pt -> finetune-sst-5-2e-05.state.pt"""
    return Path(checkpoint).with_suffix(".state.pt")


def require_same_settings(path: Path, saved: Any, settings: dict[str, Any]) -> None:
    """A ValueError that names all in which the run at `path` is not the one with `settings`."""
    try:
        differing = differences(saved, settings)
    except (AttributeError, RuntimeError) as error:  # no dict, or a tensor for a number
        raise ValueError(f"{path}: is no state of a run; delete it") from error
    if differing:
        raise ValueError(
            f"{path}: is of another run ({differing}); take that run's options, or delete the file"
        )


# What comes of values of other kinds than a state has, here and in PyTorch's, Python's and NumPy's.
_WRONG = (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError)
DIVERGED = "lower --lr or set --max_grad_norm (what was saved before is kept)"


def require_not_diverged(model: nn.Module) -> None:
    """A ValueError where a weight is no number any more: no such model is kept."""
    require_finite(dict(model.named_parameters()), DIVERGED)


class Keeper:
    """Keeps the state of one run in `path`, a save being due every `minutes`.

    Without `resume` the file of another run is a ValueError, as this one would replace it. With
    it `place` is where to go on, after `restore`; a run with other `settings` is a ValueError, and
    where there is no file the run begins at its beginning. Of several `ranks` the first has the
    file; they may be more or fewer than when it was written, in which case dropout goes on with
    other masks.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        settings: dict[str, Any],
        resume: bool = False,
        minutes: float = 5.0,
        ranks: Ranks = ALONE,
    ):
        self.path = Path(path)
        self.settings = settings
        self.minutes = minutes
        self.saved_at = time.monotonic()
        self.place = Place()
        self.is_resumed = False
        self.ranks = ranks
        self._saved: dict[str, Any] = {}
        if not ranks.of_first(self.path.exists())[0]:
            return
        if not resume:
            raise ValueError(
                f"{self.path}: keeps a run that was interrupted; --resume continues it, "
                "and deleting this file lets a new one begin"
            )
        with ranks.copy_of(self.path) as path:
            self._saved = load_torch_file(path)
        require_same_settings(self.path, self._saved.get("settings"), settings)
        try:
            self.place = Place.of_file(self._saved["place"])
        except _WRONG as error:
            raise self._damaged() from error
        self.is_resumed = True

    def restore(
        self, model: nn.Module, optimizer: Optimizer, regularizer: nn.Module | None = None
    ) -> Place:
        """Puts weights, optimizer and random numbers where they were and says where that is."""
        saved, self._saved = self._saved, {}
        if saved:
            with warnings.catch_warnings():  # of what a damaged file makes PyTorch do
                warnings.simplefilter("ignore")
                try:
                    self._put_back(saved, model, optimizer, regularizer)
                except _WRONG as error:
                    raise self._damaged() from error
        return self.place

    def _put_back(
        self,
        saved: dict[str, Any],
        model: nn.Module,
        optimizer: Optimizer,
        regularizer: nn.Module | None,
    ) -> None:
        model.load_state_dict(saved["model"])
        if regularizer is not None:
            regularizer.load_state_dict(saved["regularizer"])
        names = tuple(optimizer.defaults)  # to which loading adds PyTorch's own
        # Copied: what is loaded is mapped from the file, which is about to be replaced.
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        _require_steppable(optimizer, names)
        set_random_state(saved["random"])
        if self.ranks.size > 1:
            self.ranks.set_random_states(saved.get("random_of_ranks", []), self._seed())

    def is_due(self) -> bool:
        """Whether the last save is `minutes` or more ago."""
        return time.monotonic() - self.saved_at >= 60 * self.minutes

    def save(
        self,
        place: Place,
        model: nn.Module,
        optimizer: Optimizer,
        regularizer: nn.Module | None = None,
    ) -> None:
        """Refuses weights that are not finite, so that the last good state stays.

        All ranks call it, and the first one writes.
        """
        require_not_diverged(model)
        random_of_ranks = self.ranks.random_states() if self.ranks.size > 1 else None
        if not self.ranks.is_first:  # whose clock says when the next is due
            return
        state = {
            "settings": self.settings,
            "place": vars(place),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": random_state(),
        }
        if random_of_ranks is not None:
            state["random_of_ranks"] = random_of_ranks
        if regularizer is not None:
            state["regularizer"] = regularizer.state_dict()
        save_torch_file(self.path, state)
        self.saved_at = time.monotonic()

    def _seed(self) -> int:
        """Of dropout where a run goes on with other ranks: the same for the same place."""
        return hash((self.place.epoch, self.place.n_batches)) % 2**32

    def _damaged(self) -> ValueError:
        return ValueError(f"{self.path}: is damaged, or of another version; delete it")


def _require_steppable(optimizer: Optimizer, names: tuple[str, ...]) -> None:
    """An error of _WRONG where a loaded AdamW would fail in its next step."""
    for group in optimizer.param_groups:
        hyperparameters = {name: group[name] for name in names}
        if any(isinstance(value, torch.Tensor) for value in hyperparameters.values()):
            raise TypeError("a tensor for a number")
        peak = group.get("initial_lr", group["lr"])
        type(optimizer)(group["params"], **{**hyperparameters, "lr": peak})  # checks them
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if state == {}:  # of a parameter that has had no gradient yet
                continue
            if type(state["step"]) is not int or not 0 < state["step"] < 2**31:
                raise ValueError("a step that is no count")
            if not state["m"].shape == state["v"].shape == parameter.shape:
                raise ValueError("moments of another shape")


def require_space(checkpoint: str | os.PathLike, n_parameters: int, n_kept: int = 1) -> None:
    """A ValueError, before the work, where the disk cannot hold what a run will keep.

    That is the checkpoint, or `n_kept` of its size, the state (weights and AdamW's m and v) and,
    until it replaces it, the state's successor, all of float32 numbers.
    """
    checkpoint = real_path(checkpoint)
    held = [path for path in (checkpoint, state_path(checkpoint)) if path.is_file()]
    needed = 4 * n_parameters * (n_kept + 3 + 3) - sum(path.stat().st_size for path in held)
    free = shutil.disk_usage(checkpoint.parent).free
    if free < needed:
        raise ValueError(
            f"{checkpoint.parent}: has {free / 1e6:,.0f} MB free, training needs "
            f"{needed / 1e6:,.0f} MB there for its checkpoint and state; make room"
        )
