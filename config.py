"""The shape of a Llama model, checked once so that no later line has to."""

import reprlib
import sys
from typing import Any

ATTENTION_MODES = ("full", "causal")
POOLINGS = ("position", "last", "mean")  # what a classifier reads, see classifier.py
MAX_LABELS = 10_000  # a head of more would itself be a large model
MAX_SIZE = 2**28  # the product of any two sizes fits PyTorch's 64 bits, with room
MAX_ANGLES = 2**24  # max_seq_len * head size: the rotary table takes up to 16 bytes for each


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
            listed = [f"{key[:100]}={shown(value)}" for key, value in sorted(unknown.items())]
            more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
            raise ValueError(f"unknown LlamaConfig key: {', '.join(listed[:20])}{more}")
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
            _require_size(key, getattr(self, key))
        if self.hidden_dim is not None:
            _require_size("hidden_dim", self.hidden_dim)
        _require_probability("dropout", self.dropout)
        eps = self.layer_norm_eps
        if not (_is_number(eps) and 0.0 < eps <= sys.float_info.max):
            raise ValueError(f"layer_norm_eps={shown(eps)} is not a positive number")
        _require_one_of("attention", self.attention, ATTENTION_MODES)
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
        if self.max_seq_len * self.head_dim > MAX_ANGLES:
            raise ValueError(
                f"max_seq_len={self.max_seq_len} times head size {self.head_dim} exceeds "
                f"{MAX_ANGLES}: the table of rotary embeddings would fill the memory"
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


def require_classifier_config(config: Any) -> None:
    """ValueError naming what a stored classifier's config lacks, or has that none can have."""
    for key in ("num_labels", "hidden_dropout_prob", "option"):
        if not hasattr(config, key):
            raise ValueError(f"the classifier's config has no {key}")
    _require_size("num_labels", config.num_labels, MAX_LABELS)
    _require_probability("hidden_dropout_prob", config.hidden_dropout_prob)
    _require_one_of("option", config.option, ("pretrain", "finetune"))
    for key, words in (("pooling", POOLINGS), ("attention", ATTENTION_MODES)):
        if getattr(config, key, None) is not None:
            _require_one_of(key, getattr(config, key), words)


def shown(value: Any) -> str:
    """A value in a message, cut: one from a file may be endlessly long or deep."""
    return _SHOWN.repr(value)


_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require_probability(key: str, value: Any) -> None:
    if not (_is_number(value) and 0.0 <= value < 1.0):
        raise ValueError(f"{key}={shown(value)} is not a number in [0, 1)")


def _require_one_of(key: str, value: Any, words: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{key}={shown(value)} is not one of {words}")


def _require_size(key: str, value: Any, largest: int = MAX_SIZE) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{key}={shown(value)} is not a positive integer")
    if value > largest:
        raise ValueError(f"{key}={shown(value)} exceeds {largest}")
