"""The poolings against float64 NumPy, and what they refuse."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import oracle
from advanced.methods.pooling import POOLINGS
from classifier import LlamaEmbeddingClassifier
from conftest import LENGTHS, TOKENS, random_llama, randomize
from helpers import random_data, train, weights_of
from utils import InputError

NAMES = sorted(POOLINGS)
OWN = {"attention_pool": ["query"], "last_mean": [], "layer_mix": ["layer_scores", "gamma"]}


def config(**options) -> SimpleNamespace:
    defaults = {"num_labels": 5, "option": "finetune", "hidden_dropout_prob": 0.0}
    return SimpleNamespace(**{**defaults, "pooling": "mean", **options})


def pooling(name, attention="full", **options) -> LlamaEmbeddingClassifier:
    return POOLINGS[name](config(**options), random_llama(attention=attention)).eval()


def randomized(name) -> LlamaEmbeddingClassifier:
    """The pooling's own weights have values as training may leave them."""
    model = pooling(name)
    randomize(model, lambda parameter: parameter in OWN[name], 1.0)
    return model


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


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_padded_batch_are_the_float64_sentences_alone(name):
    model = randomized(name)
    said = model(TOKENS, lengths=LENGTHS).detach().numpy()
    weight, bias = (p.detach().double().numpy() for p in model.classifier_head.parameters())
    for row in range(len(TOKENS)):
        expected = np.log(oracle.softmax(weight @ pooled_by_numpy(name, model, row) + bias))
        np.testing.assert_allclose(said[row], expected, rtol=1e-4, atol=1e-4)


def test_all_tokens_and_all_layers_begin_alike():
    assert not pooling("attention_pool").query.any()
    mix = pooling("layer_mix")
    assert not mix.layer_scores.any() and mix.gamma == 1


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
    model = randomized(name)
    hidden = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = model.pool(hidden, LENGTHS)
        with torch.autocast("cpu", torch.bfloat16):
            actual = model.pool(hidden, LENGTHS)
    torch.testing.assert_close(actual, expected)
