"""run_llama.py through its real entry point: three modes, every option, every error."""

import io
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import run_llama
from conftest import ROOT, random_llama, save_llama, shared_asset
from optimizer import AdamW
from training.distributed import ALONE
from training.labelled import PLACEHOLDER_SHA256, read_sentences

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


def lines_of(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


def test_options_and_defaults_are_the_assignments_and_ours_are_optional(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("training.options.ROOT", tmp_path)  # where nothing is bundled
    monkeypatch.chdir(tmp_path)
    args = vars(run_llama.get_args([]))
    assert {key: args.pop(key) for key in DEFAULTS} == DEFAULTS
    assert args == {
        "attention": None,
        "pooling": None,
        "tokenizer_path": None,
        "warmup": 0.0,
        "lr_decay": None,
        "layer_decay": 1.0,
        "backbone_dropout": None,
        "label_smoothing": 0.0,
        "r_drop": 0.0,
        "patience": None,
        "max_grad_norm": None,
        "bf16": False,
        "train_acc": "extra",
        "resume": False,
        "save_minutes": 5.0,
    }
    assert capsys.readouterr().out.count("args: ") == 1


# ---------------------------------------------------------------- generate


def test_generate_writes_the_printed_continuations_of_the_assignments_prefix(run):
    code, out, err = run("generate")
    assert (code, err) == (0, "")
    assert out.count("load model from model.pt") == 1
    for temperature, name in (("0.0", "generated-sentence-temp-0.txt"), ("1.0", "-temp-1.txt")):
        path = name if name[0] == "g" else f"generated-sentence{name}"
        text = Path(path).read_bytes().decode("utf-8")
        assert text.startswith(run_llama.PREFIX)
        assert f"Temperature is {temperature}\n{text}\n---------------\n" in out
        assert f"Wrote generated sentence to {path}." in out
    assert "device: cpu, attention: full, model: model.pt, parameters: 33,440" in out


def test_generate_is_reproducible_for_a_seed(run):
    texts = []
    for seed in ("1", "1", "2"):
        out = f"temp-1-{len(texts)}.txt"
        run("generate", "--seed", seed, "--generated_sentence_high_temp_out", out)
        texts.append(Path(out).read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_attention_option_overrides_what_the_checkpoint_records(run, workplace):
    save_llama(random_llama(scale=1.0), workplace / "causal.pt", attention="causal")
    for options, mode in (
        (("--pretrained-model-path", "causal.pt"), "causal"),
        (("--pretrained-model-path", "causal.pt", "--attention", "full"), "full"),
        (("--attention", "causal"), "causal"),
    ):
        assert f"attention: {mode}," in run("generate", *options)[1]


def test_generate_pays_for_neither_scikit_learn_nor_transformers(run, workplace):
    script = (
        "import sys, run_llama; run_llama.main(sys.argv[1:]); "
        "print(sorted({'sklearn', 'scipy', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, "--pretrained-model-path", "model.pt"]
    ended = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert ended.stdout.splitlines()[-1] == "[]"


FREE = ["--attention", "causal", "--max_new_tokens", "6", "--temperature", "0"]


def test_a_prefix_of_ones_own_is_continued_on_standard_output_and_nothing_is_written(
    run, workplace
):
    before = sorted(workplace.iterdir())
    code, out, err = run("generate", *FREE, "--prefix", "this movie is")
    assert code == 0
    assert out.startswith("this movie is ")
    assert out.count("\n") == 1
    assert "load model from model.pt" in err
    assert sorted(workplace.iterdir()) == before
    likeliest = ["--prefix", "this movie is", "--temperature", "1", "--top_k", "1"]
    assert run("generate", *FREE, *likeliest, "--num_samples", "2")[1] == (
        f"{out}---------------\n{out}"
    )


@pytest.mark.parametrize("option", [["--top_k", "1"], ["--temperature", "0"], ["--stop_at_eos"]])
def test_any_option_of_free_generation_keeps_the_assignments_files_from_being_written(
    run, workplace, option
):
    code, out, _ = run("generate", *option)
    assert code == 0
    assert out.startswith(run_llama.PREFIX[:40])
    assert not list(workplace.glob("generated-sentence*"))


def test_a_prefix_is_read_from_standard_input(run, monkeypatch):
    expected = run("generate", *FREE, "--prefix", "a good\nmovie")[1]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a good\r\nmovie\n")))
    assert run("generate", *FREE, "--prefix", "-")[1] == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    code, _, err = run("generate", *FREE, "--prefix", "-")
    assert code == 2
    assert "--prefix:1: byte 0xe9 is not UTF-8" in err


def test_on_a_terminal_the_text_comes_in_pieces_and_is_the_same(run, monkeypatch):
    options = ["--prefix", "this", "--max_new_tokens", "6", "--seed", "5", "--num_samples", "2"]
    expected = run("generate", *options)[1]
    written, write = [], sys.stdout.write
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "write", lambda text: written.append(text) or write(text))
    assert run("generate", *options)[1] == expected
    first = expected.partition("\n")[0]
    assert first.startswith(written[0])
    assert len(written[0]) < len(first)


def test_a_prefix_longer_than_the_window_is_continued_with_a_warning(run):
    code, out, err = run("generate", *FREE, "--prefix", "good " * 200)
    assert code == 0
    assert out.startswith("good good")
    assert "of which the model reads the last 96" in err


# ---------------------------------------------------------------- prompt


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_prompt_writes_a_prediction_for_each_sentence_in_order(run, attention):
    code, out, err = run("prompt", "--attention", attention)
    assert (code, err) == (0, "")
    for split in ("dev", "test"):
        rows = read_sentences(f"toy-{split}.txt")
        written = lines_of(f"toy-{split}-prompting-output.txt")
        assert [line.split(" ||| ", 1)[1] for line in written] == [s for s, _ in rows]
        predictions = [int(line.split(" ||| ")[0]) for line in written]
        hits = [p == label for p, (_, label) in zip(predictions, rows, strict=True)]
        assert f"{split} acc :: {sum(hits) / len(hits):.3f}\n" in out


def test_prompt_asks_as_the_assignment_writes_it():
    assert run_llama.prompt_suffix(["bad", "good"]) == ("Is this movie bad or good? This movie is ")
    assert run_llama.prompt_suffix(["a", "b", "c", "d"]) == (
        "Is this movie a, b, c, or d? This movie is "
    )


def test_prompts_longer_than_the_model_are_cut_with_one_counted_warning(run, workplace):
    long = "a good film " * 40
    (workplace / "toy-dev.txt").write_text(
        f"0 ||| {long}\n1 ||| short\n0 ||| {long}b\n", encoding="utf-8"
    )
    code, _, err = run("prompt")
    assert code == 0
    assert err.count("warning") == 1
    assert "toy-dev.txt: 2 of 3 sentences" in err
    assert [line.split(" ||| ")[1] for line in lines_of("toy-dev-prompting-output.txt")] == [
        long.strip(),
        "short",
        f"{long}b",
    ]


# ---------------------------------------------------------------- finetune


def test_finetune_overfits_eight_sentences(run, workplace):
    code, out, err = run(
        "finetune", "--epochs", "30", "--lr", "3e-3", "--hidden_dropout_prob", "0", "--pooling",
        "mean",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "pooling: mean" in out
    assert "dev acc :: 1.000\ntest acc :: 1.000\n" in out.replace(
        "load 8 data from toy-test.txt\n", ""
    )
    assert "dev macro f1 :: 1.000" in out
    gold = [f"{label} ||| {sentence}" for sentence, label in read_sentences("toy-dev.txt")]
    assert lines_of("toy-dev-finetuning-output.txt") == gold
    assert lines_of("toy-test-finetuning-output.txt") == gold


def test_finetune_reports_each_epoch_and_a_table(run):
    _, out, _ = run("finetune", "--epochs", "2", "--lr", "1e-3")
    lines = out.splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 2
    loss, train_acc, dev_acc = (part.split(":: ")[1] for part in epochs[1].split(", "))
    start = lines.index("Epoch | Train Loss | Train Acc | Dev Acc")
    assert [cell.strip() for cell in lines[start + 2].split("|")] == ["1", loss, train_acc, dev_acc]


def test_finetune_evaluates_the_best_epoch_not_the_last(run, monkeypatch):
    evaluate = run_llama.evaluate
    checkpoints = []

    def scripted(model, loader, device, description, bf16=False, ranks=ALONE):
        result = evaluate(model, loader, device, description, bf16, ranks)
        accuracy = {"eval train": 0.5, "eval dev": [0.9, 0.1][len(checkpoints)]}[description]
        if description == "eval dev":
            checkpoints.append(model.classifier_head.bias.detach().clone())
        return result.__class__(accuracy, 0.5, [], [], [], [])

    monkeypatch.setattr("training.loop.evaluate", scripted)
    run("finetune", "--epochs", "2", "--lr", "1e-2")
    kept = torch.load("finetune-toy-2-0.01.pt", weights_only=True)["model"]
    assert torch.equal(kept["classifier_head.bias"], checkpoints[0])
    assert not torch.equal(kept["classifier_head.bias"], checkpoints[1])


def test_finetune_is_reproducible_for_a_seed(run):
    outputs = [run("finetune", "--epochs", "1", "--seed", seed)[1] for seed in ("1", "1", "2")]
    epochs = [[line for line in out.splitlines() if "epoch 0" in line] for out in outputs]
    assert epochs[0] == epochs[1] != epochs[2]


def test_checkpoints_of_two_data_sets_do_not_overwrite_each_other(run, workplace):
    (workplace / "other-train.txt").write_bytes((workplace / "toy-train.txt").read_bytes())
    run("finetune", "--epochs", "1")
    run("finetune", "--epochs", "1", "--train", "other-train.txt")
    for name in ("finetune-toy-1-2e-05.pt", "finetune-other-1-2e-05.pt"):
        saved = torch.load(workplace / name, weights_only=True)
        assert saved["label_names"] == ["bad", "good"]
        assert saved["model_config"]["pooling"] == "position"
        assert saved["model_args"]["attention"] == "full"
        assert len(saved["tokenizer_sha256"]) == 64


def test_a_label_absent_from_the_train_file_leaves_no_hole_in_the_head(run, workplace):
    (workplace / "labels.json").write_text('["awful", "bad", "good"]', encoding="utf-8")
    (workplace / "toy-train.txt").write_text("0 ||| bad film\n2 ||| good film\n", encoding="utf-8")
    (workplace / "toy-dev.txt").write_text("1 ||| a film\n", encoding="utf-8")
    assert run("finetune", "--epochs", "1")[0] == 0


@pytest.mark.parametrize("option", ["prompt", "finetune"])
def test_a_test_file_without_gold_labels_has_no_accuracy(run, workplace, option):
    (workplace / "toy-test.txt").write_text(
        "-1 ||| a good film\n-1 ||| a bad film\n", encoding="utf-8"
    )
    code, out, _ = run(option, "--epochs", "1")
    assert code == 0
    assert "test acc :: n/a (no gold labels)" in out
    assert "test macro f1" not in out
    kind = {"prompt": "prompting", "finetune": "finetuning"}[option]
    assert len(lines_of(f"toy-test-{kind}-output.txt")) == 2


def test_the_placeholder_file_is_known_by_its_content_not_its_name(run, workplace):
    (workplace / "toy-test.txt").write_bytes(shared_asset("data/cfimdb-test.txt").read_bytes())
    (workplace / "toy-dev.txt").write_text("0 ||| a bad film\n1 ||| good\n", encoding="utf-8")
    code, out, _ = run("prompt", "--batch_size", "64", "--max_sentence_len", "5")
    assert code == 0
    assert "test acc :: n/a (no gold labels)" in out
    assert len(PLACEHOLDER_SHA256) == 1


def test_max_sentence_len_cuts_what_the_model_reads_and_not_what_is_written(run, workplace):
    (workplace / "toy-dev.txt").write_text(
        "0 ||| good bad\n1 ||| good bad film and story\n", encoding="utf-8"
    )
    run("finetune", "--epochs", "1", "--max_sentence_len", "2", "--batch_size", "1")
    first, second = lines_of("toy-dev-finetuning-output.txt")
    assert first.split(" ||| ")[0] == second.split(" ||| ")[0]  # the same two tokens were read
    assert second.endswith("good bad film and story")


# ---------------------------------------------------------------- errors: one line, exit code 2


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def nothing(folder: Path) -> None:
    pass


ERRORS = [
    ("generate", ["--seed", "-1"], nothing, ["--seed", "'-1'"]),
    ("generate", ["--seed", "x"], nothing, ["--seed", "'x'"]),
    ("finetune", ["--epochs", "0"], nothing, ["--epochs", "'0'"]),
    ("finetune", ["--batch_size", "0"], nothing, ["--batch_size", "'0'"]),
    ("finetune", ["--lr", "nan"], nothing, ["--lr", "'nan'"]),
    ("finetune", ["--lr", "-1"], nothing, ["--lr", "'-1'"]),
    ("finetune", ["--hidden_dropout_prob", "1"], nothing, ["--hidden_dropout_prob", "'1'"]),
    ("finetune", ["--max_sentence_len", "0"], nothing, ["--max_sentence_len", "'0'"]),
    ("generate", ["--attention", "none"], nothing, ["--attention", "'none'"]),
    ("generate", ["--pooling", "max"], nothing, ["--pooling", "'max'"]),
    ("generate", ["--nonsense"], nothing, ["--nonsense"]),
    ("generate", ["--option", "train"], nothing, ["--option", "'train'"]),
    ("generate", ["--pretrained-model-path", "no.pt"], nothing, ["no.pt", "setup.sh"]),
    ("generate", ["--pretrained-model-path", "."], nothing, ["is not a file"]),
    ("generate", [], write("model.pt", b"<html>not found</html>"), ["model.pt", "text page"]),
    ("generate", ["--tokenizer_path", "no.model"], nothing, ["no.model", "setup.sh"]),
    ("generate", [], write("tokenizer.model", b"garbage"), ["tokenizer.model", "SentencePiece"]),
    (
        "generate",
        ["--generated_sentence_low_temp_out", "no/out.txt"],
        nothing,
        ["no/out.txt", "folder does not exist"],
    ),
    (
        "generate",
        ["--generated_sentence_low_temp_out", "."],
        nothing,
        ["is no name for an output file"],
    ),
    ("prompt", ["--dev_out", "dev.txt"], nothing, ["dev.txt", "dev-prompting-output.txt"]),
    ("prompt", ["--test_out", "t.txt"], nothing, ["t.txt", "test-prompting-output.txt"]),
    ("prompt", ["--pooling", "mean"], nothing, ["mean", "position"]),
    ("finetune", ["--dev_out", "d.txt"], nothing, ["d.txt", "dev-finetuning-output.txt"]),
    ("finetune", ["--test_out", "t.txt"], nothing, ["t.txt", "test-finetuning-output.txt"]),
    ("prompt", ["--label-names", "no.json"], nothing, ["no.json", "no such file"]),
    ("prompt", [], write("labels.json", b'{"0": "bad"}'), ["labels.json", "JSON list"]),
    ("prompt", ["--dev", "no.txt"], nothing, ["no.txt", "no such file"]),
    ("finetune", ["--train", "no.txt"], nothing, ["no.txt", "no such file"]),
    ("finetune", ["--test", "no.txt"], nothing, ["no.txt", "no such file"]),
    ("prompt", [], write("toy-dev.txt", b"0 ||| a\n7 ||| b\n"), ["toy-dev.txt:2", "7"]),
    ("finetune", [], write("toy-train.txt", b"1 ||| a\nno label\n"), ["toy-train.txt:2"]),
    ("finetune", [], write("toy-dev.txt", b"-1 ||| a\n"), ["toy-dev.txt:1", "test files only"]),
    ("finetune", [], write("toy-train.txt", b""), ["toy-train.txt", "no example"]),
    ("prompt", [], write("toy-test.txt", b"0 ||| caf\xe9\n"), ["toy-test.txt:1", "0xe9"]),
]


@pytest.mark.parametrize(("option", "options", "spoil", "words"), ERRORS)
def test_errors_are_one_line_with_value_and_place_and_leave_no_file(
    run, workplace, option, options, spoil, words
):
    spoil(workplace)
    before = sorted(path.name for path in workplace.iterdir())
    code, _, err = run(option, *options)
    assert code == 2
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert sorted(path.name for path in workplace.iterdir()) == before


@pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU here"
)
@pytest.mark.parametrize("option", ["generate", "prompt", "finetune"])
def test_use_gpu_without_a_gpu_is_one_line(run, option):
    code, _, err = run(option, "--use_gpu")
    assert code == 2
    assert err.count("\n") == 1
    assert "neither a CUDA nor an MPS device" in err


def test_vocabulary_unlike_the_checkpoints_is_named_with_both_sizes(run, workplace):
    save_llama(random_llama(vocab_size=100), workplace / "model.pt")
    for option in ("generate", "prompt", "finetune"):
        code, _, err = run(option)
        assert code == 2
        assert "320" in err
        assert "100" in err
        assert "--tokenizer_path" in err


def test_tokenizer_path_names_the_tokenizer(run, workplace):
    (workplace / "tokenizer.model").rename(workplace / "elsewhere.bin")
    assert run("generate", "--tokenizer_path", "elsewhere.bin")[0] == 0


def test_real_process_ends_with_one_line_and_code_2(workplace):
    command = [sys.executable, str(ROOT / "run_llama.py"), "--pretrained-model-path", "no.pt"]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("run_llama.py: error: no.pt: ")
    assert ended.stderr.count("\n") == 1


# ---------------------------------------------------------------- the assignment's own functions


@pytest.fixture
def args(workplace) -> Namespace:
    """What the assignment's get_args returns and main adds: none of our own options."""
    names = {key: f"toy-{key}.txt" for key in ("train", "dev", "test")}
    return Namespace(
        **{
            **DEFAULTS,
            **names,
            "label_names": "labels.json",
            "pretrained_model_path": "model.pt",
            "option": "finetune",
            "epochs": 1,
            "dev_out": "toy-dev-finetuning-output.txt",
            "test_out": "toy-test-finetuning-output.txt",
            "filepath": "my-model.pt",
        }
    )


def test_assignment_data_functions_work_together(args, tokenizer):
    data, n_labels = run_llama.create_data(args.train, tokenizer, "train")
    assert n_labels == 2
    sentence, label, tokens = data[0]
    assert (sentence, label) == ("this film is bad", 0)
    assert tokens == tokenizer.encode(sentence, bos=True, eos=True)
    prompted = run_llama.create_data(
        args.dev, tokenizer, "valid", lower=True, eos=False, prompt_suffix="So?"
    )
    assert prompted[0].sentence == "this film is bad So?"
    dataset = run_llama.LlamaDataset(prompted, args)
    loader = DataLoader(dataset, shuffle=False, batch_size=3, collate_fn=dataset.collate_fn)
    batch = next(iter(loader))
    expected = tokenizer.encode("this film is bad So?", bos=True, eos=False)
    assert batch["token_ids"][0, : len(expected)].tolist() == expected
    assert (batch["token_ids"][0, len(expected) :] == tokenizer.pad_id).all()
    assert set(batch) == {"token_ids", "labels", "lengths", "sents"}


def test_assignment_data_functions_take_what_the_assignments_do(args, tokenizer):
    Path("gap.txt").write_text("0 ||| A Film\n2 ||| Fine\n", encoding="utf-8")
    data, n_labels = run_llama.create_data("gap.txt", tokenizer, "train", lower=True)
    assert (n_labels, data[0].sentence) == (3, "a film")
    Path("unknown.txt").write_text("-1 ||| a\n", encoding="utf-8")
    assert run_llama.create_data("unknown.txt", tokenizer, "test")[0].label == -1
    args.max_sentence_len = 2
    dataset = run_llama.LlamaDataset([("this film is bad", 0)], args)
    assert len(dataset[0].tokens) == 3  # two, and the beginning


def test_assignment_train_test_and_save_work_on_its_args(args, tokenizer, capsys):
    for _ in range(2):  # and leave nothing that bars the next run of the same script
        run_llama.seed_everything(args.seed)
        run_llama.train(args)
        run_llama.test(args)
    out = capsys.readouterr().out
    assert "epoch 0: train loss :: " in out
    assert "dev acc :: " in out
    assert "load model from my-model.pt" in out

    model = run_llama.load_classifier("my-model.pt")[0]
    config = Namespace(
        num_labels=2, pretrained_model_path="model.pt", option="finetune", hidden_dropout_prob=0.3
    )
    optimizer = AdamW(model.parameters())
    run_llama.save_model(model, optimizer, args, config, "again.pt")
    assert "optim" in torch.load("again.pt", weights_only=True)

    dataset = run_llama.LlamaDataset(run_llama.create_data(args.dev, tokenizer, "valid"), args)
    loader = DataLoader(dataset, batch_size=4, collate_fn=dataset.collate_fn)
    again = run_llama.load_classifier("again.pt")[0]
    results = [run_llama.model_eval(loader, m, torch.device("cpu")) for m in (model, again)]
    assert results[0] == results[1]
    accuracy, _, predictions, labels, sentences = results[0]
    assert len(predictions) == len(labels) == len(sentences) == 8
    run_llama.write_predictions_to_file("dev", "out.txt", accuracy, predictions, sentences)
    assert lines_of("out.txt")[0] == f"{predictions[0]} ||| {sentences[0]}"


def test_assignment_generate_sentence_and_prompting_work_on_its_args(args):
    run_llama.generate_sentence(args, "a good film", "out.txt", max_new_tokens=3)
    assert Path("out.txt").read_text(encoding="utf-8").startswith("a good film")
    args.option = "prompt"
    args.dev_out, args.test_out = "toy-dev-prompting-output.txt", "toy-test-prompting-output.txt"
    run_llama.test_with_prompting(args)
    assert len(lines_of(args.dev_out)) == 8


# ---------------------------------------------------------------- real weights


@pytest.mark.parametrize("name", ["stories260K.pt", "stories260K.bin"])
def test_real_weights_continue_the_prefix_in_words(run, name):
    path = shared_asset(f"models/stories260K/{name}")
    code, out, _ = run("generate", "--pretrained-model-path", str(path), "--attention", "causal")
    assert code == 0
    text = Path("generated-sentence-temp-0.txt").read_text(encoding="utf-8")
    continuation = text.removeprefix(run_llama.PREFIX).split()
    vocabulary = shared_words()
    known = [word.strip(".,!?\"'").lower() in vocabulary for word in continuation[:-1]]
    assert len(known) > 15
    assert sum(known) / len(known) > 0.9  # English words, not pieces of them
    assert "attention: causal, model: " + name in out


def shared_words() -> set[str]:
    """Every word of the SST training sentences."""
    rows = read_sentences(shared_asset("data/sst-train.txt"))
    return {word.lower().strip("'") for sentence, _ in rows for word in sentence.split()}


def test_committed_label_names_are_those_of_the_data(workplace):
    for dataset, n_labels in (("sst", 5), ("cfimdb", 2)):
        names = json.loads(
            (ROOT / f"data/{dataset}-label-mapping.json").read_text(encoding="utf-8")
        )
        assert len(names) == n_labels
        labels = {label for _, label in read_sentences(shared_asset(f"data/{dataset}-train.txt"))}
        assert labels == set(range(n_labels))
