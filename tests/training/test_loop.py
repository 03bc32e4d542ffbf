"""The training loop against the same steps written out in float64, and what evaluation promises."""

import math
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score

from helpers import CPU, assert_same_weights, classifier, random_data, train, weights_of
from training import loop
from training.checkpoint import load_classifier, save_classifier
from training.dataset import SentenceDataset, make_train_loader
from training.evaluation import Evaluation, evaluate, forward_pass, predict_probs
from training.loop import DivergedError, Recipe


def by_hand(data: SentenceDataset, objective, pooling: str = "mean") -> tuple[dict, float]:
    """The weights and the mean loss after an epoch of AdamW in float64, written out.

    objective(log_probs, labels) is the loss of a batch of up to 4 sentences.
    """
    model = classifier(pooling).double()
    m = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    v = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    losses = []
    generator = torch.Generator().manual_seed(7)
    batches = make_train_loader(data, 4, generator, similar_lengths=pooling != "position")
    for t, batch in enumerate(batches, start=1):
        lengths = {} if pooling == "position" else {"lengths": batch["lengths"]}
        loss = objective(model(batch["token_ids"], **lengths), batch["labels"])
        model.zero_grad()
        loss.backward()
        alpha = 1e-3 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        with torch.no_grad():
            for name, p in model.named_parameters():
                grad = p.grad if p.grad is not None else torch.zeros_like(p)
                m[name] = 0.9 * m[name] + 0.1 * grad
                v[name] = 0.999 * v[name] + 0.001 * grad**2
                p -= alpha * m[name] / (v[name].sqrt() + 1e-6)
        losses.append(loss.item())
    return weights_of(model), sum(losses) / len(losses)


def nll(log_probs: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Over the batch size of 4, also for the last batch of two."""
    target = (1 - smoothing) * F.one_hot(labels, 2).double() + smoothing / 2
    return -(target * log_probs).sum() / 4


def assert_epoch(objective, pooling: str = "mean", **options) -> None:
    """An epoch of train_classifier is that of this objective, in its weights and its loss."""
    expected, loss = by_hand(random_data(), objective, pooling)
    model = classifier(pooling).double()
    (report,) = train(model, random_data(), epochs=1, **options)
    assert report.train_loss == pytest.approx(loss, rel=1e-9)
    assert_same_weights(weights_of(model), expected, atol=1e-9)


# ---------------------------------------------------------------- what is minimized


@pytest.mark.parametrize(("pooling", "smoothing"), [("position", 0.0), ("mean", 0.2)])
def test_an_epoch_is_the_steps_written_out(pooling, smoothing):
    recipe = Recipe(label_smoothing=smoothing)
    assert_epoch(lambda log_probs, y: nll(log_probs, y, smoothing), pooling, recipe=recipe)


def test_r_drop_is_half_of_its_equation_and_learns_by_both_passes(monkeypatch):
    shifts = torch.randn(2, 2, generator=torch.Generator().manual_seed(3))  # the dropout masks
    n_passes = 0

    def shifted(model, batch, device, bf16=False):
        nonlocal n_passes
        n_passes += 1
        log_probs = forward_pass(model, batch, device, bf16)
        return F.log_softmax(log_probs + shifts[(n_passes - 1) % 2], dim=-1)

    def objective(log_probs, labels):
        p, q = (F.log_softmax(log_probs + shift, dim=-1) for shift in shifts)
        divergence = (p.exp() * (p - q)).sum() + (q.exp() * (q - p)).sum()
        both = nll(p, labels, smoothing=0.2) + nll(q, labels, smoothing=0.2)
        return both / 2 + 1.5 / 4 * divergence / 4

    monkeypatch.setattr(loop, "forward_pass", shifted)
    assert_epoch(objective, recipe=Recipe(r_drop=1.5, label_smoothing=0.2))


def test_a_regularizer_is_added_to_the_loss_and_gets_the_batch_once_more():
    class Doubled(torch.nn.Module):
        def forward(self, model, log_probs, forward):
            torch.testing.assert_close(forward(model), log_probs)  # no dropout here
            return 0.3 * forward(model).square().mean()

    def objective(log_probs, labels):
        return nll(log_probs, labels) + 0.3 * log_probs.square().mean()

    assert_epoch(objective, regularizer=Doubled())


# ---------------------------------------------------------------- epochs


def test_training_overfits_eight_sentences_and_bfloat16_follows():
    losses = []
    for bf16 in (False, True):  # autocast must not keep copies of earlier weights
        recipe = Recipe(bf16=bf16)
        history = train(classifier(), random_data(8), epochs=40, lr=3e-3, recipe=recipe)
        assert history[-1].train_accuracy == 1.0
        assert history[-1].train_loss < 0.1 < history[0].train_loss
        losses.append([report.train_loss for report in history[:5]])
    assert losses[1] == pytest.approx(losses[0], rel=0.05, abs=0.01)
    assert losses[1] != losses[0]


def test_every_epoch_trains_in_training_mode_and_evaluates_in_inference_mode():
    model, passes, counts = classifier(), [], []
    model.llama.norm.register_forward_pre_hook(
        lambda norm, _: passes.append((norm.training, torch.is_inference_mode_enabled()))
    )

    def count(report, is_best):
        counts.append(passes.count((True, False)))

    train(model, random_data(10), on_epoch=count)
    assert counts == [3, 6]  # 10 examples in batches of 4, twice
    assert set(passes) == {(True, False), (False, True)}


@pytest.mark.parametrize(("train_acc", "lr"), [("extra", 0.05), ("running", 1e-30)])
def test_train_accuracy_is_of_the_train_data_and_dev_accuracy_of_the_dev_data(train_acc, lr):
    data, model, recipe = random_data(9), classifier(), Recipe(train_acc=train_acc)
    contrary = SentenceDataset([e._replace(label=1 - e.label) for e in data.examples], 3)
    (report,) = train(model, data, contrary, epochs=1, lr=lr, recipe=recipe)
    accuracy = evaluate(model, data, 4, CPU).accuracy
    assert report.train_accuracy == accuracy  # of 9 examples, so never one half
    assert report.dev_accuracy == pytest.approx(1 - accuracy)


def scripted(monkeypatch, dev_accuracies: list[float]) -> None:
    given = iter(dev_accuracies)

    def evaluation(model, data, batch_size, device, bf16, description):
        accuracy = next(given) if "dev" in description else 1.0
        return Evaluation(accuracy, 0.0, [], [], [], [])

    monkeypatch.setattr(loop, "evaluate", evaluation)


def test_best_is_the_first_epoch_with_the_highest_dev_accuracy(monkeypatch):
    scripted(monkeypatch, [0.0, 0.5, 0.5, 0.4, 0.6])
    calls = []
    train(classifier(), random_data(4), epochs=5, on_epoch=lambda _, best: calls.append(best))
    assert calls == [True, True, False, False, True]  # also an accuracy of 0 leaves a checkpoint


@pytest.mark.parametrize(
    ("accuracies", "patience", "n_epochs"),
    [
        ([0.1, 0.3, 0.2, 0.3, 0.4], 2, 4),  # 0.3 again is no improvement
        ([0.1, 0.3, 0.2, 0.4, 0.1], 2, 5),
        ([0.5, 0.4, 0.3, 0.2, 0.1], 1, 2),
    ],
)
def test_patience_counts_epochs_without_a_new_best(monkeypatch, accuracies, patience, n_epochs):
    scripted(monkeypatch, accuracies)
    recipe = Recipe(patience=patience)
    history = train(classifier(), random_data(4), epochs=5, recipe=recipe)
    assert [report.dev_accuracy for report in history] == accuracies[:n_epochs]


def test_the_schedule_and_the_clipping_reach_each_step(monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "take_step", lambda optimizers, *given: seen.append(given))
    rise = [0.25, 0.5, 0.75, 1.0]
    fall = [(20 - step) / 16 for step in range(4, 20)]
    wave = [(1 + math.cos(math.pi * (step - 4) / 16)) / 2 for step in range(4, 20)]
    for recipe, expected in (
        (Recipe(), [1.0] * 20),
        (Recipe(warmup=0.18), rise + [1.0] * 16),  # 3.6 of 20 steps are four
        (Recipe(warmup=0.2, lr_decay="linear"), rise + fall),
        (Recipe(warmup=0.2, lr_decay="cosine", max_grad_norm=0.5), rise + wave),
    ):
        seen.clear()
        train(classifier(), random_data(40), recipe=recipe)  # ten steps an epoch
        factors, norms = zip(*seen, strict=True)
        assert factors == pytest.approx(expected)
        assert set(norms) == {recipe.max_grad_norm}


# ---------------------------------------------------------------- divergence


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_place(monkeypatch):
    nll_loss, calls = F.nll_loss, []

    def diverging(*args, **kwargs):
        calls.append(1)
        return nll_loss(*args, **kwargs) * (math.nan if len(calls) == 5 else 1.0)

    monkeypatch.setattr(loop.F, "nll_loss", diverging)
    where = r"epoch 1, step 2 of 3, learning rate 0\.001: the loss is nan on the batch that begins"
    with pytest.raises(DivergedError, match=rf"{where} with 'sentence \d'; lower --lr"):
        train(classifier(), random_data())


# ---------------------------------------------------------------- evaluation


def test_masked_predictions_do_not_depend_on_the_batching_and_follow_the_data():
    model, data = classifier(), random_data(23)
    expected = torch.cat(
        [model.eval()(torch.tensor([e.tokens]), torch.tensor([len(e.tokens)])) for e in data]
    ).exp()
    for batch_size in (1, 4, 23):
        probs = predict_probs(model.train(), data, batch_size, CPU)
        assert not model.training and probs.dtype == torch.float32
        torch.testing.assert_close(probs, expected.detach(), rtol=1e-5, atol=1e-6)
    result = evaluate(model, data, 4, CPU)
    assert result.predictions == expected.argmax(dim=1).tolist()
    assert result.confidences == pytest.approx(expected.amax(dim=1).tolist(), abs=1e-6)
    assert result.sentences == [example.sentence for example in data.examples]
    assert result.labels == [example.label for example in data.examples]


def test_the_assignments_mode_reads_batches_in_the_order_of_the_data():
    model, data = classifier("position"), random_data(10)
    expected = []
    for start in (0, 4, 8):
        batch = data.collate_fn(data.examples[start : start + 4])
        expected.append(model.eval()(batch["token_ids"]).exp())
    torch.testing.assert_close(predict_probs(model, data, 4, CPU), torch.cat(expected).detach())


def test_scores_whose_exponentials_are_0_still_have_a_largest():
    """As of labels of many tokens, whose log-probabilities are sums (LlamaZeroShotClassifier)."""
    model = classifier()
    model.num_labels = 3
    model.forward = lambda ids, lengths: torch.tensor([[-300.0, -200.0, -201.0]])
    result = evaluate(model, random_data(1), 1, CPU)
    assert result.predictions == [1]
    assert result.confidences == pytest.approx([1 / (1 + math.exp(-1))])


def test_accuracy_and_f1_are_scikit_learns_over_the_examples_with_gold_labels():
    model, data = classifier(), random_data(30)
    result = evaluate(model, data, 3, CPU)
    hits = np.equal(result.predictions, result.labels)
    assert result.accuracy == hits.mean()
    assert result.macro_f1 == pytest.approx(
        f1_score(result.labels, result.predictions, average="macro")
    )
    some = SentenceDataset([e._replace(label=-1) if i >= 7 else e for i, e in enumerate(data)], 3)
    partly = evaluate(model, some, 3, CPU)
    assert partly.predictions == result.predictions
    assert partly.accuracy == pytest.approx(hits[:7].mean())
    none = SentenceDataset([e._replace(label=-1) for e in data], 3)
    unlabeled = evaluate(model, none, 3, CPU)
    assert unlabeled == replace(result, labels=[-1] * 30, accuracy=None, macro_f1=None)


@pytest.mark.parametrize("bf16", [False, True])
def test_evaluation_computes_in_the_precision_it_is_told(bf16):
    model, seen = classifier(), []
    model.llama.norm.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    evaluate(model, random_data(), 4, CPU, bf16=bf16)
    assert set(seen) == {bf16}


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_is_replaced_whole_and_holds_plain_data(tmp_path):
    path, model = tmp_path / "kept.pt", classifier()
    config = SimpleNamespace(num_labels=2, option="finetune", hidden_dropout_prob=0.0)
    config.pretrained_model_path = tmp_path / "model.pt"
    save_classifier(path, model, config, args={"train": tmp_path / "train.txt", "epochs": 1})
    loaded, saved = load_classifier(path)
    assert_same_weights(weights_of(loaded), weights_of(model))
    assert saved["args"] == {"train": str(tmp_path / "train.txt"), "epochs": 1}
    assert saved["model_config"]["pretrained_model_path"] == str(tmp_path / "model.pt")
    old = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_classifier(path, model, config, label_names=lambda: 1)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
