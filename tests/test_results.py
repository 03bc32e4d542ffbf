"""results/: each run once, the test set without a say, and tables from the files alone."""

import json
import statistics

import pytest

from conftest import ROOT
from results import finetune, history, report


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    """Runs that are only counted: dev accuracy falls with the learning rate, test rises."""
    calls = []

    def run_once(options, lr, seed):
        calls.append((lr, seed))
        accuracy = {"dev": 0.5 - lr + seed / 100, "test": lr}
        figures = {split: {"accuracy": value} for split, value in accuracy.items()}
        return {"lr": lr, "seed": seed, "minutes": 0.0, "history": [], **figures}

    monkeypatch.setattr(finetune, "run_once", run_once)
    monkeypatch.setattr(finetune, "FOLDER", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"weights")
    return calls


OPTIONS = ["--pretrained-model-path", "model.pt"]


def test_the_rate_of_the_best_dev_accuracy_serves_all_seeds(scripted, tmp_path):
    path = tmp_path / "sst-toy.json"
    finetune.study(path, "command", OPTIONS, [0.3, 0.1, 0.2], [1, 2])
    assert scripted == [(0.3, 1), (0.1, 1), (0.2, 1), (0.1, 2)]
    assert json.loads(path.read_text(encoding="utf-8"))["lr"] == 0.1


def test_what_is_finished_is_not_run_again(scripted, tmp_path):
    path = tmp_path / "sst-toy.json"
    finetune.study(path, "command", OPTIONS, [0.1], [1, 2])
    finetune.study(path, "command", OPTIONS, [0.1], [1, 2, 3])
    assert scripted == [(0.1, 1), (0.1, 2), (0.1, 3)]
    with pytest.raises(ValueError, match="other options"):
        finetune.study(path, "command", [*OPTIONS, "--bf16"], [0.1], [1])
    (tmp_path / "model.pt").write_bytes(b"other weights")
    with pytest.raises(ValueError, match="other checkpoint_sha256"):
        finetune.study(path, "command", OPTIONS, [0.1], [1])


def test_the_command_line_hands_over_what_stands_behind_the_dashes(scripted, tmp_path):
    argv = ["sst-toy", "--lrs", "0.1", "0.2", "--seeds", "3", "4", "--", *OPTIONS, "--bf16"]
    finetune.main(argv)
    content = json.loads((tmp_path / "sst-toy.json").read_text(encoding="utf-8"))
    assert content["options"] == [*OPTIONS, "--bf16"]
    assert content["command"] == f"python -m results.finetune {' '.join(argv)}"
    assert scripted == [(0.1, 3), (0.2, 3), (0.1, 4)]


def test_an_unfinished_study_has_no_row(scripted, tmp_path, monkeypatch):
    finetune.study(tmp_path / "cfimdb-toy.json", "", OPTIONS, [0.1], [1, 2])
    run_once = finetune.run_once

    def interrupted(options, lr, seed):
        if seed == 2:
            raise KeyboardInterrupt
        return run_once(options, lr, seed)

    monkeypatch.setattr(finetune, "run_once", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune.study(tmp_path / "sst-toy.json", "", OPTIONS, [0.1], [1, 2])
    assert report.table(tmp_path).count("\n") == 2
    monkeypatch.setattr(finetune, "run_once", run_once)
    finetune.study(tmp_path / "sst-toy.json", "", OPTIONS, [0.1], [1, 2])
    assert report.table(tmp_path).count("\n") == 3


def test_a_run_is_the_command_lines_finetuning(workplace, monkeypatch, capsys):
    options = ["--train=toy-train.txt", "--dev=toy-dev.txt", "--test=toy-test.txt"]
    options += ["--label-names=labels.json", "--pretrained-model-path=model.pt", "--epochs=2"]
    before = sorted(workplace.iterdir())
    run = finetune.run_once(options, 1e-3, 5)
    out = capsys.readouterr().out
    assert (run["lr"], run["seed"], len(run["history"])) == (1e-3, 5, 2)
    assert f"dev acc :: {run['dev']['accuracy']:.3f}" in out
    assert f"test acc :: {run['test']['accuracy']:.3f}" in out
    assert sorted(workplace.iterdir()) == before  # checkpoint and outputs are thrown away


def test_the_table_is_mean_and_sample_deviation_of_the_chosen_rate(scripted, tmp_path):
    for dataset in ("sst", "cfimdb"):
        finetune.study(tmp_path / f"{dataset}-toy.json", "", OPTIONS, [0.1, 0.2], [1, 2, 4])
    finetune.study(tmp_path / "sst-alone.json", "", OPTIONS, [0.1], [1])  # without its partner
    dev = [0.4 + seed / 100 for seed in (1, 2, 4)]
    expected = f"{statistics.mean(dev):.3f} ({statistics.stdev(dev):.3f})"
    rows = report.table(tmp_path).splitlines()
    assert rows[-1] == f"| toy | {expected} | 0.100 (0.000) | {expected} | 3 | 0.1 |"
    assert len(rows) == 4


def test_insertion_replaces_what_stands_between_the_marks_alone():
    text = "before\n<!-- it begins -->\nold\n<!-- it ends -->\nafter\n"
    expected = "before\n<!-- it begins -->\nnew\n<!-- it ends -->\nafter\n"
    assert report.insert(text, "new", "it") == expected
    assert report.insert(text, "new", "other") == text


@pytest.mark.parametrize("name", report.READMES)
def test_the_readmes_show_what_the_files_say(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert report.with_tables(text) == text
    assert ("<!-- speed begins -->" in text) == (not name.startswith("data"))


def test_a_history_is_drawn_and_a_bad_one_is_named(tmp_path):
    pytest.importorskip("matplotlib", reason="a development extra")
    path = tmp_path / "history.csv"
    path.write_text("step,tokens,stories bits/byte\n1,1000,2.5\n2,2000,2.25\n", encoding="utf-8")
    assert history.read_history(str(path))["stories bits/byte"] == [2.5, 2.25]
    history.main([str(path), str(tmp_path / "loss.png")])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    for text in ("", "step\n1\n", "tokens,x\n1,\n"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"history\.csv: "):
            history.read_history(str(path))
