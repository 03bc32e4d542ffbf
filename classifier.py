"""Two ways to classify a sentence with a Llama: ask it, or train a head on its states.

Both take token ids (B, T), right-padded, and return log-probabilities (B, n_labels). What they read
from the hidden states is `pooling`:

- "position": the last column, a pad token for every row but the longest. It is what the assignment
  computes, so lengths are not looked at and pad tokens are attended to like any other.
- "last": each row's last real token; "mean": the mean over each row's real tokens. Both need
  `lengths` (B,), and with them the padding is masked and changes nothing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from config import POOLINGS, LlamaConfig, require_classifier_config
from formats.checkpoint import require_finite
from llama import Llama, last_real, load_pretrained, require_exactly
from tokenizer import Tokenizer


def choose_pooling(pooling: str | None, attention: str) -> str:
    """The given pooling, checked; None is "position" in full mode and "last" in causal mode."""
    if pooling is None:
        return "position" if attention == "full" else "last"
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r} is not one of {POOLINGS}")
    return pooling


class _Classifier(nn.Module):
    """A Llama with a pooling. `reads_lengths` tells callers whether to hand over `lengths`."""

    def __init__(self, config: Any, llama: Llama | None):
        super().__init__()
        self.num_labels = config.num_labels
        attention = getattr(config, "attention", None)
        if llama is None:
            llama = load_pretrained(config.pretrained_model_path, attention=attention)
        elif attention not in (None, llama.config.attention):
            raise ValueError(f"attention={attention!r} for a {llama.config.attention!r} Llama")
        self.llama = llama
        self.pooling = choose_pooling(getattr(config, "pooling", None), self.llama.config.attention)
        self.reads_lengths = self.pooling != "position"

    def _real_lengths(self, lengths: torch.Tensor | None) -> torch.Tensor | None:
        if self.reads_lengths and lengths is None:
            raise ValueError(f"pooling={self.pooling!r} needs lengths, the real tokens of each row")
        return lengths if self.reads_lengths else None


class LlamaZeroShotClassifier(_Classifier):
    """log p(label string | prompt) of each label, by a frozen model.

    `config` has `num_labels` and `pretrained_model_path`, and optionally `attention` and `pooling`
    ("mean" is a ValueError: the next token follows a position, not an average).
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Tokenizer,
        label_names: list[str],
        llama: Llama | None = None,
    ):
        super().__init__(config, llama)
        if self.pooling == "mean":
            raise ValueError("pooling='mean' cannot prompt: choose 'position' or 'last'")
        if len(label_names) != self.num_labels:
            raise ValueError(f"{len(label_names)} label names for num_labels={self.num_labels}")
        tokenizer.require_vocab_size(self.llama.config.vocab_size)
        self.llama.requires_grad_(False)
        self.tokenizer = tokenizer
        self.label_name_ids = [tokenizer.encode(name, bos=False, eos=False) for name in label_names]
        if len({tuple(ids) for ids in self.label_name_ids} - {()}) < self.num_labels:
            raise ValueError(
                f"label names {label_names} have empty or equal tokens; tell them apart"
            )

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) -> (B, n_labels): sum_i log p(t_i | prompt, t_1 ... t_i-1) over a label's tokens.

        A label of one token costs nothing beyond the prompt's own pass; each further distinct
        beginning of a label costs one pass. Prompts must leave the model room for `longest_label`.
        """
        lengths = self._real_lengths(lengths)
        next_token: dict[tuple[int, ...], torch.Tensor] = {}  # beginning of a label -> (B, V)
        scores = []
        for ids in self.label_name_ids:
            score = torch.zeros(len(input_ids), device=input_ids.device)
            for i, token in enumerate(ids):
                beginning = tuple(ids[:i])
                if beginning not in next_token:
                    next_token[beginning] = self._log_probs(input_ids, lengths, beginning)
                score = score + next_token[beginning][:, token]
            scores.append(score)
        return torch.stack(scores, dim=1)

    @property
    def longest_label(self) -> int:
        """Positions a label needs behind the prompt: all its tokens but the last."""
        return max(len(ids) for ids in self.label_name_ids) - 1

    def _log_probs(
        self, ids: torch.Tensor, lengths: torch.Tensor | None, beginning: tuple[int, ...]
    ) -> torch.Tensor:
        """log p(. | prompt, beginning), (B, V); the beginning goes where each prompt ends."""
        B, T = ids.shape
        ends = torch.full((B,), T, device=ids.device) if lengths is None else lengths
        extra = torch.tensor(beginning, dtype=ids.dtype, device=ids.device)
        columns = ends[:, None] + torch.arange(len(beginning), device=ids.device)
        extended = F.pad(ids, (0, len(beginning)), value=self.tokenizer.pad_id)
        extended = extended.scatter(1, columns, extra.expand(B, -1))
        if lengths is not None:
            lengths = lengths + len(beginning)
        logits, _ = self.llama(extended, lengths=lengths)
        return _log_softmax(logits[:, -1])


class LlamaEmbeddingClassifier(_Classifier):
    """Pooled hidden state -> dropout -> `classifier_head` -> log-softmax.

    `config` has `num_labels`, `pretrained_model_path`, `hidden_dropout_prob` and `option`
    ("pretrain" freezes the Llama, "finetune" trains it), and optionally `attention` and `pooling`.
    A given `llama` is used instead of reading `pretrained_model_path`.
    """

    def __init__(self, config: Any, llama: Llama | None = None):
        super().__init__(config, llama)
        if config.option not in ("pretrain", "finetune"):
            raise ValueError(f"option={config.option!r} is neither 'pretrain' nor 'finetune'")
        self.llama.requires_grad_(config.option == "finetune")
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier_head = nn.Linear(self.llama.config.dim, self.num_labels)

    @classmethod
    def from_weights(
        cls, config: Any, llama_config: LlamaConfig, weights: dict[str, torch.Tensor]
    ) -> "LlamaEmbeddingClassifier":
        """A classifier in eval mode with exactly these weights, of Llama and head."""
        require_classifier_config(config)
        prefix = "llama."
        llama_weights = {
            name.removeprefix(prefix): tensor
            for name, tensor in weights.items()
            if name.startswith(prefix)
        }
        model = cls(config, Llama.from_weights(llama_config, llama_weights))
        require_exactly(model, weights)
        model.load_state_dict(weights)
        require_finite(model.classifier_head.state_dict())
        return model.eval()

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T), real tokens (B,) of right-padded rows -> log-probabilities (B, n_labels)."""
        lengths = self._real_lengths(lengths)
        hidden = self.llama.hidden_states(input_ids, lengths)  # (B, T, dim)
        scores = self.classifier_head(self.dropout(self.pool(hidden, lengths)))
        return _log_softmax(scores)

    def pool(self, hidden: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """What the head reads of the states: (B, T, dim), (B,) -> (B, dim)."""
        if self.pooling == "position":
            return hidden[:, -1]
        if self.pooling == "last":
            return last_real(hidden, lengths).squeeze(1)
        return mean_of_real(hidden, lengths)


def _log_softmax(scores: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, in float32 at least: bfloat16 tells log-probabilities apart by
    0.4 %."""
    return F.log_softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim=-1)


def are_real(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Which positions hold no padding: (B, T, dim), (B,) -> (B, T)."""
    return torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]


def mean_of_real(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The mean of each row's real positions: (B, T, dim), (B,) -> (B, dim)."""
    real = are_real(hidden, lengths)[:, :, None]
    return hidden.masked_fill(~real, 0.0).sum(dim=1) / lengths[:, None]
