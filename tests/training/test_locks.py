"""One process at a time writes a file, however the last one ended."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from training.locks import remove_leftovers, sole_writer
from utils import atomic_write, hidden_neighbor

HOLD = """
import sys
from training.locks import sole_writer
from utils import hidden_neighbor
with sole_writer(*sys.argv[1:]):
    hidden_neighbor(__import__("pathlib").Path(sys.argv[1]).resolve(), "999.tmp").touch()
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(*paths: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, *map(str, paths)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, encoding="utf-8", **pipes)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_file_has_one_writer_and_a_killed_one_bars_nobody(tmp_path):
    path = tmp_path / "ein Pfad 名.pt"
    with hold(path, tmp_path / "other.txt") as process:
        with (
            pytest.raises(ValueError, match=rf"名\.pt: process {process.pid} is writing it; wait"),
            sole_writer(tmp_path / "free.txt", path),
        ):
            pass
        with sole_writer(tmp_path / "free.txt"):  # given back by the refusal
            pass
        process.kill()
    left = {neighbor.name for neighbor in tmp_path.iterdir()}
    assert left == {".ein Pfad 名.pt.lock", ".other.txt.lock", ".ein Pfad 名.pt.999.tmp"}
    with sole_writer(path, tmp_path / "other.txt"):
        assert not list(tmp_path.glob("*.tmp"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_released_is_free_again(tmp_path):
    for _ in range(2):
        with sole_writer(tmp_path / "a", tmp_path / "a", str(tmp_path / "b")):
            assert len(list(tmp_path.iterdir())) == 2
        assert list(tmp_path.iterdir()) == []


def test_a_link_and_its_target_are_one_file(tmp_path):
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to("real")
    with hold(tmp_path / "real") as process:
        with pytest.raises(ValueError, match="is writing it"), sole_writer(tmp_path / "link"):
            pass
        process.communicate("")


def test_what_has_no_content_is_shared():
    with sole_writer("/dev/null"), sole_writer("/dev/null"):
        assert not Path("/dev/.null.lock").exists()


def test_only_what_dead_processes_wrote_for_this_very_file_is_removed(tmp_path):
    kept = {".a.pt.lock", ".a.pt.x.7.tmp", ".b.pt.7.tmp", "a.pt", ".a.pt.7.tmp.txt"}
    for name in {*kept, ".a.pt.7.tmp", ".a.pt.123456.tmp"}:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path / "a.pt")
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_long_names_that_begin_alike_are_told_apart(tmp_path):
    paths = [tmp_path / f"{'long' * 60}{i}" for i in range(2)]
    assert len({hidden_neighbor(path, "lock") for path in paths}) == 2
    with sole_writer(*paths):
        for path in paths:
            with atomic_write(path) as file:
                file.write("x")
    assert sorted(tmp_path.iterdir()) == paths
