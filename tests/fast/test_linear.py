"""linear() against float64 products, and where it takes which of its two ways."""

import ctypes
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT
from fast import linear as module
from fast.linear import Linear, chosen_library, linear
from utils import InputError


@pytest.fixture
def onednn(monkeypatch) -> None:
    """oneDNN for every size; the other way is F.linear itself."""
    if module._onednn_linear is None:
        pytest.skip("this PyTorch has no oneDNN linear")
    monkeypatch.setattr(module, "chosen_library", lambda n_rows: "oneDNN")
    monkeypatch.setattr(module, "MIN_PRODUCTS_ONE_ROW", 1)
    monkeypatch.setattr(module, "MIN_PRODUCTS", 1)


def random_triple(rows: tuple[int, ...], n_in: int, n_out: int):
    """x (*rows, n_in), weight (n_out, n_in), and a gradient of the result."""
    torch.manual_seed(0)
    x = torch.randn(*rows, n_in, requires_grad=True)
    weight = torch.randn(n_out, n_in, requires_grad=True)
    return x, weight, torch.randn(*rows, n_out)


@pytest.mark.parametrize(
    ("rows", "n_in", "n_out"), [((1,), 64, 172), ((7,), 301, 2), ((4, 1, 5), 1, 1)]
)
def test_product_and_both_gradients_are_those_of_float64(onednn, rows, n_in, n_out):
    x, weight, grad = random_triple(rows, n_in, n_out)
    y = linear(x, weight)
    y.backward(grad)
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = wide_x @ wide_weight.T
    expected.backward(grad.double())
    for ours, exact in ((y, expected), (x.grad, wide_x.grad), (weight.grad, wide_weight.grad)):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, weight).double(), expected, rtol=1e-5, atol=1e-5)


def test_strided_operands_are_read_as_they_are(onednn):
    x, weight, _ = random_triple((6,), 6, 8)
    torch.testing.assert_close(linear(x.t(), weight), x.t() @ weight.t())
    torch.testing.assert_close(linear(x, weight[:6].t()), x @ weight[:6])
    torch.testing.assert_close(linear(x[::2], weight), x[::2] @ weight.t())


def test_gradients_can_be_differentiated_again(onednn):
    x, weight, _ = random_triple((4,), 5, 3)
    (grad,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), weight)
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    y = wide_x @ wide_weight.T
    (grad,) = torch.autograd.grad(y.square().sum(), wide_x, create_graph=True)
    (expected,) = torch.autograd.grad(grad.square().sum(), wide_weight)
    torch.testing.assert_close(second.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_gets_no_gradient(onednn, frozen):
    x, weight, grad = random_triple((4,), 5, 3)
    {"x": x, "weight": weight}[frozen].requires_grad_(False)
    linear(x, weight).backward(grad)
    assert (x.grad is None) == (frozen == "x")
    assert (weight.grad is None) == (frozen == "weight")


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float64, False), (torch.bfloat16, False), (torch.float32, True)],
)
def test_other_dtypes_take_the_usual_way(onednn, dtype, autocast, monkeypatch):
    monkeypatch.setattr(module, "_onednn_linear", _refuse)
    x, weight, _ = random_triple((4,), 5, 3)
    x, weight = x.detach().to(dtype), weight.detach().to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize(
    ("rows", "limit"), [((1,), "MIN_PRODUCTS_ONE_ROW"), ((4,), "MIN_PRODUCTS")]
)
def test_small_products_take_the_usual_way(monkeypatch, rows, limit):
    monkeypatch.setattr(module, "_onednn_linear", _refuse)
    monkeypatch.setattr(module, "chosen_library", lambda n_rows: "oneDNN")
    monkeypatch.setattr(module, "MIN_PRODUCTS_ONE_ROW", 1)
    x, weight, _ = random_triple(rows, 5, 3)
    multiplications = x.numel() * 3
    monkeypatch.setattr(module, limit, multiplications + 1)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    monkeypatch.setattr(module, limit, multiplications)
    with pytest.raises(AssertionError, match="oneDNN"), torch.inference_mode():
        linear(x, weight)


@pytest.fixture
def slowed(monkeypatch):
    """slowed("BLAS", ...) makes products of these libraries take 20 ms, others 1 ms, of a clock
    that nothing else moves."""
    seconds = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: sum(seconds)))

    def script(*names: str) -> None:
        ways = {
            name: partial(lambda took, *_: seconds.append(took), 0.02 if name in names else 0.001)
            for name in ("BLAS", "oneDNN")
        }
        monkeypatch.setattr(module.F, "linear", ways["BLAS"])
        monkeypatch.setattr(module, "_multiply", ways["oneDNN"])
        monkeypatch.setattr(module, "_onednn_linear", object())
        module._measure.cache_clear()

    monkeypatch.delenv("MIN_LLAMA_PRODUCTS", raising=False)
    yield script
    module._measure.cache_clear()


@pytest.mark.parametrize("n_rows", [1, 256])
def test_the_faster_library_is_chosen_and_between_equals_the_usual_one(slowed, n_rows, monkeypatch):
    slowed("BLAS")
    assert chosen_library(n_rows) == "oneDNN"
    slowed("oneDNN")
    assert chosen_library(n_rows) == "BLAS"
    slowed("BLAS", "oneDNN")
    assert chosen_library(n_rows) == "BLAS"
    monkeypatch.setattr(module, "fastest_seconds", lambda *_: pytest.fail("measured again"))
    assert chosen_library(n_rows) == "BLAS"
    monkeypatch.setattr(module, "_onednn_linear", None)
    assert chosen_library(n_rows) == "BLAS"


def test_an_environment_variable_replaces_the_measurement(slowed, monkeypatch):
    slowed("oneDNN")
    monkeypatch.setenv("MIN_LLAMA_PRODUCTS", "oneDNN")
    assert chosen_library(1) == "oneDNN"
    module._measure.cache_clear()
    monkeypatch.setenv("MIN_LLAMA_PRODUCTS", "mkl")
    with pytest.raises(InputError, match="MIN_LLAMA_PRODUCTS=mkl: is neither BLAS nor oneDNN"):
        chosen_library(1)


def test_layer_is_an_nn_linear_without_bias(onednn):
    torch.manual_seed(0)
    ours = Linear(5, 3)
    torch.manual_seed(0)
    theirs = torch.nn.Linear(5, 3, bias=False)
    assert isinstance(ours, torch.nn.Linear)
    assert list(ours.state_dict()) == ["weight"]
    x = torch.randn(2, 5)
    torch.testing.assert_close(ours(x), theirs(x))


def _refuse(*_args):
    raise AssertionError("this product is not for oneDNN")


KERNELS = """
import ctypes, torch
from fast.linear import linear
class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in "abcdefg"] + [("used", ctypes.c_size_t), ("h", ctypes.c_size_t), ("i", ctypes.c_size_t)]
info = ctypes.CDLL(None).mallinfo2
info.restype = Info
def learn(n_rows):
    for n_in, n_out in ((192, 192), (192, 512), (512, 192)):
        weight = torch.ones(n_out, n_in, requires_grad=True)
        linear(torch.ones(n_rows, n_in, requires_grad=True), weight).sum().backward()
learn(499)
before = info().used
for n_rows in range(500, 540):
    learn(n_rows)
print(info().used - before)
"""  # noqa: E501


@pytest.mark.skipif(module._onednn_linear is None, reason="this PyTorch has no oneDNN linear")
def test_shapes_that_do_not_come_again_do_not_fill_the_memory():
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("only glibc says how much of its heap is in use")
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    plain = {key: value for key, value in os.environ.items() if key not in names}
    plain["MIN_LLAMA_PRODUCTS"] = "oneDNN"
    used = [
        int(subprocess.run(
            [sys.executable, "-c", KERNELS], env=environment, cwd=ROOT, check=True,
            capture_output=True, text=True, encoding="utf-8",
        ).stdout)
        for environment in (plain, {**plain, **dict.fromkeys(names, "1024")})
    ]  # fmt: skip
    assert used[0] < used[1] / 2, used  # and what is typed is kept
