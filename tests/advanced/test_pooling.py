"""The poolings against float64 NumPy, and the plain poolings they contain."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import oracle
from advanced.methods.pooling import POOLINGS
from classifier import LlamaEmbeddingClassifier
from conftest import LENGTHS, TOKENS, random_llama
from helpers import random_data, train, weights_of
from utils import InputError

NAMES = sorted(POOLINGS)
OWN = {"attention_pool": ["query"], "last_mean": [], "layer_mix": ["layer_scores", "gamma"]}


def config(**options) -> SimpleNamespace:
    defaults = {"num_labels": 5, "option": "finetune", "hidden_dropout_prob": 0.0}
    return SimpleNamespace(**{**defaults, "pooling": "mean", **options})


def pooling(name, attention="full", **options) -> LlamaEmbeddingClassifier:
    return POOLINGS[name](config(**options), random_llama(attention=attention)).eval()


def randomize(model: LlamaEmbeddingClassifier, name: str) -> None:
    """Give the pooling's own weights values as training may leave them."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for own in OWN[name]:
            parameter = getattr(model, own)
            parameter.copy_(torch.randn(parameter.shape, generator=rng))


def with_the_head_of(model: LlamaEmbeddingClassifier) -> LlamaEmbeddingClassifier:
    """The plain classifier of pooling "mean", of the same Llama and head."""
    plain = LlamaEmbeddingClassifier(config(), model.llama)
    plain.classifier_head = model.classifier_head
    return plain.eval()


def log_softmax(x: np.ndarray) -> np.ndarray:
    return np.log(oracle.softmax(x))


def pooled_by_numpy(name: str, model: LlamaEmbeddingClassifier, row: int) -> np.ndarray:
    """One sentence alone, without padding, in float64: what the head reads."""
    tokens = TOKENS[row : row + 1, : LENGTHS[row]]
    llama, weights = model.llama.config, model.llama.state_dict()

    def hidden(n_layers: int) -> np.ndarray:  # (T, dim) after the final norm
        shape = SimpleNamespace(**{**llama.to_dict(), "n_layers": n_layers})
        return oracle.forward(weights, shape, tokens)[1][0]

    h = hidden(llama.n_layers)
    own = {key: getattr(model, key).detach().double().numpy() for key in OWN[name]}
    if name == "attention_pool":
        return oracle.softmax(h @ own["query"]) @ h
    if name == "last_mean":
        return np.concatenate((h[-1], h.mean(axis=0)))
    weights_of_layers = own["gamma"] * oracle.softmax(own["layer_scores"])
    return sum(w * hidden(j).mean(axis=0) for j, w in enumerate(weights_of_layers))


@pytest.mark.parametrize("attention", ["full", "causal"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_padded_batch_are_the_float64_sentences_alone(name, attention):
    model = pooling(name, attention)
    randomize(model, name)
    said = model(TOKENS, lengths=LENGTHS).detach().numpy()
    weight, bias = (p.detach().double().numpy() for p in model.classifier_head.parameters())
    for row in range(len(TOKENS)):
        expected = log_softmax(weight @ pooled_by_numpy(name, model, row) + bias)
        np.testing.assert_allclose(said[row], expected, rtol=1e-4, atol=1e-4)


def test_attention_begins_as_the_mean():
    model = pooling("attention_pool")
    expected = with_the_head_of(model)(TOKENS, lengths=LENGTHS)
    torch.testing.assert_close(model(TOKENS, lengths=LENGTHS), expected, rtol=0.0, atol=1e-6)


def test_all_weight_on_the_last_layer_is_the_plain_mean():
    model = pooling("layer_mix")
    expected = with_the_head_of(model)(TOKENS, lengths=LENGTHS)
    assert not torch.allclose(model(TOKENS, lengths=LENGTHS), expected, atol=1e-3)
    with torch.no_grad():
        model.layer_scores[:-1] = -1e4
    assert torch.equal(model(TOKENS, lengths=LENGTHS), expected)


def test_layer_mix_leaves_no_hook_behind_even_where_a_pass_fails():
    model = pooling("layer_mix")
    expected = model.llama(TOKENS, lengths=LENGTHS)[1]
    model(TOKENS, lengths=LENGTHS)
    with pytest.raises(ValueError, match="are not 3 numbers"):
        model(TOKENS, lengths=LENGTHS + 1)
    assert torch.equal(model.llama(TOKENS, lengths=LENGTHS)[1], expected)
    parts = list(model.llama.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts)


@pytest.mark.parametrize("name", NAMES)
def test_over_a_frozen_llama_their_own_weights_learn(name):
    model = pooling(name, num_labels=2, option="pretrain")
    before = weights_of(model)
    train(model, random_data(), epochs=3, lr=1e-2)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) == key.startswith("llama."), key


@pytest.mark.parametrize("name", NAMES)
def test_pooling_position_which_leaves_padding_unmasked_is_refused(name):
    assert pooling(name, "causal", pooling=None).reads_lengths
    for word in ("position", None):
        with pytest.raises(InputError, match=r"--pooling position .*choose --pooling mean"):
            pooling(name, pooling=word)


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_float32_states_are_pooled_in_float32(name):
    model = pooling(name)
    randomize(model, name)
    hidden = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = model.pool(hidden, LENGTHS)
        with torch.autocast("cpu", torch.bfloat16):
            actual = model.pool(hidden, LENGTHS)
    torch.testing.assert_close(actual, expected)
