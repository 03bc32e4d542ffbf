"""AdamW by hand: Adam (Kingma and Ba 2015, arXiv 1412.6980) with decoupled weight decay
(Loshchilov and Hutter 2019, arXiv 1711.05101)."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from utils import InputError


class AdamW(Optimizer):
    """For each parameter theta (weights) with gradient g, at step t:

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        alpha_t = lr sqrt(1 - beta2^t) / (1 - beta1^t)
        theta <- theta - alpha_t m / (sqrt(v) + eps) - alpha_t weight_decay theta

    This is the "efficient" form at the end of section 2 of the Adam paper: the bias correction is
    part of the step size, so eps is compared with the uncorrected sqrt(v) and the decay shares
    alpha_t. `torch.optim.AdamW` corrects m and v themselves and decays by lr; as t grows the two
    meet. With `correct_bias=False` alpha_t is lr.

    optimizer_test.py ends within 1.8e-5 of the assignment's published weights. It cannot tell this
    decay from one by lr after the update, which ends as near.

    State per parameter: `step` (int), `m`, `v`. Raises InputError for a hyperparameter out of its
    range, in the defaults or in a parameter group, and RuntimeError for a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_hyperparameters(**(self.defaults | param_group))
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; return the closure's loss, if one is given.

        The closure runs with gradients enabled, so that it can call `backward`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, theta: torch.Tensor, group: dict[str, Any]) -> None:
        if theta.grad.is_sparse:
            raise RuntimeError(
                "AdamW does not support sparse gradients; use torch.optim.SparseAdam"
            )
        state = self.state[theta]
        if not state:
            state["step"] = 0
            state["m"] = torch.zeros_like(theta)
            state["v"] = torch.zeros_like(theta)
        state["step"] += 1
        grad, m, v, t = theta.grad, state["m"], state["v"], state["step"]
        beta1, beta2 = group["betas"]

        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        alpha = float(group["lr"])  # torch allows a tensor, which `*=` would change for good
        if group["correct_bias"]:
            alpha *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
        if group["weight_decay"]:
            theta.mul_(1 - alpha * group["weight_decay"])
        theta.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-alpha)


def _check_hyperparameters(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, **_others: Any
) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0.0 <= value < math.inf:
            raise InputError(f"{name}={value} is not a number of at least 0")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise InputError(f"betas={betas} are not two numbers in [0, 1)")
