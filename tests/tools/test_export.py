"""Exports against transformers, safetensors and llama2.c's published file; imports of theirs."""

import itertools
import json
import random
import shutil
import socket
import struct
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_checkpoint import little_memory, write_bin

import cli
import oracle
from advanced.methods.adapter import add_adapters
from advanced.methods.lora import add_lora, merge
from advanced.methods.pooling import AttentionPooling
from advanced.methods.prompting import PromptClassifier
from classifier import LlamaEmbeddingClassifier
from conftest import (
    ROOT,
    random_llama,
    randomize,
    save_llama,
    shared_asset,
    train_sentencepiece,
)
from formats.checkpoint import read_checkpoint
from formats.safetensors_file import read_safetensors, write_safetensors
from formats.tokenizers import tokenizer_json, unknown_to_llama2c
from hostile import sentencepiece_model
from llama import Llama, load_pretrained
from tokenizer import Tokenizer
from tools import export
from training.interrupts import Stopped
from training.loop import save_classifier
from utils import save_torch_file, sha256_of

TOKENS = torch.randint(320, (2, 17), generator=torch.Generator().manual_seed(5))
TOKENS[0, 4] = 3  # the pad token, which transformers could treat in its own way
FOLDER = [
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
]
TEXTS = [
    *("", " ", "  ", "a", " a", "a ", "  a  b  ", "\n", "\n\n a\t b", "\r\n", "a\n", "\x00 \x01"),
    *("héllo naïve", "日本語のテキスト", "e\u0301 é", "\ufb01 ① \uff21", "\ufffd", "\u00a0x\u3000"),
    *("😀 so 👩\u200d👩\u200d👧 good 🇫🇷", "<s>", "a<s>b</s> <unk>", "<0x0A><0x00>", "▁", "▁▁a ▁ ▁"),
    *("12345 67.89", "don't -- stop...", "Once upon a time, there was a little girl named Lily."),
]
GREEDY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
)


@pytest.fixture(scope="module")
def transformers():
    package = pytest.importorskip("transformers", reason="development extra")
    package.utils.logging.disable_progress_bar()
    return package


@pytest.fixture
def call(capsys):
    """call(...) is (exit code, standard output, standard error) of the command."""

    def run(*argv) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: export.main([str(word) for word in argv]))
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def place(tmp_path, tokenizer_file, monkeypatch) -> Path:
    """The current folder: nothing in it but a tokenizer."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(tokenizer_file, "tokenizer.model")
    return tmp_path


def untied(**shape) -> Llama:
    model = random_llama(**shape)
    weights = dict(model.state_dict())
    generator = torch.Generator().manual_seed(4)
    weights["output.weight"] = torch.randn(weights["output.weight"].shape, generator=generator)
    return Llama.from_weights(model.config, weights)


def refused(answer: tuple[int, str, str]) -> str:
    """The one line in which a command ended that wrote nothing."""
    code, out, error = answer
    assert (code, out) == (2, "")
    assert error.count("\n") == 1 and error.endswith("\n") and ": error: " in error
    return error


def assert_same_weights(path: Path | str, model: Llama) -> Llama:
    loaded = load_pretrained(path)
    expected, actual = model.state_dict(), loaded.state_dict()
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []
    tied = model.output.weight is model.tok_embeddings.weight
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == tied
    return loaded


def logits_of(theirs, tokens: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return theirs(tokens).logits.float().numpy()


def causal_logits(checkpoint: Path | str, tokens: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return load_pretrained(checkpoint, attention="causal")(tokens, targets=tokens)[0].numpy()


# ---------------------------------------------------------------- to transformers


@pytest.mark.parametrize("make", [random_llama, untied])
@pytest.mark.parametrize(
    "shape",
    [
        {"attention": "causal"},
        {"attention": "causal", "dim": 48, "n_heads": 6, "n_kv_heads": 1, "hidden_dim": 7},
        {"attention": "causal", "n_kv_heads": 4, "n_layers": 12, "layer_norm_eps": 1e-3},
    ],
)
def test_transformers_computes_what_numpy_computes_of_our_weights(
    transformers, place, call, make, shape
):
    model = make(scale=3.0, **shape)
    code, out, error = call(save_llama(model, place / "m.pt", **shape), "--to", "hf", "out")
    assert (code, error) == (0, "")
    assert out == f"wrote out: {', '.join(FOLDER)}\n"
    assert sorted(path.name for path in Path("out").iterdir()) == FOLDER
    assert sorted(path.name for path in place.iterdir()) == ["m.pt", "out", "tokenizer.model"]

    theirs = transformers.AutoModelForCausalLM.from_pretrained("out")
    expected, _ = oracle.forward(model.state_dict(), model.config, TOKENS)
    assert np.abs(logits_of(theirs, TOKENS) - expected).max() < 1e-4
    c = theirs.config
    assert (c.bos_token_id, c.eos_token_id, c.pad_token_id) == (1, 2, 3)
    assert c.max_position_embeddings == model.config.max_seq_len
    assert (c.tie_word_embeddings, theirs.dtype) == (make is random_llama, torch.float32)

    assert call("out", "--from", "hf", "back.pt") == (
        0,
        "wrote back.pt; its tokenizer is tokenizer.model beside it\n",
        "",
    )
    back = assert_same_weights("back.pt", model)
    assert back.config.attention == "causal"
    assert back.config.layer_norm_eps == model.config.layer_norm_eps


@pytest.mark.parametrize(
    ("checkpoint", "tokenizer_file"),
    [
        ("data/mini/model.pt", "data/mini/tokenizer.model"),
        ("models/stories260K/stories260K.pt", "models/stories260K/tok512.model"),
    ],
)
def test_real_models_go_on_alike_here_and_in_transformers(
    transformers, tmp_path, call, checkpoint, tokenizer_file
):
    find = shared_asset if checkpoint.startswith("models") else ROOT.joinpath
    path, out = find(checkpoint), tmp_path / "out"
    assert call(path, "--to", "hf", out)[0] == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    ours = Tokenizer(tokenizer_model=find(tokenizer_file))
    assert prompt["input_ids"].tolist() == [ours.encode("Once upon a time", bos=True, eos=False)]
    long = torch.randint(512, (1, 300), generator=torch.Generator().manual_seed(6))
    for tokens in (prompt["input_ids"], long):
        assert np.abs(logits_of(theirs, tokens) - causal_logits(path, tokens)).max() < 1e-4
    said = theirs.generate(**prompt, do_sample=False, max_new_tokens=40)
    model = load_pretrained(path, attention="causal")
    assert torch.equal(said, model.generate(prompt["input_ids"], 40, temperature=0.0))
    assert tokenizer.decode(said[0], skip_special_tokens=True) == ours.decode(said[0].tolist())


def test_safetensors_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    theirs = pytest.importorskip("safetensors.torch", reason="development extra")
    tensors = {"b": torch.randn(3, 5), "a.ü": torch.randn(7), "scalar": torch.tensor(2.5)}
    write_safetensors(tmp_path / "ours", tensors)
    loaded = theirs.load_file(tmp_path / "ours")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    content = (tmp_path / "ours").read_bytes()
    n = int.from_bytes(content[:8], "little")
    assert n % 8 == 0 and json.loads(content[8 : 8 + n])["__metadata__"] == {"format": "pt"}

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        kept = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        kept["special"] = torch.tensor([[0.0, -0.0, 1e-7, torch.inf, -torch.inf]], dtype=dtype)
        theirs.save_file(kept, tmp_path / "theirs", metadata={"any": "thing"})
        read = read_safetensors(tmp_path / "theirs")
        assert read.keys() == kept.keys()
        for name, tensor in read.items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, kept[name].float())
            assert torch.equal(tensor.signbit(), kept[name].signbit())


# ---------------------------------------------------------------- tokenizers


def export_tokenizer(path: Path, folder: Path) -> Tokenizer:
    """Writes a folder for AutoTokenizer, with the least of models beside it."""
    tokenizer = Tokenizer(tokenizer_model=path)
    shape = {"dim": 4, "n_heads": 1, "n_kv_heads": 1, "n_layers": 1, "multiple_of": 1}
    export.export_hf(random_llama(vocab_size=tokenizer.n_words, **shape), tokenizer, str(folder))
    return tokenizer


def random_texts(n: int) -> list[str]:
    rng = random.Random(7)
    letters = [*" ▁aabceth.s,'-=\n\té日😀1239<>s/ ", "the", " good", "<s>", "\x00"]
    mixed = ["".join(rng.choices(letters, k=rng.randrange(40))) for _ in range(n)]
    runs = "ab -=*#▁\n"
    return mixed + [
        "".join(rng.choice(runs) * rng.randrange(1, 12) for _ in range(rng.randrange(8)))
        for _ in range(n)
    ]


def assert_same_tokens(ours: Tokenizer, theirs, texts: list[str]) -> None:
    for text in texts:
        ids = ours.encode(text, bos=True, eos=False)
        assert theirs(text)["input_ids"] == ids, repr(text)


@pytest.mark.parametrize(
    "name",
    ["data/mini/tokenizer.model", "models/tokenizer.model", "models/stories260K/tok512.model"],
)
def test_autotokenizer_gives_the_same_tokens_without_a_network(
    transformers, tmp_path, monkeypatch, name
):
    find = shared_asset if name.startswith("models") else ROOT.joinpath
    ours = export_tokenizer(find(name), tmp_path / "out")

    def no_network(*_):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 3)
    spaces = [" " * n + letter for n in range(70) for letter in ("", "a")]
    reviews = (ROOT / "data/demo-dev.txt").read_text(encoding="utf-8").split("\n")
    texts = [*TEXTS, *spaces, *reviews, *random_texts(1000)]
    assert_same_tokens(ours, theirs, texts)
    assert_same_text(ours, theirs, texts)
    pair = theirs("a story", "good")["input_ids"]
    assert pair == [i for s in ("a story", "good") for i in ours.encode(s, bos=True, eos=False)]
    texts = ["a story", "good"]
    padded = theirs(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    assert sorted(padded) == ["attention_mask", "input_ids"]


def assert_same_text(ours: Tokenizer, theirs, texts: list[str]) -> None:
    for text in texts:
        ids = [i for i in ours.encode(text, bos=True, eos=True) if i != ours.pad_id]
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), repr(text)


SPECIAL = [(b"<unk>", 0.0, 2), (b"<s>", 0.0, 3), (b"</s>", 0.0, 3)]
WORDS = ["▁", "a", "b", "c", "▁a", "ab", "▁▁", "▁▁▁", "abc", "bc", "aa", "aaa", "▁ab", "b▁", "1"]


def tokenizer_of(
    folder: Path, scores=(), kinds=(), words=WORDS, trainer=(), normalizer=(), byte_kind=6
) -> Path:
    """A BPE model of a few pieces that leaves a text as it is, but for what is given."""
    scores, kinds = dict(scores), dict(kinds)
    pieces = [(f"<0x{i:02X}>".encode(), 0.0, byte_kind) for i in range(256)]
    pieces += [
        (word.encode(), float(scores.get(word, -i)), kinds.get(word, 1))
        for i, word in enumerate(words)
    ]
    specs = ({3: 2, 35: 1, **dict(trainer)}, {1: b"identity", 3: 1, 4: 0, **dict(normalizer)})
    path = folder / "made.model"
    path.write_bytes(sentencepiece_model([*SPECIAL, *pieces], *(spec.items() for spec in specs)))
    return path


@pytest.mark.parametrize("adds_space", [0, 1])
@pytest.mark.parametrize("is_trimmed", [0, 1])
@pytest.mark.parametrize("scores", [{}, {"▁▁": -50, "▁▁▁": -50}, {"aa": -60, "aaa": -60}])
def test_normalization_and_equal_scores_of_runs_are_kept(
    transformers, tmp_path, adds_space, is_trimmed, scores
):
    normalizer = {3: adds_space, 4: is_trimmed}
    path = tokenizer_of(tmp_path, scores, normalizer=normalizer)
    ours = export_tokenizer(path, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    rng = random.Random(8)
    texts = ["".join(rng.choices("aaabbc  ▁1é", k=rng.randrange(30))) for _ in range(500)]
    texts += [*TEXTS, *("a" * n + " " * n for n in range(30))]
    assert_same_tokens(ours, theirs, texts)
    # A trimmed text has but one space before it, unless the letter that stands for spaces is in it.
    assert_same_text(ours, theirs, [text for text in texts if "▁" not in text])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"trainer": {3: 1}}, "a model that is not BPE"),
        ({"trainer": {35: 0}, "byte_kind": 1}, "a model without byte fallback"),
        ({"trainer": {24: 1}}, "a space behind the text"),
        ({"normalizer": {5: 0}}, "spaces that are not escaped"),
        ({"kinds": {"abc": 4}}, "user-defined pieces"),
        ({"kinds": {"abc": 5}}, "unused pieces"),
        ({"scores": {"ab": -9, "bc": -9}}, "pieces with equal scores"),
        ({"words": [*WORDS, "#version"]}, "a piece that begins with #version"),
    ],
)
def test_what_tokenizer_json_cannot_hold_is_said(place, call, changes, named):
    path = tokenizer_of(place, **changes)
    tokenizer = Tokenizer(tokenizer_model=path)
    with pytest.raises(ValueError, match=named):
        tokenizer_json(tokenizer)
    model = random_llama(vocab_size=tokenizer.n_words, attention="causal")
    save_llama(model, place / "m.pt", attention="causal")
    code, out, error = call("m.pt", "--to", "hf", "out", "--tokenizer_path", path)
    assert code == 0 and "tokenizer.json" not in out and not Path("out/tokenizer.json").exists()
    assert error.endswith(
        f": {path}: has {named}, which tokenizer.json cannot hold exactly; "
        "transformers is left to read tokenizer.model, if it can\n"
    )
    config = json.loads(Path("out/tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "LlamaTokenizer"


def test_a_table_of_normalization_is_not_left_out_in_silence(tmp_path):
    text = "good bad this movie is a good bad film\n" * 9
    path = train_sentencepiece(tmp_path, text, normalization_rule_name="nmt_nfkc")
    with pytest.raises(ValueError, match=r"^a table of normalization$"):
        tokenizer_json(Tokenizer(tokenizer_model=path))


# ---------------------------------------------------------------- to llama2.c


@pytest.mark.parametrize("make", [random_llama, untied])
@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 4, "max_seq_len": 33}, {"hidden_dim": 5}])
def test_a_bin_file_is_that_of_the_format_and_comes_back_bit_for_bit(place, call, make, shape):
    model = make(attention="causal", **shape)
    save_llama(model, place / "m.pt", attention="causal", **shape)
    code, out, error = call("m.pt", "--to", "llama2c", "m.bin")
    assert (code, error) == (0, "")
    assert out == "wrote m.bin and m.tokenizer.bin\n"
    assert_same_weights("m.bin", model)
    output = model.output.weight if make is untied else None
    expected = write_bin(place / "expected.bin", model, output).read_bytes()
    written = Path("m.bin").read_bytes()
    assert (written[:28], len(written)) == (expected[:28], len(expected))
    numbers = [np.frombuffer(content[28:], "<f4") for content in (written, expected)]
    np.testing.assert_allclose(*numbers, rtol=0, atol=1e-5)  # but for tables, formed in float32

    assert call("m.bin", "--to", "hf", "out")[0] == 0
    assert call("out", "--from", "hf", "back.pt")[0] == 0
    assert_same_weights("back.pt", model)


def test_the_published_model_becomes_its_published_file_and_tells_its_story(tmp_path, call):
    folder = shared_asset("models/stories260K")
    pt, tokenizer = folder / "stories260K.pt", Tokenizer(tokenizer_model=folder / "tok512.model")
    call(pt, "--to", "llama2c", tmp_path / "s.bin")
    assert (tmp_path / "s.bin").read_bytes() == (folder / "stories260K.bin").read_bytes()
    code, _, error = call(pt, "--to", "hf", tmp_path / "hf")
    assert code == 0
    assert error.endswith(
        "stories260K.pt: read here with attention='full' (none recorded); transformers computes "
        "causal attention, as --attention causal does\n"
    )
    call(tmp_path / "hf", "--from", "hf", tmp_path / "s.pt")
    prompt = torch.tensor([tokenizer.encode("Once upon a time", bos=True, eos=False)])
    for path in (pt, tmp_path / "s.bin", tmp_path / "s.pt"):
        model = load_pretrained(path, attention="causal")
        said = model.generate(prompt, 45, temperature=0.0)[0].tolist()
        assert tokenizer.decode(said).startswith(GREEDY)


def read_tokenizer_bin(path: Path) -> tuple[int, list[tuple[float, bytes]]]:
    """(max_token_length, [(score, bytes), ...]) as run.c's build_tokenizer reads them."""
    content = path.read_bytes()
    (longest,) = struct.unpack_from("<i", content)
    at, tokens = 4, []
    while at < len(content):
        score, n = struct.unpack_from("<fi", content, at)
        tokens.append((score, content[at + 8 : at + 8 + n]))
        at += 8 + n
    return longest, tokens


def encode_as_run_c(tokens: list[tuple[float, bytes]], text: str) -> list[int]:
    """bos, a space, the characters or else their bytes; then the best pair at a time."""
    ids = {token: i for i, (_, token) in reversed(list(enumerate(tokens)))}
    found = [1, ids[b" "]] if text else [1]
    for letter in text:
        encoded = letter.encode()
        found += [ids[encoded]] if encoded in ids else [byte + 3 for byte in encoded]
    while True:
        joined = [tokens[a][1] + tokens[b][1] for a, b in itertools.pairwise(found)]
        known = [(tokens[ids[pair]][0], -i) for i, pair in enumerate(joined) if pair in ids]
        if not known:
            return found
        i = -max(known)[1]
        found[i : i + 2] = [ids[joined[i]]]


@pytest.mark.parametrize("name", ["data/mini/tokenizer.model", "models/stories260K/tok512.model"])
def test_run_c_splits_text_by_tokenizer_bin_as_we_do(tmp_path, call, name):
    path = (shared_asset if name.startswith("models") else ROOT.joinpath)(name)
    ours = Tokenizer(tokenizer_model=path)
    model = random_llama(vocab_size=ours.n_words, dim=8, n_layers=1, attention="causal")
    save_llama(model, tmp_path / "m.pt", attention="causal")
    call(tmp_path / "m.pt", "--to", "llama2c", tmp_path / "m", "--tokenizer_path", path)
    longest, tokens = read_tokenizer_bin(tmp_path / "m.tokenizer.bin")
    assert len(tokens) == ours.n_words
    assert longest == max(len(token) for _, token in tokens)
    assert [token for _, token in tokens[:4]] == [b"<unk>", b"\n<s>\n", b"\n</s>\n", b"<0x00>"]
    for i in range(259, ours.n_words):
        score, token = tokens[i]
        assert token.decode() == ours.sp_model.id_to_piece(i).replace("▁", " ")
        assert score == ours.sp_model.get_score(i)
    for text in ("", "Once upon a time", "a good film, 9 of 10: naïve\n😀"):
        assert encode_as_run_c(tokens, text) == ours.encode(text, bos=True, eos=False)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, None),
        ({"normalizer": {4: 1}}, "extra spaces taken out"),
        ({"normalizer": {3: 0}}, "no space before a text"),
        ({"trainer": {3: 1}}, "a model that is not BPE"),
    ],
)
def test_a_bin_says_what_it_has_no_place_for(place, call, changes, named):
    path = tokenizer_of(place, **changes)
    model = random_llama(layer_norm_eps=1e-6, vocab_size=274)
    save_llama(model, place / "m.pt")
    code, _, error = call("m.pt", "--to", "llama2c", "m.bin", "--tokenizer_path", path)
    assert code == 0
    said = [line.split(": ", 1)[1] for line in error.splitlines()]
    assert (
        said
        == [
            "m.pt: read here with attention='full' (none recorded); llama2.c computes causal "
            "attention, as --attention causal does",
            "m.bin: has no layer_norm_eps=1e-06, llama2.c takes 1e-05",
            f"{path}: has {named}, which llama2.c does not know; it may split a text otherwise",
        ][: 3 if named else 2]
    )


def test_numbers_that_run_c_does_not_have_are_named(tmp_path):
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": 3}
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    for numbers in ({}, {"pad_id": 3}, ids):
        options = {"vocab_size": 270, **plain, **numbers}
        path = train_sentencepiece(tmp_path, "a good film\n" * 9, **options)
        said = unknown_to_llama2c(Tokenizer(tokenizer_model=path))
        assert said == ("other numbers for beginning, end or bytes" if numbers else None)


# ---------------------------------------------------------------- finetuned checkpoints


def finetuned(path: Path, model: torch.nn.Module, save=save_classifier, **extra) -> Path:
    tokenizer = Path("tokenizer.model").absolute()
    extra = {
        "label_names": ["bad", "good"],
        "tokenizer_path": str(tokenizer),
        "tokenizer_sha256": sha256_of(tokenizer),
        **extra,
    }
    config = SimpleNamespace(num_labels=2, option="finetune", hidden_dropout_prob=0.3)
    save(path, model, config, **extra)
    return path


def save_with_shape(path, model, config, **extra) -> None:
    """As `save_classifier` does, of a model that has no `pooling` to record."""
    shape = {"model_args": model.llama.config.to_dict(), "model_config": vars(config)}
    save_torch_file(path, {"model": model.state_dict(), **shape, **extra})


def classifier(kind=LlamaEmbeddingClassifier, **shape):
    config = SimpleNamespace(
        num_labels=2, option="finetune", hidden_dropout_prob=0.3, pooling="mean"
    )
    return kind(config, random_llama(**shape))


@pytest.mark.parametrize("to", ["hf", "llama2c"])
@pytest.mark.parametrize("attention", ["full", "causal"])
def test_of_a_finetuned_checkpoint_the_backbone_goes_and_the_rest_is_named(
    place, call, to, attention
):
    model = classifier(attention=attention)
    path = finetuned(place / "fine.pt", model)
    (place / "away").mkdir()
    path = path.rename(place / "away" / path.name)  # its tokenizer is the one it recorded
    code, _, error = call(path, "--to", to, "out")
    assert code == 0
    reader = export.READERS[to]
    expected = [
        f"{path}: {reader} gets the Llama, without classifier_head.weight, classifier_head.bias "
        "(labels: bad, good)",
        f"{path}: read here with attention='full' (recorded); {reader} computes causal attention, "
        "as --attention causal does",
    ]
    said = [line.split(": ", 1)[1] for line in error.splitlines()]
    assert said == expected[: 2 if attention == "full" else 1]
    if to == "hf":
        call("out", "--from", "hf", "back.pt")
    assert_same_weights("back.pt" if to == "hf" else "out", model.llama)


def test_merged_lora_is_a_plain_change_of_weights(place, call):
    model = classifier(attention="causal")
    before = model.llama.layers[0].attention.compute_query.weight.clone()
    add_lora(model, rank=2, alpha=4.0)
    randomize(model, lambda name: name.endswith(".B"), 0.5)
    merge(model)
    assert not torch.equal(model.llama.layers[0].attention.compute_query.weight, before)
    assert call(finetuned(place / "lora.pt", model), "--to", "llama2c", "m.bin")[0] == 0
    assert_same_weights("m.bin", model.llama)


def test_of_other_classifiers_the_backbone_goes_too(place, call, tokenizer):
    prompt = PromptClassifier(
        random_llama(attention="causal"), tokenizer, (("bad", "poor"), ("good",))
    )
    models = {"bias": prompt, "query": classifier(AttentionPooling, attention="causal")}
    for left, model in models.items():
        path = finetuned(place / f"{left}.pt", model, save_with_shape)
        code, _, error = call(path, "--to", "llama2c", f"{left}.bin")
        assert code == 0
        assert f"llama2.c gets the Llama, without {left}" in error
        assert_same_weights(f"{left}.bin", model.llama)


@pytest.mark.parametrize("to", ["hf", "llama2c"])
@pytest.mark.parametrize("has_shape", [True, False])
def test_adapters_are_refused(place, call, to, has_shape):
    model = classifier(attention="causal")
    add_adapters(model, 4)
    if has_shape:
        path = finetuned(place / "adapted.pt", model, save_with_shape)
    else:
        save_torch_file("adapted.pt", {"model": model.state_dict(), "label_names": ["bad", "good"]})
        path = "adapted.pt"
    assert f"{path}: has bottleneck adapters" in refused(call(path, "--to", to, "out"))
    assert not Path("out").exists()


def test_a_checkpoint_without_its_shape_is_refused(place, call):
    save_torch_file("m.pt", {"model": classifier().state_dict(), "label_names": ["bad", "good"]})
    assert "m.pt: has no dict model_args; it holds model, label_names" in refused(
        call("m.pt", "--to", "hf", "out")
    )


def test_the_tokenizer_is_the_recorded_one_or_there_is_an_error(place, call, tmp_path):
    path = finetuned(place / "fine.pt", classifier(attention="causal"))
    Path("tokenizer.model").rename("moved.model")
    error = refused(call(path, "--to", "hf", "out"))
    assert "tokenizer.model' is not there any more" in error and "--tokenizer_path" in error
    assert call(path, "--to", "hf", "out", "--tokenizer_path", "moved.model")[0] == 0
    other = tokenizer_of(tmp_path)
    error = refused(call(path, "--to", "hf", "out2", "--tokenizer_path", other))
    assert "was trained with another tokenizer than" in error and "--tokenizer_path" in error
    save_llama(random_llama(attention="causal"), place / "plain.pt", attention="causal")
    error = refused(call("plain.pt", "--to", "hf", "out2", "--tokenizer_path", other))
    assert "made.model has 274 tokens, the checkpoint has 320" in error
    error = refused(call("plain.pt", "--to", "hf", "out2", "--tokenizer_path", "no.model"))
    assert "no.model: no such tokenizer" in error


# ---------------------------------------------------------------- from transformers


def their_model(transformers, seed: int = 0, **changes):
    shape = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{**shape, "initializer_range": 0.3, **changes})
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("changes", "dtype", "max_shard_size"),
    [
        ({}, torch.float32, "5GB"),
        ({"tie_word_embeddings": True}, torch.float16, "5GB"),
        ({"num_key_value_heads": None, "rms_norm_eps": 1e-5}, torch.bfloat16, "30KB"),
        ({"tie_word_embeddings": True, "num_key_value_heads": 1}, torch.float32, "30KB"),
    ],
)
def test_we_compute_what_transformers_computes_of_its_folder(
    transformers, place, call, changes, dtype, max_shard_size
):
    theirs = their_model(transformers, **changes).to(dtype)
    theirs.save_pretrained("theirs", max_shard_size=max_shard_size)
    n_files = len(list(Path("theirs").glob("*.safetensors")))
    assert (n_files > 2) == (max_shard_size == "30KB")
    code, out, error = call("theirs", "--from", "hf", "ours.pt")
    assert (code, out) == (0, "wrote ours.pt\n")
    assert "theirs: has no tokenizer.model" in error and error.count("\n") == 1
    model_args, weights = read_checkpoint("ours.pt")
    assert model_args["attention"] == "causal"
    assert ("output.weight" in weights) == (not changes.get("tie_word_embeddings", False))
    ours = causal_logits("ours.pt", TOKENS)
    theirs = transformers.AutoModelForCausalLM.from_pretrained("theirs", dtype=torch.float32)
    assert np.abs(ours - logits_of(theirs, TOKENS)).max() < 1e-4 * np.abs(ours).max()


@pytest.fixture
def theirs(place, call) -> Path:
    """A folder as transformers has it, of an untied model, made by our own export."""
    save_llama(untied(attention="causal"), place / "m.pt", attention="causal")
    assert call("m.pt", "--to", "hf", "theirs")[0] == 0
    (place / "tokenizer.model").unlink()
    return place / "theirs"


def change_json(path: Path, **changes) -> None:
    """Sets keys of a JSON object; None takes one out."""
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mistral"}, "model_type='mistral' (only 'llama')"),
        ({"model_type": None}, "model_type=None (only 'llama')"),
        ({"rope_theta": 5e5}, "rope_theta=500000.0 (only 10000.0)"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.rope_type='linear'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.rope_type='llama3'"),
        ({"rope_scaling": "dynamic"}, "rope_scaling.rope_type='dynamic'"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters.rope_theta=1000000.0"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_parameters.rope_type=['yarn']"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"attention_bias": True}, "attention_bias=True (only False)"),
        ({"mlp_bias": True}, "mlp_bias=True (only False)"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' (only 'silu')"),
        ({"head_dim": 16}, "head_dim=16 (only 8)"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} (only None)"),
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"hidden_size": "32"}, "dim='32' is not a positive integer"),
        ({"num_hidden_layers": 2**40}, "n_layers=1099511627776 exceeds"),
        ({"num_hidden_layers": 2**27}, "n_layers=134217728 but only"),
        ({"num_hidden_layers": 3}, "missing: layers.2.attention_norm.weight"),
        ({"num_key_value_heads": 4}, "misshapen: layers.0.attention.compute_key.weight"),
        ({"num_key_value_heads": 3}, "n_kv_heads=3"),
        ({"intermediate_size": 20}, "misshapen: layers.0.feed_forward.w1.weight"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
    ],
)
def test_a_config_that_ours_cannot_be_is_refused_by_its_key(theirs, call, changes, named):
    change_json(theirs / "config.json", **changes)
    assert named in refused(call("theirs", "--from", "hf", "ours.pt"))
    assert sorted(path.name for path in Path().iterdir()) == ["m.pt", "theirs"]


def test_all_that_cannot_be_computed_is_named_at_once(theirs, call):
    change_json(theirs / "config.json", attention_bias=True, mlp_bias=True, rope_theta=1.0)
    error = refused(call("theirs", "--from", "hf", "ours.pt"))
    assert all(key in error for key in ("attention_bias=", "mlp_bias=", "rope_theta="))


def test_a_config_of_another_version_is_read(theirs, call):
    path = theirs / "config.json"
    change_json(path, rope_parameters=None, rope_scaling={"type": "default"}, pretraining_tp=2)
    change_json(path, torch_dtype="float32", dtype=None, head_dim=8, attention_dropout=0.1)
    assert call("theirs", "--from", "hf", "ours.pt")[0] == 0
    assert_same_weights("ours.pt", untied())
    change_json(path, rope_theta=None, rope_scaling=None, rms_norm_eps=None, hidden_act=None)
    assert call("theirs", "--from", "hf", "ours2.pt")[0] == 0
    assert load_pretrained("ours2.pt").config.layer_norm_eps == 1e-6  # what transformers takes


def test_tensors_are_exactly_those_of_the_model(theirs, call):
    path = theirs / "model.safetensors"
    tensors = read_safetensors(path)

    def answer(changed: dict) -> str:
        write_safetensors(path, changed)
        return refused(call("theirs", "--from", "hf", "ours.pt"))

    assert "unexpected: score.weight; only a plain" in answer(
        {
            **tensors,
            "score.weight": torch.ones(2, 32),
        }
    )
    escape = {**tensors, "\x1b[2J": torch.ones(1)}
    assert r"unexpected: '\x1b[2J'; only" in answer(escape)
    assert "unexpected: norm.weight" in answer({**tensors, "norm.weight": torch.ones(32)})
    left = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up" not in name}
    assert "theirs: missing: layers.1.feed_forward.w3.weight" in answer(left)
    del left["lm_head.weight"]
    assert "missing: lm_head.weight, and tie_word_embeddings is not set" in answer(left)
    query = "model.layers.0.self_attn.q_proj.weight"
    assert "compute_query.weight (3, 5) instead of" in answer({**tensors, query: torch.ones(3, 5)})
    assert "NaN or infinite" in answer({**tensors, query: torch.full((32, 32), torch.nan)})
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # of old files
    write_safetensors(path, {**tensors, **frequencies})
    assert call("theirs", "--from", "hf", "ours.pt")[0] == 0


def test_the_tokenizer_comes_along_and_replaces_no_other(theirs, call, tokenizer_file):
    assert call("theirs", "--from", "hf", "ours.pt")[0] == 0
    assert Path("tokenizer.model").read_bytes() == tokenizer_file.read_bytes()
    assert call("theirs", "--from", "hf", "ours2.pt")[0] == 0  # the same is there already
    Path("tokenizer.model").write_bytes(b"another")
    error = refused(call("theirs", "--from", "hf", "ours3.pt"))
    assert "tokenizer.model: is another tokenizer than theirs/tokenizer.model" in error
    assert Path("tokenizer.model").read_bytes() == b"another"
    Path("tokenizer.model").unlink()
    (theirs / "tokenizer.model").rename("moved.model")
    code, out, error = call("theirs", "--from", "hf", "ours3.pt", "--tokenizer_path", "moved.model")
    assert (code, error) == (0, "") and "tokenizer.model beside it" in out
    Path("tokenizer.model").unlink()
    Path("theirs/tokenizer.model").write_bytes(b"no model")
    error = refused(call("theirs", "--from", "hf", "ours4.pt"))
    assert "tokenizer.model: is not a SentencePiece model" in error
    shutil.copyfile(tokenizer_of(theirs), theirs / "tokenizer.model")
    error = refused(call("theirs", "--from", "hf", "ours4.pt"))
    assert "has 274 tokens, the checkpoint has 320" in error
    assert not Path("ours4.pt").exists() and not Path("tokenizer.model").exists()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: shutil.rmtree(folder), "theirs: is no folder"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: No such file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors and no"),
        (lambda folder: (folder / "config.json").write_bytes(b"[1]"), "holds no JSON object"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff"), "no JSON in UTF-8"),
        (lambda folder: (folder / "config.json").write_bytes(b"[" * 10**6), "is damaged"),
        (
            lambda folder: (folder / "config.json").write_bytes(b'{"a": {"b": 1, "b": 2}}'),
            "config.json: has 'b' twice",
        ),
        (
            lambda folder: (folder / "config.json").write_bytes(b" " * (2**22 + 1)),
            "has more than 4,194,304 bytes",
        ),
    ],
)
def test_a_folder_of_something_else_is_told_what_it_lacks(theirs, call, spoil, named):
    spoil(theirs)
    assert named in refused(call("theirs", "--from", "hf", "ours.pt"))


def shard(folder: Path) -> dict[str, str]:
    """Splits the folder's tensors over two files; returns the index's map."""
    tensors = read_safetensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for name in sorted(set(places.values())):
        part = {key: tensor for key, tensor in tensors.items() if places[key] == name}
        write_safetensors(folder / name, part)
    return places


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model.norm.weight": "part-9.safetensors"}, "'part-9.safetensors' is no file in its"),
        ({"model.norm.weight": "../m.pt"}, "'../m.pt' is no file in its folder"),
        ({"model.norm.weight": ".."}, "'..' is no file in its folder"),
        ({"model.norm.weight": ""}, "'' is no file in its folder"),
        ({"model.norm.weight": "a" * 5000}, "aaa' is no file in its folder"),
        ({"model.norm.weight": 3}, "index.json: has no weight_map from names to files"),
        ({"more": "part-0.safetensors"}, "index.json differ in more"),
        ({"model.norm.weight": None}, "index.json differ in model.norm.weight"),
    ],
)
def test_an_index_is_held_against_its_files(theirs, call, changes, named):
    places = shard(theirs)
    index = theirs / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    assert call("theirs", "--from", "hf", "ours.pt")[0] == 0
    assert_same_weights("ours.pt", untied())
    changed = {key: value for key, value in {**places, **changes}.items() if value is not None}
    index.write_text(json.dumps({"weight_map": changed}), encoding="utf-8")
    assert named in refused(call("theirs", "--from", "hf", "ours2.pt"))


# ---------------------------------------------------------------- hostile safetensors


def safetensors(header: bytes | dict, data: bytes = b"", n: int | None = None) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if n is None else n) + header + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "is no safetensors file, or was cut off: its header is to have 0 bytes"),
        (bytes(7), "the file has 7"),
        (bytes(8), "is damaged, or no JSON in UTF-8"),
        (safetensors(b"{}", n=2**63), "its header is to have 9,223,372,036,854,775,808 bytes"),
        (safetensors(b" " * (2**22 + 1)), "a header at most 4,194,304"),
        (safetensors(b"{}", n=3), "header is to have 3 bytes, the file has 10"),
        (safetensors(b"[]"), "holds no JSON object"),
        (safetensors(b"\xff\xfe{}"), "no JSON in UTF-8"),
        (safetensors(b"[" * 100_000), "is damaged"),
        (safetensors(b'{"a": ' + b"9" * 5000 + b"}"), ": is damaged, or no JSON"),
        (safetensors(b'{"a": 1, "a": 2}'), ": has 'a' twice"),
        (safetensors({"a": 1}), "'a' is 1, not dtype, shape and data_offsets"),
        (safetensors({"a": {**entry(), "more": 1}}, bytes(8)), "not dtype, shape and"),
        (safetensors({"a": entry(dtype="I64", offsets=(0, 16))}, bytes(16)), "'a' is of 'I64'"),
        (safetensors({"a": entry(dtype=[])}, bytes(8)), "'a' is of []; F32, F16, BF16 are"),
        (safetensors({"a": entry(shape=[-1, -2])}, bytes(8)), "has shape [-1, -2]"),
        (safetensors({"a": entry(shape=[True, 2])}, bytes(8)), "has shape [True, 2]"),
        (safetensors({"a": entry(shape=[2.0])}, bytes(8)), "has shape [2.0]"),
        (safetensors({"a": entry(shape=[1] * 9, offsets=(0, 4))}, bytes(4)), "has shape [1, 1"),
        (safetensors({"a": entry(shape=2)}, bytes(8)), "has shape 2"),
        (safetensors({"a": entry(shape=[2**62, 2**62])}, bytes(8)), "bytes, its offsets are"),
        (safetensors({"a": entry(shape=[0, 2**62], offsets=(0, 0))}), "has 0 bytes"),
        (safetensors({"a": entry(offsets=(0, 8, 8))}, bytes(8)), "offsets [0, 8, 8]"),
        (safetensors({"a": entry(offsets=(0,))}, bytes(8)), "offsets [0]"),
        (safetensors({"a": entry(offsets=(8, 0))}, bytes(8)), "its offsets are [8, 0]"),
        (safetensors({"a": entry(offsets=(0, 4))}, bytes(8)), "has 8 bytes, its offsets are"),
        (safetensors({"a": entry()}, bytes(7)), "has 7 bytes of numbers, its header wants 8"),
        (safetensors({"a": entry()}, bytes(9)), "has 9 bytes of numbers, its header wants 8"),
        (safetensors({"a": entry(offsets=(4, 12))}, bytes(12)), "'a' begins at 4 instead of 0"),
        (safetensors({"a": entry(), "b": entry()}, bytes(8)), "'b' begins at 0 instead of 8"),
        (
            safetensors({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
            "'b' begins at 4 instead of 8",
        ),
        (
            safetensors({"a": entry(shape=[2**28], offsets=(0, 2**30))}, bytes(8)),
            "its header wants 1,073,741,824",
        ),
    ],
)
def test_a_hostile_safetensors_file_is_refused_before_a_tensor_is_made(tmp_path, content, named):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with little_memory(64 * 2**20), pytest.raises(ValueError) as caught:
        read_safetensors(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and named in message
    assert "\n" not in message and len(message) < 1000


def test_a_damaged_safetensors_file_is_read_or_refused_in_words(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": torch.randn(3, 2), "b": torch.randn(4), "c": torch.randn(1)})
    whole, rng = path.read_bytes(), random.Random(9)
    for _ in range(500):
        content = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(len(content) - 44)] = rng.choice(b'\x00\xff"[]{}:,019aF \\')
        path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        try:
            assert sum(tensor.numel() for tensor in read_safetensors(path).values()) <= 11
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")


# ---------------------------------------------------------------- the command


@pytest.fixture
def plain(place) -> str:
    save_llama(random_llama(attention="causal"), place / "m.pt", attention="causal")
    return "m.pt"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ((), "the following arguments are required: SOURCE, OUT"),
        (("m.pt", "out"), "one of the arguments --to --from is required"),
        (("m.pt", "--to", "hf", "--from", "hf", "out"), "not allowed with argument --to"),
        (("m.pt", "--to", "gguf", "out"), "invalid choice: 'gguf'"),
        (("m.pt", "--from", "llama2c", "out"), "invalid choice: 'llama2c'"),
    ],
)
def test_usage_errors_are_one_line(plain, call, argv, named):
    code, out, error = call(*argv)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert named in error and error.startswith("tools.export: error: ")


@pytest.mark.parametrize("to", ["hf", "llama2c"])
@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("no.pt", "no.pt: no such checkpoint"),
        (".", ".: is not a file"),
        ("tokenizer.model", "tokenizer.model: is neither a torch file nor"),
        ("zip.pt", "zip.pt: cannot be read as a checkpoint"),
        ("two.pt", "two.pt: unknown LlamaConfig key: x=1"),
    ],
)
def test_a_source_that_is_no_checkpoint_is_told_so(place, call, to, source, named):
    Path("zip.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    save_llama(random_llama(), place / "two.pt", x=1)
    assert named in refused(call(source, "--to", to, "out"))
    assert not Path("out").exists()


def test_nothing_that_is_there_is_replaced(plain, call):
    Path("full").mkdir()
    Path("full/kept").touch()
    Path("file").write_text("kept", encoding="utf-8")
    Path("link").symlink_to("nowhere")
    Path("m.tokenizer.bin").write_text("kept", encoding="utf-8")
    for out in ("full", "file", "link", "m.pt"):
        error = refused(call(plain, "--to", "hf", out))
        assert f"{out}: is there already; remove it, or name another OUT" in error
    for out in ("full", "file", "link", "m.pt", "m.bin", "m"):
        assert "is there already" in refused(call(plain, "--to", "llama2c", out))
    for out in ("no/out", "no/m.bin"):
        for to in ("hf", "llama2c"):
            assert "its folder does not exist" in refused(call(plain, "--to", to, out))
    assert "'': is no name for an output file" in refused(call(plain, "--to", "hf", ""))
    Path("empty").mkdir()
    assert "empty: is there already" in refused(call(plain, "--to", "llama2c", "empty"))
    assert call(plain, "--to", "hf", "empty")[0] == 0
    assert_same_weights(plain, random_llama())
    error = refused(call("empty", "--from", "hf", "m.pt"))
    assert "m.pt: is there already" in error


@pytest.mark.parametrize(
    ("failure", "code"),
    [(OSError(28, "No space left on device"), 2), (Stopped(), 130), (KeyboardInterrupt(), 130)],
)
@pytest.mark.parametrize(
    ("argv", "last"),
    [
        (("m.pt", "--to", "hf", "out"), "write_safetensors"),
        (("m.pt", "--to", "llama2c", "out"), "write_bin"),
        (("theirs", "--from", "hf", "out"), "save_torch_file"),
    ],
)
def test_what_fails_midway_leaves_nothing(theirs, call, monkeypatch, argv, last, failure, code):
    def fail(*_):
        raise failure

    before = sorted(path.name for path in Path().iterdir())
    monkeypatch.setattr(export, last, fail)
    ended, out, error = call(*argv, "--tokenizer_path", "theirs/tokenizer.model")
    assert (ended, out, error.count("\n")) == (code, "", 1)
    assert sorted(path.name for path in Path().iterdir()) == before
    monkeypatch.undo()


def test_an_export_that_was_killed_is_no_obstacle(plain, call):
    Path(".out.partial").mkdir()
    Path(".out.partial/model.safetensors").touch()
    assert call(plain, "--to", "hf", "out")[0] == 0
    assert not Path(".out.partial").exists()


def test_names_from_a_file_do_not_reach_the_terminal_as_they_are(place, call):
    model = classifier(attention="causal")
    path = finetuned(place / "fine.pt", model, label_names=["bad", "\x1b[2Jgood"])
    code, _, error = call(path, "--to", "llama2c", "m.bin")
    assert code == 0
    assert "\x1b" not in error and r"\x1b[2Jgood" in error


def test_the_command_warns_of_nothing(plain, call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(plain, "--to", "hf", "out")[0] == 0
        assert call(plain, "--to", "llama2c", "out.bin")[0] == 0
        assert call("out", "--from", "hf", "back.pt")[0] == 0
