"""How a composition of methods becomes a model: its parts, what of it is trained, its penalties."""

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from advanced.candidates import State
from advanced.methods import adapter, lora, mixout
from advanced.methods import freezing as partial
from advanced.methods.l2sp import L2SP
from advanced.methods.pooling import COMPONENTS
from advanced.methods.prompting import PromptClassifier
from advanced.methods.smart import Smart
from classifier import LlamaEmbeddingClassifier
from llama import Llama
from tokenizer import Tokenizer


def build(
    methods: Sequence[str],
    llama: Llama,
    config: Any,
    tokenizer: Tokenizer,
    labels: Sequence[Sequence[str]] | None,
    adapter_size: int,
) -> nn.Module:
    """A classifier of the form that the weights are kept in: with adapters, but without what is
    merged after training. `config` is that of `LlamaEmbeddingClassifier`, `labels` a template's."""
    if "prompt" in methods:
        model = PromptClassifier(llama, tokenizer, labels)
    else:
        kinds = [COMPONENTS[name] for name in methods if name in COMPONENTS]
        model = (kinds[0] if kinds else LlamaEmbeddingClassifier)(config, llama)
    if "adapter" in methods:
        adapter.add_adapters(model, adapter_size)
    return model


def prepare(
    methods: Sequence[str], model: nn.Module, options: argparse.Namespace
) -> nn.Module | None:
    """Makes trainable what is to be trained, and returns the regularizer if there is one.

    The model has the pretrained weights now: mixout and L2-SP take them for the point to stay near.
    """
    if "lora" in methods:
        lora.add_lora(model, options.lora_rank, options.lora_alpha, options.lora_targets)
    for part in partial.PARTS:
        if part in methods:
            partial.train_only(model, part)
    if "mixout" in methods:
        mixout.add_mixout(model, options.mixout_p)
    terms: list[nn.Module] = []
    if "l2sp" in methods:
        terms.append(L2SP(model, options.l2sp_weight, options.l2sp_head_weight))
    if "smart" in methods:
        smart = Smart(
            model,
            weight=options.smart_weight,
            radius=options.smart_radius,
            proximal_weight=options.proximal_weight,
            batch_size=options.batch_size,
        )
        terms.append(smart)
    return Together(*terms) if terms else None


def merged(methods: Sequence[str], model: nn.Module) -> State:
    """The weights in the form of `build`; the model stays as it is."""
    if {"lora", "mixout"} & set(methods):
        model = copy.deepcopy(model)
        (lora if "lora" in methods else mixout).merge(model)
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


class Together(nn.Module):
    """The sum of several regularizers."""

    def __init__(self, *terms: nn.Module):
        super().__init__()
        self.terms = nn.ModuleList(terms)

    def forward(self, *given: Any) -> torch.Tensor:
        return torch.stack([term(*given) for term in self.terms]).sum()
