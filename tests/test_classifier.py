"""Both classifiers against the model's own logits and states, and the laws of pooling."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from classifier import PAD_ID, LlamaEmbeddingClassifier, LlamaZeroShotClassifier, label_room
from conftest import LABEL_NAMES, LENGTHS, TOKENS, random_llama, save_llama
from training.checkpoint import load_classifier, save_classifier
from utils import InputError


def embedding_config(**options) -> SimpleNamespace:
    defaults = {"num_labels": 5, "option": "finetune", "hidden_dropout_prob": 0.3}
    return SimpleNamespace(**{**defaults, "pretrained_model_path": "unread", **options})


def embedding_classifier(attention="full", **options) -> LlamaEmbeddingClassifier:
    torch.manual_seed(0)
    llama = random_llama(attention=attention)
    return LlamaEmbeddingClassifier(embedding_config(**options), llama).eval()


def zero_shot(tokenizer, attention="full", label_names=LABEL_NAMES, **options):
    config = SimpleNamespace(num_labels=len(label_names), **options)
    llama = random_llama(attention=attention, vocab_size=tokenizer.n_words)
    return LlamaZeroShotClassifier(config, tokenizer, label_names, llama).eval()


def head(model: LlamaEmbeddingClassifier, pooled: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(model.classifier_head(pooled), dim=-1)


def test_full_mode_reads_the_last_column_and_no_lengths_as_the_assignment_does():
    model = embedding_classifier()
    assert not model.reads_lengths
    expected = head(model, model.llama(TOKENS)[1][:, -1])
    model.llama.output = None  # no logits are computed
    assert torch.equal(model(TOKENS), expected)
    assert torch.equal(model(TOKENS, lengths=LENGTHS), expected)


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_masked_poolings_equal_each_sentence_alone(attention):
    for pooling in ("last", "mean"):
        model = embedding_classifier(attention, pooling=pooling)
        together = model(TOKENS, lengths=LENGTHS)
        for row, length in enumerate(LENGTHS.tolist()):
            _, hidden = model.llama(TOKENS[row : row + 1, :length])
            pooled = hidden[:, -1] if pooling == "last" else hidden.mean(dim=1)
            alone = head(model, pooled)[0]
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_lengths_are_counted_before_the_padding_if_a_caller_gives_none(pooling):
    """As the assignment's own run_llama.py calls a classifier."""
    model = embedding_classifier("causal", pooling=pooling)
    real = torch.arange(9) < LENGTHS[:, None]
    padded = torch.where(real, TOKENS.clamp(min=4), PAD_ID)
    padded[0, 3] = PAD_ID  # a NUL byte inside a sentence is not padding
    padded[2, 0] = PAD_ID  # and a sentence of nothing else has one token all the same
    assert torch.equal(model(padded), model(padded, lengths=LENGTHS))


def test_dropout_acts_on_the_pooled_state_in_training_alone():
    model, read = embedding_classifier(hidden_dropout_prob=0.5, pooling="mean"), []
    model.classifier_head.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    model(TOKENS)
    model.train()(TOKENS)
    pooled, dropped = read
    kept = dropped != 0
    assert kept.any() and not kept.all()
    torch.testing.assert_close(dropped, 2 * pooled * kept)


def test_pretrain_freezes_the_llama_and_finetune_trains_all():
    frozen = embedding_classifier(option="pretrain")
    trainable = [name for name, p in frozen.named_parameters() if p.requires_grad]
    assert trainable == ["classifier_head.weight", "classifier_head.bias"]
    assert all(p.requires_grad for p in embedding_classifier().parameters())
    with pytest.raises(InputError, match="'freeze'"):
        embedding_classifier(option="freeze")


def test_classifier_reads_its_backbone_from_the_configured_path(tmp_path):
    path = save_llama(random_llama(), tmp_path / "model.pt")
    config = embedding_config(pretrained_model_path=str(path), attention="causal", pooling="mean")
    model = LlamaEmbeddingClassifier(config)
    assert model.llama.config.attention == "causal"
    assert torch.equal(model.llama.output.weight, random_llama().output.weight)
    with pytest.raises(InputError, match="attention='causal', but the given Llama has 'full'"):
        LlamaEmbeddingClassifier(config, random_llama())


@pytest.mark.parametrize("tied", [True, False])
def test_saved_classifier_comes_back_without_the_pretrained_file(tmp_path, tied):
    model = embedding_classifier("causal", pooling="mean")
    if not tied:
        model.llama.output.weight = torch.nn.Parameter(model.llama.output.weight.detach() * 2)
    path = tmp_path / "classifier.pt"
    save_classifier(path, model, embedding_config(pooling="mean"), label_names=list("abcde"))
    loaded, saved = load_classifier(path)
    assert loaded.pooling == "mean"
    assert not loaded.training
    assert torch.equal(loaded(TOKENS, lengths=LENGTHS), model(TOKENS, lengths=LENGTHS))
    assert torch.equal(loaded.llama(TOKENS)[0], model.llama(TOKENS)[0])
    assert saved["label_names"] == list("abcde")


def test_loading_something_else_as_a_classifier_names_the_file(tmp_path):
    path = save_llama(random_llama(), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model\.pt: is not a finetuned classifier"):
        load_classifier(path)


@pytest.mark.parametrize(
    ("part", "value", "error"),
    [
        ("model", [], "it has no model"),
        ("model", {"llama.norm.weight": 1.0}, "is not a named tensor"),
        ("model_args", 5, "it has no model_args"),
        ("model_args", {7: 1}, "has no string for a key"),
        ("model_config", [], "it has no model_config"),
        ("model_config", {7: 1}, "has no num_labels"),
        ("label_names", torch.ones(2), "not a list of words"),
        ("label_names", ["a"], "1 label names for 5 labels"),
        ("max_sentence_len", "12", "max_sentence_len is '12', not a number of tokens"),
        ("max_sentence_len", -5, "max_sentence_len is -5"),
    ],
)
def test_a_damaged_classifier_is_one_line_that_names_the_file(tmp_path, part, value, error):
    path = tmp_path / "classifier.pt"
    save_classifier(path, embedding_classifier("causal"), embedding_config())
    torch.save({**torch.load(path, weights_only=True), part: value}, path)
    with pytest.raises(InputError, match=f"classifier.pt: .*{error}"):
        load_classifier(path)


# ---------------------------------------------------------------- zero-shot


@pytest.mark.parametrize(
    ("attention", "given", "pooling"),
    [("full", None, "position"), ("full", "last", "last"), ("causal", None, "last")],
)
def test_labels_score_by_the_chain_rule_over_their_tokens(tokenizer, attention, given, pooling):
    names = ["bad xyz", "bad xq", "good"]
    model = zero_shot(tokenizer, attention, names, pooling=given)
    scores = model(TOKENS, lengths=LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        prompt = TOKENS[row, : length if pooling == "last" else None].tolist()
        for column, name in enumerate(names):
            label = tokenizer.encode(name, bos=False, eos=False)
            expected = 0.0
            for i, token in enumerate(label):  # one sentence, one step at a time, no batch
                logits, _ = model.llama(torch.tensor([prompt + label[:i]]))
                expected += F.log_softmax(logits[0, -1].double(), dim=-1)[token].item()
            assert scores[row, column].item() == pytest.approx(expected, rel=1e-5)
    n_tokens = [len(tokenizer.encode(name, bos=False, eos=False)) for name in names]
    assert label_room(tokenizer, names) == max(n_tokens) - 1
    assert n_tokens[2] == 1 and label_room(tokenizer, names[2:]) == 0


def test_zero_shot_model_is_frozen(tokenizer):
    assert not any(p.requires_grad for p in zero_shot(tokenizer).parameters())


def test_zero_shot_refuses_what_cannot_be_asked(tokenizer):
    for n, names, pooling, vocab_size, words in (
        (2, LABEL_NAMES, "mean", 320, "'mean' cannot score"),
        (2, LABEL_NAMES, "first", 320, "pooling='first' is not one of"),
        (3, LABEL_NAMES, None, 320, "2 label names for num_labels=3"),
        (2, ["good", "good"], None, 320, "equal tokens"),
        (2, LABEL_NAMES, None, 100, "has 320 tokens, the checkpoint has 100"),
    ):
        config = SimpleNamespace(num_labels=n, pooling=pooling)
        llama = random_llama(vocab_size=vocab_size)
        with pytest.raises(InputError, match=words):
            LlamaZeroShotClassifier(config, tokenizer, names, llama)
