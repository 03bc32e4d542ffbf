"""Two ways to classify a sentence with a Llama: prompt it, or train a head on its hidden states.

Both take right-padded token ids (B, T) and return log-probabilities (B, n_labels). `pooling` says
which hidden states they read:

- "position": the last column, a pad token in every row but the longest. This is the assignment's
  way; it ignores lengths, and in full mode attention reads pad tokens like words.
- "last": each row's last real token; "mean": the mean over each row's real tokens. Padding is
  masked and changes nothing. Both need `lengths` (B,); if absent, they count the tokens before the
  trailing pads.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from config import POOLINGS, LlamaConfig, require_classifier_config
from formats.checkpoint import load_exactly
from llama import Llama, last_token, load_pretrained, padding_mask
from tokenizer import Tokenizer
from utils import InputError, brief

PAD_ID = 3  # of `<0x00>` in the Llama 2 tokenizer, which the assignment pads with


def choose_pooling(pooling: str | None, attention: str) -> str:
    """Return the given pooling, checked; by default "position" in full mode, "last" in causal."""
    if pooling is None:
        return "position" if attention == "full" else "last"
    if pooling not in POOLINGS:
        raise InputError(f"pooling={brief(pooling)} is not one of {POOLINGS}")
    return pooling


class _Classifier(nn.Module):
    """A Llama and the pooling of its states. `reads_lengths` is True if padding is masked."""

    pad_id = PAD_ID

    def __init__(self, config: Any, llama: Llama | None):
        super().__init__()
        self.num_labels = config.num_labels
        attention = getattr(config, "attention", None)
        if llama is None:
            llama = load_pretrained(config.pretrained_model_path, attention=attention)
        elif attention not in (None, llama.config.attention):
            raise InputError(
                f"attention={attention!r}, but the given Llama has {llama.config.attention!r}"
            )
        self.llama = llama
        self.pooling = choose_pooling(getattr(config, "pooling", None), self.llama.config.attention)
        self.reads_lengths = self.pooling != "position"

    def _real_lengths(
        self, input_ids: torch.Tensor, lengths: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return the number of real tokens of each row (B,), or None with pooling "position"."""
        if not self.reads_lengths:
            return None
        if lengths is not None:
            return lengths
        # A caller without lengths, such as the assignment's own run_llama.py: padding is the run of
        # pad ids that ends a row.
        is_token = input_ids != self.pad_id
        positions = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        return (is_token * positions).amax(dim=1).clamp(min=1)


class LlamaZeroShotClassifier(_Classifier):
    """Score log p(label string | prompt) for each label by a frozen model; freezes `llama`.

    `config` has `num_labels` and `pretrained_model_path`, and optionally `attention` and `pooling`.
    Raises InputError for pooling "mean": the next token follows a position, not an average.
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
            raise InputError("pooling='mean' cannot score a next token; use 'position' or 'last'")
        if len(label_names) != self.num_labels:
            raise InputError(f"{len(label_names)} label names for num_labels={self.num_labels}")
        tokenizer.require_vocab_size(self.llama.config.vocab_size)
        self.llama.requires_grad_(False)
        self.pad_id = tokenizer.pad_id
        self.label_name_ids = [tokenizer.encode(name, bos=False, eos=False) for name in label_names]
        if len({tuple(ids) for ids in self.label_name_ids} - {()}) < self.num_labels:
            raise InputError(f"label names {label_names} have empty or equal tokens; rename one")

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) -> (B, n_labels): sum_i log p(t_i | prompt, t_1 ... t_i-1) over a label's tokens.

        Labels of one token share one pass; each further distinct beginning of a label costs one
        more. The prompt must leave the model room for `label_room` positions.
        """
        lengths = self._real_lengths(input_ids, lengths)
        log_probs: dict[tuple[int, ...], torch.Tensor] = {}  # beginning of a label -> (B, V)
        scores = []
        for ids in self.label_name_ids:
            score = torch.zeros(len(input_ids), device=input_ids.device)
            for i, token in enumerate(ids):
                beginning = tuple(ids[:i])
                if beginning not in log_probs:
                    log_probs[beginning] = self._log_probs(input_ids, lengths, beginning)
                score = score + log_probs[beginning][:, token]
            scores.append(score)
        return torch.stack(scores, dim=1)

    def _log_probs(
        self, ids: torch.Tensor, lengths: torch.Tensor | None, beginning: tuple[int, ...]
    ) -> torch.Tensor:
        """Return log p(. | prompt, beginning) (B, V); the beginning follows each prompt's end, with
        pooling "position" the last column."""
        B, T = ids.shape
        ends = torch.full((B,), T, device=ids.device) if lengths is None else lengths
        extra = torch.tensor(beginning, dtype=ids.dtype, device=ids.device)
        columns = ends[:, None] + torch.arange(len(beginning), device=ids.device)
        extended = F.pad(ids, (0, len(beginning)), value=self.pad_id)
        extended = extended.scatter(1, columns, extra.expand(B, -1))
        if lengths is not None:
            lengths = lengths + len(beginning)
        logits, _ = self.llama(extended, lengths=lengths)
        return _log_softmax(logits[:, -1])


class LlamaEmbeddingClassifier(_Classifier):
    """Pooled hidden state -> dropout -> `classifier_head` -> log-softmax.

    `config` has `num_labels`, `pretrained_model_path`, `hidden_dropout_prob` and `option`
    ("pretrain" freezes the Llama, "finetune" trains it), and optionally `attention` and `pooling`.
    A given `llama` is used instead of `pretrained_model_path`.
    """

    def __init__(self, config: Any, llama: Llama | None = None):
        require_classifier_config(config)
        super().__init__(config, llama)
        self.llama.requires_grad_(config.option == "finetune")
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier_head = nn.Linear(self.llama.config.dim, self.num_labels)

    @classmethod
    def from_weights(
        cls, config: Any, llama_config: LlamaConfig, weights: dict[str, torch.Tensor]
    ) -> "LlamaEmbeddingClassifier":
        """Return a classifier in eval mode with exactly these weights, of Llama and head."""
        prefix = "llama."
        of_llama = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        llama = Llama.from_weights(llama_config, of_llama)
        model = cls(config, llama)
        model.llama = nn.Identity()  # loaded already: what follows is the head's
        load_exactly(model, {n: w for n, w in weights.items() if not n.startswith(prefix)})
        model.llama = llama
        return model.eval()

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T), real tokens (B,) of right-padded rows -> log-probabilities (B, n_labels)."""
        lengths = self._real_lengths(input_ids, lengths)
        hidden = self.llama.hidden_states(input_ids, lengths)  # (B, T, dim)
        logits = self.classifier_head(self.dropout(self.pool(hidden, lengths)))
        return _log_softmax(logits)

    def pool(self, hidden: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """Return the pooled state of each row: (B, T, dim), (B,) -> (B, dim)."""
        if self.pooling == "position":
            return hidden[:, -1]
        if self.pooling == "last":
            return last_token(hidden, lengths).squeeze(1)
        return masked_mean(hidden, lengths)


def prompt_suffix(label_names: Sequence[str], subject: str = "movie") -> str:
    """Return the assignment's question, 'Is this movie a, b, or c? This movie is '."""
    if len(label_names) == 2:
        choices = " or ".join(label_names)
    else:
        choices = f"{', '.join(label_names[:-1])}, or {label_names[-1]}"
    return f"Is this {subject} {choices}? This {subject} is "


def label_room(tokenizer: Tokenizer, labels: Iterable[str]) -> int:
    """Return the positions that the longest label needs after a prompt: all its tokens but one."""
    return max(len(tokenizer.encode(label, bos=False, eos=False)) for label in labels) - 1


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities in float32 at least: bfloat16 has two to three digits."""
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def masked_mean(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the mean of each row's real positions: (B, T, dim), (B,) -> (B, dim)."""
    real = padding_mask(lengths, hidden.shape[1])[:, :, None]
    return hidden.masked_fill(~real, 0.0).sum(dim=1) / lengths[:, None]
