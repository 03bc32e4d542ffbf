"""Bottleneck adapters against a layer in NumPy, their parameter count, and what removal leaves."""

import copy

import numpy as np
import pytest
import torch
from test_training import classifier, random_data, train
from torch import nn

from advanced.methods.adapter import Adapter, add_adapters
from conftest import TOKENS, log_probs, random_llama, randomize


def randomized(model: nn.Module) -> None:
    """Adapters as training may leave them: no weight and no bias is zero."""
    randomize(model, lambda name: ".adapter." in name, 0.3)


def is_norm(name: str) -> bool:
    return name.endswith("norm.weight")


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def adapted(h: np.ndarray, adapter: Adapter) -> np.ndarray:
    """h + W_up SiLU(W_down h + b_down) + b_up in float64."""
    w = {name: tensor.detach().double().numpy() for name, tensor in adapter.named_parameters()}
    x = h @ w["down.weight"].T + w["down.bias"]
    return h + (x / (1 + np.exp(-x))) @ w["up.weight"].T + w["up.bias"]


def test_an_adapter_is_the_bottleneck_written_out():
    adapter = Adapter(6, 3, like=torch.empty(0, dtype=torch.float64))
    assert adapter.up.weight.count_nonzero() == adapter.down.bias.count_nonzero() == 0
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    h = torch.randn(2, 4, 6, dtype=torch.float64)
    ours = (h + adapter(h)).detach().numpy()
    np.testing.assert_allclose(ours, adapted(h.numpy(), adapter), rtol=1e-12, atol=1e-12)


def test_fresh_adapters_change_nothing():
    model = classifier()
    before = log_probs(model)
    add_adapters(model, 4)
    assert torch.equal(log_probs(model), before)
    randomized(model)
    assert not torch.allclose(log_probs(model), before, atol=1e-3)


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


@pytest.mark.parametrize("size", [1, 5, 32])
def test_trained_are_adapters_norms_and_head_in_closed_form(size):
    model, dim, n_layers = classifier(), 32, 2
    add_adapters(model, size)
    randomized(model)
    log_probs(model)[:, 0].sum().backward()
    with_grad = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert with_grad == set(trained)
    n_adapters = sum(p.numel() for name, p in trained.items() if ".adapter." in name)
    assert n_adapters == n_layers * 2 * (2 * dim * size + size + dim)
    rest = {name: p for name, p in trained.items() if ".adapter." not in name}
    assert all(is_norm(name) for name in rest if name.startswith("llama."))
    head = sum(parameter.numel() for parameter in model.classifier_head.parameters())
    assert sum(p.numel() for p in rest.values()) == (2 * n_layers + 1) * dim + head


def test_training_moves_adapters_and_norms_and_no_bit_of_the_rest():
    model = classifier()
    plain = states(model)
    add_adapters(model, 4)
    history = train(model, random_data(), epochs=6, lr=1e-2)
    assert history[-1].train_loss < history[0].train_loss
    trained = states(model)
    for name, before in plain.items():
        if name.startswith("llama."):
            assert torch.equal(trained[name], before) != is_norm(name), name
    ups = [tensor for name, tensor in trained.items() if name.endswith("adapter.up.weight")]
    assert len(ups) == 4
    assert all(up.count_nonzero() > 0 for up in ups)


def test_a_deep_copy_says_the_same_by_adapters_of_its_own():
    model = classifier()
    add_adapters(model, 4)
    randomized(model)
    before, twin = log_probs(model), copy.deepcopy(model)
    assert torch.equal(log_probs(twin), before)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if ".adapter." in name:
                parameter.zero_()
    assert torch.equal(log_probs(model), before)
    assert torch.equal(log_probs(twin), log_probs(classifier()))


def test_saved_adapters_load_into_a_model_that_has_them():
    model, other = classifier(), classifier()
    add_adapters(model, 4)
    randomized(model)
    add_adapters(other, 4)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(log_probs(other), log_probs(model))


def test_cached_generation_is_the_one_that_reads_all_again():
    model = nn.Module()
    model.llama = random_llama(attention="causal")
    add_adapters(model, 4)
    randomized(model)
    ids = TOKENS[:1, :4]
    cached = model.llama.generate(ids, 6, temperature=0.0)
    for _ in range(6):
        ids = torch.cat((ids, model.llama(ids)[0][:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    assert torch.equal(cached, ids)


def test_what_cannot_be_added_is_refused_and_changes_nothing():
    model = classifier()
    names = list(model.state_dict())
    for size in (0, 33, 4.0):
        with pytest.raises(ValueError, match=rf"size={size} .*1\.\.32"):
            add_adapters(model, size)
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    add_adapters(model, 4)
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapters(model, 4)
