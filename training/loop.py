"""Train one classifier: the loop, its loss, its learning rates."""

import itertools
import math
from collections.abc import Callable, Iterable
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


REMEDY = "lower --lr or set --max_grad_norm (earlier saves are kept)"


@dataclass(frozen=True)
class Recipe:
    """Options beyond epochs, batch size and learning rate; the defaults are the assignment's.

    `warmup` is the share of all steps over which the learning rate rises; with `lr_decay`, "linear"
    or "cosine", it then falls to 0. `parameter_groups` explains `layer_decay`.
    `max_grad_norm` clips gradients. `bf16` computes in bfloat16 and keeps float32 weights.
    `train_acc` "running" counts the train accuracy during the training passes, dropout included,
    "extra" in a further pass. `patience` ends the training after that many epochs in a row
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
    train_acc: str = "extra"
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
    """Progress of a run. An epoch whose batches are all trained may still await evaluation."""

    epoch: int = 0
    n_batches: int = 0  # batches trained in this epoch
    loss_sum: float = 0.0  # sum of their losses
    n_correct: int = 0  # correct predictions among their examples
    shuffle_state: torch.Tensor | None = None  # shuffling generator's state at the epoch's start
    history: list[EpochReport] = field(default_factory=list)  # reports of earlier epochs


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
    """Minimize the negative log-likelihood (NLL) by AdamW; return the report of each epoch.

    `model`, on `device`, is a classifier of classifier.py or a module with the same calls. The
    loss of a batch is its summed NLL over `batch_size`, also for a shorter last batch. A
    `regularizer(model, log_probs, forward)` returns a term that is added to it; `forward(module)`
    runs the batch again.

    After each epoch `on_epoch(report, is_best)` is called; the best epoch is the first one with the
    highest dev accuracy. Resume from `state_file` if it holds a state. Save there after each epoch,
    when a save is due, and on Ctrl-C or SIGTERM. Raises DivergedError before a loss or a weight
    that is not finite is saved.

    Under torchrun each process trains on an equal share of every batch; without dropout the weights
    equal those of one process, up to rounding.
    """
    if regularizer is not None:
        distributed.require_single_process("a regularizer")
    generator = torch.Generator().manual_seed(seed)
    loader = make_train_loader(train_data, batch_size, generator, model.reads_lengths)
    optimizer = AdamW(parameter_groups(model, lr, recipe.layer_decay), lr=lr)
    state = TrainState(shuffle_state=generator.get_state())
    if state_file is not None and state_file.saved is not None:
        state = _restore(state_file, model, optimizer, regularizer)
    # An untied output matrix gets no gradient: a classifier computes no logits of the vocabulary.
    is_tied = model.llama.output.weight is model.llama.tok_embeddings.weight
    ddp_model = distributed.wrap(model, has_unused_parameters=not is_tied)

    def save() -> None:
        require_finite_weights(model)
        if state_file is not None:
            state_file.save(
                progress=asdict(state),
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                regularizer={} if regularizer is None else regularizer.state_dict(),
                random=random_state(),
            )

    with stop_requests() as stop:
        while state.epoch < epochs and not _has_stalled(state.history, recipe.patience):
            model.train()
            generator.set_state(state.shuffle_state)
            if distributed.world_size() > 1:  # each process draws its own dropout masks
                torch.manual_seed(seed + 1000 * state.epoch + distributed.rank())
            for batch in _remaining(loader, state):
                lr_factor = _lr_factor(state, len(loader), epochs, recipe)
                loss, n_correct = batch_loss(
                    ddp_model, batch, batch_size, device, recipe, regularizer
                )
                sums = torch.tensor([loss.item(), n_correct], dtype=torch.float64)
                total_loss, total_correct = distributed.all_sum(sums).tolist()
                if not math.isfinite(total_loss):
                    raise _diverged(state, loader, lr_factor * lr, total_loss, batch["sents"][0])
                # The loss is a sum over the processes, but their gradients are averaged.
                (loss * distributed.world_size()).backward()
                take_step([optimizer], lr_factor, recipe.max_grad_norm)
                state.loss_sum += total_loss
                state.n_correct += int(total_correct)
                state.n_batches += 1
                is_due = state_file is not None and state_file.is_due()
                stop.handle(save, state_file, is_due)

            report = _evaluate(model, state, loader, dev_data, batch_size, device, recipe)
            is_best = all(report.dev_accuracy > past.dev_accuracy for past in state.history)
            on_epoch(report, is_best)
            state = TrainState(
                epoch=state.epoch + 1,
                shuffle_state=generator.get_state(),
                history=[*state.history, report],
            )
            stop.handle(save, state_file, is_due=True)
    return state.history


def require_dropout(model: nn.Module, recipe: Recipe) -> None:
    """Raise InputError for R-Drop without dropout (or mixout), whose two passes are equal."""
    if recipe.r_drop and not any(getattr(module, "p", 0.0) for module in model.modules()):
        raise InputError(
            "--r_drop compares two passes, which are equal without dropout; add --backbone_dropout "
            "or, before a head, --hidden_dropout_prob"
        )


def _remaining(loader: DataLoader, state: TrainState) -> Iterable[dict[str, Any]]:
    """Return the batches of the epoch that are not trained yet, with a progress bar on rank 0."""
    is_silent = None if distributed.is_main() else True  # None: shown on a terminal
    return tqdm(
        itertools.islice(loader, state.n_batches, None),
        desc=f"train-{state.epoch}",
        total=len(loader),
        initial=state.n_batches,
        leave=False,
        disable=is_silent,
    )


def batch_loss(
    ddp_model: nn.Module,
    batch: dict[str, Any],
    batch_size: int,
    device: torch.device,
    recipe: Recipe,
    regularizer: nn.Module | None,
) -> tuple[torch.Tensor, int]:
    """Return this process's part of a batch's loss, and how many of its rows are correct.

    `ddp_model` is the model, in several processes wrapped by DistributedDataParallel.
    """
    rows, weight = distributed.shard_batch(batch, ddp_model.reads_lengths)
    labels = rows["labels"].to(device)

    def forward(module: nn.Module) -> torch.Tensor:
        return forward_pass(module, rows, device, recipe.bf16)

    def nll(log_probs: torch.Tensor) -> torch.Tensor:
        loss = F.nll_loss(log_probs, labels, reduction="sum")
        if eps := recipe.label_smoothing:
            loss = (1 - eps) * loss - eps * log_probs.mean(dim=1).sum()
        return loss / batch_size

    log_probs = forward(ddp_model)
    loss = nll(log_probs)
    if recipe.r_drop:  # not a regularizer, because it also averages two NLLs
        second = forward(ddp_model)
        divergence = symmetric_kl(log_probs, second) * len(labels) / batch_size
        loss = (loss + nll(second)) / 2 + recipe.r_drop / 4 * divergence
    if regularizer is not None:
        loss = loss + regularizer(ddp_model, log_probs, forward)
    n_correct = (log_probs.argmax(dim=1) == labels).sum().item()
    return weight * loss, weight * n_correct


def _diverged(
    state: TrainState, loader: DataLoader, lr: float, loss: float, sentence: str
) -> DivergedError:
    return DivergedError(
        f"epoch {state.epoch}, step {state.n_batches + 1} of {len(loader)}, "
        f"learning rate {lr:.3g}: the loss is {loss} on the batch that begins with "
        f"{sentence[:60]!r}; {REMEDY}"
    )


def _evaluate(
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
    if recipe.train_acc == "extra":
        train_accuracy = accuracy(loader.dataset, "eval train")
    dev_accuracy = accuracy(dev_data, "eval dev")
    return EpochReport(state.epoch, state.loss_sum / len(loader), train_accuracy, dev_accuracy)


def _lr_factor(state: TrainState, n_batches: int, epochs: int, recipe: Recipe) -> float:
    step, n_steps = state.epoch * n_batches + state.n_batches, epochs * n_batches
    warmup_steps = round(recipe.warmup * n_steps)
    decay_from = recipe.warmup if recipe.lr_decay else 1.0
    cosine = recipe.lr_decay == "cosine"
    return learning_rate_factor(step, step / n_steps, warmup_steps, decay_from, cosine)


def _has_stalled(history: list[EpochReport], patience: int | None) -> bool:
    """Return whether the last `patience` epochs did not exceed the best dev accuracy before."""
    accuracies = [report.dev_accuracy for report in history]
    if patience is None or len(accuracies) <= patience:
        return False
    return max(accuracies[-patience:]) <= max(accuracies[:-patience])


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
        torch.Generator().set_state(state.shuffle_state)  # or a TypeError here, not in the loop
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise state_file.damaged() from error
    state_file.saved = None  # it would keep a second copy of the weights
    print(f"continue {state_file.path} in epoch {state.epoch} after {state.n_batches} batches")
    return state


def require_finite_weights(model: nn.Module) -> None:
    """Raise DivergedError if a weight is NaN or infinite."""
    try:
        require_finite(dict(model.named_parameters()), REMEDY)
    except InputError as error:
        raise DivergedError(str(error)) from error
