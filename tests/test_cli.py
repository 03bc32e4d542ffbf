"""Every failure is one line and its exit code."""

import pytest

import cli


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("a\nb"), 2, "error: a b\n"),
        (FileNotFoundError(2, "no such file", "x.txt"), 2, "error: x.txt: no such file\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
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


def test_the_return_value_is_the_exit_code():
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: 1)
    assert ended.value.code == 1


def test_a_programming_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)
