"""A CUDA device computes, trains and writes what the CPU does; skipped where there is none."""

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from test_advanced_run import DATA
from test_distributed import finish, torchrun
from test_predict import SENTENCES, as_rows, write_checkpoint
from test_pretrain import write_tales
from test_prompting import BOTH, batch
from test_prompting import classifier as prompted

import cli
import oracle
from advanced import run as composer
from advanced.catalogue import METHODS
from conftest import LENGTHS, ROOT, TOKENS, random_llama
from llama import load_pretrained
from optimizer import AdamW
from tools import explain
from tools.generate import continue_text
from training import loop as training
from utils import random_state, seed_everything, set_random_state

GPU = torch.device("cuda")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def exact_unless_allowed():
    """Products in whole float32, whatever an earlier test's command allowed, until one does:
    finetuning multiplies in TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("attention", ["full", "causal"])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_the_model_computes_what_float64_numpy_computes(attention, n_kv_heads, lengths):
    model = random_llama(attention=attention, n_kv_heads=n_kv_heads)
    expected = oracle.forward(model.state_dict(), model.config, TOKENS, lengths)
    on_gpu = {} if lengths is None else {"lengths": lengths.to(GPU)}
    model.to(GPU)
    with torch.no_grad():
        logits, hidden = model(TOKENS.to(GPU), targets=TOKENS.to(GPU), **on_gpu)
    assert logits.device.type == GPU.type
    is_real = np.arange(TOKENS.shape[1]) < LENGTHS.numpy()[:, None]
    kept = slice(None) if lengths is None else is_real
    for actual, wanted in zip((logits, hidden), expected, strict=True):
        error = np.abs(actual.cpu().numpy() - wanted)[kept].max()
        assert error < 1e-5 * np.abs(wanted[kept]).max()


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_gradients_are_those_of_the_cpu(attention):
    gradients = []
    for device in ("cpu", GPU):
        model = random_llama(attention=attention, scale=2.0).to(device)
        _, hidden = model(TOKENS.to(device), lengths=LENGTHS.to(device))
        (hidden[torch.arange(3), LENGTHS - 1] ** 2).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        error = (gradients[1][name].cpu() - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max(), name


@pytest.mark.parametrize("attention", ["full", "causal"])
@pytest.mark.parametrize("prompt", [3, 70, 96])
def test_greedy_tokens_are_those_of_the_cpu(attention, prompt):
    model = random_llama(attention=attention)
    start = torch.randint(3, 320, (1, prompt), generator=torch.Generator().manual_seed(5))
    expected = model.generate(start, 12, temperature=0.0)
    model.to(GPU)
    assert model.generate(start.to(GPU), 12, temperature=0.0).tolist() == expected.tolist()


def test_samples_repeat_for_a_seed_and_differ_without(tokenizer):
    model = random_llama(attention="causal", scale=1.0, vocab_size=tokenizer.n_words).to(GPU)

    def drawn(seed: int) -> list[str]:
        seed_everything(seed)
        return continue_text(model, tokenizer, "this film is", 20, num_samples=2)

    assert drawn(1) == drawn(1) != drawn(2)


def test_random_numbers_of_the_device_go_on_where_they_were():
    seed_everything(3)
    torch.rand(5, device=GPU)
    state = random_state()
    first = torch.rand(7, device=GPU)
    torch.rand(7, device=GPU)
    set_random_state(state)
    assert torch.equal(torch.rand(7, device=GPU), first)


def test_adamw_takes_the_steps_of_pytorchs():
    def trained(make) -> torch.Tensor:
        rng = torch.Generator().manual_seed(1)
        weight = torch.nn.Parameter(torch.randn(40, 30, generator=rng).to(GPU))
        optimizer = make([weight])
        for _ in range(20):
            weight.grad = torch.randn(40, 30, generator=rng).to(GPU)
            optimizer.step()
        return weight.detach()

    ours = trained(lambda parameters: AdamW(parameters, lr=1e-2, eps=1e-8, weight_decay=0.0))
    theirs = trained(
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, eps=1e-8, weight_decay=0.0)
    )
    # ours adds eps before the correction of the second moment, as the paper's efficient form does
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_scores_of_a_prompt_are_those_of_the_cpu(tokenizer):
    model = prompted(tokenizer, BOTH)
    tokens, lengths = batch(tokenizer, ["this film is good", "bad", "a story"])
    with torch.no_grad():
        expected = model(tokens, lengths=lengths)
        actual = model.to(GPU)(tokens.to(GPU), lengths=lengths.to(GPU))
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- the commands


def losses_in(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"epoch \d+: train loss :: ([\d.]+)", printed)]


MODES = [("full", "position"), ("causal", "last"), ("causal", "mean")]


@pytest.mark.parametrize(("attention", "pooling"), MODES)
@pytest.mark.parametrize("precision", [(), ("--bf16",)])
def test_finetuning_learns_what_it_learns_on_the_cpu_and_its_checkpoint_says_so_there(
    run, attention, pooling, precision
):
    options = ["--attention", attention, "--pooling", pooling, "--hidden_dropout_prob", "0"]
    options += ["--epochs", "3", "--lr", "3e-3"]
    losses, probabilities = [], []
    for device in ((), (*precision, "--use_gpu")):
        code, printed, err = run("finetune", *options, *device)
        assert code == 0, err
        losses.append(losses_in(printed))
        model, _ = training.load_classifier("finetune-toy-3-0.003.pt")
        with torch.no_grad():
            probabilities.append(model(TOKENS, lengths=LENGTHS).exp())
    assert "device: cuda," in printed
    assert losses[1] == pytest.approx(losses[0], rel=0.03 if precision else 0.01)
    # on the CPU --bf16, which reads 7 bits where TF32 reads 10, moves these by 0.05 at most
    tolerance = 0.1 if precision else 0.03
    torch.testing.assert_close(probabilities[1], probabilities[0], atol=tolerance, rtol=0)


def test_prompting_and_generating_are_those_of_the_cpu(run):
    outputs = []
    for options in ((), ("--use_gpu",)):
        assert run("prompt", "--attention", "causal", *options)[0] == 0
        assert run("generate", "--attention", "causal", *options)[0] == 0
        names = ("toy-dev-prompting-output.txt", "generated-sentence-temp-0.txt")
        outputs.append([Path(name).read_text(encoding="utf-8") for name in names])
    assert outputs[0] == outputs[1]


def test_an_interrupted_run_goes_on_to_the_weights_of_a_whole_one(run, monkeypatch):
    """Dropout's masks come from the device's own generator, so that must go on, too. Sums over rows
    that meet in the embedding come in any order there, so the last bits differ."""
    options = ["--use_gpu", "--attention", "causal", "--pooling", "mean", "--epochs", "3"]
    options += ["--lr", "1e-3", "--batch_size", "3"]
    path = Path("finetune-toy-3-0.001.pt")
    assert run("finetune", *options)[0] == 0
    whole = torch.load(path, weights_only=True)["model"]
    path.unlink()
    take_step, steps = training.take_step, []

    def stopping(*given):
        take_step(*given)
        steps.append(1)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(training, "take_step", stopping)
    code, _, err = run("finetune", *options)
    assert code == 143 and "to go on: " in err
    assert run("finetune", *options, "--resume")[0] == 0
    for name, weight in torch.load(path, weights_only=True)["model"].items():
        torch.testing.assert_close(weight, whole[name], atol=1e-4, rtol=0)


def test_predictions_are_those_of_the_cpu(run):
    write_checkpoint("causal", "mean")
    asked = ["--checkpoint", "kept.pt", "--format", "jsonl", *SENTENCES]
    (expected, actual) = (
        as_rows(run("predict", *options, *asked)[1]) for options in ((), ("--use_gpu",))
    )
    assert [row["label"] for row in actual] == [row["label"] for row in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-3)


def test_explanations_are_those_of_the_cpu(workplace, capsys):
    write_checkpoint("causal", "mean")

    def values(*options: str) -> list[float]:
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: explain.main(["--checkpoint", "kept.pt", *options, SENTENCES[2]]))
        printed = capsys.readouterr()
        assert not ended.value.code, printed.err
        return [float(number) for number in re.findall(r"[-+]\d+\.\d+", printed.out)]

    expected = values()
    assert len(expected) >= 18
    assert values("--use_gpu") == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_says_where(workplace, method):
    argv = [*DATA, "--method", method, "--seeds", "3,4", "--epochs", "2", "--use_gpu"]
    argv += ["--lr", "1e-2", "--batch_size", "4"]
    try:
        cli.run(lambda: composer.main(argv))
    except SystemExit as ended:
        assert not ended.code
    files = [json.loads(path.read_text(encoding="utf-8")) for path in Path("results").glob("*")]
    assert files and all(file["settings"]["device"] == "cuda" for file in files)
    for run in (run for file in files for run in file["runs"]):
        assert run["dev"]["n_sentences"] == run["test"]["n_sentences"] == 8
        if run.get("history"):  # of the device: a process that uses it holds far more
            assert 0 < run["peak_memory_mb"] < 200


# ---------------------------------------------------------------- several processes


FINETUNE = [
    *(ROOT / "run_llama.py", "--option", "finetune", *DATA, "--use_gpu"),
    *("--dev_out", "toy-dev-finetuning-output.txt", "--test_out", "toy-test-finetuning-output.txt"),
]


def test_a_process_over_nccl_trains_as_one_alone(run, workplace):
    options = ["--epochs", "3", "--lr", "3e-3", "--hidden_dropout_prob", "0"]
    code, expected, _ = run("finetune", "--use_gpu", *options)
    assert code == 0
    done = finish(torchrun(1, *FINETUNE, *options))
    assert done.returncode == 0, done.stderr
    assert losses_in(done.stdout) == pytest.approx(losses_in(expected), rel=1e-3)


def test_more_processes_than_devices_are_one_line(workplace):
    done = finish(torchrun(torch.cuda.device_count() + 1, *FINETUNE))
    assert done.returncode
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("run_llama.py: ")]
    assert "lower --nproc-per-node" in line


def test_a_sharded_pretraining_is_that_of_one_process(workplace, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    text = write_tales(workplace / "tales.txt")
    options = ["--text", text, "--vocab_size", "300", "--dim", "32", "--n_layers", "1"]
    options += ["--n_heads", "4", "--n_kv_heads", "2", "--hidden_dim", "40"]
    options += ["--seq_len", "16", "--batch_tokens", "64", "--heldout", "5", "--tokens", "2500"]
    options += ["--eval_minutes", "0", "--use_gpu", "--no-bf16", "--max_seq_len", "24"]
    for out, more in (("one", ()), ("sharded", ("--shard",))):
        done = finish(torchrun(1, "-m", "pretraining.run", *options, "--out", out, *more))
        assert done.returncode == 0, done.stderr
        assert "device: cuda" in done.stdout
    ours, theirs = (load_pretrained(f"{out}/model.pt").state_dict() for out in ("sharded", "one"))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-3, rtol=0)
