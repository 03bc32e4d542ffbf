"""Signals end a process where it does no harm, with the exit code that shells expect."""

import os
import signal
import subprocess
import sys
import threading

import pytest

import cli
from conftest import ROOT
from training.interrupts import Stopped, held_back, raised


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_raised_with_its_exit_code(signum, code):
    with pytest.raises(Stopped) as stopped, raised():
        os.kill(os.getpid(), signum)
    assert stopped.value.exit_code == code
    assert isinstance(stopped.value, KeyboardInterrupt)  # no `except Exception` swallows it


def test_a_second_signal_changes_nothing_while_the_first_is_on_its_way_out():
    done = []
    with pytest.raises(Stopped) as stopped, raised():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Stopped as first:
            first.is_resumable = True
            raise
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(True)
    assert (done, stopped.value.exit_code, stopped.value.is_resumable) == ([True], 130, True)


def test_a_signal_waits_until_what_is_held_back_is_done():
    done = []
    with pytest.raises(Stopped) as stopped, raised():
        with held_back():
            for signum in (signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), signum)
                done.append(signum)
        done.append("not reached")
    assert done == [signal.SIGTERM, signal.SIGINT]
    assert stopped.value.exit_code == 143  # the first counts


def test_an_error_in_what_is_held_back_is_not_hidden_by_a_signal():
    with pytest.raises(ZeroDivisionError), raised(), held_back():
        os.kill(os.getpid(), signal.SIGTERM)
        _ = 1 // 0


def test_handlers_are_as_before_afterwards_and_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        interrupt = signal.getsignal(signal.SIGINT)
        with raised(), held_back():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_may_hold_back_too():
    entered = []

    def work():
        with raised(), held_back():
            entered.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [True]


@pytest.mark.parametrize("is_resumable", [False, True])
def test_the_line_names_the_command_to_go_on_with_where_there_is_one(
    capsys, monkeypatch, is_resumable
):
    monkeypatch.setattr(sys, "orig_argv", ["python", "a b.py", "--lr", "1"])
    monkeypatch.setattr(sys, "argv", ["a b.py", "--lr", "1"])

    def main():
        stopped = Stopped(signal.SIGTERM)
        stopped.is_resumable = is_resumable
        raise stopped

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 143
    go_on = "; to go on: python 'a b.py' --lr 1 --resume" if is_resumable else ""
    assert capsys.readouterr().err == f"a b.py: terminated{go_on}\n"
    monkeypatch.setattr(sys, "orig_argv", ["python", "a.py", "--resume"])
    assert cli.resume_command() == "python a.py --resume"
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-m", "a", "--lr", "1"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert cli.resume_command() == "torchrun ... -m a --lr 1 --resume"


def test_a_script_without_anything_to_save_ends_with_a_line(tmp_path):
    code = "import cli, time\ncli.run(lambda: print('on', flush=True) or time.sleep(60))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    for signum, expected in ((signal.SIGTERM, (143, "terminated")), (signal.SIGINT, (130, "int"))):
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as process:
            assert process.stdout.readline() == "on\n"
            process.send_signal(signum)
            error = process.communicate()[1]
        assert process.returncode == expected[0]
        assert expected[1] in error and error.count("\n") == 1
