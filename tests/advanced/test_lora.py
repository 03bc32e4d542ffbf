"""LoRA against the sum written out, its parameter count, and what merging must leave."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_training import classifier, random_data, train
from torch import nn

from advanced.methods.lora import add_lora, merge
from conftest import TOKENS, log_probs, random_llama, randomize

ALL = ("compute_query", "compute_key", "compute_value", "compute_output", "w1", "w2", "w3")


def randomized(model: nn.Module) -> None:
    """Updates as training may leave them: neither factor is zero."""
    randomize(model, lambda name: name.endswith((".A", ".B")), 0.1)


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_fresh_updates_change_nothing():
    model = classifier()
    before, plain = log_probs(model), states(model)
    add_lora(model, 3, 16.0, ALL)
    assert torch.equal(log_probs(model), before)
    merge(model)
    assert torch.equal(log_probs(model), before)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())


def test_what_is_trained_under_autocast_is_what_merging_leaves():
    model = classifier()
    add_lora(model, 3, 12.0, ["w1"])
    randomized(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = [layer.feed_forward.w1.weight for layer in model.llama.layers]
    merge(model)
    for weight, layer in zip(trained, model.llama.layers, strict=True):
        assert torch.equal(weight, layer.feed_forward.w1.weight)


@pytest.mark.parametrize("targets", [("compute_query", "compute_value"), ALL, ["w2"]])
def test_merged_weights_are_the_sum_of_equation_3_and_leave_the_outputs(targets):
    model, rank, alpha = classifier(), 3, 12.0
    plain = states(model)
    add_lora(model, rank, alpha, targets)
    randomized(model)
    factors, unmerged = states(model), log_probs(model)
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
        assert not torch.equal(tensor, plain[name])
        difference = tensor.double() - plain[name].double()
        assert torch.linalg.matrix_rank(difference, rtol=1e-4) <= rank
    assert n_updated == 2 * len(targets)


def test_merging_leaves_the_names_and_the_gradients_of_a_plain_model():
    model = classifier()
    names = list(model.state_dict())
    add_lora(model, 2, 4.0, ALL)
    assert list(model.state_dict()) != names
    randomized(model)
    merge(model)
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.llama.tok_embeddings.weight is model.llama.output.weight
    fresh = classifier()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(log_probs(fresh), log_probs(model))


def test_trained_are_the_factors_and_the_head_in_closed_form():
    model, rank = classifier(), 3
    shapes = [
        linear.weight.shape
        for layer in model.llama.layers
        for linear in (layer.attention.compute_query, layer.attention.compute_value)
    ]
    add_lora(model, rank, 8.0)
    log_probs(model)[:, 0].sum().backward()
    with_grad = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert with_grad == set(trained)
    head = sum(parameter.numel() for parameter in model.classifier_head.parameters())
    expected = sum(rank * (n_in + n_out) for n_out, n_in in shapes) + head
    assert sum(parameter.numel() for parameter in trained.values()) == expected
    assert all(name.endswith((".A", ".B")) for name in trained if name.startswith("llama."))


def test_gradients_are_those_of_the_product_written_out():
    """dL/dB = scale G A^T and dL/dA = scale B^T G, with G the gradient of a plain weight."""
    plain, model, rank, alpha = classifier(), classifier(), 2, 6.0
    add_lora(model, rank, alpha, ["w1"])
    F.nll_loss(log_probs(plain), torch.tensor([0, 1, 1])).backward()
    F.nll_loss(log_probs(model), torch.tensor([0, 1, 1])).backward()
    for layer, plain_layer in zip(model.llama.layers, plain.llama.layers, strict=True):
        update = layer.feed_forward.w1.parametrizations.weight[0]
        G = plain_layer.feed_forward.w1.weight.grad
        torch.testing.assert_close(update.B.grad, alpha / rank * G @ update.A.T)
        assert update.B.grad.abs().max() > 0.0
        assert update.A.grad.count_nonzero() == 0  # B is 0


def test_factors_begin_as_zeros_and_as_uniform_within_one_over_the_root_of_the_inputs():
    model = classifier(dim=128)
    add_lora(model, 32, 1.0, ["w1"])
    update = model.llama.layers[0].feed_forward.w1.parametrizations.weight[0]
    bound = 128**-0.5
    assert update.B.count_nonzero() == 0
    assert 0.98 * bound < update.A.abs().max() <= bound
    assert update.A.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_training_moves_the_factors_and_no_bit_of_the_base():
    model = classifier()
    plain = states(model)
    add_lora(model, 2, 8.0)
    history = train(model, random_data(), epochs=6, lr=1e-2)
    assert history[-1].train_loss < history[0].train_loss
    trained = states(model)
    for name, before in plain.items():
        if name.startswith("llama."):
            now = trained.get(name.replace(".weight", ".parametrizations.weight.original"))
            assert torch.equal(trained[name] if now is None else now, before)
    factors = {name: tensor for name, tensor in trained.items() if name.endswith((".A", ".B"))}
    assert len(factors) == 8
    assert all(tensor.count_nonzero() > 0 for tensor in factors.values())
    unmerged = log_probs(model)
    merge(model)
    torch.testing.assert_close(log_probs(model), unmerged, rtol=0.0, atol=1e-5)


def test_a_deep_copy_is_merged_without_its_original():
    model = classifier()
    add_lora(model, 2, 8.0)
    randomized(model)
    before, twin = log_probs(model), copy.deepcopy(model)
    merge(twin)
    assert torch.equal(log_probs(model), before)
    torch.testing.assert_close(log_probs(twin), before, rtol=0.0, atol=1e-5)
    merge(model)
    assert torch.equal(log_probs(model), log_probs(twin))


def test_updates_can_be_merged_and_added_again():
    model = classifier()
    add_lora(model, 2, 8.0)
    randomized(model)
    merge(model)
    before = log_probs(model)
    add_lora(model, 3, 4.0, ["w3", "compute_query"])
    assert torch.equal(log_probs(model), before)


def test_what_cannot_be_added_or_merged_is_refused_and_changes_nothing():
    model = classifier()  # dim 32, 2 key/value heads of size 8
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=r"'w4'.*compute_key, compute_output.*w1, w2, w3"):
        add_lora(model, 2, 8.0, ["w1", "w4"])
    with pytest.raises(ValueError, match="choose from compute_key"):
        add_lora(model, 2, 8.0, [])
    for rank in (0, 17, 2.0):
        with pytest.raises(ValueError, match=rf"rank={rank} .*1\.\.16"):
            add_lora(model, rank, 8.0)
    add_lora(classifier(), 32, 8.0, ["compute_query"])  # of its smallest side a target is full
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"alpha={alpha}"):
            add_lora(model, 2, alpha)
    with pytest.raises(ValueError, match="call add_lora"):
        merge(model)
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    add_lora(model, 2, 8.0)
    with pytest.raises(ValueError, match="merge them first"):
        add_lora(model, 2, 8.0, ["w1"])


def test_a_language_model_generates_alike_before_and_after_merging():
    model = nn.Module()
    model.llama = random_llama(attention="causal")
    add_lora(model, 4, 8.0, ALL)
    randomized(model)
    unmerged = model.llama.generate(TOKENS[:, :4], 6, temperature=0.0)  # with the cache
    merge(model)
    assert torch.equal(model.llama.generate(TOKENS[:, :4], 6, temperature=0.0), unmerged)
