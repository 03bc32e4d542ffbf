"""Define the rows of the speed table; each function builds one contender's work for one shape.

A limit counts the operations of the layers' products, or the bytes to read and write, that no
solution can avoid if it computes every layer at every position.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks import llama2c, naive
from benchmarks.contenders import (
    LR,
    PAD,
    SEED,
    batches_of,
    config_of,
    make_classifier,
    make_data,
    make_llama,
    make_optimizer,
    make_zero_shot,
)
from benchmarks.report import BESIDE, CONTENDERS
from fast.linear import linear
from formats.torch_file import save_torch_file
from llama import Llama
from training.dataset import SentenceDataset
from training.evaluation import evaluate
from training.loop import train_classifier

CPU = torch.device("cpu")
N_PROMPT, N_NEW = 32, 75  # tokens of the assignment's prefix, tokens to generate
N_QUESTION = 19  # tokens of SST's question


class Work(NamedTuple):
    run: Callable[[], Any]  # timed; returns tokens, predictions or losses to compare
    amount: float = 1  # units of one run
    operations: float = 0  # that one run cannot avoid
    bytes: float = 0
    times_itself: bool = False  # `run` returns seconds, from the rate that a program prints


class Row(NamedTuple):
    name: str
    unit: str
    build: Callable[..., Work]
    args: tuple[Any, ...] = ()  # of `build`, behind contender and shape
    contenders: tuple[str, ...] = CONTENDERS


def n_parameters(shape: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Llama(config_of(shape)).parameters())


def pass_operations(shape: str, lengths: Sequence[int], causal: bool = False) -> int:
    """Count the floating-point operations of the layers' products in one forward pass.

    Each weight costs 2 per token. Each pair of positions that attend costs 4 dim per layer.
    """
    config = config_of(shape)
    with torch.device("meta"):
        layers = Llama(config).layers
    n_weights = sum(parameter.numel() for parameter in layers.parameters() if parameter.ndim == 2)
    n_pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    return 2 * n_weights * sum(lengths) + 4 * config.n_layers * config.dim * n_pairs


def lengths_of(data: SentenceDataset) -> list[int]:
    return [len(example.tokens) for example in data.examples]


def generate(contender: str, shape: str, attention: str, folder: str = "") -> Work:
    """Generate greedily after a prompt; `folder` has the compiled programs of llama2.c."""
    if contender in llama2c.PROGRAMS:
        seconds = llama2c.seconds_per_token(contender, shape, Path(folder), N_PROMPT + N_NEW)
        return Work(lambda: seconds() * N_NEW, N_NEW, times_itself=True)
    torch.manual_seed(SEED)
    idx = torch.randint(PAD + 1, config_of(shape).vocab_size, (1, N_PROMPT))
    model = make_llama(contender, shape, attention)
    options: dict[str, Any] = {"max_new_tokens": N_NEW, "temperature": 0.0}
    if contender == "transformers":
        options = {"max_new_tokens": N_NEW, "min_new_tokens": N_NEW, "do_sample": False}
        options["attention_mask"] = torch.ones_like(idx)

    def run() -> list[int]:
        return model.generate(idx, **options)[0].tolist()

    if attention == "causal":  # with a cache, each new token still reads every weight
        return Work(run, N_NEW, bytes=4 * n_parameters(shape) * N_NEW)
    n_operations = sum(pass_operations(shape, [N_PROMPT + i]) for i in range(N_NEW))
    return Work(run, N_NEW, n_operations)


def finetune(contender: str, shape: str, dataset: str, batch_size: int, n_batches: int) -> Work:
    """Train on padded batches in full mode (transformers: causal)."""
    batches = batches_of(make_data(dataset, n_batches * batch_size, shape), batch_size)
    padded = [batch["token_ids"].shape[1] for batch in batches for _ in range(batch_size)]
    model = make_classifier(contender, shape, "full")
    optimizer = make_optimizer(contender, model.parameters())
    torch.manual_seed(SEED)  # of the dropout

    def run() -> list[float]:
        return naive.train(model, optimizer, batches, batch_size)

    return Work(run, sum(padded), 3 * pass_operations(shape, padded))


def epoch(contender: str, shape: str, dataset: str, batch_size: int, n_batches: int) -> Work:
    """Train one epoch in causal mode; measure train accuracy, and dev accuracy on one batch."""
    data = make_data(dataset, n_batches * batch_size, shape)
    dev_data = SentenceDataset(data.examples[:batch_size], PAD)
    model = make_classifier(contender, shape, "causal")
    batches, dev_batches = batches_of(data, batch_size), batches_of(dev_data, batch_size)

    def ours() -> float:
        options = {"epochs": 1, "batch_size": batch_size, "lr": LR, "seed": SEED, "device": CPU}
        options["on_epoch"] = lambda report, is_best: None
        return train_classifier(model, data, dev_data, **options)[0].train_loss

    def others() -> float:
        optimizer = make_optimizer(contender, model.parameters())
        losses = naive.train(model, optimizer, batches, batch_size)
        with torch.set_grad_enabled(contender == "naive"):
            naive.evaluate(model, batches + dev_batches)
        return sum(losses) / len(losses)

    n_passes = 3 + 1 + 1 / n_batches  # training, train accuracy, dev accuracy
    n_operations = n_passes * pass_operations(shape, lengths_of(data), causal=True)
    return Work(ours if contender == "ours" else others, len(data), n_operations)


def prompt(contender: str, shape: str, dataset: str, batch_size: int, n_batches: int) -> Work:
    """Predict by prompting in causal mode; padding is masked."""
    data = make_data(dataset, n_batches * batch_size, shape, longer_by=N_QUESTION)
    model = make_zero_shot(contender, shape)
    batches = batches_of(data, batch_size)

    def ours() -> list[int]:
        return evaluate(model, data, batch_size, CPU).predictions

    def others() -> list[int]:
        with torch.set_grad_enabled(contender == "naive"):
            return naive.evaluate(model, batches)

    n_operations = pass_operations(shape, lengths_of(data), causal=True)
    return Work(ours if contender == "ours" else others, len(data), n_operations)


def adamw(contender: str, shape: str, is_late: bool = False) -> Work:
    """Update all parameters once; three tokens of four have no gradient, as if never seen.

    `is_late` starts after about 700 steps. The m of these tokens, multiplied by 0.9 in each step,
    is then a denormal number, and processors compute slowly with those. Their v, multiplied by
    0.999, is still a normal number.
    """
    model = make_llama("ours", shape, "causal")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    embedding = model.tok_embeddings.weight
    embedding.grad[len(embedding) // 4 :] = 0.0
    optimizer = make_optimizer(contender, model.parameters())
    if is_late:
        optimizer.step()
        tensors = [x for x in optimizer.state[embedding].values() if torch.is_tensor(x)]
        m, v = (tensor for tensor in tensors if tensor.shape == embedding.shape)
        m[len(embedding) // 4 :], v[len(embedding) // 4 :] = 1e-40, 1e-12
    # read theta, gradient, m and v, write theta, m and v
    return Work(optimizer.step, bytes=7 * 4 * n_parameters(shape))


_TOKENIZE = """
from tokenizer import Tokenizer
Tokenizer(tokenizer_model="data/mini/tokenizer.model").encode("a", bos=True, eos=False)
ids = torch.ones(1, 32, dtype=torch.long)
"""
# "naive" imports what the assignment's script imports.
_FIRST_TOKEN = {
    "ours": f"""
import run_llama, torch
from llama import load_pretrained
{_TOKENIZE}
load_pretrained("{{folder}}/model.pt", "causal").generate(ids, 1, 0.0)
""",
    "naive": f"""
import sklearn.metrics, torch, tqdm
from benchmarks.naive import NaiveLlama
from config import LlamaConfig
{_TOKENIZE}
saved = torch.load("{{folder}}/model.pt", weights_only=True)
model = NaiveLlama(LlamaConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval().generate(ids, 1, 0.0)
""",
    "transformers": f"""
import torch
from transformers import LlamaForCausalLM
{_TOKENIZE}
model = LlamaForCausalLM.from_pretrained("{{folder}}")
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
""",
}


def start_up(contender: str, shape: str, folder: str) -> Work:
    """Start a process that loads a checkpoint and generates one token."""
    path = Path(folder) / f"{shape}-{contender}"
    path.mkdir()
    if contender == "transformers":
        make_llama(contender, shape, "causal").save_pretrained(path)
    else:
        llama = make_llama("ours", shape, "causal")
        saved = {"model": llama.state_dict(), "model_args": llama.config.to_dict()}
        save_torch_file(path / "model.pt", saved)
    code = _FIRST_TOKEN[contender].format(folder=path.as_posix())
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = {"args": [sys.executable, "-c", code], "cwd": root, "env": env}
    return Work(lambda: subprocess.run(**command, capture_output=True, check=True).returncode)


def machine(contender: str, shape: str) -> Work:
    """Measure the best of this processor: add up 256 MB, or multiply 2048 x 2048 matrices."""
    if contender == "read 256 MB":
        numbers = torch.randn(2**26)
        return Work(lambda: numbers.sum().item(), bytes=2**28)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    product = linear if contender == "multiply, ours" else F.linear
    return Work(lambda: product(a, b)[0, 0].item(), operations=2 * 2048**3)


MACHINE = Row("machine", "s", machine, (), ("read 256 MB", "multiply, BLAS", "multiply, ours"))


NAIVE_AND_OURS = ("naive", "ours")
ALONE_AND_BESIDE = tuple(name + end for name in ("ours", "transformers") for end in ("", BESIDE))


def all_rows(folder: str, programs: tuple[str, ...] = ()) -> list[Row]:
    """Return every row.

    `folder` has the compiled `programs` and receives the files that they and start-up read.
    """
    generating = (*CONTENDERS, "ours int8", *programs)
    beside = "beside a busy process, "
    return [
        Row("generate, causal", "tokens/s", generate, ("causal", folder), generating),
        Row("generate, full", "tokens/s", generate, ("full",), NAIVE_AND_OURS),
        Row("finetune, full, sst x 80", "padded tokens/s", finetune, ("sst", 80, 2)),
        Row("finetune, full, cfimdb x 10", "padded tokens/s", finetune, ("cfimdb", 10, 2)),
        Row("epoch, masked, sst x 80", "sentences/s", epoch, ("sst", 80, 5)),
        Row("epoch, masked, cfimdb x 10", "sentences/s", epoch, ("cfimdb", 10, 5)),
        Row("prompt, masked, sst x 10", "sentences/s", prompt, ("sst", 10, 20)),
        Row("AdamW step", "s", adamw, (), NAIVE_AND_OURS),
        Row("AdamW step, late", "s", adamw, (True,), NAIVE_AND_OURS),
        Row("start-up to first token", "s", start_up, (folder,)),
        Row(f"{beside}generating", "tokens/s", generate, ("causal",), ALONE_AND_BESIDE),
        Row(f"{beside}training", "padded tokens/s", finetune, ("sst", 8, 1), ALONE_AND_BESIDE),
    ]
