"""tools.generate: shared prefixes, ends of texts, streams, and the command."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT, ended, random_llama
from helpers import error_line, finish, start
from llama import load_pretrained
from tools import generate
from tools.generate import continue_text

PREFIX = "this movie is a"


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_the_greedy_text_is_that_of_generate_in_any_number_of_passes(
    tokenizer, attention, monkeypatch
):
    monkeypatch.setattr(generate, "BATCH_SIZE", 3)
    model = random_llama(attention=attention)
    idx = torch.tensor([tokenizer.encode(PREFIX, bos=True, eos=False)])
    expected = tokenizer.decode(model.generate(idx, 20, 0.0)[0].tolist())
    assert continue_text(model, tokenizer, PREFIX, 20, temperature=0.0) == [expected]
    texts = continue_text(model, tokenizer, PREFIX, 20, top_k=1, num_samples=7)
    assert texts == [expected] * 7


@pytest.fixture
def spelling(monkeypatch):
    """spelling(a, b) makes the samples consist of these lists of tokens."""

    def script(*samples: list[int]) -> None:
        steps = iter(zip(*samples, strict=True))
        pick = lambda logits, **_: torch.tensor([[token] for token in next(steps)])  # noqa: E731
        monkeypatch.setattr(generate, "pick_next", pick)

    return script


def test_with_stop_at_eos_each_text_ends_before_its_eos_or_bos(spelling, tokenizer):
    good, bad = (tokenizer.encode(word, bos=False, eos=False) for word in ("good", "bad"))
    eos, bos = [tokenizer.eos_id], [tokenizer.bos_id]
    model = random_llama(attention="causal")
    spelling(good + eos + good * 3, bad * 3 + bos + bad)
    texts = continue_text(model, tokenizer, PREFIX, 5, num_samples=2, stop_at_eos=True)
    assert texts == [f"{PREFIX} good", f"{PREFIX} bad bad bad"]
    spelling(good + eos + good * 3, bad * 3 + bos + bad)
    texts = continue_text(model, tokenizer, PREFIX, 5, num_samples=2)
    assert [text.count("good") + text.count("bad") for text in texts] == [4, 4]
    spelling(eos)  # a second step would find no token
    assert continue_text(model, tokenizer, PREFIX, 5, stop_at_eos=True) == [PREFIX]


def test_a_character_of_several_tokens_is_streamed_once_it_is_complete(spelling, tokenizer):
    spelling([tokenizer.sp_model.piece_to_id(f"<0x{b:02X}>") for b in "é€".encode() + b"\xe2"])
    pieces: list[str] = []
    model = random_llama(attention="causal")
    texts = continue_text(model, tokenizer, PREFIX, 6, on_text=pieces.append)
    assert pieces == [PREFIX, "é", "€", "\ufffd"]
    assert texts == ["".join(pieces)]


@settings(max_examples=10)
@given(st.integers(0, 10**6))
def test_the_streamed_pieces_join_to_the_first_text(tokenizer, seed):
    torch.manual_seed(seed)
    pieces: list[str] = []
    model = random_llama(attention="causal", scale=1.0)  # many tokens are single bytes
    texts = continue_text(model, tokenizer, "", 30, num_samples=2, on_text=pieces.append)
    assert "".join(pieces) == texts[0]


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(workplace, capsys):
    """command(...) runs tools.generate on model.pt: exit code, output, errors."""
    model = ["--pretrained-model-path", "model.pt"]
    return lambda *argv: ended(lambda: generate.main([*model, *argv]), capsys)


def test_standard_output_is_the_texts_alone_and_a_seed_repeats_them(command, tokenizer):
    options = ("this film", "--max_new_tokens", "9", "--num_samples", "2", "--seed", "5")
    code, out, err = command(*options)
    torch.manual_seed(5)
    model = load_pretrained("model.pt", "causal")  # also of a checkpoint that records no mode
    texts = continue_text(model, tokenizer, "this film", 9, num_samples=2)
    assert (code, out) == (0, "\n---------------\n".join(texts) + "\n")
    assert err == "model.pt: causal attention, cpu\n"
    assert command(*options)[1] == out
    assert command(*options[:-1], "6")[1] != out


def test_quantize_generates_by_int8_weights(command, tokenizer):
    options = ("this film", "--max_new_tokens", "9", "--temperature", "0")
    code, out, err = command(*options, "--quantize", "int8")
    model = load_pretrained("model.pt", "causal", quantize="int8")
    assert (code, out) == (0, f"{continue_text(model, tokenizer, 'this film', 9, top_k=1)[0]}\n")
    assert err == "model.pt: causal attention, int8 weights, cpu\n"


def test_standard_input_is_a_prefix_and_too_long_a_prefix_is_said(command, monkeypatch):
    stdin = SimpleNamespace(buffer=io.BytesIO(b"good\r\n" * 200))
    monkeypatch.setattr(sys, "stdin", stdin)
    code, out, err = command("-", "--max_new_tokens", "0")
    assert (code, out) == (0, "good\n" * 200)
    assert "tokens; the model reads the last 96" in err


def test_a_terminal_gets_pieces_without_what_steers_it(command, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert command("a\x1b[2Jb", "--max_new_tokens", "0")[1] == "a\\x1b[2Jb\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--top_p", "1.5"], "--top_p: '1.5' is not a number in (0, 1]"),
        (["--top_k", "0"], "--top_k: '0' is not an integer in [1, 2**63)"),
        (["--temperature", "-1"], "'-1' is not a number in [0, 1e30)"),
        (["--quantize", "int4"], "--quantize: invalid choice: 'int4'"),
        (["a", "b"], "unrecognized arguments: b"),
        (["--checkpoint", "model.pt"], "unrecognized arguments: --checkpoint"),
        (["--pretrained-model-path", "gone.pt"], "gone.pt"),
        (["--pretrained-model-path", "labels.json"], "labels.json"),
        (["--tokenizer_path", "gone.model"], "gone.model"),
        (["\udce9"], "the prefix has byte 0xe9, which is not UTF-8"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, argv, words):
    assert words in error_line(command(*argv))


def test_without_options_it_continues_the_assignments_prefix_by_the_bundled_model():
    if (ROOT / "stories42M.pt").exists():
        pytest.skip("stories42M.pt is here, so nothing stands in for it")
    command = [sys.executable, "-m", "tools.generate", "--max_new_tokens", "2"]
    code, out, err = finish(start(command, ROOT))
    assert code == 0 and out.startswith(generate.PREFIX)
    assert "stories42M.pt not found, using the bundled data/mini/model.pt" in err
