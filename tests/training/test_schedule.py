"""The learning rate's course, precision and the clipped step against their equations."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import CPU, classifier
from optimizer import AdamW
from training.schedule import (
    learning_rate_factor,
    parameter_groups,
    precision,
    symmetric_kl,
    take_step,
)


@pytest.mark.parametrize(
    ("warmup", "decay_from", "cosine"),
    [(0, 0.0, False), (1, 0.4, True), (10, 0.9, False), (10, 0.0, True), (25, 1.0, False)],
)
def test_the_learning_rate_is_a_product_of_two_ramps(warmup, decay_from, cosine):
    for step, progress in [(s, p) for s in range(40) for p in np.linspace(0.0, 1.5, 31)]:
        rise = np.interp(step + 1, [0, warmup], [0, 1]) if warmup else 1.0
        done = np.interp(progress, [decay_from, 1], [0, 1]) if decay_from < 1 else 0.0
        fall = (1 + np.cos(np.pi * done)) / 2 if cosine else 1 - done
        ours = learning_rate_factor(step, progress, warmup, decay_from, cosine)
        assert ours == pytest.approx(rise * fall, abs=1e-12)


def test_symmetric_kl_is_the_sum_of_both_divergences_averaged_over_rows():
    p, q = (F.log_softmax(torch.randn(5, 3, dtype=torch.float64), dim=-1) for _ in range(2))
    both = F.kl_div(q, p, log_target=True, reduction="batchmean")
    both += F.kl_div(p, q, log_target=True, reduction="batchmean")
    torch.testing.assert_close(symmetric_kl(p, q), both)
    assert symmetric_kl(p, p) == 0.0


def two_optimizers(kind=torch.optim.SGD):
    """Two parameters in two groups of one optimizer and one in another; peaks 0.5, 0.1 and 2."""
    generator = torch.Generator().manual_seed(4)
    a, b, c = (
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in [(3, 2), (4,), (2, 2)]
    )
    first = kind([{"params": [a]}, {"params": [b], "lr": 0.1}], lr=0.5)
    return [a, b, c], [first, kind([c], lr=2.0)]


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e6])
def test_a_step_moves_each_parameter_by_its_peak_the_factor_and_the_jointly_clipped_gradient(
    max_norm,
):
    parameters, optimizers = two_optimizers()
    expected = [p.detach().numpy().copy() for p in parameters]
    rng = np.random.default_rng(5)
    for factor in (0.25, 1.0, 0.5, 0.0, 0.75):  # each of the peak, not of the step before
        grads = [rng.normal(size=p.shape) for p in parameters]
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        scale = 1.0 if max_norm is None else min(1.0, max_norm / norm)
        for i, (lr, grad) in enumerate(zip((0.5, 0.1, 2.0), grads, strict=True)):
            parameters[i].grad = torch.tensor(grad)
            expected[i] -= lr * factor * scale * grad
        take_step(optimizers, factor, max_norm)
        for ours, theirs in zip(parameters, expected, strict=True):
            np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-5)
        assert all(p.grad is None or not p.grad.any() for p in parameters)


def test_the_peak_survives_saving_and_loading_the_optimizer():
    def steps(parameters, optimizers, factors):
        for factor in factors:
            for p in parameters:
                p.grad = p.detach() * 0.3
            take_step(optimizers, factor)

    whole, optimizers = two_optimizers(AdamW)
    steps(whole, optimizers, (0.2, 0.4, 0.6, 0.8))

    half, before = two_optimizers(AdamW)
    steps(half, before, (0.2, 0.4))
    rest, after = two_optimizers(AdamW)
    for parameter, old in zip(rest, half, strict=True):
        parameter.data = old.data
    for optimizer, old in zip(after, before, strict=True):
        optimizer.load_state_dict(old.state_dict())
    steps(rest, after, (0.6, 0.8))
    assert all(torch.equal(x, y) for x, y in zip(whole, rest, strict=True))


@pytest.mark.parametrize("bf16", [False, True])
def test_precision_rules_the_products_and_never_the_weights_or_gradients(bf16):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 8, bias=False), torch.randn(5, 64)
    math_sdp = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    with precision(CPU, bf16):
        y = layer(x)
    expected = x.numpy().astype(float) @ layer.weight.detach().numpy().astype(float).T
    error = np.abs(y.detach().float().numpy() - expected).max()
    assert y.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert (1e-4 < error < 2e-2) if bf16 else error < 1e-5  # 8 against 24 bits of mantissa
    y.float().sum().backward()
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32
    assert layer(x).dtype == torch.float32  # and nothing is left behind
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() == math_sdp


@pytest.mark.parametrize("is_tied", [True, False])
def test_each_layer_learns_by_the_decay_slower_than_the_one_above_it(is_tied):
    model = classifier(n_layers=3)
    if not is_tied:
        output = model.llama.output
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
    model.llama.layers[0].requires_grad_(False)
    groups = parameter_groups(model, 2.0, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    expected = {"classifier_head.": 2.0, "llama.norm.": 2.0, "llama.output.": 2.0}
    expected |= {"llama.layers.2.": 1.0, "llama.layers.1.": 0.5, "llama.tok_embeddings.": 0.125}
    for name, parameter in model.named_parameters():
        if name.startswith("llama.layers.0."):
            assert id(parameter) not in rate  # frozen
        else:
            assert rate[id(parameter)] == next(v for k, v in expected.items() if name.startswith(k))
    (plain,) = parameter_groups(model, 2.0)
    assert {id(p) for p in plain["params"]} == set(rate)
