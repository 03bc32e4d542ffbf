"""Puts the files that are not in git where the scripts look for them, each one checked.

    .venv/bin/python data/fetch.py                              # download what is missing
    .venv/bin/python data/fetch.py tokenizer.model              # only this file
    .venv/bin/python data/fetch.py --assets-from ../shared      # copy instead: no network at all

manifest.json beside this file says what there is: names, addresses, checksums, licences. A file
gets its final name only after its check, and one that is already there is never overwritten. No
other script of this project uses the network.

Exit codes: 0 every file is there; 1 a file failed its check; 2 usage or input error; 3 files are
missing only because the network, or the folder, did not have them; 130 stopped by Ctrl-C.
"""

import argparse
import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn
from urllib.parse import urlsplit

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

try:
    from tqdm import tqdm
except ModuleNotFoundError:
    print("fetch.py: error: tqdm is not installed; run `bash setup.sh` first", file=sys.stderr)
    sys.exit(2)

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 30
LEAST_BYTES = 1 << 14  # in that time; a server that sends fewer is as good as silent
CHUNK_BYTES = 1 << 18
LOOPBACK_HOSTS = {"127.0.0.1", "localhost", "::1"}
NETWORK_ERRORS = (OSError, http.client.HTTPException, ValueError)  # ValueError: a mad Location
BAR = {"unit": "B", "unit_scale": True, "leave": False, "disable": None}  # None: terminals only


class WrongFileError(Exception):
    """What an address or a folder holds is not the file that the manifest describes."""


class UnavailableError(Exception):
    """No address, or not the folder, has the file; a later run may find it."""


@dataclass(frozen=True)
class Asset:
    """One file of the manifest. `sha256` and `n_bytes` are None where nobody published them."""

    name: str  # relative to the root, and also what the user calls it
    urls: tuple[str, ...]
    sha256: str | None
    n_bytes: int | None
    max_bytes: int
    source: str  # relative to the folder given as --assets-from


def load_manifest(path: Path) -> list[Asset]:
    """Every file of the manifest; a ValueError names the file and what is wrong in it."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["files"]
        assets = [_asset(entry) for entry in entries]
    except KeyError as error:
        raise ValueError(f"{path}: the key {error} is missing") from error
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f'{path}: not of the form {{"files": [{{...}}, ...]}}') from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    names = [asset.name for asset in assets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: {twice[0]} is listed twice")
    return assets


def _asset(entry: dict) -> Asset:
    name, urls, sha256, n_bytes = (entry[key] for key in ("name", "urls", "sha256", "bytes"))
    for path in (name, entry["assets"]):
        parts = PurePosixPath(path)
        is_plain = not parts.is_absolute() and ".." not in parts.parts and parts.name
        if not is_plain or not path.isprintable():  # as are a line break, a NUL, half a letter
            raise ValueError(f"{path!r} is not a plain path inside a folder")
    if not urls:
        raise ValueError(f"{name}: no address")
    for url in urls:
        if not is_allowed(url):
            raise ValueError(f"{name}: {url!r} is not an https address")
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"{name}: {sha256!r} is not a sha256 of 64 hex digits")
    max_bytes = entry["max_bytes"] if n_bytes is None else n_bytes
    if not isinstance(max_bytes, int) or max_bytes < 1:
        raise ValueError(f"{name}: {max_bytes!r} is not a number of bytes")
    return Asset(name, tuple(urls), sha256, n_bytes, max_bytes, entry["assets"])


def is_allowed(url: str) -> bool:
    """https anywhere; plain http only on this machine, where a test may serve it."""
    if not url.isascii() or not url.isprintable() or " " in url:  # urlsplit drops a line break
        return False
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018, a ValueError where it is none
    except ValueError:
        return False
    return bool(parts.hostname) and (
        parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK_HOSTS)
    )


def sha256_of(path: Path) -> str:
    """The sha256 of a file of any size, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def problem_with(path: Path, asset: Asset) -> str | None:
    """What tells the file at `path` from the published one, as "found ..., expected ..."."""
    n_bytes = path.stat().st_size
    if n_bytes == 0 or asset.n_bytes not in (None, n_bytes):
        wanted = "more" if asset.n_bytes is None else asset.n_bytes
        return f"found {n_bytes} bytes, expected {wanted}"
    if asset.sha256 is not None and (found := sha256_of(path)) != asset.sha256:
        return f"found sha256 {found}, expected {asset.sha256}"
    return None


def check_size(asset: Asset, n_bytes: int) -> None:
    """Refuses a file before it fills the disk."""
    if n_bytes > asset.max_bytes:
        raise WrongFileError(f"found {n_bytes} bytes, expected {asset.max_bytes} at most")


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        fp.close()  # else urllib reads all of what came with it, however long
        if not is_allowed(newurl):
            raise UnavailableError(f"its redirect to {newurl} is refused: not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def connect(url: str, offset: int, down: dict[str, str]) -> http.client.HTTPResponse:
    """Asks `url` for its bytes from `offset` on, or from 0 where there are none to ask for.

    `down` maps a host that could not be reached to the reason; it is asked and kept up to date,
    so that without a network the user waits for one timeout a host and not one a file.
    """
    host = urlsplit(url).netloc
    if host in down:
        raise UnavailableError(down[host])
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and offset:  # nothing after `offset`: the old part is no beginning
            return connect(url, 0, down)
        raise UnavailableError(f"HTTP {error.code}") from error
    except NETWORK_ERRORS as error:
        if isinstance(error, OSError):  # else it answers, if only with nonsense
            down[host] = _reason(error)
        raise UnavailableError(_reason(error)) from error


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)  # a URLError wraps the OSError that says what happened
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def receive(asset: Asset, url: str, part: Path, down: dict[str, str]) -> None:
    """Downloads `url` to `part`, going on behind what `part` holds where the server can.

    A connection that breaks is UnavailableError and leaves `part` for the next run.
    """
    start = part.stat().st_size if part.exists() else 0
    response = connect(url, start, down)
    span = response.headers.get("Content-Range", "")
    if response.status == 206 and not span.startswith(f"bytes {start}-"):
        response.close()
        start, response = 0, connect(url, 0, down)
        if response.status == 206:
            response.close()
            raise UnavailableError("sends a part of the file that was not asked for")
    if response.status != 206:  # the server ignores ranges: this is the whole file
        start = 0
    total = None if response.length is None else start + response.length
    bar = tqdm(total=total, initial=start, desc=asset.name, **BAR)
    with response, bar, open(part, "ab" if start else "wb") as file:
        n_bytes = mark = start
        deadline = time.monotonic() + TIMEOUT_S
        check_size(asset, total or n_bytes)
        while chunk := _read(response):
            n_bytes += len(chunk)
            check_size(asset, n_bytes)
            file.write(chunk)
            bar.update(len(chunk))
            if time.monotonic() > deadline:
                if n_bytes - mark < LEAST_BYTES:
                    raise UnavailableError(f"sent {n_bytes - mark} bytes in {TIMEOUT_S} s")
                mark, deadline = n_bytes, time.monotonic() + TIMEOUT_S
    if total is not None and n_bytes < total:
        raise UnavailableError(f"broke off after {n_bytes} of {total} bytes")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(CHUNK_BYTES)  # what has come, so that a slow server is seen as such
    except NETWORK_ERRORS as error:  # told apart here from an OSError of the disk
        raise UnavailableError(_reason(error)) from error


def settle(asset: Asset, temporary: Path, target: Path) -> None:
    """Gives a complete file its final name; a WrongFileError where it is not the published one."""
    if problem := problem_with(temporary, asset):
        raise WrongFileError(problem)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())  # else a power cut may leave the final name on half a file
    temporary.replace(target)


def download(asset: Asset, target: Path, down: dict[str, str]) -> str:
    """Tries the addresses in order: "fetched", or "failed" where all that came was wrong.

    Each address has a .part of its own, so that resuming never joins two different files.
    """
    parts = {
        url: target.with_name(f"{target.name}{f'.{i}' if i else ''}.part")
        for i, url in enumerate(asset.urls)
    }
    # A .part may be the beginning of something else: once it is removed, a second try starts over.
    tries = [(url, part) for url, part in parts.items() for _ in range(1 + part.exists())]
    any_wrong, reasons = False, {}
    for url, part in tries:
        try:
            receive(asset, url, part, down)
            settle(asset, part, target)
        except WrongFileError as error:
            part.unlink()
            complain(f"{asset.name}: {error} ({url})")
            any_wrong = True
        except UnavailableError as error:
            reasons[f"{urlsplit(url).netloc}: {error}"] = None
        else:
            for other in parts.values():
                other.unlink(missing_ok=True)
            return "fetched"
    if any_wrong:
        return "failed"
    raise UnavailableError("; ".join(reasons))


def copy(asset: Asset, folder: Path, target: Path) -> str:
    """The word "copied", or "failed" where what lies there is not the file."""
    source = folder / asset.source
    if not source.is_file():
        raise UnavailableError(f"not in {folder}")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        check_size(asset, source.stat().st_size)
        shutil.copyfile(source, temporary)
        settle(asset, temporary, target)
    except WrongFileError as error:
        complain(f"{asset.name}: {error} ({source})")
        return "failed"
    finally:
        temporary.unlink(missing_ok=True)
    return "copied"


def place(asset: Asset, root: Path, folder: Path | None, down: dict[str, str]) -> str:
    """Sees to one file and returns the word for its line: ok, differs, fetched, copied, failed."""
    target = root / asset.name
    if target.exists():
        problem = problem_with(target, asset)
        if problem is None:
            return "ok"
        complain(f"{asset.name}: {problem}; delete it to fetch it again")
        return "differs"
    target.parent.mkdir(parents=True, exist_ok=True)
    return download(asset, target, down) if folder is None else copy(asset, folder, target)


def place_all(assets: Sequence[Asset], root: Path, folder: Path | None) -> int:
    """Sees to every file, prints one line for each that was decided, returns the exit code."""
    words, missing, down = set(), {}, {}
    for asset in assets:
        try:
            word = place(asset, root, folder, down)
        except UnavailableError as error:
            missing[asset.name] = str(error)
            continue
        words.add(word)
        unproven = asset.sha256 is None and word in ("ok", "fetched", "copied")
        hint = "  (no checksum published: `python sanity_check.py` proves it)" if unproven else ""
        print(f"{word:8} {asset.name}{hint}", flush=True)
    if missing:
        complain(f"missing: {', '.join(missing)} ({'; '.join(dict.fromkeys(missing.values()))})")
        complain(
            "to get what is missing later: `.venv/bin/python data/fetch.py` with a network, "
            "or `--assets-from DIR` with a folder that has it"
        )
    if words & {"differs", "failed"}:
        return 1
    return 3 if missing else 0


def complain(message: str) -> None:
    """One line on standard error, whatever the message holds: some of it may be a server's."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    print(f"fetch.py: {line}", file=sys.stderr)


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Of two at work in one folder the second is refused: both would write the same .part files."""
    if fcntl is None:  # Windows, which lets nobody rename a file that another one has open
        yield
        return
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(f"{root}: another fetch.py is at work there; wait for it") from error
    except OSError:  # a file system that has no locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        complain(f"error: {message} (see --help)")
        self.exit(2)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _ArgumentParser(
        prog="fetch.py", description="Downloads, or copies, what is not in git, and checks it."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these files; default: all")
    parser.add_argument(
        "--assets-from", type=Path, metavar="DIR", help="copy from a folder, use no network"
    )
    parser.add_argument("--manifest", type=Path, metavar="FILE", default=HERE / "manifest.json")
    parser.add_argument(
        "--root", type=Path, metavar="DIR", default=HERE.parent, help="where the files go"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        for folder in filter(None, (args.assets_from, args.root)):
            if not folder.is_dir():
                raise ValueError(f"{folder}: no such folder")
        assets = {asset.name: asset for asset in load_manifest(args.manifest)}
        if unknown := set(args.names) - assets.keys():
            raise ValueError(f"{min(unknown)}: not in {args.manifest}; it has {', '.join(assets)}")
        chosen = [asset for asset in assets.values() if not args.names or asset.name in args.names]
        with alone(args.root):
            return place_all(chosen, args.root, args.assets_from)
    except KeyboardInterrupt:
        complain("interrupted; run it again to go on")
        return 130
    except BrokenPipeError:  # the reader of our output left: `fetch.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        complain(f"error: {where}{error.strerror or error}")
    except ValueError as error:
        complain(f"error: {error}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
