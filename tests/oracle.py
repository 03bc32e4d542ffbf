"""The whole model in float64 NumPy, written from the papers and not from llama.py.

PYTHONPATH=. python tests/oracle.py data/mini/model.pt data/mini/sanity_check.data
"""

import sys

import numpy as np
import torch

from config import ATTENTION_MODES, LlamaConfig
from formats.checkpoint import read_checkpoint
from formats.torch_file import save_torch_file
from sanity_check import TOKEN_IDS


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def rotate(x: np.ndarray, theta: float = 10000.0) -> np.ndarray:
    """x (B, T, heads, D): consecutive pairs as complex numbers, times exp(i position angle)."""
    T, D = x.shape[1], x.shape[3]
    angle = np.arange(T)[:, None] * theta ** (-np.arange(0, D, 2) / D)  # (T, D/2)
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[None, :, None, :]
    out = np.empty_like(x)
    out[..., 0::2], out[..., 1::2] = z.real, z.imag
    return out


def attention(x, w, prefix, config, allowed):
    """allowed (B, T, T) says which query (row) may read which key (column)."""
    B, T, dim = x.shape
    H, K, D = config.n_heads, config.n_kv_heads, dim // config.n_heads
    q = rotate((x @ w[f"{prefix}.compute_query.weight"].T).reshape(B, T, H, D))
    k = rotate((x @ w[f"{prefix}.compute_key.weight"].T).reshape(B, T, K, D))
    v = (x @ w[f"{prefix}.compute_value.weight"].T).reshape(B, T, K, D)
    out = np.empty((B, T, H, D))
    for h in range(H):
        group = h * K // H
        scores = np.einsum("btd,bsd->bts", q[:, :, h], k[:, :, group]) / np.sqrt(D)
        scores = np.where(allowed, scores, -np.inf)
        out[:, :, h] = softmax(scores) @ v[:, :, group]
    return out.reshape(B, T, dim) @ w[f"{prefix}.compute_output.weight"].T


def forward(weights, config, tokens, lengths=None):
    """weights: name -> tensor. Returns float64 logits (B, T, V) and hidden states (B, T, dim)."""
    w = {name: tensor.detach().double().numpy() for name, tensor in weights.items()}
    tokens = np.asarray(tokens)
    B, T = tokens.shape
    allowed = np.ones((B, T, T), dtype=bool)
    if config.attention == "causal":
        allowed &= np.tril(np.ones((T, T), dtype=bool))
    elif lengths is not None:
        allowed &= (np.arange(T) < np.asarray(lengths)[:, None])[:, None, :]
    h = w["tok_embeddings.weight"][tokens]
    for i in range(config.n_layers):
        p, eps = f"layers.{i}", config.layer_norm_eps
        normed = rms_norm(h, w[f"{p}.attention_norm.weight"], eps)
        h = h + attention(normed, w, f"{p}.attention", config, allowed)
        normed = rms_norm(h, w[f"{p}.ffn_norm.weight"], eps)
        gate = normed @ w[f"{p}.feed_forward.w1.weight"].T
        up = normed @ w[f"{p}.feed_forward.w3.weight"].T
        h = h + (gate / (1 + np.exp(-gate)) * up) @ w[f"{p}.feed_forward.w2.weight"].T
    h = rms_norm(h, w["norm.weight"], config.layer_norm_eps)
    return h @ w["output.weight"].T, h


def main(checkpoint: str, reference: str) -> None:
    """Write the outputs for fixed tokens, in both attention modes, for sanity_check.py."""
    config, weights = read_checkpoint(checkpoint)
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    token_ids = torch.tensor(TOKEN_IDS) % config["vocab_size"]
    content = {"token_ids": token_ids}
    for mode in ATTENTION_MODES:
        logits, hidden = forward(weights, LlamaConfig(**{**config, "attention": mode}), token_ids)
        content[mode] = {
            "logits": torch.tensor(logits[:, -1:]).float(),
            "hidden_states": torch.tensor(hidden).float(),
        }
    save_torch_file(reference, content)


if __name__ == "__main__":
    main(*sys.argv[1:])
