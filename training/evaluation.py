"""Predict with a classifier, and measure its accuracy and macro F1."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from training import distributed
from training.dataset import SentenceDataset
from training.labeled import NO_GOLD_LABEL
from training.schedule import precision
from utils import atomic_write


@dataclass(frozen=True)
class Evaluation:
    """Predictions in the order of the data; accuracy and macro F1 count the examples with a gold
    label, and are None if there are none."""

    accuracy: float | None
    macro_f1: float | None
    predictions: list[int]
    labels: list[int]
    sentences: list[str]
    confidences: list[float]  # the probability of each prediction


def forward_pass(
    model: nn.Module, batch: dict[str, Any], device: torch.device, bf16: bool = False
) -> torch.Tensor:
    """Return log-probabilities (B, n_labels); lengths go to models that read them."""
    inputs = {}
    if getattr(model, "reads_lengths", False):
        inputs["lengths"] = batch["lengths"].to(device)
    with precision(device, bf16):
        return model(batch["token_ids"].to(device), **inputs)


@torch.inference_mode()
def predict_probs(
    model: nn.Module,
    data: SentenceDataset,
    batch_size: int,
    device: torch.device,
    bf16: bool = False,
    description: str | None = "eval",
) -> torch.Tensor:
    """Return probabilities (N, n_labels), float32 on the CPU, in the order of `data`.

    They are the softmax over the labels of what the model returns, log-probabilities or scores.
    Puts the model in eval mode. Batches hold similar lengths if the model masks padding; otherwise
    a prediction depends on its batch, and batches follow the data. Each of several processes
    computes a share. Without a `description` there is no progress bar.
    """
    model.eval()
    batches = data.eval_batches(batch_size, similar_lengths=model.reads_lengths)
    probs = torch.zeros(len(data), model.num_labels)
    own = distributed.shard(batches)
    is_silent = True if description is None or not distributed.is_main() else None
    bar = tqdm(own, description, disable=is_silent, leave=False)  # None hides it without a terminal
    for indices in bar:
        batch = data.collate_fn([data[i] for i in indices])
        probs[indices] = forward_pass(model, batch, device, bf16).float().softmax(dim=1).cpu()
    return distributed.all_sum(probs)


def evaluate(
    model: nn.Module,
    data: SentenceDataset,
    batch_size: int,
    device: torch.device,
    bf16: bool = False,
    description: str = "eval",
) -> Evaluation:
    """Predict every example and compare with the gold labels."""
    probs = predict_probs(model, data, batch_size, device, bf16, description)
    confidences, predictions = (values.tolist() for values in probs.max(dim=1))
    labels = [example.label for example in data.examples]
    sentences = [example.sentence for example in data.examples]
    return Evaluation(*scores(predictions, labels), predictions, labels, sentences, confidences)


def scores(predictions: list[int], labels: list[int]) -> tuple[float | None, float | None]:
    """Return (accuracy, macro F1) over the examples with a gold label, or None for both."""
    from sklearn.metrics import accuracy_score, f1_score  # slow to import, unused by `generate`

    known = np.array(labels) != NO_GOLD_LABEL
    if not known.any():
        return None, None
    gold, predicted = np.array(labels)[known], np.array(predictions)[known]
    macro_f1 = f1_score(gold, predicted, average="macro", zero_division=0.0)
    return float(accuracy_score(gold, predicted)), float(macro_f1)


def write_predictions(
    outfile: str | os.PathLike, predictions: list[int], sentences: list[str]
) -> None:
    """Write `prediction ||| sentence` lines."""
    with atomic_write(outfile) as file:
        pairs = zip(predictions, sentences, strict=True)
        file.writelines(f"{prediction} ||| {sentence}\n" for prediction, sentence in pairs)
