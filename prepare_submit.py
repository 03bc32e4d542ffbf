"""Packs a submission folder into ID.zip and checks it, or checks a zip that exists.

    python prepare_submit.py DIR ID
    python prepare_submit.py FILE.zip ID

Every violation is found before any is reported, all in one AssertionError. `ID.zip` appears in the
current folder only after the finished archive has passed the check, and the same folder always
gives the same bytes.
"""

import ast
import os
import stat
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from string import ascii_letters, digits

import cli

OUTPUTS = tuple(
    f"{data}-{split}-{option}-output.txt"
    for data in ("sst", "cfimdb")
    for split in ("dev", "test")
    for option in ("prompting", "finetuning")
)
REQUIRED = (
    *("run_llama.py", "base_llama.py", "llama.py", "rope.py", "classifier.py", "config.py"),
    *("optimizer.py", "sanity_check.py", "tokenizer.py", "utils.py"),
    *("README.md", "structure.md", "sanity_check.data", "setup.sh"),
    *("generated-sentence-temp-0.txt", "generated-sentence-temp-1.txt"),
    *OUTPUTS,
)
PAIRS = tuple(
    (f"{data}-dev-advanced-output.txt", f"{data}-test-advanced-output.txt")
    for data in ("sst", "cfimdb")
)
RUNTIME_PACKAGES = frozenset({"torch", "numpy", "sentencepiece", "tqdm", "sklearn"})

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
        lines = [f"{count} in {_shown(os.fspath(place))}:", *problems]
        raise AssertionError("\n  ".join(lines))  # not `assert`, which `python -O` removes


def _shown(name: str) -> str:
    """A file name on one line, whatever characters it has."""
    return name if name.isprintable() else ascii(name)


def _pack(folder: Path, aid: str) -> None:
    if (folder / "pyvenv.cfg").exists():
        _raise_for(["pyvenv.cfg: the folder is itself a virtual environment; move that"], folder)
    files, bad_links = _travelers(folder)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    sources = {name: path.read_bytes() for name, path in files.items() if name.endswith(".py")}
    names = [f"{aid}/{name}" for name in files]
    _raise_for([*_name_problems(names), *_tree_problems(sizes, sources, bad_links)], folder)

    target = Path(f"{aid}.zip")
    temporary = Path(f".{aid}.zip.{os.getpid()}.tmp")
    try:
        _write_zip(temporary, files, aid)
        problems, listing = _inspect(temporary, aid)
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
    real_folder = folder.resolve()
    for root, subfolders, names in os.walk(folder, onerror=_raise):
        below = "".join(f"{part}/" for part in Path(root).relative_to(folder).parts)
        venvs = [below + sub for sub in subfolders if _is_file(Path(root, sub, "pyvenv.cfg"))]
        subfolders[:] = [sub for sub in subfolders if not _junk(f"{below}{sub}/", venvs)]
        for name in names:
            path = Path(root, name)
            if _junk(below + name):
                continue
            if _is_file(path) and path.resolve().is_relative_to(real_folder):
                files[below + name] = path
            elif path.is_symlink():
                bad_links.add(below + name)
    return dict(sorted(files.items())), bad_links


def _raise(error: OSError) -> None:
    raise error


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
    with zipfile.ZipFile(file, "w") as archive:
        for name, path in files.items():
            info = zipfile.ZipInfo(f"{aid}/{name}", _OLDEST_ZIP_DATE)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = 3  # Unix, on every system, for the permissions in external_attr
            mode = 0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644
            info.external_attr = (stat.S_IFREG | mode) << 16
            archive.writestr(info, path.read_bytes())


def _inspect(file: Path, aid: str) -> tuple[list[str], list[str]]:
    """What is wrong with a zip, and the lines to print about what is in it."""
    if not file.is_file():
        raise ValueError(f"{file}: not a zip file")
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(f"{file}: not a zip file that can be read ({error})") from error
    with archive:
        infos = archive.infolist()
        sources, problems = _read_members(archive)
    problems += _name_problems([info.filename for info in infos])
    names = {info.filename for info in infos if not _is_unsafe(info.filename)}
    top, top_problems = _top_folder(names, aid)
    problems += top_problems

    inside = {name.removeprefix(top): name for name in names if name.startswith(top)}
    venvs = {name.removesuffix("/pyvenv.cfg") for name in inside if name.endswith("/pyvenv.cfg")}
    junk = {name: _junk(name, venvs) for name in inside}
    for kind, culprit in sorted(filter(None, junk.values())):
        if kind in _FORBIDDEN:
            problems.append(f"{_shown(culprit)}: {kind} must not be in the zip")
    sizes = {info.filename: info.file_size for info in infos}
    travelers = {short: full for short, full in inside.items() if not junk[short]}
    problems += _tree_problems(
        {short: sizes[full] for short, full in travelers.items()},
        {short: sources[full] for short, full in travelers.items() if full in sources},
    )
    return problems, list(_listing(infos))


def _read_members(archive: zipfile.ZipFile) -> tuple[dict[str, bytes], list[str]]:
    """Every Python source in the archive; reading each member to its end checks its CRC."""
    sources, problems = {}, []
    for info in archive.infolist():
        if stat.S_ISLNK(info.external_attr >> 16):
            problems.append(f"{_shown(info.filename)}: is a symbolic link; pack the file itself")
        try:
            with archive.open(info) as member:
                if info.filename.endswith(".py"):
                    sources[info.filename] = member.read()
                while member.read(1 << 20):
                    pass
        except Exception as error:  # zipfile and each compression have errors of their own
            problems.append(f"{_shown(info.filename)}: corrupt or unreadable ({error})")
    return sources, problems


def _is_unsafe(name: str) -> bool:
    """Whether unpacking may write elsewhere than at `name` below the current folder."""
    parts = name.removesuffix("/").split("/")
    return "\\" in name or name[1:2] == ":" or any(part in ("", ".", "..") for part in parts)


def _name_problems(names: Collection[str]) -> Iterator[str]:
    for name, count in Counter(name.removesuffix("/") for name in names).items():
        if count > 1:
            yield f"{_shown(name)}: {count} entries of this name"
        if _is_unsafe(name):
            yield f"{_shown(name)}: the name is absolute or has a '..', a '.' or a backslash"
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # how Python reads such bytes
            yield f"{_shown(name)}: the file name is not UTF-8"


def _top_folder(names: Iterable[str], aid: str) -> tuple[str, list[str]]:
    """The prefix of the submission's members, and what is wrong at the top of the zip."""
    tops = sorted({name.split("/")[0] for name in names} - {_FINDER})
    if tops == [aid]:
        return f"{aid}/", []
    listed = ", ".join(map(_shown, tops)) or "nothing"
    problem = f"the top of the zip holds {listed}; it should hold the folder {aid}/ alone"
    return f"{tops[0] if len(tops) == 1 else aid}/", [problem]


def _listing(infos: Collection[zipfile.ZipInfo]) -> Iterator[str]:
    yield f"{'bytes':>13} {'compressed':>13}"
    for info in infos:
        yield f"{info.file_size:13,} {info.compress_size:13,}  {_shown(info.filename)}"
    size = sum(info.file_size for info in infos)
    compressed = sum(info.compress_size for info in infos)
    yield f"{size:13,} {compressed:13,}  total of {len(infos)} entries"
    finder = sum(info.filename.startswith(f"{_FINDER}/") for info in infos)
    if finder:
        yield f"note: {finder} entries in {_FINDER}/ are not needed"


def _tree_problems(
    sizes: Mapping[str, int], sources: Mapping[str, bytes], bad_links: Collection[str] = ()
) -> Iterator[str]:
    """What is wrong with the files that travel, named relative to the top folder."""
    for name in REQUIRED:
        if name in bad_links:
            yield f"missing required file: {name} is a link out of the folder or to nothing"
        elif name not in sizes:
            yield f"missing required file: {name}"
        elif sizes[name] == 0:
            yield f"empty required file: {name}"
    for pair in PAIRS:
        absent = [name for name in pair if name not in sizes]
        if len(absent) == 1:
            yield f"half a pair: {' and '.join(pair)} go together; {absent[0]} is missing"
    trees = {}
    for name, source in sources.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as "\d" in a plain string
                trees[name] = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            yield f"{_shown(name)}: not valid Python ({' '.join(str(error).split())})"
    yield from _import_problems(trees, sizes)


def _import_problems(trees: Mapping[str, ast.Module], names: Collection[str]) -> Iterator[str]:
    """The imports that would fail, in the root modules and in all that those import."""
    pythons = [name for name in names if name.endswith(".py")]
    queue = [name for name in trees if "/" not in name]
    for importer in queue:  # grows on the way
        for module, members in _imports(importer, trees[importer]):
            path = module.replace(".", "/")
            if any(name == f"{path}.py" or name.startswith(f"{path}/") for name in pythons):
                packages = map(str, PurePosixPath(path).parents)
                paths = [path, *packages, *(f"{path}/{member}" for member in members)]
                files = [f"{p}{ending}" for p in paths for ending in (".py", "/__init__.py")]
                queue += [file for file in files if file in trees and file not in queue]
            elif module.split(".")[0] not in RUNTIME_PACKAGES | sys.stdlib_module_names:
                yield f"{_shown(importer)} imports {module}, which is not in the zip"


def _imports(importer: str, tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """Every imported module by its name from the root, and what may be modules within it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folders = importer.split("/")[: -node.level] if node.level else []
            module = ".".join([*folders, *filter(None, [node.module])])
            members = [alias.name for alias in node.names]
            yield from [(module, members)] if module else ((name, []) for name in members)


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
