"""The composer: every method from command line to record; skipped, resumed and refused runs."""

import json
import os
import pkgutil
import re
import shutil
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
from conftest import ROOT
from llama import load_pretrained
from training.checkpoint import load_classifier
from training.evaluation import Evaluation
from utils import run_script

DATA = [
    *("--train", "toy-train.txt", "--dev", "toy-dev.txt", "--test", "toy-test.txt"),
    *("--label-names", "labels.json", "--pretrained-model-path", "model.pt"),
    *("--results_dir", "results"),
]
SHORT = ["--epochs", "2", "--lr", "1e-2", "--batch_size", "4"]


@pytest.fixture
def advanced(workplace: Path, capsys) -> Callable[..., tuple[int, str, str]]:
    """advanced("--method", ...) runs the composer on the workplace's files: code, out, err.

    Its train, dev and test have 8, 6 and 4 different sentences.
    """
    lines = {"dev": ["a film", "her heart", "the story"], "test": ["this movie", "warm"]}
    for split, beginnings in lines.items():
        rows = [
            f"{label} ||| {b} {w}" for b in beginnings for label, w in enumerate(("bad", "good"))
        ]
        (workplace / f"toy-{split}.txt").write_text("\n".join(rows), encoding="utf-8")

    def call(*options: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run_script(lambda: composer.main([*DATA, *SHORT, *options]))
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


def record_path(method: str, suffix: str = "", folder: str = "results") -> Path:
    (path,) = Path(folder).glob(f"toy-{method}-*{suffix}.json")
    return path


def record(method: str, suffix: str = "", folder: str = "results") -> dict:
    return json.loads(record_path(method, suffix, folder).read_text(encoding="utf-8"))


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
    code, _, err = advanced(*options)
    assert code == 0, err
    content = record(method)
    assert len(content["runs"]) == (1 if method == "soup" else 2)
    for run in content["runs"]:
        assert (run["dev"]["n_sentences"], run["test"]["n_sentences"]) == (6, 4)
        assert run["trainable_parameters"] <= run["parameters"]
        assert len(run["history"]) == (0 if method in ("wise_ft", "soup") else 2)
    code, out, _ = advanced(*options, "--dev_out", "toy-dev-advanced-output.txt")
    assert code == 0 and "parameters" not in out  # everything is there already
    lines = Path("toy-dev-advanced-output.txt").read_text(encoding="utf-8").splitlines()
    gold = Path("toy-dev.txt").read_text(encoding="utf-8").splitlines()
    n_correct = sum(a == b for a, b in zip(lines, gold, strict=True))
    assert n_correct / 6 == max(run["dev"]["accuracy"] for run in content["runs"])
    left = [path.name for path in Path("runs").glob("*/seed-*")]
    assert not [name for name in left if name.endswith(".state.pt") or ".epoch-" in name]


def test_merged_weights_are_a_checkpoint_of_run_llama(advanced):
    assert advanced("--method", "lora", "--seeds", "3")[0] == 0
    (path,) = weights("lora")
    model, saved = load_classifier(path)
    assert saved["label_names"] == ["bad", "good"] and model.pooling == "mean"


def test_methods_compose_under_one_name(advanced):
    words = ["--method", "wise_ft", "--method", "lora", "--method", "pretrain", "--method", "soup"]
    code, _, err = advanced(*words, "--seeds", "3,4", "--lora_rank", "2", "--pretrain_epochs", "1")
    assert code == 0, err
    names = {path.name.split("-")[1] for path in Path("results").glob("*.json")}
    assert names == {"pretrain+lora", "pretrain+lora+wise_ft", "pretrain+lora+wise_ft+soup"}
    (soup,) = record("pretrain+lora+wise_ft+soup")["runs"]
    assert "alphas" not in soup  # which were those of one ingredient
    assert set(soup["ingredients"]) <= {3, 4}


def test_zero_shot_chooses_template_and_scoring_on_train_and_trains_nothing(advanced):
    rows = Path("toy-train.txt").read_text(encoding="utf-8").splitlines()
    flipped = [f"{1 - int(row[0])}{row[1:]}" for row in rows]
    Path("toy-dev.txt").write_text("\n".join(flipped), encoding="utf-8")
    code, out, err = advanced("--method", "zero_shot", "--dev_out", "toy-dev-advanced-output.txt")
    assert code == 0, err
    (run,) = record("zero_shot")["runs"]
    best = max(one["train_accuracy"] for one in run["tried"])
    chosen = next(one for one in run["tried"] if one["train_accuracy"] == best)
    assert {key: chosen[key] for key in ("template", "scoring")} == run["hyperparameters"]
    assert run["trainable_parameters"] == 0 and run["history"] == []
    # Here dev is train with the other labels, so the best on train is the worst on dev.
    assert best > 0.5 and run["dev"]["accuracy"] == pytest.approx(1 - best)
    assert f"dev acc :: {1 - best:.3f}, 1 run\n" in out
    lines = Path("toy-dev-advanced-output.txt").read_text(encoding="utf-8").splitlines()
    assert sum(a == b for a, b in zip(lines, rows, strict=True)) / 8 == best
    code, out, _ = advanced("--method", "zero_shot")
    assert code == 0 and "train acc" not in out


@pytest.mark.parametrize("method", ["prompt", "zero_shot"])
def test_a_long_sentence_leaves_room_for_a_label_of_several_tokens(advanced, method):
    Path("labels.json").write_text('["bad xyz", "good"]', encoding="utf-8")
    Path("toy-dev.txt").write_text(f"0 ||| {'a good film ' * 99}\n1 ||| warm\n", encoding="utf-8")
    code, _, err = advanced("--method", method, "--seeds=3", "--epochs=1")
    assert code == 0, err
    max_tokens = int(re.search("1 of 2 sentences .* context of ([0-9]+) tokens", err)[1])
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
    advanced, monkeypatch, options, target, n_th
):
    options = [*options, "--seeds=3", "--epochs=3"]
    assert advanced(*options, "--runs_dir=whole", "--results_dir=whole-results")[0] == 0
    whole, calls = pkgutil.resolve_name(target), []

    def stopping(*given, **named):
        calls.append(1)
        if len(calls) == n_th:
            if target.startswith("advanced"):  # behind the loop a signal ends the command at once
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)
        return whole(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(target, stopping)
        code, _, err = advanced(*options)
    assert code in (130, 143) and len(err.splitlines()) == 1
    assert advanced(*options)[0] == 0
    assert_same(weights(), weights(folder="whole"))
    timing = {"seconds", "peak_memory_mb", "weights_sha256"}
    method = "mixout+smart" if options[0] in STATEFUL else "lora"
    (run,), (expected,) = (
        [{k: v for k, v in run.items() if k not in timing} for run in one["runs"]]
        for one in (record(method), record(method, folder="whole-results"))
    )
    assert run == expected
    assert not list(Path("runs").glob("*/*.state.pt"))


def test_a_killed_command_continues_to_the_same_bits(advanced):
    options = ["--method=pretrain", "--method=mixout", "--pretrain_epochs=1", "--seeds=3"]
    options.append("--epochs=16")
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
    code, out, err = advanced(*options)
    assert code == 0, err
    assert "epoch 0:" not in out and "epoch 15:" in out
    assert advanced(*options, "--runs_dir=whole", "--results_dir=whole-results")[0] == 0
    assert_same(weights(), weights(folder="whole"))


def test_an_abandoned_run_of_other_settings_begins_anew_and_leaves_no_epoch_behind(advanced):
    options = ["--method=last_epochs", "--last=2", "--seeds=3"]
    assert advanced(*options)[0] == 0
    ((path, clean),) = weights().items()
    left = Path(path).with_name(f"{Path(path).stem}.epoch-7.pt")
    torch.save({name: tensor + 1 for name, tensor in clean.items()}, left)
    torch.save({"settings": {}}, Path(path).with_suffix(".state.pt"))
    record_path("last_epochs").unlink()
    code, _, err = advanced(*options)
    assert code == 0 and "is not resumed" in err
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
    code, _, err = advanced("--grid", "lr=1e-9,1e-2", "--seeds", "3,4")
    assert code == 0, err
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
def test_each_option_of_a_grid_reaches_the_training(advanced, monkeypatch, method):
    code, _, err = advanced("--method", method, "--grid", "nonsense=1")
    assert code == 2
    accepted = set(err.rpartition("choose from ")[2].partition(" (see")[0].split(", "))
    listed = {grid.partition("=")[0] for name in {method, "plain"} for grid in GRIDS[name]}
    assert accepted == listed | {"epochs", "patience"}  # these are of how long
    finals, save = [], experiments.Experiment.save
    monkeypatch.setattr(
        experiments.Experiment,
        "save",
        lambda self, run, model: (
            finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
            or save(self, run, model)
        ),
    )
    for grid in GRIDS[method]:
        key, _, values = grid.partition("=")
        finals.clear()
        epochs = "--epochs=2" if method == "last_epochs" else "--epochs=1"
        options = ["--method", method, "--grid", grid, "--seeds=3", "--name", key, epochs]
        code, _, err = advanced(*options)
        assert code == 0, err
        first, second = finals
        assert first.shape != second.shape or not torch.equal(first, second), grid
        tried = [trial[key] for trial in record(key)["search"]]
        assert tried == [float(value) for value in values.split(",")]


def test_a_trial_that_diverges_is_not_chosen_and_ends_nothing(advanced):
    code, out, err = advanced("--grid", "lr=1e-2,1e9", "--seeds", "3", "--epochs", "3")
    assert code == 0, err
    content = record("plain")
    assert content["chosen"] == {"lr": 1e-2}
    assert content["search"][1]["dev_accuracy"] is None and "lower --lr" in out


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
    code, _, err = advanced("--method", "pretrain", "--folds", "2", "--seeds", "3,4")
    assert code == 0, err
    assert [held[3, fold] for fold in range(2)] == [held[4, fold] for fold in range(2)]
    for sentences, rows in zip(read, held.values(), strict=True):  # pretraining reads no held-out
        assert not sentences & {sentence for sentence, _ in rows}
    content = record("pretrain", "-cv2")
    assert [(run["seed"], run["fold"]) for run in content["runs"]] == [*held]
    for run in content["runs"]:
        assert run["test"] is None and run["best_epoch"] is None
        assert run["dev"]["accuracy"] == run["history"][-1]["dev_accuracy"]
    assert [sum(map(sum, run["dev"]["confusion"])) for run in content["runs"][:2]] == [7, 7]


def test_a_share_keeps_as_much_of_each_label_and_is_drawn_by_the_seed(advanced, monkeypatch):
    drawn, splits = [], experiments.Experiment.splits

    def spy(self, seed, fold):
        train, dev = splits(self, seed, fold)
        drawn.append(train)
        assert dev == self.dev
        return train, dev

    monkeypatch.setattr(experiments.Experiment, "splits", spy)
    assert advanced("--train_share", "0.5", "--seeds", "1,2,3", "--epochs", "1")[0] == 0
    assert len(record("plain", "-train50")["runs"]) == 3
    for train in drawn:
        assert sorted(label for _, label in train) == [0, 0, 1, 1]
    assert len({tuple(sorted(train)) for train in drawn}) > 1


def test_the_best_epoch_or_the_mean_of_the_last_ones_is_kept(advanced, monkeypatch):
    offered, offer = [], produce.EpochFiles.offer

    def spy(self, epoch, is_best, model, names):
        offered.append({n: t.clone() for n, t in model.state_dict().items()})
        offer(self, epoch, is_best, model, names)

    monkeypatch.setattr(produce.EpochFiles, "offer", spy)
    assert advanced("--method=last_epochs", "--last=2", "--epochs=3", "--seeds=3")[0] == 0
    for name, tensor in next(iter(weights("last_epochs").values())).items():
        torch.testing.assert_close(tensor, (offered[1][name] + offered[2][name]) / 2)

    offered.clear()
    given = iter([0.2, 0.8, 0.5, 0.8])
    scripted = Evaluation(0.0, 0.0, [0] * 6, [0, 1] * 3, [""] * 6, [0.5] * 6)
    monkeypatch.setattr(
        "training.loop.evaluate", lambda *_, **__: replace(scripted, accuracy=next(given))
    )
    assert advanced("--epochs=4", "--seeds=3")[0] == 0
    assert_same(weights("plain"), {"": offered[1]})
    assert record("plain")["runs"][0]["best_epoch"] == 1


# ---------------------------------------------------------------- averages


def test_wise_ft_ends_in_the_finetuned_and_begins_at_what_read_its_own_share(advanced, monkeypatch):
    monkeypatch.setattr(wise_ft, "ALPHAS", (0.6,))
    methods = ["--method", "pretrain", "--method", "wise_ft", "--pretrain_epochs", "1"]
    options = ["--seeds", "3,4", "--epochs", "1", "--train_share", "0.5"]
    code, _, err = advanced(*methods, *options)
    assert code == 0, err
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


def test_all_seeds_begin_with_one_head_and_end_with_different_ones(advanced, monkeypatch):
    heads, train = [], produce._train

    def spy(experiment, run, model, *others):
        heads.append(model.classifier_head.weight.detach().clone())
        return train(experiment, run, model, *others)

    monkeypatch.setattr(produce, "_train", spy)
    assert advanced("--seeds=3,4", "--epochs=1")[0] == 0
    assert torch.equal(*heads)
    ends = [state["classifier_head.weight"] for state in weights("plain").values()]
    assert not torch.equal(*ends)


def test_averages_are_chosen_on_dev_and_look_at_test_once(advanced, monkeypatch):
    assert advanced("--seeds=3,4")[0] == 0
    seen, evaluate = [], experiments.Experiment.evaluate
    same = Evaluation(0.5, 0.5, [0] * 6, [0, 1] * 3, [""] * 6, [0.5] * 6)

    def spy(self, model, rows, settings):
        seen.append(len(rows))
        return same

    monkeypatch.setattr(experiments.Experiment, "evaluate", spy)
    assert advanced("--method=soup", "--seeds=3,4")[0] == 0
    assert seen == [6] * 3 + [6, 4]  # 2 n - 1 scores; then the soup, on dev and on test
    seen.clear()
    assert advanced("--method=wise_ft", "--seeds=3")[0] == 0
    assert seen == [6] * len(wise_ft.ALPHAS) + [6, 4]
    assert record("wise_ft")["runs"][0]["alpha"] == 1.0  # of equals the nearest to the finetuned
    monkeypatch.setattr(experiments.Experiment, "evaluate", evaluate)
    assert advanced("--method=wise_ft", "--seeds=4")[0] == 0
    run = record("wise_ft")["runs"][1]
    accuracies = [one["dev_accuracy"] for one in run["alphas"]]
    assert accuracies[-1] == record("plain")["runs"][1]["dev"]["accuracy"]
    assert run["dev"]["accuracy"] == max(accuracies)


def test_a_greedy_soup_tries_each_candidates_weights_and_writes_what_it_kept(advanced, monkeypatch):
    assert advanced("--seeds=3,4,5", "--epochs=1")[0] == 0
    alone = list(weights().values())
    name = "classifier_head.weight"

    def key(state: dict[str, torch.Tensor]) -> float:
        return state[name].double().mean().item()

    def mean(*states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: sum(state[name] for state in states) / len(states)}

    # The best one, with the second better, with the third worse.
    scores = {key(alone[0]): 0.5, key(alone[1]): 0.4, key(alone[2]): 0.3}
    scores |= {key(mean(*alone[:2])): 0.9, key(mean(*alone)): 0.1}
    evaluate = experiments.Experiment.evaluate

    def scripted(self, model, rows, settings):
        result = evaluate(self, model, rows, settings)
        nearest = min(scores, key=lambda known: abs(known - key(model.state_dict())))
        return replace(result, accuracy=scores[nearest])

    monkeypatch.setattr(experiments.Experiment, "evaluate", scripted)
    code, _, err = advanced("--method=soup", "--epochs=1", "--seeds=3,4,5")
    assert code == 0, err
    (run,) = record("soup")["runs"]
    assert run["seeds"] == [3, 4, 5] and run["ingredients"] == [3, 4]
    (ours,) = weights("soup").values()
    torch.testing.assert_close(ours[name], mean(*alone[:2])[name])
    code, _, err = advanced("--method=soup", "--epochs=1", "--seeds=3,4,5", "--soup=uniform")
    assert code == 2 and "soup: saved greedy, now uniform" in err


def test_a_uniform_soup_of_other_seeds_replaces_the_earlier(advanced):
    options = ["--method=soup", "--soup=uniform", "--epochs=1"]
    assert advanced(*options, "--seeds=3")[0] == 0
    assert record("soup")["runs"][0]["dev"] == record("plain")["runs"][0]["dev"]
    assert advanced(*options, "--seeds=4,3")[0] == 0
    (run,) = record("soup")["runs"]
    assert run["seeds"] == run["ingredients"] == [4, 3]
    first, second = weights("plain").values()
    (mean,) = (state for path, state in weights("soup").items() if "/seed-4" in path)
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)


@pytest.mark.parametrize("method", ["wise_ft", "soup"])
def test_an_average_of_a_repeated_run_is_made_anew(advanced, monkeypatch, method):
    options = ["--method", method, "--seeds", "3", "--epochs", "1"]
    assert advanced(*options)[0] == 0
    (before,) = record(method)["runs"]
    assert advanced(*options)[0] == 0
    assert record(method)["runs"] == [before]
    content = record("plain")
    content["runs"] = []  # as the message about lost weights asks for
    record_path("plain").write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(produce, "seed_everything", lambda _: torch.manual_seed(99))
    assert advanced(*options)[0] == 0
    ((after,), (base,)) = record(method)["runs"], record("plain")["runs"]
    assert after["of"] == [base["weights_sha256"]] != before["of"]


# ---------------------------------------------------------------- output and errors


def test_mean_and_sample_deviation_are_shown(capsys):
    runs = [{"dev": {"accuracy": a}, "test": None} for a in (0.5, 0.6, 0.7)]
    composer.show(SimpleNamespace(path="r"), runs)
    assert capsys.readouterr().out == "dev acc :: 0.600 (0.100), 3 runs\nwrote r\n"


def test_the_list_explains_each_method_in_a_line(advanced):
    code, out, _ = advanced("--list")
    assert code == 0
    assert [line.partition(": ")[0] for line in out.splitlines()] == list(METHODS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "lora", "--method", "adapter"], "do not combine"),
        (["--seeds", "1,1"], "twice"),
        (["--grid", "lr=1e-3,-1"], "'-1' is not a number above 0"),
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
        (["--method", "pretrain", "--method", "zero_shot", "--attention", "full"], "cannot prompt"),
        (["--method", "prompt", "--template", "nonsense"], "is not one of"),
        (["--dev_out", "toy-dev.txt"], "must end in dev-advanced-output.txt"),
        (["--dev_out", "absent/toy-dev-advanced-output.txt"], "folder does not exist"),
        (["--name", "A name"], "only a-z"),
        (["--method", "lora", "--lora_rank", "999"], "rank"),
        (["--lora_rank", "2"], "--lora_rank is an option of --method lora"),
        (["--template", "x"], "--template is an option of --method zero_shot or prompt"),
        (["--method", "soup", "--train_share", "0.5"], "each seed draws a share of its own"),
        (["--method", "last_epochs", "--last", "3"], "--last 3: there are only 2 epochs"),
        (["--r_drop", "1", "--hidden_dropout_prob", "0"], "or --hidden_dropout_prob"),
        (["--method", "prompt", "--r_drop", "1"], "add --backbone_dropout\n"),
        (["--method", "prompt", "--grid", "hidden_dropout_prob=0,0.3"], "choose from"),
        (["--method", "attention_pool", "--pooling", "position"], "position"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(advanced, options, said):
    code, _, err = advanced("--seeds", "3", *options)
    assert code == 2 and said in err and len(err.splitlines()) == 1
    assert not list(Path("runs").glob("*read*"))  # before any pretraining


def test_a_record_holds_each_template_that_its_grid_tries(advanced):
    names = ["it-was", "about"]
    grid = ["--grid", f"template={','.join(names)}"]
    code, _, err = advanced("--method=prompt", "--epochs=1", "--seeds=3", *grid)
    assert code == 0, err
    assert [t["name"] for t in record("prompt")["settings"]["templates"]] == names


def test_an_output_does_not_replace_an_input(advanced):
    shutil.copyfile("toy-dev.txt", "toy-dev-advanced-output.txt")
    same = ["--dev", "toy-dev-advanced-output.txt", "--dev_out", "toy-dev-advanced-output.txt"]
    code, _, err = advanced("--seeds", "3", *same)
    assert code == 2 and "is an input" in err


def test_weights_that_are_gone_or_of_another_run_are_named(advanced):
    assert advanced("--seeds", "3", "--epochs", "1")[0] == 0
    code, _, err = advanced("--seeds", "3", "--epochs", "1", "--label_smoothing", "0.1")
    assert code == 2 and "label_smoothing: saved 0.0, now 0.1" in err
    other = ["--results_dir", "elsewhere", "--hidden_dropout_prob", "0.8"]
    assert advanced("--seeds", "3", "--epochs", "1", *other)[0] == 0
    code, _, err = advanced("--seeds", "3", "--epochs", "1", "--method", "wise_ft")
    assert code == 2 and "are of another run" in err
    Path(next(iter(weights("plain")))).unlink()
    code, _, err = advanced("--seeds", "3", "--epochs", "1", "--method", "soup")
    assert code == 2 and "are gone" in err
