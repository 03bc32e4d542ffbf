"""setup.sh with a stand-in for Python, so that nothing is installed and no network is needed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Plays the base Python and, copied there by `-m venv`, the Python of the new .venv. It writes down
# what it is asked for, and fails where FAIL_<step> gives an exit code.
STAND_IN = f"""#!/bin/sh
case "$*" in
    *version_info*) exec "${{REAL_PYTHON:-{sys.executable}}}" "$@" ;;
    -c*) exit 0 ;;
esac
echo "$*" >>"$LOG"
case "$1 $2" in
    "-m venv")
        mkdir -p .venv/bin && touch .venv/pyvenv.cfg && cp "$0" .venv/bin/python
        exit ${{FAIL_VENV:-0}} ;;
    "-m pip") [ "$3" = install ] && exit ${{FAIL_PIP:-0}} ;;
    data/fetch.py*) exit ${{FAIL_FETCH:-0}} ;;
esac
exit 0
"""
INSTALL = "-m pip install -qq --disable-pip-version-check -r "


class Tree:
    """A copy of what setup.sh needs, and a way to run it there."""

    def __init__(self, folder):
        self.root = folder / "a project"
        self.caller = folder / "else" / "where"
        self.python = folder / "stand-in"
        self.log = folder / "log"
        (self.root / "data").mkdir(parents=True)
        self.caller.mkdir(parents=True)
        for name in ("setup.sh", "requirements.txt", "data/fetch.py", "data/manifest.json"):
            shutil.copy(REPOSITORY / name, self.root / name)
        self.python.write_text(STAND_IN, encoding="utf-8")
        self.python.chmod(0o755)

    def run(self, *options, **environment):
        """Runs setup.sh from another folder; `asked` becomes what Python was asked to do."""
        self.log.write_text("", encoding="utf-8")
        environment = {"PYTHON": str(self.python), "LOG": str(self.log), **environment}
        done = subprocess.run(
            ["bash", self.root / "setup.sh", *options],
            cwd=self.caller,
            env={**os.environ, **environment},
            capture_output=True,
            encoding="utf-8",
        )
        asked = self.log.read_text(encoding="utf-8").splitlines()
        self.asked = [line for line in asked if line != "-m pip --version"]
        return done


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def one_error(done):
    (line,) = done.stderr.splitlines()
    assert line.startswith("setup.sh: error: ")
    return line


def test_bash_can_parse_it_and_it_is_executable():
    script = REPOSITORY / "setup.sh"
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    assert os.access(script, os.X_OK)


def test_help_names_every_option_and_does_nothing(tree):
    done = tree.run("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert all(option in done.stdout for option in ("--dev", "--assets-from DIR", "--help"))
    assert tree.asked == []


@pytest.mark.parametrize("options", [["--nonsense"], ["extra"], ["--assets-from"]])
def test_a_wrong_command_line_is_one_line_and_does_nothing(options, tree):
    done = tree.run(*options)
    assert done.returncode == 2
    assert options[0] in one_error(done)
    assert tree.asked == []


def test_a_folder_of_assets_that_is_not_there_is_refused_before_any_installation(tree):
    done = tree.run("--assets-from", "absent")
    assert done.returncode == 2
    assert "absent: no such folder" in one_error(done)
    assert tree.asked == []


@pytest.mark.parametrize("python", ["no-such-python", "false"])
def test_an_unsupported_python_is_refused(python, tree):
    done = tree.run(PYTHON=python)
    assert done.returncode == 2
    assert f"PYTHON={python} is not a Python 3.10 to 3.13" in one_error(done)
    assert not (tree.root / ".venv").exists()


@pytest.mark.parametrize(
    ("version", "supported"),
    [((2, 7), 0), ((3, 9), 0), ((3, 10), 1), ((3, 13), 1), ((3, 14), 0), ((4, 0), 0)],
)
def test_pythons_from_3_10_to_3_13_are_supported(version, supported, tree):
    real = tree.caller / "real"  # the real Python, but for the version that it claims
    real.write_text(
        f"#!{sys.executable}\nimport sys\nsys.version_info = {version} + (0,)\nexec(sys.argv[2])\n",
        encoding="utf-8",
    )
    real.chmod(0o755)
    assert tree.run(REAL_PYTHON=str(real)).returncode == (0 if supported else 2)


def test_without_any_python_there_is_one_line(tree):
    tools = tree.caller / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    done = tree.run(PYTHON="", PATH=str(tools))
    assert done.returncode == 2
    assert "no Python 3.10 to 3.13 found" in one_error(done)


def test_a_stub_on_the_path_is_passed_over_for_a_python_that_runs(tree):
    tools = tree.caller / "tools"
    tools.mkdir()
    (tools / "python3").write_text("#!/bin/sh\nexit 127\n", encoding="utf-8")
    (tools / "python3").chmod(0o755)
    for name in ("python3.13", "python3.12", "python3.11"):
        shutil.copy(tools / "python3", tools / name)
    shutil.copy(tree.python, tools / "python3.10")
    assert tree.run(PYTHON="", PATH=f"{tools}:{os.environ['PATH']}").returncode == 0
    assert tree.asked[0] == "-m venv --clear .venv"


def test_it_makes_a_venv_installs_fetches_and_names_the_next_command(tree):
    done = tree.run()
    assert done.returncode == 0 and done.stderr == ""
    assert tree.asked == ["-m venv --clear .venv", INSTALL + "requirements.txt", "data/fetch.py"]
    assert "next: .venv/bin/python " in done.stdout.splitlines()[-1]


def test_a_second_run_keeps_the_venv(tree):
    tree.run()
    assert tree.run().returncode == 0
    assert tree.asked == [INSTALL + "requirements.txt", "data/fetch.py"]


def test_options_are_passed_on_and_folders_are_the_callers(tree):
    (tree.caller / "some assets").mkdir()
    assert tree.run("--dev", "--assets-from", "some assets").returncode == 0
    folder = tree.caller / "some assets"
    assert tree.asked[1:] == [
        INSTALL + "requirements-dev.txt",
        f"data/fetch.py --assets-from {folder}",
    ]


def test_a_relative_python_is_the_callers(tree):
    assert tree.run(PYTHON="../../stand-in").returncode == 0
    assert tree.asked[0] == "-m venv --clear .venv"


@pytest.mark.parametrize(("fetched", "code"), [("0", 0), ("1", 1), ("2", 2), ("3", 0)])
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


@pytest.mark.parametrize("name", ["data/fetch.py", "data/manifest.json"])
def test_a_submission_without_the_data_folder_is_set_up_all_the_same(name, tree):
    (tree.root / name).unlink()
    done = tree.run()
    assert done.returncode == 0
    assert "are not fetched" in done.stdout
    assert tree.asked[-1] == INSTALL + "requirements.txt"


def test_a_venv_whose_python_is_gone_is_made_anew(tree):
    tree.run()
    (tree.root / ".venv/bin/python").unlink()
    done = tree.run()
    assert done.returncode == 0 and "anew" in done.stdout
    assert tree.asked[0] == "-m venv --clear .venv"


def test_a_folder_that_is_no_venv_is_never_cleared(tree):
    (tree.root / ".venv").mkdir()
    (tree.root / ".venv/mine").write_text("dear to someone", encoding="utf-8")
    done = tree.run()
    assert done.returncode == 2 and "move it away" in one_error(done)
    assert (tree.root / ".venv/mine").exists()
    assert tree.asked == []


def test_a_venv_of_another_python_is_left_to_its_owner(tree):
    tree.run()
    (tree.root / ".venv/bin/python").write_text(
        '#!/bin/sh\ncase "$*" in *version_info*) exit 1 ;; esac\n',
        encoding="utf-8",
    )
    done = tree.run()
    assert done.returncode == 2 and "rm -r .venv" in one_error(done)
    assert (tree.root / ".venv/bin/python").exists()


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_is_an_exact_pin(name):
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    if name == "requirements-dev.txt":
        assert lines.pop(0) == "-r requirements.txt"
    assert lines
    assert all(re.fullmatch(r"[a-z-]+==[0-9]+(\.[0-9]+)+", line) for line in lines)
