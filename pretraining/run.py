"""Train a Llama on text, from scratch or from a checkpoint.

    python -m pretraining.run --text STORIES.txt REVIEWS.txt.xz --out DIR --minutes 60
    python -m pretraining.run --text STORIES.txt --rated place=PLACES.tsv --out DIR --tokens 30M
    python -m pretraining.run --init data/mini/model.pt --text STORIES.txt --out DIR --lr 1e-3

The outputs are DIR/model.pt, DIR/tokenizer.model and DIR/history.csv. `--rated NAME.tsv` adds
reviews, and writes some of them to DIR/NAME-heldout.txt to prompt the model with. The same command
resumes an interrupted run from DIR/state.pt. With `--tokens` it ends, on one machine's CPU, in the
same bits as an uninterrupted run. With `--minutes` the learning rate follows the clock, so no two
runs are the same.
"""

import argparse
import random
import shutil
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

from config import LlamaConfig
from fast.memory import keep_freed_memory
from fast.threads import choose_threads
from llama import Llama, load_pretrained
from pretraining.corpus import (
    digest_of,
    encode_documents,
    load_corpus,
    name_of,
    train_tokenizer,
)
from pretraining.loop import HeldOut, Recipe, train_language_model
from pretraining.rated import (
    Example,
    ask,
    draw_passages,
    encode_examples,
    is_binary,
    labeled_lines,
)
from tokenizer import Tokenizer, find_tokenizer_model
from training import distributed, options
from training.state import StateFile, only_writer
from utils import (
    ArgumentParser,
    InputError,
    atomic_write,
    pick_device,
    run_script,
    seed_everything,
    sha256_of,
)

SHAPE = {
    "dim": 192,
    "n_layers": 6,
    "n_heads": 6,
    "n_kv_heads": 3,
    "hidden_dim": 512,
    "vocab_size": 4096,
    "max_seq_len": 1024,
}
OUTPUTS = ("model.pt", "tokenizer.model", "history.csv")  # beside state.pt and NAME-heldout.txt


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, prog="python -m pretraining.run")
    _add_data_options(parser)
    _add_training_options(parser)
    options.add_state_options(parser)
    args = parser.parse_args(argv)
    if args.init and any(getattr(args, name) for name in SHAPE if name != "n_layers"):
        parser.error("--init brings its own shape; leave out --dim and the like")
    if args.init == "":  # of an unset variable; it would train a new model
        parser.error("--init '' names no file")
    if args.tokenizer_path and args.vocab_size:
        parser.error("--tokenizer_path brings its own vocabulary; leave out --vocab_size")
    if not args.text and not args.rated:
        parser.error("nothing to read; give --text or --rated")
    if args.batch_tokens < args.seq_len:
        parser.error(f"--batch_tokens {args.batch_tokens} is less than --seq_len {args.seq_len}")
    return args


def _add_data_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--text", nargs="+", default=[], metavar="FILE", help="text, plain, .xz or .gz, with a "
        "document on each line; a file named twice is read twice an epoch (default: none)"
        )  # fmt: skip
    add("--rated", nargs="+", type=rated_file, default=[], metavar="[SUBJECT=]FILE",
        help="reviews, `rating TAB text` on each line, ratings from 0 to 1; each review is read "
        "with questions such as 'Is this SUBJECT bad or good?' and their answers (default: none; "
        "SUBJECT is movie if not given)")  # fmt: skip
    add("--passages", type=options.non_negative_int, default=2, metavar="N",
        help="passages of each review of --rated to ask about (default: %(default)s)")  # fmt: skip
    add("--out", required=True, metavar="DIR",
        help="folder of the outputs, made if missing (required)")  # fmt: skip
    add("--init", metavar="CHECKPOINT", help="checkpoint whose weights, shape and tokenizer to "
        "start from (default: none, new weights)")  # fmt: skip
    add("--tokenizer_path", metavar="FILE",
        help="SentencePiece model (default: the tokenizer of --init, else a new one)")  # fmt: skip
    add("--heldout", type=options.positive_int, default=200, metavar="N",
        help="documents of each file to hold out and evaluate (default: %(default)s)")  # fmt: skip
    add("--exclude", nargs="+", default=[], metavar="FILE", help="evaluation files; drop and "
        "print documents that share --exclude_words words in a row with them, or have one of their "
        "lines of at least four words as whole sentences (default: none)")  # fmt: skip
    add("--exclude_words", type=options.positive_int, default=9, metavar="N",
        help="words in a row for --exclude (default: %(default)s)")  # fmt: skip
    shape = parser.add_argument_group("shape of a new model; --init has its own")
    for name, words in (
        ("dim", "width of the residual stream"),
        ("n_layers", "layers; with --init the checkpoint's layers, repeated if it has fewer"),
        ("n_heads", "query heads of a layer"),
        ("n_kv_heads", "key and value heads of a layer"),
        ("hidden_dim", "width of the feed-forward networks"),
        ("vocab_size", "tokens in the vocabulary of a new tokenizer"),
        ("max_seq_len", "positions, the most tokens that the model reads at once"),
    ):
        shape.add_argument(f"--{name}", type=options.positive_int, metavar="N",
            help=f"{words} (default: {SHAPE[name]})")  # fmt: skip


def _add_training_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    for name, kind, metavar, default, words in (
        ("tokens", options.count, "N", None, "tokens to read, such as 30M (default: one epoch)"),
        ("minutes", options.positive_float, "MINUTES", None, "minutes after which the run ends "
            "(default: no limit)"),
        ("seq_len", options.positive_int, "N", Recipe.seq_len, "tokens in a window, or in a "
            "question with its text and answer"),
        ("batch_tokens", options.positive_int, "N", Recipe.batch_tokens, "tokens in a step, about"),
        ("micro_tokens", options.positive_int, "N", None, "tokens that a process computes at a "
            "time (default: all of its step)"),
        ("lr", options.positive_float, "RATE", Recipe.lr, "peak learning rate of AdamW"),
        ("muon_lr", options.positive_float, "RATE", Recipe.muon_lr, "peak learning rate of Muon"),
        ("weight_decay", options.non_negative_float, "FACTOR", Recipe.weight_decay, "weight decay "
            "of the matrices"),
        ("warmup", options.non_negative_int, "N", Recipe.warmup, "steps until the peak learning "
            "rate"),
        ("decay_from", options.probability_below_one, "SHARE", Recipe.decay_from, "share of the "
            "run after which the learning rate falls linearly to 0"),
        ("max_grad_norm", options.positive_float, "NORM", Recipe.max_grad_norm, "L2 norm to which "
            "the gradients are clipped"),
        ("answer_weight", options.positive_float, "WEIGHT", Recipe.answer_weight, "weight of an "
            "answer's tokens in the loss; all other tokens have weight 1"),
        ("seed", options.seed_int, "N", Recipe.seed, "seed of initial weights, order and dropout"),
        ("eval_minutes", options.non_negative_float, "MINUTES", 5.0, "minutes between "
            "evaluations"),
    ):  # fmt: skip
        words = words if default is None else f"{words} (default: {default})"
        group.add_argument(f"--{name}", type=kind, metavar=metavar, default=default, help=words)
    flag = group.add_argument
    flag("--optimizer", choices=("adamw", "muon"), default=Recipe.optimizer,
        help="optimizer of the layers' matrices; AdamW trains all other weights (default: "
        "%(default)s)")  # fmt: skip
    flag("--bf16", action=argparse.BooleanOptionalAction,
        help="compute in bfloat16 and keep float32 weights (default: on CUDA only)")  # fmt: skip
    flag("--half", action="store_true", help="write model.pt in float16 (default: float32)")
    flag("--use_gpu", action="store_true", help="use CUDA, else Apple's MPS (default: the CPU)")


def rated_file(text: str) -> tuple[str, str]:
    """'place=a.tsv' -> ("place", "a.tsv"), 'a.tsv' -> ("movie", "a.tsv")."""
    subject, _, path = text.partition("=")
    return (subject, path) if path and subject.isalpha() else ("movie", text)


def heldout_file(path: str) -> str:
    """Return the name of the output with the held-out reviews of a file."""
    return f"{name_of(path)}-heldout.txt"


def require_unused(folder: Path, names: list[str]) -> None:
    """Raise InputError if `folder` holds a finished run, or outputs without a state."""
    held = [name for name in names if (folder / name).exists()]
    if "model.pt" in held or (held and not (folder / "state.pt").exists()):
        raise InputError(
            f"{folder}: already holds {', '.join(held)}; name another --out, or --restart to begin "
            "anew and keep what is there as *.old.*"
        )


def keep_old(folder: Path, names: list[str]) -> None:
    """Rename the outputs of an earlier run: model.pt to model.old.pt."""
    for path in (folder / name for name in names):
        if path.exists():
            path.replace(path.with_name(f"{path.stem}.old{path.suffix}"))


def make_model(
    init: str | None,
    shape: dict[str, int],
    tokenizer_path: str | PathLike | None,
    seq_len: int,
    n_layers: int | None = None,
) -> Llama:
    """Return a checkpoint's model, with `n_layers` if given, or a new one; attention is causal."""
    if tokenizer_path:
        tokenizer = Tokenizer(tokenizer_model=tokenizer_path)
        shape = {**shape, "vocab_size": tokenizer.n_words}
    if init:
        model = load_pretrained(init, attention="causal")
        tokenizer.require_vocab_size(model.config.vocab_size)
        model = deepen(model, n_layers) if n_layers else model
    else:
        model = Llama(LlamaConfig(**shape, attention="causal"))
    if seq_len > model.config.max_seq_len:
        raise InputError(f"--seq_len {seq_len} exceeds max_seq_len {model.config.max_seq_len}")
    return model


def deepen(model: Llama, n_layers: int) -> Llama:
    """Return a model of `n_layers` layers that repeat the given one's in their order.

    Training such a model costs less than from scratch (Gong et al. 2019; Du et al. 2024, arXiv
    2405.15319, G_stack). Raises InputError for fewer layers than the model has.
    """
    config, n_old = model.config.to_dict(), model.config.n_layers
    if n_layers < n_old:
        raise InputError(f"--n_layers {n_layers} is less than the {n_old} of --init")
    weights = model.state_dict()
    for i in range(n_old, n_layers):
        layer = model.layers[i % n_old].state_dict()
        weights |= {f"layers.{i}.{name}": weight for name, weight in layer.items()}
    return Llama.from_weights(LlamaConfig(**{**config, "n_layers": n_layers}), weights)


@dataclass
class Corpus:
    """What a model is trained on, and what is held out of each file, by the file's name."""

    texts: list[str]
    examples: list[Example]
    heldout_texts: dict[str, list[str]]
    heldout_lines: dict[str, str]  # whole reviews as lines of `label ||| sentence`
    heldout_examples: dict[str, list[Example]]  # made of passages of these reviews

    def digests(self) -> dict[str, str]:
        heldout = {**self.heldout_texts, **self.heldout_examples}
        named = {f"heldout_{name}": held for name, held in heldout.items()}
        parts = {"text": self.texts, "examples": self.examples, **named}
        return {f"{name}_sha256": digest_of(part) for name, part in parts.items()}


def read_corpus(args: argparse.Namespace) -> Corpus:
    """Read --text and --rated; for --passages see `draw_passages`."""
    texts, rated = args.text, args.rated
    paths = [path for _, path in rated]
    train, heldout = load_corpus(texts, paths, args.heldout, args.exclude, args.exclude_words)
    corpus = Corpus(
        texts=[document.text for path in texts for document in train[path]],
        examples=[],
        heldout_texts={name_of(path): [text for text, _ in heldout[path]] for path in texts},
        heldout_lines={},
        heldout_examples={},
    )
    binary = {path: is_binary(train[path] + heldout[path]) for path in dict.fromkeys(paths)}
    rng = random.Random(args.seed)
    for subject, path in rated:
        n_passages = args.passages * len(train[path])
        reviews = [*train[path], *draw_passages(train[path], n_passages, rng)]
        corpus.examples += ask(reviews, subject, binary[path], rng)
    for subject, path in dict.fromkeys(rated):  # a file that is read twice is measured once
        fixed = random.Random(0)  # the same held-out questions in every run
        chosen = draw_passages(heldout[path], args.heldout, fixed)
        corpus.heldout_examples[name_of(path)] = ask(chosen, subject, binary[path], fixed)
        corpus.heldout_lines[heldout_file(path)] = labeled_lines(heldout[path], binary[path])
    return corpus


def pretrain(
    model: Llama,
    corpus: Corpus,
    folder: Path,
    recipe: Recipe,
    *,
    tokenizer_path: str | PathLike | None,
    state_file: StateFile,
    **named: Any,
) -> None:
    """Tokenize the corpus and train on it; for `named` see `train_language_model`.

    A new run writes tokenizer.model and the held-out reviews first, and removes them if it ends
    before it has a state.
    """
    is_new = state_file.saved is None and distributed.is_main()
    try:
        if is_new:
            keep_old(folder, [*OUTPUTS, *corpus.heldout_lines])
            write_tokenizer(folder / "tokenizer.model", tokenizer_path, corpus, model)
            for name, lines in corpus.heldout_lines.items():
                with atomic_write(folder / name) as file:
                    file.write(lines)
        distributed.barrier()  # nobody reads the tokenizer before it is written
        tokenizer = Tokenizer(tokenizer_model=folder / "tokenizer.model")
        texts = encode_documents(tokenizer, corpus.texts)
        examples = encode_examples(tokenizer, corpus.examples)
        heldout = [
            HeldOut.texts(name, held, tokenizer, recipe.seq_len)
            for name, held in corpus.heldout_texts.items()
        ]
        heldout += [
            HeldOut.answers(name, held, tokenizer, recipe.seq_len)
            for name, held in corpus.heldout_examples.items()
        ]
        n_tokens = sum(map(len, texts)) + sum(len(ids) for ids, _ in examples)
        print(
            f"processes: {distributed.world_size()}, device: {model.norm.weight.device}, "
            f"bf16: {recipe.bf16}, attention: causal, "
            f"parameters: {sum(p.numel() for p in model.parameters()):,}, "
            f"text: {n_tokens:,} tokens, {len(examples):,} answers",
            flush=True,
        )
        keep_freed_memory()
        train_language_model(
            model, texts, heldout, folder, recipe,
            examples=examples, state_file=state_file, **named,
        )  # fmt: skip
    except BaseException:
        if is_new and not state_file.path.exists():
            for name in ("tokenizer.model", *corpus.heldout_lines):
                (folder / name).unlink(missing_ok=True)
        raise


def write_tokenizer(
    path: Path, existing: str | PathLike | None, corpus: Corpus, model: Llama
) -> None:
    """Copy the existing tokenizer, or train one of the model's size on all that it will read."""
    if existing:
        shutil.copyfile(existing, path)
    else:
        asked = [f"{example.text} {example.answer}" for example in corpus.examples]
        train_tokenizer(corpus.texts + asked, model.config.vocab_size, path)


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    folder = Path(args.out)
    tokenizer_path = args.tokenizer_path or (args.init and find_tokenizer_model(args.init))
    with distributed.process_group(args.use_gpu):
        device = pick_device(args.use_gpu)
        args.bf16 = device.type == "cuda" if args.bf16 is None else args.bf16
        recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
        shape = {name: getattr(args, name) or default for name, default in SHAPE.items()}
        seed_everything(args.seed)
        model = make_model(args.init, shape, tokenizer_path, args.seq_len, args.n_layers).to(device)
        choose_threads(model, args.micro_tokens or recipe.batch_tokens)
        folder.mkdir(parents=True, exist_ok=True)
        names = [*OUTPUTS, *dict.fromkeys(heldout_file(path) for _, path in args.rated)]
        outputs = [str(folder / name) for name in (*names, "state.pt")]
        inputs = [*args.text, *(path for _, path in args.rated), *args.exclude]
        options.require_outputs(outputs, [*inputs, args.init, tokenizer_path])
        if not args.restart:
            require_unused(folder, names)
        with only_writer(*outputs):
            corpus = read_corpus(args)
            settings = {
                **asdict(recipe),
                **{f"model_{key}": value for key, value in model.config.to_dict().items()},
                "device": device.type,
                "init_sha256": sha256_of(args.init) if args.init else None,
                "tokenizer_sha256": sha256_of(tokenizer_path) if tokenizer_path else None,
                **corpus.digests(),
            }
            mode = options.state_mode(args)
            state_file = StateFile(folder / "state.pt", settings, mode, args.save_minutes)
            pretrain(
                model,
                corpus,
                folder,
                recipe,
                tokenizer_path=tokenizer_path,
                state_file=state_file,
                micro_tokens=args.micro_tokens,
                eval_minutes=args.eval_minutes,
                half=args.half,
            )
        print(f"wrote {', '.join(outputs[:-1])}")


if __name__ == "__main__":
    run_script(main)
