"""A small classifier, data and a short training, for the tests of the methods."""

from types import SimpleNamespace

import torch
from torch import nn

from classifier import LlamaEmbeddingClassifier
from conftest import random_llama
from training.dataset import Example, SentenceDataset
from training.loop import train_classifier


def random_data(n: int = 10) -> SentenceDataset:
    """Sentences of 2 to 7 random tokens, labelled 0, 1, 0, ..."""
    rng = torch.Generator().manual_seed(0)
    examples = []
    for i in range(n):
        length = int(torch.randint(2, 8, (), generator=rng))
        tokens = torch.randint(3, 320, (length,), generator=rng).tolist()
        examples.append(Example(f"sentence {i}", i % 2, tokens))
    return SentenceDataset(examples, pad_id=3)


def classifier(
    scale: float = 1.0, num_labels: int = 2, dropout: float = 0.0, **shape
) -> LlamaEmbeddingClassifier:
    """The same weights in every call."""
    config = SimpleNamespace(
        num_labels=num_labels, option="finetune", hidden_dropout_prob=dropout, pooling="mean"
    )
    llama = random_llama(scale=scale, **shape)
    torch.manual_seed(0)
    return LlamaEmbeddingClassifier(config, llama)


def train(model: nn.Module, data: SentenceDataset, **options) -> list:
    defaults = {"epochs": 2, "batch_size": 4, "lr": 1e-3, "seed": 7}
    return train_classifier(
        model,
        data,
        data,
        device=torch.device("cpu"),
        **{**defaults, "on_epoch": lambda report, is_best: None, **options},
    )


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def move(model: nn.Module, by: float = 0.1) -> None:
    """Some steps of training, as it were: every weight leaves its pretrained value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))
