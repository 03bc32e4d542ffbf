"""Finetune by one of the methods in advanced/methods/, or by several combined, over seeds.

    python -m advanced.run --list
    python -m advanced.run --method pretrain --method lora --seeds 1,2,3 --grid lr=1e-3,2e-3
    python -m advanced.run --method norms --folds 5 --seeds 1 --results_dir DIR --runs_dir DIR

A finished run is recorded in runs/records/<data set>-<method>-<model>.json and not repeated. The
same command resumes an interrupted run. Weights and states are in runs/. With --grid the first seed
tries every combination, and all seeds use the one with the best dev accuracy. The test split is
evaluated after all training.
"""

import argparse
import itertools
import re
import shlex
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from advanced import produce
from advanced.compose import AVERAGES, METHODS, OPTIONS, add_method_options, compose, options_of
from advanced.experiment import SETTINGS, Experiment
from advanced.record import Record, Run
from fast.memory import keep_freed_memory
from tokenizer import find_tokenizer_model
from training import distributed, options
from training.evaluation import write_predictions
from training.loop import DivergedError
from training.state import only_writer
from utils import ArgumentParser, flush_denormals, pick_device, run_script

DEFAULTS = {"attention": "causal", "pooling": "mean", "batch_size": 32, "train_acc": "running"}
FILES = ("train", "dev", "test", "label_names", "pretrained_model_path", "tokenizer_path")


# ---------------------------------------------------------------- options


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the options; `args.grid` becomes {option: values}, always with "lr"."""
    parser = ArgumentParser(__doc__, prog="python -m advanced.run")
    add = parser.add_argument
    add("--list", action="store_true",
        help="print each method and its description, and exit (default: off)")  # fmt: skip
    add("--method", action="append", choices=tuple(METHODS), metavar="NAME",
        help="method of --list; repeat the option to combine methods (default: plain)")  # fmt: skip
    add("--name", help="name in the results, such as r_drop (default: the methods' names)")
    add("--seeds", type=_seeds, default=[1, 2, 3, 4, 5], metavar="A,B",
        help="seeds, one run for each (default: 1,2,3,4,5)")  # fmt: skip
    add("--grid", nargs="+", action="extend", default=[], metavar="OPTION=A,B",
        help="values to try with the first seed; the best dev accuracy chooses (default: no "
        "search)")  # fmt: skip
    add("--folds", type=_folds, metavar="N",
        help="folds of a cross-validation over train and dev together (default: none)")  # fmt: skip
    add("--train_share", type=options.share, default=1.0, metavar="SHARE",
        help="share of each label's training sentences to use (default: 1)")  # fmt: skip
    for split in ("dev", "test"):
        add(f"--{split}_out", metavar="FILE", help=f"file for the {split} predictions of the seed "
            f"with the best dev accuracy, such as sst-{split}-advanced-output.txt (default: "
            "none)")  # fmt: skip
    add("--results_dir", default="runs/records", metavar="DIR",
        help="folder of the records (default: %(default)s)")  # fmt: skip
    add("--runs_dir", default="runs", metavar="DIR",
        help="folder of weights and states (default: %(default)s)")  # fmt: skip
    options.add_save_minutes(parser)
    options.add_data_options(parser, DEFAULTS["attention"], DEFAULTS["pooling"])
    options.add_training_options(parser)
    options.add_recipe_options(parser)
    add_method_options(parser)
    parser.set_defaults(**DEFAULTS)
    args = parser.parse_args(argv)
    args.method = args.method or ["plain"]
    args.grid = _grid(parser, args)
    _require_consistent(parser, args)
    return args


def _seeds(text: str) -> list[int]:
    seeds = [options.seed_int(word) for word in text.split(",")]
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice")
    return seeds


def _folds(text: str) -> int:
    folds = options.positive_int(text)
    if folds < 2:
        raise argparse.ArgumentTypeError("1 fold leaves nothing to train on; take 2 or more")
    return folds


def _grid(parser: ArgumentParser, args: argparse.Namespace) -> dict[str, list[Any]]:
    """Parse --grid lr=1e-4,3e-4 into {"lr": [1e-4, 3e-4]} by the types of the options."""
    known = {"lr", *SETTINGS, *options_of(args.method)}
    if "prompt" in args.method:
        known.remove("hidden_dropout_prob")  # a prompt has no head
    types = {action.dest: action.type for action in parser._actions if action.type and
             action.nargs is None and action.dest in known}  # fmt: skip
    grid: dict[str, list[Any]] = {}
    for word in args.grid:
        key, _, values = word.partition("=")
        if key not in types:
            parser.error(f"--grid {word}: choose from {', '.join(sorted(types))}")
        try:
            parsed = [types[key](value) for value in values.split(",")]
        except argparse.ArgumentTypeError as error:
            parser.error(f"--grid {key}: {error}")
        if key in grid or len(set(parsed)) < len(parsed):
            parser.error(f"--grid {word}: give each option once, with different values")
        grid[key] = parsed
    return grid


def _require_consistent(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error for options of other methods, and for ones that exclude each other."""
    used = options_of(args.method)
    for rows in OPTIONS.values():
        for name, (_, default, _) in rows.items():
            if name not in used and getattr(args, name) != default:
                owners = " or ".join(m for m, rows in OPTIONS.items() if name in rows)
                parser.error(f"--{name} is an option of --method {owners}")
    if args.name is not None and not re.fullmatch(r"[a-z0-9_+]{1,40}", args.name):
        parser.error(f"--name {args.name!r}: use only a-z, digits, _ and +")
    for split in ("dev", "test"):
        outfile, ending = getattr(args, f"{split}_out"), f"{split}-advanced-output.txt"
        if outfile is not None and not outfile.endswith(ending):
            parser.error(f"--{split}_out {outfile}: must end in {ending}")
    chosen = {"zero_shot", *AVERAGES} & set(args.method)
    folds_exclude = {  # a fold judges a model, so it may not influence its training
        "--train_share": args.train_share < 1.0,
        "--grid": args.grid,
        "--patience": args.patience,
        "--dev_out": args.dev_out,
        "--test_out": args.test_out,
        **{f"--method {name}": True for name in sorted(chosen)},
    }
    for option, is_given in folds_exclude.items():
        if args.folds and is_given:
            parser.error(f"--folds cannot be combined with {option}")
    if "zero_shot" in args.method and (args.grid or args.train_share < 1.0):
        parser.error("zero_shot trains nothing; leave out --grid and --train_share")
    if "soup" in args.method and args.train_share < 1.0:
        parser.error("each seed draws a share of its own, and a soup would have read all of them; "
                     "leave out --train_share")  # fmt: skip


# ---------------------------------------------------------------- runs


def run_all(experiment: Experiment, methods: tuple[str, ...], seeds: list[int]) -> list[Run]:
    """Run and show what the records lack; return the runs of the last method.

    `methods` has the averages, too.
    """
    record = Record(experiment.results_path(), experiment.identity(), experiment.command)
    if "zero_shot" in methods:
        if not record.runs:
            run = produce.zero_shot(experiment, seeds[0])
            record.content["chosen"] = run["hyperparameters"]
            record.add("runs", run)
        runs = record.runs
    else:
        runs = train_all(experiment, record, seeds)
    show(record, runs)
    if "wise_ft" in methods:
        runs = average_all(experiment, "wise_ft", [[run] for run in runs])
    if "soup" in methods:
        average = "+".join(name for name in AVERAGES if name in methods)
        runs = average_all(experiment, average, [runs])
    return runs


def train_all(experiment: Experiment, record: Record, seeds: list[int]) -> list[Run]:
    """Train what the record lacks and return all runs. The test split comes last."""
    grid = experiment.grid
    combinations = [dict(zip(grid, one, strict=True)) for one in itertools.product(*grid.values())]
    for hyperparameters in combinations:
        experiment.require_trainable(experiment.settings_with(hyperparameters))
    if record.content["chosen"] is None and len(combinations) > 1:
        _search(experiment, record, combinations, seeds[0])
    chosen = record.content["chosen"] = record.content["chosen"] or combinations[0]
    folds = range(experiment.folds) if experiment.folds else [None]
    runs = []
    for seed, fold in itertools.product(seeds, folds):
        run = record.find("runs", chosen, seed, fold)
        if run is None:
            run = produce.trained(experiment, chosen, seed, fold)
            record.add("runs", run)
        produce.forget(experiment, run)
        runs.append(run)
    for run in runs:
        if run["test"] is None and not experiment.folds:
            settings = experiment.settings_with(chosen)
            run["test"] = experiment.metrics(experiment.load(run), experiment.test, settings)
            record.write()
    return runs


def _search(
    experiment: Experiment, record: Record, combinations: list[dict[str, Any]], seed: int
) -> None:
    """Try every combination with one seed and make the best its run."""
    for hyperparameters in combinations:
        if record.find("trials", hyperparameters, seed) is None:
            try:
                trial = produce.trained(experiment, hyperparameters, seed)
            except DivergedError as error:
                print(f"{hyperparameters}: {error}", flush=True)
                trial = {"seed": seed, "fold": None, "hyperparameters": hyperparameters}
                trial["dev"] = {"accuracy": None}
            record.add("trials", trial)
    trials = list(record.content["trials"])
    chosen = record.choose(seed)
    for trial in trials:
        produce.forget(experiment, trial)
        if trial["hyperparameters"] != chosen:
            experiment.weights_path(trial).unlink(missing_ok=True)


def average_all(experiment: Experiment, average: str, groups: list[list[Run]]) -> list[Run]:
    """Return an average of each group of runs: "wise_ft", "soup", or a soup of "wise_ft+soup".

    The record keeps the averages that are still of the same weights.
    """
    record = Record(
        experiment.results_path(average), experiment.identity(average), experiment.command
    )
    is_soup, averages = average.endswith("soup"), []
    make = produce.soup if is_soup else produce.interpolated
    for runs in groups:
        of = [run["weights_sha256"] for run in runs]
        made = next((run for run in record.runs if run.get("of") == of), None)
        if made is None:
            made = make(experiment, runs, average)
            chosen, seed = made["hyperparameters"], made["seed"]
            others = [run for run in record.runs if run["seed"] != seed and not is_soup]
            record.content["chosen"] = chosen
            record.content["runs"] = [run for run in others if run["hyperparameters"] == chosen]
            record.add("runs", made)
        averages.append(made)
    show(record, averages)
    return averages


def show(record: Record, runs: list[Run]) -> None:
    """Print mean and standard deviation over the runs, a line for each split."""
    for split in ("dev", "test"):
        values = [run[split]["accuracy"] for run in runs if run[split] is not None]
        values = [value for value in values if value is not None]
        if values:
            spread = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
            n_runs = f"{len(values)} run{'s' if len(values) > 1 else ''}"
            print(f"{split} acc :: {statistics.mean(values):.3f}{spread}, {n_runs}")
    print(f"wrote {record.path}")


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> None:
    distributed.require_single_process("advanced.run")
    given = sys.argv[1:] if argv is None else argv
    args = get_args(given)
    if args.list:
        for name, description in METHODS.items():
            print(f"{name}: {description}")
        return
    methods = compose(args.method)
    options.fill_inputs(args, ("train", "dev", "test"))
    if args.tokenizer_path is None:
        args.tokenizer_path = str(find_tokenizer_model(args.pretrained_model_path))
    outputs = {split: getattr(args, f"{split}_out") for split in ("dev", "test")}
    outputs = {split: path for split, path in outputs.items() if path is not None}
    files = {key: getattr(args, key) for key in FILES}
    options.require_outputs(outputs.values(), files.values())
    keep_freed_memory()
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # as in run_llama.py
    flush_denormals()
    experiment = Experiment(
        methods=tuple(name for name in methods if name not in AVERAGES) or ("plain",),
        files=files,
        settings=SimpleNamespace(**vars(args)),
        grid={"lr": [args.lr], **args.grid},
        device=pick_device(args.use_gpu),
        command=shlex.join(["python", "-m", "advanced.run", *given]),
        results_dir=Path(args.results_dir),
        runs_dir=Path(args.runs_dir),
        name=args.name,
        folds=args.folds,
        train_share=args.train_share,
        save_minutes=args.save_minutes,
    )
    weights = experiment.runs_dir / experiment.stem()
    for folder in (experiment.results_dir, weights):
        folder.mkdir(parents=True, exist_ok=True)
    with only_writer(experiment.results_path(), weights, *outputs.values()):
        runs = run_all(experiment, methods, args.seeds)
        best = max(runs, key=lambda run: run["dev"]["accuracy"])
        settings = experiment.settings_with(best["hyperparameters"])
        for split, outfile in outputs.items():
            rows = experiment.dev if split == "dev" else experiment.test
            data = experiment.encode(rows, settings)
            result = experiment.evaluate(experiment.load(best), data, settings)
            write_predictions(outfile, result.predictions, result.sentences)
            seeds = ", ".join(map(str, best.get("ingredients", [best["seed"]])))
            print(f"wrote {outfile}: {split} predictions of seed {seeds}")


if __name__ == "__main__":
    run_script(main)
