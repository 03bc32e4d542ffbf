"""Which weights are trained: counts in closed form, and frozen weights that keep their bits."""

import pytest
import torch

from advanced.methods.freezing import PARTS, count_parameters, train_only
from helpers import classifier, random_data, train, weights_of

DIM, N_LAYERS, N_LABELS = 32, 2, 2
HEAD = (DIM + 1) * N_LABELS
NORMS = (2 * N_LAYERS + 1) * DIM


def test_counts_are_the_closed_forms_with_the_tied_weight_once():
    model = classifier(hidden_dim=40, vocab_size=320)
    attention = 2 * DIM * DIM + 2 * DIM * (DIM // 2)  # half as many key/value heads as query heads
    everything = 320 * DIM + N_LAYERS * (attention + 3 * DIM * 40) + NORMS + HEAD
    assert count_parameters(model) == (everything, everything)
    train_only(model, "norms")
    assert count_parameters(model) == (NORMS + HEAD, everything)
    train_only(model, "head")
    assert count_parameters(model) == (HEAD, everything)


@pytest.mark.parametrize("part", PARTS)
def test_training_moves_the_part_and_no_bit_of_the_rest(part):
    model = classifier()
    before = weights_of(model)
    model.requires_grad_(False)  # what was trainable before does not matter
    train_only(model, part)
    layers = [f"llama.layers.{i}." for i in range(N_LAYERS)]
    norms = {f"{layer}{kind}_norm.weight" for layer in layers for kind in ("attention", "ffn")}
    moving = {"classifier_head.weight", "classifier_head.bias"}
    moving |= norms | {"llama.norm.weight"} if part == "norms" else set()
    train(model, random_data())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in moving), name
