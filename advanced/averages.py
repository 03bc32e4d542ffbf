"""What is made of finished runs' weights: WiSE-FT of each, a soup of all (see `wise_ft.py`).

Both choose by dev accuracy, look at the test split after that, and leave records of their own.
"""

from typing import Any

from torch import nn

from advanced.experiment import Experiment
from advanced.methods import wise_ft
from advanced.record import Record
from llama import load_pretrained

Run = dict[str, Any]
Finished = tuple[Record, list[Run]]


def toward_pretrained(experiment: Experiment, runs: list[Run], command: str) -> Finished:
    """For each run a further one, of the weights at the best alpha on the way to the pretrained.

    Of equal alphas the one nearer to the finetuned weights counts.
    """
    identity = _identity(experiment, "wise_ft")
    record = Record(experiment.results_path("wise_ft"), identity, command)
    if record.content["chosen"] not in (None, runs[0]["hyperparameters"]):
        record.content["runs"] = []  # of runs that another choice has replaced
    done = []
    for run in runs:
        found = record.find("runs", run["hyperparameters"], run["seed"], run["fold"])
        if found is None or not _is_of(found, [run]):
            record.content["runs"] = [one for one in record.content["runs"] if one is not found]
            found = _interpolated(experiment, run)
            record.content["chosen"] = run["hyperparameters"]
            record.add("runs", found)
        done.append(found)
    return record, done


def _interpolated(experiment: Experiment, run: Run) -> Run:
    options = experiment.options(run["hyperparameters"])
    model, dev = experiment.load(run), experiment.encode(experiment.dev, options)
    finetuned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train, _ = experiment.splits(run["seed"], run["fold"])
    checkpoint, _ = experiment.checkpoint(options, train)
    start = load_pretrained(checkpoint, options.attention)
    pretrained = {f"llama.{name}": tensor for name, tensor in start.state_dict().items()}
    tried = []
    for alpha in wise_ft.ALPHAS:
        model.load_state_dict(wise_ft.interpolate(pretrained, finetuned, alpha))
        accuracy = experiment.evaluate(model, dev, options).accuracy
        tried.append({"alpha": alpha, "dev_accuracy": accuracy})
    best = max(reversed(tried), key=lambda one: one["dev_accuracy"])["alpha"]
    model.load_state_dict(wise_ft.interpolate(pretrained, finetuned, best))
    return _measured(experiment, model, [run], "wise_ft") | {"alpha": best, "alphas": tried}


def soup(experiment: Experiment, runs: list[Run], command: str) -> Finished:
    """One run more: the mean of the runs' weights, or of those that together raise dev accuracy."""
    kind = experiment.args.soup
    after = "+".join(name for name in (runs[0].get("after", ""), "soup") if name)
    identity = _identity(experiment, after)
    identity["settings"]["soup"] = kind
    record = Record(experiment.results_path(after), identity, command)
    seeds = [run["seed"] for run in runs]
    earlier = record.content["runs"]
    if [one["seeds"] for one in earlier] == [seeds] and _is_of(earlier[0], runs):
        return record, earlier
    record.content["runs"] = []  # a soup of other runs makes room for this one
    states = [experiment.load(run).state_dict() for run in runs]
    options = experiment.options(runs[0]["hyperparameters"])
    model, dev = experiment.load(runs[0]), experiment.encode(experiment.dev, options)

    def score(state: dict[str, Any]) -> float:
        model.load_state_dict(state)
        return experiment.evaluate(model, dev, options).accuracy

    chosen = list(range(len(states)))
    if kind == "greedy":
        state, chosen = wise_ft.greedy_soup(states, score)
    else:
        state = wise_ft.average(states)
    model.load_state_dict(state)
    made = _measured(experiment, model, runs, after)
    made |= {"seeds": seeds, "ingredients": [runs[i]["seed"] for i in chosen]}
    record.content["chosen"] = made["hyperparameters"]
    record.add("runs", made)
    return record, [made]


def _identity(experiment: Experiment, after: str) -> dict[str, Any]:
    identity = {**experiment.identity(), "method": experiment.name_with(after)}
    identity["methods"] = [*identity["methods"], *after.split("+")]
    return identity


def _is_of(made: Run, runs: list[Run]) -> bool:
    """Whether an average is of these runs' weights."""
    return made.get("of") == [run["weights_sha256"] for run in runs]


def _measured(experiment: Experiment, model: nn.Module, runs: list[Run], after: str) -> Run:
    """The record of the first run with what `model`, made of them all, reaches; its weights are
    written."""
    run = runs[0]
    made = {key: value for key, value in run.items() if key not in ("alpha", "alphas")}
    made |= {"after": after, "history": [], "best_epoch": None}
    made["of"] = [one["weights_sha256"] for one in runs]
    made |= {"seconds": None, "peak_memory_mb": None}
    path = experiment.weights_path(run["hyperparameters"], run["seed"], run["fold"], after)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = experiment.options(run["hyperparameters"])
    made["weights_sha256"] = experiment.save(path, model, options)
    for split, rows in (("dev", experiment.dev), ("test", experiment.test)):
        data = experiment.encode(rows, options)
        made[split] = experiment.figures(experiment.evaluate(model, data, options))
    return made
