"""The bundled model is what its card says."""

import pytest
import torch

import oracle
import sanity_check
from config import ATTENTION_MODES
from conftest import ROOT
from llama import load_pretrained
from tokenizer import Tokenizer

MINI = ROOT / "data/mini"


@pytest.fixture(scope="module")
def mini():
    return load_pretrained(MINI / "model.pt")


@pytest.fixture(scope="module")
def mini_tokenizer():
    return Tokenizer(tokenizer_model=MINI / "tokenizer.model")


def test_it_is_small_causal_and_grouped_and_loads_to_float32(mini):
    config = mini.config
    assert config.attention == "causal"
    assert config.n_kv_heads < config.n_heads
    n_parameters = sum(p.numel() for p in mini.parameters())
    assert f"{n_parameters:,} parameters" in (MINI / "README.md").read_text(encoding="utf-8")
    assert {p.dtype for p in mini.parameters()} == {torch.float32}
    assert mini.output.weight is mini.tok_embeddings.weight
    assert (MINI / "model.pt").stat().st_size <= 16e6
    saved = torch.load(MINI / "model.pt", weights_only=True)
    assert {tensor.dtype for tensor in saved["model"].values()} == {torch.float16}
    assert saved["model_args"]["attention"] == "causal"


def test_its_reference_is_what_float64_numpy_computes_in_both_modes(tmp_path):
    """And the model passes sanity_check.py on it."""
    assert sanity_check.check(str(MINI / "model.pt"), str(MINI / "sanity_check.data"))
    oracle.main(MINI / "model.pt", tmp_path / "computed.data")
    token_ids, references = sanity_check.read_reference(MINI / "sanity_check.data")
    same_ids, computed = sanity_check.read_reference(tmp_path / "computed.data")
    assert set(references) == set(ATTENTION_MODES)
    assert token_ids.unique().numel() > 2
    torch.testing.assert_close(token_ids, same_ids)
    for mode, reference in references.items():
        for name in sanity_check.QUANTITIES:
            torch.testing.assert_close(reference[name], computed[mode][name])


@pytest.mark.parametrize("text", ["A thriller, at last!", "  naïve  电影 🎬\n\tin 1999\x00 "])
def test_its_tokenizer_gives_back_any_text(mini, mini_tokenizer, text):
    ids = mini_tokenizer.encode(text, bos=True, eos=False)
    assert mini_tokenizer.decode(ids) == text
    assert max(ids) < mini.config.vocab_size == mini_tokenizer.n_words


def test_it_predicts_a_review_better_than_shuffled_words(mini, mini_tokenizer):
    def nats(sentence: str) -> float:
        ids = torch.tensor([mini_tokenizer.encode(sentence, bos=True, eos=False)])
        with torch.inference_mode():
            logits, _ = mini(ids, targets=ids)
        return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()

    review = "The acting was great and I would recommend this movie to anyone who loves comedies."
    shuffled = "comedies movie loves acting the to would. and recommend who I was this anyone great"
    assert nats(review) < nats(shuffled) - 1
