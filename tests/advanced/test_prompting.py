"""Prompts, their scores and calibrations against float64 sums, and finetuning through them."""

import math

import pytest
import torch

from advanced.methods.prompting import (
    SCORINGS,
    PromptClassifier,
    calibrate,
    encode_prompts,
    label_scores,
    longest_label,
)
from advanced.methods.templates import Template, render
from conftest import random_llama
from training.dataset import Example, SentenceDataset
from training.loop import train_classifier

PLAIN = Template("plain", "", "the movie is", (("bad",), ("good",)))
BOTH = Template("both", "a story :", "it was a", (("bad", "film"), ("good", "warm xyz"), ("or",)))


def classifier(tokenizer, template=BOTH, **options) -> PromptClassifier:
    llama = random_llama(attention="causal", vocab_size=tokenizer.n_words, scale=3.0)
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


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("template", [PLAIN, BOTH, Template("bare", "", "", None)])
def test_prompt_is_tokenized_as_the_rendered_text(tokenizer, template):
    rows = [("the story was bad", 0), ("a movie !", 1)]
    examples, n_truncated = encode_prompts(rows, tokenizer, template, max_tokens=90)
    for (sentence, label), example in zip(rows, examples, strict=True):
        assert example == (sentence, label, prompt(tokenizer, render(template, sentence)))
    assert n_truncated == 0


@pytest.mark.parametrize("template", [PLAIN, BOTH])
def test_too_long_sentence_loses_its_end_and_no_word_of_the_template(tokenizer, template):
    n_template = len(prompt(tokenizer, render(template, "")))  # with bos; "good" is one token
    for n_words, room, longest, kept, n_cut in (
        (40, n_template + 9, None, 9, 1),
        (40, 90, 7, 7, 0),
        (40, n_template + 9, 20, 9, 1),
        (9, n_template + 9, None, 9, 0),
    ):
        examples, n_truncated = encode_prompts(
            [(" ".join(["good"] * n_words), 0)],
            tokenizer,
            template,
            max_tokens=room,
            max_sentence_len=longest,
        )
        assert examples[0].tokens == prompt(tokenizer, render(template, " ".join(["good"] * kept)))
        assert n_truncated == n_cut


def test_template_that_leaves_no_room_is_one_line(tokenizer):
    with pytest.raises(ValueError, match="no room"):
        encode_prompts([("good", 0)], tokenizer, BOTH, max_tokens=6)


# ---------------------------------------------------------------- scores


def test_scores_are_the_summed_probabilities_of_a_labels_strings(tokenizer):
    model = classifier(tokenizer)
    texts = ["a story : the heart it was a", "a good"]
    scores = model.scores(*batch(tokenizer, texts))
    expected = torch.tensor(
        [[score_by_hand(model, text, strings) for strings in BOTH.labels] for text in texts]
    )
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    log_probs = model(*batch(tokenizer, texts))
    torch.testing.assert_close(log_probs, expected - expected.logsumexp(1, keepdim=True))
    assert model.longest_label == len(tokenizer.encode("warm xyz", bos=False, eos=False)) - 1


def test_scores_under_autocast_are_finer_than_bfloat16(tokenizer):
    model = classifier(tokenizer)
    given = batch(tokenizer, ["the film was good", "a heart"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model.scores(*given)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    torch.testing.assert_close(scores, model.scores(*given), rtol=0.05, atol=0.2)


def test_padding_and_other_rows_change_nothing(tokenizer):
    model = classifier(tokenizer)
    texts = ["the film was good and the story bad", "a", "a warm heart"]
    ids, lengths = batch(tokenizer, texts)
    together = model(ids, lengths)
    padded = torch.nn.functional.pad(ids, (0, 5), value=7)
    torch.testing.assert_close(model(padded, lengths), together)
    for row, text in enumerate(texts):
        torch.testing.assert_close(model(*batch(tokenizer, [text]))[0], together[row])


def test_labels_of_one_token_take_one_pass_and_further_beginnings_one_each(tokenizer, monkeypatch):
    passes = []
    for labels in ((("bad", "film"), ("good",)), (("bad", "bad xq"), ("good xq",))):
        model = classifier(tokenizer, Template("", "", "", labels))
        inner = model.llama.hidden_states
        calls = []
        monkeypatch.setattr(
            model.llama, "hidden_states", lambda *a, f=inner, c=calls: c.append(1) or f(*a)
        )
        model(*batch(tokenizer, ["a film"]))
        passes.append(len(calls))
    tails = [len(tokenizer.encode(s, False, False)) - 1 for s in ("bad xq", "good xq")]
    assert passes == [1, 1 + sum(tails)]


def test_full_attention_and_missing_lengths_are_refused(tokenizer):
    llama = random_llama(attention="full", vocab_size=tokenizer.n_words)
    with pytest.raises(ValueError, match=r"'full' cannot prompt.*--attention causal"):
        PromptClassifier(llama, tokenizer, BOTH.labels)
    model = classifier(tokenizer)
    assert model.reads_lengths
    with pytest.raises(ValueError, match="lengths"):
        model(torch.tensor([[1, 5]]))


# ---------------------------------------------------------------- calibration


def probs_by_hand(model, text: str) -> torch.Tensor:
    scores = [score_by_hand(model, text, strings) for strings in BOTH.labels]
    return torch.tensor(scores, dtype=torch.float64).softmax(0)


def test_bias_is_minus_the_log_of_the_mean_probability_over_what_the_scoring_reads(tokenizer):
    model = classifier(tokenizer)
    examples, _ = encode_prompts(
        [("the film is good", 0), ("bad", 1), ("a", 1)], tokenizer, BOTH, max_tokens=50
    )
    read = {
        "plain": None,
        "contextual": ["N/A", "", "[MASK]"],
        "pmi": [""],
        "batch": [example.sentence for example in examples],
    }
    assert tuple(read) == SCORINGS
    model.bias.fill_(3.0)  # what an earlier calibration left must not count
    model.bias[0] = -4.0
    for scoring in ("batch", "pmi", "contextual", "plain"):
        calibrate(model, scoring, BOTH, label_scores(model, examples))
        expected = torch.zeros(3)
        if read[scoring] is not None:
            probs = [probs_by_hand(model, render(BOTH, text)) for text in read[scoring]]
            expected = -torch.stack(probs).mean(0).log().float()
        torch.testing.assert_close(model.bias, expected, rtol=1e-4, atol=1e-4)


def test_calibrated_model_is_undecided_without_a_sentence(tokenizer):
    model = classifier(tokenizer)
    empty = batch(tokenizer, [render(BOTH, "")])
    assert model(*empty).exp().max() > 0.4
    calibrate(model, "pmi", BOTH)
    torch.testing.assert_close(model(*empty).exp(), torch.full((1, 3), 1 / 3))


def test_pmi_log_odds_are_those_of_the_prompt_minus_those_of_the_premise(tokenizer):
    model = classifier(tokenizer)
    calibrate(model, "pmi", BOTH)
    text = render(BOTH, "her heart is warm")
    pmi = [
        score_by_hand(model, text, strings) - score_by_hand(model, render(BOTH, ""), strings)
        for strings in BOTH.labels
    ]
    log_probs = model(*batch(tokenizer, [text]))[0]
    expected = torch.tensor(pmi).log_softmax(0)
    torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-4)


def test_label_scores_stand_in_the_order_of_the_examples_and_do_not_depend_on_batches(tokenizer):
    model = classifier(tokenizer)
    sentences = ["the film", "a", "bad bad bad", "story or movie", "good and warm"]
    examples, _ = encode_prompts([(s, 0) for s in sentences], tokenizer, BOTH, max_tokens=50)
    by_hand = [
        [score_by_hand(model, render(BOTH, s), strings) for strings in BOTH.labels]
        for s in sentences
    ]
    for batch_size in (2, 32):
        scores = label_scores(model, examples, batch_size)
        torch.testing.assert_close(scores, torch.tensor(by_hand), rtol=1e-4, atol=1e-4)


def test_the_longest_label_is_that_of_the_model(tokenizer):
    assert longest_label(tokenizer, BOTH) == classifier(tokenizer).longest_label


def test_batch_calibration_needs_scores(tokenizer):
    with pytest.raises(ValueError, match="needs the scores"):
        calibrate(classifier(tokenizer), "batch", BOTH)


def test_unknown_scoring_names_the_known(tokenizer):
    with pytest.raises(ValueError, match=r"'zhao'.*contextual"):
        calibrate(classifier(tokenizer), "zhao", BOTH)


# ---------------------------------------------------------------- finetuning


def test_weights_are_the_llamas_and_the_bias_alone(tokenizer):
    model = classifier(tokenizer)
    assert {name for name in model.state_dict() if not name.startswith("llama.")} == {"bias"}
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in classifier(tokenizer, trainable=False).parameters())


def test_finetuning_learns_a_toy_set_and_leaves_the_bias(tokenizer):
    rows = [("this film is good", 1), ("a warm movie", 1), ("this film is bad", 0), ("a bad", 0)]
    template = PLAIN._replace(labels=(("bad", "or xq"), ("good",)))
    examples, _ = encode_prompts(rows, tokenizer, template, max_tokens=50)
    data = SentenceDataset(examples, tokenizer.pad_id)
    llama = random_llama(attention="causal", vocab_size=tokenizer.n_words, scale=1.0)
    model = PromptClassifier(llama, tokenizer, template.labels)
    calibrate(model.eval(), "pmi", template)
    bias = model.bias.clone()
    history = train_classifier(
        model,
        data,
        data,
        epochs=12,
        batch_size=4,
        lr=3e-3,
        seed=0,
        device=torch.device("cpu"),
        on_epoch=lambda report, is_best: None,
    )
    assert history[-1].train_loss < 0.3 * history[0].train_loss
    assert history[-1].dev_accuracy == 1.0
    assert torch.equal(model.bias, bias)
