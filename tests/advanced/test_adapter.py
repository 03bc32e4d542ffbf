"""Bottleneck adapters against a layer in NumPy, and their parameter count."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from advanced.methods.adapter import Adapter, add_adapters
from advanced.methods.freezing import count_parameters
from conftest import log_probs, randomize
from helpers import classifier
from utils import InputError


def randomized(model: nn.Module) -> None:
    """Give the adapters weights as training may leave them, without zeros."""
    randomize(model, lambda name: ".adapter." in name, 0.3)


def adapted(h: np.ndarray, adapter: Adapter) -> np.ndarray:
    """h + W_up SiLU(W_down h + b_down) + b_up in float64."""
    w = {name: tensor.detach().double().numpy() for name, tensor in adapter.named_parameters()}
    x = h @ w["down.weight"].T + w["down.bias"]
    return h + (x / (1 + np.exp(-x))) @ w["up.weight"].T + w["up.bias"]


def test_each_sub_layer_adds_its_adapter_before_the_residual_sum():
    model = classifier()
    x = torch.randn(2, 5, 32)
    layer = model.llama.layers[1]
    plain = copy.deepcopy(layer)
    add_adapters(model, 4)
    randomized(model)
    h = x.double().numpy()
    for sub_layer, own, norm in (
        (layer.attention, plain.attention, plain.attention_norm),
        (layer.feed_forward, plain.feed_forward, plain.ffn_norm),
    ):
        read = norm(torch.tensor(h).float())
        output = adapted(own(read).detach().double().numpy(), sub_layer.adapter)
        np.testing.assert_allclose(sub_layer(read).detach(), output, rtol=1e-4, atol=1e-6)
        h = h + output
    np.testing.assert_allclose(layer(x).detach(), h, rtol=1e-4, atol=1e-5)


def test_fresh_adapters_are_the_identity():
    model = classifier()
    before = log_probs(model)
    add_adapters(model, 4)
    assert torch.equal(log_probs(model), before)
    randomized(model)
    assert not torch.allclose(log_probs(model), before, atol=1e-3)


@pytest.mark.parametrize("size", [1, 32])
def test_adapters_norms_and_head_are_trained_in_closed_form(size):
    model, dim, n_layers, n_labels = classifier(), 32, 2, 2
    norms, head = (2 * n_layers + 1) * dim, (dim + 1) * n_labels
    n_before = sum(p.numel() for p in model.parameters())
    add_adapters(model, size)
    added = n_layers * 2 * (2 * dim * size + size + dim)
    assert count_parameters(model) == (added + norms + head, n_before + added)


def test_a_deep_copy_uses_its_own_adapters():
    model = classifier()
    add_adapters(model, 4)
    randomized(model)
    before, twin = log_probs(model), copy.deepcopy(model)
    assert torch.equal(log_probs(twin), before)
    randomize(twin, lambda name: ".adapter." in name, 0.0)
    assert torch.equal(log_probs(model), before)
    assert torch.equal(log_probs(twin), log_probs(classifier()))


@pytest.mark.parametrize("size", [0, 33])
def test_a_size_that_is_no_bottleneck_is_refused_and_changes_nothing(size):
    model = classifier()
    with pytest.raises(InputError, match=rf"--adapter_size {size}: .*1\.\.32"):
        add_adapters(model, size)
    assert all(parameter.requires_grad for parameter in model.parameters())
