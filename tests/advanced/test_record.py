"""The figures of a run against scikit-learn, and what a record keeps, skips and refuses."""

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from advanced.record import Record, figures

IDENTITY = {"dataset": "toy", "settings": {"epochs": 2, "targets": ["w1"]}}


def random_predictions(n: int = 200, n_labels: int = 5):
    labels, predictions = np.random.randint(0, n_labels, (2, n))
    return predictions.tolist(), labels.tolist(), np.random.uniform(0.2, 1.0, n).tolist()


@pytest.mark.parametrize("n_occurring", [5, 3])
def test_figures_are_those_of_scikit_learn(n_occurring):
    predictions, labels, confidences = random_predictions(n_labels=n_occurring)
    ours = figures(predictions, labels, confidences, 5)
    assert ours["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    macro_f1 = f1_score(labels, predictions, average="macro", zero_division=0.0)
    assert ours["macro_f1"] == pytest.approx(macro_f1)
    assert ours["confusion"] == confusion_matrix(labels, predictions, labels=range(5)).tolist()
    assert [c == "1" for c in ours["right"]] == [
        a == b for a, b in zip(labels, predictions, strict=True)
    ]


def test_the_calibration_error_is_the_mean_gap_weighted_by_the_bins_counts():
    predictions, labels = [0, 0, 0, 0, 1], [0, 1, 0, 0, 1]
    confidences = [0.95, 0.91, 0.51, 0.55, 1.0]  # a confidence of 1 belongs to the last bin
    ours = figures(predictions, labels, confidences, 2)
    # [0.5, 0.6): two right at 0.53 on average; [0.9, 1]: two of three right at 0.9533
    assert ours["reliability"]["count"] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 3]
    assert ours["ece"] == pytest.approx(2 / 5 * (1 - 0.53) + 3 / 5 * (2.86 / 3 - 2 / 3))


def test_what_has_no_gold_labels_has_no_figures():
    ours = figures([0, 1], [-1, -1], [0.5, 0.9], 2)
    assert ours == {"n_sentences": 2, "accuracy": None, "macro_f1": None}


def test_sentences_without_a_gold_label_do_not_count():
    ours = figures([0, 1, 0, 1], [0, -1, 1, 1], [0.5, 0.9, 0.6, 0.7], 2)
    assert ours == figures([0, 0, 1], [0, 1, 1], [0.5, 0.6, 0.7], 2)
    assert ours["accuracy"] == pytest.approx(2 / 3)


def entry(seed: int, lr: float = 0.1, accuracy: float | None = 0.5) -> dict:
    hyperparameters = {"lr": lr}
    dev = {"accuracy": accuracy}
    return {"seed": seed, "fold": None, "hyperparameters": hyperparameters, "dev": dev}


def test_what_was_added_is_found_by_the_next_process(tmp_path):
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
    record.add("trials", {**entry(7, 0.4, 0.9)})  # of another seed, from an earlier command
    record.add("trials", entry(1, 0.5, None))  # diverged
    assert record.choose(1) == {"lr": 0.2}
    content = json.loads(record.path.read_text(encoding="utf-8"))
    assert content["runs"] == [entry(1, 0.2, 0.6)] and content["trials"] == []
    assert [trial["dev_accuracy"] for trial in content["search"]] == [0.4, 0.6, 0.6, None]


def test_where_every_trial_diverged_there_is_nothing_to_choose(tmp_path):
    record = Record(tmp_path / "toy.json", IDENTITY, "command")
    record.add("trials", entry(1, 0.1, None))
    with pytest.raises(ValueError, match="every trial of the grid diverged"):
        record.choose(1)


def test_a_record_of_other_settings_is_refused_with_what_differs(tmp_path):
    path = tmp_path / "toy.json"
    Record(path, IDENTITY, "first").write()
    other = {**IDENTITY, "settings": {"epochs": 3, "targets": ["w1"]}}
    with pytest.raises(ValueError, match=r"toy\.json: .*epochs: 2 there, 3 here.*--name"):
        Record(path, other, "second")


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{", '{"runs": 1}', '{"dataset": "toy"}', "[" * 100_000),
        *('{"runs": [], "trials": []}', '{"chosen": 1, "runs": [], "trials": []}'),
        *(
            f'{{"chosen": null, "trials": [], "runs": [{run}]}}'
            for run in ("1", "{}", '{"seed": 1}')
        ),
    ],
    ids=range(11),
)
def test_a_file_that_is_no_record_is_a_line(tmp_path, content):
    path = tmp_path / "toy.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="is no record of runs"):
        Record(path, IDENTITY, "command")
