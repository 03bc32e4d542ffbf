"""The benchmark's contenders do the same work, its counts are right, and its words are true."""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import jobs, lengths, plot, profile, report, run, workers
from benchmarks.rows import Counts, all_rows
from conftest import ROOT, shared_asset
from fast import linear
from llama import Llama

TINY = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 320}
RATES = {"operations_per_s": 1e9, "bytes_per_s": 1e9}


@pytest.fixture
def tiny(monkeypatch) -> str:
    monkeypatch.setitem(jobs.SHAPES, "tiny", {**TINY, "max_seq_len": 256})
    monkeypatch.setattr(jobs, "keep_freed_memory", lambda: None)
    return "tiny"


def row_named(name: str, scratch: str = ""):
    (row,) = [row for row in all_rows(scratch) if row.name == name]
    return row


def work(row, contender: str, shape: str):
    if contender == "transformers":
        pytest.importorskip("transformers", reason="a development extra")
    return getattr(jobs, row.maker)(contender, shape=shape, **row.options)(None)


# ---------------------------------------------------------------- the data


@pytest.mark.parametrize(("dataset", "mean", "longest"), [("sst", 27, 93), ("cfimdb", 236, 585)])
def test_drawn_lengths_are_distributed_as_the_published_ones(dataset, mean, longest):
    drawn = lengths.draw_lengths(dataset, 20_000, seed=0, longest=10**6)
    assert np.mean(drawn) == pytest.approx(mean, rel=0.02)
    assert longest * 0.9 < max(drawn) <= longest
    assert max(lengths.draw_lengths(dataset, 1000, seed=0, longest=50)) == 50
    assert drawn[:9] == lengths.draw_lengths(dataset, 9, seed=0, longest=10**6)


def test_lengths_are_those_of_the_files(tmp_path, monkeypatch):
    for dataset in lengths.DATASETS:
        shared_asset(f"data/{dataset}-train.txt")
    tokenizer = shared_asset("models/tokenizer.model")
    monkeypatch.chdir(tokenizer.parent.parent)
    monkeypatch.setattr("tokenizer.TOKENIZER_MODEL", tokenizer)
    monkeypatch.setattr(lengths, "PATH", tmp_path / "lengths.json")
    committed = (ROOT / "benchmarks" / "lengths.json").read_text(encoding="utf-8")
    lengths.main()
    assert (tmp_path / "lengths.json").read_text(encoding="utf-8") == committed


# ---------------------------------------------------------------- the contenders


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_generating_contenders_give_the_same_tokens(tiny, attention):
    row = row_named(f"generate, {attention}")
    ours, plain = (work(row, name, tiny) for name in ("ours", "naive"))
    assert ours == plain
    assert len(ours) == jobs.N_PROMPT + jobs.N_NEW


@pytest.mark.parametrize("dataset", ["sst x 80", "cfimdb x 10"])
def test_training_contenders_have_the_same_losses(tiny, dataset):
    row = row_named(f"finetune, full, {dataset}")
    ours, plain = (work(row, name, tiny) for name in ("ours", "naive"))
    assert ours == pytest.approx(plain, abs=1e-5)


def test_prompting_contenders_predict_the_same(tiny):
    row = row_named("prompt, masked, sst x 10")
    ours, plain = (work(row, name, tiny) for name in ("ours", "naive"))
    assert ours == plain
    assert len(ours) == row.amount(Counts(tiny, RATES))


@pytest.mark.parametrize("contender", ["naive", "ours", "transformers"])
def test_an_epoch_reads_all_sentences_twice_and_a_batch_more(tiny, contender, monkeypatch):
    row, rows_read, make = row_named("epoch, masked, cfimdb x 10"), [], jobs.make_classifier

    def watched(*args):
        model = make(*args)

        def count(_module, inputs, options):
            tokens = inputs[0] if inputs else options["input_ids"]
            rows_read.append((model.training, len(tokens)))

        model.register_forward_pre_hook(count, with_kwargs=True)
        return model

    monkeypatch.setattr(jobs, "make_classifier", watched)
    assert 1.0 < work(row, contender, tiny) < 3.0  # the mean loss, about log 5
    n = row.amount(Counts(tiny, RATES))
    assert sum(length for training, length in rows_read if training) == n
    assert sum(length for training, length in rows_read if not training) == n + 10


def test_transformers_generates_and_is_asked_as_often(tiny):
    assert len(work(row_named("generate, causal"), "transformers", tiny)) == 107
    assert len(work(row_named("prompt, masked, sst x 10"), "transformers", tiny)) == 200
    assert len(work(row_named("finetune, full, sst x 80"), "transformers", tiny)) == 2


@pytest.mark.parametrize("contender", ["naive", "ours", "torch", "torch fused"])
def test_every_optimizer_moves_the_weights(tiny, contender, monkeypatch):
    kept, make = [], jobs.make_llama
    monkeypatch.setattr(jobs, "make_llama", lambda *a: kept.append(make(*a)) or kept[0])
    step = jobs.adamw(contender, tiny)
    before = kept[0].output.weight.detach().clone()
    step(None)
    moved = (kept[0].output.weight.detach() - before).abs()
    assert moved.max().item() == pytest.approx(jobs.LR, rel=1e-2)  # the first step has length lr


@pytest.mark.parametrize("contender", ["naive", "ours", "transformers"])
def test_a_curve_has_a_step_for_each_point(tiny, contender):
    if contender == "transformers":
        pytest.importorskip("transformers", reason="a development extra")
    job = jobs.curve(contender, tiny, [(2, 5), (1, 9)])
    assert job((2, 5)) and job((1, 9))


@pytest.mark.parametrize("contender", ["naive", "ours", "import torch", "read file"])
def test_a_start_up_ends_well(tiny, contender, tmp_path):
    assert jobs.start_up(contender, tiny, str(tmp_path))(None) == 0


# ---------------------------------------------------------------- the counts


@pytest.mark.parametrize("n_logits", [0, 1])
def test_operations_are_those_that_torch_counts(tiny, monkeypatch, n_logits):
    monkeypatch.setattr(linear, "_onednn_linear", None)  # which the counter does not know
    counts = Counts(tiny, RATES)
    model = Llama(counts.config)
    tokens = torch.randint(300, (1, 40))
    # The counter's attention is of full sequences; of a causal one half the scores are needed.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _ = model(tokens) if n_logits else model.hidden_states(tokens)
    # Flash attention on a CPU is not in its table: two products of T x T x dim in each layer.
    attention = 4 * counts.config.n_layers * counts.config.dim * 40 * 40
    counted = counter.get_total_flops()
    assert counts.forward([40], n_logits) == counted + attention


def test_limits_are_bytes_and_operations_over_the_rates(tiny):
    counts = Counts(tiny, RATES)
    model = Llama(counts.config)
    n = sum(p.numel() for p in model.parameters())
    assert row_named("generate, causal").limit(counts) == pytest.approx(75 * 4 * n / 1e9)
    assert row_named("AdamW step").limit(counts) == pytest.approx(28 * n / 1e9)
    steps = row_named("finetune, full, sst x 80")
    tokens = steps.amount(counts)
    assert steps.limit(counts) > 6 * counts.n_in_layers * tokens / 1e9
    causal, full = counts.forward([40], causal=True), counts.forward([40])
    assert full - causal == 4 * 2 * 32 * sum(range(40))  # layers, dim, scores above the diagonal
    assert counts.n_in_layers == n - 320 * 32 - 5 * 32  # without embedding and five norms


# ---------------------------------------------------------------- turns and words


def test_contenders_take_turns_in_their_own_processes():
    names = ("multiply, BLAS", "multiply, oneDNN")
    measured = workers.take_turns("machine", names, {}, repeats=2, threads=1)
    assert set(measured) == set(names)
    for m in measured.values():
        assert len(m["seconds"]) == 1 and len(m["seconds"][0]) == 2
        assert min(m["seconds"][0]) > 0 and m["peak_mb"] > 32  # two matrices of 16 MB


def test_a_contender_that_dies_is_named():
    with pytest.raises(RuntimeError, match="machine, read 256 MB"):
        workers.Worker("machine", "read 256 MB", {"no such option": 1}, 1)


def measured_row(**medians: float) -> dict:
    contenders = {
        name.replace("_", " "): {"median": seconds, "seconds": [seconds], "peak_mb": 100 * seconds}
        for name, seconds in medians.items()
    }
    return {
        "shape": "stories42M", "row": "a row", "unit": "tokens/s", "amount": 300,
        "limit_seconds": 0.5, "ours_vs_naive": "0 of 3 differ", "contenders": contenders,
    }  # fmt: skip


def test_the_table_has_rates_ratios_and_the_distance_from_the_limit():
    lines = report.table([measured_row(naive=4.0, ours=1.0, transformers=3.0)]).splitlines()
    assert lines[-1] == (
        "| stories42M | a row (tokens/s) | 75.0 | 300 | 100 | 4.00 | 3.00 | 0.50 | 0.25 |"
    )
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    without = report.table([measured_row(naive=4.0, ours=1.0)]).splitlines()[-1]
    assert without == "| stories42M | a row (tokens/s) | 75.0 | 300 |  | 4.00 |  | 0.50 | 0.25 |"


def test_targets_are_met_or_missed():
    row = measured_row(naive=4.0, ours=1.0, torch_fused=0.5, import_torch=0.6, read_file=0.1)
    bounds = {"naive": 4.0, "torch fused": 0.6, "limit": 0.5, "memory": 0.2}
    bounds["beyond import and reading"] = 0.31
    verdicts = report.check([row], {"a row": bounds}).splitlines()
    assert [line.split(":")[0] for line in verdicts] == ["met", "MISSED", "met", "MISSED", "met"]
    assert report.check([{**row, "shape": "mini"}], {"a row": bounds}) == ""
    assert "torch fused 0.5000 s" in report.others([row])


def test_results_are_compared_as_what_they_are():
    assert run.difference([1, 2, 3], [1, 5, 3]) == "1 of 3 differ"
    assert run.difference([0.5, 1.0], [0.5, 1.25]) == "losses differ by at most 2.5e-01"
    assert run.difference(None, None) is None


def test_a_run_writes_its_numbers_and_a_plot(tmp_path, capsys):
    for package in ("transformers", "matplotlib"):
        pytest.importorskip(package, reason="a development extra")
    out = tmp_path / "speed.json"
    options = ["--shapes", "stories260K", "--rows", "AdamW", "--repeats", "1", "--threads", "1"]
    run.main([*options, "--out", str(out)])
    content = json.loads(out.read_text(encoding="utf-8"))
    assert [row["row"] for row in content["rows"]] == ["AdamW step"]
    everything = report.with_limits(content["rows"])
    assert report.table(everything) in capsys.readouterr().out
    another = [*options[:3], "generate, full", *options[4:]]
    run.main([*another, "--out", str(out)])
    both = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["row"] for row in both] == ["AdamW step", "generate, full"]
    assert both[0] == content["rows"][0]
    content["growth"] = {
        "shape": "stories260K",
        "points": [(2, 4), (2, 8), (1, 4), (2, 4)],
        "seconds": {"naive": [1, 2, 1, 2], "ours": [0.5, 1, 0.5, 1]},
    }
    for name in plot.plot(content, out.with_suffix("")):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"speed.json", "speed.png", "growth.png"}


def test_an_unknown_shape_row_or_contender_is_refused():
    for package in ("transformers", "matplotlib"):
        pytest.importorskip(package, reason="a development extra")
    with pytest.raises(ValueError, match="llama7b"):
        run.main(["--shapes", "llama7b"])
    with pytest.raises(ValueError, match="no such row"):
        profile.main(["no such row"])
    with pytest.raises(ValueError, match="transformers"):
        profile.main(["generate, full", "--shape", "stories260K", "--contender", "transformers"])
