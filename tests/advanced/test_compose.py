"""Which methods combine, and that every option reaches its method."""

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.parametrize import is_parametrized

from advanced import run as composer
from advanced.compose import METHODS, PARTIAL, POOL, Sum, build, compose, prepare
from advanced.methods import lora
from advanced.methods.mixout import Mixout
from conftest import random_llama
from utils import InputError

REFUSED = {
    *(frozenset(pair) for group in (POOL, PARTIAL) for pair in combinations(group, 2)),
    *(frozenset((part, "mixout")) for part in PARTIAL),
    *(frozenset((part, "l2sp")) for part in ("lora", "head")),
    frozenset(("head", "wise_ft")),
    *(frozenset(("plain", name)) for name in METHODS if name != "plain"),
    *(frozenset(("zero_shot", name)) for name in METHODS if name not in ("zero_shot", "pretrain")),
    frozenset(("prompt", "head")),
    frozenset(("prompt", "smart")),
    frozenset(("adapter", "wise_ft")),
}


def test_each_pair_combines_in_one_order_or_is_refused_in_a_line_that_names_one():
    for pair in combinations(METHODS, 2):
        if frozenset(pair) in REFUSED:
            with pytest.raises(InputError, match="|".join(pair)) as refused:
                compose(pair)
            assert "\n" not in str(refused.value)
        else:
            assert compose(pair) == compose(pair[::-1]) == pair
    with pytest.raises(InputError, match="twice"):
        compose(["lora", "lora"])


def prepared(method: str, *options: str):
    """Return (the model with its parts, its regularizer) of a command's options."""
    args = composer.get_args(["--method", method, *options])
    config = SimpleNamespace(num_labels=2, option="finetune", hidden_dropout_prob=0.0)
    model = build(args.method, random_llama(), config, None, (), args.adapter_size)
    return model, prepare(args.method, model, args)


def test_lora_updates_the_matrices_it_is_told_to():
    def updated(model: torch.nn.Module) -> set[str]:
        names = [name for name, module in model.named_modules() if is_parametrized(module)]
        return {name.rpartition(".")[2] for name in names}

    assert updated(prepared("lora")[0]) == {"compute_query", "compute_value"}
    targets = ("w1", "compute_output")
    model, _ = prepared("lora", "--lora_rank", "3", "--lora_alpha", "5", "--lora_targets", *targets)
    assert updated(model) == set(targets)
    updates = [module for module in model.modules() if isinstance(module, lora.LowRankUpdate)]
    assert {(update.A.shape[0], update.scale) for update in updates} == {(3, 5 / 3)}


def test_mixout_adapters_l2sp_and_smart_get_their_numbers():
    model, _ = prepared("mixout", "--mixout_p", "0.3")
    assert {m.p for m in model.modules() if isinstance(m, Mixout)} == {0.3}
    model, _ = prepared("adapter", "--adapter_size", "5")
    assert model.llama.layers[1].feed_forward.adapter.down.weight.shape == (5, 32)
    _, penalty = prepared("l2sp", "--l2sp_weight", "0.25", "--l2sp_head_weight", "0.75")
    assert (penalty[0].alpha, penalty[0].beta) == (0.25, 0.75)
    options = ["--smart_weight", "2", "--smart_radius", "0.5", "--proximal_weight", "3"]
    model, penalty = prepared("smart", *options, "--batch_size", "4")
    term, rms = penalty[0], model.llama.tok_embeddings.weight.square().mean().sqrt().item()
    assert (term.weight, term.proximal_weight, term.batch_size) == (2, 3, 4)
    assert term.radius == pytest.approx(0.5 * rms)
    assert term.momentum == 0.99
    assert term.noise / term.radius == pytest.approx(1.0)
    assert term.step_size / term.radius == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("moved", "weight"),
    [("llama.norm.weight", 0.5), ("llama.layers.0.attention.adapter.up.bias", 0.25)],
)
def test_l2sp_holds_pretrained_gains_and_takes_adapters_for_new(moved, weight):
    options = ["--method", "l2sp", "--l2sp_weight", "0.5", "--l2sp_head_weight", "0.25"]
    model, penalty = prepared("adapter", *options)
    before, parameter = penalty(model, None, None), model.get_parameter(moved)
    with torch.no_grad():
        parameter.add_(1.0)
    difference = (penalty(model, None, None) - before).item()
    assert difference == pytest.approx(weight / 2 * parameter.numel(), rel=1e-4)


def test_regularizers_together_are_their_sum():
    terms = [torch.nn.Identity(), torch.nn.Softsign()]
    assert Sum(terms)(torch.tensor(1.0)) == 1.5
