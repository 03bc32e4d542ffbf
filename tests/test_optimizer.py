"""AdamW against its equations in NumPy and, where the formulas agree, against torch.optim."""

import copy
import math

import numpy as np
import pytest
import torch

import optimizer_test
from optimizer import AdamW
from utils import InputError

HYPER = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}


def equations(theta, grads, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct=True):
    """The update of the class docstring, one float64 array at a time."""
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(grads, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        alpha = lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) if correct else lr
        theta = theta - alpha * (m / (np.sqrt(v) + eps) + weight_decay * theta)
    return theta, m, v


def take_steps(optimizer, parameter, grads):
    for grad in grads:
        parameter.grad = torch.as_tensor(grad, dtype=parameter.dtype)
        optimizer.step()


def random_problem(n_steps=20):
    """A start and gradients; some elements have no gradient at first, others never."""
    rng = np.random.default_rng(3)
    start, grads = rng.normal(size=(4, 3)), rng.normal(size=(n_steps, 4, 3))
    grads[:5, 0] = 0.0
    grads[:, 1] = 0.0
    return start, grads


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_follow_the_equations(correct_bias, weight_decay):
    """Whatever the parameter's memory layout; an element without a gradient only decays."""
    start, grads = random_problem()
    hyper = {**HYPER, "weight_decay": weight_decay}
    theta, m, v = equations(start, grads, **hyper, correct=correct_bias)
    for values in (torch.tensor(start), torch.tensor(start).t().contiguous().t()):
        parameter = torch.nn.Parameter(values.clone(memory_format=torch.preserve_format))
        optimizer = AdamW([parameter], **hyper, correct_bias=correct_bias)
        take_steps(optimizer, parameter, grads)
        np.testing.assert_allclose(parameter.detach().numpy(), theta, rtol=1e-12)
        state = optimizer.state[parameter]
        assert set(state) == {"step", "m", "v"}
        assert state["step"] == len(grads)
        np.testing.assert_allclose(state["m"].numpy(), m, rtol=1e-12)
        np.testing.assert_allclose(state["v"].numpy(), v, rtol=1e-12)
        if not weight_decay:
            np.testing.assert_array_equal(parameter[1].detach().numpy(), start[1])


def test_without_eps_and_decay_it_is_torch_adamw():
    start, grads = random_problem()
    grads[:] += 0.1  # 0 / 0 without eps
    ours, theirs = (torch.nn.Parameter(torch.tensor(start)) for _ in range(2))
    take_steps(AdamW([ours], lr=0.01, eps=0.0), ours, grads)
    take_steps(torch.optim.AdamW([theirs], lr=0.01, eps=0.0, weight_decay=0.0), theirs, grads)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("fault", [{"correct_bias": False}, {"weight_decay": 0.0}])
def test_optimizer_check_sees_a_missing_bias_correction_or_decay(fault, monkeypatch, capsys):
    monkeypatch.setattr(optimizer_test, "AdamW", lambda p, **said: AdamW(p, **(said | fault)))
    assert optimizer_test.main() == 1
    assert "failed" in capsys.readouterr().out


def test_state_dict_round_trips_bit_for_bit():
    start, grads = random_problem(12)
    a = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    first = AdamW([a], **HYPER)
    take_steps(first, a, grads[:7])
    b = torch.nn.Parameter(a.detach().clone())
    second = AdamW([b])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(first, a, grads[7:])
    take_steps(second, b, grads[7:])
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


def test_groups_use_their_own_hyperparameters_and_without_a_gradient_nothing_moves():
    start, grads = random_problem()
    slow, fast, idle = (torch.nn.Parameter(torch.tensor(start)) for _ in range(3))
    rate = torch.tensor(0.1)  # torch allows a tensor
    groups = [{"params": [slow]}, {"params": [fast], "lr": rate}, {"params": [idle]}]
    optimizer = AdamW(groups, lr=0.01, weight_decay=0.5)
    for grad in grads:
        slow.grad = fast.grad = torch.tensor(grad)
        optimizer.step()
    for parameter, lr in ((slow, 0.01), (fast, rate.item())):
        expected, *_ = equations(start, grads, lr=lr, weight_decay=0.5)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12)
    assert torch.equal(idle, torch.tensor(start))
    assert idle not in optimizer.state
    assert rate == 0.1


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = AdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("lr", value) for value in (-1.0, math.nan, math.inf)),
        *(("eps", -1e-8), ("weight_decay", -0.1), ("weight_decay", math.inf)),
        *(("betas", value) for value in ((1.0, 0.9), (0.9, -0.1), (0.9,))),
    ],
)
def test_bad_hyperparameters_are_refused_by_name(name, value):
    parameter = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(InputError, match=name):
        AdamW([parameter], **{name: value})
    with pytest.raises(InputError, match=name):
        AdamW([{"params": [parameter], name: value}])
