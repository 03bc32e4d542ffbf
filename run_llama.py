"""Generate text, classify by prompting, or finetune a classifier.

    python run_llama.py --option generate --attention causal
    python run_llama.py --option prompt --batch_size 10
    python run_llama.py --option finetune --train FILE --dev FILE --test FILE --label-names FILE

This is the assignment's command line. Functions with the assignment's names keep its signatures,
so its scripts still run. Options that their `args` does not define take their defaults.
"""

import fast  # noqa: F401, before PyTorch

# isort: split
import argparse
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader

from classifier import LlamaEmbeddingClassifier, LlamaZeroShotClassifier, label_room, prompt_suffix
from fast.linear import bfloat16_gain
from fast.memory import keep_freed_memory
from fast.threads import USUAL_LENGTH, choose_threads, generation_rows
from llama import Llama, load_pretrained
from tokenizer import Tokenizer, find_tokenizer_model, open_tokenizer
from training import distributed, options
from training.checkpoint import load_classifier, provenance, save_classifier
from training.dataset import Example, SentenceDataset, encode_examples, warn_of_truncation
from training.evaluation import Evaluation, evaluate, forward_pass, scores, write_predictions
from training.labeled import read_label_names, read_sentences
from training.loop import EpochReport, require_dropout, train_classifier
from training.state import StateFile, only_writer, require_space, state_path
from utils import (
    ArgumentParser,
    InputError,
    atomic_write,
    pick_device,
    run_script,
    seed_everything,
    sha256_of,
)

SPLITS_READ_BY = {
    "generate": (),
    "prompt": ("dev", "test"),
    "finetune": ("train", "dev", "test"),
}


# ---------------------------------------------------------------- the command line


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options, fill in the default files, and print all of them."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    # fmt: off
    add("--option", choices=tuple(SPLITS_READ_BY), default="generate",
        help="generate continues the assignment's prefix, prompt asks the frozen model for a "
        "label, finetune trains a classifier (default: generate)")
    options.add_data_options(parser)
    options.add_training_options(parser)
    add("--seed", type=options.seed_int, default=1337, metavar="N",
        help="seed of all random numbers, below 2**32 (default: %(default)s)")
    for name, temperature in (("low", 0), ("high", 1)):
        add(f"--generated_sentence_{name}_temp_out", metavar="FILE",
            default=f"generated-sentence-temp-{temperature}.txt",
            help=f"file for the text of temperature {temperature} (default: %(default)s)")
    for split in ("dev", "test"):
        add(f"--{split}_out", metavar="FILE", help=f"file for the {split} predictions (default: "
            f"DATASET-{split}-prompting-output.txt or DATASET-{split}-finetuning-output.txt; the "
            "name must end so)")
    # fmt: on
    options.add_recipe_options(parser)
    options.add_state_options(parser)
    parser.add_argument("--quantize", choices=("int8",),
        help="round the weight matrices to int8, only to generate or prompt (default: "
        "float32)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.quantize and args.option == "finetune":
        parser.error("--quantize is for inference alone, not for --option finetune")
    if (args.resume or args.restart) and args.option != "finetune":
        parser.error("--resume and --restart belong to --option finetune")
    options.fill_inputs(args, SPLITS_READ_BY[args.option])
    kind = "finetuning" if args.option == "finetune" else "prompting"
    for split in ("dev", "test"):
        if getattr(args, f"{split}_out") is None:
            dataset = options.dataset_name(getattr(args, split), split)
            setattr(args, f"{split}_out", f"{dataset}-{split}-{kind}-output.txt")
    if distributed.is_main():
        print(f"args: {vars(args)}")
    return args


def checkpoint_path(args: argparse.Namespace) -> str:
    """Return `args.filepath` if a script set it, else OPTION-DATASET-EPOCHS-LR.pt."""
    name = f"{args.option}-{options.dataset_name(args.train)}-{args.epochs}-{args.lr}.pt"
    return getattr(args, "filepath", None) or name


def output_files(args: argparse.Namespace) -> list[str]:
    """Return the files that the option writes."""
    if args.option == "generate":
        return [args.generated_sentence_low_temp_out, args.generated_sentence_high_temp_out]
    if args.option == "prompt":
        return [args.dev_out, args.test_out]
    checkpoint = checkpoint_path(args)
    return [checkpoint, str(state_path(checkpoint)), args.dev_out, args.test_out]


def input_files(args: argparse.Namespace) -> list[str | Path]:
    """Return the files that the option reads, with the tokenizer found beside the model."""
    splits = SPLITS_READ_BY.get(args.option, SPLITS_READ_BY["finetune"])
    data = [getattr(args, key) for key in (*splits, "label_names")] if splits else []
    return [*data, args.pretrained_model_path, tokenizer_path(args)]


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    run = {"generate": generate, "prompt": test_with_prompting, "finetune": finetune}[args.option]
    if args.option != "finetune":
        distributed.require_single_process(f"--option {args.option}")
    with distributed.process_group(args.use_gpu):
        outputs = output_files(args)
        options.require_outputs(outputs, input_files(args))
        seed_everything(args.seed)
        with only_writer(*outputs):
            run(args)


# ---------------------------------------------------------------- the modes


def generate(args: argparse.Namespace) -> None:
    """Continue the assignment's prefix at temperature 0 and at temperature 1."""
    backbone = load_backbone(args)
    llama, _, device = backbone
    announce(args, llama, device)
    low, high = args.generated_sentence_low_temp_out, args.generated_sentence_high_temp_out
    generate_sentence(args, options.PREFIX, low, temperature=0.0, backbone=backbone)
    generate_sentence(args, options.PREFIX, high, temperature=1.0, backbone=backbone)


def generate_sentence(
    args: argparse.Namespace,
    prefix: str,
    outfile: str,
    max_new_tokens: int = 75,
    temperature: float = 0.0,
    backbone: tuple[Llama, Tokenizer, torch.device] | None = None,
) -> None:
    """Print `prefix` and its continuation, and write both to `outfile`."""
    llama, tokenizer, device = backbone or load_backbone(args)
    idx = torch.tensor([tokenizer.encode(prefix, bos=True, eos=False)], device=device)  # (1, T)
    sentence = tokenizer.decode(llama.generate(idx, max_new_tokens, temperature)[0].tolist())
    print(f"Temperature is {temperature}\n{sentence}\n---------------")
    with atomic_write(outfile) as file:
        file.write(sentence)
    print(f"Wrote generated sentence to {outfile}.")


def test_with_prompting(args: argparse.Namespace) -> None:
    """Score each label as the continuation of sentence and `prompt_suffix` by the frozen model."""
    _require_output_names(args, "prompting")
    label_names = read_label_names(args.label_names)
    splits = _read_dev_and_test(args, label_names)
    llama, tokenizer, device = load_backbone(args)
    config = SimpleNamespace(num_labels=len(label_names), pooling=getattr(args, "pooling", None))
    model = LlamaZeroShotClassifier(config, tokenizer, label_names, llama)
    announce(args, llama, device, model.pooling)

    suffix = prompt_suffix(label_names)
    if llama.config.attention == "causal":
        suffix = suffix.rstrip()  # its last space is a token that " good" never follows
    max_tokens = llama.config.max_seq_len - label_room(tokenizer, label_names)
    for split, rows in splits.items():
        data = _encode(args, split, rows, tokenizer, max_tokens, suffix)
        _evaluate_and_write(args, split, model, data, device)


def train(args: argparse.Namespace, keep_state: bool = False) -> list[EpochReport]:
    """Finetune on --train and keep the checkpoint of the best dev accuracy.

    Resume an interrupted run (see `training.state.StateFile`). Its state is deleted at the end,
    unless `keep_state`.
    """
    filepath = checkpoint_path(args)
    options.require_outputs([filepath], input_files(args))
    label_names = read_label_names(args.label_names)
    train_rows = read_sentences(args.train, len(label_names), label_names=label_names)
    dev_rows = read_sentences(args.dev, len(label_names), label_names=label_names)
    _warn_of_unused_labels(args, label_names, train_rows)
    llama, tokenizer, device = load_backbone(args)
    config = SimpleNamespace(
        num_labels=len(label_names),
        pretrained_model_path=args.pretrained_model_path,
        option=args.option,
        hidden_dropout_prob=args.hidden_dropout_prob,
        pooling=getattr(args, "pooling", None),
    )
    model = LlamaEmbeddingClassifier(config, llama).to(device)
    recipe = options.recipe_of(args)
    require_dropout(model, recipe)
    announce(args, llama, device, model.pooling)
    recommend_bfloat16(device, recipe.bf16)
    extra = {"args": {k: v for k, v in vars(args).items() if k not in ("resume", "restart")}}
    extra |= provenance(label_names, tokenizer, args.pretrained_model_path, args.max_sentence_len)

    def on_epoch(report: EpochReport, is_best: bool) -> None:
        if is_best and distributed.is_main():
            save_classifier(filepath, model, config, **extra)
            print(f"save the model to {filepath}")
        print(report.in_words(), flush=True)

    state_file = StateFile(
        state_path(filepath),
        _settings(args, model, tokenizer, device),
        options.state_mode(args),
        getattr(args, "save_minutes", 5.0),
    )
    if distributed.is_main():  # after StateFile, which may keep an old state under a new name
        require_space(filepath, sum(parameter.numel() for parameter in model.parameters()))
    _require_best_checkpoint(filepath, state_file)
    history = train_classifier(
        model,
        _encode(args, "train", train_rows, tokenizer, llama.config.max_seq_len),
        _encode(args, "dev", dev_rows, tokenizer, llama.config.max_seq_len),
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        device=device,
        on_epoch=on_epoch,
        recipe=recipe,
        state_file=state_file,
    )
    distributed.barrier()  # rank 0 has written the checkpoint
    if not keep_state:
        state_file.delete()
    return history


def test(args: argparse.Namespace) -> dict[str, Evaluation]:
    """Evaluate the checkpoint that `train` kept and write both outputs."""
    _require_output_names(args, "finetuning")
    label_names = read_label_names(args.label_names)
    splits = _read_dev_and_test(args, label_names)
    filepath = checkpoint_path(args)
    device = pick_device(args.use_gpu)
    model, saved = load_classifier(filepath)
    model.to(device)
    print(f"load model from {filepath}")
    if saved.get("label_names", label_names) != label_names:
        raise InputError(f"{filepath}: has labels {saved['label_names']}, not {label_names}")
    tokenizer = open_tokenizer(filepath, saved, tokenizer_path(args))
    tokenizer.require_vocab_size(model.llama.config.vocab_size)
    results = {}
    for split, rows in splits.items():
        data = _encode(args, split, rows, tokenizer, model.llama.config.max_seq_len)
        bf16 = options.recipe_of(args).bf16  # as after each epoch
        results[split] = _evaluate_and_write(args, split, model, data, device, bf16)
    return results


def finetune(args: argparse.Namespace) -> None:
    """`train`, the table of its epochs, `test`, macro F1.

    The state stays until both outputs are written, so that the same command continues there.
    """
    keep_freed_memory()
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # 10-bit mantissas, see results/LOG.md
    _require_output_names(args, "finetuning")
    _read_dev_and_test(args, read_label_names(args.label_names))  # before the work, not after
    history = train(args, keep_state=True)
    print("Epoch | Train Loss | Train Acc | Dev Acc")
    for r in history:
        accuracies = f"{r.train_accuracy:9.3f} | {r.dev_accuracy:7.3f}"
        print(f"{r.epoch:5d} | {r.train_loss:10.3f} | {accuracies}")
    for split, result in test(args).items():
        if result.macro_f1 is not None:
            print(f"{split} macro f1 :: {result.macro_f1:.3f}")
    if distributed.is_main():
        state_path(checkpoint_path(args)).unlink(missing_ok=True)


# ---------------------------------------------------------------- for the assignment's scripts


class LlamaDataset(SentenceDataset):
    """(sentence, label, ...) tuples, tokenized by the tokenizer that `args` names."""

    def __init__(self, dataset: list[tuple], args: argparse.Namespace, eos: bool = False):
        self.tokenizer = Tokenizer(args.max_sentence_len, tokenizer_path(args))
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
    """Read a file into (sentence, label, tokens); with flag "train" also the number of labels, the
    largest label + 1."""
    examples = []
    for sentence, label in read_sentences(filename, unlabeled=flag == "test"):
        sentence = sentence.lower() if lower else sentence
        sentence = sentence if prompt_suffix is None else f"{sentence} {prompt_suffix}"
        examples.append(Example(sentence, label, tokenizer.encode(sentence, bos=True, eos=eos)))
    print(f"load {len(examples)} data from {filename}")
    if flag == "train":
        return examples, max(example.label for example in examples) + 1
    return examples


@torch.inference_mode()
def model_eval(
    dataloader: DataLoader, model: torch.nn.Module, device: torch.device
) -> tuple[float | None, float | None, list[int], list[int], list[str]]:
    """Return (accuracy, macro F1, predictions, labels, sentences) in the dataloader's order."""
    model.eval()
    predictions, labels, sentences = [], [], []
    for batch in dataloader:
        predictions += forward_pass(model, batch, device).argmax(dim=1).tolist()
        labels += batch["labels"].tolist()
        sentences += batch["sents"]
    return *scores(predictions, labels), predictions, labels, sentences


def save_model(
    model: LlamaEmbeddingClassifier,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
    config: Any,
    filepath: str,
) -> None:
    """Write what `load_classifier` reads, with the optimizer's state and `args`."""
    save_classifier(filepath, model, config, optim=optimizer.state_dict(), args=vars(args))
    print(f"save the model to {filepath}")


def write_predictions_to_file(
    split: str, outfile: str, acc: float | None, pred: list[int], sents: list[str]
) -> None:
    """Write `pred ||| sentence` lines and print the accuracy (None: no gold labels)."""
    print(f"{split} acc :: {'n/a (no gold labels)' if acc is None else f'{acc:.3f}'}")
    write_predictions(outfile, pred, sents)


# ---------------------------------------------------------------- from args to named parameters


def tokenizer_path(args: argparse.Namespace) -> str | Path:
    given = getattr(args, "tokenizer_path", None)
    return given or find_tokenizer_model(args.pretrained_model_path)


def load_backbone(args: argparse.Namespace) -> tuple[Llama, Tokenizer, torch.device]:
    """Return the pretrained Llama, its tokenizer and the device."""
    device = pick_device(args.use_gpu)
    llama = load_pretrained(
        args.pretrained_model_path,
        getattr(args, "attention", None),
        getattr(args, "backbone_dropout", None),
        getattr(args, "quantize", None),
        device,
    )
    tokenizer = Tokenizer(tokenizer_model=tokenizer_path(args))
    tokenizer.require_vocab_size(llama.config.vocab_size)
    print(f"load model from {args.pretrained_model_path}")
    is_generating = getattr(args, "option", "generate") == "generate"
    batch_rows = USUAL_LENGTH * getattr(args, "batch_size", 8)
    choose_threads(llama, generation_rows(llama) if is_generating else batch_rows)
    return llama, tokenizer, device


def announce(
    args: argparse.Namespace, llama: Llama, device: torch.device, pooling: str | None = None
) -> None:
    """Print what runs: processes, device, attention, pooling, model."""
    int8 = [buffer for buffer in llama.buffers() if buffer.dtype == torch.int8]
    n_parameters = sum(tensor.numel() for tensor in (*llama.parameters(), *int8))
    ranks = f"ranks: {distributed.world_size()}, " if distributed.world_size() > 1 else ""
    pooling = f"pooling: {pooling}, " if pooling else ""
    print(
        f"{ranks}device: {device}, attention: {llama.config.attention}, {pooling}"
        f"model: {Path(args.pretrained_model_path).name}, parameters: {n_parameters:,}"
        f"{', weights: int8' if int8 else ''}",
        flush=True,
    )


def recommend_bfloat16(device: torch.device, is_used: bool) -> None:
    """Print a line if this CPU has instructions that make bfloat16 clearly faster."""
    if device.type == "cpu" and not is_used and (gain := bfloat16_gain()) > 1.5:
        distributed.say(
            f"hint: this processor multiplies in bfloat16 {gain:.1f} times as fast as in float32; "
            "--bf16 trains faster and was as accurate"
        )


def _settings(
    args: argparse.Namespace,
    model: LlamaEmbeddingClassifier,
    tokenizer: Tokenizer,
    device: torch.device,
) -> dict[str, Any]:
    """Return what decides the trained weights; files count by their content."""
    files = {"train": args.train, "dev": args.dev, "label_names": args.label_names}
    files |= {"model": args.pretrained_model_path, "tokenizer": tokenizer.model_path}
    names = (
        "option",
        "epochs",
        "batch_size",
        "lr",
        "seed",
        "hidden_dropout_prob",
        "max_sentence_len",
    )
    return {
        **{name: getattr(args, name) for name in names},
        **asdict(options.recipe_of(args)),
        "attention": model.llama.config.attention,
        "backbone_dropout": model.llama.config.dropout,
        "pooling": model.pooling,
        "device": device.type,
        **{f"{name}_sha256": sha256_of(path) for name, path in files.items()},
    }


def _require_output_names(args: argparse.Namespace, kind: str) -> None:
    """Raise InputError for an output that the submission check would not find."""
    for split in ("dev", "test"):
        outfile, ending = getattr(args, f"{split}_out"), f"{split}-{kind}-output.txt"
        if not outfile.endswith(ending):
            raise InputError(f"--{split}_out {outfile}: must end in {ending}, as DATASET-{ending}")


def _read_dev_and_test(
    args: argparse.Namespace, label_names: list[str]
) -> dict[str, list[tuple[str, int]]]:
    n_labels = len(label_names)
    return {
        "dev": read_sentences(args.dev, n_labels, label_names=label_names),
        "test": read_sentences(args.test, n_labels, unlabeled=True, label_names=label_names),
    }


def _require_best_checkpoint(filepath: str, state_file: StateFile) -> None:
    """Raise InputError if a saved run has finished an epoch and its checkpoint is gone."""
    progress = (state_file.saved or {}).get("progress")
    has_best = isinstance(progress, dict) and progress.get("history")
    if has_best and not Path(filepath).exists():
        raise InputError(
            f"{filepath}: the best checkpoint of the run in {state_file.path} is missing; put it "
            "back, or start over with --restart"
        )


def _warn_of_unused_labels(
    args: argparse.Namespace, label_names: list[str], rows: list[tuple[str, int]]
) -> None:
    """Print a line if the data lacks labels of the mapping, which may belong to other data."""
    unused = sorted(set(range(len(label_names))) - {label for _, label in rows})
    if unused:
        distributed.say(
            f"warning: {args.label_names} names {len(label_names)} labels; never seen in "
            f"{args.train}: {', '.join(map(str, unused))}"
        )


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
    bf16: bool = False,
) -> Evaluation:
    result = evaluate(model, data, args.batch_size, device, bf16, f"eval {split}")
    if distributed.is_main():
        outfile, predicted = getattr(args, f"{split}_out"), result.predictions
        write_predictions_to_file(split, outfile, result.accuracy, predicted, result.sentences)
    return result


if __name__ == "__main__":
    run_script(main)
