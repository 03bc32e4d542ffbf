"""A CUDA device computes, trains and writes what the CPU does; skipped without one."""

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import oracle
from advanced import run as advanced_run
from advanced.compose import METHODS
from conftest import LENGTHS, TOKENS, ended, random_llama
from helpers import finetune_command, finish, start, torchrun
from tools import explain, predict
from training import loop
from training.checkpoint import load_classifier
from training.state import random_state, set_random_state
from utils import seed_everything

GPU = torch.device("cuda")
CHECKPOINT = "finetune-toy-3-0.003.pt"
TRAIN = ["--epochs", "3", "--lr", "3e-3", "--attention", "causal", "--pooling", "mean"]
DATA = ["--train", "toy-train.txt", "--dev", "toy-dev.txt", "--test", "toy-test.txt", "--use_gpu"]
DATA += ["--label-names", "labels.json", "--pretrained-model-path", "model.pt"]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def float32_products():
    """Multiply in float32, whatever an earlier test's command allowed; finetuning sets TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def losses_in(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"epoch \d+: train loss :: ([\d.]+)", printed)]


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("attention", ["full", "causal"])
@pytest.mark.parametrize("n_kv_heads", [1, 4])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_the_model_computes_what_float64_numpy_computes(attention, n_kv_heads, lengths):
    model = random_llama(attention=attention, n_kv_heads=n_kv_heads)
    expected = oracle.forward(model.state_dict(), model.config, TOKENS, lengths)
    on_gpu = {} if lengths is None else {"lengths": lengths.to(GPU)}
    with torch.no_grad():
        actual = model.to(GPU)(TOKENS.to(GPU), targets=TOKENS.to(GPU), **on_gpu)
    is_real = np.arange(TOKENS.shape[1]) < LENGTHS.numpy()[:, None]
    kept = slice(None) if lengths is None else is_real
    for ours, wanted in zip(actual, expected, strict=True):
        error = np.abs(ours.cpu().numpy() - wanted)[kept].max()
        assert error < 1e-5 * np.abs(wanted[kept]).max()


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_gradients_and_greedy_tokens_are_those_of_the_cpu(attention):
    gradients, tokens = [], []
    start = torch.randint(3, 320, (1, 70), generator=torch.Generator().manual_seed(5))
    for device in (torch.device("cpu"), GPU):
        model = random_llama(attention=attention, scale=2.0).to(device)
        _, hidden = model(TOKENS.to(device), lengths=LENGTHS.to(device))
        (hidden[torch.arange(3), LENGTHS - 1] ** 2).sum().backward()
        gradients.append({name: p.grad.cpu() for name, p in model.named_parameters()})
        tokens.append(model.generate(start.to(device), 40, temperature=0.0).tolist())
    for name, expected in gradients[0].items():
        error = (gradients[1][name] - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max(), name
    assert tokens[0] == tokens[1]


def test_random_numbers_of_the_device_continue_from_a_saved_state():
    seed_everything(3)
    torch.rand(5, device=GPU)
    state = random_state()
    first = torch.rand(7, device=GPU)
    torch.rand(7, device=GPU)
    set_random_state(state)
    assert torch.equal(torch.rand(7, device=GPU), first)


# ---------------------------------------------------------------- the commands


@pytest.mark.parametrize("precision", [(), ("--bf16",)])
@pytest.mark.parametrize("mode", [("full", "position"), ("causal", "last"), ("causal", "mean")])
def test_finetuning_learns_what_it_learns_on_the_cpu(run, mode, precision):
    options = [*TRAIN, "--attention", mode[0], "--pooling", mode[1], "--hidden_dropout_prob", "0"]
    losses, probs = [], []
    for device in ((), (*precision, "--use_gpu")):
        code, printed, err = run("finetune", *options, *device, "--restart")
        assert code == 0, err
        losses.append(losses_in(printed))
        model, _ = load_classifier(CHECKPOINT)
        with torch.no_grad():
            probs.append(model(TOKENS, lengths=LENGTHS).exp())
    assert "device: cuda," in printed
    assert losses[1] == pytest.approx(losses[0], rel=0.03 if precision else 0.01)
    torch.testing.assert_close(probs[1], probs[0], atol=0.1 if precision else 0.03, rtol=0)


def test_prompting_and_generating_are_those_of_the_cpu(run):
    outputs = []
    for device in ((), ("--use_gpu",)):
        assert run("prompt", "--attention", "causal", *device)[0] == 0
        assert run("generate", "--attention", "causal", *device)[0] == 0
        names = ("toy-dev-prompting-output.txt", "generated-sentence-temp-0.txt")
        outputs.append([Path(name).read_text(encoding="utf-8") for name in names])
    assert outputs[0] == outputs[1]


def test_an_interrupted_run_continues_to_the_weights_of_a_whole_one(run, monkeypatch):
    """Dropout draws from the device's generator. Sums in the embedding's gradient come in any order
    there, so the last bits differ."""
    options = [*TRAIN, "--batch_size", "3", "--use_gpu"]
    assert run("finetune", *options)[0] == 0
    whole = torch.load(CHECKPOINT, weights_only=True)["model"]
    take_step, steps = loop.take_step, []

    def stopping(*given):
        take_step(*given)
        steps.append(1)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop, "take_step", stopping)
    assert run("finetune", *options, "--restart")[0] == 143
    assert run("finetune", *options, "--resume")[0] == 0
    for name, weight in torch.load(CHECKPOINT, weights_only=True)["model"].items():
        torch.testing.assert_close(weight, whole[name], atol=1e-4, rtol=0)


def test_predictions_and_explanations_are_those_of_the_cpu(run, capsys):
    assert run("finetune", *TRAIN)[0] == 0
    for tool in (predict, explain):
        numbers = []
        for device in ([], ["--use_gpu"]):
            argv = ["--checkpoint", CHECKPOINT, *device, "this film is good but her story was bad"]
            code, printed, err = ended(lambda main=tool.main, argv=argv: main(argv), capsys)
            assert code == 0, err
            numbers.append([float(number) for number in re.findall(r"[-+]?\d+\.\d+", printed)])
        assert numbers[0] and numbers[1] == pytest.approx(numbers[0], abs=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(workplace, method, capsys):
    argv = [*DATA, "--method", method, "--seeds", "3,4", "--epochs", "2", "--lr", "1e-2"]
    code, _, err = ended(lambda: advanced_run.main([*argv, "--results_dir", "kept"]), capsys)
    assert code == 0, err
    records = [json.loads(path.read_text(encoding="utf-8")) for path in Path("kept").glob("*")]
    assert records and all(record["settings"]["device"] == "cuda" for record in records)


# ---------------------------------------------------------------- several processes


def torchrun_finetuning(n: int, *options: str) -> tuple[int, str, str]:
    return finish(start(torchrun(n, *finetune_command("--use_gpu", *options)), Path.cwd()))


def test_a_process_over_nccl_trains_as_one_alone(run, workplace):
    options = [*TRAIN, "--hidden_dropout_prob", "0"]
    code, expected, err = run("finetune", "--use_gpu", *options)
    assert code == 0, err
    code, printed, err = torchrun_finetuning(1, *options, "--restart")
    assert code == 0, err
    assert losses_in(printed) == pytest.approx(losses_in(expected), rel=1e-3)


def test_more_processes_than_devices_are_one_line(workplace):
    code, _, err = torchrun_finetuning(torch.cuda.device_count() + 1, *TRAIN)
    (line,) = [line for line in err.splitlines() if line.startswith("run_llama.py: ")]
    assert code != 0 and "lower --nproc-per-node" in line
