"""Other parts between the Llama's states and the head, each a classifier with its own `pool`.

- `AttentionPooling`: the mean over a row's real tokens h_t, weighted by softmax_t(u h_t) with a
  learned query u (Yang et al. 2016, Hierarchical Attention Networks, equations 6 and 7; Lin et al.
  2017, arXiv 1703.03130, equation 5 with one hop). Both put a tanh layer before the product; the
  Llama's last layer stands there already, so here is none. u = 0 at first: the plain mean.
- `LastMean`: the last real token's state beside the mean of all, for a head of 2 dim (concat
  pooling, Howard and Ruder 2018, arXiv 1801.06146, section 3.3, which adds the maximum as a third).
- `LayerMix`: gamma sum_j softmax_j(s) h_j over the embedding and each layer's output (Peters et al.
  2018, arXiv 1802.05365, equation 1), every h_j through the final norm, then the mean over real
  tokens. s = 0 and gamma = 1 at first, all layers alike. So at the start it is not the
  plain model, which is all weight on the last; the head is new in either case. ELMo trains the mix
  over frozen states (`option="pretrain"`); here these can be finetuned, too.

All mask padding and read `lengths`. The config's `pooling`, which they replace, may thus be "mean"
or "last", to the same effect, and not "position". Their weights load in their own class alone, for
instance by its `from_weights`.
"""

from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from classifier import LlamaEmbeddingClassifier, are_real, mean_of_real
from llama import Llama, last_real


class _MaskedPooling(LlamaEmbeddingClassifier):
    """ValueError for a config that leaves padding unmasked."""

    def __init__(self, config: Any, llama: Llama | None = None):
        super().__init__(config, llama)
        if not self.reads_lengths:
            raise ValueError(
                f"pooling={self.pooling!r} leaves padding unmasked, which {type(self).__name__} "
                "would read: choose pooling='mean'"
            )


class AttentionPooling(_MaskedPooling):
    """sum_t softmax_t(u h_t) h_t over each row's real tokens."""

    def __init__(self, config: Any, llama: Llama | None = None):
        super().__init__(config, llama)
        self.query = nn.Parameter(torch.zeros_like(self.llama.norm.weight))

    def pool(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        scores = (hidden * self.query).sum(dim=-1)  # (B, T), by no product that autocast rounds
        weights = F.softmax(scores.masked_fill(~are_real(hidden, lengths), -torch.inf), dim=-1)
        return (weights[:, :, None] * hidden).sum(dim=1)  # (B, dim)


class LastMean(_MaskedPooling):
    """The last real state and the mean of the real ones, (B, 2 dim)."""

    def __init__(self, config: Any, llama: Llama | None = None):
        super().__init__(config, llama)
        self.classifier_head = nn.Linear(2 * self.llama.config.dim, self.num_labels)

    def pool(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        last = last_real(hidden, lengths).squeeze(1)  # (B, dim)
        return torch.cat((last, mean_of_real(hidden, lengths)), dim=1)


class LayerMix(_MaskedPooling):
    """The mean over real tokens of a learned mix of all layers."""

    def __init__(self, config: Any, llama: Llama | None = None):
        super().__init__(config, llama)
        like = self.llama.norm.weight
        self.layer_scores = nn.Parameter(like.new_zeros(self.llama.config.n_layers + 1))
        self.gamma = nn.Parameter(like.new_ones(()))

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """For the time of the pass, hooks keep what each layer reads, and mix it at the final norm.

        So `pool` gets the mix where the other classifiers get the last layer's states.
        """
        states: list[torch.Tensor] = []  # the embedding, then all layers' outputs but the last's

        def keep(layer: nn.Module, args: tuple) -> None:
            states.append(args[0])

        def mix(norm: nn.Module, args: tuple, last: torch.Tensor) -> torch.Tensor:
            weights = self.gamma * F.softmax(self.layer_scores, dim=0)  # (n_layers + 1,)
            normed = [*(norm.forward(state) for state in states), last]  # each (B, T, dim)
            return sum(weight * state for weight, state in zip(weights, normed, strict=True))

        with ExitStack() as hooks:
            for layer in self.llama.layers:
                hooks.callback(layer.register_forward_pre_hook(keep).remove)
            hooks.callback(self.llama.norm.register_forward_hook(mix).remove)
            return super().forward(input_ids, lengths)

    def pool(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return mean_of_real(hidden, lengths)


COMPONENTS: dict[str, type[LlamaEmbeddingClassifier]] = {
    "attention_pool": AttentionPooling,
    "last_mean": LastMean,
    "layer_mix": LayerMix,
}
