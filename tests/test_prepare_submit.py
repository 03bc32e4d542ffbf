"""prepare_submit.py packs what belongs into ID.zip, and names all that is wrong in one error."""

import errno
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import prepare_submit
from conftest import ROOT, shared_asset
from submission import (
    FILES,
    ID,
    MAPPINGS,
    OUTPUTS,
    REQUIRED,
    add_to,
    predictions,
    put,
    put_splits,
    zip_of,
)

NAME = "sst-dev-prompting-output.txt"
RIGHT = predictions("sst", "dev")
QUESTION = "Is this movie bad, so-so, or good? This movie is "


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The current folder, beside the submission's; splits that no folder has are in a third."""
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(prepare_submit, "DATA", put_splits(tmp_path / "splits"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def folder(tmp_path):
    return put(tmp_path / "submission", FILES)


@pytest.fixture
def script(tmp_path):
    """script(*args) runs a copy of prepare_submit.py alone in its folder, in a bare Python."""
    (tmp_path / "tool").mkdir()
    shutil.copy(ROOT / "prepare_submit.py", tmp_path / "tool")

    def call(*args, flags=()) -> subprocess.CompletedProcess:
        tool = [sys.executable, "-S", "-I", *flags, str(tmp_path / "tool" / "prepare_submit.py")]
        command = [*tool, *map(str, args)]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)

    return call


def problems(path) -> list[str]:
    """The lines of the error that `main` raises, without the headline, whose count they match."""
    with pytest.raises(AssertionError) as caught:
        prepare_submit.main(path, ID)
    headline, *lines = str(caught.value).split("\n")
    assert int(re.match(r"(\d+) problems? in ", headline)[1]) == len(lines)
    return [line.strip() for line in lines]


def packed(folder) -> set[str]:
    prepare_submit.main(folder, ID)
    with zipfile.ZipFile(f"{ID}.zip") as archive:
        assert all(name.startswith(f"{ID}/") for name in archive.namelist())
        return {name.removeprefix(f"{ID}/") for name in archive.namelist()}


def test_complete_folder_becomes_one_zip_of_its_files_that_passes_the_check(folder, here, capsys):
    assert packed(folder) == set(FILES)
    with zipfile.ZipFile(f"{ID}.zip") as archive:
        assert all(archive.read(f"{ID}/{name}").decode() == text for name, text in FILES.items())
        assert archive.namelist() == sorted(archive.namelist())
    printed = capsys.readouterr().out
    assert all(f" {ID}/{name}\n" in printed for name in FILES)
    prepare_submit.check_file(f"{ID}.zip", ID)
    assert "a complete submission" in capsys.readouterr().out
    assert [path.name for path in here.iterdir()] == [f"{ID}.zip"]


def test_what_the_submission_does_not_need_stays_out_and_is_listed(folder, capsys):
    needless = {
        **{"tests/test_llama.py": "import pytest", "benchmarks/run.py": "", "docs/usage.md": ""},
        **{"training/unused.py": "import transformers", "results/records/a.json": "[]"},
        **{"CHANGELOG.md": "", "stories42M.pt": "", "old.zip": "", "data/sst-train.txt": "no"},
        **{"data/mini/model.pt": "", ".git/config": "", ".hidden": "", "venv/pyvenv.cfg": ""},
        **{"venv/lib/a.py": "", "tests/__pycache__/a.pyc": "", "advanced/run.py": ""},
    }
    assert packed(put(folder, needless)) == set(FILES)
    left_out = "CHANGELOG.md, advanced/, benchmarks/, docs/, old.zip, results/, stories42M.pt"
    assert f"left out: {left_out}, tests/\n" in capsys.readouterr().out


def test_advanced_code_travels_with_advanced_outputs(folder):
    outputs = {
        f"cfimdb-{split}-advanced-output.txt": predictions("cfimdb", split, f" {QUESTION}\n")
        for split in ("dev", "test")
    }
    code = {
        "advanced/run.py": "import pretraining.loop\n",
        "advanced/methods/smart.py": "",
        "training/templates.json": "{}",
        "pretraining/loop.py": "",
    }
    assert packed(put(folder, outputs | code)) == {*FILES, *outputs, *code}


def test_names_above_the_folder_do_not_matter(tmp_path):
    assert packed(put(tmp_path / ".git/venv/__pycache__/a.zip/env", FILES)) == set(FILES)


def test_same_files_give_the_same_bytes_also_from_within_the_folder(folder, tmp_path, monkeypatch):
    packed(folder)
    first = Path(f"{ID}.zip").read_bytes()
    copy = put(tmp_path / "copy", dict(reversed(FILES.items())))
    for path in copy.rglob("*.py"):
        os.utime(path, (1e9, 1e9))
    monkeypatch.chdir(copy)
    for _ in range(2):  # the second run finds the zip of the first
        packed(".")
        assert Path(f"{ID}.zip").read_bytes() == first


def test_executable_script_stays_executable(folder):
    (folder / "setup.sh").chmod(0o700)
    packed(folder)
    with zipfile.ZipFile(f"{ID}.zip") as archive:
        modes = {i.filename: oct(i.external_attr >> 16 & 0o777) for i in archive.infolist()}
    assert modes.pop(f"{ID}/setup.sh") == "0o755" and set(modes.values()) == {"0o644"}


CHANGES = {  # file: (its text or None if it is missing, what the violation begins with)
    "README.md": (None, "missing required file: README.md"),
    "rope.py": (" \r\n", "empty file: rope.py"),
    "generated-sentence-temp-1.txt": ("\ufeff\n", "empty file: generated-sentence-temp-1.txt"),
    "sst-dev-advanced-output.txt": (RIGHT, "half a pair: sst-dev-advanced-output.txt and sst-test"),
    "training/state.py": (
        None,
        "training/loop.py:4: imports training.state, which is neither in the submission nor ",
    ),
    "utils.py": ("import os\nx = (\n", "utils.py:2: not Python ("),
    "config.py": ("def f():\n    import transformers.models\n", "config.py:2: imports transfor"),
    "data/sst-label-mapping.json": ('["bad"]', "data/sst-label-mapping.json: is not a JSON list"),
    "cfimdb-dev-finetuning-output.txt": (
        predictions("cfimdb", "dev").replace("1 |||", "2 |||"),
        "cfimdb-dev-finetuning-output.txt:2: label 2 does not exist; labels are 0 to 1; write the",
    ),
}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        *((name, *change) for name, change in CHANGES.items()),
        ("training/loop.py", None, "run_llama.py:2: imports training.loop, which"),
        ("formats/checkpoint.py", None, "llama.py:2: imports formats.checkpoint, which"),
        ("formats/deep/torch_file.py", None, "training/state.py:1: imports formats.deep.torch_f"),
        ("formats/deep/names.py", None, "formats/deep/__init__.py:1: imports formats.deep.names"),
    ],
)
def test_each_violation_is_reported_alone(name, text, expected):
    files = {n: t for n, t in (FILES | {name: text}).items() if t is not None}
    (line,) = problems(zip_of(files))
    assert line.startswith(expected)


def test_every_required_file_must_be_there(folder):
    for name in REQUIRED:
        (folder / name).unlink()
    assert {f"missing required file: {name}" for name in REQUIRED} <= {*problems(folder)}


def test_all_violations_come_in_one_error_and_leave_the_old_zip_as_it_was(folder, here):
    put(here, {f"{ID}.zip": "old"})
    for name, (text, _) in CHANGES.items():
        (folder / name).unlink(missing_ok=True)
        if text is not None:
            put(folder, {name: text})
    lines = problems(folder)
    expected = [start for _, start in CHANGES.values()]
    assert len(lines) == len(expected)
    assert all(any(line.startswith(start) for line in lines) for start in expected)
    assert [path.name for path in here.iterdir()] == [f"{ID}.zip"]
    assert (here / f"{ID}.zip").read_text(encoding="utf-8") == "old"


def test_a_zip_that_was_written_wrong_never_takes_its_name(folder, here, monkeypatch):
    write = zipfile.ZipFile.writestr
    monkeypatch.setattr(zipfile.ZipFile, "writestr", lambda z, info, text: write(z, info, b""))
    assert "empty file: rope.py" in problems(folder)
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RIGHT.replace("0 |||", "zero |||"), "1: label 'zero' is not an integer"),
        (RIGHT.replace("1 |||", "3 |||"), "2: label 3 does not exist; labels are 0 to 2"),
        (RIGHT.replace("1 |||", "-1 |||"), "2: label -1 does not exist; labels are 0 to 2"),
        (RIGHT.replace("0 |||", "0,"), "1: '0, sst in dev is good' is not 'label ||| sentence'"),
        (RIGHT.replace("dev é", "dev E"), "3: 'sst in dev E' found, data/sst-dev.txt has 'sst"),
        (RIGHT.replace("é", "x" * 99), f"3: 'sst in dev {'x' * 29}...' found, data/sst-dev"),
        (RIGHT + "1 ||| more\n", "5: 'more' found, data/sst-dev.txt has nothing (5 sentences"),
        (RIGHT[: RIGHT.rindex("1 |||")], "end: nothing found, data/sst-dev.txt has 'sst in"),
        ("".join(reversed(RIGHT.splitlines(True))), "1: 'sst in dev was bad' found"),
        (predictions("sst", "test"), "1: 'sst in test is good' found, data/sst-dev.txt has"),
        (RIGHT.replace("good\n", "good Is it?\n"), "1: '... in dev is good Is it?' found"),
        (RIGHT.encode("latin-1"), "3: byte 0xe9 is not UTF-8"),
    ],
)
def test_each_wrong_output_is_one_violation_with_its_first_wrong_line_and_remedy(text, expected):
    (line,) = problems(zip_of(FILES | {NAME: text}))
    assert line.startswith(f"{NAME}:{expected}")
    assert line.endswith("; write the file again")


def test_a_long_sentence_is_shown_where_it_differs():
    line = prepare_submit.excerpt("a" * 900 + "X" + "b" * 900, "a" * 900 + "Y")
    assert line == repr("..." + "a" * 15 + "X" + "b" * 24 + "...")


@pytest.mark.parametrize("end", [f" {QUESTION}\n", f"\n\n{QUESTION}\n", "\r\n", " \n"])
def test_outputs_of_the_assignments_own_script_carry_the_question_and_pass(folder, end):
    prompted = [name for name in OUTPUTS if "prompting" in name]
    files = {name: predictions(*name.split("-")[:2], end) for name in prompted}
    assert packed(put(folder, files)) == set(FILES)
    if QUESTION in end:  # which a finetuned model is never asked
        text = predictions("sst", "dev", f" {QUESTION}\n")
        put(folder, {"sst-dev-finetuning-output.txt": text})
        assert problems(folder)[0].startswith("sst-dev-finetuning-output.txt:1: ")


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_for_the_real_data_pass_and_only_for_their_own_split(name, monkeypatch):
    folder = shared_asset("data/cfimdb-test.txt").parent
    monkeypatch.setattr(prepare_submit, "DATA", folder)
    own = "-".join(name.split("-")[:2])
    for split in ("sst-dev", "sst-test", "cfimdb-dev", "cfimdb-test"):
        content = (folder / f"{split}.txt").read_bytes()
        found = prepare_submit.output_problems({name: content}, [folder])
        assert [line.partition(": ")[0] for line in found] == (
            [] if split == own else [f"{name}:1"]
        )


def test_a_submission_is_compared_with_the_splits_of_its_folder_or_zip_and_a_note_says_if_not(
    folder, capsys, monkeypatch
):
    put(folder, {"data/sst-dev.txt": "0 ||| of nobody\n"})
    assert any("data/sst-dev.txt has 'of nobody'" in line for line in problems(folder))
    monkeypatch.setattr(prepare_submit, "DATA", folder / "nowhere")
    capsys.readouterr()
    prepare_submit.main(zip_of(FILES | {"data/sst-dev.txt": RIGHT}), ID)
    expected = "note: sentences were not compared with data/sst-test.txt, data/cfimdb-dev.txt, "
    assert expected in capsys.readouterr().out


LINK = zipfile.ZipInfo(f"{ID}/link.md")
LINK.external_attr = (stat.S_IFLNK | 0o777) << 16


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (f"{ID}/stories42M.pt", "stories42M.pt: leave weights, zips, git data and virtual"),
        (f"{ID}/old.zip", "old.zip: leave weights, zips"),
        (f"{ID}/a/.git/objects/b", "a/.git/objects/b: leave weights, zips, git data"),
        (f"{ID}/mine/pyvenv.cfg", "mine/pyvenv.cfg: leave weights, zips, git data and virtual"),
        (f"{ID}/rope.py", f"{ID}/rope.py: 2 entries of this name"),
        ("/etc/passwd", "/etc/passwd: the name is absolute"),
        (f"{ID}/../up.txt", f"{ID}/../up.txt: the name is absolute or has '..'"),
        (f"{ID}\\a.txt", f"{ID}\\a.txt: the name"),
        ("C:/a.txt", "C:/a.txt: the name"),
        (LINK, f"{ID}/link.md: is a link or a device"),
        ("other/a.txt", f"the top of the zip holds {ID}, other; pack one folder, {ID}/"),
        (f"__MACOSX/{ID}/._rope.py", None),
        (f"{ID}/tests/", None),
    ],
)
def test_what_may_not_be_in_a_zip_is_named(entry, expected):
    add_to(zip_of(FILES), entry)
    if expected is None:
        prepare_submit.main("made.zip", ID)
    else:
        assert any(line.startswith(expected) for line in problems("made.zip"))


def test_a_zip_of_another_top_folder_has_no_other_violation():
    (line,) = problems(zip_of(FILES, top="submission/"))
    assert line == f"the top of the zip holds submission; pack one folder, {ID}/"


@pytest.mark.parametrize("limit", ["MAX_BYTES", "MAX_ENTRIES"])
def test_what_is_beyond_the_one_bound_is_not_read(folder, monkeypatch, limit):
    monkeypatch.setattr(prepare_submit, limit, 30)
    zip_of(FILES)
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    for path in (folder, "made.zip"):
        (line,) = problems(path)
        assert re.match(rf"{len(FILES)} files of [\d,]+ bytes were not read; at most ", line)


def test_a_zip_with_bytes_changed_at_random_fails_in_words_or_passes():
    whole = Path(zip_of(FILES)).read_bytes()
    directory = whole.index(b"PK\1\2")
    for seed in range(50):
        draw, data = random.Random(seed), bytearray(whole)
        for _ in range(draw.randint(1, 20)):
            start = directory if draw.random() < 0.8 else 0
            data[draw.randrange(start, len(data))] = draw.choice((0, 1, 0xFF, draw.randrange(256)))
        Path("made.zip").write_bytes(data)
        try:
            prepare_submit.main("made.zip", ID)
        except (AssertionError, prepare_submit.InputError) as error:
            assert "made.zip" in str(error) and str(error).replace("\n", "").isprintable(), seed
        assert [path.name for path in Path().iterdir()] == ["made.zip"], seed


def test_a_lone_copy_of_the_file_packs_and_checks_in_a_python_without_packages(folder, script):
    """Nor does it need `assert`, which -O removes, or leave files open, of which -X dev warns."""
    flags = ("-O", "-X", "dev")
    for path in (folder, f"{ID}.zip"):
        done = script(path, ID, flags=flags)
        assert (done.returncode, done.stderr) == (0, "") and f"{ID}/rope.py\n" in done.stdout
    (folder / "README.md").unlink()
    put(folder, {"setup.sh": "", "é\n.txt": ""})
    done = script(folder, ID, flags=flags)
    assert done.returncode == 1 and done.stderr.splitlines() == [
        f"AssertionError: 2 problems in {folder}:",
        "  missing required file: README.md",
        "  empty file: setup.sh",
    ]


def test_script_says_in_one_line_what_it_cannot_work_with_and_exits_with_2(folder, here, script):
    put(here, {"text.zip": "no zip", "cut.zip": ""})
    Path("cut.zip").write_bytes(Path(zip_of(FILES)).read_bytes()[:-40])
    (here / "taken.zip").mkdir()
    cases = {
        (): "ID",
        (folder,): "ID",
        (folder, ID, "more"): "more",
        ("nowhere", ID): "nowhere",
        ("", ID): "''",
        ("text.zip", ID): "text.zip",
        ("cut.zip", ID): "cut.zip",
        (os.devnull, ID): os.devnull,
        (folder, "taken"): "taken.zip",
        **{(folder, aid): repr(aid) for aid in ("a b", ".a", "a/b", "../a", "é", "a:b")},
    }
    before = sorted(here.iterdir())
    for args, named in cases.items():
        done = script(*args)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (args, done.stderr)
        assert done.stderr.startswith("prepare_submit.py: error: ") and named in done.stderr
    assert sorted(here.iterdir()) == before


def test_a_full_disk_is_one_line_that_names_the_zip(folder, here, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(zipfile.ZipFile, "writestr", write)
    with pytest.raises(OSError, match=rf"No space left on device: '{ID}\.zip'"):
        prepare_submit.main(folder, ID)
    assert not list(here.iterdir())


def test_a_reader_that_stops_early_is_no_traceback(folder, script, tmp_path):
    pack = [sys.executable, str(tmp_path / "tool/prepare_submit.py"), str(folder), ID]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(pack, cwd=tmp_path, stdout=writer, stderr=-1, encoding="utf-8")
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_this_project_packs_itself_and_the_unpacked_script_runs(tmp_path):
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    listed = done.stdout.splitlines()
    folder = tmp_path / "submission"
    for name in filter(lambda name: (ROOT / name).is_file(), listed):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    made_up = {*REQUIRED} - {path.name for path in folder.iterdir()}
    assert made_up == {"sanity_check.data", *OUTPUTS} | {n for n in REQUIRED if "generated" in n}
    put(folder, {name: FILES[name] for name in made_up} | MAPPINGS)
    names = packed(folder)
    needed = {"training/loop.py", "training/__init__.py", "data/fetch.py", "data/manifest.json"}
    assert needed <= names and "requirements.txt" in names
    rooms = {name.split("/")[0] for name in names if "/" in name}
    assert not rooms & {"tests", "benchmarks", "results", "docs", "tools", "advanced"}
    with zipfile.ZipFile(f"{ID}.zip") as archive:
        archive.extractall("unpacked")
    command = [sys.executable, "run_llama.py", "--help"]
    done = subprocess.run(
        command, cwd=f"unpacked/{ID}", capture_output=True, encoding="utf-8", check=False
    )
    assert (done.returncode, done.stderr) == (0, "") and "--option" in done.stdout
