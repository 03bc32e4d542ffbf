"""A stopped run goes on as if it had not been stopped, and no other run gets in its way."""

import contextlib
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import run_llama
from classifier import LlamaEmbeddingClassifier
from conftest import ROOT, random_llama
from formats.checkpoint import load_torch_file
from training import interrupts
from training import loop as training
from training.dataset import Example, SentenceDataset
from training.distributed import Ranks, Signals
from training.interrupts import Stopped
from training.loop import train_classifier
from training.state import Keeper, Place, require_same_settings, require_space, state_path
from utils import save_torch_file

CPU = torch.device("cpu")
SETTINGS = {"lr": 1e-3, "seed": 7}


def classifier(pooling: str) -> LlamaEmbeddingClassifier:
    attention = "full" if pooling == "position" else "causal"
    config = {"num_labels": 2, "option": "finetune", "hidden_dropout_prob": 0.3, "pooling": pooling}
    torch.manual_seed(5)
    llama = random_llama(scale=1.0, dropout=0.1, attention=attention)
    return LlamaEmbeddingClassifier(SimpleNamespace(**config), llama)


def sentences(n: int) -> SentenceDataset:
    draw = random.Random(n)
    examples = [
        Example(f"sentence {i}", i % 2, [draw.randrange(3, 320) for _ in range(3 + i % 5)])
        for i in range(n)
    ]
    return SentenceDataset(examples, pad_id=3)


def train(
    model: LlamaEmbeddingClassifier, keeper: Keeper | None = None, dropout_seed: int = 1
) -> dict:
    """What a run of two epochs of three batches ends in."""
    torch.manual_seed(dropout_seed)
    reports = []
    options = {"epochs": 2, "batch_size": 4, "lr": 1e-3, "seed": 7, "device": CPU}
    history = train_classifier(
        model,
        sentences(10),
        sentences(6),
        on_epoch=lambda report, is_best: reports.append((report.epoch, is_best)),
        keeper=keeper,
        **options,
    )
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"history": [asdict(report) for report in history], "weights": weights, "said": reports}


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


# ---------------------------------------------------------------- the law, at every moment


# Forward passes: three batches to train on, three for the train and two for the dev accuracy.
@pytest.mark.parametrize("n_passes", range(1, 17))
@pytest.mark.parametrize("pooling", ["position", "last"])
def test_a_run_stopped_in_any_pass_and_resumed_ends_as_if_it_had_not_been(
    tmp_path, pooling, n_passes
):
    whole = train(classifier(pooling))

    def stop_in_pass(*_):
        nonlocal passes
        passes += 1
        if passes == n_passes:
            os.kill(os.getpid(), signal.SIGTERM)

    passes, path = 0, tmp_path / "run.state.pt"
    cut = classifier(pooling)
    cut.llama.norm.register_forward_pre_hook(stop_in_pass)
    with pytest.raises(Stopped) as stopped, interrupts.raised():
        train(cut, Keeper(path, SETTINGS))
    assert stopped.value.exit_code == 143 and stopped.value.is_resumable

    keeper = Keeper(path, SETTINGS, resume=True)
    assert keeper.is_resumed
    resumed = train(classifier(pooling), keeper, dropout_seed=99)  # not what decides
    assert resumed["history"] == whole["history"]
    assert_same_weights(resumed["weights"], whole["weights"])
    assert resumed["said"] == [said for said in whole["said"] if said[0] >= keeper.place.epoch]


class SeveralsSignals(Ranks):
    """One process, whose signals wait as those of several ranks do."""

    @contextlib.contextmanager
    def signals(self):
        with interrupts.held_back() as waiting:
            yield Signals(self, waiting)


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_signal_while_an_epoch_is_reported_stops_several_ranks_resumably(tmp_path, epoch):
    def stop(report, is_best):
        if report.epoch == epoch:
            os.kill(os.getpid(), signal.SIGTERM)

    options = {"epochs": 2, "batch_size": 4, "lr": 1e-3, "seed": 7, "device": CPU}
    keeper = Keeper(tmp_path / "run.state.pt", SETTINGS)
    data, ranks = sentences(6), SeveralsSignals()
    with pytest.raises(Stopped) as caught:
        train_classifier(
            classifier("last"), data, data, on_epoch=stop, keeper=keeper, ranks=ranks, **options
        )
    assert caught.value.is_resumable
    place = Keeper(tmp_path / "run.state.pt", SETTINGS, resume=True).place
    assert (place.epoch, place.n_batches) == (epoch + 1, 0)


def test_a_state_is_kept_when_it_is_due_and_keeping_it_changes_nothing(tmp_path):
    whole = train(classifier("last"))
    places = []

    class Watched(Keeper):
        def save(self, place, *others):
            super().save(place, *others)
            places.append((place.epoch, place.n_batches))

    for minutes, expected in ((60, [(1, 0), (2, 0)]), (0, None)):
        places.clear()
        watched = train(classifier("last"), Watched(tmp_path / f"{minutes}.pt", {}, False, minutes))
        assert_same_weights(watched["weights"], whole["weights"])
        steps = [(e, n) for e in (0, 1) for n in (1, 2, 3)]
        assert places == (expected or sorted([*steps, (1, 0), (2, 0)]))


def test_measuring_once_more_changes_no_training():
    once = train(classifier("last"))
    evaluate = training.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "evaluate", lambda *a, **k: evaluate(*a, **k) and evaluate(*a, **k))
        twice = train(classifier("last"))
    assert_same_weights(once["weights"], twice["weights"])


# ---------------------------------------------------------------- which run it is


def keep_a_run(path: Path) -> Keeper:
    model = classifier("last")
    keeper = Keeper(path, SETTINGS)
    optimizer = training.AdamW(model.parameters())
    model(torch.tensor([[5, 6]]), torch.tensor([2])).sum().backward()
    optimizer.step()
    report = {"epoch": 0, "train_loss": 0.5, "train_accuracy": 1.0, "dev_accuracy": 0.5}
    order = torch.Generator().get_state()
    keeper.save(Place(epoch=1, order=order, history=[report]), model, optimizer)
    return keeper


def test_a_new_run_does_not_replace_the_state_of_an_interrupted_one(tmp_path):
    path = tmp_path / "run.state.pt"
    keep_a_run(path)
    with pytest.raises(ValueError, match=r"run\.state\.pt: keeps a run .* --resume continues it"):
        Keeper(path, SETTINGS)


def test_a_run_with_other_settings_is_refused_by_name(tmp_path):
    path = tmp_path / "run.state.pt"
    keep_a_run(path)
    with pytest.raises(ValueError, match=r"another run \(lr: 0\.001 there, 0\.1 here\); "):
        Keeper(path, {**SETTINGS, "lr": 0.1}, resume=True)
    with pytest.raises(ValueError, match=r"lr: None there, 0\.001 here; seed: None there, 7 here"):
        require_same_settings(path, {}, SETTINGS)
    with pytest.raises(ValueError, match="is no state of a run"):
        require_same_settings(path, None, SETTINGS)


def test_without_a_state_a_resumed_run_begins_at_the_beginning(tmp_path):
    keeper = Keeper(tmp_path / "run.state.pt", SETTINGS, resume=True)
    assert not keeper.is_resumed and keeper.place == Place()


@pytest.mark.parametrize("lost", ["place", "model", "optimizer", "random"])
def test_a_state_that_lacks_something_is_called_damaged(tmp_path, lost):
    path = tmp_path / "run.state.pt"
    keep_a_run(path)
    content = load_torch_file(path)
    del content[lost]
    save_torch_file(path, content)
    model = classifier("last")
    with pytest.raises(ValueError, match=r"run\.state\.pt: is damaged"):
        Keeper(path, SETTINGS, resume=True).restore(model, training.AdamW(model.parameters()))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("place", "epoch"), "0"),
        (("place", "n_batches"), -1),
        (("place", "loss_sum"), None),
        (("place", "order"), None),
        (("place", "order"), torch.zeros(3)),
        (("place", "history"), [{"epoch": 0}]),
        (("place", "history", 0, "dev_accuracy"), "0.5"),
        (("place", "history", 0, "epoch"), 0.5),
        (("place",), [1, 2]),
        (("settings", "lr"), torch.ones(2)),
        (("settings",), None),
        (("optimizer", "param_groups", 0, "betas"), (0.9, "0.999")),
        (("optimizer", "param_groups", 0, "initial_lr"), "0.1"),
        (("optimizer", "state", 0, "step"), 1.5),
        (("optimizer", "state", 0, "m"), torch.ones(2)),
        (("optimizer", "state", 0), {"step": 1}),
        (("random", "torch"), torch.zeros(3)),
    ],
)
def test_a_state_of_other_values_is_refused_in_one_line(tmp_path, where, value):
    path = tmp_path / "run.state.pt"
    keep_a_run(path)
    content = load_torch_file(path)
    *inner, last = where
    entry = content
    for key in inner:
        entry = entry[key]
    entry[last] = value
    save_torch_file(path, content)
    model = classifier("last")
    with pytest.raises(ValueError, match=r"run\.state\.pt: is (damaged|no state)"):
        Keeper(path, SETTINGS, resume=True).restore(model, training.AdamW(model.parameters()))


def test_the_state_lies_beside_its_checkpoint():
    assert state_path("a b/finetune-sst-5-2e-05.pt") == Path("a b/finetune-sst-5-2e-05.state.pt")
    assert state_path("finetune-sst-5-0.0005.pt") == Path("finetune-sst-5-0.0005.state.pt")


# ---------------------------------------------------------------- run_llama.py

COMMAND = [
    *(sys.executable, str(ROOT / "run_llama.py"), "--option", "finetune", "--epochs", "2"),
    *("--train", "long-train.txt", "--dev", "toy-dev.txt", "--test", "toy-test.txt"),
    *("--label-names", "labels.json", "--pretrained-model-path", "model.pt", "--lr", "1e-3"),
    *("--batch_size", "2", "--save_minutes", "0"),
    *("--dev_out", "toy-dev-finetuning-output.txt"),
    *("--test_out", "toy-test-finetuning-output.txt"),
]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # with as many a resumed run is the same bit for bit
CHECKPOINT, STATE = "finetune-long-2-0.001.pt", "finetune-long-2-0.001.state.pt"
OUTPUTS = [COMMAND[-3], COMMAND[-1]]


@pytest.fixture
def long_run(workplace: Path) -> Path:
    """The workplace with training data for a run of some seconds."""
    lines = (workplace / "toy-train.txt").read_text(encoding="utf-8")
    (workplace / "long-train.txt").write_text(lines * 60, encoding="utf-8")
    return workplace


def start(folder: Path, *options: str, **how) -> subprocess.Popen:
    environment = {**os.environ, **ONE_THREAD}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    command = [*COMMAND, *options]
    return subprocess.Popen(
        command, cwd=folder, env=environment, encoding="utf-8", **{**pipes, **how}
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and what was said on standard error, once the process has ended."""
    error = process.communicate()[1]
    return process.returncode, error


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[bytes]]:
    weights = load_torch_file(folder / CHECKPOINT)["model"]
    return weights, [(folder / name).read_bytes() for name in OUTPUTS]


@pytest.fixture
def uninterrupted(long_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """What the run ends in if left alone; run once, as its files are the same in every test."""
    if not _whole:
        folder = tmp_path_factory.mktemp("whole") / "run"
        shutil.copytree(long_run, folder)
        assert ended(start(folder, "--save_minutes", "9")) == (0, "")
        assert not (folder / STATE).exists()  # a finished run has nothing to resume
        assert not list(folder.glob(".*"))
        _whole.extend(outcome(folder))
    return tuple(_whole)


_whole: list = []


def test_a_run_killed_at_ten_random_moments_ends_in_the_same_files(long_run, uninterrupted):
    moments, places, state = random.Random(3), [], long_run / STATE
    for i in range(10):
        before = state.stat().st_mtime_ns if state.exists() else None
        process = start(long_run, "--resume")
        if i % 2:  # in its steps; else wherever it is by then, which may be before them
            wait_for(lambda old=before: state.exists() and state.stat().st_mtime_ns != old, process)
        time.sleep(moments.uniform(0.0, 1.0 if i % 2 else 4.0))
        if process.poll() == 0:  # faster than it could be killed as often
            break
        process.kill()
        process.communicate()
        if state.exists():
            place = load_torch_file(state)["place"]
            places.append((place["epoch"], place["n_batches"]))
    assert ended(start(long_run, "--resume"))[0] == 0
    assert places == sorted(places) and len(set(places)) > 1
    weights, outputs = outcome(long_run)
    assert_same_weights(weights, uninterrupted[0])
    assert outputs == uninterrupted[1]
    assert not (long_run / STATE).exists()
    assert not list(long_run.glob(".*"))  # nor locks or what was being written


@pytest.mark.parametrize(
    ("signum", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_ends_a_run_with_the_command_that_resumes_it(
    long_run, uninterrupted, signum, code, word
):
    process = start(long_run)
    wait_for((long_run / STATE).exists, process)
    process.send_signal(signum)
    returned, error = ended(process)
    assert returned == code
    said, _, command = error.partition("; to go on: ")
    assert said == f"run_llama.py: {word}"
    assert shlex.split(command) == [*process.args, "--resume"]
    saved = load_torch_file(long_run / STATE)["place"]
    assert (saved["epoch"], saved["n_batches"]) > (0, 0)
    how = {"cwd": long_run, "env": {**os.environ, **ONE_THREAD}, "capture_output": True}
    assert subprocess.run(shlex.split(command), **how).returncode == 0
    assert_same_weights(outcome(long_run)[0], uninterrupted[0])


def test_a_second_run_that_would_write_the_same_files_is_refused_while_the_first_lives(long_run):
    first = start(long_run)
    wait_for((long_run / STATE).exists, first)
    for options in ([], ["--lr", "0.5"]):  # another checkpoint, but the same outputs
        code, error = ended(start(long_run, *options))
        assert code == 2 and error.count("\n") == 1
        assert f"process {first.pid} is writing it" in error
    first.kill()
    first.communicate()
    assert list(long_run.glob(".*.lock"))  # stale ones, which bar nobody
    assert ended(start(long_run, "--resume"))[0] == 0
    assert not list(long_run.glob(".*"))


# ---------------------------------------------------------------- what goes wrong on the way


def finetune(run, *options: str) -> tuple[int, str, str]:
    return run("finetune", "--epochs", "2", "--lr", "1e-3", "--batch_size", "3", *options)


def test_another_learning_rate_seed_or_file_is_refused_and_named(run, workplace, monkeypatch):
    taken = 0

    def stop_at_fourth(*args, **kwargs):
        nonlocal taken
        taken += 1
        if taken == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(*args, **kwargs)

    take_step = training.take_step
    monkeypatch.setattr(training, "take_step", stop_at_fourth)
    assert finetune(run)[0] == 143
    code, _, error = finetune(run)
    assert code == 2 and "--resume continues it" in error
    code, _, error = finetune(run, "--resume", "--seed", "3", "--max_grad_norm", "1")
    assert code == 2
    assert "(seed: 1337 there, 3 here; max_grad_norm: None there, 1.0 here)" in error
    train = workplace / "toy-train.txt"
    content = train.read_text(encoding="utf-8")
    train.write_text(content.replace("good", "fine"), encoding="utf-8")
    code, _, error = finetune(run, "--resume")
    assert code == 2 and "train_sha256: " in error and error.count("\n") == 1
    train.write_text(content, encoding="utf-8")
    code, said, _ = finetune(run, "--resume")
    assert code == 0 and "state.pt in epoch 1, behind 1 batches" in said


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_what_was_good(
    run, workplace, monkeypatch
):
    assert finetune(run)[0] == 0
    good = (workplace / "finetune-toy-2-0.001.pt").read_bytes()
    nll_loss, calls = training.F.nll_loss, []

    def diverge(log_probs, *args, **kwargs):
        calls.append(log_probs)
        return nll_loss(log_probs, *args, **kwargs) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(training.F, "nll_loss", diverge)
    code, _, error = finetune(run)
    assert code == 2 and error.count("\n") == 1
    where = "epoch 1, step 2 of 3, learning rate 0.001: the loss is nan on the batch that begins"
    assert where in error
    assert any(repr(line.split(" ||| ")[1]) in error for line in lines(workplace / "toy-train.txt"))
    assert load_torch_file(workplace / "finetune-toy-2-0.001.state.pt")["place"]["epoch"] == 1
    kept = load_torch_file(workplace / "finetune-toy-2-0.001.pt")["model"]
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    assert len(good) == (workplace / "finetune-toy-2-0.001.pt").stat().st_size


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_weights_that_are_no_numbers_are_not_kept(run, workplace, monkeypatch):
    take_step, taken = training.take_step, []

    def diverge(optimizers, *args):
        take_step(optimizers, *args)
        taken.append(1)
        if len(taken) == 6:  # the last of the second epoch
            with torch.no_grad():
                optimizers[0].param_groups[0]["params"][0][0, 0] = float("inf")

    monkeypatch.setattr(training, "take_step", diverge)
    code, _, error = finetune(run)
    assert (
        code == 2 and "NaN or infinite numbers in llama.tok_embeddings.weight; lower --lr" in error
    )
    for name in ("finetune-toy-2-0.001.pt", "finetune-toy-2-0.001.state.pt"):
        kept = load_torch_file(workplace / name)["model"]
        assert all(torch.isfinite(tensor).all() for tensor in kept.values())


def test_an_output_folder_that_vanished_costs_no_training(run, workplace, monkeypatch):
    (workplace / "out").mkdir()
    outputs = [f"--{split}_out=out/{split}-finetuning-output.txt" for split in ("dev", "test")]
    load_classifier = run_llama.load_classifier

    def load_while_it_vanishes(path):
        shutil.rmtree(workplace / "out")
        return load_classifier(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_llama, "load_classifier", load_while_it_vanishes)
        code, said, error = finetune(run, *outputs)
    assert code == 2 and error.count("\n") == 1
    assert error.endswith("out/dev-finetuning-output.txt: No such file or directory\n")
    (workplace / "out").mkdir()
    code, resumed, _ = finetune(run, *outputs, "--resume")
    assert code == 0 and "in epoch 2, behind 0 batches" in resumed
    assert resumed[resumed.index("Epoch |") :].startswith(said[said.index("Epoch |") :][:120])
    assert len(list((workplace / "out").iterdir())) == 2


def test_a_run_stopped_in_its_last_evaluation_can_be_resumed(run, workplace, monkeypatch):
    def stop(path):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_llama, "load_classifier", stop)
        code, _, error = finetune(run)
    assert code == 130 and "interrupted; to go on: " in error
    assert finetune(run, "--resume")[0] == 0
    assert finetune(run)[0] == 0  # and then nothing bars a new run


def test_what_does_not_train_cannot_be_resumed(run, workplace):
    before = set(workplace.iterdir())
    code, _, error = run("prompt", "--resume")
    assert code == 2 and "add --option finetune" in error and error.count("\n") == 1
    assert set(workplace.iterdir()) == before


def test_too_little_room_is_said_before_the_training(run, workplace, monkeypatch):
    usage = shutil.disk_usage(workplace)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    code, said, error = finetune(run)
    assert code == 2 and "0 MB free, training needs" in error and "make room" in error
    assert "train loss" not in said
    require_space(workplace / "x.pt", 100_000 // 28)
    require_space(workplace / "x.pt", 100_000 // 44, n_kept=5)
    with pytest.raises(ValueError, match="make room"):
        require_space(workplace / "x.pt", 100_000 // 28, n_kept=2)
    with pytest.raises(ValueError, match="make room"):
        require_space(workplace / "x.pt", 100_000 // 28 + 1)


@pytest.mark.parametrize("share", [0.0, 0.5, 2.0])
def test_a_disk_that_is_full_costs_no_earlier_result(long_run, uninterrupted, share):
    resource = pytest.importorskip("resource")
    weights, outputs = uninterrupted
    size = 4 * sum(tensor.numel() for tensor in weights.values())
    for name, content in zip(OUTPUTS, outputs, strict=True):
        (long_run / name).write_bytes(content)
    old = b"an earlier checkpoint"
    (long_run / CHECKPOINT).write_bytes(old)
    limit = round(share * size)
    process = start(
        long_run, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    code, error = ended(process)
    assert code == 2, error
    assert error.count("\n") == 1 and error.endswith("File too large\n")
    assert CHECKPOINT in error or STATE in error
    assert [(long_run / name).read_bytes() for name in OUTPUTS] == outputs
    kept = (long_run / CHECKPOINT).read_bytes()
    assert kept == old or load_torch_file(long_run / CHECKPOINT)
    assert not list(long_run.glob(".*.tmp"))
