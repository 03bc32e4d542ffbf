"""Several real processes, started by torchrun, that train one model: what they compute, and faults.

One rank is killed by a script that looks at its RANK.
"""

import re
import signal
import sys
from pathlib import Path

import pytest
import ranks_job
import torch

from formats.torch_file import load_torch_file
from helpers import assert_same_weights, finetune_command, finish, start, torchrun
from training import distributed
from training.state import StateFile, stop_requests
from utils import InputError


def test_ranks_end_in_the_weights_and_numbers_of_one_process(tmp_path):
    ranks_job.main(str(tmp_path / "alone.pt"))
    command = torchrun(3, ranks_job.__file__, str(tmp_path / "ranks.pt"))
    code, _, err = finish(start(command, tmp_path))
    assert code == 0, err
    alone, ranks = (torch.load(tmp_path / f"{k}.pt", weights_only=True) for k in ("alone", "ranks"))
    for case, ours, theirs in zip(ranks_job.CASES, alone["results"], ranks["results"], strict=True):
        assert_same_weights(ours["weights"], theirs["weights"], atol=1e-10)
        assert theirs["losses"] == pytest.approx(ours["losses"], abs=1e-10), case
        assert theirs["confidences"] == pytest.approx(ours["confidences"], abs=1e-7), case
        for key in ("accuracies", "predictions"):
            assert theirs[key] == ours[key], case
    said = "ranks [1, 2] were started with options or data files that differ from rank 0's"
    assert ranks["messages"] == [said]
    assert len(set(ranks["masks"])) == 6  # of three ranks in two epochs

    state_file = StateFile(tmp_path / "ranks.pt.state.pt", ranks_job.SETTINGS, "resume")
    assert state_file.saved["progress"]["epoch"] == 1
    continued = ranks_job.train_case(*ranks_job.CASES[0], state_file=state_file)  # as one process
    assert_same_weights(continued["weights"], alone["results"][0]["weights"], atol=1e-10)


def test_shares_differ_by_one_row_at_most_and_together_are_all(monkeypatch):
    for size in (1, 2, 3, 5):
        for n in range(12):
            shares = []
            for rank in range(size):
                as_rank(monkeypatch, rank, rank, size)
                shares.append(distributed.shard(range(n)))
            assert sorted(row for rows in shares for row in rows) == list(range(n))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


# ---------------------------------------------------------------- the command

# run_llama.py, whose rank 1 is killed after some steps.
KILLED = """
import os, signal, sys
sys.path.insert(0, {project!r})
import run_llama
from training import loop
from utils import run_script
take_step, steps = loop.take_step, []
def dying(*given):
    take_step(*given)
    steps.append(1)
    if os.environ["RANK"] == "1" and len(steps) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
loop.take_step = dying
run_script(run_llama.main)
"""
CHECKPOINT, STATE = "finetune-toy-3-0.01.pt", "finetune-toy-3-0.01.state.pt"
OPTIONS = ["--epochs", "3", "--lr", "1e-2", "--batch_size", "3", "--hidden_dropout_prob", "0"]


def outputs() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(Path().glob("*-output.txt"))]


def test_a_killed_rank_ends_the_job_and_more_ranks_continue_it_to_what_one_process_writes(
    workplace, project
):
    command = finetune_command(*OPTIONS, project=project)
    code, expected, err = finish(start([sys.executable, *command], workplace))
    assert code == 0, err
    whole, written = load_torch_file(CHECKPOINT)["model"], outputs()
    for path in (CHECKPOINT, *Path().glob("*-output.txt")):
        Path(path).unlink()

    Path("killed.py").write_text(KILLED.format(project=str(project)), encoding="utf-8")
    code, _, err = finish(start(torchrun(2, "killed.py", *command[1:]), workplace))
    assert code and "Signal 9" in err
    assert not outputs() and not list(Path().glob(".*.tmp"))
    progress = load_torch_file(STATE)["progress"]
    assert (progress["epoch"], progress["n_batches"]) == (1, 0)

    code, printed, err = finish(start(torchrun(3, *command), workplace))
    assert code == 0, err
    assert printed.count("args: ") == 1 and "ranks: 3, device: cpu" in printed
    assert f"continue {STATE} in epoch 1 after 0 batches" in printed
    table = re.compile(r"Epoch \| Train Loss.*", re.DOTALL)
    assert table.search(printed)[0] == table.search(expected)[0]
    assert outputs() == written
    assert_same_weights(load_torch_file(CHECKPOINT)["model"], whole, atol=1e-5)
    assert not Path(STATE).exists()


def as_rank(monkeypatch, rank: int, local_rank: int, world_size: int = 4) -> None:
    values = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": world_size}
    values |= {"LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_what_one_process_does_is_not_started_as_several(workplace, monkeypatch, run):
    as_rank(monkeypatch, 0, 0)
    code, _, err = run("prompt")
    assert code == 2
    assert "--option prompt runs in one process; start it without torchrun" in err


@pytest.mark.parametrize("local_rank", [0, 1])
def test_more_ranks_than_cuda_devices_end_every_rank_and_the_first_says_so(monkeypatch, local_rank):
    as_rank(monkeypatch, 2 + local_rank, local_rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit if local_rank else InputError) as caught:  # noqa: SIM117
        with distributed.process_group(use_gpu=True):
            pass
    if local_rank == 0:
        assert "2 processes for 1 CUDA devices" in str(caught.value)


def test_only_the_first_process_of_a_machine_reports_an_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)
    for rank, local_rank in ((0, 0), (1, 1), (2, 0), (3, 1)):
        as_rank(monkeypatch, rank, local_rank)
        with pytest.raises(SystemExit if local_rank else InputError):  # noqa: SIM117
            with distributed.process_group(use_gpu=False):
                print(f"rank {rank}")
                distributed.say("a line")
                raise InputError("all of them have it")
    out, err = capsys.readouterr()
    assert out == "rank 0\n" and err.count("a line") == 1


def test_a_signal_ends_several_processes_at_once(monkeypatch):
    as_rank(monkeypatch, 0, 0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), stop_requests():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
