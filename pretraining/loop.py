"""Train a Llama on text: the next-token loss, held-out bits per byte, and the loop.

    L = -1/N sum_t log p(x_t | x_<t)      (Radford et al. 2018, GPT, equation 1)

over rows of T + 1 tokens, which give T inputs and T targets. Shape letters: N rows, T tokens,
V vocabulary. The command is `python -m pretraining.run`; other code calls

    train_language_model(model, texts, heldout, folder, Recipe(lr=...), state_file=...)
"""

import csv
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from formats.torch_file import save_torch_file
from llama import Llama
from optimizer import AdamW
from pretraining.batches import Batches, Row, padded, row_of, shortened, windows
from pretraining.corpus import encode_documents
from pretraining.rated import Example, encode_examples
from tokenizer import Tokenizer
from training import distributed
from training.loop import REMEDY, DivergedError, require_finite_weights
from training.schedule import learning_rate_factor, precision, take_step
from training.state import StateFile, random_state, set_random_state, stop_requests
from utils import atomic_write


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights of a run, except its text and its initial weights."""

    tokens: int | None = None  # to read, in whole steps; None: one epoch
    minutes: float | None = None  # after which a run ends earlier, evaluations included
    seq_len: int = 256  # T of a window
    batch_tokens: int = 4096  # of a step, about
    optimizer: str = "adamw"  # or "muon"
    lr: float = 3e-3  # peak, of AdamW
    muon_lr: float = 6e-3  # peak, of Muon
    weight_decay: float = 0.1  # of matrices; norms have none
    warmup: int = 100  # steps
    decay_from: float = 0.4  # share of the run after which the rate falls linearly to 0
    max_grad_norm: float = 1.0
    answer_weight: float = 1.0  # of the tokens that answer a question, in the mean loss
    seed: int = 1337
    bf16: bool = False

    @property
    def n_steps(self) -> int:
        return math.ceil(self.tokens / self.batch_tokens)


@dataclass
class Progress:
    """How far a run is: with weights, optimizer and random numbers, the state to resume from."""

    step: int = 0
    seconds: float = 0.0  # with evaluations, over all sittings
    loss_sum: float = 0.0  # over the n_losses steps since the last row of the history
    n_losses: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def share(self, recipe: Recipe) -> float:
        """Return the share of the run that is done, by tokens or by the clock."""
        by_clock = self.seconds / (60 * recipe.minutes) if recipe.minutes else 0.0
        return max(self.step / recipe.n_steps, by_clock)

    def add_step(self, loss: float, seconds: float) -> None:
        self.step += 1
        self.seconds = seconds
        self.loss_sum += loss
        self.n_losses += 1

    def add_row(self, measured: dict[str, float], recipe: Recipe, lr_factor: float) -> str:
        """Add a row to the history and put it in words; the mean loss starts anew."""
        minutes, train_loss = self.seconds / 60, self.loss_sum / self.n_losses
        row = {
            "step": self.step,
            "tokens": self.step * recipe.batch_tokens,
            "minutes": round(minutes, 4),
            "lr_factor": round(lr_factor, 4),
            "train_loss": round(train_loss, 4),
        }
        self.history.append(row | {key: round(value, 4) for key, value in measured.items()})
        self.loss_sum, self.n_losses = 0.0, 0
        begin = f"step {self.step}, {row['tokens']:,} tokens, {minutes:.1f} minutes"
        return f"{begin}; train loss {train_loss:.3f}; {_in_words(measured)}"


def token_losses(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return -log p of each target of rows (N, T + 1), in nats, (N, T)."""
    targets = batch[:, 1:]
    logits, _ = model(batch[:, :-1], targets=targets)  # (N, T, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)


class HeldOut:
    """Rows of one file that are not trained on; a token of weight 0 is not measured.

    `divisors` names the units of the result, each with what the sum of nats is divided by.
    """

    def __init__(self, name: str, rows: list[Row], divisors: dict[str, float]):
        self.name = name
        self.rows = sorted(rows, key=lambda row: len(row.ids), reverse=True)
        self.divisors = divisors

    @classmethod
    def texts(cls, name: str, texts: list[str], tokenizer: Tokenizer, seq_len: int) -> "HeldOut":
        """Measure all tokens of texts, in nats per token and bits per byte.

        A bos ends each text and counts as one byte, a newline.
        """
        tokens = np.concatenate([*encode_documents(tokenizer, texts), [tokenizer.bos_id]])
        n_bytes = sum(len(text.encode("utf-8")) + 1 for text in texts)
        divisors = {"nats/token": len(tokens) - 1, "bits/byte": math.log(2) * n_bytes}
        return cls(name, [row_of(ids, 0) for ids in windows(tokens, seq_len)], divisors)

    @classmethod
    def answers(
        cls, name: str, examples: Sequence[Example], tokenizer: Tokenizer, seq_len: int
    ) -> "HeldOut":
        """Measure the answers of examples alone, each the end of a row, in nats per answer."""
        pairs = encode_examples(tokenizer, examples)
        rows = [row_of(shortened(ids, seq_len + 1), n, other=0.0) for ids, n in pairs]
        return cls(name, rows, {"nats/answer": len(examples)})

    @torch.no_grad()
    def measure(self, model: Llama, max_tokens: int) -> dict[str, float]:
        """Return "<name> <unit>" of each unit; a pass takes at most `max_tokens`.

        Each rank takes its share of the rows.
        """
        device, was_training = model.norm.weight.device, model.training
        model.eval()
        nats = 0.0
        for ids, weights in padded(distributed.shard(self.rows), max_tokens):
            losses = token_losses(model, ids.to(device))
            nats += (losses * weights[:, 1:].to(device)).sum().item()
        nats = distributed.all_sum(torch.tensor(nats, dtype=torch.float64)).item()
        model.train(was_training)
        return {f"{self.name} {unit}": nats / divisor for unit, divisor in self.divisors.items()}


def measure(model: Llama, heldout: list[HeldOut], max_tokens: int) -> dict[str, float]:
    """Measure every held-out set."""
    measured: dict[str, float] = {}
    for file in heldout:
        measured |= file.measure(model, max_tokens)
    return measured


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[Optimizer]:
    """Return AdamW, or Muon for the matrices of the layers and AdamW for the rest.

    Muon is PyTorch's (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982). Matrices decay, norms
    do not.
    """
    parameters = list(model.named_parameters())  # a tied matrix once
    hidden = [p for name, p in parameters if p.ndim == 2 and name.startswith("layers.")]
    outer = [p for name, p in parameters if p.ndim == 2 and not name.startswith("layers.")]
    norms = [p for _, p in parameters if p.ndim == 1]
    by_muon = hidden if recipe.optimizer == "muon" else []
    groups = [
        {"params": outer if by_muon else outer + hidden, "weight_decay": recipe.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    optimizers: list[Optimizer] = [AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), eps=1e-8)]
    if by_muon:
        options = {"lr": recipe.muon_lr, "weight_decay": recipe.weight_decay}
        optimizers.append(torch.optim.Muon(by_muon, adjust_lr_fn="match_rms_adamw", **options))
    return optimizers


def train_language_model(
    model: Llama,
    texts: list[np.ndarray],
    heldout: list[HeldOut],
    folder: Path,
    recipe: Recipe,
    *,
    state_file: StateFile,
    examples: Sequence[tuple[np.ndarray, int]] = (),
    micro_tokens: int | None = None,
    eval_minutes: float = 5.0,
    half: bool = False,
) -> list[dict[str, float]]:
    """Train `model` in place, on its device; return the history, one row for each evaluation.

    `texts` are token ids, bos first (`corpus.encode_documents`), and `examples` end in answers
    (`rated.encode_examples`); `Batches` mixes them. Several ranks take equal shares of each step.
    `micro_tokens` bounds the tokens of a pass and so the memory; a step adds the gradients of its
    passes. Resume from `state_file` if it holds a state. State is saved at the start, when it is
    due, and on Ctrl-C and SIGTERM, which raise `Stopped` between two steps. At the end `folder`
    gets model.pt (float16 with `half`) and history.csv, and the state is deleted. Raises
    `DivergedError` if a loss or a weight is not finite; the last state stays.
    """
    n = recipe.batch_tokens
    batches = Batches(texts, examples, recipe.seq_len, n, recipe.seed, recipe.answer_weight)
    recipe = replace(recipe, tokens=recipe.tokens or n * batches.batches_per_epoch)
    optimizers = make_optimizers(model, recipe)
    progress = _restore(state_file, model, optimizers, recipe.seed)
    micro_tokens = micro_tokens or recipe.batch_tokens
    network = distributed.wrap(model)
    model.train()

    def save() -> None:
        require_finite_weights(model)
        state_file.save(
            model=model.state_dict(),
            model_args=model.config.to_dict(),  # so that the state is itself a checkpoint
            optimizers=[optimizer.state_dict() for optimizer in optimizers],
            random=random_state(),
            progress=vars(progress),
        )

    if progress.step == 0:
        _say(f"before: {_in_words(measure(model, heldout, micro_tokens))}")
        save()  # a kill from here on leaves a state
    started, evaluated_at = time.monotonic() - progress.seconds, progress.seconds
    with stop_requests() as stop, _progress_bar(recipe.n_steps, progress.step) as bar:
        while (done := progress.share(recipe)) < 1.0:
            lr_factor = learning_rate_factor(progress.step, done, recipe.warmup, recipe.decay_from)
            rows = batches.batch(progress.step)
            loss = add_gradients(network, rows, micro_tokens, recipe.bf16)
            if not math.isfinite(loss):
                raise DivergedError(
                    f"step {progress.step + 1}, at {lr_factor:.3g} of the peak learning rate: "
                    f"the loss is {loss}; {REMEDY}"
                )
            take_step(optimizers, lr_factor, recipe.max_grad_norm)
            progress.add_step(loss, _seconds_since(started))
            bar.update()
            is_last = progress.share(recipe) >= 1.0
            if is_last or progress.seconds - evaluated_at >= 60 * eval_minutes:
                measured = measure(model, heldout, micro_tokens)
                _say(progress.add_row(measured, recipe, lr_factor))
                evaluated_at = _seconds_since(started)
            stop.handle(save, state_file, is_last or state_file.is_due())
    if distributed.is_main():
        _write_outputs(folder, model, progress.history, half)
        state_file.delete()
    return progress.history


def add_gradients(
    network: nn.Module, rows: Sequence[Row], micro_tokens: int, bf16: bool = False
) -> float:
    """Add the gradient of the weighted mean loss of the rows of a step; return that loss.

    Each rank takes its share of the rows, about `micro_tokens` at a time. A rank without a row
    takes one of weight 0: in its last pass every rank exchanges gradients.
    """
    device = next(network.parameters()).device
    own = distributed.shard(rows)
    total_weight = sum(row.weights[1:].sum(dtype=torch.float64).item() for row in rows)
    passes = list(padded(own or rows[:1], micro_tokens))
    total = 0.0
    for i, (ids, weights) in enumerate(passes, start=1):
        is_last = i == len(passes)  # the pass in which DistributedDataParallel exchanges
        exchange = nullcontext if is_last else getattr(network, "no_sync", nullcontext)
        shares = weights[:, 1:].double() * (bool(own) / total_weight)  # (N, T), of the mean
        with exchange():
            with precision(device, bf16):
                losses = token_losses(network, ids.to(device))
            loss = (losses * shares.to(losses)).sum()
            (loss * distributed.world_size()).backward()  # the exchange takes the mean
        total += loss.item()
    return distributed.all_sum(torch.tensor(total, dtype=torch.float64)).item()


def _seconds_since(started: float) -> float:
    """Return the seconds since then by the clock of rank 0, which all ranks follow."""
    seconds = time.monotonic() - started if distributed.is_main() else 0.0
    return distributed.all_sum(torch.tensor(seconds, dtype=torch.float64)).item()


def _restore(
    state_file: StateFile, model: Llama, optimizers: list[Optimizer], seed: int
) -> Progress:
    """Load the saved state, if there is one; return how far that run is."""
    progress, saved = Progress(), state_file.saved
    if saved is not None:
        try:
            model.load_state_dict(saved["model"])
            for optimizer, kept in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
            set_random_state(saved["random"])
            progress = Progress(**saved["progress"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise state_file.damaged() from error
        _say(f"continue {state_file.path} at step {progress.step:,}")
    if not distributed.is_main():  # each rank draws its own dropout masks
        torch.manual_seed(seed + progress.step + 1_000_003 * distributed.rank())
    return progress


def _write_outputs(folder: Path, model: Llama, history: list[dict[str, float]], half: bool) -> None:
    """Write history.csv, then model.pt, whose presence says that the run is finished."""
    with atomic_write(folder / "history.csv") as file:
        writer = csv.DictWriter(file, list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}  # tied: once
    if half:
        weights = {name: tensor.half() for name, tensor in weights.items()}
    save_torch_file(folder / "model.pt", {"model": weights, "model_args": model.config.to_dict()})


def _progress_bar(n_steps: int, step: int) -> tqdm:
    hidden = None if distributed.is_main() else True  # None: shown on a terminal
    return tqdm(total=n_steps, initial=step, unit="step", mininterval=2.0, disable=hidden)


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stdout)  # above the progress bar
    sys.stdout.flush()


def _in_words(measured: dict[str, float]) -> str:
    """{"reviews bits/byte": 1.4512} -> "reviews 1.451 bits/byte"."""
    parts = [(*key.rsplit(" ", 1), value) for key, value in measured.items()]
    return "; ".join(f"{name} {value:.3f} {unit}" for name, unit, value in parts)
