"""What a line of a data file may be, what becomes of it, and what is said of every other line."""

import hashlib
import json

import pytest
import torch

from conftest import ROOT, shared_asset
from tokenizer import Tokenizer
from training import labelled
from training.dataset import Example, SentenceDataset, encode_examples, make_loader
from training.labelled import PLACEHOLDER_SHA256, read_label_names, read_sentences

# Unicode's other line ends; only \n, \r\n and \r end a line of a data file.
IN_LINE = ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c"]


@pytest.fixture
def write(tmp_path):
    """write(text or bytes) -> the path of a data file that holds it."""

    def to_file(content: str | bytes):
        path = tmp_path / "toy.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file


def refusal(read, path, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as caught:
        read(path, *args, **kwargs)
    message = str(caught.value)
    assert message.startswith(f"{path}:")
    assert "\n" not in message
    return message.removeprefix(f"{path}:")


# ---------------------------------------------------------------- read_sentences


def test_sentences_and_labels_come_in_the_order_of_the_file(write):
    path = write("1 ||| a good film\n0 ||| a bad film\n1 ||| fine\n")
    expected = [("a good film", 1), ("a bad film", 0), ("fine", 1)]
    assert read_sentences(path) == expected
    assert read_sentences(str(path)) == expected


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_and_a_byte_order_mark_change_nothing(write, end, mark, last):
    text = mark + f"1 ||| Amélie, 東京 物語 🎬{end}0 ||| a bad film" + end * last
    assert read_sentences(write(text)) == [("Amélie, 東京 物語 🎬", 1), ("a bad film", 0)]


def test_blank_lines_are_skipped_and_counted(write):
    assert read_sentences(write("\n1 ||| a\n \t \n\n0 ||| b\n\n")) == [("a", 1), ("b", 0)]
    assert refusal(read_sentences, write("\n \n1 ||| a\n\nx ||| b\n")).startswith("5:")


@pytest.mark.parametrize("sentence", ["a ||| b", "||| a", "a |||", "1 ||| 0 ||| 1"])
def test_a_line_is_split_at_its_first_separator(write, sentence):
    assert read_sentences(write(f"1 ||| {sentence}\n")) == [(sentence, 1)]


@pytest.mark.parametrize("character", IN_LINE)
def test_only_line_feed_and_carriage_return_end_a_line(write, character):
    assert read_sentences(write(f"1 ||| a{character}b\n")) == [(f"a{character}b", 1)]


def test_spaces_around_label_and_sentence_are_no_part_of_them(write):
    assert read_sentences(write(" 1  |||  a  b \t\n")) == [("a  b", 1)]


def test_label_minus_one_is_for_test_files(write):
    path = write("-1 ||| a\n1 ||| b\n")
    assert read_sentences(path, n_labels=2, unlabelled=True) == [("a", -1), ("b", 1)]
    message = refusal(read_sentences, path, n_labels=2)
    assert message.startswith("1: label -1")
    assert "test files only" in message


@pytest.mark.parametrize("unlabelled", [True, False])
@pytest.mark.parametrize(("label", "n_labels"), [(2, 2), (9, 5), (-2, 2), (-7, 5)])
def test_a_label_without_a_name_is_refused(write, label, n_labels, unlabelled):
    path = write(f"0 ||| a\n{label} ||| b\n")
    message = refusal(read_sentences, path, n_labels=n_labels, unlabelled=unlabelled)
    assert message.startswith(f"2: label {label} ")
    assert f"labels are 0 to {n_labels - 1} by --label-names" in message


def test_without_label_names_only_negative_labels_are_refused(write):
    assert read_sentences(write("7 ||| a\n")) == [("a", 7)]
    assert refusal(read_sentences, write("-7 ||| a\n")).startswith("1: label -7")


@pytest.mark.parametrize(
    "label", ["1_0", "\uff11", "²", "1.0", "", "x", "+1", "1 0", "0x1", "--1", "1e0", "nan", "True"]
)
def test_a_label_is_ascii_digits(write, label):
    message = refusal(read_sentences, write(f"0 ||| a\n{label} ||| b\n"))
    assert message == f"2: label {label!r} is not an integer; labels are 0, 1, 2, ..."


def test_a_label_of_any_length_is_refused_in_a_short_message(write):
    assert len(refusal(read_sentences, write("9" * 5000 + " ||| a\n"))) < 150


@pytest.mark.parametrize("line", ["a film", "1", "1 || a film", "1||| a film", "1\ta", "1 |||| a"])
def test_a_line_without_separator_is_shown(write, line):
    message = refusal(read_sentences, write(f"0 ||| a\n{line}\n"))
    assert message == f"2: {line!r} has no separator; write 'label ||| sentence'"


def test_a_long_line_without_separator_is_shown_by_its_beginning(write):
    message = refusal(read_sentences, write("word " * 1000))
    assert message.startswith("1: 'word word")
    assert len(message) < 150


@pytest.mark.parametrize("line", ["1 |||", "1 ||| ", "1 ||| \t\u3000"])
def test_an_empty_sentence_is_refused(write, line):
    message = refusal(read_sentences, write(f"0 ||| a\n{line}\n"))
    assert message == f"2: {line!r} has an empty sentence; write one or delete the line"


@pytest.mark.parametrize("content", ["", "\n", " \r\n\t\n", "\ufeff", "\ufeff\n"])
def test_a_file_without_examples_is_refused(write, content):
    message = refusal(read_sentences, write(content))
    assert "holds no example" in message
    assert "'label ||| sentence'" in message


@pytest.mark.parametrize(
    ("content", "number", "byte"),
    [
        ("1 ||| a\n".encode("utf-16"), 1, "0xff"),
        ("0 ||| a\n\n1 ||| café\n".encode("latin-1"), 3, "0xe9"),
        (b"\xef\xbb\xbf1 ||| caf\xe9\n", 1, "0xe9"),  # the byte order mark shifts nothing
        (b"0 ||| a\r1 ||| caf\xe9\r", 2, "0xe9"),
        (b"0 ||| a\r\n1 ||| caf\xe9\r\n", 2, "0xe9"),
        ("0 ||| a\r\n1 ||| “b”\r\n".encode("cp1252"), 2, "0x93"),
        (b"0 ||| a\n1 ||| b\xed\xa0\x80\n", 2, "0xed"),  # a surrogate is no character
    ],
)
def test_a_byte_that_is_not_utf8_is_named_with_its_line(write, content, number, byte):
    message = refusal(read_sentences, write(content))
    assert message == f"{number}: byte {byte} is not UTF-8; convert the file"


@pytest.mark.parametrize("read", [read_sentences, read_label_names])
def test_a_missing_file_is_named_with_the_remedy(read, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"setup\.sh") as caught:
        read(tmp_path / "absent.txt")
    assert caught.value.filename == str(tmp_path / "absent.txt")


# ---------------------------------------------------------------- placeholder labels


def test_a_file_of_placeholder_labels_is_a_test_file_without_labels(write, monkeypatch):
    content = b"0 ||| a\n0 ||| b\n"
    path = write(content)
    assert read_sentences(path, unlabelled=True) == [("a", 0), ("b", 0)]
    monkeypatch.setattr(labelled, "PLACEHOLDER_SHA256", {hashlib.sha256(content).hexdigest()})
    assert read_sentences(path, unlabelled=True) == [("a", -1), ("b", -1)]
    assert "placeholder labels, fit for --test alone" in refusal(read_sentences, path)
    for same in (b"0 ||| a\r\n0 ||| b\r\n", b"\xef\xbb\xbf0 ||| a\n0 ||| b"):
        assert read_sentences(write(same), unlabelled=True) == [("a", -1), ("b", -1)]
    other = write(content + b"1 ||| c\n")
    assert read_sentences(other) == [("a", 0), ("b", 0), ("c", 1)]


def test_cfimdb_test_is_the_file_with_placeholder_labels():
    path = shared_asset("data/cfimdb-test.txt")
    assert {hashlib.sha256(path.read_bytes()).hexdigest()} == PLACEHOLDER_SHA256
    assert {line[:6] for line in path.read_text(encoding="utf-8").splitlines()} == {"0 ||| "}
    rows = read_sentences(path, n_labels=2, unlabelled=True)
    assert len(rows) == 488
    assert {label for _, label in rows} == {-1}
    assert "placeholder labels" in refusal(read_sentences, path, n_labels=2)


def test_the_manifest_knows_the_file_with_placeholder_labels():
    manifest = ROOT / "data" / "manifest.json"
    if not manifest.exists():
        pytest.skip("needs data/manifest.json")
    files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    published = {entry["sha256"] for entry in files if entry["name"] == "data/cfimdb-test.txt"}
    assert published == PLACEHOLDER_SHA256


# ---------------------------------------------------------------- read_label_names


@pytest.mark.parametrize("names", [["bad", "good"], ["差", "好", "très bon"], ["0", "1"]])
def test_label_names_are_read_in_their_order(write, names):
    assert read_label_names(write(json.dumps(names))) == names
    assert read_label_names(write("\ufeff" + json.dumps(names, ensure_ascii=False))) == names


@pytest.mark.parametrize(
    "content",
    [
        '{"bad": 0, "good": 1}',
        '["bad", "bad"]',
        '["bad"]',
        "[]",
        "[0, 1]",
        '["bad", null]',
        '[["bad"], ["good"]]',
        '["bad", ""]',
        '["bad", " "]',
        '"bad"',
        "null",
    ],
)
def test_label_names_are_at_least_two_different_strings(write, content):
    message = refusal(read_label_names, write(content))
    assert "list of at least two different names" in message
    assert message.endswith(f'such as ["bad", "good"], but {content}')


@pytest.mark.parametrize(
    ("content", "number"),
    [("", 1), ("bad, good", 1), ("['bad', 'good']", 1), ('["bad",\n"good",\nx]', 3), ('["bad"', 1)],
)
def test_label_names_that_are_not_json_are_refused_with_their_line(write, content, number):
    message = refusal(read_label_names, write(content))
    assert message.startswith(f"{number}: is not JSON")
    assert '["bad", "good"]' in message


@pytest.mark.parametrize("content", ["1" * 5000, "[" * 100_000])
def test_label_names_that_the_json_parser_gives_up_on_are_refused(write, content):
    assert "is not JSON; label names are a JSON list" in refusal(read_label_names, write(content))


@pytest.mark.parametrize("name", [r"\ud800", r"good \udc80", r"\ud83d\ud83d"])
def test_half_a_letter_is_no_label_name(write, name):
    path = write(f'["bad", "{name}"]')
    with pytest.raises(ValueError, match="lone surrogate") as caught:
        read_label_names(path)
    assert str(caught.value).startswith(f"{path}: ")
    str(caught.value).encode()  # it can be shown
    assert read_label_names(write(r'["bad", "\ud83d\ude00"]')) == ["bad", "\U0001f600"]


def test_more_label_names_than_a_head_can_have_are_refused(write):
    names = [f"name {i}" for i in range(10_001)]
    assert len(read_label_names(write(json.dumps(names[:-1])))) == 10_000
    with pytest.raises(ValueError, match="holds 10001 names, more than 10000"):
        read_label_names(write(json.dumps(names)))


def test_label_names_in_another_encoding_are_refused_with_the_byte(write):
    message = refusal(read_label_names, write('["bad",\n"très bon"]'.encode("latin-1")))
    assert message == "2: byte 0xe8 is not UTF-8; convert the file"


# ---------------------------------------------------------------- encode_examples

ROWS = [
    ("this movie is good and the story was good", 1),
    ("bad", 0),
    ("the film: 東京 物語", 1),
    ("a ||| b", -1),
]
SUFFIX = "is this movie good or bad? this movie is"


def pieces(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, bos=False, eos=False)


@pytest.mark.parametrize("suffix", [None, "", SUFFIX])
def test_an_example_is_bos_and_the_whole_text(tokenizer, suffix):
    examples, n_truncated = encode_examples(ROWS, tokenizer, max_tokens=200, suffix=suffix)
    assert n_truncated == 0
    assert [(example.sentence, example.label) for example in examples] == ROWS
    for example in examples:
        text = f"{example.sentence} {suffix}" if suffix else example.sentence
        assert example.tokens == tokenizer.encode(text, bos=True, eos=False)


@pytest.mark.parametrize("suffix", [None, SUFFIX])
@pytest.mark.parametrize("kept", [1, 2, 5, 1000])
def test_max_sentence_len_keeps_that_many_tokens_of_the_sentence(tokenizer, suffix, kept):
    examples, n_truncated = encode_examples(
        ROWS, tokenizer, max_tokens=200, max_sentence_len=kept, suffix=suffix
    )
    asked = pieces(tokenizer, suffix) if suffix else []
    for (sentence, _), example in zip(ROWS, examples, strict=True):
        head = pieces(tokenizer, sentence)[:kept]
        assert example.tokens == [tokenizer.bos_id, *head, *asked]
    assert n_truncated == 0  # what was asked for is no loss to report


@pytest.mark.parametrize("suffix", [None, SUFFIX])
@pytest.mark.parametrize("room", [1, 2, 5, 8])
def test_a_text_that_is_too_long_keeps_the_suffix_and_the_head_of_its_sentence(
    tokenizer, suffix, room
):
    asked = pieces(tokenizer, suffix) if suffix else []
    max_tokens = 1 + room + len(asked)
    examples, n_truncated = encode_examples(ROWS, tokenizer, max_tokens=max_tokens, suffix=suffix)
    sentences = [pieces(tokenizer, sentence) for sentence, _ in ROWS]
    for sentence, example in zip(sentences, examples, strict=True):
        assert example.tokens == [tokenizer.bos_id, *sentence[:room], *asked]
    assert n_truncated == sum(len(sentence) > room for sentence in sentences) > 0


def test_the_tighter_of_both_limits_decides(tokenizer):
    row = [ROWS[0]]
    n_suffix = len(pieces(tokenizer, SUFFIX))
    for max_sentence_len, room, n_cut in ((3, 6, 0), (6, 3, 1), (3, 3, 0)):
        (example,), n_truncated = encode_examples(
            row,
            tokenizer,
            max_tokens=1 + room + n_suffix,
            max_sentence_len=max_sentence_len,
            suffix=SUFFIX,
        )
        assert len(example.tokens) == 1 + 3 + n_suffix
        assert n_truncated == n_cut


@pytest.mark.parametrize("suffix", [None, SUFFIX])
def test_a_sentence_without_room_for_one_token_is_refused(tokenizer, suffix):
    n_suffix = len(pieces(tokenizer, suffix)) if suffix else 0
    with pytest.raises(ValueError) as caught:
        encode_examples(ROWS, tokenizer, max_tokens=1 + n_suffix, suffix=suffix)
    assert (f"a question of {n_suffix} tokens" in str(caught.value)) == bool(suffix)
    assert f"{1 + n_suffix} positions" in str(caught.value)


def test_a_real_prompt_is_cut_between_real_sentence_and_suffix():
    tokenizer = Tokenizer(tokenizer_model=shared_asset("models/tokenizer.model"))
    rows = read_sentences(shared_asset("data/sst-dev.txt"), n_labels=5)
    suffix = "Is this movie terrible, bad, neutral, good or great? This movie is"
    asked = pieces(tokenizer, suffix)
    examples, n_truncated = encode_examples(
        rows, tokenizer, max_tokens=1 + 20 + len(asked), suffix=suffix
    )
    sentences = [pieces(tokenizer, sentence) for sentence, _ in rows]
    assert [e.tokens for e in examples] == [[1, *ids[:20], *asked] for ids in sentences]
    assert n_truncated == sum(len(ids) > 20 for ids in sentences)


# ---------------------------------------------------------------- batches

PAD = 3
EXAMPLES = [Example(f"sentence {n}", n % 2, [1, *range(10, 10 + n % 4)]) for n in range(11)]


def test_a_batch_is_padded_on_the_right_and_carries_its_lengths():
    data = SentenceDataset(EXAMPLES, pad_id=PAD)
    batch = data.collate_fn([data[3], data[0], data[2]])
    assert batch["token_ids"].tolist() == [[1, 10, 11, 12], [1, PAD, PAD, PAD], [1, 10, 11, PAD]]
    assert batch["lengths"].tolist() == [4, 1, 3]
    assert batch["labels"].tolist() == [1, 0, 0]
    assert batch["sents"] == ["sentence 3", "sentence 0", "sentence 2"]
    for key in ("token_ids", "lengths", "labels"):
        assert batch[key].dtype == torch.int64


def test_collating_leaves_the_examples_alone():
    data = SentenceDataset([Example("a", 0, [1, 5]), Example("b", 1, [1])], pad_id=PAD)
    data.collate_fn([data[0], data[1]])
    assert [example.tokens for example in data] == [[1, 5], [1]]


def sentences_of(loader) -> list[str]:
    return [sentence for batch in loader for sentence in batch["sents"]]


@pytest.mark.parametrize("batch_size", [1, 4, 11, 50])
def test_batches_follow_the_file_and_lose_nothing(batch_size):
    data = SentenceDataset(EXAMPLES, pad_id=PAD)
    assert len(data) == len(EXAMPLES)
    loader = make_loader(data, batch_size)
    sizes = [len(batch["sents"]) for batch in loader]
    assert sizes == [min(batch_size, 11 - i) for i in range(0, 11, batch_size)]
    assert sentences_of(loader) == [example.sentence for example in EXAMPLES]
    rebuilt = [
        Example(sentence, label, ids[:length])
        for batch in loader
        for sentence, label, ids, length in zip(
            batch["sents"],
            batch["labels"].tolist(),
            batch["token_ids"].tolist(),
            batch["lengths"].tolist(),
            strict=True,
        )
    ]
    assert rebuilt == EXAMPLES


def test_a_generator_shuffles_anew_each_epoch_and_equal_seeds_agree():
    data = SentenceDataset(EXAMPLES, pad_id=PAD)
    in_order = [example.sentence for example in EXAMPLES]

    def two_epochs(seed: int) -> list[list[str]]:
        loader = make_loader(data, 4, torch.Generator().manual_seed(seed))
        return [sentences_of(loader), sentences_of(loader)]

    first, second = two_epochs(0)
    assert sorted(first) == sorted(second) == sorted(in_order)
    assert first != in_order
    assert first != second
    assert two_epochs(0) == [first, second]
    assert two_epochs(1)[0] != first


def test_shuffling_draws_from_the_given_generator_alone():
    data = SentenceDataset(EXAMPLES, pad_id=PAD)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = sentences_of(make_loader(data, 4, torch.Generator().manual_seed(7)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert sentences_of(make_loader(data, 4, torch.Generator().manual_seed(7))) == one


# ---------------------------------------------------------------- the real files


@pytest.mark.parametrize(
    ("name", "n_examples", "n_labels", "majority"),
    [
        ("sst-train", 8544, 5, None),
        ("sst-dev", 1101, 5, 0.2625),
        ("sst-test", 2210, 5, 0.2864),
        ("cfimdb-train", 1707, 2, None),
        ("cfimdb-dev", 245, 2, 0.5020),
        ("cfimdb-test", 488, 2, None),
    ],
)
def test_the_real_files_hold_what_is_known_of_them(name, n_examples, n_labels, majority):
    unlabelled = name == "cfimdb-test"
    path = shared_asset(f"data/{name}.txt")
    rows = read_sentences(path, n_labels=n_labels, unlabelled=unlabelled)
    assert len(rows) == n_examples
    labels = [label for _, label in rows]
    assert set(labels) == ({-1} if unlabelled else set(range(n_labels)))
    if majority is not None:
        largest = max(labels.count(label) for label in range(n_labels))
        assert round(largest / n_examples, 4) == majority
    lines = path.read_bytes().decode("utf-8").split("\n")
    assert [sentence for sentence, _ in rows] == [line[6:].strip() for line in lines if line]


@pytest.mark.parametrize(("name", "n_labels"), [("sst", 5), ("cfimdb", 2)])
def test_the_real_label_names_are_one_per_label(name, n_labels):
    path = shared_asset(f"data/{name}-label-mapping.json")
    assert read_label_names(path) == json.loads(path.read_text(encoding="utf-8"))
    assert len(read_label_names(path)) == n_labels


@pytest.mark.parametrize(("name", "mean", "longest"), [("sst", 27, 93), ("cfimdb", 236, 585)])
def test_the_real_sentences_have_the_known_lengths(name, mean, longest):
    tokenizer = Tokenizer(tokenizer_model=shared_asset("models/tokenizer.model"))
    rows = []
    for split in ("train", "dev", "test"):
        rows += read_sentences(shared_asset(f"data/{name}-{split}.txt"), unlabelled=split == "test")
    examples, n_truncated = encode_examples(rows, tokenizer, max_tokens=1024)
    lengths = [len(example.tokens) for example in examples]
    assert abs(sum(lengths) / len(lengths) - mean) < 1
    assert max(lengths) == longest
    assert n_truncated == 0


def loader_of(lengths, batch_size=4, seed=0):
    examples = [Example(str(i), 0, [5] * length) for i, length in enumerate(lengths)]
    generator = torch.Generator().manual_seed(seed)
    return make_loader(SentenceDataset(examples, 3), batch_size, generator, similar_lengths=True)


def batches_of(loader):
    return [batch["sents"] for batch in loader]


def test_similar_lengths_give_every_example_once_an_epoch_in_another_order_each():
    lengths = [1 + i * 37 % 50 for i in range(1001)]  # several pools, a short last batch
    loader = loader_of(lengths)
    epochs = [batches_of(loader) for _ in range(2)]
    for batches in epochs:
        assert len(batches) == len(loader) == 251
        assert sorted(len(batch) for batch in batches)[0] == 1
        read = sorted((sent for batch in batches for sent in batch), key=int)
        assert read == [str(i) for i in range(1001)]
    assert epochs[0] != epochs[1]
    assert epochs[0] == batches_of(loader_of(lengths))
    assert epochs[0] != batches_of(loader_of(lengths, seed=1))


def test_which_sentences_meet_changes_from_epoch_to_epoch():
    loader = loader_of(range(1, 1001))  # no two are of one length
    epochs = [{frozenset(batch) for batch in batches_of(loader)} for _ in range(2)]
    assert len(epochs[0] & epochs[1]) < 125  # of 250


def test_similar_lengths_pad_little_where_random_order_pads_much():
    lengths = [1 + i * 37 % 50 for i in range(1000)]
    padded = sum(batch["token_ids"].numel() for batch in loader_of(lengths, batch_size=8))
    examples = [Example(str(i), 0, [5] * length) for i, length in enumerate(lengths)]
    plain = make_loader(SentenceDataset(examples, 3), 8, torch.Generator().manual_seed(0))
    assert padded < 1.1 * sum(lengths)
    assert sum(batch["token_ids"].numel() for batch in plain) > 1.5 * sum(lengths)
