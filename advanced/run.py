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
from advanced.experiment import Experiment, Rows
from advanced.methods import METHODS, compose
from advanced.record import Record
from advanced.zero_shot import ZeroShot
from locks import sole_writer
from options import (
    add_data_options,
    add_recipe_options,
    add_training_options,
    fill_inputs,
    require_folder,
)
from training import Evaluation
from utils import allow_tf32, keep_freed_memory

MATRICES = ("compute_query", "compute_key", "compute_value", "compute_output", "w1", "w2", "w3")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.ArgumentParser(prog="advanced.run", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--list", action="store_true", help="say what each method does, and end")
    add("--method", action="append", choices=tuple(METHODS), metavar="NAME",
        help="see --list; given again, the methods combine (default: plain)")  # fmt: skip
    add("--name", help="in the results, in place of the method's, such as r_drop")
    add("--seeds", type=_seeds, default=[1, 2, 3, 4, 5], help="default 1,2,3,4,5")
    add("--grid", nargs="+", type=_grid, default=[], metavar="OPTION=A,B",
        help="values to choose from by the dev accuracy of the first seed")  # fmt: skip
    add("--folds", type=_folds, help="cross-validate over train and dev together")
    add("--train_share", type=cli.share, default=1.0, help="of each label's sentences")
    add("--dev_out", help="for the predictions of the best seed by dev accuracy (default: none)")
    add("--test_out", help="such as sst-test-advanced-output.txt (default: none)")
    add("--results_dir", default="results", help="default results")
    add("--runs_dir", default="runs", help="of weights and states (default runs)")
    add_data_options(parser)
    add_training_options(parser)
    add_recipe_options(parser)
    _add_method_options(parser)
    parser.set_defaults(attention="causal", pooling="mean", batch_size=32, train_acc="running")
    args = parser.parse_args(argv)
    args.grid = dict(args.grid)
    for key, values in args.grid.items():
        default = getattr(args, key, None)
        if key != "lr" and (isinstance(default, bool) or not isinstance(default, int | float)):
            parser.error(f"--grid {key}: is no option that takes a number")
        args.grid[key] = [int(v) if isinstance(default, int) else v for v in values]
    if args.name is not None and not re.fullmatch(r"[a-z0-9_+]{1,40}", args.name):
        parser.error(f"--name {args.name!r}: write it in letters a-z, digits, _ and +")
    if args.folds and args.train_share < 1.0:
        parser.error("--folds and --train_share exclude each other")
    return args


def _add_method_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("options of single methods").add_argument
    add("--pretrain_epochs", type=cli.positive_int, default=3)
    add("--pretrain_lr", type=cli.positive_float, default=3e-4)
    add("--template", help="by its name in templates.json (default: the data set's first)")
    add("--lora_rank", type=cli.positive_int, default=8)
    add("--lora_alpha", type=cli.positive_float, default=16.0)
    add("--lora_targets", nargs="+", choices=MATRICES, default=["compute_query", "compute_value"])
    add("--adapter_size", type=cli.positive_int, default=16)
    add("--mixout_p", type=cli.probability_below_one, default=0.5)
    add("--l2sp_weight", type=cli.non_negative_float, default=0.01)
    add("--l2sp_head_weight", type=cli.non_negative_float, default=0.01)
    add("--smart_weight", type=cli.non_negative_float, default=1.0)
    add("--smart_radius", type=cli.positive_float, default=0.1, help="/ RMS of the embeddings")
    add("--proximal_weight", type=cli.non_negative_float, default=0.0)
    add("--last", type=cli.positive_int, default=2, help="epochs that last_epochs averages")
    add("--soup", choices=("greedy", "uniform"), default="greedy")


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


def _grid(text: str) -> tuple[str, list[float]]:
    key, _, values = text.partition("=")
    try:
        return key, [float(value) for value in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like lr=1e-4,3e-4") from None


def run_all(experiment: Experiment, record: Record) -> list[dict[str, Any]]:
    """Runs what the record lacks; returns the wanted runs. The test split comes last."""
    args = experiment.args
    folds = range(args.folds) if args.folds else (None,)
    grid = {"lr": [args.lr], **args.grid}
    combinations = [dict(zip(grid, one, strict=True)) for one in itertools.product(*grid.values())]
    if record.content["chosen"] is None:
        if len(combinations) > 1 and args.folds:
            raise ValueError("--grid and --folds: choose on the dev split first, then name --lr")
        for one in combinations:
            if record.find("trials", one, args.seeds[0], folds[0]) is None:
                record.add("trials", experiment.train_run(one, args.seeds[0], folds[0]))
        record.choose()
    chosen = record.content["chosen"]
    wanted = [(seed, fold) for seed in args.seeds for fold in folds]
    for seed, fold in wanted:
        if record.find("runs", chosen, seed, fold) is None:
            record.add("runs", experiment.train_run(chosen, seed, fold))
    runs = [record.find("runs", chosen, seed, fold) for seed, fold in wanted]
    if not args.folds:
        _test(experiment, record, runs)
    return runs


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
    data = experiment.encode(experiment.test) if untested else None
    for run in untested:
        run["test"] = experiment.figures(experiment.evaluate(experiment.load(run), data))
        record.write()


def show(record: Record) -> None:
    """A line for each split: mean, standard deviation, and the seeds behind them."""
    runs = record.content["runs"]
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
            run_llama.write_predictions_to_file(
                split, outfile, result.accuracy, result.predictions, result.sentences
            )


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    if args.list:
        for name, what in METHODS.items():
            print(f"{name}: {what}")
        return
    methods = compose(args.method or ["plain"])
    fill_inputs(args, ("train", "dev", "test"))
    outputs = [path for path in (args.dev_out, args.test_out) if path]
    for path in outputs:
        require_folder(path)
    trained = tuple(name for name in methods if name not in ("wise_ft", "soup")) or ("plain",)
    if args.folds and {"wise_ft", "soup"} & set(methods):
        raise ValueError("wise_ft and soup choose by dev accuracy; leave out --folds")
    keep_freed_memory()
    allow_tf32()
    Path(args.results_dir).mkdir(parents=True, exist_ok=True)
    experiment = Experiment(args, trained)
    with sole_writer(experiment.results_path(), *outputs):
        record = Record(experiment.results_path(), experiment.identity(), command())
        if "zero_shot" in methods:
            prompt = zero_shot(experiment, record)
            show(record)
            chosen = record.content["runs"][0]
            _write_outputs(experiment, lambda rows: prompt.evaluate(chosen, rows))
            return
        runs = run_all(experiment, record)
        show(record)
        if "wise_ft" in methods:
            record, runs = toward_pretrained(experiment, runs, command())
            show(record)
        if "soup" in methods:
            record, runs = soup(experiment, runs, command())
            show(record)
        best = max(runs, key=lambda run: run["dev"]["accuracy"])
        _write_outputs(
            experiment,
            lambda rows: experiment.evaluate(experiment.load(best), experiment.encode(rows)),
        )


if __name__ == "__main__":
    cli.run(main)
