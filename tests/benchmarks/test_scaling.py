"""What several ranks gain is measured on real ranks; what more would give follows its formula."""

import json
import math

import pytest
import torch

from benchmarks import jobs, projection, ranks, run, scaling
from benchmarks.projection import Link, Plan, Step, all_reduce_seconds
from benchmarks.ranks import SIZES, SUMS
from conftest import ROOT

MB = 10**6
STEP = Step(forward=1.0, backward=2.0, update=0.5, n_rows=10, buckets=(MB, MB, MB))
PERFECT = Link(math.inf, 0.0)
SLOW = Link(MB, 0.0)  # a bucket a second


def measured_row(**changed) -> dict:
    """As `benchmarks.ranks` writes it, of round numbers."""
    link = Link(bytes_per_s=2e9, latency=3e-5)
    seconds = {
        "one rank": [[3.0, 6.0, 1.0, 0.0], [30.0, 60.0, 10.0, 0.0], [0.3, 0.6, 0.1, 0.0]],
        "product": [[0.25]],
        "ranks": [[1.0, 3.0, 1.0, 0.2]],
        "one rank, a share": [[1.0, 2.0, 1.0, 0.0]],
        "one rank, all threads": [[2.0, 5.0, 1.0, 0.0]],
        "exchange": [[0.5]],
        **{f"exchange {size}": [[all_reduce_seconds(2, [size], link)]] for size in SIZES},
    }
    row = {
        "shape": "stories42M", "row": "finetune", "device": "cpu", "bf16": False, "n_cpus": 2,
        "n_ranks": 2, "threads": 1, "n_rows": 10, "tokens_of_row": 100, "operations": 4e9,
        "product_operations": 2e8, "gradient_bytes": 3 * MB, "bucket_bytes": [MB, 2 * MB],
        "losses": {"one rank": [1.0, 0.5], "ranks": [1.0, 0.75]}, "seconds": seconds,
        "command": "python -m benchmarks.run",
    }  # fmt: skip
    return {**row, **changed}


# ---------------------------------------------------------------- the formula


def test_a_sum_sends_each_byte_almost_twice_in_twice_log_n_messages_a_bucket():
    link = Link(bytes_per_s=MB, latency=0.01)
    assert all_reduce_seconds(1, [MB], link) == 0.0
    assert all_reduce_seconds(2, [MB], link) == pytest.approx(1.0 + 2 * 0.01)
    assert all_reduce_seconds(8, [MB, MB], link) == pytest.approx(2 * 1.75 + 2 * 2 * 3 * 0.01)
    assert all_reduce_seconds(5, [0], link) == pytest.approx(2 * 3 * 0.01)
    assert all_reduce_seconds(1024, [MB], PERFECT) == 0.0


def test_a_step_is_its_passes_its_update_and_what_is_not_hidden():
    assert STEP.seconds(10, 1, SLOW, hidden=False) == 3.5
    assert STEP.seconds(10, 2, SLOW, hidden=False) == pytest.approx(1.5 + 0.5 + 3.0)
    # Of 3 s one is the last bucket's, and of the other two the backward pass of 1 s hides as much.
    assert STEP.seconds(10, 2, SLOW, hidden=True) == pytest.approx(1.5 + 0.5 + 1.0 + 1.0)
    assert STEP.seconds(10, 3, PERFECT, hidden=False) == pytest.approx(4 * 0.3 + 0.5)  # 4, 3, 3
    assert STEP.seconds(10, 64, PERFECT, hidden=True) == pytest.approx(0.3 + 0.5)
    late = Link(math.inf, 0.1)
    assert STEP.seconds(10, 2, late, hidden=False) == pytest.approx(2.0 + 0.2 * (3 + SUMS))
    fast = STEP.on_faster(10, 5)
    assert fast.seconds(10, 1, SLOW, hidden=False) == pytest.approx(0.3 + 0.1)
    assert fast.buckets == STEP.buckets


@pytest.mark.parametrize("most", [None, 10 * 100])
@pytest.mark.parametrize("link", [PERFECT, SLOW, *projection.LINKS])
def test_hiding_helps_one_device_is_one_and_no_number_gives_more_than_itself(link, most):
    plan = Plan("", STEP, 10, most)
    for n in (1, 2, 8, 64, 1024):
        nothing, all_of_it = (plan.speedup(n, link, hidden) for hidden in (False, True))
        assert nothing <= all_of_it <= n * (1 + 1e-9)
        if n == 1:
            assert nothing == 1.0
        if most and link is PERFECT and n <= 100:
            assert nothing == pytest.approx(n)


def test_rows_for_each_device_end_with_the_data():
    plan = Plan("", STEP, 10, most=25)
    assert [plan.rows(n) for n in (1, 2, 3, 1024)] == [10, 20, 25, 25]
    assert plan.speedup(3, PERFECT, hidden=True) == pytest.approx(25 / (9 * 0.3 + 0.5) / (10 / 3.5))


def test_the_most_devices_worth_half_are_those_of_a_search():
    plan = Plan("", STEP, 10)
    worth = [n for n in (1, 2, 4, 8, 16) if plan.speedup(n, PERFECT, hidden=False) >= n / 2]
    assert plan.most_devices(PERFECT) == max(worth) == 4
    assert Plan("", STEP, 10, most=10**6).most_devices(PERFECT) == 4096
    assert plan.most_devices(Link(1.0, 1.0)) == 1


def test_a_link_is_found_from_what_it_took():
    found = projection.fit_link(measured_row())
    assert found.bytes_per_s == pytest.approx(2e9)
    assert found.latency == pytest.approx(3e-5)
    assert str(found) == "16 Gbit/s, 30 µs"
    row = measured_row()
    row["seconds"] |= {f"exchange {size}": [[1 / size]] for size in SIZES}
    with pytest.raises(ValueError, match="finetune: exchanging more took no longer"):
        projection.fit_link(row)


# ---------------------------------------------------------------- the words


def test_the_table_has_medians_gains_and_what_the_exchange_costs():
    line = scaling.scaling_table([measured_row()]).splitlines()[-1]
    # 1,000 tokens in 10 s; 4e9 of 10 x 8e8; in 5 s; 10 / 5; 4 / 5; 10 / 8; 0.5 / 5; 0.2 / 5
    cells = "100 | 0.50 | 200 | 2.00 | 0.80 | 1.25 | 0.10 | 0.04"
    assert line == f"| stories42M | finetune | 2 | {cells} |"
    alone = measured_row(n_ranks=1, bf16=True, device="cuda")
    line = scaling.scaling_table([alone]).splitlines()[-1]
    assert line == "| stories42M | finetune, bf16, GPU | 1 | 100 | 0.50 |  |  |  |  |  |  |"


def test_the_page_is_of_rows_measured_alike():
    rows = [measured_row(), measured_row(row="pretrain", n_rows=8)]
    page = projection.page([*rows, measured_row(bf16=True, threads=9)])
    assert "differ by 2e-01 at most" in page  # 0.25 in the second step
    # r(2) = 3 MB / 2 GB/s + 2 buckets x 2 x 30 µs, t(2) = 4.5 + 1 + r(2) + 3 x 2 x 30 µs
    assert "| 300.00 | 600.00 | 1000 | 0.40 | 16 Gbit/s, 30 µs | 0.00 | 1.10 |" in page
    assert "On GPUs nothing was measured" in page
    assert "On GPUs nothing" not in projection.page([*rows, measured_row(device="cuda")])
    with pytest.raises(ValueError, match="no scaling row pretrain of two ranks for stories42M"):
        projection.page(rows[:1])
    with pytest.raises(ValueError, match="differ in threads, cores or repeats"):
        projection.page([*rows, measured_row(shape="mini", threads=2)])


def test_the_page_shows_what_the_file_says(tmp_path, capsys):
    projection.main(["--out", str(tmp_path / "README.md")])
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == page
    capsys.readouterr()
    projection.main(["--link", "1", "50"])
    printed = capsys.readouterr().out
    assert printed.splitlines()[2] == "| devices | 1.0 Gbit/s, 50 µs |"
    (first,) = (line for line in printed.splitlines()[:9] if line.startswith("| 8 |"))
    assert first.removesuffix(" |") in page


def test_the_page_needs_its_rows(tmp_path):
    (tmp_path / "speed.json").write_text('{"rows": []}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"speed.json: there is no scaling row finetune and pre"):
        projection.main(["--speed", str(tmp_path / "speed.json"), "--out", str(tmp_path / "page")])
    assert not (tmp_path / "page").exists()


# ---------------------------------------------------------------- the ranks


def test_operations_are_those_of_three_passes(monkeypatch):
    shape = {"dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "vocab_size": 320}
    monkeypatch.setitem(jobs.SHAPES, "tiny", {**shape, "hidden_dim": 16, "max_seq_len": 512})
    in_layer = 4 * 8 * 8 + 3 * 8 * 16
    work = ranks.pretrain("tiny", torch.device("cpu"))
    n_scores = 8 * 256 * 257 // 2
    by_hand = 2 * in_layer * 8 * 256 + 4 * 8 * n_scores + 2 * 8 * 256 * 320 * 8
    assert ranks.operations(work, "pretrain", "tiny") == 3 * by_hand
    work = ranks.finetune("tiny", torch.device("cpu"))
    T = work.tokens_of_row
    by_hand = 2 * in_layer * 80 * T + 4 * 8 * 80 * T * T
    assert ranks.operations(work, "finetune", "tiny") == 3 * by_hand


@pytest.mark.parametrize("row", ranks.ROWS)
def test_two_ranks_take_the_steps_of_one(row, tmp_path, capfd):
    out = tmp_path / "speed.json"
    options = ["--shapes", "stories260K", "--rows", f"scaling, {row}", "--repeats", "1"]
    run.main([*options, "--out", str(out)])
    (measured,) = json.loads(out.read_text(encoding="utf-8"))["scaling"]
    losses = measured["losses"]
    assert losses["ranks"] == pytest.approx(losses["one rank"], abs=1e-5)
    assert losses["ranks"][1] < losses["ranks"][0] - 1e-4  # of the second step, so there was one
    assert scaling.scaling_table([measured]) in capfd.readouterr().out
    assert measured["command"] == (
        f"python -m benchmarks.run --shapes stories260K --rows 'scaling, {row}' --repeats 1 "
        f"--out {out}"
    )
    assert sum(measured["bucket_bytes"]) == measured["gradient_bytes"]
    ways = {"one rank", "product", "ranks", "one rank, a share", "one rank, all threads"}
    ways |= {"exchange", *(f"exchange {size}" for size in SIZES)}
    assert measured["seconds"].keys() == ways
    ((forward, backward, update, waited),) = measured["seconds"]["ranks"]
    assert 0 < waited < backward
    assert min(forward, update) > 0


def test_one_rank_has_a_rate_and_a_share_of_the_peak(tmp_path):
    out = tmp_path / "speed.json"
    options = ["--shapes", "stories260K", "--rows", "scaling, pretrain", "--repeats", "1"]
    run.main([*options, "--ranks", "1", "--out", str(out)])
    (measured,) = json.loads(out.read_text(encoding="utf-8"))["scaling"]
    assert measured["seconds"].keys() == {"one rank", "product"}
    line = scaling.scaling_table([measured]).splitlines()[-1]
    assert line.startswith("| stories260K | pretrain | 1 | ")
    assert line.endswith(" |  |  |  |  |  |  |")


def test_a_row_is_replaced_by_its_like_alone(tmp_path):
    out = tmp_path / "speed.json"
    row = measured_row()
    others = [{**row, "n_ranks": 1}, {**row, "bf16": True}, {**row, "device": "cuda"}]
    out.write_text(json.dumps({"rows": [], "scaling": [row, *others]}), encoding="utf-8")
    new = measured_row(threads=3)
    assert run.keep(out, scaled=[new])["scaling"] == [new, *others]
    assert json.loads(out.read_text(encoding="utf-8"))["scaling"] == [new, *others]


def test_what_cannot_be_measured_is_said(tmp_path, capfd):
    out = str(tmp_path / "speed.json")
    options = ["--shapes", "stories260K", "--rows", "scaling, pretrain", "--out", out]
    with pytest.raises(ValueError, match="--ranks 3: one needs a thread, and --threads is fewer"):
        run.main([*options, "--ranks", "3"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="scaling, pretrain, stories260K: its ranks failed"):
            run.main([*options, "--ranks", "1", "--use_gpu"])
        assert "--use_gpu: this PyTorch sees neither" in capfd.readouterr().err
    assert not (tmp_path / "speed.json").exists()
