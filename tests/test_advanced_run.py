"""The composer: every method from command line to record, what is skipped, resumed and refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import cli
from advanced import assembly
from advanced import experiment as experiments
from advanced import run as composer
from advanced.methods import METHODS
from interrupts import Stopped
from training import load_classifier

TRAINED = [name for name in METHODS if name not in ("zero_shot", "prompt")]
DATA = [
    *("--train", "toy-train.txt", "--dev", "toy-dev.txt", "--test", "toy-test.txt"),
    *("--label-names", "labels.json", "--pretrained-model-path", "model.pt"),
]


@pytest.fixture
def advanced(workplace: Path, capsys) -> Callable[..., tuple[int, str, str]]:
    """advanced("--method", ...) runs the composer on the workplace's files: code, out, err."""

    def call(*options: str) -> tuple[int, str, str]:
        argv = [*DATA, "--epochs", "2", "--lr", "1e-2", "--batch_size", "4", *options]
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: composer.main(argv))
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


def record(method: str, suffix: str = "") -> dict:
    (path,) = Path("results").glob(f"toy-{method}-*{suffix}.json")
    return json.loads(path.read_text(encoding="utf-8"))


def weights(folder: Path = Path("runs")) -> dict[str, dict[str, torch.Tensor]]:
    paths = sorted(folder.glob("toy-*/seed-*.pt"))
    return {str(path): torch.load(path, weights_only=True)["model"] for path in paths}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "zero_shot"])
def test_every_method_trains_leaves_its_record_and_weights_that_reproduce_it(advanced, method):
    options = ["--lora_rank", "2", "--adapter_size", "4", "--pretrain_epochs", "1", "--last", "1"]
    code, _, err = advanced("--method", method, "--seeds", "3,4", *options)
    assert code == 0, err
    content = record(method)
    n_runs = 1 if method == "soup" else 2
    assert len(content["runs"]) == n_runs
    for run in content["runs"]:
        assert run["dev"]["n_sentences"] == run["test"]["n_sentences"] == 8
        assert run["trainable_parameters"] <= run["parameters"]
        assert len(run["history"]) == (0 if method in ("wise_ft", "soup") else 2)
    code, again, _ = advanced(
        "--method", method, "--seeds", "3,4", "--dev_out", "toy-dev-advanced-output.txt", *options
    )
    assert code == 0 and "parameters" not in again  # everything is there already
    best = max(run["dev"]["accuracy"] for run in content["runs"])
    assert f"dev acc :: {best:.3f}\n" in again  # of the weights, read anew
    assert len(Path("toy-dev-advanced-output.txt").read_text(encoding="utf-8").splitlines()) == 8
    left = [path.name for path in Path("runs").glob(f"toy-{method}-*/*")]
    assert not [name for name in left if name.endswith((".state.pt", ".best.pt", ".epoch-1.pt"))]


@pytest.mark.parametrize("method", ["plain", "lora", "mixout", "head", "pretrain"])
def test_what_is_merged_is_a_checkpoint_of_run_llama(advanced, method):
    advanced("--method", method, "--seeds", "3", "--lora_rank", "2")
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
    assert set(soup["ingredients"]) <= {3, 4}


@pytest.mark.parametrize(
    "options", [["--method", "plain"], ["--method", "mixout", "--method", "smart"], ["--r_drop=1"]]
)
def test_an_interrupted_run_goes_on_to_the_same_weights(advanced, monkeypatch, options):
    options = [*options, "--proximal_weight", "1", "--seeds", "3", "--epochs", "3"]
    folders = ["--runs_dir", "whole", "--results_dir", "whole-results"]
    assert advanced(*options, *folders)[0] == 0
    evaluate, calls = experiments.train_classifier.__globals__["evaluate"], []

    def stopping(*given, **named):
        calls.append(1)
        if len(calls) == 2:
            raise Stopped(15)
        return evaluate(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr("training.evaluate", stopping)
        code, _, _ = advanced(*options)
    assert code == 143 and not list(Path("results").glob("toy*.json"))
    assert list(Path("runs").glob("*/*.state.pt"))
    assert advanced(*options)[0] == 0
    ours, theirs = weights(), weights(Path("whole"))
    assert len(ours) == len(theirs) == 1
    for (_, a), (_, b) in zip(ours.items(), theirs.items(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


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


def test_a_grid_of_another_option_reaches_the_method_as_its_kind(advanced, monkeypatch):
    ranks = []
    monkeypatch.setattr(
        "advanced.lora.add_lora", lambda model, rank, alpha, targets: ranks.append(rank)
    )
    monkeypatch.setattr("advanced.lora.merge", lambda model: None)
    assert advanced("--method", "lora", "--grid", "lora_rank=1,2", "--seeds", "3")[0] == 0
    assert ranks == [1, 2] and all(isinstance(rank, int) for rank in ranks)


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
    code, _, err = advanced("--folds", "4", "--seeds", "3,4", "--epochs", "1")
    assert code == 0, err
    assert len(held) == 8
    assert [held[3, fold] for fold in range(4)] == [held[4, fold] for fold in range(4)]
    content = record("plain", "-cv4")
    assert [(run["seed"], run["fold"]) for run in content["runs"]] == [
        (seed, fold) for seed in (3, 4) for fold in range(4)
    ]
    for run in content["runs"]:
        assert run["test"] is None
        assert run["dev"]["accuracy"] == run["history"][-1]["dev_accuracy"]
        assert sum(map(sum, run["dev"]["confusion"])) == 4


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
    code, out, err = advanced("--method", "zero_shot", "--dev_out", "toy-dev-advanced-output.txt")
    assert code == 0, err
    (run,) = record("zero_shot")["runs"]
    best = max(one["train_accuracy"] for one in run["tried"])
    chosen = next(one for one in run["tried"] if one["train_accuracy"] == best)
    assert {key: chosen[key] for key in ("template", "scoring")} == run["hyperparameters"]
    assert run["trainable_parameters"] == 0 and run["history"] == []
    # The toy's dev is its train: the accuracy that chose is that of the whole way once more.
    assert run["dev"]["accuracy"] == pytest.approx(best)
    assert f"dev acc :: {best:.3f}\n" in out
    code, again, _ = advanced("--method", "zero_shot")
    assert code == 0 and "train acc" not in again


def test_wise_ft_ends_in_what_was_finetuned_and_begins_at_the_pretrained_backbone(advanced):
    assert advanced("--method", "wise_ft", "--seeds", "3")[0] == 0
    (base,), (run,) = record("plain")["runs"], record("wise_ft")["runs"]
    assert [one["alpha"] for one in run["alphas"]] == [i / 10 for i in range(11)]
    assert run["alphas"][-1]["dev_accuracy"] == base["dev"]["accuracy"]
    assert run["dev"]["accuracy"] == max(one["dev_accuracy"] for one in run["alphas"])


def test_a_soup_of_one_is_that_one(advanced):
    assert advanced("--method", "soup", "--seeds", "3")[0] == 0
    (base,), (run,) = record("plain")["runs"], record("soup")["runs"]
    assert run["ingredients"] == [3]
    assert run["dev"] == base["dev"] and run["test"] == base["test"]


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
        (["--grid", "lr=fast"], "is not like lr=1e-4,3e-4"),
        (["--grid", "attention=1"], "takes a number"),
        (["--grid", "nonsense=1"], "takes a number"),
        (["--folds", "1"], "nothing to train on"),
        (["--folds", "2", "--method", "wise_ft"], "leave out --folds"),
        (["--folds", "2", "--train_share", "0.5"], "exclude each other"),
        (["--folds", "2", "--grid", "lr=1,2"], "then name --lr"),
        (["--name", "A name"], "letters a-z"),
        (["--dev_out", "absent/toy-dev-advanced-output.txt"], "folder does not exist"),
        (["--method", "lora", "--lora_rank", "999"], "rank"),
        (["--method", "attention_pool", "--pooling", "position"], "position"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(advanced, options, said):
    code, _, err = advanced("--seeds", "3", *options)
    assert code == 2 and said in err and len(err.splitlines()) == 1


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
