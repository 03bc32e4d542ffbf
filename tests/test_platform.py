"""The same behavior on every system: letters, folders, file names, encodings, processes."""

import ast
import ntpath
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import run_llama
from conftest import ROOT, copy_project
from helpers import without_hint
from training.options import PREFIX
from utils import atomic_write

ROOMS = ("advanced", "benchmarks", "data", "fast", "formats", "pretraining", "results", "tools")
PATTERNS = ["*.py", "training/*.py", *(f"{room}/**/*.py" for room in ROOMS)]
PROJECT = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
LETTERS = "мои модели 我的"
ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}


def python(*command: str | Path, cwd: Path = ROOT, **environment: str):
    """A Python process that leaves no bytecode behind."""
    return subprocess.run(
        [sys.executable, "-B", *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


# ---------------------------------------------------------------- folders and letters


def test_from_another_folder_inputs_are_the_projects_and_outputs_stay_here(tmp_path):
    """With spaces and letters of three scripts in both paths."""
    project, here = tmp_path / LETTERS / "min llama", tmp_path / "別の 所"
    copy_project(project)
    here.mkdir()
    before = sorted(project.rglob("*"))
    ended = python(project / "run_llama.py", cwd=here)
    assert (ended.returncode, ended.stderr.count("\n")) == (0, 1), ended.stderr
    outputs = [f"generated-sentence-temp-{temperature}.txt" for temperature in (0, 1)]
    assert sorted(path.name for path in here.iterdir()) == outputs
    assert sorted(project.rglob("*")) == before
    for name in outputs:
        assert (here / name).read_text(encoding="utf-8").startswith(PREFIX)


@pytest.mark.parametrize(
    ("folder", "environment"),
    [(LETTERS, {"PYTHONIOENCODING": "ascii"}), ("plain", ASCII_LOCALE)],
    ids=["letters", "locale"],
)
def test_neither_the_folders_letters_nor_the_locale_change_what_is_written(
    workplace, folder, environment
):
    sentences = ["un film réussi", "хороший фильм", "好电影", "👍 good"]
    rows = "".join(f"{i % 2} ||| {sentence}\n" for i, sentence in enumerate(sentences))
    (workplace / folder).mkdir()
    for name in ("model.pt", "tokenizer.model", "labels.json"):
        shutil.move(workplace / name, workplace / folder / name)
    files = {"pretrained-model-path": "model.pt", "label-names": "labels.json"}
    for split in ("train", "dev", "test"):
        files[split] = f"toy-{split}.txt"
        (workplace / folder / files[split]).write_text(rows, encoding="utf-8")
    outputs = {f"{split}_out": f"toy-{split}-finetuning-output.txt" for split in ("dev", "test")}
    command = [ROOT / "run_llama.py", "--option", "finetune", "--epochs", "1"]
    for key, name in (files | outputs).items():
        command += [f"--{key}", f"{folder}/{name}"]
    ended = python(*command, cwd=workplace, **environment)
    assert (ended.returncode, without_hint(ended.stderr)) == (0, "")
    assert ended.stdout.isascii()
    assert (workplace / "finetune-toy-1-2e-05.pt").is_file()
    for name in outputs.values():
        lines = (workplace / folder / name).read_text(encoding="utf-8").splitlines()
        assert [line.split(" ||| ")[1] for line in lines] == sentences


def test_a_letter_that_the_terminal_lacks_is_escaped_on_both_streams():
    program = """
from utils import InputError, run_script
def main():
    print("\\u6211")
    raise InputError("\\u6211")
run_script(main)
"""
    ended = python("-c", program, **ASCII_LOCALE)
    assert (ended.returncode, ended.stdout) == (2, "\\u6211\n")
    assert ended.stderr == "-c: error: \\u6211\n"


# ---------------------------------------------------------------- names that Windows can have

DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"}
DEVICES |= {f"{port}{digit}" for port in ("COM", "LPT") for digit in "123456789¹²³"}


def is_windows_name(name: str) -> bool:
    """Microsoft's rules for the name of a file (Naming Files, Paths, and Namespaces)."""
    if not name or name[-1] in " ." or set(name) & {*'<>:"/\\|?*', *map(chr, range(32))}:
        return False
    return name.partition(".")[0].rstrip(" ").upper() not in DEVICES


def test_the_rule_for_names_is_windows_own():
    good = ["a.txt", ".hidden", "com", "com0", "nullable", "a b.c", "мои"]
    bad = ["", "a:b", "a\\b", "a\tb", "a.", "a ", "nul", "Aux.txt", "con .txt", "com1.a", "lpt¹"]
    for name in good + bad:
        assert is_windows_name(name) == (name in good), name
        is_path = ntpath.basename(name) != name  # ":" and a backslash divide one
        if name and not is_path and hasattr(ntpath, "isreserved"):  # since Python 3.13
            assert ntpath.isreserved(name) == (name in bad), name


@pytest.mark.parametrize("place", ["con/{}.txt", 'a:b"c<d>e|f?g*h\\i\tj-{}.txt'])
def test_a_default_name_of_an_output_is_one_that_windows_can_have(place):
    typed = [w for name in ("train", "dev", "test") for w in (f"--{name}", place.format(name))]
    args = run_llama.get_args(["--option", "finetune", *typed])
    names = [value for key, value in vars(args).items() if key.endswith("_out")]
    assert len(names) == 4
    assert all(map(is_windows_name, [*names, run_llama.checkpoint_path(args)]))


@pytest.mark.parametrize("name", ["com", ".hidden", "мои модели", "a" * 39 + " " + "b" * 200])
def test_a_temporary_name_is_one_that_windows_can_have(tmp_path, name):
    with atomic_write(tmp_path / name):
        (temporary,) = tmp_path.iterdir()
    assert is_windows_name(temporary.name)


def test_the_project_can_be_checked_out_on_windows():
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    paths = set(listed.stdout.rstrip("\0").split("\0"))  # a conflict lists one thrice
    assert "run_llama.py" in paths
    assert all(is_windows_name(name) for path in paths for name in path.split("/"))
    assert len({path.casefold() for path in paths}) == len(paths)


# ---------------------------------------------------------------- laws of the sources


def calls(source: str) -> Iterator[tuple[str, str, ast.Call]]:
    """(module or object, verb, call) of every call: ("os.path", "join", ...)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            owner, _, verb = ast.unparse(node.func).rpartition(".")
            yield owner, verb, node


def leaves_the_encoding_open(owner: str, verb: str, call: ast.Call) -> bool:
    words = {word.arg: word.value for word in call.keywords}
    if "encoding" in words or None in words:  # None: `**options`
        return False
    if owner == "subprocess":
        return "text" in words or "universal_newlines" in words
    if verb in ("read_text", "write_text"):
        return len(call.args) <= ("read_text", "write_text").index(verb)
    if verb != "open":
        return False
    is_packed = owner in ("gzip", "bz2", "lzma")  # binary by default
    place = 1 if is_packed or owner in ("", "io") else 0  # else Path.open, whose mode comes first
    mode = call.args[place] if len(call.args) > place else words.get("mode", ast.Constant("r"))
    modes = [node.value for node in ast.walk(mode) if isinstance(node, ast.Constant)]
    text = [m for m in modes if isinstance(m, str) and set(m) <= set("rwaxt+")]
    return any("t" in m for m in text) if is_packed else bool(text)


LEFT_OPEN = """open(p) | open(p, 'w') | open(p, mode='r+') | p.open() | p.open('w') | p.read_text()
    | lzma.open(p, 'rt') | p.write_text(s) | subprocess.run(c, text=True)"""
NAMED = """open(p, 'rb') | open(p, 'ab' if more else 'wb') | p.open('rb') | lzma.open(p)
    | os.open(p, flags) | zip.open(member) | p.read_text('utf-8') | open(p, encoding='utf-8')
    | subprocess.run(c)"""


def test_an_encoding_left_to_the_system_is_seen():
    for sources, expected in ((LEFT_OPEN, True), (NAMED, False)):
        for source in map(str.strip, sources.split("|")):
            assert [leaves_the_encoding_open(*call) for call in calls(source)] == [expected], source


def test_every_text_names_its_encoding():
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in [*PROJECT, *ROOT.glob("tests/**/*.py")]
        for owner, verb, call in calls(path.read_text(encoding="utf-8"))
        if leaves_the_encoding_open(owner, verb, call)
    ]
    assert found == []


def test_renames_replace_what_is_there_on_windows_too():
    """os.rename and Path.rename fail there on an existing target, and shutil.move copies."""
    for path in PROJECT:
        verbs = {verb for _, verb, _ in calls(path.read_text(encoding="utf-8"))}
        assert verbs.isdisjoint({"rename", "renames", "move"}), path


def test_no_process_is_a_fork_of_another():
    """Windows cannot, macOS should not; a DataLoader with workers forks on Linux alone.

    `context` is what get_context("spawn") gave.
    """
    forking = {"fork", "forkpty", "Process", "Pool", "ProcessPoolExecutor", "set_start_method"}
    for path in PROJECT:
        for owner, verb, call in calls(path.read_text(encoding="utf-8")):
            arguments = [ast.unparse(argument) for argument in call.args]
            if verb in forking:
                assert "context" in (owner, *arguments), f"{path}: {owner}.{verb}"
            if verb == "get_context":
                assert arguments == ["'spawn'"], path
            assert "num_workers" not in {word.arg for word in call.keywords}, path
