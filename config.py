"""The shape of a Llama model, checked once so that no later line has to."""

import math
from typing import Any

ATTENTION_MODES = ("full", "causal")
POOLINGS = ("position", "last", "mean")  # what a classifier reads, see classifier.py


class LlamaConfig:
    """Hyperparameters of `llama.Llama`.

    `attention` is "full" (no mask at all: what the assignment's reference computes) or "causal"
    (each position sees itself and what came before: how every published checkpoint was trained).
    `n_kv_heads=None` means one key/value head per query head; fewer is grouped-query attention
    (Ainslie et al. 2023, arXiv 2305.13245). `hidden_dim=None` lets the feed-forward layer take
    2/3 * 4 dim, rounded up to `multiple_of` (Shazeer 2020, arXiv 2002.05202, section 3).

    Raises ValueError naming key and value for anything that no model can have.
    """

    def __init__(
        self,
        /,  # so that a key named self is an unknown key like any other
        vocab_size: int = 32000,
        dim: int = 512,
        dropout: float = 0.0,
        n_layers: int = 8,
        n_heads: int = 8,
        n_kv_heads: int | None = 8,
        max_seq_len: int = 1024,
        layer_norm_eps: float = 1e-5,
        multiple_of: int = 32,
        hidden_dim: int | None = None,
        attention: str = "full",
        **unknown: Any,
    ):
        if unknown:
            listed = ", ".join(f"{key}={value!r}" for key, value in sorted(unknown.items()))
            raise ValueError(f"unknown LlamaConfig key: {listed}")
        self.vocab_size = vocab_size
        self.dim = dim
        self.dropout = dropout
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.max_seq_len = max_seq_len
        self.layer_norm_eps = layer_norm_eps
        self.multiple_of = multiple_of
        self.hidden_dim = hidden_dim
        self.attention = attention
        self._validate()

    def _validate(self) -> None:
        for key in (
            "vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "multiple_of",
        ):  # fmt: skip
            _require_positive_int(key, getattr(self, key))
        if self.hidden_dim is not None:
            _require_positive_int("hidden_dim", self.hidden_dim)
        if not (_is_number(self.dropout) and 0.0 <= self.dropout < 1.0):
            raise ValueError(f"dropout={self.dropout!r} is not a number in [0, 1)")
        if not (_is_number(self.layer_norm_eps) and 0.0 < self.layer_norm_eps < math.inf):
            raise ValueError(f"layer_norm_eps={self.layer_norm_eps!r} is not a positive number")
        if self.attention not in ATTENTION_MODES:
            raise ValueError(f"attention={self.attention!r} is not one of {ATTENTION_MODES}")
        if self.dim % self.n_heads:
            raise ValueError(f"dim={self.dim} is not divisible by n_heads={self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"dim={self.dim} / n_heads={self.n_heads} gives head size {self.head_dim}, "
                "which is odd: rotary embeddings rotate pairs"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def to_dict(self) -> dict[str, Any]:
        """The keyword arguments that build this config again: a checkpoint's `model_args`."""
        return dict(vars(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LlamaConfig) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"LlamaConfig({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require_positive_int(key: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{key}={value!r} is not a positive integer")
