"""What next-token training is: its loss, its measure on held-out text, its loop, its resumption.

L = -1/N sum_t log p(x_t | x_<t) (Radford et al. 2018, GPT, equation 1), over windows of tokens.
"""

import csv
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from advanced.corpus import TokenStream, encode_documents, windows
from checkpoint import load_torch_file
from interrupts import Stopped, held_back
from llama import Llama
from optimizer import AdamW
from resume import DIVERGED, require_not_diverged, require_same_settings
from steps import learning_rate_factor, precision, take_step
from tokenizer import Tokenizer
from utils import atomic_write, random_state, save_torch_file, set_random_state


def lm_loss(model: Llama, batch: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy in nats of windows (B, T + 1); a target of -100 does not count."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    logits, _ = model(inputs.clamp(min=0), targets=targets)  # (B, T, V)
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction=reduction
    )


class HeldOut:
    """Documents of one file that are not trained on, as windows (N, T + 1)."""

    def __init__(self, name: str, texts: list[str], tokenizer: Tokenizer, seq_len: int):
        self.name = name
        # Each document's end is a bos, which counts as the one byte of a newline.
        self.n_bytes = sum(len(text.encode("utf-8")) + 1 for text in texts)
        stream = np.concatenate([*encode_documents(tokenizer, texts), [tokenizer.bos_id]])
        n_windows = -(-(len(stream) - 1) // seq_len)
        self.n_tokens = len(stream) - 1
        padded = np.full(n_windows * seq_len + 1, -100)
        padded[: len(stream)] = stream
        self.windows = windows(padded, seq_len, 0, n_windows)

    @torch.inference_mode()
    def measure(self, model: Llama, batch_size: int) -> tuple[float, float]:
        """(nats per token, bits per byte); puts the model in eval mode and back."""
        device = model.norm.weight.device
        was_training = model.training
        model.eval()
        nats = sum(
            lm_loss(model, batch.to(device), reduction="sum").item()
            for batch in self.windows.split(batch_size)
        )
        model.train(was_training)
        return nats / self.n_tokens, nats / math.log(2) / self.n_bytes


def make_optimizers(
    model: nn.Module, kind: str, lr: float, muon_lr: float, weight_decay: float
) -> list[Optimizer]:
    """AdamW for everything, or Muon (Jordan 2024; Liu et al. 2025, arXiv 2502.16982) for the
    matrices inside the layers and AdamW for embedding and norms. Norms are not decayed."""
    parameters = list(model.named_parameters())  # a tied matrix once
    hidden = [p for name, p in parameters if p.ndim == 2 and name.startswith("layers.")]
    outer = [p for name, p in parameters if p.ndim == 2 and not name.startswith("layers.")]
    norms = [p for _, p in parameters if p.ndim == 1]
    groups = [
        {"params": outer if kind == "muon" else outer + hidden, "weight_decay": weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    optimizers: list[Optimizer] = [AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)]
    if kind == "muon":
        optimizers.append(
            torch.optim.Muon(
                hidden, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers


class Run:
    """A training run: its model, its place in the text, its history, and the folder it lives in."""

    def __init__(
        self,
        folder: Path,
        model: Llama,
        optimizers: list[Optimizer],
        stream: TokenStream,
        heldout: list[HeldOut],
        settings: dict[str, Any],
        half: bool = False,
    ):
        self.folder = folder
        self.model = model
        self.optimizers = optimizers
        self.stream = stream
        self.heldout = heldout
        self.settings = settings
        self.half = half
        self.budget: dict[str, float | None] = {"tokens": None, "minutes": None}
        self.step = 0
        self.seconds = 0.0  # from the first step on, over all sittings
        # Sum and number of the losses since the last row of the history.
        self.loss_sum = torch.zeros((), device=model.norm.weight.device)
        self.n_losses = 0
        self.history: list[dict[str, float]] = []

    def load(self) -> None:
        """Continues where `save` left off; ValueError where that run was another one."""
        path = self.folder / "state.pt"
        state = load_torch_file(path)
        require_same_settings(path, state.get("settings"), self.settings)
        try:
            self._restore(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{path}: is damaged, or of another version") from error

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.stream = TokenStream(
            self.stream.documents, self.stream.seq_len, self.stream.seed, tuple(state["position"])
        )
        set_random_state(state["random"])
        self.budget = state["budget"]
        self.step, self.seconds = state["step"], state["seconds"]
        self.history, self.n_losses = state["history"], state["n_losses"]
        self.loss_sum.fill_(state["loss_sum"])

    def save(self) -> None:
        """State, weights and history, each whole or not at all; the state, which counts, first.

        Weights that are not finite are refused, so that the last good ones stay.
        """
        require_not_diverged(self.model)
        state = {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "position": list(self.stream.position),
            "random": random_state(),
            "budget": self.budget,
            "loss_sum": self.loss_sum.item(),
            "n_losses": self.n_losses,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
        }
        save_torch_file(self.folder / "state.pt", state)
        save_model(self.folder / "model.pt", self.model, self.half)
        with atomic_write(self.folder / "history.csv") as file:
            if self.history:
                writer = csv.DictWriter(file, list(self.history[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.history)

    def evaluate(self, lr_factor: float, batch_size: int) -> str:
        """Measures every held-out set, adds a row to the history and puts it in words."""
        measured = self.measure(batch_size)
        with held_back():
            train_loss = self.loss_sum.item() / self.n_losses
            self.loss_sum.zero_()
            self.n_losses = 0
            n_tokens = self.step * self.settings["batch_tokens"]
            row = {
                "step": self.step,
                "tokens": n_tokens,
                "minutes": round(self.seconds / 60, 2),
                "lr_factor": round(lr_factor, 4),
                "train_loss": round(train_loss, 4),
            }
            self.history.append(row | measured)
        begin = f"step {self.step}, {n_tokens:,} tokens, {self.seconds / 60:.1f} minutes"
        return f"{begin}; train loss {train_loss:.3f}; {in_words(measured)}"

    def measure(self, batch_size: int) -> dict[str, float]:
        """nats per token and bits per byte of every held-out set, by "name unit"."""
        values = {}
        for heldout in self.heldout:
            nats, bits = heldout.measure(self.model, batch_size)
            values[f"{heldout.name} nats/token"] = round(nats, 4)
            values[f"{heldout.name} bits/byte"] = round(bits, 4)
        return values


def in_words(measured: dict[str, float]) -> str:
    """What `Run.measure` returns, for people: "reviews 3.611 nats/token; reviews 1.451 ..."."""
    words = []
    for key, value in measured.items():
        name, unit = key.rsplit(" ", 1)
        words.append(f"{name} {value:.3f} {unit}")
    return "; ".join(words)


def save_model(path: Path, model: Llama, half: bool) -> None:
    """A checkpoint for `load_pretrained`; a tied output matrix is written once."""
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    if model.output.weight is model.tok_embeddings.weight:
        del weights["output.weight"]
    if half:
        weights = {name: tensor.half() for name, tensor in weights.items()}
    save_torch_file(path, {"model": weights, "model_args": model.config.to_dict()})


def train(run: Run, device: torch.device, eval_minutes: float, save_minutes: float) -> None:
    """Takes steps until the budget's tokens are read or its minutes have passed.

    On `Stopped`, which comes between two steps, the run is saved first. ValueError where a loss is
    not finite; what was saved before stays.
    """
    try:
        _take_steps(run, device, eval_minutes, save_minutes)
    except Stopped as stopped:
        with held_back():
            run.save()
        stopped.is_resumable = True
        raise


def _take_steps(run: Run, device: torch.device, eval_minutes: float, save_minutes: float) -> None:
    options, bf16 = run.settings, run.settings["bf16"]
    n_rows = options["batch_tokens"] // options["seq_len"]
    total_steps = -(-run.budget["tokens"] // options["batch_tokens"])
    total_seconds = 60 * (run.budget["minutes"] or math.inf)
    started = time.monotonic() - run.seconds
    evaluated = saved = time.monotonic()
    bar = tqdm(total=total_steps, initial=run.step, unit="step", disable=None, mininterval=2.0)
    factor = 0.0
    run.model.train()
    while (progress := max(run.step / total_steps, run.seconds / total_seconds)) < 1.0:
        factor = learning_rate_factor(run.step, progress, options["warmup"], options["decay_from"])
        with held_back():
            batch = run.stream.next_batch(n_rows).to(device, non_blocking=True)
            with precision(device, bf16):
                loss = lm_loss(run.model, batch)
            if not math.isfinite(loss.item()):
                raise ValueError(
                    f"step {run.step + 1}, learning rate {factor} of its peak: the loss is "
                    f"{loss.item()}; {DIVERGED}"
                )
            loss.backward()
            take_step(run.optimizers, factor, options["max_grad_norm"])
            run.loss_sum += loss.detach()
            run.n_losses += 1
            run.step += 1
            run.seconds = time.monotonic() - started
        bar.update()

        now = time.monotonic()
        if now - evaluated >= 60 * eval_minutes:
            bar.write(run.evaluate(factor, n_rows), file=sys.stdout)
            sys.stdout.flush()
            evaluated = time.monotonic()
        if now - saved >= 60 * save_minutes:
            with held_back():
                run.save()
            saved = time.monotonic()
    bar.close()
    if run.n_losses:
        print(run.evaluate(factor, n_rows))
    with held_back():
        run.save()
