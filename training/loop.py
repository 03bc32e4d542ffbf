"""Train one classifier: the loop, its loss, its learning rates."""

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from formats.checkpoint import require_finite
from optimizer import AdamW
from training import distributed
from training.dataset import SentenceDataset, make_train_loader
from training.evaluation import evaluate, forward_pass
from training.schedule import learning_rate_factor, parameter_groups, symmetric_kl, take_step
from training.state import StateFile, random_state, set_random_state, stop_requests
from utils import InputError


class DivergedError(InputError):
    """A loss or a weight is not finite."""


REMEDY = "lower --lr or set --max_grad_norm (what was saved before is kept)"


@dataclass(frozen=True)
class Recipe:
    """How to train beyond epochs, batch size and learning rate; the defaults are the assignment's.

    `warmup` is the share of all steps over which the learning rate rises; with `lr_decay`, "linear"
    or "cosine", it then falls to 0. `layer_decay` is described at `parameter_groups`.
    `max_grad_norm` clips gradients. `bf16` computes in bfloat16 and keeps float32 weights.
    `running_train_acc` counts the train accuracy during the training passes, dropout included,
    instead of in a further pass. `patience` ends the training after that many epochs in a row
    without a new best dev accuracy.

    `label_smoothing` mixes that share of the uniform distribution into the labels (Szegedy et al.
    2016, arXiv 1512.00567, section 7). `r_drop` is the weight alpha of R-Drop (Liang et al. 2021,
    arXiv 2106.14448): every batch passes twice, under two dropout masks, and half of equation 4 is
    minimized, (NLL_1 + NLL_2) / 2 + alpha / 4 (KL(p_1 || p_2) + KL(p_2 || p_1)). (The alpha of its
    authors' code weighs the divergence twice as much.)
    """

    warmup: float = 0.0
    lr_decay: str | None = None
    max_grad_norm: float | None = None
    bf16: bool = False
    running_train_acc: bool = False
    layer_decay: float = 1.0
    label_smoothing: float = 0.0
    patience: int | None = None
    r_drop: float = 0.0


@dataclass(frozen=True)
class EpochReport:
    epoch: int
    train_loss: float  # mean over batches of the minimized quantity
    train_accuracy: float
    dev_accuracy: float

    def in_words(self) -> str:
        return (
            f"epoch {self.epoch}: train loss :: {self.train_loss:.3f}, "
            f"train acc :: {self.train_accuracy:.3f}, dev acc :: {self.dev_accuracy:.3f}"
        )


@dataclass
class TrainState:
    """How far a run is. An epoch whose batches are all trained on has yet to be evaluated."""

    epoch: int = 0
    n_batches: int = 0  # trained on in this epoch
    loss_sum: float = 0.0  # over them
    n_correct: int = 0  # of their examples, while training
    shuffle_state: torch.Tensor | None = None  # of the shuffling generator at the epoch's start
    history: list[EpochReport] = field(default_factory=list)  # of earlier epochs


def train_classifier(
    model: nn.Module,
    train_data: SentenceDataset,
    dev_data: SentenceDataset,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
    on_epoch: Callable[[EpochReport, bool], None],
    recipe: Recipe = Recipe(),
    state_file: StateFile | None = None,
    regularizer: nn.Module | None = None,
) -> list[EpochReport]:
    """Minimize the NLL by AdamW over shuffled batches; the model must be on `device`.

    `model` is a classifier of classifier.py, or a module that is called like one. The loss of a
    batch is its summed NLL over `batch_size`, also for a shorter last batch. A `regularizer` adds
    regularizer(model, log_probs, forward), where log_probs (B, n_labels) are the batch's and
    forward(module) is another pass of the batch; its `state_dict` is saved with the run's.

    After each epoch train and dev accuracy are measured in eval mode and `on_epoch(report,
    is_best)` is called; best is the first epoch with the highest dev accuracy. With a `state_file`
    the run continues from its state, if it has one, and saves there after each epoch, when a save
    is due, and on Ctrl-C or SIGTERM. Raises DivergedError before anything that is not finite is
    saved.

    Several processes, which all call this alike, take equal shares of each batch and of the
    evaluation. Without dropout their weights equal those of one process, up to rounding.
    """
    if regularizer is not None:
        distributed.require_single_process("a regularizer")
    generator = torch.Generator().manual_seed(seed)
    loader = make_train_loader(train_data, batch_size, generator, model.reads_lengths)
    optimizer = AdamW(parameter_groups(model, lr, recipe.layer_decay), lr=lr)
    state = TrainState(shuffle_state=generator.get_state())
    if state_file is not None and state_file.saved is not None:
        state = _restore(state_file, model, optimizer, regularizer)
    trained = distributed.wrap(model)

    def save() -> None:
        require_finite_weights(model)
        if state_file is not None:
            _save(state_file, state, model, optimizer, regularizer)

    with stop_requests() as stop:
        while state.epoch < epochs and not _has_stalled(state.history, recipe.patience):
            model.train()
            generator.set_state(state.shuffle_state)
            if distributed.world_size() > 1:  # each process draws its own dropout masks
                torch.manual_seed(seed + 1000 * state.epoch + distributed.rank())
            batches = itertools.islice(loader, state.n_batches, None)
            bar = {"total": len(loader), "initial": state.n_batches, "leave": False}
            is_silent = None if distributed.is_main() else True  # None: without a terminal
            for batch in tqdm(batches, f"train-{state.epoch}", disable=is_silent, **bar):
                factor = _rate_factor(state, len(loader), epochs, recipe)
                loss, n_correct = batch_loss(
                    trained, model, batch, batch_size, device, recipe, regularizer
                )
                value, n_correct = _total(loss, n_correct)
                if not math.isfinite(value):
                    raise _diverged(state, len(loader), factor * lr, value, batch["sents"][0])
                # The loss is a sum over processes, and their gradients are averaged.
                (loss * distributed.world_size()).backward()
                take_step([optimizer], factor, recipe.max_grad_norm)
                state.loss_sum += value
                state.n_correct += n_correct
                state.n_batches += 1
                if stop.requested or (state_file is not None and state_file.is_due()):
                    save()
                stop.check(state_file)

            report = _report(model, state, loader, dev_data, batch_size, device, recipe)
            is_best = all(report.dev_accuracy > past.dev_accuracy for past in state.history)
            on_epoch(report, is_best)
            history = [*state.history, report]
            state = TrainState(
                state.epoch + 1, shuffle_state=generator.get_state(), history=history
            )
            save()
            stop.check(state_file)
    return state.history


def batch_loss(
    trained: nn.Module,
    model: nn.Module,
    batch: dict[str, Any],
    batch_size: int,
    device: torch.device,
    recipe: Recipe,
    regularizer: nn.Module | None,
) -> tuple[torch.Tensor, int]:
    """Return this process's part of a batch's loss, and how many of its rows are correct.

    `trained` is the model as `distributed.wrap` returned it.
    """
    own, weight = distributed.own_rows(batch, model.reads_lengths)
    labels = own["labels"].to(device)

    def forward(module: nn.Module) -> torch.Tensor:
        return forward_pass(module, own, device, recipe.bf16)

    def nll(log_probs: torch.Tensor) -> torch.Tensor:
        loss = F.nll_loss(log_probs, labels, reduction="sum")
        if recipe.label_smoothing:
            uniform = -log_probs.mean(dim=1).sum()
            loss = torch.lerp(loss, uniform, recipe.label_smoothing)
        return loss / batch_size

    log_probs = forward(trained)
    loss = nll(log_probs)
    if recipe.r_drop:
        second = forward(trained)
        divergence = symmetric_kl(log_probs, second) * len(labels) / batch_size
        loss = (loss + nll(second)) / 2 + recipe.r_drop / 4 * divergence
    if regularizer is not None:
        loss = loss + regularizer(model, log_probs, forward)
    n_correct = (log_probs.argmax(dim=1) == labels).sum().item()
    return weight * loss, weight * n_correct


def _diverged(
    state: TrainState, n_batches: int, lr: float, loss: float, sentence: str
) -> DivergedError:
    return DivergedError(
        f"epoch {state.epoch}, step {state.n_batches + 1} of {n_batches}, learning rate {lr:.3g}: "
        f"the loss is {loss} on the batch that begins with {sentence[:60]!r}; {REMEDY}"
    )


def _total(loss: torch.Tensor, n_correct: int) -> tuple[float, int]:
    """Sum over the processes."""
    values = torch.tensor([loss.item(), n_correct], dtype=torch.float64)
    value, n_correct = distributed.all_sum(values).tolist()
    return value, int(n_correct)


def _report(
    model: nn.Module,
    state: TrainState,
    loader: DataLoader,
    dev_data: SentenceDataset,
    batch_size: int,
    device: torch.device,
    recipe: Recipe,
) -> EpochReport:
    """Measure the model after the last batch of an epoch."""
    require_finite_weights(model)

    def accuracy(data: SentenceDataset, description: str) -> float | None:
        return evaluate(model, data, batch_size, device, recipe.bf16, description).accuracy

    train_accuracy = state.n_correct / len(loader.dataset)
    if not recipe.running_train_acc:
        train_accuracy = accuracy(loader.dataset, "eval train")
    dev_accuracy = accuracy(dev_data, "eval dev")
    return EpochReport(state.epoch, state.loss_sum / len(loader), train_accuracy, dev_accuracy)


def _rate_factor(state: TrainState, n_batches: int, epochs: int, recipe: Recipe) -> float:
    step, n_steps = state.epoch * n_batches + state.n_batches, epochs * n_batches
    warmup_steps = round(recipe.warmup * n_steps)
    decay_from = recipe.warmup if recipe.lr_decay else 1.0
    cosine = recipe.lr_decay == "cosine"
    return learning_rate_factor(step, step / n_steps, warmup_steps, decay_from, cosine)


def _has_stalled(history: list[EpochReport], patience: int | None) -> bool:
    """Whether the last `patience` epochs did not exceed the best dev accuracy before them."""
    accuracies = [report.dev_accuracy for report in history]
    if patience is None or len(accuracies) <= patience:
        return False
    return max(accuracies[-patience:]) <= max(accuracies[:-patience])


def _save(
    state_file: StateFile,
    state: TrainState,
    model: nn.Module,
    optimizer: Optimizer,
    regularizer: nn.Module | None,
) -> None:
    state_file.save(
        progress=asdict(state),
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        regularizer={} if regularizer is None else regularizer.state_dict(),
        random=random_state(),
    )


def _restore(
    state_file: StateFile, model: nn.Module, optimizer: Optimizer, regularizer: nn.Module | None
) -> TrainState:
    """Load the saved weights, optimizer and random numbers; return how far the run was."""
    saved = state_file.saved
    try:
        history = [EpochReport(**report) for report in saved["progress"]["history"]]
        state = TrainState(**{**saved["progress"], "history": history})
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if regularizer is not None:
            regularizer.load_state_dict(saved["regularizer"])
        set_random_state(saved["random"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise state_file.damaged() from error
    if distributed.is_main():
        print(f"continue {state_file.path} in epoch {state.epoch}, batch {state.n_batches}")
    return state


def require_finite_weights(model: nn.Module) -> None:
    """Raise DivergedError if a weight is NaN or infinite."""
    try:
        require_finite(dict(model.named_parameters()), REMEDY)
    except InputError as error:
        raise DivergedError(str(error)) from error
