"""Classifiers with another pooling between the Llama's states and the head.

- `AttentionPooling`: the mean of a row's states h_t weighted by softmax_t(u h_t), with a learned
  query u (Yang et al. 2016, Hierarchical Attention Networks, equations 6 and 7; Lin et al. 2017,
  arXiv 1703.03130, equation 5 with one hop). Both apply a tanh layer first; here the Llama's last
  layer serves for it. u starts as zeros, which is the plain mean.
- `LastMean`: the last token's state beside the mean of all states, for a head of 2 dim (concat
  pooling, Howard and Ruder 2018, arXiv 1801.06146, section 3.3, without its maximum).
- `LayerMix`: gamma sum_j softmax_j(s) h_j over the embedding and each layer's output (Peters et al.
  2018, arXiv 1802.05365, equation 1), each h_j through the final norm, then the mean over tokens.
  s starts as zeros and gamma as 1, all layers alike. ELMo trains the mix over frozen states; here
  the layers can be finetuned, too.

All mask padding and need `lengths`. They replace the config's `pooling`, which must not be
"position", as that leaves padding unmasked.
"""

from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from classifier import LlamaEmbeddingClassifier, masked_mean
from llama import Llama, last_token, padding_mask
from utils import InputError


class _MaskedPooling(LlamaEmbeddingClassifier):
    def __init__(self, config: Any, llama: Llama):
        super().__init__(config, llama)
        if not self.reads_lengths:
            raise InputError(
                f"--pooling {self.pooling} leaves padding unmasked, which {type(self).__name__} "
                "would read; choose --pooling mean"
            )


class AttentionPooling(_MaskedPooling):
    """Pool sum_t softmax_t(u h_t) h_t over the tokens of each row."""

    def __init__(self, config: Any, llama: Llama):
        super().__init__(config, llama)
        self.query = nn.Parameter(torch.zeros_like(self.llama.norm.weight))

    def pool(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        scores = (hidden * self.query).sum(dim=-1)  # (B, T); autocast would round a matrix product
        weights = F.softmax(
            scores.masked_fill(~padding_mask(lengths, hidden.shape[1]), -torch.inf), dim=-1
        )
        return (weights[:, :, None] * hidden).sum(dim=1)  # (B, dim)


class LastMean(_MaskedPooling):
    """Pool the last token's state and the mean of all, (B, 2 dim)."""

    def __init__(self, config: Any, llama: Llama):
        super().__init__(config, llama)
        self.classifier_head = nn.Linear(2 * self.llama.config.dim, self.num_labels)

    def pool(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        last = last_token(hidden, lengths).squeeze(1)  # (B, dim)
        return torch.cat((last, masked_mean(hidden, lengths)), dim=1)


class LayerMix(_MaskedPooling):
    """Pool the mean of a learned mix of all layers."""

    def __init__(self, config: Any, llama: Llama):
        super().__init__(config, llama)
        like = self.llama.norm.weight
        self.layer_scores = nn.Parameter(like.new_zeros(self.llama.config.n_layers + 1))
        self.gamma = nn.Parameter(like.new_ones(()))

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Collect the input of each layer by hooks, and return the mix from the final norm.

        So `pool` reads the mix where the other classifiers read the last layer's states.
        """
        states: list[torch.Tensor] = []  # the embedding, then every layer's output except the last

        def collect(layer: nn.Module, args: tuple) -> None:
            states.append(args[0])

        def mix(norm: nn.Module, args: tuple, last: torch.Tensor) -> torch.Tensor:
            weights = self.gamma * F.softmax(self.layer_scores, dim=0)  # (n_layers + 1,)
            normed = [*(norm.forward(state) for state in states), last]  # each (B, T, dim)
            return sum(weight * state for weight, state in zip(weights, normed, strict=True))

        with ExitStack() as hooks:
            for layer in self.llama.layers:
                hooks.callback(layer.register_forward_pre_hook(collect).remove)
            hooks.callback(self.llama.norm.register_forward_hook(mix).remove)
            return super().forward(input_ids, lengths)

    def pool(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return masked_mean(hidden, lengths)


POOLINGS: dict[str, type[LlamaEmbeddingClassifier]] = {
    "attention_pool": AttentionPooling,
    "last_mean": LastMean,
    "layer_mix": LayerMix,
}
