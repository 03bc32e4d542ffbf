"""tools.predict: probabilities against the model called alone, the stream, files and formats."""

import csv
import io
import itertools
import json
import os
import select
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from conftest import LABEL_NAMES, ROOT, ended
from helpers import error_line, write_classifier
from tools import lines as reading
from tools import predict
from tools.lines import Line, in_blocks, read_column, read_lines
from tools.predict import load_predictor
from training.evaluation import evaluate
from utils import InputError

SENTENCES = ["this film is good", "a bad movie", "her story was not so bad as all that", "warm"]


def alone(sentence: str) -> list[float]:
    """The probabilities of a sentence by itself, straight from the model."""
    predictor = load_predictor("kept.pt")
    ids = torch.tensor([predictor.tokenizer.encode(sentence, bos=True, eos=False)])
    with torch.no_grad():
        return predictor.model(ids, lengths=torch.tensor([ids.shape[1]])).exp()[0].tolist()


@pytest.fixture
def command(workplace, capsys):
    """command(...) runs tools.predict on kept.pt: exit code, output, errors."""
    write_classifier("kept.pt")
    return lambda *argv: ended(lambda: predict.main(["--checkpoint", "kept.pt", *argv]), capsys)


@pytest.fixture
def rows(command):
    """rows(...) are the objects that --format jsonl writes."""

    def call(*argv: str) -> list[dict]:
        code, out, err = command("--format", "jsonl", *argv)
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()]

    return call


# ---------------------------------------------------------------- probabilities


def test_a_masked_model_gives_each_sentence_the_same_in_a_batch_as_alone(rows):
    for row, sentence in zip(rows("--batch_size", "3", *SENTENCES), SENTENCES, strict=True):
        assert row["sentence"] == sentence
        assert list(row["probabilities"]) == LABEL_NAMES
        assert list(row["probabilities"].values()) == pytest.approx(alone(sentence), abs=1e-5)
        assert row["label"] == max(LABEL_NAMES, key=row["probabilities"].get)
        assert row["probability"] == row["probabilities"][row["label"]]


def test_quantize_stores_the_llama_as_int8_and_keeps_the_head(rows):
    with pytest.raises(InputError, match="neither None nor 'int8'"):
        load_predictor("kept.pt", quantize="int4")
    predictor = load_predictor("kept.pt", quantize="int8")
    assert predictor.model.llama.output.weight.dtype == torch.int8
    assert predictor.model.classifier_head.weight.dtype == torch.float32
    data, _ = predictor.encode(SENTENCES)
    expected = predictor.probs(data, 8).tolist()
    assert np.abs(np.array(expected) - [alone(s) for s in SENTENCES]).max() > 1e-4
    for row, probs in zip(rows("--quantize", "int8", *SENTENCES), expected, strict=True):
        assert list(row["probabilities"].values()) == pytest.approx(probs, abs=1e-6)


@pytest.mark.parametrize("mode", [("last", "causal"), ("position", "full")])
def test_predictions_and_scores_of_a_file_are_those_of_evaluate(command, rows, mode, monkeypatch):
    """Also where a read ends within a batch, whose padding the assignment's mode reads."""
    monkeypatch.setattr(reading, "READ_SIZE", 50)
    monkeypatch.setattr(predict, "BATCHES_PER_BLOCK", 2)
    write_classifier("kept.pt", *mode)
    golds = [int(g) for g in "01101001011011"]
    sentences = [" ".join(SENTENCES[: 1 + i % 4]) for i in range(len(golds))]
    text = "".join(f"{g} ||| {s}\n" for g, s in zip(golds, sentences, strict=True))
    Path("x.txt").write_text(text, encoding="utf-8")
    predictor = load_predictor("kept.pt")
    data, _ = predictor.encode(sentences)
    data.examples = [e._replace(label=g) for e, g in zip(data.examples, golds, strict=True)]
    expected = evaluate(predictor.model, data, 3, predictor.device)

    found = rows("--input", "x.txt", "--batch_size", "3")
    assert [LABEL_NAMES.index(row["label"]) for row in found] == expected.predictions
    assert [row["probability"] for row in found] == pytest.approx(expected.confidences, abs=1e-5)
    err = command("--input", "x.txt", "--batch_size", "3")[2]
    assert f"acc :: {expected.accuracy:.3f} of 14, macro f1 :: {expected.macro_f1:.3f}\n" in err


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1))
def test_the_summary_is_that_of_the_pairs_it_counts(pairs):
    confusion = np.zeros((3, 3), dtype=int)
    for gold, predicted in pairs:
        confusion[gold, predicted] += 1
    first, _, *table = predict.summary(confusion, ["a", "b c", "d"]).splitlines()
    gold, predicted = zip(*pairs, strict=True)
    accuracy, f1 = np.mean(np.equal(gold, predicted)), f1_score(gold, predicted, average="macro")
    assert first == f"acc :: {accuracy:.3f} of {len(pairs)}, macro f1 :: {f1:.3f}"
    assert [list(map(int, line.split()[-3:])) for line in table] == confusion.tolist()


# ---------------------------------------------------------------- labels


def test_labels_are_numbers_or_the_checkpoints_names_and_minus_one_is_unknown(command, rows):
    lines = ["1 ||| warm", "good ||| warm", " bad |||  warm ", "-1 ||| warm", "", "0 ||| a ||| b"]
    Path("x.txt").write_text("\n".join(lines), encoding="utf-8")
    found = rows("--input", "x.txt")
    assert [row["gold"] for row in found] == ["good", "good", "bad", None, "bad"]
    assert [row["sentence"] for row in found] == ["warm"] * 4 + ["a ||| b"]
    assert [row["line"] for row in found] == [1, 2, 3, 4, 6]
    _, out, err = command("--input", "x.txt")
    assert "of 4, macro f1" in err
    for line, row in zip(out.splitlines(), found, strict=True):
        is_wrong = row["gold"] not in (None, row["label"])  # warm is, either as good or as bad
        assert (f"(gold: {row['gold']})" in line) == is_wrong


def test_placeholder_labels_are_unknown(command, rows, monkeypatch):
    Path("x.txt").write_text("0 ||| warm\n0 ||| bad\n", encoding="utf-8")
    monkeypatch.setattr(reading, "has_placeholder_labels", lambda content: True)
    assert [row["gold"] for row in rows("--input", "x.txt")] == [None, None]
    assert "acc" not in command("--input", "x.txt")[2]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"0.0 ||| warm\n",
            ["x.txt:1", "'0.0' is not a label; labels are 0 to 1 or bad, good"],
        ),
        (b"\n1 ||| good\nfine ||| bad\n", ["x.txt:3", "label 'fine' is not a label"]),
        (b"1 ||| good\n2 ||| warm\n", ["x.txt:2", "label 2 does not exist; labels are 0 to 1"]),
        (b"1 ||| good\nno label here\n", ["x.txt:2", "has no separator"]),
        (b"warm\n1 ||| good\n", ["x.txt:2", "but the first line does not", "on none"]),
        (b"1 |||\n0 ||| bad\n", ["x.txt:1", "has an empty sentence"]),
        (b"good\nbad\n\xff\n", ["x.txt:3", "byte 0xff is not UTF-8"]),
        (b"good " * 2**18, ["x.txt:1", "is longer than 1,048,576 bytes"]),
        (b"\n \n", ["there is no sentence to predict"]),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(command, content, words):
    Path("x.txt").write_bytes(content)
    line = error_line(command("--input", "x.txt"))
    assert all(word in line for word in words)


# ---------------------------------------------------------------- tables


def test_csv_and_tsv_cells_are_read_and_written_as_pythons_csv_module_does(command, rows):
    cells = ['he said "good", she said "bad"', "two\n lines", "", "  ünïcode  🎬 "]
    expected = [cells[0], "two lines", "ünïcode  🎬"]  # as it would be in a file of sentences
    for name, delimiter in (("x.csv", ","), ("x.tsv", "\t")):
        with open(name, "w", encoding="utf-8-sig", newline="") as file:
            table = [["id", "text"], *enumerate(cells)]
            csv.writer(file, delimiter=delimiter).writerows(table)
        assert [r["sentence"] for r in rows("--input", name, "--column", "text")] == expected
        out = command("--input", name, "--column", "text", "--format", "csv")[1]
        written = list(csv.DictReader(io.StringIO(out)))
        assert [row["sentence"] for row in written] == expected
        for row in written:
            probs = {label: float(row[f"p({label})"]) for label in LABEL_NAMES}
            assert sum(probs.values()) == pytest.approx(1, abs=2e-6)
            assert float(row["probability"]) == probs[row["label"]] == max(probs.values())


@pytest.mark.parametrize(
    ("content", "argv", "words"),
    [
        ("id,text\n1,good\n", [], "--input x.csv: name its column of sentences by --column NAME"),
        ("id,text\n1,good\n", ["--column", "review"], "has no column 'review'; its columns are id"),
        ("", ["--column", "text"], "none, the file is empty"),
        (
            'id,text\n1,"good',
            ["--column", "text"],
            "x.csv:2: is not CSV (unexpected end of data)",
        ),
        ("id,text\n1\n", ["--column", "text"], "there is no sentence"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(command, content, argv, words):
    Path("x.csv").write_text(content, encoding="utf-8")
    assert words in error_line(command("--input", "x.csv", *argv))


# ---------------------------------------------------------------- the stream


class Slow(io.RawIOBase):
    """A pipe whose writer wrote these pieces."""

    def __init__(self, *pieces: bytes):
        self.pieces = list(pieces)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        piece = self.pieces.pop(0) if self.pieces else b""
        buffer[: len(piece)] = piece
        return len(piece)


@given(st.lists(st.integers(0, 44), max_size=6), st.integers(1, 7), st.integers(1, 3))
def test_lines_do_not_depend_on_where_the_reads_fall(cuts, size, multiple_of):
    text = b"\xef\xbb\xbf" + "one\r\ntwo é\n\n \nthree\rfour\n\ufefffive".encode()
    expected = [(1, "one"), (2, "two é"), (5, "three"), (6, "four"), (7, "\ufefffive")]
    places = [0, *sorted(set(cuts) - {0}), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(places) if a < b]
    lines = list(read_lines(io.BufferedReader(Slow(*pieces)), "x", LABEL_NAMES))
    assert [(line.number, line.sentence) for line in lines if line] == expected
    blocks = list(in_blocks(lines, size * multiple_of, multiple_of))
    assert [line for block in blocks for line in block] == [line for line in lines if line]
    assert all(0 < len(block) <= size * multiple_of for block in blocks)
    assert all(len(block) % multiple_of == 0 for block in blocks[:-1])


@pytest.mark.parametrize(
    "read", [lambda f: read_lines(f, "x", []), lambda f: read_column(f, "x", "a")]
)
def test_no_more_is_read_than_is_asked_for(read):
    file = io.BytesIO(b"a\n" + b"a sentence\n" * 100_000)
    assert isinstance(next(read(file)), Line)
    assert file.tell() <= reading.READ_SIZE


def start(*options: str, **pipes) -> subprocess.Popen:
    command = [sys.executable, "-m", "tools.predict", "--checkpoint", "kept.pt", *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}, **pipes,
    )  # fmt: skip


def test_a_pipe_gets_each_answer_before_its_next_line_and_in_utf_8(workplace):
    write_classifier("kept.pt")
    with start("--format", "jsonl", stdin=subprocess.PIPE) as process:
        for number, sentence in enumerate([*SENTENCES, "café 🎬"], start=1):
            process.stdin.write(f"{sentence}\n".encode())
            process.stdin.flush()
            assert select.select([process.stdout], [], [], 60)[0]
            row = json.loads(process.stdout.readline())
            assert (row["line"], row["sentence"]) == (number, sentence)
        process.stdin.close()
        assert process.stdout.read() == b""
        assert process.wait() == 0


def test_a_reader_that_leaves_ends_it_quietly(workplace):
    write_classifier("kept.pt")
    Path("x.txt").write_text("a good film\n" * 20_000, encoding="utf-8")
    with start("--input", "x.txt") as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


# ---------------------------------------------------------------- the command and the checkpoint


def test_text_escapes_what_steers_a_terminal_and_a_sentence_is_one_line(command):
    write_classifier("kept.pt", label_names=["\x1b[31mred", "new\nline"])
    code, out, err = command("1 ||| evil \x1b[2J \x07\r\ntext")
    assert (code, out.count("\n")) == (0, 1)
    assert not {"\x1b", "\x07"} & set(out + err)
    assert out.endswith(" | evil \\x1b[2J \\x07 text\n")


def test_the_checkpoint_decides_the_cut_and_the_names(command):
    write_classifier("kept.pt", max_sentence_len=2, label_names=[])
    out = command("a b c d", "a b c e")[1]
    assert len({line.rpartition(" | ")[0] for line in out.splitlines()}) == 1
    assert out.split()[0] in ("0", "1")  # a checkpoint without names answers in numbers
    write_classifier("kept.pt", label_names=["bad", "good", "great"])
    assert "kept.pt: 3 label names for 2 labels" in command("good")[2]
    write_classifier("kept.pt", label_names=5)
    assert "kept.pt: its label_names are 5, not a list of words" in command("good")[2]
    write_classifier("kept.pt")
    assert "warning: 1 sentence was truncated" in command("good " * 200, "good")[2]


def test_a_tokenizer_that_was_moved_can_be_named(command, workplace):
    (workplace / "tokenizer.model").rename("t.model")
    assert "--tokenizer_path" in error_line(command("good"))
    assert command("--tokenizer_path", "t.model", "good")[0] == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--checkpoint", "model.pt", "good"], "model.pt: is not a finetuned classifier"),
        (["--checkpoint", "gone.pt", "good"], "gone.pt"),
        (["--input", "gone.txt"], "gone.txt: No such file"),
        (["--input", "toy-dev.txt", "good"], "give sentences or --input, not both"),
        (["--format", "xml"], "invalid choice: 'xml'"),
        (["caf\udce9", "good"], "sentence:1: byte 0xe9 is not UTF-8"),
        ([""], "there is no sentence to predict"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, argv, words):
    assert words in error_line(command(*argv))
