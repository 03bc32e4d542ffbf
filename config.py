"""The sizes of a Llama model, checked once so that no later line has to."""

from types import SimpleNamespace
from typing import Any

from utils import InputError, brief

ATTENTION_MODES = ("full", "causal")
POOLINGS = ("position", "last", "mean")  # how a classifier pools hidden states
MAX_LABELS = 10_000
MAX_LAYERS = 1_000  # building more takes long, before missing weights are found
MAX_SIZE = 2**28  # the product of any two sizes fits PyTorch's 64-bit indices
MAX_TABLE = 2**24  # max_seq_len * head size: the numbers in the rotary table, 64 MiB in float32


class LlamaConfig(SimpleNamespace):  # for its == and its repr
    """Hyperparameters of `llama.Llama`.

    `attention` is "full" (no mask: what the assignment's reference computes) or "causal" (each
    position sees itself and earlier ones: how every published checkpoint was trained).
    `n_kv_heads=None` means one key/value head per query head; fewer is grouped-query attention
    (Ainslie et al. 2023, arXiv 2305.13245). `hidden_dim=None` gives the feed-forward layer
    2/3 * 4 dim, rounded up to `multiple_of` (Shazeer 2020, arXiv 2002.05202, section 3).

    Raises InputError with key and value for an unknown key or an impossible value.
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
            raise InputError(f"unknown LlamaConfig keys: {brief(unknown)}")
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
        sizes = ("vocab_size", "dim", "n_heads", "n_kv_heads", "max_seq_len", "multiple_of")
        for key in sizes:
            _require_size(key, getattr(self, key))
        _require_size("n_layers", self.n_layers, MAX_LAYERS)
        if self.hidden_dim is not None:
            _require_size("hidden_dim", self.hidden_dim)
        _require_probability("dropout", self.dropout)
        if not (_is_number(self.layer_norm_eps) and 0.0 < self.layer_norm_eps <= 1.0):
            raise InputError(f"layer_norm_eps={brief(self.layer_norm_eps)} is not in (0, 1]")
        _require_one_of("attention", self.attention, ATTENTION_MODES)
        if self.dim % self.n_heads:
            raise InputError(f"dim={self.dim} is not divisible by n_heads={self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise InputError(
                f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise InputError(
                f"dim={self.dim} / n_heads={self.n_heads} gives the odd head size {self.head_dim}; "
                "rotary embeddings rotate pairs"
            )
        if self.max_seq_len * self.head_dim > MAX_TABLE:
            raise InputError(
                f"max_seq_len={self.max_seq_len} times head size {self.head_dim} exceeds "
                f"{MAX_TABLE}: the table of rotary embeddings would be too large"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def to_dict(self) -> dict[str, Any]:
        """Return the keyword arguments that build this config again: `model_args`."""
        return dict(vars(self))


def require_classifier_config(config: Any) -> None:
    """Raise InputError for a missing or impossible value in a classifier's config."""
    for key in ("num_labels", "hidden_dropout_prob", "option"):
        if not hasattr(config, key):
            raise InputError(f"the classifier's config has no {key}")
    _require_size("num_labels", config.num_labels, MAX_LABELS)
    _require_probability("hidden_dropout_prob", config.hidden_dropout_prob)
    _require_one_of("option", config.option, ("pretrain", "finetune"))  # frozen or trained Llama


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require_probability(key: str, value: Any) -> None:
    if not (_is_number(value) and 0.0 <= value < 1.0):
        raise InputError(f"{key}={brief(value)} is not a number in [0, 1)")


def _require_one_of(key: str, value: Any, words: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in words:
        raise InputError(f"{key}={brief(value)} is not one of {words}")


def _require_size(key: str, value: Any, largest: int = MAX_SIZE) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        raise InputError(f"{key}={brief(value)} is not an integer in 1..{largest}")
