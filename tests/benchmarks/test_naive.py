"""The naive solution gives our numbers, so what is fast here is not what is different.

Shapes are large enough for our products to go through oneDNN where PyTorch has it.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import naive
from classifier import LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from conftest import random_llama
from fast import linear
from llama import Llama
from optimizer import AdamW
from training.dataset import Example, SentenceDataset, make_loader
from training.loop import evaluate
from training.steps import take_step

LENGTHS = torch.tensor([64, 3, 40, 64, 17, 1, 33, 50])


def pair(attention: str, scale: float = 1.0) -> tuple[Llama, naive.NaiveLlama]:
    ours = random_llama(
        scale=scale, attention=attention, dim=256, n_heads=8, n_kv_heads=2, max_seq_len=128
    )
    plain = naive.NaiveLlama(ours.config)
    plain.load_state_dict(ours.state_dict())
    return ours, plain.eval()


def random_batch(seed: int = 0) -> naive.Batch:
    torch.manual_seed(seed)
    tokens = torch.randint(3, 320, (len(LENGTHS), int(LENGTHS.max())))
    labels = torch.randint(3, (len(LENGTHS),))
    return {"token_ids": tokens, "lengths": LENGTHS, "labels": labels}


def test_these_shapes_are_large_enough_for_onednn():
    assert LENGTHS.numel() * LENGTHS.max() * 256 * 256 >= linear.SMALL


@pytest.mark.parametrize("attention", ["full", "causal"])
@pytest.mark.parametrize("masked", [False, True])
def test_logits_and_real_states_are_equal(attention, masked):
    ours, plain = pair(attention, scale=3.0)
    batch = random_batch()
    lengths = LENGTHS if masked else None
    logits, hidden = ours(batch["token_ids"], lengths=lengths)
    plain_logits, plain_hidden = plain(batch["token_ids"], lengths)
    torch.testing.assert_close(plain_logits, logits, rtol=1e-4, atol=1e-4)
    real = torch.arange(hidden.shape[1]) < LENGTHS[:, None]
    if not masked:
        real = torch.ones_like(real)
    torch.testing.assert_close(plain_hidden[real], hidden[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_greedy_tokens_are_equal(attention):
    ours, plain = pair(attention, scale=3.0)
    start = random_batch()["token_ids"][:2, :32]
    assert torch.equal(ours.generate(start, 80, 0.0), plain.generate(start, 80, 0.0))


def test_sampled_tokens_come_from_the_same_distribution_in_the_same_order():
    ours, plain = pair("causal", scale=3.0)
    start = random_batch()["token_ids"][:2, :32]
    torch.manual_seed(1)
    expected = plain.generate(start, 20, 1.0)
    torch.manual_seed(1)
    assert torch.equal(ours.generate(start, 20, 1.0), expected)


@pytest.mark.parametrize(("attention", "masked"), [("full", False), ("causal", True)])
def test_losses_of_training_are_equal_to_1e_5(attention, masked):
    ours, plain = pair(attention)
    settings = SimpleNamespace(num_labels=3, hidden_dropout_prob=0.3, option="finetune")
    model = LlamaEmbeddingClassifier(settings, ours)
    other = naive.NaiveClassifier(plain, 3, 0.3, masked=masked)
    other.load_state_dict(model.state_dict())
    batches = [random_batch(seed) for seed in range(4)]
    torch.manual_seed(5)  # of the dropout
    plain_losses = naive.train(other, naive.NaiveAdamW(other.parameters(), 1e-3), batches, 8)
    torch.manual_seed(5)
    optimizer, losses = AdamW(model.parameters(), lr=1e-3), []
    model.train()
    for batch in batches:
        log_probs = model(batch["token_ids"], batch["lengths"])
        loss = F.nll_loss(log_probs, batch["labels"], reduction="sum") / 8
        loss.backward()
        take_step([optimizer])
        losses.append(loss.item())
    assert losses == pytest.approx(plain_losses, abs=1e-5)
    assert abs(losses[0] - losses[-1]) > 1e-2  # something was learned


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
    ours, plain = pair("causal", scale=3.0)
    labels = ["b", "g", "t"]
    ids = [tokenizer.encode(label, bos=False, eos=False) for label in labels]
    assert {len(tokens) for tokens in ids} <= {1, 2}
    settings = SimpleNamespace(num_labels=3)
    model = LlamaZeroShotClassifier(settings, tokenizer, labels, ours)
    model.label_name_ids = [[tokens[-1]] for tokens in ids]  # naive knows labels of one token
    other = naive.NaiveZeroShot(plain, [tokens[-1] for tokens in ids], masked=True)
    batch = random_batch()
    examples = [
        Example("", 0, row[:n].tolist())
        for row, n in zip(batch["token_ids"], batch["lengths"], strict=True)
    ]
    data = SentenceDataset(examples, pad_id=3)
    similar = make_loader(data, 3, similar_lengths=True)
    expected = naive.evaluate(other, list(make_loader(data, 3)))
    assert evaluate(model, similar, torch.device("cpu")).predictions == expected
    assert len(set(expected)) > 1
