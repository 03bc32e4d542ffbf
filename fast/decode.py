"""Decoding with a KV cache: each step computes only the new position.

Shapes: B rows, T new positions, S all positions so far, H query heads, K key/value heads, D head
size (dim = H * D), F feed-forward size, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from fast.int8 import Int8Linear, int8_linear
from fast.linear import linear
from rope import THETA, rotary_table, rotate
from utils import InputError


class Decoder:
    """The forward pass of a causal Llama in eval mode over the next positions.

    It keeps the keys and values of all positions: 2 * 4 B K D bytes a layer and position in
    float32. Causal attention allows that; without a mask each new token would change all earlier
    states. Projections that read the same input are one product (`fused`), and everything that
    does not depend on the tokens is prepared once. Logits equal those of `Llama.forward` up to
    rounding.

    Raises InputError for another attention mode, and for positions beyond `capacity`.
    """

    def __init__(self, model: nn.Module, batch_size: int, capacity: int):
        config = model.config
        if config.attention != "causal":
            raise InputError(
                f"a KV cache needs attention='causal', not {config.attention!r}: "
                "without a mask each new token changes every earlier key and value"
            )
        like = model.norm.weight
        self.embedding = model.tok_embeddings
        self.layers = [_DecoderLayer(layer) for layer in model.layers]
        self.norm, self.output = _RMSNorm(model.norm), fused(model.output)
        shape = (config.n_layers, batch_size, config.n_kv_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=like.device, dtype=like.dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0  # positions that are stored
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.rotations = rotary_table(
            config.max_seq_len, config.head_dim, THETA, like.device, dtype
        )

    @torch.inference_mode()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Store the next positions, tokens (B, T), and return the logits of the last one (B, V).

        The first call may read several positions, each further call one.
        """
        start, end = self.length, self.length + tokens.shape[1]
        assert start == 0 or end == start + 1, "a prefix first, then one position at a time"
        if end > self.keys.shape[3]:
            raise InputError(f"a KV cache of {self.keys.shape[3]} positions cannot hold {end}")
        rotations = self.rotations[start:end]  # (T, D/2)
        h = self.embedding(tokens)  # (B, T, dim)
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            h = layer(h, keys[:, :, :end], values[:, :, :end], rotations)
        self.length = end
        return self.output(self.norm(h[:, -1]))

    def repeat(self, n: int) -> None:
        """Repeat each row n times, side by side: B becomes B n."""
        self.keys = self.keys.repeat_interleave(n, dim=1)
        self.values = self.values.repeat_interleave(n, dim=1)


class _DecoderLayer:
    def __init__(self, layer: nn.Module):
        attention, mlp = layer.attention, layer.feed_forward
        self.sizes = attention.n_heads, attention.n_kv_heads, attention.head_dim
        self.attention_norm = _RMSNorm(layer.attention_norm)
        self.query_key_value = fused(
            attention.compute_query, attention.compute_key, attention.compute_value
        )
        self.attention_output = fused(attention.compute_output)
        self.ffn_norm = _RMSNorm(layer.ffn_norm)
        self.w1_w3, self.w2 = fused(mlp.w1, mlp.w3), fused(mlp.w2)

    def __call__(
        self, h: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rotations: torch.Tensor
    ) -> torch.Tensor:
        """Map h (B, T, dim), and write the last T positions of keys and values (B, K, S, D)."""
        (H, K, D), (B, T, _) = self.sizes, h.shape
        x = self.query_key_value(self.attention_norm(h)).view(B, T, H + 2 * K, D)
        query_key = rotate(x[:, :, : H + K], rotations).transpose(1, 2)  # (B, H + K, T, D)
        keys[:, :, -T:] = query_key[:, H:]
        values[:, :, -T:] = x[:, :, H + K :].transpose(1, 2)
        query = query_key[:, :H]
        if T == 1:  # then the H/K query heads that share a key head are H/K queries of one head
            output = F.scaled_dot_product_attention(query.view(B, K, H // K, D), keys, values)
        else:  # the first T positions, so S = T
            keys, values = (t.repeat_interleave(H // K, dim=1) for t in (keys, values))
            output = F.scaled_dot_product_attention(query, keys, values, is_causal=True)
            output = output.transpose(1, 2)  # (B, T, H, D)
        h = h + self.attention_output(output.reshape(B, T, H * D))
        gate, x = self.w1_w3(self.ffn_norm(h)).chunk(2, dim=-1)  # (B, T, F) each
        return h + self.w2(F.silu(gate) * x)


class _RMSNorm:
    """llama.RMSNorm in four operations instead of seven.

    sqrt(mean(x^2) + eps) = hypot(|x|, sqrt(n eps)) / sqrt(n) for x of n numbers.
    """

    def __init__(self, norm: nn.Module):
        n, self.dtype = len(norm.weight), torch.promote_types(norm.weight.dtype, torch.float32)
        self.weight = norm.weight.detach().to(self.dtype) * math.sqrt(n)
        self.floor = self.weight.new_tensor(math.sqrt(n * norm.eps))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.dtype)
        return (x * self.weight / torch.hypot(length, self.floor)).type_as(x)


def fused(*linears: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return one product (..., I) -> (..., O) for several layers of the same input, in their order.

    The layers' weights become views of the fused matrix, so that nothing is kept twice.
    """
    weight = fuse_weights([layer.weight for layer in linears])
    if isinstance(linears[0], Int8Linear):
        scale = torch.cat([layer.scale for layer in linears]).bfloat16()  # exact, see quantize_rows
        return partial(int8_linear, weight=weight, scale=scale)
    return partial(linear, weight=weight)


@torch.no_grad()
def fuse_weights(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the rows of all weights (O_i, I) as one matrix, and make the weights views of it."""
    first, n_rows = weights[0].detach(), sum(map(len, weights))
    storage = first.untyped_storage().data_ptr()
    end, are_fused = first.data_ptr(), True
    for weight in weights:
        are_fused &= weight.data_ptr() == end and weight.untyped_storage().data_ptr() == storage
        end += weight.nbytes  # of a contiguous weight, as every loaded or new one is
    if are_fused:
        return first.as_strided((n_rows, first.shape[1]), first.stride())
    with torch.inference_mode(False):  # weights that were fused here can still be trained
        matrix = torch.cat([weight.detach() for weight in weights])
        for weight, rows in zip(weights, matrix.split([len(w) for w in weights]), strict=True):
            weight.data = rows
    return matrix


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
    stand side by side and share one pass over its prefix. The model reads the last `max_seq_len`
    positions; with full attention, with forward hooks, or once this window slides, every step
    recomputes it.
    """
    window = model.config.max_seq_len
    decoder = None
    # A decoder would pass over hooks, such as adapters.
    has_hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    is_causal = model.config.attention == "causal"
    if is_causal and not has_hooks and idx.shape[1] < window and max_new_tokens > 0:
        decoder = Decoder(model, len(idx), min(window, idx.shape[1] + max_new_tokens))
    for step in range(max_new_tokens):
        if decoder is not None and idx.shape[1] <= window:
            logits = decoder(idx[:, decoder.length :])
        else:
            logits = model(idx[:, -window:])[0][:, -1]  # (B, V)
        if step == 0 and num_samples > 1:
            logits = logits.repeat_interleave(num_samples, dim=0)
            idx = idx.repeat_interleave(num_samples, dim=0)
            if decoder is not None:
                decoder.repeat(num_samples)
        token = pick(logits)
        yield token
        idx = torch.cat((idx, token), dim=1)
