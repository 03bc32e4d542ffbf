"""A small classifier and its data, the project's commands, and processes of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from classifier import LlamaEmbeddingClassifier
from conftest import LABEL_NAMES, ROOT, random_llama, randomize
from training.checkpoint import save_classifier
from training.dataset import Example, SentenceDataset
from training.loop import EpochReport, train_classifier
from utils import InputError, sha256_of

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


def write_classifier(
    path: str | Path, pooling: str = "mean", attention: str = "causal", **changes
) -> LlamaEmbeddingClassifier:
    """Write a random classifier of bad and good as finetuning does, with ./tokenizer.model."""
    model = classifier(pooling, scale=5.0, attention=attention).eval()
    randomize(model, lambda name: name.startswith("classifier_head"), 1.0)
    config = SimpleNamespace(num_labels=2, option="finetune", hidden_dropout_prob=0.3)
    tokenizer = Path("tokenizer.model").absolute()
    recorded = {"tokenizer_path": str(tokenizer), "tokenizer_sha256": sha256_of(tokenizer)}
    save_classifier(path, model, config, **{"label_names": LABEL_NAMES, **recorded, **changes})
    return model


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


def lines_of(path: Path | str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


def refusal(read: Callable, path: Path | str, *args, longest: int = 1000, **options) -> str:
    """What is said of a bad file, behind its name: one line, however long the file's own words."""
    with pytest.raises(InputError) as caught:
        read(path, *args, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}:"), message
    assert "\n" not in message and len(message) < len(str(path)) + longest, message
    return message.removeprefix(f"{path}:").lstrip()


def assert_same_weights(ours: dict, theirs: dict, atol: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0.0, atol=atol, msg=name)


# ---------------------------------------------------------------- commands and processes


def error_line(answer: tuple[int, str, str]) -> str:
    """Return the one line in which a command ended that printed nothing else."""
    code, out, err = answer
    assert (code, out, err.count("\n")) == (2, "", 1), err
    return err


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
