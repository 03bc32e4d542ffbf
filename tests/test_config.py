"""LlamaConfig has the assignment's signature and lets no impossible model through."""

import inspect
import math
from types import SimpleNamespace

import pytest

from config import LlamaConfig, require_classifier_config
from utils import InputError

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
SIZES = {*ASSIGNMENT} - {"dropout", "layer_norm_eps"}
MAX_SIZE, MAX_LAYERS = 2**28, 1000
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


def test_names_order_and_defaults_are_the_assignments_and_attention_is_full():
    assert vars(LlamaConfig()) == {**ASSIGNMENT, "attention": "full"}
    names = list(inspect.signature(LlamaConfig).parameters)
    assert names[: len(ASSIGNMENT) + 1] == [*ASSIGNMENT, "attention"]
    assert vars(LlamaConfig(**OTHER)) == vars(LlamaConfig(*OTHER.values())) == OTHER


def test_kv_heads_and_head_size_are_computed():
    assert [LlamaConfig(n_heads=n, n_kv_heads=None).n_kv_heads for n in (1, 4, 16)] == [1, 4, 16]
    assert (LlamaConfig().head_dim, LlamaConfig(**OTHER).head_dim) == (512 // 8, 48 // 6)


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
        {"max_seq_len": 2**18},  # times 64: the largest rotary table
        *({key: MAX_SIZE} for key in ("vocab_size", "multiple_of", "hidden_dim")),
        {"n_layers": MAX_LAYERS},
        {"dim": MAX_SIZE, "n_heads": 64, "max_seq_len": 4},
    ],
)
def test_the_edge_of_what_is_valid_is_valid(valid):
    config = vars(LlamaConfig(**valid))
    assert {key: config[key] for key in valid} == valid


NO_SIZES = [0, -1, 8.0, math.nan, math.inf, True, "8", [8], MAX_SIZE + 8, 10**100]
NO_PROBABILITIES = [1.0, 1, -1e-9, math.nan, -math.inf, True, "0.1", None]
NO_EPS = [0, -1e-5, 1.5, math.nan, math.inf, True, "1e-5", None, 10**400]
NO_ATTENTION = ["sliding", "Full", "", None, 0, ["full"]]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        *((key, NO_SIZES) for key in sorted(SIZES)),
        *((key, [None]) for key in sorted(SIZES - {"n_kv_heads", "hidden_dim"})),
        ("dropout", NO_PROBABILITIES),
        ("layer_norm_eps", NO_EPS),
        ("attention", NO_ATTENTION),
    ],
)
def test_an_impossible_value_is_refused_with_its_name(key, values):
    for value in values:
        with pytest.raises(InputError) as caught:
            LlamaConfig(**{key: value})
        shown = repr(value) if len(repr(value)) < 40 else repr(value)[:10]
        assert str(caught.value).startswith(f"{key}={shown}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dim": 100}, "dim=100 is not divisible by n_heads=8"),
        ({"n_kv_heads": 3}, "n_heads=8 is not divisible by n_kv_heads=3"),
        ({"n_heads": 4}, "n_heads=4 is not divisible by n_kv_heads=8"),
        ({"dim": 24}, "dim=24 / n_heads=8 gives the odd head size 3"),
        ({"max_seq_len": 2**18 + 1}, "max_seq_len=262145 times head size 64"),
        ({"attention": "sliding"}, r"\('full', 'causal'\)"),
        ({"rope_theta": 1e4, "self": "x"}, "'rope_theta': 10000.0, 'self': 'x'"),
    ],
)
def test_sizes_that_do_not_fit_and_unknown_keys_are_named(arguments, words):
    with pytest.raises(InputError, match=words):
        LlamaConfig(**arguments)


@pytest.mark.parametrize("key", ["vocab_size", "dropout", "layer_norm_eps", "attention", "unknown"])
def test_a_value_of_any_length_and_depth_is_refused_in_a_short_message(key):
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    doubled: list = []
    for _ in range(60):
        doubled = [doubled, doubled]  # 2^60 lists if printed
    for value in (deep, doubled, "a" * 10**6, ["a"] * 10**6):
        with pytest.raises(InputError, match=key) as caught:
            LlamaConfig(**{key: value})
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("arguments", [OTHER, {"n_heads": 2, "n_kv_heads": None}])
def test_a_config_is_built_again_from_its_dict_and_from_its_repr(arguments):
    config = LlamaConfig(**arguments)
    assert LlamaConfig(**config.to_dict()) == eval(repr(config)) == config
    assert LlamaConfig(**{**arguments, "max_seq_len": 76}) != config
    config.to_dict()["dim"] = 7  # a copy
    assert config.dim != 7


SOUND = {"num_labels": 2, "hidden_dropout_prob": 0.3, "option": "finetune", "pooling": "last"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        *(({key: ...}, f"has no {key}") for key in SOUND if key != "pooling"),
        ({"num_labels": 0}, "num_labels=0 is not an integer in 1..10000"),
        ({"num_labels": 10_001}, "num_labels=10001 is not an integer"),
        ({"num_labels": "2"}, "num_labels='2' is not an integer"),
        ({"hidden_dropout_prob": None}, "hidden_dropout_prob=None is not a number"),
        ({"option": ["finetune"]}, "option=.* is not one of"),
    ],
)
def test_the_config_of_a_stored_classifier_is_checked(changed, words):
    require_classifier_config(SimpleNamespace(**SOUND))
    kept = {key: value for key, value in {**SOUND, **changed}.items() if value is not ...}
    with pytest.raises(InputError, match=words):
        require_classifier_config(SimpleNamespace(**kept))
