"""Train one classifier, evaluate it, keep the best of it."""

import contextlib
import itertools
import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from classifier import LlamaEmbeddingClassifier
from config import LlamaConfig
from formats.checkpoint import listed, load_torch_file
from optimizer import AdamW
from tokenizer import Tokenizer
from training.dataset import SentenceDataset, make_loader
from training.distributed import ALONE, Ranks, Signals
from training.interrupts import Stopped
from training.labelled import NO_GOLD_LABEL
from training.state import DIVERGED, EpochReport, Keeper, Place, require_not_diverged
from training.steps import learning_rate_factor, precision, symmetric_kl, take_step
from utils import save_torch_file, sha256_of


@dataclass(frozen=True)
class Evaluation:
    """What a model says of a data set, in the data set's order whatever that of the loader.

    Accuracy and macro F1 count the examples that have a gold label; None if none has.
    """

    accuracy: float | None
    macro_f1: float | None
    predictions: list[int]
    labels: list[int]
    sentences: list[str]
    confidences: list[float]  # the probability that each prediction was given


@dataclass(frozen=True)
class Recipe:
    """How to train beyond epochs, batch size and learning rate; the defaults are the assignment's.

    `warmup` is the share of all steps over which the learning rate rises; with `lr_decay`, "linear"
    or "cosine", it then falls to 0. `layer_decay` is described at `parameter_groups`.
    `max_grad_norm` clips gradients. `bf16` computes in bfloat16, weights and updates staying
    float32. `running_train_acc` takes the train accuracy from the training passes, dropout and all,
    instead of from a further pass in eval mode. `patience` ends the training after that many epochs
    in a row without a new best dev accuracy.

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


def log_probs_of(
    model: nn.Module, batch: dict[str, Any], device: torch.device, bf16: bool = False
) -> torch.Tensor:
    """Log-probabilities (B, n_labels); lengths are handed to models that say they read them."""
    inputs = {}
    if getattr(model, "reads_lengths", False):
        inputs["lengths"] = batch["lengths"].to(device)
    with precision(device, bf16):
        return model(batch["token_ids"].to(device), **inputs)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    description: str = "eval",
    bf16: bool = False,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Puts the model in eval mode and predicts every example; of several `ranks` each takes every
    `size`-th batch, and all get the whole."""
    from sklearn.metrics import accuracy_score, f1_score  # slow to import, and not for `generate`

    model.eval()
    predictions, labels, sentences, confidences = [], [], [], []
    for i, batch in enumerate(tqdm(loader, desc=description, disable=None, leave=False)):
        log_probs = predicted = torch.zeros(len(batch["sents"]))
        if i % ranks.size == ranks.rank:
            log_probs, predicted = log_probs_of(model, batch, device, bf16).max(dim=1)
            log_probs = log_probs.exp()
        predictions += predicted.tolist()
        confidences += log_probs.tolist()
        labels += batch["labels"].tolist()
        sentences += batch["sents"]
    if ranks.size > 1:
        table = torch.tensor([predictions, confidences], dtype=torch.float64)
        predictions, confidences = ranks.sum_of(table).tolist()
        predictions = [int(label) for label in predictions]
    if isinstance(loader.sampler, list):  # by length, see `dataset.make_loader`
        place = sorted(range(len(labels)), key=loader.sampler.__getitem__)
        predictions, labels, sentences, confidences = (
            [values[i] for i in place] for values in (predictions, labels, sentences, confidences)
        )
    known = [i for i, label in enumerate(labels) if label != NO_GOLD_LABEL]
    accuracy = f1 = None
    if known:
        gold, predicted = [labels[i] for i in known], [predictions[i] for i in known]
        accuracy = float(accuracy_score(gold, predicted))
        f1 = float(f1_score(gold, predicted, average="macro", zero_division=0.0))
    return Evaluation(accuracy, f1, predictions, labels, sentences, confidences)


def macro_f1(confusion: np.ndarray) -> float:
    """The mean of 2 TP / (2 TP + FP + FN) over the labels that occur, of (n_labels, n_labels)
    counts whose rows are gold and whose columns are predicted."""
    n_predicted_or_gold = confusion.sum(axis=0) + confusion.sum(axis=1)
    occurs = n_predicted_or_gold > 0
    return float(np.mean(2 * np.diag(confusion)[occurs] / n_predicted_or_gold[occurs]))


def parameter_groups(model: nn.Module, lr: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """The parameters that are trained, in groups of one learning rate.

    It is `lr` for the final norm and the head, lr * layer_decay for the topmost layer, and falls by
    that factor with each layer down to the embedding (Howard and Ruder 2018, arXiv 1801.06146,
    section 3.2). An output layer is a head, unless it is the embedding (tied).
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if layer_decay == 1.0:
        return [{"params": [parameter for _, parameter in trained], "lr": lr}]
    n_layers = model.llama.config.n_layers
    by_distance: dict[int, list[nn.Parameter]] = {}
    for name, parameter in trained:
        layer = re.match(r"llama\.layers\.(\d+)\.", name)
        at_bottom = parameter is model.llama.tok_embeddings.weight
        height = int(layer[1]) + 1 if layer else (0 if at_bottom else n_layers + 1)
        by_distance.setdefault(n_layers + 1 - height, []).append(parameter)
    return [
        {"params": parameters, "lr": lr * layer_decay**distance}
        for distance, parameters in sorted(by_distance.items())
    ]


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
    keeper: Keeper | None = None,
    regularizer: nn.Module | None = None,
    ranks: Ranks = ALONE,
) -> list[EpochReport]:
    """Minimizes the NLL by AdamW over shuffled batches; the model must be on `device`.

    `model` is a classifier of `classifier.py`, or a module that is called like one.

    The loss of a batch is its summed NLL over `batch_size`, also for the shorter last batch. After
    each epoch train and dev accuracy are measured in eval mode and `on_epoch(report, is_best)` is
    called; best is the first epoch with the highest dev accuracy. A model that masks its padding
    gets batches of similar lengths, which hold less of it.

    A `regularizer` adds a term to each batch's loss: regularizer(model, log_probs, again), where
    log_probs (B, n_labels) are the batch's, and again(module) is another pass of the batch, through
    the model or one that is called like it. Its `state_dict` is kept with the run's.

    With a `keeper` the run goes on where that says, and its state is kept after every epoch, when a
    save is due, and on `Stopped`, which comes between two batches. A loss or a weight that is not
    finite is a ValueError, before anything is kept of it.

    Several `ranks`, which all call this alike, take equal shares of each batch and of what is
    measured: `batch_size` is that of all together, and without dropout the weights are those of one
    process, but for rounding. `on_epoch` is called on all of them. They take no `regularizer`.
    """
    if regularizer is not None and ranks.size > 1:
        raise ValueError("a regularizer is a term of the whole batch; train in one process")
    shuffle_by = torch.Generator().manual_seed(seed)
    by_length = {"similar_lengths": model.reads_lengths}
    run = _Run(
        model=model,
        optimizer=AdamW(parameter_groups(model, lr, recipe.layer_decay), lr=lr),
        shuffled=make_loader(train_data, batch_size, shuffle_by, **by_length),
        train_loader=make_loader(train_data, batch_size, **by_length),
        dev_loader=make_loader(dev_data, batch_size, **by_length),
        batch_size=batch_size,
        device=device,
        epochs=epochs,
        recipe=recipe,
        keeper=keeper,
        regularizer=regularizer,
        ranks=ranks,
    )
    place = Place(order=shuffle_by.get_state())
    ranks.seed_apart(seed)
    if keeper is not None and keeper.is_resumed:
        place = keeper.restore(model, run.optimizer, regularizer)
    with ranks.signals() as run.signals:
        return _train(run, place, shuffle_by, on_epoch)


def _train(
    run: "_Run",
    place: Place,
    shuffle_by: torch.Generator,
    on_epoch: Callable[[EpochReport, bool], None],
) -> list[EpochReport]:
    try:
        while place.epoch < run.epochs and not _has_stalled(place.history, run.recipe.patience):
            report = run.epoch(place)
            earlier = [past["dev_accuracy"] for past in place.history]
            with run.signals.held_back():
                on_epoch(report, all(report.dev_accuracy > accuracy for accuracy in earlier))
                history = [*place.history, asdict(report)]
                place = Place(place.epoch + 1, order=shuffle_by.get_state(), history=history)
                run.save(place)
            run.signals.heed()
    except Stopped as stopped:
        with contextlib.suppress(Stopped), run.signals.held_back():  # another one changes nothing
            run.save(place)
        stopped.is_resumable = run.keeper is not None
        raise
    return [EpochReport(**report) for report in place.history]


def _has_stalled(history: list[dict[str, Any]], patience: int | None) -> bool:
    """Whether the last `patience` epochs brought no dev accuracy above that of the epochs before.

    A run that was resumed behind its last epoch has stalled, too.
    """
    accuracies = [report["dev_accuracy"] for report in history]
    if patience is None or len(accuracies) <= patience:
        return False
    return max(accuracies[-patience:]) <= max(accuracies[:-patience])


@dataclass
class _Run:
    """What stays the same from the first step of a run to its last; a `Place` is what changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    shuffled: DataLoader
    train_loader: DataLoader
    dev_loader: DataLoader
    batch_size: int
    device: torch.device
    epochs: int
    recipe: Recipe
    keeper: Keeper | None
    regularizer: nn.Module | None
    ranks: Ranks
    signals: Signals = field(init=False)

    def __post_init__(self) -> None:
        llama = self.model.llama
        is_tied = llama.output.weight is llama.tok_embeddings.weight
        self.trained = self.ranks.wrap(self.model, has_unused=not is_tied)

    def save(self, place: Place) -> None:
        if self.keeper is not None:
            self.keeper.save(place, self.model, self.optimizer, self.regularizer)

    def epoch(self, place: Place) -> EpochReport:
        """Takes the steps of the epoch that `place` has not taken, and measures."""
        n_batches = len(self.shuffled)
        self.model.train()
        self.shuffled.generator.set_state(place.order)
        to_take = itertools.islice(self.shuffled, place.n_batches, None)
        bar = {"desc": f"train-{place.epoch}", "disable": None, "leave": False}
        for batch in tqdm(to_take, total=n_batches, initial=place.n_batches, **bar):
            with self.signals.held_back():
                self._step(place, batch)
                is_due = self.keeper is not None and self.keeper.is_due()
                if self.ranks.of_first(is_due)[0]:
                    self.save(place)
            self.signals.heed()
        require_not_diverged(self.model)

        train_accuracy = place.n_right / len(self.shuffled.dataset)
        if not self.recipe.running_train_acc:
            train_accuracy = self._accuracy(self.train_loader, "eval train")
        dev_accuracy = self._accuracy(self.dev_loader, "eval dev")
        return EpochReport(place.epoch, place.loss_sum / n_batches, train_accuracy, dev_accuracy)

    def _accuracy(self, loader: DataLoader, description: str) -> float | None:
        bf16, ranks = self.recipe.bf16, self.ranks
        result = evaluate(self.model, loader, self.device, description, bf16, ranks)
        self.signals.heed()
        return result.accuracy

    def _step(self, place: Place, batch: dict[str, Any]) -> None:
        recipe, n_steps = self.recipe, self.epochs * len(self.shuffled)
        step = place.epoch * len(self.shuffled) + place.n_batches
        warmup_steps = round(recipe.warmup * n_steps)
        decay_from = recipe.warmup if recipe.lr_decay else 1.0
        cosine = recipe.lr_decay == "cosine"
        factor = learning_rate_factor(step, step / n_steps, warmup_steps, decay_from, cosine)

        own, weight = self._own(batch)
        labels = own["labels"].to(self.device)
        with self.ranks.exchanging(self.trained):
            log_probs, loss = self._objective(own, labels)
        n_right = (log_probs.argmax(dim=1) == labels).sum().item()
        value, n_right = self.ranks.sum(weight * loss.item(), weight * n_right)
        if not math.isfinite(value):
            lr = factor * self.optimizer.defaults["lr"]
            raise ValueError(
                f"epoch {place.epoch}, step {place.n_batches + 1} of {len(self.shuffled)}, "
                f"learning rate {lr:.3g}: the loss is {value} on the batch that begins with "
                f"{batch['sents'][0][:60]!r}; {DIVERGED}"
            )
        with self.ranks.exchanging(self.trained):  # takes the mean of what is to be a sum
            (loss * (weight * self.ranks.size)).backward()
        take_step([self.optimizer], factor, recipe.max_grad_norm)
        place.loss_sum += value
        place.n_right += int(n_right)
        place.n_batches += 1

    def _own(self, batch: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """This rank's rows of a batch and their weight: where it has none, one of weight 0, as all
        ranks have to take part in each exchange."""
        if self.ranks.size == 1:
            return batch, 1
        rows = self.ranks.rows(len(batch["sents"]))
        chosen = rows or [0]
        own = {key: batch[key][chosen] for key in ("token_ids", "labels", "lengths")}
        if self.model.reads_lengths:  # else padding is read, all of the batch's
            own["token_ids"] = own["token_ids"][:, : int(own["lengths"].max())]
        return own, int(bool(rows))

    def _objective(
        self, batch: dict[str, Any], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probabilities (B, n_labels), the loss of the batch)."""
        recipe = self.recipe

        def again(module: nn.Module) -> torch.Tensor:
            return log_probs_of(module, batch, self.device, recipe.bf16)

        def nll(log_probs: torch.Tensor) -> torch.Tensor:
            loss = F.nll_loss(log_probs, labels, reduction="sum")
            if recipe.label_smoothing:
                uniform = -log_probs.mean(dim=1).sum()
                loss = torch.lerp(loss, uniform, recipe.label_smoothing)
            return loss / self.batch_size

        log_probs = again(self.trained)
        loss = nll(log_probs)
        if recipe.r_drop:
            second = again(self.trained)
            divergence = symmetric_kl(log_probs, second) * len(labels) / self.batch_size
            loss = (loss + nll(second)) / 2 + recipe.r_drop / 4 * divergence
        if self.regularizer is not None:
            loss = loss + self.regularizer(self.model, log_probs, again)
        return log_probs, loss


def provenance(
    label_names: list[str],
    tokenizer: Tokenizer,
    pretrained_model_path: str | os.PathLike,
    max_sentence_len: int | None,
) -> dict[str, Any]:
    """What a checkpoint holds beside the model, so that reading sentences takes nothing else."""
    return {
        "label_names": label_names,
        "tokenizer_path": tokenizer.model_path,
        "tokenizer_sha256": sha256_of(tokenizer.model_path),
        "pretrained_model_sha256": sha256_of(pretrained_model_path),
        "max_sentence_len": max_sentence_len,
    }


def save_classifier(
    path: str | os.PathLike, model: LlamaEmbeddingClassifier, config: Any, **extra: Any
) -> None:
    """Writes a checkpoint of plain data, whole or not at all.

    `config` is the namespace the classifier was built from. Together with `model_args`, the shape
    of the Llama, it builds the classifier again without the pretrained file.
    """
    content = {
        "model": model.state_dict(),
        "model_args": model.llama.config.to_dict(),
        "model_config": _without_paths({**vars(config), "pooling": model.pooling}),
        **{key: _without_paths(v) if isinstance(v, dict) else v for key, v in extra.items()},
    }
    save_torch_file(path, content)


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """A pathlib.Path is no plain data: it would be pickled and then not load."""
    return {
        key: os.fspath(value) if isinstance(value, os.PathLike) else value
        for key, value in values.items()
    }


def load_classifier(
    path: str | os.PathLike,
) -> tuple[LlamaEmbeddingClassifier, dict[str, Any]]:
    """What `save_classifier` wrote: the classifier, on the CPU in eval mode, and the rest."""
    saved = load_torch_file(path)
    absent = [key for key in ("model", "model_args", "model_config") if key not in saved]
    if absent:
        if saved.get("methods"):
            raise ValueError(
                f"{path}: has parts of advanced.run --method {listed(saved['methods'])}, which "
                "only that reads"
            )
        raise ValueError(f"{path}: is no finetuned classifier, it has no {', '.join(absent)}")
    config = SimpleNamespace(**saved["model_config"])
    try:
        llama_config = LlamaConfig(**saved["model_args"])
        model = LlamaEmbeddingClassifier.from_weights(config, llama_config, saved.pop("model"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model, saved
