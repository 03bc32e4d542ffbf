"""The documents: links lead somewhere, and commands run as they are written."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import test_help
from conftest import ROOT
from training.options import PREFIX

PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("data/mini/*.md")]
    if not path.is_relative_to(ROOT / "runs")
)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = set()
    for heading in re.findall(r"^#+ (.*)", text, flags=re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page):
    broken = []
    for link in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_front_page_is_read_in_one_sitting():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 260 and len(text.encode()) <= 20_000


@pytest.mark.parametrize("page", ["README.md", "README.zh-TW.md"])
def test_the_front_pages_count_the_lines_of_the_code(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[([\w/]+\.py)\]\(\1\) \| (\d+) \|", text, re.M)
    assert len(rows) == 9
    for name, n_lines in rows:
        assert (ROOT / name).read_text(encoding="utf-8").count("\n") == int(n_lines), name


def blocks(page: Path, language: str = r"\w*") -> list[str]:
    """Return the code blocks of a page in a language, or all of them."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


# A command that needs downloads, another package or minutes of time is not run here, nor one that
# repeats a bare command with the number of threads, a batch size, or the defaults written out.
LEFT_OUT = re.compile(
    r"setup\.sh|fetch\.py|stories42M|sanity_check\.data|stories260K|data/(sst|cfimdb)|2e-5"
    r"|finetune --pretrained|ANDREWID|FILE|ADDRESS|torchrun|pytest|fuzz\.py|ruff|benchmarks"
    r"|results\.|advanced\.run --method|--use_gpu|--batch_size|\$"
    r"|^(OMP_NUM_THREADS|git|cd|rm|sed -n)\b"
)


def commands() -> list[str]:
    """The lines of the bash blocks in the order of the pages, each once."""
    lines = []
    for page in (ROOT / "README.md", ROOT / "docs/usage.md", *sorted(ROOT.glob("docs/*.md"))):
        for block in blocks(page, "bash"):
            lines += [line.split("    #")[0] for line in block.splitlines()]
    return [line for line in dict.fromkeys(lines) if not LEFT_OUT.search(line)]


PROGRAM = re.compile(
    r"(?:\w+=\w+ )*(?:\.venv/bin/)?(?:python3?|torchrun --nproc-per-node \d) "
    r"(-m [\w.]+|[\w/]+\.py)(?= |$)(.*)"
)


def test_every_command_of_every_page_is_accepted():
    """By its parser, also those that no test runs."""
    checked = set()
    for line in (line for page in PAGES for block in blocks(page) for line in block.splitlines()):
        found = PROGRAM.match(line)
        if found and found[1] in test_help.COMMANDS and "--help" not in line:
            words = shlex.split(re.split(" [<>] ", found[2])[0], comments=True)
            test_help.parser_of(found[1]).parse_args(words)
            checked.add(found[1])
    assert len(checked) > 10


def python_blocks() -> list[str]:
    """The Python blocks of the pages, in which a checkpoint of the commands is read."""
    pages = (ROOT / "README.md", ROOT / "docs/usage.md")
    return [block for page in pages for block in blocks(page, "python")]


def printed_by(command: str) -> str:
    """The block that README shows below a command."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(rf"^{re.escape(command)}\n```\n\n```\n(.*?)^```", text, re.M | re.S)[1]


# A proxy that no name server knows: a command that uses the network fails.
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://offline.invalid:9")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The tracked files, with fewer demo sentences: training on all of them takes a minute."""
    folder = tmp_path_factory.mktemp("clone")
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    )
    for name in tracked.stdout.split("\0")[:-1]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    for split, n in (("train", 180), ("dev", 50), ("test", 20)):
        path = folder / f"data/demo-{split}.txt"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:n]), encoding="utf-8")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def test_the_commands_of_the_pages_run_as_they_are_written(clone):
    lines, said = commands(), {}
    for line in lines:
        ended = subprocess.run(
            ["bash", "-c", line],
            cwd=clone,
            env={**os.environ, **OFFLINE},
            capture_output=True,
            encoding="utf-8",
        )
        assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"
        said[line] = ended

    for block in python_blocks():
        ended = subprocess.run(
            [sys.executable, "-c", block], cwd=clone, capture_output=True, encoding="utf-8"
        )
        assert ended.returncode == 0, f"{block}\n{ended.stderr}"
        assert ended.stdout.splitlines()[-1] in ("awful", "bad", "average", "good", "excellent")

    bare = ".venv/bin/python run_llama.py"
    for line in printed_by(bare).splitlines():
        assert line in said[bare].stdout
    assert said[bare].stderr.count("\n") == 1
    assert "stories42M.pt not found, using the bundled" in said[bare].stderr
    for temperature in ("0", "1"):
        path = clone / f"generated-sentence-temp-{temperature}.txt"
        text = path.read_text(encoding="utf-8")
        assert text.startswith(PREFIX) and len(text) > len(PREFIX) + 100
    output = clone / "demo-dev-prompting-output.txt"
    assert len(output.read_text(encoding="utf-8").splitlines()) == 50
    printed = said[f"{bare} --option finetune"].stdout
    accuracy = re.search(r"^dev acc :: (.*)$", printed, flags=re.M)
    assert float(accuracy[1]) > 0.35  # of five labels
