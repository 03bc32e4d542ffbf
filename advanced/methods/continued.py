"""Continued pretraining on a task's own sentences (Gururangan et al. 2020, arXiv 2004.10964).

Before finetuning, the model continues its pretraining on the train split's sentences, without their
labels (section 4, "TAPT"):

    L = -1/N sum_t log p(x_t | x_<t)

The model keeps its shape and tokenizer; attention is causal. The paper continues a masked language
model for a hundred epochs with new masks in each; here the next token is predicted, and
`--pretrain_epochs` is 3 by default.
"""

import csv
import hashlib
import math
from dataclasses import asdict
from pathlib import Path

import torch

from llama import load_pretrained
from pretraining.corpus import digest_of, encode_documents
from pretraining.loop import HeldOut, Recipe, train_language_model
from tokenizer import Tokenizer
from training.state import StateFile, only_writer
from utils import seed_everything, sha256_of

SEED = 0  # all runs of a study share the continued model


def continue_pretraining(
    sentences: list[str],
    heldout: list[str],
    checkpoint: str,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    epochs: int,
    lr: float,
    device: torch.device,
    bf16: bool = False,
    save_minutes: float = 5.0,
) -> tuple[Path, float]:
    """Train on the sentences; return (path of the model, seconds). `heldout` is only measured.

    The name of the run's folder is `folder` and a digest of the settings. A finished run is not
    repeated, and an interrupted one continues.
    """
    model = load_pretrained(checkpoint, attention="causal", device=device)
    texts = encode_documents(tokenizer, sentences)
    recipe = _recipe(sum(map(len, texts)), model.config.max_seq_len, epochs, lr, bf16)
    settings = {**asdict(recipe), "text_sha256": digest_of(sentences), "device": device.type}
    settings["model_sha256"] = sha256_of(checkpoint)
    settings["tokenizer_sha256"] = sha256_of(tokenizer.model_path)
    digest = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:12]
    folder = folder.with_name(f"{folder.name}-{digest}")
    folder.mkdir(parents=True, exist_ok=True)
    path, history = folder / "model.pt", folder / "history.csv"
    with only_writer(path, folder / "state.pt"):
        if not path.exists() or (folder / "state.pt").exists():
            seed_everything(SEED)
            train_language_model(
                model,
                texts,
                [HeldOut.texts("held out", heldout, tokenizer, recipe.seq_len)],
                folder,
                recipe,
                state_file=StateFile(folder / "state.pt", settings, minutes=save_minutes),
                eval_minutes=math.inf,
            )
    with history.open(encoding="utf-8") as file:
        return path, 60 * float(list(csv.DictReader(file))[-1]["minutes"])


def _recipe(n_tokens: int, max_seq_len: int, epochs: int, lr: float, bf16: bool) -> Recipe:
    """Return the recipe for `epochs` passes over a text, of which a few sentences are a window."""
    seq_len = min(128, max_seq_len, n_tokens - 1)
    n_rows = min(16, (n_tokens - 1) // seq_len)
    n_steps = math.ceil(epochs * n_tokens / (n_rows * seq_len))
    return Recipe(
        tokens=epochs * n_tokens,
        seq_len=seq_len,
        batch_tokens=n_rows * seq_len,
        lr=lr,
        warmup=min(20, n_steps // 10),
        decay_from=0.0,
        seed=SEED,
        bf16=bf16,
    )
