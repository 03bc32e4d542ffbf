"""SMART (Jiang et al. 2020, arXiv 1911.03437, section 3): smooth around each input, small steps.

    weight * E max_{||d||_inf <= radius} l(f(x + d; theta), f(x; theta))       (section 3.1)
    + proximal_weight * E l(f(x; theta), f(x; theta~))                         (section 3.2)
    theta~ <- momentum * theta~ + (1 - momentum) * theta

is added to the loss; l is the symmetrized KL divergence, x the sentence's word embeddings, and d is
sought as in algorithm 1. A hook perturbs the embeddings, so model and loop stay as they are.

What differs here, and why:
- Units. The paper's radius, noise and step (1e-5, 1e-5, 1e-3) are absolute. Here the
  radius is a fraction of the RMS of the pretrained embedding, noise and step are in radii; their
  ratios, 1 and 100, are the paper's: what has 1 % of the largest gradient moves by a radius.
  With the bundled model, finetuned a while on SST, a radius of 0.1 gives the first term a value of
  0.09 beside a loss of 1.3 (noise as large gives 0.0001), and 0.02 gives 0.004. The paper's radius,
  0.0001 of that embedding's RMS, would leave less than 1e-6. In bfloat16 0.1 gives 0.09, too.
- Dropout. All passes of the two terms are in eval mode. With masks, l would measure these: a head's
  dropout of 0.3 alone makes it 0.3 there. So the training pass cannot serve as f(x).
- The momentum stays 0.99; the paper raises it to 0.999 after a tenth of the training.

The first term costs two passes with gradients and `n_steps` for the search, the second one without.
A step takes 3.8 times as long with the first term, 2.3 with the second, 4.1 with both.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from training.steps import symmetric_kl

Again = Callable[[nn.Module], torch.Tensor]  # another pass of the batch -> (B, n_labels)


class Smart(nn.Module):
    """Both terms, as a `regularizer` of `training.train_classifier`; a weight of 0 drops its own.

    Build it on the pretrained model, after what changes the model's modules and before a run's
    state is loaded. `teacher` is theta~, a copy of the model that is saved with the run. With
    `batch_size` a short batch, the last of an epoch, weighs as much less as it does in the training
    loop's loss. ValueError for a number that is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float = 1.0,
        radius: float = 0.1,
        step_size: float = 100.0,
        noise: float = 1.0,
        n_steps: int = 1,
        proximal_weight: float = 1.0,
        momentum: float = 0.99,
        batch_size: int | None = None,
    ):
        super().__init__()
        weights = {"weight": weight, "proximal_weight": proximal_weight}
        # Without noise the search would stay where it begins: at d = 0 the gradient is 0.
        sizes = {"radius": radius, "step_size": step_size, "noise": noise, "n_steps": n_steps}
        for name, value in (weights | sizes).items():
            if not 0.0 <= value < math.inf or (name in sizes and not value):
                least = "above" if name in sizes else "of at least"
                raise ValueError(f"SMART's {name}={value} is not a number {least} 0")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"SMART's momentum={momentum} is not a number in [0, 1)")
        self.weight, self.proximal_weight, self.momentum = weight, proximal_weight, momentum
        self.n_steps = n_steps
        self.batch_size = batch_size
        self.radius = (
            radius * model.llama.tok_embeddings.weight.detach().square().mean().sqrt().item()
        )
        self.step_size, self.noise = step_size * self.radius, noise * self.radius
        if proximal_weight:
            self.teacher = copy.deepcopy(model).requires_grad_(False)

    def forward(self, model: nn.Module, _log_probs: torch.Tensor, again: Again) -> torch.Tensor:
        """The sum of the terms, a scalar. One call a step: each moves the teacher."""
        embedded: list[torch.Tensor] = []
        with _evaluating(model):
            with _hooked(model, lambda _module, _inputs, output: embedded.append(output.detach())):
                clean = again(model)
            penalty = torch.zeros_like(clean[0, 0])
            if self.weight:
                delta = self._search(model, clean.detach(), again, like=embedded[0])
                with perturbed(model, delta):
                    penalty = self.weight * symmetric_kl(again(model), clean)
        if self.proximal_weight:
            with torch.no_grad():
                # What the model has now are the weights after the step before, theta_t.
                for average, now in zip(self.teacher.parameters(), model.parameters(), strict=True):
                    average.lerp_(now, 1.0 - self.momentum)
                followed = again(self.teacher.eval())
            penalty = penalty + self.proximal_weight * symmetric_kl(clean, followed)
        return penalty * (len(clean) / (self.batch_size or len(clean)))

    def _search(
        self, model: nn.Module, clean: torch.Tensor, again: Again, like: torch.Tensor
    ) -> torch.Tensor:
        """d (B, T, dim) by projected gradient ascent; the parameters get no gradient of it."""
        delta = self.noise * torch.randn_like(like)
        for _ in range(self.n_steps):
            delta.requires_grad_()
            with perturbed(model, delta):
                divergence = symmetric_kl(again(model), clean)
            (gradient,) = torch.autograd.grad(divergence, delta)
            largest = gradient.abs().amax(dim=(1, 2), keepdim=True)  # of each sentence
            unit = gradient / largest.clamp_min(torch.finfo(largest.dtype).tiny)
            delta = (delta.detach() + self.step_size * unit).clamp_(-self.radius, self.radius)
        return delta


def perturbed(model: nn.Module, delta: torch.Tensor) -> contextlib.AbstractContextManager:
    """In this context `model` reads its word embeddings plus delta (B, T, dim)."""
    return _hooked(model, lambda _module, _inputs, output: output + delta)


@contextlib.contextmanager
def _hooked(model: nn.Module, hook: Callable) -> Iterator[None]:
    handle = model.llama.tok_embeddings.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module is in the mode it had."""
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True
