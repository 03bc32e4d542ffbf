"""The command line of `run_llama.py`: its options, their defaults, and where it may write."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import cli
from config import ATTENTION_MODES, POOLINGS
from training.state import state_path
from utils import has_no_content, real_path

ROOT = Path(__file__).resolve().parent.parent
SPLITS_READ_BY = {
    "generate": (),
    "prompt": ("dev", "test"),
    "finetune": ("train", "dev", "test"),
    "predict": (),
}
FORMATS = ("text", "jsonl", "csv")  # of predictions
GENERATION = ("prefix", "max_new_tokens", "temperature", "top_k", "top_p", "num_samples")
GENERATION += ("stop_at_eos",)
USED_BY_PREDICT = ("option", "checkpoint", "input", "sentences", "format", "tokenizer_path")
USED_BY_PREDICT += ("batch_size", "use_gpu", "seed")
WITH_HYPHENS = ("label_names", "pretrained_model_path")  # the assignment's other options have _


def _data(name: str) -> dict[str, str]:
    splits = {split: f"data/{name}-{split}.txt" for split in ("train", "dev", "test")}
    return {**splits, "label_names": f"data/{name}-label-mapping.json"}


# The assignment's defaults, and what stands in where their files are absent.
MODEL, MINI_MODEL = "stories42M.pt", "data/mini/model.pt"
DATA, DEMO_DATA = _data("cfimdb"), _data("demo")
LR, MINI_LR = 2e-5, 5e-4  # 13 times smaller, the bundled model needs greater steps


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the options, and prints them but where the output is for other programs (predict, and
    texts of one's own); a usage error is one line and exit code 2.

    Where a default's file is absent its bundled counterpart stands in (see `fill_defaults`).
    """
    parser = cli.ArgumentParser(
        description="Generate text, classify by prompting, finetune a classifier, or predict by it."
    )
    add_data_options(parser)
    add_training_options(parser)
    add = parser.add_argument
    add("--seed", type=cli.seed_int, default=1337)
    add(
        "--option",
        choices=tuple(SPLITS_READ_BY),
        default="generate",
        help="prompt leaves the Llama frozen, finetune trains it, predict uses what that left",
    )
    add("--generated_sentence_low_temp_out", default="generated-sentence-temp-0.txt")
    add("--generated_sentence_high_temp_out", default="generated-sentence-temp-1.txt")
    for split in ("dev", "test"):
        add(f"--{split}_out", help=f"default: cfimdb-{split}-prompting-output.txt or -finetuning-; "
            "demo- where the demo data stand in")  # fmt: skip
    recipe = add_recipe_options(parser)
    recipe("--resume", action="store_true", help="go on with an interrupted run of these options")
    own = {"generate": _add_generation_options(parser), "predict": _add_predict_options(parser)}
    argv = sys.argv[1:] if argv is None else argv
    n_before = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_intermixed_args(argv[:n_before])  # which would lose the "--"
    args.sentences = [*args.sentences, *argv[n_before + 1 :]]
    if args.resume and args.option != "finetune":
        parser.error("--resume goes on with a training; add --option finetune")
    for option, names in own.items():
        typed = [name for name in names if _is_changed(parser, args, name)]
        if typed and option != args.option:
            what = f"--{typed[0]}"
            if typed[0] == "sentences":
                what = f"{cli.shown(args.sentences[0])!r} is a sentence, which"
            parser.error(f"{what} goes with --option {option}, not {args.option}")
        for name in () if typed else names:
            delattr(args, name)
    if args.option == "predict":
        _require_predictable(parser, args)
        return args
    if generates_freely(args):
        _require_free(parser, args)
    fill_defaults(args)
    if not generates_freely(args):
        print(f"args: {vars(args)}")
    return args


def _is_changed(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str) -> bool:
    """Whether an option has another value than its default."""
    value, default = getattr(args, name), parser.get_default(name)
    return value != [] and (type(value) is not type(default) or value != default)


def generates_freely(args: argparse.Namespace) -> bool:
    """Whether texts of one's own are asked for, not the assignment's two."""
    return hasattr(args, "prefix")  # `get_args` leaves the options of `GENERATION` if one was typed


def _add_generation_options(parser: argparse.ArgumentParser) -> tuple[str, ...]:
    """Each is None or False if not typed."""
    add = parser.add_argument_group("generate: any of these prints texts of your own").add_argument
    add("--prefix", help="- reads standard input (default: the assignment's)")
    add("--max_new_tokens", type=cli.positive_int, help="default 75")
    add("--temperature", type=cli.non_negative_float, help="default 1; 0: the likeliest token")
    add("--top_k", type=cli.positive_int, help="sample among the K likeliest tokens")
    add("--top_p", type=cli.share, help="among the likeliest that have this share together")
    add("--num_samples", type=cli.positive_int, help="default 1")
    add("--stop_at_eos", action="store_true", help="end where the model ends the text")
    return GENERATION


def _add_predict_options(parser: argparse.ArgumentParser) -> tuple[str, ...]:
    add = parser.add_argument_group("predict").add_argument
    add("sentences", nargs="*", metavar="SENTENCE",
        help="else --input, else standard input; after -- it may begin with -")  # fmt: skip
    add("--checkpoint", help="what --option finetune, or advanced.run, left")
    add("--input", help="a sentence a line, or `label ||| sentence`; - is standard input")
    add("--format", choices=FORMATS, help="default text")
    return ("sentences", "checkpoint", "input", "format")


def _require_predictable(parser: cli.ArgumentParser, args: argparse.Namespace) -> None:
    """A usage error for what predict has no use for, since the checkpoint says it."""
    if getattr(args, "checkpoint", None) is None:
        parser.error("--option predict needs --checkpoint, such as finetune-sst-5-2e-05.pt")
    if args.input is not None and args.sentences:
        parser.error("--input and sentences exclude each other")
    for name in vars(args):
        if name not in USED_BY_PREDICT and _is_changed(parser, args, name):
            remedy = "; --input names the file" if name in ("train", "dev", "test") else ""
            option = name.replace("_", "-") if name in WITH_HYPHENS else name
            parser.error(f"--{option} does not go with --option predict{remedy}")


def _require_free(parser: cli.ArgumentParser, args: argparse.Namespace) -> None:
    """A usage error for what texts of one's own have no use for."""
    for name in ("generated_sentence_low_temp_out", "generated_sentence_high_temp_out"):
        if _is_changed(parser, args, name):
            parser.error(f"--{name} is for the assignment's texts; leave it out")
    if args.temperature == 0:
        for name in ("top_k", "top_p", "num_samples"):
            if getattr(args, name) not in (None, 1):
                parser.error(f"--{name} needs a --temperature above 0, where there is a choice")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """What is read: the splits, the label names, the model."""
    add = parser.add_argument
    add("--train", help=f"default: {DATA['train']}")
    add("--dev", help=f"default: {DATA['dev']}")
    add("--test", help=f"default: {DATA['test']}")
    add("--label-names", help=f"JSON list of names; default: {DATA['label_names']}")
    add("--pretrained-model-path", help=f".pt or llama2.c .bin; default: {MODEL}")
    add("--tokenizer_path", help="default: what a finetuned checkpoint recorded; the .model file "
        "beside a pretrained one, else at the root")  # fmt: skip
    add("--max_sentence_len", type=cli.positive_int, help="tokens kept of a sentence")
    add(
        "--attention",
        choices=ATTENTION_MODES,
        help="default: what the checkpoint records, else full (the assignment: no mask)",
    )
    add(
        "--pooling",
        choices=POOLINGS,
        help="state that is read; default: position with full attention, last with causal",
    )
    add("--use_gpu", action="store_true", help="CUDA, else Apple MPS")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--epochs", type=cli.positive_int, default=5)
    add("--batch_size", type=cli.positive_int, default=8)
    add("--hidden_dropout_prob", type=cli.probability_below_one, default=0.3)
    add(
        "--lr",
        type=cli.positive_float,
        help=f"default: {LR}, or {MINI_LR} for the bundled model standing in",
    )


def add_recipe_options(parser: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
    """How to train beyond that; returns what adds a further option to their group."""
    add = parser.add_argument_group("finetuning, beyond the assignment").add_argument
    add("--warmup", type=cli.probability_below_one, default=0.0, help="share of all steps")
    add(
        "--lr_decay",
        nargs="?",
        choices=("linear", "cosine"),
        const="linear",
        help="after it, to 0: linearly, or along half a wave",
    )
    add("--layer_decay", type=cli.share, default=1.0, help="learning rate of a layer / that above")
    add("--max_grad_norm", type=cli.positive_float, help="clip gradients to this norm")
    add("--backbone_dropout", type=cli.probability_below_one,
        help="inside the layers (default: what the checkpoint records, else 0)")  # fmt: skip
    add("--label_smoothing", type=cli.probability_below_one, default=0.0,
        help="share of a label that is spread evenly over all of them")  # fmt: skip
    add("--r_drop", type=cli.non_negative_float, default=0.0, help="weight of R-Drop's divergence")
    add("--patience", type=cli.positive_int, help="epochs without a better dev accuracy, then end")
    add("--bf16", action="store_true", help="train in bfloat16 (weights stay float32)")
    add(
        "--train_acc",
        choices=("extra", "running"),
        default="extra",
        help="from an extra pass over the train data, or from the training passes",
    )
    add(
        "--save_minutes",
        type=cli.non_negative_float,
        default=5.0,
        help="between saves of the state that a run goes on from (default 5, and after each epoch)",
    )
    return add


def fill_defaults(args: argparse.Namespace) -> None:
    """Gives every path that was not typed the assignment's default, or its bundled counterpart."""
    dataset = "demo" if fill_inputs(args, SPLITS_READ_BY[args.option]) else "cfimdb"
    kind = "finetuning" if args.option == "finetune" else "prompting"
    for split in ("dev", "test"):
        if getattr(args, f"{split}_out") is None:
            setattr(args, f"{split}_out", f"{dataset}-{split}-{kind}-output.txt")


def fill_inputs(args: argparse.Namespace, splits: Sequence[str]) -> bool:
    """Fills in the model, the data and the learning rate; returns whether the demo data stand in.

    The bundled model stands in where --pretrained-model-path was not typed and stories42M.pt is
    absent, the demo data where none of the data paths was typed and a file of CFIMDB among the
    `splits` that are read is absent. A line on standard error says so, and which of the
    assignment's files are read beside typed ones. What was typed is never replaced.
    """
    model, stands_in = _choose({"model": MODEL}, {"model": MINI_MODEL}, ["model"])
    if args.pretrained_model_path is None:
        args.pretrained_model_path = model["model"]
        if stands_in:
            args.lr = MINI_LR if args.lr is None else args.lr
            _say_stand_in(MODEL, MINI_MODEL)

    data, stands_in = _choose(DATA, DEMO_DATA, splits)
    if any(getattr(args, key) is not None for key in DATA):
        data, stands_in = {key: _found(path) for key, path in DATA.items()}, False
        _say_not_given(args, data, splits)
    if stands_in:
        _say_stand_in("data/cfimdb-*.txt", "data/demo-*.txt")
    for key, value in {**data, "lr": LR}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    return stands_in


def _choose(
    wanted: dict[str, str], bundled: dict[str, str], needed: Sequence[str]
) -> tuple[dict[str, str], bool]:
    """(paths, whether they are the bundled ones): the first of wanted, then bundled, whose needed
    files are all in the current folder, or all in the project's; if there are none, wanted."""
    for paths in (wanted, bundled):
        for folder in (Path(), ROOT):
            if all((folder / paths[key]).exists() for key in needed):
                found = {  # a folder of splits alone has the project's label names
                    key: str(folder / path) if (folder / path).exists() else _found(path)
                    for key, path in paths.items()
                }
                return found, paths is bundled
    return wanted, False


def _found(path: str) -> str:
    """The path in the current folder, or in the project's where it is only there."""
    return str(ROOT / path) if not Path(path).exists() and (ROOT / path).exists() else path


def _say_stand_in(absent: str, bundled: str) -> None:
    _say(
        f"{absent} not found, using the bundled {bundled}; `bash setup.sh` downloads the "
        "assignment's own"
    )


def _say_not_given(args: argparse.Namespace, data: dict[str, str], splits: Sequence[str]) -> None:
    """Typed data are seldom meant to be measured on another data set, or by its label names."""
    read = [*splits, "label_names"] if splits else []
    taken = [key for key in read if getattr(args, key) is None]
    if taken:
        listed = ", ".join(f"--{key.replace('_', '-')} {data[key]}" for key in taken)
        _say(f"not given and so the assignment's: {listed}")


def _say(line: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)


def checkpoint_path(args: argparse.Namespace) -> str:
    """`args.filepath` if a script set it, else a name that carries option, data set, epochs, lr."""
    name = f"{args.option}-{dataset_name(args.train)}-{args.epochs}-{args.lr}.pt"
    return getattr(args, "filepath", None) or name


def dataset_name(train: str) -> str:
    """data/sst-train.txt or sst/train.txt -> sst"""
    path = real_path(train)
    name = path.parent.name if path.stem == "train" else path.stem.removesuffix("-train")
    return re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", name)  # no name on Windows has these


def output_files(args: argparse.Namespace) -> list[str]:
    """The files that the option writes."""
    if args.option == "predict" or generates_freely(args):
        return []
    if args.option == "generate":
        return [args.generated_sentence_low_temp_out, args.generated_sentence_high_temp_out]
    predictions = [args.dev_out, args.test_out]
    if args.option == "prompt":
        return predictions
    checkpoint = checkpoint_path(args)
    return [checkpoint, str(state_path(checkpoint)), *predictions]


def input_files(args: argparse.Namespace) -> list[str | None]:
    """The files that the option reads, None where one is yet to be found."""
    splits = SPLITS_READ_BY[args.option]
    data = [*splits, "label_names"] if splits else []
    return [getattr(args, key) for key in (*data, "pretrained_model_path", "tokenizer_path")]


def require_folder(outfile: str) -> None:
    """A ValueError before the work, not after it, where `outfile` cannot be written."""
    if not outfile or Path(outfile).is_dir():
        raise ValueError(f"{outfile!r}: is no name for an output file")
    if has_no_content(outfile):  # opened as it is, with no neighbor
        return
    folder = real_path(outfile).parent
    if not folder.is_dir():
        raise ValueError(f"{outfile}: its folder does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{outfile}: its folder may not be written to")


def require_different(outfiles: Sequence[str], inputs: Sequence[str | None]) -> None:
    """A ValueError where two outputs have one name, or one would replace an input."""
    read = {real_path(path) for path in inputs if path is not None}
    seen = set()
    for outfile in outfiles:
        path = real_path(outfile)
        if has_no_content(path):
            continue
        if path in read:
            raise ValueError(f"{outfile}: is an input, and would be replaced; name another output")
        if path in seen:
            raise ValueError(f"{outfile}: is the name of two outputs; give each its own")
        seen.add(path)


def require_output_names(args: argparse.Namespace, kind: str) -> None:
    """ValueError for an output that is not named for its split, or cannot be; None is no output."""
    for split in ("dev", "test"):
        name, ending = getattr(args, f"{split}_out"), f"{split}-{kind}-output.txt"
        if name is None:
            continue
        if not name.endswith(ending):
            raise ValueError(f"--{split}_out {name}: must end in {ending}, as <dataset>-{ending}")
        require_folder(name)
