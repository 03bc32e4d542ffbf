"""The training loop against the same steps written out, and what evaluation promises."""

import math
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score

from classifier import LlamaEmbeddingClassifier
from conftest import random_llama
from optimizer import AdamW
from training import loop as training
from training.dataset import Example, SentenceDataset, make_loader
from training.distributed import ALONE, Ranks, Signals
from training.interrupts import Stopped
from training.loop import (
    Evaluation,
    Recipe,
    evaluate,
    log_probs_of,
    parameter_groups,
    train_classifier,
)
from training.state import Place
from training.steps import take_step

CPU = torch.device("cpu")


def random_data(n: int = 10, seed: int = 0) -> SentenceDataset:
    rng = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(n):
        length = int(torch.randint(2, 8, (), generator=rng))
        tokens = torch.randint(3, 320, (length,), generator=rng).tolist()
        examples.append(Example(f"sentence {i}", i % 2, tokens))
    return SentenceDataset(examples, pad_id=3)


def classifier(pooling: str = "mean", **shape) -> LlamaEmbeddingClassifier:
    config = SimpleNamespace(
        num_labels=2, option="finetune", hidden_dropout_prob=0.0, pooling=pooling
    )
    llama = random_llama(scale=1.0, **shape)
    torch.manual_seed(0)
    return LlamaEmbeddingClassifier(config, llama)


def train(model, data, dev=None, **options):
    defaults = {"epochs": 2, "batch_size": 4, "lr": 1e-3, "seed": 7}
    return train_classifier(
        model,
        data,
        dev or data,
        device=CPU,
        **{**defaults, "on_epoch": lambda report, best: None, **options},
    )


def test_an_epoch_is_the_steps_written_out():
    data, model, twin = random_data(), classifier(), classifier()
    history = train(model, data, epochs=1)

    optimizer = AdamW(twin.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(7)
    losses = []
    for batch in make_loader(data, 4, generator, similar_lengths=True):
        log_probs = twin(batch["token_ids"], lengths=batch["lengths"])
        picked = log_probs[torch.arange(len(log_probs)), batch["labels"]]
        loss = -picked.sum() / 4  # also for the last batch of two
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(losses) == 3
    assert history[0].train_loss == pytest.approx(sum(losses) / 3, rel=1e-6)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_equal_seeds_give_equal_weights_and_other_seeds_do_not():
    runs = []
    for seed in (7, 7, 8):
        model = classifier()
        train(model, random_data(), seed=seed)
        runs.append(model.classifier_head.weight)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_best_is_the_first_epoch_with_the_highest_dev_accuracy(monkeypatch):
    dev_accuracies = iter([0.0, 0.5, 0.5, 0.4, 0.6])

    def scripted(model, loader, device, description, bf16, ranks):
        accuracy = next(dev_accuracies) if "dev" in description else 1.0
        return SimpleNamespace(accuracy=accuracy)

    monkeypatch.setattr("training.loop.evaluate", scripted)
    calls = []
    history = train(
        classifier(), random_data(), epochs=5, on_epoch=lambda report, best: calls.append(best)
    )
    assert calls == [True, True, False, False, True]  # also an accuracy of 0 leaves a checkpoint
    assert [report.epoch for report in history] == [0, 1, 2, 3, 4]


def test_training_overfits_eight_sentences():
    data = random_data(8)
    history = train(classifier(), data, epochs=40, lr=3e-3, batch_size=8)
    assert history[-1].train_accuracy == 1.0
    assert history[-1].train_loss < 0.1 < history[0].train_loss


def test_evaluation_by_length_says_the_same_in_the_same_order():
    data, model = random_data(23), classifier()
    plain = evaluate(model, make_loader(data, 4), CPU)
    loader = make_loader(data, 4, similar_lengths=True)
    lengths = [length for batch in loader for length in batch["lengths"].tolist()]
    assert lengths == sorted(lengths, reverse=True)
    found = evaluate(model, loader, CPU)
    assert found.confidences == pytest.approx(plain.confidences, abs=1e-6)
    assert replace(found, confidences=plain.confidences) == plain
    assert len(set(plain.predictions)) == 2


def test_evaluation_matches_scikit_learn_and_keeps_the_order():
    data, model = random_data(), classifier()
    result = evaluate(model.train(), make_loader(data, 3), CPU)
    assert not model.training
    assert result.sentences == [example.sentence for example in data.examples]
    assert result.labels == [example.label for example in data.examples]
    matches = [p == y for p, y in zip(result.predictions, result.labels, strict=True)]
    assert result.accuracy == sum(matches) / len(matches)
    assert result.macro_f1 == pytest.approx(
        f1_score(result.labels, result.predictions, average="macro")
    )


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("attention", ["full", "causal"])
def test_masked_predictions_do_not_depend_on_the_batching(pooling, attention):
    model, data = classifier(pooling, attention=attention).eval(), random_data()
    with torch.no_grad():
        by_batch_size = [
            torch.cat([log_probs_of(model, batch, CPU) for batch in make_loader(data, size)])
            for size in (1, 3, 10)
        ]
    for other in by_batch_size[1:]:
        torch.testing.assert_close(by_batch_size[0], other, rtol=1e-5, atol=1e-5)


def test_examples_without_gold_label_are_predicted_but_not_counted():
    model, data = classifier(), random_data()
    full = evaluate(model, make_loader(data, 4), CPU)
    half = [e._replace(label=-1) if i >= 4 else e for i, e in enumerate(data.examples)]
    partly = evaluate(model, make_loader(SentenceDataset(half, 3), 4), CPU)
    assert partly.predictions == full.predictions
    hits = [full.predictions[i] == data.examples[i].label for i in range(4)]
    assert partly.accuracy == sum(hits) / 4
    none = [e._replace(label=-1) for e in data.examples]
    unlabelled = evaluate(model, make_loader(SentenceDataset(none, 3), 4), CPU)
    assert unlabelled.accuracy is None
    assert unlabelled.macro_f1 is None


def test_a_model_that_takes_token_ids_alone_is_handed_nothing_else():
    data = random_data()
    received = []

    class Plain(torch.nn.Module):
        def forward(self, input_ids):
            received.append(input_ids.shape)
            return F.log_softmax(torch.tensor([[0.0, math.log(3.0)]]), -1).repeat(len(input_ids), 1)

    result = evaluate(Plain(), make_loader(data, 5), CPU)
    assert result.predictions == [1] * 10
    assert len(received) == 2


# ---------------------------------------------------------------- the recipe


def test_bfloat16_follows_float32():
    """Also from step to step: autocast must not go on with copies of earlier weights."""
    data = random_data(n=40)
    history = {
        bf16: train(classifier(), data, epochs=4, lr=3e-3, recipe=Recipe(bf16=bf16))
        for bf16 in (False, True)
    }
    losses = {bf16: [report.train_loss for report in history[bf16]] for bf16 in history}
    assert losses[False][0] - losses[False][-1] > 0.05
    # The stale copies would keep the first loss; rounding moves the last ones, of 0.07, by 0.004.
    assert losses[True] == pytest.approx(losses[False], rel=0.05, abs=0.01)
    assert losses[True] != losses[False]


def test_a_schedule_rises_over_its_share_of_the_steps_and_falls_to_zero(monkeypatch):
    factors = []

    def spy(optimizers, factor, max_grad_norm):
        factors.append(factor)
        take_step(optimizers, factor, max_grad_norm)

    monkeypatch.setattr("training.loop.take_step", spy)
    data = random_data(n=40)  # ten steps an epoch
    train(classifier(), data, epochs=2, recipe=Recipe(warmup=0.2, lr_decay="linear"))
    rise = [0.25, 0.5, 0.75, 1.0]
    fall = [(20 - step) / 16 for step in range(4, 20)]
    assert factors == pytest.approx(rise + fall)
    factors.clear()
    train(classifier(), data, epochs=2, recipe=Recipe(warmup=0.2, lr_decay="cosine"))
    wave = [(1 + math.cos(math.pi * (step - 4) / 16)) / 2 for step in range(4, 20)]
    assert factors == pytest.approx(rise + wave)
    factors.clear()
    train(classifier(), data, epochs=2, recipe=Recipe(warmup=0.18))  # 3.6 steps are four
    assert factors == pytest.approx(rise + [1.0] * 16)
    factors.clear()
    train(classifier(), data, epochs=1)
    assert factors == [1.0] * 10


def test_a_schedule_of_zero_rate_changes_nothing_and_clipping_reaches_the_step(monkeypatch):
    norms = []

    def spy(optimizers, factor, max_grad_norm):
        norms.append(max_grad_norm)
        take_step(optimizers, 0.0, max_grad_norm)

    monkeypatch.setattr("training.loop.take_step", spy)
    model, twin = classifier(), classifier()
    train(model, random_data(), epochs=1, recipe=Recipe(max_grad_norm=0.5))
    assert norms == [0.5] * 3
    for ours, untouched in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, untouched)


def test_running_accuracy_is_that_of_the_training_passes():
    data, model, twin = random_data(), classifier(), classifier()
    history = train(model, data, epochs=1, recipe=Recipe(running_train_acc=True))
    optimizer = AdamW(twin.parameters(), lr=1e-3)
    n_right = 0
    for batch in make_loader(data, 4, torch.Generator().manual_seed(7), similar_lengths=True):
        log_probs = twin(batch["token_ids"], lengths=batch["lengths"])
        n_right += (log_probs.argmax(dim=1) == batch["labels"]).sum().item()
        optimizer.zero_grad()
        F.nll_loss(log_probs, batch["labels"], reduction="sum").div(4).backward()
        optimizer.step()
    assert history[0].train_accuracy == n_right / 10


def trained_by_hand(data, objective, epochs: int = 1):
    """The weights after AdamW steps on objective(model, log_probs, batch)."""
    model = classifier()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(7)
    for _ in range(epochs):
        for batch in make_loader(data, 4, generator, similar_lengths=True):
            objective(model, model(batch["token_ids"], lengths=batch["lengths"]), batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def assert_same_weights(ours, theirs):
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_label_smoothing_is_the_cross_entropy_with_mixed_labels():
    def objective(_model, log_probs, batch):
        target = 0.8 * F.one_hot(batch["labels"], 2) + 0.2 / 2
        return -(target * log_probs).sum() / 4

    model = classifier()
    train(model, random_data(), epochs=1, recipe=Recipe(label_smoothing=0.2))
    assert_same_weights(model, trained_by_hand(random_data(), objective))


def test_a_regularizer_is_added_to_the_loss_and_gets_the_batch_once_more():
    class Doubled(torch.nn.Module):
        def forward(self, model, log_probs, again):
            torch.testing.assert_close(again(model), log_probs)  # no dropout here
            return 0.3 * again(model).square().mean()

    def objective(_model, log_probs, batch):
        nll = F.nll_loss(log_probs, batch["labels"], reduction="sum") / 4
        return nll + 0.3 * log_probs.square().mean()

    model = classifier()
    history = train(model, random_data(), epochs=1, regularizer=Doubled())
    assert_same_weights(model, trained_by_hand(random_data(), objective))
    plain = train(classifier(), random_data(), epochs=1)
    assert history[0].train_loss > plain[0].train_loss  # the term counts in what is reported


def test_r_drop_is_half_of_its_equation_over_two_dropout_masks(monkeypatch):
    passes = []
    rng = torch.Generator().manual_seed(3)

    def noisy(model, batch, device, bf16=False):
        log_probs = log_probs_of(model, batch, device, bf16)
        if model.training:  # stands for dropout
            noise = torch.randn(log_probs.shape, generator=rng)
            log_probs = F.log_softmax(log_probs + noise, dim=-1)
            passes.append(log_probs)
        return log_probs

    monkeypatch.setattr("training.loop.log_probs_of", noisy)
    history = train(classifier(), random_data(3), epochs=1, recipe=Recipe(r_drop=1.5))
    first, second = (p.detach().double() for p in passes)
    batch = next(
        iter(make_loader(random_data(3), 4, torch.Generator().manual_seed(7), similar_lengths=True))
    )
    labels = batch["labels"]
    nll = F.nll_loss(first, labels) + F.nll_loss(second, labels)
    both = F.kl_div(second, first, log_target=True, reduction="batchmean")  # KL(first || second)
    both += F.kl_div(first, second, log_target=True, reduction="batchmean")
    expected = 3 / 4 * (nll / 2 + 1.5 / 4 * both).item()  # of three sentences in a batch of four
    assert history[0].train_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_r_drop_learns_by_both_of_its_passes(monkeypatch, smoothing):
    shifts = torch.randn(2, 2, generator=torch.Generator().manual_seed(3))
    n_passes = 0

    def shifted(model, batch, device, bf16=False):
        nonlocal n_passes
        log_probs = log_probs_of(model, batch, device, bf16)
        if not model.training:
            return log_probs
        n_passes += 1  # a shift for each of the two stands for their dropout masks
        return F.log_softmax(log_probs + shifts[(n_passes - 1) % 2], dim=-1)

    def objective(_model, log_probs, batch):
        first, second = (F.log_softmax(log_probs + shift, dim=-1) for shift in shifts)
        target = (1 - smoothing) * F.one_hot(batch["labels"], 2) + smoothing / 2
        nll = -(target * (first + second)).sum() / 2
        divergence = F.kl_div(second, first, log_target=True, reduction="sum")
        divergence += F.kl_div(first, second, log_target=True, reduction="sum")
        return (nll + 1.5 / 4 * divergence) / 4

    monkeypatch.setattr("training.loop.log_probs_of", shifted)
    model = classifier()
    train(model, random_data(), epochs=1, recipe=Recipe(r_drop=1.5, label_smoothing=smoothing))
    assert_same_weights(model, trained_by_hand(random_data(), objective))


@pytest.mark.parametrize("bf16", [False, True])
def test_evaluation_computes_in_the_precision_it_is_told(bf16):
    model, seen = classifier(), []
    model.llama.norm.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    evaluate(model, make_loader(random_data(), 4), CPU, bf16=bf16)
    assert set(seen) == {bf16}


def test_each_layer_learns_by_the_decay_slower_than_the_one_above_it():
    model = classifier(n_layers=3)
    model.llama.layers[0].requires_grad_(False)
    groups = parameter_groups(model, 1.0, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    expected = {"classifier_head.": 1.0, "llama.norm.": 1.0, "llama.layers.2.": 0.5}
    expected |= {"llama.layers.1.": 0.25, "llama.tok_embeddings.": 0.0625}
    for name, parameter in model.named_parameters():
        if name.startswith("llama.layers.0."):
            assert id(parameter) not in rate  # frozen
        else:
            assert rate[id(parameter)] == next(v for k, v in expected.items() if name.startswith(k))


def test_an_untied_output_layer_is_a_head_and_learns_as_fast():
    model = classifier()
    llama = model.llama
    llama.output.weight = torch.nn.Parameter(llama.output.weight.detach().clone())
    groups = parameter_groups(model, 1.0, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rate[id(llama.output.weight)] == 1.0
    assert rate[id(llama.tok_embeddings.weight)] == 0.5 ** (llama.config.n_layers + 1)


def test_a_second_signal_while_the_first_one_saves_leaves_the_run_resumable():
    run = SimpleNamespace(epochs=1, recipe=Recipe(), keeper=object(), signals=Signals(ALONE))

    def stop(_place):
        raise Stopped(signal.SIGINT)

    run.epoch = stop
    run.save = lambda _place: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped) as caught:
        training._train(run, Place(), torch.Generator(), on_epoch=None)
    assert caught.value.is_resumable
    assert caught.value.signum == signal.SIGINT


def test_several_ranks_take_no_regularizer():
    with pytest.raises(ValueError, match="train in one process"):
        train(classifier(), random_data(), regularizer=torch.nn.Identity(), ranks=Ranks(0, 2))


@pytest.mark.parametrize(
    ("accuracies", "patience", "n_epochs"),
    [
        ([0.1, 0.3, 0.2, 0.3, 0.4], 2, 4),  # 0.3 again is no improvement
        ([0.1, 0.3, 0.2, 0.4, 0.1], 2, 5),
        ([0.5, 0.4, 0.3, 0.2, 0.1], 1, 2),
        ([0.5, 0.4, 0.3, 0.2, 0.1], None, 5),
    ],
)
def test_early_stopping_counts_epochs_without_a_new_best(
    monkeypatch, accuracies, patience, n_epochs
):
    given = iter(accuracies)

    def scripted(*_args, **_options):
        return Evaluation(next(given), 0.0, [], [], [], [])

    monkeypatch.setattr("training.loop.evaluate", scripted)
    recipe = Recipe(patience=patience, running_train_acc=True)
    history = train(classifier(), random_data(4), epochs=5, recipe=recipe)
    assert [report.dev_accuracy for report in history] == accuracies[:n_epochs]


def test_confidences_are_the_probabilities_of_the_predictions_in_the_files_order():
    data, model = random_data(9), classifier().eval()
    result = evaluate(model, make_loader(data, 4, similar_lengths=True), CPU)
    for example, said, confidence in zip(
        data.examples, result.predictions, result.confidences, strict=True
    ):
        tokens = torch.tensor([example.tokens])
        probs = model(tokens, lengths=torch.tensor([tokens.shape[1]])).exp()[0]
        assert said == probs.argmax().item()
        assert confidence == pytest.approx(probs.max().item(), rel=1e-5)
