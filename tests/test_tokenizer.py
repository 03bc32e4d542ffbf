"""The tokenizer against SentencePiece itself, and which model file a checkpoint gets."""

import os
import re
import shutil

import pytest
import sentencepiece

import tokenizer as tokenizer_module
from conftest import ROOT, shared_asset, train_sentencepiece
from helpers import refusal
from hostile import sentencepiece_model
from tokenizer import TOKENIZER_MODEL, Tokenizer, find_tokenizer_model, open_tokenizer
from utils import InputError, sha256_of

TEXTS = [
    "this movie is good",
    "Amélie, naïve façade: ÄÖÜ ß",
    "東京物語 / Дерсу Узала / שלום / مرحبا",
    "🎬👩‍👩‍👧 great 🙂!",
    "a  b   c\ttabs\nand\nlines",
    "x",
    "",
]
REAL = {"models/tokenizer.model": 32000, "models/stories260K/tok512.model": 512}


def train_tiny(folder, **options) -> str:
    """A SentencePiece model of the given traits; returns its file."""
    text = "a good film\na bad film\nthe story was good\n" * 4
    return str(train_sentencepiece(folder, text, **options))


@pytest.mark.parametrize("model", REAL)
def test_the_real_tokenizers_have_llamas_special_tokens_and_decoding_undoes_encoding(model):
    tokenizer = Tokenizer(tokenizer_model=shared_asset(model))
    tokenizer.require_vocab_size(REAL[model])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    for text in TEXTS:
        if "tok512" in model:  # its own normalization squeezes runs of spaces
            text = re.sub(" +", " ", text)
        assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_bos_comes_first_and_eos_last_around_the_pieces(tokenizer, tokenizer_file, text):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file)).encode(text)
    bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
    assert tokenizer.encode(text, bos=False, eos=False) == pieces
    assert tokenizer.encode(text, bos=True, eos=False) == bos + pieces
    assert tokenizer.encode(text, bos=False, eos=True) == pieces + eos
    assert tokenizer.encode(text, bos=True, eos=True) == bos + pieces + eos
    assert tokenizer.decode(bos + pieces + eos) == text


def test_a_path_that_is_not_utf8_is_a_path_like_any_other(tokenizer_file, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.model")
    shutil.copyfile(tokenizer_file, path)
    assert Tokenizer(tokenizer_model=path).n_words == 320


def test_max_len_is_positive_and_bounds_the_pieces_alone(tokenizer, tokenizer_file):
    text = "this movie is good and the story was bad"
    for max_len in (1, 3, 100):
        short = Tokenizer(max_len=max_len, tokenizer_model=tokenizer_file)
        pieces = tokenizer.encode(text, bos=False, eos=False)[:max_len]
        assert short.encode(text, bos=False, eos=False) == pieces
        assert short.encode(text, bos=True, eos=True) == [short.bos_id, *pieces, short.eos_id]
    for max_len in (0, -1):
        with pytest.raises(InputError, match=f"max_len={max_len} "):
            Tokenizer(max_len=max_len, tokenizer_model=tokenizer_file)


def test_padding_is_the_zero_byte_and_every_id_has_an_embedding(tokenizer):
    assert tokenizer.sp_model.id_to_piece(tokenizer.pad_id) == "<0x00>"
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert len(special & set(range(tokenizer.n_words))) == 3


# ---------------------------------------------------------------- files


def test_without_a_name_the_tokenizer_at_the_root_is_read(tokenizer_file, monkeypatch):
    assert TOKENIZER_MODEL == ROOT / "tokenizer.model"
    monkeypatch.setattr(tokenizer_module, "TOKENIZER_MODEL", tokenizer_file)
    assert Tokenizer().model_path == str(tokenizer_file)
    assert Tokenizer().n_words == 320


def test_a_missing_tokenizer_is_named_with_the_remedy(tmp_path):
    for path in (tmp_path / "absent.model", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"setup\.sh") as caught:
            Tokenizer(tokenizer_model=path)
        assert caught.value.filename == str(path)


def refusal_of(path) -> str:
    return refusal(lambda path: Tokenizer(tokenizer_model=path), path)


def test_a_git_lfs_pointer_is_told_to_be_pulled(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", encoding="utf-8"
    )
    assert re.match("is a git-lfs pointer.*`git lfs pull`", refusal_of(path))


PIECES = [(b"<unk>", 0.0, 2), (b"<s>", 0.0, 3), (b"</s>", 0.0, 3)]
PIECES += [(b"<0x%02X>" % i, 0.0, 6) for i in range(256)]


def test_a_file_that_is_no_sentencepiece_model_is_named(tmp_path, capfd):
    path = tmp_path / "tokenizer.model"
    sound, pieceless, no_text = (
        sentencepiece_model(pieces, [(3, 2), (35, 1)], [])
        for pieces in (PIECES, [], [*PIECES, (b"a\xe2\x96", 0.0, 1)])
    )
    path.write_bytes(sound)
    assert Tokenizer(tokenizer_model=path).n_words == 259
    page = b"<!DOCTYPE html><title>Not found</title>"
    for content in (b"", page, bytes(1000), sound[: len(sound) // 2], pieceless, no_text):
        path.write_bytes(content)
        assert refusal_of(path) == "is not a SentencePiece model"
        assert capfd.readouterr().err == ""  # SentencePiece itself adds nothing


@pytest.mark.parametrize("lacking", [{"bos_id": -1}, {"eos_id": -1}])
def test_a_model_without_bos_or_eos_is_refused(tmp_path, lacking):
    path = train_tiny(tmp_path, **lacking)
    assert refusal_of(path) == "has no bos or no eos; train it with both"


def test_a_model_without_byte_fallback_works_until_padding_is_needed(tmp_path):
    path = train_tiny(tmp_path, byte_fallback=False, vocab_size=30)
    tokenizer = Tokenizer(tokenizer_model=path)
    ids = tokenizer.encode("a good film", bos=True, eos=False)
    assert tokenizer.decode(ids) == "a good film"
    said = refusal(lambda _: tokenizer.pad_id, path)
    assert re.match("has no <0x00> to pad batches with.* with byte fallback", said)


def test_a_vocabulary_of_another_size_is_refused_naming_both(tokenizer, tokenizer_file):
    tokenizer.require_vocab_size(320)
    for size in (319, 321):
        words = f"has 320 tokens, the checkpoint has {size}: .*--tokenizer_path"
        with pytest.raises(InputError, match=f"^{re.escape(str(tokenizer_file))} {words}"):
            tokenizer.require_vocab_size(size)


@pytest.mark.parametrize(
    ("beside", "found"),
    [
        (["tok512.model"], "tok512.model"),
        (["a.model", "tokenizer.model", "z.model"], "tokenizer.model"),
        (["tokenizer.model.bak", "tokenizer.txt"], None),
    ],
)
def test_a_checkpoint_takes_the_tokenizer_beside_it_or_else_the_one_at_the_root(
    tmp_path, monkeypatch, beside, found
):
    for name in beside:
        (tmp_path / name).touch()
    (tmp_path / "folder.model").mkdir()
    (tmp_path / "folder.model/tokenizer.model").touch()  # not beside
    expected = tmp_path / found if found else TOKENIZER_MODEL
    assert find_tokenizer_model(tmp_path / "model.pt") == expected
    monkeypatch.chdir(tmp_path)
    assert find_tokenizer_model("model.pt") == expected


def test_of_several_tokenizers_beside_a_checkpoint_none_is_guessed(tmp_path):
    for name in ("z.model", "a.model"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"beside it are a.model, z.model; .* --tokenizer_path"):
        find_tokenizer_model(tmp_path / "model.pt")


@pytest.mark.parametrize("recorded", ["a" * 5000, "gone.model", "", "\0"])
def test_a_recorded_tokenizer_that_is_not_there_is_named_on_a_short_line(tmp_path, recorded):
    with pytest.raises(InputError) as caught:
        open_tokenizer(tmp_path / "kept.pt", {"tokenizer_path": recorded})
    assert "was not found" in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) + 300


def test_a_finetuned_checkpoint_finds_its_tokenizer_and_refuses_another(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "runs").mkdir()
    own = train_tiny(tmp_path / "runs")
    another = train_tiny(tmp_path / "other", vocab_size=290)
    saved = {"tokenizer_path": "tokenizer.model", "tokenizer_sha256": sha256_of(own)}
    checkpoint = tmp_path / "runs" / "best.pt"
    monkeypatch.chdir(tmp_path / "other")  # which has a tokenizer of that name, too
    assert sha256_of(open_tokenizer(checkpoint, saved).model_path) == sha256_of(own)
    assert open_tokenizer(checkpoint, saved, own).model_path == own
    with pytest.raises(InputError, match="was trained with a different tokenizer than") as caught:
        open_tokenizer(checkpoint, saved, another)
    assert "--tokenizer_path" in str(caught.value)
    (tmp_path / "runs" / "tokenizer.model").unlink()
    with pytest.raises(InputError, match="was trained with a different tokenizer than"):
        open_tokenizer(checkpoint, saved)


def test_a_linked_checkpoint_has_the_tokenizer_beside_the_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model.pt").touch()
    (tmp_path / "link.pt").symlink_to(tmp_path / "elsewhere" / "model.pt")
    (tmp_path / "tokenizer.model").touch()
    assert find_tokenizer_model(tmp_path / "link.pt") == tmp_path / "tokenizer.model"
