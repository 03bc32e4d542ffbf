"""Mixout: its mean, its spread, its gradient, and that it leaves as it came."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils import parametrize

from advanced.methods.mixout import Mixout, add_mixout, merge
from classifier import LlamaEmbeddingClassifier
from conftest import LENGTHS, TOKENS, random_llama
from fast.linear import Linear
from training.dataset import Example, SentenceDataset
from training.loop import train_classifier


def classifier(scale: float = 1.0) -> LlamaEmbeddingClassifier:
    config = SimpleNamespace(
        num_labels=2, option="finetune", hidden_dropout_prob=0.0, pooling="mean"
    )
    return LlamaEmbeddingClassifier(config, random_llama(scale=scale)).eval()


def moved(model: LlamaEmbeddingClassifier) -> None:
    """Some steps of training, as it were: every weight is off the pretrained one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def log_probs(model: LlamaEmbeddingClassifier) -> torch.Tensor:
    return model(TOKENS, lengths=LENGTHS)


def weight_and_mixout(p: float, n: int = 50) -> tuple[torch.Tensor, Mixout]:
    target = torch.randn(n, n)
    return (target + torch.randn(n, n)).requires_grad_(), Mixout(target, p)


def test_without_a_probability_the_training_pass_is_the_eval_pass():
    model = classifier(scale=5.0)
    add_mixout(model, 0.0)
    moved(model)
    expected = log_probs(model)
    state = torch.get_rng_state()
    assert torch.equal(log_probs(model.train()), expected)
    assert torch.equal(torch.get_rng_state(), state)


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
    rows, columns = is_pretrained.any(dim=1), is_pretrained.any(dim=0)
    assert rows.all() and columns.all()  # a draw for each number, not for each neuron
    assert not is_pretrained.all(dim=1).any() and not is_pretrained.all(dim=0).any()


def test_the_mean_over_draws_is_the_weight_of_eval_mode():
    p, n_draws = 0.7, 400
    weight, mixout = weight_and_mixout(p)
    weight = weight.detach()
    mean = torch.stack([mixout(weight) for _ in range(n_draws)]).double().mean(dim=0)
    # Var W' = (W - W_pre)^2 p / (1 - p); six standard errors, for 2,500 numbers at once.
    std = (weight - mixout.target).abs().double() * (p / (1 - p)) ** 0.5
    assert ((mean - weight).abs() < 6 * std / n_draws**0.5 + 1e-6).all()
    assert torch.equal(mixout.eval()(weight), weight)


@pytest.mark.parametrize("p", [0.1, 0.9])
def test_at_the_pretrained_weights_training_equals_eval(p):
    model = classifier(scale=5.0)
    expected = log_probs(model)
    add_mixout(model, p)
    assert torch.equal(log_probs(model.train()), expected)
    moved(model)
    assert not torch.equal(log_probs(model), log_probs(model))


def test_gradient_reaches_the_weight_where_it_was_not_swapped_and_scaled():
    p = 0.75
    weight, mixout = weight_and_mixout(p)
    mixed = mixout(weight)
    upstream = torch.randn_like(mixed)
    (gradient,) = torch.autograd.grad(mixed, weight, upstream)
    is_pretrained = mixed == mixout.target
    assert 0 < is_pretrained.sum() < is_pretrained.numel()
    torch.testing.assert_close(gradient, upstream * ~is_pretrained / (1 - p))


def test_eval_mode_is_the_model_without_mixout_and_draws_nothing():
    model = classifier(scale=5.0)
    state = torch.get_rng_state()
    add_mixout(model, 0.9)
    assert torch.equal(torch.get_rng_state(), state)
    moved(model)
    plain = copy.deepcopy(model)
    merge(plain)
    state = torch.get_rng_state()
    assert torch.equal(log_probs(model), log_probs(plain))  # added in eval mode, it is in eval mode
    assert torch.equal(torch.get_rng_state(), state)
    add_mixout(plain.train(), 0.9)
    assert torch.equal(torch.get_rng_state(), state)


def test_merge_restores_the_names_and_keeps_the_parameters_and_what_they_learned():
    model = classifier()
    names, parameters = list(model.state_dict()), dict(model.named_parameters())
    add_mixout(model, 0.5)
    moved(model)
    merge(model)
    assert list(model.state_dict()) == names
    assert all(p is parameters[name] for name, p in model.named_parameters())
    start = classifier()
    for layer, pretrained in zip(model.llama.layers, start.llama.layers, strict=True):
        assert not torch.equal(layer.feed_forward.w2.weight, pretrained.feed_forward.w2.weight)
    assert type(model.llama.layers[0].feed_forward.w2) is Linear


def test_every_matrix_of_the_layers_is_mixed_and_nothing_else_is():
    model = classifier()
    matrices = {name for name, p in model.llama.layers.named_parameters() if p.ndim == 2}
    add_mixout(model, 0.5)
    mixed = {
        f"{name}.weight"
        for name, module in model.llama.layers.named_modules()
        if parametrize.is_parametrized(module, "weight")
    }
    assert mixed == matrices and len(mixed) == 14
    outside = (model.classifier_head, model.llama.tok_embeddings, model.llama.output)
    assert not any(parametrize.is_parametrized(module) for module in outside)


def test_the_pretrained_weights_are_neither_saved_nor_trained_nor_shared():
    plain, model = classifier(), classifier()
    add_mixout(model, 0.5)
    shapes = [tensor.shape for tensor in plain.state_dict().values()]
    assert sorted(t.shape for t in model.state_dict().values()) == sorted(shapes)
    log_probs(model.train())[:, 0].sum().backward()
    inside = [name for name, p in model.llama.layers.named_parameters() if p.grad is not None]
    assert len(inside) == len(list(plain.llama.layers.parameters()))
    assert sum(name.endswith(".parametrizations.weight.original") for name in inside) == 14
    moved(model)
    linear = model.llama.layers[0].attention.compute_query
    start = plain.llama.layers[0].attention.compute_query.weight
    assert torch.equal(linear.parametrizations.weight[0].target, start)


def test_training_moves_the_weights_and_a_new_draw_makes_each_pass():
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    add_mixout(model, 0.5)
    examples = [Example(f"sentence {i}", i % 2, [5 + i, 9, 20 + i]) for i in range(8)]
    data = SentenceDataset(examples, pad_id=3)
    history = train_classifier(
        model, data, data, epochs=2, batch_size=4, lr=1e-2, seed=1,
        device=torch.device("cpu"), on_epoch=lambda report, best: None,
    )  # fmt: skip
    assert history[1].train_loss < history[0].train_loss
    assert not torch.equal(log_probs(model.train()), log_probs(model))
    merge(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert not any(torch.equal(after[name], before[name]) for name in before if "layers" in name)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_a_p_that_is_no_probability_below_one_is_refused_by_value(p):
    model = classifier()
    with pytest.raises(ValueError, match=rf"p={p} is not a number in \[0, 1\)"):
        add_mixout(model, p)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_adding_twice_and_merging_what_is_not_there_are_refused_by_name():
    model = classifier()
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.compute_query\.weight has no"):
        merge(model)
    add_mixout(model, 0.5)
    with pytest.raises(ValueError, match=r"compute_query\.weight is parametrized already"):
        add_mixout(model, 0.5)
    last = model.llama.layers[1].feed_forward.w3
    parametrize.register_parametrization(last, "weight", torch.nn.Identity())
    with pytest.raises(ValueError, match=r"w3\.weight has Mixout, Identity, not mixout alone"):
        merge(model)
    assert parametrize.is_parametrized(model.llama.layers[0].attention.compute_query)
