"""Exports against transformers and llama2.c's published file; imports of transformers' folders."""

import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import oracle
from advanced.methods.adapter import add_adapters
from conftest import ROOT, ended, random_llama, save_llama, shared_asset, train_sentencepiece
from fast.int8 import quantize_model
from formats import huggingface, llama2c
from helpers import error_line, write_classifier
from llama import Llama, load_pretrained
from tokenizer import Tokenizer
from tools import export

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
SHAPE = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def transformers():
    package = pytest.importorskip("transformers", reason="development extra")
    package.utils.logging.disable_progress_bar()
    return package


@pytest.fixture
def call(capsys) -> Callable[..., tuple[int, str, str]]:
    """call(...) is (exit code, standard output, standard error) of the command."""
    return lambda *argv: ended(lambda: export.main([str(word) for word in argv]), capsys)


@pytest.fixture
def place(tmp_path, tokenizer_file, monkeypatch) -> Path:
    """The current folder: nothing in it but a tokenizer and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(tokenizer_file, "tokenizer.model")
    save_llama(untied(attention="causal"), tmp_path / "m.pt", attention="causal")
    return tmp_path


@pytest.fixture
def theirs(transformers, place, call) -> Path:
    """A folder of transformers with a tokenizer, alone in the current folder with m.pt."""
    assert call("m.pt", "--to", "hf", "theirs")[0] == 0
    (place / "tokenizer.model").unlink()
    return place / "theirs"


def untied(**shape) -> Llama:
    model = random_llama(**shape)
    weights = dict(model.state_dict())
    generator = torch.Generator().manual_seed(4)
    weights["output.weight"] = torch.randn(weights["output.weight"].shape, generator=generator)
    return Llama.from_weights(model.config, weights)


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_holds(path: Path | str, model: Llama) -> Llama:
    """The file has the weights of the model, tied or not as there."""
    loaded = load_pretrained(path)
    assert_same_bits(loaded.state_dict(), model.state_dict())
    tied = model.output.weight is model.tok_embeddings.weight
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == tied
    return loaded


def logits_of(model, tokens: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(tokens).logits.float().numpy()


def causal_logits(checkpoint: Path | str, tokens: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return load_pretrained(checkpoint, attention="causal")(tokens, targets=tokens)[0].numpy()


# ---------------------------------------------------------------- to transformers


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (random_llama, {"dim": 48, "n_heads": 6, "n_kv_heads": 1, "hidden_dim": 7}),
        (untied, {"n_kv_heads": 4, "n_layers": 12, "layer_norm_eps": 1e-3}),
    ],
)
def test_transformers_computes_what_numpy_computes_of_our_weights(
    transformers, place, call, make, shape
):
    model = make(scale=3.0, attention="causal", **shape)
    save_llama(model, place / "m.pt", attention="causal")
    answer = call("m.pt", "--to", "hf", "out")
    assert answer == (0, f"wrote out: {', '.join(FOLDER)}\n", "")
    assert sorted(path.name for path in place.iterdir()) == ["m.pt", "out", "tokenizer.model"]

    theirs = transformers.AutoModelForCausalLM.from_pretrained("out")
    expected, _ = oracle.forward(model.state_dict(), model.config, TOKENS)
    assert np.abs(logits_of(theirs, TOKENS) - expected).max() < 1e-4
    c = theirs.config
    assert (c.bos_token_id, c.eos_token_id, c.pad_token_id) == (1, 2, 3)
    assert (c.tie_word_embeddings, theirs.dtype) == (make is random_llama, torch.float32)

    answer = call("out", "--from", "hf", "back.pt")
    assert answer == (0, "wrote back.pt; its tokenizer is tokenizer.model beside it\n", "")
    back = assert_holds("back.pt", model)
    assert (back.config.attention, back.config.max_seq_len) == ("causal", model.config.max_seq_len)
    assert back.config.layer_norm_eps == model.config.layer_norm_eps


@pytest.mark.parametrize(
    ("checkpoint", "tokenizer_file"),
    [
        ("data/mini/model.pt", "data/mini/tokenizer.model"),
        ("models/stories260K/stories260K.pt", "models/stories260K/tok512.model"),
    ],
)
def test_real_models_continue_alike_here_and_in_transformers(
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


def random_texts(n: int) -> list[str]:
    rng = random.Random(7)
    letters = [*" ▁aabceth.s,'-=\n\té日😀1239<>s/ ", "the", " good", "<s>", "\x00"]
    mixed = ["".join(rng.choices(letters, k=rng.randrange(40))) for _ in range(n)]
    runs = "ab -=*#▁\n"
    return mixed + [
        "".join(rng.choice(runs) * rng.randrange(1, 12) for _ in range(rng.randrange(8)))
        for _ in range(n)
    ]


@pytest.mark.parametrize(
    "name",
    ["data/mini/tokenizer.model", "models/tokenizer.model", "models/stories260K/tok512.model"],
)
def test_autotokenizer_gives_the_same_tokens_without_a_network(
    transformers, tmp_path, monkeypatch, name
):
    find = shared_asset if name.startswith("models") else ROOT.joinpath
    ours = Tokenizer(tokenizer_model=find(name))
    assert huggingface.write_tokenizer(tmp_path, ours, max_seq_len=10_000)

    def no_network(*_):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 3)
    spaces = [" " * n + letter for n in range(70) for letter in ("", "a")]
    for text in [*TEXTS, *spaces, *random_texts(500)]:
        assert theirs(text)["input_ids"] == ours.encode(text, bos=True, eos=False), repr(text)
        ids = [i for i in ours.encode(text, bos=True, eos=True) if i != ours.pad_id]
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), repr(text)
    padded = theirs(["a story", "good"], padding=True)
    assert sorted(padded) == ["attention_mask", "input_ids"]


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"byte_fallback": False, "vocab_size": 30}, True),
        ({"user_defined_symbols": ["xqz"]}, False),
        ({"normalization_rule_name": "nmt_nfkc"}, False),
    ],
)
def test_a_tokenizer_that_would_split_otherwise_is_left_out_in_words(
    transformers, place, call, options, fits
):
    text = "a good film\na bad film\nthe story was good\n" * 4
    path = train_sentencepiece(place, text, **{"normalization_rule_name": "identity", **options})
    n_words = Tokenizer(tokenizer_model=path).n_words
    save_llama(random_llama(vocab_size=n_words), place / "m.pt", attention="causal")
    code, _, error = call("m.pt", "--to", "hf", "out")
    assert code == 0
    assert Path("out/tokenizer.json").exists() == fits
    assert ("cannot split texts as it does, so out has only tokenizer.model" in error) != fits


# ---------------------------------------------------------------- to llama2.c


@pytest.mark.parametrize("make", [random_llama, untied])
def test_a_bin_file_comes_back_bit_for_bit(transformers, place, call, make):
    model = make(attention="causal", n_kv_heads=1, hidden_dim=5)
    save_llama(model, place / "m.pt", attention="causal")
    assert call("m.pt", "--to", "llama2c", "m.bin") == (0, "wrote m.bin and m.tokenizer.bin\n", "")
    assert_holds("m.bin", model)
    assert call("m.bin", "--to", "hf", "out")[0] == 0
    assert call("out", "--from", "hf", "back.pt")[0] == 0
    assert_holds("back.pt", model)


def test_the_published_model_becomes_its_published_file(tmp_path, call):
    folder = shared_asset("models/stories260K")
    code, _, error = call(folder / "stories260K.pt", "--to", "llama2c", tmp_path / "s.bin")
    assert code == 0
    assert (tmp_path / "s.bin").read_bytes() == (folder / "stories260K.bin").read_bytes()
    assert "stories260K.pt: has full attention here; llama2.c computes causal attention" in error
    assert "tok512.model: run.c may split texts differently" in error  # it removes spaces


def test_a_bin_says_what_it_has_no_place_for(place, call):
    save_llama(random_llama(layer_norm_eps=1e-6), place / "m.pt", attention="causal")
    _, _, error = call("m.pt", "--to", "llama2c", "m.bin")
    assert error == (
        "tools.export: note: m.bin: has no place for layer_norm_eps=1e-06; run.c takes 1e-05\n"
    )


# ---------------------------------------------------------------- to int8


def int8_of(path: Path | str) -> dict[str, torch.Tensor]:
    return load_pretrained(path, quantize="int8").state_dict()


@pytest.mark.parametrize("make", [random_llama, untied])
def test_an_int8_file_quantizes_to_its_own_numbers_again(place, call, make):
    save_llama(make(), place / "m.pt")
    assert call("m.pt", "--to", "int8", "m8.pt") == (0, "wrote m8.pt\n", "")
    assert call("m8.pt", "--to", "int8", "again.pt")[0] == 0
    stored = torch.load("m8.pt", weights_only=True)["model"]
    assert ("output.weight" in stored) == ("output.scale" in stored) == (make is untied)
    again = torch.load("again.pt", weights_only=True)["model"]
    assert {name: tensor.dtype for name, tensor in again.items()} == {
        name: torch.int8 if f"{name[:-6]}scale" in stored else torch.float32 for name in stored
    }
    expected = int8_of("m.pt")
    assert_same_bits(int8_of("m8.pt"), expected)
    for kept in (stored, again):  # without the output of a tied model
        assert_same_bits(kept, {name: expected[name] for name in kept})


def test_float32_weights_are_written_from_an_int8_file(place, call):
    assert call("m.pt", "--to", "int8", "m8.pt")[0] == 0
    assert call("m8.pt", "--to", "llama2c", "m.bin")[0] == 0
    assert_holds("m.bin", load_pretrained("m8.pt"))


def test_a_real_int8_file_is_a_quarter_and_names_its_tokenizer(tmp_path, call):
    source, out = shared_asset("models/stories260K/stories260K.pt"), tmp_path / "s.pt"
    code, _, error = call(source, "--to", "int8", out)
    assert code == 0 and error.count("\n") == 1
    assert "tok512.model; copy it beside s.pt" in error
    assert out.stat().st_size < 0.3 * source.stat().st_size


def test_an_int8_file_is_written_beside_several_tokenizers(place, call):
    (place / "many").mkdir()
    for name in ("a.model", "b.model"):
        (place / "many" / name).write_bytes(b"another")
    code, out, error = call("m.pt", "--to", "int8", "many/m8.pt")
    assert (code, out) == (0, "wrote many/m8.pt\n")
    assert error.endswith("tokenizer.model; copy it beside m8.pt\n")


# ---------------------------------------------------------------- finetuned checkpoints


@pytest.mark.parametrize(
    ("to", "attention"), [("hf", "full"), ("llama2c", "causal"), ("int8", "full")]
)
def test_of_a_finetuned_checkpoint_the_llama_goes_and_the_rest_is_named(
    transformers, place, call, to, attention
):
    (place / "away").mkdir()  # its tokenizer is the one it recorded
    path, names = place / "away" / "fine.pt", ["bad", "\x1b[2Jgood"]
    llama = write_classifier(path, attention=attention, label_names=names).llama
    code, _, error = call(path, "--to", to, "out")
    assert code == 0
    reader = export.READERS[to]
    first, *rest = error.splitlines()
    assert first.endswith(
        f"{path}: {reader} gets the Llama without classifier_head.weight, classifier_head.bias "
        r"(labels: bad, \x1b[2Jgood)"
    )
    assert len(rest) == (attention == "full" and to != "int8")
    if to == "int8":
        quantize_model(llama)
        assert_same_bits(int8_of("out"), llama.state_dict())
    elif to == "hf":
        call("out", "--from", "hf", "back.pt")
        assert_holds("back.pt", llama)
    else:
        assert_holds("out", llama)


def test_parts_that_no_plain_llama_has_are_refused(place, call):
    model = random_llama(attention="causal")
    weights = {**model.state_dict(), "layers.0.adapter.down.weight": torch.ones(4, 32)}
    torch.save({"model": weights, "model_args": model.config.to_dict()}, "m.pt")
    error = error_line(call("m.pt", "--to", "llama2c", "out"))
    assert "m.pt: unexpected: layers.0.adapter.down.weight" in error
    classifier = write_classifier("fine.pt")
    add_adapters(classifier, 4)
    weights = classifier.state_dict()
    torch.save({"model": weights, "model_args": classifier.llama.config.to_dict()}, "fine.pt")
    error = error_line(call("fine.pt", "--to", "hf", "out"))
    assert "fine.pt: has adapters, for which transformers has no place" in error


def test_the_tokenizer_is_the_recorded_one_or_there_is_an_error(place, call):
    write_classifier("fine.pt")
    Path("tokenizer.model").rename("moved.model")
    error = error_line(call("fine.pt", "--to", "llama2c", "out"))
    assert "tokenizer.model' was not found" in error and "--tokenizer_path" in error
    assert call("fine.pt", "--to", "llama2c", "out", "--tokenizer_path", "moved.model")[0] == 0
    other = ROOT / "data/mini/tokenizer.model"
    error = error_line(call("fine.pt", "--to", "llama2c", "out2", "--tokenizer_path", other))
    assert "was trained with a different tokenizer than" in error
    error = error_line(call("m.pt", "--to", "llama2c", "out2", "--tokenizer_path", other))
    assert "tokens, the checkpoint has 320" in error


# ---------------------------------------------------------------- from transformers


@pytest.mark.parametrize(
    ("changes", "dtype", "max_shard_size"),
    [
        ({"tie_word_embeddings": True}, torch.float16, "5GB"),
        ({"num_key_value_heads": 4, "rms_norm_eps": 1e-5}, torch.bfloat16, "30KB"),
    ],
)
def test_we_compute_what_transformers_computes_of_its_folder(
    transformers, place, call, changes, dtype, max_shard_size
):
    config = transformers.LlamaConfig(**{**SHAPE, "initializer_range": 0.3, **changes})
    model = transformers.LlamaForCausalLM(config).eval().to(dtype)
    model.save_pretrained("theirs", max_shard_size=max_shard_size)
    assert (len(list(Path("theirs").glob("*.safetensors"))) > 1) == (max_shard_size == "30KB")
    code, out, error = call("theirs", "--from", "hf", "ours.pt")
    assert (code, out) == (0, "wrote ours.pt\n")
    assert "theirs: has no tokenizer.model" in error and error.count("\n") == 1
    assert load_pretrained("ours.pt").config.attention == "causal"
    kept = torch.load("ours.pt", weights_only=True)["model"]
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    ours = causal_logits("ours.pt", TOKENS)
    theirs = transformers.AutoModelForCausalLM.from_pretrained("theirs", dtype=torch.float32)
    assert np.abs(ours - logits_of(theirs, TOKENS)).max() < 1e-4 * np.abs(ours).max()


FOREIGN = [  # changes of config.json, and what the refusal names
    ({"model_type": "mistral"}, "model_type is 'mistral', not 'llama'"),
    ({"model_type": "unheard", "auto_map": {"AutoConfig": "evil.Config"}}, "cannot be read"),
    ({"rope_parameters": {"rope_theta": 1e6}}, "rope_theta=1000000.0 (only 10000.0)"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    ({"attention_bias": True, "mlp_bias": True}, "attention_bias=True (only False), mlp_bias"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' (only 'silu')"),
    ({"head_dim": 16}, "head_dim=16 (only 8)"),
    ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} (only None)"),
    ({"hidden_size": "32"}, "config.json cannot be read"),
    ({"num_hidden_layers": 2**40}, "1099511627776 layers, but only"),
    ({"num_hidden_layers": 3}, "missing: model.layers.2.input_layernorm.weight"),
    ({"num_hidden_layers": 1}, "unexpected: model.layers.1"),
    ({"num_key_value_heads": 3}, "theirs: n_heads=4 is not divisible by n_kv_heads=3"),
    ({"num_key_value_heads": 4}, "misshapen: layers.0.attention.compute_key.weight"),
    ({"intermediate_size": 20}, "misshapen: layers.0.feed_forward.w1.weight"),
]


def test_a_config_that_ours_cannot_be_is_refused_by_its_key(theirs, call):
    content = json.loads((theirs / "config.json").read_text(encoding="utf-8"))
    for changes, named in FOREIGN:
        (theirs / "config.json").write_text(json.dumps({**content, **changes}), encoding="utf-8")
        assert named in error_line(call("theirs", "--from", "hf", "ours.pt"))
        assert sorted(path.name for path in Path().iterdir()) == ["m.pt", "theirs"]


def test_files_that_are_absent_or_damaged_are_named(theirs, call):
    def answer() -> str:
        return error_line(call("theirs", "--from", "hf", "ours.pt"))

    weights = theirs / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "model.safetensors: is not a safetensors file, or is damaged" in answer()
    weights.rename(theirs / "pytorch_model.bin")
    assert "load it in transformers and call `save_pretrained`" in answer()
    (theirs / "pytorch_model.bin").unlink()
    assert "theirs: has no model.safetensors" in answer()
    shutil.rmtree(theirs)
    assert "theirs: is not a folder" in answer()


def test_the_tokenizer_comes_along_and_replaces_no_other(theirs, call, tokenizer_file):
    assert call("theirs", "--from", "hf", "ours.pt")[0] == 0
    assert Path("tokenizer.model").read_bytes() == tokenizer_file.read_bytes()
    assert call("theirs", "--from", "hf", "ours2.pt")[0] == 0  # the same is there already
    Path("tokenizer.model").write_bytes(b"another")
    error = error_line(call("theirs", "--from", "hf", "ours3.pt"))
    assert "tokenizer.model: is another tokenizer" in error
    assert Path("tokenizer.model").read_bytes() == b"another"
    Path("tokenizer.model").unlink()
    other = ROOT / "data/mini/tokenizer.model"
    error = error_line(call("theirs", "--from", "hf", "ours3.pt", "--tokenizer_path", other))
    assert "theirs: its embedding has 320 rows" in error and "resize_token_embeddings" in error
    assert not Path("ours3.pt").exists() and not Path("tokenizer.model").exists()


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ((), "the following arguments are required: SOURCE, OUT"),
        (("m.pt", "out"), "one of the arguments --to --from is required"),
        (("m.pt", "--to", "hf", "--from", "hf", "out"), "not allowed with argument --to"),
        (("m.pt", "--to", "gguf", "out"), "invalid choice: 'gguf'"),
        (("no.pt", "--to", "hf", "out"), "no.pt: no such checkpoint"),
        (("tokenizer.model", "--to", "hf", "out"), "tokenizer.model: is neither a torch file nor"),
        (("m.pt", "--to", "hf", "no/out"), "no/out: its folder does not exist"),
        (("m.pt", "--to", "hf", "full"), "full: exists already"),
        (("m.pt", "--to", "llama2c", "link"), "link: exists already"),
        (("m.pt", "--to", "llama2c", "m.pt"), "m.pt: exists already"),
        (("m.pt", "--to", "llama2c", "m.bin"), "m.tokenizer.bin: exists already"),
        (("full", "--from", "hf", "m.pt"), "m.pt: exists already"),
    ],
)
def test_a_wrong_command_is_one_line_and_replaces_nothing(place, call, argv, named):
    Path("full").mkdir()
    Path("full/kept").touch()
    Path("link").symlink_to("nowhere")
    Path("m.tokenizer.bin").touch()
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    assert named in error_line(call(*argv))
    assert before == {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_all_files_of_a_folder_may_be_read_by_the_same_users(theirs):
    assert len({path.stat().st_mode for path in theirs.iterdir()}) == 1


def test_an_export_that_fails_midway_leaves_nothing(transformers, place, call, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device", "out")

    def fail_as_safetensors(*_):
        raise Exception("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(huggingface, "write_model", fail_as_safetensors)
    monkeypatch.setattr(llama2c, "write_bin", fail)
    for to in ("hf", "llama2c"):
        assert "out: No space left on device" in error_line(call("m.pt", "--to", to, "out"))
    assert sorted(path.name for path in place.iterdir()) == ["m.pt", "tokenizer.model"]


def test_without_transformers_the_remedy_is_one_line(place, call, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = error_line(call("m.pt", "--to", "hf", "out"))
    assert "transformers is missing; `bash setup.sh --dev` installs it" in error
    assert call("m.pt", "--to", "llama2c", "m.bin")[0] == 0
