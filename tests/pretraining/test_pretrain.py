"""Language-model training: the objective by the oracle, a run by its files, resumption by bits."""

import csv
import itertools
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cli
import oracle
from conftest import ROOT, random_llama, save_llama, shared_asset, train_tokenizer
from formats.checkpoint import load_torch_file
from llama import Llama, load_pretrained
from optimizer import AdamW
from pretraining import loop as language_model
from pretraining import run as pretrain
from pretraining.corpus import read_documents
from pretraining.loop import HeldOut, lm_loss, make_optimizers
from tokenizer import Tokenizer

TEXTS = ["this film is good", "a warm\nfilm, é!", "bad", "the story was a good story"]
SHAPE = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 40}
SHAPE |= {"vocab_size": 300, "max_seq_len": 24}
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


def losses(folder: Path) -> list[float]:
    return [row["tales nats/token"] for row in history(folder)]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_torch_file(folder / "model.pt")["model"]


@pytest.fixture(scope="module")
def tales(tmp_path_factory) -> str:
    return write_tales(tmp_path_factory.mktemp("tales") / "tales.txt")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tales) -> Path:
    """The folder of a whole run that was measured after each of its steps."""
    folder = tmp_path_factory.mktemp("finished")
    options = as_options({**SHAPE, **OPTIONS, "tokens": "2.5K", "eval_minutes": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "keep_freed_memory", lambda: None)
        pretrain.main(["--text", tales, "--out", str(folder), *options])
    return folder


@pytest.fixture
def call(tales, tmp_path, capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """call(...) trains on `tales` into `tmp_path/out`; returns exit code, output and error."""
    monkeypatch.setattr(pretrain, "keep_freed_memory", lambda: None)

    def call(*options: object) -> tuple[int, str, str]:
        argv = ["--text", tales, "--out", tmp_path / "out", *as_options(OPTIONS)]
        argv += [] if "--init" in options else as_options(SHAPE)
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: pretrain.main([str(word) for word in [*argv, *options]]))
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


# ---------------------------------------------------------------- the objective


def surprise(model: Llama, tokens: list[int]) -> np.ndarray:
    """-log p(x_t | x_<t) for t = 1, 2, ... by the float64 model."""
    logits, _ = oracle.forward(model.state_dict(), model.config, [tokens[:-1]])
    return -np.log(oracle.softmax(logits[0])[np.arange(len(tokens) - 1), tokens[1:]])


def test_the_loss_is_the_mean_surprise_of_the_tokens_that_count():
    model = random_llama(attention="causal")
    batch = torch.randint(3, 320, (3, 10), generator=torch.Generator().manual_seed(1))
    rows = batch[0].tolist(), batch[1, :6].tolist(), batch[2, :2].tolist()
    expected = np.concatenate([surprise(model, row) for row in rows])
    batch[1, 6:], batch[2, 2:] = -100, -100
    assert lm_loss(model, batch).item() == pytest.approx(expected.mean(), rel=1e-5)
    assert lm_loss(model, batch, "sum").item() == pytest.approx(expected.sum(), rel=1e-5)
    logits = model(batch[:1, :-1], targets=batch[:1, 1:])[0]
    theirs = F.cross_entropy(logits[0], batch[0, 1:])
    torch.testing.assert_close(lm_loss(model, batch[:1]), theirs)


@pytest.mark.parametrize("training", [True, False])
def test_held_out_text_is_measured_per_token_and_byte_whatever_the_batch(tokenizer, training):
    model = random_llama(attention="causal", dropout=0.5).train(training)
    ids = [token for text in TEXTS for token in tokenizer.encode(text, bos=True, eos=False)]
    ids.append(tokenizer.bos_id)  # which ends the last document
    nats = sum(surprise(model, ids[i : i + 9]).sum() for i in range(0, len(ids) - 1, 8))
    n_bytes = len(("\n".join(TEXTS) + "\n").encode())
    expected = nats / (len(ids) - 1), nats / np.log(2) / n_bytes
    heldout = HeldOut("x", TEXTS, tokenizer, seq_len=8)
    for batch_size in (1, 3, 100):
        assert heldout.measure(model, batch_size) == pytest.approx(expected, rel=1e-5)
        assert model.training is training


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_norms_do_not_decay(kind, tied):
    model = random_llama()
    if not tied:
        model.output.weight = torch.nn.Parameter(model.output.weight.detach().clone())
    optimizers = make_optimizers(model, kind, lr=0.1, muon_lr=0.2, weight_decay=0.3)
    place = {}  # parameter -> class of its optimizer, learning rate, weight decay
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert parameter not in place
                place[parameter] = (type(optimizer), group["lr"], group["weight_decay"])
    assert set(place) == set(model.parameters())
    for name, parameter in model.named_parameters():
        is_muon = kind == "muon" and name.startswith("layers.") and "norm" not in name
        decay = 0.0 if "norm" in name else 0.3
        expected = (torch.optim.Muon, 0.2, 0.3) if is_muon else (AdamW, 0.1, decay)
        assert place[parameter] == expected, name


# ---------------------------------------------------------------- a whole run


def test_a_run_leaves_a_causal_tied_float32_model_and_its_tokenizer(finished):
    model = load_pretrained(finished / "model.pt")
    config = model.config.to_dict()
    assert {name: config[name] for name in SHAPE} == SHAPE
    assert model.config.attention == "causal"
    assert model.output.weight is model.tok_embeddings.weight
    assert {tensor.dtype for tensor in weights_of(finished).values()} == {torch.float32}
    assert Tokenizer(tokenizer_model=finished / "tokenizer.model").n_words == 300
    assert not list(finished.glob(".*"))


def test_the_history_rises_by_steps_follows_the_schedule_and_ends_with_what_the_files_give(
    finished, tales
):
    rows, n = history(finished), math.ceil(2500 / 64)
    assert [row["step"] for row in rows] == list(range(1, n + 1))
    assert [row["tokens"] for row in rows] == [64 * row["step"] for row in rows]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    for i, row in enumerate(rows):
        factor = min((i + 1) / 4, 1) * min((1 - i / n) / (1 - 0.4), 1)
        assert row["lr_factor"] == pytest.approx(factor, abs=1e-4)
    key = "tales nats/token"
    assert rows[-1][key] < rows[0][key] - 0.5
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] - 0.5

    held = read_documents(tales)[::16]  # 5 of 80
    tokenizer = Tokenizer(tokenizer_model=finished / "tokenizer.model")
    heldout = HeldOut("tales", held, tokenizer, seq_len=16)
    measured = heldout.measure(load_pretrained(finished / "model.pt"), batch_size=2)
    last = rows[-1][key], rows[-1]["tales bits/byte"]
    assert measured == pytest.approx(last, abs=2e-4)


@pytest.mark.parametrize(("micro_tokens", "n_rows"), [(None, 4), (32, 2), (8, 1)])
def test_a_measurement_takes_no_more_windows_at_once_than_training(
    call, monkeypatch, micro_tokens, n_rows
):
    seen, measure = [], HeldOut.measure

    def spy(self, model, batch_size, ranks):
        seen.append(batch_size)
        return measure(self, model, batch_size, ranks)

    monkeypatch.setattr(HeldOut, "measure", spy)
    micro = ["--micro_tokens", micro_tokens] if micro_tokens else []
    assert call("--tokens", 128, *micro)[0] == 0
    assert set(seen) == {n_rows}


def test_half_precision_rounds_the_same_weights_into_half_the_file(call, tmp_path, finished):
    assert call("--tokens", 2500, "--half")[0] == 0
    half, full = weights_of(tmp_path / "out"), weights_of(finished)
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    assert all(torch.equal(half[name], full[name].half()) for name in full)
    load_pretrained(tmp_path / "out" / "model.pt")
    sizes = [(folder / "model.pt").stat().st_size for folder in (tmp_path / "out", finished)]
    assert sizes[0] == pytest.approx(sizes[1] / 2, rel=0.1)


@pytest.mark.parametrize("times", [1, 2])
def test_by_default_the_text_is_read_once_or_as_often_as_it_is_named(call, tmp_path, tales, times):
    assert call("--text", *[tales] * times)[0] == 0
    model = Tokenizer(tokenizer_model=tmp_path / "out" / "tokenizer.model")
    train = [text for i, text in enumerate(read_documents(tales)) if i % 16]  # 5 of 80 held out
    n_tokens = sum(len(model.encode(text, bos=True, eos=False)) for text in train)
    assert history(tmp_path / "out")[-1]["step"] == math.ceil(times * n_tokens / 64)


def test_documents_that_share_words_with_an_excluded_file_are_not_read(call, tmp_path, tales):
    sentence = read_documents(tales)[7].replace("\n", " ").upper()
    (tmp_path / "test.txt").write_text(f"3 ||| {sentence}\n", encoding="utf-8")
    n_same = read_documents(tales).count(read_documents(tales)[7])
    options = ["--exclude", tmp_path / "test.txt", "--exclude_words", 15, "--tokens", 64]
    assert f"{n_same} dropped for overlap" in call(*options)[1]


def test_a_document_that_occurs_twice_is_held_out_whole_of_all_files(tmp_path):
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("\n".join(["same", *map(str, range(8)), "same"]), encoding="utf-8")
    other.write_text("held\n8\nsame\n9\n", encoding="utf-8")
    args = Namespace(text=[str(one), str(other)], exclude=[], exclude_words=9, heldout=1)
    kept, held = pretrain.load_corpus(args)
    assert held == {"one": ["same"], "other": ["held"]}
    assert kept == [*map(str, range(10))]


def test_minutes_end_a_run_that_tokens_alone_would_not(call, tmp_path, monkeypatch):
    clock = SimpleNamespace(monotonic=itertools.count(0.0, 0.1).__next__)  # s, each time it is read
    monkeypatch.setattr(language_model, "time", clock)
    assert call("--tokens", "100M", "--minutes", 0.02)[0] == 0
    state = load_torch_file(tmp_path / "out" / "state.pt")
    assert 0 < state["step"] < 100e6 / 64
    assert state["seconds"] >= 0.02 * 60
    assert history(tmp_path / "out")[-1]["lr_factor"] < 0.5  # the schedule follows the clock


def test_bfloat16_trains_alike_and_keeps_float32_weights(call, tmp_path, finished):
    options = ["--tokens", 2500, "--eval_minutes", 0, "--bf16"]
    assert call(*options)[0] == 0
    assert losses(tmp_path / "out") == pytest.approx(losses(finished), rel=0.03)
    ours, theirs = weights_of(tmp_path / "out"), weights_of(finished)
    assert not torch.equal(ours["norm.weight"], theirs["norm.weight"])
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_bfloat16_trains_like_the_cpu(call, tmp_path, finished):
    options = ["--tokens", 2500, "--eval_minutes", 0, "--use_gpu"]
    code, printed, _ = call(*options)
    assert code == 0 and "device: cuda, bf16: True" in printed
    assert losses(tmp_path / "out") == pytest.approx(losses(finished), rel=0.05)
    assert load_pretrained(tmp_path / "out" / "model.pt").norm.weight.device.type == "cpu"
    assert call(*options, "--resume")[0] == 0


# ---------------------------------------------------------------- interrupted and resumed


def start(out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "pretraining.run", "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("kind", ["adamw with dropout", "muon"])
def test_a_killed_run_that_is_resumed_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path, tokenizer_file, kind
):
    text = write_tales(tmp_path / "tales.txt", 30)  # so that there are several epochs
    options = ["--text", text, *as_options(OPTIONS)]
    budget = ["--tokens", str(64 * 120)]  # which a resumed run remembers
    if kind == "muon":
        options += [*as_options(SHAPE), "--optimizer", "muon"]
    else:
        init = random_llama(scale=1.0, dropout=0.2)
        options += ["--init", str(save_llama(init, tmp_path / "init.pt"))]
        options += ["--tokenizer_path", str(tokenizer_file)]
    assert start(tmp_path / "whole", *options, *budget).wait() == 0

    cut, state = tmp_path / "cut", tmp_path / "cut" / "state.pt"
    process = start(cut, *options, *budget, "--save_minutes", "0")
    while not (state.exists() and load_torch_file(state)["step"] >= 20):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    assert process.wait() < 0
    assert 20 <= load_torch_file(state)["step"] < 120
    assert start(cut, *options, "--resume").wait() == 0

    ours, theirs = weights_of(cut), weights_of(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert not list(cut.glob(".*"))  # nor what it was writing when it was killed
    ends = [load_torch_file(tmp_path / name / "state.pt") for name in ("cut", "whole")]
    assert ends[0]["step"] == ends[1]["step"] == 120
    assert ends[0]["position"] == ends[1]["position"]
    assert history(cut)[-1]["train_loss"] == history(tmp_path / "whole")[-1]["train_loss"]
    assert ends[0]["position"][0] >= 2


@pytest.mark.parametrize(
    ("place", "name"),
    [(language_model, "take_step"), (HeldOut, "measure")],
    ids=["step", "measure"],
)
def test_a_run_stopped_by_a_signal_is_saved_whole_and_ends_as_if_it_had_not_been(
    call, tmp_path, finished, monkeypatch, place, name
):
    def stop_at_seventh(*args, **kwargs):
        calls.append(name)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    calls, original = [], getattr(place, name)
    monkeypatch.setattr(place, name, stop_at_seventh)
    options = ["--tokens", 2500, "--eval_minutes", 0]
    code, _, error = call(*options)
    assert code == 143 and "terminated; to go on: " in error and error.count("\n") == 1
    code, said, _ = call(*options, "--resume")
    assert code == 0 and "resumed at step 7\n" in said
    ours, theirs = weights_of(tmp_path / "out"), weights_of(finished)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert losses(tmp_path / "out")[-1] == losses(finished)[-1]
    assert not list((tmp_path / "out").glob(".*"))


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_last_state(
    call, tmp_path, monkeypatch
):
    lm_loss, calls = language_model.lm_loss, []

    def diverge(*args, **kwargs):
        calls.append(args)
        return lm_loss(*args, **kwargs) * (float("inf") if len(calls) == 9 else 1.0)

    monkeypatch.setattr(language_model, "lm_loss", diverge)
    code, _, error = call("--tokens", 2500, "--save_minutes", 0)
    assert code == 2 and "step 9, learning rate " in error and "the loss is inf; lower" in error
    state = load_torch_file(tmp_path / "out" / "state.pt")
    assert state["step"] == 8
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


def test_resuming_a_finished_run_changes_nothing(call, finished):
    before = weights_of(finished), history(finished)
    options = ["--tokens", 2500, "--out", finished, "--resume"]
    assert call(*options)[0] == 0
    assert all(torch.equal(before[0][name], w) for name, w in weights_of(finished).items())
    assert history(finished) == before[1]


def test_resuming_with_another_setting_names_what_differs(call, finished, tmp_path):
    options = ["--tokens", 2500, "--out", finished, "--resume"]
    _, _, error = call(*options, "--lr", 0.02, "--seed", 5)
    assert "(lr: 0.005 there, 0.02 here; seed: 1337 there, 5 here)" in error
    other = write_tales(tmp_path / "tales.txt", 70)
    assert "text_sha256: " in call(*options, "--text", other)[2]


# ---------------------------------------------------------------- from a checkpoint


def test_continuing_keeps_tokenizer_and_shape_and_its_first_step_is_as_long_as_adams(
    call, tmp_path, finished
):
    assert call("--init", finished / "model.pt", "--tokens", 64, "--lr", 1e-4, "--seed", 3)[0] == 0
    ours, theirs = (f / "tokenizer.model" for f in (tmp_path / "out", finished))
    assert ours.read_bytes() == theirs.read_bytes()
    ours, theirs = (load_pretrained(f / "model.pt") for f in (tmp_path / "out", finished))
    assert ours.config == theirs.config
    for name, weight in theirs.state_dict().items():
        change = (ours.state_dict()[name] - weight).abs().max().item()
        # m / sqrt(v) is +-1 then, the first of 4 steps of warm-up has a quarter of the rate
        assert change == pytest.approx(1e-4 / 4, rel=0.3), name


def test_training_on_its_kind_of_text_improves_a_published_model(call, tmp_path):
    model = shared_asset("models/stories260K/stories260K.pt")
    stories = read_documents(shared_asset("text/tinystories.txt.xz"))[:150]
    text = tmp_path / "stories.txt"
    text.write_text("\n".join(story.replace("\n", "\\n") for story in stories), encoding="utf-8")
    options = {"text": text, "init": model, "seq_len": 128, "batch_tokens": 1024, "lr": 1e-4}
    options |= {"tokens": 24 * 1024, "warmup": 2, "decay_from": 0, "heldout": 15}
    code, said, _ = call(*as_options(options))
    assert code == 0
    out = tmp_path / "out"
    heldout = HeldOut("", stories[::10], Tokenizer(tokenizer_model=out / "tokenizer.model"), 128)
    before, after = (
        heldout.measure(load_pretrained(path, attention="causal"), 8)[1]
        for path in (model, out / "model.pt")
    )
    assert after < before
    where_it_began = next(line for line in said.splitlines() if line.startswith("before: "))
    assert where_it_began.endswith(f" {before:.3f} bits/byte")


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt: no such text file"),
        (["--batch_tokens", 65], "--batch_tokens 65 is no multiple of --seq_len 16"),
        (["--seq_len", 32], "--seq_len 32 exceeds --max_seq_len 24"),
        (
            ["--heldout", 80],
            "tales.txt: 80 held-out documents of 80 leave none to train; lower --heldout",
        ),
        (["--batch_tokens", "640000"], "smaller --batch_tokens"),
        (["--vocab_size", 9999], "--vocab_size 9999"),
        (["--tokens", "many"], "--tokens: 'many' is not a count"),
        (["--dim", 30], "dim=30 is not divisible by n_heads=4"),
        (["--tokenizer_path", "t.model"], "leave out --vocab_size"),
        (["--init", "model.pt", "--dim", 8], "--init brings its own shape; leave out --dim"),
        (["--resume"], "nothing to --resume"),
    ],
)
def test_errors_are_one_line(call, options, words):
    code, _, error = call(*options)
    assert code == 2 and words in error
    assert error.count("\n") == 1 and error.endswith("\n")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["one"], "has 1 documents, one a line, after 0 were dropped for overlap"),
        (["one"] * 50, "all its documents are held out, or equal to one that is"),
    ],
)
def test_a_text_that_leaves_nothing_to_train_on_is_named(call, tmp_path, lines, words):
    (tmp_path / "few.txt").write_text("\n".join(lines), encoding="utf-8")
    code, _, error = call("--text", tmp_path / "few.txt")
    assert code == 2 and f"few.txt: {words}" in error and error.count("\n") == 1


def test_a_run_that_cannot_begin_leaves_its_folder_to_the_next_command(call, tmp_path):
    assert call("--batch_tokens", 640_000)[0] == 2
    assert [*(tmp_path / "out").iterdir()] == []
    save_llama(random_llama(vocab_size=100, attention="causal"), tmp_path / "init.pt")
    tokenizer = train_tokenizer(tmp_path)
    code, _, error = call("--init", tmp_path / "init.pt", "--tokenizer_path", tokenizer)
    assert code == 2 and "100" in error
    assert [*(tmp_path / "out").iterdir()] == []
    assert call("--tokens", 64)[0] == 0


def test_a_run_is_resumed_under_the_names_and_on_the_model_that_it_began_with(
    call, tmp_path, tales, tokenizer_file
):
    init = save_llama(random_llama(n_heads=4, n_kv_heads=4), tmp_path / "init.pt")
    options = ["--init", init, "--tokenizer_path", tokenizer_file, "--tokens"]
    assert call(*options, 64)[0] == 0
    shutil.copyfile(tales, tmp_path / "moved.txt")
    code, _, error = call(*options, 128, "--resume", "--text", tmp_path / "moved.txt")
    assert code == 2 and "heldout_names: ['tales'] there, ['moved'] here" in error
    save_llama(random_llama(n_heads=8, n_kv_heads=8), tmp_path / "init.pt")  # the same tensors
    code, _, error = call(*options, 128, "--resume")
    assert code == 2 and "model_n_heads: 4 there, 8 here" in error


@pytest.mark.parametrize("name", ["tokenizer.model", "history.csv", "model.pt"])
def test_a_file_that_is_no_run_is_not_written_over(call, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine", encoding="utf-8")
    code, _, error = call()
    assert code == 2 and f"holds {name}; name another --out" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text(encoding="utf-8") == "mine"


def test_a_folder_that_holds_a_run_is_not_written_over(call, finished):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    code, _, error = call("--out", finished)
    assert code == 2 and "--resume continues the run" in error
    assert {path: path.read_bytes() for path in finished.iterdir()} == before
