"""An output file passes if it is what run_llama.py writes for its split, and if not it says why."""

import random
from pathlib import Path

import pytest

import outputs
import run_llama
from advanced import run as advanced_run
from conftest import shared_asset
from submission import MAPPINGS, OUTPUTS, SENTENCES, predictions, put, put_splits
from training.labelled import read_sentences

NAME = "sst-dev-prompting-output.txt"
RIGHT = predictions("sst", "dev")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The folder that is looked into where a submission brings no truth of its own."""
    monkeypatch.setattr(outputs, "DATA", put_splits(tmp_path / "data"))
    put(tmp_path, MAPPINGS)
    return tmp_path / "data"


def check(contents: dict[str, str | bytes], splits=None) -> list[str]:
    raw = {k: v.encode() if isinstance(v, str) else v for k, v in contents.items()}
    references = outputs.find_references(raw, splits or {})
    return list(outputs.output_problems(raw, references))


@pytest.mark.parametrize("seed", range(20))
def test_what_run_llama_writes_passes_byte_for_byte(data, tmp_path, seed):
    draw = random.Random(seed)
    letters = "ab |\t\u2028\x85\x1c\x0bé😀'\"\\0"
    lines = ["".join(draw.choices(letters, k=30)) + "x" for _ in range(20)]
    text = draw.choice(["\n", "\r\n"]).join(f" {draw.randrange(3)} ||| {line}" for line in lines)
    (data / "sst-dev.txt").write_bytes(b"\xef\xbb\xbf" * (seed % 2) + text.encode() + b"\n\n")
    sentences = [sentence for sentence, _ in read_sentences(data / "sst-dev.txt")]
    labels = [draw.randrange(3) for _ in sentences]
    run_llama.write_predictions_to_file("dev", str(tmp_path / NAME), 0.5, labels, sentences)
    content = (tmp_path / NAME).read_bytes()
    assert check({NAME: content}) == []
    assert check({NAME: content.rstrip(b"\n").replace(b"\n", b"\r\n")}) == []
    assert len(check({NAME: content.replace(b"x\n", b"y\n", 1)})) == 1


@pytest.mark.parametrize("name", [*OUTPUTS, *outputs.PAIRS[0], *outputs.PAIRS[1]])
def test_what_run_llama_writes_for_the_real_data_passes_and_only_for_its_own_split(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr(outputs, "DATA", shared_asset("data/cfimdb-test.txt").parent)
    corpus, split = name.split("-")[:2]
    for other in SENTENCES:
        rows = read_sentences(shared_asset(f"data/{other}.txt"), unlabelled=True)
        sentences = [sentence for sentence, _ in rows]
        labels = [i % 2 for i in range(len(sentences))]
        run_llama.write_predictions_to_file(split, str(tmp_path / name), None, labels, sentences)
        found = check({name: (tmp_path / name).read_bytes()})
        if other == f"{corpus}-{split}":
            assert found == []
        else:
            (line,) = found
            assert f"holds the sentences of data/{other}.txt, not of" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RIGHT.replace("0 |||", "zero |||"), "1: label 'zero' is not an integer"),
        (RIGHT.replace("1 |||", "3 |||"), "2: label 3 does not exist; labels are 0 to 2 by data/"),
        (RIGHT.replace("1 |||", "-1 |||"), "2: label -1 does not exist; labels are 0 to 2"),
        (RIGHT.replace("1 |||", "-2 |||"), "2: label -2 does not exist"),
        (RIGHT.replace(" ||| sst in dev a", " sst in dev a"), "2: label '1 sst in dev a' is not"),
        (RIGHT.replace("0 |||", "0,"), "1: '0, sst in dev is good' has no separator"),
        (RIGHT + "\n", "5: '' has no separator"),
        (
            RIGHT.replace("dev é", "dev E"),
            "3: 'sst in dev E' stands where data/sst-dev.txt has 'sst",
        ),
        (RIGHT + "1 ||| more\n", "5: 'more' stands where data/sst-dev.txt has ended (5 lines"),
        (RIGHT[: RIGHT.rindex("1 |||")], "4: the file ends where data/sst-dev.txt has 'sst in"),
        ("".join(reversed(RIGHT.splitlines(True))), "1: 'sst in dev was bad' stands where"),
        (RIGHT.encode("latin-1"), "3: byte 0xe9 is not UTF-8"),
        (
            predictions("sst", "test"),
            " holds the sentences of data/sst-test.txt, not of data/sst-dev",
        ),
        (predictions("cfimdb", "dev"), " holds the sentences of data/cfimdb-dev.txt, not of data/"),
        ("0 ||| a\n" * 10_001, " 10,001 lines, where no split has more than 10,000"),
    ],
)
def test_each_wrong_file_is_one_violation_with_its_first_wrong_line_and_the_remedy(
    data, text, expected
):
    (line,) = check({NAME: text})
    assert line.startswith(f"{NAME}:{expected}")
    assert "; write it again: run_llama.py --option prompt --train data/sst-train.txt --dev" in line


def test_the_remedy_names_option_and_split_of_the_file(data):
    found = check(dict.fromkeys((*OUTPUTS, *outputs.PAIRS[1]), "0 ||| x\n"))
    for name, line in zip(sorted((*OUTPUTS, *outputs.PAIRS[1])), found, strict=True):
        corpus, split, option, _ = name.split("-")
        assert line.startswith(f"{name}:1: 'x' stands where data/{corpus}-{split}.txt has ")
        command = line.split("; write it again: ")[1].removeprefix("python -m advanced.run ")
        if option == "advanced":
            args = advanced_run.get_args(command.split())
        else:
            args = run_llama.get_args(command.removeprefix("run_llama.py ").split())
            assert args.option == {"prompting": "prompt", "finetuning": "finetune"}[option]
        assert Path(args.train).name == f"{corpus}-train.txt"
        assert Path(getattr(args, split)).name == f"{corpus}-{split}.txt"
        assert Path(args.label_names).name == f"{corpus}-label-mapping.json"
        assert getattr(args, f"{split}_out") == name


def test_long_sentences_are_shown_where_they_differ(data):
    (data / "sst-dev.txt").write_text(f"0 ||| {'a' * 900}X{'b' * 900}\n", encoding="utf-8")
    (line,) = check({NAME: f"0 ||| {'a' * 900}Y{'c' * 900}\n"})
    assert f"'...{'a' * 15}Y{'c' * 24}...' stands where" in line
    assert f" has '...{'a' * 15}X{'b' * 24}...'" in line and len(line) < 500


def test_without_its_split_a_file_is_checked_for_form_and_labels_and_the_note_says_so(data):
    (data / "sst-dev.txt").unlink()
    assert check({NAME: "0 ||| whatever\n"}) == []
    assert "1: label 3 does not exist" in check({NAME: "3 ||| whatever\n"})[0]
    assert (
        "holds the sentences of data/sst-test.txt" in check({NAME: predictions("sst", "test")})[0]
    )
    (data / "sst-label-mapping.json").unlink()
    assert check({NAME: "3 ||| whatever\n"}) == []
    (line,) = check({NAME: "-1 ||| whatever\n"})
    assert "label -1 does not exist; labels are 0, 1, 2, ...;" in line
    assert outputs.find_references({}, {}).note() == (
        "note: not checked: sentences, for want of data/sst-dev.txt; "
        "the largest label, for want of data/sst-label-mapping.json"
    )


def test_the_truth_of_the_submission_goes_before_ours(data, tmp_path):
    put(tmp_path / "own", {"sst-dev.txt": "0 ||| only this\n"})
    splits = {"data/sst-dev.txt": tmp_path / "own/sst-dev.txt"}
    assert check({NAME: "1 ||| only this\n"}, splits) == []
    assert len(check({NAME: RIGHT}, splits)) == 1
    own = {"data/sst-label-mapping.json": '["a", "b"]'}
    assert check({NAME: RIGHT, **own}) == []
    (line,) = check({NAME: RIGHT.replace("1 |||", "2 |||"), **own})
    assert "labels are 0 to 1" in line
    assert outputs.find_references({}, {}).note() is None


@pytest.mark.parametrize(
    "text", ["[", '["a"]', "[" * 5000, "[" * 900 + "]" * 900, '{"a": 1}', b"\xff"]
)
def test_a_broken_mapping_is_one_violation_and_not_said_to_be_absent(data, text):
    contents = {name: predictions(*name.split("-")[:2]) for name in OUTPUTS}
    (line,) = check({**contents, "data/sst-label-mapping.json": text})
    assert line.startswith("data/sst-label-mapping.json:") and len(line) < 300
    raw = text if isinstance(text, bytes) else text.encode()
    assert outputs.find_references({"data/sst-label-mapping.json": raw}, {}).note() is None


def test_a_broken_or_enormous_split_is_a_violation_and_not_compared_with(data):
    (data / "sst-dev.txt").write_text("good\n", encoding="utf-8")
    with open(data / "sst-test.txt", "wb") as file:
        file.truncate(2**33)
    lines = check({NAME: "0 ||| whatever\n"})
    assert [line[:18] for line in lines] == ["data/sst-dev.txt:1", "data/sst-test.txt:"]
    assert outputs.find_references({}, {}).note() is None


@pytest.mark.parametrize("content", [b"a story", "é".encode(), b"\xef\xbb\xbfa"])
def test_a_generated_sentence_is_any_text(data, content):
    assert check({"generated-sentence-temp-0.txt": content}) == []
    (line,) = check({"generated-sentence-temp-0.txt": content + b"\n\xff"})
    assert line.startswith("generated-sentence-temp-0.txt:2: byte 0xff is not UTF-8")


@pytest.mark.parametrize("content", ["", " \t\r\n\x0b\x0c", "\ufeff\n", "\u2003\u2028"])
def test_white_space_is_blank_and_left_to_the_caller(data, content):
    assert outputs.is_blank(content.encode())
    assert check({NAME: content, "generated-sentence-temp-0.txt": content}) == []
    assert not outputs.is_blank(f"{content}.".encode())
