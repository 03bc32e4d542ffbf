"""The metrics of a run against scikit-learn, and what a record keeps, skips and refuses."""

import json
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from advanced import run as composer
from advanced.compose import AVERAGES, compose
from advanced.experiment import Experiment
from advanced.record import Record, metrics_of
from conftest import ROOT
from training.evaluation import Evaluation, scores
from training.templates import find_templates
from utils import InputError

IDENTITY = {"dataset": "toy", "settings": {"epochs": 2, "targets": ["w1"]}, "files": {}}


def metrics(predictions: list[int], labels: list[int], confidences: list[float], n_labels: int):
    accuracy, macro_f1 = scores(predictions, labels)
    sentences = [""] * len(labels)
    result = Evaluation(accuracy, macro_f1, predictions, labels, sentences, confidences)
    return metrics_of(result, n_labels)


def test_metrics_are_those_of_scikit_learn():
    labels, predictions = np.random.randint(0, 3, (2, 200)).tolist()  # of five labels
    ours = metrics(predictions, labels, np.random.uniform(0.2, 1.0, 200).tolist(), 5)
    assert ours["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    macro_f1 = f1_score(labels, predictions, average="macro", zero_division=0.0)
    assert ours["macro_f1"] == pytest.approx(macro_f1)
    assert ours["confusion"] == confusion_matrix(labels, predictions, labels=range(5)).tolist()
    assert [c == "1" for c in ours["right"]] == np.equal(labels, predictions).tolist()


def test_the_calibration_error_is_the_mean_gap_weighted_by_the_bins_counts():
    predictions, labels = [0, 0, 0, 0, 1], [0, 1, 0, 0, 1]
    confidences = [0.95, 0.91, 0.51, 0.55, 1.0]  # a confidence of 1 belongs to the last bin
    ours = metrics(predictions, labels, confidences, 2)
    # [0.5, 0.6): two correct at 0.53 on average; [0.9, 1]: two of three correct at 0.9533
    assert ours["reliability"]["count"] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 3]
    assert ours["reliability"]["accuracy"][0] is None
    assert ours["reliability"]["accuracy"][5] == 1.0
    assert ours["reliability"]["confidence"][5] == pytest.approx(0.53)
    assert ours["ece"] == pytest.approx(2 / 5 * (1 - 0.53) + 3 / 5 * (2.86 / 3 - 2 / 3))


def test_sentences_without_a_gold_label_do_not_count():
    none = {"n_sentences": 2, "accuracy": None, "macro_f1": None}
    assert metrics([0, 1], [-1, -1], [0.5, 0.9], 2) == none
    ours = metrics([0, 1, 0, 1], [0, -1, 1, 1], [0.5, 0.9, 0.6, 0.7], 2)
    assert ours == metrics([0, 0, 1], [0, 1, 1], [0.5, 0.6, 0.7], 2)
    assert ours["accuracy"] == pytest.approx(2 / 3)


def entry(seed: int, lr: float = 0.1, accuracy: float | None = 0.5) -> dict:
    run = {"seed": seed, "fold": None, "hyperparameters": {"lr": lr}}
    return {**run, "dev": {"accuracy": accuracy}}


def test_an_added_run_is_found_by_the_next_process(tmp_path):
    path = tmp_path / "toy.json"
    Record(path, IDENTITY, "first").add("runs", entry(2))
    record = Record(path, IDENTITY, "second")
    assert record.find("runs", {"lr": 0.1}, 2) == entry(2)
    assert record.find("runs", {"lr": 0.1}, 3) is None
    assert record.find("runs", {"lr": 0.2}, 2) is None
    assert record.content["command"] == "second"


def test_the_best_trial_becomes_the_first_run_and_the_first_of_equals_wins(tmp_path):
    record = Record(tmp_path / "toy.json", IDENTITY, "command")
    for lr, accuracy in ((0.1, 0.4), (0.2, 0.6), (0.3, 0.6)):
        record.add("trials", entry(1, lr, accuracy))
    record.add("trials", entry(7, 0.4, 0.9))  # of another seed, from an earlier command
    record.add("trials", entry(1, 0.5, None))  # diverged
    assert record.choose(1) == {"lr": 0.2}
    content = json.loads(record.path.read_text(encoding="utf-8"))
    assert content["runs"] == [entry(1, 0.2, 0.6)] and content["trials"] == []
    assert [trial["dev_accuracy"] for trial in content["search"]] == [0.4, 0.6, 0.6, None]
    record.add("trials", entry(2, 0.1, None))
    with pytest.raises(InputError, match="every trial of the grid diverged"):
        record.choose(2)


def test_a_record_of_other_settings_is_refused_with_what_differs(tmp_path):
    path = tmp_path / "toy.json"
    Record(path, IDENTITY, "first").write()
    other = {**IDENTITY, "settings": {"epochs": 3, "targets": ["w1"]}}
    with pytest.raises(InputError, match=r"toy\.json: .*epochs: saved 2, now 3.*--name"):
        Record(path, other, "second")
    for text, words in (("{", "is not JSON"), ("{}", "is not a record"), ("[]", "is not a record")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=words):
            Record(path, IDENTITY, "command")


def test_each_bundled_record_is_found_by_its_own_command():
    for path in sorted((ROOT / "results/records").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        args = composer.get_args(shlex.split(content["command"])[3:])
        trained = tuple(name for name in compose(args.method) if name not in AVERAGES)
        experiment = Experiment.__new__(Experiment)  # without its data, which may be absent
        vars(experiment).update(
            **{key: content[key] for key in ("dataset", "n_labels", "folds", "train_share")},
            methods=trained or ("plain",),
            settings=SimpleNamespace(**vars(args)),
            grid={"lr": content["grid"]["lr"] if args.lr is None else [args.lr], **args.grid},
            device=torch.device(content["settings"]["device"]),
            results_dir=path.parent,
            name=args.name or "+".join(trained or ("plain",)),
            model_name=content["model"],
            digests=content["files"],
            templates=[],
        )
        if {"prompt", "zero_shot"} & set(trained):
            names = json.loads((ROOT / args.label_names).read_text(encoding="utf-8"))
            experiment.templates = find_templates(content["dataset"], names)
        average = "+".join(name for name in content["methods"] if name in AVERAGES)
        assert experiment.results_path(average) == path
        identity = experiment.identity(average)
        if "head_seed" in content["settings"]:
            assert Record(path, identity, content["command"]).runs
        else:  # its seeds drew heads of their own
            with pytest.raises(InputError, match="head_seed: saved None, now 0"):
                Record(path, identity, content["command"])
