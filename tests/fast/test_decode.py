"""The cached decoder against the model's whole forward pass, on random and on real weights."""

import copy

import pytest
import torch

from conftest import random_llama, shared_asset
from fast.decode import Decoder, fused, next_tokens
from fast.int8 import quantize_model
from llama import Llama, load_pretrained
from training.schedule import take_step
from utils import InputError


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(4, 320, shape)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(dim=-1, keepdim=True)


def plain_loop(model: Llama, idx: torch.Tensor, n: int) -> torch.Tensor:
    """Generation as the assignment writes it: the whole context again for each token."""
    with torch.no_grad():
        for _ in range(n):
            logits, _ = model(idx[:, -model.config.max_seq_len :])
            idx = torch.cat((idx, greedy(logits[:, -1])), dim=1)
    return idx


@pytest.mark.parametrize(
    ("n_kv_heads", "dtype", "tolerance"),
    [(2, torch.float64, 1e-10), (4, torch.float32, 1e-4), (1, torch.bfloat16, 0.15)],
)
def test_logits_are_those_of_the_whole_forward(n_kv_heads, dtype, tolerance):
    model = random_llama(attention="causal", n_heads=4, n_kv_heads=n_kv_heads)
    tokens = random_tokens(3, 12)
    with torch.no_grad():
        expected, _ = model.double()(tokens, targets=tokens)
    decoder = Decoder(model.to(dtype), 3, 12)
    logits = [decoder(tokens[:, :7])]
    logits += [decoder(tokens[:, [i]]) for i in range(7, 12)]
    scale = expected.abs().max()
    for i, got in enumerate(logits, start=6):
        assert (got.double() - expected[:, i]).abs().max() < tolerance * scale


def test_it_refuses_full_attention_and_positions_without_room():
    with pytest.raises(InputError, match="causal"):
        Decoder(random_llama(attention="full"), 1, 4)
    decoder = Decoder(random_llama(attention="causal"), 1, 4)
    decoder(random_tokens(1, 3))
    with pytest.raises(InputError, match="4 positions cannot hold 5"):
        decoder(greedy(decoder(random_tokens(1, 1))))


def test_samples_of_several_prefixes_stand_side_by_side():
    model, idx = random_llama(attention="causal"), random_tokens(2, 5)
    steps = torch.cat(list(next_tokens(model, idx, 4, greedy, num_samples=2)), dim=1)
    assert torch.equal(steps, plain_loop(model, idx, 4)[:, 5:].repeat_interleave(2, dim=0))


def test_each_token_is_read_once_and_samples_share_their_prefix(monkeypatch):
    shapes, call = [], Decoder.__call__
    monkeypatch.setattr(
        Decoder, "__call__", lambda self, t: shapes.append(tuple(t.shape)) or call(self, t)
    )
    model = random_llama(attention="causal")
    list(next_tokens(model, random_tokens(1, 5), 4, greedy, num_samples=3))
    assert shapes == [(1, 5), (3, 1), (3, 1), (3, 1)]


@pytest.mark.parametrize("length", [16, 20])
def test_a_prefix_that_fills_the_context_needs_no_decoder(length, monkeypatch):
    monkeypatch.setattr("fast.decode.Decoder", lambda *_: pytest.fail("it is never read"))
    model, idx = random_llama(attention="causal", max_seq_len=16), random_tokens(2, length)
    assert torch.equal(model.generate(idx, 3, 0.0), plain_loop(model, idx, 3))


def test_real_weights_give_the_tokens_of_the_plain_loop():
    """Grouped queries (8 heads on 4), several samples of a prefix, past the end of the context."""
    model = load_pretrained(shared_asset("models/stories260K/stories260K.pt"), attention="causal")
    model.config.max_seq_len = 48
    idx = torch.tensor([[1, 403, 407, 261, 378]])
    expected = plain_loop(model, idx, 60)
    assert torch.equal(model.generate(idx, 60, 0.0), expected)
    steps = torch.cat(list(next_tokens(model, idx, 60, greedy, num_samples=3)), dim=1)
    assert torch.equal(steps, expected[:, 5:].expand(3, -1))


def test_int8_logits_are_those_of_the_whole_forward_up_to_bfloat16():
    model = random_llama(attention="causal")
    quantize_model(model)
    tokens, decoder = random_tokens(2, 20), Decoder(model, 2, 20)
    with torch.no_grad():
        expected = model(tokens)[0][:, 0]  # products of many rows, in float32
    decoder(tokens[:, :19])
    difference = (decoder(tokens[:, 19:]) - expected).abs().max()
    assert 0 < difference < 0.05 * expected.abs().max()


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_such_as_an_adapters_is_not_passed_over(kind):
    model = random_llama(attention="causal")
    getattr(model.norm, kind)(lambda *_: torch.zeros(1, 1, 32))
    assert model.generate(random_tokens(1, 4), 3, 0.0)[0, 4:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("is_int8", [False, True])
def test_fused_layers_share_their_memory(is_int8):
    model = random_llama(attention="causal")
    if is_int8:
        quantize_model(model)
    mlp, x = model.layers[0].feed_forward, torch.randn(2, 32)
    expected = torch.cat((mlp.w1(x), mlp.w3(x)), dim=-1)
    product = fused(mlp.w1, mlp.w3)
    torch.testing.assert_close(product(x), expected)
    torch.testing.assert_close(torch.cat((mlp.w1(x), mlp.w3(x)), dim=-1), expected)
    weights = (mlp.w1.weight, mlp.w3.weight)
    assert weights[0].untyped_storage().data_ptr() == weights[1].untyped_storage().data_ptr()
    before = mlp.w1.weight.data_ptr()
    fused(mlp.w1, mlp.w3)
    assert mlp.w1.weight.data_ptr() == before  # a second decoder copies nothing


def test_a_model_that_generated_can_be_trained_copied_and_used_again():
    model, fresh = (random_llama(attention="causal") for _ in range(2))
    model.generate(random_tokens(1, 4), 2, 0.0)
    tokens = random_tokens(2, 6)
    for trained in (model, fresh):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        trained(tokens, targets=tokens)[0].square().mean().backward()
        take_step([optimizer])
    for ours, expected in zip(model.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)
    idx = random_tokens(1, 4)
    assert torch.equal(model.generate(idx, 5, 0.0), plain_loop(fresh, idx, 5))
    assert torch.equal(copy.deepcopy(model).generate(idx, 5, 0.0), plain_loop(fresh, idx, 5))
