"""Texts of one's own: shared caches, streams, ends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import random_llama
from llama import Llama
from tools import generate as generation
from tools.generate import continue_text

PREFIX = "this movie is a"


def rank_by_row(logits: torch.Tensor) -> torch.Tensor:
    """A `pick` that needs no chance: row i takes its i-th likeliest token."""
    ranked = logits.argsort(dim=-1, descending=True)
    return torch.stack([row[[i]] for i, row in enumerate(ranked)])


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_samples_are_what_each_would_be_alone_read_anew_at_every_step(attention):
    model = random_llama(attention=attention, max_seq_len=12)  # the window begins to slide
    idx = torch.randint(3, 320, (2, 5))
    steps = list(model.next_tokens(idx, 10, rank_by_row, num_samples=3))
    rows = idx.repeat_interleave(3, dim=0)
    for step in steps:
        with torch.no_grad():
            logits, _ = model(rows[:, -12:])
        assert torch.equal(step, rank_by_row(logits[:, -1]))
        rows = torch.cat((rows, step), dim=1)


def test_samples_share_the_prefixs_cache(monkeypatch, tokenizer):
    read, forward = [], Llama.forward

    def recording(self, tokens, *args, **options):
        read.append(tuple(tokens.shape))
        return forward(self, tokens, *args, **options)

    monkeypatch.setattr(Llama, "forward", recording)
    continue_text(random_llama(attention="causal"), tokenizer, PREFIX, 4, num_samples=3)
    n_prefix = len(tokenizer.encode(PREFIX, bos=True, eos=False))
    assert read == [(1, n_prefix), (3, 1), (3, 1), (3, 1)]


def test_a_generator_that_is_left_early_leaves_no_mode_behind():
    idx = torch.randint(3, 320, (1, 5))
    for _ in random_llama(attention="causal").next_tokens(idx, 5, rank_by_row):
        assert not torch.is_inference_mode_enabled()
        break
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_the_greedy_text_is_that_of_generate(tokenizer, attention):
    model = random_llama(attention=attention)
    idx = torch.tensor([tokenizer.encode(PREFIX, bos=True, eos=False)])
    expected = tokenizer.decode(model.generate(idx, 20, 0.0)[0].tolist())
    assert continue_text(model, tokenizer, PREFIX, 20, temperature=0.0) == [expected]


def test_many_samples_are_made_some_at_once(monkeypatch, tokenizer):
    monkeypatch.setattr(generation, "AT_ONCE", 3)
    model = random_llama(attention="causal")
    options = {"temperature": 1.0, "top_k": 1, "num_samples": 7}
    (greedy,) = continue_text(model, tokenizer, PREFIX, 5, temperature=0.0)
    assert continue_text(model, tokenizer, PREFIX, 5, **options) == [greedy] * 7


@pytest.fixture
def spelling(monkeypatch, tokenizer):
    """spelling(columns) makes the samples consist of these tokens, one list a sample."""

    def script(*samples: list[int]) -> None:
        steps = iter(zip(*samples, strict=True))

        def pick(logits, **_):
            return torch.tensor([[token] for token in next(steps)])

        monkeypatch.setattr(generation, "pick_next", pick)

    return script


def of_bytes(tokenizer, content: bytes) -> list[int]:
    return [tokenizer.sp_model.piece_to_id(f"<0x{byte:02X}>") for byte in content]


def test_a_text_ends_before_its_eos_or_bos_and_the_others_go_on(spelling, tokenizer):
    good, bad = (tokenizer.encode(word, bos=False, eos=False) for word in ("good", "bad"))
    assert len(good) == len(bad) == 1
    eos, bos = [tokenizer.eos_id], [tokenizer.bos_id]
    spelling(good + eos + good * 3, bad * 3 + bos + bad)
    options = {"num_samples": 2, "stop_at_eos": True}
    model = random_llama(attention="causal")
    assert continue_text(model, tokenizer, PREFIX, 5, **options) == [
        f"{PREFIX} good",
        f"{PREFIX} bad bad bad",
    ]
    spelling(good + eos + good * 3, bad * 3 + bos + bad)
    texts = continue_text(model, tokenizer, PREFIX, 5, num_samples=2)
    assert [text.count("good") + text.count("bad") for text in texts] == [4, 4]


def test_when_all_texts_have_ended_nothing_more_is_computed(spelling, tokenizer):
    spelling([tokenizer.eos_id])  # a second step would find no token
    model = random_llama(attention="causal")
    assert continue_text(model, tokenizer, PREFIX, 5, stop_at_eos=True) == [PREFIX]


def test_a_letter_of_several_bytes_is_held_back_until_it_is_whole(spelling, tokenizer):
    spelling(of_bytes(tokenizer, "é€".encode() + b"\xe2"))  # the last one stays in pieces
    pieces: list[str] = []
    model = random_llama(attention="causal")
    texts = continue_text(model, tokenizer, PREFIX, 6, on_text=pieces.append)
    assert pieces == [PREFIX, "é", "€", "\ufffd"]
    assert texts == ["".join(pieces)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_the_pieces_joined_are_the_first_text(tokenizer, seed):
    torch.manual_seed(seed)
    pieces: list[str] = []
    model = random_llama(attention="causal", scale=1.0)  # many tokens are single bytes
    options = {"num_samples": 2, "on_text": pieces.append}
    texts = continue_text(model, tokenizer, "", 30, **options)
    assert "".join(pieces) == texts[0]
