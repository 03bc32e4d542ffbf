"""Read the published checkpoint formats into one form: (model_args, weights).

A file's content decides its format, not its name. There are two formats:

- a torch file with {"model": state dict, "model_args": LlamaConfig arguments}. Its attention
  matrices have llama2.c's names (wq, wk, wv, wo) or CMU's (compute_query, ...). Matrices may be
  int8 with a scale for each row, as `tools.export --to int8` writes them.
- llama2.c's `.bin` (see llama2c.py).
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from formats.llama2c import read_bin
from formats.torch_file import is_torch_file, listed, load_torch_file
from utils import InputError, brief

Weights = dict[str, torch.Tensor]
_CMU_NAMES = {"q": "query", "k": "key", "v": "value", "o": "output"}
_PREFIXES = re.compile(r"^(_orig_mod\.|module\.)+")  # of torch.compile, DataParallel and DDP
_ATTENTION = re.compile(r"(?<=\.attention\.)w([qkvo])(?=\.)")
# Tables that some files store beside the weights; they follow from the config.
_DERIVED = re.compile(r"freqs_cos|freqs_sin|rope\.freqs|layers\.\d+\.attention\.mask")
_UNREAD_ARGS = ("position_embedding_type", "use_cache")  # of the assignment's LlamaConfig


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, Any], Weights]:
    """Read a file; return LlamaConfig arguments and float32 CPU weights under the CMU names.

    Raises FileNotFoundError, or InputError that begins with the file's name.
    """
    path = Path(path)
    if not path.exists():
        remedy = "no such checkpoint; `bash setup.sh` downloads the published weights"
        raise FileNotFoundError(2, remedy, str(path))
    if not path.is_file():
        raise InputError(f"{path}: is not a file")
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise InputError(f"{path}: is empty; delete it and download it again")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: is a git-lfs pointer, not the weights; run `git lfs pull`")
    if is_torch_file(path):
        return parse_checkpoint(path, load_torch_file(path))
    try:
        return read_bin(path)
    except InputError as error:
        if head.lstrip().startswith((b"<", b"{")):  # checked last: a .bin may begin with any byte
            reason = "is a text page, not a checkpoint; download it again"
            raise InputError(f"{path}: {reason}") from error
        raise


def parse_checkpoint(
    path: str | os.PathLike, content: dict[str, Any]
) -> tuple[dict[str, Any], Weights]:
    """Return `read_checkpoint`'s pair for the content of the torch file `path`."""
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        raise InputError(
            f"{path}: is a bare state dict, without the model's sizes; wrap it: torch.save({{"
            "'model': state_dict, 'model_args': {'dim': 512, 'n_layers': 8, ...}}, path)"
        )
    absent = [key for key in ("model", "model_args") if not isinstance(content.get(key), dict)]
    if absent:
        held = listed(content) or "nothing"
        raise InputError(f"{path}: has no dict {' and no '.join(absent)}; it holds {held}")
    weights: Weights = {}
    for name, tensor in content["model"].items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
            raise InputError(f"{path}: model[{brief(name)}] is not a named tensor")
        name = _ATTENTION.sub(lambda m: f"compute_{_CMU_NAMES[m[1]]}", _PREFIXES.sub("", name))
        if _DERIVED.fullmatch(name):
            continue
        if name in weights:
            raise InputError(f"{path}: holds {listed([name])} twice, under two names")
        is_int8 = tensor.dtype == torch.int8 and tensor.ndim == 2 and name.endswith(".weight")
        if not (tensor.is_floating_point() or is_int8):
            raise InputError(f"{path}: {listed([name])} is not a dense tensor of real numbers")
        weights[name] = tensor if is_int8 else tensor.float()
    _dequantize(path, weights)
    args = {key: value for key, value in content["model_args"].items() if key not in _UNREAD_ARGS}
    for key in args:
        if not isinstance(key, str):
            raise InputError(f"{path}: model_args[{brief(key)}] has no string for a key")
    if "norm_eps" in args and "layer_norm_eps" not in args:  # llama2.c's and Meta's name
        args["layer_norm_eps"] = args.pop("norm_eps")
    return args, weights


def _dequantize(path: str | os.PathLike, weights: Weights) -> None:
    """Replace each int8 `X.weight` (O, I) and its `X.scale` (O,) by the float32 weight, in place.

    Raises InputError for a scale that is missing, misshapen or not finite.
    """
    for name in [name for name, tensor in weights.items() if tensor.dtype == torch.int8]:
        of_scale = f"{name.removesuffix('weight')}scale"
        scale, n_rows = weights.pop(of_scale, torch.empty(0)), len(weights[name])
        if scale.shape != (n_rows,) or not scale.isfinite().all():
            raise InputError(
                f"{path}: {listed([name])} is int8 and needs {n_rows} finite numbers in "
                f"{listed([of_scale])}; export the file again"
            )
        weights[name] = weights[name] * scale[:, None]


def load_exactly(module: nn.Module, weights: Weights) -> None:
    """Replace every parameter of `module` by the tensor of its name, in the parameter's dtype.

    A tensor is copied only for another dtype, or if it overlaps with others in memory. Raises
    InputError that lists missing, unexpected and misshapen tensors, or tensors with NaN or inf.
    """
    wanted = module.state_dict()
    _require_names_and_shapes(wanted, weights)
    weights = {name: weights[name].to(tensor.dtype) for name, tensor in wanted.items()}
    require_finite(weights)
    module.load_state_dict(_separate(weights), assign=True)


def require_finite(
    weights: Weights, remedy: str = "the file is damaged, or its training diverged"
) -> None:
    """Raise InputError that lists every tensor with a NaN or an infinity."""
    with torch.no_grad():
        faulty = [
            name
            for name, tensor in weights.items()
            if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax())
        ]
    if faulty:
        raise InputError(f"NaN or infinite numbers in {listed(faulty)}; {remedy}")


def _require_names_and_shapes(wanted: Weights, weights: Weights) -> None:
    faults = {
        "missing": [name for name in wanted if name not in weights],
        "unexpected": [name for name in weights if name not in wanted],
        "misshapen": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    }
    if "llama.norm.weight" in faults["unexpected"]:
        raise InputError("is a finetuned classifier, not a Llama; give it to tools.predict")
    if any(faults.values()):
        lines = [f"{kind}: {listed(names)}" for kind, names in faults.items() if names]
        raise InputError("; ".join(lines))


def _separate(weights: Weights) -> Weights:
    """Copy tensors that overlap themselves or another one: an optimizer steps each number once."""
    own, end = {}, 0  # end of the memory that is taken
    for name, tensor in sorted(weights.items(), key=lambda item: item[1].data_ptr()):
        if tensor.is_contiguous() and tensor.data_ptr() >= end:
            own[name], end = tensor, tensor.data_ptr() + tensor.nbytes
        else:
            own[name] = tensor.clone(memory_format=torch.contiguous_format)
    return own
