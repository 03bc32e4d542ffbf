"""From logits to the next token: greedy, by temperature, or among the likeliest alone."""

import torch
import torch.nn.functional as F


def pick_next(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """(B, V) -> (B, 1): the likeliest token at temperature 0, else a sample.

    The sample is of softmax(logits / temperature), cut to what `keep_likeliest` keeps of it.
    ValueError where the largest logit of a row is no finite number.
    """
    largest, likeliest = logits.max(dim=-1, keepdim=True)
    if not largest.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are damaged, or diverged")
    if temperature < torch.finfo(logits.dtype).tiny:  # 0, or what would be rounded to 0
        return likeliest
    logits = (logits - largest) / temperature  # a tiny temperature must not overflow
    probs = F.softmax(keep_likeliest(logits, top_k, top_p), dim=-1)
    return torch.multinomial(probs, num_samples=1)


def keep_likeliest(logits: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """(B, V) -> (B, V) with -inf for the tokens that are left out.

    `top_k` keeps the k likeliest (Fan et al. 2018, arXiv 1805.04833, section 5.1), and all that are
    as likely as the last of them; of those `top_p` keeps the fewest, from the likeliest on, whose
    probabilities sum to at least p (Holtzman et al. 2020, arXiv 1904.09751, section 3.1).
    """
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:  # 1 is all, whatever a sum of float32 comes to
        by_rank, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = F.softmax(by_rank, dim=-1)
        before = probs.cumsum(dim=-1) - probs  # what the likelier ones sum to
        by_rank = by_rank.masked_fill(before >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, order, by_rank)
    return logits
