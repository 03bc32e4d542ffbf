"""The methods: what each does, its options, which combine, and what they make of a model."""

import argparse
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from advanced.methods import adapter, freezing, lora, mixout
from advanced.methods.l2sp import L2SP
from advanced.methods.pooling import POOLINGS
from advanced.methods.prompting import PromptClassifier
from advanced.methods.smart import Smart
from classifier import LlamaEmbeddingClassifier
from llama import Llama
from tokenizer import Tokenizer
from training.options import (
    non_negative_float,
    positive_float,
    positive_int,
    probability_below_one,
)
from utils import InputError

METHODS = {  # in the order in which they act
    "plain": "finetune all weights under a new head, as `run_llama.py --option finetune` does",
    "zero_shot": "train nothing; choose template and calibration on the train split",
    "pretrain": "first continue next-token training on the train split's own sentences",
    "prompt": "finetune the language model to predict the label's word after a template",
    "attention_pool": "the head reads a learned weighting of the states",
    "last_mean": "the head reads the last state concatenated with the mean of all",
    "layer_mix": "the head reads a learned mixture of all layers",
    "lora": "train low-rank updates of the matrices, merged after training, and the head",
    "adapter": "train small networks after attention and feed-forward, the norms and the head",
    "norms": "train the gains of the norms and the head (BitFit, for a model without biases)",
    "head": "train the head alone",
    "mixout": "replace weights by the pretrained ones at random in training",
    "l2sp": "a quadratic penalty on the distance from the pretrained weights",
    "smart": "penalize how much small changes of the embeddings, and a step, change the output",
    "last_epochs": "the mean of the weights of the last epochs instead of the best epoch's",
    "wise_ft": "interpolate pretrained and finetuned weights, with the share chosen on dev",
    "soup": "the mean of the weights of the seeds that do not lower dev accuracy, or of all",
}
MATRICES = ("compute_query", "compute_key", "compute_value", "compute_output", "w1", "w2", "w3")


# The options of each method: {name: (type or choices, default, help)}.
_TEMPLATE = {
    "template": (str, None, "name in templates.json (default: the first; zero_shot tries all)")
}
OPTIONS: dict[str, dict[str, tuple[Any, Any, str]]] = {
    "pretrain": {
        "pretrain_epochs": (positive_int, 3, "passes over the train split"),
        "pretrain_lr": (positive_float, 3e-4, "peak learning rate of pretrain"),
    },
    "zero_shot": _TEMPLATE,
    "prompt": _TEMPLATE,
    "lora": {
        "lora_rank": (positive_int, 8, "rank of the update B A"),
        "lora_alpha": (positive_float, 16.0, "alpha; the update B A is scaled by alpha / rank"),
        "lora_targets": (MATRICES, ["compute_query", "compute_value"], "matrices to update"),
    },
    "adapter": {"adapter_size": (positive_int, 16, "units in an adapter's bottleneck")},
    "mixout": {"mixout_p": (probability_below_one, 0.5, "probability that a weight is replaced")},
    "l2sp": {
        "l2sp_weight": (non_negative_float, 0.01, "L2-SP's alpha, its weight on the Llama"),
        "l2sp_head_weight": (non_negative_float, 0.01, "L2-SP's beta, its weight on the head"),
    },
    "smart": {
        "smart_weight": (non_negative_float, 1.0, "weight of SMART's smoothness term"),
        "smart_radius": (positive_float, 0.1, "radius in units of the embeddings' RMS"),
        "proximal_weight": (non_negative_float, 1.0, "weight of SMART's proximal term"),
    },
    "last_epochs": {"last": (positive_int, 2, "epochs whose weights are averaged")},
    "soup": {
        "soup": (
            ("greedy", "uniform"),
            "greedy",
            "greedy adds a seed if dev accuracy does not fall, uniform averages all seeds",
        )
    },
}
POOL = ("prompt", *POOLINGS)
PARTIAL = ("lora", "adapter", "norms", "head")
AVERAGES = ("wise_ft", "soup")  # of finished runs

CLASHES = (  # a method, those that it does not combine with, and why
    ("mixout", PARTIAL, "{rival} does not train the matrices that it mixes"),
    ("l2sp", ("lora", "head"), "{rival} trains none of the pretrained weights that it holds"),
    ("wise_ft", ("head",), "{rival} trains none of the weights that it interpolates"),
    ("wise_ft", ("adapter",), "adapters have no pretrained counterpart"),
    ("prompt", ("head",), "a prompt has no head to train"),
    ("prompt", ("smart",), "labels of several tokens take several passes; smart perturbs one"),
)


def compose(names: Sequence[str]) -> tuple[str, ...]:
    """Return the methods in their order of action; raise InputError if they do not combine."""
    chosen = tuple(name for name in METHODS if name in names)
    if len(chosen) < len(names):
        raise InputError(f"--method {' --method '.join(names)}: names a method twice")
    if "plain" in chosen and len(chosen) > 1:
        raise InputError("plain is finetuning without a method; leave it out beside others")
    if "zero_shot" in chosen and set(chosen) - {"zero_shot", "pretrain"}:
        raise InputError("zero_shot trains no classifier; it combines with pretrain alone")
    for group, what in ((POOL, "replaces the pooling"), (PARTIAL, "says what is trained")):
        rivals = [name for name in chosen if name in group]
        if len(rivals) > 1:
            raise InputError(f"{' and '.join(rivals)} do not combine: each {what}")
    for name, rivals, why in CLASHES:
        for rival in rivals:
            if {name, rival} <= set(chosen):
                raise InputError(f"{name} and {rival} do not combine: {why.format(rival=rival)}")
    return chosen


def options_of(methods: Sequence[str]) -> list[str]:
    """Return the names of the options that these methods read."""
    return [name for method in methods for name in OPTIONS.get(method, ())]


def add_method_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of single methods")
    rows = {name: row for options in OPTIONS.values() for name, row in options.items()}
    for name, (kind, default, text) in rows.items():
        values: dict[str, Any] = {"choices" if isinstance(kind, tuple) else "type": kind}
        if not isinstance(kind, tuple):
            values["metavar"] = {int: "N", float: "X"}.get(type(default), "NAME")
        if isinstance(default, list):
            values |= {"nargs": "+", "metavar": "NAME"}
            text += f" among {', '.join(kind)} (default: {' '.join(default)})"
        elif default is not None:
            text += " (default: %(default)s)"
        group.add_argument(f"--{name}", default=default, help=text, **values)


def build(
    methods: Sequence[str],
    llama: Llama,
    config: Any,
    tokenizer: Tokenizer,
    labels: Sequence[Sequence[str]],
    adapter_size: int,
) -> nn.Module:
    """Return a classifier in the form that is saved: with adapters, without mergeable updates.

    `config` is that of `LlamaEmbeddingClassifier`; `labels` are the strings of a prompt's template.
    """
    if {"prompt", "zero_shot"} & set(methods):
        model = PromptClassifier(llama, tokenizer, labels, trainable="prompt" in methods)
    else:
        poolings = [POOLINGS[name] for name in methods if name in POOLINGS]  # at most one
        kind = poolings[0] if poolings else LlamaEmbeddingClassifier
        model = kind(config, llama)
    if "adapter" in methods:
        adapter.add_adapters(model, adapter_size)
    return model


def prepare(methods: Sequence[str], model: nn.Module, settings: SimpleNamespace) -> "Sum | None":
    """Select what of `model` is trained and return the regularizer, if there is one.

    The model must have the pretrained weights, to which mixout and L2-SP hold it.
    """
    if "lora" in methods:
        lora.add_lora(model, settings.lora_rank, settings.lora_alpha, settings.lora_targets)
    for part in freezing.PARTS:
        if part in methods:
            freezing.train_only(model, part)
    if "mixout" in methods:
        mixout.add_mixout(model, settings.mixout_p)
    terms: list[nn.Module] = []
    if "l2sp" in methods:
        terms.append(L2SP(model, settings.l2sp_weight, settings.l2sp_head_weight))
    if "smart" in methods:
        smart = Smart(
            model,
            weight=settings.smart_weight,
            radius=settings.smart_radius,
            proximal_weight=settings.proximal_weight,
            batch_size=settings.batch_size,
        )
        terms.append(smart)
    return Sum(terms) if terms else None


class Sum(nn.ModuleList):
    """The sum of several regularizers."""

    def forward(self, *inputs: Any) -> torch.Tensor:
        return sum(term(*inputs) for term in self)
