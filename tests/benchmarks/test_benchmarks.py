"""The benchmark's contenders do the same work, its counts are right, and its tables are true."""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import many_devices, report, rows, run
from benchmarks.contenders import SHAPES, draw_lengths, make_classifier, make_llama
from conftest import ROOT, shared_asset
from tokenizer import Tokenizer
from training.dataset import encode_examples
from training.labelled import read_sentences

CONTENDERS = ("naive", "ours", "transformers")
ROWS = {row.name: row for row in rows.all_rows("")}


@pytest.fixture
def tiny(monkeypatch) -> str:
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 320}
    monkeypatch.setitem(SHAPES, "tiny", {**shape, "max_seq_len": 256})
    return "tiny"


def results(name: str, shape: str) -> dict:
    """Return the first result of each contender of a row."""
    pytest.importorskip("transformers", reason="a development extra")
    row = ROWS[name]
    return {who: row.build(who, shape, *row.args).run() for who in row.contenders}


@pytest.mark.parametrize("dataset", ["sst", "cfimdb"])
def test_lengths_are_the_percentiles_of_the_training_files(dataset):
    data, model = shared_asset(f"data/{dataset}-train.txt"), shared_asset("models/tokenizer.model")
    tokenizer = Tokenizer(tokenizer_model=model)
    examples, _ = encode_examples(read_sentences(data), tokenizer, max_tokens=10**9)
    percentiles = np.percentile([len(e.tokens) for e in examples], range(101))
    text = (ROOT / "benchmarks" / "lengths.json").read_text(encoding="utf-8")
    assert json.loads(text)[dataset] == list(percentiles)
    drawn = draw_lengths(dataset, 20_000, seed=0, longest=10**6)
    assert np.mean(drawn) == pytest.approx(np.mean(percentiles), rel=0.02)
    assert max(draw_lengths(dataset, 1000, seed=0, longest=50)) == 50


@pytest.mark.parametrize("name", ["generate, causal", "generate, full"])
def test_contenders_generate_as_many_tokens_and_ours_are_naives(tiny, name):
    tokens = results(name, tiny)
    assert tokens["ours"] == tokens["naive"]
    assert {len(of) for of in tokens.values()} == {rows.N_PROMPT + rows.N_NEW}


def test_contenders_finetune_and_prompt_alike(tiny):
    losses = results("finetune, full, cfimdb x 10", tiny)
    assert losses["ours"] == pytest.approx(losses["naive"], abs=1e-5)
    assert len(losses["transformers"]) == 2
    predictions = results("prompt, masked, sst x 10", tiny)
    assert predictions["ours"] == predictions["naive"]
    assert len(predictions["transformers"]) == len(predictions["ours"]) == 200


@pytest.mark.parametrize("contender", CONTENDERS)
def test_an_epoch_reads_all_sentences_twice_and_a_batch_more(tiny, contender, monkeypatch):
    pytest.importorskip("transformers", reason="a development extra")
    n_read = {True: 0, False: 0}  # in training, in evaluation

    def watched(*args):
        model = make_classifier(*args)

        def count(_module, inputs, options):
            n_read[model.training] += len(inputs[0] if inputs else options["input_ids"])

        model.register_forward_pre_hook(count, with_kwargs=True)
        return model

    monkeypatch.setattr(rows, "make_classifier", watched)
    work = rows.epoch(contender, tiny, "cfimdb", 10, 5)
    assert 1.0 < work.run() < 3.0  # the mean loss, about log 5
    assert n_read == {True: 50, False: 60}
    assert work.amount == 50


@pytest.mark.parametrize("causal", [True, False])
def test_operations_are_those_that_torch_counts(tiny, causal):
    T, attention = 40, "causal" if causal else "full"
    model = make_llama("naive", tiny, attention)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(300, (1, T)))
    logits, unneeded = 2 * 320 * 32, 4 * 2 * 32 * T * (T - 1) // 2 * causal
    assert rows.pass_operations(tiny, [T], causal) == counter.get_total_flops() - logits - unneeded


@pytest.mark.parametrize("contender", CONTENDERS)
def test_every_contender_starts_and_makes_a_token(tiny, contender, tmp_path):
    pytest.importorskip("transformers", reason="a development extra")
    assert rows.start_up(contender, tiny, str(tmp_path)).run() == 0


def test_a_run_keeps_its_rows_and_the_report_shows_them(tmp_path, monkeypatch, capsys):
    for package in ("transformers", "matplotlib"):
        pytest.importorskip(package, reason="a development extra")
    short = [rows.Row("AdamW step", "s", rows.adamw, (), ("naive", "ours"))]
    monkeypatch.setattr(run, "all_rows", lambda folder: short)
    rates = {"bytes_per_s": 1e15, "operations_per_s": 1e15}
    monkeypatch.setattr(run, "measure_machine", lambda repeats, threads: rates)
    out, figure = tmp_path / "speed.json", tmp_path / "speed.png"
    report.keep(out, "rows", {"shape": "stories260K", "row": "AdamW step", "unit": "old"})
    report.keep(out, "rows", {"shape": "mini", "row": "AdamW step"})
    options = ["--shapes", "stories260K", "--repeats", "1", "--threads", "1", "--out", str(out)]
    run.main(options)
    measured, other = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert other == {"shape": "mini", "row": "AdamW step"}
    assert measured["unit"] == "s" and measured["command"].endswith(" ".join(options))
    for contender in measured["contenders"].values():
        assert contender["median"] > 0 and contender["peak_mb"] > 50
    out.write_text(json.dumps({"rows": [measured]}), encoding="utf-8")
    report.main(["--speed", str(out), "--plot", str(figure)])
    assert report.speed_table(out, "stories260K") in capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_table_has_rates_ratios_the_limit_and_memory():
    contenders = {
        name: {"median": seconds, "peak_mb": 100 * seconds}
        for name, seconds in {"naive": 4.0, "ours": 1.0, "transformers": 3.0}.items()
    }
    row = {
        "shape": "stories42M", "row": "a row", "unit": "tokens/s", "amount": 300,
        "limit_seconds": 0.5, "contenders": contenders,
    }  # fmt: skip
    cells = "75.0 | 300 | 100 | 4.00 | 3.00 | 0.50 | 0.25"
    assert report.table([row]).splitlines()[-1] == f"| stories42M | a row (tokens/s) | {cells} |"
    del contenders["transformers"]
    assert report.table([row]).splitlines()[-1].count("|") == 10


def test_many_devices_follow_the_formula_by_hand():
    # 10 rows pass in 3 s, the update takes 0.5 s; 1 MB of gradients over 1 MB/s, 0.01 s a message
    seconds = {"one rank": [[1.0, 2.0, 0.5]]}
    row = {"n_rows": 10, "gradient_bytes": 10**6, "seconds": seconds}
    exchange = 2 * 7 / 8 + 2 * 3 * 5 * 0.01  # 8 devices: 14/8 of each byte, 6 messages a bucket
    assert many_devices.exchange_seconds(8, 10**6, 1e6, 0.01) == pytest.approx(exchange)
    shared, own = (many_devices.speedup(8, row, 1e6, 0.01, own) for own in (False, True))
    assert shared == pytest.approx(3.5 / (2 / 10 * 3 + 0.5 + exchange))  # of 10 rows, one has 2
    assert own == pytest.approx(8 * 3.5 / (3.5 + exchange))
    assert many_devices.speedup(1, row, 1e6, 0.01, False) == pytest.approx(1.0)
