"""Llama 2 (Touvron et al. 2023, arXiv 2307.09288): RMSNorm, grouped-query attention, SwiGLU.

Shapes: B batch, T sequence, S keys in reach (T plus whatever a cache holds), H query heads,
K key/value heads, D head size (dim = H * D), F feed-forward hidden size, V vocabulary.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from base_llama import LlamaPreTrainedModel
from config import LlamaConfig
from fast.linear import Linear
from formats.checkpoint import listed, read_checkpoint, require_finite
from rope import apply_rotary_emb
from tools.sampling import pick_next


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Squares of half-precision values overflow, so at least float32 here.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self._norm(wide).type_as(x) * self.weight


class KVCache:
    """Keys and values of the positions already seen, (layer, B, position, K, D), unrepeated.

    Only causal attention has them to offer: there no later token changes an earlier state. Without
    a mask every new token changes all of them, so any other mode is refused with a ValueError.
    """

    def __init__(self, config: LlamaConfig, batch_size: int, capacity: int, like: torch.Tensor):
        if config.attention != "causal":
            raise ValueError(
                f"a KV cache needs attention='causal', not {config.attention!r}: "
                "without a mask each new token changes every earlier key and value"
            )
        shape = (config.n_layers, batch_size, capacity, config.n_kv_heads, config.head_dim)
        self.keys = torch.empty(shape, device=like.device, dtype=like.dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0  # positions seen by all layers; `Llama.forward` advances it

    def extend(
        self, layer_id: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores one layer's new (B, T, K, D) and returns all its (B, S, K, D) so far."""
        end = self.length + key.shape[1]
        if end > self.keys.shape[2]:
            raise ValueError(f"KV cache of {self.keys.shape[2]} positions cannot hold {end}")
        self.keys[layer_id, :, self.length : end] = key
        self.values[layer_id, :, self.length : end] = value
        return self.keys[layer_id, :, :end], self.values[layer_id, :, :end]

    def repeated(self, n: int) -> "KVCache":
        """A cache that holds every row n times, side by side: (layer, B n, position, K, D)."""
        cache = copy.copy(self)
        cache.keys = self.keys.repeat_interleave(n, dim=1)
        cache.values = self.values.repeat_interleave(n, dim=1)
        return cache


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K <= H key/value heads (arXiv 2305.13245)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads
        self.head_dim = config.head_dim
        self.max_seq_len = config.max_seq_len
        self.compute_query = Linear(config.dim, config.n_heads * self.head_dim)
        self.compute_key = Linear(config.dim, config.n_kv_heads * self.head_dim)
        self.compute_value = Linear(config.dim, config.n_kv_heads * self.head_dim)
        self.compute_output = Linear(config.n_heads * self.head_dim, config.dim)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def compute_query_key_value_scores(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """softmax(Q K^T / sqrt(D)) V (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

        query (B, H, T, D) holds the last T of the S positions of key and value (B, K, S, D), and
        its head h reads key/value head h // (H / K). key_mask (B, S) is True where a key may be
        read. Returns (B, H, T, D).
        """
        T, S = query.shape[-2], key.shape[-2]
        dropout_p = self.attn_dropout.p if self.training else 0.0
        causal = self.config.attention == "causal" and T > 1  # the last position reads all keys
        whole = causal and T == S and key_mask is None  # for this the fused kernels need no mask
        mask = None  # True where a query may read a key, broadcast to (B, H, T, S)
        if causal and not whole:
            mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)
        if key_mask is not None:
            readable = key_mask[:, None, None, :]  # (B, 1, 1, S)
            mask = readable if mask is None else mask & readable
        grouped = query.shape[1] != key.shape[1]
        if grouped and query.device.type != "cpu":  # elsewhere few fused kernels know groups
            n_rep = query.shape[1] // key.shape[1]
            key, value = repeat_heads(key, n_rep), repeat_heads(value, n_rep)
            grouped = False
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal=whole, enable_gqa=grouped
        )

    def forward(
        self,
        x: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
        layer_id: int = 0,
    ) -> torch.Tensor:
        """x (B, T, dim) -> (B, T, dim), before the residual.

        key_mask (B, S) is True where a key may be read. With a cache the S keys are those it holds
        for layer `layer_id` and these T, which it takes; without, S is T.
        """
        B, T, _ = x.shape
        query = self.compute_query(x).view(B, T, self.n_heads, self.head_dim)  # (B, T, H, D)
        key = self.compute_key(x).view(B, T, self.n_kv_heads, self.head_dim)  # (B, T, K, D)
        value = self.compute_value(x).view(B, T, self.n_kv_heads, self.head_dim)  # (B, T, K, D)

        start_pos = 0 if cache is None else cache.length
        query, key = apply_rotary_emb(
            query, key, self.head_dim, self.max_seq_len, start_pos=start_pos
        )
        if cache is not None:
            key, value = cache.extend(layer_id, key, value)  # (B, S, K, D)

        output = self.compute_query_key_value_scores(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), key_mask
        )  # (B, H, T, D)
        output = output.transpose(1, 2).reshape(B, T, -1)  # (B, T, dim)
        return self.resid_dropout(self.compute_output(output))


class _SiLUGate(torch.autograd.Function):
    """SiLU(gate) * up. Keeps these two alone for the gradient; autograd would keep SiLU(gate) too,
    one of the four tensors of a feed-forward layer's hidden size."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class FeedForward(nn.Module):
    """W2 (SiLU(W1 x) * W3 x), a gated layer without biases (Shazeer 2020, arXiv 2002.05202).

    Three matrices instead of two: `hidden_dim=None` takes 2/3 of the usual 4 dim, rounded up to
    `multiple_of`, so that the parameter count stays.
    """

    def __init__(self, dim: int, hidden_dim: int | None, multiple_of: int, dropout: float):
        super().__init__()
        if hidden_dim is None:
            hidden_dim = multiple_of * math.ceil(2 * 4 * dim // 3 / multiple_of)
        self.w1 = Linear(dim, hidden_dim)
        self.w2 = Linear(hidden_dim, dim)
        self.w3 = Linear(dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def SwiGLU(self, x: torch.Tensor) -> torch.Tensor:  # noqa: N802, the assignment's name
        return _SiLUGate.apply(self.w1(x), self.w3(x))  # (B, T, F)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.w2(self.SwiGLU(x)))


class LlamaLayer(nn.Module):
    """h = x + Attention(norm(x)); h + FeedForward(norm(h)): the stream itself is never normed."""

    def __init__(self, layer_id: int, config: LlamaConfig):
        super().__init__()
        self.layer_id = layer_id
        self.attention_norm = RMSNorm(config.dim, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(
            config.dim, config.hidden_dim, config.multiple_of, config.dropout
        )

    def forward(
        self,
        x: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        h = x + self.attention(self.attention_norm(x), key_mask, cache, self.layer_id)
        return h + self.feed_forward(self.ffn_norm(h))


class Llama(LlamaPreTrainedModel):
    """Token embedding, `n_layers` layers, a final norm, and the embedding again as output."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.params = config  # the assignment's name beside `config`
        output = Linear(config.dim, config.vocab_size)
        self.tok_embeddings = nn.Embedding.from_pretrained(output.weight, freeze=False)
        self.tok_embeddings.weight = output.weight  # tied (Press and Wolf, arXiv 1608.05859)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LlamaLayer(i, config) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, eps=config.layer_norm_eps)
        self.output = output
        self.init_weights()

    @classmethod
    def from_weights(cls, config: LlamaConfig, weights: dict[str, torch.Tensor]) -> "Llama":
        """A float32 model in eval mode with exactly these weights, in their memory, not a copy.

        `output.weight` may be absent or equal to the embedding (tied), or differ (then untied).
        ValueError lists every missing, unexpected and misshapen tensor, or those that hold numbers
        which are none.
        """
        if config.n_layers > len(weights) // 9 + 100:  # too many to build for a list of the missing
            raise ValueError(f"n_layers={config.n_layers} but only {len(weights)} tensors")
        weights = dict(weights)
        if "tok_embeddings.weight" in weights:
            weights.setdefault("output.weight", weights["tok_embeddings.weight"])
        with torch.device("meta"):  # a shape without memory, and without drawing initial weights
            model = cls(config)
        require_exactly(model, weights)
        weights = {name: tensor.float() for name, tensor in weights.items()}
        tied = torch.equal(weights["output.weight"], weights["tok_embeddings.weight"])
        if tied:  # looked through once, and one memory
            del weights["output.weight"]
        require_finite(weights)
        weights = _unshared(weights)
        weights.setdefault("output.weight", weights["tok_embeddings.weight"])
        model.load_state_dict(weights, assign=True)
        if tied:
            model.tok_embeddings.weight = model.output.weight
        return model.eval()

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens (B, T) -> logits, hidden states (B, T, dim) after the final norm.

        logits are (B, T, V) if `targets` is given (its values are not read), else those of the last
        position alone, (B, 1, V), which with `lengths` is each row's last real one. `lengths` and
        `cache` are those of `hidden_states`.
        """
        h = self.hidden_states(tokens, lengths, cache)
        if targets is not None:
            return self.output(h), h
        return self.output(h[:, [-1]] if lengths is None else last_real(h, lengths)), h

    def hidden_states(
        self,
        tokens: torch.Tensor,
        lengths: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """tokens (B, T) -> (B, T, dim) after the final norm: `forward` without logits.

        `lengths` (B,) counts the real tokens of right-padded rows: keys beyond them are masked, so
        that padding changes no real state. Without it every token is real, pads included, which is
        what the assignment computes.

        `cache` holds the positions before these tokens and takes these tokens too.
        """
        B, T = tokens.shape
        key_mask = None
        if lengths is not None:
            if cache is not None:
                raise ValueError("lengths and cache exclude each other: a cache holds no padding")
            if lengths.shape != (B,) or lengths.min() < 1 or lengths.max() > T:
                raise ValueError(f"lengths {lengths.tolist()} are not {B} numbers in 1..{T}")
            if self.config.attention == "full":  # a causal row's real tokens never see its pads
                key_mask = torch.arange(T, device=tokens.device) < lengths[:, None]  # (B, T)

        h = self.dropout(self.tok_embeddings(tokens))  # (B, T, dim)
        for layer in self.layers:
            h = layer(h, key_mask, cache)
        if cache is not None:
            cache.length += T
        return self.norm(h)

    def generate(
        self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0
    ) -> torch.Tensor:
        """Appends `max_new_tokens` to every row of idx (B, T) and returns (B, T + max_new_tokens).

        Temperature 0 takes the likeliest token, any other samples by `sampling.pick_next` from
        PyTorch's global generator. Call `eval()` first.
        """
        if not temperature >= 0.0:
            raise ValueError(f"temperature={temperature} is negative")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens} is negative")
        if idx.ndim != 2 or idx.shape[1] == 0:
            raise ValueError(f"idx {tuple(idx.shape)} is not (B, T) with at least one token")
        pick = partial(pick_next, temperature=temperature)
        return torch.cat((idx, *self.next_tokens(idx, max_new_tokens, pick)), dim=1)

    @torch.inference_mode()
    def next_tokens(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        pick: Callable[[torch.Tensor], torch.Tensor],
        num_samples: int = 1,
    ) -> Iterator[torch.Tensor]:
        """Continues every row of idx (B, T) `num_samples` times, a token at a time.

        Yields (B * num_samples, 1), a row's samples side by side: `pick` of logits (B *
        num_samples, V). The model reads the last `max_seq_len` tokens. With causal attention it
        keeps a `KVCache`, which the samples of a row begin with in common, until the window is full
        and begins to slide: then, as in full mode always, every step reads the whole window again.
        """
        window = self.config.max_seq_len
        cache = None
        if self.config.attention == "causal":
            capacity = min(window, idx.shape[1] + max_new_tokens)
            cache = KVCache(self.config, len(idx), capacity, like=self.norm.weight)
        for step in range(max_new_tokens):
            if cache is not None and idx.shape[1] <= window:
                logits, _ = self(idx[:, cache.length :], cache=cache)
            else:
                logits, _ = self(idx[:, -window:])
            if step == 0 and num_samples > 1:
                logits = logits.repeat_interleave(num_samples, dim=0)
                idx = idx.repeat_interleave(num_samples, dim=0)
                cache = cache and cache.repeated(num_samples)
            following = pick(logits[:, -1])
            yield following
            idx = torch.cat((idx, following), dim=1)


def _unshared(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights; what overlaps itself or another one is copied, so that an optimizer steps
    every number once."""
    own, end = {}, 0  # of the memory that is taken
    for name, tensor in sorted(weights.items(), key=lambda item: item[1].data_ptr()):
        if tensor.is_contiguous() and tensor.data_ptr() >= end:
            own[name], end = tensor, tensor.data_ptr() + tensor.nbytes
        else:
            own[name] = tensor.clone(memory_format=torch.contiguous_format)
    return own


def repeat_heads(states: torch.Tensor, n_rep: int) -> torch.Tensor:
    """(B, K, S, D) -> (B, K * n_rep, S, D), whose head h is a copy of head h // n_rep."""
    return states.repeat_interleave(n_rep, dim=1)


def last_real(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Picks each row's last real position: (B, T, dim), (B,) -> (B, 1, dim)."""
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, lengths - 1].unsqueeze(1)


def require_exactly(module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Raises one ValueError that lists every missing, unexpected and misshapen tensor."""
    wanted = module.state_dict()
    faults = {
        "missing": [name for name in wanted if name not in weights],
        "unexpected": [name for name in weights if name not in wanted],
        "misshapen": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(wanted[name].shape)}"
            for name in wanted
            if name in weights and weights[name].shape != wanted[name].shape
        ],
    }
    if any(faults.values()):
        raise ValueError(
            "; ".join(f"{kind}: {listed(names)}" for kind, names in faults.items() if names)
        )


def load_pretrained(
    checkpoint: str | os.PathLike, attention: str | None = None, dropout: float | None = None
) -> Llama:
    """Reads a checkpoint (see `checkpoint.read_checkpoint`) into a float32 model in eval mode.

    `attention=None` takes the mode that the checkpoint records in `model_args`, else "full", as the
    assignment computes; `dropout=None` the recorded probability of dropout inside the layers, else
    0. Raises ValueError, naming the file, for whatever is wrong with it.
    """
    model_args, weights = read_checkpoint(checkpoint)
    given = {"attention": attention, "dropout": dropout}
    model_args |= {key: value for key, value in given.items() if value is not None}
    if any(name.startswith("llama.") for name in weights):
        raise ValueError(
            f"{checkpoint}: is a finetuned classifier, not a pretrained Llama; --option predict "
            "--checkpoint reads it, and tools.export its Llama"
        )
    try:
        return Llama.from_weights(LlamaConfig(**model_args), weights)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from error
