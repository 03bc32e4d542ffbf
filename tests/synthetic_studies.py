"""Studies as `advanced.run` leaves them, drawn at random: no training, but every number agrees."""

import json
from pathlib import Path
from typing import Any

import numpy as np

N_LABELS = {"sst": 5, "cfimdb": 2}
N_PARAMETERS = 3_221_952


def evaluation(
    rng: np.random.Generator, gold: np.ndarray, accuracy: float, n_labels: int
) -> dict[str, Any]:
    """Of a system that is right with probability `accuracy`, too sure of itself by a tenth."""
    is_right = rng.random(len(gold)) < accuracy
    wrong = (gold + rng.integers(1, n_labels, len(gold))) % n_labels
    confusion = np.zeros((n_labels, n_labels), dtype=int)
    np.add.at(confusion, (gold, np.where(is_right, gold, wrong)), 1)
    sure = np.clip(accuracy + 0.1 + 0.15 * rng.standard_normal(len(gold)), 0.2, 0.999)
    bins = (10 * sure).astype(int)
    counts = np.bincount(bins, minlength=10)

    def means(values: np.ndarray) -> list[float | None]:
        return [float(values[bins == i].mean()) if counts[i] else None for i in range(10)]

    confidence, accuracies = means(sure), means(is_right.astype(float))
    gaps = [n * abs(c - a) for n, c, a in zip(counts, confidence, accuracies, strict=True) if n]
    precision = np.diag(confusion) / np.maximum(confusion.sum(axis=0), 1)
    recall = np.diag(confusion) / np.maximum(confusion.sum(axis=1), 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    return {
        "n_sentences": len(gold),
        "accuracy": float(is_right.mean()),
        "macro_f1": float(f1.mean()),
        "confusion": confusion.tolist(),
        "right": "".join(map(str, is_right.astype(int))),
        "reliability": {
            "count": counts.tolist(), "confidence": confidence, "accuracy": accuracies
        },
        "ece": float(sum(gaps) / len(gold)),
    }  # fmt: skip


def gold_labels(dataset: str, split: str, fold: int | None, n: int) -> np.ndarray:
    """The same for every study: uneven classes, of each split and fold its own."""
    n_labels = N_LABELS[dataset]
    rng = np.random.default_rng([n_labels, split == "dev", 0 if fold is None else fold + 1])
    return rng.choice(n_labels, n, p=np.arange(1, n_labels + 1) / sum(range(1, n_labels + 1)))


def run(
    dataset: str,
    accuracy: float,
    seed: int,
    fold: int | None = None,
    n: tuple[int, int] = (60, 80),
    alphas: bool = False,
    n_trained: int = N_PARAMETERS,
) -> dict[str, Any]:
    rng = np.random.default_rng([seed, fold or 0, int(1e6 * accuracy)])
    n_labels = N_LABELS[dataset]
    accuracy += 0.01 * rng.standard_normal()
    dev = evaluation(rng, gold_labels(dataset, "dev", fold, n[0]), accuracy, n_labels)
    test = {"n_sentences": n[1], "accuracy": None}
    if dataset == "sst":
        test = evaluation(rng, gold_labels(dataset, "test", None, n[1]), accuracy, n_labels)
    shape = (-0.04, -0.01, 0.0) if fold is None else (-0.04, -0.01, -0.005, 0.0)
    history = [
        {
            "epoch": epoch,
            "train_loss": 1.5 / (epoch + 1),
            "train_accuracy": 0.4 + 0.1 * epoch,
            "dev_accuracy": dev["accuracy"] + below * (1 + 0.3 * rng.random()),
        }
        for epoch, below in enumerate(shape + ((-0.01, -0.015) if fold is None else ()))
    ]
    found = {
        "seed": seed,
        "fold": fold,
        "hyperparameters": {"lr": 3e-4, "epochs": 5},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "history": history,
        "best_epoch": int(np.argmax([epoch["dev_accuracy"] for epoch in history])),
        "dev": dev,
        "test": None if fold is not None else test,
        "seconds": 100.0 + seed,
        "threads": 1,
        "trainable_parameters": n_trained,
        "parameters": N_PARAMETERS,
        "peak_memory_mb": 400.0 + seed,
    }
    if alphas:
        grid = np.linspace(0, 1, 11)
        found["alphas"] = [
            {"alpha": float(a), "dev_accuracy": dev["accuracy"] - 0.3 * (a - 0.8) ** 2}
            for a in grid
        ]
    return found


def study(
    dataset: str,
    method: str,
    accuracy: float = 0.5,
    seeds: tuple[int, ...] = (1, 2, 3),
    folds: int | None = None,
    train_share: float = 1.0,
    model: str = "toy",
    **of_run: Any,
) -> dict[str, Any]:
    places = [(seed, fold) for seed in seeds for fold in (range(folds) if folds else [None])]
    return {
        "dataset": dataset,
        "method": method,
        "model": model,
        "train_share": train_share,
        "folds": folds,
        "n_labels": N_LABELS[dataset],
        "command": f"python -m advanced.run --method {method} --dataset {dataset}",
        "settings": {"epochs": 5, "device": "cuda" if method == "lora" else "cpu"},
        "files": {"train_sha256": "0" * 64},
        "search": [{"lr": 3e-4, "dev_accuracy": 0.5}, {"lr": 6e-4, "dev_accuracy": 0.4}],
        "chosen": {"lr": 3e-4},
        "runs": [run(dataset, accuracy, seed, fold, **of_run) for seed, fold in places],
    }


def write(folder: Path, *studies: dict[str, Any]) -> Path:
    """Each under the name that advanced.run would give it."""
    for s in studies:
        tail = f"-cv{s['folds']}" if s["folds"] else ""
        tail += f"-train{100 * s['train_share']:.0f}" if s["train_share"] != 1 else ""
        path = folder / f"{s['dataset']}-{s['method']}-{s['model']}{tail}.json"
        path.write_text(json.dumps(s), encoding="utf-8")
    return folder
