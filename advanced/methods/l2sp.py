"""L2-SP: weight decay toward the pretrained weights (Li, Grandvalet and Davoine 2018, arXiv
1802.01483, equation 3).

    alpha / 2 ||w - w0||^2 + beta / 2 ||v||^2

w are the pretrained weights in training, w0 their values before finetuning (the starting point,
SP), v the weights of the new head. The penalty is a `regularizer` of `train_classifier`.

Difference from the paper: it trains by SGD with momentum. AdamW divides the gradient of the whole
loss, and so the penalty's, by its root mean square. A weight with large gradients is pulled back
more slowly than alpha says (Loshchilov and Hutter 2019, arXiv 1711.05101). AdamW's own weight
decay, 0 in this project's finetuning, pulls to zero and not to w0.
"""

import torch
import torch.nn.functional as F
from torch import nn


class L2SP(nn.Module):
    """alpha / 2 ||w - w0||^2 + beta / 2 ||v||^2, over the trainable parameters.

    w are those of `model.llama` without adapters; v are all others. w0 is read from `model` here
    and not saved: a resumed run builds this on the pretrained model before it loads its state.
    """

    def __init__(self, model: nn.Module, alpha: float, beta: float):
        super().__init__()
        self.alpha, self.beta = alpha, beta
        self.starts = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name.startswith("llama.") and ".adapter." not in name
        }

    def forward(self, model: nn.Module, *_batch: object) -> torch.Tensor:
        """Return the penalty, a scalar; it does not depend on the batch."""
        pretrained = new = 0.0
        for name, parameter in model.named_parameters():
            if name in self.starts:
                # mse_loss needs one pass over the memory in each direction, a difference two.
                pretrained += F.mse_loss(parameter, self.starts[name], reduction="sum")
            elif parameter.requires_grad:
                new += parameter.square().sum()
        return self.alpha / 2 * pretrained + self.beta / 2 * new
