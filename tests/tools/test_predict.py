"""What a finetuned checkpoint says: the stream, the formats, the checkpoint's own knowledge."""

import csv
import hashlib
import io
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

import run_llama
from classifier import LlamaEmbeddingClassifier
from conftest import ROOT, random_llama
from tokenizer import Tokenizer
from tools import predict
from tools.predict import Line, in_whole_batches, load_predictor, read_blocks
from training import labelled
from training.labelled import PLACEHOLDER_SHA256
from training.loop import macro_f1, provenance, save_classifier

SENTENCES = ["this film is good", "a bad movie", "her story was not so bad as all that", "warm"]
CSV_HEADER = ["line", "label", "probability", "p(bad)", "p(good)", "gold", "sentence"]


@pytest.fixture(params=[("causal", "mean"), ("full", "position")], ids=["masked", "assignment"])
def checkpoint(workplace: Path, request: pytest.FixtureRequest) -> str:
    """kept.pt: a random classifier of bad and good, as finetuning writes it."""
    return write_checkpoint(*request.param)


def write_checkpoint(attention: str = "causal", pooling: str = "mean", **changes) -> str:
    llama = random_llama(attention=attention)
    config = SimpleNamespace(
        num_labels=2, option="finetune", hidden_dropout_prob=0.3, pooling=pooling
    )
    torch.manual_seed(1)
    extra = provenance(
        ["bad", "good"], Tokenizer(tokenizer_model="tokenizer.model"), "model.pt", None
    )
    model = LlamaEmbeddingClassifier(config, llama)
    save_classifier("kept.pt", model, config, **{**extra, **changes})
    return "kept.pt"


@pytest.fixture
def said(run):
    """said("--format", "jsonl", ...) is (exit code, standard output, standard error) of predict."""
    return lambda *options: run("predict", "--checkpoint", "kept.pt", *options)


def as_rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def alone(sentence: str) -> list[float]:
    """The probabilities of a sentence by itself, straight from the model."""
    predictor = load_predictor("kept.pt")
    ids = torch.tensor([predictor.tokenizer.encode(sentence, bos=True, eos=False)])
    with torch.no_grad():
        return predictor.model(ids, lengths=torch.tensor([ids.shape[1]])).exp()[0].tolist()


# ---------------------------------------------------------------- what is said


@pytest.mark.parametrize("batch_size", ["1", "3", "64"])
def test_a_sentence_gets_what_the_model_gives_it_alone_whatever_its_neighbors(said, batch_size):
    write_checkpoint()
    code, out, _ = said("--format", "jsonl", "--batch_size", batch_size, *SENTENCES)
    assert code == 0
    for row, sentence in zip(as_rows(out), SENTENCES, strict=True):
        assert row["sentence"] == sentence
        probs = alone(sentence)
        assert list(row["probabilities"].values()) == pytest.approx(probs, abs=1e-5)
        assert row["label"] == ["bad", "good"][probs.index(max(probs))]
        assert row["probability"] == max(row["probabilities"].values())
        assert list(row["probabilities"]) == ["bad", "good"]


def test_in_the_assignments_mode_a_batch_is_read_with_its_padding(said):
    write_checkpoint("full", "position")
    _, out, _ = said("--format", "jsonl", "--batch_size", "1", *SENTENCES)
    for row, sentence in zip(as_rows(out), SENTENCES, strict=True):
        assert list(row["probabilities"].values()) == pytest.approx(alone(sentence), abs=1e-5)


@pytest.mark.parametrize("mode", [("causal", "last"), ("full", "position")])
def test_it_says_of_a_file_what_finetuning_said_of_it(run, capsys, mode):
    options = ["--attention", mode[0], "--pooling", mode[1], "--epochs", "2", "--lr", "1e-2"]
    code, out, _ = run("finetune", *options, "--batch_size", "3", "--max_sentence_len", "3")
    assert code == 0
    written = Path("toy-dev-finetuning-output.txt").read_text(encoding="utf-8").splitlines()
    kept = ["--checkpoint", "finetune-toy-2-0.01.pt", "--batch_size", "3"]
    code, answers, err = run("predict", *kept, "--input", "toy-dev.txt", "--format", "jsonl")
    assert code == 0
    labels = {"bad": 0, "good": 1}
    rows = as_rows(answers)
    assert [f"{labels[row['label']]} ||| {row['sentence']}" for row in rows] == written
    accuracy = np.mean([row["label"] == row["gold"] for row in rows])
    assert f"dev acc :: {accuracy:.3f}" in out
    assert f"acc :: {accuracy:.3f} of 8, macro f1 :: " in err


def test_standard_output_is_the_predictions_and_nothing_else(said, checkpoint):
    code, out, err = said(*SENTENCES)
    assert code == 0
    lines = out.splitlines()
    assert [line.rpartition(" | ")[2] for line in lines] == SENTENCES
    for line in lines:
        label, probability = line.partition(" | ")[0].split()
        assert f"{label} {probability}" in line.split(" | ")[1].split(", ")
    assert "4 sentences, " in err
    assert "a second" in err


def test_a_wrong_answer_shows_the_gold_label_in_text(said):
    write_checkpoint()
    Path("x.txt").write_text("".join(f"{g} ||| warm\n" for g in (0, 1, -1)), encoding="utf-8")
    _, out, _ = said("--input", "x.txt")
    said_label = out.split()[0]
    wrong = {"bad": "good", "good": "bad"}[said_label]
    assert [f"(gold: {wrong})" in line for line in out.splitlines()].count(True) == 1
    assert f"(gold: {said_label})" not in out


def test_csv_is_read_back_by_a_csv_reader(said, checkpoint):
    tricky = ['he said "good", she said "bad"', "a, b; c", "  ünïcode 🎬 "]
    _, out, _ = said("--format", "csv", *tricky)
    header, *rows = csv.reader(io.StringIO(out))
    assert header == CSV_HEADER
    assert [row[-1] for row in rows] == [text.strip() for text in tricky]
    for row in rows:
        bad, good = map(float, row[3:5])
        assert bad + good == pytest.approx(1, abs=2e-6)
        assert row[1] == ("good" if good > bad else "bad")
        assert float(row[2]) == max(bad, good)
        assert row[5] == ""


# ---------------------------------------------------------------- labelled lines


def test_accuracy_f1_and_confusion_count_the_lines_with_a_gold_label(said):
    write_checkpoint()
    golds = [0, 1, -1, 1, 0, 1]
    text = "".join(f"{g} ||| {s}\n" for g, s in zip(golds, (SENTENCES * 2)[:6], strict=True))
    Path("x.txt").write_text(text, encoding="utf-8")
    _, out, err = said("--input", "x.txt", "--format", "jsonl")
    rows = as_rows(out)
    assert [row["gold"] for row in rows] == ["bad", "good", None, "good", "bad", "good"]
    known = [row for row in rows if row["gold"]]
    confusion = [[sum(r["gold"] == g and r["label"] == s for r in known) for s in ("bad", "good")]
                 for g in ("bad", "good")]  # fmt: skip
    table = [line.split() for line in err.splitlines()[-2:]]
    assert table == [["bad", *map(str, confusion[0])], ["good", *map(str, confusion[1])]]
    accuracy = np.mean([row["label"] == row["gold"] for row in known])
    f1 = f1_score([r["gold"] for r in known], [r["label"] for r in known], average="macro")
    assert f"acc :: {accuracy:.3f} of 5, macro f1 :: {f1:.3f}" in err


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_macro_f1_of_a_confusion_is_scikit_learns(pairs):
    confusion = np.zeros((4, 4), dtype=int)
    for gold, said in pairs:
        confusion[gold, said] += 1
    gold, said = zip(*pairs, strict=True)
    assert macro_f1(confusion) == pytest.approx(f1_score(gold, said, average="macro"))


@pytest.mark.parametrize("redirected", [False, True])
def test_placeholder_labels_are_not_known(said, monkeypatch, redirected):
    write_checkpoint()
    content = b"0 ||| warm\n0 ||| bad\n"
    Path("x.txt").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(labelled, "PLACEHOLDER_SHA256", PLACEHOLDER_SHA256 | {digest})
    with open("x.txt", encoding="utf-8") as file:
        monkeypatch.setattr("sys.stdin", file)
        source = () if redirected else ("--input", "x.txt")
        _, out, err = said(*source, "--format", "jsonl")
    assert [row["gold"] for row in as_rows(out)] == [None, None]
    assert "acc" not in err


def test_what_would_steer_a_terminal_is_written_out(said):
    write_checkpoint(label_names=["\x1b[31mred", "new\nline"])
    code, out, err = said("evil \x1b[2J \x07 text")
    assert code == 0
    assert len(out.splitlines()) == 1
    assert "\x1b" not in out + err
    assert "\x07" not in out
    assert "evil \\x1b[2J \\x07 text" in out


def test_several_lines_on_the_command_line_are_one_sentence(said):
    write_checkpoint()
    _, out, _ = said("--format", "jsonl", "one\r\ntwo\rthree\nfour")
    assert [row["sentence"] for row in as_rows(out)] == ["one two three four"]


@pytest.mark.parametrize("sentences", [[""], ["--input", "x.txt"]])
def test_nothing_to_predict_is_one_line(said, workplace, sentences):
    write_checkpoint()
    Path("x.txt").write_text("\n \n", encoding="utf-8")
    code, out, err = said(*sentences)
    assert (code, out) == (2, "")
    assert "there is no sentence to predict" in err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"1 ||| good\n\n0 ||| bad\n2 ||| warm\n",
            ["x.txt:4", "0 to 1 by the checkpoint"],
        ),
        (b"1 ||| good\nno label here\n", ["x.txt:2", "has no separator"]),
        (b"label ||| sentence\n1 ||| good\n", ["x.txt:2", "the first line does not"]),
        (b"1 |||\n0 ||| bad\n", ["x.txt:1", "has an empty sentence"]),
        (b"good\nbad\n\xff\n", ["x.txt:3", "byte 0xff is not UTF-8"]),
        (b"good\n" + b"a" * (predict.LONGEST_LINE + 2**16), ["x.txt:2", "1,048,576 bytes"]),
    ],
)
def test_a_bad_line_is_one_line_with_its_place(said, content, words):
    write_checkpoint()
    Path("x.txt").write_bytes(content)
    code, _, err = said("--input", "x.txt")
    assert code == 2
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err


# ---------------------------------------------------------------- the stream


class Slow(io.RawIOBase):
    """A pipe in which each write is found by a read of its own."""

    def __init__(self, *writes: bytes):
        super().__init__()
        self.writes = list(writes)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        chunk = self.writes.pop(0) if self.writes else b""
        buffer[: len(chunk)] = chunk
        return len(chunk)


TEXT = "one\r\ntwo é\n\n \nthree\rfour\n\ufefffive".encode()
LINES = [(1, "one"), (2, "two é"), (5, "three"), (6, "four"), (7, "\ufefffive")]


@given(st.lists(st.integers(0, len(TEXT)), max_size=6))
def test_lines_are_the_same_wherever_the_reads_fall(cuts):
    places = [0, *sorted(set(cuts) - {0}), len(TEXT)]
    pieces = [TEXT[a:b] for a, b in itertools.pairwise(places) if a < b]
    blocks = read_blocks(io.BufferedReader(Slow(*pieces)), "x", 2)
    assert [(line.number, line.sentence) for block in blocks for line in block] == LINES


def test_a_byte_order_mark_is_no_part_of_the_first_line():
    blocks = read_blocks(io.BytesIO(b"\xef\xbb\xbf1 ||| good\n"), "x", 2)
    assert list(blocks) == [[Line(1, "good", 1)]]


def test_no_more_is_read_than_is_asked_for():
    file = io.BytesIO(b"a sentence\n" * 100_000)
    blocks = read_blocks(file, "x", 2)
    next(blocks)
    assert file.tell() <= predict.READ_SIZE


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 7))
def test_whole_batches_are_the_same_lines_and_only_the_last_is_short(sizes, batch_size):
    numbers = iter(range(1000))
    blocks = [[Line(next(numbers), "x", None) for _ in range(size)] for size in sizes]
    whole = list(in_whole_batches(blocks, batch_size))
    assert [line for block in whole for line in block] == [ln for block in blocks for ln in block]
    assert all(block for block in whole)
    assert all(len(block) % batch_size == 0 for block in whole[:-1])


def start(*options: str, **pipes) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "run_llama.py"), "--option", "predict"]
    return subprocess.Popen(
        [*command, "--checkpoint", "kept.pt", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **pipes,
    )  # fmt: skip


def test_an_answer_comes_before_the_next_line_is_written(workplace):
    write_checkpoint()
    with start("--format", "jsonl", stdin=subprocess.PIPE) as process:
        for number, sentence in enumerate(SENTENCES, start=1):
            process.stdin.write(f"{sentence}\n".encode())
            process.stdin.flush()
            assert select.select([process.stdout], [], [], 60)[0]
            row = json.loads(process.stdout.readline())
            assert (row["line"], row["sentence"]) == (number, sentence)
        process.stdin.close()
        assert process.stdout.read() == b""
        assert process.wait() == 0


def test_a_reader_who_leaves_ends_it_quietly(workplace):
    write_checkpoint()
    Path("x.txt").write_text("a good film\n" * 20_000, encoding="utf-8")
    with start("--input", "x.txt") as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_read_once(workplace):
    write_checkpoint()
    os.mkfifo("pipe")
    with start("--input", "pipe", "--format", "jsonl") as process:
        Path("pipe").write_text("a good film\na bad one\n", encoding="utf-8")
        rows = as_rows(process.stdout.read().decode())
        assert [row["sentence"] for row in rows] == ["a good film", "a bad one"]
        assert process.wait() == 0


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_what_programs_read_is_utf_8_in_any_locale(workplace, kind):
    write_checkpoint()
    variables = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with start("--format", kind, "café 🎬", env=variables) as process:
        assert "café 🎬" in process.stdout.read().decode("utf-8")
        assert process.wait() == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_crash(workplace, closed):
    write_checkpoint()
    command = [sys.executable, str(ROOT / "run_llama.py"), "--option", "predict"]
    command += ["--checkpoint", "kept.pt", "good"]
    ended = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", *command], capture_output=True, check=False
    )
    assert ended.returncode == 0
    assert b"Traceback" not in ended.stderr


def test_a_process_without_standard_input_is_one_line(workplace):
    write_checkpoint()
    command = [sys.executable, str(ROOT / "run_llama.py"), "--option", "predict"]
    command += ["--checkpoint", "kept.pt"]
    closed = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *command], capture_output=True, check=False
    )
    assert closed.returncode == 2
    assert b"standard input is closed" in closed.stderr


# ---------------------------------------------------------------- the checkpoint


def test_nothing_is_repeated_that_finetuning_was_told(run, workplace):
    """Another attention, pooling, cut and tokenizer than the defaults, and the base is gone."""
    (workplace / "tokenizer.model").rename("other.model")
    options = ["--attention", "causal", "--pooling", "mean", "--max_sentence_len", "2"]
    options += ["--tokenizer_path", "other.model", "--epochs", "1", "--lr", "1e-3"]
    assert run("finetune", *options)[0] == 0
    Path("model.pt").unlink()
    predictor = load_predictor("finetune-toy-1-0.001.pt")
    assert predictor.model.llama.config.attention == "causal"
    assert predictor.model.pooling == "mean"
    assert predictor.max_sentence_len == 2
    assert predictor.label_names == ["bad", "good"]
    code, out, _ = run("predict", "--checkpoint", "finetune-toy-1-0.001.pt", "a b c d", "a b c e")
    assert code == 0
    assert len({line.rpartition(" | ")[0] for line in out.splitlines()}) == 1


def test_a_checkpoint_says_what_it_was_made_from(run):
    assert run("finetune", "--epochs", "1")[0] == 0
    saved = torch.load("finetune-toy-1-2e-05.pt", weights_only=True)
    assert saved["pretrained_model_sha256"] == run_llama.sha256_of("model.pt")
    assert saved["tokenizer_sha256"] == run_llama.sha256_of("tokenizer.model")


def test_a_tokenizer_that_was_moved_or_replaced_is_one_line_and_can_be_named(
    said, workplace, monkeypatch
):
    monkeypatch.setattr("tokenizer.TOKENIZER_MODEL", workplace / "project" / "tokenizer.model")
    write_checkpoint()
    (workplace / "elsewhere").mkdir()
    (workplace / "tokenizer.model").rename("elsewhere/t.model")
    code, _, err = said("good")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "kept.pt: its tokenizer 'tokenizer.model' is not there any more" in err
    assert "--tokenizer_path" in err
    assert said("--tokenizer_path", "elsewhere/t.model", "good")[0] == 0
    with monkeypatch.context() as elsewhere:  # both moved together
        shutil.copy("kept.pt", "elsewhere/kept.pt")
        shutil.copy("elsewhere/t.model", "elsewhere/tokenizer.model")
        (workplace / "empty").mkdir()
        elsewhere.chdir(workplace / "empty")
        assert load_predictor("../elsewhere/kept.pt").label_names == ["bad", "good"]
    (workplace / "tokenizer.model").write_bytes((ROOT / "data/mini/tokenizer.model").read_bytes())
    code, _, err = said("good")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "was trained with another tokenizer than" in err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label_names": ["bad", "good", "great"]}, "3 label names, of which 3 differ, for 2"),
        ({"label_names": ["bad", "bad"]}, "2 label names, of which 1 differ, for 2"),
        ({"label_names": "bad"}, "label_names is not a list of strings"),
        ({"tokenizer_path": 3}, "tokenizer_path is not a string"),
        ({"tokenizer_path": "a\x1b[31m"}, r"its tokenizer 'a\x1b[31m' is not there"),
        ({"max_sentence_len": -1}, "max_sentence_len is no positive number"),
        ({"max_sentence_len": True}, "max_sentence_len is no positive number"),
    ],
)
def test_a_checkpoint_that_says_nonsense_is_one_line(said, workplace, changes, words):
    write_checkpoint(**changes)
    code, out, err = said("good")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert words in err


def test_a_pretrained_checkpoint_is_none_that_predicts(run):
    code, _, err = run("predict", "--checkpoint", "model.pt", "good")
    assert code == 2
    assert "model.pt: is no finetuned classifier" in err


def test_a_checkpoint_of_names_unknown_answers_in_numbers(said, workplace):
    write_checkpoint(label_names=[])
    code, out, _ = said("good")
    assert code == 0
    assert out.split()[0] in ("0", "1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--option", "predict"], "needs --checkpoint"),
        (["--option", "predict", "--checkpoint", "a", "--input", "b", "c"], "exclude each other"),
        (["--option", "prompt", "--checkpoint", "a"], "--checkpoint goes with --option predict"),
        (["a b"], "'a b' is a sentence, which goes with --option predict, not generate"),
        (["--option", "predict", "--checkpoint", "a", "--temperature", "0"], "--temperature goes"),
        (["--option", "predict", "--checkpoint", "a", "--test", "b"], "--input names the file"),
        (["--option", "predict", "--checkpoint", "a", "--pooling", "last"], "does not go with"),
        (["--option=predict", "--checkpoint=a", "--label-names=b"], "--label-names does not go"),
        (["--top_k", "2", "--temperature", "0"], "--top_k needs a --temperature above 0"),
        (["--top_k", "2", "--generated_sentence_low_temp_out", "a"], "for the assignment's texts"),
        (["--option", "finetune", "--top_k", "3"], "--top_k goes with --option generate"),
        (["--option", "predict", "--format", "xml"], "invalid choice: 'xml'"),
    ],
)
def test_options_of_another_mode_are_a_usage_error(capsys, options, words):
    with pytest.raises(SystemExit) as ended:
        run_llama.get_args(options)
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out, len(captured.err.splitlines())) == (2, "", 1)
    assert words in captured.err


def test_a_sentence_whose_bytes_are_no_text_is_one_line(said, workplace):
    write_checkpoint()
    code, _, err = said("good", os.fsdecode(b"caf\xe9"))
    assert code == 2
    assert "sentence:2: byte 0xe9 is not UTF-8" in err
