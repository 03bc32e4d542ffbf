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

from config import LlamaConfig
from formats.checkpoint import load_torch_file, require_finite
from llama import Llama
from optimizer import AdamW
from pretraining import sharding
from pretraining.corpus import TokenStream, encode_documents, windows
from tokenizer import Tokenizer
from training.distributed import ALONE, Ranks, Signals
from training.interrupts import Stopped
from training.state import DIVERGED, require_same_settings
from training.steps import learning_rate_factor, precision, take_step
from utils import atomic_write, random_state, save_torch_file, set_random_state

FILES = ("state.pt", "model.pt", "tokenizer.model", "history.csv")  # of a run, in its folder


def lm_loss(model: Llama, batch: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy in nats of windows (B, T + 1); a target of -100 does not count."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    logits, _ = model(inputs.clamp(min=0), targets=targets)  # (B, T, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction=reduction)


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

    @torch.no_grad()
    def measure(self, model: Llama, batch_size: int, ranks: Ranks = ALONE) -> tuple[float, float]:
        """(nats per token, bits per byte); puts the model in eval mode and back. Each of several
        `ranks` takes every `size`-th batch."""
        device = model.norm.weight.device
        was_training = model.training
        model.eval()
        batches, nats = self.windows.split(batch_size), 0.0
        for start in range(0, len(batches), ranks.size):  # a model that is cut takes all ranks
            mine = start + ranks.rank
            batch = batches[min(mine, len(batches) - 1)].to(device)
            nats += (mine < len(batches)) * lm_loss(model, batch, reduction="sum").item()
        (nats,) = ranks.sum(nats)
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
        ranks: Ranks = ALONE,
        micro_rows: int | None = None,
    ):
        self.folder = folder
        self.model = model
        self.optimizers = optimizers
        self.stream = stream
        self.heldout = heldout
        self.settings = settings
        self.half = half
        self.ranks = ranks
        self.micro_rows = micro_rows  # windows of a pass; None: all that a rank has of a batch
        self.is_sharded = any(map(sharding.is_cut, model.parameters()))
        self.trained = model if self.is_sharded else ranks.wrap(model)
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
        with self.ranks.copy_of(path) as copy:
            state = load_torch_file(copy)
        require_same_settings(path, state.get("settings"), self.settings)
        try:
            self._restore(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{path}: is damaged, or of another version") from error

    def _restore(self, state: dict[str, Any]) -> None:
        weights, optimizers = state.get("model"), state.get("optimizers")
        if "shards" in state:
            weights, optimizers = sharding.read_shards(self.folder, state["shards"])
        sharding.put_rows(self.model, weights, self.ranks)
        for optimizer, saved in zip(self.optimizers, optimizers, strict=True):
            if self.is_sharded:
                saved = sharding.cut_optimizer(saved, self.ranks)
            optimizer.load_state_dict(saved)
        self.stream = TokenStream(
            self.stream.documents, self.stream.seq_len, self.stream.seed, tuple(state["position"])
        )
        set_random_state(state["random"])
        if self.ranks.size > 1:
            self.ranks.set_random_states(state.get("random_of_ranks", []), state["step"])
        self.budget = state["budget"]
        self.step, self.seconds = state["step"], state["seconds"]
        self.history, self.n_losses = state["history"], state["n_losses"]
        self.loss_sum.fill_(state["loss_sum"])

    def save(self) -> None:
        """State, weights and history, each whole or not at all; the state, which counts, first.

        Weights that are not finite are refused, so that the last good ones stay. All ranks call it;
        the first one writes, and of a model that is cut each its own rows.
        """
        ranks = self.ranks
        with ranks.agreed():
            own = {n: sharding.own_rows(p) for n, p in self.model.named_parameters()}
            require_finite(own, DIVERGED)
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        kept: dict[str, Any] = {"model": self.model.state_dict(), "optimizers": optimizers}
        if self.is_sharded:
            content = {"model": own, "optimizers": optimizers}
            kept = {"shards": sharding.save_shard(self.folder, self.step, ranks, content)}
        if ranks.size > 1:
            kept["random_of_ranks"] = ranks.random_states()
        weights = sharding.whole_weights(self.model)
        if not ranks.is_first:
            return
        state = {
            **kept,
            "settings": self.settings,
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
        sharding.remove_shards(self.folder, but=kept.get("shards", ()))
        save_weights(self.folder / "model.pt", weights, self.model.config, self.half)
        with atomic_write(self.folder / "history.csv") as file:
            if self.history:
                writer = csv.DictWriter(file, list(self.history[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.history)

    def evaluate(self, lr_factor: float, n_rows: int, signals: Signals) -> str:
        """Measures every held-out set, adds a row to the history and puts it in words."""
        measured = self.measure(n_rows)
        with signals.held_back():
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

    def measure(self, n_rows: int) -> dict[str, float]:
        """nats per token and bits per byte of every held-out set, by "name unit", in passes of as
        many windows as training takes of a step's `n_rows`."""
        values, batch_size = {}, self.micro_rows or -(-n_rows // self.ranks.size)
        for heldout in self.heldout:
            nats, bits = heldout.measure(self.model, batch_size, self.ranks)
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
    save_weights(path, sharding.whole_weights(model), model.config, half)


def save_weights(
    path: Path, weights: dict[str, torch.Tensor], config: LlamaConfig, half: bool
) -> None:
    if half:
        weights = {name: tensor.half() for name, tensor in weights.items()}
    save_torch_file(path, {"model": weights, "model_args": config.to_dict()})


def train(run: Run, device: torch.device, eval_minutes: float, save_minutes: float) -> None:
    """Takes steps until the budget's tokens are read or its minutes have passed.

    On `Stopped`, which comes between two steps, the run is saved first. ValueError where a loss is
    not finite; what was saved before stays. Several ranks take equal shares of each step's rows, by
    the first one's clock.
    """
    with run.ranks.signals() as signals:
        try:
            _take_steps(run, device, eval_minutes, save_minutes, signals)
        except Stopped as stopped:
            with signals.held_back():
                run.save()
            stopped.is_resumable = True
            raise


def _take_steps(
    run: Run, device: torch.device, eval_minutes: float, save_minutes: float, signals: Signals
) -> None:
    options, ranks = run.settings, run.ranks
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
        with signals.held_back():
            loss = _backward(run, run.stream.next_batch(n_rows), device)
            if not math.isfinite(loss):
                raise ValueError(
                    f"step {run.step + 1}, learning rate {factor} of its peak: the loss is "
                    f"{loss}; {DIVERGED}"
                )
            take_step(run.optimizers, factor, options["max_grad_norm"])
            run.loss_sum += loss
            run.n_losses += 1
            run.step += 1
            now = time.monotonic()
            is_due = now - evaluated >= 60 * eval_minutes, now - saved >= 60 * save_minutes
            run.seconds, to_evaluate, to_save = ranks.of_first(now - started, *is_due)
        signals.heed()
        bar.update()
        if to_evaluate:
            bar.write(run.evaluate(factor, n_rows, signals), file=sys.stdout)
            sys.stdout.flush()
            evaluated = time.monotonic()
        if to_save:
            with signals.held_back():
                run.save()
            saved = time.monotonic()
    bar.close()
    if run.n_losses:
        print(run.evaluate(factor, n_rows, signals))
    with signals.held_back():
        run.save()


def _backward(run: Run, batch: torch.Tensor, device: torch.device) -> float:
    """Adds the gradient of the mean loss of the windows (N, T + 1), of all ranks, and returns it.

    Each rank takes its share, in as many passes as `micro_rows` makes of the largest share; where
    it has no window left for one it takes one of weight 0, as all have to take part in each.
    """
    ranks = run.ranks
    largest = -(-len(batch) // ranks.size)
    own, micro_rows = batch[ranks.rows(len(batch))], run.micro_rows or largest
    total = 0.0
    for start in range(0, largest, micro_rows):
        part = own[start : start + micro_rows]
        share = len(part) / len(batch)
        part = (part if len(part) else batch[:1]).to(device, non_blocking=True)
        with ranks.exchanging(run.trained, is_last=start + micro_rows >= largest):
            with precision(device, run.settings["bf16"]):
                loss = lm_loss(run.trained, part)
            (loss * (share * ranks.size)).backward()  # the exchange takes the mean
        total += share * loss.item()
    return ranks.sum(total)[0]
