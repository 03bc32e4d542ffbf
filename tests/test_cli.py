"""Every failure is one line and its exit code."""

import pytest
import torch

import cli


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("a\nb"), 2, "error: a b\n"),
        (FileNotFoundError(2, "no such file", "x.txt"), 2, "error: x.txt: no such file\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (MemoryError(), 2, "error: out of memory; make batches smaller, or sentences shorter\n"),
        (torch.OutOfMemoryError("CUDA"), 2, "make batches smaller, or sentences shorter\n"),
    ],
)
def test_an_exception_becomes_a_line_and_a_code(error, code, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == code
    err = capsys.readouterr().err
    assert err.endswith(words)
    assert err.count("\n") == 1


def test_a_cpu_without_memory_is_a_line(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: torch.empty(2**50))
    assert ended.value.code == 2
    assert "out of memory; make batches smaller" in capsys.readouterr().err


def test_the_return_value_is_the_exit_code():
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: 1)
    assert ended.value.code == 1


def test_a_programming_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="same number of dimensions"):
        cli.run(lambda: torch.cat([torch.ones(1), torch.ones(1, 1)]))
