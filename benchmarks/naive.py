"""Solve the assignment plainly, as the measuring stick of `benchmarks.run`; not a model to use.

Every formula is written out where it is needed:

- attention is two products around a softmax, with a new rotary table in each layer;
- keys and values are always repeated, and each new token computes the whole sequence again;
- AdamW goes tensor by tensor, with a new tensor for each operation;
- evaluation keeps the graph.

The model loads the state dict of ours and computes the same (tests/benchmarks/test_naive.py).

Shapes: B batch, T sequence, H query heads, K key/value heads, D head size, F feed-forward size.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from config import LlamaConfig

Batch = dict[str, torch.Tensor]


class NaiveRMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return x / norm * self.weight


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Turn the pairs of x (B, T, heads, D) by their positions."""
    T, D = x.shape[1], x.shape[3]
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, D, 2).float() / D)  # (D/2,)
    angles = torch.outer(torch.arange(T).float(), frequencies)  # (T, D/2)
    cos, sin = angles.cos()[None, :, None, :], angles.sin()[None, :, None, :]
    real, imag = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)  # (B, T, heads, D/2)
    turned = torch.stack((real * cos - imag * sin, real * sin + imag * cos), dim=-1)
    return turned.reshape(x.shape)


class NaiveAttention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(config.dropout)
        dim, kv_dim = config.dim, config.n_kv_heads * config.head_dim
        self.compute_query = nn.Linear(dim, dim, bias=False)
        self.compute_key = nn.Linear(dim, kv_dim, bias=False)
        self.compute_value = nn.Linear(dim, kv_dim, bias=False)
        self.compute_output = nn.Linear(dim, dim, bias=False)

    def forward(self, x: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """allowed (B, 1, T, T): whether a query (row) may read a key (column); None: always."""
        config, (B, T, _) = self.config, x.shape
        query = rotate(self.compute_query(x).view(B, T, config.n_heads, config.head_dim))
        key = rotate(self.compute_key(x).view(B, T, config.n_kv_heads, config.head_dim))
        value = self.compute_value(x).view(B, T, config.n_kv_heads, config.head_dim)
        n_rep = config.n_heads // config.n_kv_heads
        key = torch.repeat_interleave(key, n_rep, dim=2)  # (B, T, H, D)
        value = torch.repeat_interleave(value, n_rep, dim=2)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

        scores = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(config.head_dim)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        weights = self.dropout(F.softmax(scores, dim=-1))  # (B, H, T, T)
        output = torch.matmul(weights, value)  # (B, H, T, D)
        output = output.transpose(1, 2).contiguous().view(B, T, config.dim)
        return self.dropout(self.compute_output(output))


class NaiveFeedForward(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        hidden_dim = config.hidden_dim
        if hidden_dim is None:
            hidden_dim = config.multiple_of * math.ceil(
                2 * 4 * config.dim // 3 / config.multiple_of
            )
        self.w1 = nn.Linear(config.dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, hidden_dim, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class NaiveLayer(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm = NaiveRMSNorm(config.dim, config.layer_norm_eps)
        self.attention = NaiveAttention(config)
        self.ffn_norm = NaiveRMSNorm(config.dim, config.layer_norm_eps)
        self.feed_forward = NaiveFeedForward(config)

    def forward(self, x: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        h = x + self.attention(self.attention_norm(x), allowed)
        return h + self.feed_forward(self.ffn_norm(h))


class NaiveLlama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(NaiveLayer(config) for _ in range(config.n_layers))
        self.norm = NaiveRMSNorm(config.dim, config.layer_norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tok_embeddings.weight = self.output.weight
        for parameter in self.parameters():  # as the assignment's base class does before loading
            if parameter.ndim == 2:
                nn.init.normal_(parameter, mean=0.0, std=0.02)

    def forward(
        self, tokens: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens (B, T) -> logits of the last token (B, 1, V), hidden states (B, T, dim)

        `lengths` are for causal mode, in which no real token reads the padding behind it.
        """
        h = self.dropout(self.tok_embeddings(tokens))
        allowed = None
        if self.config.attention == "causal":
            B, T = tokens.shape
            allowed = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T)
        for layer in self.layers:
            h = layer(h, allowed)
        h = self.norm(h)
        last = h[:, [-1], :]
        if lengths is not None:
            last = torch.stack([row[n - 1 : n] for row, n in zip(h, lengths, strict=True)])
        return self.output(last), h

    @torch.no_grad()
    def generate(
        self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0
    ) -> torch.Tensor:
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.max_seq_len :])
            logits = logits[:, -1, :]
            if temperature == 0.0:
                next_token = logits.argmax(dim=-1, keepdim=True)
            else:
                next_token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
            idx = torch.cat((idx, next_token), dim=1)
        return idx


class NaiveClassifier(nn.Module):
    """Classify by the last column in full mode, by each row's last real token in causal mode."""

    def __init__(self, llama: NaiveLlama, n_labels: int, dropout: float):
        super().__init__()
        self.llama = llama
        self.dropout = nn.Dropout(dropout)
        self.classifier_head = nn.Linear(llama.config.dim, n_labels)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        if self.llama.config.attention == "full":
            _, hidden = self.llama(tokens)
            pooled = hidden[:, -1]
        else:
            _, hidden = self.llama(tokens, lengths)
            pooled = torch.stack([row[n - 1] for row, n in zip(hidden, lengths, strict=True)])
        return F.log_softmax(self.classifier_head(self.dropout(pooled)), dim=-1)


class NaiveZeroShot(nn.Module):
    """Return log p of labels of one token each."""

    def __init__(self, llama: NaiveLlama, label_ids: list[int]):
        super().__init__()
        self.llama = llama.requires_grad_(False)
        self.label_ids = label_ids

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        logits, _ = self.llama(tokens, lengths)
        log_probs = F.log_softmax(logits, dim=-1)  # (B, 1, V)
        return torch.stack([log_probs[:, -1, i] for i in self.label_ids], dim=1)


class NaiveAdamW(torch.optim.Optimizer):
    """The equations of `optimizer.AdamW`, one operation after the other."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "decay": weight_decay})

    def step(self) -> None:
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad, state = p.grad.data, self.state[p]
                if not state:
                    state["t"] = 0
                    state["m"], state["v"] = torch.zeros_like(p.data), torch.zeros_like(p.data)
                state["t"] += 1
                state["m"] = beta1 * state["m"] + (1 - beta1) * grad
                state["v"] = beta2 * state["v"] + (1 - beta2) * grad**2
                alpha = lr * math.sqrt(1 - beta2 ** state["t"]) / (1 - beta1 ** state["t"])
                update = state["m"] / (torch.sqrt(state["v"]) + group["eps"])
                p.data = p.data - alpha * (update + group["decay"] * p.data)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch], batch_size: int
) -> list[float]:
    """Take a step for each batch; return their losses (summed NLL / batch size)."""
    model.train()
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        log_probs = model(batch["token_ids"], batch["lengths"])
        loss = F.nll_loss(log_probs, batch["labels"].view(-1), reduction="sum") / batch_size
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def evaluate(model: nn.Module, batches: list[Batch]) -> list[int]:
    """Predict every batch; as in the assignment, autograd keeps a graph."""
    model.eval()
    predictions = []
    for batch in batches:
        predictions += model(batch["token_ids"], batch["lengths"]).detach().argmax(dim=1).tolist()
    return predictions
