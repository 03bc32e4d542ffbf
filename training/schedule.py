"""Schedule learning rates, choose the precision, and take clipped steps, in every loop."""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer


def learning_rate_factor(
    step: int, progress: float, warmup_steps: int, decay_from: float, cosine: bool = False
) -> float:
    """Return the factor of the peak learning rate at `step` (0, 1, ...): a trapezoid.

    It rises linearly over the first `warmup_steps` steps and stays at 1. When `progress`, the share
    of the training that is done, passes `decay_from`, it falls linearly to 0 (Hägele et al. 2024,
    arXiv 2405.18392), or with `cosine` along half a wave (Loshchilov and Hutter 2017, arXiv
    1608.03983, equation 5). `decay_from=0` is the usual warm-up and decay, `decay_from=1` never
    decays.
    """
    rise = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    fall = min(1.0, (1.0 - progress) / (1.0 - decay_from)) if decay_from < 1.0 else 1.0
    fall = max(0.0, fall)
    if cosine:
        fall = (1.0 - math.cos(math.pi * fall)) / 2.0
    return rise * fall


def symmetric_kl(log_probs: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the mean over rows of KL(p || q) + KL(q || p), of log-probabilities (B, C)."""
    return ((log_probs.exp() - others.exp()) * (log_probs - others)).sum(dim=-1).mean()


@contextlib.contextmanager
def precision(device: torch.device, bf16: bool) -> Iterator[None]:
    """Compute in float32 (TF32 products on CUDA if allowed), or autocast to bfloat16.

    Enter it for each pass anew: inside, autocast caches bfloat16 copies of the weights, which an
    optimizer step would not change. A CPU without bfloat16 instructions is slow with it.
    """
    if not bf16:
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        if device.type == "cpu":  # its fused kernel is slower in bfloat16 than plain products
            allow = torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp
            stack.callback(allow, torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed())
            allow(True)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def take_step(
    optimizers: Sequence[Optimizer], lr_factor: float = 1.0, max_grad_norm: float | None = None
) -> None:
    """Update every optimizer at its peak rate times `lr_factor`, then clear the gradients.

    `max_grad_norm` clips the norm of all gradients together (Pascanu et al. 2013, arXiv 1211.5063,
    algorithm 1). A group's peak is the `lr` of its first step, kept as `initial_lr`.
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


def parameter_groups(model: nn.Module, lr: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Return the trained parameters in groups of one learning rate.

    The rate is `lr` for the final norm and the head, lr * layer_decay for the topmost layer, and
    falls by that factor with each layer down to the embedding (Howard and Ruder 2018, arXiv
    1801.06146, section 3.2). An untied output layer counts as a head.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if layer_decay == 1.0:
        return [{"params": [parameter for _, parameter in trained], "lr": lr}]
    n_layers = model.llama.config.n_layers
    by_distance: dict[int, list[nn.Parameter]] = {}
    for name, parameter in trained:
        layer = re.match(r"llama\.layers\.(\d+)\.", name)
        is_embedding = parameter is model.llama.tok_embeddings.weight
        height = int(layer[1]) + 1 if layer else (0 if is_embedding else n_layers + 1)
        by_distance.setdefault(n_layers + 1 - height, []).append(parameter)
    return [
        {"params": parameters, "lr": lr * layer_decay**distance}
        for distance, parameters in sorted(by_distance.items())
    ]
