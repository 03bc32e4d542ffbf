"""The model against float64 NumPy, against transformers, and against its own laws."""

import math

import numpy as np
import pytest
import torch

import oracle
from config import LlamaConfig
from conftest import random_llama, save_llama
from llama import Attention, FeedForward, Llama, RMSNorm, load_pretrained, sample
from utils import InputError

MODES = ("full", "causal")


def random_tokens(B: int = 3, T: int = 11, V: int = 320, seed: int = 1) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def run(model, tokens, **kwargs):
    with torch.no_grad():
        return model(tokens, **kwargs)


def assert_near(actual: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    """Largest difference over the largest expected value: the measure of sanity_check.py."""
    assert actual.shape == expected.shape
    assert np.abs(actual.numpy() - expected).max() / np.abs(expected).max() < tolerance


@pytest.mark.parametrize("lengths", [None, [11, 4, 1]])
@pytest.mark.parametrize("attention", MODES)
@pytest.mark.parametrize("shape", [{"n_heads": 8, "n_kv_heads": 4, "dim": 64}, {"n_kv_heads": 1}])
def test_the_model_computes_what_float64_numpy_computes(attention, shape, lengths):
    """In float32 and in float64; with lengths, at the real tokens."""
    model, tokens = random_llama(attention=attention, **shape), random_tokens()
    given = {} if lengths is None else {"lengths": torch.tensor(lengths)}
    logits, states = oracle.forward(model.state_dict(), model.config, tokens, lengths)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        every, hidden = run(model.to(dtype), tokens, targets=tokens, **given)
        last, _ = run(model, tokens, **given)
        for row, n in enumerate(lengths or [11, 11, 11]):
            assert_near(hidden[row, :n], states[row, :n], tolerance)
            assert_near(every[row, :n], logits[row, :n], tolerance)
            assert_near(last[row], logits[row, [n - 1]], tolerance)


@pytest.mark.parametrize("attention", MODES)
def test_padding_is_read_in_full_mode_without_lengths_and_nowhere_else(attention):
    model = random_llama(attention=attention)
    tokens = random_tokens(1, 6)
    alone, alone_hidden = run(model, tokens, lengths=torch.tensor([6]))
    for pad_id, width in ((3, 4), (200, 17)):
        padded = torch.nn.functional.pad(tokens, (0, width), value=pad_id)
        logits, hidden = run(model, padded, lengths=torch.tensor([6]))
        torch.testing.assert_close(logits, alone)
        torch.testing.assert_close(hidden[:, :6], alone_hidden)
        difference = (run(model, padded)[1][:, :6] - alone_hidden).abs().max()
        assert (difference > 1e-3) == (attention == "full")


def test_lengths_that_fit_no_row_are_refused():
    model, tokens = random_llama(), random_tokens(2, 5)
    for lengths in ([5, 6], [0, 5], [5]):
        with pytest.raises(InputError, match="lengths"):
            model(tokens, lengths=torch.tensor(lengths))


# ---------------------------------------------------------------- generation


def generate_without_cache(model, idx, n, temperature):
    for _ in range(n):
        logits = run(model, idx[:, -model.config.max_seq_len :])[0][:, -1]
        if temperature == 0:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            token = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1)
        idx = torch.cat((idx, token), dim=1)
    return idx


@pytest.mark.parametrize("attention", MODES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("prompt", "new"), [(9, 12), (16, 3), (20, 4)])
def test_generation_equals_recomputing_the_cropped_context(attention, temperature, prompt, new):
    model = random_llama(attention=attention, max_seq_len=16)
    idx = random_tokens(2, prompt)
    torch.manual_seed(5)
    expected = generate_without_cache(model, idx, new, temperature)
    torch.manual_seed(5)
    assert torch.equal(model.generate(idx, new, temperature), expected)


def test_sampling_follows_the_softmax_of_the_scaled_logits():
    model = random_llama()
    idx = random_tokens(1, 4).expand(20000, -1)
    temperature = 3.0
    torch.manual_seed(0)
    drawn = model.generate(idx, 1, temperature)[:, -1]
    expected = torch.softmax(run(model, idx[:1])[0][0, 0].double() / temperature, dim=-1)
    observed = torch.bincount(drawn, minlength=320) / len(drawn)
    standard_error = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((observed - expected).abs() <= 5 * standard_error + 1e-3).all()


def test_a_tiny_temperature_takes_the_likeliest_token_and_a_huge_one_any_that_is_left():
    logits = torch.tensor([[900.0, 899.0, -900.0, -torch.inf]])
    for temperature in (1e-3, 1e-37, 1e-300):
        assert sample(logits, temperature).item() == 0
    for temperature in (1e39, math.inf):
        drawn = sample(logits.expand(1000, 4), temperature)
        assert drawn.unique().tolist() == [0, 1, 2]


def test_generated_tokens_can_be_trained_on():
    model = random_llama(attention="causal")
    idx = model.generate(random_tokens(1, 4), 3)
    logits, _ = model(idx, targets=idx)
    logits.sum().backward()
    assert model.norm.weight.grad.isfinite().all()


def test_generate_refuses_what_it_cannot_continue():
    model = random_llama()
    for temperature in (-0.5, math.nan):
        with pytest.raises(InputError, match="temperature"):
            model.generate(random_tokens(1, 4), 1, temperature)
    with pytest.raises(InputError, match="the prompt has no token"):
        model.generate(torch.empty(1, 0, dtype=torch.long), 1)
    assert torch.equal(model.generate(random_tokens(1, 4), 0), random_tokens(1, 4))
    with torch.no_grad():
        model.layers[0].feed_forward.w1.weight.fill_(3e38)  # finite, and overflows
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="logits are not finite"):
            model.generate(random_tokens(1, 4), 1, temperature)


# ---------------------------------------------------------------- the parts


def test_rms_norm_survives_half_precision_squares():
    x = torch.full((1, 4), 300.0, dtype=torch.float16)  # 300^2 overflows float16
    out = RMSNorm(4).half()(x)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize(
    ("dim", "multiple_of", "hidden"), [(512, 32, 1376), (64, 4, 172), (288, 32, 768), (3, 1, 8)]
)
def test_default_hidden_size_is_two_thirds_of_four_dim_rounded_up(dim, multiple_of, hidden):
    assert FeedForward(dim, None, multiple_of, 0.0).w1.out_features == hidden
    assert FeedForward(dim, 77, multiple_of, 0.0).w2.in_features == 77


def test_a_given_dropout_wins_over_the_recorded_one_also_0(tmp_path):
    path = save_llama(random_llama(dropout=0.3), tmp_path / "model.pt")
    found = [load_pretrained(path, dropout=given).config.dropout for given in (None, 0.0, 0.1)]
    assert found == [0.3, 0.0, 0.1]


def test_attention_drops_weights_and_keeps_their_expectation():
    config = LlamaConfig(dim=8, n_heads=1, n_kv_heads=1, dropout=0.5)
    attention = Attention(config).train()
    q = k = torch.zeros(4000, 1, 1, 8)
    v = torch.ones(4000, 1, 1, 8)
    torch.manual_seed(0)
    out = attention.compute_query_key_value_scores(q, k, v)[:, 0, 0, 0]
    assert set(out.tolist()) == {0.0, 2.0}  # a single weight of 1 is dropped or doubled
    assert out.mean().item() == pytest.approx(1.0, abs=0.1)


PLACES = ["dropout", "layers.0.attention.attn_dropout", "layers.1.attention.resid_dropout"]
PLACES += ["layers.1.feed_forward.dropout"]


@pytest.mark.parametrize("place", PLACES)
def test_each_place_of_dropout_acts_in_training_alone(place):
    model, tokens = random_llama(dropout=0.5), random_tokens(1, 6)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and name != place:
            module.p = 0.0
    assert torch.equal(run(model, tokens)[1], run(random_llama(), tokens)[1])
    model.train()
    assert not torch.equal(run(model, tokens)[1], run(model, tokens)[1])


def test_initial_weights_have_the_stated_spread():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocab_size=2000, dim=256, n_layers=8, n_heads=8, n_kv_heads=4))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        residual = name.endswith(("compute_output.weight", "w2.weight"))
        expected = 0.02 / math.sqrt(2 * 8) if residual else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
        assert abs(parameter.mean().item()) < expected / 20


def test_embedding_and_output_are_one_tensor_and_the_published_size_comes_out():
    with torch.device("meta"):
        model = Llama(LlamaConfig())
    assert model.tok_embeddings.weight is model.output.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 41_689_600  # 41.7M
    assert model.params is model.config
    assert (model.vocab_size, model.n_layers) == (32000, 8)
    assert model.dtype == torch.float32


def test_gradients_reach_every_parameter():
    model = random_llama().train()
    tokens = random_tokens()
    logits, _ = model(tokens, targets=tokens)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_weights_are_taken_over_and_loading_draws_no_random_numbers():
    model = random_llama()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    loaded = Llama.from_weights(model.config, weights)
    assert torch.equal(torch.get_rng_state(), before)
    for name, parameter in loaded.named_parameters():
        assert parameter.data_ptr() == weights[name].data_ptr() and parameter.requires_grad, name
    assert loaded.tok_embeddings.weight is loaded.output.weight
    tokens = random_tokens()
    assert torch.equal(loaded(tokens)[1], model(tokens)[1])


def test_weights_in_half_precision_become_float32():
    model = random_llama()
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    assert Llama.from_weights(model.config, half).dtype == torch.float32
