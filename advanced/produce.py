"""Produce a run by training, by choosing a prompt, or by averaging finished runs.

The methods act in this order: continue pretraining; build a model with its pooling; choose what is
trained; add penalties; train; average epochs; measure. Nothing is chosen by the test split.
"""

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from advanced import compose
from advanced.experiment import HEAD_SEED, Experiment
from advanced.methods import prompting, wise_ft
from advanced.methods.freezing import count_parameters
from advanced.record import Run, flattened
from fast.memory import peak_memory_mb, reset_peak_memory
from formats.torch_file import load_torch_file, save_torch_file
from llama import load_pretrained
from training.dataset import SentenceDataset
from training.loop import EpochReport, train_classifier
from training.options import recipe_of
from training.state import StateFile, require_space, state_path
from training.templates import Template
from utils import seed_everything

# ---------------------------------------------------------------- training


@dataclass
class EpochFiles:
    """The weights in which a run may end, beside its own file: of the best epoch (`n_last` is 0),
    or of the last `n_last` epochs. An interrupted run finds them again."""

    path: Path
    n_last: int

    def paths(self) -> list[Path]:
        """Return the files in the order of the epochs."""
        paths = self.path.parent.glob(f"{self.path.stem}.epoch-*.pt")
        return sorted(paths, key=lambda path: int(path.stem.rpartition("-")[2]))

    def offer(self, epoch: int, is_best: bool, model: nn.Module, names: Sequence[str]) -> None:
        """Keep the tensors `names` of the model, in which parametrizations are merged."""
        if is_best or self.n_last:
            model.eval()  # in which mixout's weights are the trained ones
            weights = {name: attrgetter(name)(model).detach().cpu() for name in names}
            save_torch_file(self.path.with_name(f"{self.path.stem}.epoch-{epoch}.pt"), weights)
            for path in self.paths()[: -max(self.n_last, 1)]:
                path.unlink()

    def remove(self) -> None:
        for path in self.paths():
            path.unlink()


def trained(
    experiment: Experiment, hyperparameters: dict[str, Any], seed: int, fold: int | None = None
) -> Run:
    """Train, write the weights, and return the record, with None for "test".

    Continue an interrupted run. Its state stays until `forget`, after its record is written.
    """
    settings = experiment.settings_with(hyperparameters)
    run: Run = {"seed": seed, "fold": fold, "hyperparameters": hyperparameters}
    path, epoch_files = experiment.weights_path(run), _epoch_files(experiment, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    train, dev = experiment.splits(seed, fold)
    checkpoint, pretrain_seconds = experiment.checkpoint(settings, train)
    started = time.monotonic()
    _reset_peak_memory(experiment.device)
    seed_everything(HEAD_SEED)
    model = experiment.build(settings, checkpoint)
    seed_everything(seed)
    identity = flattened({**experiment.identity(), "grid": None, **run})
    state_file = StateFile(state_path(path), identity, minutes=experiment.save_minutes)
    n_teachers = int("smart" in experiment.methods)  # in the state, which exists twice for a moment
    require_space(path, experiment.n_parameters, max(epoch_files.n_last, 1) + 2 * n_teachers)
    is_resumed = state_file.saved is not None
    train_data, dev_data = (experiment.encode(rows, settings) for rows in (train, dev))
    history = _train(experiment, run, model, train_data, dev_data, state_file, epoch_files)
    n_trainable, n_parameters = count_parameters(model)
    model = experiment.build(settings, checkpoint)
    model.load_state_dict(wise_ft.average(map(load_torch_file, epoch_files.paths())))
    best = max(history, key=lambda report: report.dev_accuracy).epoch
    return {
        **run,
        "versions": _versions(),
        "history": [asdict(report) for report in history],
        "best_epoch": None if epoch_files.n_last else best,
        "dev": experiment.metrics(model, dev, settings),
        "test": None,
        "weights_sha256": experiment.save(run, model),
        "seconds": None if is_resumed else round(time.monotonic() - started, 1),
        "pretrain_seconds": pretrain_seconds,
        "threads": torch.get_num_threads(),
        "trainable_parameters": n_trainable,
        "parameters": n_parameters,
        "peak_memory_mb": None if is_resumed else _peak_memory_mb(experiment.device),
    }


def _train(
    experiment: Experiment,
    run: Run,
    model: nn.Module,
    train_data: SentenceDataset,
    dev_data: SentenceDataset,
    state_file: StateFile,
    epoch_files: EpochFiles,
) -> list[EpochReport]:
    settings = experiment.settings_with(run["hyperparameters"])
    names = list(model.state_dict())  # before parametrizations rename them
    regularizer = compose.prepare(experiment.methods, model, settings)
    n_trainable, n_parameters = count_parameters(model)
    print(f"{epoch_files.path}: trains {n_trainable:,} of {n_parameters:,} parameters", flush=True)
    if state_file.saved is None:
        epoch_files.remove()  # of an abandoned run

    def on_epoch(report: EpochReport, is_best: bool) -> None:
        epoch_files.offer(report.epoch, is_best, model, names)
        print(report.in_words(), flush=True)

    return train_classifier(
        model,
        train_data,
        dev_data,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        seed=run["seed"],
        device=experiment.device,
        on_epoch=on_epoch,
        recipe=recipe_of(settings),
        state_file=state_file,
        regularizer=regularizer,
    )


def _epoch_files(experiment: Experiment, run: Run) -> EpochFiles:
    # A fold may not choose the epoch by which it is judged, so its last epoch counts.
    n_last = 0 if run["fold"] is None else 1
    if "last_epochs" in experiment.methods:
        n_last = experiment.settings_with(run["hyperparameters"]).last
    return EpochFiles(experiment.weights_path(run), n_last)


def forget(experiment: Experiment, run: Run) -> None:
    """Delete what a run needed to continue, once its record is written."""
    state_path(experiment.weights_path(run)).unlink(missing_ok=True)
    _epoch_files(experiment, run).remove()


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__}


def _reset_peak_memory(device: torch.device) -> None:
    reset_peak_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory_mb(device: torch.device) -> float:
    """Return the peak since `_reset_peak_memory`: of a CUDA device, else of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return round(peak_memory_mb(), 1)


# ---------------------------------------------------------------- prompts


def zero_shot(experiment: Experiment, seed: int) -> Run:
    """Choose a template and a scoring by train accuracy, and measure them on dev and test."""
    named = experiment.settings.template
    experiment.build(experiment.settings)  # an error comes now, not after the pretraining
    checkpoint, pretrain_seconds = experiment.checkpoint(experiment.settings, experiment.train)
    started = time.monotonic()
    _reset_peak_memory(experiment.device)
    tried = []
    for template in experiment.templates:
        if named in (None, template.name):
            tried += _try_scorings(experiment, template, checkpoint)
    best = max(tried, key=lambda one: one["train_accuracy"])
    run = {
        "seed": seed,
        "fold": None,
        "hyperparameters": {key: best[key] for key in ("template", "scoring")},
        "bias": best["bias"],
        "tried": [{k: v for k, v in one.items() if k != "bias"} for one in tried],
        "versions": _versions(),
        "history": [],
        "best_epoch": None,
        "seconds": round(time.monotonic() - started, 1),
        "pretrain_seconds": pretrain_seconds,
        "threads": torch.get_num_threads(),
        "trainable_parameters": 0,
        "parameters": experiment.n_parameters,
        "peak_memory_mb": _peak_memory_mb(experiment.device),
    }
    model, settings = experiment.load(run), experiment.settings_with(run["hyperparameters"])
    run["dev"] = experiment.metrics(model, experiment.dev, settings)
    run["test"] = experiment.metrics(model, experiment.test, settings)
    return run


def _try_scorings(
    experiment: Experiment, template: Template, checkpoint: str
) -> list[dict[str, Any]]:
    """Return the train accuracy and the bias of each scoring of a template."""
    settings = experiment.settings_with({"template": template.name})
    model = experiment.build(settings, checkpoint)
    labels = torch.tensor([label for _, label in experiment.train])
    examples = experiment.encode(experiment.train, settings).examples
    bf16 = settings.bf16
    probs = prompting.unbiased_probs(model, examples, settings.batch_size, bf16)  # (N, n_labels)
    tried = []
    for scoring in prompting.SCORINGS:
        prompting.calibrate(model, scoring, template, probs, bf16)
        predictions = (probs.log() + model.bias.cpu()).argmax(dim=1)
        accuracy = (predictions == labels).float().mean().item()
        one = {"template": template.name, "scoring": scoring, "train_accuracy": accuracy}
        tried.append({**one, "bias": model.bias.tolist()})
        print(f"{template.name}, {scoring}: train acc :: {accuracy:.3f}", flush=True)
    return tried


# ---------------------------------------------------------------- averages


def interpolated(experiment: Experiment, runs: list[Run], after: str) -> Run:
    """Average one run's weights with the pretrained ones (WiSE-FT), at the best alpha on dev.

    Ties go to the alpha nearer to the finetuned weights.
    """
    (run,) = runs
    settings = experiment.settings_with(run["hyperparameters"])
    model = experiment.load(run)
    finetuned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train, _ = experiment.splits(run["seed"], run["fold"])
    checkpoint, _ = experiment.checkpoint(settings, train)
    llama = load_pretrained(checkpoint, settings.attention)
    pretrained = {f"llama.{name}": tensor for name, tensor in llama.state_dict().items()}
    dev, tried = experiment.encode(experiment.dev, settings), []
    for alpha in wise_ft.ALPHAS:
        model.load_state_dict(wise_ft.interpolate(pretrained, finetuned, alpha))
        accuracy = experiment.evaluate(model, dev, settings).accuracy
        tried.append({"alpha": alpha, "dev_accuracy": accuracy})
    best = max(reversed(tried), key=lambda one: one["dev_accuracy"])["alpha"]
    model.load_state_dict(wise_ft.interpolate(pretrained, finetuned, best))
    return _averaged(experiment, model, runs, after) | {"alpha": best, "alphas": tried}


def soup(experiment: Experiment, runs: list[Run], after: str) -> Run:
    """Average the weights of all runs ("uniform"), or of those that do not lower dev accuracy."""
    settings = experiment.settings_with(runs[0]["hyperparameters"])
    states = [experiment.load(run).state_dict() for run in runs]
    model = experiment.load(runs[0])
    dev = experiment.encode(experiment.dev, settings)

    def score(state: wise_ft.State) -> float:
        model.load_state_dict(state)
        return experiment.evaluate(model, dev, settings).accuracy

    if settings.soup == "greedy":
        state, chosen = wise_ft.greedy_soup(states, score)
    else:
        state, chosen = wise_ft.average(states), range(len(states))
    model.load_state_dict(state)
    seeds = [run["seed"] for run in runs]
    made = _averaged(experiment, model, runs, after)
    return made | {"seeds": seeds, "ingredients": [seeds[i] for i in chosen]}


def _averaged(experiment: Experiment, model: nn.Module, runs: list[Run], after: str) -> Run:
    """Write the weights of an average and return its record, based on that of the first run."""
    made = {key: value for key, value in runs[0].items() if key not in ("alpha", "alphas")}
    made |= {"after": after, "history": [], "best_epoch": None, "seconds": None}
    made |= {"of": [run["weights_sha256"] for run in runs], "peak_memory_mb": None}
    made["weights_sha256"] = experiment.save(made, model)
    settings = experiment.settings_with(made["hyperparameters"])
    made["dev"] = experiment.metrics(model, experiment.dev, settings)
    made["test"] = experiment.metrics(model, experiment.test, settings)
    return made
