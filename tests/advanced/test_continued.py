"""Continued pretraining by itself; test_advanced_run.py has it as a method."""

import math

import pytest
import torch

from advanced.methods import continued
from tokenizer import Tokenizer
from training import state
from training.schedule import learning_rate_factor


def read(workplace, monkeypatch, n_sentences: int) -> dict:
    """Return the arguments that the training gets, none if it is not begun."""
    seen = {}

    def note(model, documents, heldout, folder, recipe, **options):
        seen.update(model=model, documents=documents, heldout=heldout, recipe=recipe)
        (folder / "history.csv").write_text("minutes\n0.5\n", encoding="utf-8")

    monkeypatch.setattr(continued, "train_language_model", note)
    _, seconds = continued.continue_pretraining(
        ["a film her heart the story"] * n_sentences, ["warm"], "model.pt",
        Tokenizer(tokenizer_model="tokenizer.model"), workplace / "read",
        epochs=3, lr=1e-3, device=torch.device("cpu"),
    )  # fmt: skip
    assert seconds == 30.0
    return seen


def test_it_reads_causally_and_only_measures_the_held_out_text(workplace, monkeypatch):
    seen = read(workplace, monkeypatch, 2000)
    model, recipe = seen["model"], seen["recipe"]
    assert model.config.attention == "causal"
    assert recipe.tokens == 3 * sum(map(len, seen["documents"]))
    assert recipe.seq_len == min(128, model.config.max_seq_len)
    assert recipe.batch_tokens == 16 * recipe.seq_len
    (heldout,) = seen["heldout"]
    n_bytes = len("warm") + 1  # and its end
    assert heldout.divisors["bits/byte"] == pytest.approx(math.log(2) * n_bytes)


def test_a_finished_run_is_not_repeated_when_the_code_changes(workplace, monkeypatch):
    read(workplace, monkeypatch, 20)
    (folder,) = workplace.glob("read-*")
    (folder / "model.pt").touch()
    for module in (state, continued):
        monkeypatch.setattr(module, "source_digest", lambda: "other", raising=False)
    assert read(workplace, monkeypatch, 20) == {}
    assert list(workplace.glob("read-*")) == [folder]


def test_the_rate_reaches_its_peak_also_in_a_few_steps(workplace, monkeypatch):
    few, many = (read(workplace, monkeypatch, n)["recipe"] for n in (20, 9000))
    assert few.n_steps < 40 and many.n_steps > 200 and many.warmup == 20
    factors = [
        learning_rate_factor(step, step / few.n_steps, few.warmup, few.decay_from)
        for step in range(few.n_steps)
    ]
    assert max(factors) > 0.8 and factors[-1] < 0.3
