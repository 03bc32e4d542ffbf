"""Define the options that the training commands share, their defaults, and legal outputs."""

import argparse
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from config import ATTENTION_MODES, POOLINGS
from training import distributed
from training.loop import Recipe
from training.state import ROOT
from utils import InputError, is_device, real_path

# The assignment's defaults, and the bundled files that replace missing ones.
MODEL, MINI_MODEL = "stories42M.pt", "data/mini/model.pt"
PREFIX = (
    "I have wanted to see this thriller for a while, and it didn't disappoint. "
    "Keanu Reeves, playing the hero John Wick, is"
)
LR, MINI_LR = 2e-5, 5e-4  # of stories42M, of the bundled model
DATA, DEMO_DATA = (
    {
        **{split: f"data/{name}-{split}.txt" for split in ("train", "dev", "test")},
        "label_names": f"data/{name}-label-mapping.json",
    }
    for name in ("cfimdb", "demo")
)
# Files of the project that no output may replace. Outputs may lie in any of its folders.
OWN_FILES = (
    *("*.py", "*.sh", "*.toml", "requirements*.txt", "LICENSE"),
    *("README*.md", "structure.md", "CHANGELOG.md", "docs/*"),
    *("training/*.json", "benchmarks/*.json", "data/*.json"),
    *("data/mini/*", "data/*-train.txt", "data/*-dev.txt", "data/*-test.txt"),
    *("results/LOG.md", "results/records/*", "sanity_check.data"),
)


# ---------------------------------------------------------------- argparse types


def _number(kind: type, is_valid: Callable, wanted: str) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


positive_int = _number(int, lambda n: 1 <= n < 2**63, "an integer in [1, 2**63)")
non_negative_int = _number(int, lambda n: 0 <= n < 2**63, "an integer in [0, 2**63)")
seed_int = _number(int, lambda n: 0 <= n < 2**32, "an integer in [0, 2**32)")
positive_float = _number(float, lambda x: 0 < x < 1e30, "a number in (0, 1e30)")
non_negative_float = _number(float, lambda x: 0 <= x < 1e30, "a number in [0, 1e30)")
probability_below_one = _number(float, lambda x: 0 <= x < 1, "a number in [0, 1)")
share = _number(float, lambda x: 0 < x <= 1, "a number in (0, 1]")


def count(text: str) -> int:
    """Parse a number of things: 1500000, 1.5e6 or 1.5M."""
    number = r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[0-9]{1,2})?)"
    match = re.fullmatch(number + "([KMB]?)", text.strip(), re.IGNORECASE)
    units = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
    value = float(match[1]) * units[match[2].upper()] if match else 0.0
    if value < 1 or round(value, 3) % 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count such as 1500000 or 1.5M")
    return round(value)


# ---------------------------------------------------------------- options
# fmt: off


def add_data_options(
    parser: argparse.ArgumentParser, attention: str | None = None, pooling: str | None = None
) -> None:
    """Add the splits, the label names, the model, and how it reads a sentence.

    `attention` and `pooling` are the command's defaults; None takes them from the checkpoint.
    """
    add = parser.add_argument
    for split in ("train", "dev", "test"):
        add(f"--{split}", metavar="FILE",
            help=f"{split} split, `label ||| sentence` on each line (default: {DATA[split]}, "
            f"else {DEMO_DATA[split]})")
    add("--label-names", metavar="FILE",
        help=f"JSON list of the label names, in order (default: {DATA['label_names']}, else "
        f"{DEMO_DATA['label_names']})")
    add("--pretrained-model-path", metavar="FILE",
        help=f"pretrained checkpoint, .pt or llama2.c's .bin (default: {MODEL}, else {MINI_MODEL})")
    add("--tokenizer_path", metavar="FILE", help="SentencePiece model (default: the .model file "
        "beside the checkpoint, else tokenizer.model)")
    add("--max_sentence_len", type=positive_int, metavar="N",
        help="tokens to keep of a sentence (default: as many as the model has positions)")
    add("--attention", choices=ATTENTION_MODES, default=attention,
        help="full: every token attends to all others (the assignment), causal: to itself and to "
        f"earlier ones (default: {attention or 'the mode in the checkpoint, else full'})")
    add("--pooling", choices=POOLINGS, default=pooling,
        help="state that the classifier reads; position: of the batch's last column, last: of the "
        "last real token, mean: the mean of the real tokens "
        f"(default: {pooling or 'position in full mode, last in causal mode'})")
    add("--use_gpu", action="store_true", help="use CUDA, else Apple's MPS (default: the CPU)")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the assignment's hyperparameters."""
    add = parser.add_argument
    add("--epochs", type=positive_int, default=5, metavar="N",
        help="passes over the train split (default: %(default)s)")
    add("--batch_size", type=positive_int, default=8, metavar="N",
        help="sentences in a training step, or in an evaluation batch (default: %(default)s)")
    add("--hidden_dropout_prob", type=probability_below_one, default=0.3, metavar="P",
        help="dropout probability before the classification head (default: %(default)s)")
    add("--lr", type=positive_float, metavar="RATE",
        help=f"peak learning rate (default: {LR}, or {MINI_LR} with the bundled model)")


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add the training options that the assignment lacks."""
    add = parser.add_argument_group("finetuning, beyond the assignment").add_argument
    add("--warmup", type=probability_below_one, default=0.0, metavar="SHARE",
        help="share of all steps over which the learning rate rises to its peak (default: 0)")
    add("--lr_decay", nargs="?", choices=("linear", "cosine"), const="linear",
        help="decay to 0 after the warm-up; linear if no shape is given (default: the rate stays "
        "constant)")
    add("--layer_decay", type=share, default=1.0, metavar="FACTOR",
        help="learning rate of a layer divided by the rate of the layer above (default: 1)")
    add("--max_grad_norm", type=positive_float, metavar="NORM",
        help="L2 norm to which gradients are clipped (default: no clipping)")
    add("--backbone_dropout", type=probability_below_one, metavar="P",
        help="dropout probability of the embedding and the layers (default: the value in the "
        "checkpoint, else 0)")
    add("--label_smoothing", type=probability_below_one, default=0.0, metavar="SHARE",
        help="share of the uniform distribution in each target (default: 0)")
    add("--r_drop", type=non_negative_float, default=0.0, metavar="WEIGHT",
        help="weight of R-Drop's divergence in the loss (default: 0)")
    add("--patience", type=positive_int, metavar="N",
        help="epochs without a better dev accuracy after which training stops (default: never)")
    add("--bf16", action="store_true",
        help="compute in bfloat16 and keep float32 weights (default: float32)")
    add("--train_acc", choices=("extra", "running"), default="extra",
        help="measure train accuracy in an extra pass, or during the training passes "
        "(default: %(default)s)")


def add_state_options(parser: argparse.ArgumentParser) -> None:
    """Add when the state of a run is saved, and whether a saved run is resumed."""
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true",
        help="resume the saved run even if the source code changed (default: resume it if "
        "settings, data and code are the same)")
    add("--restart", action="store_true",
        help="start over and keep the saved run as ....state.old.pt (default: off)")
    add_save_minutes(parser)


def add_save_minutes(parser: argparse.ArgumentParser) -> None:
    """Add how often the state of a run is saved."""
    parser.add_argument("--save_minutes", type=non_negative_float, default=5.0, metavar="MINUTES",
        help="minutes between saves of the state; finetuning also saves it after each epoch "
        "(default: 5)")


# fmt: on
def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return the recipe; an option that `args` lacks has its default."""
    return Recipe(**{f.name: getattr(args, f.name, f.default) for f in fields(Recipe)})


def state_mode(args: argparse.Namespace) -> str:
    """Return the mode of `training.state.StateFile`."""
    for mode in ("resume", "restart"):
        if getattr(args, mode, False):
            return mode
    return "auto"


# ---------------------------------------------------------------- defaults


def fill_inputs(args: argparse.Namespace, splits: Sequence[str]) -> None:
    """Fill in the model, the data and the learning rate that were not given.

    The demo data is used if no data path was typed and one of CFIMDB's `splits` is missing. A line
    on standard error says so, and names the assignment's files that are read beside typed ones.
    """
    fill_model(args)
    if any(getattr(args, key) is not None for key in DATA):
        data = {key: _found(path) for key, path in DATA.items()}
        read = [*splits, "label_names"] if splits else []
        missing = [key for key in read if getattr(args, key) is None]
        if missing:
            files = ", ".join(f"--{key.replace('_', '-')} {data[key]}" for key in missing)
            distributed.say(f"not given, using the assignment's files: {files}")
    else:
        data, is_bundled = _choose(DATA, DEMO_DATA, splits)
        if is_bundled:
            distributed.say(
                "data/cfimdb-*.txt not found, using the bundled data/demo-*.txt; "
                "`bash setup.sh` downloads the assignment's data"
            )
    for key, value in {**data, "lr": LR}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)


def fill_model(args: argparse.Namespace) -> None:
    """Fill in the model, and the learning rate of the bundled one in commands that have a rate.

    The bundled model is used if stories42M.pt is missing. A line on standard error says so.
    """
    if args.pretrained_model_path is None:
        paths, is_bundled = _choose({"model": MODEL}, {"model": MINI_MODEL}, ["model"])
        args.pretrained_model_path = paths["model"]
        if is_bundled:
            _say_model_stands_in(getattr(args, "lr", MINI_LR))
    is_mini = real_path(args.pretrained_model_path) == real_path(ROOT / MINI_MODEL)
    if is_mini and getattr(args, "lr", MINI_LR) is None:
        args.lr = MINI_LR


def _say_model_stands_in(lr: float | None) -> None:
    line = f"{MODEL} not found, using the bundled {MINI_MODEL}; `bash setup.sh` downloads {MODEL}"
    if lr is not None and lr < MINI_LR / 10:
        line += f"; with --lr {lr} the bundled model learns slowly, its default is {MINI_LR}"
    distributed.say(line)


def _choose(
    wanted: dict[str, str], bundled: dict[str, str], needed: Sequence[str]
) -> tuple[dict[str, str], bool]:
    """Return paths, and whether they are the bundled ones.

    They are the first of `wanted` and `bundled` whose needed files are all in the current folder,
    or all in the project's folder. If neither is complete, they are `wanted`.
    """
    for paths in (wanted, bundled):
        for folder in (Path(), ROOT):
            if all((folder / paths[key]).exists() for key in needed):
                found = {
                    key: str(folder / path) if (folder / path).exists() else _found(path)
                    for key, path in paths.items()
                }
                return found, paths is bundled
    return wanted, False


def _found(path: str) -> str:
    """Return the path in the current folder, or in the project's if it is only there."""
    return str(ROOT / path) if not Path(path).exists() and (ROOT / path).exists() else path


def dataset_name(path: str, split: str = "train") -> str:
    """data/sst-train.txt or sst/train.txt -> sst"""
    whole = Path(os.path.abspath(path))  # noqa: PTH100, a link keeps its own name
    name = whole.parent.name if whole.stem == split else whole.stem.removesuffix(f"-{split}")
    return re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", name)  # characters that Windows refuses


# ---------------------------------------------------------------- outputs


def require_outputs(outputs: Iterable[str], inputs: Iterable[str | os.PathLike | None]) -> None:
    """Raise InputError, before the work, for an output that must not or cannot be written.

    No output may be one of `inputs`, a file of the project's own, or the name of two outputs.
    """
    read = {real_path(path) for path in inputs if path is not None}
    seen = set()
    for output in outputs:
        if not output or Path(output).is_dir():
            raise InputError(f"{output!r}: is not a name for an output file")
        if is_device(output):
            continue
        path = real_path(output)
        if path in read:
            raise InputError(f"{output}: is an input and would be replaced; name another output")
        if path.exists() and _is_own_file(path):
            raise InputError(f"{output}: is a file of the project; name another output")
        if path in seen:
            raise InputError(f"{output}: is the name of two outputs; give each its own")
        seen.add(path)
        if not path.parent.is_dir():
            raise InputError(f"{output}: its folder does not exist; make it first")
        if not os.access(path.parent, os.W_OK):
            raise InputError(f"{output}: its folder is not writable")


def _is_own_file(path: Path) -> bool:
    """Return whether a file belongs to the project: sources, documents, bundled data."""
    return ROOT in path.parents and any(path.match(pattern) for pattern in OWN_FILES)
