"""What a line of a data file may be, what becomes of it, and what is said of every other line."""

import hashlib
import itertools
import json
import os
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT, shared_asset
from helpers import refusal
from tokenizer import Tokenizer
from training import labeled
from training.dataset import Example, SentenceDataset, encode_examples, make_train_loader
from training.labeled import PLACEHOLDER_SHA256, parse_line, read_label_names, read_sentences
from utils import InputError

# With Unicode's other line ends; only \n, \r\n and \r end a line of a data file.
SENTENCE = "Amélie, 東京\u2028\u2029\u0085\x0b\x0c\x1c物語 🎬"


@pytest.fixture
def write(tmp_path):
    """write(text or bytes) -> the path of a data file that holds it."""

    def to_file(content: str | bytes):
        path = tmp_path / "toy.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file


# ---------------------------------------------------------------- read_sentences


@pytest.mark.parametrize(
    ("end", "mark", "last"),
    [("\n", "", True), ("\r\n", "\ufeff", True), ("\r", "\ufeff", False), ("\r\n", "", False)],
)
def test_line_ends_blank_lines_and_a_byte_order_mark_change_nothing(write, end, mark, last):
    text = mark + f"1 ||| {SENTENCE}{end} \t {end}0 |||  a  bad film " + end * last
    assert read_sentences(write(text)) == [(SENTENCE, 1), ("a  bad film", 0)]


@pytest.mark.parametrize("sentence", ["a ||| b", "||| a", "a |||"])
def test_a_line_is_split_at_its_first_separator(write, sentence):
    assert read_sentences(write(f"1 ||| {sentence}\n")) == [(sentence, 1)]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("read", [read_sentences, read_label_names])
def test_a_pipe_is_refused_because_data_are_read_twice(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe or a device, and data are read twice" in refusal(read, tmp_path / "pipe")


def test_label_minus_one_is_for_test_files(write):
    path = write("-1 ||| a\n1 ||| b\n")
    assert read_sentences(path, n_labels=2, unlabeled=True) == [("a", -1), ("b", 1)]
    assert "allowed in test files only" in refusal(read_sentences, path, n_labels=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 ||| b", "2: label 2 does not exist; labels are 0 to 1"),
        ("-7 ||| b", "2: label -7 does not exist; labels are 0 to 1"),
        ("good ||| b", "2: label 'good' is not an integer; write 1"),
        (f"{'9' * 5000} ||| b", f"2: label '{'9' * 60}' is not an integer; labels are 0 to 1"),
        ("1 || b", "2: '1 || b' has no separator; write 'label ||| sentence'"),
        ("1\tb", "2: '1\\tb' has no separator; write 'label ||| sentence'"),
        ("1 |||", "2: '1 |||' has an empty sentence; write one or delete the line"),
        ("1 ||| \u3000", "2: '1 ||| \\u3000' has an empty sentence; write one or delete the line"),
    ],
)
def test_any_other_line_is_refused_with_its_number_value_and_remedy(write, line, message):
    path = write(f"0 ||| a\n{line}\n")
    names = ["bad", "good"]
    said = refusal(read_sentences, path, n_labels=2, label_names=names, longest=200)
    assert said == message


@pytest.mark.parametrize("label", ["1.0", "1_0", "+1", "²", "\uff11", ""])
def test_a_label_is_ascii_digits(write, label):
    message = refusal(read_sentences, write(f"{label} ||| b\n"))
    assert message == f"1: label {label!r} is not an integer; labels are 0, 1, 2, ..."
    assert read_sentences(write("700 ||| a\n")) == [("a", 700)]


CHARACTERS = st.sampled_from("0123-+ |\t\u3000a\u0661é")
TEXT = st.text(CHARACTERS, max_size=6)


@given(TEXT | st.builds("{} ||| {}".format, st.text(CHARACTERS, max_size=3), TEXT))
def test_every_line_is_read_or_refused_in_one_line(line):
    fields = re.fullmatch(r"\s*(-?0*[01])\s* \|\|\| (.*\S.*)", line)
    if fields:
        expected = fields[2].strip(), int(fields[1])
        assert parse_line(line, "f:1", n_labels=2, unlabeled=True) == expected
    else:
        refusal(lambda place: parse_line(line, place, n_labels=2, unlabeled=True), "f:1")


@pytest.mark.parametrize("content", ["", "\ufeff \r\n\t\n"])
def test_a_file_without_sentences_is_refused(write, content):
    assert "has no sentences; write 'label ||| sentence'" in refusal(read_sentences, write(content))


@pytest.mark.parametrize(
    ("content", "number", "byte"),
    [
        ("1 ||| a\n".encode("utf-16"), 1, "0xff"),
        ("0 ||| a\n\n1 ||| café\n".encode("latin-1"), 3, "0xe9"),
        (b"\xef\xbb\xbf1 ||| caf\xe9\n", 1, "0xe9"),  # the byte order mark shifts nothing
        (b"0 ||| a\r1 ||| caf\xe9\r", 2, "0xe9"),
        ("0 ||| a\r\n1 ||| “b”\r\n".encode("cp1252"), 2, "0x93"),
        (b"0 ||| a\n1 ||| b\xed\xa0\x80\n", 2, "0xed"),  # a surrogate is no character
    ],
)
def test_a_byte_that_is_not_utf8_is_named_with_its_line(write, content, number, byte):
    message = refusal(read_sentences, write(content))
    assert message == f"{number}: byte {byte} is not UTF-8; convert it"


@pytest.mark.parametrize("read", [read_sentences, read_label_names])
def test_a_missing_file_is_named_with_the_remedy(read, tmp_path):
    assert "setup.sh" in refusal(read, tmp_path / "absent.txt")


def test_placeholder_labels_are_unknown_labels(write, monkeypatch):
    content = b"0 ||| a\n0 ||| b\n"
    path = write(content)
    assert read_sentences(path, unlabeled=True) == [("a", 0), ("b", 0)]
    monkeypatch.setattr(labeled, "PLACEHOLDER_SHA256", hashlib.sha256(content).hexdigest())
    assert "placeholder labels; use it for --test only" in refusal(read_sentences, path)
    for same in (content, b"0 ||| a\r\n0 ||| b\r\n", b"\xef\xbb\xbf0 ||| a\n0 ||| b"):
        assert read_sentences(write(same), unlabeled=True) == [("a", -1), ("b", -1)]
    assert read_sentences(write(content + b"1 ||| c\n")) == [("a", 0), ("b", 0), ("c", 1)]


def test_the_placeholder_file_is_the_published_one():
    files = json.loads((ROOT / "data/manifest.json").read_text(encoding="utf-8"))["files"]
    published = {entry["sha256"] for entry in files if entry["name"] == "data/cfimdb-test.txt"}
    assert published == {PLACEHOLDER_SHA256}
    rows = read_sentences(shared_asset("data/cfimdb-test.txt"), n_labels=2, unlabeled=True)
    assert len(rows) == 488 and {label for _, label in rows} == {-1}


@pytest.mark.parametrize(
    ("name", "n_examples", "n_labels", "majority"),
    [
        ("sst-train", 8544, 5, None),
        ("sst-dev", 1101, 5, 0.2625),
        ("sst-test", 2210, 5, 0.2864),
        ("cfimdb-train", 1707, 2, None),
        ("cfimdb-dev", 245, 2, 0.5020),
    ],
)
def test_the_real_files_hold_what_is_known_of_them(name, n_examples, n_labels, majority):
    path = shared_asset(f"data/{name}.txt")
    rows = read_sentences(path, n_labels=n_labels)
    labels = [label for _, label in rows]
    assert (len(rows), set(labels)) == (n_examples, set(range(n_labels)))
    if majority is not None:
        assert round(max(map(labels.count, range(n_labels))) / n_examples, 4) == majority
    lines = path.read_bytes().decode("utf-8").split("\n")
    assert [sentence for sentence, _ in rows] == [line[6:].strip() for line in lines if line]
    for folder in (ROOT, path.parent.parent):
        mapping = folder / f"data/{name.split('-')[0]}-label-mapping.json"
        assert len(read_label_names(mapping)) == n_labels


# ---------------------------------------------------------------- read_label_names


def test_label_names_are_read_in_their_order(write):
    names = ["好", "差", "très bon", "1", "0"]
    assert read_label_names(write(json.dumps(names))) == names
    assert read_label_names(write("\ufeff" + json.dumps(names, ensure_ascii=False))) == names
    assert read_label_names(write('["awful ", "\\tso so\\n"]')) == ["awful", "so so"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *((c, f"different names such as [\"bad\", \"good\"], but {c}") for c in (
            '{"bad": 0, "good": 1}', "null", '["bad", "bad"]', '["bad", "bad "]', '["bad"]', "[]",
            '["bad", null]', '[["bad"], ["good"]]', '["bad", " "]',
        )),
        ("", "1: is not JSON"),
        ("bad, good", "1: is not JSON"),
        ('["bad",\n"good",\nx]', "3: is not JSON"),
        ("1" * 5000, "is not JSON; label names are a JSON list"),
        ("[" * 100_000, "is not JSON; label names are a JSON list"),
        (r'["bad", "good \udc80"]', "has a lone surrogate"),
        (json.dumps([str(i) for i in range(10_001)]), "has 10001 names, more than 10000"),
        ('["bad",\n"très bon"]'.encode("latin-1"), "2: byte 0xe8 is not UTF-8; convert it"),
    ],
)  # fmt: skip
def test_label_names_are_at_least_two_different_texts(write, content, words):
    message = refusal(read_label_names, write(content), longest=200)
    assert words in message
    message.encode()  # it can be shown


# ---------------------------------------------------------------- encode_examples

ROWS = [
    ("this movie is good and the story was good", 1),
    ("bad", 0),
    ("the film: 東京 物語", 1),
    ("a ||| b", -1),
]
SUFFIX = "is this movie good or bad? this movie is"


def pieces(tokenizer: Tokenizer, text: str | None) -> list[int]:
    return tokenizer.encode(text or "", bos=False, eos=False)


@pytest.mark.parametrize("suffix", [None, "", SUFFIX])
def test_an_example_is_bos_and_the_whole_text(tokenizer, suffix):
    examples, n_truncated = encode_examples(ROWS, tokenizer, max_tokens=200, suffix=suffix)
    assert n_truncated == 0
    assert [(example.sentence, example.label) for example in examples] == ROWS
    for example in examples:
        text = f"{example.sentence} {suffix}" if suffix else example.sentence
        assert example.tokens == tokenizer.encode(text, bos=True, eos=False)


@pytest.mark.parametrize("suffix", [None, SUFFIX])
@pytest.mark.parametrize(("kept", "fits"), [(1, 99), (99, 1), (3, 6), (6, 3)])
def test_a_long_sentence_keeps_its_head_and_the_whole_suffix(tokenizer, suffix, kept, fits):
    """max_sentence_len (`kept`) was asked for and is no loss; the model's limit (`fits`) is."""
    asked = pieces(tokenizer, suffix)
    examples, n_truncated = encode_examples(
        ROWS, tokenizer, max_tokens=1 + fits + len(asked), max_sentence_len=kept, suffix=suffix
    )
    sentences = [pieces(tokenizer, sentence) for sentence, _ in ROWS]
    for ids, example in zip(sentences, examples, strict=True):
        assert example.tokens == [tokenizer.bos_id, *ids[: min(kept, fits)], *asked]
    assert n_truncated == (sum(len(ids) > fits for ids in sentences) if fits < kept else 0)


@pytest.mark.parametrize("suffix", [None, SUFFIX])
def test_a_model_without_room_for_one_token_is_refused(tokenizer, suffix):
    n_suffix = len(pieces(tokenizer, suffix))
    with pytest.raises(InputError, match=f"{1 + n_suffix} positions leave no room"):
        encode_examples(ROWS, tokenizer, max_tokens=1 + n_suffix, suffix=suffix)


# ---------------------------------------------------------------- batches

PAD = 3


def dataset(lengths) -> SentenceDataset:
    return SentenceDataset([Example(str(i), i % 2, [5] * n) for i, n in enumerate(lengths)], PAD)


def test_a_batch_is_padded_on_the_right_and_carries_its_lengths():
    data = SentenceDataset([Example("a", 1, [1, 10, 11]), Example("b", 0, [1])], pad_id=PAD)
    batch = data.collate_fn([data[0], data[1]])
    assert batch["token_ids"].tolist() == [[1, 10, 11], [1, PAD, PAD]]
    assert batch["lengths"].tolist() == [3, 1]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["sents"] == ["a", "b"]
    assert data[1].tokens == [1]


@pytest.mark.parametrize("batch_size", [1, 4, 50])
@pytest.mark.parametrize("similar_lengths", [True, False])
def test_evaluation_reads_every_sentence_once(batch_size, similar_lengths):
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    batches = dataset(lengths).eval_batches(batch_size, similar_lengths)
    assert list(map(len, batches)) == [min(batch_size, 11 - i) for i in range(0, 11, batch_size)]
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(11))
    read = [lengths[i] for i in order]
    assert read == (sorted(lengths, reverse=True) if similar_lengths else lengths)


@pytest.mark.parametrize("similar_lengths", [True, False])
def test_training_reads_every_sentence_once_an_epoch_in_another_order_each(similar_lengths):
    data = dataset(1 + i * 37 % 50 for i in range(1001))  # several pools, a short last batch

    def epochs(seed: int) -> list[list[list[str]]]:
        generator = torch.Generator().manual_seed(seed)
        loader = make_train_loader(data, 4, generator, similar_lengths)
        assert len(loader) == 251
        return [[batch["sents"] for batch in loader] for _ in range(2)]

    before = torch.get_rng_state()
    first, second = epochs(0)
    assert torch.equal(torch.get_rng_state(), before)  # the given generator alone is drawn from
    for batches in (first, second):
        assert sorted(map(len, batches)) == [1, *[4] * 250]
        assert sorted(int(s) for batch in batches for s in batch) == list(range(1001))
    assert epochs(0) == [first, second]
    assert epochs(1)[0] != first
    widths = [max(len(data[int(s)].tokens) for s in batch) for batch in first]
    assert sum(a <= b for a, b in itertools.pairwise(widths)) < 0.7 * len(widths)  # not sorted
    together = [{frozenset(batch) for batch in batches} for batches in (first, second)]
    assert len(together[0] & together[1]) < 125  # which sentences meet changes, too


def test_similar_lengths_pad_little_where_random_order_pads_much():
    lengths = [1 + i * 37 % 50 for i in range(1000)]

    def n_positions(similar_lengths: bool) -> int:
        loader = make_train_loader(dataset(lengths), 8, torch.Generator(), similar_lengths)
        return sum(batch["token_ids"].numel() for batch in loader)

    assert n_positions(True) < 1.1 * sum(lengths) < 1.5 * sum(lengths) < n_positions(False)
