"""Train one classifier, evaluate it, keep the best of it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoint import load_torch_file
from classifier import LlamaEmbeddingClassifier
from config import LlamaConfig
from dataset import NO_GOLD_LABEL, SentenceDataset, make_loader
from optimizer import AdamW
from utils import atomic_write


@dataclass(frozen=True)
class Evaluation:
    """What a model says of a data set, in the data set's order.

    Accuracy and macro F1 count the examples that have a gold label; None if none has.
    """

    accuracy: float | None
    macro_f1: float | None
    predictions: list[int]
    labels: list[int]
    sentences: list[str]


@dataclass(frozen=True)
class EpochReport:
    epoch: int
    train_loss: float  # mean over batches of (NLL summed over the batch / batch size)
    train_accuracy: float
    dev_accuracy: float


def log_probs_of(model: nn.Module, batch: dict[str, Any], device: torch.device) -> torch.Tensor:
    """Log-probabilities (B, n_labels); lengths are handed to models that say they read them."""
    token_ids = batch["token_ids"].to(device)
    if getattr(model, "reads_lengths", False):
        return model(token_ids, lengths=batch["lengths"].to(device))
    return model(token_ids)


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: DataLoader, device: torch.device, description: str = "eval"
) -> Evaluation:
    """Puts the model in eval mode and predicts every example."""
    from sklearn.metrics import accuracy_score, f1_score  # slow to import, and not for `generate`

    model.eval()
    predictions, labels, sentences = [], [], []
    for batch in tqdm(loader, desc=description, disable=None, leave=False):
        predictions += log_probs_of(model, batch, device).argmax(dim=1).tolist()
        labels += batch["labels"].tolist()
        sentences += batch["sents"]
    known = [i for i, label in enumerate(labels) if label != NO_GOLD_LABEL]
    accuracy = macro_f1 = None
    if known:
        gold, said = [labels[i] for i in known], [predictions[i] for i in known]
        accuracy = float(accuracy_score(gold, said))
        macro_f1 = float(f1_score(gold, said, average="macro", zero_division=0.0))
    return Evaluation(accuracy, macro_f1, predictions, labels, sentences)


def train_classifier(
    model: LlamaEmbeddingClassifier,
    train_data: SentenceDataset,
    dev_data: SentenceDataset,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
    on_epoch: Callable[[EpochReport, bool], None],
) -> list[EpochReport]:
    """Minimizes the NLL by AdamW over shuffled batches; the model must be on `device`.

    The loss of a batch is its summed NLL over `batch_size`, also for the shorter last batch. After
    each epoch train and dev accuracy are measured in eval mode and `on_epoch(report, is_best)` is
    called; best is the first epoch with the highest dev accuracy.
    """
    shuffled = make_loader(train_data, batch_size, torch.Generator().manual_seed(seed))
    train_loader, dev_loader = (
        make_loader(train_data, batch_size),
        make_loader(dev_data, batch_size),
    )
    optimizer = AdamW(model.parameters(), lr=lr)
    history: list[EpochReport] = []
    for epoch in range(epochs):
        train_loss = _train_epoch(model, shuffled, optimizer, batch_size, device, epoch)
        train_accuracy = evaluate(model, train_loader, device, "eval train").accuracy
        dev_accuracy = evaluate(model, dev_loader, device, "eval dev").accuracy
        report = EpochReport(epoch, train_loss, train_accuracy, dev_accuracy)
        is_best = all(report.dev_accuracy > earlier.dev_accuracy for earlier in history)
        history.append(report)
        on_epoch(report, is_best)
    return history


def _train_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    device: torch.device,
    epoch: int,
) -> float:
    model.train()
    total = 0.0
    for batch in tqdm(loader, desc=f"train-{epoch}", disable=None, leave=False):
        optimizer.zero_grad()
        labels = batch["labels"].to(device)
        loss = F.nll_loss(log_probs_of(model, batch, device), labels, reduction="sum") / batch_size
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)


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
    with atomic_write(path, "wb") as file:
        torch.save(content, file)


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
        raise ValueError(f"{path}: is no finetuned classifier, it has no {', '.join(absent)}")
    config = SimpleNamespace(**saved["model_config"])
    try:
        llama_config = LlamaConfig(**saved["model_args"])
        model = LlamaEmbeddingClassifier.from_weights(config, llama_config, saved.pop("model"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model, saved
