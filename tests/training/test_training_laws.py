"""Laws of dropout, the training loop, checkpoints and sampling that no other file here states."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from classifier import LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from conftest import random_llama
from optimizer import AdamW
from rope import apply_rotary_emb, rotary_table
from training.dataset import Example, SentenceDataset, make_loader
from training.loop import evaluate, load_classifier, save_classifier, train_classifier

CPU = torch.device("cpu")
TOKENS = torch.randint(3, 320, (3, 9), generator=torch.Generator().manual_seed(2))
CONFIG = {"num_labels": 2, "option": "finetune", "hidden_dropout_prob": 0.3}


def classifier(llama=None, **config) -> LlamaEmbeddingClassifier:
    config = SimpleNamespace(**{**CONFIG, **config})
    return LlamaEmbeddingClassifier(config, llama or random_llama(scale=1.0))


def random_data(n: int, flip: bool = False) -> SentenceDataset:
    rows = torch.randint(3, 320, (n, 5), generator=torch.Generator().manual_seed(n)).tolist()
    examples = [Example(f"sentence {i}", (i + flip) % 2, tokens) for i, tokens in enumerate(rows)]
    return SentenceDataset(examples, pad_id=3)


def train(model, data, dev, on_epoch=lambda report, best: None, **options):
    options = {"epochs": 2, "batch_size": 4, "lr": 1e-3, "seed": 7, **options}
    return train_classifier(model, data, dev, device=CPU, on_epoch=on_epoch, **options)


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize(
    ("dropout", "source"),
    [
        ("dropout", "tok_embeddings.weight"),
        ("layers.0.attention.attn_dropout", "layers.0.attention.compute_value.weight"),
        ("layers.0.attention.resid_dropout", "layers.0.attention.compute_output.weight"),
        ("layers.0.feed_forward.dropout", "layers.0.feed_forward.w2.weight"),
    ],
)
def test_each_dropout_alone_acts_on_what_its_matrix_makes_and_in_training_only(dropout, source):
    model = random_llama()
    plain, without_source = model(TOKENS)[1], copy.deepcopy(model)
    with torch.no_grad():
        without_source.get_parameter(source).zero_()
    place = model.get_submodule(dropout)

    place.p = 0.5
    assert torch.equal(model(TOKENS)[1], plain)
    model.train()
    assert not torch.equal(model(TOKENS)[1], model(TOKENS)[1])
    place.p = 1.0  # dropping everything leaves as little as weights of zero
    torch.testing.assert_close(model(TOKENS)[1], without_source(TOKENS)[1])
    place.p = 0.0
    torch.testing.assert_close(model(TOKENS)[1], plain)


# ---------------------------------------------------------------- the loop


def test_every_epoch_trains_in_training_mode_and_evaluates_in_inference_mode():
    model, passes = classifier(), []
    model.llama.norm.register_forward_pre_hook(
        lambda norm, _: passes.append((norm.training, torch.is_inference_mode_enabled()))
    )
    counts = []
    data = random_data(10)
    train(model, data, data, lambda report, best: counts.append(passes.count((True, False))))
    assert counts == [3, 6]  # 10 examples in batches of 4, twice
    assert set(passes) == {(True, False), (False, True)}


def test_train_accuracy_is_of_the_train_data_and_dev_accuracy_of_the_dev_data():
    data, contrary = random_data(9), random_data(9, flip=True)
    model = classifier()
    report = train(model, data, contrary, epochs=1)[0]
    accuracy = evaluate(model, make_loader(data, 4), CPU).accuracy
    assert report.train_accuracy == accuracy  # of 9 examples, so never one half
    assert report.dev_accuracy == pytest.approx(1 - accuracy)


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_that_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "kept.pt"
    save_classifier(path, classifier(), SimpleNamespace(**CONFIG))
    old = path.read_bytes()

    def broken(content, target):
        with open(target, "wb") if target == path else target as file:
            file.write(b"half")
            raise RuntimeError("disk")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="disk"):
        save_classifier(path, classifier(), SimpleNamespace(**CONFIG))
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_paths_in_config_and_args_come_back_as_text(tmp_path):
    config = SimpleNamespace(**CONFIG, pretrained_model_path=Path("a") / "model.pt")
    args = {"train": Path("a") / "train.txt", "epochs": 1}
    save_classifier(tmp_path / "c.pt", classifier(), config, args=args)
    _, saved = load_classifier(tmp_path / "c.pt")
    assert saved["args"] == {"train": str(args["train"]), "epochs": 1}
    assert saved["model_config"]["pretrained_model_path"] == str(config.pretrained_model_path)


# ---------------------------------------------------------------- optimizer, rope, attention


def test_a_tensor_as_learning_rate_steps_like_a_number_and_stays_as_it_is():
    lr, ends = torch.tensor(0.1), []
    for rate in (lr, lr.item()):
        parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = AdamW([parameter], lr=rate, weight_decay=0.1)
        for _ in range(3):
            parameter.grad = parameter.detach() ** 2
            optimizer.step()
        ends.append(parameter)
    torch.testing.assert_close(*ends)
    assert torch.equal(lr, torch.tensor(0.1))


def test_a_rotary_table_first_needed_under_the_meta_device_is_real():
    heads = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    rotary_table.cache_clear()
    expected, _ = apply_rotary_emb(heads, heads, 8, 16)
    rotary_table.cache_clear()
    with torch.device("meta"):
        apply_rotary_emb(heads, heads, 8, 16)
    assert torch.equal(apply_rotary_emb(heads, heads, 8, 16)[0], expected)


@pytest.mark.parametrize(("before", "after"), [("full", "causal"), ("causal", "full")])
def test_an_attention_mode_changed_in_the_config_takes_effect(before, after):
    model = random_llama(attention=before)
    model.config.attention = after
    lengths = torch.tensor([9, 4, 1])
    expected = random_llama(attention=after)(TOKENS, lengths=lengths)[0]
    assert torch.equal(model(TOKENS, lengths=lengths)[0], expected)
    assert torch.equal(model(TOKENS)[0], random_llama(attention=after)(TOKENS)[0])
    assert not torch.equal(model(TOKENS)[0], random_llama(attention=before)(TOKENS)[0])


def test_an_attention_mode_unlike_the_given_llamas_is_refused():
    assert classifier(random_llama(attention="causal"), attention="causal")
    with pytest.raises(ValueError, match="'causal' for a 'full' Llama"):
        classifier(random_llama(attention="full"), attention="causal")


# ---------------------------------------------------------------- sampling and asking


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 5e-324])
def test_a_temperature_next_to_zero_takes_the_likeliest_token(temperature):
    model = random_llama()
    assert torch.equal(model.generate(TOKENS, 5, temperature), model.generate(TOKENS, 5, 0.0))


def test_a_negative_number_of_new_tokens_is_refused():
    with pytest.raises(ValueError, match="max_new_tokens=-1"):
        random_llama().generate(TOKENS, -1)


@pytest.mark.parametrize("names", [["good", "good"], ["good", ""]])
def test_labels_without_tokens_of_their_own_are_refused(tokenizer, names):
    with pytest.raises(ValueError, match="empty or equal tokens"):
        LlamaZeroShotClassifier(SimpleNamespace(num_labels=2), tokenizer, names, random_llama())
