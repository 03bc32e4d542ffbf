"""SMART: where the search goes, what the penalty is then, and that it leaves no trace."""

import copy

import pytest
import torch

from advanced.methods.smart import Smart, perturbed
from classifier import LlamaEmbeddingClassifier
from helpers import classifier as small_classifier
from helpers import move
from training.schedule import symmetric_kl

TOKENS = torch.randint(3, 320, (3, 5), generator=torch.Generator().manual_seed(2))
LENGTHS = torch.tensor([5, 3, 1])
TINY = {"dim": 8, "n_heads": 2, "n_kv_heads": 1}


def classifier(scale: float = 5.0, **options) -> LlamaEmbeddingClassifier:
    return small_classifier(scale=scale, n_labels=3, **options).train()


def forward(module: torch.nn.Module) -> torch.Tensor:
    return module(TOKENS, lengths=LENGTHS)


def call(smart: Smart, model: LlamaEmbeddingClassifier, seed: int = 0):
    torch.manual_seed(seed)
    return smart(model, None, forward)


def adversary(model: LlamaEmbeddingClassifier, **options) -> Smart:
    return Smart(model, **{"proximal_weight": 0.0, **options})


def deltas(smart: Smart, model: LlamaEmbeddingClassifier) -> list[torch.Tensor]:
    """What each pass of a call had added to the embeddings: none, the noise, ..., the found one."""
    seen = []
    handle = model.llama.layers[0].register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].detach())
    )
    call(smart, model)
    handle.remove()
    return [states - seen[0] for states in seen]


def rms_of_embedding(model: LlamaEmbeddingClassifier) -> float:
    weight = model.llama.tok_embeddings.weight.detach().double().numpy()
    return float((weight**2).mean() ** 0.5)


# ---------------------------------------------------------------- the perturbation


def test_a_perturbation_is_another_embedding_until_its_context_ends():
    model = classifier().eval()
    tokens = torch.arange(10, 15)[None]  # each token once
    expected = model(tokens, lengths=torch.tensor([5]))
    delta = torch.randn(1, 5, 32)
    with perturbed(model, delta):
        ours = model(tokens, lengths=torch.tensor([5]))
    assert torch.equal(model(tokens, lengths=torch.tensor([5])), expected)
    with torch.no_grad():
        model.llama.tok_embeddings.weight[10:15] += delta[0]
    torch.testing.assert_close(ours, model(tokens, lengths=torch.tensor([5])))


def test_the_perturbation_stays_in_the_ball_and_reaches_its_edge():
    model = classifier()
    found = deltas(adversary(model, radius=0.2), model)
    radius = 0.2 * rms_of_embedding(model)
    real = torch.arange(5) < LENGTHS[:, None]
    assert len(found) == 3  # of the clean pass, the noise, the perturbation
    largest = found[2].abs().amax(dim=2)
    assert (largest <= radius * (1 + 1e-5)).all()
    assert (largest[real] > 0.99 * radius).all()


def test_the_step_is_the_gradient_by_finite_differences_over_its_largest_number():
    model = classifier(**TINY).double().eval()
    smart = adversary(model, radius=0.1, step_size=0.01, noise=0.5)
    _, noise, found = deltas(smart, model)
    clean = forward(model).detach()
    h = 1e-4 * rms_of_embedding(model)
    gradient = torch.zeros_like(noise)
    with torch.no_grad():
        for i in range(noise.numel()):
            shift = torch.zeros_like(noise)
            shift.view(-1)[i] = h
            for sign in (1, -1):
                with perturbed(model, noise + sign * shift):
                    value = symmetric_kl(forward(model), clean)
                gradient.view(-1)[i] += sign * value / (2 * h)
    largest = gradient.abs().amax(dim=(1, 2), keepdim=True)
    radius = 0.1 * rms_of_embedding(model)
    expected = (noise + 0.01 * radius * gradient / largest).clamp(-radius, radius)
    assert (noise.abs() > radius).any()
    assert not gradient[1, 3:].any() and not gradient[2, 1:].any()  # of padding
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * radius)


# ---------------------------------------------------------------- the penalty


def test_the_gradient_is_that_of_the_divergence_at_the_found_perturbation_from_both_sides():
    model = classifier().double()
    smart = adversary(model, weight=3.0)
    delta = deltas(smart, model)[-1]
    trained = list(model.parameters())
    value = call(smart, model)
    ours = torch.autograd.grad(value, trained, allow_unused=True)
    with perturbed(model, delta):
        q = forward(model)
    p = forward(model)
    expected = 3.0 * (p.exp() * (p - q) + q.exp() * (q - p)).sum() / 3
    theirs = torch.autograd.grad(expected, trained, allow_unused=True)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(ours, theirs)


def test_the_proximal_term_is_the_divergence_from_the_teacher_times_its_weight():
    model = classifier()
    smart = Smart(model, weight=0.0, proximal_weight=2.0, momentum=0.5)
    assert call(smart, model).item() == 0.0
    start = copy.deepcopy(model)
    move(model, by=0.05)
    middle = copy.deepcopy(model)
    with torch.no_grad():
        for p, p0 in zip(middle.parameters(), start.parameters(), strict=True):
            p.copy_((p + p0) / 2)
    value = call(smart, model)
    expected = 2.0 * symmetric_kl(forward(model), forward(middle).detach())
    torch.testing.assert_close(value, expected)
    value.backward()
    assert not any(p.requires_grad or p.grad is not None for p in smart.parameters())
    expected_gradient = torch.autograd.grad(expected, model.classifier_head.weight)[0]
    torch.testing.assert_close(model.classifier_head.weight.grad, expected_gradient)


def test_the_teacher_is_the_moving_average_of_the_weights_of_each_call():
    model, beta = classifier().double(), 0.9
    smart = Smart(model, weight=0.0, momentum=beta)
    weights = [copy.deepcopy(list(model.parameters()))]
    for _ in range(4):
        move(model, by=0.05)
        call(smart, model)
        weights.append(copy.deepcopy(list(model.parameters())))
    for i, teacher in enumerate(smart.teacher.parameters()):
        expected = beta**4 * weights[0][i]
        for k in range(1, 5):
            expected = expected + (1 - beta) * beta ** (4 - k) * weights[k][i]
        torch.testing.assert_close(teacher.data, expected.data)
    assert smart.teacher.llama.output.weight is smart.teacher.llama.tok_embeddings.weight


def test_a_short_last_batch_weighs_as_much_less_as_in_the_loss():
    model = classifier()
    smarts = [Smart(model, batch_size=size) for size in (None, 4 * len(TOKENS))]
    move(model, by=0.05)
    whole, short = (call(smart, model).item() for smart in smarts)
    assert short == pytest.approx(whole / 4) and whole > 0.0


def test_dropout_is_not_measured():
    model = classifier(dropout=0.5)
    smart = Smart(model)
    move(smart.teacher, by=0.01)
    twin = copy.deepcopy(smart)
    in_training, in_eval = call(smart, model), call(twin, copy.deepcopy(model).eval())
    assert torch.equal(in_training, in_eval)
    smart, twin = (Smart(copy.deepcopy(model), weight=0.0) for _ in range(2))
    move(model, by=0.05)
    assert torch.equal(call(smart, model, seed=1), call(twin, model, seed=2))
    assert not torch.equal(forward(model), forward(model))


# ---------------------------------------------------------------- no trace


def traces(model: LlamaEmbeddingClassifier) -> tuple:
    hooks = [len(module._forward_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    return hooks, modes, [p.requires_grad for p in model.parameters()]


def test_a_call_leaves_gradients_modes_and_hooks_as_they_were():
    model = classifier()
    model.llama.layers[0].eval()
    model.llama.norm.weight.requires_grad_(False)
    before = traces(model)
    model.llama.output.weight.grad = torch.full_like(model.llama.output.weight, 7.0)
    smart = Smart(model)
    call(smart, model)
    assert traces(model) == before
    own = model.llama.output.weight
    assert (own.grad == 7.0).all()
    assert all(p.grad is None for p in model.parameters() if p is not own)
