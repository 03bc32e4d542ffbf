"""A small classifier and its data, and the project's commands as processes of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from classifier import LlamaEmbeddingClassifier
from conftest import ROOT, random_llama
from training.dataset import Example, SentenceDataset
from training.loop import EpochReport, train_classifier

CPU = torch.device("cpu")
LIMIT = 300  # seconds, for a process that hangs


def random_data(n: int = 10, seed: int = 0, n_labels: int = 2) -> SentenceDataset:
    """Sentences of 2 to 7 random tokens, labeled 0, 1, 0, ..."""
    rng = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(n):
        length = int(torch.randint(2, 8, (), generator=rng))
        tokens = torch.randint(4, 320, (length,), generator=rng).tolist()
        examples.append(Example(f"sentence {i}", i % n_labels, tokens))
    return SentenceDataset(examples, pad_id=3)


def classifier(
    pooling: str = "mean", dropout: float = 0.0, n_labels: int = 2, **shape
) -> LlamaEmbeddingClassifier:
    """The same weights in every call."""
    config = SimpleNamespace(
        num_labels=n_labels, option="finetune", hidden_dropout_prob=dropout, pooling=pooling
    )
    llama = random_llama(**{"scale": 1.0, **shape})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaEmbeddingClassifier(config, llama)


def train(
    model: torch.nn.Module, data: SentenceDataset, dev: SentenceDataset | None = None, **options
) -> list[EpochReport]:
    defaults = {"epochs": 2, "batch_size": 4, "lr": 1e-3, "seed": 7, "device": CPU}
    defaults["on_epoch"] = lambda report, is_best: None
    return train_classifier(model, data, dev or data, **{**defaults, **options})


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def move(model: torch.nn.Module, by: float = 0.1) -> None:
    """Some steps of training, as it were: every weight leaves its pretrained value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))


def assert_same_weights(ours: dict, theirs: dict, atol: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max().item() <= atol, name


# ---------------------------------------------------------------- processes


def environment() -> dict[str, str]:
    """One thread, and no trace of a torchrun around the tests."""
    torchruns = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    kept = {key: value for key, value in os.environ.items() if key not in torchruns}
    return {**kept, "OMP_NUM_THREADS": "1"}


def heed_interrupts() -> None:
    """A background job's children ignore SIGINT; a process that a test interrupts must not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(command: list[str], folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        preexec_fn=heed_interrupts if os.name == "posix" else None,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=LIMIT)
    return process.returncode, out, without_hint(err)


def without_hint(err: str) -> str:
    """Standard error without the line that only some processors get."""
    lines = err.splitlines(keepends=True)
    return "".join(line for line in lines if "hint: this processor multiplies" not in line)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def torchrun(n: int, script: Path | str, *options: str) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    return [sys.executable, *launch, str(script), *options]


def finetune_command(*options: str, project: Path = ROOT) -> list[str]:
    """What `torchrun` or Python runs to finetune on a workplace's files."""
    data = ["--train", "toy-train.txt", "--dev", "toy-dev.txt", "--test", "toy-test.txt"]
    data += ["--label-names", "labels.json", "--pretrained-model-path", "model.pt"]
    return [str(project / "run_llama.py"), "--option", "finetune", *data, *options]
