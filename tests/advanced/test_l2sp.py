"""L2-SP against its closed form in float64 NumPy."""

import numpy as np
import pytest
import torch

from advanced.methods.l2sp import L2SP
from helpers import classifier, move, random_data, train

ALPHA, BETA = 0.3, 0.07


def flat(parameters) -> np.ndarray:
    return np.concatenate([p.detach().double().numpy().ravel() for p in parameters])


@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_penalty_is_its_closed_form_over_what_is_trained(is_frozen):
    model = classifier()
    held = model.llama.norm if is_frozen else model.llama  # a tied matrix counts once
    if is_frozen:
        model.llama.requires_grad_(False)
        model.llama.norm.requires_grad_(True)
    w0 = flat(held.parameters())
    penalty = L2SP(model, ALPHA, BETA)
    assert not penalty.state_dict()
    move(model)
    w, v = flat(held.parameters()), flat(model.classifier_head.parameters())
    expected = ALPHA / 2 * np.sum((w - w0) ** 2) + BETA / 2 * np.sum(v**2)
    assert penalty(model, None, None).item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_the_distance_times_the_weight():
    model, start = classifier(), classifier()
    penalty = L2SP(model, ALPHA, BETA)
    move(model)
    penalty(model, None, None).backward()
    for p, p0 in zip(model.llama.parameters(), start.llama.parameters(), strict=True):
        torch.testing.assert_close(p.grad, ALPHA * (p - p0).detach())
    for p in model.classifier_head.parameters():
        torch.testing.assert_close(p.grad, BETA * p.detach())


def test_at_the_start_with_a_zero_head_penalty_and_gradient_are_zero():
    model = classifier()
    penalty = L2SP(model, ALPHA, BETA)
    with torch.no_grad():
        for parameter in model.classifier_head.parameters():
            parameter.zero_()
    value = penalty(model, None, None)
    value.backward()
    assert value.item() == 0.0
    assert all(not p.grad.any() for p in model.parameters())


def test_the_stronger_the_pull_the_nearer_training_ends_to_the_start():
    distances = []
    for alpha in (0.0, 1.0, 100.0):
        model = classifier()
        w0 = flat(model.llama.parameters())
        train(model, random_data(8), epochs=4, regularizer=L2SP(model, alpha, 0.0))
        distances.append(np.linalg.norm(flat(model.llama.parameters()) - w0))
    assert distances[0] > distances[1] > distances[2] > 0.0
