"""The benchmark's contenders do the same work, its counts are right, and its tables are true."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import llama2c, many_devices, processor, report, rows, run
from benchmarks.contenders import SHAPES, draw_lengths, make_classifier, make_llama
from conftest import ROOT, random_llama, shared_asset
from formats import llama2c as llama2c_format
from helpers import finish, start, torchrun
from tokenizer import Tokenizer
from training.dataset import encode_examples
from training.labeled import read_sentences
from utils import InputError

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
    short = [
        rows.Row("AdamW step", "s", rows.adamw, (), ("naive", "ours")),
        rows.Row("beside", "s", rows.adamw, (True,), ("ours", f"ours{report.BESIDE}")),
    ]
    monkeypatch.setattr(run, "all_rows", lambda folder, programs: short)
    rates = {"bytes_per_s": 1e15, "operations_per_s": 1e15}
    monkeypatch.setattr(run, "measure_machine", lambda repeats, threads: rates)
    out, figure = tmp_path / "speed-mine.json", tmp_path / "speed.png"
    here = processor.describe()
    report.keep(out, "rows", {"shape": "stories260K", "row": "AdamW step", "unit": "old"})
    report.keep(out, "rows", {"shape": "mini", "row": "AdamW step"})
    options = ["--shapes", "stories260K", "--repeats", "1", "--threads", "1", "--out", str(out)]
    run.main(options)
    content = json.loads(out.read_text(encoding="utf-8"))
    assert content["processor"] == here
    step, other, beside = content["rows"]
    assert other == {"shape": "mini", "row": "AdamW step"}
    assert step["unit"] == "s" and step["command"].endswith(" ".join(options))
    assert set(step["library"].values()) <= {"BLAS", "oneDNN"}
    for contender in (*step["contenders"].values(), *beside["contenders"].values()):
        assert contender["median"] > 0 and contender["peak_mb"] > 50
    with monkeypatch.context() as patch, pytest.raises(InputError, match="not of another"):
        patch.setattr(report, "describe", lambda: {**here, "name": "another"})
        report.keep(out, "rows", {})
    with pytest.raises(InputError, match="is an input and would be replaced"):
        report.main([str(out), "--plot", str(out)])
    ranks = tmp_path / "ranks.json"
    ranks.write_text(json.dumps({"processor": here, "ranks": []}), encoding="utf-8")
    with pytest.raises(InputError, match="nothing to draw"):
        report.main([str(ranks), "--plot", str(figure)])
    assert not figure.exists()
    other = tmp_path / "other.json"
    for data in (b"{}", b"[]", b"\x89PNG"):
        other.write_bytes(data)
        for use in (report.main, lambda argv: run.main([*options[:-1], *argv])):
            with pytest.raises(InputError, match=r"other\.json: is not an output of benchmarks"):
                use([str(other)])
    out.write_text(json.dumps({**content, "rows": [step, beside]}), encoding="utf-8")
    report.main([str(out), "--plot", str(figure)])
    printed = capsys.readouterr().out
    assert all(text in printed for text in report.all_tables([step, beside]))
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_processor_has_a_name_and_its_file_a_short_one():
    assert processor.processor_name()
    one = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n"
    name = processor.name_in(f"{one}\n{one.replace('AMD EPYC', 'another')}")
    assert name == "AMD EPYC (family 25, model 1)"
    assert processor.speed_file(name).name == "speed-amd-epyc-family-25-model-1.json"
    numbered = "Intel(R) Xeon(R) CPU E5-2690 v4 @ 2.60GHz"
    assert processor.name_in(f"model name\t: {numbered}\nmodel\t: 79\n") == numbered
    assert processor.speed_file(numbered).name == "speed-intel-xeon-e5-2690-v4.json"
    assert processor.name_in("CPU implementer\t: 0x41\n") == ""


def measured(name: str, **seconds: float) -> dict:
    """A row of 300 tokens with the seconds of each contender."""
    contenders = {who: {"median": of, "peak_mb": 100.0} for who, of in seconds.items()}
    shape = {"shape": "stories42M", "row": name, "unit": "tokens/s", "amount": 300}
    return {**shape, "threads": 2, "limit_seconds": 0.5, "contenders": contenders}


def test_two_processors_stand_side_by_side(tmp_path):
    programs = {"ours int8": 1.0, "run.c": 1.5, "runq.c": 3.0}
    generating = measured("g", naive=4.0, ours=2.0, transformers=3.0, **programs)
    beside = measured("b", ours=2.0, **{f"ours{report.BESIDE}": 5.0})
    files = tmp_path / "speed-a.json", tmp_path / "speed-b.json"
    both = [generating, beside], [measured("t", naive=9.0, ours=3.0)]
    for path, rows_of_one in zip(files, both, strict=True):
        head = {"name": path.stem, "torch": "2.13"}
        path.write_text(json.dumps({"processor": head, "rows": rows_of_one}), encoding="utf-8")
    ranks = tmp_path / "speed-gpu.json"  # of benchmarks.ranks alone: not in this table
    ranks.write_text(json.dumps({"processor": head, "ranks": []}), encoding="utf-8")
    lines = report.speed_table([ranks, *files]).splitlines()
    assert lines[1] == "- B: speed-b, 2 threads, PyTorch 2.13"
    assert "| g (tokens/s) | 150 | 2.00 | 1.50 |  |  |  |" in lines
    assert "| t (tokens/s) |  |  |  | 100 | 3.00 |  |" in lines
    assert "| stories42M | 150 | 200 | 300 | 100 | 0.75 | 3.00 | 2.00 |" in lines
    assert "| stories42M | b (tokens/s) | 150 | 2.50 |  |" in lines


def test_runq_reads_back_what_the_weights_were(tmp_path):
    """A NumPy reader that follows runq.c: norms, then per matrix int8 numbers and scales."""
    model = random_llama(dim=96, n_heads=3, n_kv_heads=1, hidden_dim=160)  # groups of 32
    weights = dict(model.state_dict())
    with torch.no_grad():
        weights["layers.0.feed_forward.w1.weight"][0] = 0.0
    sizes = {key: getattr(model.config, key) for key in llama2c_format.SIZES}
    sizes["hidden_dim"] = 160
    llama2c.write_q8(tmp_path / "q.bin", sizes, weights)
    data = (tmp_path / "q.bin").read_bytes()
    magic, version, *numbers = struct.unpack_from("<4si7i", data)
    assert (magic, version, tuple(numbers)) == (b"24ka", 2, tuple(sizes.values()))
    assert struct.unpack_from("<Bi", data, 36) == (1, 32)
    at = 256
    layers = range(sizes["n_layers"])
    for name in [f"layers.{i}.{kind}_norm" for kind in ("attention", "ffn") for i in layers]:
        np.testing.assert_array_equal(
            np.frombuffer(data, "<f4", 96, at), weights[f"{name}.weight"].numpy()
        )
        at += 4 * 96
    np.testing.assert_array_equal(np.frombuffer(data, "<f4", 96, at), weights["norm.weight"])
    at += 4 * 96
    kinds = [f"attention.compute_{name}" for name in ("query", "key", "value", "output")]
    kinds += [f"feed_forward.w{i}" for i in (1, 2, 3)]
    names = ["tok_embeddings", *(f"layers.{i}.{kind}" for kind in kinds for i in layers)]
    for name in names:
        weight = weights[f"{name}.weight"].numpy().reshape(-1, 32)
        quantized = np.frombuffer(data, np.int8, weight.size, at).reshape(weight.shape)
        scale = np.frombuffer(data, "<f4", len(weight), at + weight.size)[:, None]
        at += weight.size + 4 * len(weight)
        assert np.all(np.abs(quantized * scale - weight) <= 0.5001 * scale)
    assert at == len(data)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_programs_are_compiled_outside_the_checkout_and_say_their_rate(tiny, tmp_path):
    source, folder = tmp_path / "llama2.c", tmp_path / "built"
    source.mkdir()
    folder.mkdir()
    with pytest.raises(InputError, match=r"has no run\.c; name a checkout"):
        llama2c.compile_programs(source, folder)
    code = '#include <stdio.h>\nint main() { fprintf(stderr, "\\nachieved tok/s: 50.0\\n"); }\n'
    for name in llama2c.PROGRAMS:
        (source / name).write_text(code, encoding="utf-8")
    llama2c.compile_programs(source, folder)
    assert {path.name for path in source.iterdir()} == set(llama2c.PROGRAMS)
    for name in llama2c.PROGRAMS:
        work = rows.generate(name, tiny, "causal", str(folder))
        assert work.times_itself and work.run() == pytest.approx(rows.N_NEW / 50)
    _, weights = llama2c_format.read_bin(folder / "tiny.run.c.bin")
    expected = make_llama("ours", tiny, "causal").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    (source / "run.c").write_text("no program", encoding="utf-8")
    with pytest.raises(InputError, match=r"fails on run\.c"):
        llama2c.compile_programs(source, folder)


RANKS = """
import gc, sys
import torch
sys.path.insert(0, {root!r})
from benchmarks import ranks

destroy = torch.distributed.destroy_process_group

def destroy_and_count():
    wrapped = torch.nn.parallel.DistributedDataParallel
    print(sum(isinstance(o, wrapped) for o in gc.get_objects()), "wrapped models are left")
    destroy()

torch.distributed.destroy_process_group = destroy_and_count
ranks.main(["--shape", "stories260K", "--repeats", "1", "--out", {out!r}])
"""


def test_a_step_of_two_ranks_is_that_of_one_and_no_model_outlives_the_group(tmp_path):
    job, out = tmp_path / "job.py", tmp_path / "speed-mine.json"
    job.write_text(RANKS.format(root=str(ROOT), out=str(out)), encoding="utf-8")
    code, printed, err = finish(start(torchrun(2, job), tmp_path))
    assert code == 0, err
    assert "0 wrapped models are left" in printed  # its end and gloo's threads may deadlock
    (row,) = json.loads(out.read_text(encoding="utf-8"))["ranks"]
    assert report.ranks_table([row]) in printed
    assert (row["row"], row["n_ranks"], row["gradient_bytes"]) == ("finetune", 2, 4 * 260_357)
    assert {way: len(turns) for way, turns in row["seconds"].items()} == {
        "one rank": 1, "ranks": 1, "one rank, all threads": 1
    }  # fmt: skip
    alone, ranks = row["losses"]["one rank"], row["losses"]["ranks"]
    assert ranks[0] == pytest.approx(alone[0], abs=1e-6)  # the first step of both models


def test_the_table_has_rates_ratios_the_limit_and_memory():
    row = measured("a row", naive=4.0, ours=1.0, transformers=3.0)
    row["contenders"]["naive"]["peak_mb"] = 400.0
    cells = "75.0 | 300 | 100 | 4.00 | 3.00 | 0.50 | 0.25"
    assert report.table([row]).splitlines()[-1] == f"| stories42M | a row (tokens/s) | {cells} |"
    del row["contenders"]["transformers"]
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
