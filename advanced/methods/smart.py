"""SMART (Jiang et al. 2020, arXiv 1911.03437, section 3): smoothness around inputs, small steps.

    weight * E max_{||d||_inf <= radius} l(f(x + d; theta), f(x; theta))       (section 3.1)
    + proximal_weight * E l(f(x; theta), f(x; theta~))                         (section 3.2)
    theta~ <- momentum * theta~ + (1 - momentum) * theta

is added to the loss. l is the symmetrized KL divergence, x are the sentence's word embeddings, and
algorithm 1 searches d. A hook perturbs the embeddings.

Differences from the paper:

- Units. The paper's radius, noise and step (1e-5, 1e-5, 1e-3) are absolute. Here the radius is a
  fraction of the RMS of the pretrained embedding, and noise and step are in radii, in the paper's
  ratios of 1 and 100. With the bundled model after some finetuning on SST:

  | radius | first term, beside a loss of 1.3 |
  |---|---|
  | the paper's (0.0001 of the RMS) | < 1e-6 |
  | 0.02 | 0.004 |
  | 0.1 (also in bfloat16) | 0.09 |

- The search divides the gradient by its largest entry in the sentence.
- Dropout. All passes of the two terms are in eval mode; otherwise l would measure the masks (a
  head's dropout of 0.3 alone makes it 0.3). So the training pass cannot serve as f(x).
- The momentum stays 0.99; the paper raises it to 0.999 after a tenth of the training.

A step takes 3.8 times as long with the first term, 2.3 with the second, 4.1 with both.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from training.schedule import symmetric_kl

Forward = Callable[[nn.Module], torch.Tensor]  # a pass of the batch -> log-probabilities (B, C)


class Smart(nn.Module):
    """Both terms, as a `regularizer` of `train_classifier`; a weight of 0 drops its term.

    Build it on the pretrained model, before a resumed run loads its state. `teacher`, theta~, is a
    copy of the model and part of the saved state. With `batch_size` a short last batch weighs as
    much less as in the training loop's loss.
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float = 1.0,
        radius: float = 0.1,
        step_size: float = 100.0,
        noise: float = 1.0,
        proximal_weight: float = 1.0,
        momentum: float = 0.99,
        batch_size: int | None = None,
    ):
        super().__init__()
        self.weight, self.proximal_weight, self.momentum = weight, proximal_weight, momentum
        rms = model.llama.tok_embeddings.weight.detach().square().mean().sqrt().item()
        self.radius = radius * rms
        self.step_size, self.noise = step_size * self.radius, noise * self.radius
        self.batch_size = batch_size
        if proximal_weight:
            self.teacher = copy.deepcopy(model).requires_grad_(False)

    def forward(self, model: nn.Module, _log_probs: torch.Tensor, forward: Forward) -> torch.Tensor:
        """Return the sum of the terms, a scalar. Call it once a step: it moves the teacher."""
        with _eval_mode(model):
            embedded: list[torch.Tensor] = []
            with _embedding_hook(model, lambda output: embedded.append(output.detach())):
                clean = forward(model)
            penalty = torch.zeros_like(clean[0, 0])
            if self.weight:
                delta = self._search(model, clean.detach(), forward, like=embedded[0])
                with perturbed(model, delta):
                    penalty = self.weight * symmetric_kl(forward(model), clean)
        if self.proximal_weight:
            followed = self._follow(model, forward)
            penalty = penalty + self.proximal_weight * symmetric_kl(clean, followed)
        return penalty * (len(clean) / (self.batch_size or len(clean)))

    def _search(
        self, model: nn.Module, clean: torch.Tensor, forward: Forward, like: torch.Tensor
    ) -> torch.Tensor:
        """Return d (B, T, dim), one step of projected gradient ascent, no gradients of parameters.

        It starts at noise, because the gradient at d = 0 is 0.
        """
        delta = (self.noise * torch.randn_like(like)).requires_grad_()
        with perturbed(model, delta):
            divergence = symmetric_kl(forward(model), clean)
        (gradient,) = torch.autograd.grad(divergence, delta)
        largest = gradient.abs().amax(dim=(1, 2), keepdim=True)  # of each sentence
        unit = gradient / largest.clamp_min(torch.finfo(largest.dtype).tiny)
        return (delta.detach() + self.step_size * unit).clamp_(-self.radius, self.radius)

    @torch.no_grad()
    def _follow(self, model: nn.Module, forward: Forward) -> torch.Tensor:
        """Move the teacher to the weights that the step before left; return its predictions."""
        for average, current in zip(self.teacher.parameters(), model.parameters(), strict=True):
            average.lerp_(current, 1.0 - self.momentum)
        return forward(self.teacher.eval())


def perturbed(model: nn.Module, delta: torch.Tensor) -> contextlib.AbstractContextManager:
    """Add delta (B, T, dim) to the word embeddings of `model` in this context."""
    return _embedding_hook(model, lambda output: output + delta)


@contextlib.contextmanager
def _embedding_hook(model: nn.Module, hook: Callable) -> Iterator[None]:
    embedding = model.llama.tok_embeddings
    handle = embedding.register_forward_hook(lambda _module, _inputs, output: hook(output))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode and back into the mode it had."""
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True
