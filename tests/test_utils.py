"""Scripts end in one line and an exit code; files are written whole or not at all; seeds repeat."""

import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, ended
from helpers import finish, start, wait_for
from utils import (
    ArgumentParser,
    InputError,
    atomic_write,
    brief,
    is_device,
    on_one_line,
    pick_device,
    printable,
    require_package,
    run_script,
    seed_everything,
    sha256_of,
)

# ---------------------------------------------------------------- errors and scripts


def raising(error):
    def main():
        raise error

    return main


class Terminated(KeyboardInterrupt):
    exit_code = 143


NO_MEMORY = "error: out of memory; use smaller batches or shorter sentences"


@pytest.mark.parametrize(
    ("main", "code", "words"),
    [
        (raising(InputError("a\nb")), 2, "error: a b"),
        (raising(FileNotFoundError(2, "no such file", "x.txt")), 2, "error: x.txt: no such file"),
        (raising(MemoryError()), 2, NO_MEMORY),
        (raising(torch.OutOfMemoryError("CUDA")), 2, NO_MEMORY),
        (lambda: torch.empty(2**50), 2, NO_MEMORY),
        (raising(KeyboardInterrupt()), 130, "interrupted"),
        (raising(Terminated("saved")), 143, "saved"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_a_code(main, code, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["folder/script.py"])
    exit_code, out, err = ended(main, capsys)
    assert (exit_code, out) == (code, "")
    assert err.count("\n") == 1 and err.startswith(f"script.py: {words}")


@pytest.mark.parametrize("bug", [ValueError("1 + 1"), OSError("no file"), RuntimeError("a shape")])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises(type(bug)):
        run_script(raising(bug))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")  # noqa: PTH110
@pytest.mark.parametrize(
    ("end", "err"),
    [
        ("pass", "-c: error: standard output: No space left on device\n"),
        ("raise InputError('x')", "-c: error: x\n"),
    ],
)
def test_a_full_disk_behind_standard_output_is_one_line(end, err):
    program = f"from utils import *\ndef main():\n    print('lost')\n    {end}\nrun_script(main)"
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": ""},
            stdout=full,
            stderr=-1,
            encoding="utf-8",
        )
    assert (done.returncode, done.stderr) == (2, err)


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_removes_temporary_files_and_is_one_line(number, code, word, tmp_path):
    program = (
        "import sys, time\nfrom utils import atomic_write, run_script\n"
        "def main():\n    with atomic_write(sys.argv[1]):\n        time.sleep(100)\n"
        "run_script(main)"
    )
    process = start([sys.executable, "-c", program, str(tmp_path / "out.txt")], ROOT)
    wait_for(lambda: list(tmp_path.iterdir()), process)
    process.send_signal(number)
    assert finish(process) == (code, "", f"-c: {word}\n")
    assert not list(tmp_path.iterdir())


def test_the_return_value_is_the_exit_code(capsys):
    assert [ended(lambda n=n: n, capsys)[0] for n in (None, 0, 1)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--data-file"], "argument --data-file: expected one argument"),
        (["--nothing-like-it"], "unrecognized arguments: --nothing-like-it"),
        (["--data_file", "x"], "unknown option --data_file; did you mean --data-file?"),
        (["--data_file=x"], "did you mean --data-file?"),
        (["--max-epochs", "3"], "did you mean --max_epochs?"),
    ],
)
def test_a_usage_error_is_one_line_that_names_the_option_meant(typed, words, capsys):
    parser = ArgumentParser("Do it.\n\n    python script.py\n", prog="script.py")
    parser.add_argument("--data-file")
    parser.add_argument("--max_epochs", type=int)
    code, _, err = ended(lambda: parser.parse_args(typed), capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("script.py: error: ") and words in err and "--help" in err


def test_a_missing_package_is_named_with_its_remedy():
    require_package("torch")
    with pytest.raises(InputError, match=r"no_such_package is missing; `bash setup.sh --dev`"):
        require_package("no_such_package")


def test_text_for_a_terminal_has_no_control_characters():
    assert printable("a\x1b[31m\u202eb\n") == r"a\x1b[31m\u202eb\n"
    assert printable("a\n\tb", kept="\n") == "a\n\\tb"
    kept = "naïve 电影 👩\u200d🚀 می\u200cکن"
    assert printable(kept) == on_one_line(kept) == kept
    assert on_one_line(" a\n b\x07 ") == r"a b\x07"


def test_a_value_in_a_message_is_short():
    assert brief("word") == "'word'" and brief(1.5) == "1.5"
    assert max(len(brief(value)) for value in ("a" * 10**6, ["a"] * 10**6, 10**1000)) < 200


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("error", [RuntimeError(), OSError(28, "No space left on device")])
def test_a_failed_write_leaves_the_old_file_and_an_error_of_the_disk_names_it(error, tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(type(error)) as caught, atomic_write(path) as file:
        file.write("half")
        raise error
    assert getattr(caught.value, "filename", str(path)) == str(path)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_an_error_with_the_callers_name(tmp_path):
    path = tmp_path / "absent" / "out.txt"
    with pytest.raises(FileNotFoundError) as caught, atomic_write(path):
        pass
    assert caught.value.filename == str(path)


@pytest.mark.parametrize("name", ["real.txt", "名" * 82 + ".txt", "a" * 255])
def test_a_link_is_followed_and_text_is_utf8_with_plain_newlines(name, tmp_path):
    """For names of up to the 255 bytes that file systems take."""
    (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / name)
    with atomic_write(tmp_path / "link") as file:
        file.write("é\n")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / name).read_bytes() == "é\n".encode()


def test_a_device_or_a_pipe_stays_what_it_is(tmp_path):
    with atomic_write(os.devnull) as file:
        file.write("gone")
    assert is_device(os.devnull) and not os.path.isfile(os.devnull)  # noqa: PTH113
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert is_device(tmp_path / "pipe")
    assert not is_device(tmp_path) and not is_device(tmp_path / "absent")


def test_sha256_is_the_standards(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "abc") == expected


# ---------------------------------------------------------------- seeds and devices


def test_a_seed_repeats_the_draws_of_python_numpy_and_torch():
    draws = []
    for seed in (5, 5, 6):
        seed_everything(seed)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1]
    assert not set(draws[0]) & set(draws[2])


def test_the_device_is_the_cpu_unless_a_gpu_is_asked_for_and_there(monkeypatch):
    assert pick_device(False).type == "cpu"
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device(True).type == expected
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match="--use_gpu"):
        pick_device(True)
