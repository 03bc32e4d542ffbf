"""Continued pretraining by itself; tests/test_advanced_run.py has it as a method."""

import math

import torch

from advanced import continued
from steps import learning_rate_factor
from tokenizer import Tokenizer


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
