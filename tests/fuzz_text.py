"""Fuzz targets that are text or make tokens of it: data, label names, tokenizer models."""

import json
from pathlib import Path

from hypothesis import strategies as st

import hostile
import run_llama
from fuzz import Inputs
from fuzz_shared import JSON_TEXTS, JSON_VALUES, assets, mutated, tokenizer
from tokenizer import Tokenizer
from training.dataset import encode_examples
from training.labelled import read_label_names, read_sentences

# ---------------------------------------------------------------- data files and label names

FRAGMENTS = [
    *(b"0", b"1", b"-1", b"2", b"+1", b"00", b"1.0", b"999999999", b"9" * 5000, b"\xd9\xa1"),
    *(b" ||| ", b" ||| ", b" ||| ", b"|||", b" |||", b"||| ", b" || ", b"\t|||\t"),
    *(b"\n", b"\n", b"\n", b"\r", b"\r\n", b"\x0b", b"\x0c", b"\x1c", "\x85\u2028".encode()),
    *(b"\0", b"\xed\xa0\x80", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc0\x80", b"\xf4\x90\x80\x80"),
    *("é漢😀".encode(), "é".encode("latin-1"), "0 ||| a".encode("utf-16"), b"good film", b" "),
]
LINE = st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=6), max_size=8).map(b"".join)
GOOD_LINE = st.tuples(st.sampled_from([b"0", b"1", b"-1"]), st.text(max_size=8)).map(
    lambda pair: pair[0] + b" ||| " + pair[1].encode("utf-8", "surrogatepass") + b"\n"
)
LONG = st.sampled_from([b"a", b"a ", b"\0", " é".encode(), b"|"]).map(
    lambda unit: b"0 ||| " + unit * (10**6 // len(unit))
) | st.just(b"0 ||| a\n" * 20_000)
DATA = st.one_of(*[st.lists(GOOD_LINE | LINE, max_size=6).map(b"".join)] * 200, LONG)


def act_data() -> None:
    name = next(name for name in ("toy-dev.txt", "toy-test.txt") if Path(name).exists())
    rows = read_sentences(name, 2, unlabelled="test" in name)
    examples, _ = encode_examples(rows, tokenizer(), max_tokens=64, suffix="Is this movie good?")
    sentences = [example.sentence for example in examples]
    run_llama.write_predictions_to_file("dev", "out.txt", None, [0] * len(rows), sentences)


def act_labels() -> None:
    folder = assets()
    names = read_label_names("labels.json")
    run_llama.prompt_suffix(names)
    run_llama.main(
        [
            *("--option", "prompt", "--label-names", "labels.json"),
            *("--pretrained-model-path", str(folder / "model.pt")),
            *("--dev", str(folder / "two.txt"), "--test", str(folder / "two.txt")),
            *("--dev_out", "toy-dev-prompting-output.txt"),
            *("--test_out", "toy-test-prompting-output.txt"),
        ]
    )


NAMES = st.lists(st.text(max_size=5) | st.sampled_from(["bad", "good", " ", "\ud800"]), max_size=5)
LABELS = st.one_of(
    st.sampled_from(JSON_TEXTS),
    (NAMES | JSON_VALUES).map(lambda value: json.dumps(value).encode()),
    NAMES.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    mutated(b'["bad", "good", "very good"]'),
)

# ---------------------------------------------------------------- tokenizer models

PIECES = [
    b"a",
    b"b",
    b"ab",
    "▁".encode(),
    "▁a".encode(),
    b"the",
    b"th",
    b"e",
    b"x" * 300,
    b"\xff",
    b"\0",
]
PIECES += [
    b"\xe2\x96",
    b"",
    b"\xed\xa0\x80",
    b" ",
    b"\n",
    b"<s>",
    b"<0x00>",
    b"<0x41>",
    b"<0xZZ>",
    b"aaaa",
]
UNITS = st.sampled_from([0, 1, 2**9 - 1, 2**31, 2**32 - 1, 2**20]) | st.integers(0, 2**32 - 1)
CHARSMAPS = st.tuples(st.lists(UNITS, max_size=40), st.sampled_from([1, 4, 256, 1024])).flatmap(
    lambda drawn: st.tuples(
        st.just(drawn[0] * drawn[1] if len(drawn[0]) < 6 else drawn[0]),
        st.sampled_from([None, None, None, 0, 4, 2**32 - 1]),
        st.sampled_from([b"", b"\0", b"abc\0", b"abc", b"\xff\0"]),
    )
).map(lambda t: hostile.charsmap(t[0], 4 * len(t[0]) if t[1] is None else t[1], t[2]))  # fmt: skip


@st.composite
def tokenizer_files(draw: st.DrawFn) -> Inputs:
    """A model of a few pieces that differs from a sound one in a few places."""
    if draw(st.integers(0, 3)) == 0:
        whole = (assets() / "tokenizer.model").read_bytes()
        return {"tokenizer.model": draw(mutated(whole))}
    pieces = [(b"<unk>", 0.0, 2), (b"<s>", 0.0, 3), (b"</s>", 0.0, 3)]
    pieces += [(b"<0x%02X>" % i, 0.0, 6) for i in range(256)]
    sound = draw(st.booleans())
    odd = st.sampled_from(PIECES) | st.binary(max_size=4)
    texts = draw(st.lists(st.sampled_from(PIECES[:8]) if sound else odd, max_size=10))
    scores = st.sampled_from([0.0, -1.0, -2.5, 1e38, -1e38]) | st.floats(width=32)
    score = st.sampled_from([0.0, -1.0, -1e38]) if sound else scores
    kinds = st.sampled_from([1, 1, 1, 4, 5]) if sound else st.integers(-1, 8)
    pieces += [
        (text, draw(score), draw(kinds)) for text in dict.fromkeys(texts) if text or not sound
    ]
    for _ in range(0 if sound else draw(st.sampled_from([0, 0, 1, 2]))):
        at = draw(st.integers(0, len(pieces) - 1))
        pieces[at] = (draw(st.sampled_from(PIECES)), draw(scores), draw(st.integers(0, 7)))
    if draw(st.integers(0, 9)) == 0:
        pieces = pieces[draw(st.integers(0, len(pieces))) :]
    trainer = [
        (3, draw(st.sampled_from([1, 2, 3, 4, 0, 99]))),
        (35, 1 if sound else draw(st.integers(0, 1))),
    ]
    ids = st.sampled_from([-1, 0, 1, 2, 258, 10**6, 2**31 - 1, -(2**31)])
    trainer += [(key, draw(ids)) for key in draw(st.lists(st.integers(40, 43), max_size=2))]
    words = st.sampled_from([b"", b"<s>", b"a", b"\xff", b"none", b"<0x00>"])
    trainer += [(key, draw(words)) for key in draw(st.lists(st.integers(44, 48), max_size=2))]
    normalizer = [(key, draw(st.integers(0, 1))) for key in (3, 4, 5)]
    if draw(st.booleans()):
        normalizer.append((2, draw(CHARSMAPS)))
    return {"tokenizer.model": hostile.sentencepiece_model(pieces, trainer, normalizer)}


def act_tokenizer() -> None:
    loaded = Tokenizer(tokenizer_model="tokenizer.model")
    for text in ("the aaaa ab x", "\0 é漢 \n", "▁" * 50, "a" * 3000, ""):
        ids = loaded.encode(text, bos=True, eos=True)
        if not all(0 <= i < loaded.n_words for i in ids):
            raise AssertionError(f"ids out of range: {ids[:20]}")
        loaded.decode(ids).encode()
    loaded.decode(list(range(loaded.n_words))).encode()
