"""Continued pretraining by itself; tests/test_advanced_run.py has it as a method."""

import math

import torch

from advanced.methods import continued
from tokenizer import Tokenizer
from training.steps import learning_rate_factor


def test_it_reads_causally_by_the_numbers_its_documentation_gives(workplace, monkeypatch):
    seen = []
    monkeypatch.setattr(continued, "train", lambda run, *_, **__: seen.append(run))
    sentences = ["a film her heart the story"] * 2000
    continued.continue_on(
        sentences, ["warm"], "model.pt", Tokenizer(tokenizer_model="tokenizer.model"),
        workplace / "read", epochs=2, lr=1e-3, seed=0, device=torch.device("cpu"),
    )  # fmt: skip
    (run,) = seen
    assert run.model.config.attention == "causal"
    n_tokens = sum(map(len, run.stream.documents))
    assert run.budget["tokens"] == 2 * n_tokens
    seq_len = min(128, run.model.config.max_seq_len)
    assert run.settings["batch_tokens"] == 16 * seq_len and run.settings["seq_len"] == seq_len
    assert (run.settings["decay_from"], run.settings["max_grad_norm"]) == (0.0, 1.0)
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    assert {group["lr"] for group in groups} == {1e-3}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    (heldout,) = run.heldout
    assert heldout.n_bytes == len("warm") + 1  # and its end


def test_the_rate_reaches_its_peak_also_in_a_few_steps(workplace, monkeypatch):
    tokenizer, peaks = Tokenizer(tokenizer_model="tokenizer.model"), []

    def note(run, *_, **__):
        n_steps = math.ceil(run.budget["tokens"] / run.settings["batch_tokens"])
        warmup, decay_from = run.settings["warmup"], run.settings["decay_from"]
        factors = [
            learning_rate_factor(step, step / n_steps, warmup, decay_from)
            for step in range(n_steps)
        ]
        peaks.append((n_steps, warmup, max(factors)))

    monkeypatch.setattr(continued, "train", note)
    for n in (20, 9000):
        continued.continue_on(
            ["a film her heart the story"] * n, ["warm"], "model.pt", tokenizer,
            workplace / str(n), epochs=3, lr=1e-3, seed=0, device=torch.device("cpu"),
        )  # fmt: skip
    (few, _, peak), (many, warmup, _) = peaks
    assert few < 40 and peak > 0.8
    assert many > 200 and warmup == 20
