"""Mixout (Lee, Cho and Kang 2020, arXiv 1909.11299, section 3): dropout toward pretrained weights.

Where dropout puts zeros, mixout puts the numbers that the pretrained matrix has there. In training
each matrix W of the layers is seen as

    W' = (m * W_pre + (1 - m) * W - p * W_pre) / (1 - p),    m ~ Bernoulli(p),

so E[W'] = W, and where W is still W_pre so is W'. In eval mode W is seen. For a strongly convex
loss it adds at least a multiple of p / (1 - p) ||W - W_pre||^2 (their section 3).

What differs here, and why:
- One m for each number of a matrix, drawn independently. Their figure 1 and their code draw one for
  each input neuron and so swap whole columns; the code also leaves 1 / (1 - p) out of the gradient.
- One m a pass for the whole batch: it is the matrix that is mixed, not what a sentence makes of it.
- The matrices inside the layers alone. The head is new, it has no pretrained value to go to. The
  embedding, which is also the output, is looked up and not multiplied; the norms are few numbers.

Comparing `rand` with p costs half of what `bernoulli_` does on a CPU. All in all the 2.4 million
numbers of the bundled model's layers cost 12 ms a step there, where a step of 8 sentences of 24
tokens takes 62 (on one thread; by `F.dropout(W - W_pre)` it would be 21).
"""

import torch
from torch import nn
from torch.nn.utils import parametrize

from fast.linear import Linear


class Mixout(nn.Module):
    """The parametrization W -> W' in training, W -> W in eval mode.

    `target` is W_pre, of W's shape. It is rebuilt from the pretrained weights, not saved.
    """

    def __init__(self, target: torch.Tensor, p: float):
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"mixout's p={p} is not a number in [0, 1): at 1 nothing would train")
        self.p = p
        self.register_buffer("target", target, persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return weight
        # The formula is W_pre + (1 - m) / (1 - p) * (W - W_pre): exactly W_pre where W is.
        scale = torch.rand_like(weight, requires_grad=False).ge_(self.p).div_(1.0 - self.p)
        return torch.lerp(self.target, weight, scale)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def add_mixout(model: nn.Module, p: float) -> None:
    """Mixes every Linear inside model.llama.layers with its present weights, until `merge`.

    Their parameters stay the same objects; `<linear>.parametrizations.weight.original` is their
    name meanwhile. A run that is resumed calls this on the pretrained model, before its state is
    loaded. ValueError, and nothing is changed, for a p outside [0, 1) or where a Linear is
    parametrized already.
    """
    linears = _linears(model)
    for name, linear in linears:
        if parametrize.is_parametrized(linear, "weight"):
            raise ValueError(f"{name}.weight is parametrized already; merge that before add_mixout")
    mixouts = [Mixout(linear.weight.detach().clone(), p) for _, linear in linears]
    for (_, linear), mixout in zip(linears, mixouts, strict=True):
        # unsafe skips the trial call, which in training mode would draw random numbers.
        parametrize.register_parametrization(linear, "weight", mixout, unsafe=True)


def merge(model: nn.Module) -> None:
    """Undoes `add_mixout`: the trained W, what eval mode sees, are plain parameters again.

    A copy of the model stays as it is. ValueError, and nothing is changed, for a Linear without
    mixout, or with more than that.
    """
    linears = _linears(model)
    for name, linear in linears:
        parametrized = parametrize.is_parametrized(linear, "weight")
        kinds = [type(part) for part in linear.parametrizations.weight] if parametrized else []
        if kinds != [Mixout]:
            found = ", ".join(kind.__name__ for kind in kinds) or "no parametrization"
            raise ValueError(f"{name}.weight has {found}, not mixout alone; add_mixout comes first")
    for _, linear in linears:
        # PyTorch's own removal takes `weight` from the class, which a copy of the model shares.
        weight = linear.parametrizations.weight.original
        del linear.parametrizations
        linear.__class__ = type(linear).__base__
        linear.register_parameter("weight", weight)


def _linears(model: nn.Module) -> list[tuple[str, Linear]]:
    return [
        (f"llama.layers.{name}", module)
        for name, module in model.llama.layers.named_modules()
        if isinstance(module, Linear)
    ]
