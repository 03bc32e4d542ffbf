"""prepare_submit.py packs what belongs into ID.zip, and names all that is wrong in one error."""

import os
import re
import shutil
import stat
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest

import outputs
import prepare_submit
from archive import within_bounds
from conftest import ROOT
from submission import (
    FILES,
    ID,
    REQUIRED,
    SOURCES,
    add_to,
    predictions,
    put,
    put_splits,
    zip_of,
)

MODULES = (
    "prepare_submit",
    "archive",
    "outputs",
    "sources",
    "labelled",
    "config",
    "cli",
    "interrupts",
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, beside the submission's; splits that no folder has are in a third."""
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(outputs, "DATA", put_splits(tmp_path / "splits"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def folder(tmp_path, here):
    return put(tmp_path / "submission", FILES)


def problems(path, aid=ID) -> list[str]:
    """The lines of the error that `main` raises, without the headline, whose count they match."""
    with pytest.raises(AssertionError) as caught:
        prepare_submit.main(path, aid)
    headline, *lines = str(caught.value).split("\n")
    assert int(re.match(r"(\d+) problems? in ", headline)[1]) == len(lines)
    return [line.strip() for line in lines]


def packed(folder, aid=ID) -> set[str]:
    prepare_submit.main(folder, aid)
    with zipfile.ZipFile(f"{aid}.zip") as archive:
        assert all(name.startswith(f"{aid}/") for name in archive.namelist())
        return {name.removeprefix(f"{aid}/") for name in archive.namelist()}


@pytest.fixture
def script(tmp_path):
    """script(*args) runs a copy of prepare_submit.py that has its modules and data, no more."""
    put_splits(tmp_path / "tool" / "data")
    for module in MODULES:
        shutil.copy(ROOT / f"{module}.py", tmp_path / "tool")

    def call(*args, flags=()) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            *flags,
            str(tmp_path / "tool/prepare_submit.py"),
            *map(str, args),
        ]
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", timeout=60, check=False
        )

    return call


def test_complete_folder_becomes_one_compressed_zip_with_all_of_its_files(folder, here, capsys):
    assert packed(folder) == set(FILES)
    with zipfile.ZipFile(f"{ID}.zip") as archive:
        infos = archive.infolist()
        assert all(archive.read(f"{ID}/{name}").decode() == text for name, text in FILES.items())
        assert {info.compress_type for info in infos} == {zipfile.ZIP_DEFLATED}
        assert [info.filename for info in infos] == sorted(info.filename for info in infos)
        compressed = sum(info.compress_size for info in infos)
    printed = capsys.readouterr().out
    assert all(f"{ID}/{name}\n" in printed for name in FILES)
    assert f"{compressed:,}  total" in printed
    assert [path.name for path in here.iterdir()] == [f"{ID}.zip"]


@pytest.mark.parametrize("name", REQUIRED)
def test_every_required_file_must_be_there_and_not_empty(folder, here, name):
    (folder / name).write_bytes(b"")
    assert problems(folder) == [f"empty required file: {name}"]
    (folder / name).unlink()
    assert f"missing required file: {name}" in problems(folder)
    (folder / name).mkdir()
    assert f"missing required file: {name}" in problems(folder)
    assert not list(here.iterdir())


@pytest.mark.parametrize("data", ["sst", "cfimdb"])
def test_advanced_outputs_come_in_pairs(folder, data):
    dev, test = (f"{data}-{split}-advanced-output.txt" for split in ("dev", "test"))
    for present, absent in ((dev, test), (test, dev)):
        put(folder, {present: predictions(data, present.split("-")[1])})
        (line,) = problems(folder)
        assert line.startswith("half a pair") and line.endswith(f"{absent} is missing")
        (folder / present).unlink()
    put(folder, {dev: predictions(data, "dev"), test: predictions(data, "test")})
    assert packed(folder) == {*FILES, dev, test}


@pytest.mark.parametrize(
    "name",
    [
        *(".gitignore", ".git/config", ".DS_Store", "tests/.hidden/x.py", ".git"),
        *("venv/a.py", "env/a.py", "tests/env/a.py", "__pycache__/a.py", "tests/a.pyc"),
        *(".pytest_cache/v", ".ruff_cache/v", "my.egg-info/PKG-INFO", "__MACOSX/a", "a.tmp"),
        *("stories42M.pt", "a.pth", "a.bin", "a.safetensors", "tokenizer.model", "a.ckpt", "A.PT"),
        *("old.zip", "a.part", "tests/a.zip", "data/sst-train.txt", "data/a/b.csv"),
    ],
)
def test_hidden_generated_and_heavy_files_are_left_out(folder, name):
    assert packed(put(folder, {name: "x = ("})) == set(FILES)


def test_folder_with_pyvenv_cfg_is_left_out_whatever_its_name(folder):
    put(folder, {"tests/mine/pyvenv.cfg": "", "tests/mine/lib/a.py": "x = ("})
    assert packed(folder) == set(FILES)
    put(folder, {"pyvenv.cfg": "", "lib/a.py": ""})
    assert "itself a virtual environment" in problems(folder)[0]


def test_this_project_itself_is_within_the_bounds():
    files, _ = prepare_submit._travelers(ROOT)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    _, problems = within_bounds(sizes)
    assert [problem for problem in problems if ".py" in problem] == []


def test_everything_else_travels(folder):
    names = {"env.py", "venv", "notes/data/train.txt", "data/more/a.py", "binary", "model.txt"}
    assert packed(put(folder, dict.fromkeys(names, ""))) == {*FILES, *names}


@pytest.mark.parametrize("outside", [".git/data", "venv", "__pycache__/a.zip", "data", "b.tmp"])
def test_names_above_the_folder_do_not_matter(tmp_path, here, outside):
    assert packed(put(tmp_path / outside / "env", FILES)) == set(FILES)


def test_packing_the_current_folder_never_packs_the_zip_of_an_earlier_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert packed(".") == set(FILES)
    first = Path(f"{ID}.zip").read_bytes()
    assert packed(".", "other") == packed(".") == set(FILES)
    assert Path(f"{ID}.zip").read_bytes() == first


def test_same_files_give_the_same_bytes(folder, tmp_path):
    packed(folder)
    first = Path(f"{ID}.zip").read_bytes()
    copy = put(tmp_path / "copy", dict(reversed(FILES.items())))
    for path in copy.rglob("*.py"):
        os.utime(path, (1e9, 1e9))
    packed(copy)
    assert Path(f"{ID}.zip").read_bytes() == first


def test_executable_script_stays_executable(folder):
    (folder / "setup.sh").chmod(0o700)
    packed(folder)
    with zipfile.ZipFile(f"{ID}.zip") as archive:
        modes = {i.filename: oct(i.external_attr >> 16 & 0o777) for i in archive.infolist()}
    assert modes.pop(f"{ID}/setup.sh") == "0o755" and set(modes.values()) == {"0o644"}


def test_links_out_of_the_folder_are_left_out_and_named_if_required(folder, tmp_path):
    outside = put(tmp_path / "outside", {"a.txt": "a", "sub/b.py": "x = ("})
    (folder / "notes.txt").symlink_to(outside / "a.txt")
    (folder / "package").symlink_to(outside / "sub", target_is_directory=True)
    (folder / "inner").symlink_to(folder / "tests", target_is_directory=True)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "alias.md").symlink_to("README.md")
    assert packed(folder) == {*FILES, "alias.md"}
    for name, target in (("README.md", outside / "a.txt"), ("rope.py", tmp_path / "nowhere")):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
    lines = problems(folder)
    assert any(re.search("missing required file: README.md is a link out", line) for line in lines)
    assert any(re.search("missing required file: rope.py is a link out", line) for line in lines)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a pipe that has a name")
def test_pipe_is_left_out_and_not_waited_for(folder, script):
    os.mkfifo(folder / "pipe")
    assert packed(folder) == set(FILES)
    assert script(folder / "pipe", ID).returncode == 2


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such a name")
def test_file_name_that_is_not_utf8_is_a_violation(folder, here):
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("", encoding="utf-8")
    (line,) = problems(folder)
    assert line.isprintable() and line.endswith("the file name is not UTF-8")


@pytest.mark.parametrize(
    ("removed", "importer"),
    [
        *(("training.py", "run_llama.py"), ("dataset.py", "training.py")),
        *(("checkpoint.py", "llama.py"), ("cli.py", "run_llama.py")),
    ],
)
def test_modules_imported_by_the_required_ones_must_travel(folder, removed, importer):
    (folder / removed).unlink()
    module = removed.removesuffix(".py")
    assert problems(folder) == [f"{importer} imports {module}, which is not in the zip"]
    files = {name: text for name, text in FILES.items() if name != removed}
    assert problems(zip_of(files)) == [f"{importer} imports {module}, which is not in the zip"]


@pytest.mark.parametrize(
    ("source", "culprit", "module"),
    [
        ("import transformers.models", "extra.py", "transformers.models"),
        ("def f():\n    from peft import Lora", "extra.py", "peft"),
        ("from . import nowhere", "extra.py", "nowhere"),
        ("import package.gone", "extra.py", "package.gone"),
        ("import package.whole.inner", "package/__init__.py", "einops"),
        ("from package import deep", "package/deep.py", "package.sibling"),
        ("import env.tool", "extra.py", "env.tool"),
    ],
)
def test_import_from_nowhere_names_importer_and_module(folder, source, culprit, module):
    package = {
        "package/__init__.py": "import einops\n" if module == "einops" else "",
        "package/whole/inner.py": "",
        "package/deep.py": "from .sibling import x\n",
    }
    put(folder, {"extra.py": source, "env/tool.py": "", **package})
    assert problems(folder) == [f"{culprit} imports {module}, which is not in the zip"]


def test_python_that_does_not_parse_is_a_violation_and_a_warning_is_none(folder):
    put(folder, {"odd.py": "x = '\\d'\n"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed(folder)
    put(folder, {"broken.py": "def f(:\n", "tests/zero.py": "x = 1\0"})
    assert [line.split(":")[0] for line in sorted(problems(folder))] == [
        "broken.py",
        "tests/zero.py",
    ]


def test_all_violations_come_in_one_error_and_leave_the_old_zip_as_it_was(folder, here):
    put(here, {f"{ID}.zip": "old"})
    put(
        folder,
        {
            "rope.py": "",
            "sst-dev-advanced-output.txt": predictions("sst", "dev"),
            "extra.py": "import nowhere",
        },
    )
    (folder / "README.md").unlink()
    assert [re.match(r"\w+", line)[0] for line in problems(folder)] == [
        *("empty", "missing", "half", "extra")
    ]
    assert [path.name for path in here.iterdir()] == [f"{ID}.zip"]
    assert (here / f"{ID}.zip").read_text(encoding="utf-8") == "old"


def test_zip_that_was_written_wrong_never_takes_its_name(folder, here, monkeypatch):
    put(here, {f"{ID}.zip": "old"})
    write = zipfile.ZipFile.writestr
    monkeypatch.setattr(zipfile.ZipFile, "writestr", lambda z, info, text: write(z, info, b""))
    assert "empty required file: rope.py" in problems(folder)
    assert [path.name for path in here.iterdir()] == [f"{ID}.zip"]
    assert (here / f"{ID}.zip").read_text(encoding="utf-8") == "old"


def test_file_name_of_odd_characters_stays_on_one_line(folder, script, capsys, monkeypatch):
    put(folder, {"a\nb.txt": "", "c\nd.py": "x = ("})
    assert problems(folder)[0].startswith(r"'c\nd.py'")
    (folder / "c\nd.py").unlink()
    packed(folder)
    assert rf"'{ID}/a\nb.txt'" in capsys.readouterr().out
    put(folder, {"é.txt": ""})
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # as in a bare container
    assert rf"{ID}/\xe9.txt" in script(folder, ID).stdout


def test_complete_zip_made_by_hand_passes_with_what_macos_adds_mentioned(here, capsys):
    zip_of(FILES | {"tests/": "", ".DS_Store": "", "data/sst-train.txt": "", "__pycache__/a": ""})
    add_to("made.zip", f"__MACOSX/{ID}/._rope.py", "no = Python")
    add_to("made.zip", f"__MACOSX/{ID}/._a.pt")
    prepare_submit.check_file("made.zip", ID)
    assert "2 entries in __MACOSX/" in capsys.readouterr().out
    assert [path.name for path in here.iterdir()] == ["made.zip"]


@pytest.mark.parametrize("aid", ["env", "data", "a.pt", "x.zip", "A_b.c-9"])
def test_any_valid_id_can_name_the_top_folder(folder, aid):
    assert packed(folder, aid) == set(FILES)
    prepare_submit.main(zip_of(FILES, "hand.zip", f"{aid}/"), aid)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{ID}/stories42M.pt", "stories42M.pt: weights"),
        (f"{ID}/.cache/a.safetensors", ".cache/a.safetensors: weights"),
        (f"{ID}/old.zip", "old.zip: a zip"),
        (f"{ID}/.git/objects/a.zip", ".git: git data"),
        (f"{ID}/tests/venv/a.py", "tests/venv: a virtual environment"),
        (f"{ID}/mine/pyvenv.cfg", "mine: a virtual environment"),
        (f"{ID}/pyvenv.cfg", "pyvenv.cfg: a virtual environment"),
        (f"{ID}/rope.py", f"{ID}/rope.py: 2 entries"),
        ("/etc/passwd", "/etc/passwd: the name is absolute"),
        (f"{ID}/../up.txt", f"{ID}/../up.txt: the name"),
        (f"{ID}\\a.txt", f"{ID}\\a.txt: the name"),
        ("C:/a.txt", "C:/a.txt: the name"),
        ("other/a.txt", f"the top of the zip holds {ID}, other;"),
        ("loose.txt", f"the top of the zip holds {ID}, loose.txt;"),
        (f"{ID}/.github/a.py", None),
    ],
)
def test_what_may_not_be_in_a_zip_is_named(here, name, expected):
    add_to(zip_of(FILES), name)
    if expected is None:
        prepare_submit.main("made.zip", ID)
    else:
        (line,) = problems("made.zip")
        assert line.startswith(expected)


def test_virtual_environment_in_a_zip_is_one_violation(here):
    inside = {f"tests/v/lib/{i}.py": "x = (" for i in range(9)}
    zip_of(FILES | {"tests/v/pyvenv.cfg": "", "tests/v/a.bin": ""} | inside)
    assert problems("made.zip") == ["tests/v: a virtual environment must not be in the zip"]


def test_wrong_top_folder_is_the_only_violation_of_a_zip_that_is_else_complete(here):
    (line,) = problems(zip_of(FILES, top="submission/"))
    assert line.startswith("the top of the zip holds submission;") and f"{ID}/ alone" in line
    assert "the top of the zip holds nothing" in problems(zip_of({}))[0]


def test_damaged_member_is_named(here):
    data = bytearray(Path(zip_of(FILES)).read_bytes())
    data[data.index(b"the text of structure.md") + 3] ^= 1
    Path("made.zip").write_bytes(data)
    (line,) = problems("made.zip")
    assert line.startswith(f"{ID}/structure.md: corrupt") and "CRC" in line


def test_link_in_a_zip_is_no_file(here):
    info = zipfile.ZipInfo(f"{ID}/link.md")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    assert "link.md: is a symbolic link" in problems(add_to(zip_of(FILES), info))[0]


@pytest.mark.parametrize("aid", ["", ".", ".a", "a b", "a/b", "../a", "é", "a\n", "a:b"])
def test_id_of_other_characters_is_refused(folder, here, aid):
    with pytest.raises(ValueError, match="use letters, digits"):
        prepare_submit.main(folder, aid)
    assert not list(here.iterdir())


@pytest.mark.parametrize("flags", [(), ("-O",), ("-X", "dev")])
def test_script_lists_violations_on_stderr_and_exits_with_1(folder, here, script, flags):
    (folder / "README.md").unlink()
    put(folder, {"setup.sh": ""})
    for path in (folder, zip_of({name: FILES[name] for name in SOURCES})):
        done = script(path, ID, flags=flags)
        headline, *lines = done.stderr.splitlines()
        assert done.returncode == 1
        assert re.match(rf"AssertionError: {len(lines)} problems in ", headline) and len(lines) > 1
        assert "  missing required file: README.md" in lines
        assert "Traceback" not in done.stderr and not (here / f"{ID}.zip").exists()


@pytest.mark.parametrize("flags", [(), ("-O",)])
def test_script_packs_and_checks_with_exit_code_0(folder, script, flags):
    done = script(folder, ID, flags=flags)
    assert (done.returncode, done.stderr) == (0, "") and f"{ID}/rope.py" in done.stdout
    done = script(f"{ID}.zip", ID, flags=flags)
    assert (done.returncode, done.stderr) == (0, "") and "complete" in done.stdout


def test_script_says_in_one_line_what_it_cannot_work_with_and_exits_with_2(folder, here, script):
    put(here, {"text.zip": "no zip", "cut.zip": ""})
    Path("cut.zip").write_bytes(Path(zip_of(FILES)).read_bytes()[:-40])
    coded = Path(zip_of(FILES | {"é": ""})).read_bytes()
    Path("coded.zip").write_bytes(coded.replace("é".encode(), b"\xff\xff"))
    (here / "taken.zip").mkdir()
    cases = {
        (): "ID",
        (folder,): "ID",
        (folder, ID, "more"): "more",
        ("nowhere", ID): "nowhere",
        ("", ID): "''",
        ("text.zip", ID): "text.zip",
        ("cut.zip", ID): "cut.zip",
        ("coded.zip", ID): "coded.zip",
        (os.devnull, ID): os.devnull,
        (folder, "a b"): "'a b'",
        (folder, "taken"): "taken.zip",
        (folder, "a" * 300): "error: aaa",
    }
    before = sorted(here.iterdir())
    for args, named in cases.items():
        done = script(*args)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (args, done.stderr)
        assert done.stderr.startswith("prepare_submit.py: error: ") and named in done.stderr
        assert ".tmp" not in done.stderr
    assert sorted(here.iterdir()) == before


def test_script_starts_without_torch():
    code = "import sys, prepare_submit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_links_out_of_the_folder_are_not_followed_to_its_splits_either(folder, tmp_path):
    other = put(tmp_path / "other", {"sst-dev.txt": "0 ||| of nobody\n"})
    put(folder, {"data/sst-dev.txt": "0 ||| of nobody\n"})
    assert any("data/sst-dev.txt has 'of nobody'" in line for line in problems(folder))
    (folder / "data/sst-dev.txt").unlink()
    (folder / "data/sst-dev.txt").symlink_to(other / "sst-dev.txt")
    packed(folder)
    (folder / "data/sst-dev.txt").unlink()
    (folder / "data/sst-dev.txt").symlink_to("more.txt")
    put(folder, {"data/more.txt": "0 ||| of nobody\n"})
    assert any("data/sst-dev.txt has 'of nobody'" in line for line in problems(folder))


def test_a_planted_link_of_the_temporary_name_is_not_written_through(folder, here, tmp_path):
    put(tmp_path, {"outside.txt": "mine"})
    (here / f".{ID}.zip.{os.getpid()}.tmp").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(FileExistsError):
        prepare_submit.main(folder, ID)
    assert (tmp_path / "outside.txt").read_text(encoding="utf-8") == "mine"


def test_what_was_not_compared_is_said_once_by_folder_and_by_zip(folder, tmp_path, capsys):
    (tmp_path / "splits/cfimdb-test.txt").unlink()
    expected = "note: not checked: sentences, for want of data/cfimdb-test.txt\n"
    for act in (lambda: packed(folder), lambda: prepare_submit.main(f"{ID}.zip", ID)):
        act()
        assert capsys.readouterr().out.count(expected) == 1
    (folder / "rope.py").unlink()
    problems(folder)
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("sst-dev-prompting-output.txt", " \r\n", "empty required file: sst-dev-prompting"),
        ("rope.py", "\n", "empty required file: rope.py"),
        ("generated-sentence-temp-1.txt", "\t\n", "empty required file: generated"),
        ("sst-dev-advanced-output.txt", "\ufeff\n", "empty file: sst-dev-advanced-output.txt"),
        ("sst-dev-prompting-output.txt", "7 ||| a\n", "sst-dev-prompting-output.txt:1: 'a' stands"),
    ],
)
def test_contents_are_checked_in_folders_and_zips_alike(folder, as_zip, name, text, expected):
    more = {name: text}
    if "advanced" in name:
        more["sst-test-advanced-output.txt"] = predictions("sst", "test")
    (line,) = problems(zip_of(FILES | more) if as_zip else put(folder, more))
    assert line.startswith(expected)


def test_files_beyond_the_bounds_are_named_before_a_folder_is_read(folder, here):
    for name, size in (("notes.bin2", 2**33), ("long.py", 2**33), ("sst-dev-x.txt", 2**20)):
        with open(folder / name, "wb") as file:
            file.truncate(size)
    assert sorted(problems(folder)) == [
        "long.py: 8,589,934,592 bytes were not read; at most 262,144 are: "
        "leave it out or make it smaller",
        "notes.bin2: 8,589,934,592 bytes were not read; at most 67,108,864 are: "
        "leave it out or make it smaller",
    ]
    assert not list(here.iterdir())


def test_a_flood_of_violations_is_counted_and_cut(folder):
    put(folder, {"extra.py": "".join(f"import gone{i}\n" for i in range(300))})
    with pytest.raises(AssertionError, match="300 problems in ") as caught:
        prepare_submit.main(folder, ID)
    lines = str(caught.value).split("\n")
    assert len(lines) == 1 + prepare_submit.MAX_SHOWN + 1 and lines[-1] == "  ... and 100 more"
