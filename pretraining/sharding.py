"""A model cut over the ranks of a run, for models beyond one device, and its state in as many
files.

`torch.distributed.fsdp.fully_shard` (Zhao et al. 2023, arXiv 2304.11277) leaves each rank a share
of the rows of every parameter; a layer's parameters are gathered when it computes, its gradients
summed into the shares. A rank's share is that of `torch.chunk`: of n rows on `size` ranks it is
ceil(n / size) of them from rank * ceil(n / size) on, or what is left.

A kept state is state.pt, which names files `state-<step>-<rank>.pt` with the rows of one rank each.
They are written first and state.pt last, so that it never names what is not whole.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from formats.checkpoint import load_torch_file
from llama import Llama
from training.distributed import Ranks
from utils import save_torch_file

Rows = dict[str, torch.Tensor]


def shard(model: Llama, ranks: Ranks) -> None:
    """Cuts the model in place; its parameters are DTensors then."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_cut(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "to_local")


def own_rows(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank has of a parameter, in its memory; of one that is not cut, all."""
    return parameter.detach().to_local() if is_cut(parameter) else parameter.detach()


def whole_weights(model: Llama) -> Rows:
    """All weights on the CPU, a tied output matrix once; all ranks must call it."""
    return {
        name: (p.full_tensor() if is_cut(p) else p).detach().cpu()
        for name, p in model.named_parameters()
    }


def rows_of(n: int, ranks: Ranks) -> slice:
    """Which of n rows are this rank's."""
    size = -(-n // ranks.size)
    return slice(min(n, ranks.rank * size), min(n, (ranks.rank + 1) * size))


def save_shard(folder: Path, step: int, ranks: Ranks, content: dict[str, Any]) -> list[str]:
    """Writes this rank's file; returns the names of all, which are there when this returns."""
    names = [f"state-{step}-{rank}.pt" for rank in range(ranks.size)]
    with ranks.agreed():
        save_torch_file(folder / names[ranks.rank], content)
    with ranks.agreed():
        absent = [name for name in names if ranks.is_first and not (folder / name).is_file()]
        if absent:
            raise ValueError(
                f"{folder}: lacks {absent[0]}, which another rank wrote; with --shard all machines "
                "need --out in a folder that they share"
            )
    return names


def remove_shards(folder: Path, but: Iterable[str] = ()) -> None:
    """Removes the files of earlier saves, and of one that was cut off."""
    for path in folder.glob("state-*-*.pt"):
        if path.name not in but:
            path.unlink(missing_ok=True)


def read_shards(folder: Path, names: Sequence[str]) -> tuple[Rows, list[dict[str, Any]]]:
    """The whole weights, and the state dicts of optimizers of whole parameters, from the files that
    state.pt names; ValueError or OSError where one is gone or damaged."""
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError("names files that are none of a state")
    parts = [load_torch_file(folder / name) for name in names]
    weights = {n: torch.cat([part["model"][n] for part in parts]) for n in parts[0]["model"]}
    of_ranks = zip(*(part["optimizers"] for part in parts), strict=True)
    return weights, [_joined(states) for states in of_ranks]


def _joined(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def all_rows(index: int, key: str, _own: torch.Tensor) -> torch.Tensor:
        return torch.cat([state["state"][index][key] for state in states])

    return _with_tensors(states[0], all_rows)


def put_rows(model: nn.Module, weights: Rows, ranks: Ranks) -> None:
    """Loads whole weights into a model that may be cut."""
    for name, parameter in model.named_parameters():
        own, full = own_rows(parameter), weights[name]
        full = full[rows_of(len(full), ranks)] if is_cut(parameter) else full
        if own.shape != full.shape:
            raise ValueError(f"{name} has shape {tuple(full.shape)}, not {tuple(own.shape)}")
        own.copy_(full)


def cut_optimizer(state: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Of an optimizer's state dict what is of this rank's rows."""
    return _with_tensors(state, lambda _index, _key, t: t[rows_of(len(t), ranks)].clone())


def _with_tensors(
    state: dict[str, Any], change: Callable[[int, str, torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    """An optimizer's state dict with other tensors."""
    changed = {
        index: {
            key: change(index, key, value) if isinstance(value, torch.Tensor) else value
            for key, value in entries.items()
        }
        for index, entries in state["state"].items()
    }
    return {**state, "state": changed}
