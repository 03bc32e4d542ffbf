"""The rows of the table: what is timed, in which unit, and what no program could go below."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import jobs
from config import LlamaConfig
from llama import Llama

CONTENDERS = ("naive", "ours", "transformers")


@dataclass(frozen=True)
class Row:
    """What is timed for a shape; `limit` gives the seconds that the machine cannot go below, if
    every layer is computed at every position."""

    name: str
    maker: str
    options: dict[str, Any]
    unit: str  # of `amount`, per second; "s" for the seconds themselves
    amount: Callable[["Counts"], float]
    limit: Callable[["Counts"], float]
    contenders: tuple[str, ...] = CONTENDERS
    targets: dict[str, float] = field(default_factory=dict)  # of the stories42M shape, see `check`


class Counts:
    """Multiplications and bytes that a row cannot avoid, on a machine of known rates."""

    def __init__(self, shape: str, rates: dict[str, float]):
        self.shape, self.rates = shape, rates
        self.config = LlamaConfig(**jobs.SHAPES[shape])
        with torch.device("meta"):
            model = Llama(self.config)
        self.n_parameters = sum(parameter.numel() for parameter in model.parameters())
        matrices = [p for p in model.layers.parameters() if p.ndim == 2]
        self.n_in_layers = sum(matrix.numel() for matrix in matrices)

    def forward(self, lengths: Sequence[int], n_logits: int = 0, causal: bool = False) -> float:
        """Floating-point operations of one pass over sequences, without elementwise work."""
        c = self.config
        n_scores = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
        attention = 4 * c.n_layers * c.dim * n_scores
        logits = 2 * n_logits * c.vocab_size * c.dim
        return 2 * self.n_in_layers * sum(lengths) + attention + logits

    def seconds(self, operations: float) -> float:
        return operations / self.rates["operations_per_s"]

    def reading(self, n_bytes: float) -> float:
        return n_bytes / self.rates["bytes_per_s"]

    def data(self, options: dict[str, Any], padded: bool, **more: Any) -> list[int]:
        """Lengths of a row's sentences, as they are or as their batches pad them."""
        size = options["batch_size"]
        n = size * options["n_batches"]
        data = jobs.make_data(options["dataset"], n, self.shape, **more)
        if not padded:
            return [len(example.tokens) for example in data.examples]
        batches = jobs.in_order(data, size)
        return [batch["token_ids"].shape[1] for batch in batches for _ in batch["lengths"]]


def generate_row(attention: str, contenders: tuple[str, ...], targets: dict[str, float]) -> Row:
    def limit(counts: Counts) -> float:
        start, n = jobs.N_PROMPT, jobs.N_NEW
        if attention == "causal":  # every weight is read for every token
            return counts.reading(4 * counts.n_parameters * n)
        return counts.seconds(sum(counts.forward([start + i], 1) for i in range(n)))

    return Row(
        f"generate, {attention}", "generate", {"attention": attention}, "tokens/s",
        lambda counts: jobs.N_NEW, limit, contenders, targets,
    )  # fmt: skip


def steps_row(dataset: str, batch_size: int, n_batches: int) -> Row:
    options = {"dataset": dataset, "batch_size": batch_size, "n_batches": n_batches}
    return Row(
        f"finetune, full, {dataset} x {batch_size}", "steps", options, "padded tokens/s",
        lambda counts: sum(counts.data(options, padded=True)),
        lambda counts: counts.seconds(3 * counts.forward(counts.data(options, padded=True))),
        targets={"naive": 1.25, "transformers": 1.1, "memory": 0.8},
    )  # fmt: skip


def epoch_row(dataset: str, batch_size: int, n_batches: int, naive: float) -> Row:
    options = {"dataset": dataset, "batch_size": batch_size, "n_batches": n_batches}

    def limit(counts: Counts) -> float:
        # Three passes to train, one for the train accuracy, one over a batch for the dev accuracy.
        n_passes = 3 + 1 + 1 / n_batches
        lengths = counts.data(options, padded=False)
        return counts.seconds(n_passes * counts.forward(lengths, causal=True))

    return Row(
        f"epoch, masked, {dataset} x {batch_size}", "epoch", options, "sentences/s",
        lambda counts: batch_size * n_batches, limit, targets={"naive": naive, "memory": 0.8},
    )  # fmt: skip


def prompt_row(dataset: str, batch_size: int, n_batches: int) -> Row:
    options = {"dataset": dataset, "batch_size": batch_size, "n_batches": n_batches}

    def limit(counts: Counts) -> float:
        lengths = counts.data(options, padded=False, longer_by=jobs.QUESTION)
        return counts.seconds(counts.forward(lengths, len(lengths), causal=True))

    return Row(
        f"prompt, masked, {dataset} x {batch_size}", "prompt", options, "sentences/s",
        lambda counts: batch_size * n_batches, limit, targets={"naive": 2.0},
    )  # fmt: skip


def all_rows(scratch: str) -> list[Row]:
    return [
        generate_row("causal", CONTENDERS, {"naive": 4.0, "transformers": 1.7, "limit": 0.75}),
        generate_row("full", ("naive", "ours"), {"naive": 1.3}),
        steps_row("sst", 80, 2),
        steps_row("cfimdb", 10, 2),
        epoch_row("sst", 80, 5, naive=2.5),
        epoch_row("cfimdb", 10, 5, naive=2.0),
        prompt_row("sst", 10, 20),
        Row(
            "AdamW step", "adamw", {}, "s", lambda counts: 1,
            # theta, gradient, m and v are read, theta, m and v written
            lambda counts: counts.reading(7 * 4 * counts.n_parameters),
            ("naive", "ours", "torch", "torch fused"), {"naive": 5.0, "torch fused": 1 / 1.3},
        ),
        Row(
            "start-up to first token", "start_up", {"scratch": scratch}, "s", lambda counts: 1,
            lambda counts: 0.0,  # what `import torch` and reading take is measured beside it
            (*CONTENDERS, "import torch", "read file"), {"beyond import and reading": 0.3},
        ),
    ]  # fmt: skip
