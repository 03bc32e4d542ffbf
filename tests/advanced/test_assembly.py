"""That every option of advanced.run reaches the part it is for, and what its defaults are."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.parametrize import is_parametrized

from advanced import assembly
from advanced import run as composer
from advanced.methods import lora
from advanced.methods.mixout import Mixout
from advanced.methods.smart import Smart
from classifier import LlamaEmbeddingClassifier
from conftest import random_llama


def prepared(method: str, *options: str):
    """(the model with its parts, its regularizer) of a command's options."""
    args = composer.get_args(["--method", method, *options])
    config = SimpleNamespace(num_labels=2, option="finetune", hidden_dropout_prob=0.0)
    model = assembly.build([method], random_llama(), config, None, None, args.adapter_size)
    return model, assembly.prepare([method], model, args)


def parametrized(model: LlamaEmbeddingClassifier) -> set[str]:
    """The last names of the modules whose weights a method computes."""
    names = [name for name, module in model.named_modules() if is_parametrized(module)]
    return {name.rpartition(".")[2] for name in names}


def test_lora_changes_the_matrices_it_is_told_to():
    assert parametrized(prepared("lora")[0]) == {"compute_query", "compute_value"}
    targets = ("w1", "compute_output")
    model, _ = prepared("lora", "--lora_rank", "3", "--lora_alpha", "5", "--lora_targets", *targets)
    assert parametrized(model) == set(targets)
    updates = [module for module in model.modules() if isinstance(module, lora.LowRankUpdate)]
    assert {update.A.shape[0] for update in updates} == {3}
    assert {update.scale for update in updates} == {5 / 3}


def test_mixout_mixes_with_the_probability_it_is_told():
    model, _ = prepared("mixout", "--mixout_p", "0.3")
    assert {m.p for m in model.modules() if isinstance(m, Mixout)} == {0.3}


def test_l2sp_takes_the_first_weight_for_the_pretrained_and_the_second_for_the_head():
    _, penalty = prepared("l2sp", "--l2sp_weight", "0.25", "--l2sp_head_weight", "0.75")
    assert (penalty.terms[0].weight, penalty.terms[0].head_weight) == (0.25, 0.75)


def test_smart_gets_its_weights_its_radius_and_the_size_of_a_whole_batch():
    options = ["--smart_weight", "2", "--smart_radius", "0.5", "--proximal_weight", "3"]
    model, penalty = prepared("smart", *options, "--batch_size", "4")
    term = penalty.terms[0]
    assert (term.weight, term.proximal_weight, term.batch_size) == (2, 3, 4)
    scale = model.llama.tok_embeddings.weight.square().mean().sqrt().item()
    assert term.radius == pytest.approx(0.5 * scale)


def test_smarts_other_numbers_are_those_its_documentation_gives():
    term = Smart(prepared("smart")[0])
    assert (term.n_steps, term.momentum) == (1, 0.99)
    assert term.noise / term.radius == pytest.approx(1.0)
    assert term.step_size / term.radius == pytest.approx(100.0)


@pytest.mark.parametrize(("size", "part"), [("5", "down"), ("9", "up")])
def test_adapters_have_the_size_they_are_told(size, part):
    model, _ = prepared("adapter", "--adapter_size", size)
    shapes = {getattr(layer.attention.adapter, part).weight.shape for layer in model.llama.layers}
    dim = model.llama.config.dim
    assert shapes == {torch.Size([int(size), dim] if part == "down" else [dim, int(size)])}
