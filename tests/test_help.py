"""Each command's --help describes every option and shows three commands that its parser accepts."""

import argparse
import re
import shlex

import pytest

import fuzz
import prepare_submit
import run_llama
import sanity_check
from advanced import run as advanced_run
from benchmarks import int8, ranks
from benchmarks import report as benchmarks_report
from benchmarks import run as benchmarks_run
from conftest import ROOT
from data import fetch
from pretraining import run as pretraining_run
from results import history
from results import report as results_report
from test_layers import MODULES
from tools import explain, export, generate, predict

COMMANDS = {  # what is typed after `python`, and the function that makes the parser
    "run_llama.py": run_llama.get_args,
    "sanity_check.py": sanity_check.main,
    "prepare_submit.py": prepare_submit.script,
    "data/fetch.py": fetch.main,
    "tests/fuzz.py": fuzz.main,
    "-m tools.generate": generate.get_args,
    "-m tools.predict": predict.get_args,
    "-m tools.explain": explain.get_args,
    "-m tools.export": export.get_args,
    "-m advanced.run": advanced_run.get_args,
    "-m pretraining.run": pretraining_run.get_args,
    "-m benchmarks.run": benchmarks_run.main,
    "-m benchmarks.int8": int8.main,
    "-m benchmarks.ranks": ranks.main,
    "-m benchmarks.report": benchmarks_report.main,
    "-m results.report": results_report.main,
    "-m results.history": history.main,
}
PROGRAMS = ("python", ".venv/bin/python", "torchrun --nproc-per-node 2")


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def parser(command: str) -> argparse.ArgumentParser:
    return parser_of(command)


def parser_of(command: str) -> argparse.ArgumentParser:
    def parse_args(self: argparse.ArgumentParser, *_: object) -> None:
        raise SystemExit(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as made:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        COMMANDS[command]()
    return made.value.code


def examples_of(parser: argparse.ArgumentParser) -> list[str]:
    title, *lines = parser.epilog.splitlines()
    assert title == "examples:"
    return [line.strip() for line in lines]


def arguments_of(example: str, command: str) -> list[str]:
    """The words after the command, without a comment and without what the shell redirects."""
    program, found, rest = example.partition(f" {command}")
    assert found and program in PROGRAMS, example
    return shlex.split(re.split(" [<>] ", rest)[0], comments=True)


def test_every_module_that_parses_options_is_listed():
    listed = {name.removeprefix("-m ").removesuffix(".py").replace(".", "/") for name in COMMANDS}
    sources = {str(path.with_suffix("")): ROOT / path for path in MODULES}
    sources["tests/fuzz"] = ROOT / "tests/fuzz.py"
    assert listed == {
        name for name, path in sources.items() if ".parse_args(" in path.read_text(encoding="utf-8")
    }


def test_help_shows_description_options_and_three_examples(parser, capsys):
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code in (None, 0)
    assert re.match(r"[A-Z][^\n]+\.$", parser.description)
    assert parser.description in out
    assert len(examples_of(parser)) == 3 and out.endswith(f"{parser.epilog}\n")


def test_every_option_has_a_help_text_with_its_default(parser):
    for action in parser._actions:
        assert action.help, action.dest
        is_option = bool(action.option_strings) or action.nargs in ("?", "*")
        if is_option and action.dest != "help":
            assert re.search(r"\(default: .|\(required", action.help), action.dest
            assert not action.help.startswith("default"), action.dest


def test_every_example_is_accepted(command, parser, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    check = COMMANDS[command]
    if check.__name__ != "get_args":  # it would run
        check = parser.parse_args
    for example in examples_of(parser):
        check(arguments_of(example, command))


def test_files_in_examples_are_in_a_checkout_or_placeholders(command, parser):
    published = (ROOT / "data/manifest.json").read_text(encoding="utf-8")
    for example in examples_of(parser):
        for word in arguments_of(example, command):
            path = word.partition("=")[2] or word
            if re.search(r"/|\.[a-z]\w*$", path) and not re.search("[A-Z]{2}", path):
                is_name = command == "data/fetch.py" and f'"{path}"' in published
                assert is_name or (ROOT / path).exists(), path
