"""Mixout (Lee, Cho and Kang 2020, arXiv 1909.11299, section 3): dropout to the pretrained weights.

Dropout replaces numbers by zero, mixout by the pretrained numbers. In training each matrix W of the
layers becomes

    W' = (m * W_pre + (1 - m) * W - p * W_pre) / (1 - p),    m ~ Bernoulli(p),

so E[W'] = W, and W' = W_pre where W = W_pre. In eval mode W' is W. For a strongly convex loss
mixout adds at least a multiple of p / (1 - p) ||W - W_pre||^2 (section 3).

Differences from the paper:

- m is drawn for each number of a matrix. Figure 1 and the paper's code draw it for each input
  neuron and so replace whole columns; the code also leaves 1 / (1 - p) out of the gradient.
- m is drawn once per pass, for the whole batch.
- Only the matrices of the layers are mixed. The head has no pretrained value; the embedding, which
  is also the output layer, is looked up and not multiplied.
"""

import torch
from torch import nn
from torch.nn.utils import parametrize

from fast.linear import Linear


class Mixout(nn.Module):
    """W -> W' in training, W -> W in eval mode. `target` is W_pre and is not saved."""

    def __init__(self, target: torch.Tensor, p: float):
        super().__init__()
        self.p = p
        self.register_buffer("target", target, persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return weight
        # W_pre + (1 - m) / (1 - p) * (W - W_pre) is exactly W_pre where W is. `rand` and a
        # comparison take half the time of `bernoulli_` on a CPU.
        scale = torch.rand_like(weight, requires_grad=False).ge_(self.p).div_(1.0 - self.p)
        return torch.lerp(self.target, weight, scale)


def add_mixout(model: nn.Module, p: float) -> None:
    """Mix every Linear of `model.llama.layers` with its present weights.

    A resumed run calls this on the pretrained model before it loads its state.
    """
    for module in list(model.llama.layers.modules()):
        if isinstance(module, Linear):
            mixout = Mixout(module.weight.detach().clone(), p)
            # unsafe=True skips a trial call, which would draw random numbers in training mode.
            parametrize.register_parametrization(module, "weight", mixout, unsafe=True)
