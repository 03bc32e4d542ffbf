"""LlamaConfig has the assignment's signature and lets no impossible model through."""

import inspect
import math
from types import SimpleNamespace

import pytest

from config import LlamaConfig, require_classifier_config

# The assignment's config.py, in its order.
ASSIGNMENT = {
    "vocab_size": 32000,
    "dim": 512,
    "dropout": 0.0,
    "n_layers": 8,
    "n_heads": 8,
    "n_kv_heads": 8,
    "max_seq_len": 1024,
    "layer_norm_eps": 1e-5,
    "multiple_of": 32,
    "hidden_dim": None,
}
SIZES = (
    "vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "multiple_of",
    "hidden_dim",
)  # fmt: skip
OTHER = {
    "vocab_size": 100,
    "dim": 48,
    "dropout": 0.25,
    "n_layers": 3,
    "n_heads": 6,
    "n_kv_heads": 2,
    "max_seq_len": 77,
    "layer_norm_eps": 1e-6,
    "multiple_of": 5,
    "hidden_dim": 91,
    "attention": "causal",
}


def test_defaults_are_the_assignments_and_attention_is_full():
    assert vars(LlamaConfig()) == {**ASSIGNMENT, "attention": "full"}


def test_arguments_stand_in_the_assignments_order():
    names = list(inspect.signature(LlamaConfig).parameters)
    assert names[: len(ASSIGNMENT) + 1] == [*ASSIGNMENT, "attention"]
    assert LlamaConfig(*OTHER.values()) == LlamaConfig(**OTHER)


def test_every_argument_is_kept_as_given():
    assert vars(LlamaConfig(**OTHER)) == OTHER


@pytest.mark.parametrize("n_heads", [1, 4, 16])
def test_no_kv_heads_means_one_per_query_head(n_heads):
    assert LlamaConfig(n_heads=n_heads, n_kv_heads=None).n_kv_heads == n_heads


def test_head_size_is_dim_over_heads():
    assert LlamaConfig().head_dim == 512 // 8
    assert LlamaConfig(**OTHER).head_dim == 48 // 6


@pytest.mark.parametrize(
    "valid",
    [
        {"dropout": 0},
        {"dropout": math.nextafter(1, 0)},
        {"layer_norm_eps": 1},
        {"layer_norm_eps": 5e-324},
        {"n_kv_heads": 1},
        {"dim": 16},  # heads of size 2, the smallest that rotates
        {"hidden_dim": 1},
    ],
)
def test_the_edge_of_what_is_valid_is_valid(valid):
    ((key, value),) = valid.items()
    assert getattr(LlamaConfig(**valid), key) == value


def refusal(**arguments) -> str:
    with pytest.raises(ValueError) as caught:
        LlamaConfig(**arguments)
    return str(caught.value)


@pytest.mark.parametrize("key", sorted({*SIZES} - {"n_heads", "n_kv_heads", "max_seq_len"}))
def test_sizes_whose_product_no_tensor_can_have_are_refused(key):
    heads = {"n_heads": 64, "max_seq_len": 1}
    assert getattr(LlamaConfig(**heads, **{key: 2**28}), key) == 2**28
    for size in (2**28 + 8, 2**62, 10**100):
        with pytest.raises(ValueError, match=f"{key}=.* exceeds 268435456"):
            LlamaConfig(**{key: size})


def test_a_rotary_table_that_would_fill_the_memory_is_refused():
    assert LlamaConfig(max_seq_len=2**18).head_dim == 64
    with pytest.raises(ValueError, match="max_seq_len=262145 times head size 64"):
        LlamaConfig(max_seq_len=2**18 + 1)


def test_numbers_beyond_a_float_are_refused():
    with pytest.raises(ValueError, match="layer_norm_eps=1000"):
        LlamaConfig(layer_norm_eps=10**400)


@pytest.mark.parametrize("key", ["vocab_size", "dropout", "layer_norm_eps", "attention", "unknown"])
def test_a_value_of_any_length_and_depth_is_refused_in_a_short_message(key):
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    doubled: list = []
    for _ in range(60):
        doubled = [doubled, doubled]  # 2^60 lists, where they are printed
    for value in (deep, doubled, "a" * 10**6, ["a"] * 10**6):
        with pytest.raises(ValueError, match=key) as caught:
            LlamaConfig(**{key: value})
        assert len(str(caught.value)) < 1000


SOUND = {"num_labels": 2, "hidden_dropout_prob": 0.3, "option": "finetune", "pooling": "last"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        *(({key: ...}, f"has no {key}") for key in SOUND if key != "pooling"),
        ({"num_labels": 0}, "num_labels=0 is not a positive integer"),
        ({"num_labels": "2"}, "num_labels='2' is not a positive integer"),
        ({"num_labels": 10_001}, "num_labels=10001 exceeds 10000"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob=1.0 is not a number"),
        ({"hidden_dropout_prob": None}, "hidden_dropout_prob=None is not a number"),
        ({"option": ["finetune"]}, "option=.* is not one of"),
        ({"pooling": 3}, "pooling=3 is not one of"),
        ({"attention": "sliding"}, "attention='sliding' is not one of"),
    ],
)
def test_the_config_of_a_stored_classifier_is_checked(changed, words):
    require_classifier_config(SimpleNamespace(**SOUND))
    kept = {key: value for key, value in {**SOUND, **changed}.items() if value is not ...}
    with pytest.raises(ValueError, match=words):
        require_classifier_config(SimpleNamespace(**kept))


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [0, -1, 8.0, math.nan, math.inf, True, False, "8", [8]])
def test_a_size_is_a_positive_integer(key, value):
    assert f"{key}={value!r} is not a positive integer" in refusal(**{key: value})


@pytest.mark.parametrize("key", sorted({*SIZES} - {"n_kv_heads", "hidden_dim"}))
def test_only_kv_heads_and_hidden_size_have_a_default_to_compute(key):
    assert f"{key}=None" in refusal(**{key: None})


@pytest.mark.parametrize(
    "value", [1.0, 1, 1.5, -1e-9, math.nan, math.inf, -math.inf, True, "0.1", None]
)
def test_dropout_lies_between_zero_and_below_one(value):
    assert f"dropout={value!r} is not a number in [0, 1)" in refusal(dropout=value)


@pytest.mark.parametrize("value", [0, 0.0, -1e-5, math.nan, math.inf, True, "1e-5", None])
def test_layer_norm_eps_is_positive(value):
    assert f"layer_norm_eps={value!r} is not a positive number" in refusal(layer_norm_eps=value)


@pytest.mark.parametrize("value", ["sliding", "Full", "", None, 0, ["full"]])
def test_attention_is_one_of_two_words(value):
    message = refusal(attention=value)
    assert f"attention={value!r}" in message
    assert "'full', 'causal'" in message


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"dim": 100}, ["dim=100", "n_heads=8", "not divisible"]),
        ({"n_kv_heads": 3}, ["n_heads=8", "n_kv_heads=3", "not divisible"]),
        ({"n_heads": 4}, ["n_heads=4", "n_kv_heads=8", "not divisible"]),
        ({"dim": 24}, ["dim=24", "n_heads=8", "head size 3", "odd"]),
        ({"n_heads": 1, "n_kv_heads": 1, "dim": 7}, ["dim=7", "n_heads=1", "head size 7"]),
    ],
)
def test_sizes_that_do_not_fit_together_are_both_named(arguments, named):
    message = refusal(**arguments)
    assert [word for word in named if word not in message] == []


def test_every_unknown_key_is_named_with_its_value():
    message = refusal(rope_theta=1e4, norm_eps="x")
    assert "rope_theta=10000.0" in message
    assert "norm_eps='x'" in message


@pytest.mark.parametrize("arguments", [{}, OTHER, {"n_heads": 2, "n_kv_heads": None}])
def test_a_config_can_be_built_again_from_its_dict_and_from_its_repr(arguments):
    config = LlamaConfig(**arguments)
    assert LlamaConfig(**config.to_dict()) == config
    assert eval(repr(config)) == config


def test_the_dict_is_a_copy():
    config = LlamaConfig()
    config.to_dict()["dim"] = 7
    assert config.dim == 512


@pytest.mark.parametrize("key", OTHER)
def test_configs_that_differ_anywhere_are_unequal(key):
    other = {"n_heads": 12, "n_kv_heads": 1, "dim": 96}.get(key, LlamaConfig().to_dict()[key])
    assert other != OTHER[key]
    assert LlamaConfig(**{**OTHER, key: other}) != LlamaConfig(**OTHER)


def test_a_config_equals_no_dict():
    assert LlamaConfig(**OTHER) != OTHER
