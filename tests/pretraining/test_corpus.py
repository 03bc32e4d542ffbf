"""From a text file to tokens: nothing is lost, overlap is dropped, errors say where."""

import gzip
import lzma
import os
import random
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pretraining.corpus import (
    Document,
    Overlap,
    encode_documents,
    load_corpus,
    name_of,
    read_documents,
    read_reviews,
    sentences,
    split_heldout,
    train_tokenizer,
    words_of,
)
from tokenizer import Tokenizer
from utils import InputError

LINES = ["A cat sat.\\nIt slept.", "  two  spaces ", "", " \t ", "Ärger: 東京 🎬", "x\\n\\ny"]
DOCUMENTS = ["A cat sat.\nIt slept.", "  two  spaces ", "Ärger: 東京 🎬", "x\n\ny"]
PACK = {".txt": bytes, ".xz": lzma.compress, ".gz": gzip.compress}
LONG = "".join(f"story {i} is of a cat with {i * 37 % 91} tails\n" for i in range(200)).encode()
PACKED = gzip.compress(LONG, mtime=0)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("suffix", "newline", "end", "mark"),
    [
        (".txt", "\r\n", "\r\n", "\ufeff"),
        (".xz", "\n", "", "\ufeff"),
        (".gz", "\r\n", "\r\n", ""),
    ],
)
def test_a_file_gives_its_documents_however_it_is_packed(tmp_path, suffix, newline, end, mark):
    path = tmp_path / f"text{suffix}"
    path.write_bytes(PACK[suffix]((mark + newline.join(LINES) + end).encode()))
    assert read_documents(path) == read_documents(str(path)) == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "text.xz",
            lzma.compress("good\n\nna\xefve\n".encode("latin-1")),
            ":3: byte 0xef is not",
        ),
        ("text.xz", lzma.compress(LONG)[:-9], ": is damaged"),
        ("text.xz", LONG, ": is damaged"),
        ("text.gz", LONG, ": is damaged"),
        ("text.gz", PACKED[:83] + b"\0" + PACKED[84:], ": is damaged"),
        ("text.txt", b"\n \n\t\n", ": holds no document"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}{words}"):
        read_documents(path)


def test_a_rating_and_a_tab_stand_before_a_review(tmp_path):
    path = tmp_path / "rated.tsv.gz"
    path.write_bytes(gzip.compress("0.25\tA B\\nC\r\n\n1\t é \n".encode()))
    assert read_reviews(path) == [Document("A B\nC", 0.25), Document(" é ", 1.0)]


@pytest.mark.parametrize(
    "line", ["good", "good\tfilm", "1.01\tfilm", "nan\tfilm", "0.5\t ", "-1\ta", "1\tshop\tfilm"]
)
def test_a_line_that_is_not_a_rated_review_is_named(tmp_path, line):
    path = tmp_path / "rated.tsv"
    path.write_text(f"1\tfilm\n\n{line}\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}:3: .* is not a rating from 0"):
        read_reviews(path)


# ---------------------------------------------------------------- what is held out or dropped


@pytest.mark.parametrize(("n", "n_heldout"), [(10, 1), (10, 3), (11, 10), (1000, 7)])
def test_holding_out_partitions_the_documents_at_equal_distances(n, n_heldout):
    train, held = split_heldout([str(i) for i in range(n)], n_heldout)
    places = [int(text) for text in held]
    assert len(places) == n_heldout
    assert train == [str(i) for i in range(n) if i not in places]
    gaps = np.diff([*places, n + places[0]])  # around the ring
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("she does n't know", "she doesn't know"),
        ("The FILM, at last, WORKS!", "the film at last works"),
        ("it 's a well-made (if long) film .", "Its a well made, if long, film"),
        ("they 'll see 12_000 stars", "they'll see 12 000 stars"),
        ("goofy -LRB- and gory -RRB- stuff .", "Goofy (and gory) stuff."),
    ],
)
def test_words_ignore_case_punctuation_and_split_contractions(one, other):
    assert words_of(one) == words_of(other) != ()


def kept_of(documents: list[str], evaluation: list[str], n: int) -> list[str]:
    overlap = Overlap(evaluation, n)
    return [text for text in documents if overlap.found_in(text) is None]


def test_exactly_the_documents_that_share_n_words_in_a_row_are_dropped():
    evaluation = ["The cat sat on the mat."]
    documents = ["a cat sat on mats", "the CAT, sat: on", "on the mat the cat sat", "cat"]
    assert kept_of(documents, evaluation, 4) == ["a cat sat on mats", *documents[2:]]
    assert kept_of(documents, evaluation, 3) == ["cat"]
    assert Overlap(evaluation, 3).found_in("Then the CAT, sat: on") == "the cat sat"

    rng = random.Random(6)
    texts = [" ".join(rng.choices("abc", k=8)) for _ in range(60)]
    for n in (2, 5, 8):
        runs = {text[2 * i : 2 * (i + n) - 1] for text in texts[50:] for i in range(9 - n)}
        kept = [text for text in texts[:50] if not any(run in text for run in runs)]
        assert kept_of(texts[:50], texts[50:], n) == kept


def test_a_short_evaluation_text_counts_as_a_whole_sentence_of_a_document():
    evaluation = ["It 's a good film .", "Too long !", "Do n't miss it now"]
    documents = [
        "I went. It's a GOOD film! We left.",
        '"Don\'t miss it now." he said',
        "Line one\ndo not miss it\nDon't miss it now",
        "It's a good film and too long.",  # the words, in a longer sentence
        "Too long!",  # fewer than four words say nothing
    ]
    assert kept_of(documents, evaluation, 9) == documents[3:]
    assert Overlap(evaluation, 9).found_in(documents[0]) == "its a good film"
    two = ["It 's slow . Very , very slow ."]
    documents = ["He left. It's slow. Very, very slow. So what?", "Very, very slow. It's slow."]
    assert kept_of(documents, two, 9) == documents[1:]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Good. Bad! So?", ["Good.", "Bad!", "So?"]),
        ('He said "no." She left', ['He said "no."', "She left"]),
        ("\u201cBad.\u201d I agree", ["\u201cBad.\u201d", "I agree"]),
        ("Mr. Lee and J. R. Doe met Dr. No in 1.5 hours", None),
        ("one\n\ntwo ... three", ["one", "two ...", "three"]),
    ],
)
def test_a_text_falls_into_sentences(text, parts):
    assert sentences(text) == (parts or [text])


def test_a_file_is_called_what_stands_before_its_suffixes():
    names = ["a/films.tsv.xz", "films.2020.txt", "films.2020.txt.gz", "films"]
    assert [name_of(name) for name in names] == ["films", "films.2020", "films.2020", "films"]
    assert name_of(os.fsdecode(b"caf\xe9.txt")) == r"caf\udce9"  # Linux takes any bytes


def write(path, *documents: str) -> str:
    path.write_text("\n".join(documents), encoding="utf-8")
    return str(path)


def test_a_document_equal_to_one_held_out_of_any_file_is_not_trained_on(tmp_path, capsys):
    one = write(tmp_path / "one.txt", "same", *map(str, range(8)), "same")
    other = write(tmp_path / "other.txt", "held", "8", "same", "9")
    test = write(tmp_path / "test.txt", "0 ||| he read number SEVEN", "1 ||| 7 and 7")
    rated = write(tmp_path / "rated.tsv", "1\tHe read number seven", "0\tb", "0.5\t9", "1\tsame")
    train, held = load_corpus([one, other, other], [rated], 1, [test], exclude_words=3)
    expected = {one: Document("same"), other: Document("held"), rated: Document("b", 0.0)}
    assert held == {path: [document] for path, document in expected.items()}
    assert train == {
        one: [Document(str(i)) for i in range(8)],
        other: [Document("8"), Document("9")],
        rated: [Document("9", 0.5)],
    }
    assert capsys.readouterr().out.splitlines() == [
        f"{rated}: dropped 'He read number seven', which has 'he read number'",
        f"{one}: 10 documents, 0 dropped for overlap, 1 held out, 8 to train on",
        f"{other}: 4 documents, 0 dropped for overlap, 1 held out, 2 to train on",
        f"{rated}: 4 documents, 1 dropped for overlap, 1 held out, 1 to train on",
    ]
    test = write(tmp_path / "x.txt", "3 ||| 5")
    (train,) = load_corpus([one], [], 1, [test], exclude_words=1)[0].values()
    texts = [document.text for document in train]
    assert "5" not in texts and "3" in texts  # the label of an evaluation line is not a word


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        (["one"], "--heldout 1 of 1 documents leaves none to train on"),
        (["one"] * 50, "all its documents are held out, or equal to one that is"),
    ],
)
def test_a_text_that_leaves_nothing_to_train_on_is_named(tmp_path, documents, words):
    path = write(tmp_path / "few.txt", *documents)
    with pytest.raises(InputError, match=f"^{re.escape(path)}: {words}"):
        load_corpus([path], [], 1, [], 9)


# ---------------------------------------------------------------- the tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("trained") / "tokenizer.model"
    train_tokenizer([f"The cat sat in {1900 + i} halls.\nIt purred." for i in range(80)], 320, path)
    return Tokenizer(tokenizer_model=path)


# Any Unicode except surrogates, which UTF-8 lacks, and SentencePiece's own sign for a space.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@given(text=ANY_TEXT, ends=st.booleans())
@example(text=" a  b \n\r\n\\n\t<s><0x0A>\u200be\u0301", ends=True)
def test_decoding_undoes_encoding_of_any_text(trained, text, ends):
    assert trained.decode(trained.encode(text, bos=ends, eos=ends)) == text


def test_every_byte_is_a_token_and_digits_stand_alone(trained):
    pieces = [trained.sp_model.id_to_piece(i) for i in range(trained.n_words)]
    assert trained.n_words == 320
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= set(pieces)
    learned = [piece for piece in pieces if not piece.startswith("<0x")]
    assert any(piece.endswith("at") for piece in learned)
    assert all(len(piece) == 1 for piece in learned if re.search(r"\d", piece))


# ---------------------------------------------------------------- tokens


def test_documents_begin_with_bos_and_are_otherwise_their_pieces(trained):
    texts = ["cat 1\nsat", "", "東京"]
    encoded = encode_documents(trained, texts)
    assert {ids.dtype for ids in encoded} == {np.dtype("int32")}
    assert [ids.tolist() for ids in encoded] == [
        [trained.bos_id, *trained.sp_model.encode(text)] for text in texts
    ]
