"""run_llama.py through its entry point: what it computes, writes and says, and every error."""

import re
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import oracle
import run_llama
from classifier import LlamaEmbeddingClassifier
from conftest import LABEL_NAMES, ROOT, random_llama, save_llama
from formats.torch_file import load_torch_file
from helpers import CPU, assert_same_weights, environment, lines_of
from llama import Attention, Llama, load_pretrained
from optimizer import AdamW
from tokenizer import Tokenizer
from training import loop, state
from training.checkpoint import load_classifier, save_classifier
from training.evaluation import Evaluation
from training.labeled import read_sentences
from training.options import PREFIX
from utils import InputError, seed_everything

# The assignment's options.
DEFAULTS = {
    "train": "data/cfimdb-train.txt",
    "dev": "data/cfimdb-dev.txt",
    "test": "data/cfimdb-test.txt",
    "label_names": "data/cfimdb-label-mapping.json",
    "pretrained_model_path": "stories42M.pt",
    "max_sentence_len": None,
    "seed": 1337,
    "epochs": 5,
    "option": "generate",
    "use_gpu": False,
    "generated_sentence_low_temp_out": "generated-sentence-temp-0.txt",
    "generated_sentence_high_temp_out": "generated-sentence-temp-1.txt",
    "dev_out": "cfimdb-dev-prompting-output.txt",
    "test_out": "cfimdb-test-prompting-output.txt",
    "batch_size": 8,
    "hidden_dropout_prob": 0.3,
    "lr": 2e-5,
}
OURS = {"attention", "pooling", "tokenizer_path", "warmup", "lr_decay", "layer_decay", "bf16"}
OURS |= {"backbone_dropout", "label_smoothing", "r_drop", "patience", "max_grad_norm", "train_acc"}
OURS |= {"resume", "restart", "save_minutes", "quantize"}
KIND = {"prompt": "prompting", "finetune": "finetuning"}


def continuation(model: Llama, temperature: float = 0.0) -> str:
    """The assignment's prefix and 75 more tokens."""
    tokenizer = Tokenizer(tokenizer_model="tokenizer.model")
    idx = torch.tensor([tokenizer.encode(PREFIX, bos=True, eos=False)])
    return tokenizer.decode(model.generate(idx, 75, temperature)[0].tolist())


def test_options_and_defaults_are_the_assignments_and_ours_are_optional(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("training.options.ROOT", tmp_path)  # where nothing is bundled
    monkeypatch.chdir(tmp_path)
    args = vars(run_llama.get_args([]))
    assert {key: args.pop(key) for key in DEFAULTS} == DEFAULTS
    assert set(args) == OURS
    assert capsys.readouterr().out.count("args: ") == 1


# ---------------------------------------------------------------- generate


def test_generate_continues_the_assignments_prefix_at_temperatures_0_and_1(run, workplace):
    save_llama(random_llama(scale=2.0), workplace / "model.pt")
    code, out, err = run("generate", "--seed", "5")
    assert (code, err) == (0, "")
    assert out.count("load model from model.pt") == 1
    assert "device: cpu, attention: full, model: model.pt, parameters: 33,440" in out
    seed_everything(5)
    for temperature in (0.0, 1.0):
        text = continuation(load_pretrained("model.pt"), temperature)
        path = f"generated-sentence-temp-{temperature:.0f}.txt"
        assert Path(path).read_bytes().decode("utf-8") == text
        assert f"Temperature is {temperature}\n{text}\n---------------\n" in out
        assert f"Wrote generated sentence to {path}." in out


def test_attention_option_overrides_what_the_checkpoint_records(run, workplace):
    save_llama(random_llama(scale=1.0), workplace / "causal.pt", attention="causal")
    for options, mode in (
        (("--pretrained-model-path", "causal.pt"), "causal"),
        (("--pretrained-model-path", "causal.pt", "--attention", "full"), "full"),
        (("--attention", "causal"), "causal"),
    ):
        assert f"attention: {mode}," in run("generate", *options)[1]


def test_quantize_generates_and_prompts_by_int8_weights_and_trains_nothing(run, workplace):
    code, out, _ = run("generate", "--quantize", "int8")
    assert code == 0 and "model: model.pt, parameters: 33,440, weights: int8\n" in out
    text = continuation(load_pretrained("model.pt", quantize="int8"))
    assert Path("generated-sentence-temp-0.txt").read_bytes().decode("utf-8") == text
    code, out, _ = run("prompt", "--quantize", "int8")
    assert code == 0 and ", weights: int8\n" in out
    code, out, err = run("finetune", "--quantize", "int8")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--quantize is for inference alone, not for --option finetune" in err


# ---------------------------------------------------------------- prompt


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_prompt_predicts_by_the_oracles_scores_in_batches(run, workplace, attention):
    model = random_llama(seed=5, attention=attention)
    save_llama(model, workplace / "model.pt")
    code, out, _ = run("prompt", "--attention", attention, "--batch_size", "3")
    assert code == 0
    tokenizer = Tokenizer(tokenizer_model="tokenizer.model")
    labels = [tokenizer.encode(name, bos=False, eos=False)[0] for name in LABEL_NAMES]
    rows = read_sentences("toy-dev.txt")

    def predictions(ending: str, size: int = 3) -> list[int]:
        question = f"Is this movie bad or good? This movie is{ending}"
        prompts = [tokenizer.encode(f"{s} {question}", bos=True, eos=False) for s, _ in rows]
        said = []
        for batch in (prompts[i : i + size] for i in range(0, len(prompts), size)):
            width = max(map(len, batch))
            padded = [row + [tokenizer.pad_id] * (width - len(row)) for row in batch]
            logits, _ = oracle.forward(model.state_dict(), model.config, padded)
            for row, prompt in zip(logits, batch, strict=True):
                last = len(prompt) - 1 if attention == "causal" else -1
                said.append(int(np.argmax(row[last, labels])))
        return said

    with_space, without_space = predictions(" "), predictions("")
    assert with_space != without_space  # else the space could be lost unnoticed
    assert attention == "causal" or with_space != predictions(" ", size=8)  # so could batch_size
    expected = without_space if attention == "causal" else with_space
    written = [line.split(" ||| ", 1) for line in lines_of("toy-dev-prompting-output.txt")]
    assert written == [[str(p), s] for p, (s, _) in zip(expected, rows, strict=True)]
    accuracy = np.mean([p == label for p, (_, label) in zip(expected, rows, strict=True)])
    assert f"dev acc :: {accuracy:.3f}\n" in out


def test_prompt_asks_as_the_assignment_writes_it():
    assert run_llama.prompt_suffix(["bad", "good"]) == "Is this movie bad or good? This movie is "
    question = "Is this movie a, b, c, or d? This movie is "
    assert run_llama.prompt_suffix(["a", "b", "c", "d"]) == question


@pytest.fixture
def seen(monkeypatch) -> list[torch.Tensor]:
    """The token ids (B, T) of every pass through a Llama."""
    batches, hidden_states = [], Llama.hidden_states

    def recording(self, tokens, *options):
        batches.append(tokens)
        return hidden_states(self, tokens, *options)

    monkeypatch.setattr(Llama, "hidden_states", recording)
    return batches


def test_long_prompts_leave_room_for_the_longest_label_and_one_warning_counts_them(
    run, workplace, seen
):
    (workplace / "labels.json").write_text('["bad xyz", "good"]', encoding="utf-8")
    long = "a good film " * 40
    (workplace / "toy-dev.txt").write_text(f"0 ||| {long}\n1 ||| short\n", encoding="utf-8")
    code, _, err = run("prompt")
    assert (code, err.count("warning")) == (0, 1)
    assert "toy-dev.txt: 1 of 2 sentences" in err
    assert max(tokens.shape[1] for tokens in seen) == random_llama().config.max_seq_len
    said = [line.split(" ||| ")[1] for line in lines_of("toy-dev-prompting-output.txt")]
    assert said == [long.strip(), "short"]


# ---------------------------------------------------------------- finetune


def test_finetune_overfits_eight_sentences(run):
    options = ["--epochs", "30", "--lr", "3e-3", "--hidden_dropout_prob", "0", "--pooling", "mean"]
    code, out, err = run("finetune", *options)
    assert (code, err) == (0, "")
    assert "pooling: mean" in out
    for line in ("dev acc :: 1.000", "test acc :: 1.000", "dev macro f1 :: 1.000"):
        assert f"\n{line}\n" in out
    gold = [f"{label} ||| {sentence}" for sentence, label in read_sentences("toy-dev.txt")]
    assert lines_of("toy-dev-finetuning-output.txt") == gold
    assert lines_of("toy-test-finetuning-output.txt") == gold
    said = re.search("^epoch 1: .*:: (.*), .*:: (.*), .*:: (.*)$", out, re.MULTILINE).groups()
    lines = out.splitlines()
    row = lines[lines.index("Epoch | Train Loss | Train Acc | Dev Acc") + 2]
    assert [cell.strip() for cell in row.split("|")] == ["1", *said]
    saved = load_torch_file("finetune-toy-30-0.003.pt")
    assert saved["label_names"] == ["bad", "good"] and len(saved["tokenizer_sha256"]) == 64
    assert saved["model_config"]["pooling"] == "mean"


def test_finetune_tests_the_best_epoch_not_the_last(run, monkeypatch):
    heads = []

    def scripted(model, data, batch_size, device, bf16=False, description="eval"):
        if description == "eval dev":
            heads.append(model.classifier_head.bias.detach().clone())
        accuracy = 0.5 if description == "eval train" else [0.9, 0.1][len(heads) - 1]
        return Evaluation(accuracy, 0.5, [], [], [], [])

    monkeypatch.setattr(loop, "evaluate", scripted)
    code, _, err = run("finetune", "--epochs", "2", "--lr", "1e-2")
    assert code == 0, err
    kept = load_torch_file("finetune-toy-2-0.01.pt")["model"]["classifier_head.bias"]
    assert torch.equal(kept, heads[0]) and not torch.equal(kept, heads[1])


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
    said |= {"train_acc": "running", "bf16": True}
    assert [{key: call[key] for key in said} for call in calls] == [said]


@pytest.mark.parametrize("option", ["prompt", "finetune"])
def test_the_model_reads_max_sentence_len_tokens_in_batches_of_batch_size(
    run, workplace, seen, option
):
    run(option, "--max_sentence_len", "2", "--batch_size", "3", "--epochs", "1")
    tokenizer = Tokenizer(tokenizer_model="tokenizer.model")
    question = run_llama.prompt_suffix(LABEL_NAMES) if option == "prompt" else ""
    asked = tokenizer.encode(question, bos=False, eos=False)
    expected = {
        (tokenizer.bos_id, *tokenizer.encode(sentence, bos=False, eos=False)[:2], *asked)
        for sentence, _ in read_sentences("toy-dev.txt")  # train and test are the same
    }
    assert {tuple(row) for tokens in seen for row in tokens.tolist()} == expected
    assert sorted({len(tokens) for tokens in seen}) == [2, 3]  # of 8 sentences
    assert lines_of(f"toy-dev-{KIND[option]}-output.txt")[0].endswith("this film is bad")


@pytest.mark.parametrize("option", ["prompt", "finetune"])
def test_a_test_file_without_gold_labels_has_no_accuracy(run, workplace, option):
    text = "-1 ||| a good film\n-1 ||| a bad film\n"
    (workplace / "toy-test.txt").write_text(text, encoding="utf-8")
    code, out, _ = run(option, "--epochs", "1")
    assert code == 0
    assert "test acc :: n/a (no gold labels)" in out and "test macro f1" not in out
    assert len(lines_of(f"toy-test-{KIND[option]}-output.txt")) == 2


def test_labels_of_the_mapping_that_never_occur_are_warned_of_once(run, workplace):
    """Such as SST's five names for CFIMDB's two labels."""
    (workplace / "labels.json").write_text('["a", "b", "c", "d", "e"]', encoding="utf-8")
    code, _, err = run("finetune", "--epochs", "1")
    assert code == 0
    assert err.count("\n") == 1
    assert "warning: labels.json names 5 labels; never seen in toy-train.txt: 2, 3, 4" in err


# ---------------------------------------------------------------- errors


LOW = "--generated_sentence_low_temp_out"
ERRORS = [
    ("generate", ["--pretrained_model_path", "x.pt"], {}, ["mean --pretrained-model-path?"]),
    ("generate", ["--resume"], {}, ["--resume", "--option finetune"]),
    ("generate", ["--pretrained-model-path", "no.pt"], {}, ["no.pt", "setup.sh"]),
    ("generate", ["--pretrained-model-path", "."], {}, ["is not a file"]),
    ("generate", ["--tokenizer_path", "no.model"], {}, ["no.model", "setup.sh"]),
    ("generate", [LOW, "model.pt"], {}, ["model.pt: is an input"]),
    ("generate", [LOW, "tokenizer.model"], {}, ["tokenizer.model: is an input"]),  # found
    ("generate", [LOW, str(ROOT / "data/demo-dev.txt")], {}, ["is a file of the project"]),
    ("prompt", ["--dev_out", "dev.txt"], {}, ["dev.txt", "dev-prompting-output.txt"]),
    ("prompt", ["--dev", "x-dev-prompting-output.txt", "--dev_out", "x-dev-prompting-output.txt"],
     {}, ["is an input"]),
    ("prompt", ["--pooling", "mean"], {}, ["mean", "position"]),
    ("finetune", ["--test_out", "t.txt"], {}, ["t.txt", "test-finetuning-output.txt"]),
    ("prompt", [], {"labels.json": b'{"0": "bad"}'}, ["labels.json", "JSON list"]),
    ("finetune", ["--test", "no.txt"], {}, ["no.txt", "no such file"]),
    ("finetune", ["--r_drop", "1", "--hidden_dropout_prob", "0"], {}, ["without dropout"]),
    ("prompt", [], {"toy-dev.txt": b"0 ||| a\n7 ||| b\n"}, ["toy-dev.txt:2", "7"]),
    ("finetune", [], {"toy-train.txt": b"good ||| a\n"}, ["toy-train.txt:1", "write 1"]),
    ("finetune", [], {"toy-dev.txt": b"-1 ||| a\n"}, ["toy-dev.txt:1", "test files only"]),
]  # fmt: skip


@pytest.mark.parametrize(("option", "options", "files", "words"), ERRORS)
def test_errors_are_one_line_with_value_and_place_and_leave_no_file(
    run, workplace, option, options, files, words
):
    for name, content in files.items():
        (workplace / name).write_bytes(content)
    before = sorted(path.name for path in workplace.iterdir())
    code, _, err = run(option, *options)
    assert code == 2 and err.count("\n") == 1
    assert [word for word in words if word not in err] == []
    assert sorted(path.name for path in workplace.iterdir()) == before


@pytest.mark.parametrize("option", ["generate", "prompt", "finetune"])
def test_a_bug_in_the_model_shows_its_traceback(run, monkeypatch, option):
    def forward(self, x, *_):
        B, T = x.shape  # the third dimension is forgotten
        return x.view(B, T, -1)

    monkeypatch.setattr(Attention, "forward", forward)
    with pytest.raises(ValueError, match="too many values to unpack") as bug:
        run(option)
    assert not isinstance(bug.value, InputError)


def test_a_vocabulary_unlike_the_checkpoints_is_named_with_both_sizes(run, workplace):
    save_llama(random_llama(vocab_size=100), workplace / "model.pt")
    for option in ("generate", "prompt", "finetune"):
        code, _, err = run(option)
        assert code == 2
        assert "320 tokens, the checkpoint has 100" in err and "--tokenizer_path" in err


# ---------------------------------------------------------------- the assignment's functions


@pytest.fixture
def args(workplace) -> Namespace:
    """What the assignment's get_args returns and main adds: none of our own options."""
    names = {key: f"toy-{key}.txt" for key in ("train", "dev", "test")}
    outputs = {f"{key}_out": f"toy-{key}-finetuning-output.txt" for key in ("dev", "test")}
    ours = {"label_names": "labels.json", "pretrained_model_path": "model.pt", "epochs": 2}
    rest = {"option": "finetune", "filepath": "my-model.pt", "lr": 1e-3}
    return Namespace(**{**DEFAULTS, **names, **outputs, **ours, **rest})


def test_its_data_functions_work_together(args, tokenizer):
    Path("gap.txt").write_text("0 ||| A Film\n2 ||| Fine\n", encoding="utf-8")
    data, n_labels = run_llama.create_data("gap.txt", tokenizer, "train", lower=True)
    assert (n_labels, data[0].sentence, data[0].label) == (3, "a film", 0)
    assert data[0].tokens == tokenizer.encode("a film", bos=True, eos=True)
    Path("unknown.txt").write_text("-1 ||| a\n", encoding="utf-8")
    assert run_llama.create_data("unknown.txt", tokenizer, "test")[0].label == -1
    prompted = run_llama.create_data(args.dev, tokenizer, "valid", eos=False, prompt_suffix="So?")
    assert prompted[0].sentence == "this film is bad So?"
    args.max_sentence_len = 4
    dataset = run_llama.LlamaDataset(prompted, args)
    batch = next(iter(DataLoader(dataset, batch_size=3, collate_fn=dataset.collate_fn)))
    expected = tokenizer.encode("this film is bad So?", bos=True, eos=False)[:5]
    assert batch["token_ids"][0, : len(expected)].tolist() == expected
    assert set(batch) == {"token_ids", "labels", "lengths", "sents"}


def test_its_train_test_and_save_work_on_its_args(args, tokenizer, capsys):
    for _ in range(2):  # nothing is left that bars the next run of the same script
        run_llama.seed_everything(args.seed)
        run_llama.train(args)
        results = run_llama.test(args)
    assert "load model from my-model.pt" in capsys.readouterr().out
    model, _ = load_classifier("my-model.pt")
    config = Namespace(
        num_labels=2, pretrained_model_path="model.pt", option="finetune", hidden_dropout_prob=0.3
    )
    run_llama.save_model(model, AdamW(model.parameters()), args, config, "again.pt")
    assert "optim" in load_torch_file("again.pt")
    dataset = run_llama.LlamaDataset(
        run_llama.create_data(args.dev, tokenizer, "valid", eos=False), args
    )
    loader = DataLoader(dataset, batch_size=8, collate_fn=dataset.collate_fn)
    again, _ = load_classifier("again.pt")
    accuracy, f1, predictions, labels, sents = run_llama.model_eval(loader, again, CPU)
    dev = results["dev"]
    assert (accuracy, f1) == (dev.accuracy, dev.macro_f1)
    assert (predictions, labels, sents) == (dev.predictions, dev.labels, dev.sentences)
    run_llama.write_predictions_to_file("dev", "out.txt", accuracy, predictions, sents)
    assert lines_of("out.txt") == lines_of(args.dev_out)


def test_its_generating_and_prompting_work_on_its_args(args):
    run_llama.generate_sentence(args, "a good film", "out.txt", max_new_tokens=3)
    assert Path("out.txt").read_text(encoding="utf-8").startswith("a good film")
    args.option = "prompt"
    args.dev_out, args.test_out = "toy-dev-prompting-output.txt", "toy-test-prompting-output.txt"
    run_llama.test_with_prompting(args)
    assert len(lines_of(args.dev_out)) == 8


@pytest.fixture
def interrupted(args, monkeypatch) -> dict[str, torch.Tensor]:
    """A call of train(args) was stopped in its second epoch; what a whole one ends in."""
    run_llama.seed_everything(args.seed)
    run_llama.train(args)
    whole = load_torch_file("my-model.pt")["model"]
    take_step, steps = loop.take_step, []

    def stopping(*given):
        take_step(*given)
        steps.append(1)
        if len(steps) == 2:  # of one batch in each epoch
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(state.Stopped):
        patch.setattr(loop, "take_step", stopping)
        run_llama.seed_everything(args.seed)
        run_llama.train(args)
    assert Path("my-model.state.pt").exists()
    return whole


OLD = Path("my-model.state.old.pt")


def test_a_script_that_calls_train_again_continues(args, interrupted, capsys):
    run_llama.seed_everything(3)  # not what decides
    run_llama.train(args)
    assert "continue my-model.state.pt in epoch 1 after 1 batches" in capsys.readouterr().out
    assert_same_weights(load_torch_file("my-model.pt")["model"], interrupted)
    assert not Path("my-model.state.pt").exists() and not OLD.exists()


@pytest.mark.parametrize("restart", [True, False])
def test_on_request_or_with_other_settings_training_begins_anew_and_keeps_the_old_state(
    args, interrupted, capsys, restart
):
    words = ["(--restart)"]
    if restart:
        args.restart = True
    else:
        args.seed = 5
        Path("toy-train.txt").write_bytes(b"0 ||| a\n1 ||| b\n")
        save_llama(random_llama(seed=1), Path("model.pt"))
        words = ["(seed: saved 1337, now 5; ", "train_sha256: ", "model_sha256: "]
    run_llama.seed_everything(args.seed)
    assert [report.epoch for report in run_llama.train(args)] == [0, 1]
    out, err = capsys.readouterr()
    assert "my-model.state.pt is not resumed (" in err and all(word in err for word in words)
    assert f"it is renamed to {OLD}" in err and "continue my-model" not in out
    assert load_torch_file(OLD)["progress"]["epoch"] == 1


def test_resume_insists_past_changed_code_but_not_past_changed_settings(
    args, interrupted, monkeypatch, capsys
):
    args.resume, args.lr = True, 0.5
    with pytest.raises(InputError, match=r"another run \(lr: saved 0\.001, now 0\.5\)"):
        run_llama.train(args)
    args.lr = 1e-3
    monkeypatch.setattr(state, "source_digest", lambda: "another")
    run_llama.train(args)
    assert "warning: my-model.state.pt was saved by other source code" in capsys.readouterr().err
    assert_same_weights(load_torch_file("my-model.pt")["model"], interrupted)


def test_a_script_may_not_train_into_a_file_that_it_reads(args):
    for args.filepath in ("model.pt", "tokenizer.model", "toy-train.txt", "labels.json"):
        with pytest.raises(InputError, match="is an input and would be replaced"):
            run_llama.train(args)


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"label_names": ["good", "bad"]}, ["['good', 'bad']", "['bad', 'good']"]),
        ({"tokenizer_sha256": "0" * 64}, ["a different tokenizer", "tokenizer.model"]),
        ({"vocab_size": 100}, ["320 tokens", "100"]),
    ],
)
def test_a_checkpoint_of_other_labels_tokenizer_or_vocabulary_is_one_line(args, saved, words):
    config = SimpleNamespace(num_labels=2, option="finetune", hidden_dropout_prob=0.0)
    llama = random_llama(vocab_size=saved.pop("vocab_size", 320))
    save_classifier("my-model.pt", LlamaEmbeddingClassifier(config, llama), config, **saved)
    with pytest.raises(InputError) as refused:
        run_llama.test(args)
    assert "\n" not in str(refused.value)
    assert [word for word in words if word not in str(refused.value)] == []
    assert not list(Path().glob("*-output.txt"))


# ---------------------------------------------------------------- a script of one's own

# In the form of the assignment's run_llama.py: its own data functions and loop, which hand the
# model token ids alone, over our llama, classifier, optimizer, tokenizer and utils.
SCRIPT = """
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from types import SimpleNamespace

from classifier import LlamaZeroShotClassifier, LlamaEmbeddingClassifier
from llama import Llama, load_pretrained
from optimizer import AdamW
from tokenizer import Tokenizer
from utils import *

def read(path, tokenizer):
    with open(path, encoding="utf-8") as file:
        pairs = [line.lower().strip().split(" ||| ") for line in file]
    return [(tokenizer.encode(text, bos=True, eos=True), int(label)) for label, text in pairs]

def collate(rows):
    width = max(len(ids) for ids, _ in rows)
    ids = [ids + [tokenizer.pad_id] * (width - len(ids)) for ids, _ in rows]
    return torch.LongTensor(ids), torch.LongTensor([label for _, label in rows])

seed_everything(1337)
tokenizer = Tokenizer(None, "tokenizer.model")
rows = read("toy-train.txt", tokenizer)
loader = DataLoader(rows, shuffle=True, batch_size=4, collate_fn=collate)
config = SimpleNamespace(
    hidden_dropout_prob=0.0, pretrained_model_path="model.pt", num_labels=2, option="finetune"
)
model = LlamaEmbeddingClassifier(config)
optimizer = AdamW(model.parameters(), lr=3e-3)
for epoch in range(20):
    model.train()
    for b_ids, b_labels in loader:
        optimizer.zero_grad()
        loss = F.nll_loss(model(b_ids), b_labels.view(-1), reduction="sum") / 4
        loss.backward()
        optimizer.step()
model.eval()
with torch.no_grad():
    together = model(collate(rows)[0])
    alone = torch.cat([model(collate([row])[0]) for row in rows])
print("accuracy", (together.argmax(1) == collate(rows)[1]).float().mean().item())
print("padding", bool((together - alone).abs().max() > 1e-4))
print("asked", LlamaZeroShotClassifier(config, tokenizer, ["bad", "good"])(collate(rows)[0]).shape)
llama = load_pretrained("model.pt")
start = torch.tensor(tokenizer.encode("a good film", bos=True, eos=False)).unsqueeze(0)
ids = llama.generate(start, max_new_tokens=5, temperature=0.0)[0].tolist()
print("text", tokenizer.decode(ids))
"""


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_a_script_in_the_assignments_form_runs_on_our_modules(workplace, attention):
    """Also over a checkpoint that records causal attention, whose padding is then no word."""
    save_llama(random_llama(scale=1.0), workplace / "model.pt", attention=attention)
    Path("script.py").write_text(SCRIPT, encoding="utf-8")
    env = {**environment(), "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=env, check=False)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert said["accuracy"] == "1.0"
    assert said["padding"] == str(attention == "full")
    assert said["asked"] == "torch.Size([8, 2])"
    assert said["text"].startswith("a good film")


@pytest.mark.parametrize(
    ("gain", "options", "n"), [(2.2, (), 1), (1.4, (), 0), (2.2, ("--bf16",), 0)]
)
def test_bfloat16_is_recommended_where_the_processor_gains(run, monkeypatch, gain, options, n):
    monkeypatch.setattr(run_llama, "bfloat16_gain", lambda: gain)
    monkeypatch.setattr(run_llama, "finetune", run_llama.train)
    code, _, err = run("finetune", "--epochs", "1", *options)
    assert code == 0
    assert err.count("multiplies in bfloat16 2.2 times as fast") == n
