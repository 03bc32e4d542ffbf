"""Download the files that are not in git, or copy them from a folder, and check each one.

    .venv/bin/python data/fetch.py                    # download every missing file
    .venv/bin/python data/fetch.py tokenizer.model    # download this file only
    .venv/bin/python data/fetch.py --assets-from DIR  # copy from a folder, without a network

data/manifest.json lists the files with their addresses, sizes, checksums and licenses. A new file
gets its name after it passed its check. An existing file is checked and never overwritten, nor is
a link that leads nowhere. No other script of the project uses the network.

Exit codes: 0 every file is there; 1 a file failed its check; 2 usage error or unusable disk; 3 the
network or the folder did not provide a file; 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

import argparse
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import urllib.error
import zipfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

try:
    from torch.hub import download_url_to_file
except ModuleNotFoundError:
    print("fetch.py: error: torch is not installed; run `bash setup.sh` first", file=sys.stderr)
    sys.exit(2)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TIMEOUT_S = 30  # for a connection, and between two packets
NETWORK_ERRORS = (  # any other OSError comes from the disk
    *(urllib.error.URLError, http.client.HTTPException),
    *(ConnectionError, TimeoutError, ssl.SSLError),
)


def problem_with(path: Path, file: dict) -> str | None:
    """Return "found ..., expected ..." if `path` differs from the published file."""
    if not path.exists():
        return "is a link to a file that is missing"
    n_bytes = path.stat().st_size
    if file["bytes"] not in (None, n_bytes):
        return f"found {n_bytes} bytes, expected {file['bytes']}"
    if file["sha256"] is None:  # a zip ends with its directory: a cut file has none
        is_whole = zipfile.is_zipfile(path)
        return None if is_whole else f"found {n_bytes} bytes, expected a whole PyTorch checkpoint"
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    return None if found == file["sha256"] else f"found sha256 {found}, expected {file['sha256']}"


def download(url: str, path: Path, failures: dict[str, str]) -> bool:
    """Write the content of `url` to `path`; on failure return False and add to `failures`.

    A host that did not answer is not tried again for the next file: without a network the user
    waits for one timeout, not for one per file.
    """
    host = urlsplit(url).netloc
    if host in failures:
        return False
    try:
        download_url_to_file(url, str(path), progress=sys.stderr.isatty())
        return True
    except urllib.error.HTTPError as error:
        error.close()
        failures[url] = f"{host}: HTTP {error.code}"
    except NETWORK_ERRORS as error:
        cause = getattr(error, "reason", error)  # URLError wraps the OSError with the reason
        failures[host] = f"{host}: {getattr(cause, 'strerror', None) or repr(cause)[:200]}"
    return False


def copy(source: Path, path: Path, failures: dict[str, str]) -> bool:
    """Copy `source` to `path`; if it is missing return False and add to `failures`."""
    if source.is_file():
        shutil.copyfile(source, path)
        return True
    failures["--assets-from"] = "not in the folder of --assets-from"
    return False


def fetch(file: dict, folder: Path | None, failures: dict[str, str]) -> str:
    """Place one file and return "ok", "differs", "fetched", "copied", "failed" or "missing"."""
    target, word = ROOT / file["name"], "missing"
    if target.is_symlink() or target.exists():
        problem = problem_with(target, file)
        if problem:
            complain(f"{file['name']}: {problem}; delete it to fetch it again")
        return "differs" if problem else "ok"
    target.parent.mkdir(parents=True, exist_ok=True)
    # `scratch` and its content disappear after success, an error or a signal.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        part = Path(scratch) / target.name
        sources, get = ([folder / file["assets"]], copy) if folder else (file["urls"], download)
        for source in sources:
            if not get(source, part, failures):
                continue
            problem = problem_with(part, file)
            if not problem:
                part.replace(target)
                return "copied" if folder else "fetched"
            complain(f"{file['name']}: {problem} ({source})")
            word = "failed"
    return word


def fetch_all(files: Sequence[dict], folder: Path | None) -> int:
    """Place every file, print one line per file, and return the exit code."""
    words, failures = {}, {}
    for file in files:
        word = words[file["name"]] = fetch(file, folder, failures)
        is_unproven = file["sha256"] is None and word in ("ok", "fetched", "copied")
        hint = "  (no published checksum; sanity_check.py verifies it)" if is_unproven else ""
        if word != "missing":
            print(f"{word:8} {file['name']}{hint}", flush=True)
    if missing := [name for name, word in words.items() if word == "missing"]:
        reasons = dict.fromkeys(failures.values())  # each once
        complain(
            f"missing: {', '.join(missing)} ({'; '.join(reasons)}); to get them, run "
            "`.venv/bin/python data/fetch.py` with a network, or add --assets-from DIR to copy them"
        )
    if {"differs", "failed"} & set(words.values()):
        return 1
    return 3 if missing else 0


def complain(message: str) -> None:
    print(f"fetch.py: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    files = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))["files"]
    names = [file["name"] for file in files]
    description, examples, *_ = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        prog="fetch.py",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="file to fetch (default: all)")
    parser.add_argument("--assets-from", type=Path, metavar="DIR",
        help="folder to copy the files from (default: download them)")  # fmt: skip
    args = parser.parse_args(argv)
    for name in set(args.names).difference(names):
        parser.error(f"{name} is not in the manifest, which lists {', '.join(names)}")
    if args.assets_from and not args.assets_from.is_dir():
        parser.error(f"--assets-from: {args.assets_from} is not a folder")
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        return fetch_all([f for f in files if f["name"] in (args.names or names)], args.assets_from)
    except BrokenPipeError:  # `fetch.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        complain(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        complain("interrupted; run it again to fetch the rest")
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `with` blocks clean up
    sys.exit(main())
