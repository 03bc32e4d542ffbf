"""What the command line says is what the model, the loop and the files get."""

import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import oracle
import run_llama
from classifier import LlamaEmbeddingClassifier
from conftest import LABEL_NAMES, ROOT, random_llama, save_llama
from llama import Llama, load_pretrained
from tokenizer import Tokenizer
from training.labelled import read_sentences
from training.loop import save_classifier
from training.options import checkpoint_path
from utils import seed_everything


@pytest.fixture
def seen(monkeypatch) -> list[torch.Tensor]:
    """The token ids (B, T) of every pass through a Llama."""
    batches, hidden_states = [], Llama.hidden_states

    def recording(self, tokens, *options):
        batches.append(tokens)
        return hidden_states(self, tokens, *options)

    monkeypatch.setattr(Llama, "hidden_states", recording)
    return batches


# ---------------------------------------------------------------- generate


def test_generate_draws_at_temperature_1_after_the_seed(run, workplace):
    save_llama(random_llama(scale=2.0), workplace / "model.pt")
    run("generate", "--seed", "5")
    seed_everything(5)
    model, tokenizer = load_pretrained("model.pt"), Tokenizer(tokenizer_model="tokenizer.model")
    idx = torch.tensor([tokenizer.encode(run_llama.PREFIX, bos=True, eos=False)])
    for name, temperature in (("0", 0.0), ("1", 1.0)):
        expected = tokenizer.decode(model.generate(idx, 75, temperature)[0].tolist())
        written = workplace / f"generated-sentence-temp-{name}.txt"
        assert written.read_text(encoding="utf-8") == expected


# ---------------------------------------------------------------- prompt


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_prompt_predicts_by_the_oracles_scores_in_batches(run, workplace, attention):
    model = random_llama(seed=5, attention=attention)
    save_llama(model, workplace / "model.pt")
    run("prompt", "--attention", attention, "--batch_size", "3")
    lines = (workplace / "toy-dev-prompting-output.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = Tokenizer(tokenizer_model="tokenizer.model")
    labels = [tokenizer.encode(name, bos=False, eos=False)[0] for name in LABEL_NAMES]

    def predictions(ending: str, size: int = 3) -> list[int]:
        question = f"Is this movie bad or good? This movie is{ending}"
        sentences = [sentence for sentence, _ in read_sentences("toy-dev.txt")]
        prompts = [tokenizer.encode(f"{s} {question}", bos=True, eos=False) for s in sentences]
        said = []
        for batch in (prompts[i : i + size] for i in range(0, len(prompts), size)):
            width = max(map(len, batch))
            rows = [row + [tokenizer.pad_id] * (width - len(row)) for row in batch]
            logits, _ = oracle.forward(model.state_dict(), model.config, rows)
            for row, prompt in zip(logits, batch, strict=True):
                last = len(prompt) - 1 if attention == "causal" else -1
                said.append(int(np.argmax(row[last, labels])))
        return said

    with_space, without_space = predictions(" "), predictions("")
    assert with_space != without_space  # else the space could be lost unnoticed
    assert attention == "causal" or with_space != predictions(" ", size=8)  # so could batch_size
    expected = without_space if attention == "causal" else with_space
    assert set(expected) == {0, 1}
    assert [int(line.split(" ||| ")[0]) for line in lines] == expected


def test_a_prompt_leaves_room_for_the_longest_label(run, workplace, seen):
    (workplace / "labels.json").write_text('["bad xyz", "good"]', encoding="utf-8")
    (workplace / "toy-dev.txt").write_text(f"0 ||| {'a good film ' * 40}\n", encoding="utf-8")
    code, _, err = run("prompt")
    assert (code, err.count("warning")) == (0, 1)
    assert max(tokens.shape[1] for tokens in seen) == random_llama().config.max_seq_len


# ---------------------------------------------------------------- options that must arrive


@pytest.mark.parametrize("option", ["prompt", "finetune"])
def test_the_model_reads_max_sentence_len_tokens_of_a_sentence(run, workplace, seen, option):
    run(option, "--max_sentence_len", "2", "--batch_size", "1", "--epochs", "1")
    tokenizer = Tokenizer(tokenizer_model="tokenizer.model")
    question = run_llama.prompt_suffix(LABEL_NAMES) if option == "prompt" else ""
    asked = tokenizer.encode(question, bos=False, eos=False)
    expected = {
        (tokenizer.bos_id, *tokenizer.encode(sentence, bos=False, eos=False)[:2], *asked)
        for sentence, _ in read_sentences("toy-dev.txt")  # train and test are the same
    }
    assert {tuple(tokens[0].tolist()) for tokens in seen} == expected


def test_training_gets_what_the_command_line_says(run, monkeypatch):
    calls, train_classifier = [], run_llama.train_classifier

    def recording(model, train_data, dev_data, **options):
        of_model = {"hidden_dropout_prob": model.dropout.p}
        of_model["backbone_dropout"] = model.llama.config.dropout
        calls.append({**options, **asdict(options["recipe"]), **of_model})
        return train_classifier(model, train_data, dev_data, **options)

    monkeypatch.setattr(run_llama, "train_classifier", recording)
    said = {"epochs": 2, "batch_size": 3, "lr": 0.01, "seed": 5, "hidden_dropout_prob": 0.25}
    said |= {"warmup": 0.2, "lr_decay": "cosine", "layer_decay": 0.9, "max_grad_norm": 3.0}
    said |= {"label_smoothing": 0.1, "r_drop": 0.5, "patience": 7, "backbone_dropout": 0.05}
    words = [word for key, value in said.items() for word in (f"--{key}", str(value))]
    assert run("finetune", *words, "--train_acc", "running", "--bf16")[0] == 0
    said |= {"running_train_acc": True, "bf16": True}
    assert [{key: call[key] for key in said} for call in calls] == [said]


def test_batch_size_is_that_of_training_and_of_evaluation(run, seen):
    run("finetune", "--batch_size", "3", "--epochs", "1")
    assert [len(tokens) for tokens in seen] == [3, 3, 2] * (len(seen) // 3)  # 8 sentences each


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"label_names": ["good", "bad"]}, ["['good', 'bad']", "['bad', 'good']"]),
        ({"tokenizer_sha256": "0" * 64}, ["another tokenizer", "tokenizer.model"]),
        ({"vocab_size": 100}, ["320 tokens", "100"]),
    ],
)
def test_a_checkpoint_of_other_labels_tokenizer_or_vocabulary_is_one_line(workplace, saved, words):
    config = SimpleNamespace(num_labels=2, option="finetune", hidden_dropout_prob=0.0)
    llama = random_llama(vocab_size=saved.pop("vocab_size", 320))
    save_classifier("kept.pt", LlamaEmbeddingClassifier(config, llama), config, **saved)
    args = Namespace(
        dev="toy-dev.txt", test="toy-test.txt", train="toy-train.txt", label_names="labels.json",
        dev_out="toy-dev-finetuning-output.txt", test_out="toy-test-finetuning-output.txt",
        pretrained_model_path="model.pt", filepath="kept.pt", use_gpu=False,
        max_sentence_len=None, batch_size=8, option="finetune", epochs=1, lr=1e-3,
    )  # fmt: skip
    with pytest.raises(ValueError) as refused:
        run_llama.test(args)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)
    assert not list(workplace.glob("*-output.txt"))


@pytest.mark.parametrize("enter", [True, False])
def test_train_files_of_one_name_in_two_folders_have_checkpoints_of_their_own(
    tmp_path, monkeypatch, enter
):
    names = set()
    for dataset in ("sst", "cfimdb"):
        (tmp_path / dataset).mkdir()
        monkeypatch.chdir(tmp_path / dataset if enter else tmp_path)
        train = "train.txt" if enter else f"{dataset}/train.txt"
        names.add(checkpoint_path(Namespace(option="finetune", train=train, epochs=1, lr=1e-3)))
    assert len(names) == 2


# ---------------------------------------------------------------- how it ends


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_one_line_before_the_work(run, workplace):
    (workplace / "locked").mkdir(mode=0o555)
    code, out, err = run("generate", "--generated_sentence_low_temp_out", "locked/out.txt")
    assert (code, err.count("\n")) == (2, 1)
    assert "locked/out.txt: its folder may not be written to" in err
    assert "load model" not in out


def ended(*command: str, close_stdout: bool = False) -> tuple[int, str]:
    """Exit code and standard error of a Python process that buffers its output."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    if close_stdout:  # the reader has left
        process.stdout.close()
        process.stdout = None
    _, err = process.communicate()
    return process.returncode, err


@pytest.mark.parametrize("flush", [True, False])
def test_a_reader_who_leaves_is_no_error_message(flush):
    script = f"import cli; cli.run(lambda: print('text', flush={flush}))"
    assert ended("-c", script, close_stdout=True) == (1, "")


def test_dev_mode_shows_the_traceback_of_an_input_error():
    script = "import cli; cli.run(lambda: int('x'))"
    assert ended("-c", script)[1].count("\n") == 1
    err = ended("-X", "dev", "-c", script)[1]
    assert err.startswith("Traceback")
    assert "ValueError: invalid literal for int()" in err
