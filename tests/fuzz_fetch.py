"""Fuzz targets that come from elsewhere: submissions, the manifest, what a server answers."""

import contextlib
import hashlib
import io
import json
import socket
import struct
import sys
import threading
import warnings
import zipfile
from pathlib import Path
from unittest import mock

from hypothesis import strategies as st
from test_fetch import fetch

import cli
import hostile
import prepare_submit
from fuzz import Inputs
from fuzz_shared import JSON_TEXTS, JSON_VALUES, ODD_FLOATS, ODD_INTS, mutated
from test_prepare_submit import FILES

# ---------------------------------------------------------------- submissions


NAMES = [
    *("abc-1/run_llama.py", "abc-1/README.md", "abc-1/data/fetch.py", "abc-1/a.zip", "abc-1/"),
    *("../out", "/absolute", "C:/x", "abc-1/../../x", "other/x", "a\\b", "\n", "é", "abc-1/x\0.py"),
]
CONTENTS = [
    *(b"", b"import os\n", b"(" * 3000, b"x = 1" * 1000, b"\0", b"\xff", b"-" * 20_000 + b"1\n"),
    *(b"a." * 20_000 + b"b", b"import " + b"a." * 5000 + b"b\n", bytes(10**5)),
]
LARGE = bytes(300 * 2**20)  # 300 KB when deflated


@st.composite
def submissions(draw: st.DrawFn) -> Inputs:
    """A sound submission, or nothing, with strange members added, then bytes of its headers."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # of zipfile, on two members of one name
        for name, content in FILES.items() if draw(st.booleans()) else ():
            archive.writestr(f"abc-1/{name}", content, zipfile.ZIP_DEFLATED)
        for _ in range(draw(st.integers(0, 4))):
            info = zipfile.ZipInfo(draw(st.sampled_from(NAMES)))
            info.external_attr = draw(st.sampled_from([0, 0o644 << 16, 0o120777 << 16]))
            info.compress_type = draw(st.sampled_from([0, 8, 8, 12, 14]))
            archive.writestr(info, draw(st.sampled_from(CONTENTS)))
        if draw(st.integers(0, 150)) == 0:
            archive.writestr(draw(st.sampled_from(NAMES)), LARGE, zipfile.ZIP_DEFLATED)
    return {"abc-1.zip": _with_headers(draw, buffer.getvalue())}


def _with_headers(draw: st.DrawFn, whole: bytes) -> bytes:
    """The first member's sizes, flags or method as the directory and the member declare them."""
    kind = draw(st.integers(0, 5))
    if kind == 1:
        return draw(mutated(whole))
    if kind == 2:
        sizes = struct.pack("<I", draw(st.sampled_from([0, 1, 2**31, 2**32 - 2])))
        return hostile.patched_zip(whole, {22: sizes}, {24: sizes})
    if kind == 3:
        return hostile.patched_zip(whole, {6: b"\1"}, {8: b"\1"})  # encrypted
    if kind == 4:
        method = struct.pack("<H", draw(st.sampled_from([0, 8, 9, 12, 14, 93, 99])))
        return hostile.patched_zip(whole, {8: method}, {10: method})
    return whole


def act_submission() -> None:
    with mock.patch.object(sys, "argv", ["prepare_submit.py", "abc-1.zip", "abc-1"]):
        cli.run(prepare_submit._script)


# ---------------------------------------------------------------- the manifest and the server

BODY = b"the published file\n" * 50


def entry(**changed: object) -> dict:
    sound = {"name": "root.bin", "urls": ["https://127.0.0.1:9/file"], "bytes": len(BODY)}
    sound |= {"sha256": hashlib.sha256(BODY).hexdigest(), "assets": "file.bin"}
    return {**sound, **changed}


ODD_TEXTS = st.sampled_from(
    [
        *("", ".", "..", "/etc/x", "a/../b", "a\0b", "\ud800", "a\nb", "a" * 300, "folder/x", "é"),
        *("\x1b[31m", "root.bin", "https://", "http://127.0.0.1:99999/x", "http://127.0.0.1:x/"),
        *("http://[::1", "https://a\nb/", "0" * 64, "http://example.invalid/x"),
        *("file:///etc/passwd", "http://127.0.0.1\\@example.invalid/"),
    ]
)


@st.composite
def manifests(draw: st.DrawFn) -> Inputs:
    """Read with --assets-from: whatever address stands there, nothing is connected to."""
    if draw(st.integers(0, 4)) == 0:
        text = draw(
            st.sampled_from(JSON_TEXTS) | mutated(json.dumps({"files": [entry()]}).encode())
        )
        return {"manifest.json": text, "file.bin": BODY}
    entries = []
    for _ in range(draw(st.integers(0, 3))):
        listed = entry()
        for key in draw(st.lists(st.sampled_from([*listed, "max_bytes"]), max_size=2)):
            odd = ODD_TEXTS | JSON_VALUES | st.sampled_from([*ODD_INTS, *ODD_FLOATS, 10**400])
            listed[key] = draw(odd | st.lists(ODD_TEXTS, max_size=2))
        entries.append(listed)
    content = draw(st.sampled_from([BODY, BODY, b"", BODY + b"x"]))
    return {"manifest.json": json.dumps({"files": entries}).encode(), "file.bin": content}


def act_manifest() -> None:
    Path("root").mkdir()
    arguments = ["--manifest", "manifest.json", "--root", "root", "--assets-from", "."]
    sys.exit(fetch.main(arguments))


N = len(BODY)
STATUSES = [
    *(b"200 OK", b"200 OK", b"200 OK", b"206 Partial Content", b"206 x", b"302 Found", b"301 x"),
    *(b"404 x", b"416 x", b"304 x", b"204 x", b"100 Continue", b"999 x", b"abc", b"", b"401 x"),
    b"200 " + b"x" * 70_000,
]
PLACES = [
    *(b"/again", b"http://plain.invalid/x", b"http://127.0.0.1:99999/", b"", b"https://[x"),
    *(
        b"file:///etc/passwd",
        b"http://\xff/",
        b"//plain.invalid/x",
        b"http://plain.invalid/\x1b[3m",
    ),
]
HEADERS = [
    *(b"Content-Length: %d" % n for n in (0, 7, N, N + 5, 10**15, 10**30, -5)),
    *(b"Content-Range: bytes %d-%d/%d" % (n, N - 1, N) for n in (0, 7, 100)),
    *(b"Location: " + place for place in PLACES),
    *(b"Content-Length: x", b"Transfer-Encoding: chunked", b"\xff: \xff", b"nocolon"),
    *(b"Content-Range: x", b"Content-Encoding: gzip", b"X: " + b"y" * 70_000, b"X: y\r\n z"),
]
BODIES = [
    *(BODY, BODY, BODY, b"", BODY[:100], BODY[100:], BODY + b"x", b"\0" + BODY[1:]),
    *(b"%x\r\n%s\r\n0\r\n\r\n" % (N, BODY), b"ffff\r\nless", b"zz\r\n", b"-5\r\nx"),
]
SOUND = [
    hostile.http_answer(b"200 OK", [b"Content-Length: %d" % N], BODY),
    hostile.http_answer(b"206 x", [b"Content-Range: bytes 100-%d/%d" % (N - 1, N)], BODY[100:]),
    hostile.http_answer(b"302 x", [b"Location: /again"], b""),
]
ANSWERS = st.builds(
    hostile.http_answer,
    st.sampled_from(STATUSES),
    st.lists(st.sampled_from(HEADERS), max_size=3),
    st.sampled_from(BODIES),
) | st.sampled_from([*SOUND, b"", b"\0" * 100, b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200])
SERVERS = st.fixed_dictionaries(
    {
        "answer-0": ANSWERS,
        "answer-1": ANSWERS,
        "published": st.sampled_from([b"yes", b"yes", b"no"]),
        "pace": st.sampled_from([b"fast"] * 30 + [b"slow"]),
    },
    optional={"part": st.sampled_from([BODY[:100], BODY, BODY + b"x", b"other"])},
)


def act_server() -> None:
    """fetch.py against a server that gives the answers of the folder, one a connection."""
    root = Path("root")
    root.mkdir()
    if Path("part").exists():
        Path("part").rename(root / "root.bin.part")
    answers = [Path(f"answer-{i}").read_bytes() for i in (0, 1)]
    with _serving(answers, slow=Path("pace").read_bytes() == b"slow") as port:
        listed = entry(urls=[f"http://127.0.0.1:{port}/file"])
        if Path("published").read_bytes() == b"no":
            listed |= {"sha256": None, "bytes": None, "max_bytes": 10_000}
        Path("manifest.json").write_text(json.dumps({"files": [listed]}), encoding="utf-8")
        with (
            mock.patch.object(fetch, "TIMEOUT_S", 0.3),
            mock.patch.dict("os.environ", no_proxy="*"),
        ):
            code = fetch.main(["--manifest", "manifest.json", "--root", "root"])
    sys.exit(code)


@contextlib.contextmanager
def _serving(answers: list[bytes], slow: bool):
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for number in range(40):
            try:
                connection, _ = listener.accept()
            except OSError:  # closed: the case is over
                return
            answer = answers[min(number, len(answers) - 1)]
            with connection, contextlib.suppress(OSError):
                connection.settimeout(1.0)
                connection.recv(4096)
                head, end, _ = answer.partition(b"\r\n\r\n") if slow else (answer, b"", b"")
                head = len(head) + len(end)  # what comes at once
                connection.sendall(answer[:head])
                for at in range(head, len(answer)):
                    connection.sendall(answer[at : at + 1])
                    stop.wait(0.02)

    stop = threading.Event()
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        stop.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
