"""What all runs of a command share: methods, data, the model, settings, and where files lie."""

from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import nn

from advanced import compose
from advanced.methods import prompting
from advanced.methods.continued import continue_pretraining
from advanced.record import Run, metrics_of
from classifier import LlamaEmbeddingClassifier, label_room
from fast.threads import USUAL_LENGTH, choose_threads
from formats.torch_file import load_torch_file, save_torch_file
from llama import load_pretrained
from tokenizer import Tokenizer
from training.checkpoint import provenance, save_classifier
from training.dataset import SentenceDataset, encode_examples, warn_of_truncation
from training.evaluation import Evaluation, evaluate
from training.labeled import read_label_names, read_sentences
from training.loop import Recipe, require_dropout
from training.options import dataset_name, recipe_of
from training.templates import Template, choose_template, find_templates
from utils import InputError, real_path, sha256_of

Rows = list[tuple[str, int]]  # sentence, label
HEAD_SEED = 0  # all runs begin with one head, so that soups may average them
SETTINGS = (  # that decide the results of every method; `compose.OPTIONS` has the methods' own
    *("attention", "pooling", "epochs", "batch_size", "hidden_dropout_prob", "backbone_dropout"),
    *("max_sentence_len", *(f.name for f in fields(Recipe) if f.name != "train_acc")),
)


@dataclass
class Experiment:
    """One composition of methods on one data set and model.

    `settings` has every hyperparameter under the name of its option; `grid` has the values to
    choose from, always those of `lr`. `files` are the paths of train, dev, test, label_names,
    pretrained_model_path and tokenizer_path.
    """

    methods: tuple[str, ...]
    files: dict[str, str]
    settings: SimpleNamespace
    grid: dict[str, list[Any]]
    device: torch.device
    command: str
    results_dir: Path
    runs_dir: Path
    name: str | None = None
    folds: int | None = None
    train_share: float = 1.0
    save_minutes: float = 5.0

    def __post_init__(self):
        files = self.files
        self.name = self.name or "+".join(self.methods)
        self.dataset = dataset_name(files["train"])
        self.label_names = read_label_names(files["label_names"])
        self.n_labels = len(self.label_names)
        names = {"n_labels": self.n_labels, "label_names": self.label_names}
        self.train: Rows = read_sentences(files["train"], **names)
        self.dev: Rows = read_sentences(files["dev"], **names)
        self.test: Rows = read_sentences(files["test"], unlabeled=True, **names)
        self._require_enough_sentences()
        self.tokenizer = Tokenizer(tokenizer_model=files["tokenizer_path"])
        path = Path(files["pretrained_model_path"])
        self.model_name = real_path(path).parent.name if path.stem == "model" else path.stem
        llama = load_pretrained(path)
        self.tokenizer.require_vocab_size(llama.config.vocab_size)
        self.max_seq_len = llama.config.max_seq_len
        self.n_parameters = sum(parameter.numel() for parameter in llama.parameters())
        choose_threads(llama, USUAL_LENGTH * self.settings.batch_size)
        self.templates: list[Template] = []
        if {"prompt", "zero_shot"} & set(self.methods):
            self.templates = find_templates(self.dataset, self.label_names)
            choose_template(self.templates, self.settings.template)  # fail now if it is unknown
        self.digests = {f"{key}_sha256": sha256_of(path) for key, path in files.items()}

    def identity(self, average: str = "") -> dict[str, Any]:
        """Return everything that decides a result except seed, fold and the grid's choice."""
        averages = average.split("+") if average else []
        names = (*SETTINGS, *compose.options_of([*self.methods, *averages]))
        settings = {key: getattr(self.settings, key) for key in names if key not in self.grid}
        settings |= {"device": self.device.type, "head_seed": HEAD_SEED}
        if self.templates:
            templates = self.templates
            if "zero_shot" not in self.methods:
                chosen = self.grid.get("template", [self.settings.template])
                templates = [choose_template(templates, name) for name in chosen]
            settings["templates"] = [template._asdict() for template in templates]
        return {
            "dataset": self.dataset,
            "method": self._name(average),
            "model": self.model_name,
            "methods": [*self.methods, *averages],
            "n_labels": self.n_labels,
            "train_share": self.train_share,
            "folds": self.folds,
            "grid": self.grid,
            "settings": settings,
            "files": self.digests,
        }

    def settings_with(self, hyperparameters: dict[str, Any]) -> SimpleNamespace:
        return SimpleNamespace(**{**vars(self.settings), **hyperparameters})

    # ------------------------------------------------------------------ paths

    def _name(self, average: str) -> str:
        return "+".join(p for p in (self.name, average) if p not in ("", "plain")) or "plain"

    def stem(self, average: str = "") -> str:
        stem = f"{self.dataset}-{self._name(average)}-{self.model_name}"
        stem += f"-cv{self.folds}" if self.folds else ""
        return stem + (f"-train{100 * self.train_share:.3g}" if self.train_share < 1.0 else "")

    def results_path(self, average: str = "") -> Path:
        """Return the record of the runs, or of an average of their weights, such as "wise_ft"."""
        return self.results_dir / f"{self.stem(average)}.json"

    def weights_path(self, run: Run) -> Path:
        """Return the path for a run of this seed, fold and hyperparameters."""
        fold = "" if run["fold"] is None else f"-fold-{run['fold']}"
        pairs = sorted(run["hyperparameters"].items(), key=lambda item: (item[0] != "lr", item[0]))
        values = "".join(f"-{key}-{value}" for key, value in pairs)
        folder = self.runs_dir / self.stem(run.get("after", ""))
        return folder / f"seed-{run['seed']}{fold}{values}.pt"

    # ------------------------------------------------------------------ data

    def splits(self, seed: int, fold: int | None) -> tuple[Rows, Rows]:
        """Return (train, dev). Folds are the same for all seeds; each seed draws its share."""
        if fold is not None:
            rows = self.train + self.dev
            folds = StratifiedKFold(self.folds, shuffle=True, random_state=0)
            train, dev = list(folds.split(rows, [label for _, label in rows]))[fold]
            return [rows[i] for i in train], [rows[i] for i in dev]
        if self.train_share == 1.0:
            return self.train, self.dev
        labels = [label for _, label in self.train]
        train, _ = train_test_split(
            self.train, train_size=self.train_share, stratify=labels, random_state=seed
        )
        return train, self.dev

    def _require_enough_sentences(self) -> None:
        rows, share = self.train + self.dev if self.folds else self.train, self.train_share
        fewest = min(Counter(label for _, label in rows).values())
        if self.folds and fewest < self.folds:
            raise InputError(
                f"--folds {self.folds}: a label has only {fewest} sentences; take fewer folds"
            )
        if share < 1.0 and fewest * min(share, 1.0 - share) < 1.0:
            raise InputError(
                f"--train_share {share:g}: a label has only {fewest} sentences, and both the kept "
                "and the left part need one; take a share nearer to 0.5"
            )

    def encode(self, rows: Rows, settings: SimpleNamespace) -> SentenceDataset:
        """Tokenize the rows, for `prompt` and `zero_shot` in their template."""
        limits = {"max_tokens": self.max_seq_len, "max_sentence_len": settings.max_sentence_len}
        if self.templates:
            template = choose_template(self.templates, settings.template)
            limits["max_tokens"] -= label_room(self.tokenizer, sum(template.labels, ()))
            examples, n_truncated = prompting.encode_prompts(
                rows, self.tokenizer, template, **limits
            )
        else:
            examples, n_truncated = encode_examples(rows, self.tokenizer, **limits)
        warn_of_truncation(n_truncated, len(rows), limits["max_tokens"])
        return SentenceDataset(examples, self.tokenizer.pad_id)

    # ------------------------------------------------------------------ the model

    def checkpoint(self, settings: SimpleNamespace, train: Rows) -> tuple[str, float]:
        """Return (the weights to start from, the seconds that continued pretraining took).

        All runs on one train split share the continued model, so the spread over seeds is that of
        finetuning. Its held-out text is dev, of which folds train on a part.
        """
        if "pretrain" not in self.methods:
            return self.files["pretrained_model_path"], 0.0
        path, seconds = continue_pretraining(
            [sentence for sentence, _ in train],
            [sentence for sentence, _ in self.dev],
            self.files["pretrained_model_path"],
            self.tokenizer,
            self.runs_dir / f"{self.dataset}-read-{self.model_name}",
            epochs=settings.pretrain_epochs,
            lr=settings.pretrain_lr,
            device=self.device,
            bf16=settings.bf16,
            save_minutes=self.save_minutes,
        )
        return str(path), round(seconds, 1)

    def _config(self, settings: SimpleNamespace) -> SimpleNamespace:
        return SimpleNamespace(
            num_labels=self.n_labels,
            pretrained_model_path=self.files["pretrained_model_path"],
            option="finetune",
            hidden_dropout_prob=settings.hidden_dropout_prob,
            pooling=settings.pooling,
        )

    def build(self, settings: SimpleNamespace, checkpoint: str | None = None) -> nn.Module:
        """Return a classifier with a new head, in the form that is saved."""
        checkpoint = checkpoint or self.files["pretrained_model_path"]
        llama = load_pretrained(checkpoint, settings.attention, settings.backbone_dropout)
        labels = ()
        if self.templates:
            labels = choose_template(self.templates, settings.template).labels
        config, size = self._config(settings), settings.adapter_size
        model = compose.build(self.methods, llama, config, self.tokenizer, labels, size)
        return model.to(self.device)

    def require_trainable(self, settings: SimpleNamespace) -> None:
        """Raise InputError before hours of work for settings that cannot be trained."""
        model = self.build(settings)
        if "last_epochs" in self.methods and settings.last > settings.epochs:
            raise InputError(f"--last {settings.last}: there are only {settings.epochs} epochs")
        compose.prepare(self.methods, model, settings)
        require_dropout(model, recipe_of(settings))

    def evaluate(
        self, model: nn.Module, data: SentenceDataset, settings: SimpleNamespace
    ) -> Evaluation:
        return evaluate(model, data, settings.batch_size, self.device, bf16=settings.bf16)

    def metrics(self, model: nn.Module, rows: Rows, settings: SimpleNamespace) -> dict[str, Any]:
        data = self.encode(rows, settings)
        return metrics_of(self.evaluate(model, data, settings), self.n_labels)

    def save(self, run: Run, model: nn.Module) -> str:
        """Write a run's weights and return their sha256.

        `run_llama.py` can read them if the model is its plain classifier.
        """
        path, settings = self.weights_path(run), self.settings_with(run["hyperparameters"])
        path.parent.mkdir(parents=True, exist_ok=True)
        base, max_len = self.files["pretrained_model_path"], settings.max_sentence_len
        extra = provenance(self.label_names, self.tokenizer, base, max_len)
        extra["methods"] = list(self.methods)
        if type(model) is LlamaEmbeddingClassifier and "adapter" not in self.methods:
            save_classifier(path, model, self._config(settings), **extra)
        else:
            model_args = model.llama.config.to_dict()
            save_torch_file(path, {"model": model.state_dict(), "model_args": model_args, **extra})
        return sha256_of(path)

    def load(self, run: Run) -> nn.Module:
        """Return the model of a finished run; raise InputError if its weights are gone."""
        settings = self.settings_with(run["hyperparameters"])
        if "bias" in run:  # zero-shot
            checkpoint, _ = self.checkpoint(settings, self.train)
            model = self.build(settings, checkpoint)
            model.bias.copy_(torch.tensor(run["bias"]))
            return model
        path = self.weights_path(run)
        if not path.is_file() or sha256_of(path) != run["weights_sha256"]:
            state = "are of another run" if path.is_file() else "are gone"
            raise InputError(
                f"{path}: the weights of a finished run {state}; delete its entry in the results, "
                "and the same command runs it again"
            )
        model = self.build(settings)
        model.load_state_dict(load_torch_file(path)["model"])
        return model
