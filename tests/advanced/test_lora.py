"""LoRA against the sum written out, its parameter count, and what merging leaves."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from advanced.methods.freezing import count_parameters
from advanced.methods.lora import add_lora
from conftest import TOKENS, log_probs, random_llama, randomize
from helpers import classifier, weights_of
from utils import InputError

ALL = ("compute_query", "compute_key", "compute_value", "compute_output", "w1", "w2", "w3")


def randomized(model: nn.Module) -> None:
    """Give both factors values as training may leave them, without zeros."""
    randomize(model, lambda name: name.endswith((".A", ".B")), 0.1)


def merge(model: nn.Module) -> None:
    """Replace each updated weight by the value that its layer reads, which is what a run saves."""
    for module in model.llama.layers.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")


def test_fresh_updates_change_nothing_and_merge_into_the_same_bits():
    model = classifier()
    before, plain = log_probs(model), weights_of(model)
    add_lora(model, 3, 16.0, ALL)
    assert torch.equal(log_probs(model), before)
    merge(model)
    assert list(model.state_dict()) == list(plain)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())


def test_merged_weights_are_the_sum_of_equation_3_and_keep_the_outputs():
    model, rank, alpha, targets = classifier(), 3, 12.0, ("compute_key", "w2")
    plain = weights_of(model)
    add_lora(model, rank, alpha, targets)
    randomized(model)
    factors, unmerged = weights_of(model), log_probs(model)
    merge(model)
    torch.testing.assert_close(log_probs(model), unmerged, rtol=0.0, atol=1e-5)
    n_updated = 0
    for name, tensor in model.state_dict().items():
        owner = name.removesuffix(".weight")
        update = f"{owner}.parametrizations.weight.0"
        if f"{update}.A" not in factors:
            assert torch.equal(tensor, plain[name])
            continue
        n_updated += 1
        assert owner.endswith(tuple(targets))
        A, B = (factors[f"{update}.{letter}"].double().numpy() for letter in "AB")
        expected = plain[name].double().numpy() + alpha / rank * B @ A
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert n_updated == 2 * len(targets)


def test_the_weights_trained_under_autocast_are_those_that_merging_leaves():
    model = classifier()
    add_lora(model, 3, 12.0, ["w1"])
    randomized(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = [layer.feed_forward.w1.weight for layer in model.llama.layers]
    merge(model)
    for weight, layer in zip(trained, model.llama.layers, strict=True):
        assert torch.equal(weight, layer.feed_forward.w1.weight)


def test_factors_and_head_are_trained_in_closed_form():
    model, rank, n_layers, dim, kv_dim = classifier(), 3, 2, 32, 16
    add_lora(model, rank, 8.0, ["compute_query", "compute_value"])
    head = sum(parameter.numel() for parameter in model.classifier_head.parameters())
    n_trained, _ = count_parameters(model)
    assert n_trained == n_layers * rank * ((dim + dim) + (dim + kv_dim)) + head


def test_gradients_are_those_of_the_product_written_out():
    """dL/dB = scale G A^T and dL/dA = scale B^T G, with G the gradient of the merged weight."""
    plain, model, rank, alpha = classifier(), classifier(), 2, 6.0
    add_lora(model, rank, alpha, ["w1"])
    randomized(model)
    pairs = [
        (plain_layer.feed_forward.w1, layer.feed_forward.w1)
        for plain_layer, layer in zip(plain.llama.layers, model.llama.layers, strict=True)
    ]
    for merged, updated in pairs:
        merged.weight.data = updated.weight.detach()
    for one in (plain, model):
        F.nll_loss(log_probs(one), torch.tensor([0, 1, 1])).backward()
    for merged, updated in pairs:
        update, G = updated.parametrizations.weight[0], merged.weight.grad
        torch.testing.assert_close(update.B.grad, alpha / rank * G @ update.A.T)
        torch.testing.assert_close(update.A.grad, alpha / rank * update.B.T @ G)


def test_a_is_uniform_within_one_over_the_root_of_the_inputs_and_b_is_zero():
    model = classifier(dim=128)
    add_lora(model, 32, 1.0, ["w1"])
    update = model.llama.layers[0].feed_forward.w1.parametrizations.weight[0]
    bound = 128**-0.5
    assert update.B.count_nonzero() == 0
    assert 0.98 * bound < update.A.abs().max() <= bound
    assert update.A.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_a_language_model_generates_the_same_before_and_after_merging():
    model = nn.Module()
    model.llama = random_llama(attention="causal")
    add_lora(model, 4, 8.0, ALL)
    randomized(model)
    unmerged = model.llama.generate(TOKENS[:, :4], 6, temperature=0.0)  # with the cache
    merge(model)
    assert torch.equal(model.llama.generate(TOKENS[:, :4], 6, temperature=0.0), unmerged)


@pytest.mark.parametrize("rank", [0, 17])
def test_a_rank_beyond_the_smallest_side_is_refused_and_changes_nothing(rank):
    model = classifier()  # dim 32, 2 key/value heads of size 8
    with pytest.raises(InputError, match=rf"--lora_rank {rank}: .*1\.\.16"):
        add_lora(model, rank, 8.0, ["compute_query", "compute_value"])
    assert all(parameter.requires_grad for parameter in model.parameters())
