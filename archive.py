"""Reading a zip that someone else made in seconds and less than 1 GB, whatever it says it holds.

What is beyond the bounds is a violation that names file, value and remedy, and is not read.
"""

import io
import stat
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import cli
from outputs import MAX_TEXT, TEXTS
from sources import MAX_SOURCE, MAX_SOURCES

# This project has some 230 files and 4 MB.
MAX_DIRECTORY = 8 * 2**20  # bytes of its list of files: zipfile takes 1.5 s and 200 MB for as much
MAX_ENTRIES = 2_000
MAX_NAME = 255  # characters of a path, what Windows unpacks
MAX_MEMBER = 64 * 2**20  # bytes of a file of no other bound: a report with pictures
MAX_TOTAL = 128 * 2**20  # bytes that are unpacked to check their sums, 0.5 s

_SPECIAL = (stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK)
_ENCRYPTED = 0x1 | 0x40 | 0x2000  # by itself, strongly, with its name


class _BoundedReader(io.BufferedReader):
    """zipfile reads a zip's whole list of files at once, however long the zip says it is."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise ValueError(f"its list of files has {size:,} bytes; {MAX_DIRECTORY:,} are read")
        return super().read(size)


@contextmanager
def opened(file: Path) -> Iterator[zipfile.ZipFile]:
    """The zip, for reading; ValueError where it is none, or its list of files is too long."""
    if not file.is_file():
        raise ValueError(f"{file}: not a zip file")
    with _BoundedReader(io.FileIO(file)) as raw:
        try:
            archive = zipfile.ZipFile(raw)
        except Exception as error:  # of many kinds, where numbers in the zip are wild
            raise ValueError(f"{file}: not a zip file that can be read ({error})") from error
        with archive:
            yield archive


def crowd_problem(infos: Collection[zipfile.ZipInfo]) -> str:
    """What to say of a zip of more than MAX_ENTRIES entries: where most of them lie."""
    folders = Counter("/".join(info.filename.split("/", 2)[:2]) for info in infos)
    ((folder, count),) = folders.most_common(1)
    return (
        f"{len(infos):,} entries, {count:,} of them in {folder[:100]!r}; nothing was checked, "
        f"{MAX_ENTRIES:,} at most are: leave out environments, git data and caches"
    )


def member_problems(infos: Iterable[zipfile.ZipInfo]) -> tuple[set[str], list[str]]:
    """The members that are not opened, and why not."""
    refused, problems = set(), []
    for info in infos:
        kind = stat.S_IFMT(info.external_attr >> 16)
        reasons = {
            "is a symbolic link; pack the file itself": kind == stat.S_IFLNK,
            "is a device or pipe; leave it out": kind in _SPECIAL,
            "is encrypted; make the zip without a password": info.flag_bits & _ENCRYPTED,
            # zipfile unpacks what it reads of bzip2 and LZMA at once, which can be 1 GB from 1 MB.
            f"has compression method {info.compress_type}; make the zip with the usual, deflate": (
                info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            ),
        }
        for reason in filter(reasons.get, reasons):
            refused.add(info.filename)
            problems.append(f"{cli.shown(info.filename)}: {reason}")
    return refused, problems


def is_read(name: str) -> bool:
    """Whether what a file of this name holds is checked too."""
    return name.endswith(".py") or name in TEXTS


def within_bounds(sizes: Mapping[str, int], top: str = "") -> tuple[set[str], list[str]]:
    """The names of the files that may be read, and what is wrong with the others."""
    names, problems = set(), []
    for name, size in sizes.items():
        is_text = name.removeprefix(top) in TEXTS
        limit = MAX_TEXT if is_text else MAX_SOURCE if name.endswith(".py") else MAX_MEMBER
        if size <= limit:
            names.add(name)
        else:
            problems.append(
                f"{cli.shown(name)}: {size:,} bytes were not read; at most {limit:,} are: "
                "leave it out or make it smaller"
            )
    pythons = {name for name in names if name.endswith(".py")}
    for group, what, limit in ((pythons, ".py files", MAX_SOURCES), (names, "files", MAX_TOTAL)):
        total = sum(sizes[name] for name in group)
        if total > limit:
            names = names - group
            problems.append(
                f"{len(group):,} {what} of {total:,} bytes in all were not read; at most {limit:,} "
                "are: leave out what the submission does not need"
            )
    return names, problems


def read_members(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]
) -> tuple[dict[str, bytes], list[str]]:
    """The contents that are checked; reading each member to its end checks its CRC."""
    contents, problems = {}, []
    for name, info in members.items():
        try:
            with archive.open(info) as member:
                chunks = iter(lambda: member.read(2**20), b"")
                if is_read(name):
                    contents[name] = b"".join(chunks)
                for _ in chunks:
                    pass
        except Exception as error:  # zipfile and each compression have errors of their own
            reason = cli.shown(" ".join(str(error).split()))
            problems.append(f"{cli.shown(info.filename)}: corrupt or unreadable ({reason})")
    return contents, problems
