"""advanced/explain.py, what it renders and which mistakes it lists: against closed forms, finite
differences, the classifier called by hand, and a plain sort."""

import contextlib
import copy
import html.parser
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

import cli
from classifier import LlamaEmbeddingClassifier
from conftest import LABEL_NAMES, random_llama, randomize, train_sentencepiece
from llama import RMSNorm
from tokenizer import Tokenizer
from tools import explain, mistakes, picture, predict, rendering
from tools.predict import Line, Prediction, Predictor
from tools.rendering import Explanation
from training.labelled import NO_GOLD_LABEL
from training.loop import save_classifier

CPU = torch.device("cpu")
LOO, GXI = "leave-one-out", "gradient x input"
SENTENCES = [
    "this film is good",
    "bad",
    "  not  bad ,  a naïve 電影 😀! and\tgood  ",
    "a\u00a0film good\u2028good",
]


def config_of(pooling):
    return SimpleNamespace(
        num_labels=2, option="finetune", hidden_dropout_prob=0.3, pooling=pooling
    )


def predictor_of(tokenizer, llama, pooling, max_sentence_len=None):
    model = LlamaEmbeddingClassifier(config_of(pooling), llama)
    randomize(model, lambda name: name.startswith("classifier_head"), 1.0)
    return Predictor(model.eval(), tokenizer, LABEL_NAMES, max_sentence_len, CPU)


def bag_of_words(tokenizer, pooling, eps=1.0):
    """Layers that add nothing: the states are the embeddings, normed."""
    llama = random_llama(layer_norm_eps=eps, attention="causal")
    with torch.no_grad():
        for layer in llama.layers:
            layer.attention.compute_output.weight.zero_()
            layer.feed_forward.w2.weight.zero_()
    return predictor_of(tokenizer, llama, pooling)


def values_of(predictor, sentence, **options):
    return explain.explain(predictor, sentence, **options).values


def without(sentence, word):
    words = sentence.split(" ")
    return " ".join(words[:word] + words[word + 1 :])


# ---------------------------------------------------------------- the attributions


class Bag:
    """`bag_of_words` with pooling "mean" in float64 NumPy."""

    def __init__(self, predictor):
        weights = {n: w.double().numpy() for n, w in predictor.model.state_dict().items()}
        self.embedding = weights["llama.output.weight"]
        self.norm = weights["llama.norm.weight"]
        self.head, self.bias = (weights[f"classifier_head.{n}"] for n in ("weight", "bias"))
        self.eps = predictor.model.llama.config.layer_norm_eps
        self.encode = lambda text: predictor.tokenizer.encode(text, bos=True, eos=False)

    def states(self, sentence):  # (T, dim), (T, 1)
        embedded = self.embedding[self.encode(sentence)]
        square = (embedded**2).mean(axis=1, keepdims=True)
        return embedded / np.sqrt(square + self.eps) * self.norm, square

    def log_probs(self, sentence):
        scores = self.head @ self.states(sentence)[0].mean(axis=0) + self.bias
        return scores - np.log(np.exp(scores).sum())

    def gradient_x_input(self, sentence, label):
        """d/ds of e s / sqrt(m s^2 + eps) at s = 1 is the normed e times eps / (m + eps)."""
        states, square = self.states(sentence)
        moved = states * self.eps / (square + self.eps) / len(states)  # (T, dim)
        by_label = moved @ self.head.T  # (T, n_labels)
        return by_label[:, label] - by_label @ np.exp(self.log_probs(sentence))


def test_a_bag_of_words_gets_the_values_of_its_closed_forms(tokenizer):
    predictor = bag_of_words(tokenizer, "mean")
    bag, sentence = Bag(predictor), "this film is good or bad"
    for label in (0, 1):
        values = values_of(predictor, sentence, label=label)
        log_p = bag.log_probs(sentence)[label]
        rest = [bag.log_probs(without(sentence, word))[label] for word in range(6)]
        assert values[LOO] == pytest.approx([log_p - other for other in rest], abs=2e-6)
        by_token = bag.gradient_x_input(sentence, label)
        pieces = tokenizer.sp_model.encode(sentence, out_type=str)
        word_of = np.cumsum([piece.startswith("▁") for piece in pieces]) - 1
        by_word = np.bincount(word_of, weights=by_token[1:])
        assert values[GXI] == pytest.approx(by_word, abs=2e-6)
        assert np.ptp(by_word) > 0.01


def test_a_word_that_the_pooling_ignores_gets_zero(tokenizer):
    predictor = bag_of_words(tokenizer, "last")
    values = values_of(predictor, "bad film this is good")
    for method in (LOO, GXI):
        *ignored, last = values[method]
        assert ignored == pytest.approx([0.0] * 4, abs=1e-6)
        assert abs(last) > 1e-3


KINDS = [("causal", "last"), ("causal", "mean"), ("full", "last"), ("full", "position")]


@pytest.mark.parametrize(("attention", "pooling"), KINDS)
def test_leave_one_out_is_what_the_classifier_says_without_the_word(tokenizer, attention, pooling):
    predictor = predictor_of(tokenizer, random_llama(attention=attention), pooling)
    sentence = "this story is a 電影 film or bad"  # 電影 is seven tokens

    def log_p(text):
        ids = torch.tensor([tokenizer.encode(text, bos=True, eos=False)])
        return predictor.model(ids, torch.tensor([ids.shape[1]]))[0, 1].item()

    expected = [log_p(sentence) - log_p(without(sentence, word)) for word in range(8)]
    found = explain.explain(predictor, sentence, label=1, methods=["leave_one_out"])
    assert list(found.values) == [LOO]
    assert found.values[LOO] == pytest.approx(expected, abs=1e-5)
    assert found.label_probability == pytest.approx(np.exp(log_p(sentence)), rel=1e-5)


def test_more_words_than_a_batch_are_left_out_too(tokenizer, monkeypatch):
    predictor = predictor_of(tokenizer, random_llama(attention="causal"), "mean")
    sentence = "this story is a good film or bad"
    whole = values_of(predictor, sentence)[LOO]
    monkeypatch.setattr(explain, "BATCH_SIZE", 3)
    assert values_of(predictor, sentence)[LOO] == pytest.approx(whole, abs=1e-5)


def test_without_its_only_word_a_sentence_is_bos_alone(tokenizer):
    predictor = predictor_of(tokenizer, random_llama(attention="causal"), "mean")
    with torch.no_grad():
        bos = predictor.model(torch.tensor([[tokenizer.bos_id]]), torch.tensor([1]))[0]
    found = explain.explain(predictor, " good ", label=0)
    expected = np.log(found.label_probability) - bos[0].item()
    assert found.values[LOO] == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize(("attention", "pooling"), KINDS)
@pytest.mark.parametrize("sentence", SENTENCES)
def test_gradient_x_input_is_the_derivative_by_the_scale_of_embeddings(
    tokenizer, attention, pooling, sentence
):
    """For all tokens together and for each alone, by central differences in float64."""
    llama = random_llama(attention=attention).double()
    predictor = predictor_of(tokenizer, llama, pooling)
    predictor.model.double()
    ids = torch.tensor([tokenizer.encode(sentence, bos=True, eos=False)])

    def log_p(scale):
        hook = llama.tok_embeddings.register_forward_hook(lambda *args: args[-1] * scale)
        with hook, torch.no_grad():
            return predictor.model(ids, torch.tensor([ids.shape[1]]))[0, 0].item()

    def derivative(direction, h=1e-5):
        ones = torch.ones(ids.shape[1], 1, dtype=torch.float64)
        return (log_p(ones + h * direction) - log_p(ones - h * direction)) / (2 * h)

    example = explain.read(predictor, sentence).example
    by_token = explain.token_gradients_x_input(predictor, example, 0)
    each = torch.eye(ids.shape[1], dtype=torch.float64)[:, :, None]
    assert by_token == pytest.approx([derivative(one) for one in each], rel=1e-5, abs=1e-7)
    assert sum(by_token) == pytest.approx(derivative(each.sum(dim=0)), rel=1e-5, abs=1e-7)


def test_gradients_of_all_labels_cancel_when_weighed_by_probability(tokenizer):
    """sum_c p_c d log p_c = d sum_c p_c = 0."""
    predictor = predictor_of(tokenizer, random_llama(attention="causal"), "mean")
    both = [explain.explain(predictor, SENTENCES[2], label=label) for label in (0, 1)]
    weighed = sum(one.label_probability * np.array(one.values[GXI]) for one in both)
    assert weighed == pytest.approx(np.zeros(len(weighed)), abs=1e-5)


def test_the_predicted_label_is_explained_unless_another_is_named(tokenizer):
    predictor = predictor_of(tokenizer, random_llama(attention="causal"), "mean")
    found = explain.explain(predictor, "this film is good")
    predicted = LABEL_NAMES.index(found.predicted)
    assert (found.label, found.label_probability) == (found.predicted, found.probability)
    assert found.probability >= 0.5
    assert found == explain.explain(predictor, "this film is good", label=predicted)
    other = explain.explain(predictor, "this film is good", label=1 - predicted)
    assert (other.predicted, other.label) == (found.predicted, LABEL_NAMES[1 - predicted])
    assert other.label_probability == pytest.approx(1 - found.probability, abs=1e-6)


def test_probabilities_that_float32_lacks_are_no_infinities(tokenizer):
    predictor = bag_of_words(tokenizer, "last")
    with torch.no_grad():
        predictor.model.classifier_head.bias.copy_(torch.tensor([0.0, 1e4]))
    values = values_of(predictor, "bad film", label=0)
    assert values[LOO] == [0.0, 0.0]
    assert np.isfinite(values[GXI]).all()


def test_the_model_is_left_as_it_was(tokenizer, monkeypatch):
    predictor = predictor_of(tokenizer, random_llama(attention="full"), "position")
    before = copy.deepcopy(predictor.model.state_dict())
    explain.explain(predictor, "this film is good")

    def fails(*args):
        raise ValueError("no states today")

    monkeypatch.setattr(RMSNorm, "forward", fails)
    with pytest.raises(ValueError, match="no states today"):
        explain.token_gradients_x_input(predictor, explain.read(predictor, "bad").example, 0)
    after = predictor.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None and p.requires_grad for p in predictor.model.parameters())
    assert not any(m.training or m._forward_hooks for m in predictor.model.modules())


# ---------------------------------------------------------------- words and tokens


def reading_of(tokenizer, sentence, **options):
    model = SimpleNamespace(llama=SimpleNamespace(config=SimpleNamespace(max_seq_len=10_000)))
    return explain.read(Predictor(model, tokenizer, LABEL_NAMES, None, CPU, **options), sentence)


# SentencePiece itself takes ▁ for a space.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), min_size=1)
SPACED = st.lists(st.sampled_from([" ", "  ", "\t", "good", "a", ",", "é", "電影", "😀"])).map(
    "".join
)


@settings(deadline=None, max_examples=60)
@given(sentence=(TEXT | SPACED).filter(str.strip))
def test_the_tokens_of_a_word_decode_to_it(tokenizer, sentence):
    reading = reading_of(tokenizer, sentence)
    assert reading.words == sentence.split()
    assert reading.read_words == list(range(len(reading.words)))
    ids = reading.example.tokens[1:]
    for index, word in enumerate(reading.words):
        own = [i for i, words in zip(ids, reading.covered, strict=True) if index in words]
        assert tokenizer.decode(own).strip() == word
    in_order = [word for words in reading.covered for word in words]
    assert in_order == sorted(in_order)


@settings(deadline=None, max_examples=60)
@given(sentence=SPACED.filter(str.strip))
def test_the_sentence_without_a_word_has_the_others(tokenizer, sentence):
    reading = reading_of(tokenizer, sentence)
    for word in range(len(reading.words)):
        others = reading.words[:word] + reading.words[word + 1 :]
        assert reading.without(word).split() == others


def test_spaces_go_with_the_word_behind_them_and_the_last_with_none(tokenizer):
    reading = reading_of(tokenizer, "  bad  good ")
    assert reading.covered == [range(0, 1)] * 3 + [range(1, 2)] * 2 + [range(2, 2)]


def test_a_token_of_several_words_is_shared_alike(tmp_path):
    path = train_sentencepiece(
        tmp_path, "of the good\nof the bad\n" * 20, vocab_size=290, split_by_whitespace=False,
        normalization_rule_name="identity", hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer = Tokenizer(tokenizer_model=path)
    predictor = predictor_of(tokenizer, random_llama(attention="causal"), "mean")
    reading = explain.read(predictor, "of the good")
    assert any(len(words) > 1 for words in reading.covered)
    by_token = explain.token_gradients_x_input(predictor, reading.example, 0)
    found = explain.gradient_x_input(predictor, reading, 0)
    assert sum(found.values()) == pytest.approx(sum(by_token[1:]), abs=1e-6)
    assert found[0] == pytest.approx(found[1])


@pytest.mark.parametrize("cut_by", ["max_sentence_len", "max_seq_len"])
def test_words_behind_what_the_model_reads_have_no_value(tokenizer, cut_by):
    n_tokens = 4  # this, film, is, good
    lengths = {"max_seq_len": 1 + n_tokens} if cut_by == "max_seq_len" else {}
    llama = random_llama(attention="causal", **lengths)
    kept = n_tokens if cut_by == "max_sentence_len" else None
    predictor = predictor_of(tokenizer, llama, "mean", kept)
    beginning = explain.explain(predictor, "this film is good")
    found = explain.explain(predictor, "this film is good or bad")
    assert found.words[4:] == ["or", "bad"]
    assert found.values[LOO][4:] == found.values[GXI][4:] == [None, None]
    assert found.values[GXI][:4] == beginning.values[GXI]
    moved = explain.explain(predictor, "this film is or", LABEL_NAMES.index(found.predicted))
    moved_up = np.log(found.probability) - np.log(moved.label_probability)
    assert found.values[LOO][3] == pytest.approx(moved_up, abs=1e-5)


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(workplace, tokenizer, monkeypatch, capsys):
    """command(...) runs tools.explain beside a checkpoint c.pt: exit code, output, errors."""
    model = predictor_of(tokenizer, random_llama(attention="causal"), "mean").model
    given = {"tokenizer_path": str(workplace / "tokenizer.model"), "label_names": LABEL_NAMES}
    save_classifier("c.pt", model, config_of("mean"), **given)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def call(*argv):
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: explain.main(list(argv)))
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


EXPLANATION = Explanation(
    "good", 0.75, "good", 0.75, "bad", ["電影", "was", "<b>", "unread"],
    {LOO: [0.5, -0.25, -1e-9, None], GXI: [0.1, 0.0, 0.2, None]},
)  # fmt: skip


def test_a_table_has_a_word_a_line_in_columns():
    assert rendering.table(EXPLANATION).splitlines() == [
        "good 0.750 (gold: bad)",
        "word    leave-one-out  gradient x input",
        "電影           +0.500            +0.100",
        "was            -0.250             0.000",
        "<b>             0.000            +0.200",
        "unread              -                 -",
    ]


def test_the_command_prints_the_values_of_each_sentence(command, workplace):
    predictor = predict.load_predictor("c.pt")
    code, out, err = command("--checkpoint", "c.pt", "1 ||| a good film", "0 ||| bad")
    tables = [
        rendering.table(explain.explain(predictor, "a good film", gold="good")),
        rendering.table(explain.explain(predictor, "bad", gold="bad")),
    ]
    assert (code, out, err) == (0, "".join(f"{one}\n\n" for one in tables), "")


def test_label_and_method_choose_what_is_shown(command, workplace):
    predictor = predict.load_predictor("c.pt")
    for name in LABEL_NAMES:
        _, out, _ = command("--checkpoint", "c.pt", "--label", name, "--method", "gradient", "bad")
        label = LABEL_NAMES.index(name)
        wanted = explain.explain(predictor, "bad", label, methods=["gradient"])
        assert out == f"{rendering.table(wanted)}\n\n"
        assert (f"; what speaks for {name}" in out) == (wanted.predicted != name)


def test_color_is_for_terminals_that_want_it(command, monkeypatch):
    def out_of():
        return command("--checkpoint", "c.pt", "a good film")[1]

    plain = out_of()
    assert "\033" not in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    colored = out_of()
    assert "\033[38;5;16;48;5;" in colored
    assert "toward the label" in colored
    assert re.sub("\033\\[[0-9;]*m", "", colored).count("a good film") == 2
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert out_of() == plain
    monkeypatch.setenv("NO_COLOR", "")  # https://no-color.org: an empty one is none
    assert out_of() == colored


def test_color_is_by_sign_and_as_deep_as_the_share():
    explanation = Explanation(
        "good", 0.9, "good", 0.9, None, list("abcde"), {LOO: [1.0, -2.0, -0.5, 0.1, None]}
    )
    line = rendering.colored(explanation).splitlines()[-1]
    codes = re.findall("48;5;([0-9]+)m(.)", line)
    assert codes == [("117", "a"), ("208", "b"), ("223", "c")]
    assert " d " in line
    assert "\033[2;9me\033[0m" in line


def test_what_steers_a_terminal_is_written_out(command, tmp_path, monkeypatch):
    _, out, _ = command("--checkpoint", "c.pt", "a\033[2J \u202ebad")
    assert "a\\x1b[2J" in out
    assert "\\u202ebad" in out
    row = {"line": 1, "label": "a\033", "probability": 1, "gold": "b", "sentence": "c\033\nd"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row), encoding="utf-8")
    _, out, _ = command("--errors", "p.jsonl")
    assert out.splitlines()[1] == "1.000 predicted a\\x1b, gold b | line 1 | c\\x1b d"


class Page(html.parser.HTMLParser):
    """The text of a page, its elements and their attributes; every element must be closed."""

    VOID = ("meta",)

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_page_holds_every_word_and_value_and_loads_and_runs_nothing():
    hostile = '<script>alert("1")</script>&amp;'
    explanation = Explanation(
        "<i>", 0.75, "<i>", 0.75, "&", [hostile, "b", "c"], {LOO: [1.0, -0.5, None]}
    )
    text = rendering.page([explanation, EXPLANATION], 'of "<u>".pt')
    page = Page(text)
    words = [tag for tag in page.tags if tag[0] in ("span", "s") and "title" in tag[1]]
    assert [attrs["title"] for _, attrs in words][:3] == ["+1.000", "-0.500", "-"]
    assert "(0, 114, 178, 0.65)" in words[0][1]["style"]
    assert "(230, 159, 0, 0.33)" in words[1][1]["style"]
    assert page.text.count(hostile) == 2  # in the sentence and in the table
    for heading in ('of "<u>".pt', "<i> 0.750 (gold: &)", "good 0.750 (gold: bad)"):
        assert heading in page.text
    allowed = {"html", "meta", "title", "style", "h1", "h2", "h3", "p", "section", "span", "s"}
    allowed |= {"details", "summary", "table", "tr", "th", "td"}
    assert {tag for tag, _ in page.tags} == allowed
    names = {name for _, attrs in page.tags for name in attrs}
    assert names == {"lang", "charset", "name", "content", "title", "style", "dir"}
    assert "url(" not in text
    assert "@import" not in text


def test_the_command_writes_a_page(command, workplace):
    code, out, err = command("--checkpoint", "c.pt", "a good film", "bad", "--out", "o.HTML")
    assert (code, err) == (0, "")
    assert out.endswith("\nwrote o.HTML\n")
    page = Page((workplace / "o.HTML").read_text(encoding="utf-8"))
    assert "Which words carried the decisions of c.pt" in page.text
    assert [tag for tag, _ in page.tags].count("section") == 2


def matplotlib_or_skip():
    return pytest.importorskip("matplotlib", reason="a development extra")


def test_a_picture_holds_every_word_and_the_great_values():
    matplotlib_or_skip()
    long = Explanation(r"$\frac$", 0.5, "good", 0.5, None, ["ab" * 100, "c$"], {LOO: [1.0, -0.2]})
    figure = picture.draw([long], "title")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [texts.count(one) for one in (r"$\frac$", "c$", "+1.000", "-0.200")] == [1, 1, 1, 0]
    assert "ab" * 100 in "".join(text for text in texts if text != "+1.000")
    figure.canvas.draw()
    frame = figure.bbox
    for artist in [*figure.axes[0].texts, *figure.axes[0].patches]:
        box = artist.get_window_extent()
        assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
        assert frame.y0 <= box.y0 <= box.y1 <= frame.y1


def test_words_of_a_picture_do_not_cover_each_other():
    matplotlib_or_skip()
    words = [f"word{i}" * (1 + i % 3) for i in range(40)]
    explanation = Explanation("good", 0.9, "good", 0.9, None, words, {LOO: [1.0] * 40})
    figure = picture.draw([explanation], "title")
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            beside = one.x1 <= other.x0 + 1 or other.x1 <= one.x0 + 1
            # A line of text is measured with the room for accents above its letters.
            apart = one.y1 <= other.y0 + 3 or other.y1 <= one.y0 + 3
            assert beside or apart


def test_the_command_writes_a_picture(command, workplace):
    matplotlib_or_skip()
    code, _, err = command("--checkpoint", "c.pt", "good film", "bad", "--out", "o.png")
    assert (code, err) == (0, "")
    assert (workplace / "o.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = command("--checkpoint", "c.pt", "電影", "--out", "o.png")
    assert (code, err) == (0, "o.png: its font lacks some letters; a .html shows them\n")


def test_a_picture_that_would_be_too_high_is_refused(tmp_path):
    matplotlib_or_skip()
    with pytest.raises(ValueError, match="would be higher than 100 inches"):
        picture.write_picture(str(tmp_path / "o.png"), [EXPLANATION] * 100, "title")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_a_picture_is_refused_before_the_work(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = command("--checkpoint", "c.pt", "bad", "--out", "o.png")
    assert (code, out) == (2, "")
    assert "matplotlib is missing; `bash setup.sh --dev` installs it, or name a .html" in err
    assert command("--checkpoint", "c.pt", "bad", "--out", "o.html")[0] == 0


@pytest.mark.parametrize("out", ["o.html", "o.png"])
def test_nothing_is_half_written(command, workplace, monkeypatch, out):
    if out == "o.png":
        matplotlib_or_skip()
    (workplace / out).write_text("before", encoding="utf-8")
    names = sorted(path.name for path in workplace.iterdir())

    def fails(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fails)
    code, _, err = command("--checkpoint", "c.pt", "a good film", "--out", out)
    assert code == 2
    assert err.endswith(f"{workplace / out}: No space left on device\n")
    assert (workplace / out).read_text(encoding="utf-8") == "before"
    assert sorted(path.name for path in workplace.iterdir()) == names


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give either sentences or --errors FILE"),
        (["bad", "--checkpoint", "c.pt", "--errors", "p.jsonl"], "give either sentences or"),
        (["bad"], "sentences need --checkpoint, such as"),
        (["bad", "--checkpoint", "c.pt", "--top", "3"], "--top goes with --errors"),
        (["--errors", "p.jsonl", "--top", "0"], "'0' is not an integer of at least 1"),
        (["--errors", "p.jsonl", "--label", "bad"], "--label needs --checkpoint"),
        (["--errors", "p.jsonl", "--out", "o.html"], "--out needs --checkpoint"),
        (["--errors", "p.jsonl", "--method", "both"], "--method needs --checkpoint"),
        (["--errors", "p.jsonl", "--use_gpu"], "--use_gpu needs --checkpoint"),
        (
            ["bad", "--checkpoint", "c.pt", "--out", "o.pdf"],
            "o.pdf: ends in neither .html nor .png",
        ),
        (["bad", "--checkpoint", "c.pt", "--out", "gone/o.html"], "its folder does not exist"),
        (
            ["bad", "--checkpoint", "c.pt", "--label", "fine"],
            "--label fine: the checkpoint's labels are bad, good",
        ),
        (["bad", "--checkpoint", "gone.pt"], "gone.pt: No such file"),
        (["  ", "--checkpoint", "c.pt"], "no sentence has a word"),
        (["--errors", "gone.jsonl"], "gone.jsonl: No such file"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(command, argv, message):
    code, out, err = command(*argv)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


# ---------------------------------------------------------------- mistakes


def rows_of(predictions, kind):
    """What --option predict writes, of (probability, predicted, gold or None)."""
    found = []
    for number, (p, predicted, gold) in enumerate(predictions, 1):
        probs = [p, 1 - p] if predicted == 0 else [1 - p, p]
        gold = NO_GOLD_LABEL if gold is None else gold
        sentence = f'sentence "{number}", and a comma'
        found.append(Prediction(Line(number, sentence, gold), probs))
    header, as_text = predict.formatter(kind, LABEL_NAMES)
    return (header + as_text(found)).encode()


PREDICTIONS = st.lists(
    st.tuples(
        st.integers(50, 100).map(lambda percent: percent / 100),
        st.integers(0, 1),
        st.sampled_from([None, 0, 1]),
    ),
    min_size=1,
).filter(lambda rows: any(gold is not None for *_, gold in rows))


@settings(deadline=None, max_examples=60)
@given(rows=PREDICTIONS, kind=st.sampled_from(["jsonl", "csv"]), top=st.integers(1, 5))
def test_the_most_confident_mistakes_of_what_predict_writes_come_first(rows, kind, top):
    # Of two equals it is the first.
    rows = [(p, 0 if p == 0.5 else predicted, gold) for p, predicted, gold in rows]
    found = mistakes.find_mistakes(io.BytesIO(rows_of(rows, kind)), "p", top)
    wrong = [
        (-p, number, LABEL_NAMES[predicted], LABEL_NAMES[gold])
        for number, (p, predicted, gold) in enumerate(rows, 1)
        if gold not in (None, predicted)
    ]
    assert found.n_mistakes == len(wrong)
    assert found.n_gold == sum(gold is not None for *_, gold in rows)
    listed = [(-one.probability, one.line, one.predicted, one.gold) for one in found.worst]
    assert listed == sorted(wrong)[:top]
    assert all(one.sentence == f'sentence "{one.line}", and a comma' for one in found.worst)


def test_errors_lists_and_counts(command, workplace, monkeypatch):
    content = rows_of([(0.75, 1, 0), (0.9, 0, 0), (0.987, 1, 0), (0.6, 1, None)], "jsonl")
    (workplace / "p.jsonl").write_bytes(content)
    listed = [
        "2 mistakes of 3 with a gold label",
        '0.987 predicted good, gold bad | line 3 | sentence "3", and a comma',
        '0.750 predicted good, gold bad | line 1 | sentence "1", and a comma',
    ]
    assert command("--errors", "p.jsonl") == (0, "".join(f"{one}\n" for one in listed), "")
    assert command("--errors", "p.jsonl", "--top", "1")[1].splitlines() == listed[:2]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert command("--errors", "-")[1].splitlines() == listed
    (workplace / "p.jsonl").write_bytes(rows_of([(0.9, 0, 0)], "jsonl"))
    assert command("--errors", "p.jsonl")[1] == "0 mistakes of 1 with a gold label\n"


def test_with_a_checkpoint_each_mistake_is_explained(command, workplace):
    (workplace / "p.csv").write_bytes(rows_of([(0.75, 1, 0), (0.9, 0, 0), (0.8, 1, 0)], "csv"))
    code, out, _ = command("--errors", "p.csv", "--checkpoint", "c.pt", "--out", "o.html")
    assert code == 0
    predictor = predict.load_predictor("c.pt")
    for number, p in ((3, "0.800"), (1, "0.750")):
        sentence = f'sentence "{number}", and a comma'
        explanation = explain.explain(predictor, sentence, gold="bad")
        line = f"{p} predicted good, gold bad | line {number} | {sentence}"
        assert f"{line}\n{rendering.table(explanation)}\n\n" in out
    page = Page((workplace / "o.html").read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("section") == 2


def test_memory_holds_the_listed_mistakes_and_a_line_at_a_time():
    class Lines:
        """A file without an end in sight, that can be read by the line alone."""

        def __init__(self, n):
            self.rest = iter([rows_of([(0.5 + i / n / 2, 1, 0)], "jsonl") for i in range(1, n + 1)])

        def readline(self, limit):
            return next(self.rest, b"")

    found = mistakes.find_mistakes(Lines(1000), "p", 2)
    assert [round(one.probability, 4) for one in found.worst] == [1.0, 0.9995]
    assert found.n_mistakes == 1000


GOOD = {"line": 1, "label": "bad", "probability": 0.5, "gold": "good", "sentence": "a b"}
HEADER = "line,label,probability,p(bad),p(good),gold,sentence\n"


def row(**changed):
    return json.dumps({key: value for key, value in {**GOOD, **changed}.items() if value != ...})


def test_a_sentence_as_long_as_predict_takes_is_read_from_csv():
    content = f"{HEADER}1,bad,0.5,0.5,0.5,good,{'a' * 2**20}\n".encode()
    (worst,) = mistakes.find_mistakes(io.BytesIO(content), "p", 1).worst
    assert len(worst.sentence) == 2**20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "p: holds no prediction; write it by run_llama.py --option predict --format jsonl"),
        ("\n \n", "p: holds no prediction"),
        (HEADER, "p: holds no prediction"),
        ("good 0.9 | bad 0.1, good 0.9 | a b\n", "p:1: 'good 0.9 | bad 0.1, good 0.9 | a b' is"),
        ("\n1 ||| a\n", "p:2: '1 ||| a' is not of --format jsonl or csv; write it by"),
        (f"{row()}\n\n{{oh\n", "p:3: '{oh' is not JSON; write it by"),
        (f"{row()}\n[1]", "p:2: [1] is not an object of JSON; write it by"),
        ('{"a":' * 10**5, "is not JSON; write it by"),
        (f'{{"line": {"9" * 5000}}}', "is not JSON; write it by"),
        (row(probability=..., sentence=...), "p:1: has no probability, sentence; write it by"),
        (row(probability="high"), "p:1: probability 'high' is not a number in [0, 1]; write"),
        (row(probability=True), "p:1: probability True is not a number in [0, 1]"),
        (row(probability=1.5), "p:1: probability 1.5 is not a number in [0, 1]"),
        (row(probability=float("nan")), "p:1: probability nan is not a number in [0, 1]"),
        (row(line=0), "p:1: line 0 is not 1, 2, 3, ...; write it by"),
        (row(line="1"), "p:1: line '1' is not 1, 2, 3, ..."),
        (row(label=1), "p:1: label 1 is not a text; write it by"),
        (row(gold=["good"]), "p:1: gold ['good'] is not a text"),
        (row(sentence=" "), "p:1: sentence ' ' is not a text"),
        (row(sentence="\ud800"), r"p:1: sentence '\ud800' is not a text"),
        (row(gold=None), "p: none of its 1 predictions has a gold label, since the input was"),
        (row(gold=...), "p: none of its 1 predictions has a gold label, since the input was"),
        (f"{HEADER}1,bad,0.5,0.5,0.5,,a b\n", "p: none of its 1 predictions has a gold label"),
        (f"{HEADER}\n1,bad,x,0.5,0.5,good,a\n", "p:3: probability 'x' is not a number in [0, 1]"),
        (f"{HEADER}1,bad,nan,0.5,0.5,good,a\n", "p:2: probability nan is not a number in [0, 1]"),
        (f"{HEADER}1.5,bad,1,0.5,0.5,good,a\n", "p:2: line '1.5' is not 1, 2, 3, ..."),
        (f"{HEADER}1,bad,0.5,good,a\n", "p:2: has 5 cells for 7 columns; write it by"),
        (f'{HEADER}1,bad,0.5,0.5,0.5,good,"a\n', "p:2: is not CSV, unexpected end of data; write"),
        ("line,label,probability,gold\n1,bad,0.5,good\n", "p:2: has no sentence; write it by"),
        (f"{row()}\n".encode() + b'{"\xff', "p:2: byte 0xff is not UTF-8; convert the file"),
        (f"{HEADER}1,bad,1,1,1,good,".encode() + b"\xff", "p:2: byte 0xff is not UTF-8"),
    ],
)  # fmt: skip
def test_a_file_that_predict_did_not_write_is_one_line(content, message):
    content = content if isinstance(content, bytes) else content.encode()
    with pytest.raises(ValueError) as error:
        mistakes.find_mistakes(io.BytesIO(content), "p", 3)
    assert message in str(error.value)
    assert len(str(error.value)) < 300


def test_a_line_without_an_end_is_not_read_to_it(monkeypatch):
    monkeypatch.setattr(mistakes, "LONGEST_LINE", 1000)
    with pytest.raises(ValueError, match=r"p:1: is longer than 1,000 bytes; write it by"):
        mistakes.find_mistakes(io.BytesIO(b'{"' + b"a" * 10**4), "p", 3)


@settings(deadline=None, max_examples=60)
@given(content=st.binary() | st.text().map(lambda text: ("{" + text).encode(errors="replace"))
       | st.text().map(lambda text: (HEADER + text).encode(errors="replace")))  # fmt: skip
def test_any_bytes_are_a_list_or_a_value_error(content):
    with contextlib.suppress(ValueError):
        mistakes.find_mistakes(io.BytesIO(content), "p", 3)
