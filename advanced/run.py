"""Finetunes by the methods of this folder, alone or composed, over seeds.

    python -m advanced.run --method pretrain --method lora --seeds 1,2,3,4,5 --grid lr=1e-3,2e-3

What is finished is kept in results/<data set>-<method>-<model>.json and not run again; what was
interrupted goes on; weights and states lie in runs/. Of a --grid the first seed tries every
combination, and the one with the best dev accuracy serves all seeds. The test split is looked at
when all training is done.
"""

import argparse
import itertools
import re
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cli
import run_llama
from advanced.averages import soup, toward_pretrained
from advanced.catalogue import METHODS, compose
from advanced.experiment import FILES, OPTIONS_OF, SETTINGS, Experiment
from advanced.record import Record
from advanced.task import Rows
from advanced.zero_shot import ZeroShot
from training import distributed
from training.interrupts import Stopped, held_back
from training.locks import sole_writer
from training.loop import Evaluation
from training.options import (
    add_data_options,
    add_recipe_options,
    add_training_options,
    fill_inputs,
    require_different,
    require_output_names,
)
from training.state import DIVERGED
from utils import allow_tf32, keep_freed_memory

DEFAULTS = {"attention": "causal", "pooling": "mean", "batch_size": 32, "train_acc": "running"}
MATRICES = ("compute_query", "compute_key", "compute_value", "compute_output", "w1", "w2", "w3")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    here = ", ".join(f"--{option} {value}" for option, value in DEFAULTS.items())
    parser = cli.ArgumentParser(
        prog="advanced.run",
        description=__doc__.split("\n")[0],
        epilog=f"Whatever stands above, the defaults here are {here}.",
    )
    add = parser.add_argument
    add("--list", action="store_true", help="say what each method does, and end")
    add("--method", action="append", choices=tuple(METHODS), metavar="NAME",
        help="see --list; given again, the methods combine (default: plain)")  # fmt: skip
    add("--name", help="in the results, in place of the method's, such as r_drop")
    add("--seeds", type=_seeds, default=[1, 2, 3, 4, 5], help="default 1,2,3,4,5")
    add("--grid", nargs="+", action="extend", default=[], metavar="OPTION=A,B",
        help="values to choose from by the dev accuracy of the first seed")  # fmt: skip
    add("--folds", type=_folds, help="cross-validate over train and dev together")
    add("--train_share", type=cli.share, default=1.0, help="of each label's sentences")
    add("--dev_out", help="for the predictions of the best seed by dev accuracy (default: none)")
    add("--test_out", help="such as sst-test-advanced-output.txt (default: none)")
    add("--results_dir", default="results/records", help="default results/records")
    add("--runs_dir", default="runs", help="of weights and states (default runs)")
    add_data_options(parser)
    add_training_options(parser)
    add_recipe_options(parser)
    _add_method_options(parser)
    parser.set_defaults(**DEFAULTS)
    args = parser.parse_args(argv)
    args.grid = _grid(parser, args)
    _require_used(parser, args)
    if args.name is not None and not re.fullmatch(r"[a-z0-9_+]{1,40}", args.name):
        parser.error(f"--name {args.name!r}: write it in letters a-z, digits, _ and +")
    if args.folds:
        _require_no_choice_by_a_fold(parser, args)
    return args


def _require_no_choice_by_a_fold(parser: cli.ArgumentParser, args: argparse.Namespace) -> None:
    """A fold judges what was trained without it, so it may not have a say in the training."""
    if args.train_share < 1.0:
        parser.error("--folds and --train_share exclude each other")
    if args.grid:
        parser.error("--folds takes no --grid: choose on the dev split first, then name the value")
    if args.patience:
        parser.error("--folds takes no --patience: a fold may not end its own training")
    if args.dev_out or args.test_out:
        parser.error("--folds writes no outputs: its models have read most of dev")
    chosen = [name for name in args.method or () if name in ("wise_ft", "soup", "zero_shot")]
    if chosen:
        parser.error(f"--folds and {chosen[0]}: that chooses, or is not trained; leave out --folds")


def _require_used(parser: cli.ArgumentParser, args: argparse.Namespace) -> None:
    """A usage error for an option of a method that was not chosen."""
    methods = args.method or ["plain"]
    used = {key for name in methods for key in OPTIONS_OF.get(name, ())}
    for name, keys in OPTIONS_OF.items():
        for key in keys:
            if key not in used and getattr(args, key) != parser.get_default(key):
                parser.error(f"--{key} is an option of --method {name}, which was not chosen")


def _grid(parser: cli.ArgumentParser, args: argparse.Namespace) -> dict[str, list[Any]]:
    """--grid lr=1e-4,3e-4 as {"lr": [1e-4, 3e-4]}, each value checked as that of its option."""
    methods = args.method or ["plain"]
    known = {"lr", *SETTINGS, *(key for name in methods for key in OPTIONS_OF.get(name, ()))}
    if "prompt" in methods:
        known.remove("hidden_dropout_prob")  # of the head that a prompt does not have
    numbers = {action.dest: action.type for action in parser._actions if action.type and
               action.nargs is None and action.dest in known}  # fmt: skip
    grid: dict[str, list[Any]] = {}
    for word in args.grid:
        key, _, values = word.partition("=")
        if key not in numbers:
            parser.error(f"--grid {word}: choose from {', '.join(sorted(numbers))}")
        if key in grid:
            parser.error(f"--grid names {key} twice; give all its values at once, as {key}=A,B")
        try:
            grid[key] = [numbers[key](value) for value in values.split(",")]
        except argparse.ArgumentTypeError as error:
            parser.error(f"--grid {key}: {error}")
        if len(set(grid[key])) < len(grid[key]):
            parser.error(f"--grid {word}: has a value twice")
    return grid


def _add_method_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("options of single methods").add_argument
    add("--pretrain_epochs", type=cli.positive_int, default=3, help="over the train split (3)")
    add("--pretrain_lr", type=cli.positive_float, default=3e-4, help="default 3e-4")
    add("--template", help="by its name in templates.json (default: the data set's first)")
    add("--lora_rank", type=cli.positive_int, default=8, help="default 8")
    add("--lora_alpha", type=cli.positive_float, default=16.0, help="alpha / rank scales BA (16)")
    add("--lora_targets", nargs="+", choices=MATRICES, default=["compute_query", "compute_value"],
        help="default: compute_query compute_value")  # fmt: skip
    add("--adapter_size", type=cli.positive_int, default=16, help="width of the bottleneck (16)")
    add("--mixout_p", type=cli.probability_below_one, default=0.5,
        help="share of numbers put back to the pretrained ones (0.5)")  # fmt: skip
    add("--l2sp_weight", type=cli.non_negative_float, default=0.01, help="of the Llama (0.01)")
    add("--l2sp_head_weight", type=cli.non_negative_float, default=0.01, help="of the head (0.01)")
    add("--smart_weight", type=cli.non_negative_float, default=1.0, help="of SMART's 1st term (1)")
    add("--smart_radius", type=cli.positive_float, default=0.1,
        help="/ RMS of the embeddings (0.1)")  # fmt: skip
    add("--proximal_weight", type=cli.non_negative_float, default=1.0,
        help="of SMART's 2nd term (1)")  # fmt: skip
    add("--last", type=cli.positive_int, default=2, help="epochs that last_epochs averages (2)")
    add("--soup", choices=("greedy", "uniform"), default="greedy",
        help="add a seed where dev does not fall (greedy), or average all")  # fmt: skip


def _seeds(text: str) -> list[int]:
    seeds = [cli.seed_int(word) for word in text.split(",")]
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice")
    return seeds


def _folds(text: str) -> int:
    folds = cli.positive_int(text)
    if folds < 2:
        raise argparse.ArgumentTypeError("1 fold leaves nothing to train on; take 2 or more")
    return folds


def run_all(experiment: Experiment, record: Record) -> list[dict[str, Any]]:
    """Runs what the record lacks; returns the wanted runs. The test split comes last."""
    args = experiment.args
    folds = range(args.folds) if args.folds else (None,)
    grid = {"lr": [args.lr], **args.grid}
    combinations = [dict(zip(grid, one, strict=True)) for one in itertools.product(*grid.values())]
    for one in combinations:
        experiment.require_buildable(one)
    first = args.seeds[0]
    if record.content["chosen"] is None and len(combinations) == 1:
        record.content["chosen"] = combinations[0]
    if record.content["chosen"] is None:
        for one in combinations:
            if record.find("trials", one, first) is None:
                _add(experiment, record, "trials", _tried(experiment, one, first))
        chosen = record.choose(first)
        for one in combinations:
            if one != chosen:
                experiment.weights_path(one, first, None).unlink(missing_ok=True)
    chosen = record.content["chosen"]
    wanted = [(seed, fold) for seed in args.seeds for fold in folds]
    for seed, fold in wanted:
        if record.find("runs", chosen, seed, fold) is None:
            _add(experiment, record, "runs", experiment.train_run(chosen, seed, fold))
    runs = [record.find("runs", chosen, seed, fold) for seed, fold in wanted]
    if not args.folds:
        _test(experiment, record, runs)
    return runs


def _tried(experiment: Experiment, hyperparameters: dict[str, Any], seed: int) -> dict[str, Any]:
    """A trial of the search; what diverges has no accuracy and is not chosen."""
    try:
        return experiment.train_run(hyperparameters, seed)
    except ValueError as error:
        if DIVERGED not in str(error):
            raise
        print(f"{hyperparameters}: {error}", flush=True)
        run = {"seed": seed, "fold": None, "hyperparameters": hyperparameters}
        return {**run, "dev": {"accuracy": None}}


def _add(experiment: Experiment, record: Record, where: str, run: dict[str, Any]) -> None:
    """Its record first, then what it needed to go on: a stop in between costs nothing."""
    with held_back():
        record.add(where, run)
        experiment.forget(run)


def zero_shot(experiment: Experiment, record: Record) -> ZeroShot:
    """Chooses a prompt on the train split, unless the record has one, and measures it."""
    prompt = ZeroShot(experiment)
    if not record.content["runs"]:
        run = prompt.choose()
        for split, rows in (("dev", experiment.dev), ("test", experiment.test)):
            run[split] = experiment.figures(prompt.evaluate(run, rows))
        record.content["chosen"] = run["hyperparameters"]
        record.add("runs", run)
    return prompt


def _test(experiment: Experiment, record: Record, runs: list[dict[str, Any]]) -> None:
    untested = [run for run in runs if run["test"] is None]
    options = experiment.options(record.content["chosen"])
    data = experiment.encode(experiment.test, options) if untested else None
    for run in untested:
        result = experiment.evaluate(experiment.load(run), data, options)
        run["test"] = experiment.figures(result)
        record.write()


def show(record: Record, runs: list[dict[str, Any]]) -> None:
    """A line for each split: mean and standard deviation over the runs."""
    for split in ("dev", "test"):
        values = [run[split]["accuracy"] for run in runs if run[split] is not None]
        values = [value for value in values if value is not None]
        if values:
            spread = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
            of = f"{len(values)} run{'s' if len(values) > 1 else ''}"
            print(f"{split} acc :: {statistics.mean(values):.3f}{spread}, {of}")
    print(f"wrote {record.path}")


def command() -> str:
    return shlex.join(["python", "-m", "advanced.run", *sys.argv[1:]])


def _write_outputs(experiment: Experiment, predict: Callable[[Rows], Evaluation]) -> None:
    """What one run predicts, as `pred ||| sentence` lines."""
    for split, rows in (("dev", experiment.dev), ("test", experiment.test)):
        outfile = getattr(experiment.args, f"{split}_out")
        if outfile:
            result = predict(rows)
            print(f"{outfile}: predictions of the run with the best dev accuracy")
            run_llama.write_predictions_to_file(
                split, outfile, result.accuracy, result.predictions, result.sentences
            )


def main(argv: list[str] | None = None) -> None:
    distributed.require_alone("advanced.run")
    args = get_args(argv)
    if args.list:
        for name, what in METHODS.items():
            print(f"{name}: {what}")
        return
    methods = compose(args.method or ["plain"])
    if "zero_shot" in methods and (args.grid or args.train_share < 1.0):
        raise ValueError("zero_shot trains nothing; leave out --grid and --train_share")
    fill_inputs(args, ("train", "dev", "test"))
    require_output_names(args, "advanced")
    outputs = [path for path in (args.dev_out, args.test_out) if path is not None]
    require_different(outputs, [getattr(args, key) for key in FILES])
    keep_freed_memory()
    allow_tf32()
    trained = tuple(name for name in methods if name not in ("wise_ft", "soup")) or ("plain",)
    experiment = Experiment(args, trained)
    experiment.require_enough()
    Path(args.results_dir).mkdir(parents=True, exist_ok=True)
    try:
        with sole_writer(experiment.results_path(), *outputs):
            _run(experiment, methods)
    except Stopped as stopped:
        stopped.is_resumable, stopped.option = True, None
        raise


def _run(experiment: Experiment, methods: tuple[str, ...]) -> None:
    record = Record(experiment.results_path(), experiment.identity(), command())
    if "zero_shot" in methods:
        prompt = zero_shot(experiment, record)
        chosen = record.content["runs"][0]
        show(record, [chosen])
        _write_outputs(experiment, lambda rows: prompt.evaluate(chosen, rows))
        return
    runs = run_all(experiment, record)
    show(record, runs)
    if "wise_ft" in methods:
        record, runs = toward_pretrained(experiment, runs, command())
        show(record, runs)
    if "soup" in methods:
        record, runs = soup(experiment, runs, command())
        show(record, runs)
    best = max(runs, key=lambda run: run["dev"]["accuracy"])
    options = experiment.options(best["hyperparameters"])

    def predict(rows: Rows) -> Evaluation:
        data = experiment.encode(rows, options)
        return experiment.evaluate(experiment.load(best), data, options)

    _write_outputs(experiment, predict)


if __name__ == "__main__":
    cli.run(main)
