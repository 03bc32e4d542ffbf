"""Which weights are trained: counts in closed form, and frozen bits that stay."""

import pytest
import torch
from test_training import classifier, random_data, train

from advanced.methods.freezing import PARTS, count_trainable, train_only

DIM, N_LAYERS, N_LABELS = 32, 2, 2
HEAD = (DIM + 1) * N_LABELS
NORMS = (2 * N_LAYERS + 1) * DIM


def trained_names(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_counts_are_the_closed_forms_with_the_tied_weight_once():
    model = classifier(hidden_dim=40, vocab_size=320)
    attention = 2 * DIM * DIM + 2 * DIM * (DIM // 2)  # half as many key/value heads as query heads
    everything = 320 * DIM + N_LAYERS * (attention + 3 * DIM * 40) + NORMS + HEAD
    assert count_trainable(model) == (everything, everything)
    train_only(model, "norms")
    assert count_trainable(model) == (NORMS + HEAD, everything)
    train_only(model, "head")
    assert count_trainable(model) == (HEAD, everything)
    model.llama.output.weight = torch.nn.Parameter(model.llama.output.weight.detach().clone())
    model.requires_grad_(True)
    untied = everything + 320 * DIM
    assert count_trainable(model) == (untied, untied)


@pytest.mark.parametrize("which", PARTS)
@pytest.mark.parametrize("before", [*PARTS, None])
def test_what_is_trained_does_not_depend_on_what_was(which, before):
    model = classifier()
    if before is None:
        model.requires_grad_(False)
    else:
        train_only(model, before)
    train_only(model, which)
    expected = {"classifier_head.weight", "classifier_head.bias"}
    if which == "norms":
        layers = [f"llama.layers.{i}." for i in range(N_LAYERS)]
        expected |= {f"{layer}{n}_norm.weight" for layer in layers for n in ("attention", "ffn")}
        expected |= {"llama.norm.weight"}
    assert set(trained_names(model)) == expected


@pytest.mark.parametrize("which", PARTS)
def test_training_moves_what_is_trained_and_no_bit_of_the_rest(which):
    model = classifier()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_only(model, which)
    moving = set(trained_names(model))
    train(model, random_data(), epochs=2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in moving), name


def test_a_part_that_there_is_not_is_refused_and_changes_nothing():
    model = classifier()
    with pytest.raises(ValueError, match=r"which='biases'.*norms, head"):
        train_only(model, "biases")
    assert all(parameter.requires_grad for parameter in model.parameters())
