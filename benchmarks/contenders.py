"""What is timed: one function for each row, which builds a contender and returns the work to time.

Everything is random but of the real shape and the real lengths. Naive and ours begin with the same
weights; transformers has its own of the same shape. A job's result is compared between contenders.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import naive
from benchmarks.lengths import draw_lengths
from classifier import LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from config import LlamaConfig
from fast.linear import linear
from llama import Llama
from optimizer import AdamW
from training.dataset import Example, SentenceDataset, make_loader
from training.loop import evaluate, train_classifier
from training.steps import take_step
from utils import keep_freed_memory, save_torch_file

Job = Callable[[Any], Any]  # a point of a curve (None elsewhere) -> what the work gave

SHAPES: dict[str, dict[str, Any]] = {
    "stories42M": {"dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "vocab_size": 32000},
    "mini": {
        "dim": 192, "n_layers": 6, "n_heads": 6, "n_kv_heads": 3, "vocab_size": 4096,
        "hidden_dim": 512,
    },
    "stories260K": {
        "dim": 64, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 512,
        "hidden_dim": 172, "max_seq_len": 512,
    },
}  # fmt: skip
SEED = 11711
CPU = torch.device("cpu")
N_LABELS = 5
LR = 2e-5
N_PROMPT, N_NEW = 32, 75  # tokens of the assignment's prefix, tokens to generate
QUESTION = 19  # tokens of SST's question
PAD = 3


# ---------------------------------------------------------------- contenders


def make_llama(contender: str, shape: str, attention: str) -> nn.Module:
    config = LlamaConfig(**SHAPES[shape], attention=attention)
    torch.manual_seed(SEED)
    ours = Llama(config).eval()
    if contender == "ours":
        return ours
    plain = naive.NaiveLlama(config)
    plain.load_state_dict(ours.state_dict())
    return plain.eval()


def transformers_config(c: LlamaConfig, **options: Any) -> Any:
    """The same shape, as transformers wants it described."""
    import transformers

    with torch.device("meta"):
        ours = Llama(c).layers[0].feed_forward.w1
    return transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=ours.out_features,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.layer_norm_eps,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        **options,
    )


def make_classifier(contender: str, shape: str, attention: str) -> nn.Module:
    """The assignment's in full mode, reading the last real token in causal mode."""
    if contender == "transformers":
        import transformers

        torch.manual_seed(SEED)
        config = transformers_config(LlamaConfig(**SHAPES[shape]), num_labels=N_LABELS)
        return transformers.LlamaForSequenceClassification(config)
    llama = make_llama(contender, shape, attention)
    settings = SimpleNamespace(num_labels=N_LABELS, hidden_dropout_prob=0.3, option="finetune")
    torch.manual_seed(SEED)
    if contender == "ours":
        return LlamaEmbeddingClassifier(settings, llama)
    return naive.NaiveClassifier(llama, N_LABELS, 0.3, masked=attention == "causal")


# ---------------------------------------------------------------- data


def make_data(
    dataset: str, n: int, shape: str, longer_by: int = 0, seed: int = SEED
) -> SentenceDataset:
    """n sentences of random tokens; `dataset` is where their lengths come from."""
    config = LlamaConfig(**SHAPES[shape])
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in draw_lengths(dataset, n, seed, config.max_seq_len - longer_by):
        ids = torch.randint(PAD + 1, config.vocab_size, (length + longer_by,), generator=generator)
        label = int(torch.randint(N_LABELS, (1,), generator=generator))
        examples.append(Example("", label, ids.tolist()))
    return SentenceDataset(examples, PAD)


def in_order(data: SentenceDataset, batch_size: int) -> list[naive.Batch]:
    return list(make_loader(data, batch_size))


# ---------------------------------------------------------------- rows


def generate(contender: str, shape: str, attention: str) -> Job:
    """Greedy tokens after a prompt."""
    torch.manual_seed(SEED)
    idx = torch.randint(PAD + 1, SHAPES[shape]["vocab_size"], (1, N_PROMPT))
    if contender == "transformers":
        import transformers

        model = transformers.LlamaForCausalLM(
            transformers_config(LlamaConfig(**SHAPES[shape]))
        ).eval()
        options = {"max_new_tokens": N_NEW, "min_new_tokens": N_NEW, "do_sample": False}
        attended = torch.ones_like(idx)
        return lambda _: model.generate(idx, attention_mask=attended, **options)[0].tolist()
    model = make_llama(contender, shape, attention)
    return lambda _: model.generate(idx, N_NEW, temperature=0.0)[0].tolist()


def steps(contender: str, shape: str, dataset: str, batch_size: int, n_batches: int) -> Job:
    """Training steps on the same padded batches, in full mode (transformers: causal)."""
    batches = in_order(make_data(dataset, n_batches * batch_size, shape), batch_size)
    model = make_classifier(contender, shape, "full")
    torch.manual_seed(SEED)
    if contender == "naive":
        plain = naive.NaiveAdamW(model.parameters(), lr=LR)
        return lambda _: naive.train(model, plain, batches, batch_size)
    if contender == "transformers":
        theirs = torch.optim.AdamW(model.parameters(), lr=LR)
        return lambda _: transformers_train(model, theirs, batches)
    keep_freed_memory()
    optimizer = AdamW(model.parameters(), lr=LR)
    return lambda _: [our_step(model, optimizer, batch, batch_size) for batch in batches]


def our_step(model: nn.Module, optimizer: AdamW, batch: naive.Batch, batch_size: int) -> float:
    """What `training.train_classifier` does with a batch."""
    model.train()
    log_probs = model(batch["token_ids"], batch["lengths"])
    loss = F.nll_loss(log_probs, batch["labels"], reduction="sum") / batch_size
    loss.backward()
    take_step([optimizer])
    return loss.item()


def transformers_train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[naive.Batch]
) -> list[float]:
    model.train()
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**transformers_inputs(batch), labels=batch["labels"]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def transformers_inputs(batch: naive.Batch) -> dict[str, torch.Tensor]:
    real = torch.arange(batch["token_ids"].shape[1]) < batch["lengths"][:, None]
    return {"input_ids": batch["token_ids"], "attention_mask": real.long()}


def epoch(contender: str, shape: str, dataset: str, batch_size: int, n_batches: int) -> Job:
    """An epoch of a masked mode on few sentences, with the passes for train and dev accuracy.

    Gives the mean loss, which also depends on how the sentences meet in batches.
    """
    data = make_data(dataset, n_batches * batch_size, shape)
    few = SentenceDataset(data.examples[:batch_size], PAD)
    model = make_classifier(contender, shape, "causal")
    if contender == "ours":
        keep_freed_memory()
        options = {"batch_size": batch_size, "lr": LR, "seed": SEED, "device": CPU}
        return lambda _: (
            train_classifier(model, data, few, epochs=1, on_epoch=lambda *_: None, **options)[
                0
            ].train_loss
        )
    batches, dev = in_order(data, batch_size), in_order(few, batch_size)

    def plain(_: Any) -> float:
        optimizer = naive.NaiveAdamW(model.parameters(), lr=LR)
        losses = naive.train(model, optimizer, batches, batch_size)
        naive.evaluate(model, batches + dev)
        return sum(losses) / len(losses)

    def theirs(_: Any) -> float:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        losses = transformers_train(model, optimizer, batches)
        model.eval()
        with torch.no_grad():
            for batch in batches + dev:
                model(**transformers_inputs(batch)).logits.argmax(dim=1).tolist()
        return sum(losses) / len(losses)

    return plain if contender == "naive" else theirs


class _LabelTokens:
    """In place of a tokenizer: each label is one token."""

    pad_id = PAD

    def require_vocab_size(self, vocab_size: int) -> None:
        pass

    def encode(self, label: str, bos: bool, eos: bool) -> list[int]:
        return [int(label)]


def prompt(contender: str, shape: str, dataset: str, batch_size: int, n_batches: int) -> Job:
    """Predictions by prompting in a masked mode."""
    data = make_data(dataset, n_batches * batch_size, shape, longer_by=QUESTION)
    labels = [str(i) for i in range(100, 100 + N_LABELS)]
    if contender == "ours":
        settings = SimpleNamespace(num_labels=N_LABELS)
        llama = make_llama(contender, shape, "causal")
        model = LlamaZeroShotClassifier(settings, _LabelTokens(), labels, llama)
        loader = make_loader(data, batch_size, similar_lengths=True)
        return lambda _: evaluate(model, loader, CPU).predictions
    batches = in_order(data, batch_size)
    if contender == "naive":
        plain = naive.NaiveZeroShot(
            make_llama(contender, shape, "causal"), [int(label) for label in labels], masked=True
        )
        return lambda _: naive.evaluate(plain, batches)
    import transformers

    theirs = transformers.LlamaForCausalLM(transformers_config(LlamaConfig(**SHAPES[shape]))).eval()
    ids = torch.tensor([int(label) for label in labels])

    @torch.no_grad()
    def ask(_: Any) -> list[int]:
        said = []
        for batch in batches:
            hidden = theirs.model(**transformers_inputs(batch)).last_hidden_state
            last = hidden[torch.arange(len(hidden)), batch["lengths"] - 1]
            said += theirs.lm_head(last)[:, ids].argmax(dim=1).tolist()
        return said

    return ask


def adamw(contender: str, shape: str) -> Job:
    """One step over all parameters, where three tokens of four have not been seen yet."""
    model = make_llama("ours", shape, "causal")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    embedding = model.tok_embeddings.weight
    embedding.grad[len(embedding) // 4 :] = 0.0
    if contender == "ours":
        keep_freed_memory()
    optimizers = {
        "naive": lambda ps: naive.NaiveAdamW(ps, lr=LR),
        "ours": lambda ps: AdamW(ps, lr=LR),
        "torch": lambda ps: torch.optim.AdamW(ps, lr=LR, weight_decay=0.0),
        "torch fused": lambda ps: torch.optim.AdamW(ps, lr=LR, weight_decay=0.0, fused=True),
    }
    optimizer = optimizers[contender](list(model.parameters()))
    return lambda _: optimizer.step()


# A process from its start to its first token; what the assignment's script imports, naive imports.
_FIRST_TOKEN = {
    "import torch": "import torch",
    "read file": "open({file!r}, 'rb').read()",
    "ours": """
import run_llama, torch
from llama import load_pretrained
model = load_pretrained({file!r}, "causal")
run_llama.Tokenizer(tokenizer_model="data/mini/tokenizer.model").encode("a", bos=True, eos=False)
model.generate(torch.ones(1, {n}, dtype=torch.long), 1, 0.0)
""",
    "naive": """
import sklearn.metrics, torch, tqdm
from benchmarks.naive import NaiveLlama
from config import LlamaConfig
from tokenizer import Tokenizer
file = torch.load({file!r}, weights_only=True)
model = NaiveLlama(LlamaConfig(**file["model_args"]))
model.load_state_dict(file["model"])
Tokenizer(tokenizer_model="data/mini/tokenizer.model").encode("a", bos=True, eos=False)
model.eval().generate(torch.ones(1, {n}, dtype=torch.long), 1, 0.0)
""",
    "transformers": """
import torch
from transformers import LlamaForCausalLM
from tokenizer import Tokenizer
model = LlamaForCausalLM.from_pretrained({folder!r})
Tokenizer(tokenizer_model="data/mini/tokenizer.model").encode("a", bos=True, eos=False)
ids = torch.ones(1, {n}, dtype=torch.long)
model.generate(ids, attention_mask=ids, max_new_tokens=1, do_sample=False)
""",
}


def start_up(contender: str, shape: str, scratch: str) -> Job:
    """A fresh process that loads a checkpoint and makes one token."""
    file, folder = Path(scratch) / f"{shape}.pt", Path(scratch) / shape
    if contender == "transformers" and not folder.exists():
        import transformers

        transformers.LlamaForCausalLM(
            transformers_config(LlamaConfig(**SHAPES[shape]))
        ).save_pretrained(folder)
    if contender != "transformers" and not file.exists():
        llama = make_llama("ours", shape, "causal")
        content = {"model": llama.state_dict(), "model_args": llama.config.to_dict()}
        save_torch_file(file, content)
    code = _FIRST_TOKEN[contender].format(file=str(file), folder=str(folder), n=N_PROMPT)
    root = Path(__file__).resolve().parent.parent
    process = {
        "args": [sys.executable, "-c", code],
        "cwd": root,
        "env": {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        "stderr": subprocess.DEVNULL,
    }
    return lambda _: subprocess.run(**process, check=True).returncode


def curve(contender: str, shape: str, sizes: list[tuple[int, int]]) -> Job:
    """A training step of B sentences of T tokens each; the point is (B, T)."""
    model = make_classifier(contender, shape, "full")
    if contender == "ours":
        keep_freed_memory()
    makers = {"ours": AdamW, "naive": naive.NaiveAdamW, "transformers": torch.optim.AdamW}
    optimizer = makers[contender](model.parameters(), lr=LR)
    torch.manual_seed(SEED)
    batches = {
        (B, T): {
            "token_ids": torch.randint(PAD + 1, SHAPES[shape]["vocab_size"], (B, T)),
            "labels": torch.randint(N_LABELS, (B,)),
            "lengths": torch.full((B,), T),
        }
        for B, T in sizes
    }
    if contender == "ours":
        return lambda point: our_step(model, optimizer, batches[point], point[0])
    if contender == "naive":
        return lambda point: naive.train(model, optimizer, [batches[point]], point[0])
    return lambda point: transformers_train(model, optimizer, [batches[point]])


def machine(contender: str) -> Job:
    """What the processor can do: seconds to read 256 MB, as numbers to add or as a matrix that one
    row is multiplied by, and to multiply 2048 x 2048 matrices."""
    if contender == "read 256 MB":
        numbers = torch.randn(2**26)
        return lambda _: numbers.sum().item()
    if contender == "one row, oneDNN":
        row, matrix = torch.randn(1, 512), torch.randn(2**17, 512)
        return lambda _: linear(row, matrix)[0, 0].item()
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    if contender == "multiply, BLAS":
        return lambda _: F.linear(a, b)[0, 0].item()
    return lambda _: linear(a, b)[0, 0].item()
