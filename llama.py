"""Llama 2 (Touvron et al. 2023, arXiv 2307.09288): RMSNorm, grouped-query attention, SwiGLU.

Shapes: B batch, T sequence, S keys in reach (T plus the positions in a cache), H query heads,
K key/value heads, D head size (dim = H * D), F feed-forward hidden size, V vocabulary.
"""

import math
import os
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from base_llama import LlamaPreTrainedModel
from config import LlamaConfig
from fast.decode import KVCache, next_tokens
from fast.linear import Linear
from formats.checkpoint import load_exactly, read_checkpoint
from rope import apply_rotary_emb
from utils import InputError


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The square of a half-precision number overflows early, so compute in float32 at least.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self._norm(wide).type_as(x) * self.weight


class Attention(nn.Module):
    """Grouped-query attention: H query heads share K <= H key/value heads (arXiv 2305.13245)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.is_causal = config.attention == "causal"
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
        """Return softmax(Q K^T / sqrt(D)) V (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

        query (B, H, T, D) holds the last T of the S positions of key and value (B, K, S, D); query
        head h reads key/value head h // (H / K). key_mask (B, S) is True where a key may be read.
        Returns (B, H, T, D).
        """
        T, S = query.shape[-2], key.shape[-2]
        is_plain = self.is_causal and T == S and key_mask is None  # fused kernels know this mask
        mask = None  # True where a query may read a key, broadcast to (B, H, T, S)
        if self.is_causal and not is_plain and T > 1:  # a single query reads every key
            mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)
        if key_mask is not None:
            keys = key_mask[:, None, None, :]  # (B, 1, 1, S)
            mask = keys if mask is None else mask & keys
        return F.scaled_dot_product_attention(
            query,
            repeat_heads(key, self.n_heads // self.n_kv_heads),
            repeat_heads(value, self.n_heads // self.n_kv_heads),
            attn_mask=mask,
            is_causal=is_plain,
            dropout_p=self.attn_dropout.p if self.training else 0.0,
        )

    def forward(
        self,
        x: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
        layer_id: int = 0,
    ) -> torch.Tensor:
        """x (B, T, dim) -> (B, T, dim), before the residual addition.

        With a cache the S keys are those it holds for layer `layer_id` and these T, which it
        stores; without one S is T.
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


class FeedForward(nn.Module):
    """W2 (SiLU(W1 x) * W3 x), a gated layer without biases (Shazeer 2020, arXiv 2002.05202).

    It has three matrices instead of two, so `hidden_dim=None` takes 2/3 of the usual 4 dim, rounded
    up to `multiple_of`: the number of parameters stays the same.
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
        return F.silu(self.w1(x)) * self.w3(x)  # (B, T, F)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.w2(self.SwiGLU(x)))


class LlamaLayer(nn.Module):
    """h = x + Attention(norm(x)); h + FeedForward(norm(h)). The residual stream is never normed."""

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
        # nn.Embedding(V, dim) would import PyTorch's compiler to draw weights on the meta device.
        self.tok_embeddings = nn.Embedding.from_pretrained(output.weight, freeze=False)
        self.tok_embeddings.weight = output.weight  # tied (Press and Wolf, arXiv 1608.05859)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LlamaLayer(i, config) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, eps=config.layer_norm_eps)
        self.output = output
        self.init_weights()

    @classmethod
    def from_weights(cls, config: LlamaConfig, weights: dict[str, torch.Tensor]) -> "Llama":
        """Return a model in eval mode with exactly these weights.

        `output.weight` may be absent or equal to the embedding (tied), or differ (untied). Raises
        InputError that lists every missing, unexpected, misshapen and non-finite tensor.
        """
        if config.n_layers > len(weights):  # too many layers to build only to list their names
            raise InputError(
                f"n_layers={config.n_layers}, but there are only {len(weights)} tensors"
            )
        with torch.device("meta"):  # shapes without memory
            model = cls(config)
        load_exactly(model, weights)
        return model.eval()

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens (B, T) -> logits, hidden states (B, T, dim) after the final norm.

        logits are (B, T, V) if `targets` is given (its values are not read); else (B, 1, V), those
        of the last position, which with `lengths` is each row's last real token.
        """
        h = self.hidden_states(tokens, lengths, cache)
        if targets is not None:
            return self.output(h), h
        return self.output(h[:, [-1]] if lengths is None else last_token(h, lengths)), h

    def hidden_states(
        self,
        tokens: torch.Tensor,
        lengths: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """tokens (B, T) -> (B, T, dim) after the final norm: `forward` without the logits.

        `lengths` (B,) counts the real tokens of right-padded rows: padding is masked and changes no
        real token's state. Without lengths every token is real, as in the assignment. `cache` holds
        the positions before these tokens and stores these tokens, too.
        """
        B, T = tokens.shape
        key_mask = None
        if lengths is not None:
            if cache is not None:
                raise InputError("pass lengths or a cache, not both: a cache holds no padding")
            if lengths.shape != (B,) or lengths.min() < 1 or lengths.max() > T:
                raise InputError(f"lengths {lengths.tolist()} are not {B} numbers in 1..{T}")
            if self.config.attention == "full":  # in causal mode no real token reads a later pad
                key_mask = torch.arange(T, device=tokens.device) < lengths[:, None]  # (B, T)

        h = self.dropout(self.tok_embeddings(tokens))  # (B, T, dim)
        for layer in self.layers:
            h = layer(h, key_mask, cache)
        if cache is not None:
            cache.length += T
        return self.norm(h)

    @torch.no_grad()
    def generate(
        self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0
    ) -> torch.Tensor:
        """Append `max_new_tokens` to each row of idx (B, T) and return (B, T + max_new_tokens).

        The model reads the last `max_seq_len` tokens. Temperature 0 takes the likeliest token, any
        other draws from PyTorch's global generator. Call `eval()` first.
        """
        if not temperature >= 0.0 or max_new_tokens < 0:
            raise InputError(f"temperature={temperature} or {max_new_tokens=} is below 0")
        if self.config.attention == "causal":  # earlier states never change, so a cache keeps them
            pick = partial(sample, temperature=temperature)
            return torch.cat((idx, *next_tokens(self, idx, max_new_tokens, pick)), dim=1)
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.max_seq_len :])  # (B, 1, V)
            idx = torch.cat((idx, sample(logits[:, -1], temperature)), dim=1)
        return idx


def sample(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """logits (B, V) -> tokens (B, 1): the likeliest, or a draw from softmax(logits / temperature).

    Raises InputError if the largest logit of a row is not finite.
    """
    largest, likeliest = logits.max(dim=-1, keepdim=True)
    if not largest.isfinite().all():
        raise InputError("the model's logits are not finite: its weights are damaged or diverged")
    if temperature < torch.finfo(logits.dtype).tiny:  # 0, or what a division rounds to 0
        return likeliest
    probs = F.softmax((logits - largest) / temperature, dim=-1)  # at most 0: no overflow
    return torch.multinomial(probs, num_samples=1)


def repeat_heads(states: torch.Tensor, n_rep: int) -> torch.Tensor:
    """(B, K, S, D) -> (B, K * n_rep, S, D), whose head h is head h // n_rep of `states`."""
    return states if n_rep == 1 else states.repeat_interleave(n_rep, dim=1)


def last_token(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return each row's last real position: (B, T, dim), (B,) -> (B, 1, dim)."""
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, lengths - 1].unsqueeze(1)


def load_pretrained(
    checkpoint: str | os.PathLike, attention: str | None = None, dropout: float | None = None
) -> Llama:
    """Read a checkpoint (see formats/checkpoint.py) into a float32 model in eval mode.

    `attention=None` takes the mode that the checkpoint records, else "full", the assignment's;
    `dropout=None` takes the recorded dropout inside the layers, else 0. Raises InputError with the
    file's name.
    """
    model_args, weights = read_checkpoint(checkpoint)
    given = {"attention": attention, "dropout": dropout}
    model_args |= {key: value for key, value in given.items() if value is not None}
    try:
        return Llama.from_weights(LlamaConfig(**model_args), weights)
    except InputError as error:
        raise InputError(f"{checkpoint}: {error}") from error
