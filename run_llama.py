"""The assignment's command line: generate text, classify by prompting, finetune, and predict.

`args` ends in this file: everything below takes named parameters. The functions under the
assignment's own names take what they take there, so its scripts run on; an `args` that lacks one of
our optional options (`attention`, `pooling`, `tokenizer_path`, the recipe) means its default.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader

import cli
from classifier import LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from llama import Llama, load_pretrained
from tokenizer import Tokenizer, find_tokenizer_model, open_tokenizer
from tools.generate import continue_text
from tools.predict import is_typed, load_predictor, open_lines, print_predictions
from training import distributed
from training.dataset import (
    Example,
    SentenceDataset,
    encode_examples,
    make_loader,
    warn_of_truncation,
)
from training.distributed import ALONE, Ranks
from training.interrupts import Stopped
from training.labelled import decode, read_label_names, read_sentences
from training.locks import sole_writer
from training.loop import (
    EpochReport,
    Evaluation,
    Recipe,
    evaluate,
    load_classifier,
    provenance,
    save_classifier,
    train_classifier,
)
from training.options import (
    checkpoint_path,
    generates_freely,
    get_args,
    input_files,
    output_files,
    require_different,
    require_folder,
    require_output_names,
)
from training.state import Keeper, require_space, state_path
from utils import (
    allow_tf32,
    atomic_write,
    keep_freed_memory,
    pick_device,
    seed_everything,
    sha256_of,
)

PREFIX = (
    "I have wanted to see this thriller for a while, and it didn't disappoint. "
    "Keanu Reeves, playing the hero John Wick, is"
)


# ---------------------------------------------------------------- the assignment's data functions


class LlamaDataset(SentenceDataset):
    """(sentence, label, ...) tuples, tokenized by the tokenizer that `args` names."""

    def __init__(self, dataset: list[tuple], args: argparse.Namespace, eos: bool = False):
        self.tokenizer = _tokenizer(args, max_len=args.max_sentence_len)
        examples = [
            Example(sentence, label, self.tokenizer.encode(sentence, bos=True, eos=eos))
            for sentence, label, *_ in dataset
        ]
        super().__init__(examples, self.tokenizer.pad_id)


def create_data(
    filename: str,
    tokenizer: Tokenizer,
    flag: str = "train",
    lower: bool = False,
    eos: bool = True,
    prompt_suffix: str | None = None,
) -> list[Example] | tuple[list[Example], int]:
    """Reads a file into (sentence, label, tokens); with flag "train" also the number of labels,
    which is the largest label + 1, so that a label missing from the file leaves no hole."""
    examples = []
    for sentence, label in read_sentences(filename, unlabelled=flag == "test"):
        sentence = sentence.lower() if lower else sentence
        sentence = sentence if prompt_suffix is None else f"{sentence} {prompt_suffix}"
        examples.append(Example(sentence, label, tokenizer.encode(sentence, bos=True, eos=eos)))
    print(f"load {len(examples)} data from {filename}")
    if flag == "train":
        return examples, max(example.label for example in examples) + 1
    return examples


def model_eval(
    dataloader: DataLoader, model: torch.nn.Module, device: torch.device
) -> tuple[float | None, float | None, list[int], list[int], list[str]]:
    """(accuracy, macro F1, predictions, labels, sentences), in the dataloader's order."""
    result = evaluate(model, dataloader, device)
    return result.accuracy, result.macro_f1, result.predictions, result.labels, result.sentences


def save_model(
    model: LlamaEmbeddingClassifier,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
    config: Any,
    filepath: str,
) -> None:
    """Writes what `load_classifier` reads, with the optimizer's state and `args`."""
    save_classifier(filepath, model, config, optim=optimizer.state_dict(), args=vars(args))
    print(f"save the model to {filepath}")


def write_predictions_to_file(
    split: str, outfile: str, acc: float | None, pred: list[int], sents: list[str]
) -> None:
    """Writes `pred ||| sentence` lines and prints the accuracy (None: there are no gold labels)."""
    shown = "n/a (no gold labels)" if acc is None else f"{acc:.3f}"
    print(f"{split} acc :: {shown}")
    with atomic_write(outfile) as file:
        file.writelines(f"{p} ||| {s}\n" for p, s in zip(pred, sents, strict=True))


# ---------------------------------------------------------------- the modes


def generate(args: argparse.Namespace) -> None:
    """Continues the assignment's prefix at temperature 0 and at temperature 1."""
    if generates_freely(args):
        _generate_freely(args)
        return
    llama, tokenizer, device = _load_backbone(args)
    _announce(args, llama, device)
    for outfile, temperature in (
        (args.generated_sentence_low_temp_out, 0.0),
        (args.generated_sentence_high_temp_out, 1.0),
    ):
        _write_continuation(llama, tokenizer, PREFIX, outfile, 75, temperature)


def generate_sentence(
    args: argparse.Namespace,
    prefix: str,
    outfile: str,
    max_new_tokens: int = 75,
    temperature: float = 0.0,
) -> None:
    """Prints `prefix` and its continuation, and writes both to `outfile`."""
    llama, tokenizer, _ = _load_backbone(args)
    _write_continuation(llama, tokenizer, prefix, outfile, max_new_tokens, temperature)


def _write_continuation(
    llama: Llama,
    tokenizer: Tokenizer,
    prefix: str,
    outfile: str,
    max_new_tokens: int,
    temperature: float,
) -> None:
    start = tokenizer.encode(prefix, bos=True, eos=False)
    idx = torch.tensor([start], device=llama.norm.weight.device)  # (1, T)
    sentence = tokenizer.decode(llama.generate(idx, max_new_tokens, temperature)[0].tolist())
    print(f"Temperature is {temperature}\n{sentence}\n---------------")
    with atomic_write(outfile) as file:
        file.write(sentence)
    print(f"Wrote generated sentence to {outfile}.")


def _generate_freely(args: argparse.Namespace) -> None:
    """Prints `--num_samples` texts; on a terminal the first appears as it is made."""
    prefix = os.fsencode(PREFIX if args.prefix is None else args.prefix)
    if args.prefix == "-":
        prefix = cli.standard_input().read().replace(b"\r\n", b"\n").removesuffix(b"\n")
    prefix = decode(prefix, "--prefix")
    with contextlib.redirect_stdout(sys.stderr):
        llama, tokenizer, device = _load_backbone(args)
        _announce(args, llama, device)
    n_tokens, window = len(tokenizer.encode(prefix, bos=True, eos=False)), llama.config.max_seq_len
    if n_tokens > window:
        print(
            f"warning: --prefix has {n_tokens} tokens, of which the model reads the last {window}",
            file=sys.stderr,
        )

    is_terminal = sys.stdout.isatty()

    def fit(text: str) -> str:
        return cli.printable(text, kept="\n\t") if is_terminal else text

    def show(text: str) -> None:
        print(fit(text), end="", flush=True)

    first, *others = continue_text(
        llama,
        tokenizer,
        prefix,
        75 if args.max_new_tokens is None else args.max_new_tokens,
        temperature=1.0 if args.temperature is None else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        num_samples=args.num_samples or 1,
        stop_at_eos=args.stop_at_eos,
        on_text=show if is_terminal else None,
    )
    print("" if is_terminal else first)
    for text in others:
        print(f"---------------\n{fit(text)}")


def predict(args: argparse.Namespace) -> None:
    """Prints what a finetuned checkpoint says of each line; all else goes to standard error."""
    device = pick_device(args.use_gpu)
    predictor = load_predictor(args.checkpoint, args.tokenizer_path, device)
    n_labels = len(predictor.label_names)
    batch_size = None if predictor.model.reads_lengths else args.batch_size
    with open_lines(args.sentences, args.input, n_labels, batch_size) as blocks:
        shows_bar = not is_typed(args.sentences, args.input)
        print_predictions(predictor, blocks, args.batch_size, args.format or "text", shows_bar)


def test_with_prompting(args: argparse.Namespace) -> None:
    """Zero-shot: asks the frozen model the question of `prompt_suffix` and scores the labels."""
    require_output_names(args, "prompting")
    label_names = read_label_names(args.label_names)
    splits = _read_dev_and_test(args, len(label_names))
    llama, tokenizer, device = _load_backbone(args)
    config = SimpleNamespace(num_labels=len(label_names), pooling=_option(args, "pooling"))
    model = LlamaZeroShotClassifier(config, tokenizer, label_names, llama)
    _announce(args, llama, device, model.pooling)

    suffix = prompt_suffix(label_names)
    if llama.config.attention == "causal":
        suffix = suffix.rstrip()  # a token of its own, which no " good" can follow
    room = llama.config.max_seq_len - model.longest_label
    for split, rows in splits.items():
        data = _encode(args, split, rows, tokenizer, room, suffix)
        _evaluate_and_write(args, split, model, data, device)


def prompt_suffix(label_names: list[str]) -> str:
    """The assignment's question with its trailing space: Is this movie a, b, or c? This movie is"""
    if len(label_names) == 2:
        choices = " or ".join(label_names)
    else:
        choices = f"{', '.join(label_names[:-1])}, or {label_names[-1]}"
    return f"Is this movie {choices}? This movie is "


def train(args: argparse.Namespace, ranks: Ranks = ALONE) -> list[EpochReport]:
    """Finetunes on --train, keeping the checkpoint of the best dev accuracy.

    What an interrupted run goes on from is gone when this returns.
    """
    history = _train(args, ranks)
    _forget_state(args, ranks)
    return history


def _forget_state(args: argparse.Namespace, ranks: Ranks) -> None:
    if ranks.is_first:
        state_path(checkpoint_path(args)).unlink(missing_ok=True)


def _train(args: argparse.Namespace, ranks: Ranks) -> list[EpochReport]:
    filepath = checkpoint_path(args)
    with ranks.agreed():
        require_folder(filepath)
        label_names = read_label_names(args.label_names)
        train_rows = read_sentences(args.train, len(label_names))
        dev_rows = read_sentences(args.dev, len(label_names))
        llama, tokenizer, device = _load_backbone(args)
        config = SimpleNamespace(
            num_labels=len(label_names),
            pretrained_model_path=args.pretrained_model_path,
            option=args.option,
            hidden_dropout_prob=args.hidden_dropout_prob,
            pooling=_option(args, "pooling"),
        )
        model = LlamaEmbeddingClassifier(config, llama).to(device)
    _announce(args, llama, device, model.pooling, ranks)
    room = llama.config.max_seq_len
    recipe = recipe_of(args)
    extra = {"args": {key: value for key, value in vars(args).items() if key != "resume"}}
    base = args.pretrained_model_path
    extra |= provenance(label_names, tokenizer, base, args.max_sentence_len)
    with ranks.agreed():
        if ranks.is_first:
            require_space(filepath, sum(parameter.numel() for parameter in model.parameters()))
    keeper = _keeper(args, model, recipe, tokenizer, device, ranks)

    def on_epoch(report: EpochReport, is_best: bool) -> None:
        if is_best and ranks.is_first:
            save_classifier(filepath, model, config, **extra)
            print(f"save the model to {filepath}")
        print(report.in_words(), flush=True)

    return train_classifier(
        model,
        _encode(args, "train", train_rows, tokenizer, room),
        _encode(args, "dev", dev_rows, tokenizer, room),
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        device=device,
        on_epoch=on_epoch,
        recipe=recipe,
        keeper=keeper,
        ranks=ranks,
    )


def test(args: argparse.Namespace, ranks: Ranks = ALONE) -> dict[str, Evaluation]:
    """Evaluates the checkpoint that `train` kept and writes both outputs."""
    require_output_names(args, "finetuning")
    label_names = read_label_names(args.label_names)
    splits = _read_dev_and_test(args, len(label_names))
    filepath = checkpoint_path(args)
    device = pick_device(args.use_gpu)
    with ranks.copy_of(filepath) as path:
        model, saved = load_classifier(path)
    model.to(device)
    print(f"load model from {filepath}")
    if saved.get("label_names", label_names) != label_names:
        raise ValueError(f"{filepath}: has labels {saved['label_names']}, not {label_names}")
    tokenizer = open_tokenizer(filepath, saved, _tokenizer(args).model_path)
    tokenizer.require_vocab_size(model.llama.config.vocab_size)
    results = {}
    for split, rows in splits.items():
        data = _encode(args, split, rows, tokenizer, model.llama.config.max_seq_len)
        results[split] = _evaluate_and_write(args, split, model, data, device, ranks)
    return results


def finetune(args: argparse.Namespace, ranks: Ranks = ALONE) -> None:
    """`train`, the table of its epochs, `test`, macro F1.

    The state stays until both outputs are written, so --resume also serves where `test` failed.
    """
    with ranks.agreed():  # before the work, not after
        require_output_names(args, "finetuning")
        _read_dev_and_test(args, len(read_label_names(args.label_names)))
    history = _train(args, ranks)
    try:
        print("Epoch | Train Loss | Train Acc | Dev Acc")
        for r in history:
            accuracies = f"{r.train_accuracy:9.3f} | {r.dev_accuracy:7.3f}"
            print(f"{r.epoch:5d} | {r.train_loss:10.3f} | {accuracies}")
        for split, result in test(args, ranks).items():
            if result.macro_f1 is not None:
                print(f"{split} macro f1 :: {result.macro_f1:.3f}")
    except Stopped as stopped:
        stopped.is_resumable = True  # with no step to take
        raise
    _forget_state(args, ranks)


# ---------------------------------------------------------------- from args to named parameters


def _option(args: argparse.Namespace, name: str, default: Any = None) -> Any:
    return getattr(args, name, default)


def _tokenizer(args: argparse.Namespace, max_len: int | None = None) -> Tokenizer:
    path = _option(args, "tokenizer_path") or find_tokenizer_model(args.pretrained_model_path)
    return Tokenizer(max_len=max_len, tokenizer_model=path)


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The options of a recipe; one that `args` lacks has its default."""
    given = {field.name: getattr(args, field.name, field.default) for field in fields(Recipe)}
    return Recipe(**{**given, "running_train_acc": _option(args, "train_acc") == "running"})


def _keeper(
    args: argparse.Namespace,
    model: LlamaEmbeddingClassifier,
    recipe: Recipe,
    tokenizer: Tokenizer,
    device: torch.device,
    ranks: Ranks,
) -> Keeper:
    """Compared, between ranks too, is all that decides what a training ends in; files count by
    their content."""
    files = {"train": args.train, "dev": args.dev, "label_names": args.label_names}
    files |= {"model": args.pretrained_model_path, "tokenizer": tokenizer.model_path}
    names = ("epochs", "batch_size", "lr", "seed", "hidden_dropout_prob", "max_sentence_len")
    settings = {
        **{name: getattr(args, name) for name in names},
        **asdict(recipe),
        "attention": model.llama.config.attention,
        "backbone_dropout": model.llama.config.dropout,
        "pooling": model.pooling,
        "device": device.type,
        **{f"{name}_sha256": sha256_of(path) for name, path in files.items()},
    }
    path, resume = state_path(checkpoint_path(args)), _option(args, "resume", False)
    ranks.require_same({**settings, "resume": resume})
    minutes = _option(args, "save_minutes", 5.0)
    keeper = Keeper(path, settings, resume, minutes, ranks)
    if keeper.is_resumed:
        place = keeper.place
        print(f"resume {path} in epoch {place.epoch}, behind {place.n_batches} batches")
    elif resume:
        print(f"run_llama.py: {path} not found, beginning anew", file=sys.stderr)
    return keeper


def _load_backbone(args: argparse.Namespace) -> tuple[Llama, Tokenizer, torch.device]:
    device = pick_device(args.use_gpu)
    llama = load_pretrained(
        args.pretrained_model_path, _option(args, "attention"), _option(args, "backbone_dropout")
    )
    tokenizer = _tokenizer(args)
    tokenizer.require_vocab_size(llama.config.vocab_size)
    print(f"load model from {args.pretrained_model_path}")
    return llama.to(device), tokenizer, device


def _announce(
    args: argparse.Namespace,
    llama: Llama,
    device: torch.device,
    pooling: str | None = None,
    ranks: Ranks = ALONE,
) -> None:
    n_parameters = sum(parameter.numel() for parameter in llama.parameters())
    print(
        (f"ranks: {ranks.size}, " if ranks.size > 1 else "")
        + f"device: {device}, attention: {llama.config.attention}, "
        + (f"pooling: {pooling}, " if pooling else "")
        + f"model: {Path(args.pretrained_model_path).name}, parameters: {n_parameters:,}",
        flush=True,
    )


def _read_dev_and_test(args: argparse.Namespace, n_labels: int) -> dict[str, list[tuple[str, int]]]:
    return {
        "dev": read_sentences(args.dev, n_labels),
        "test": read_sentences(args.test, n_labels, unlabelled=True),
    }


def _encode(
    args: argparse.Namespace,
    split: str,
    rows: list[tuple[str, int]],
    tokenizer: Tokenizer,
    max_tokens: int,
    suffix: str | None = None,
) -> SentenceDataset:
    path = getattr(args, split)
    examples, n_truncated = encode_examples(
        rows,
        tokenizer,
        max_tokens=max_tokens,
        max_sentence_len=args.max_sentence_len,
        suffix=suffix,
    )
    print(f"load {len(examples)} data from {path}")
    warn_of_truncation(n_truncated, len(rows), max_tokens, path)
    return SentenceDataset(examples, tokenizer.pad_id)


def _evaluate_and_write(
    args: argparse.Namespace,
    split: str,
    model: torch.nn.Module,
    data: SentenceDataset,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Evaluation:
    loader = make_loader(data, args.batch_size, similar_lengths=model.reads_lengths)
    result = evaluate(model, loader, device, f"eval {split}", ranks=ranks)
    if ranks.is_first:
        outfile, predicted = getattr(args, f"{split}_out"), result.predictions
        write_predictions_to_file(split, outfile, result.accuracy, predicted, result.sentences)
    return result


def main(argv: list[str] | None = None) -> None:
    with distributed.silent_but_first():
        args = get_args(argv)
        if args.option == "finetune":
            with distributed.joined(args.use_gpu) as ranks:
                _run(args, lambda: finetune(args, ranks), ranks)
        else:
            distributed.require_alone(f"--option {args.option}")
            modes = {"generate": generate, "prompt": test_with_prompting, "predict": predict}
            _run(args, lambda: modes[args.option](args), ALONE)


def _run(args: argparse.Namespace, work: Callable[[], None], ranks: Ranks) -> None:
    outputs = output_files(args)
    with ranks.agreed():
        for path in outputs:
            require_folder(path)
        require_different(outputs, input_files(args))
    seed_everything(args.seed)
    if args.option == "finetune":
        keep_freed_memory()
        allow_tf32()
    with contextlib.ExitStack() as held:
        with ranks.agreed():
            if ranks.is_first:
                held.enter_context(sole_writer(*outputs))
        work()


if __name__ == "__main__":
    cli.run(main)
