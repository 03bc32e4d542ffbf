"""AdamW by hand: Adam (Kingma and Ba 2015, arXiv 1412.6980) with decoupled weight decay
(Loshchilov and Hutter 2019, arXiv 1711.05101)."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

CHUNK = 2**18  # elements: theta, gradient, m, v and a temporary are then 5 MB


class AdamW(Optimizer):
    """For each parameter theta with gradient g, at step t:

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        alpha_t = lr sqrt(1 - beta2^t) / (1 - beta1^t)
        theta <- theta - alpha_t (m / (sqrt(v) + eps) + weight_decay theta)

    This is the "efficient" form at the end of section 2 of the Adam paper: the bias correction sits
    in the step size, so eps is compared with the uncorrected sqrt(v) and the decay shares alpha_t.
    `torch.optim.AdamW` corrects m and v themselves and decays by lr; as t grows the two meet.
    With `correct_bias=False` alpha_t is lr.

    The assignment's published weights (optimizer_test.py) come from a reference that subtracts
    lr weight_decay theta after the update; over its 1000 steps that differs from this by 1.8e-5.

    State per parameter: `step` (int), `m`, `v`. Raises ValueError for a hyperparameter out of its
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
        _check_hyperparameters(**{**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient; returns the closure's loss, if one is given.

        The closure runs with gradients enabled: it is there to call `backward`.
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
        key, grad = theta, theta.grad
        if hasattr(theta, "to_local"):  # cut over several processes: each updates its own rows
            theta, grad = theta.to_local(), grad.to_local()
        if grad.is_sparse:
            raise RuntimeError(
                "AdamW does not support sparse gradients; use torch.optim.SparseAdam"
            )
        state = self.state[key]
        if not state:
            state["step"] = 0
            state["m"] = torch.zeros_like(theta)
            state["v"] = torch.zeros_like(theta)
        state["step"] += 1
        m, v, t = state["m"], state["v"], state["step"]
        beta1, beta2 = group["betas"]

        alpha = float(group["lr"])  # torch allows a tensor, which `*=` would change for good
        if group["correct_bias"]:
            alpha *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
        for theta_, grad_, m_, v_ in _in_chunks(theta, grad, m, v):
            m_.lerp_(grad_, 1 - beta1)
            v_.mul_(beta2).addcmul_(grad_, grad_, value=1 - beta2)
            if group["weight_decay"]:
                theta_.mul_(1 - alpha * group["weight_decay"])
            # Not `sqrt`: on x86 that is MKL's, slow where v is 0, as for every token not yet seen.
            root = v_.rsqrt().reciprocal_()
            theta_.addcdiv_(m_, root.add_(group["eps"]), value=-alpha)


def _in_chunks(*tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Views of the same elements of all tensors, on a CPU few enough to stay in its cache.

    The operations then read memory once. A GPU is better served by the whole at once.
    """
    if tensors[0].device.type != "cpu" or not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    return zip(*(tensor.view(-1).split(CHUNK) for tensor in tensors), strict=True)


def _check_hyperparameters(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, **_others: Any
) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name}={value} is not a number of at least 0")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas={betas} are not two numbers in [0, 1)")
