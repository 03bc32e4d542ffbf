"""The composer: every method from command line to record, what is skipped, resumed and refused."""

import json
import pkgutil
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cli
from advanced import assembly, candidates
from advanced import experiment as experiments
from advanced import run as composer
from advanced.catalogue import METHODS
from advanced.methods import wise_ft
from conftest import random_llama
from llama import load_pretrained
from training.interrupts import Stopped
from training.loop import Evaluation, load_classifier

DATA = [
    *("--train", "toy-train.txt", "--dev", "toy-dev.txt", "--test", "toy-test.txt"),
    *("--label-names", "labels.json", "--pretrained-model-path", "model.pt"),
]


@pytest.fixture
def advanced(workplace: Path, capsys) -> Callable[..., tuple[int, str, str]]:
    """advanced("--method", ...) runs the composer on the workplace's files: code, out, err.

    Its train, dev and test are of 8, 6 and 4 different sentences.
    """
    lines = {"dev": ["a film", "her heart", "the story"], "test": ["this movie", "warm"]}
    for split, beginnings in lines.items():
        rows = [
            f"{label} ||| {b} {w}" for b in beginnings for label, w in enumerate(("bad", "good"))
        ]
        (workplace / f"toy-{split}.txt").write_text("\n".join(rows), encoding="utf-8")

    def call(*options: str) -> tuple[int, str, str]:
        argv = [*DATA, "--epochs", "2", "--lr", "1e-2", "--batch_size", "4", *options]
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: composer.main(argv))
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


def record(method: str, suffix: str = "", folder: str = "results") -> dict:
    (path,) = Path(folder).glob(f"toy-{method}-*{suffix}.json" if method else "*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def weights(folder: Path = Path("runs")) -> dict[str, dict[str, torch.Tensor]]:
    paths = sorted(folder.glob("toy-*/seed-*.pt"))
    paths = [path for path in paths if not re.search(r"\.(state|best|epoch-\d+)\.pt$", path.name)]
    return {str(path): torch.load(path, weights_only=True)["model"] for path in paths}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "zero_shot"])
def test_every_method_trains_leaves_its_record_and_weights_that_reproduce_it(advanced, method):
    small = {"lora": ["--lora_rank", "2"], "adapter": ["--adapter_size", "4"]}
    small |= {"pretrain": ["--pretrain_epochs", "1"], "last_epochs": ["--last", "1"]}
    options = small.get(method, [])
    code, _, err = advanced("--method", method, "--seeds", "3,4", *options)
    assert code == 0, err
    content = record(method)
    n_runs = 1 if method == "soup" else 2
    assert len(content["runs"]) == n_runs
    for run in content["runs"]:
        assert (run["dev"]["n_sentences"], run["test"]["n_sentences"]) == (6, 4)
        assert run["trainable_parameters"] <= run["parameters"]
        assert len(run["history"]) == (0 if method in ("wise_ft", "soup") else 2)
    code, again, _ = advanced(
        "--method", method, "--seeds", "3,4", "--dev_out", "toy-dev-advanced-output.txt", *options
    )
    assert code == 0 and "parameters" not in again  # everything is there already
    best = max(run["dev"]["accuracy"] for run in content["runs"])
    assert f"accuracy\ndev acc :: {best:.3f}\n" in again  # of the weights, read anew
    assert len(Path("toy-dev-advanced-output.txt").read_text(encoding="utf-8").splitlines()) == 6
    left = [path.name for path in Path("runs").glob("*/*")]
    assert not [name for name in left if name.endswith((".state.pt", ".best.pt", ".epoch-1.pt"))]


@pytest.mark.parametrize("method", ["plain", "lora", "mixout", "head", "pretrain"])
def test_what_is_merged_is_a_checkpoint_of_run_llama(advanced, method):
    assert advanced("--method", method, "--seeds", "3")[0] == 0
    (path,) = Path("runs").glob(f"toy-{method}-*/seed-3*.pt")
    model, saved = load_classifier(path)
    assert saved["label_names"] == ["bad", "good"] and model.pooling == "mean"


def test_methods_compose_under_one_name(advanced):
    words = ["--method", "wise_ft", "--method", "lora", "--method", "pretrain", "--method", "soup"]
    code, _, err = advanced(*words, "--seeds", "3,4", "--lora_rank", "2", "--pretrain_epochs", "1")
    assert code == 0, err
    names = sorted(path.name for path in Path("results").iterdir() if path.suffix == ".json")
    assert {name.split("-")[1] for name in names} == {
        *("pretrain+lora", "pretrain+lora+wise_ft", "pretrain+lora+wise_ft+soup")
    }
    (soup,) = record("pretrain+lora+wise_ft+soup")["runs"]
    assert "alphas" not in soup  # which were those of one ingredient
    assert set(soup["ingredients"]) <= {3, 4}


STATEFUL = ("--method=mixout", "--method=smart")
STOPS = [  # options, and the call during which a signal comes
    *((STATEFUL, "training.loop.take_step", n) for n in (1, 3)),
    (("--r_drop=1",), "training.loop.take_step", 4),
    (STATEFUL, "training.loop.evaluate", 2),
    *((("--method=lora",), f"advanced.{name}", 1) for name in ("wise_ft.average", "run._test")),
    *((("--method=lora",), f"advanced.{name}", 1) for name in (
        "experiment.Experiment.save", "record.Record.add", "experiment.Experiment.forget"
    )),
]  # fmt: skip


@pytest.mark.parametrize(("options", "target", "n_th"), STOPS)
def test_a_run_stopped_anywhere_goes_on_to_the_same_weights_and_record(
    advanced, monkeypatch, options, target, n_th
):
    options = [*options, "--seeds=3", "--epochs=3"]
    assert advanced(*options, "--runs_dir=whole", "--results_dir=whole-results")[0] == 0
    whole, calls = pkgutil.resolve_name(target), []

    def stopping(*given, **named):
        calls.append(1)
        if len(calls) == n_th:
            signal.raise_signal(signal.SIGTERM)
        return whole(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(target, stopping)
        code, _, err = advanced(*options)
    assert code == 143 and "to go on: " in err and "--resume" not in err
    assert advanced(*options)[0] == 0
    ours, theirs = weights(), weights(Path("whole"))
    assert len(ours) == len(theirs) == 1
    for a, b in zip(ours.values(), theirs.values(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)
    timing = {"seconds", "peak_memory_mb", "weights_sha256"}
    (run,), (expected,) = (
        [
            {key: value for key, value in run.items() if key not in timing}
            for run in json.loads(next(Path(folder).glob("*.json")).read_text(encoding="utf-8"))[
                "runs"
            ]
        ]
        for folder in ("results", "whole-results")
    )
    assert run == expected
    assert not list(Path("runs").glob("*/*.state.pt"))


@pytest.mark.parametrize(
    "target",
    [
        "advanced.methods.continued.train",
        "advanced.averages._measured",
    ],
)
def test_a_stop_before_or_after_the_training_costs_what_was_not_finished(
    advanced, monkeypatch, target
):
    options = ["--method=pretrain", "--method=wise_ft", "--method=soup", "--seeds=3,4"]
    options += ["--pretrain_epochs=1"]

    def stop(*given, **named):
        raise Stopped(2)

    with monkeypatch.context() as patch:
        patch.setattr(target, stop)
        code, _, err = advanced(*options)
    assert code == 130 and "to go on: " in err
    code, _, err = advanced(*options)
    assert code == 0, err
    assert len(record("pretrain+wise_ft")["runs"]) == 2


def test_a_model_that_was_not_written_after_its_state_is_written_by_the_next_command(advanced):
    options = ["--method=pretrain", "--seeds=3", "--pretrain_epochs=1", "--epochs=1"]
    assert advanced(*options)[0] == 0
    (path,) = Path("runs").glob("toy-read-*/model.pt")
    whole = torch.load(path, weights_only=True)["model"]
    path.unlink()
    assert advanced(*options[:1], "--seeds=4", *options[2:])[0] == 0
    again = torch.load(path, weights_only=True)["model"]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_grid_is_tried_by_the_first_seed_and_the_test_split_is_looked_at_last(
    advanced, monkeypatch
):
    seen = []
    train_run = experiments.Experiment.train_run

    def spy(self, hyperparameters, seed, fold=None):
        seen.append((hyperparameters["lr"], seed))
        return train_run(self, hyperparameters, seed, fold)

    def test_split(self, record_, runs):
        seen.append("test")

    monkeypatch.setattr(experiments.Experiment, "train_run", spy)
    monkeypatch.setattr(composer, "_test", test_split)
    code, _, err = advanced("--grid", "lr=1e-9,1e-2", "--seeds", "3,4,5")
    assert code == 0, err
    content = record("plain")
    tried = {trial["lr"]: trial["dev_accuracy"] for trial in content["search"]}
    chosen = max(tried, key=tried.get)
    assert list(tried) == [1e-9, 1e-2] and content["chosen"] == {"lr": chosen}
    assert seen == [(1e-9, 3), (1e-2, 3), (chosen, 4), (chosen, 5), "test"]
    assert [run["test"] for run in content["runs"]] == [None] * 3


GRIDS = {
    "plain": [
        *("lr=1e-2,2e-2", "batch_size=2,4", "hidden_dropout_prob=0.0,0.9"),
        *("backbone_dropout=0.0,0.5", "warmup=0.0,0.9", "layer_decay=0.1,1.0", "r_drop=0,5"),
        *("max_grad_norm=0.01,9", "label_smoothing=0,0.5", "max_sentence_len=1,50"),
    ],
    "lora": ["lora_rank=1,2", "lora_alpha=1,20"],
    "adapter": ["adapter_size=2,4"],
    "mixout": ["mixout_p=0,0.9"],
    "l2sp": ["l2sp_weight=0,9", "l2sp_head_weight=0,9"],
    "smart": ["smart_weight=0,90", "smart_radius=0.1,5", "proximal_weight=0,90"],
    "pretrain": ["pretrain_epochs=1,2", "pretrain_lr=1e-4,1e-2"],
    "last_epochs": ["last=1,2", "epochs=2,3"],
}


@pytest.mark.parametrize("method", GRIDS)
def test_no_option_of_a_grid_is_left_out_above(advanced, method):
    code, _, err = advanced("--method", method, "--grid", "nonsense=1")
    assert code == 2
    accepted = set(err.rpartition("choose from ")[2].partition(" (see")[0].split(", "))
    listed = {grid.partition("=")[0] for name in {method, "plain"} for grid in GRIDS[name]}
    assert accepted == listed | {"epochs", "patience"}  # these are of how long, and tried above


@pytest.mark.parametrize(
    ("method", "grid"), [(method, grid) for method, grids in GRIDS.items() for grid in grids]
)
def test_each_option_of_a_grid_reaches_the_training(advanced, monkeypatch, method, grid):
    monkeypatch.setattr(composer.Path, "unlink", lambda *given, **named: None)  # keep both
    code, _, err = advanced("--method", method, "--grid", grid, "--seeds", "3")
    assert code == 0, err
    first, second = (
        torch.cat([tensor.flatten() for tensor in state.values()]) for state in weights().values()
    )
    assert first.shape != second.shape or not torch.equal(first, second)
    key, _, values = grid.partition("=")
    tried = [trial[key] for trial in record(method)["search"]]
    assert tried == [float(value) for value in values.split(",")]


def test_a_trial_that_diverges_is_not_chosen_and_ends_nothing(advanced):
    code, out, err = advanced("--grid", "lr=1e-2,1e9", "--seeds", "3", "--epochs", "3")
    assert code == 0, err
    content = record("plain")
    assert content["chosen"] == {"lr": 1e-2}
    assert content["search"][1]["dev_accuracy"] is None and "lower --lr" in out


def test_folds_hold_out_every_sentence_once_whatever_the_seed(advanced, monkeypatch):
    held, kept = {}, {}
    splits = experiments.Experiment.splits

    def spy(self, seed, fold):
        train, dev = splits(self, seed, fold)
        held[seed, fold] = dev
        kept[seed, fold] = train
        self_rows = self.train + self.dev
        assert sorted(train + dev) == sorted(self_rows)
        return train, dev

    monkeypatch.setattr(experiments.Experiment, "splits", spy)
    code, _, err = advanced("--folds", "4", "--seeds", "3,4")
    assert code == 0, err
    assert len(held) == 8
    assert [held[3, fold] for fold in range(4)] == [held[4, fold] for fold in range(4)]
    content = record("plain", "-cv4")
    assert [(run["seed"], run["fold"]) for run in content["runs"]] == [
        (seed, fold) for seed in (3, 4) for fold in range(4)
    ]
    for run in content["runs"]:
        assert run["test"] is None and run["best_epoch"] is None
        assert run["dev"]["accuracy"] == run["history"][-1]["dev_accuracy"]
    n_held = [sum(map(sum, run["dev"]["confusion"])) for run in content["runs"][:4]]
    assert sum(n_held) == 8 + 6 and max(n_held) - min(n_held) <= 1


def test_a_share_keeps_as_much_of_each_label_and_is_drawn_by_the_seed(advanced, monkeypatch):
    drawn = []
    splits = experiments.Experiment.splits

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
    # Here dev is train with the other labels: what is best on train is worst on dev.
    assert best > 0.5
    assert run["dev"]["accuracy"] == pytest.approx(1 - best)
    assert f"dev acc :: {1 - best:.3f}\n" in out
    code, again, _ = advanced("--method", "zero_shot")
    assert code == 0 and "train acc" not in again


def test_wise_ft_ends_in_what_was_finetuned_and_begins_at_the_pretrained_backbone(
    advanced, monkeypatch
):
    at_zero, interpolate = [], wise_ft.interpolate

    def noting(pretrained, finetuned, alpha):
        state = interpolate(pretrained, finetuned, alpha)
        if alpha == 0:
            at_zero.append(state)
        return state

    monkeypatch.setattr(wise_ft, "interpolate", noting)
    assert advanced("--method", "wise_ft", "--seeds", "3")[0] == 0
    (base,), (run,) = record("plain")["runs"], record("wise_ft")["runs"]
    assert [one["alpha"] for one in run["alphas"]] == [i / 10 for i in range(11)]
    pretrained = load_pretrained("model.pt", "causal").state_dict()
    assert all(torch.equal(at_zero[0][f"llama.{k}"], v) for k, v in pretrained.items())
    assert run["alphas"][-1]["dev_accuracy"] == base["dev"]["accuracy"]
    assert run["dev"]["accuracy"] == max(one["dev_accuracy"] for one in run["alphas"])


def test_wise_ft_writes_the_weights_on_its_way(advanced, monkeypatch):
    monkeypatch.setattr(wise_ft, "ALPHAS", (0.6,))
    assert advanced("--method", "wise_ft", "--seeds", "3")[0] == 0
    start = load_pretrained("model.pt", "causal").state_dict()
    (finetuned,) = (state for path, state in weights().items() if "/toy-plain-" in path)
    (ours,) = (state for path, state in weights().items() if "/toy-wise_ft-" in path)
    for name, tensor in ours.items():
        end = finetuned[name]
        expected = end
        if name.startswith("llama."):
            expected = 0.4 * start[name.removeprefix("llama.")].double() + 0.6 * end.double()
        torch.testing.assert_close(tensor, expected.float())


def test_wise_ft_begins_at_what_has_read_the_sentences_of_its_own_share(advanced, monkeypatch):
    monkeypatch.setattr(wise_ft, "ALPHAS", (0.0,))
    read, continue_on = [], experiments.continue_on

    def noting(sentences, *given, **named):
        read.append(sentences)
        return continue_on(sentences, *given, **named)

    monkeypatch.setattr(experiments, "continue_on", noting)
    methods = ["--method", "pretrain", "--method", "wise_ft", "--pretrain_epochs", "1"]
    options = ["--seeds", "3,4", "--epochs", "1", "--train_share", "0.5"]
    code, _, err = advanced(*methods, *options)
    assert code == 0, err
    assert {len(sentences) for sentences in read} == {4}  # of 8
    assert len({tuple(sentences) for sentences in read}) == 2  # each seed's own
    models = [load_pretrained(path, "causal") for path in Path("runs").glob("toy-read-*/model.pt")]
    ours = [state for path, state in weights().items() if "/toy-pretrain+wise_ft-" in path]
    assert len(models) == len(ours) == 2
    for state in ours:
        same = [
            all(torch.equal(state[f"llama.{k}"], v) for k, v in model.state_dict().items())
            for model in models
        ]
        assert sum(same) == 1


def test_continued_pretraining_reads_no_sentence_of_the_fold_that_is_held_out(
    advanced, monkeypatch
):
    read = []

    def noting(sentences, *given, **named):
        read.append(set(sentences))
        return "model.pt", 0.0

    monkeypatch.setattr(experiments, "continue_on", noting)
    options = ["--seeds", "3", "--epochs", "1", "--folds", "2"]
    code, _, err = advanced("--method", "pretrain", *options)
    assert code == 0, err
    lines = [
        line.partition(" ||| ")[2].strip()
        for split in ("train", "dev")
        for line in Path(f"toy-{split}.txt").read_text(encoding="utf-8").splitlines()
    ]
    first, second = {frozenset(sentences) for sentences in read}
    assert first | second == set(lines) and not first & second


def test_a_greedy_soup_tries_each_candidates_weights_and_writes_what_it_kept(advanced, monkeypatch):
    options = ["--method=soup", "--epochs=1"]
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

    def scripted(self, model, data, options):
        result = evaluate(self, model, data, options)
        nearest = min(scores, key=lambda known: abs(known - key(model.state_dict())))
        return replace(result, accuracy=scores[nearest])

    monkeypatch.setattr(experiments.Experiment, "evaluate", scripted)
    code, _, err = advanced(*options, "--seeds=3,4,5")
    assert code == 0, err
    (run,) = record("soup")["runs"]
    assert run["ingredients"] == [3, 4]
    (ours,) = (state for path, state in weights().items() if "/toy-soup-" in path)
    torch.testing.assert_close(ours[name], mean(*alone[:2])[name])


def test_a_soup_of_another_kind_is_no_repetition(advanced):
    options = ["--method=soup", "--epochs=1", "--seeds=3"]
    assert advanced(*options)[0] == 0
    code, _, err = advanced(*options, "--soup=uniform")
    assert code == 2 and "soup: greedy there, uniform here" in err


def test_averages_are_chosen_on_dev_and_look_at_test_once(advanced, monkeypatch):
    assert advanced("--seeds=3,4")[0] == 0
    seen, evaluate = [], experiments.Experiment.evaluate

    def spy(self, model, data, options):
        seen.append(len(data))
        return evaluate(self, model, data, options)

    monkeypatch.setattr(experiments.Experiment, "evaluate", spy)
    assert advanced("--method=soup", "--seeds=3,4")[0] == 0
    assert seen == [6] * 3 + [6, 4]  # 2 n - 1 scores; then the soup, on dev and on test
    seen.clear()
    assert advanced("--method=wise_ft", "--seeds=3")[0] == 0
    assert seen == [6] * len(wise_ft.ALPHAS) + [6, 4]


def test_of_equal_alphas_the_one_nearer_to_the_finetuned_weights_counts(advanced, monkeypatch):
    assert advanced("--seeds=3")[0] == 0
    same = Evaluation(0.5, 0.5, [0] * 6, [0, 1] * 3, [""] * 6, [0.5] * 6)
    monkeypatch.setattr(experiments.Experiment, "evaluate", lambda *_: same)
    assert advanced("--method=wise_ft", "--seeds=3")[0] == 0
    assert record("wise_ft")["runs"][0]["alpha"] == 1.0


def test_what_is_shown_is_mean_and_sample_deviation(capsys):
    runs = [{"dev": {"accuracy": a}, "test": None} for a in (0.5, 0.6, 0.7)]
    composer.show(SimpleNamespace(path="r"), runs)
    assert capsys.readouterr().out == "dev acc :: 0.600 (0.100), 3 runs\nwrote r\n"


@pytest.mark.parametrize("method", ["prompt", "zero_shot"])
def test_a_long_sentence_leaves_room_for_a_label_of_several_tokens(advanced, method):
    Path("labels.json").write_text('["bad xyz", "good"]', encoding="utf-8")
    Path("toy-dev.txt").write_text(f"0 ||| {'a good film ' * 99}\n1 ||| warm\n", encoding="utf-8")
    code, _, err = advanced("--method", method, "--seeds=3", "--epochs=1")
    assert code == 0, err
    places = int(re.search("1 of 2 sentences do not fit the ([0-9]+) positions", err)[1])
    assert places < load_pretrained("model.pt").config.max_seq_len  # the label takes its own


def test_a_soup_of_one_is_that_one(advanced):
    assert advanced("--method", "soup", "--seeds", "3")[0] == 0
    (base,), (run,) = record("plain")["runs"], record("soup")["runs"]
    assert run["ingredients"] == [3]
    assert run["dev"] == base["dev"] and run["test"] == base["test"]


def test_zero_shot_without_a_mask_is_refused_before_the_pretraining(advanced, monkeypatch):
    monkeypatch.setattr(experiments, "continue_on", lambda *given, **named: pytest.fail("began"))
    methods = ["--method", "pretrain", "--method", "zero_shot"]
    code, _, err = advanced(*methods, "--attention", "full")
    assert code == 2 and "attention='full' cannot prompt" in err


def test_what_pretraining_took_is_said_of_zero_shot_too(advanced, monkeypatch):
    monkeypatch.setattr(experiments, "continue_on", lambda *given, **named: ("model.pt", 7.04))
    code, _, err = advanced("--method", "pretrain", "--method", "zero_shot")
    assert code == 0, err
    assert record("zero_shot+pretrain")["runs"][0]["pretrain_seconds"] == 7.0


@pytest.mark.parametrize("method", ["norms", "adapter"])
def test_l2sp_holds_the_pretrained_gains_that_some_methods_train(method):
    options = composer.get_args(["--method", method, "--method", "l2sp"])
    config = SimpleNamespace(num_labels=2, option="finetune", hidden_dropout_prob=0.0)
    model = assembly.build([method], random_llama(), config, None, None, options.adapter_size)
    penalty = assembly.prepare([method, "l2sp"], model, options)
    before = penalty(model, None, None)
    with torch.no_grad():
        model.llama.norm.weight.add_(1.0)
    expected = options.l2sp_weight / 2 * model.llama.config.dim
    assert (penalty(model, None, None) - before).item() == pytest.approx(expected, rel=1e-4)


def test_l2sp_takes_adapters_for_new():
    options = composer.get_args(["--method", "adapter", "--method", "l2sp"])
    config = SimpleNamespace(num_labels=2, option="finetune", hidden_dropout_prob=0.0)
    model = assembly.build(["adapter"], random_llama(), config, None, None, options.adapter_size)
    penalty = assembly.prepare(["adapter", "l2sp"], model, options)
    before = penalty(model, None, None)
    bias = model.llama.layers[0].attention.adapter.up.bias  # begins at 0
    with torch.no_grad():
        bias.add_(1.0)
    expected = options.l2sp_head_weight / 2 * bias.numel()
    assert (penalty(model, None, None) - before).item() == pytest.approx(expected, rel=1e-4)


def test_regularizers_together_are_their_sum():
    class Term(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, model, log_probs, again):
            return torch.tensor(self.value)

    both = assembly.Together(Term(1.5), Term(2.0))
    assert both(None, None, None) == 3.5


def test_the_list_explains_each_method_in_a_line(advanced):
    code, out, _ = advanced("--list")
    assert code == 0
    assert [line.partition(": ")[0] for line in out.splitlines()] == list(METHODS)
    assert all(len(line) > 25 for line in out.splitlines())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "lora", "--method", "adapter"], "do not combine"),
        (["--method", "nonsense"], "invalid choice"),
        (["--seeds", "1,1"], "twice"),
        (["--seeds", "one"], "not an integer"),
        (["--grid", "lr=fast"], "'fast' is not a number above 0"),
        (["--grid", "lr=1e-3,-1"], "'-1' is not a number above 0"),
        (["--grid", "epochs=1.5"], "'1.5' is not an integer"),
        (["--grid", "epochs=inf"], "'inf' is not an integer"),
        (["--grid", "lr=1,1"], "a value twice"),
        (["--grid", "lr=1", "--grid", "lr=2"], "twice"),
        (["--grid", "attention=1"], "choose from"),
        (["--grid", "lora_rank=1,2"], "choose from"),
        (["--grid", "nonsense=1"], "choose from"),
        (["--folds", "1"], "nothing to train on"),
        (["--folds", "2", "--method", "wise_ft"], "leave out --folds"),
        (["--folds", "2", "--train_share", "0.5"], "exclude each other"),
        (["--folds", "2", "--grid", "lr=1,2"], "then name the value"),
        (["--folds", "2", "--patience", "1"], "no --patience"),
        (["--folds", "2", "--dev_out", "toy-dev-advanced-output.txt"], "writes no outputs"),
        (["--folds", "50"], "a label has only 7 sentences"),
        (["--train_share", "0.01"], "leaves a label none among those kept"),
        (["--train_share", "0.99"], "or among the rest"),
        (["--method", "zero_shot", "--grid", "lr=1,2"], "trains nothing"),
        (["--method", "zero_shot", "--folds", "2"], "not trained"),
        (["--method", "prompt", "--template", "nonsense"], "no template is called"),
        (["--dev_out", "toy-dev.txt"], "must end in dev-advanced-output.txt"),
        (["--name", "A name"], "letters a-z"),
        (["--dev_out", "absent/toy-dev-advanced-output.txt"], "folder does not exist"),
        (["--method", "lora", "--lora_rank", "999"], "rank"),
        (["--lora_rank", "2"], "--lora_rank is an option of --method lora, which was not chosen"),
        (["--method", "lora", "--soup", "uniform"], "an option of --method soup"),
        (["--method", "last_epochs", "--last", "3"], "--last 3: there are only 2 epochs"),
        (["--r_drop", "1", "--hidden_dropout_prob", "0"], "or --hidden_dropout_prob"),
        (["--method", "prompt", "--r_drop", "1"], "give it --backbone_dropout\n"),
        (["--method", "prompt", "--grid", "hidden_dropout_prob=0,0.3"], "choose from"),
        (["--method", "attention_pool", "--pooling", "position"], "position"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(advanced, options, said):
    code, _, err = advanced("--seeds", "3", *options)
    assert code == 2 and said in err and len(err.splitlines()) == 1


def test_an_output_does_not_replace_an_input(advanced):
    shutil.copyfile("toy-dev.txt", "toy-dev-advanced-output.txt")
    same = ["--dev", "toy-dev-advanced-output.txt", "--dev_out", "toy-dev-advanced-output.txt"]
    code, _, err = advanced("--seeds", "3", *same)
    assert code == 2 and "is an input" in err


def test_weights_of_another_run_are_not_taken_for_a_records_own(advanced):
    assert advanced("--seeds", "3", "--epochs", "1")[0] == 0
    other = ["--results_dir", "elsewhere", "--hidden_dropout_prob", "0.8"]
    assert advanced("--seeds", "3", "--epochs", "1", *other)[0] == 0
    code, _, err = advanced("--seeds", "3", "--epochs", "1", "--method", "wise_ft")
    assert code == 2 and "are of another run" in err


def test_what_an_abandoned_run_left_is_not_averaged(advanced):
    options = ["--method=last_epochs", "--last=2", "--seeds=3"]
    assert advanced(*options)[0] == 0
    ((path, clean),) = weights().items()
    left = Path(path).with_suffix(".epoch-7.pt")
    torch.save({name: tensor + 1 for name, tensor in clean.items()}, left)
    next(Path("results").glob("*.json")).unlink()
    assert advanced(*options)[0] == 0
    again = weights()[path]
    assert all(torch.equal(clean[name], again[name]) for name in clean) and not left.exists()


@pytest.fixture
def offered(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """The weights after each epoch that is trained from now on."""
    states = []
    offer = candidates.Candidates.offer

    def spy(self, epoch, is_best, state):
        states.append({name: tensor.clone() for name, tensor in state().items()})
        offer(self, epoch, is_best, state)

    monkeypatch.setattr(candidates.Candidates, "offer", spy)
    return states


def test_the_mean_of_the_last_epochs_is_that_of_their_weights(advanced, offered):
    assert advanced("--method=last_epochs", "--last=2", "--epochs=3", "--seeds=3")[0] == 0
    ((_, mean),) = weights().items()
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (offered[1][name] + offered[2][name]) / 2)


def test_the_best_epoch_is_what_is_kept(advanced, offered, monkeypatch):
    given = iter([0.2, 0.8, 0.5, 0.8])
    monkeypatch.setattr(
        "training.loop.evaluate",
        lambda *a, **k: Evaluation(next(given), 0.0, [0] * 6, [0, 1] * 3, [""] * 6, [0.5] * 6),
    )
    assert advanced("--epochs=4", "--seeds=3")[0] == 0
    ((_, kept),) = weights().items()
    assert all(torch.equal(kept[name], offered[1][name]) for name in kept)
    assert record("plain")["runs"][0]["best_epoch"] == 1


def test_a_soup_of_other_seeds_replaces_the_earlier(advanced):
    options = ["--method=soup", "--soup=uniform", "--epochs=1"]
    assert advanced(*options, "--seeds=3")[0] == 0
    code, _, err = advanced(*options, "--seeds=3,4")
    assert code == 0, err
    (run,) = record("soup")["runs"]
    assert run["seeds"] == run["ingredients"] == [3, 4]
    both = [state for path, state in weights().items() if "/toy-soup-" not in path]
    (mean,) = (state for path, state in weights().items() if "/toy-soup-" in path)
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (both[0][name] + both[1][name]) / 2)


@pytest.mark.parametrize("method", ["wise_ft", "soup"])
def test_an_average_of_a_run_that_was_repeated_is_made_anew(advanced, monkeypatch, method):
    options = ["--method", method, "--seeds", "3", "--epochs", "1"]
    assert advanced(*options)[0] == 0
    (before,) = record(method)["runs"]
    assert advanced(*options)[0] == 0
    assert record(method)["runs"] == [before]
    (path,) = Path("results").glob("toy-plain-*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["runs"] = []  # as the message about lost weights asks for
    path.write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(experiments, "seed_everything", lambda _: torch.manual_seed(99))
    assert advanced(*options)[0] == 0
    ((after,), (base,)) = record(method)["runs"], record("plain")["runs"]
    assert after["of"] == [base["weights_sha256"]] != before["of"]


def test_where_another_value_is_chosen_the_averages_of_the_earlier_are_gone(advanced):
    options = ["--method=wise_ft", "--epochs=1", "--grid", "lr=1e-2,2e-2"]
    assert advanced(*options, "--seeds=3,4")[0] == 0
    chosen = record("plain")["chosen"]
    (path,) = Path("results").glob("toy-plain-*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    content |= {"runs": [], "chosen": {"lr": 2e-2 if chosen == {"lr": 1e-2} else 1e-2}}
    path.write_text(json.dumps(content), encoding="utf-8")
    assert advanced(*options, "--seeds=3")[0] == 0
    content = record("wise_ft")
    assert [run["seed"] for run in content["runs"]] == [3]
    assert content["runs"][0]["hyperparameters"] == content["chosen"] != chosen


def test_an_average_that_does_not_say_of_what_is_made_anew(advanced):
    assert advanced("--method=wise_ft", "--epochs=1", "--seeds=3")[0] == 0
    (path,) = Path("results").glob("toy-wise_ft-*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["runs"][0]["of"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert advanced("--method=wise_ft", "--epochs=1", "--seeds=3")[0] == 0
    assert "of" in record("wise_ft")["runs"][0]


def test_the_order_of_a_grid_does_not_name_other_weights(advanced):
    grids = [["lr=1e-2", "epochs=1"], ["epochs=1", "lr=1e-2"]]
    for grid, runs in zip(grids, ("one", "two"), strict=True):
        options = ["--seeds=3", f"--runs_dir={runs}", f"--results_dir={runs}-results"]
        assert advanced("--grid", *grid, *options)[0] == 0
    one, two = (weights(Path(runs)).keys() for runs in ("one", "two"))
    assert [path.removeprefix("one") for path in one] == [path.removeprefix("two") for path in two]


def test_other_settings_under_the_same_name_are_refused(advanced):
    assert advanced("--seeds", "3", "--epochs", "1")[0] == 0
    code, _, err = advanced("--seeds", "3", "--epochs", "1", "--label_smoothing", "0.1")
    assert code == 2 and "label_smoothing: 0.0 there, 0.1 here" in err
    assert advanced("--seeds", "3", "--label_smoothing", "0.1", "--name", "smoothed")[0] == 0
    assert record("smoothed")["method"] == "smoothed"


def test_a_finished_run_whose_weights_are_gone_is_named(advanced):
    assert advanced("--seeds", "3", "--epochs", "1")[0] == 0
    (path,) = Path("runs").glob("toy-*/seed-3*.pt")
    path.unlink()
    code, _, err = advanced("--seeds", "3", "--epochs", "1", "--method", "soup")
    assert code == 2 and path.name in err and "gone" in err
