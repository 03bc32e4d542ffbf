"""What several ranks gain is measured on real ranks; what more would give follows its formula."""

import json
import math

import pytest
import torch

from benchmarks import projection, ranks, run, scaling
from benchmarks.projection import Link, Plan, Step, all_reduce_seconds
from benchmarks.ranks import BUCKET, SIZES
from conftest import ROOT

STEP = Step(
    forward=1.0, backward=2.0, update=0.5, n_rows=10, gradient_bytes=3 * BUCKET, late_bytes=BUCKET
)
PERFECT = Link(math.inf, 0.0)
SLOW = Link(BUCKET, 0.0)  # a bucket a second
SPEED = ROOT / "results" / "speed.json"


def test_a_ring_sends_each_bucket_twice_around_but_for_one_share():
    link = Link(bytes_per_s=BUCKET, latency=0.01)
    assert all_reduce_seconds(1, BUCKET, link) == 0.0
    assert all_reduce_seconds(2, BUCKET, link) == pytest.approx(1.0 + 2 * 0.01)
    assert all_reduce_seconds(4, 2 * BUCKET, link) == pytest.approx(2 * 1.5 + 2 * 6 * 0.01)
    assert all_reduce_seconds(4, BUCKET + 4, PERFECT) == 0.0


def test_a_step_is_its_passes_its_update_and_what_is_not_hidden():
    assert STEP.seconds(10, 1, SLOW, hidden=False) == 3.5
    assert STEP.seconds(10, 2, SLOW, hidden=False) == pytest.approx(1.5 + 0.5 + 3.0)
    # Of 3 s one is late, and of the other two the backward pass of 1 s hides as much.
    assert STEP.seconds(10, 2, SLOW, hidden=True) == pytest.approx(1.5 + 0.5 + 1.0 + 1.0)
    assert STEP.seconds(10, 3, PERFECT, hidden=False) == pytest.approx(4 * 0.3 + 0.5)  # 4, 3, 3
    assert STEP.seconds(10, 64, PERFECT, hidden=True) == pytest.approx(0.3 + 0.5)
    fast = STEP.on_faster(10)
    assert fast.seconds(10, 1, SLOW, hidden=False) == pytest.approx(0.35)
    assert fast.gradient_bytes == STEP.gradient_bytes


@pytest.mark.parametrize("is_each", [False, True])
@pytest.mark.parametrize("link", [PERFECT, SLOW, *projection.LINKS])
def test_hiding_helps_one_device_is_one_and_no_number_gives_more_than_itself(link, is_each):
    plan = Plan("", STEP, 10, is_each)
    for n in (1, 2, 8, 64, 1024):
        nothing, all_of_it = (plan.speedup(n, link, hidden) for hidden in (False, True))
        assert nothing <= all_of_it <= n
        if n == 1:
            assert nothing == 1.0
        if is_each and link is PERFECT:
            assert nothing == pytest.approx(n)


def test_the_most_devices_worth_half_are_those_of_a_search():
    plan = Plan("", STEP, 10)
    worth = [n for n in (1, 2, 4, 8, 16) if plan.speedup(n, PERFECT, hidden=False) >= n / 2]
    assert plan.most_devices(PERFECT) == max(worth) == 4
    assert Plan("", STEP, 10, is_each=True).most_devices(PERFECT) == 4096
    assert plan.most_devices(Link(1.0, 1.0)) == 1


def test_a_link_is_found_from_what_it_took():
    link = Link(bytes_per_s=2e9, latency=3e-5)
    took = {f"exchange {size}": [[2 * 3e-5 + size / 2e9]] * 3 for size in SIZES}
    found = projection.fit_link({"n_ranks": 2, "seconds": took})
    assert found.bytes_per_s == pytest.approx(link.bytes_per_s)
    assert found.latency == pytest.approx(link.latency)
    assert str(found) == "16 Gbit/s, 30 µs"


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
    with pytest.raises(ValueError, match=r"no scaling row finetune and pretrain of two ranks"):
        projection.main(["--speed", str(tmp_path / "speed.json"), "--out", str(tmp_path / "page")])
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize("row", ranks.ROWS)
def test_two_ranks_take_the_step_of_one(row, tmp_path, capfd):
    out = tmp_path / "speed.json"
    options = ["--shapes", "stories260K", "--rows", f"scaling, {row}", "--repeats", "1"]
    run.main([*options, "--out", str(out)])
    (measured,) = json.loads(out.read_text(encoding="utf-8"))["scaling"]
    assert measured["losses"]["ranks"] == pytest.approx(measured["losses"]["one rank"], abs=1e-5)
    assert measured["n_ranks"] == 2
    assert scaling.scaling_table([measured]) in capfd.readouterr().out
    ways = {"one rank", "ranks", "apart", "one rank, a share", "one rank, all threads", "exchange"}
    assert measured["seconds"].keys() == ways | {f"exchange {size}" for size in SIZES}
    assert all(sum(turn) > 0 for turns in measured["seconds"].values() for turn in turns)


def test_one_rank_has_a_rate_and_a_share_of_the_peak(tmp_path):
    out = tmp_path / "speed.json"
    options = ["--shapes", "stories260K", "--rows", "scaling, pretrain", "--repeats", "1"]
    run.main([*options, "--ranks", "1", "--out", str(out)])
    (measured,) = json.loads(out.read_text(encoding="utf-8"))["scaling"]
    line = scaling.scaling_table([measured]).splitlines()[-1]
    assert line.startswith("| stories260K | pretrain | 1 | ")
    assert line.endswith(" |  |  |  |  |  |  |")
    share = measured["operations"] / sum(measured["seconds"]["one rank"][0])
    assert 0 < share / measured["peak_operations_per_s"] < 1


def test_a_row_is_replaced_by_its_like_alone(tmp_path):
    out = tmp_path / "speed.json"
    row = {"shape": "mini", "row": "pretrain", "device": "cpu", "bf16": False, "n_ranks": 2}
    others = [{**row, "n_ranks": 1}, {**row, "bf16": True}, {**row, "device": "cuda"}]
    out.write_text(json.dumps({"rows": [], "scaling": [row, *others]}), encoding="utf-8")
    new = {**row, "threads": 1}
    assert run.merge(out, [], [new], None)["scaling"] == [new, *others]


def test_ranks_that_fail_are_named(tmp_path, capfd):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    options = ["--shapes", "stories260K", "--rows", "scaling, pretrain", "--use_gpu"]
    with pytest.raises(ValueError, match="scaling, pretrain, stories260K: its ranks failed"):
        run.main([*options, "--ranks", "1", "--out", str(tmp_path / "speed.json")])
    assert "--use_gpu: this PyTorch sees neither" in capfd.readouterr().err
    assert not (tmp_path / "speed.json").exists()
