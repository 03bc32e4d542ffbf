"""The fuzz target of a finetuning run's state: what --resume reads."""

import copy
import os
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st

import hostile
from classifier import LlamaEmbeddingClassifier
from conftest import random_llama
from formats.checkpoint import load_torch_file
from fuzz import Inputs
from fuzz_models import ODD_VALUES, TINY, as_torch_file, filled
from fuzz_shared import ODD_FLOATS, mutated
from training.dataset import Example, SentenceDataset
from training.loop import train_classifier
from training.state import Keeper

STATE = "run.state.pt"


def train(epochs: int, resume: bool) -> None:
    """On four sentences, in batches of two."""
    torch.manual_seed(0)
    config = {"num_labels": 2, "option": "finetune", "hidden_dropout_prob": 0.3, "pooling": "last"}
    llama = random_llama(**TINY, attention="causal")
    data = SentenceDataset([Example("a", i % 2, [1, 2, 3 + i]) for i in range(4)], pad_id=3)
    train_classifier(
        LlamaEmbeddingClassifier(SimpleNamespace(**config), llama),
        data,
        data,
        epochs=epochs,
        batch_size=2,
        lr=1e-3,
        seed=0,
        device=torch.device("cpu"),
        on_epoch=lambda report, is_best: None,
        keeper=Keeper(STATE, {"lr": 1e-3, "seed": 0, "pooling": "last"}, resume),
    )


def act_state() -> None:
    train(epochs=2, resume=True)


@cache
def state_content() -> dict[str, Any]:
    """Of a run that is behind its first epoch."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            train(epochs=1, resume=False)
            return copy.deepcopy(load_torch_file(STATE))
        finally:
            os.chdir(home)


def places(content: Any, path: tuple = ()) -> list[tuple]:
    """The way to every entry of dicts and lists, but not to each of many numbers."""
    if isinstance(content, dict):
        entries = list(content.items())
    elif isinstance(content, list):
        entries = list(enumerate(content[:4]))
    else:
        entries = []
    inner = [place for key, value in entries for place in places(value, (*path, key))]
    return [(*path, key) for key, _ in entries] + inner


@st.composite
def state_files(draw: st.DrawFn) -> Inputs:
    content = copy.deepcopy(state_content())
    if draw(st.integers(0, 4)) == 0:
        return {STATE: draw(mutated(hostile.torch_file(content)))}
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(content)))
        entry = content
        for key in way:
            entry = entry[key]
        kind = draw(st.integers(0, 4))
        if kind == 0:
            del entry[last]
        elif kind == 1 and isinstance(entry[last], torch.Tensor):
            entry[last] = filled(entry[last], draw(st.sampled_from(ODD_FLOATS)))
        elif kind == 2:
            entry[last] = draw(st.sampled_from([1, -1, 0.5, "0", (1, 2), [], {}, True]))
        else:
            entry[last] = draw(ODD_VALUES)
    return {STATE: as_torch_file(content, draw(st.booleans()))}
