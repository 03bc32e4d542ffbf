"""The base class of the model: its config, initial weights and dtype."""

import math

import torch
from torch import nn

from config import LlamaConfig


class LlamaPreTrainedModel(nn.Module):
    config_class = LlamaConfig  # the assignment's, like the next one; not used here
    base_model_prefix = "llama"

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.n_layers = config.n_layers

    def init_weights(self) -> None:
        """Draw every matrix from normal(0, 0.02); the norms keep their weights.

        The projections that write into the residual stream (`compute_output` and `w2`) get
        0.02 / sqrt(2 n_layers), so that the 2 n_layers additions to it together add about as much
        variance in a deep model as in a shallow one (Radford et al. 2019, GPT-2, section 2.3). A
        model on the meta device (shapes without memory) has no weights to draw.
        """
        if any(parameter.is_meta for parameter in self.parameters()):
            return
        self.apply(self._init_weights)
        residual_std = 0.02 / math.sqrt(2 * self.n_layers)
        for name, parameter in self.named_parameters():
            if name.endswith(("compute_output.weight", "w2.weight")):
                nn.init.normal_(parameter, mean=0.0, std=residual_std)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters() if p.is_floating_point())
