"""tools.explain: finite differences in float64, the classifier without the word, a plain sort."""

import html
import io
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import LABEL_NAMES, ended, randomize
from helpers import CPU, classifier, error_line, write_classifier
from tools import explain, mistakes, rendering
from tools.predict import Predictor, load_predictor
from tools.rendering import Explanation

LOO, GXI = "leave-one-out", "gradient x input"
SENTENCE = "  not  bad ,  a naïve 電影 😀! and\tgood  "


def predictor_of(tokenizer, pooling="mean", max_sentence_len=None, **shape):
    model = classifier(pooling, scale=5.0, **{"attention": "causal", **shape})
    randomize(model, lambda name: name.startswith("classifier_head"), 1.0)
    return Predictor(model.eval(), tokenizer, LABEL_NAMES, max_sentence_len, CPU)


# ---------------------------------------------------------------- the two methods


@pytest.mark.parametrize("pooling", ["last", "position"])  # padding is masked, or read
def test_leave_one_out_is_the_classifiers_difference_without_the_word(tokenizer, pooling):
    predictor = predictor_of(tokenizer, pooling, attention="full")
    words = ["this", "story", "is", "a", "電影", "film", "or", "bad"]  # 電影 is seven tokens

    def log_p(text):
        ids = torch.tensor([tokenizer.encode(text, bos=True, eos=False)])
        return predictor.model(ids, torch.tensor([ids.shape[1]]))[0, 1].item()

    whole = log_p(" ".join(words))
    expected = [whole - log_p(" ".join(words[:i] + words[i + 1 :])) for i in range(8)]
    found = explain.explain(predictor, " ".join(words), label=1)
    assert found.values[LOO] == pytest.approx(expected, abs=1e-5)
    assert found.label_probability == pytest.approx(np.exp(whole), rel=1e-5)
    assert found.predicted == LABEL_NAMES[int(np.exp(whole) > 0.5)]
    only = explain.explain(predictor, "good", label=1).values[LOO]  # without it bos is left
    assert only == pytest.approx([log_p("good") - log_p("")], abs=1e-5)


def test_gradient_x_input_is_the_derivative_by_each_embeddings_scale(tokenizer):
    """Central differences in float64, summed over a word's tokens. The model stays as it was."""
    predictor = predictor_of(tokenizer)
    embedding = predictor.model.double().llama.tok_embeddings
    ids = torch.tensor([tokenizer.encode(SENTENCE, bos=True, eos=False)])

    def log_p(scale):
        hook = embedding.register_forward_hook(lambda *args: args[-1] * scale)
        with hook, torch.no_grad():
            return predictor.model(ids, torch.tensor([ids.shape[1]]))[0, 0].item()

    def derivative(direction, h=1e-5):
        return (log_p(1 + h * direction) - log_p(1 - h * direction)) / (2 * h)

    reading = explain.read(predictor, SENTENCE)
    by_token = explain.token_gradients_x_input(predictor, reading, 0)
    each = torch.eye(ids.shape[1], dtype=torch.float64)[:, :, None]
    assert by_token == pytest.approx([derivative(one) for one in each], rel=1e-5, abs=1e-7)
    by_word = np.bincount(reading.word_of_token, weights=by_token[1:])[:-1]  # less the last spaces
    assert explain.explain(predictor, SENTENCE, 0).values[GXI] == pytest.approx(by_word)
    assert all(p.grad is None and p.requires_grad for p in predictor.model.parameters())
    assert not any(m.training or m._forward_hooks for m in predictor.model.modules())


def test_probabilities_that_float32_lacks_give_finite_values(tokenizer):
    predictor = predictor_of(tokenizer)
    with torch.no_grad():
        predictor.model.classifier_head.bias.copy_(torch.tensor([0.0, 1e4]))
    values = explain.explain(predictor, "bad film", label=0).values
    assert values[LOO] == [0.0, 0.0]
    assert np.isfinite(values[GXI]).all()


# ---------------------------------------------------------------- words and tokens

# SentencePiece takes ▁ for a space.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), min_size=1)
SPACED = st.lists(st.sampled_from([" ", "  ", "\t", "good", "a", ",", "é", "電影", "😀"]))


@settings(max_examples=60)
@given(sentence=(TEXT | SPACED.map("".join)).filter(str.strip))
def test_the_tokens_of_a_word_decode_to_it_and_without_it_the_others_stay(tokenizer, sentence):
    model = SimpleNamespace(llama=SimpleNamespace(config=SimpleNamespace(max_seq_len=10_000)))
    reading = explain.read(Predictor(model, tokenizer, LABEL_NAMES, None, CPU), sentence)
    assert reading.words == sentence.split()
    assert reading.read_words == list(range(len(reading.words)))
    assert reading.word_of_token == sorted(reading.word_of_token)
    pairs = list(zip(reading.data.examples[0].tokens[1:], reading.word_of_token, strict=True))
    for index, word in enumerate(reading.words):
        assert tokenizer.decode([i for i, of in pairs if of == index]).strip() == word
        others = reading.words[:index] + reading.words[index + 1 :]
        assert reading.without(index).split() == others


@pytest.mark.parametrize("cut", [{"max_sentence_len": 4}, {"max_seq_len": 5}])
def test_words_that_the_model_does_not_read_have_no_value(tokenizer, cut):
    predictor = predictor_of(tokenizer, **cut)
    start = explain.explain(predictor, "this film is good")
    found = explain.explain(predictor, "this film is good or bad")
    assert found.words[4:] == ["or", "bad"]
    assert found.values[LOO][4:] == found.values[GXI][4:] == [None, None]
    assert found.values[GXI][:4] == start.values[GXI]


# ---------------------------------------------------------------- table and page

EXPLANATION = Explanation(
    "good", 0.75, "good", 0.75, "bad", ["電影", "was", "<b>", "unread"],
    {LOO: [0.5, -0.25, -1e-9, None], GXI: [0.1, 0.0, 0.2, None]},
)  # fmt: skip


def test_a_table_has_a_word_per_line_and_colors_by_sign_and_share():
    plain = rendering.table(EXPLANATION)
    assert plain.splitlines() == [
        "good 0.750 (gold: bad)",
        "word    leave-one-out  gradient x input",
        "電影           +0.500            +0.100",
        "was            -0.250             0.000",
        "<b>             0.000            +0.200",
        "unread              -                 -",
    ]
    colored = rendering.table(EXPLANATION, is_colored=True)
    assert re.sub("\033\\[[0-9;]*m", "", colored) == plain
    codes = re.findall(r"48;5;([0-9]+)m *([-+0-9.]+)", colored)
    assert codes == [("33", "+0.500"), ("117", "+0.100"), ("222", "-0.250"), ("33", "+0.200")]


def test_a_page_escapes_its_words_and_loads_and_runs_nothing():
    hostile = '<script>alert("1")</script>&amp;'
    words = {LOO: [1.0, -0.5, None]}
    explanation = Explanation("<i>", 0.75, "<i>", 0.75, "&", [hostile, "b", "c"], words)
    text = rendering.page([explanation, EXPLANATION], 'of "<u>".pt')
    assert set(re.findall(r"</?([a-z0-9]+)", text)) == {
        *("html", "meta", "title", "style", "h1", "h2", "h3", "p", "section", "span")
    }
    assert not re.search(r"url\(|@import|src=|href=| on[a-z]+=", text)
    for shown in (hostile, 'of "<u>".pt', "<i> 0.750 (gold: &)", "good 0.750 (gold: bad)"):
        assert f">{html.escape(shown)}<" in text
    spans = re.findall(r'<span title="([^"]+)" style="background: rgba\((.+?)\)', text)
    assert spans[:2] == [("+1.000", "0, 114, 178, 0.65"), ("-0.500", "230, 159, 0, 0.33")]
    assert spans[2][0] == "-"


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(workplace, monkeypatch, capsys):
    """command(...) runs tools.explain beside a checkpoint c.pt: exit code, output, errors."""
    write_classifier("c.pt")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return lambda *argv: ended(lambda: explain.main(list(argv)), capsys)


def test_the_command_prints_tables_and_writes_a_page(command, workplace, monkeypatch):
    predictor = load_predictor("c.pt")
    options = ("--checkpoint", "c.pt", "--label", "bad", "--out", "o.html")
    labeled = (("a good film", "good"), ("bad", "bad"))
    found = [explain.explain(predictor, text, 0, gold) for text, gold in labeled]
    plain = "".join(f"{rendering.table(one)}\n\n" for one in found) + "wrote o.html\n"
    assert command(*options, "1 ||| a good film", "bad ||| bad") == (0, plain, "")
    text = (workplace / "o.html").read_text(encoding="utf-8")
    assert text == rendering.page(found, "Which words carried the predictions of c.pt")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\033[38;5;16;48;5;" in command(*options, "bad")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in command(*options, "bad \033[2J")[1]


def row(line=1, predicted=1, gold=0, probability=0.5, **changes):
    content = {"line": line, "label": LABEL_NAMES[predicted], "probability": probability}
    content |= {"gold": None if gold is None else LABEL_NAMES[gold], "sentence": "a good film"}
    return json.dumps({**content, **changes}).encode() + b"\n"


LABELS = st.integers(0, 1)


@given(st.lists(st.tuples(LABELS, st.none() | LABELS, st.integers(50, 99))), st.integers(1, 5))
def test_the_most_confident_mistakes_come_first(predictions, top):
    predictions += [(0, 0, 60)]
    lines = [row(i, p, g, c / 100) for i, (p, g, c) in enumerate(predictions, start=1)]
    worst, n_mistakes, n_gold = mistakes.find_mistakes(lines, "p", top)
    wrong = [
        (-c / 100, i, LABEL_NAMES[p], LABEL_NAMES[g])
        for i, (p, g, c) in enumerate(predictions, start=1)
        if g not in (None, p)
    ]
    assert (n_mistakes, n_gold) == (len(wrong), sum(g is not None for _, g, _ in predictions))
    listed = [(-one.probability, one.line, one.predicted, one.gold) for one in worst]
    assert listed == sorted(wrong)[:top]


def test_errors_are_listed_and_explained_with_a_checkpoint(command, workplace, monkeypatch):
    content = row(1, probability=0.75) + row(2, 0) + row(3, probability=0.9, sentence="c\033\nd")
    (workplace / "p.jsonl").write_bytes(content)
    code, out, err = command("--errors", "p.jsonl")
    listed = out.splitlines()
    assert (code, err) == (0, "")
    assert listed == [
        "2 mistakes of 3 with a gold label",
        "0.900 predicted good, gold bad | line 3 | c\\x1b d",
        "0.750 predicted good, gold bad | line 1 | a good film",
    ]
    assert command("--errors", "p.jsonl", "--top", "1")[1].splitlines() == listed[:2]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert command("--errors", "-")[1] == out
    out = command("--errors", "p.jsonl", "--checkpoint", "c.pt")[1]
    explained = explain.explain(load_predictor("c.pt"), "a good film", gold="bad")
    assert f"{listed[2]}\n{rendering.table(explained)}\n\n" in out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (row(gold=None), "p.jsonl: has no gold labels"),
        (b"\ngood 0.9 | bad 0.1, good 0.9 | a b\n", "p.jsonl:2: 'good 0.9 | bad 0.1, good 0.9"),
        (b"[1]", "p.jsonl:1: '[1]' is not a prediction"),
        (b'{"a":' * 10**5, "is not a prediction"),
        (row(probability=1.5), "is not a prediction"),
        (row(sentence="\ud800"), "is not a prediction"),
        (row(label=3), "is not a prediction"),
        (row() + b'{"\xff', "p.jsonl:2: byte 0xff is not UTF-8"),
    ],
)
def test_a_file_that_predict_did_not_write_is_one_line(command, workplace, content, words):
    (workplace / "p.jsonl").write_bytes(content)
    line = error_line(command("--errors", "p.jsonl"))
    assert words in line and len(line) < 300


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give either sentences or --errors FILE"),
        (["bad", "--checkpoint", "c.pt", "--errors", "p.jsonl"], "give either sentences or"),
        (["bad"], "name --checkpoint, such as"),
        (["--errors", "p.jsonl", "--out", "o.html"], "name --checkpoint"),
        (["--errors", "p.jsonl", "--label", "bad"], "name --checkpoint"),
        (["bad", "--checkpoint", "c.pt", "--out", "o.png"], "o.png: must end in .html"),
        (["bad", "--checkpoint", "c.pt", "--out", "gone/o.html"], "its folder does not exist"),
        (["bad", "--checkpoint", "c.pt", "--label", "fine"], "labels are bad, good"),
        (["bad", "--checkpoint", "c.pt", "--label", ""], "labels are bad, good"),
        (["bad", "--checkpoint", "gone.pt"], "gone.pt"),
        (["  ", "--checkpoint", "c.pt"], "no sentence has a word"),
        (["--errors", "gone.jsonl"], "gone.jsonl: No such file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(command, argv, words):
    assert words in error_line(command(*argv))
