"""Language-model training of a Llama, from scratch or continued from a checkpoint.

    python -m pretraining.run --text reviews.txt.xz stories.txt.xz --out DIR --minutes 60

writes DIR/model.pt, DIR/tokenizer.model, DIR/history.csv, and DIR/state.pt, from which `--resume`
continues, on CPUs bit for bit where the number of threads is the same. With `--minutes` the
learning rate follows the clock, so such a run is never repeated exactly; with `--tokens` it is.
"""

import argparse
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

import cli
from config import LlamaConfig
from llama import Llama, load_pretrained
from pretraining import sharding
from pretraining.corpus import (
    TokenStream,
    digest_of,
    encode_documents,
    read_documents,
    split_heldout,
    train_tokenizer,
    without_overlap,
)
from pretraining.loop import FILES, HeldOut, Run, in_words, make_optimizers, train
from tokenizer import Tokenizer, find_tokenizer_model
from training import distributed
from training.distributed import Ranks
from training.locks import sole_writer
from utils import atomic_write, keep_freed_memory, pick_device, seed_everything

SHAPE = {
    "dim": 192,
    "n_layers": 6,
    "n_heads": 6,
    "n_kv_heads": 3,
    "hidden_dim": 512,
    "vocab_size": 4096,
    "max_seq_len": 1024,
}
# What is not compared between a run and its resumption: the budget, which may be given anew and
# stretches the rest of the schedule; paths, because the hash of the tokens tells texts apart; what
# does not touch the weights; and use_gpu, because the device itself is compared.
_NOT_COMPARED = (
    *("tokens", "minutes", "text", "exclude", "init", "tokenizer_path", "out", "resume"),
    *("half", "eval_minutes", "save_minutes", "use_gpu", "micro_tokens", "shard"),
)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.ArgumentParser(prog="pretraining.run", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--text", nargs="+", required=True, metavar="FILE", help=".txt, .xz or .gz, a document a "
        "line; a file named twice is read twice as often")  # fmt: skip
    add("--out", required=True, metavar="DIR")
    add("--init", metavar="CHECKPOINT", help="continue from it, with its shape and tokenizer")
    add("--tokenizer_path", help="an existing tokenizer; default: that of --init, else a new one")
    shape = parser.add_argument_group("shape, without --init")
    for name, default in SHAPE.items():
        shape.add_argument(f"--{name}", type=cli.positive_int, help=f"default {default}")
    add("--tokens", type=cli.count, help="to read, such as 30M; default: the text once")
    add(
        "--minutes",
        type=cli.positive_float,
        help="end at the latest this long after the first step",
    )
    add("--batch_tokens", type=cli.positive_int, default=4096, help="tokens of an update")
    add("--micro_tokens", type=cli.positive_int,
        help="of a pass, several of which make an update (default: all of its tokens)")  # fmt: skip
    add("--seq_len", type=cli.positive_int, default=256)
    add("--optimizer", choices=("adamw", "muon"), default="adamw",
        help="muon: for the matrices of the layers, AdamW for the rest")  # fmt: skip
    add("--lr", type=cli.positive_float, default=3e-3, help="peak, of AdamW")
    add("--muon_lr", type=cli.positive_float, default=6e-3, help="peak, of Muon if chosen")
    add("--weight_decay", type=cli.non_negative_float, default=0.1, help="of matrices")
    add("--warmup", type=cli.non_negative_int, default=100, help="steps")
    add("--decay_from", type=cli.probability_below_one, default=0.4,
        help="share of the run from which the rate falls linearly, to 0 at its end")  # fmt: skip
    add("--max_grad_norm", type=cli.positive_float, default=1.0)
    add("--seed", type=cli.seed_int, default=1337)
    add("--bf16", action=argparse.BooleanOptionalAction,
        help="autocast to bfloat16; default: on CUDA")  # fmt: skip
    add("--shard", action="store_true",
        help="cut the model over torchrun's ranks, for one that no device holds")  # fmt: skip
    add("--half", action="store_true", help="write model.pt in half precision")
    add("--heldout", type=cli.positive_int, default=200, help="documents held out of each file")
    add("--exclude", nargs="+", default=[], metavar="FILE",
        help="drop documents that share --exclude_words words in a row with these")  # fmt: skip
    add("--exclude_words", type=cli.positive_int, default=9)
    add("--eval_minutes", type=cli.non_negative_float, default=5.0)
    add("--save_minutes", type=cli.non_negative_float, default=5.0)
    add("--resume", action="store_true", help="continue the run in --out")
    add("--use_gpu", action="store_true", help="CUDA, else Apple MPS")
    args = parser.parse_args(argv)
    if args.init and any(getattr(args, name) for name in SHAPE):
        parser.error("--init brings its own shape; leave out --dim and the like")
    if (args.init or args.tokenizer_path) and args.vocab_size:
        parser.error("a given tokenizer brings its own vocabulary; leave out --vocab_size")
    if args.shard and not distributed.is_launched():
        parser.error("--shard is for several ranks; start it by torchrun")
    if args.shard and args.optimizer == "muon":
        parser.error("--shard and --optimizer muon exclude each other: Muon takes whole matrices")
    if args.batch_tokens % args.seq_len:
        parser.error(
            f"--batch_tokens {args.batch_tokens} is no multiple of --seq_len {args.seq_len}"
        )
    return args


def load_corpus(args: argparse.Namespace) -> tuple[list[str], dict[str, list[str]]]:
    """(training documents, held-out documents of each file by its name)."""
    evaluation = [text for path in args.exclude for text in read_documents(path)]
    evaluation = [text.partition(" ||| ")[2] or text for text in evaluation]
    splits, heldout = {}, {}
    for path in dict.fromkeys(args.text):
        documents = read_documents(path)
        n_read = len(documents)
        if evaluation:
            documents = without_overlap(documents, evaluation, args.exclude_words)
        n_dropped = n_read - len(documents)
        if len(documents) < 2:
            raise ValueError(
                f"{path}: has {len(documents)} documents, one a line, after {n_dropped} were "
                "dropped for overlap; one has to be held out and one to be left"
            )
        try:
            kept, held = split_heldout(documents, args.heldout)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; lower --heldout") from error
        name = Path(path).name.split(".")[0]
        if name in heldout:
            raise ValueError(f"--text: two files are called {name}; rename one")
        heldout[name] = held
        counts = f"{n_read:,} documents, {n_dropped} dropped for overlap, {len(held)} held out"
        splits[path] = kept, counts
    twins = {text for held in heldout.values() for text in held}
    train_texts = []
    for path, (kept, counts) in splits.items():
        others = [text for text in kept if text not in twins]  # what occurs twice is held out whole
        if not others:
            raise ValueError(f"{path}: all its documents are held out, or equal to one that is")
        repeats = args.text.count(path)
        train_texts += others * repeats
        print(f"{path}: {counts}, {len(others):,} to train on {repeats} times an epoch")
    return train_texts, heldout


def prepare_folder(args: argparse.Namespace) -> Path:
    """--out, made if need be; ValueError where it holds a run's files and --resume is not given."""
    folder = Path(args.out)
    state = folder / "state.pt"
    if args.resume and not state.is_file():
        raise ValueError(f"{state}: no such file, so there is nothing to --resume")
    held = [name for name in FILES if (folder / name).exists()]
    if held and not args.resume:
        remedy = "--resume continues the run, or " if "state.pt" in held else ""
        raise ValueError(f"{folder}: holds {', '.join(held)}; {remedy}name another --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def prepare_tokenizer(args: argparse.Namespace, folder: Path, texts: list[str]) -> Tokenizer:
    """The tokenizer in `folder`: of an earlier sitting, a copy of a given one, or a new one."""
    path = folder / "tokenizer.model"
    if not args.resume:
        given = args.tokenizer_path or (args.init and find_tokenizer_model(args.init))
        if given:
            Tokenizer(tokenizer_model=given)  # or one line that says what is wrong with it
            with open(given, "rb") as source, atomic_write(path, "wb") as copy:
                shutil.copyfileobj(source, copy)
        else:
            train_tokenizer(texts, args.vocab_size or SHAPE["vocab_size"], path)
    return Tokenizer(tokenizer_model=path)


def _new_config(args: argparse.Namespace, vocab_size: int) -> LlamaConfig:
    shape = {name: getattr(args, name) or default for name, default in SHAPE.items()}
    if args.seq_len > shape["max_seq_len"]:
        raise ValueError(f"--seq_len {args.seq_len} exceeds --max_seq_len {shape['max_seq_len']}")
    return LlamaConfig(**{**shape, "vocab_size": vocab_size, "attention": "causal"})


def make_model(args: argparse.Namespace, tokenizer: Tokenizer) -> Llama:
    if args.init:
        model = load_pretrained(args.init, attention="causal")
    else:
        model = Llama(_new_config(args, tokenizer.n_words))
    tokenizer.require_vocab_size(model.config.vocab_size)
    if args.seq_len > model.config.max_seq_len:
        raise ValueError(f"--seq_len {args.seq_len} exceeds {model.config.max_seq_len} positions")
    return model


def main(argv: list[str] | None = None) -> None:
    with distributed.silent_but_first():
        args = get_args(argv)
        with distributed.joined(args.use_gpu) as ranks:
            _main(args, ranks)


def _main(args: argparse.Namespace, ranks: Ranks) -> None:
    device = pick_device(args.use_gpu)
    bf16 = device.type == "cuda" if args.bf16 is None else args.bf16
    seed_everything(args.seed)
    with contextlib.ExitStack() as held:
        with ranks.agreed():
            if not args.init:  # an impossible shape is said before the text is read
                _new_config(args, args.vocab_size or SHAPE["vocab_size"])
            if ranks.is_first:
                folder = prepare_folder(args)
                held.enter_context(sole_writer(*(folder / name for name in FILES)))
        _pretrain(args, Path(args.out), device, bf16, ranks)


@contextlib.contextmanager
def _taken_back(path: Path) -> Iterator[None]:
    """After an error in this context the file is gone, which would bar the next command's way."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _pretrain(
    args: argparse.Namespace, folder: Path, device: torch.device, bf16: bool, ranks: Ranks
) -> None:
    begins = ranks.is_first and not args.resume
    with _taken_back(folder / "tokenizer.model") if begins else contextlib.nullcontext():
        run = _prepare(args, folder, device, bf16, ranks)
    if args.init and not args.resume:
        before = run.measure(args.batch_tokens // args.seq_len)
        print(f"before: {in_words(before)}", flush=True)
    train(run, device, args.eval_minutes, args.save_minutes)
    print(f"wrote {folder / 'model.pt'}, {folder / 'tokenizer.model'}, {folder / 'history.csv'}")


def _prepare(
    args: argparse.Namespace, folder: Path, device: torch.device, bf16: bool, ranks: Ranks
) -> Run:
    """The run of `args` at its first step, saved, or where the one to be resumed stands."""
    with ranks.agreed():
        texts, heldout_texts = load_corpus(args)
        if ranks.is_first:
            prepare_tokenizer(args, folder, texts)
    with ranks.copy_of(folder / "tokenizer.model") as path:
        tokenizer = Tokenizer(tokenizer_model=path)
    with ranks.agreed():
        model = make_model(args, tokenizer)
    if args.shard:
        sharding.shard(model, ranks)
    else:
        model.to(device)
    encoded = encode_documents(tokenizer, texts)
    n_tokens = sum(map(len, encoded))
    keep_freed_memory()
    settings = {key: value for key, value in vars(args).items() if key not in _NOT_COMPARED}
    settings |= {"text_sha256": digest_of(encoded), "bf16": bf16, "device": device.type}
    settings |= {"heldout_names": list(heldout_texts)}  # which the history's columns carry
    settings |= {f"model_{key}": value for key, value in model.config.to_dict().items()}
    ranks.require_same({**settings, **{key: vars(args)[key] for key in ("tokens", "minutes")}})
    run = Run(
        folder,
        model,
        make_optimizers(model, args.optimizer, args.lr, args.muon_lr, args.weight_decay),
        TokenStream(encoded, args.seq_len, args.seed),
        [HeldOut(name, held, tokenizer, args.seq_len) for name, held in heldout_texts.items()],
        settings,
        args.half,
        ranks,
        args.micro_tokens and max(1, args.micro_tokens // args.seq_len),
    )
    if args.resume:
        run.load()
        print(f"resumed at step {run.step:,}")
    else:
        ranks.seed_apart(args.seed)
        run.budget["tokens"] = n_tokens
    for key, given in (("tokens", args.tokens), ("minutes", args.minutes)):
        run.budget[key] = given or run.budget[key]
    with ranks.agreed():
        run.stream.require(args.batch_tokens // args.seq_len)
    if not args.resume:
        run.save()  # so that a kill at any time leaves something to resume
    print(
        (f"ranks: {ranks.size}, " if ranks.size > 1 else "")
        + f"device: {device}, bf16: {bf16}, attention: causal, parameters: "
        f"{sum(p.numel() for p in model.parameters()):,}, text: {n_tokens:,} tokens",
        flush=True,
    )
    return run


if __name__ == "__main__":
    cli.run(main)
