"""results/figures.py and curves.py: what is drawn are the numbers of the files."""

import numpy as np
import pytest

import synthetic_studies as synthetic
from conftest import ROOT
from results import curves, figures, studies, style

pytest.importorskip("matplotlib", reason="a development extra")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Every kind of study once."""
    study, folder = synthetic.study, tmp_path_factory.mktemp("results")
    synthetic.write(
        folder,
        study("sst", "zero_shot", 0.2, seeds=(1,), n_trained=0),
        study("sst", "plain", 0.5),
        study("sst", "lora", 0.45, n_trained=60_000),
        study("sst", "wise_ft", 0.6, alphas=True),
        study("sst", "plain", 0.4, train_share=0.1),
        study("cfimdb", "plain", 0.9),
        study("cfimdb", "smart", 0.95),
        study("cfimdb", "plain", 0.9, seeds=(1, 2), folds=3),
        study("cfimdb", "lora", 0.9, seeds=(1, 2), folds=3),
    )
    return studies.load(folder)


def only(found, **wanted):
    (one,) = studies.select(found, **{"train_share": 1.0, "folds": None, **wanted})
    return one


def accuracies(found, split, **wanted):
    return [run[split]["accuracy"] for run in only(found, **wanted)["runs"]]


def mean_std(values):
    return np.mean(values), (np.std(values, ddof=1) if len(values) > 1 else 0.0)


def panel_of(figure, title):
    (panel,) = [panel for panel in figure.axes if panel.get_title() == title]
    return panel


def points(container):
    """(x, y, half the length of the bar) of one errorbar."""
    line, _, (bars,) = container
    (segment,) = bars.get_segments()
    return *line.get_xydata()[0], np.ptp(segment, axis=0).max() / 2


def test_a_dot_is_the_mean_and_its_bar_the_deviation_over_seeds(found):
    figure = figures.accuracy(found)
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == ["SST dev", "SST test", "CFIMDB dev", "CFIMDB 3-fold"]
    for title, split in (("SST dev", "dev"), ("SST test", "test")):
        panel = panel_of(figure, title)
        names = [label.get_text() for label in panel.get_yticklabels()]
        assert names[:2] == ["zero_shot", "plain"]  # the best on dev behind them
        assert names[2:] == ["wise_ft", "lora"]
        for name, container in zip(names, panel.containers, strict=True):
            x, y, half = points(container)
            values = accuracies(found, split, dataset="sst", method=name)
            assert (x, half) == pytest.approx(mean_std(values))
            assert names[int(y)] == name


def test_a_split_with_one_method_has_no_panel(found):
    figure = figures.accuracy([s for s in found if not (s["folds"] and s["method"] == "lora")])
    assert [panel.get_title() for panel in figure.axes] == ["SST dev", "SST test", "CFIMDB dev"]
    assert figures.accuracy(studies.select(found, method="zero_shot")) is None


def test_lines_stand_at_plain_and_at_the_published_and_zero_shot_is_written(found):
    panel = panel_of(figures.accuracy(found), "SST dev")
    plain = accuracies(found, "dev", dataset="sst", method="plain")
    drawn = {line.get_label(): line.get_xdata()[0] for line in panel.lines}
    assert drawn["plain"] == pytest.approx(np.mean(plain))
    written = [text.get_text() for text in panel.texts]
    (zero_shot,) = only(found, dataset="sst", method="zero_shot")["runs"]
    assert written == [f"\u2190 {zero_shot['dev']['accuracy']:.3f}"]
    low, high = panel.get_xlim()
    assert ("published, stories42M" in drawn) == (low <= 0.414 <= high)
    assert "published 0.800" in panel_of(figures.accuracy(found), "CFIMDB dev").get_xlabel()


def test_a_method_far_from_the_others_is_written_and_leaves_the_axis_to_them(tmp_path):
    accuracy = {"plain": 0.45, "lora": 0.46, "adapter": 0.44, "mixout": 0.45, "head": 0.15}
    members = [synthetic.study("sst", method, at) for method, at in accuracy.items()]
    found = studies.load(synthetic.write(tmp_path, *members))
    panel = panel_of(figures.accuracy(found), "SST dev")
    names = [label.get_text() for label in panel.get_yticklabels()]
    (written,) = panel.texts
    head = accuracies(found, "dev", dataset="sst", method="head")
    assert written.get_text() == f"\u2190 {studies.mean_std(head)}"
    assert names[round(written.get_position()[1])] == "head"
    low, high = panel.get_xlim()
    for name in accuracy:
        mean, std = mean_std(accuracies(found, "dev", dataset="sst", method=name))
        assert (low <= mean - std and mean + std <= high) == (name != "head")


@pytest.mark.parametrize(
    ("means", "bar", "axis"),
    [
        ([0.44, 0.445, 0.45, 0.455, 0.46, 0.9], 0.0, (0.44, 0.46)),  # the last far out, above
        ([0.1, 0.44, 0.445, 0.45, 0.455, 0.46], 0.01, (0.43, 0.47)),
        ([0.4, 0.5], 0.0, (0.4, 0.5)),
        ([0.5], 0.0, (0.5, 0.5)),
        # far out by the quartiles, but on the axis that the bars of the others need
        ([0.42, 0.45, 0.451, 0.452, 0.453], 0.03, (0.39, 0.483)),
    ],
)
def test_an_axis_holds_the_dots_that_are_not_far_out_and_all_of_their_bars(means, bar, axis):
    low, high = figures._limits([(mean, bar) for mean in means])
    pad = 0.08 * max(axis[1] - axis[0], figures.NARROW)
    assert (low, high) == pytest.approx((axis[0] - pad, axis[1] + pad))


def test_a_method_far_above_is_written_on_the_other_side(tmp_path):
    level = ("plain", "lora", "adapter", "mixout", "norms", "head")
    members = [synthetic.study("sst", name, 0.2) for name in level]
    members.append(synthetic.study("sst", "prompt", 0.95))
    found = studies.load(synthetic.write(tmp_path, *members))
    (written,) = panel_of(figures.accuracy(found), "SST dev").texts
    assert written.get_text().endswith(" \u2192") and written.get_position()[0] > 0.5


def test_trained_parameters_of_one_power_of_ten_have_more_than_one_tick(tmp_path):
    assert style.round_numbers(5, 20) == [5, 10, 20]
    members = [synthetic.study("sst", "plain", 0.5), synthetic.study("sst", "lora", 0.5)]
    for content, n in zip(members, (260_162, 23_250), strict=True):
        for run in content["runs"]:
            run.update(trainable_parameters=n, parameters=260_162)
    found = studies.load(synthetic.write(tmp_path, *members))
    (panel,) = figures.parameters(found).axes
    assert [label.get_text() for label in panel.get_xticklabels()] == [
        *("50,000", "100,000", "200,000")
    ]
    assert panel.get_xticks().tolist() == [50_000, 100_000, 200_000]
    assert not len(panel.get_xticks(minor=True))


def test_without_plain_no_two_methods_are_shown_as_the_baseline_and_the_best(found):
    assert figures.confusion([study for study in found if study["method"] != "plain"]) is None


def test_a_confusion_matrix_has_rows_of_one_and_counts_summed_over_seeds(found):
    figure = figures.confusion(found)
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == [
        "SST test, plain",
        "SST test, wise_ft",
        "CFIMDB dev, plain",
        "CFIMDB dev, smart",
    ]
    panel = panel_of(figure, "SST test, plain")
    runs = only(found, dataset="sst", method="plain")["runs"]
    counts = sum(np.array(run["test"]["confusion"]) for run in runs)
    shares = np.array(panel.images[0].get_array())
    np.testing.assert_allclose(shares, counts / counts.sum(axis=1, keepdims=True))
    written = [int(text.get_text().split("\n")[1]) for text in panel.texts]
    assert written == counts.ravel().tolist()
    assert [label.get_text() for label in panel.get_xticklabels()] == list(figures.LABELS["sst"])


def test_training_curves_and_alphas_are_means_over_seeds(found):
    panel = panel_of(curves.training(found), "SST dev")
    assert [line.get_label() for line in panel.lines] == ["plain", "wise_ft", "lora"]
    for line in panel.lines:
        runs = only(found, dataset="sst", method=line.get_label())["runs"]
        rows = [[epoch["dev_accuracy"] for epoch in run["history"]] for run in runs]
        np.testing.assert_allclose(line.get_ydata(), np.mean(rows, axis=0))
    (panel,) = curves.wise_ft(found).axes
    (line,) = panel.lines
    runs = only(found, method="wise_ft")["runs"]
    rows = [[point["dev_accuracy"] for point in run["alphas"]] for run in runs]
    np.testing.assert_allclose(line.get_xydata()[:, 0], np.linspace(0, 1, 11))
    np.testing.assert_allclose(line.get_ydata(), np.mean(rows, axis=0))
    band = panel.collections[0].get_paths()[0].vertices[:, 1]
    std = np.std(rows, axis=0, ddof=1)
    assert band.max() == pytest.approx((np.mean(rows, axis=0) + std).max())
    assert band.min() == pytest.approx((np.mean(rows, axis=0) - std).min())


def test_curves_of_unequal_length_are_cut_to_the_shortest():
    mean, std = style.mean_and_std([[0.1, 0.2, 0.9], [0.3, 0.6]])
    assert mean == pytest.approx([0.2, 0.4])
    assert std == pytest.approx([0.2 / np.sqrt(2), 0.4 / np.sqrt(2)])
    assert style.mean_and_std([[0.5, 0.6]])[1].tolist() == [0, 0]


def test_accuracy_stands_over_the_parameters_that_are_trained(found):
    (panel,) = figures.parameters(found).axes  # on CFIMDB all methods train as many
    assert (panel.get_title(), panel.get_xscale()) == ("SST test", "log")
    drawn = {container.get_label(): points(container) for container in panel.containers}
    assert set(drawn) == {"plain", "lora", "others that train all weights"}  # zero_shot: none
    values = accuracies(found, "test", dataset="sst", method="lora")
    x, y, half = drawn["lora"]
    assert x == 60_000
    assert (y, half) == pytest.approx(mean_std(values))


def test_accuracy_stands_over_the_share_of_training_data(found):
    (panel,) = curves.train_size(found).axes
    (container,) = panel.containers
    assert container.get_label() == "plain"
    small, whole = (
        studies.measured(only(found, dataset="sst", method="plain", train_share=share), "test")
        for share in (0.1, 1.0)
    )
    expected = [[10, np.mean(small)], [100, np.mean(whole)]]
    np.testing.assert_allclose(container[0].get_xydata(), expected)
    assert [label.get_text() for label in panel.get_xticklabels()] == ["10", "100"]


def test_reliability_is_of_all_seeds_sentences(found):
    panel = panel_of(curves.reliability(found), "SST test")
    diagonal, plain, *_ = panel.lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    runs = only(found, dataset="sst", method="plain")["runs"]
    tables = [run["test"]["reliability"] for run in runs]
    expected = []
    for i in range(10):
        n = [table["count"][i] for table in tables]
        if sum(n) >= 10:
            point = [
                sum(k * table[key][i] for k, table in zip(n, tables, strict=True) if k) / sum(n)
                for key in ("confidence", "accuracy")
            ]
            expected.append(point)
    np.testing.assert_allclose(plain.get_xydata(), expected)
    counts = np.sum([table["count"] for table in tables], axis=0)
    assert ((counts > 0) & (counts < 10)).any()  # so that one is left out
    ece = np.mean([run["test"]["ece"] for run in runs])
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert f"plain: {ece:.3f}" in labels


def test_all_figures_are_small_pngs_and_what_lacks_data_is_named(found, tmp_path):
    lines = list(figures.draw_all(found, tmp_path))
    assert lines == [f"wrote {tmp_path / f'{name}-toy.png'}" for name in figures.FIGURES]
    for name in figures.captions(found):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) < 150_000
    alone = studies.select(found, method="zero_shot")
    lines = list(figures.draw_all(alone, tmp_path))
    skipped = {line.partition("-toy.png: skipped, needs ")[0] for line in lines}
    assert skipped == set(figures.FIGURES)
    assert not list(tmp_path.glob("*.png"))  # the earlier ones would show what is measured no more
    assert list(figures.draw_all([], tmp_path)) == []


def test_a_method_looks_the_same_everywhere_and_like_no_other(found):
    looks = [tuple(style.method_style(name).values()) for name in (*style._FIXED, *style._METHODS)]
    assert len(set(looks)) == len(looks)
    measured = {study["method"] for study in studies.load(ROOT / "results")}
    assert len({tuple(style.method_style(name).values()) for name in measured}) == len(measured)
    expected = {"color": "#D55E00", "marker": "v", "linestyle": "--"}
    assert style.method_style("some+new") == expected  # in every process, unlike `hash`
    color = style.method_style("wise_ft")["color"]
    for figure in (curves.training(found), curves.wise_ft(found)):
        lines = [line for panel in figure.axes for line in panel.lines]
        assert {line.get_color() for line in lines if line.get_label() == "wise_ft"} == {color}
