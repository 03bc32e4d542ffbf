"""Finetunes over seeds and keeps what was measured in results/NAME.json.

    python -m results.finetune NAME --lrs 3e-4 6e-4 --seeds 1 2 3 4 5 -- OPTIONS OF run_llama.py

With several learning rates the first seed tries each and the one with the best dev accuracy serves
all seeds; the test set has no say. What is finished is kept after every run and not run again.
"""

import json
import platform
import shlex
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import cli
import run_llama
from training import Evaluation
from utils import atomic_write, keep_freed_memory, seed_everything, sha256_of

FOLDER = Path(__file__).resolve().parent


def run_once(options: list[str], lr: float, seed: int) -> dict[str, Any]:
    """One finetuning by run_llama.py's own functions, its files in a folder that is thrown away."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [
            f"--{split}_out={folder}/run-{split}-finetuning-output.txt" for split in ("dev", "test")
        ]
        argv = [*options, "--option", "finetune", f"--lr={lr}", f"--seed={seed}", *outputs]
        args = run_llama.get_args(argv)
        args.filepath = f"{folder}/model.pt"
        seed_everything(seed)
        history = run_llama.train(args)
        results = run_llama.test(args)
    return {
        "lr": lr,
        "seed": seed,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "history": [asdict(report) for report in history],
        **{split: _figures(result) for split, result in results.items()},
    }


def _figures(result: Evaluation) -> dict[str, Any]:
    return {
        "accuracy": result.accuracy,
        "macro_f1": result.macro_f1,
        "n_sentences": len(result.predictions),
    }


def study(path: Path, command: str, options: list[str], lrs: list[float], seeds: list[int]) -> None:
    """Runs what `path` does not hold yet; ValueError where it is of other options or weights."""
    checkpoint = run_llama.get_args(options).pretrained_model_path
    identity = {
        "options": options,
        "checkpoint_sha256": sha256_of(checkpoint),
    }
    content = {"command": command, **identity, "lr": None, "runs": []}
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        for key, value in identity.items():
            if content[key] != value:
                raise ValueError(f"{path}: is of other {key}, {content[key]}; move it away")
        content["command"] = command
    done = {(run["lr"], run["seed"]): run for run in content["runs"]}

    def finish(lr: float, seed: int) -> dict[str, Any]:
        if (lr, seed) not in done:
            done[lr, seed] = run_once(options, lr, seed)
            content["runs"] = [done[key] for key in sorted(done)]
            _write(path, content)
        return done[lr, seed]

    tried = [finish(lr, seeds[0]) for lr in lrs]
    best = max(tried, key=lambda run: run["dev"]["accuracy"])["lr"]
    content["lr"] = best
    for seed in seeds:
        finish(best, seed)
    _write(path, content)
    print(f"wrote {path}")


def _write(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def main(argv: list[str] | None = None) -> None:
    parser = cli.ArgumentParser(
        prog="results.finetune",
        description=__doc__.split("\n")[0],
        epilog="After -- stand options of run_llama.py.",
    )
    parser.add_argument("name", help="results/NAME.json is written")
    parser.add_argument("--lrs", type=cli.positive_float, nargs="+", required=True)
    parser.add_argument("--seeds", type=cli.seed_int, nargs="+", default=[1, 2, 3, 4, 5])
    words = sys.argv[1:] if argv is None else argv
    end = words.index("--") if "--" in words else len(words)
    args, options = parser.parse_args(words[:end]), words[end + 1 :]
    path = FOLDER / f"{args.name}.json"
    lrs, seeds = map(str, args.lrs), map(str, args.seeds)
    command = shlex.join([args.name, "--lrs", *lrs, "--seeds", *seeds, "--", *options])
    keep_freed_memory()
    study(path, f"python -m results.finetune {command}", options, args.lrs, args.seeds)


if __name__ == "__main__":
    cli.run(main)
