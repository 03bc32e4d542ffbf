"""Pack a submission folder into ID.zip, or check a zip.

    python prepare_submit.py . ID         # pack the current folder into ID.zip
    python prepare_submit.py DIR ID       # pack another folder
    python prepare_submit.py FILE.zip ID  # check a zip

This file needs Python 3.10 or newer and nothing else: copy it anywhere. With the assignment's
`data/` beside it, or in DIR, the output files are compared with the splits line by line.

All violations are listed in one AssertionError (exit code 1); a wrong ID or path is an InputError
(exit code 2). `ID.zip` appears in the current folder only after it has passed the check, and the
same folder always gives the same bytes.
"""

import argparse
import ast
import json
import os
import re
import stat
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import NoReturn

DATA = Path(__file__).resolve().parent / "data"  # splits and label mappings to compare with

GENERATED = ("generated-sentence-temp-0.txt", "generated-sentence-temp-1.txt")
DATASETS, SPLIT_NAMES = ("sst", "cfimdb"), ("dev", "test")
OUTPUTS = tuple(
    f"{data}-{split}-{option}-output.txt"
    for data in DATASETS
    for split in SPLIT_NAMES
    for option in ("prompting", "finetuning")
)
PAIRS = tuple(  # optional
    tuple(f"{data}-{split}-advanced-output.txt" for split in SPLIT_NAMES) for data in DATASETS
)
ADVANCED = (*PAIRS[0], *PAIRS[1])
SPLITS = tuple(f"data/{data}-{split}.txt" for data in DATASETS for split in SPLIT_NAMES)
MAPPINGS = {f"data/{data}-label-mapping.json": data for data in DATASETS}
REQUIRED = (
    *("run_llama.py", "base_llama.py", "llama.py", "rope.py", "classifier.py", "config.py"),
    *("optimizer.py", "sanity_check.py", "tokenizer.py", "utils.py"),
    *("README.md", "structure.md", "sanity_check.data", "setup.sh"),
    *GENERATED,
    *OUTPUTS,
)
# What setup.sh installs, the assignment's own or ours, by the names that `import` uses.
INSTALLED = (
    *("torch", "torchvision", "torchaudio", "numpy", "scipy", "sklearn", "sentencepiece", "tqdm"),
    *("tokenizers", "requests", "filelock", "importlib_metadata"),
)

MAX_ENTRIES = 2_000  # files of a submission; this project has about 60
MAX_BYTES = 128 * 2**20  # of all files of a submission, unpacked
WEIGHTS = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")
# Endings of files at the top of a folder that stay out, unless they are required.
LEFT_OUT = (*WEIGHTS, ".zip", ".md", ".pyc", ".tmp", ".jsonl", ".html", "-output.txt")
FINDER = "__MACOSX/"  # what macOS adds to the zips that its Finder makes
SEPARATOR = " ||| "
OLDEST_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


class InputError(ValueError):
    """An ID, a path or a file that the caller can fix: one line and exit code 2."""


class ContentError(Exception):
    """What is wrong in one file, with the file's name and the line."""


def main(path: str | os.PathLike, aid: str) -> None:
    """Pack the folder `path` into `{aid}.zip`, or check the zip `path`.

    Raises one AssertionError that lists all violations, and InputError for a wrong `aid` or `path`.
    An old `{aid}.zip` survives both.
    """
    aid = aid.strip()
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", aid):
        raise InputError(f"ID {aid!r}: use letters, digits, '-', '_' and '.', and no '.' in front")
    if not os.fspath(path) or not Path(path).exists():
        raise InputError(f"{os.fspath(path)!r}: no such folder or zip file")
    if Path(path).is_dir():
        pack(Path(path), aid)
    else:
        check_file(path, aid)


def check_file(file: str | os.PathLike, check_aid: str) -> None:
    """Print what a zip holds, and raise one AssertionError that lists all violations."""
    raise_for(inspect(Path(file), check_aid, [DATA]), file)
    print(f"{file}: a complete submission of {check_aid}", flush=True)


def pack(folder: Path, aid: str) -> None:
    """Write the submission in `folder` to `{aid}.zip`, if it passes the check."""
    names, left_out = travelers(folder)
    raise_for(too_large({name: (folder / name).stat().st_size for name in names}), folder)
    target, temporary = Path(f"{aid}.zip"), Path(f".{aid}.zip.{os.getpid()}.tmp")
    try:
        try:
            write_zip(temporary, folder, names, aid)
        except OSError as error:
            error.filename = error.filename or str(target)  # a full disk names no file
            raise
        problems = inspect(temporary, aid, [folder / "data", DATA])
        print(f"left out: {', '.join(left_out) or 'nothing'}", flush=True)
        raise_for(problems, folder)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {target}, {target.stat().st_size:,} bytes", flush=True)


def raise_for(problems: Iterable[str], place: str | os.PathLike) -> None:
    problems = list(dict.fromkeys(problems))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        headline = f"{count} in {shown(os.fspath(place))}:"
        raise AssertionError("\n  ".join([headline, *problems]))  # `python -O` removes `assert`


def shown(text: str) -> str:
    """Return a name fit for one line of a terminal."""
    return text if text.isprintable() else ascii(text)


# --- packing: which files travel ---


def travelers(folder: Path) -> tuple[list[str], list[str]]:
    """Return the files to pack, and the top-level names that stay out.

    Files at the top travel, a report in PDF too, but no weights, no leftovers and no Markdown that
    is not required; so does everything that the Python files at the top import, and `advanced/`
    beside an advanced output. JSON files travel with the modules of their folder, and
    `data/fetch.py` with what `setup.sh` needs.
    """
    names = set(files_below(folder))
    kept = {name for name in names if "/" not in name and not name.lower().endswith(LEFT_OUT)}
    kept |= names & {*REQUIRED, *ADVANCED}
    sources = {name: (folder / name).read_bytes() for name in names if name.endswith(".py")}
    roots = [name for name in sources if name in kept or name == "data/fetch.py"]
    if kept.intersection(ADVANCED):
        roots += [name for name in sources if name.startswith("advanced/")]
    modules, _ = follow_imports(roots, sources)
    folders = {"data", *(name.rpartition("/")[0] for name in modules)} - {""}
    kept |= {n for n in names if n.endswith(".json") and n.rpartition("/")[0] in folders}
    kept |= modules
    tops = {name.split("/")[0] for name in names} - {name.split("/")[0] for name in kept}
    left_out = sorted(shown(f"{top}/" if (folder / top).is_dir() else top) for top in tops)
    return sorted(kept), left_out


def files_below(folder: Path) -> Iterator[str]:
    """Yield the files by their paths below `folder`, except hidden files and environments."""
    for root, subfolders, files in os.walk(folder):
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith((".", "__pycache__"))
            and not Path(root, name, "pyvenv.cfg").exists()
        ]
        for name in files:
            path = Path(root, name)
            if not name.startswith(".") and name.isprintable() and path.is_file():
                yield path.relative_to(folder).as_posix()


def write_zip(file: Path, folder: Path, names: Iterable[str], aid: str) -> None:
    with zipfile.ZipFile(file, "x") as archive:
        for name in names:
            path = folder / name
            info = zipfile.ZipInfo(f"{aid}/{name}", OLDEST_ZIP_DATE)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = 3  # Unix on every system, for the permissions in external_attr
            mode = 0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644
            info.external_attr = (stat.S_IFREG | mode) << 16
            archive.writestr(info, path.read_bytes())


# --- reading a zip ---


def inspect(file: Path, aid: str, data_folders: Iterable[Path]) -> list[str]:
    """Print what a zip holds and return what is wrong with it."""
    with open_zip(file) as archive:
        infos = [info for info in archive.infolist() if not info.filename.startswith(FINDER)]
        for info in infos[:MAX_ENTRIES]:
            print(f"{info.file_size:12,} {shown(info.filename)}")
        top, problems = top_folder(infos, aid)
        problems += entry_problems(infos)
        members = {
            info.filename.removeprefix(top): info
            for info in infos
            if info.filename.startswith(top) and not info.is_dir()
        }
        forbidden = {name for name in members if must_not_travel(name)}
        problems += [
            f"{shown(name)}: leave weights, zips, git data and virtual environments out of the zip"
            for name in sorted(forbidden)
        ]
        members = {name: info for name, info in members.items() if name not in forbidden}
        beyond = too_large({name: info.file_size for name, info in members.items()})
        if beyond:
            return problems + beyond + missing_problems(members, {})
        contents, unreadable = read_members(archive, members)
    problems += unreadable + missing_problems(members, contents)
    sources = {name: content for name, content in contents.items() if name.endswith(".py")}
    problems += follow_imports([name for name in REQUIRED if name in sources], sources)[1]
    return problems + output_problems(contents, data_folders)


def open_zip(file: Path) -> zipfile.ZipFile:
    if not file.is_file():
        raise InputError(f"{file}: not a zip file")
    try:
        return zipfile.ZipFile(file)
    except Exception as error:  # zipfile has many for a damaged list of files
        raise InputError(f"{file}: not a zip file that can be read ({error})") from error


def top_folder(infos: Iterable[zipfile.ZipInfo], aid: str) -> tuple[str, list[str]]:
    """Return the prefix of the submission's files, and what is wrong at the top of the zip."""
    tops = sorted({info.filename.split("/")[0] for info in infos})
    if tops == [aid]:
        return f"{aid}/", []
    listed = ", ".join(map(shown, tops[:5])) + (", ..." if len(tops) > 5 else "")
    problem = f"the top of the zip holds {listed or 'nothing'}; pack one folder, {aid}/"
    return f"{tops[0] if len(tops) == 1 else aid}/", [problem]


def entry_problems(infos: Collection[zipfile.ZipInfo]) -> list[str]:
    """Return the entries that may not be unpacked: links, names that lead elsewhere, duplicates."""
    problems = []
    for info in infos:
        name, kind = info.filename, stat.S_IFMT(info.external_attr >> 16)
        parts = name.removesuffix("/").split("/")
        if "\\" in name or name[1:2] == ":" or any(part in ("", ".", "..") for part in parts):
            problems.append(f"{shown(name)}: the name is absolute or has '..', '.' or a backslash")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            problems.append(f"{shown(name)}: is a link or a device; pack the file itself")
    counts = Counter(info.filename.removesuffix("/") for info in infos)
    return problems + [
        f"{shown(name)}: {count} entries of this name; keep one"
        for name, count in counts.items()
        if count > 1
    ]


def must_not_travel(name: str) -> bool:
    is_heavy = name.lower().endswith((*WEIGHTS, ".zip"))
    return is_heavy or not {".git", "pyvenv.cfg"}.isdisjoint(name.split("/"))


def too_large(sizes: dict[str, int]) -> list[str]:
    """Return the violation of the one bound on what is read, if there is one."""
    total = sum(sizes.values())
    if len(sizes) <= MAX_ENTRIES and total <= MAX_BYTES:
        return []
    largest = max(sizes, key=sizes.__getitem__)
    return [
        f"{len(sizes):,} files of {total:,} bytes were not read; at most {MAX_ENTRIES:,} files of "
        f"{MAX_BYTES:,} bytes are: leave out what the submission does not need (the largest is "
        f"{shown(largest)} with {sizes[largest]:,} bytes)"
    ]


def read_members(
    archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]
) -> tuple[dict[str, bytes], list[str]]:
    """Return the contents of all members, which zipfile compares with their checksums."""
    contents, problems = {}, []
    for name, info in members.items():
        try:
            with archive.open(info) as member:
                contents[name] = member.read(info.file_size + 1)  # to the end: checks the CRC
        except Exception as error:  # zipfile and zlib have many: checksum, encryption, method
            problems.append(f"{shown(name)}: cannot be read ({shown(str(error))}); zip it again")
    return contents, problems


def missing_problems(names: Collection[str], contents: dict[str, bytes]) -> list[str]:
    """Return the required files that are missing or empty, and the halves of pairs."""
    problems = [f"missing required file: {name}" for name in REQUIRED if name not in names]
    for pair in PAIRS:
        absent = [name for name in pair if name not in names]
        if len(absent) == 1:
            problems.append(f"half a pair: {' and '.join(pair)}; {absent[0]} is missing")
    for name in (*REQUIRED, *ADVANCED):
        if name in contents and is_blank(contents[name]):
            problems.append(f"empty file: {name}")
    return problems


def is_blank(content: bytes) -> bool:
    return not content.decode("utf-8-sig", "replace").strip()


# --- imports ---


def follow_imports(roots: list[str], sources: dict[str, bytes]) -> tuple[set[str], list[str]]:
    """Return the files that `roots` import, roots included, and what cannot be imported.

    The files of the packages that an import passes through (`__init__.py`) are among them.
    """
    queue, problems = list(roots), []
    for importer in queue:  # grows on the way
        try:
            tree = parse_python(importer, sources[importer])
        except ContentError as error:
            problems.append(str(error))
            continue
        for line, module, members in imports(importer, tree):
            path = module.replace(".", "/")
            paths = [path, *map(str, PurePosixPath(path).parents)]
            paths += [f"{path}/{member}" for member in members]
            files = [f"{p}{end}" for p in paths for end in (".py", "/__init__.py")]
            queue += [file for file in files if file in sources and file not in queue]
            problems += [
                f"{shown(importer)}:{line}: imports {shown(absent)}, which is neither in the "
                "submission nor installed by setup.sh; add the module or remove the import"
                for absent in absent_modules(module, members, sources)
            ]
    return set(queue), problems


def absent_modules(module: str, members: list[str], sources: dict[str, bytes]) -> list[str]:
    """Return which modules `from module import members` does not find."""
    path = module.replace(".", "/")
    if f"{path}.py" in sources:
        return []
    if not any(name.startswith(f"{path}/") for name in sources):
        known = {*INSTALLED, *sys.stdlib_module_names}
        return [] if module.split(".")[0] in known else [module]
    # A package: what its __init__.py does not mention must be a module in it.
    text = sources.get(f"{path}/__init__.py", b"").decode("utf-8", "replace")
    modules = [f"{module}.{member}" for member in members if member != "*" and member not in text]
    return [absent for name in modules for absent in absent_modules(name, [], sources)]


def parse_python(name: str, source: bytes) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as "\d" in a plain string
            return ast.parse(source)
    except SyntaxError as error:
        problem = f"{shown(name)}:{error.lineno or 1}: not Python ({error.msg})"
    except (ValueError, RecursionError, MemoryError) as error:
        problem = f"{shown(name)}: not Python ({str(error) or 'nested too deeply'})"
    raise ContentError(problem)


def imports(importer: str, tree: ast.Module) -> Iterator[tuple[int, str, list[str]]]:
    """Yield the line, the module (named from the top folder) and the imported names of each
    import statement, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = importer.split("/")[: -node.level] if node.level else []
            module = ".".join([*package, *filter(None, [node.module])])
            members = [alias.name for alias in node.names]
            if module:
                yield node.lineno, module, members
            else:  # from . import a, at the top
                yield from ((node.lineno, member, []) for member in members)


# --- output files ---


def output_problems(contents: dict[str, bytes], data_folders: Collection[Path]) -> list[str]:
    """Return at most one violation of each output file that is not blank."""
    splits, n_labels, problems = references(contents, data_folders)
    for name in (*GENERATED, *OUTPUTS, *ADVANCED):
        if name not in contents or is_blank(contents[name]):
            continue
        try:
            if name in GENERATED:
                decode(name, contents[name])
            else:
                check_output(name, contents[name], splits, n_labels)
        except ContentError as error:
            problems.append(f"{error}; write the file again")
    absent = [name for name in SPLITS if name not in splits]
    if absent:
        print(f"note: sentences were not compared with {', '.join(absent)}, which are not here")
    return problems


def references(
    contents: dict[str, bytes], data_folders: Collection[Path]
) -> tuple[dict[str, list[str]], dict[str, int], list[str]]:
    """Return the sentences by split, the number of labels by data set, and what is wrong there.

    They are read from the first of `data_folders` that has the file, or else from the submission.
    """
    splits, n_labels, problems = {}, {}, []
    for name in (*SPLITS, *MAPPINGS):
        paths = [folder / Path(name).name for folder in data_folders]
        content = next((p.read_bytes() for p in paths if p.is_file()), contents.get(name))
        try:
            if content is not None and name in MAPPINGS:
                n_labels[MAPPINGS[name]] = count_labels(name, content)
            elif content is not None:
                splits[name] = [sentence for _, _, sentence in parse_rows(name, content)]
        except ContentError as error:
            problems.append(str(error))
    return splits, n_labels, problems


def count_labels(name: str, content: bytes) -> int:
    try:
        names = json.loads(decode(name, content))
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or len(names) < 2:
        raise ContentError(f'{name}: is not a JSON list of label names such as ["bad", "good"]')
    return len(names)


def check_output(
    name: str, content: bytes, splits: dict[str, list[str]], n_labels: dict[str, int]
) -> None:
    """Compare a file with its split, line by line, and its labels with the label mapping."""
    data, split, option, _ = name.split("-")
    own = f"data/{data}-{split}.txt"
    rows = parse_rows(name, content)
    for number, label, _ in rows:
        if label < 0 or label >= n_labels.get(data, label + 1):
            known = f"0 to {n_labels[data] - 1}" if data in n_labels else "0, 1, 2, ..."
            raise ContentError(f"{name}:{number}: label {label} does not exist; labels are {known}")
    if own not in splits:
        return
    numbers, expected = [number for number, _, _ in rows], splits[own]
    sentences = [sentence for _, _, sentence in rows]
    if option != "finetuning":
        sentences = without_question(sentences, expected[0])
    for number, ours, theirs in zip_longest(numbers, sentences, expected):
        if ours != theirs:
            raise ContentError(
                f"{name}:{number or 'end'}: {excerpt(ours, theirs)} found, {own} has "
                f"{excerpt(theirs, ours)} ({len(rows):,} sentences, {own} has {len(expected):,})"
            )


def parse_rows(name: str, content: bytes) -> list[tuple[int, int, str]]:
    """Return the number, the label and the sentence of each line `label ||| sentence`."""
    lines = decode(name, content).rstrip("\n").split("\n")
    # A prompt may have its question on a line of its own: sentence, blank line, question.
    has_questions = not any(map(str.strip, lines[1::3])) and len(set(lines[2::3])) == 1
    rows = []
    for number in range(1, len(lines) + 1, 3 if has_questions else 1):
        line = lines[number - 1]
        label, separator, sentence = line.partition(SEPARATOR)
        if not separator:
            raise ContentError(f"{name}:{number}: {line[:40]!r} is not 'label{SEPARATOR}sentence'")
        if not re.fullmatch("-?[0-9]{1,9}", label.strip()):
            raise ContentError(f"{name}:{number}: label {label[:40]!r} is not an integer")
        rows.append((number, int(label), sentence.strip()))
    return rows


def without_question(sentences: list[str], expected: str) -> list[str]:
    """Remove the question that the assignment's own script leaves behind each prompted sentence.

    `expected` is the first sentence of the split, which tells where the question begins.
    """
    question = sentences[0].removeprefix(expected)
    is_asked = question.startswith(" ") and question != sentences[0]
    if not is_asked or not all(sentence.endswith(question) for sentence in sentences):
        return sentences
    return [sentence.removesuffix(question) for sentence in sentences]


def decode(name: str, content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise ContentError(f"{name}:{number}: byte 0x{byte:02x} is not UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def excerpt(text: str | None, other: str | None) -> str:
    """Return the text, quoted, around the first character in which it differs from the other."""
    if text is None:
        return "nothing"
    pairs = enumerate(zip_longest(text, other or ""))
    start = max(0, next((i for i, (a, b) in pairs if a != b), 0) - 15)
    end = "..." if len(text) > start + 40 else ""
    return repr(("..." if start else "") + text[start : start + 40] + end)


# --- the command ---


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


def script() -> int:
    description, examples, *_ = __doc__.split("\n\n")
    parser = ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="DIR|FILE.zip", help="folder to pack, or zip to check")
    parser.add_argument("id", metavar="ID", help="your Andrew ID, which names the zip's top folder")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name that the terminal cannot show
    try:
        main(args.path, args.id)
        sys.stdout.flush()
    except BrokenPipeError:  # `prepare_submit.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except AssertionError as error:
        print(f"AssertionError: {error}", file=sys.stderr)
        return 1
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise
        parser.error(" ".join(str(error).split()))
    return 0


if __name__ == "__main__":
    sys.exit(script())
