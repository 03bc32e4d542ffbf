"""One data set, one composition of methods, one model: a training run of it, measured.

The order is that in which the methods act: go on pretraining; a model with what reads its states;
what is trained of it; penalties; the training loop; the mean of epochs; the figures.
"""

import argparse
import hashlib
import platform
import time
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import run_llama
from advanced import assembly
from advanced.candidates import Candidates
from advanced.methods import freezing as partial
from advanced.methods import prompting, templates, wise_ft
from advanced.methods.continued import continue_on
from advanced.record import figures
from advanced.task import Rows, Task
from classifier import LlamaEmbeddingClassifier
from formats.checkpoint import load_torch_file
from llama import load_pretrained
from tokenizer import Tokenizer, find_tokenizer_model
from training.dataset import SentenceDataset, encode_examples, make_loader, warn_of_truncation
from training.locks import sole_writer
from training.loop import (
    EpochReport,
    Evaluation,
    Recipe,
    evaluate,
    provenance,
    save_classifier,
    train_classifier,
)
from training.state import Keeper, require_space, state_path
from utils import (
    forget_peak_memory,
    peak_memory_mb,
    pick_device,
    real_path,
    save_torch_file,
    seed_everything,
    sha256_of,
)

# What of a method's options decides its results; the others are run_llama.py's.
OPTIONS_OF = {
    "pretrain": ("pretrain_epochs", "pretrain_lr"),
    "prompt": ("template",),
    "zero_shot": ("template",),
    "lora": ("lora_rank", "lora_alpha", "lora_targets"),
    "adapter": ("adapter_size",),
    "mixout": ("mixout_p",),
    "l2sp": ("l2sp_weight", "l2sp_head_weight"),
    "smart": ("smart_weight", "smart_radius", "proximal_weight"),
    "last_epochs": ("last",),
    "soup": ("soup",),
}
RECIPE = tuple(f.name for f in fields(Recipe) if f.name != "running_train_acc")
SETTINGS = (
    *("attention", "pooling", "epochs", "batch_size", "hidden_dropout_prob", "backbone_dropout"),
    *("max_sentence_len", *RECIPE),
)
FILES = ("train", "dev", "test", "label_names", "pretrained_model_path", "tokenizer_path")


def _draws(model: nn.Module) -> bool:
    """Whether its dropout makes two passes in training differ."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


class Experiment(Task):
    """What is the same for all seeds; `args` are those of advanced.run."""

    def __init__(self, args: argparse.Namespace, methods: tuple[str, ...]):
        super().__init__(args)
        self.methods = methods
        self.device = pick_device(args.use_gpu)
        if args.tokenizer_path is None:
            args.tokenizer_path = str(find_tokenizer_model(args.pretrained_model_path))
        self.tokenizer = Tokenizer(tokenizer_model=args.tokenizer_path)
        path = Path(args.pretrained_model_path)
        self.model_name = real_path(path).parent.name if path.stem == "model" else path.stem
        self.name = args.name or "+".join(methods)
        llama = load_pretrained(args.pretrained_model_path)
        self.tokenizer.require_vocab_size(llama.config.vocab_size)
        self.room = llama.config.max_seq_len
        self.n_parameters = sum(parameter.numel() for parameter in llama.parameters())
        if self.has("prompt", "zero_shot"):
            self.templates = templates.find_templates(self.dataset, self.label_names)
            self._template()  # or a line now that it does not exist

    def _stem(self, name: str) -> str:
        stem = f"{self.dataset}-{name}-{self.model_name}"
        stem += f"-cv{self.args.folds}" if self.args.folds else ""
        share = self.args.train_share
        return stem + (f"-train{100 * share:.3g}" if share < 1.0 else "")

    def results_path(self, after: str = "") -> Path:
        """Of its own record, or of that of an average of its weights, such as "wise_ft"."""
        return Path(self.args.results_dir) / f"{self._stem(self.name_with(after))}.json"

    def name_with(self, after: str) -> str:
        return "+".join(part for part in (self.name, after) if part not in ("", "plain")) or "plain"

    def has(self, *names: str) -> bool:
        return not set(names).isdisjoint(self.methods)

    def identity(self) -> dict[str, Any]:
        """All that decides a result but seed, fold and the choice from the grid."""
        args = self.args
        own = [key for name in self.methods for key in OPTIONS_OF.get(name, ())]
        settings = {key: getattr(args, key) for key in (*SETTINGS, *own) if key not in args.grid}
        return {
            "dataset": self.dataset,
            "method": self.name,
            "model": self.model_name,
            "methods": list(self.methods),
            "n_labels": self.n_labels,
            "train_share": args.train_share,
            "folds": args.folds,
            "grid": {"lr": [args.lr], **args.grid},
            "settings": {**settings, "device": self.device.type},
            "files": self.files,
        }

    @cached_property
    def files(self) -> dict[str, str]:
        """What was read, by its sha256."""
        paths = {key: getattr(self.args, key) for key in FILES}
        if self.has("prompt", "zero_shot"):
            paths["templates"] = templates.TEMPLATES
        return {f"{key}_sha256": sha256_of(path) for key, path in paths.items()}

    # ------------------------------------------------------------------ data

    def encode(
        self,
        rows: Rows,
        options: argparse.Namespace,
        template: templates.Template | None = None,
    ) -> SentenceDataset:
        """The rows as they are, or as prompts: by the given template, or `prompt`'s own."""
        room = {"max_tokens": self.room, "max_sentence_len": options.max_sentence_len}
        if template is None and self.has("prompt"):
            template = self._template()
        if template is not None:
            room["max_tokens"] -= prompting.longest_label(self.tokenizer, template)
            examples, n_cut = prompting.encode_prompts(rows, self.tokenizer, template, **room)
        else:
            examples, n_cut = encode_examples(rows, self.tokenizer, **room)
        warn_of_truncation(n_cut, len(rows), room["max_tokens"])
        return SentenceDataset(examples, self.tokenizer.pad_id)

    # ------------------------------------------------------------------ the model

    def checkpoint(self, options: argparse.Namespace, train: Rows) -> tuple[str, float]:
        """The pretrained weights, which have read the training sentences if `pretrain` says so, and
        the seconds that took.

        That is done once, by a seed of its own, for all runs on one train split: the spread over
        seeds is of the finetuning alone, but with --train_share, whose split each seed draws. What
        is measured meanwhile is the bits per byte of dev, of which folds train on a part.
        """
        args = self.args
        if not self.has("pretrain"):
            return args.pretrained_model_path, 0.0
        sentences = [sentence for sentence, _ in train]
        key = [sentences, options.pretrain_epochs, options.pretrain_lr, args.bf16]
        key += [self.files["pretrained_model_path_sha256"], self.files["tokenizer_path_sha256"]]
        key += [self.device.type]
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:12]
        path, seconds = continue_on(
            sentences,
            [sentence for sentence, _ in self.dev],
            args.pretrained_model_path,
            self.tokenizer,
            Path(args.runs_dir) / f"{self.dataset}-read-{self.model_name}-{digest}",
            epochs=options.pretrain_epochs,
            lr=options.pretrain_lr,
            seed=0,
            device=self.device,
            bf16=args.bf16,
        )
        return str(path), round(seconds, 1)

    def build(self, checkpoint: str, options: argparse.Namespace) -> nn.Module:
        """A classifier of the final form on the pretrained weights, its head drawn anew."""
        llama = load_pretrained(checkpoint, options.attention, options.backbone_dropout)
        labels = self._template().labels if self.has("prompt") else None
        model = assembly.build(
            self.methods,
            llama,
            self.config(options),
            self.tokenizer,
            labels,
            options.adapter_size,
        )
        return model.to(self.device)

    def config(self, options: argparse.Namespace) -> SimpleNamespace:
        return SimpleNamespace(
            num_labels=self.n_labels,
            pretrained_model_path=options.pretrained_model_path,
            option="finetune",
            hidden_dropout_prob=options.hidden_dropout_prob,
            pooling=options.pooling,
        )

    def require_buildable(self, hyperparameters: dict[str, Any]) -> None:
        """A ValueError now where the model could not be made, not after hours of other work."""
        options = self.options(hyperparameters)
        model = self.build(options.pretrained_model_path, options)
        if options.r_drop and not self.has("mixout") and not _draws(model):
            raise ValueError(
                "--r_drop compares two passes, which are the same without dropout; give it "
                "--backbone_dropout" + ("" if self.has("prompt") else " or --hidden_dropout_prob")
            )
        if self.has("last_epochs") and options.last > options.epochs:
            raise ValueError(f"--last {options.last}: there are only {options.epochs} epochs")
        assembly.prepare(self.methods, model, options)

    def wanted_templates(self) -> list[templates.Template]:
        """All of the data set, or the one that was named."""
        return self.templates if self.args.template is None else [self._template()]

    def _template(self) -> templates.Template:
        return templates.choose_template(self.templates, self.args.template)

    # ------------------------------------------------------------------ a run

    def options(self, hyperparameters: dict[str, Any]) -> argparse.Namespace:
        return argparse.Namespace(**{**vars(self.args), **hyperparameters})

    def weights_path(
        self, hyperparameters: dict[str, Any], seed: int, fold: int | None, after: str = ""
    ) -> Path:
        in_order = sorted(hyperparameters.items(), key=lambda item: (item[0] != "lr", item[0]))
        varied = "".join(f"-{key}-{value}" for key, value in in_order)
        folder = Path(self.args.runs_dir) / self._stem(self.name_with(after))
        return folder / f"seed-{seed}{'' if fold is None else f'-fold-{fold}'}{varied}.pt"

    def train_run(
        self, hyperparameters: dict[str, Any], seed: int, fold: int | None = None
    ) -> dict[str, Any]:
        """Trains, writes the weights, and returns the record with None for "test".

        Its state stays until `forget`, so that a run is not lost before its record is written.
        """
        path = self.weights_path(hyperparameters, seed, fold)
        path.parent.mkdir(parents=True, exist_ok=True)
        with sole_writer(path):
            return self._train_run(path, hyperparameters, seed, fold)

    def _train_run(
        self, path: Path, hyperparameters: dict[str, Any], seed: int, fold: int | None
    ) -> dict[str, Any]:
        options = self.options(hyperparameters)
        n_kept = max(self._n_last(options, fold), 1)
        n_teachers = 1 if self.has("smart") and options.proximal_weight else 0
        require_space(path, self.n_parameters, n_kept + 2 * n_teachers)
        train, dev = self.splits(seed, fold)
        checkpoint, pretrain_seconds = self.checkpoint(options, train)
        started = time.monotonic()
        self.forget_peak_memory()
        seed_everything(seed)
        model = self.build(checkpoint, options)
        regularizer = assembly.prepare(self.methods, model, options)
        if regularizer is not None:
            regularizer.to(self.device)
        n_trained, n_all = partial.count_trainable(model)
        print(f"{path}: trains {n_trained:,} of {n_all:,} parameters", flush=True)
        identity = {**self.identity(), "grid": None, "seed": seed, "fold": fold, **hyperparameters}
        keeper = Keeper(state_path(path), identity, True, self.args.save_minutes)
        is_resumed = keeper.is_resumed
        candidates = self._candidates(path, options, fold)
        if not is_resumed:
            candidates.clear()
        dev_data = self.encode(dev, options)

        def on_epoch(report: EpochReport, is_best: bool) -> None:
            candidates.offer(report.epoch, is_best, lambda: assembly.merged(self.methods, model))
            print(report.in_words(), flush=True)

        history = train_classifier(
            model,
            self.encode(train, options),
            dev_data,
            epochs=options.epochs,
            batch_size=options.batch_size,
            lr=options.lr,
            seed=seed,
            device=self.device,
            on_epoch=on_epoch,
            recipe=run_llama.recipe_of(options),
            keeper=keeper,
            regularizer=regularizer,
        )
        final = self.build(checkpoint, options)
        final.load_state_dict(wise_ft.average(candidates.states(len(history))))
        result = self.evaluate(final, dev_data, options)
        best = max(history, key=lambda report: report.dev_accuracy).epoch
        return {
            "seed": seed,
            "fold": fold,
            "hyperparameters": hyperparameters,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "history": [asdict(report) for report in history],
            "best_epoch": None if candidates.n_last else best,
            "dev": self.figures(result),
            "test": None,
            "weights_sha256": self.save(path, final, options),
            "seconds": None if is_resumed else round(time.monotonic() - started, 1),
            "pretrain_seconds": pretrain_seconds,
            "threads": torch.get_num_threads(),
            "trainable_parameters": n_trained,
            "parameters": n_all,
            "peak_memory_mb": None if is_resumed else self.peak_memory_mb(),
        }

    def forget(self, run: dict[str, Any]) -> None:
        """Deletes what a run needed in order to go on; its record has been written."""
        path = self.weights_path(run["hyperparameters"], run["seed"], run["fold"])
        state_path(path).unlink(missing_ok=True)  # first: without it the rest is worth nothing
        self._candidates(path, self.options(run["hyperparameters"]), run["fold"]).clear()

    def _candidates(self, path: Path, options: argparse.Namespace, fold: int | None) -> Candidates:
        return Candidates(path, self._n_last(options, fold))

    def forget_peak_memory(self) -> None:
        forget_peak_memory()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory_mb(self) -> float:
        """Since `forget_peak_memory`: of the device on CUDA, else of the process."""
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1)
        return round(peak_memory_mb(), 1)

    def _n_last(self, options: argparse.Namespace, fold: int | None) -> int:
        """How many of the last epochs' weights are wanted: 0 is the best epoch's instead.

        A fold is not to choose the epoch by which it is judged, so there the last one counts.
        """
        if self.has("last_epochs"):
            return options.last
        return 0 if fold is None else 1

    def evaluate(
        self, model: nn.Module, data: SentenceDataset, options: argparse.Namespace
    ) -> Evaluation:
        loader = make_loader(data, options.batch_size, similar_lengths=model.reads_lengths)
        return evaluate(model, loader, self.device, bf16=options.bf16)

    def figures(self, result: Evaluation) -> dict[str, Any]:
        return figures(result.predictions, result.labels, result.confidences, self.n_labels)

    def save(self, path: Path, model: nn.Module, options: argparse.Namespace) -> str:
        """A finetuned checkpoint of run_llama.py's kind where the model is of that kind; returns
        its sha256."""
        base = self.args.pretrained_model_path
        extra = provenance(self.label_names, self.tokenizer, base, options.max_sentence_len)
        extra |= {"methods": list(self.methods)}
        if type(model) is LlamaEmbeddingClassifier and not self.has("adapter"):
            save_classifier(path, model, self.config(options), **extra)
        else:
            model_args = model.llama.config.to_dict()
            save_torch_file(path, {"model": model.state_dict(), "model_args": model_args, **extra})
        return sha256_of(path)

    def load(self, run: dict[str, Any]) -> nn.Module:
        """The model that a run ended in; ValueError where its weights are not there any more."""
        hyperparameters = run["hyperparameters"]
        path = self.weights_path(hyperparameters, run["seed"], run["fold"], run.get("after", ""))
        if not path.is_file() or sha256_of(path) != run["weights_sha256"]:
            state = "are of another run" if path.is_file() else "are gone"
            raise ValueError(
                f"{path}: the weights of a finished run {state}; delete the run's entry in "
                "the results, and it will be run again"
            )
        options = self.options(hyperparameters)
        model = self.build(options.pretrained_model_path, options)
        model.load_state_dict(load_torch_file(path)["model"])
        return model
