"""Zero-shot: template and calibration are chosen on the train split, before dev and test are read.

No weight changes, and no seed has a say; `templates.py` and `prompting.py` say what is chosen from.
"""

import argparse
import platform
import time
from typing import Any

import torch

from advanced.experiment import Experiment
from advanced.methods import prompting, templates
from advanced.task import Rows
from llama import load_pretrained
from training.loop import Evaluation


class ZeroShot:
    """The best prompt of an experiment: `run` is its record, `evaluate(rows)` predicts by it."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        args = experiment.args
        self.options = argparse.Namespace(**{**vars(args), "bf16": False})  # as `choose` scores
        self.llama = load_pretrained(args.pretrained_model_path, args.attention)
        self._model(experiment.wanted_templates()[0])  # or a line before hours of `pretrain`
        checkpoint, self.pretrain_seconds = experiment.checkpoint(args, experiment.train)
        self.llama = load_pretrained(checkpoint, args.attention).to(experiment.device)

    def _model(self, template: templates.Template) -> prompting.PromptClassifier:
        given = (self.llama, self.experiment.tokenizer, template.labels)
        return prompting.PromptClassifier(*given, trainable=False).eval()

    def choose(self) -> dict[str, Any]:
        """Tries every template and scoring on the train split and returns the record of a run."""
        started = time.monotonic()
        experiment, tried = self.experiment, []
        experiment.forget_peak_memory()
        labels = torch.tensor([label for _, label in experiment.train])
        for template in experiment.wanted_templates():
            model = self._model(template)
            prompts = experiment.encode(experiment.train, self.options, template)
            scores = prompting.label_scores(model, prompts.examples)  # (N, n_labels)
            for scoring in prompting.SCORINGS:
                prompting.calibrate(model, scoring, template, scores)
                right = (scores + model.bias).argmax(dim=1).cpu() == labels
                one = {"template": template.name, "scoring": scoring, "bias": model.bias.tolist()}
                tried.append({**one, "train_accuracy": right.float().mean().item()})
                accuracy = tried[-1]["train_accuracy"]
                print(f"{template.name}, {scoring}: train acc :: {accuracy:.3f}", flush=True)
        best = max(tried, key=lambda one: one["train_accuracy"])
        return {
            "seed": experiment.args.seeds[0],
            "fold": None,
            "hyperparameters": {key: best[key] for key in ("template", "scoring")},
            "bias": best["bias"],
            "tried": [{k: v for k, v in one.items() if k != "bias"} for one in tried],
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "history": [],
            "best_epoch": None,
            "seconds": round(time.monotonic() - started, 1),
            "pretrain_seconds": self.pretrain_seconds,
            "threads": torch.get_num_threads(),
            "trainable_parameters": 0,
            "parameters": experiment.n_parameters,
            "peak_memory_mb": experiment.peak_memory_mb(),
        }

    def evaluate(self, run: dict[str, Any], rows: Rows) -> Evaluation:
        """What the prompt of a run says of the rows."""
        name = run["hyperparameters"]["template"]
        template = templates.choose_template(self.experiment.templates, name)
        model = self._model(template)
        model.bias.copy_(torch.tensor(run["bias"]))
        prompts = self.experiment.encode(rows, self.options, template)
        return self.experiment.evaluate(model, prompts, self.options)
