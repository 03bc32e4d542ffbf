"""setup.sh with a stand-in for Python, so that nothing is installed and no network is needed."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from conftest import ROOT

# Plays the base Python and, copied there by `-m venv`, the Python of the new .venv. It logs its
# arguments, and fails if FAIL_<step> gives an exit code.
STAND_IN = f"""#!/bin/sh
case "$*" in
    *version_info*) exec "${{REAL_PYTHON:-{sys.executable}}}" "$@" ;;
esac
echo "$*" >>"$LOG"
case "$1 $2" in
    "-m venv")
        mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
        [ -z "$INTERRUPT" ] || kill -INT 0
        exit ${{FAIL_VENV:-0}} ;;
    "-m pip") [ "$3" = --version ] && exit ${{FAIL_PIP_VERSION:-0}} || exit ${{FAIL_PIP:-0}} ;;
    */data/fetch.py*) exit ${{FAIL_FETCH:-0}} ;;
esac
exit 0
"""
INSTALL = "-m pip install -qq --disable-pip-version-check -r "


def write_script(path, text):
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


class Tree:
    """A copy of what setup.sh needs, and a way to run it there."""

    def __init__(self, folder):
        self.root = folder / "a project"
        self.caller = folder / "else" / "where"
        self.tools = folder / "tools"  # a folder for PATH
        self.python = write_script(folder / "stand-in", STAND_IN)
        self.log = folder / "log"
        for new in (self.root / "data", self.caller, self.tools):
            new.mkdir(parents=True)
        for name in ("setup.sh", "requirements.txt", "data/fetch.py", "data/manifest.json"):
            shutil.copy(ROOT / name, self.root / name)

    def run(self, *options, **environment):
        """Run setup.sh from another folder; `asked` becomes the commands that Python got."""
        self.log.write_text("", encoding="utf-8")
        environment = {"PYTHON": str(self.python), "LOG": str(self.log), **environment}
        done = subprocess.run(
            [self.root / "setup.sh", *options],
            cwd=self.caller,
            env={**os.environ, **environment},
            capture_output=True,
            encoding="utf-8",
            start_new_session=True,  # a Ctrl-C of the tests is not its own, nor the other way
        )
        asked = self.log.read_text(encoding="utf-8").replace(f"{self.root}/", "").splitlines()
        self.asked = [line for line in asked if line != "-m pip --version"]
        return done


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def refusal(done) -> str:
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("setup.sh: error: ")
    return line


def test_help_names_every_option_and_does_nothing(tree):
    done = tree.run("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert all(option in done.stdout for option in ("--dev", "--assets-from DIR", "--help"))
    assert tree.asked == []


def test_a_wrong_command_line_is_one_line_and_does_nothing(tree):
    for options in (["--nonsense"], ["extra"], ["--assets-from"], ["--assets-from", "absent"]):
        assert options[-1] in refusal(tree.run(*options))
        assert tree.asked == []


@pytest.mark.parametrize("python", ["no-such-python", "false"])
def test_an_unsupported_python_is_refused(python, tree):
    done = tree.run(PYTHON=python)
    assert f"PYTHON={python} is not a Python 3.10 to 3.13" in refusal(done)
    assert not (tree.root / ".venv").exists()


@pytest.mark.parametrize(("minor", "code"), [(9, 2), (10, 0), (13, 0), (14, 2)])
def test_pythons_from_3_10_to_3_13_are_supported(minor, code, tree):
    version = f"import sys\nsys.version_info = (3, {minor}, 0)\n"  # the real Python but for that
    real = write_script(tree.caller / "real", f"#!{sys.executable}\n{version}exec(sys.argv[2])\n")
    assert tree.run(REAL_PYTHON=str(real)).returncode == code


def test_without_any_python_there_is_one_line(tree):
    for name in ("bash", "dirname", "cat"):
        (tree.tools / name).symlink_to(shutil.which(name))
    assert "no Python 3.10 to 3.13 found" in refusal(tree.run(PYTHON="", PATH=str(tree.tools)))


def test_a_stub_on_the_path_is_passed_over_for_a_python_that_runs(tree):
    for name in ("python3", "python3.13", "python3.12", "python3.11"):
        write_script(tree.tools / name, "#!/bin/sh\nexit 127\n")
    shutil.copy(tree.python, tree.tools / "python3.10")
    assert tree.run(PYTHON="", PATH=f"{tree.tools}:{os.environ['PATH']}").returncode == 0
    assert tree.asked[0] == "-m venv .venv"


def test_it_makes_a_venv_installs_fetches_and_names_the_next_command(tree):
    done = tree.run()
    assert done.returncode == 0 and done.stderr == ""
    assert tree.asked == ["-m venv .venv", INSTALL + "requirements.txt", "data/fetch.py"]
    assert "next: .venv/bin/python " in done.stdout.splitlines()[-1]
    assert tree.run().returncode == 0  # and keeps the .venv
    assert tree.asked == [INSTALL + "requirements.txt", "data/fetch.py"]


def test_options_are_passed_on_and_paths_are_the_callers(tree):
    (tree.caller / "some assets").mkdir()
    done = tree.run("--dev", "--assets-from", "some assets", PYTHON="../../stand-in")
    assert done.returncode == 0
    install, fetch = tree.asked[1:]
    assert install == INSTALL + "requirements-dev.txt"
    assert fetch == "data/fetch.py --assets-from some assets"


@pytest.mark.parametrize(("fetched", "code"), [("2", 2), ("3", 0)])
def test_only_missing_downloads_are_no_failure(fetched, code, tree):
    done = tree.run(FAIL_FETCH=fetched)
    assert done.returncode == code
    assert ("next: " in done.stdout) == (code == 0)


@pytest.mark.parametrize("step", ["VENV", "PIP"])
def test_a_failed_step_says_what_to_do_and_stops(step, tree):
    done = tree.run(**{"FAIL_" + step: "7"})
    assert done.returncode == 1
    assert re.match("setup.sh: error: .*(python3-venv|PIP_FIND_LINKS)", done.stderr, re.DOTALL)
    assert len(done.stderr.splitlines()) <= 2
    assert "data/fetch.py" not in tree.asked
    assert tree.run().returncode == 0  # nothing is left in the way of the next try


def test_ctrl_c_leaves_no_half_environment(tree):
    # A suite in the background ignores SIGINT, and so would setup.sh.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert tree.run(INTERRUPT="1").returncode != 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tree.root / ".venv").exists()
    assert tree.run().returncode == 0


@pytest.mark.parametrize("name", ["data/fetch.py", "data/manifest.json"])
def test_a_submission_without_the_data_folder_is_set_up_all_the_same(name, tree):
    (tree.root / name).unlink()
    done = tree.run()
    assert done.returncode == 0
    assert "are not fetched" in done.stdout
    assert tree.asked[-1] == INSTALL + "requirements.txt"


def test_a_folder_that_is_no_usable_venv_is_left_to_its_owner(tree):
    def is_refused(**environment):
        done = tree.run(**environment)
        return "move it away" in refusal(done) and tree.asked == []

    venv = tree.root / ".venv"
    venv.mkdir()
    (venv / "mine").write_text("dear to someone", encoding="utf-8")
    assert is_refused()
    assert (venv / "mine").exists()
    shutil.rmtree(venv)
    tree.run()
    assert is_refused(REAL_PYTHON="false")
    assert is_refused(FAIL_PIP_VERSION="1")
    (venv / "bin/python").unlink()
    assert is_refused()
    shutil.rmtree(venv)
    venv.symlink_to("nowhere")
    assert is_refused()


def test_every_requirement_is_an_exact_pin():
    names = ("requirements.txt", "requirements-dev.txt")
    users, dev = ((ROOT / name).read_text(encoding="utf-8").splitlines() for name in names)
    assert users and dev.pop(0) == "-r requirements.txt"
    assert all(re.fullmatch(r"[a-z-]+==[0-9]+(\.[0-9]+)+", line) for line in users + dev)
