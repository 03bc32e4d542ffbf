"""Small stand-ins for the real thing, made on the spot, and the real thing where it lies about."""

import gc
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import settings

import run_llama
from config import LlamaConfig
from llama import Llama
from tokenizer import Tokenizer
from utils import run_script

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every later garbage collection; the suite is quicker."""
    gc.freeze()


ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
LABEL_NAMES = ["bad", "good"]


def shared_asset(path: str) -> Path:
    """A file of `../shared`, or the test is skipped."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs ../shared/{path}, which is not here")
    return SHARED / path


def copy_project(folder: Path) -> Path:
    """A copy without what setup.sh downloads: the code, the demo data, the bundled model."""
    rooms = ("", "training/", "formats/", "fast/", "pretraining/", "tools/", "advanced/", "data/")
    patterns = [f"{room}*.py" for room in (*rooms, "advanced/methods/")]
    patterns += ["training/*.json", "data/demo-*", "data/mini/*", "data/*.json"]
    for pattern in patterns:
        for path in ROOT.glob(pattern):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return folder


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which nobody edits the source code while a run is interrupted and continued."""
    return copy_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(autouse=True)
def seeded_torch() -> None:
    """What a test draws depends on the run's seed and on the test, not on those before it.

    pytest-randomly seeds Python and NumPy before each test and leaves PyTorch out. Denormal numbers
    are kept until a test calls `seed_everything`.
    """
    torch.set_flush_denormal(False)
    torch.manual_seed(random.getrandbits(32))


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def train_tokenizer(folder: Path) -> Path:
    """A SentencePiece model of 320 tokens with byte fallback, trained on a few sentences."""
    sentence = "good bad this movie is a good bad film and the story was good or bad"
    words = sentence.split(" ")
    text = "\n".join(" ".join(words[i:] + words[:i]) for i in range(len(words)))
    return train_sentencepiece(
        folder,
        text,
        vocab_size=320,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )


def train_sentencepiece(folder: Path, text: str, **options) -> Path:
    """A model of 300 tokens with byte fallback, or of the given options."""
    (folder / "text.txt").write_text(text, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        minloglevel=2,
        **{"vocab_size": 300, "byte_fallback": True, **options},
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer(tokenizer_model=tokenizer_file)


def random_llama(seed: int = 0, scale: float = 5.0, **config) -> Llama:
    """A small model in eval mode with weights large enough for every part to matter."""
    shape = {"vocab_size": 320, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    with torch.random.fork_rng(), torch.no_grad():  # what a test draws later is its own
        torch.manual_seed(seed)
        model = Llama(LlamaConfig(**{**shape, "max_seq_len": 96, "multiple_of": 4, **config}))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
            else:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


# Three rows of 9, 4 and 1 real tokens, and what a classifier says of them.
TOKENS = torch.randint(3, 320, (3, 9), generator=torch.Generator().manual_seed(2))
LENGTHS = torch.tensor([9, 4, 1])


def log_probs(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(TOKENS, lengths=LENGTHS)


def randomize(model: torch.nn.Module, is_chosen: Callable[[str], bool], scale: float) -> None:
    """Parameters as training may leave them: of those with such names no number is zero."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_chosen(name):
                parameter.copy_(scale * torch.randn(parameter.shape, generator=rng))


def save_llama(model: Llama, path: Path, **model_args) -> Path:
    """Writes {"model", "model_args"} as the assignment's checkpoints have it."""
    config = {key: value for key, value in model.config.to_dict().items() if key != "attention"}
    torch.save({"model": model.state_dict(), "model_args": {**config, **model_args}}, path)
    return path


@pytest.fixture
def workplace(tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder holds model.pt, its tokenizer, label names and three small data files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    save_llama(random_llama(scale=1.0), tmp_path / "model.pt")
    (tmp_path / "labels.json").write_text('["bad", "good"]', encoding="utf-8")
    good = ["this film is good", "a warm movie", "her story is good", "the heart is warm"]
    bad = ["this film is bad", "a bad movie", "her story was bad", "this was a bad film"]
    lines = [
        f"{label} ||| {s}" for pair in zip(bad, good, strict=True) for label, s in enumerate(pair)
    ]
    for name in ("train", "dev", "test"):
        (tmp_path / f"toy-{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def run(
    workplace: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """run("prompt", ...) calls run_llama.py's entry point on the workplace's files.

    Returns exit code, standard output and standard error. Later options override earlier ones.
    """
    monkeypatch.setattr(run_llama, "bfloat16_gain", lambda: 1.0)  # no hint on any processor

    def call(option: str, *options: str) -> tuple[int, str, str]:
        kind = {"finetune": "finetuning"}.get(option, "prompting")
        argv = ["--option", option, "--train", "toy-train.txt", "--dev", "toy-dev.txt"]
        argv += ["--test", "toy-test.txt", "--label-names", "labels.json"]
        argv += ["--pretrained-model-path", "model.pt"]
        argv += ["--dev_out", f"toy-dev-{kind}-output.txt"]
        argv += ["--test_out", f"toy-test-{kind}-output.txt", *options]
        return ended(lambda: run_llama.main(argv), capsys)

    return call


def ended(main: Callable[[], int | None], capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    """Call a command's main as its script does; return exit code, standard output and error."""
    with pytest.raises(SystemExit) as how:
        run_script(main)
    captured = capsys.readouterr()
    return how.value.code or 0, captured.out, captured.err
