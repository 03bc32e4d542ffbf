"""Llama 2 (Touvron et al. 2023, arXiv 2307.09288): RMSNorm, grouped-query attention, SwiGLU.

Llama 2 is causal. The default here is attention="full", because the assignment's reference has no
mask; attention="causal" is right for published checkpoints. Read `Linear` as nn.Linear without a
bias; fast/linear.py only makes it faster on CPUs.

Shapes: B batch, T sequence, H query heads, K key/value heads, D head size (dim = H * D), F
feed-forward hidden size, V vocabulary. `F.` in the code is torch.nn.functional.
"""

import math
import os
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from base_llama import LlamaPreTrainedModel
from config import LlamaConfig
from fast.decode import next_tokens
from fast.int8 import quantize_model, require_known
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
        self.attn_dropout = nn.Dropout(config.dropout)  # F.scaled_dot_product_attention applies it
        self.resid_dropout = nn.Dropout(config.dropout)

    def compute_query_key_value_scores(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return softmax(Q K^T / sqrt(D)) V (Vaswani et al. 2017, arXiv 1706.03762, eq. 1), in one
        call of PyTorch; benchmarks/naive.py writes it out.

        query (B, H, T, D), key and value (B, K, T, D); query head h reads key/value head
        h // (H / K). key_mask (B, T), for full mode, is True where a key may be read. Returns
        (B, H, T, D).
        """
        mask = None if key_mask is None else key_mask[:, None, None, :]  # (B, 1, 1, T)
        return F.scaled_dot_product_attention(
            query,
            repeat_heads(key, self.n_heads // self.n_kv_heads),
            repeat_heads(value, self.n_heads // self.n_kv_heads),
            attn_mask=mask,
            is_causal=self.is_causal,
            dropout_p=self.attn_dropout.p if self.training else 0.0,
        )

    def forward(self, x: torch.Tensor, key_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return attention's output (B, T, dim) for x (B, T, dim), before the residual addition."""
        B, T, _ = x.shape
        query = self.compute_query(x).view(B, T, self.n_heads, self.head_dim)  # (B, T, H, D)
        key = self.compute_key(x).view(B, T, self.n_kv_heads, self.head_dim)  # (B, T, K, D)
        value = self.compute_value(x).view(B, T, self.n_kv_heads, self.head_dim)  # (B, T, K, D)

        query, key = apply_rotary_emb(query, key, self.head_dim, self.max_seq_len)
        output = self.compute_query_key_value_scores(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), key_mask
        )  # (B, H, T, D)
        output = output.transpose(1, 2).reshape(B, T, -1)  # (B, T, dim)
        return self.resid_dropout(self.compute_output(output))


class FeedForward(nn.Module):
    """W2 (SiLU(W1 x) * W3 x), a gated layer without biases (Shazeer 2020, arXiv 2002.05202).

    It has three matrices instead of two, so `hidden_dim=None` takes 2/3 of the usual 4 dim, rounded
    up to `multiple_of`: the number of parameters stays about the same.
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
    """h = x + Attention(norm(x)); h + FeedForward(norm(h)). No layer norms the sum itself."""

    def __init__(self, layer_id: int, config: LlamaConfig):
        super().__init__()
        self.layer_id = layer_id
        self.attention_norm = RMSNorm(config.dim, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(
            config.dim, config.hidden_dim, config.multiple_of, config.dropout
        )

    def forward(self, x: torch.Tensor, key_mask: torch.Tensor | None = None) -> torch.Tensor:
        h = x + self.attention(self.attention_norm(x), key_mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Llama(LlamaPreTrainedModel):
    """Token embedding, `n_layers` layers, a final norm, and the embedding again as output."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.params = config  # the assignment's name beside `config`
        output = Linear(config.dim, config.vocab_size)
        # from_pretrained skips nn.Embedding's initialization, which imports torch._dynamo on the
        # meta device. It wraps the weight in a new Parameter, so tie it again.
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
        if "tok_embeddings.weight" in weights:
            weights = {"output.weight": weights["tok_embeddings.weight"], **weights}
        with torch.device("meta"):  # shapes without memory
            model = cls(config)
        load_exactly(model, weights)
        if torch.equal(model.output.weight, model.tok_embeddings.weight):
            model.output.weight = model.tok_embeddings.weight
        return model.eval()

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and final hidden states (B, T, dim) of tokens (B, T).

        The logits are (B, 1, V), those of the last position, or of each row's last real token if
        `lengths` is given. Any tensor as `targets` asks for the logits of every position (B, T, V),
        as in the assignment; its values are ignored, and the loss is computed outside.
        """
        h = self.hidden_states(tokens, lengths)
        if targets is not None:
            return self.output(h), h
        return self.output(h[:, [-1]] if lengths is None else last_token(h, lengths)), h

    def hidden_states(
        self, tokens: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the hidden states of tokens (B, T) after the final norm, (B, T, dim).

        `lengths` (B,) counts the real tokens of right-padded rows: padding is masked and changes no
        real token's state. Without lengths every token is real, as in the assignment.
        """
        B, T = tokens.shape
        key_mask = None
        if lengths is not None:
            if lengths.shape != (B,) or lengths.min() < 1 or lengths.max() > T:
                raise InputError(f"lengths {lengths.tolist()} are not {B} numbers in 1..{T}")
            if self.config.attention == "full":  # in causal mode no real token reads a later pad
                key_mask = padding_mask(lengths, T)  # (B, T)

        h = self.dropout(self.tok_embeddings(tokens))  # (B, T, dim)
        for layer in self.layers:
            h = layer(h, key_mask)
        return self.norm(h)

    @torch.no_grad()
    def generate(
        self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0
    ) -> torch.Tensor:
        """Append `max_new_tokens` to each row of idx (B, T) and return (B, T + max_new_tokens).

        The model reads the last `max_seq_len` tokens. Temperature 0 takes the likeliest token, any
        other draws from PyTorch's global generator. Call `eval()` first.
        """
        if not temperature >= 0.0:
            raise InputError(f"temperature={temperature} is not a number of at least 0")
        if idx.shape[1] == 0:
            raise InputError("the prompt has no token; begin it with bos")
        if self.config.attention == "causal":  # earlier states never change, so a cache keeps them
            pick = partial(sample, temperature=temperature)
            return torch.cat((idx, *next_tokens(self, idx, max_new_tokens, pick)), dim=1)
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.max_seq_len :])  # (B, 1, V)
            idx = torch.cat((idx, sample(logits[:, -1], temperature)), dim=1)
        return idx


def sample(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Draw a token for each row of logits (B, V) from softmax(logits / temperature), (B, 1).

    Temperature 0 takes the likeliest. Raises InputError if a row's largest logit is not finite.
    """
    largest, likeliest = logits.max(dim=-1, keepdim=True)
    if not largest.isfinite().all():
        raise InputError("the model's logits are not finite: its weights are damaged or diverged")
    if temperature < torch.finfo(logits.dtype).tiny:  # 0, or what a division rounds to 0
        return likeliest
    temperature = min(temperature, torch.finfo(logits.dtype).max)  # -inf / inf would be NaN
    probs = F.softmax((logits - largest) / temperature, dim=-1)
    return torch.multinomial(probs, num_samples=1)


def repeat_heads(states: torch.Tensor, n_rep: int) -> torch.Tensor:
    """Repeat each key/value head `n_rep` times: (B, K, T, D) -> (B, K * n_rep, T, D)."""
    return states if n_rep == 1 else states.repeat_interleave(n_rep, dim=1)


def padding_mask(lengths: torch.Tensor, T: int) -> torch.Tensor:
    """Return True at the real tokens of rows with these lengths (B,), (B, T)."""
    return torch.arange(T, device=lengths.device) < lengths[:, None]


def last_token(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return each row's last real position: (B, T, dim), (B,) -> (B, 1, dim)."""
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, lengths - 1].unsqueeze(1)


def load_pretrained(
    checkpoint: str | os.PathLike,
    attention: str | None = None,
    dropout: float | None = None,
    quantize: str | None = None,
    device: torch.device | str = "cpu",
) -> Llama:
    """Read a checkpoint (see formats/checkpoint.py) into a float32 model in eval mode on `device`.

    `attention=None` takes the mode that the checkpoint records, else "full", the assignment's;
    `dropout=None` takes the recorded dropout of the embedding and the layers, else 0.
    `quantize="int8"` stores the matrices as int8, for inference alone. Raises InputError with the
    file's name.
    """
    require_known(quantize)
    model_args, weights = read_checkpoint(checkpoint)
    given = {"attention": attention, "dropout": dropout}
    model_args |= {key: value for key, value in given.items() if value is not None}
    try:
        model = Llama.from_weights(LlamaConfig(**model_args), weights)
    except InputError as error:
        raise InputError(f"{checkpoint}: {error}") from error
    model.to(device)
    if quantize:  # on its device: a move would copy what tied matrices share
        quantize_model(model)
    return model
