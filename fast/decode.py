"""Decoding with a KV cache: each step computes only the new position.

Shapes: B batch, T new positions, S all positions so far, K key/value heads, D head size, V
vocabulary.
"""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from config import LlamaConfig
from utils import InputError


class KVCache:
    """Keys and values of earlier positions, each (layer, B, position, K, D).

    Only causal attention can keep them: without a mask every new token changes all earlier states.
    Raises InputError for any other attention mode.
    """

    def __init__(self, config: LlamaConfig, batch_size: int, capacity: int, like: torch.Tensor):
        if config.attention != "causal":
            raise InputError(
                f"a KV cache needs attention='causal', not {config.attention!r}: "
                "without a mask each new token changes every earlier key and value"
            )
        shape = (config.n_layers, batch_size, capacity, config.n_kv_heads, config.head_dim)
        self.keys = torch.empty(shape, device=like.device, dtype=like.dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0  # positions that all layers have stored; the model's forward advances it

    def extend(
        self, layer_id: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one layer's new (B, T, K, D) and return all its (B, S, K, D)."""
        end = self.length + key.shape[1]
        if end > self.keys.shape[2]:
            raise InputError(f"a KV cache of {self.keys.shape[2]} positions cannot hold {end}")
        self.keys[layer_id, :, self.length : end] = key
        self.values[layer_id, :, self.length : end] = value
        return self.keys[layer_id, :, :end], self.values[layer_id, :, :end]

    def repeated(self, n: int) -> "KVCache":
        """Return a cache with every row n times, side by side: (layer, B n, position, K, D)."""
        cache = copy.copy(self)
        cache.keys = self.keys.repeat_interleave(n, dim=1)
        cache.values = self.values.repeat_interleave(n, dim=1)
        return cache


@torch.inference_mode()
def next_tokens(
    model: nn.Module,
    idx: torch.Tensor,
    max_new_tokens: int,
    pick: Callable[[torch.Tensor], torch.Tensor],
    num_samples: int = 1,
) -> Iterator[torch.Tensor]:
    """Yield the tokens that continue each row of idx (B, T), one position at a time.

    `pick` maps logits (B * num_samples, V) to tokens (B * num_samples, 1); the samples of a row
    stand side by side and share one pass over its prefix. The tokens equal `Llama.generate`'s. The
    model reads the last `max_seq_len` positions; with full attention, or once this window slides,
    every step recomputes it.
    """
    window = model.config.max_seq_len
    cache = None
    if model.config.attention == "causal" and idx.shape[1] < window:
        capacity = min(window, idx.shape[1] + max_new_tokens)
        cache = KVCache(model.config, len(idx), capacity, like=model.norm.weight)
    for step in range(max_new_tokens):
        if cache is not None and idx.shape[1] <= window:
            logits, _ = model(idx[:, cache.length :], cache=cache)
        else:
            logits, _ = model(idx[:, -window:])  # (B, 1, V)
        if step == 0 and num_samples > 1:
            logits = logits.repeat_interleave(num_samples, dim=0)
            idx = idx.repeat_interleave(num_samples, dim=0)
            if cache is not None:
                cache = cache.repeated(num_samples)
        token = pick(logits[:, -1])
        yield token
        idx = torch.cat((idx, token), dim=1)
