"""Prompts, their scores and calibrations against float64 sums, and finetuning through them."""

import math

import pytest
import torch

from advanced.methods.prompting import (
    SCORINGS,
    PromptClassifier,
    calibrate,
    encode_prompts,
    unbiased_probs,
)
from classifier import label_room
from conftest import random_llama
from helpers import train
from training.dataset import Example, SentenceDataset
from training.templates import Template, render

PLAIN = Template("plain", "", "the movie is", (("bad",), ("good",)))
BOTH = Template("both", "a story :", "it was a", (("bad", "film"), ("good", "warm xyz"), ("or",)))


def classifier(tokenizer, template=BOTH, scale=3.0, **options) -> PromptClassifier:
    llama = random_llama(attention="causal", vocab_size=tokenizer.n_words, scale=scale)
    return PromptClassifier(llama, tokenizer, template.labels, **options).eval()


def prompt(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, bos=True, eos=False)


def batch(tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    examples = [Example(text, 0, prompt(tokenizer, text)) for text in texts]
    collated = SentenceDataset(examples, tokenizer.pad_id).collate_fn(examples)
    return collated["token_ids"], collated["lengths"]


def score_by_hand(model, text: str, strings: tuple[str, ...]) -> float:
    """log of the summed probabilities of texts that go on so: float64, one step at a time."""
    before, total = prompt(model.tokenizer, text), 0.0
    for string in strings:
        ids = prompt(model.tokenizer, f"{text} {string}")
        assert ids[: len(before)] == before
        p = 1.0
        for i in range(len(before), len(ids)):
            logits = model.llama(torch.tensor([ids[:i]]))[0][0, -1].double()
            p *= (logits[ids[i]] - logits.logsumexp(0)).exp().item()
        total += p
    return math.log(total)


def probs_by_hand(model, text: str) -> torch.Tensor:
    scores = [score_by_hand(model, text, strings) for strings in BOTH.labels]
    return torch.tensor(scores, dtype=torch.float64).softmax(0)


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("template", [BOTH, Template("bare", "", "", ())])
def test_a_prompt_is_tokenized_as_the_rendered_text(tokenizer, template):
    rows = [("the story was bad", 0), ("a movie !", 1)]
    examples, n_truncated = encode_prompts(rows, tokenizer, template, max_tokens=90)
    for (sentence, label), example in zip(rows, examples, strict=True):
        assert example == (sentence, label, prompt(tokenizer, render(template, sentence)))
    assert n_truncated == 0


def test_a_long_sentence_loses_its_end_and_no_word_of_the_template(tokenizer):
    n_template = len(prompt(tokenizer, render(BOTH, "")))  # with bos; "good" is one token
    for n_words, max_tokens, longest, n_kept, n_cut in (
        (40, n_template + 9, None, 9, 1),
        (40, 90, 7, 7, 0),
        (9, n_template + 9, None, 9, 0),
    ):
        examples, n_truncated = encode_prompts(
            [(" ".join(["good"] * n_words), 0)],
            tokenizer,
            BOTH,
            max_tokens=max_tokens,
            max_sentence_len=longest,
        )
        kept = " ".join(["good"] * n_kept)
        assert examples[0].tokens == prompt(tokenizer, render(BOTH, kept))
        assert n_truncated == n_cut


# ---------------------------------------------------------------- scores


def test_scores_are_the_summed_probabilities_of_a_labels_strings_whatever_the_padding(tokenizer):
    model = classifier(tokenizer)
    texts = ["a story : the heart it was a", "a good"]
    ids, lengths = batch(tokenizer, texts)
    for row, length in enumerate(lengths):
        ids[row, length:] = 7
    scores = model.scores(ids, lengths)
    expected = torch.tensor(
        [[score_by_hand(model, text, strings) for strings in BOTH.labels] for text in texts]
    )
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    log_probs = expected - expected.logsumexp(1, keepdim=True)
    torch.testing.assert_close(model(ids, lengths), log_probs)
    n_tokens = len(tokenizer.encode("warm xyz", bos=False, eos=False))
    assert label_room(tokenizer, sum(BOTH.labels, ())) == n_tokens - 1


# ---------------------------------------------------------------- calibration


def test_the_bias_is_minus_the_log_mean_probability_over_what_the_scoring_reads(tokenizer):
    model = classifier(tokenizer)
    rows = [("the film is good", 0), ("bad", 1), ("a", 1)]
    examples, _ = encode_prompts(rows, tokenizer, BOTH, max_tokens=50)
    read = {
        "plain": None,
        "contextual": ["N/A", "", "[MASK]"],
        "pmi": [""],
        "batch": [sentence for sentence, _ in rows],
    }
    assert tuple(read) == SCORINGS
    model.bias.fill_(3.0)
    model.bias[0] = -4.0  # an earlier calibration must not matter
    unbiased = unbiased_probs(model, examples, batch_size=2)
    by_hand = torch.stack([probs_by_hand(model, render(BOTH, text)) for text in read["batch"]])
    torch.testing.assert_close(unbiased, by_hand.float(), rtol=1e-4, atol=1e-4)  # in their order
    for scoring in ("batch", "pmi", "contextual", "plain"):
        calibrate(model, scoring, BOTH, unbiased)
        expected = torch.zeros(3)
        if read[scoring] is not None:
            probs = [probs_by_hand(model, render(BOTH, text)) for text in read[scoring]]
            expected = -torch.stack(probs).mean(0).log().float()
        torch.testing.assert_close(model.bias, expected, rtol=1e-4, atol=1e-4)


def test_after_pmi_the_prompt_without_a_sentence_is_undecided(tokenizer):
    model = classifier(tokenizer)
    calibrate(model, "pmi", BOTH, torch.empty(0, 3))
    empty = model(*batch(tokenizer, [render(BOTH, "")])).exp()
    torch.testing.assert_close(empty, torch.full((1, 3), 1 / 3))


# ---------------------------------------------------------------- finetuning


def test_finetuning_learns_a_toy_set_and_leaves_the_bias(tokenizer):
    rows = [("this film is good", 1), ("a warm movie", 1), ("this film is bad", 0), ("a bad", 0)]
    template = PLAIN._replace(labels=(("bad", "or xq"), ("good",)))
    examples, _ = encode_prompts(rows, tokenizer, template, max_tokens=50)
    model = classifier(tokenizer, template, scale=1.0)
    assert {name for name in model.state_dict() if not name.startswith("llama.")} == {"bias"}
    calibrate(model, "pmi", template, torch.empty(0, 2))
    bias = model.bias.clone()
    data = SentenceDataset(examples, tokenizer.pad_id)
    history = train(model, data, epochs=20, lr=1e-3)
    assert history[-1].train_loss < 0.3 * history[0].train_loss
    assert history[-1].dev_accuracy == 1.0
    assert torch.equal(model.bias, bias)
    frozen = classifier(tokenizer, trainable=False)
    assert not any(p.requires_grad for p in frozen.parameters())
