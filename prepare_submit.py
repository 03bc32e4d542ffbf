"""Packs a submission folder into ID.zip and checks it, or checks a zip that exists.

    python prepare_submit.py DIR ID
    python prepare_submit.py FILE.zip ID

Every violation is found before any is reported, all in one AssertionError. `ID.zip` appears in the
current folder only after the finished archive has passed the check, and the same folder always
gives the same bytes. What may be read of a zip is in `archive.py`, what an output file must hold in
`outputs.py`, what a source may import in `sources.py`.
"""

import os
import stat
import sys
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from string import ascii_letters, digits

import cli
from archive import (
    MAX_ENTRIES,
    MAX_NAME,
    crowd_problem,
    is_read,
    member_problems,
    opened,
    read_members,
    within_bounds,
)
from outputs import (
    GENERATED,
    OUTPUTS,
    PAIRS,
    SPLITS,
    References,
    find_references,
    is_blank,
    output_problems,
)
from sources import source_problems

REQUIRED = (
    *("run_llama.py", "base_llama.py", "llama.py", "rope.py", "classifier.py", "config.py"),
    *("optimizer.py", "sanity_check.py", "tokenizer.py", "utils.py"),
    *("README.md", "structure.md", "sanity_check.data", "setup.sh"),
    *GENERATED,
    *OUTPUTS,
)
MAX_SHOWN = 200  # violations

_VENV_NAMES = ("venv", "env", ".venv")
_WEIGHTS = (".pt", ".pth", ".bin", ".safetensors", ".model", ".ckpt")
_NEEDLESS_ENDINGS = (".pyc", ".egg-info", ".tmp", ".part")
_FINDER = "__MACOSX"  # what macOS adds to the zips that its Finder makes
_FORBIDDEN = ("git data", "a virtual environment", "weights", "a zip")  # even in a zip made by hand
_OLDEST_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def main(path: str | os.PathLike, aid: str) -> None:
    """Packs the folder `path` into `{aid}.zip` here, or checks the zip `path`.

    Raises one AssertionError that lists all violations, and ValueError or OSError for an `aid` or
    `path` that cannot be worked with. After any of them an old `{aid}.zip` is as it was.
    """
    if not aid or aid.startswith(".") or set(aid) - set(ascii_letters + digits + "-_."):
        raise ValueError(f"ID {aid!r}: use letters, digits, '-', '_' and '.', and no '.' in front")
    if not os.fspath(path) or not Path(path).exists():  # Path("") would be the current folder
        raise ValueError(f"{os.fspath(path)!r}: no such folder or zip file")
    if Path(path).is_dir():
        _pack(Path(path), aid)
    else:
        check_file(path, aid)


def check_file(file: str | os.PathLike, check_aid: str) -> None:
    """Prints what a zip holds and raises one AssertionError for all that is wrong with it."""
    problems, listing = _inspect(Path(file), check_aid)
    print(*listing, sep="\n", flush=True)
    _raise_for(problems, file)
    print(f"{file}: a complete submission of {check_aid}", flush=True)


def _raise_for(problems: Iterable[str], place: str | os.PathLike) -> None:
    problems = list(dict.fromkeys(problems))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        more = len(problems) - MAX_SHOWN
        lines = [f"{count} in {cli.shown(os.fspath(place))}:", *problems[:MAX_SHOWN]]
        lines += [f"... and {more:,} more"] if more > 0 else []
        raise AssertionError("\n  ".join(lines))  # not `assert`, which `python -O` removes


def _pack(folder: Path, aid: str) -> None:
    if (folder / "pyvenv.cfg").exists():
        _raise_for(["pyvenv.cfg: the folder is itself a virtual environment; move that"], folder)
    files, bad_links = _travelers(folder)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    readable, problems = within_bounds(sizes)
    contents = {name: files[name].read_bytes() for name in readable if is_read(name)}
    splits = {name: folder / name for name in SPLITS if _lies_in(folder / name, folder)}
    references = find_references(contents, splits)
    problems += _name_problems(files)
    problems += _tree_problems(sizes, contents, references, bad_links)
    if problems and (note := references.note()):
        print(note, flush=True)
    _raise_for(problems, folder)

    target = Path(f"{aid}.zip")
    temporary = Path(f".{aid}.zip.{os.getpid()}.tmp")
    try:
        _write_zip(temporary, files, aid)
        problems, listing = _inspect(temporary, aid, splits)
        _raise_for(problems, target)
        temporary.replace(target)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(target)  # the name that the caller knows
        raise
    finally:
        with suppress(OSError):  # renamed, or never made
            temporary.unlink()
    print(*listing, f"wrote {target}, {target.stat().st_size:,} bytes", sep="\n", flush=True)


def _travelers(folder: Path) -> tuple[dict[str, Path], set[str]]:
    """The files to pack by their names in the zip, sorted; and the links that cannot be packed.

    Only names below `folder` count: it may itself lie in a `.git` or a `data`.
    """
    files, bad_links = {}, set()
    for root, subfolders, names in os.walk(folder, onerror=_raise):
        below = "".join(f"{part}/" for part in Path(root).relative_to(folder).parts)
        venvs = [below + sub for sub in subfolders if _is_file(Path(root, sub, "pyvenv.cfg"))]
        subfolders[:] = [sub for sub in subfolders if not _junk(f"{below}{sub}/", venvs)]
        for name in names:
            path = Path(root, name)
            if _junk(below + name):
                continue
            if _lies_in(path, folder):
                files[below + name] = path
            elif path.is_symlink():
                bad_links.add(below + name)
    return dict(sorted(files.items())), bad_links


def _raise(error: OSError) -> None:
    raise error


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether it is a file, and no link leads out of the folder to it."""
    return _is_file(path) and path.resolve().is_relative_to(folder.resolve())


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a link into a folder that may not be read
        return False


def _junk(name: str, venvs: Collection[str] = ()) -> tuple[str, str] | None:
    """Why a path relative to the submission's folder stays out of the zip; None if it travels.

    The answer is a kind and the outermost path to blame (`.git` for all that is in it), for a path
    of several kinds one of `_FORBIDDEN`. A folder's path ends in "/"; `venvs` are the folders known
    to hold a pyvenv.cfg.
    """
    parts = name.split("/")
    found = []
    for depth, part in enumerate(parts, start=1):
        path = "/".join(parts[:depth])
        kind = "a virtual environment" if path in venvs else _kind(part, depth < len(parts))
        if kind:
            found.append((kind, path))
    if parts[0] == "data" and len(parts) > 1 and not name.endswith((".py", ".json", "/")):
        found.append(("a dataset", name))
    return min(found, key=lambda kind_and_path: kind_and_path[0] not in _FORBIDDEN, default=None)


def _kind(part: str, is_folder: bool) -> str | None:
    lower = part.lower()
    if part == ".git":
        return "git data"
    if part == "pyvenv.cfg" or (is_folder and part in _VENV_NAMES):
        return "a virtual environment"
    if lower.endswith(_WEIGHTS):
        return "weights"
    if lower.endswith(".zip"):
        return "a zip"
    is_needless = part in ("__pycache__", _FINDER) or lower.endswith(_NEEDLESS_ENDINGS)
    return "hidden or generated" if is_needless or part.startswith(".") else None


def _write_zip(file: Path, files: Mapping[str, Path], aid: str) -> None:
    with zipfile.ZipFile(file, "x") as archive:
        for name, path in files.items():
            info = zipfile.ZipInfo(f"{aid}/{name}", _OLDEST_ZIP_DATE)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = 3  # Unix, on every system, for the permissions in external_attr
            mode = 0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644
            info.external_attr = (stat.S_IFREG | mode) << 16
            archive.writestr(info, path.read_bytes())


def _inspect(
    file: Path, aid: str, splits: Mapping[str, Path] | None = None
) -> tuple[list[str], list[str]]:
    """What is wrong with a zip, and the lines to print about what is in it."""
    with opened(file) as archive:
        infos = archive.infolist()
        if len(infos) > MAX_ENTRIES:
            return [crowd_problem(infos)], [f"{len(infos):,} entries"]
        problems = _name_problems([info.filename for info in infos])
        by_name = {info.filename: info for info in infos if not _is_unsafe(info.filename)}
        top, top_problems = _top_folder(by_name, aid)
        problems += top_problems
        inside = {name.removeprefix(top): name for name in by_name if name.startswith(top)}
        travelers, forbidden, junk_problems = _sort_out(inside)
        problems += junk_problems

        refused, refusals = member_problems(infos)
        costs = {
            name: max(info.file_size, info.compress_size)  # either can be the larger by far
            for name, info in by_name.items()
            if name not in forbidden | refused
        }
        readable, bound_problems = within_bounds(costs, top)
        wanted = {name: by_name[full] for name, full in travelers.items() if full in readable}
        contents, read_problems = read_members(archive, wanted)
    references = find_references(contents, splits or {})
    sizes = {name: by_name[full].file_size for name, full in travelers.items()}
    problems = [*refusals, *bound_problems, *read_problems, *problems]
    problems += _tree_problems(sizes, contents, references)
    return problems, [*_listing(infos), *filter(None, [references.note()])]


def _sort_out(inside: Mapping[str, str]) -> tuple[dict[str, str], set[str], list[str]]:
    """Of the members by their name below the top folder: those that travel, the full names of
    those that must not be there, and what is wrong with these."""
    venvs = {name.removesuffix("/pyvenv.cfg") for name in inside if name.endswith("/pyvenv.cfg")}
    junk = {name: _junk(name, venvs) for name in inside}
    travelers = {name: full for name, full in inside.items() if not junk[name]}
    found = {name: why for name, why in junk.items() if why and why[0] in _FORBIDDEN}
    problems = [
        f"{cli.shown(culprit)}: {kind} must not be in the zip"
        for kind, culprit in sorted(found.values())
    ]
    return travelers, {inside[name] for name in found}, problems


def _is_unsafe(name: str) -> bool:
    """Whether unpacking may fail, or write elsewhere than at `name` below the current folder."""
    parts = name.removesuffix("/").split("/")
    is_odd = "\\" in name or name[1:2] == ":" or any(part in ("", ".", "..") for part in parts)
    return is_odd or len(name) > MAX_NAME


def _name_problems(names: Collection[str]) -> list[str]:
    problems = []
    for name, count in Counter(name.removesuffix("/") for name in names).items():
        shown = cli.shown(name)
        if count > 1:
            problems.append(f"{shown}: {count} entries of this name")
        if len(name) > MAX_NAME:
            problems.append(f"{shown}: a name of {len(name):,} characters; use {MAX_NAME} at most")
        elif _is_unsafe(name):
            problems.append(f"{shown}: the name is absolute or has a '..', a '.' or a backslash")
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # how Python reads such bytes
            problems.append(f"{shown}: the file name is not UTF-8")
    return problems


def _top_folder(names: Iterable[str], aid: str) -> tuple[str, list[str]]:
    """The prefix of the submission's members, and what is wrong at the top of the zip."""
    tops = sorted({name.split("/")[0] for name in names} - {_FINDER})
    if tops == [aid]:
        return f"{aid}/", []
    listed = ", ".join(map(cli.shown, tops[:5])) or "nothing"
    listed += f" and {len(tops) - 5:,} more" if len(tops) > 5 else ""
    problem = f"the top of the zip holds {listed}; it should hold the folder {aid}/ alone"
    return f"{tops[0] if len(tops) == 1 else aid}/", [problem]


def _listing(infos: Collection[zipfile.ZipInfo]) -> Iterator[str]:
    yield f"{'bytes':>13} {'compressed':>13}"
    for info in infos:
        yield f"{info.file_size:13,} {info.compress_size:13,}  {cli.shown(info.filename)}"
    size = sum(info.file_size for info in infos)
    compressed = sum(info.compress_size for info in infos)
    yield f"{size:13,} {compressed:13,}  total of {len(infos)} entries"
    finder = sum(info.filename.startswith(f"{_FINDER}/") for info in infos)
    if finder:
        yield f"note: {finder} entries in {_FINDER}/ are not needed"


def _tree_problems(
    sizes: Mapping[str, int],
    contents: Mapping[str, bytes],
    references: References,
    bad_links: Collection[str] = (),
) -> Iterator[str]:
    """What is wrong with the files that travel, named relative to the top folder."""
    for name in REQUIRED:
        if name in bad_links:
            yield f"missing required file: {name} is a link out of the folder or to nothing"
        elif name not in sizes:
            yield f"missing required file: {name}"
        elif sizes[name] == 0 or is_blank(contents.get(name, b"not read")):
            yield f"empty required file: {name}"
    for pair in PAIRS:
        absent = [name for name in pair if name not in sizes]
        if len(absent) == 1:
            yield f"half a pair: {' and '.join(pair)} go together; {absent[0]} is missing"
        for name in pair:
            if name in sizes and is_blank(contents.get(name, b"not read")):
                yield f"empty file: {name}"
    yield from output_problems(contents, references)
    yield from source_problems({n: c for n, c in contents.items() if n.endswith(".py")}, sizes)


def _script() -> int:
    parser = cli.ArgumentParser(description="Packs a submission folder into ID.zip, or checks one.")
    parser.add_argument("path", metavar="DIR|FILE.zip", help="what to pack, or what to check")
    parser.add_argument("id", metavar="ID", help="your Andrew ID")
    args = parser.parse_args()
    try:
        main(args.path, args.id)
    except AssertionError as error:
        print(f"AssertionError: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    cli.run(_script)
