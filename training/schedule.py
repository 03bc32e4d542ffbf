"""What every training loop here shares: the learning rate's course, precision, a clipped step."""

import contextlib
import math
from collections.abc import Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer


def learning_rate_factor(
    step: int,
    progress: float,
    warmup_steps: int = 0,
    decay_from: float = 1.0,
    cosine: bool = False,
) -> float:
    """What the peak learning rate is multiplied by at `step` (0, 1, ...): a trapezoid.

    It rises linearly over the first `warmup_steps` steps, stays at 1, and once `progress`, the
    share in [0, 1] of the training that is done, passes `decay_from` falls linearly to 0 (Hagele
    et al. 2024, arXiv 2405.18392), or with `cosine` along half a wave (Loshchilov and Hutter 2017,
    arXiv 1608.03983, equation 5). `decay_from=0` is the usual warm-up and decay, `decay_from=1`
    never decays.
    """
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    fall = min(1.0, (1.0 - progress) / (1.0 - decay_from)) if decay_from < 1.0 else 1.0
    fall = max(0.0, fall)
    if cosine:
        fall = (1.0 - math.cos(math.pi * fall)) / 2.0
    return rise * fall


def symmetric_kl(log_probs: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """KL(p || q) + KL(q || p) of two (B, C) tables of log-probabilities, the mean over rows."""
    return ((log_probs.exp() - others.exp()) * (log_probs - others)).sum(dim=-1).mean()


def precision(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager:
    """The context to compute in: float32 as it is, or autocast to bfloat16 (weights stay float32).

    To be entered for each pass anew: inside, autocast keeps its bfloat16 copies of the weights, and
    a step would not reach them. On CPUs without bfloat16 instructions it is slow, but right.
    """
    stack = contextlib.ExitStack()
    if bf16:
        stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        if device.type == "cpu":  # there the fused kernel is slower in bfloat16 than plain products
            allow = torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp
            stack.callback(allow, torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed())
            allow(True)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack


def take_step(
    optimizers: Sequence[Optimizer], lr_factor: float = 1.0, max_grad_norm: float | None = None
) -> None:
    """One update of every optimizer at its own peak rate times `lr_factor`; gradients are cleared.

    `max_grad_norm` bounds the norm of all gradients together (Pascanu et al. 2013, arXiv 1211.5063,
    algorithm 1). A group's peak is the `lr` it had at its first step, kept as `initial_lr`.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if max_grad_norm is not None:
        parameters = [parameter for group in groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    for group in groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * lr_factor
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
