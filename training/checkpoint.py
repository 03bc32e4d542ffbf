"""Save finetuned classifiers as plain data, and load them."""

import os
from types import SimpleNamespace
from typing import Any

from classifier import LlamaEmbeddingClassifier
from config import LlamaConfig
from formats.checkpoint import parse_checkpoint
from formats.torch_file import load_torch_file, save_torch_file
from tokenizer import Tokenizer
from utils import InputError, brief, sha256_of


def provenance(
    label_names: list[str],
    tokenizer: Tokenizer,
    pretrained_model_path: str | os.PathLike,
    max_sentence_len: int | None,
) -> dict[str, Any]:
    """Return the label names, the tokenizer and the hashes that a checkpoint records."""
    return {
        "label_names": label_names,
        "tokenizer_path": tokenizer.model_path,
        "tokenizer_sha256": sha256_of(tokenizer.model_path),
        "pretrained_model_sha256": sha256_of(pretrained_model_path),
        "max_sentence_len": max_sentence_len,
    }


def save_classifier(
    path: str | os.PathLike, model: LlamaEmbeddingClassifier, config: Any, **extra: Any
) -> None:
    """Write a checkpoint; after an error `path` is unchanged.

    `config` is the namespace that the classifier was built from. With it and `model_args`, the
    shape of the Llama, `load_classifier` rebuilds the classifier without the pretrained file.
    """
    content = {
        "model": model.state_dict(),
        "model_args": model.llama.config.to_dict(),
        "model_config": _without_paths({**vars(config), "pooling": model.pooling}),
        **{key: _without_paths(v) if isinstance(v, dict) else v for key, v in extra.items()},
    }
    save_torch_file(path, content)


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Turn each pathlib.Path into a string: a Path is pickled as an object and would not load."""
    return {
        key: os.fspath(value) if isinstance(value, os.PathLike) else value
        for key, value in values.items()
    }


def label_names_of(path: str | os.PathLike, saved: dict[str, Any]) -> list[str]:
    """Return the label names in a checkpoint's content, [] if there are none."""
    names = saved.get("label_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: its label_names are {brief(names)}, not a list of words")
    return names


def load_classifier(path: str | os.PathLike) -> tuple[LlamaEmbeddingClassifier, dict[str, Any]]:
    """Return the classifier of a file, on the CPU in eval mode, and the file's other entries."""
    saved = load_torch_file(path)
    parts = ("model", "model_args", "model_config")
    absent = [key for key in parts if not isinstance(saved.get(key), dict)]
    if absent and isinstance(saved.get("methods"), list):
        methods = ", ".join(map(str, saved["methods"]))
        raise InputError(f"{path}: is of --method {methods}, which only advanced.run reads")
    if absent:
        raise InputError(f"{path}: is not a finetuned classifier: it has no {', '.join(absent)}")
    names, most = label_names_of(path, saved), saved.get("max_sentence_len")
    if most is not None and (type(most) is not int or most < 1):
        raise InputError(f"{path}: its max_sentence_len is {brief(most)}, not a number of tokens")
    config = SimpleNamespace(**{str(key): v for key, v in saved["model_config"].items()})
    model_args, weights = parse_checkpoint(path, saved)
    del saved["model"]
    try:
        model = LlamaEmbeddingClassifier.from_weights(config, LlamaConfig(**model_args), weights)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if len(names) not in (0, model.num_labels):
        raise InputError(f"{path}: {len(names)} label names for {model.num_labels} labels")
    return model, saved
