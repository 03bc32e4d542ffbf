"""Language-model training: the objective by an oracle, a run by its files, resumption by bits."""

import csv
import itertools
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import oracle
from classifier import LlamaZeroShotClassifier, prompt_suffix
from conftest import ROOT, ended, random_llama, save_llama, shared_asset
from formats.torch_file import load_torch_file
from helpers import assert_same_weights, error_line, finish, start, torchrun, wait_for
from llama import Llama, load_pretrained
from pretraining import loop, run
from pretraining.batches import Row
from pretraining.corpus import encode_documents, read_documents
from pretraining.loop import (
    HeldOut,
    Recipe,
    add_gradients,
    make_optimizers,
    token_losses,
    train_language_model,
)
from pretraining.rated import Example, encode_examples
from tokenizer import Tokenizer
from training import distributed
from training.labeled import read_sentences
from training.loop import DivergedError
from training.state import StateFile

TEXTS = ["this film is good", "a warm\nfilm, é!", "bad", "the story was a good story"]
SHAPE = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 40}
SHAPE |= {"vocab_size": 300, "max_seq_len": 24}
MINI = ROOT / "data/mini/model.pt"
OPTIONS = {"seq_len": 16, "batch_tokens": 64, "heldout": 5, "warmup": 4, "lr": 0.005}


def as_options(options: dict) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def write_tales(path: Path, n: int = 80) -> str:
    rng = random.Random(1)
    nouns, verbs = ["cat", "dog", "film", "story"], ["saw", "liked", "met"]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(n):
            parts = [(rng.choice(nouns), rng.choice(verbs), rng.choice(nouns)) for _ in range(3)]
            print("\\n".join("The {} {} a {}.".format(*part) for part in parts), file=file)
    return str(path)


def history(folder: Path) -> list[dict[str, float]]:
    with open(folder / "history.csv", newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_torch_file(folder / "model.pt")["model"]


@pytest.fixture(scope="module")
def tales(tmp_path_factory) -> str:
    return write_tales(tmp_path_factory.mktemp("tales") / "tales.txt")


@pytest.fixture(autouse=True, scope="module")
def memory_of_the_other_tests() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "keep_freed_memory", lambda: None)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tales) -> Path:
    """The folder of a run that was evaluated after each of its 40 steps."""
    folder = tmp_path_factory.mktemp("finished")
    options = as_options({**SHAPE, **OPTIONS, "tokens": "2.5K", "eval_minutes": 0})
    run.main(["--text", tales, "--out", str(folder), *options])
    return folder


@pytest.fixture
def call(tales, tmp_path, capsys) -> Callable[..., tuple[int, str, str]]:
    """call(...) trains on `tales` into `tmp_path/out`; returns exit code, output and error."""

    def call(*options: object) -> tuple[int, str, str]:
        argv = ["--text", tales, "--out", tmp_path / "out", *as_options(OPTIONS)]
        argv += [] if "--init" in options else as_options(SHAPE)
        return ended(lambda: run.main([str(word) for word in [*argv, *options]]), capsys)

    return call


# ---------------------------------------------------------------- the objective


def exact_losses(model: Llama, tokens: list[int]) -> np.ndarray:
    """-log p(x_t | x_<t) for t = 1, 2, ... by the float64 model."""
    logits, _ = oracle.forward(model.state_dict(), model.config, [tokens[:-1]])
    return -np.log(oracle.softmax(logits[0])[np.arange(len(tokens) - 1), tokens[1:]])


def test_the_loss_is_the_weighted_mean_loss_whatever_the_passes():
    model = random_llama(attention="causal")
    rng = torch.Generator().manual_seed(1)
    rows = [
        Row(torch.randint(3, 320, (n,), generator=rng), torch.rand(n, generator=rng) * 9)
        for n in (10, 8, 3)
    ]
    expected = [exact_losses(model, row.ids.tolist()) for row in rows]
    weights = np.concatenate([row.weights[1:] for row in rows])
    mean = np.average(np.concatenate(expected), weights=weights)
    gradients = []
    for micro_tokens in (1, 18, 100):
        model.zero_grad()
        assert add_gradients(model, rows, micro_tokens) == pytest.approx(mean, rel=1e-5)
        gradients.append(model.norm.weight.grad.clone())
    change = torch.randn(model.config.dim, generator=rng)
    torch.testing.assert_close(gradients[1:], [gradients[0]] * 2)

    def mean_at(distance: float) -> float:
        moved = random_llama(attention="causal").double()
        with torch.no_grad():
            moved.norm.weight += distance * change
        losses = torch.cat([token_losses(moved, row.ids[None])[0] for row in rows])
        return np.average(losses.detach(), weights=weights)

    slope = (mean_at(1e-4) - mean_at(-1e-4)) / 2e-4
    assert (gradients[0] * change).sum().item() == pytest.approx(slope, rel=1e-3)


def test_held_out_text_is_measured_per_token_and_byte_whatever_batch_and_mode(tokenizer):
    model = random_llama(attention="causal", dropout=0.5)
    ids = [token for text in TEXTS for token in tokenizer.encode(text, bos=True, eos=False)]
    ids.append(tokenizer.bos_id)  # which ends the last document
    nats = sum(exact_losses(model, ids[i : i + 9]).sum() for i in range(0, len(ids) - 1, 8))
    n_bytes = len(("\n".join(TEXTS) + "\n").encode())
    expected = {"x nats/token": nats / (len(ids) - 1), "x bits/byte": nats / np.log(2) / n_bytes}
    heldout = HeldOut.texts("x", TEXTS, tokenizer, seq_len=8)
    for max_tokens, training in ((1, True), (24, False), (800, True)):
        measured = heldout.measure(model.train(training), max_tokens)
        assert measured == pytest.approx(expected, rel=1e-5)
        assert model.training is training


def test_of_held_out_examples_the_answers_alone_are_measured(tokenizer):
    model = random_llama(attention="causal")
    pairs = [("a warm film. So?", "good"), ("Is it bad or good? It is", "bad film")]
    examples = [Example(*pair) for pair in pairs]
    for seq_len in (60, 8):  # whole, or bos and the end
        nats = 0.0
        for ids, n in encode_examples(tokenizer, examples):
            ids = ids.tolist()
            short = ids if len(ids) <= seq_len + 1 else [ids[0], *ids[-seq_len:]]
            assert (short == ids) == (seq_len == 60)
            nats += exact_losses(model, short)[-n:].sum()
        heldout = HeldOut.answers("x", examples, tokenizer, seq_len)
        assert heldout.measure(model, 40) == pytest.approx({"x nats/answer": nats / 2}, rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizers_have_every_parameter_once_and_norms_do_not_decay(name):
    model = random_llama()
    model.output.weight = torch.nn.Parameter(model.output.weight.detach().clone())  # untied
    optimizers = make_optimizers(model, Recipe(optimizer=name, weight_decay=0.3))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    decay = {parameter: g["weight_decay"] for g in groups for parameter in g["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay)
    assert decay == {p: 0.0 if "norm" in name else 0.3 for name, p in model.named_parameters()}
    if name == "muon":  # the matrices of the layers alone
        by_muon = {p for group in optimizers[1].param_groups for p in group["params"]}
        assert by_muon == {p for layer in model.layers for p in layer.parameters() if p.ndim == 2}


# ---------------------------------------------------------------- a whole run


def test_a_run_leaves_a_causal_tied_float32_model_and_its_tokenizer(finished):
    assert visible(finished) == ["history.csv", "model.pt", "tokenizer.model"]
    model = load_pretrained(finished / "model.pt")
    config = model.config.to_dict()
    assert {name: config[name] for name in SHAPE} == SHAPE
    assert model.config.attention == "causal"
    assert model.output.weight is model.tok_embeddings.weight
    assert {tensor.dtype for tensor in weights_of(finished).values()} == {torch.float32}
    assert Tokenizer(tokenizer_model=finished / "tokenizer.model").n_words == 300


def test_the_history_follows_the_schedule_and_ends_with_what_the_model_gives(finished, tales):
    rows, n = history(finished), math.ceil(2500 / 64)
    assert [row["step"] for row in rows] == list(range(1, n + 1))
    assert [row["tokens"] for row in rows] == [64 * row["step"] for row in rows]
    for i, row in enumerate(rows):
        factor = min((i + 1) / 4, 1) * min((1 - i / n) / (1 - 0.4), 1)
        assert row["lr_factor"] == pytest.approx(factor, abs=1e-4)
    for key in ("tales nats/token", "train_loss"):
        assert rows[-1][key] < rows[0][key] - 0.5
    tokenizer = Tokenizer(tokenizer_model=finished / "tokenizer.model")
    heldout = HeldOut.texts("tales", read_documents(tales)[::16], tokenizer, 16)  # 5 of 80
    measured = heldout.measure(load_pretrained(finished / "model.pt"), 32)
    assert len(measured) == 2
    assert {key: rows[-1][key] for key in measured} == pytest.approx(measured, abs=2e-4)


@pytest.mark.parametrize(("micro", "n_rows"), [([], 4), (["--micro_tokens", 32], 2)])
def test_no_pass_takes_more_windows_than_asked_for(call, monkeypatch, micro, n_rows):
    seen = set()

    def spy(model, batch):
        seen.add(len(batch))
        return token_losses(model, batch)

    monkeypatch.setattr(loop, "token_losses", spy)
    assert call("--tokens", 128, *micro)[0] == 0
    assert max(seen) == n_rows


def test_an_epoch_reads_a_file_as_often_as_it_is_named(call, tmp_path, tales):
    rated = write_reviews(tmp_path / "rated.tsv", 50)
    data = ["--text", tales, tales, "--rated", rated, rated, "--passages", 1]
    code, printed, error = call(*data, "--vocab_size", 310)
    assert code == 0, error
    tokenizer = Tokenizer(tokenizer_model=tmp_path / "out" / "tokenizer.model")
    n_answers = 2 * 2 * (50 - 5)
    assert f" tokens, {n_answers} answers" in printed
    train = [text for i, text in enumerate(read_documents(tales)) if i % 16]  # 5 of 80 held out
    n_targets = 2 * sum(map(len, encode_documents(tokenizer, train))) - 1
    n_targets += 16 * n_answers  # each is longer than a window and shortened to one
    assert history(tmp_path / "out")[-1]["step"] == n_targets // 64


def test_minutes_end_a_run_and_the_schedule_follows_the_clock(call, tmp_path, monkeypatch):
    n_steps, take_step = itertools.count(1), loop.take_step
    clock = SimpleNamespace(monotonic=lambda: 0.0)
    monkeypatch.setattr(loop, "time", clock)

    def in_a_tenth_of_a_second(*args):
        seconds = 0.1 * next(n_steps)
        clock.monotonic = lambda: seconds
        take_step(*args)

    monkeypatch.setattr(loop, "take_step", in_a_tenth_of_a_second)
    assert call("--tokens", "100M", "--minutes", 0.02, "--eval_minutes", 0)[0] == 0
    rows = history(tmp_path / "out")
    assert len(rows) == 12  # in 1.2 s
    for row in rows[4:]:
        factor = min((1 - (row["step"] - 1) / 12) / (1 - 0.4), 1)
        assert row["lr_factor"] == pytest.approx(factor, abs=1e-4)


def test_bfloat16_trains_alike_and_keeps_float32_weights(call, tmp_path, finished):
    assert call("--tokens", 2500, "--eval_minutes", 0, "--bf16")[0] == 0
    ours, theirs = (
        [row["tales nats/token"] for row in history(folder)]
        for folder in (tmp_path / "out", finished)
    )
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.03)
    assert {tensor.dtype for tensor in weights_of(tmp_path / "out").values()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_bfloat16_trains_like_the_cpu(call, tmp_path, finished):
    code, printed, _ = call("--tokens", 2500, "--eval_minutes", 0, "--use_gpu")
    assert code == 0 and "device: cuda:0, bf16: True" in printed
    last = history(tmp_path / "out")[-1]["train_loss"]
    assert last == pytest.approx(history(finished)[-1]["train_loss"], rel=0.05)


def write_reviews(path: Path, n: int = 900) -> str:
    rng = random.Random(2)
    pairs = ("dull flat", "weak long", "plain fair", "neat warm", "rich vivid")
    words = [pair.split() for pair in pairs]
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n):
            print(f"{i % 5 / 4}\tFilm {i} was {rng.choice(words[i % 5])}.", file=file)
    return str(path)


def test_ratings_teach_a_model_to_answer_in_words(tmp_path, capsys):
    rated, out = write_reviews(tmp_path / "rated.tsv"), tmp_path / "out"
    shape = {**SHAPE, "dim": 64, "n_layers": 2, "vocab_size": 420, "max_seq_len": 128}
    recipe = {"seq_len": 64, "batch_tokens": 512, "heldout": 7, "warmup": 4, "lr": 0.004}
    recipe |= {"tokens": "150K", "passages": 3, "answer_weight": 10}
    run.main(["--rated", f"film={rated}", "--out", str(out), *as_options({**shape, **recipe})])
    before, after = (
        float(re.search(r"rated (\S+) nats/answer", line)[1])
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("before: ", "step "))
    )
    assert after < before / 2

    heldout = read_sentences(out / "rated-heldout.txt", n_labels=5)
    reviews = [line.split("\t") for line in Path(rated).read_text(encoding="utf-8").splitlines()]
    chosen = [reviews[i * 900 // 7] for i in range(7)]
    assert heldout == [(text, int(4 * float(rating))) for rating, text in chosen]

    model, words = load_pretrained(out / "model.pt"), ["bad", "good"]
    tokenizer = Tokenizer(tokenizer_model=out / "tokenizer.model")
    classifier = LlamaZeroShotClassifier(SimpleNamespace(num_labels=2), tokenizer, words, model)
    question = prompt_suffix(words, "film").rstrip()
    for label, word in enumerate(("dull", "vivid")):
        prompt = tokenizer.encode(f"Film 5 was {word}. {question}", bos=True, eos=False)
        assert classifier(torch.tensor([prompt])).argmax().item() == label


# ---------------------------------------------------------------- several ranks

RANKS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}, {here!r}]
from test_pretrain import train_in_float64
train_in_float64({out!r})
"""


def train_in_float64(out: str) -> None:
    """Train on 40 tokens a step, in one pass or several, then on 8, as one of the ranks."""
    rng = np.random.default_rng(1)
    documents = [rng.integers(3, 320, 20 + 7 * i, dtype=np.int32) for i in range(6)]
    examples = [(documents[i], n) for i, n in ((0, 2), (2, 5), (4, 1), (5, 9))]
    bytes_as_ids = SimpleNamespace(bos_id=1, encode=lambda text, **_: [1, *text.encode()])
    heldout = HeldOut.texts("x", TEXTS, bytes_as_ids, 8)
    results = []
    with distributed.process_group(use_gpu=False):
        for number, (n_rows, micro_rows) in enumerate([(5, None), (5, 2), (5, 1), (1, None)]):
            folder = Path(f"{out}-{number}")
            folder.mkdir(exist_ok=True)
            model = random_llama(attention="causal", scale=1.0).double()
            recipe = Recipe(
                tokens=80, seq_len=8, batch_tokens=8 * n_rows, lr=1e-2, warmup=2, answer_weight=7.0
            )
            train_language_model(
                model, documents[1:4:2], [heldout], folder, recipe,
                state_file=StateFile(folder / "state.pt", {}),
                micro_tokens=micro_rows and 8 * micro_rows, examples=examples,
            )  # fmt: skip
            measured = torch.tensor([*heldout.measure(model, 2).values()], dtype=torch.float64)
            results.append({"measured": measured, **model.state_dict()})
        if distributed.is_main():
            torch.save(results, out)


def test_ranks_and_micro_batches_end_in_the_weights_of_one_process(tmp_path):
    train_in_float64(str(tmp_path / "alone.pt"))
    job, here = tmp_path / "job.py", Path(__file__).parent
    names = {"root": str(ROOT), "tests": str(ROOT / "tests"), "here": str(here)}
    job.write_text(RANKS.format(**names, out=str(tmp_path / "ranks.pt")), encoding="utf-8")
    code, _, error = finish(start(torchrun(2, job), tmp_path))
    assert code == 0, error
    *alone, few = torch.load(tmp_path / "alone.pt", weights_only=True)
    *ranks, few_of_ranks = torch.load(tmp_path / "ranks.pt", weights_only=True)
    assert_same_weights(few_of_ranks, few, atol=1e-10)
    for result in [*alone[1:], *ranks]:
        assert_same_weights(result, alone[0], atol=1e-10)


# ---------------------------------------------------------------- interrupted and continued


def test_a_killed_run_ends_by_the_same_command_in_the_same_bits(tmp_path, tokenizer_file):
    text = write_tales(tmp_path / "tales.txt", 30)  # so that there are several epochs
    init = save_llama(random_llama(scale=1.0, dropout=0.2), tmp_path / "init.pt")
    options = ["--text", text, "--init", str(init), "--tokenizer_path", str(tokenizer_file)]
    options += [*as_options(OPTIONS), "--tokens", str(64 * 80), "--optimizer", "muon"]
    whole, cut, state = tmp_path / "whole", tmp_path / "cut", tmp_path / "cut" / "state.pt"

    def started(out: Path, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "pretraining.run", "--out", str(out), *options, *more]
        return start(command, ROOT)

    assert finish(started(whole))[0] == 0
    process = started(cut, "--save_minutes", "0")
    wait_for(lambda: state.exists() and load_torch_file(state)["progress"]["step"] >= 5, process)
    process.kill()
    assert finish(process)[0] < 0
    assert 5 <= load_torch_file(state)["progress"]["step"] < 80
    so_far = load_pretrained(state)  # a state is a checkpoint of the model so far
    assert so_far.config.attention == "causal"
    assert finish(started(cut))[0] == 0

    assert_same_weights(weights_of(cut), weights_of(whole))
    ends = history(cut)[-1], history(whole)[-1]
    assert {**ends[0], "minutes": 0} == {**ends[1], "minutes": 0}
    assert visible(cut) == ["history.csv", "model.pt", "tokenizer.model"]


def stop_after(n_steps: int, monkeypatch) -> None:
    """SIGTERM comes during a step."""
    calls, take_step = itertools.count(1), loop.take_step

    def stop(*args):
        if next(calls) == n_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        take_step(*args)

    monkeypatch.setattr(loop, "take_step", stop)


def test_a_stopped_run_continues_by_the_same_command(call, tmp_path, finished, monkeypatch):
    stop_after(7, monkeypatch)
    command = ["--tokens", 2500, "--eval_minutes", 0]
    code, _, error = call(*command)
    assert code == 143 and "terminated; the same command continues" in error
    assert not (tmp_path / "out" / "model.pt").exists()
    code, printed, _ = call(*command, "--half")  # which the weights in training do not see
    assert code == 0 and "state.pt at step 7\n" in printed
    assert [row["step"] for row in history(tmp_path / "out")] == list(range(1, 41))
    half, full = weights_of(tmp_path / "out"), weights_of(finished)
    assert all(torch.equal(half[name], full[name].half()) for name in full)


@pytest.mark.parametrize(
    ("changed", "words"),
    [(["--lr", 0.004], "lr: saved 0.005, now 0.004"), (["--heldout", 6], "text_sha256")],
)
def test_another_run_begins_anew_and_keeps_the_old_state(
    call, tmp_path, monkeypatch, changed, words
):
    stop_after(7, monkeypatch)
    assert call("--tokens", 2500)[0] == 143
    out = tmp_path / "out"
    state, tokenizer = ((out / name).read_bytes() for name in ("state.pt", "tokenizer.model"))
    code, _, error = call("--tokens", 2500, *changed, "--resume")
    assert code == 2 and words in error and error.count("\n") == 1
    code, printed, error = call("--tokens", 2500, *changed)
    assert code == 0 and words in error and "before: " in printed
    assert (out / "state.old.pt").read_bytes() == state
    assert (out / "tokenizer.old.model").read_bytes() == tokenizer


def test_what_is_in_the_folder_is_replaced_only_by_restart(call, tmp_path):
    out = tmp_path / "out"
    assert call("--tokens", 64)[0] == 0
    files = {path: path.read_bytes() for path in out.iterdir()}
    for more in ([], ["--lr", 0.1], ["--resume"]):
        error = error_line(call("--tokens", 64, *more))
        assert "already holds model.pt, tokenizer.model, history.csv" in error
    error = error_line(call("--tokens", 64, "--init", out / "model.pt", "--restart"))
    assert "is an input and would be replaced" in error
    assert {path: path.read_bytes() for path in out.iterdir()} == files
    assert call("--tokens", 64, "--lr", 0.1, "--restart")[0] == 0
    assert (out / "model.old.pt").read_bytes() == files[out / "model.pt"]

    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.model").write_text("of another program", encoding="utf-8")
    error = error_line(call("--out", other))
    assert "already holds tokenizer.model; name another --out" in error
    assert visible(other) == ["tokenizer.model"]


def test_a_run_that_ends_before_it_has_a_state_leaves_nothing(call, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "encode_documents", interrupted)
        assert call("--tokens", 64)[0] == 130
    assert visible(tmp_path / "out") == []
    assert call("--tokens", 64)[0] == 0


def test_divergence_is_an_error_of_its_own_and_leaves_the_last_state(tales, tmp_path, monkeypatch):
    calls, original = itertools.count(1), loop.add_gradients
    monkeypatch.setattr(
        loop, "add_gradients", lambda *args: original(*args) * (math.inf if next(calls) == 9 else 1)
    )
    options = as_options({**SHAPE, **OPTIONS, "tokens": 2500, "save_minutes": 0})
    with pytest.raises(DivergedError, match=r"^step 9, at .* the loss is inf; lower --lr"):
        run.main(["--text", tales, "--out", str(tmp_path), *options])
    state = load_torch_file(tmp_path / "state.pt")
    assert state["progress"]["step"] == 8
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


# ---------------------------------------------------------------- from a checkpoint


def test_the_first_step_from_a_checkpoint_is_as_long_as_adams(call, tmp_path, finished):
    assert call("--init", finished / "model.pt", "--tokens", 64, "--lr", 1e-4, "--seed", 3)[0] == 0
    ours, theirs = (f / "tokenizer.model" for f in (tmp_path / "out", finished))
    assert ours.read_bytes() == theirs.read_bytes()
    ours, theirs = (load_pretrained(f / "model.pt") for f in (tmp_path / "out", finished))
    assert ours.config == theirs.config
    for name, weight in theirs.state_dict().items():
        change = (ours.state_dict()[name] - weight).abs().max().item()
        # m / sqrt(v) is +-1 then, the first of 4 steps of warm-up has a quarter of the rate
        assert change == pytest.approx(1e-4 / 4, rel=0.3), name


def test_a_deeper_model_repeats_the_layers_and_without_their_output_is_the_same_model():
    model = random_llama(attention="causal")
    n_old = model.config.n_layers
    deep = run.deepen(model, 2 * n_old + 1)
    assert deep.config.n_layers == len(deep.layers) == 2 * n_old + 1
    for i, layer in enumerate(deep.layers):
        torch.testing.assert_close(
            layer.state_dict(), model.layers[i % n_old].state_dict(), rtol=0, atol=0
        )
    assert deep.output.weight is deep.tok_embeddings.weight
    tokens = torch.randint(3, 320, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for layer in deep.layers[n_old:]:
            layer.attention.compute_output.weight.zero_()
            layer.feed_forward.w2.weight.zero_()
    torch.testing.assert_close(deep(tokens, targets=tokens)[0], model(tokens, targets=tokens)[0])


def test_training_on_its_kind_of_text_improves_a_published_model(call, tmp_path):
    model = shared_asset("models/stories260K/stories260K.pt")
    stories = read_documents(shared_asset("text/tinystories.txt.xz"))[:150]
    text = tmp_path / "stories.txt"
    text.write_text("\n".join(story.replace("\n", "\\n") for story in stories), encoding="utf-8")
    options = {"text": text, "init": model, "seq_len": 128, "batch_tokens": 1024, "lr": 1e-4}
    options |= {"tokens": 12 * 1024, "warmup": 2, "decay_from": 0, "heldout": 15}
    code, printed, _ = call(*as_options(options))
    assert code == 0
    before, after = (
        float(line.rsplit("; stories ", 1)[1].split()[0])
        for line in printed.splitlines()
        if line.startswith(("before: ", "step "))
    )
    assert after < before < 2


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt: no such text file"),
        (["--text", "a/films.txt", "b/films.txt"], "two files are called films; rename one"),
        (["--rated", "place=nowhere.tsv"], "nowhere.tsv: no such text file"),
        (["--batch_tokens", 15], "--batch_tokens 15 is less than --seq_len 16"),
        (["--seq_len", 32], "--seq_len 32 exceeds max_seq_len 24"),
        (["--heldout", 80], "tales.txt: --heldout 80 of 80 documents leaves none"),
        (["--vocab_size", 100], "--vocab_size 100"),
        (["--vocab_size", 9999], "--vocab_size 9999"),
        (["--tokens", "many"], "--tokens: 'many' is not a count"),
        (["--dim", 30], "dim=30 is not divisible by n_heads=4"),
        (["--tokenizer_path", "t.model"], "leave out --vocab_size"),
        (["--init", "model.pt", "--dim", 8], "--init brings its own shape; leave out --dim"),
        (["--init", MINI, "--n_layers", 5], "--n_layers 5 is less than the 9"),
        (["--init", ""], "--init '' names no file"),
        (["--resume"], "no saved state to --resume"),
        (["--batch_tokens", 640_000], "a batch takes 640,000; give more --text"),
    ],
)
def test_errors_are_one_line_and_leave_nothing_in_the_folder(call, tmp_path, options, words):
    code, _, error = call(*options)
    assert code == 2 and words in error
    assert error.count("\n") == 1 and error.endswith("\n")
    assert not (tmp_path / "out").exists() or visible(tmp_path / "out") == []


def test_a_tokenizer_of_another_size_than_the_checkpoints_is_refused(call, tokenizer_file):
    error = error_line(call("--init", MINI, "--tokenizer_path", tokenizer_file))
    assert "has 320 tokens, the checkpoint has 4096" in error
