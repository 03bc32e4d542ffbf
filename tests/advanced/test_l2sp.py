"""L2-SP against its closed form in float64 NumPy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from advanced.methods.l2sp import L2SP
from classifier import LlamaEmbeddingClassifier
from conftest import random_llama
from training.dataset import Example, SentenceDataset
from training.loop import train_classifier

ALPHA, BETA = 0.3, 0.07


def classifier(option: str = "finetune") -> LlamaEmbeddingClassifier:
    config = SimpleNamespace(num_labels=2, option=option, hidden_dropout_prob=0.0, pooling="mean")
    torch.manual_seed(0)
    return LlamaEmbeddingClassifier(config, random_llama(scale=1.0))


def moved(model: LlamaEmbeddingClassifier, by: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))


def flat(parameters) -> np.ndarray:
    return np.concatenate([p.detach().double().numpy().ravel() for p in parameters])


def test_the_penalty_is_its_closed_form():
    model = classifier()
    w0 = flat(model.llama.parameters())  # a tied matrix once
    penalty = L2SP(model, ALPHA, BETA)
    moved(model)
    w, v = flat(model.llama.parameters()), flat(model.classifier_head.parameters())
    expected = ALPHA / 2 * np.sum((w - w0) ** 2) + BETA / 2 * np.sum(v**2)
    assert penalty(model, None, None).item() == pytest.approx(expected, rel=1e-5)


def test_what_is_frozen_is_in_no_term():
    model = classifier()
    model.llama.requires_grad_(False)
    model.llama.norm.requires_grad_(True)
    w0 = flat(model.llama.norm.parameters())
    penalty = L2SP(model, ALPHA, BETA)
    moved(model)
    w, v = flat(model.llama.norm.parameters()), flat(model.classifier_head.parameters())
    expected = ALPHA / 2 * np.sum((w - w0) ** 2) + BETA / 2 * np.sum(v**2)
    assert penalty(model, None, None).item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_the_distance_times_the_weight():
    model, start = classifier(), classifier()
    penalty = L2SP(model, ALPHA, BETA)
    moved(model)
    penalty(model, None, None).backward()
    for p, p0 in zip(model.llama.parameters(), start.llama.parameters(), strict=True):
        torch.testing.assert_close(p.grad, ALPHA * (p - p0).detach())
    for p in model.classifier_head.parameters():
        torch.testing.assert_close(p.grad, BETA * p.detach())


def test_at_the_pretrained_point_with_a_zero_head_it_is_zero():
    model = classifier()
    penalty = L2SP(model, ALPHA, BETA)
    with torch.no_grad():
        for parameter in model.classifier_head.parameters():
            parameter.zero_()
    value = penalty(model, None, None)
    value.backward()
    assert value.item() == 0.0
    assert all(not p.grad.any() for p in model.parameters())


def test_the_starting_point_is_what_the_weights_were_and_is_not_saved():
    model = classifier()
    penalty = L2SP(model, 1.0, 0.0)
    assert not penalty.state_dict()
    assert not list(penalty.parameters())
    moved(model)
    far = penalty(model, None, None).item()
    assert far > 0.0
    assert L2SP(model, 1.0, 0.0)(model, None, None).item() == 0.0
    assert penalty.double().get_buffer("start_0").dtype == torch.float64  # moves with the module


def test_frozen_parameters_are_not_held_and_a_frozen_llama_is_refused():
    model = classifier()
    model.llama.tok_embeddings.requires_grad_(False)
    penalty = L2SP(model, 1.0, 0.0)
    with torch.no_grad():
        model.llama.tok_embeddings.weight.add_(1.0)
    assert penalty(model, None, None).item() == 0.0
    with pytest.raises(ValueError, match=r"model\.llama is frozen"):
        L2SP(classifier("pretrain"), 1.0, 0.0)


@pytest.mark.parametrize("weights", [(-1.0, 0.0), (0.0, float("nan")), (float("inf"), 0.0)])
def test_a_weight_that_is_no_number_of_at_least_zero_is_refused(weights):
    with pytest.raises(ValueError, match=r"weight=(-1\.0|nan|inf) is not a number of at least 0"):
        L2SP(classifier(), *weights)


def test_the_harder_the_pull_the_nearer_training_ends_to_the_start():
    examples = [Example(f"sentence {i}", i % 2, [5 + i, 9, 20 + i]) for i in range(8)]
    data = SentenceDataset(examples, pad_id=3)
    distances = []
    for alpha in (0.0, 1.0, 100.0):
        model = classifier()
        w0 = flat(model.llama.parameters())
        train_classifier(
            model, data, data, epochs=4, batch_size=4, lr=1e-3, seed=1,
            device=torch.device("cpu"), on_epoch=lambda report, best: None,
            regularizer=L2SP(model, alpha, 0.0),
        )  # fmt: skip
        distances.append(np.linalg.norm(flat(model.llama.parameters()) - w0))
    assert distances[0] > distances[1] > distances[2] > 0.0
