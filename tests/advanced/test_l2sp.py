"""L2-SP against its closed form in float64 NumPy."""

import numpy as np
import pytest

from advanced.methods.l2sp import L2SP
from helpers import classifier, move, random_data, train

ALPHA, BETA = 0.3, 0.07


def flat(parameters) -> np.ndarray:
    return np.concatenate([p.detach().double().numpy().ravel() for p in parameters])


@pytest.mark.parametrize("is_frozen", [False, True])
def test_penalty_and_gradient_are_their_closed_forms_over_what_is_trained(is_frozen):
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
    value = penalty(model, None, None)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    for part, gradient in ((held, ALPHA * (w - w0)), (model.classifier_head, BETA * v)):
        ours = flat(p.grad for p in part.parameters())
        np.testing.assert_allclose(ours, gradient, rtol=1e-5, atol=1e-5)


def test_the_stronger_the_pull_the_nearer_training_ends_to_the_start():
    distances = []
    for alpha in (0.0, 1.0, 100.0):
        model = classifier()
        w0 = flat(model.llama.parameters())
        train(model, random_data(8), epochs=4, regularizer=L2SP(model, alpha, 0.0))
        distances.append(np.linalg.norm(flat(model.llama.parameters()) - w0))
    assert distances[0] > distances[1] > distances[2] > 0.0
