"""results/: studies read and checked, and tables from the files alone."""

import re
import statistics

import numpy as np
import pytest

import synthetic_studies as synthetic
from conftest import ROOT
from results import details, history, report, significance, studies

study = synthetic.study


@pytest.fixture
def found(tmp_path):
    """Two models; of `toy` every kind of study, of `other` one."""
    synthetic.write(
        tmp_path,
        study("sst", "plain", 0.5),
        study("sst", "lora", 0.3, n_trained=60_000),
        study("sst", "smart", 0.7, seeds=(1, 2)),
        study("sst", "zero_shot", 0.2, seeds=(1,), n_trained=0),
        study("sst", "plain", 0.3, train_share=0.1),
        study("cfimdb", "plain", 0.8),
        study("cfimdb", "lora", 0.9),
        study("cfimdb", "plain", 0.7, seeds=(1, 2), folds=3),
        study("cfimdb", "plain", 0.7, seeds=(1, 2), folds=5),
        study("cfimdb", "mixout", 0.9, model="other"),
    )
    (tmp_path / "speed.json").write_text('{"rows": []}', encoding="utf-8")
    return studies.load(tmp_path)


def cells(table):
    """{first cell: the others} of the rows under the head."""
    rows = [line.removeprefix("|").removesuffix("|").split("|") for line in table.splitlines()[2:]]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def one(found, **wanted):
    (only,) = studies.select(found, **{"folds": None, "train_share": 1.0, "model": "toy", **wanted})
    return only


LARGEST = "always the split's largest class"


def mean_std(values):
    return f"{statistics.mean(values):.3f} ({statistics.stdev(values):.3f})"


def test_the_table_is_mean_and_sample_deviation_over_seeds(found):
    rows = cells(report.table(found, "toy"))
    order = ["reference, stories42M, published", LARGEST, "zero_shot", "plain", "smart"]
    assert list(rows) == [*order, "lora"]  # by SST dev
    of_sst, of_cfimdb = (one(found, dataset=name, method="lora") for name in ("sst", "cfimdb"))
    expected = [
        mean_std([run[split]["accuracy"] for run in of["runs"]])
        for of, split in ((of_sst, "dev"), (of_sst, "test"), (of_cfimdb, "dev"))
    ]
    assert rows["lora"][:5] == ["1.86", *expected, ""]
    (zero_shot,) = one(found, method="zero_shot")["runs"]
    assert rows["zero_shot"][:2] == ["0", f"{zero_shot['dev']['accuracy']:.3f}"]
    assert (rows["lora"][-1], rows["smart"][-1]) == ("3", "2")
    plain = one(found, dataset="sst", method="plain")  # not that of a tenth of the data
    assert rows["plain"][1] == mean_std([run["dev"]["accuracy"] for run in plain["runs"]])
    assert rows["plain"][-2:] == ["", "3 (CFIMDB 5-fold 2)"]
    assert len({line.count("|") for line in report.table(found, "toy").splitlines()}) == 1


@pytest.mark.parametrize("unfinished", ["test", "runs"])
def test_a_study_under_way_takes_no_column_from_the_others(tmp_path, unfinished):
    first = study("sst", "adapter", 0.5)
    for run in first["runs"]:
        run["test"] = None  # which is looked at when all training is done
    if unfinished == "runs":
        first["runs"] = []
    found = studies.load(synthetic.write(tmp_path, first, study("sst", "plain", 0.5)))
    assert found[0]["method"] == "adapter"
    table = report.table(found, "toy")
    assert "| SST dev | SST test |" in table.splitlines()[0]
    runs = one(found, method="plain")["runs"]
    assert cells(table)["plain"][2] == mean_std([run["test"]["accuracy"] for run in runs])


def test_folds_are_pooled_for_each_seed(found):
    folds = one(found, folds=5)
    n_right = dict.fromkeys((1, 2), 0)
    for run in folds["runs"]:
        n_right[run["seed"]] += run["dev"]["right"].count("1")
    shares = [n / (5 * 60) for n in n_right.values()]
    assert cells(report.table(found, "toy"))["plain"][4] == mean_std(shares)
    assert studies.right(folds, "dev").shape == (2, 300)
    assert studies.right(folds, "dev").mean(axis=1).tolist() == pytest.approx(shares)


def test_folds_of_unequal_size_weigh_as_many_sentences(tmp_path):
    content = study("cfimdb", "plain", 0.5, seeds=(1,), folds=2)
    for run, n in zip(content["runs"], (300, 20), strict=True):
        run["dev"] = synthetic.run("cfimdb", 0.2 if n == 20 else 0.9, 1, 0, n=(n, 1))["dev"]
    (folds,) = studies.load(synthetic.write(tmp_path, content))
    n_right = [run["dev"]["right"].count("1") for run in folds["runs"]]
    assert studies.measured(folds, "dev") == pytest.approx([sum(n_right) / 320])


def test_the_majority_class_is_the_largest_share_of_gold_labels(found):
    confusion = one(found, dataset="sst", method="plain")["runs"][0]["test"]["confusion"]
    largest = max(map(sum, confusion)) / 80
    gold = synthetic.gold_labels("sst", "dev", None, 60)
    folds = np.concatenate([synthetic.gold_labels("cfimdb", "dev", i, 60) for i in range(5)])
    row = cells(report.table(found, "toy"))[LARGEST]
    assert row[1:3] == [f"{np.bincount(gold).max() / 60:.3f}", f"{largest:.3f}"]
    assert row[4] == f"{np.bincount(folds).max() / 300:.3f}"


def test_differences_are_tested_against_plain_and_corrected_by_holm(found):
    plain = studies.right(one(found, dataset="sst", method="plain"), "test")
    names = ("zero_shot", "smart", "lora")
    answers = [studies.right(one(found, dataset="sst", method=name), "test") for name in names]
    compared = [significance.paired_bootstrap(a, plain) for a in answers]
    corrected = significance.holm([comparison.p for comparison in compared])
    rows = cells(report.table(found, "toy"))
    for name, comparison, p in zip(names, compared, corrected, strict=True):
        shown = "<0.001" if p < 0.001 else f"{p:.3f}"
        assert rows[name][5] == f"{comparison.difference:+.3f} ({shown})"
    assert corrected != [comparison.p for comparison in compared]


def test_of_folds_the_difference_is_of_the_reviews_held_out(tmp_path):
    members = [study("cfimdb", "plain", 0.8, folds=5), study("cfimdb", "lora", 0.6, folds=5)]
    found = studies.load(synthetic.write(tmp_path, *members))
    plain, lora = (one(found, method=name, folds=5) for name in ("plain", "lora"))
    table = report.table(found, "toy")
    names = [name.strip() for name in table.splitlines()[0].split("|")]
    assert names[-3:-1] == ["CFIMDB 5-fold, minus plain (p)", "seeds"]
    of_lora = details.compare(lora, plain, "dev")
    assert cells(table)["lora"][-2] == f"{of_lora.difference:+.3f} ({details.p_value(of_lora.p)})"
    assert cells(table)["plain"][-2] == ""


def test_one_run_against_one_run_is_mcnemar(tmp_path):
    members = [study("sst", "plain", 0.5, seeds=(1,)), study("sst", "zero_shot", 0.35, seeds=(1,))]
    found = studies.load(synthetic.write(tmp_path, *members))
    of = {s["method"]: s for s in found}
    p = significance.mcnemar(*(studies.right(of[m], "test")[0] for m in ("zero_shot", "plain")))
    assert details.compare(of["zero_shot"], of["plain"], "test").p == p
    assert f"({p:.3f})" in cells(report.table(found, "toy"))["zero_shot"][3]


def test_without_plain_there_is_no_difference(found):
    row = cells(report.table(found, "other"))["mixout"]
    values = [run["dev"]["accuracy"] for run in one(found, model="other")["runs"]]
    assert row == ["100", mean_std(values), "3"]  # no column for what was not measured
    tables = report.tables(found).split("\n\n")
    assert tables == [report.table(found, "other"), report.table(found, "toy")]


def test_the_page_has_every_number_of_every_study(found, tmp_path):
    (tmp_path / "accuracy-toy.png").write_bytes(b"")
    page = details.page(found, tmp_path)
    titles = re.findall(r"^## (.*)", page, flags=re.M)
    assert titles == [
        *("other, CFIMDB", "toy, SST", "toy, SST, 10% of the training data", "toy, CFIMDB"),
        *("toy, CFIMDB, 3-fold cross-validation", "toy, CFIMDB, 5-fold cross-validation"),
        *("Figures", "Commands"),
    ]
    accuracy, cost = page.split("## toy, SST\n\n")[1].split("\n\n")[:2]
    lora = one(found, dataset="sst", method="lora")
    measured = [
        mean_std([run[split][key] for run in lora["runs"]])
        for split in ("dev", "test")
        for key in ("accuracy", "macro_f1", "ece")
    ]
    assert cells(accuracy)["lora"][:6] == measured
    group = studies.select(found, model="toy", dataset="sst", folds=None, train_share=1.0)
    compared = details.compare_with_plain(group, "test")["lora"]
    interval = f"{compared.difference:+.3f} [{compared.low:+.3f}, {compared.high:+.3f}]"
    assert cells(accuracy)["lora"][6].startswith(f"{interval} p ")  # of test, which chose nothing
    assert "| dev, minus plain" not in accuracy
    assert "| dev, minus plain" in page.split("## toy, CFIMDB\n\n")[1].split("\n\n")[0]
    assert cells(cost)["lora"] == ["60,000", "1.86", "lr 0.0003", "2", "cuda", "102", "403"]
    assert "(accuracy-toy.png)" in page
    assert "training-toy.png" not in page
    assert all(f"# {s['file']}\n{s['command']}" in page for s in found)
    assert page.count("McNemar") == 1


def test_a_soup_says_how_many_runs_it_is_of(tmp_path):
    soup = study("sst", "soup", seeds=(1,))
    soup["runs"][0] |= {"seeds": [1, 2, 3, 4], "ingredients": [2, 4]}
    found = studies.load(synthetic.write(tmp_path, soup, study("cfimdb", "soup", seeds=(1, 2))))
    assert cells(report.table(found, "toy"))["soup"][-1] == "2 of 4 (CFIMDB dev 2)"
    assert "| 2 of 4 |" in details.page(found, tmp_path)


def test_what_pretraining_took_stands_beside_the_seconds_of_a_run(tmp_path):
    pretrained = study("sst", "pretrain")
    for run in pretrained["runs"]:
        run["pretrain_seconds"] = 401.6
    page = details.page(studies.load(synthetic.write(tmp_path, pretrained)), tmp_path)
    assert "| 102 + 402 once |" in page
    pretrained["train_share"] = 0.025  # drawn by each seed, so that each reads sentences of its own
    page = details.page(studies.load(synthetic.write(tmp_path, pretrained)), tmp_path)
    assert "| 102 + 402 each |" in page
    assert "## toy, SST, 2.5% of the training data" in page


@pytest.mark.parametrize("key", ["dev", "test", "train", "pretrained_model_path"])
def test_studies_of_one_name_are_of_one_file(tmp_path, key):
    first, second = study("sst", "plain"), study("sst", "lora")
    for number, of in enumerate((first, second)):
        of["files"][f"{key}_sha256"] = str(number) * 64
    synthetic.write(tmp_path, first, second)
    with pytest.raises(ValueError, match=rf"sst-plain-toy.json: {key}_sha256 of .*same file"):
        studies.load(tmp_path)


def test_a_resumed_run_and_a_soup_may_have_no_seconds_and_no_memory(tmp_path):
    unknown = study("sst", "plain", 0.5)
    for run in unknown["runs"]:
        run.update(seconds=None, peak_memory_mb=None, history=[], best_epoch=None)
    page = details.page(studies.load(synthetic.write(tmp_path, unknown)), tmp_path)
    assert "| plain | 3,221,952 | 100 | lr 0.0003 | 2 | cpu |  |  |" in page


def test_what_is_unfinished_is_named_and_not_counted(tmp_path):
    half, none = study("cfimdb", "plain", 0.8, folds=5), study("sst", "plain")
    half["runs"].pop()
    none.update(runs=[], chosen=None)
    half, none = studies.load(synthetic.write(tmp_path, half, none))
    assert list(studies.unfinished(half)) == [
        "cfimdb-plain-toy-cv5.json: seed 3 has 4 of 5 folds and is left out"
    ]
    assert list(studies.unfinished(none)) == ["sst-plain-toy.json: has no run yet"]
    assert len(studies.measured(half, "dev")) == len(studies.right(half, "dev")) == 2
    assert cells(report.table([half, none], "toy"))["plain"][-1] == "2"


def put(key, value):
    return lambda content: content.update({key: value})


def put_in_run(key, value):
    return lambda content: content["runs"][0].update({key: value})


def put_in_test(key, value):
    return lambda content: content["runs"][0]["test"].update({key: value})


def add_to_accuracy(content, amount):
    content["runs"][0]["test"]["accuracy"] += amount


def test_an_accuracy_may_differ_by_rounding_alone(tmp_path):
    content = study("sst", "plain", 0.5)
    add_to_accuracy(content, 1e-9)
    assert len(studies.load(synthetic.write(tmp_path, content))) == 1


@pytest.mark.parametrize("fold", [-1, 5])
def test_a_fold_that_there_is_not_is_named(tmp_path, fold):
    content = study("cfimdb", "plain", 0.5, folds=5)
    content["runs"][0]["fold"] = fold
    synthetic.write(tmp_path, content)
    with pytest.raises(ValueError, match=f"seed 1, fold {fold}: is no fold of 5"):
        studies.load(tmp_path)


def test_all_models_are_judged_by_the_same_gold_labels(tmp_path):
    ours, theirs = study("sst", "plain", 0.5), study("sst", "plain", 0.5, model="other")
    of_run = theirs["runs"][1]["dev"]
    gold = next(i for i, row in enumerate(of_run["confusion"]) if row[i])
    of_run["confusion"][gold][gold] -= 1
    of_run["confusion"][gold - 1][gold - 1] += 1
    synthetic.write(tmp_path, ours, theirs)
    with pytest.raises(ValueError, match="evaluate both on the same sentences"):
        studies.load(tmp_path)


def test_where_a_seed_was_not_evaluated_no_mean_is_made_of_the_others(tmp_path):
    content = study("sst", "plain", 0.5)
    content["runs"][-1]["test"] = None
    (loaded,) = studies.load(synthetic.write(tmp_path, content))
    assert len(studies.measured(loaded, "dev")) == 3
    assert studies.measured(loaded, "test") == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda content: content.pop("chosen"), "study lacks chosen"),
        (lambda content: content["settings"].pop("device"), "list of settings lacks device"),
        (lambda content: content["runs"][1].pop("dev"), "run lacks dev"),
        (lambda content: content["runs"][1]["test"].pop("ece"), "lacks ece"),
        (put_in_run("seed", 2), "seed 2, fold None: stands there twice"),
        (put_in_run("fold", 1), "is no fold of None"),
        (put_in_run("dev", None), "has no dev"),
        (put("chosen", {"lr": 0.1}), "lr is 0.0003, chosen was 0.1"),
        (put("n_labels", 2), "confusion is"),
        (put_in_test("right", "1" * 79), "79 answers"),
        (put_in_test("right", "2" * 80), "80 answers of 0 or 1"),
        (put_in_test("right", "1" * 80), "80 right answers"),
        (put_in_test("accuracy", 0.99), r"accuracy 0\.99 do not agree"),
        (lambda content: add_to_accuracy(content, 1e-5), "do not agree"),
        (put("runs", None), "its runs are of another type"),
        (put("files", [1]), "its files are of another type"),
        (put("chosen", [1]), "its chosen are of another type"),
        (put("runs", [1]), "not of a study's form"),
        (put_in_run("hyperparameters", [1]), "not of a study's form"),
    ],
)
def test_a_file_that_lacks_or_contradicts_is_named_in_one_line(tmp_path, spoil, words):
    content = study("sst", "plain", 0.5)
    spoil(content)
    synthetic.write(tmp_path, content)
    with pytest.raises(ValueError, match=rf"sst-plain-toy\.json: .*{words}") as error:
        studies.load(tmp_path)
    assert "\n" not in str(error.value)


def test_other_json_files_are_no_studies_and_broken_ones_are_named(tmp_path):
    for name, text in (("speed.json", '{"rows": []}'), ("list.json", "[1]")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert studies.load(tmp_path) == []
    (tmp_path / "sst-x.json").write_text('{"method": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"sst-x\.json: is no JSON"):
        studies.load(tmp_path)


def test_two_files_of_one_kind_and_other_sentences_are_refused(tmp_path):
    synthetic.write(tmp_path, study("sst", "plain"))
    content = (tmp_path / "sst-plain-toy.json").read_text(encoding="utf-8")
    (tmp_path / "sst-copy.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"same kind as sst-copy\.json"):
        studies.load(tmp_path)
    (tmp_path / "sst-copy.json").unlink()
    synthetic.write(tmp_path, study("sst", "lora", n=(61, 80)))
    with pytest.raises(ValueError, match=r"sst-plain-toy\.json: dev has .* same sentences"):
        studies.load(tmp_path)


def test_the_command_writes_the_readmes_and_the_page(found, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "project" / "results"
    folder.mkdir(parents=True)
    synthetic.write(folder, *found)
    names = ("results.report", "speed")
    marks = "".join(f"<!-- {name} begins -->\n<!-- {name} ends -->\n" for name in names)
    readme = folder.parent / "README.md"
    readme.write_text(f"before\n{marks}after\n", encoding="utf-8")
    monkeypatch.setattr(report, "FOLDER", folder)
    report.main([])
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- results.report begins -->\n| other, mean")
    assert f"\n\n{report.table(found, 'toy')}\n<!-- results.report ends -->\n" in text
    assert text.endswith("<!-- speed ends -->\nafter\n")
    assert report.tables(found) in capsys.readouterr().out
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert page == details.page(studies.load(folder), folder)
    assert not list(folder.glob("*.png"))


def test_the_command_draws_where_it_is_asked_to(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="a development extra")
    synthetic.write(tmp_path, study("sst", "plain"), study("sst", "lora"))
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    monkeypatch.setattr(report, "READMES", ())
    report.main(["--plot"])
    out = capsys.readouterr().out
    assert f"wrote {tmp_path / 'accuracy-toy.png'}" in out
    assert "wise_ft-toy.png: skipped, needs a run with alphas" in out
    assert "![Accuracy of each" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_insertion_replaces_what_stands_between_the_marks_alone():
    text = "before\n<!-- it begins -->\nold\n<!-- it ends -->\nafter\n"
    expected = "before\n<!-- it begins -->\nnew\n<!-- it ends -->\nafter\n"
    assert report.insert(text, "new", "it") == expected
    assert report.insert(text, "new", "other") == text


@pytest.fixture(scope="module")
def tables():
    """As `python -m results.report` writes them from the files that are here."""
    return report.tables(report.load(report.FOLDER)), report.speed_table()


@pytest.mark.parametrize("name", report.READMES)
def test_the_readmes_show_what_the_files_say(name, tables):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert report.with_tables(text, *tables) == text
    assert ("<!-- speed begins -->" in text) == (not name.startswith("data"))


def test_the_page_shows_what_the_files_say():
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    assert details.page(report.load(report.FOLDER), report.FOLDER) == text


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
