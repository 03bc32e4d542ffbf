"""Mixout: its formula, masks and gradient, and what it leaves."""

import pytest
import torch
from torch.nn.utils import parametrize

from advanced.methods.mixout import Mixout, add_mixout
from conftest import LENGTHS, TOKENS
from helpers import classifier, move, random_data, train


def log_probs(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS, lengths=LENGTHS)


def weight_and_mixout(p: float, n: int = 50) -> tuple[torch.Tensor, Mixout]:
    target = torch.randn(n, n)
    return (target + torch.randn(n, n)).requires_grad_(), Mixout(target, p)


def test_each_number_is_the_papers_formula_for_one_of_the_two_masks():
    p = 0.3
    weight, mixout = weight_and_mixout(p)
    mixed, w, target = (t.detach().double() for t in (mixout(weight), weight, mixout.target))
    of_pretrained, of_trained = (
        (m * target + (1 - m) * w - p * target) / (1 - p) for m in (1.0, 0.0)
    )
    is_pretrained = (mixed - of_pretrained).abs() < 1e-5
    is_trained = (mixed - of_trained).abs() < 1e-5
    assert (is_pretrained | is_trained).all()
    # A binomial count of 2,500 draws: five of its standard deviations.
    assert abs(is_pretrained.sum().item() - 2500 * p) < 5 * (2500 * p * (1 - p)) ** 0.5
    assert is_pretrained.any(dim=0).all() and not is_pretrained.all(dim=0).any()  # no column whole
    assert not torch.equal(mixout(weight), mixout(weight))  # each pass draws anew
    assert torch.equal(mixout.eval()(weight), weight)


def test_the_gradient_reaches_the_kept_numbers_scaled():
    p = 0.75
    weight, mixout = weight_and_mixout(p)
    mixed = mixout(weight)
    upstream = torch.randn_like(mixed)
    (gradient,) = torch.autograd.grad(mixed, weight, upstream)
    is_pretrained = mixed == mixout.target
    assert 0 < is_pretrained.sum() < is_pretrained.numel()
    torch.testing.assert_close(gradient, upstream * ~is_pretrained / (1 - p))


@pytest.mark.parametrize("p", [0.0, 0.9])
def test_at_the_pretrained_weights_or_without_p_training_equals_eval(p):
    model = classifier(scale=5.0).eval()
    expected = log_probs(model)
    add_mixout(model, p)
    assert torch.equal(log_probs(model.train()), expected)
    move(model)
    state = torch.get_rng_state()
    trained, evaluated = log_probs(model), log_probs(model.eval())
    assert torch.equal(trained, evaluated) == (p == 0.0)
    assert torch.equal(torch.get_rng_state(), state) == (p == 0.0)  # eval mode draws nothing


def test_every_matrix_of_the_layers_is_mixed_and_the_pretrained_ones_are_not_saved():
    model = classifier()
    matrices = {name for name, p in model.llama.layers.named_parameters() if p.ndim == 2}
    shapes = [tensor.shape for tensor in model.state_dict().values()]
    state = torch.get_rng_state()
    add_mixout(model.train(), 0.5)
    assert torch.equal(torch.get_rng_state(), state)
    mixed = {
        f"{name}.weight"
        for name, module in model.llama.layers.named_modules()
        if parametrize.is_parametrized(module, "weight")
    }
    assert mixed == matrices and len(mixed) == 14
    assert sorted(t.shape for t in model.state_dict().values()) == sorted(shapes)
    outside = (model.classifier_head, model.llama.tok_embeddings, model.llama.output)
    assert not any(parametrize.is_parametrized(module) for module in outside)


def test_in_eval_mode_the_weights_are_those_that_training_moved():
    model = classifier()
    linear = model.llama.layers[0].feed_forward.w1
    trained, before = linear.weight, linear.weight.detach().clone()
    add_mixout(model, 0.5)
    train(model, random_data(8), lr=1e-2)
    model.eval()
    assert torch.equal(linear.weight, trained)
    assert not torch.equal(trained, before)
