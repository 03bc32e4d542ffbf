"""The naive solution and ours are oracles of each other: same tokens, losses and predictions.

Shapes are large enough for our products to go through oneDNN if PyTorch has it.
"""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import naive
from benchmarks.contenders import batches_of
from classifier import LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from conftest import random_llama
from fast import linear
from llama import Llama
from optimizer import AdamW
from training.dataset import Example, SentenceDataset
from training.evaluation import evaluate

LENGTHS = torch.tensor([64, 3, 40, 64, 17, 1, 33, 50])


def pair(attention: str, scale: float = 3.0) -> tuple[Llama, naive.NaiveLlama]:
    shape = {"dim": 256, "n_heads": 8, "n_kv_heads": 2, "max_seq_len": 128}
    ours = random_llama(scale=scale, attention=attention, **shape)
    plain = naive.NaiveLlama(ours.config)
    plain.load_state_dict(ours.state_dict())
    return ours, plain.eval()


def random_data(seed: int = 0) -> SentenceDataset:
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.randint(4, 320, (n,), generator=rng).tolist() for n in LENGTHS.tolist()]
    labels = torch.randint(3, (len(rows),), generator=rng).tolist()
    return SentenceDataset([Example("", y, row) for row, y in zip(rows, labels, strict=True)], 3)


def test_these_shapes_are_large_enough_for_onednn():
    assert LENGTHS.numel() * LENGTHS.max() * 256 * 256 >= linear.MIN_PRODUCTS


@pytest.mark.parametrize(
    ("attention", "masked"), [("full", False), ("causal", False), ("causal", True)]
)
def test_logits_and_real_states_are_equal(attention, masked):
    ours, plain = pair(attention)
    (batch,) = batches_of(random_data(), len(LENGTHS))
    lengths = LENGTHS if masked else None
    logits, hidden = ours(batch["token_ids"], lengths=lengths)
    plain_logits, plain_hidden = plain(batch["token_ids"], lengths)
    torch.testing.assert_close(plain_logits, logits, rtol=1e-4, atol=1e-4)
    is_real = torch.arange(hidden.shape[1]) < LENGTHS[:, None]
    if not masked:
        is_real = torch.ones_like(is_real)
    torch.testing.assert_close(plain_hidden[is_real], hidden[is_real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("attention", "temperature"), [("full", 0.0), ("causal", 1.0)])
def test_greedy_and_sampled_tokens_are_equal(attention, temperature):
    ours, plain = pair(attention)
    start = torch.randint(4, 320, (2, 32), generator=torch.Generator().manual_seed(0))
    tokens = []
    for model in (ours, plain):
        torch.manual_seed(1)
        tokens.append(model.generate(start, 40, temperature))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_losses_of_training_are_equal(attention):
    ours, plain = pair(attention, scale=1.0)
    settings = SimpleNamespace(num_labels=3, hidden_dropout_prob=0.3, option="finetune")
    model = LlamaEmbeddingClassifier(settings, ours)
    other = naive.NaiveClassifier(plain, 3, 0.3)
    other.load_state_dict(model.state_dict())
    untrained = model.classifier_head.weight.detach().clone()
    batches = [batch for seed in range(4) for batch in batches_of(random_data(seed), 8)]
    losses = []
    for trained, optimizer in ((model, AdamW), (other, naive.NaiveAdamW)):
        torch.manual_seed(5)  # of the dropout
        losses.append(naive.train(trained, optimizer(trained.parameters(), lr=1e-3), batches, 8))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert (model.classifier_head.weight - untrained).abs().max() > 5e-4  # the steps were taken


def test_optimizers_take_the_same_steps():
    torch.manual_seed(0)
    ours, plain = (torch.nn.Parameter(torch.ones(300, 1000)) for _ in range(2))
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    optimizers = AdamW([ours], **options), naive.NaiveAdamW([plain], **options)
    for _ in range(5):
        ours.grad = torch.randn(300, 1000)
        plain.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_prompting_predicts_the_same_in_batches_of_similar_lengths(tokenizer):
    ours, plain = pair("causal")
    labels = ["b", "g", "t"]
    ids = [tokenizer.encode(label, bos=False, eos=False) for label in labels]
    model = LlamaZeroShotClassifier(SimpleNamespace(num_labels=3), tokenizer, labels, ours)
    model.label_name_ids = [[tokens[-1]] for tokens in ids]  # naive knows labels of one token
    other = naive.NaiveZeroShot(plain, [tokens[-1] for tokens in ids])
    data = random_data()
    expected = naive.evaluate(other, batches_of(data, 3))
    assert evaluate(model, data, 3, torch.device("cpu")).predictions == expected
    assert len(set(expected)) > 1
