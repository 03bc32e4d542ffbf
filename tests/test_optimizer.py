"""AdamW against its equations in NumPy and, where the formulas agree, against torch.optim."""

import copy
import math

import numpy as np
import pytest
import torch

import optimizer as optimizer_module
import optimizer_test
from optimizer import AdamW


def equations(theta, grads, lr, betas, eps, weight_decay, correct_bias):
    """The update of the class docstring, one float64 array at a time."""
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(grads, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        alpha = lr
        if correct_bias:
            alpha = lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        theta = theta - alpha * (m / (np.sqrt(v) + eps) + weight_decay * theta)
    return theta, m, v


def take_steps(optimizer, parameter, grads):
    for grad in grads:
        parameter.grad = torch.as_tensor(grad, dtype=parameter.dtype)
        optimizer.step()


def random_problem(n_steps=20):
    rng = np.random.default_rng(3)
    return rng.normal(size=(4, 3)), rng.normal(size=(n_steps, 4, 3))


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_follow_the_equations(correct_bias, weight_decay):
    start, grads = random_problem()
    hyper = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": weight_decay}
    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = AdamW([parameter], **hyper, correct_bias=correct_bias)
    take_steps(optimizer, parameter, grads)
    theta, m, v = equations(start, grads, **hyper, correct_bias=correct_bias)
    np.testing.assert_allclose(parameter.detach().numpy(), theta, rtol=1e-12)
    state = optimizer.state[parameter]
    assert set(state) == {"step", "m", "v"}
    assert state["step"] == len(grads)
    np.testing.assert_allclose(state["m"].numpy(), m, rtol=1e-12)
    np.testing.assert_allclose(state["v"].numpy(), v, rtol=1e-12)


def test_without_eps_and_decay_it_is_torch_adamw():
    start, grads = random_problem()
    ours, theirs = (torch.nn.Parameter(torch.tensor(start)) for _ in range(2))
    take_steps(AdamW([ours], lr=0.01, eps=0.0), ours, grads)
    take_steps(torch.optim.AdamW([theirs], lr=0.01, eps=0.0, weight_decay=0.0), theirs, grads)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_reference_weights_of_the_assignment_are_reached(capsys):
    assert optimizer_test.main() == 0
    assert "Optimizer test passed!" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["no bias correction", "decay in the gradient"])
def test_optimizer_check_sees_a_wrong_optimizer(fault, monkeypatch, capsys):
    class Wrong(AdamW):
        def step(self, closure=None):
            for group in self.param_groups:
                group["correct_bias"] = fault != "no bias correction"
                for parameter in group["params"]:
                    if fault == "decay in the gradient":
                        parameter.grad += 100 * group["weight_decay"] * parameter.detach()
            return super().step(closure)

    monkeypatch.setattr(optimizer_test, "AdamW", Wrong)
    assert optimizer_test.main() == 1
    assert "failed" in capsys.readouterr().out


def test_state_dict_round_trips_bit_for_bit():
    start, grads = random_problem(12)
    a = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    first = AdamW([a], lr=0.01, weight_decay=0.1)
    take_steps(first, a, grads[:5])
    b = torch.nn.Parameter(a.detach().clone())
    second = AdamW([b])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(first, a, grads[5:])
    take_steps(second, b, grads[5:])
    assert torch.equal(a, b)
    assert all(torch.equal(first.state[a][key], second.state[b][key]) for key in ("m", "v"))


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    parameter = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = AdamW([parameter], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert parameter.item() == pytest.approx(2.9, abs=1e-5)  # the first step has length lr


def test_parameters_without_gradient_stay():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([parameter], weight_decay=0.5)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(2))
    assert parameter not in optimizer.state


def test_parameter_groups_use_their_own_hyperparameters():
    start, grads = random_problem()
    slow, fast = (torch.nn.Parameter(torch.tensor(start)) for _ in range(2))
    optimizer = AdamW([{"params": [slow]}, {"params": [fast], "lr": 0.1}], lr=0.01)
    for grad in grads:
        slow.grad = fast.grad = torch.tensor(grad)
        optimizer.step()
    for parameter, lr in ((slow, 0.01), (fast, 0.1)):
        expected, *_ = equations(start, grads, lr, (0.9, 0.999), 1e-6, 0.0, True)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12)


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = AdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("lr", math.nan),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("weight_decay", math.inf),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9, -0.1)),
        ("betas", (0.9,)),
    ],
)
def test_bad_hyperparameters_are_refused_by_name(name, value):
    parameter = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=name):
        AdamW([parameter], **{name: value})
    with pytest.raises(ValueError, match=name):
        AdamW([{"params": [parameter], name: value}])


def test_a_number_whose_gradient_was_always_zero_stays_until_it_has_one():
    start = np.ones(8)
    grads = np.zeros((3, 8))
    grads[1:, 4:] = [[0.5], [-0.25]]
    parameter = torch.nn.Parameter(torch.tensor(start))
    take_steps(AdamW([parameter], lr=0.01), parameter, grads)
    theta, *_ = equations(start, grads, 0.01, (0.9, 0.999), 1e-6, 0.0, True)
    assert parameter[:4].tolist() == [1.0] * 4
    np.testing.assert_allclose(parameter.detach().numpy(), theta, rtol=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_chunks_change_nothing(monkeypatch, weight_decay):
    start, grads = random_problem()
    ends = []
    for chunk in (1, 5, 1000):
        monkeypatch.setattr(optimizer_module, "CHUNK", chunk)
        parameter = torch.nn.Parameter(torch.tensor(start))
        take_steps(AdamW([parameter], lr=0.01, weight_decay=weight_decay), parameter, grads)
        ends.append(parameter.detach())
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-14, atol=0)
    torch.testing.assert_close(ends[1], ends[2], rtol=1e-14, atol=0)


def test_a_transposed_parameter_is_updated_like_any_other():
    start, grads = random_problem()
    plain = torch.nn.Parameter(torch.tensor(start))
    strided = torch.nn.Parameter(torch.tensor(start).t().contiguous().t())
    assert not strided.is_contiguous()
    for parameter in (plain, strided):
        take_steps(AdamW([parameter], lr=0.01, weight_decay=0.1), parameter, grads)
    torch.testing.assert_close(plain, strided, rtol=1e-14, atol=0)
