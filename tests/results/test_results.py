"""results/: tables and figures against numbers counted by hand from small records."""

import json

import numpy as np
import pytest
import scipy.stats

from results import figures, history, page, report, studies
from results.page import MAJORITY_CLASS
from results.significance import holm, mcnemar
from utils import InputError

N_LABELS = {"sst": 5, "cfimdb": 2}


def evaluation(dataset, right):
    """Return the record of one evaluation. `right` has a 1 for each correct sentence: "1100".

    The gold labels go round: 0, 1, 0, 1 for CFIMDB.
    """
    confusion = np.zeros((N_LABELS[dataset], N_LABELS[dataset]), dtype=int)
    for i, character in enumerate(right):
        gold = i % N_LABELS[dataset]
        confusion[gold, gold if character == "1" else gold - 1] += 1
    return {
        "n_sentences": len(right),
        "accuracy": right.count("1") / len(right),
        "macro_f1": 0.3,
        "ece": 0.05,
        "confusion": confusion.tolist(),
        "right": right,
    }


def study(dataset, method, dev, test=None, folds=None, model="toy", train_share=1.0):
    """Return a record with a run per string of `dev`: one per seed, or `folds` per seed."""
    runs = [
        {
            "seed": 1 + i // (folds or 1),
            "fold": i % folds if folds else None,
            "dev": evaluation(dataset, right),
            "test": evaluation(dataset, test[i]) if test else None,
            "seconds": 100.0 + 2 * i,
            "peak_memory_mb": 400.0 + i,
            "trainable_parameters": 186 if method == "lora" else 10_000,
            "parameters": 10_000,
        }
        for i, right in enumerate(dev)
    ]
    return {
        "dataset": dataset,
        "method": method,
        "model": model,
        "train_share": train_share,
        "folds": folds,
        "command": f"python -m advanced.run --method {method}",
        "settings": {"device": "cpu"},
        "files": {f"{split}_sha256": f"{split} of {dataset}" for split in ("train", "dev", "test")},
        "search": [{"lr": 3e-4}, {"lr": 6e-4}],
        "chosen": {"lr": 3e-4},
        "runs": runs,
        "file": f"{dataset}-{method}-{model}.json",
    }


def cells(table):
    """Return {first cell: the other cells} of every row, the head included."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert len({len(row) for row in rows}) == 1
    return {row[0]: row[1:] for row in rows}


def test_a_cell_is_the_mean_and_sample_deviation_over_seeds():
    plain = study("sst", "plain", ["11110", "11000"], test=["11111", "00000"])
    rows = cells(report.table([plain], "toy"))
    # 0.8 and 0.4: mean 0.6, deviation sqrt(2 * 0.2**2 / 1) = 0.283
    assert rows["plain"] == ["100", "0.600 (0.283)", "0.500 (0.707)", "", "2"]
    assert rows["reference, stories42M, published"][:3] == ["100", "0.414 (0.014)", "0.418 (0.017)"]
    assert rows["toy, mean (std) over seeds"][1:3] == ["SST dev", "SST test"]  # nothing of CFIMDB


def test_rows_are_the_baselines_then_the_methods_by_sst_dev():
    table = report.table(
        [
            study("sst", "lora", ["11000"]),
            study("sst", "smart", ["11110"]),
            study("sst", "plain", ["10000"]),
            study("sst", "zero_shot", ["00000"]),
            study("cfimdb", "mixout", ["11"]),
            study("cfimdb", "lora", ["11", "10"]),
            study("sst", "adapter", ["11111"], train_share=0.1),
            study("sst", "head", ["11111"], model="other"),
        ],
        "toy",
    )
    rows = cells(table)
    assert list(rows)[4:] == ["zero_shot", "plain", "smart", "lora", "mixout"]
    assert rows["lora"] == ["1.86", "0.400", "0.750 (0.354)", "1 (CFIMDB dev 2)"]


def test_folds_are_averaged_by_their_sentences_and_a_seed_without_all_folds_is_left_out():
    folds = study("cfimdb", "plain", ["1111", "00", "1111", "10", "0000"], folds=2)
    folds["runs"].reverse()
    assert studies.scores(folds, "dev") == pytest.approx([4 / 6, 5 / 6])
    assert studies.correct_answers(folds, "dev").tolist() == [
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
    ]
    assert studies.n_seeds(folds) == "2"
    five = study("cfimdb", "plain", ["1111", "00", "00", "00", "00"], folds=5)
    assert cells(report.table([five], "toy"))["plain"][1] == "0.333"


def test_a_seed_without_an_evaluation_leaves_no_mean_over_the_others():
    plain = study("sst", "plain", ["11110", "11000"], test=["11111", "00000"])
    plain["runs"][1]["test"] = None
    assert studies.scores(plain, "test") == []
    plain["runs"][1]["test"] = {"n_sentences": 5, "accuracy": None}  # placeholder labels
    assert studies.scores(plain, "test") == []
    assert "SST test" not in report.table([plain], "toy")


def test_the_majority_class_is_the_largest_share_of_gold_labels():
    # gold labels 0 1 2 3 4 0 1 2: classes 0, 1 and 2 have two sentences of eight
    rows = cells(report.table([study("sst", "plain", ["11111000"])], "toy"))
    assert rows[MAJORITY_CLASS][:2] == ["0", "0.250"]


def test_one_run_against_plain_is_mcnemar_corrected_by_holm_and_the_short_table_marks_it():
    n_wrong = {"plain": 0, "lora": 10, "norms": 9, "smart": 6, "mixout": 4, "l2sp": 0}
    members = [
        study("sst", name, ["1"], test=["0" * n + "1" * (20 - n)], model=figures.MODEL)
        for name, n in n_wrong.items()
    ]
    members.append(study("sst", "adapter", ["1"], test=["0" * 20], model="other"))
    rows = cells(report.table(members, figures.MODEL))
    assert rows["mini, mean (std) over seeds"][3] == "SST test, minus plain (p)"
    differences = {name: rows[name][3] for name in n_wrong}
    assert differences == {
        "plain": "",
        "lora": "-0.500 (0.010)",  # p 2 / 2**10, times 5
        "norms": "-0.450 (0.016)",  # p 2 / 2**9, times 4
        "smart": "-0.300 (0.094)",  # p 2 / 2**6, times 3
        "mixout": "-0.200 (0.250)",  # p 2 / 2**4, times 2
        "l2sp": "+0.000 (1.000)",
    }
    for language, (first, others, published) in enumerate(zip(*report.GLANCE_ENDS, strict=True)):
        rows = cells(report.glance(members, language))
        name = {
            m: report.NAMED[language].format(words[language], m)
            for m, words in report.GLANCE.items()
        }
        assert rows[""] == ["SST test"]
        assert rows[name["lora"]] == ["0.500 ↓"]
        assert rows[name["norms"]] == ["0.550 ↓"]
        assert rows[name["smart"]] == ["0.700"]
        assert rows[name["plain"]] == ["1.000"]
        assert name["head"] not in rows  # nobody ran it
        assert rows[others] == ["0.800–1.000"]
        assert rows[published] == ["0.418 (0.017)"]
        assert first in rows


@pytest.mark.parametrize(("folds", "split"), [(None, "dev"), (2, "train")])
def test_answers_about_different_files_are_not_compared(folds, split):
    members = [study("cfimdb", name, ["1111", "1111"], folds=folds) for name in ("plain", "lora")]
    assert set(studies.compare_with_plain(members, "dev")) == {"lora"}
    members[1]["files"][f"{split}_sha256"] = "another"
    with pytest.raises(InputError, match=rf"lora-toy\.json and .* are of different {split} files"):
        studies.compare_with_plain(members, "dev")


def test_a_soup_says_how_many_runs_it_keeps():
    soup = study("sst", "soup", ["11111"])
    soup["runs"][0] |= {"seeds": [1, 2, 3, 4], "ingredients": [2, 4]}
    members = [soup, study("cfimdb", "soup", ["11", "10"])]
    assert cells(report.table(members, "toy"))["soup"][-1] == "2 of 4 (CFIMDB dev 2)"


def test_the_page_has_scores_intervals_and_costs():
    pretrain = study("sst", "pretrain", ["11110", "11000"], test=["11111", "00000"])
    for run in pretrain["runs"]:
        run["pretrain_seconds"] = 41.6
    plain = study("sst", "plain", ["11110", "11000"], test=["11111", "00000"])
    members = [plain, pretrain, study("cfimdb", "plain", ["11"], folds=1)]
    text = page.page(members)
    score_table, cost_table = text.split("### toy, SST\n\n")[1].split("\n\n")[:2]
    row = cells(score_table)["pretrain"]
    assert row[:3] == ["0.600 (0.283)", "0.300 (0.000)", "0.050 (0.000)"]
    assert row[-2].startswith("+0.000 [-1.000, +1.000] p 1.000")  # one seed of two is drawn
    expected = ["10,000", "100", "lr 0.0003", "2", "cpu", "101 + 42 once", "401"]
    assert cells(cost_table)["pretrain"] == expected
    assert "### toy, CFIMDB, 1-fold cross-validation" in text
    dev_only = page.page([study("cfimdb", name, ["10"]) for name in ("plain", "lora")])
    assert "minus plain" not in dev_only  # dev chose the epochs, so it tests nothing


def test_every_page_shows_what_the_records_say():
    tables = report.all_tables(studies.load(report.FOLDER / "records"))
    for name in report.PAGES:
        text = (report.FOLDER.parent / name).read_text(encoding="utf-8")
        assert any(f"<!-- {table} begins -->" in text for table in tables)
        assert report.with_tables(text, tables) == text, f"{name}: run python -m results.report"


def test_the_prose_quotes_the_records():
    records = studies.load(report.FOLDER / "records")

    def text(name: str) -> str:
        return " ".join((report.FOLDER.parent / name).read_text(encoding="utf-8").split())

    def group(**wanted) -> dict[str, dict]:
        found = studies.select(records, model=figures.MODEL, **wanted)
        return {study["method"]: study for study in found}

    means, ps = {}, {}
    for share in (0.1, 0.3):
        members = group(dataset="sst", train_share=share)
        for name, member in members.items():
            means[share, name] = f"{np.mean(studies.scores(member, 'test')):.3f}"
        for name, comparison in studies.compare_with_plain([*members.values()], "test").items():
            ps[share, name] = page.p_value(comparison.p)
    prompt, plain, p = means[0.1, "prompt"], means[0.1, "plain"], ps[0.1, "prompt"]
    assert f"SST test {prompt}, `plain` {plain}, p = {p}" in text("README.md")
    assert f"SST test {prompt}，`plain` {plain}，p = {p}" in text("README.zh-TW.md")
    methods = text("docs/methods.md")
    assert f"SST test {prompt}, `plain` {plain} (p = {p})" in methods
    prompt, lora, plain = (means[0.3, name] for name in ("prompt", "lora", "plain"))
    ps = f"(p = {ps[0.3, 'prompt']} and {ps[0.3, 'lora']})"
    assert f"SST test {prompt} and {lora}, `plain` {plain} {ps}" in methods

    folds = group(dataset="cfimdb", folds=5)
    last = {
        name: [run["history"][-1]["train_accuracy"] for run in member["runs"]]
        for name, member in folds.items()
    }
    own = last.pop("assignment")
    others = [value for name in ("full_last", "masked", "plain") for value in last[name]]
    low, high, others_low, others_high = min(own), max(own), min(others), max(others)
    percents = [f"{100 * value:.0f}" for value in (low, high, others_low, others_high)]
    front = "{} to {} % of the training reviews right, by fold, and the other modes {} to {} %"
    assert front.format(*percents) in text("README.md")
    assert "{}% 到 {}% 答對，其他做法則有 {}% 到 {}%".format(*percents) in text("README.zh-TW.md")
    findings = text("docs/results.md")
    said = f"training accuracy is {low:.2f} to {high:.2f}, by fold, that of the other three modes"
    assert f"{said} {others_low:.2f} to {others_high:.2f}" in findings
    held_out = [run["dev"]["accuracy"] for run in folds["assignment"]["runs"]]
    assert f"({min(held_out):.3f} to {max(held_out):.3f}, by fold)" in findings
    comparison = studies.compare_with_plain([*folds.values()], "dev")["assignment"]
    gap, p = f"{-100 * comparison.difference:.1f}", page.p_value(comparison.p)
    assert f"{gap} points below `plain` (p = {p})" in text("README.md")
    assert f"低 {gap} 個百分點（p = {p}）" in text("README.zh-TW.md")
    assert f"{gap} points below `plain`" in findings
    plain_folds = [run["dev"]["accuracy"] for run in folds["plain"]["runs"]]
    over_folds = scipy.stats.ttest_rel(held_out, plain_folds).pvalue
    assert (
        sum(np.less(held_out, plain_folds)) == 4 and "lower in four of the five folds" in findings
    )
    assert f"a paired t-test over the folds has p = {over_folds:.2f}" in findings
    rows = [studies.correct_answers(folds[name], "dev")[0] for name in ("full_last", "masked")]
    own_row = studies.correct_answers(folds["assignment"], "dev")[0]
    ps = [mcnemar(rows[0], own_row), mcnemar(rows[1], rows[0])]
    gains = [f"{100 * (a.mean() - b.mean()):.1f}" for a, b in ((rows[0], own_row), rows[::-1])]
    assert f"{gains[0]} points higher (McNemar's test, p = {ps[0]:.3f})" in findings
    assert f"another {gains[1]} (p = {ps[1]:.3f})" in findings
    assert f"both are {max(holm(ps)):.3f}" in findings


def test_a_difference_that_rounds_to_zero_has_one_sign():
    values = (-0.0004, 0.0, 0.0004, -0.0006, 0.0123)
    assert [studies.signed(value) for value in values] == ["+0.000"] * 3 + ["-0.001", "+0.012"]


def test_the_command_writes_between_the_marks_only(tmp_path, monkeypatch, capsys):
    plain = study("sst", "plain", ["11110"], test=["11111"])
    (tmp_path / "results" / "records").mkdir(parents=True)
    record = tmp_path / "results" / "records" / plain["file"]
    record.write_text(json.dumps(plain), encoding="utf-8")
    text = "before\n"
    for name in ("results.report", "speed"):
        text += f"<!-- {name} begins -->\nold {name}\n<!-- {name} ends -->\nafter {name}\n"
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    monkeypatch.setattr(report, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(report, "PAGES", ("README.md",))
    monkeypatch.setattr(report, "speed_table", lambda: "| speed |")
    report.main([])
    table = report.table([plain], "toy")
    expected = text.replace("old results.report", table).replace("old speed", "| speed |")
    assert readme.read_text(encoding="utf-8") == expected
    assert table in capsys.readouterr().out


def test_figures_plot_means_over_seeds(tmp_path):
    pytest.importorskip("matplotlib", reason="a development extra")
    lora = study("sst", "lora", ["11111"] * 2, test=["11110", "11000"], model=figures.MODEL)
    tenth = study("sst", "lora", ["1"] * 2, ["11000", "00000"], None, figures.MODEL, 0.1)
    head = study("cfimdb", "head", ["1"] * 5, folds=5, model=figures.MODEL)
    panel, folds = figures.accuracy([lora, tenth, head]).axes
    (bar,) = panel.containers
    assert bar.lines[0].get_xydata()[0] == pytest.approx([0.6, 0])
    (segment,) = bar.lines[2][0].get_segments()
    assert np.ptp(segment[:, 0]) / 2 == pytest.approx(np.sqrt(2 * 0.2**2 / 1))
    assert (panel.get_title(), folds.get_title()) == ("SST test", "CFIMDB 5-fold")
    assert [label.get_text() for label in panel.get_yticklabels()] == ["lora", "head"]
    assert folds.containers[0].lines[0].get_xydata()[0] == pytest.approx([1, 1])
    (panel,) = figures.train_size([lora, tenth]).axes
    (line,) = (bar.lines[0].get_xydata() for bar in panel.containers)
    np.testing.assert_allclose(line, [[10, 0.2], [100, 0.6]])
    third = study("sst", "head", ["1"] * 2, ["11111"] * 2, None, figures.MODEL, 0.3)
    (panel,) = figures.train_size([lora, tenth, third]).axes
    assert panel.get_title() == "with 10 % of the sentences lora has the highest mean"
    unfinished = study("sst", "lora", ["1"] * 2, None, None, figures.MODEL, 0.1)
    assert not figures.train_size([unfinished]).axes[0].containers  # not evaluated on test
    figures.draw_all([lora, tenth], tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"accuracy-mini.png", "attention-mini.png", "train_size-mini.png"}
    assert names <= {path.name for path in (report.FOLDER / "figures").iterdir()}


def test_a_history_is_plotted_and_another_file_is_an_error_that_names_it(tmp_path):
    pytest.importorskip("matplotlib", reason="a development extra")
    path = tmp_path / "history.csv"
    path.write_text("step,tokens,stories bits/byte\n1,1000,2.5\n2,2000,2.25\n", encoding="utf-8")
    assert history.read_history(path)["stories bits/byte"] == [2.5, 2.25]
    history.main([str(path), str(tmp_path / "loss.png")])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    for columns in ("x nats/answer", "x bits/byte,y nats/answer", "train_loss"):
        values = ",".join("2" for _ in columns.split(","))
        path.write_text(f"tokens,{columns}\n1000,{values}\n", encoding="utf-8")
        history.main([str(path), str(tmp_path / "other.png")])
        assert (tmp_path / "other.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"other\.png: not a history"):
        history.read_history(tmp_path / "other.png")
    with pytest.raises(InputError, match="is an input and would be replaced"):
        history.main([str(path), str(path)])
    for text in ("", "step\n1\n", "tokens,x\n1,\n", "tokens,x\n1,a\n"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"history\.csv: not a history"):
            history.read_history(path)
