"""Build models, optimizers and data of real sizes and random content for the benchmark.

Naive and ours start from the same weights. transformers draws its own weights of the same shape.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import naive
from classifier import LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from config import LlamaConfig
from fast.int8 import quantize_model
from llama import Llama
from optimizer import AdamW
from training.dataset import Example, SentenceDataset

SHAPES: dict[str, dict[str, Any]] = {
    "stories42M": {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "vocab_size": 32000},
    "mini": {
        "dim": 192, "n_layers": 6, "n_heads": 6, "n_kv_heads": 3, "vocab_size": 4096,
        "hidden_dim": 512,
    },
    "stories260K": {
        "dim": 64, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 512,
        "hidden_dim": 172, "max_seq_len": 512,
    },
}  # fmt: skip
SEED = 11711
N_LABELS = 5
LABEL_IDS = list(range(100, 100 + N_LABELS))  # of prompting: each label is one token
LR = 2e-5
PAD = 3


def config_of(shape: str, attention: str = "full") -> LlamaConfig:
    return LlamaConfig(**SHAPES[shape], attention=attention)


def make_llama(contender: str, shape: str, attention: str) -> nn.Module:
    """Return a language model with `generate`, in eval mode."""
    config = config_of(shape, attention)
    torch.manual_seed(SEED)
    if contender == "transformers":
        import transformers

        return transformers.LlamaForCausalLM(transformers_config(config)).eval()
    ours = Llama(config).eval()
    if contender == "ours int8":
        quantize_model(ours)
    if contender in ("ours", "ours int8"):
        return ours
    plain = naive.NaiveLlama(config)
    plain.load_state_dict(ours.state_dict())
    return plain.eval()


def transformers_config(c: LlamaConfig) -> Any:
    import transformers

    with torch.device("meta"):
        hidden_dim = Llama(c).layers[0].feed_forward.w1.out_features
    return transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=hidden_dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.layer_norm_eps,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        num_labels=N_LABELS,
    )


class TransformersClassifier(nn.Module):
    """Give `LlamaForSequenceClassification`, or a prompted `LlamaForCausalLM`, our interface."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """tokens (B, T), lengths (B,) -> log-probabilities (B, n_labels)"""
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        if not hasattr(self.model, "lm_head"):
            return F.log_softmax(self.model(tokens, attention_mask=mask).logits, dim=-1)
        hidden = self.model.model(tokens, attention_mask=mask).last_hidden_state  # (B, T, dim)
        logits = self.model.lm_head(hidden[torch.arange(len(hidden)), lengths - 1])  # (B, V)
        return F.log_softmax(logits, dim=-1)[:, LABEL_IDS]


def make_classifier(contender: str, shape: str, attention: str) -> nn.Module:
    """Return a classifier: last column in full mode, last real token in causal mode."""
    if contender == "transformers":
        import transformers

        torch.manual_seed(SEED)
        config = transformers_config(config_of(shape))
        return TransformersClassifier(transformers.LlamaForSequenceClassification(config))
    llama = make_llama(contender, shape, attention)
    torch.manual_seed(SEED)
    if contender == "naive":
        return naive.NaiveClassifier(llama, N_LABELS, 0.3)
    settings = SimpleNamespace(num_labels=N_LABELS, hidden_dropout_prob=0.3, option="finetune")
    return LlamaEmbeddingClassifier(settings, llama)


def make_zero_shot(contender: str, shape: str) -> nn.Module:
    """Return a prompted causal model that masks padding."""
    llama = make_llama(contender, shape, "causal")
    if contender == "transformers":
        return TransformersClassifier(llama)
    if contender == "naive":
        return naive.NaiveZeroShot(llama, LABEL_IDS)
    tokenizer = SimpleNamespace(
        pad_id=PAD,
        require_vocab_size=lambda vocab_size: None,
        encode=lambda label, bos, eos: [int(label)],
    )
    labels = [str(i) for i in LABEL_IDS]
    return LlamaZeroShotClassifier(SimpleNamespace(num_labels=N_LABELS), tokenizer, labels, llama)


def make_optimizer(contender: str, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    if contender == "naive":
        return naive.NaiveAdamW(parameters, lr=LR)
    if contender == "ours":
        return AdamW(parameters, lr=LR)
    return torch.optim.AdamW(parameters, lr=LR)


def make_data(dataset: str, n: int, shape: str, longer_by: int = 0) -> SentenceDataset:
    """Return n sentences of random tokens, with the lengths of `dataset` plus `longer_by`."""
    config = config_of(shape)
    generator = torch.Generator().manual_seed(SEED)
    examples = []
    for length in draw_lengths(dataset, n, SEED, config.max_seq_len - longer_by):
        ids = torch.randint(PAD + 1, config.vocab_size, (length + longer_by,), generator=generator)
        label = int(torch.randint(N_LABELS, (1,), generator=generator))
        examples.append(Example("", label, ids.tolist()))
    return SentenceDataset(examples, PAD)


def draw_lengths(dataset: str, n: int, seed: int, longest: int) -> list[int]:
    """Draw n sentence lengths in tokens, bos included, at most `longest`.

    lengths.json holds percentiles 0 to 100 of the training files under the Llama tokenizer.
    """
    text = Path(__file__).with_name("lengths.json").read_text(encoding="utf-8")
    percentiles = json.loads(text)[dataset]
    drawn = np.random.default_rng(seed).uniform(0, 100, n)
    lengths = np.interp(drawn, range(101), percentiles)
    return [min(round(length), longest) for length in lengths]


def batches_of(data: SentenceDataset, batch_size: int) -> list[naive.Batch]:
    """Cut the data into padded batches, in order."""
    starts = range(0, len(data), batch_size)
    return [data.collate_fn(data.examples[start : start + batch_size]) for start in starts]
