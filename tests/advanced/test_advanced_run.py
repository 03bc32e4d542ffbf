"""The composer: every method from command line to record; skipped, resumed and refused runs."""

import itertools
import json
import os
import pkgutil
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from advanced import experiment as experiments
from advanced import produce
from advanced import run as composer
from advanced.compose import METHODS
from advanced.methods import wise_ft
from conftest import ROOT, ended
from helpers import error_line, lines_of
from llama import load_pretrained
from training import evaluation
from training.checkpoint import load_classifier
from training.evaluation import Evaluation

DATA = [
    *("--train", "toy-train.txt", "--dev", "toy-dev.txt", "--test", "toy-test.txt"),
    *("--label-names", "labels.json", "--pretrained-model-path", "model.pt"),
    *("--results_dir", "results"),
]
SHORT = ["--epochs", "2", "--lr", "1e-2", "--batch_size", "4"]


@pytest.fixture
def command(workplace: Path, capsys) -> Callable[..., tuple[int, str, str]]:
    """command("--method", ...) runs the composer on the workplace's files: code, out, err.

    Its train, dev and test have 8, 6 and 4 different sentences.
    """
    lines = {"dev": ["a film", "her heart", "the story"], "test": ["this movie", "warm"]}
    for split, beginnings in lines.items():
        rows = [
            f"{label} ||| {b} {w}" for b in beginnings for label, w in enumerate(("bad", "good"))
        ]
        (workplace / f"toy-{split}.txt").write_text("\n".join(rows), encoding="utf-8")

    return lambda *options: ended(lambda: composer.main([*DATA, *SHORT, *options]), capsys)


@pytest.fixture
def advanced(command) -> Callable[..., str]:
    """advanced("--method", ...) returns what a command printed that ended well."""

    def call(*options: str) -> str:
        code, out, err = command(*options)
        assert code == 0, err
        return out + err

    return call


def record_path(method: str, folder: str = "results") -> Path:
    (path,) = Path(folder).glob(f"toy-{method}-*.json")
    return path


def record(method: str, folder: str = "results") -> dict:
    return json.loads(record_path(method, folder).read_text(encoding="utf-8"))


def weights(method: str = "*", folder: str = "runs") -> dict[str, dict[str, torch.Tensor]]:
    """Return the saved weights of finished runs by their path."""
    paths = sorted(Path(folder).glob(f"toy-{method}-*/seed-*.pt"))
    paths = [path for path in paths if not re.search(r"\.(state|state\.old|epoch-\d+)$", path.stem)]
    return {str(path): torch.load(path, weights_only=True)["model"] for path in paths}


def assert_same(ours: dict, theirs: dict) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours.values(), theirs.values(), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize("method", [name for name in METHODS if name != "zero_shot"])
def test_every_method_leaves_its_record_and_weights_that_reproduce_it(advanced, method):
    small = {"lora": ["--lora_rank", "2"], "adapter": ["--adapter_size", "4"]}
    small |= {"pretrain": ["--pretrain_epochs", "1"], "last_epochs": ["--last", "1"]}
    options = ["--method", method, "--seeds", "3,4", *small.get(method, [])]
    advanced(*options)
    runs = record(method)["runs"]
    assert len(runs) == (1 if method == "soup" else 2)
    for run in runs:
        assert (run["dev"]["n_sentences"], run["test"]["n_sentences"]) == (6, 4)
        assert run["trainable_parameters"] <= run["parameters"]
        assert len(run["history"]) == (0 if method in ("wise_ft", "soup") else 2)
    printed = advanced(*options, "--dev_out", "toy-dev-advanced-output.txt")
    assert "parameters" not in printed  # everything is there already
    rows = zip(lines_of("toy-dev-advanced-output.txt"), lines_of("toy-dev.txt"), strict=True)
    n_correct = sum(predicted == gold for predicted, gold in rows)
    assert n_correct / 6 == max(run["dev"]["accuracy"] for run in runs)
    left = [path.name for path in Path("runs").glob("*/seed-*")]
    assert not [name for name in left if name.endswith(".state.pt") or ".epoch-" in name]


def test_merged_weights_are_a_checkpoint_of_run_llama(advanced):
    advanced("--method", "lora", "--seeds", "3")
    (path,) = weights("lora")
    model, saved = load_classifier(path)
    assert saved["label_names"] == ["bad", "good"] and model.pooling == "mean"


def test_methods_compose_under_one_name(advanced):
    words = ["--method", "wise_ft", "--method", "lora", "--method", "pretrain", "--method", "soup"]
    advanced(*words, "--seeds", "3,4", "--lora_rank", "2", "--pretrain_epochs", "1")
    names = {path.name.split("-")[1] for path in Path("results").glob("*.json")}
    assert names == {"pretrain+lora", "pretrain+lora+wise_ft", "pretrain+lora+wise_ft+soup"}
    (soup,) = record("pretrain+lora+wise_ft+soup")["runs"]
    assert "alphas" not in soup  # which were those of one ingredient
    assert set(soup["ingredients"]) <= {3, 4}


def test_zero_shot_chooses_template_and_scoring_on_train_and_trains_nothing(advanced):
    rows = lines_of("toy-train.txt")
    flipped = [f"{1 - int(row[0])}{row[1:]}" for row in rows]
    Path("toy-dev.txt").write_text("\n".join(flipped), encoding="utf-8")
    printed = advanced("--method", "zero_shot", "--dev_out", "toy-dev-advanced-output.txt")
    (run,) = record("zero_shot")["runs"]
    best = max(one["train_accuracy"] for one in run["tried"])
    chosen = next(one for one in run["tried"] if one["train_accuracy"] == best)
    assert {key: chosen[key] for key in ("template", "scoring")} == run["hyperparameters"]
    assert run["trainable_parameters"] == 0 and run["history"] == []
    # Here dev is train with the other labels, so the best on train is the worst on dev.
    assert best > 0.5 and run["dev"]["accuracy"] == pytest.approx(1 - best)
    assert f"dev acc :: {1 - best:.3f}, 1 run\n" in printed
    predicted = lines_of("toy-dev-advanced-output.txt")
    assert sum(a == b for a, b in zip(predicted, rows, strict=True)) / 8 == best
    assert "train acc" not in advanced("--method", "zero_shot")


def test_zero_shot_reads_every_split_in_batches_of_batch_size(advanced, monkeypatch):
    sizes, pass_of = set(), evaluation.forward_pass

    def recording(model, batch, device, bf16):
        sizes.add((len(batch["sents"]), bf16))
        return pass_of(model, batch, device, bf16)

    monkeypatch.setattr(evaluation, "forward_pass", recording)
    advanced("--method", "zero_shot", "--template=about", "--batch_size", "2", "--bf16")
    assert sizes == {(1, True), (2, True), (3, True)}  # 1 and 3 are the calibrations


def test_the_record_says_what_command_made_it(advanced):
    advanced("--method", "zero_shot", "--template=about")
    words = shlex.split(record("zero_shot")["command"])
    assert words[:3] == ["python", "-m", "advanced.run"]
    assert words[-3:] == ["--method", "zero_shot", "--template=about"]


def test_a_long_sentence_leaves_room_for_a_label_of_several_tokens(advanced):
    Path("labels.json").write_text('["bad xyz", "good"]', encoding="utf-8")
    Path("toy-dev.txt").write_text(f"0 ||| {'a good film ' * 99}\n1 ||| warm\n", encoding="utf-8")
    printed = advanced("--method", "prompt", "--seeds=3", "--epochs=1")
    max_tokens = int(re.search("1 of 2 sentences .* context of ([0-9]+) tokens", printed)[1])
    assert max_tokens < load_pretrained("model.pt").config.max_seq_len


# ---------------------------------------------------------------- interruptions

STATEFUL = ("--method=mixout", "--method=smart")


@pytest.mark.parametrize(
    ("options", "target", "n_th"),
    [
        (STATEFUL, "training.loop.take_step", 3),
        (STATEFUL, "training.loop.evaluate", 2),
        (("--method=lora",), "advanced.experiment.Experiment.save", 1),
        (("--method=lora",), "advanced.produce.forget", 1),
    ],
)
def test_a_stopped_run_continues_to_the_same_weights_and_record(
    command, advanced, monkeypatch, options, target, n_th
):
    options = [*options, "--seeds=3", "--epochs=3"]
    advanced(*options, "--runs_dir=whole", "--results_dir=whole-results")
    whole, calls = pkgutil.resolve_name(target), itertools.count(1)

    def stopping(*given, **named):
        if next(calls) == n_th:
            if target.startswith("advanced"):  # behind the loop a signal ends the command at once
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)
        return whole(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(target, stopping)
        code, _, err = command(*options)
    assert code in (130, 143) and len(err.splitlines()) == 1
    advanced(*options)
    assert_same(weights(), weights(folder="whole"))
    (run,), (expected,) = (record("*", folder)["runs"] for folder in ("results", "whole-results"))
    measured = {key: run[key] for key in ("seconds", "peak_memory_mb", "weights_sha256")}
    assert run == expected | measured
    assert not list(Path("runs").glob("*/*.state.pt"))


def test_a_killed_command_continues_to_the_same_bits(advanced):
    options = ["--method=pretrain", "--method=mixout", "--pretrain_epochs=1", "--seeds=3"]
    options.append("--epochs=32")  # it must be killed before the last one
    command = [sys.executable, "-m", "advanced.run", *DATA, *SHORT, *options, "--save_minutes=0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, encoding="utf-8")
    for line in process.stdout:
        if line.startswith("epoch 1:"):
            break
    process.kill()
    process.wait()
    process.stdout.close()
    assert list(Path("runs").glob("*/seed-3*.state.pt"))
    printed = advanced(*options)
    assert "epoch 0:" not in printed and "epoch 31:" in printed
    advanced(*options, "--runs_dir=whole", "--results_dir=whole-results")
    assert_same(weights(), weights(folder="whole"))


def test_an_abandoned_run_of_other_settings_begins_anew_and_leaves_no_epoch_behind(advanced):
    options = ["--method=last_epochs", "--last=2", "--seeds=3"]
    advanced(*options)
    ((path, clean),) = weights().items()
    left = Path(path).with_name(f"{Path(path).stem}.epoch-7.pt")
    torch.save({name: tensor + 1 for name, tensor in clean.items()}, left)
    torch.save({"settings": {}}, Path(path).with_suffix(".state.pt"))
    record_path("last_epochs").unlink()
    assert "is not resumed" in advanced(*options)
    assert_same(weights(), {path: clean})
    assert not left.exists()


# ---------------------------------------------------------------- grid, folds, shares


def test_the_grid_is_tried_by_the_first_seed_and_the_test_split_comes_last(advanced, monkeypatch):
    seen, trained, metrics = [], produce.trained, experiments.Experiment.metrics

    def spy(experiment, hyperparameters, seed, fold=None):
        seen.append((hyperparameters["lr"], seed))
        return trained(experiment, hyperparameters, seed, fold)

    def measure(self, model, rows, settings):
        seen.extend(["test"] if rows is self.test else [])
        return metrics(self, model, rows, settings)

    monkeypatch.setattr(produce, "trained", spy)
    monkeypatch.setattr(experiments.Experiment, "metrics", measure)
    advanced("--grid", "lr=1e-9,1e-2", "--seeds", "3,4")
    content = record("plain")
    tried = {trial["lr"]: trial["dev_accuracy"] for trial in content["search"]}
    chosen = max(tried, key=tried.get)
    assert list(tried) == [1e-9, 1e-2] and content["chosen"] == {"lr": chosen}
    assert seen == [(1e-9, 3), (1e-2, 3), (chosen, 4), "test", "test"]
    assert len(weights()) == 2


GRIDS = {
    "plain": [
        *("lr=1e-2,2e-2", "batch_size=2,4", "hidden_dropout_prob=0.0,0.9"),
        *("backbone_dropout=0.0,0.5", "warmup=0.0,0.9", "layer_decay=0.1,1.0", "r_drop=0,5"),
        *("max_grad_norm=0.01,9", "label_smoothing=0,0.5", "max_sentence_len=1,50"),
    ],
    "pretrain": ["pretrain_epochs=1,2", "pretrain_lr=1e-4,1e-2"],
    "last_epochs": ["last=1,2", "epochs=2,3"],
}


@pytest.mark.parametrize("method", GRIDS)
def test_each_option_of_a_grid_reaches_the_training(command, advanced, monkeypatch, method):
    line = error_line(command("--method", method, "--grid", "nonsense=1"))
    accepted = set(line.rpartition("choose from ")[2].partition(" (see")[0].split(", "))
    listed = {grid.partition("=")[0] for name in {method, "plain"} for grid in GRIDS[name]}
    assert accepted == listed | {"epochs", "patience"}  # these are of how long
    finals, save = [], experiments.Experiment.save

    def spy(self, run, model):
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return save(self, run, model)

    monkeypatch.setattr(experiments.Experiment, "save", spy)
    for grid in GRIDS[method]:
        key, _, values = grid.partition("=")
        finals.clear()
        epochs = "--epochs=2" if method == "last_epochs" else "--epochs=1"
        advanced("--method", method, "--grid", grid, "--seeds=3", "--name", key, epochs)
        first, second = finals
        assert first.shape != second.shape or not torch.equal(first, second), grid
        tried = [trial[key] for trial in record(key)["search"]]
        assert tried == [float(value) for value in values.split(",")]


def test_a_trial_that_diverges_is_not_chosen_and_ends_nothing(advanced):
    printed = advanced("--grid", "lr=1e-2,1e9", "--seeds", "3", "--epochs", "3")
    content = record("plain")
    assert content["chosen"] == {"lr": 1e-2}
    assert content["search"][1]["dev_accuracy"] is None and "lower --lr" in printed


def test_folds_hold_out_every_sentence_once_whatever_the_seed(advanced, monkeypatch):
    held, read, splits = {}, [], experiments.Experiment.splits

    def spy(self, seed, fold):
        train, held[seed, fold] = splits(self, seed, fold)
        assert sorted(train + held[seed, fold]) == sorted(self.train + self.dev)
        return train, held[seed, fold]

    def note(sentences, *given, **named):
        read.append(set(sentences))
        return "model.pt", 0.0

    monkeypatch.setattr(experiments.Experiment, "splits", spy)
    monkeypatch.setattr(experiments, "continue_pretraining", note)
    advanced("--method", "pretrain", "--folds", "2", "--seeds", "3,4")
    assert [held[3, fold] for fold in range(2)] == [held[4, fold] for fold in range(2)]
    for sentences, rows in zip(read, held.values(), strict=True):  # pretraining reads no held-out
        assert not sentences & {sentence for sentence, _ in rows}
    runs = record("pretrain")["runs"]
    assert [(run["seed"], run["fold"]) for run in runs] == [*held]
    for run in runs:
        assert run["test"] is None and run["best_epoch"] is None
        assert run["dev"]["accuracy"] == run["history"][-1]["dev_accuracy"]
        assert sum(map(sum, run["dev"]["confusion"])) == 7


def test_a_share_keeps_as_much_of_each_label_and_is_drawn_by_the_seed(advanced, monkeypatch):
    drawn, splits = [], experiments.Experiment.splits

    def spy(self, seed, fold):
        train, dev = splits(self, seed, fold)
        drawn.append(train)
        assert dev == self.dev
        return train, dev

    monkeypatch.setattr(experiments.Experiment, "splits", spy)
    advanced("--train_share", "0.5", "--seeds", "1,2,3", "--epochs", "1")
    assert len(record("plain")["runs"]) == 3
    for train in drawn:
        assert sorted(label for _, label in train) == [0, 0, 1, 1]
    assert len({tuple(sorted(train)) for train in drawn}) > 1


def test_the_best_epoch_or_the_mean_of_the_last_ones_is_kept(advanced, monkeypatch):
    offered, offer = [], produce.EpochFiles.offer

    def spy(self, epoch, is_best, model, names):
        offered.append({n: t.clone() for n, t in model.state_dict().items()})
        offer(self, epoch, is_best, model, names)

    monkeypatch.setattr(produce.EpochFiles, "offer", spy)
    advanced("--method=last_epochs", "--last=2", "--epochs=3", "--seeds=3")
    for name, tensor in next(iter(weights("last_epochs").values())).items():
        torch.testing.assert_close(tensor, (offered[1][name] + offered[2][name]) / 2)

    offered.clear()
    given = iter([0.2, 0.8, 0.5, 0.8])
    scripted = Evaluation(0.0, 0.0, [0] * 6, [0, 1] * 3, [""] * 6, [0.5] * 6)
    monkeypatch.setattr(
        "training.loop.evaluate", lambda *_, **__: replace(scripted, accuracy=next(given))
    )
    advanced("--epochs=4", "--seeds=3")
    assert_same(weights("plain"), {"": offered[1]})
    assert record("plain")["runs"][0]["best_epoch"] == 1


# ---------------------------------------------------------------- averages


def test_wise_ft_ends_in_the_finetuned_and_begins_at_what_read_its_own_share(advanced, monkeypatch):
    monkeypatch.setattr(wise_ft, "ALPHAS", (0.6,))
    methods = ["--method", "pretrain", "--method", "wise_ft", "--pretrain_epochs", "1"]
    advanced(*methods, "--seeds", "3,4", "--epochs", "1", "--train_share", "0.5")
    starts = [
        load_pretrained(path, "causal").state_dict() for path in Path("runs").glob("*/model.pt")
    ]
    ours, finetuned = weights("pretrain+wise_ft"), weights("pretrain")
    assert len(starts) == len(ours) == len(finetuned) == 2  # each seed reads its own sentences

    def is_average(state: dict, start: dict, end: dict) -> bool:
        pretrained = {f"llama.{name}": tensor for name, tensor in start.items()}
        return all(
            torch.allclose(tensor, torch.lerp(pretrained.get(name, end[name]), end[name], 0.6))
            for name, tensor in state.items()
        )

    for state, end in zip(ours.values(), finetuned.values(), strict=True):
        assert sum(is_average(state, start, end) for start in starts) == 1


def test_all_seeds_begin_with_one_head_and_end_with_different_ones(advanced):
    for name, lr in (("still", "1e-30"), ("trained", "1e-2")):
        advanced("--seeds=3,4", "--epochs=1", "--lr", lr, "--name", name)
        heads = [state["classifier_head.weight"] for state in weights(name).values()]
        assert torch.equal(*heads) == (name == "still")


def test_averages_are_chosen_on_dev_and_look_at_test_once(advanced, monkeypatch):
    advanced("--seeds=3,4")
    seen, evaluate = [], experiments.Experiment.evaluate
    same = Evaluation(0.5, 0.5, [0] * 6, [0, 1] * 3, [""] * 6, [0.5] * 6)

    def spy(self, model, rows, settings):
        seen.append(len(rows))
        return same

    monkeypatch.setattr(experiments.Experiment, "evaluate", spy)
    for method in ("soup", "wise_ft"):
        seen.clear()
        advanced("--method", method, "--seeds=3,4" if method == "soup" else "--seeds=3")
        assert set(seen[:-1]) == {6} and seen[-1] == 4  # dev has 6 sentences, test has 4
    assert record("wise_ft")["runs"][0]["alpha"] == 1.0  # of equals the nearest to the finetuned
    monkeypatch.setattr(experiments.Experiment, "evaluate", evaluate)
    advanced("--method=wise_ft", "--seeds=4")
    run = record("wise_ft")["runs"][1]
    assert [one["alpha"] for one in run["alphas"]] == list(wise_ft.ALPHAS)
    accuracies = [one["dev_accuracy"] for one in run["alphas"]]
    assert accuracies[-1] == record("plain")["runs"][1]["dev"]["accuracy"]
    assert run["dev"]["accuracy"] == max(accuracies)


def test_a_greedy_soup_tries_each_candidates_weights_and_writes_what_it_kept(
    command, advanced, monkeypatch
):
    options = ["--seeds=3,4,5", "--epochs=1"]
    advanced(*options)
    heads = [state["classifier_head.weight"] for state in weights().values()]
    best, evaluate = (heads[0] + heads[1]) / 2, experiments.Experiment.evaluate

    def nearness(self, model, rows, settings):  # instead of the accuracy
        distance = (model.classifier_head.weight - best).norm().item()
        return replace(evaluate(self, model, rows, settings), accuracy=-distance)

    monkeypatch.setattr(experiments.Experiment, "evaluate", nearness)
    advanced("--method=soup", *options)
    (run,) = record("soup")["runs"]
    assert run["seeds"] == [3, 4, 5] and sorted(run["ingredients"]) == [3, 4]
    (soup,) = weights("soup").values()
    torch.testing.assert_close(soup["classifier_head.weight"], best)
    code, _, err = command("--method=soup", "--soup=uniform", *options)
    assert code == 2 and "soup: saved greedy, now uniform" in err


def test_a_uniform_soup_of_other_seeds_replaces_the_earlier(advanced):
    options = ["--method=soup", "--soup=uniform", "--epochs=1"]
    advanced(*options, "--seeds=3")
    assert record("soup")["runs"][0]["dev"] == record("plain")["runs"][0]["dev"]
    advanced(*options, "--seeds=4,3")
    (run,) = record("soup")["runs"]
    assert run["seeds"] == run["ingredients"] == [4, 3]
    first, second = weights("plain").values()
    (mean,) = (state for path, state in weights("soup").items() if "/seed-4" in path)
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)


def test_an_average_of_a_repeated_run_is_made_anew(advanced, monkeypatch):
    options = ["--method=wise_ft", "--seeds=3", "--epochs=1"]
    advanced(*options)
    (before,) = record("wise_ft")["runs"]
    advanced(*options)
    assert record("wise_ft")["runs"] == [before]
    content = record("plain")
    content["runs"] = []  # as the message about lost weights asks for
    record_path("plain").write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(produce, "seed_everything", lambda _: torch.manual_seed(99))
    advanced(*options)
    ((after,), (base,)) = record("wise_ft")["runs"], record("plain")["runs"]
    assert after["of"] == [base["weights_sha256"]] != before["of"]


# ---------------------------------------------------------------- output and errors


def test_mean_and_sample_deviation_are_shown(capsys):
    runs = [{"dev": {"accuracy": a}, "test": None} for a in (0.5, 0.6, 0.7)]
    composer.show(SimpleNamespace(path="r"), runs)
    assert capsys.readouterr().out == "dev acc :: 0.600 (0.100), 3 runs\nwrote r\n"


def test_the_list_explains_each_method_in_a_line(advanced):
    printed = advanced("--list").splitlines()
    assert [line.partition(": ")[0] for line in printed] == list(METHODS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "lora", "--method", "adapter"], "do not combine"),
        (["--seeds", "1,1"], "twice"),
        (["--grid", "lr=1e-3,-1"], "'-1' is not a number in (0, 1e30)"),
        (["--grid", "epochs=1.5"], "'1.5' is not an integer"),
        (["--grid", "lr=1,1"], "with different values"),
        (["--grid", "lr=1", "--grid", "lr=2"], "each option once"),
        (["--grid", "lora_rank=1,2"], "choose from"),
        (["--folds", "1"], "nothing to train on"),
        (["--folds", "2", "--method", "wise_ft"], "--folds cannot be combined with --method"),
        (["--folds", "2", "--train_share", "0.5"], "with --train_share"),
        (["--folds", "2", "--grid", "lr=1,2"], "with --grid"),
        (["--folds", "2", "--patience", "1"], "with --patience"),
        (["--folds", "2", "--dev_out", "toy-dev-advanced-output.txt"], "with --dev_out"),
        (["--folds", "2", "--test_out", "toy-test-advanced-output.txt"], "with --test_out"),
        (["--folds", "50"], "a label has only 7 sentences"),
        (["--train_share", "0.01"], "a label has only 4 sentences"),
        (["--method", "zero_shot", "--grid", "lr=1,2"], "trains nothing"),
        (["--method=pretrain", "--method=zero_shot", "--attention=full"], "--attention causal"),
        (["--method", "prompt", "--template", "nonsense"], "is not one of"),
        (["--dev_out", "toy-dev.txt"], "must end in dev-advanced-output.txt"),
        (["--dev=x-dev-advanced-output.txt", "--dev_out=x-dev-advanced-output.txt"], "an input"),
        (["--dev_out", "absent/toy-dev-advanced-output.txt"], "folder does not exist"),
        (["--name", "A name"], "only a-z"),
        (["--method", "lora", "--lora_rank", "999"], "rank"),
        (["--lora_rank", "2"], "--lora_rank is an option of --method lora"),
        (["--template", "x"], "--template is an option of --method zero_shot or prompt"),
        (["--method", "soup", "--train_share", "0.5"], "each seed draws a share of its own"),
        (["--method", "last_epochs", "--last", "3"], "--last 3: there are only 2 epochs"),
        (["--r_drop", "1", "--hidden_dropout_prob", "0"], "equal without dropout"),
        (["--method", "prompt", "--r_drop", "1"], "equal without dropout"),
        (["--method=mixout", "--mixout_p=0", "--r_drop=1", "--hidden_dropout_prob=0"], "equal w"),
        (["--method", "prompt", "--grid", "hidden_dropout_prob=0,0.3"], "choose from"),
        (["--method", "attention_pool", "--pooling", "position"], "position"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, options, said):
    assert said in error_line(command("--seeds", "3", *options))
    assert not list(Path("runs").glob("*read*"))  # before any pretraining


def test_a_record_holds_each_template_that_its_grid_tries(advanced):
    names = ["it-was", "about"]
    grid = ["--grid", f"template={','.join(names)}"]
    advanced("--method=prompt", "--epochs=1", "--seeds=3", *grid)
    assert [t["name"] for t in record("prompt")["settings"]["templates"]] == names


def test_weights_that_are_gone_or_of_another_run_are_named(command, advanced):
    options = ["--seeds=3", "--epochs=1"]
    advanced(*options)
    line = error_line(command(*options, "--label_smoothing=0.1"))
    assert "label_smoothing: saved 0.0, now 0.1" in line
    advanced(*options, "--results_dir=elsewhere", "--hidden_dropout_prob=0.8")
    code, _, err = command(*options, "--method=wise_ft")
    assert code == 2 and "are of another run" in err
    Path(next(iter(weights("plain")))).unlink()
    code, _, err = command(*options, "--method=soup")
    assert code == 2 and "are gone" in err
