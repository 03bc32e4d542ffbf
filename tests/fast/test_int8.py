"""int8 weights against float64 NumPy: rounding, both products, ties, and a real model's text."""

import math

import numpy as np
import pytest
import torch

from conftest import ROOT, random_llama, shared_asset
from fast import int8
from fast.int8 import Int8Embedding, Int8Linear, dequantize, int8_linear, quantize_model
from fast.linear import linear
from llama import Llama, load_pretrained
from tokenizer import Tokenizer
from utils import InputError

EPS = 2.0**-8  # a bfloat16 is within half of this share


def matrix(n_out: int, n_in: int) -> torch.Tensor:
    """Rows of very different sizes, one of zeros, and one too small for a scale."""
    weight = torch.randn(n_out, n_in) * torch.logspace(-6, 3, n_out)[:, None]
    weight[0], weight[1] = 0.0, 1e-40
    return weight


def test_a_row_is_rounded_to_its_scale_and_quantizes_to_itself_again():
    weight = matrix(2000, 33)
    quantized, scale = int8.quantize_rows(weight)
    exact = quantized.double() * scale.double()[:, None]
    assert ((weight.double() - exact).abs() <= 0.5001 * scale[:, None].double()).all()
    assert scale[2:].numpy() == pytest.approx(weight[2:].abs().amax(1).numpy() / 127, rel=EPS)
    assert (quantized[2:].abs().amax(1) == 127).all()
    assert scale[:2].tolist() == [1.0, 1.0] and not quantized[:2].any()
    assert torch.equal(dequantize(quantized, scale).double(), exact)
    again = int8.quantize_rows(dequantize(quantized, scale))
    assert torch.equal(again[0], quantized) and torch.equal(again[1], scale)


@pytest.mark.parametrize(
    ("rows", "n_in"),  # the operator could crash at the last two
    [((0,), 64), ((2, 3), 64), ((16,), 64), ((17,), 64), ((1,), 72), ((1,), 5)],
)
def test_the_product_is_within_the_rounding_of_weights_and_bfloat16(rows, n_in, monkeypatch):
    operator, calls = torch._weight_int8pack_mm, []
    monkeypatch.setattr(
        torch, "_weight_int8pack_mm", lambda x, *given: calls.append(x) or operator(x, *given)
    )
    x, weight = torch.randn(*rows, n_in), matrix(30, n_in)
    quantized, scale = int8.quantize_rows(weight)
    product = int8_linear(x, quantized, scale)
    assert product.dtype == torch.float32 and product.shape == (*rows, 30)
    size = np.abs(x.double().numpy())
    exact = x.double().numpy() @ weight.double().numpy().T
    rounding = size.sum(-1, keepdims=True) * scale.double().numpy() * 0.5001
    to_bfloat16 = EPS * (size @ dequantize(quantized, scale).abs().double().numpy().T)
    assert (np.abs(product.double().numpy() - exact) <= rounding + to_bfloat16).all()
    assert len(calls) == (n_in == 64 and math.prod(rows) <= 16)


def test_the_operator_reads_rows_of_any_memory_layout():
    quantized, scale = int8.quantize_rows(torch.randn(20, 64))
    x = torch.randn(64, 4).T
    rounded = x.bfloat16().double() @ dequantize(quantized, scale).double().T
    product = int8_linear(x, quantized, scale)
    assert (product - rounded).abs().max() < EPS * rounded.abs().max()
    assert not torch.equal(product, linear(x, dequantize(quantized, scale)))


def test_many_rows_compute_what_a_float32_model_of_the_rounded_weights_computes():
    model, tokens = random_llama(attention="causal"), torch.randint(320, (2, 40))
    quantized = random_llama(attention="causal")
    quantize_model(quantized)
    state = quantized.state_dict()
    for name, parameter in model.named_parameters():
        if name.removesuffix("weight") + "scale" in state:
            scale = state[name.removesuffix("weight") + "scale"]
            parameter.data = dequantize(state[name], scale)
    with torch.no_grad():
        expected, _ = model(tokens, targets=tokens)
        assert torch.equal(quantized(tokens, targets=tokens)[0], expected)


def test_every_matrix_is_int8_and_tied_ones_share_their_numbers():
    tied = random_llama()
    untied = Llama.from_weights(
        tied.config, {**tied.state_dict(), "output.weight": torch.randn(320, 32)}
    )
    for model, is_tied in ((tied, True), (untied, False)):
        quantize_model(model)
        quantize_model(model)  # finds nothing to do
        kinds = {type(module) for module in model.modules()}
        assert kinds.isdisjoint({torch.nn.Linear, torch.nn.Embedding})
        assert {Int8Linear, Int8Embedding} < kinds
        assert all(parameter.ndim == 1 for parameter in model.parameters())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert (model.output.weight is model.tok_embeddings.weight) == is_tied
        assert (model.output.scale is model.tok_embeddings.scale) == is_tied


def test_a_pytorch_without_the_operator_and_another_word_are_one_line(monkeypatch):
    with pytest.raises(InputError, match="quantize='int4' is neither None nor 'int8'"):
        load_pretrained("model.pt", quantize="int4")
    monkeypatch.setattr(torch.ops, "aten", object())
    with pytest.raises(InputError, match="no int8 product; install the version in requirements"):
        quantize_model(random_llama())


@pytest.mark.parametrize(
    ("checkpoint", "tokenizer_file"),
    [
        ("data/mini/model.pt", "data/mini/tokenizer.model"),
        ("models/stories260K/stories260K.pt", "models/stories260K/tok512.model"),
    ],
)
def test_a_real_model_begins_the_same_text_with_int8_weights(checkpoint, tokenizer_file):
    find = shared_asset if checkpoint.startswith("models") else ROOT.joinpath
    tokenizer = Tokenizer(tokenizer_model=find(tokenizer_file))
    idx = torch.tensor([tokenizer.encode("Once upon a time", bos=True, eos=False)])
    texts = [
        load_pretrained(find(checkpoint), "causal", quantize=kind).generate(idx, 8, 0.0)
        for kind in (None, "int8")
    ]
    assert torch.equal(*texts)
