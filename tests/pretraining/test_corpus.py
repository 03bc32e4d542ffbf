"""From a text file to windows of tokens: nothing lost, nothing read twice, faults named."""

import gzip
import lzma
import random
import re
from itertools import pairwise

import numpy as np
import pytest
import torch

from pretraining.corpus import (
    TokenStream,
    encode_documents,
    ngrams,
    read_documents,
    split_heldout,
    train_tokenizer,
    windows,
    without_overlap,
)
from tokenizer import Tokenizer

LINES = [
    "A cat sat.\\nIt slept.",
    "  two  spaces ",
    "",
    " \t ",
    "Ärger im Kino: 東京 🎬",
    "x\\n\\ny",
]
DOCUMENTS = ["A cat sat.\nIt slept.", "  two  spaces ", "Ärger im Kino: 東京 🎬", "x\n\ny"]
PACK = {".txt": bytes, ".xz": lzma.compress, ".gz": gzip.compress}
LONG = "".join(f"story {i} is of a cat with {i * 37 % 91} tails\n" for i in range(200)).encode()


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_a_file_gives_its_documents_however_it_is_packed(tmp_path, suffix, newline, last):
    path = tmp_path / f"text{suffix}"
    path.write_bytes(PACK[suffix]((newline.join(LINES) + newline * last).encode()))
    assert read_documents(path) == read_documents(str(path)) == DOCUMENTS


@pytest.mark.parametrize("suffix", PACK)
def test_what_is_not_utf8_is_named_by_file_and_line(tmp_path, suffix):
    path = tmp_path / f"text{suffix}"
    path.write_bytes(PACK[suffix]("good\n\nna\xefve\n".encode("latin-1")))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}:3: .*UTF-8"):
        read_documents(path)


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
@pytest.mark.parametrize("damage", ["end cut off", "middle cut off", "not packed", "byte changed"])
def test_a_damaged_file_is_named(tmp_path, suffix, damage):
    packed = PACK[suffix](LONG)
    path = tmp_path / f"text{suffix}"
    path.write_bytes(
        {
            "end cut off": packed[:-9],
            "middle cut off": packed[:99],
            "not packed": LONG,
            "byte changed": packed[:83] + bytes([packed[83] ^ 0x55]) + packed[84:],
        }[damage]
    )
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: is damaged"):
        read_documents(path)


@pytest.mark.parametrize("suffix", PACK)
def test_a_file_without_a_document_is_named(tmp_path, suffix):
    path = tmp_path / f"text{suffix}"
    path.write_bytes(PACK[suffix](b"\n \n\t\n"))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: holds no document"):
        read_documents(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_documents(path)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "nowhere.xz", tmp_path):
        with pytest.raises(FileNotFoundError) as raised:
            read_documents(path)
        assert raised.value.filename == str(path)


# ---------------------------------------------------------------- what is held out or dropped


@pytest.mark.parametrize(("n", "n_heldout"), [(10, 1), (10, 3), (11, 10), (1000, 7), (5, 0)])
def test_holding_out_partitions_the_documents_at_equal_distances(n, n_heldout):
    train, held = split_heldout([str(i) for i in range(n)], n_heldout)
    places = [int(text) for text in held]
    assert len(places) == n_heldout
    assert train == [str(i) for i in range(n) if i not in places]
    if places:
        gaps = np.diff([*places, n + places[0]])  # around the ring
        assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("n_heldout", [3, 4])
def test_holding_out_everything_is_refused(n_heldout):
    with pytest.raises(ValueError, match=rf"{n_heldout} held-out documents of 3"):
        split_heldout(["a", "b", "c"], n_heldout)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("she does n't know", "she doesn't know"),
        ("The FILM, at last, WORKS!", "the film at last works"),
        ("it 's a well-made (if long) film .", "Its a well made, if long, film"),
        ("they 'll see 12_000 stars", "they'll see 12 000 stars"),
        ("we ca\nn't", "we can't"),
    ],
)
def test_runs_of_words_see_through_case_punctuation_and_split_contractions(one, other):
    assert list(ngrams(one, 2)) == list(ngrams(other, 2)) != []


def test_runs_of_words_are_all_windows_of_n_words():
    words = list("abc5é")
    for n in range(1, 7):
        expected = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        assert list(ngrams(" ".join(words), n)) == expected


def test_exactly_the_documents_that_share_n_words_in_a_row_are_dropped():
    rng = random.Random(6)
    texts = [" ".join(rng.choices("abc", k=8)) for _ in range(60)]
    documents, evaluation = texts[:50], texts[50:]

    def shares(one: str, other: str, n: int) -> bool:
        runs = [one[2 * i : 2 * (i + n) - 1] for i in range(8 - n + 1)]  # one letter, one space
        return any(run in other for run in runs)

    for n in (2, 5, 6, 8):
        kept = [d for d in documents if not any(shares(d, e, n) for e in evaluation)]
        assert without_overlap(documents, iter(evaluation), n) == kept
        assert n in (2, 8) or 0 < len(kept) < len(documents)


# ---------------------------------------------------------------- the tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("trained") / "tokenizer.model"
    tales = [f"The cat sat in {1900 + i} halls.\nIt purred {i} times." for i in range(80)]
    train_tokenizer(tales, 320, path)
    return Tokenizer(tokenizer_model=path)


def random_text(rng: random.Random) -> str:
    ranges = [(0, 0x80)] * 4 + [(0x80, 0x2581), (0x2582, 0xD800), (0xE000, 0x110000)]
    letters = [chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(12))]
    words = [
        "cat",
        " ",
        "  ",
        "\n",
        "\\n",
        "\t",
        "<s>",
        "<0x0A>",
        "2024",
        "\r\n",
        "\u200b",
        "e\u0301",
    ]
    return "".join(rng.choices([*letters, *words], k=rng.randrange(20)))


def test_decoding_undoes_encoding_of_any_text(trained):
    rng = random.Random(7)
    texts = [random_text(rng) for _ in range(1500)] + [" a", "   a  b ", "\n\n", "\n a", ""]
    for text in texts:
        for bos, eos in [(False, False), (True, True)]:
            assert trained.decode(trained.encode(text, bos=bos, eos=eos)) == text


def test_every_byte_is_a_token_and_the_pad_is_the_byte_zero(trained):
    pieces = {trained.sp_model.id_to_piece(i) for i in range(trained.n_words)}
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= pieces
    assert trained.sp_model.id_to_piece(trained.pad_id) == "<0x00>"
    assert trained.n_words == 320


def test_digits_stand_alone(trained):
    pieces = [trained.sp_model.id_to_piece(i) for i in range(trained.n_words)]
    learned = [piece for piece in pieces if not piece.startswith("<0x")]
    assert any(piece.endswith("at") for piece in learned)
    assert all(piece.isdigit() for piece in learned if re.search(r"\d", piece))
    assert all(len(piece) == 1 for piece in learned if piece.isdigit())


@pytest.mark.parametrize("vocab_size", [100, 50_000])
def test_a_vocabulary_the_text_cannot_fill_is_refused_and_leaves_no_file(tmp_path, vocab_size):
    with pytest.raises(ValueError, match=f"^--vocab_size {vocab_size}: ") as raised:
        train_tokenizer(["a cat sat on a mat"] * 9, vocab_size, tmp_path / "tokenizer.model")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_is_trained_on_at_most_n_documents_from_all_over(tmp_path):
    tales = [f"{chr(0x4E00 + i)} tale" for i in range(100)]  # each has a character of its own
    train_tokenizer(tales, 300, tmp_path / "few.model", n_documents=30)
    model = Tokenizer(tokenizer_model=tmp_path / "few.model").sp_model
    pieces = "".join(model.id_to_piece(i) for i in range(model.vocab_size()))
    known = [i for i, tale in enumerate(tales) if tale[0] in pieces]
    assert len(known) <= 30
    assert known[0] < 10 and known[-1] > 90


# ---------------------------------------------------------------- tokens


def test_documents_begin_with_bos_and_are_otherwise_their_encoding(trained):
    texts = [f"cat {i}\nsat" for i in range(2003)]  # more than are encoded at a time
    encoded = encode_documents(trained, texts)
    assert [ids.tolist() for ids in encoded] == [trained.encode(t, True, False) for t in texts]
    assert {ids.dtype for ids in encoded} == {np.dtype("int32")}


def numbered_documents(lengths=(7, 1, 12, 5, 9, 3, 14, 2)) -> list[np.ndarray]:
    """Every token of all documents is another number."""
    return np.split(np.arange(sum(lengths), dtype=np.int32), np.cumsum(lengths)[:-1])


def test_windows_are_slices_that_share_one_token():
    stream = np.arange(100, 150, dtype=np.int32)
    batch = windows(stream, seq_len=7, start=2, count=4)
    assert batch.dtype == torch.int64
    assert batch.tolist() == [stream[i * 7 : i * 7 + 8].tolist() for i in range(2, 6)]


@pytest.mark.parametrize("seq_len", [1, 4, 5])
def test_an_epoch_reads_every_token_once_and_predicts_the_one_behind_it(seq_len):
    documents = numbered_documents()
    n_tokens = sum(map(len, documents))
    stream = TokenStream(documents, seq_len, seed=3)
    for epoch in range(3):
        rows = [stream.next_batch(1)[0] for _ in range((n_tokens - 1) // seq_len)]
        assert stream.position == (epoch, len(rows))
        read = torch.cat([row[:-1] for row in rows]).tolist()
        assert torch.cat([row[1:] for row in rows]).tolist() == [*read[1:], rows[-1][-1]]
        tail = n_tokens - len(read)
        assert len(set(read)) == len(read) and 1 <= tail <= seq_len
        starts = {int(document[0]) for document in documents}
        breaks = {b for a, b in pairwise(read) if b != a + 1}
        assert breaks <= starts  # documents stay whole


def test_the_order_is_a_function_of_seed_and_epoch():
    def epochs(seed: int) -> list[list[int]]:
        stream = TokenStream(numbered_documents(), 7, seed)
        return [stream.next_batch(7)[:, :-1].flatten().tolist() for _ in range(3)]

    assert epochs(1) == epochs(1)
    orders = {tuple(order) for seed in (1, 2) for order in epochs(seed)}
    assert len(orders) == 6


@pytest.mark.parametrize("n_rows", [1, 2, 5])
def test_a_stream_goes_on_from_any_position(n_rows):
    def stream(position=(0, 0)):
        return TokenStream(numbered_documents(), 4, seed=9, position=position)

    whole, batches, positions = stream(), [], []
    for _ in range(30):  # several epochs of 13 windows
        positions.append(whole.position)
        batches.append(whole.next_batch(n_rows))
    assert whole.position[0] >= 2
    for i, position in enumerate(positions):
        resumed = stream(position)
        assert resumed.position == position
        assert all(torch.equal(resumed.next_batch(n_rows), batch) for batch in batches[i:])


def test_a_text_too_small_for_a_batch_is_refused_in_one_line():
    stream = TokenStream(numbered_documents(), 8, seed=0)  # 53 tokens: 6 windows and a tail
    stream.next_batch(6)
    with pytest.raises(ValueError, match=r"6 windows of 8 tokens, a batch takes 7") as raised:
        stream.next_batch(7)
    assert "\n" not in str(raised.value)
