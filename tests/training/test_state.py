"""A stopped run continues as if it had not been stopped, and no other run gets in its way."""

import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import run_llama
from formats.torch_file import load_torch_file, save_torch_file
from helpers import (
    assert_same_weights,
    classifier,
    finetune_command,
    finish,
    random_data,
    refusal,
    start,
    train,
    wait_for,
    weights_of,
)
from test_layers import behind
from training import distributed, loop, state
from training.state import (
    StateFile,
    Stopped,
    only_writer,
    random_state,
    require_space,
    set_random_state,
    state_path,
    stop_requests,
)
from utils import InputError, seed_everything

SETTINGS = {"lr": 1e-3, "seed": 7}


@pytest.fixture(autouse=True)
def heeded_interrupts():
    """A suite in the background ignores SIGINT; these tests must not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------- the law, at every moment


def run_with(state_file: StateFile | None, pooling: str, dropout_seed: int = 1, hook=None) -> dict:
    """What two epochs of three batches, with two kinds of dropout, end in."""
    model, reports = classifier(pooling, dropout=0.3), []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    if hook is not None:
        model.llama.norm.register_forward_pre_hook(hook)
    torch.manual_seed(dropout_seed)
    options = {"state_file": state_file, "on_epoch": lambda *said: reports.append(said)}
    history = train(model, random_data(10), random_data(6, seed=1), **options)
    return {"history": history, "weights": weights_of(model), "reports": reports}


# Forward passes: three batches to train on, three for the train and two for the dev accuracy. A
# signal in an evaluation is seen after it.
@pytest.mark.parametrize("n_passes", [1, 2, 3, 7, 10, 16])
def test_a_run_stopped_in_any_pass_continues_to_the_same_bits(tmp_path, n_passes, capsys):
    pooling = ("position", "last")[n_passes % 2]
    signum = (signal.SIGTERM, signal.SIGINT)[n_passes // 2 % 2]
    whole, path, passes = run_with(None, pooling), tmp_path / "run.state.pt", []

    def stop(*_):
        passes.append(1)
        if len(passes) == n_passes:
            signal.raise_signal(signum)

    with pytest.raises(Stopped, match=r"the same command continues from .*run\.state\.pt") as stop_:
        run_with(StateFile(path, SETTINGS), pooling, hook=stop)
    assert stop_.value.exit_code == 128 + signum
    state_file = StateFile(path, SETTINGS)
    epoch = state_file.saved["progress"]["epoch"]
    continued = run_with(state_file, pooling, dropout_seed=99)  # not what decides
    assert f"continue {path} in epoch {epoch} after " in capsys.readouterr().out
    assert continued["history"] == whole["history"]
    assert_same_weights(continued["weights"], whole["weights"])
    assert continued["reports"] == [said for said in whole["reports"] if said[0].epoch >= epoch]


@pytest.mark.parametrize(("minutes", "n_saves"), [(60, 2), (0, 8)])
def test_a_state_is_saved_after_each_epoch_and_when_due_and_that_changes_nothing(
    tmp_path, minutes, n_saves, monkeypatch
):
    saves = []
    monkeypatch.setattr(state, "save_torch_file", lambda path, content: saves.append(path))
    saved = run_with(StateFile(tmp_path / "x", SETTINGS, minutes=minutes), "last")
    assert_same_weights(saved["weights"], run_with(None, "last")["weights"])
    assert saves == [tmp_path / "x"] * n_saves


def test_random_numbers_continue_from_a_saved_state(tmp_path):
    def draws() -> list[float]:
        return [random.gauss(0, 1), np.random.normal(), torch.rand(()).item()]

    seed_everything(3)
    draws()  # gauss makes two numbers and keeps the second
    save_torch_file(tmp_path / "random.pt", random_state())
    expected = draws()
    seed_everything(4)
    set_random_state(load_torch_file(tmp_path / "random.pt"))
    assert draws() == expected


# ---------------------------------------------------------------- signals


def test_a_second_signal_ends_a_run_at_once():
    with stop_requests() as stop:
        saves = []
        stop.handle(lambda: saves.append("not due"), None)
        signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop.handle(lambda: saves.append("stopped"), None)
        assert saves == ["stopped"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_stops_a_restarted_run_continues_it_without_that_option(saved_run):
    state_file = StateFile(saved_run, SETTINGS, "restart")
    state_file.save(progress={"epoch": 0})
    stopped = Stopped(signal.SIGINT, state_file)
    words = "interrupted; the same command without --restart continues from"
    assert str(stopped) == f"{words} {saved_run}"
    assert StateFile(saved_run, SETTINGS).saved["progress"] == {"epoch": 0}


def test_a_signal_during_a_save_waits_for_the_next_one(saved_run):
    """`Stopped` promises that the state is saved, so it is raised only behind a save that began
    after the signal."""
    state_file, saves = StateFile(saved_run, SETTINGS), []

    def save() -> None:
        saves.append(len(saves))
        if len(saves) == 1:
            signal.raise_signal(signal.SIGINT)

    with stop_requests() as stop:
        stop.handle(save, state_file, is_due=True)
        with pytest.raises(Stopped, match="the same command continues"):
            stop.handle(save, state_file)
    assert saves == [0, 1]


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signum is None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


# ---------------------------------------------------------------- which run it is


@pytest.fixture
def saved_run(tmp_path) -> Path:
    path = tmp_path / "run.state.pt"
    StateFile(path, SETTINGS).save(progress={"epoch": 1})
    return path


OLD = "run.state.old.pt"


@pytest.mark.parametrize("mode", ["auto", "resume"])
def test_the_same_settings_continue(saved_run, mode, capsys):
    assert StateFile(saved_run, SETTINGS, mode).saved["progress"] == {"epoch": 1}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("more", "mode", "reason"),
    [
        (
            {"lr": 0.1, "train": "0" * 64},
            "auto",
            "lr: saved 0.001, now 0.1; train: saved None, now",
        ),
        ({}, "auto", "it is damaged or of another version)"),
        ({}, "restart", "--restart)"),
    ],
)
def test_a_state_that_is_not_resumed_is_kept_and_a_line_says_why(
    saved_run, more, mode, reason, capsys
):
    if "damaged" in reason:
        saved_run.write_bytes(b"garbage")
    content, settings = saved_run.read_bytes(), {**SETTINGS, **more}
    assert StateFile(saved_run, settings, mode).saved is None
    err = capsys.readouterr().err
    assert f"{saved_run} is not resumed ({reason}" in err and err.count("\n") == 1
    assert f"it is renamed to {OLD}" in err
    assert not saved_run.exists() and saved_run.with_name(OLD).read_bytes() == content
    assert StateFile(saved_run, settings, mode).saved is None  # with nothing there, too
    assert capsys.readouterr().err == ""


def test_to_insist_on_a_state_that_does_not_fit_is_an_error(saved_run):
    def said(**changed) -> str:
        return refusal(StateFile, saved_run, {**SETTINGS, **changed}, "resume")

    assert "of another run (seed: saved 7, now 8); use that run's options" in said(seed=8)
    saved_run.rename(saved_run.with_name(OLD))
    assert said().endswith(f"leave that option out, or rename {OLD}, an older one")
    saved_run.with_name(OLD).unlink()
    assert said() == "no saved state to --resume; leave that option out"
    saved_run.write_bytes(b"garbage")
    assert said() == "is damaged or of another version; --restart starts over"
    assert saved_run.read_bytes() == b"garbage"


def test_changed_source_code_begins_anew_unless_one_insists(saved_run, monkeypatch, capsys):
    monkeypatch.setattr(state, "source_digest", lambda: "another")
    assert StateFile(saved_run, SETTINGS, "resume").saved
    assert "warning: " in capsys.readouterr().err
    assert StateFile(saved_run, SETTINGS).saved is None
    assert "the source code has changed" in capsys.readouterr().err


def test_the_digest_of_the_source_code_is_of_every_module_that_training_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "ROOT", tmp_path)
    digests, commands = [state.source_digest()], ("run_llama", "advanced.run", "pretraining.run")
    modules = sorted({module for command in commands for module in behind(command)})
    for module in modules:
        path = tmp_path / f"{module.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1", encoding="utf-8")
        digests.append(state.source_digest())
    (tmp_path / "llama.py").write_text("2", encoding="utf-8")
    digests.append(state.source_digest())
    assert len(set(digests)) == len(modules) + 2 > 50
    (tmp_path / "notes.txt").touch()
    assert state.source_digest() in digests


def test_too_little_memory_is_no_damage(saved_run, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: x")

    monkeypatch.setattr(torch, "load", load)
    assert refusal(StateFile, saved_run, SETTINGS).startswith("does not fit in the free memory")
    assert saved_run.exists()


@pytest.mark.parametrize("lost", ["progress", "random"])
def test_a_state_that_lacks_something_is_called_damaged(tmp_path, lost):
    path = tmp_path / "run.state.pt"
    run_with(StateFile(path, SETTINGS), "last")
    content = load_torch_file(path)
    del content[lost]
    save_torch_file(path, content)
    with pytest.raises(InputError, match=r"run\.state\.pt: is damaged"):
        run_with(StateFile(path, SETTINGS), "last")


def test_the_state_lies_beside_its_checkpoint():
    assert state_path("a b/finetune-sst-5-2e-05.pt") == Path("a b/finetune-sst-5-2e-05.state.pt")
    assert state_path("run-0.5") == Path("run-0.5.state.pt")


# ---------------------------------------------------------------- the command as a process

CHECKPOINT, STATE = "finetune-toy-2-0.001.pt", "finetune-toy-2-0.001.state.pt"
OUTPUTS = [f"toy-{split}-finetuning-output.txt" for split in ("dev", "test")]
OPTIONS = ["--epochs", "2", "--lr", "1e-3", "--batch_size", "2", "--save_minutes", "0"]


@pytest.fixture
def command(project: Path) -> list[str]:
    return [sys.executable, *finetune_command(*OPTIONS, project=project)]


@pytest.fixture
def long_run(workplace: Path) -> Path:
    """The workplace with training data for a run of some seconds."""
    path = workplace / "toy-train.txt"
    path.write_text(path.read_text(encoding="utf-8") * 20, encoding="utf-8")
    return workplace


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[bytes]]:
    weights = load_torch_file(folder / CHECKPOINT)["model"]
    return weights, [(folder / name).read_bytes() for name in OUTPUTS]


@pytest.fixture(scope="module")
def results() -> list:
    return []


@pytest.fixture
def uninterrupted(results, command, long_run, tmp_path_factory) -> tuple:
    """What the run ends in if left alone; run once, as its files are the same in every test."""
    if not results:
        folder = tmp_path_factory.mktemp("whole") / "run"
        shutil.copytree(long_run, folder)
        code, _, err = finish(start(command, folder))
        assert code == 0, err
        assert not (folder / STATE).exists() and not list(folder.glob(".*"))
        results += outcome(folder)
    return tuple(results)


def test_a_run_killed_at_random_moments_ends_in_the_same_files(long_run, command, uninterrupted):
    moments, progress, path = random.Random(random.getrandbits(32)), [], long_run / STATE
    for _ in range(2):
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = start(command, long_run)
        wait_for(lambda old=before: path.exists() and path.stat().st_mtime_ns != old, process)
        time.sleep(moments.uniform(0.0, 0.3))
        process.kill()
        process.communicate()
        if not path.exists():  # it was faster
            break
        reached = load_torch_file(path)["progress"]
        progress.append((reached["epoch"], reached["n_batches"]))
    was_cut = path.exists()
    code, out, err = finish(start(command, long_run))
    assert (code, err) == (0, "")
    assert (f"continue {STATE} in epoch" in out) == was_cut
    assert progress == sorted(set(progress))
    weights, outputs = outcome(long_run)
    assert_same_weights(weights, uninterrupted[0])
    assert outputs == uninterrupted[1]
    assert not path.exists() and not list(long_run.glob(".*"))


def test_a_run_bars_another_and_after_ctrl_c_the_same_command_continues(
    long_run, command, uninterrupted
):
    process = start(command, long_run)
    wait_for((long_run / STATE).exists, process)
    process.send_signal(signal.SIGSTOP)  # or it could end before the other one asks
    other = start([*command, "--lr", "0.5"], long_run)  # another checkpoint, the same outputs
    code, _, err = finish(other)
    assert code == 2 and err.count("\n") == 1
    assert "another process is writing it; wait, or name another output" in err
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    line = f"run_llama.py: interrupted; the same command continues from {STATE}\n"
    assert finish(process)[::2] == (130, line)
    assert not (long_run / OUTPUTS[0]).exists() and not list(long_run.glob(".*"))
    code, out, err = finish(start(command, long_run))
    assert (code, err) == (0, "")
    assert f"continue {STATE} in epoch" in out
    assert_same_weights(outcome(long_run)[0], uninterrupted[0])


def test_of_several_processes_the_first_holds_the_locks(tmp_path, monkeypatch):
    with only_writer(tmp_path / "out", "/dev/null"):
        monkeypatch.setattr(distributed, "is_main", lambda: False)
        with only_writer(tmp_path / "out"):
            pass


def test_leftovers_of_a_killed_process_are_removed_and_no_other_files(tmp_path):
    kept = {"out[1]", ".out[1].notes.tmp", ".out1.12.tmp"}
    for name in (*kept, ".out[1].12.tmp"):
        (tmp_path / name).touch()
    with only_writer(tmp_path / "out[1]"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == kept
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("seed-1.pt", ".seed-1.state.pt.12.tmp"):
        (weights / name).touch()
    with only_writer(weights):  # a folder
        pass
    assert [path.name for path in weights.iterdir()] == ["seed-1.pt"]


def test_a_disk_that_is_full_costs_no_earlier_result(long_run, command, uninterrupted):
    resource = pytest.importorskip("resource")
    weights, outputs = uninterrupted
    for name, content in zip(OUTPUTS, outputs, strict=True):
        (long_run / name).write_bytes(content)
    (long_run / CHECKPOINT).write_bytes(b"an earlier checkpoint")
    limit = 2 * sum(tensor.nbytes for tensor in weights.values())  # a state has three of each
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))  # which children inherit
    try:
        process = start(command, long_run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert finish(process)[::2] == (2, f"run_llama.py: error: {long_run / STATE}: File too large\n")
    assert [(long_run / name).read_bytes() for name in OUTPUTS] == outputs
    assert (long_run / CHECKPOINT).read_bytes() == b"an earlier checkpoint"
    assert not list(long_run.glob(".*"))


# ---------------------------------------------------------------- what goes wrong on the way


def finetune(run, *options: str) -> tuple[int, str, str]:
    return run("finetune", "--epochs", "2", "--lr", "1e-3", "--batch_size", "3", *options)


@pytest.fixture
def stopped(run, monkeypatch) -> str:
    """What a run printed that was stopped in its last evaluation."""
    with monkeypatch.context() as patch:
        patch.setattr(run_llama, "load_classifier", lambda path: signal.raise_signal(signal.SIGINT))
        code, out, _ = finetune(run)
    assert code == 130 and "epoch 1: " in out
    return out


def test_a_run_stopped_in_its_last_evaluation_continues_there(stopped, run):
    code, continued, _ = finetune(run)
    assert code == 0 and f"continue {STATE} in epoch 2 after 0 batches" in continued
    assert "epoch 1: " not in continued
    table = continued[continued.index("Epoch | ") :]
    assert table.startswith(stopped[stopped.index("Epoch | ") :].rstrip())
    assert not Path(STATE).exists()


@pytest.mark.usefixtures("stopped")
def test_a_run_whose_best_checkpoint_is_gone_says_so_before_it_trains(run):
    Path(CHECKPOINT).unlink()
    code, out, err = finetune(run)
    assert code == 2 and err.count("\n") == 1 and "continue" not in out
    assert f"{CHECKPOINT}: the best checkpoint of the run in {STATE} is missing" in err
    assert "start over with --restart" in err
    assert Path(STATE).exists()
    assert finetune(run, "--restart")[0] == 0


@pytest.mark.parametrize(("minutes", "n_batches"), [("5", 0), ("0", 1)])  # seen at which save
def test_what_was_saved_before_a_divergence_is_kept(
    run, workplace, monkeypatch, minutes, n_batches
):
    take_step, taken = loop.take_step, []

    def diverging(optimizers, *given):
        take_step(optimizers, *given)
        taken.append(1)
        if len(taken) == 5:  # in the second epoch
            with torch.no_grad():
                optimizers[0].param_groups[0]["params"][0][0, 0] = float("inf")

    monkeypatch.setattr(loop, "take_step", diverging)
    code, _, err = finetune(run, "--save_minutes", minutes)
    assert code == 2 and err.count("\n") == 1
    assert "llama.tok_embeddings.weight; lower --lr or set --max_grad_norm" in err
    progress = load_torch_file(STATE)["progress"]
    assert (progress["epoch"], progress["n_batches"]) == (1, n_batches)
    for name in (CHECKPOINT, STATE):
        assert all(tensor.isfinite().all() for tensor in load_torch_file(name)["model"].values())


def test_too_little_space_is_said_before_the_training(run, workplace, monkeypatch):
    usage = shutil.disk_usage(workplace)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    code, out, err = finetune(run)
    assert code == 2 and "0 MB free, training needs" in err and "make room" in err
    assert "train loss" not in out
    needed = re.search("needs ([0-9.,]+) MB", err)[1]
    Path(STATE).write_bytes(bytes(10**6))  # of another run: it is kept, so it makes no room
    assert re.search("needs ([0-9.,]+) MB", finetune(run, "--restart")[2])[1] == needed
    for n_kept, floats in ((1, 7), (5, 11)):  # checkpoints, and two states of three floats each
        require_space(workplace / "x.pt", 100_000 // (4 * floats), n_kept)
        with pytest.raises(InputError, match="make room"):
            require_space(workplace / "x.pt", 100_000 // (4 * floats) + 1, n_kept)
