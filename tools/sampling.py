"""Sample the next token from the likeliest ones: top-k and top-p."""

import torch
import torch.nn.functional as F

from llama import sample

ROUNDING = 1e-6  # of float32 probabilities and their sums, relative to top_p


def pick_next(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """Return `llama.sample` of the tokens that `keep_likeliest` keeps: (B, V) -> (B, 1)."""
    if temperature > 0:
        logits = keep_likeliest(logits, temperature, top_k, top_p)
    return sample(logits, temperature)


def keep_likeliest(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> torch.Tensor:
    """Set the logits of all other tokens to -inf: (B, V) -> (B, V).

    `top_k` keeps the k likeliest tokens and ties with the last of them (Fan et al. 2018,
    arXiv 1805.04833, section 5.1). Of these, `top_p` keeps the smallest set of likeliest tokens
    whose softmax(logits / temperature) sums to at least p (Holtzman et al. 2020,
    arXiv 1904.09751, section 3.1).
    """
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        by_rank, order = logits.sort(dim=-1, descending=True, stable=True)
        scaled = (by_rank - by_rank[:, :1]) / min(max(temperature, 1e-6), 1e30)
        sums = F.softmax(scaled, dim=-1).cumsum(dim=-1)
        sum_before = F.pad(sums[:, :-1], (1, 0), value=-1.0)  # of the likelier tokens; -1: kept
        by_rank = by_rank.masked_fill(sum_before >= top_p * (1 - ROUNDING), -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, order, by_rank)
    return logits
