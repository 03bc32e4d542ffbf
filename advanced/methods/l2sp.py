"""L2-SP (Li, Grandvalet and Davoine 2018, arXiv 1802.01483, equation 3): weight decay to a start.

    alpha / 2 ||w - w0||^2 + beta / 2 ||v||^2

where w are the weights that were pretrained, w0 what they were before finetuning (the starting
point, SP), and v those of the new head. It is a term of the loss, a `regularizer` of
`training.train_classifier`; model and loop stay as they are.

What differs here, and why: the paper trains by SGD with momentum, here AdamW divides the gradient
of the whole loss, this term's included, by its root mean square. A weight with large gradients is
thereby pulled back more slowly than alpha says, one with small gradients faster (Loshchilov and
Hutter 2019, arXiv 1711.05101, say so of L2). `AdamW`'s own weight decay, 0 in this project's
finetuning, pulls to zero, not to w0; use one of the two.

The 3.2 million numbers of the bundled model cost 6 ms a step on one thread of a CPU.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class L2SP(nn.Module):
    """weight / 2 ||w - w0||^2 + head_weight / 2 ||v||^2.

    w are the pretrained parameters of `model.llama` that are trainable, and w0 the weights they
    have, when this is built; v are all others that are: the head, adapters, and what reads the
    states. w0 is not saved: a run that is resumed builds this on the pretrained model, before its
    state is loaded. ValueError for a weight that is no number of at least 0, and where all of the
    pretrained is frozen.
    """

    def __init__(self, model: nn.Module, weight: float, head_weight: float):
        super().__init__()
        for name, value in (("weight", weight), ("head_weight", head_weight)):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"L2-SP's {name}={value} is not a number of at least 0")
        self.weight = weight
        self.head_weight = head_weight
        trained = [name for name, p in model.llama.named_parameters() if p.requires_grad]
        self.names = [name for name in trained if ".adapter." not in name]
        if not self.names:
            raise ValueError("L2-SP holds what is trained, but model.llama is frozen; finetune it")
        for i, name in enumerate(self.names):  # a buffer's own name has no dots
            start = model.llama.get_parameter(name).detach().clone()
            self.register_buffer(f"start_{i}", start, persistent=False)

    def forward(self, model: nn.Module, *_batch: object) -> torch.Tensor:
        """The penalty, a scalar; of the batch it needs nothing."""
        squares = [
            # One pass over the memory each way, of which (w - w0).square().sum() takes two.
            F.mse_loss(
                model.llama.get_parameter(name), self.get_buffer(f"start_{i}"), reduction="sum"
            )
            for i, name in enumerate(self.names)
        ]
        held = {f"llama.{name}" for name in self.names}
        new = [
            parameter.square().sum()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name not in held
        ]
        return self.weight / 2 * sum(squares) + self.head_weight / 2 * sum(new)
