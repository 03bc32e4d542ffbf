"""Several real processes, started by torchrun, that train one model: what they compute, and faults.

A rank is made to differ, to be late or to die by a script that looks at its RANK.
"""

import contextlib
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import run_llama
from conftest import ROOT
from pretraining import run as pretrain
from training import distributed
from training.distributed import ALONE, Ranks

LIMIT = 300  # s, for a job that hangs

# Trains in float64 as the ranks it is started on, and leaves what it ends in.
TRAIN = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_distributed import train_all
train_all({out!r})
"""

# run_llama.py or pretraining.run, but for one rank with other arguments, or an end of its own.
CLI = """
import os, signal, sys
sys.path.insert(0, {root!r})
import cli, run_llama, training
from pretraining import loop as language_model, run as pretrain
if os.environ.get("RANK") == {rank!r}:
    sys.argv += {more!r}
    take_step, n_steps = training.take_step, 0
    def ending(*args):
        global n_steps
        take_step(*args)
        n_steps += 1
        if n_steps == {ends_after!r}:
            os.kill(os.getpid(), {signum!r})
    training.take_step = language_model.take_step = ending
if __name__ == "__main__":
    cli.run({module}.main)
"""


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in distributed.VARIABLES}
    return {**kept, "OMP_NUM_THREADS": "1"}


def torchrun(n: int, script: Path, *options: str, launcher: tuple[str, ...] = ()) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n)]
    return [*start, *(launcher or ("--standalone",)), str(script), *options]


def finish(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        timeout=LIMIT,
        env=environment(),
        check=False,
    )


def own_lines(result: subprocess.CompletedProcess) -> list[str]:
    """What run_llama.py said on standard error, without the launcher's report."""
    return [line for line in result.stderr.splitlines() if line.startswith("job.py: ")]


# ---------------------------------------------------------------- what is computed

CASES = [
    # attention, pooling, batch size (of 10 sentences), r_drop, max_grad_norm, untied
    ("full", "position", 4, 0.0, None, False),
    ("causal", "last", 4, 0.0, 0.5, False),
    ("full", "mean", 10, 0.7, None, False),
    ("causal", "mean", 1, 0.0, None, True),  # less than the ranks
]


def train_all(out: str) -> None:
    """Trains every case as the rank that this process is; the first one writes what comes out."""
    from types import SimpleNamespace

    from classifier import LlamaEmbeddingClassifier
    from conftest import random_llama
    from training.dataset import Example, SentenceDataset, make_loader
    from training.loop import Recipe, evaluate, train_classifier

    rng = torch.Generator().manual_seed(1)
    examples = [
        Example(str(i), i % 3, [1, *torch.randint(3, 320, (2 + 3 * i,), generator=rng).tolist()])
        for i in range(10)
    ]
    data, results = SentenceDataset(examples, pad_id=0), []
    with distributed.joined(use_gpu=False) as ranks:
        for attention, pooling, batch_size, r_drop, max_grad_norm, untied in CASES:
            llama = random_llama(attention=attention, scale=1.0)
            if untied:
                llama.output.weight = torch.nn.Parameter(llama.output.weight.detach().clone())
            config = SimpleNamespace(
                num_labels=3, option="finetune", hidden_dropout_prob=0.0, pooling=pooling
            )
            torch.manual_seed(2)
            model = LlamaEmbeddingClassifier(config, llama).double()
            n_passes = itertools.count()
            model.classifier_head.register_forward_hook(  # so R-Drop's two passes differ
                lambda head, _in, out, n=n_passes: out * 1.5 ** (head.training and next(n) % 2)
            )
            history = train_classifier(
                model, data, data, epochs=2, batch_size=batch_size, lr=1e-3, seed=3,
                device=torch.device("cpu"), on_epoch=lambda *_: None, ranks=ranks,
                recipe=Recipe(r_drop=r_drop, max_grad_norm=max_grad_norm),
            )  # fmt: skip
            loader = make_loader(data, batch_size, similar_lengths=model.reads_lengths)
            found = evaluate(model, loader, torch.device("cpu"), ranks=ranks)
            results.append({
                "weights": model.state_dict(),
                "losses": [report.train_loss for report in history],
                "accuracies": [[r.train_accuracy, r.dev_accuracy] for r in history],
                "predictions": found.predictions,
                "confidences": found.confidences,
                "sentences": found.sentences,
            })  # fmt: skip
        for number, micro_rows in enumerate((None, 2)):
            for is_sharded in (False, ranks.size > 1):
                folder = Path(f"{out}-{number}-{is_sharded}")
                pretrain_in(ranks, folder, 120, micro_rows, is_sharded)
                results.append(pretrain_in(ranks, folder, 200, micro_rows, is_sharded))
        pretrain_in(ranks, Path(f"{out}-begun"), 120, None, ranks.size > 1)
        if ranks.is_first:
            torch.save(results, out)


def pretrain_in(
    ranks: Ranks,
    folder: Path,
    n_tokens: int,
    micro_rows: int | None = None,
    is_sharded: bool = False,
) -> dict:
    """Steps of 5 windows over a text, in float64, until so many are read; goes on with what is in
    the folder."""
    import numpy as np

    from conftest import random_llama
    from pretraining import sharding
    from pretraining.corpus import TokenStream
    from pretraining.loop import Run, make_optimizers, train

    model = random_llama(attention="causal", scale=1.0).double()
    if is_sharded:
        sharding.shard(model, ranks)
    rng = np.random.default_rng(1)
    documents = [rng.integers(3, 320, 20 + 7 * i, dtype=np.int32) for i in range(6)]
    settings = {"batch_tokens": 40, "seq_len": 8, "warmup": 2, "decay_from": 1.0}
    settings |= {"max_grad_norm": 1.0, "bf16": False}
    folder.mkdir(exist_ok=True)
    run = Run(
        folder, model, make_optimizers(model, "adamw", 1e-2, 0.0, 0.1),
        TokenStream(documents, 8, seed=4), [], settings, False, ranks, micro_rows,
    )  # fmt: skip
    if ranks.of_first((folder / "state.pt").exists())[0]:
        run.load()
    run.budget["tokens"] = n_tokens
    train(run, torch.device("cpu"), 99.0, 99.0)
    losses = [row["train_loss"] for row in run.history]
    weights = sharding.whole_weights(model)
    return {"weights": weights, "losses": losses, "confidences": [run.step]}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ranks_end_in_the_weights_and_figures_of_one_process(tmp_path, n):
    train_all(str(tmp_path / "alone.pt"))
    job = tmp_path / "job.py"
    names = {"root": str(ROOT), "tests": str(ROOT / "tests"), "out": str(tmp_path / "ranks.pt")}
    job.write_text(TRAIN.format(**names), encoding="utf-8")
    result = finish(torchrun(n, job))
    assert result.returncode == 0, result.stderr
    alone, ranks = (torch.load(tmp_path / f"{k}.pt", weights_only=True) for k in ("alone", "ranks"))
    cases = [*CASES, "pretraining", "sharded", "in micro-batches", "sharded in micro-batches"]
    assert_same(alone[-1]["weights"], alone[-3]["weights"], "micro-batches alone")
    resumed = pretrain_in(ALONE, tmp_path / "ranks.pt-begun", 200)  # with another number of ranks
    assert_same(resumed["weights"], alone[-4]["weights"], "resumed alone")
    assert not list((tmp_path / "ranks.pt-begun").glob("state-*"))
    for case, ours, theirs in zip(cases, alone, ranks, strict=True):
        assert_same(ours["weights"], theirs["weights"], case)
        assert theirs["losses"] == pytest.approx(ours["losses"], abs=1e-10)
        assert theirs["confidences"] == pytest.approx(ours["confidences"], abs=1e-10)
        for key in ("accuracies", "predictions", "sentences"):
            assert theirs.get(key) == ours.get(key), (case, key)


def assert_same(ours: dict, theirs: dict, case: object) -> None:
    for name, weight in ours.items():
        assert (weight - theirs[name]).abs().max().item() <= 1e-10, (case, name)


def test_shares_differ_by_one_row_at_most_and_together_are_all():
    for size in (1, 2, 3, 5):
        for n in range(12):
            shares = [Ranks(rank, size).rows(n) for rank in range(size)]
            assert sorted(row for share in shares for row in share) == list(range(n))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_exchanged_or_changed(monkeypatch):
    for name in distributed.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    model = torch.nn.Linear(2, 2)
    with distributed.joined(use_gpu=False) as ranks:
        assert ranks is ALONE
        assert ranks.wrap(model, has_unused=False) is model
        assert ranks.sum(1.5, 2) == [1.5, 2.0]
        assert ranks.gather(b"x") == [b"x"]
        before = torch.get_rng_state()
        ranks.seed_apart(1)
        assert torch.equal(torch.get_rng_state(), before)
    assert not torch.distributed.is_initialized()


def test_ranks_draw_other_numbers_and_the_first_one_those_of_a_single_process():
    draws = []
    for rank in range(3):
        torch.manual_seed(7)
        Ranks(rank, 3).seed_apart(7)
        draws.append(tuple(torch.rand(4).tolist()))
    torch.manual_seed(7)
    assert draws[0] == tuple(torch.rand(4).tolist())
    assert len(set(draws)) == 3


# ---------------------------------------------------------------- the command


@pytest.fixture
def job(workplace: Path, run):
    """job(n, *options, ...) finetunes on the workplace's files by n ranks."""

    def start(n, *options, rank="", more=(), ends_after=0, signum=0, launcher=()) -> list[str]:
        script = workplace / "job.py"
        names = {"root": str(ROOT), "rank": rank, "more": list(more)}
        script.write_text(
            CLI.format(**names, ends_after=ends_after, signum=int(signum), module="run_llama"),
            encoding="utf-8",
        )
        argv = ["--option", "finetune", "--train", "toy-train.txt", "--dev", "toy-dev.txt"]
        argv += ["--test", "toy-test.txt", "--label-names", "labels.json", "--epochs", "3"]
        argv += ["--pretrained-model-path", "model.pt", "--lr", "1e-2", "--batch_size", "3"]
        argv += ["--dev_out", "toy-dev-finetuning-output.txt"]
        argv += ["--test_out", "toy-test-finetuning-output.txt", *options]
        return torchrun(n, script, *argv, launcher=launcher)

    return start


CHECKPOINT, STATE = "finetune-toy-3-0.01.pt", "finetune-toy-3-0.01.state.pt"


def weights() -> dict[str, torch.Tensor]:
    return torch.load(CHECKPOINT, weights_only=True)["model"]


def outputs() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(Path().glob("*-output.txt"))]


def test_two_ranks_print_and_write_once_what_one_process_prints_and_writes(job, run, workplace):
    options = ["--hidden_dropout_prob", "0"]
    argv = ["--epochs", "3", "--lr", "1e-2", "--batch_size", "3", *options]
    code, expected, _ = run("finetune", *argv)
    assert code == 0
    ours, written = weights(), outputs()
    Path(CHECKPOINT).unlink()
    result = finish(job(2, *options))
    assert result.returncode == 0, result.stderr
    lines = [re.sub("^ranks: 2, ", "", line) for line in result.stdout.splitlines()]
    assert [line for line in lines if not line.startswith("args: ")] == [
        line for line in expected.splitlines() if not line.startswith("args: ")
    ]
    assert outputs() == written
    for name, weight in weights().items():
        torch.testing.assert_close(weight, ours[name], atol=1e-5, rtol=0)
    assert not Path(STATE).exists()


def test_two_nodes_on_this_machine(job, workplace):
    port = free_port()
    nodes = []
    for node in (0, 1):
        where = ("--nnodes", "2", "--node-rank", str(node), "--master-port", str(port))
        command = job(1, launcher=(*where, "--master-addr", "127.0.0.1"))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        nodes.append(subprocess.Popen(command, env=environment(), **pipes))
    said = [node.communicate(timeout=LIMIT) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "ranks: 2, " in said[0][0]
    assert said[1][0] == ""
    assert len(outputs()) == 2


def free_port() -> int:
    """Below those that the system hands out, so that none does so before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as listening:
            listening.bind(("127.0.0.1", port))
            return port


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seed", "5"], ["rank 1 was started otherwise than rank 0", "seed: 1337 on rank 0, 5"]),
        (["--train", "other.txt"], ["rank 1 was started otherwise", "train_sha256"]),
        (["--dev", "absent.txt"], ["rank 1: absent.txt: no such file"]),
    ],
)
def test_ranks_that_differ_are_told_before_training(job, workplace, more, words):
    other = Path("toy-train.txt").read_text(encoding="utf-8").replace("warm", "cold")
    Path("other.txt").write_text(other, encoding="utf-8")
    result = finish(job(2, rank="1", more=more))
    assert result.returncode != 0
    (line,) = own_lines(result)
    for word in words:
        assert word in line
    assert not Path(CHECKPOINT).exists()
    assert not outputs()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_rank_ends_the_job_with_nothing_in_pieces_and_other_ranks_go_on(
    job, workplace, rank
):
    result = finish(job(2, rank=rank, ends_after=5, signum=signal.SIGKILL))
    assert result.returncode != 0
    if rank == "1":
        (line,) = own_lines(result)
        assert "another process of this run ended" in line
        assert "--resume" in line
    assert not list(Path().glob(".*.tmp"))
    assert not outputs()
    kept = torch.load(STATE, weights_only=True)["place"]
    assert (kept["epoch"], kept["n_batches"]) == (1, 0)
    n = 3 if rank == "1" else 1
    result = finish(job(n, "--resume"))
    assert result.returncode == 0, result.stderr
    assert "resume finetune-toy-3-0.01.state.pt in epoch 1, behind 0 batches" in result.stdout
    assert len(outputs()) == 2


# One process, to which torchrun's SIGTERM comes while it is about to say that another was lost.
LOST = """
import os, signal, sys
sys.path.insert(0, {root!r})
import cli, distributed
def main():
    with distributed.joined(use_gpu=False):
        try:
            with distributed._peers():
                raise RuntimeError("[gloo] Connection closed by peer")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
cli.run(main)
"""


def test_the_signal_that_follows_a_lost_rank_does_not_hide_it():
    where = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    result = subprocess.run(
        [sys.executable, "-c", LOST.format(root=str(ROOT))],
        capture_output=True,
        encoding="utf-8",
        timeout=LIMIT,
        env={**environment(), **where, "MASTER_PORT": str(free_port())},
        check=False,
    )
    assert result.returncode == 2
    assert "another process of this run ended" in result.stderr
    assert "terminated" not in result.stderr


def test_a_signal_to_one_rank_stops_all_and_resumed_they_end_in_the_same_weights(job, workplace):
    assert finish(job(2)).returncode == 0  # with dropout, of other masks on each rank
    expected, written = weights(), outputs()
    Path(CHECKPOINT).unlink()
    result = finish(job(2, rank="1", ends_after=5, signum=signal.SIGTERM))
    assert result.returncode != 0
    (line,) = own_lines(result)
    assert "terminated" in line
    place = torch.load(STATE, weights_only=True)["place"]
    assert (place["epoch"], place["n_batches"]) == (1, 2)
    assert finish(job(2, "--resume")).returncode == 0
    assert outputs() == written
    for name, weight in weights().items():
        assert torch.equal(weight, expected[name]), name


def test_a_sharded_pretraining_whose_rank_was_killed_goes_on_with_other_ranks_unsharded(
    workplace, monkeypatch
):
    rng = random.Random(1)
    words = ["this", "film", "movie", "story", "is", "a", "good", "bad", "warm", "her", "heart"]
    text = "\n".join(" ".join(rng.choices(words, k=30)) for _ in range(40))
    Path("text.txt").write_text(text, encoding="utf-8")
    argv = ["--text", "text.txt", "--init", "model.pt", "--heldout", "3", "--lr", "1e-3"]
    argv += ["--batch_tokens", "160", "--seq_len", "32", "--tokens", "1600", "--warmup", "2"]
    for name in distributed.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    pretrain.main([*argv, "--out", "alone"])

    def start(n: int, *options: str, ends_after: int = 0) -> subprocess.CompletedProcess:
        names = {"root": str(ROOT), "rank": "1", "more": [], "module": "pretrain"}
        script = CLI.format(**names, ends_after=ends_after, signum=int(signal.SIGKILL))
        Path("job.py").write_text(script, encoding="utf-8")
        return finish(torchrun(n, Path("job.py"), *argv, "--out", "ranks", *options))

    result = start(2, "--shard", "--save_minutes", "0", ends_after=6)
    assert result.returncode != 0
    (line,) = own_lines(result)
    assert "another process of this run ended" in line
    kept = torch.load("ranks/state.pt", weights_only=True)
    assert 4 <= kept["step"] <= 6
    assert sorted(path.name for path in Path("ranks").glob("state-*")) >= kept["shards"]
    assert not list(Path("ranks").glob(".*.tmp"))
    result = start(3, "--resume")
    assert result.returncode == 0, result.stderr
    assert f"resumed at step {kept['step']}" in result.stdout
    alone, ranks = (
        torch.load(f"{folder}/model.pt", weights_only=True)["model"]
        for folder in ("alone", "ranks")
    )
    assert alone.keys() == ranks.keys()
    for name, weight in alone.items():
        torch.testing.assert_close(ranks[name], weight, atol=2e-4, rtol=0)
    assert not list(Path("ranks").glob("state-*"))


def test_what_one_process_does_is_not_started_as_several(workplace, monkeypatch, run):
    for name, value in zip(distributed.VARIABLES, ("0", "2", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    code, _, err = run("prompt")
    assert code == 2
    assert "--option prompt runs in one process; start it without torchrun" in err


@pytest.mark.parametrize(
    ("rank", "local_rank", "says"), [("0", "0", True), ("1", "1", False), ("2", "0", True)]
)
def test_more_ranks_than_cuda_devices_are_one_line_of_each_machine(
    workplace, monkeypatch, run, rank, local_rank, says
):
    for name, value in zip(distributed.VARIABLES, (rank, "4", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, _, err = run("finetune", "--use_gpu")
    assert code == 2
    words = "processes on this machine: 2, CUDA devices: 1; each takes a device of its own"
    assert [words in line for line in err.splitlines()] == [True] * says


def test_a_port_in_use_is_one_line(workplace, monkeypatch, run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in zip(distributed.VARIABLES, ("0", "2", "127.0.0.1", port), strict=True):
            monkeypatch.setenv(name, value)
        code, _, err = run("finetune")
    assert code == 2
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert f"rank 0 of 2 cannot meet the others at 127.0.0.1:{port}" in line


def test_a_rank_that_does_not_come_is_one_line(workplace, monkeypatch, run):
    monkeypatch.setattr(distributed, "PATIENCE", distributed.timedelta(seconds=2))
    values = ("0", "2", "127.0.0.1", str(free_port()))
    for name, value in zip(distributed.VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)
    code, _, err = run("finetune")
    assert code == 2
    assert "rank 0 of 2 cannot meet the others" in err
    assert not torch.distributed.is_initialized()
    assert run_llama.distributed.is_launched()
