"""data/fetch.py against a small server on this machine: nothing here leaves it."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from conftest import ROOT, SHARED
from helpers import finish, start, wait_for

BODY = bytes(range(256)) * 4096  # 1 MiB: several chunks
SHA256 = hashlib.sha256(BODY).hexdigest()
with io.BytesIO() as buffer:
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", BODY)
    CHECKPOINT = buffer.getvalue()  # a zip, as torch.save writes it

SERVED = {
    "right": BODY,
    "altered": b"\1" + BODY[1:],
    "short": BODY[:-1],
    "checkpoint": CHECKPOINT,
    "cut": CHECKPOINT[:-1],
}


class Handler(BaseHTTPRequestHandler):
    """Each address is a habit of a server: a content of SERVED, or a fault."""

    timeout = 60  # else the default that fetch.py sets for this process would apply here too

    def do_GET(self):
        self.server.requests.append(self.path)
        habit = self.path.strip("/")
        with contextlib.suppress(ConnectionError):  # the client may hang up
            if habit in SERVED:
                self.answer(200, SERVED[habit])
            elif habit == "gone":
                self.answer(404, b"no such file")
            elif habit == "moved":
                self.answer(302, b"", Location="/right")
            elif habit == "nonsense":
                self.wfile.write(b"\x1b[31mnonsense\r\n\r\n")
            else:
                self.answer(200, BODY[:500_000], n_promised=len(BODY))
                if habit == "stalls":
                    self.rfile.read(1)  # until the client hangs up

    def answer(self, code, body, n_promised=None, **headers):
        self.send_response(code)
        self.send_header("Content-Length", str(n_promised or len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def running_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server(running_server, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    running_server.requests = []
    running_server.url = f"http://127.0.0.1:{running_server.server_port}/"
    return running_server


@pytest.fixture
def closed_url(server):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # bound, so that nobody else gets it, but not listening
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/file"


@pytest.fixture
def root(tmp_path):
    """A project that holds data/fetch.py alone."""
    (tmp_path / "project/data").mkdir(parents=True)
    shutil.copyfile(ROOT / "data/fetch.py", tmp_path / "project/data/fetch.py")
    yield tmp_path / "project"
    socket.setdefaulttimeout(None)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "assets/models").mkdir(parents=True)
    (tmp_path / "assets/models/file.bin").write_bytes(BODY)
    return tmp_path / "assets"


def entry(*urls, name="new/file.bin", **changes):
    plain = {"name": name, "urls": urls, "sha256": SHA256, "bytes": len(BODY)}
    return {**plain, "assets": "models/file.bin", **changes}


UNPUBLISHED = {"sha256": None, "bytes": None}


def run(root, *entries, options=(), timeout_s=30):
    """Return the exit code of fetch.py with a manifest of these entries."""
    manifest = json.dumps({"files": entries})
    (root / "data/manifest.json").write_text(manifest, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("fetch", root / "data/fetch.py")
    fetch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fetch)
    fetch.TIMEOUT_S = timeout_s
    try:
        return fetch.main(list(map(str, options)))
    except SystemExit as stop:  # argparse
        return stop.code


def new_files(root):
    """Everything that fetch.py made, hidden folders included."""
    made = [path for path in root.rglob("*") if path not in (root / "data", root / "new")]
    return sorted(str(path.relative_to(root)) for path in made if path.parent != root / "data")


@pytest.fixture(autouse=True)
def no_bytecode(monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


@pytest.mark.parametrize("habit", ["right", "moved"])
def test_a_missing_file_is_downloaded_once_and_leaves_nothing_else(habit, server, root, capfd):
    assert run(root, entry(server.url + habit)) == 0
    assert (root / "new/file.bin").read_bytes() == BODY
    assert new_files(root) == ["new/file.bin"]
    assert capfd.readouterr() == ("fetched  new/file.bin\n", "")  # no bar without a terminal
    server.requests.clear()
    assert run(root, entry(server.url + habit)) == 0
    assert server.requests == []
    assert capfd.readouterr() == ("ok       new/file.bin\n", "")


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: path.touch(), f"found 0 bytes, expected {len(BODY)}"),
        (lambda path: path.write_bytes(SERVED["altered"]), f"found sha256 .*, expected {SHA256}"),
        (lambda path: path.symlink_to("absent"), "is a link to a file that is missing"),
    ],
)
def test_a_file_that_differs_is_reported_and_kept(make, problem, server, folder, root, capsys):
    path = root / "new/file.bin"
    path.parent.mkdir()
    make(path)
    before = path.lstat()
    for options in ([], ["--assets-from", folder]):
        assert run(root, entry(server.url + "right"), options=options) == 1
        out, err = capsys.readouterr()
        assert out == "differs  new/file.bin\n"
        assert re.search(f"new/file.bin: {problem}; delete it to fetch it again\n$", err)
    assert (path.lstat().st_ino, path.lstat().st_mtime) == (before.st_ino, before.st_mtime)
    assert (new_files(root), server.requests) == (["new/file.bin"], [])


@pytest.mark.parametrize(
    ("habit", "changes", "found"),
    [
        ("altered", {}, f"found sha256 [0-9a-f]{{64}}, expected {SHA256}"),
        ("short", {}, f"found {len(BODY) - 1} bytes, expected {len(BODY)}"),
        ("right", UNPUBLISHED, f"found {len(BODY)} bytes, expected a whole PyTorch checkpoint"),
        ("cut", UNPUBLISHED, ".*, expected a whole PyTorch checkpoint"),
    ],
)
def test_a_wrong_file_is_reported_and_removed(habit, changes, found, server, root, capsys):
    assert run(root, entry(server.url + habit, **changes)) == 1
    assert new_files(root) == []
    out, err = capsys.readouterr()
    assert out == "failed   new/file.bin\n"
    assert re.fullmatch(f"fetch.py: new/file.bin: {found} \\({server.url}{habit}\\)\n", err)


def test_without_a_published_checksum_any_whole_checkpoint_is_accepted(server, root, capsys):
    for word in ("fetched", "ok"):
        assert run(root, entry(server.url + "checkpoint", **UNPUBLISHED)) == 0
        out = capsys.readouterr().out
        assert out.startswith(word) and "sanity_check.py verifies it" in out


@pytest.mark.parametrize("habit", ["altered", "gone", "breaks-off", "stalls", "nonsense"])
def test_the_next_address_is_tried_after_one_that_fails(habit, server, root):
    other_host = server.url.replace("127.0.0.1", "localhost")
    timeout_s = 1 if habit == "stalls" else 30
    assert run(root, entry(other_host + habit, server.url + "right"), timeout_s=timeout_s) == 0
    assert server.requests == ["/" + habit, "/right"]
    assert (root / "new/file.bin").read_bytes() == BODY
    assert new_files(root) == ["new/file.bin"]


@pytest.mark.parametrize(
    ("habit", "reason"),
    [("gone", "HTTP 404"), ("stalls", "timed out"), ("nonsense", r"\\x1b\[31mnonsense")],
)
def test_a_file_that_no_address_provides_is_missing(habit, reason, server, root, capsys):
    assert run(root, entry(server.url + habit), timeout_s=1 if habit == "stalls" else 30) == 3
    assert new_files(root) == []
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(f"fetch.py: missing: new/file.bin .*{reason}.*--assets-from", err)
    assert err.rstrip("\n").isprintable()  # one line, and a server cannot steer the terminal


def test_a_host_that_is_down_is_tried_once_and_the_rest_is_fetched(
    closed_url, server, root, monkeypatch, capsys
):
    ports, connect = [], socket.create_connection

    def record(address, *args, **kwargs):
        ports.append(address[1])
        return connect(address, *args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", record)
    down = [entry(closed_url, name=name) for name in ("a", "b", "c")]
    assert run(root, *down, entry(server.url + "right", name="d")) == 3
    assert len(ports) == 2
    assert new_files(root) == ["d"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fetch.py: missing: a, b, c (127.0.0.1:")
    assert line.count("refused") == 1 and "data/fetch.py" in line
    assert run(root, *down, entry(server.url + "altered", name="e")) == 1  # a wrong file outranks


def test_names_choose_the_files(server, root, capsys):
    entries = [entry(server.url + "right", name=name) for name in ("a", "b", "c")]
    assert run(root, *entries, options=["c", "a"]) == 0
    assert new_files(root) == ["a", "c"]
    assert run(root, *entries, options=["d"]) == 2
    assert "error: d is not in the manifest" in capsys.readouterr().err


def test_from_a_folder_files_are_copied_without_the_network(folder, server, root, capsys):
    (folder / "models/file.bin").chmod(0o444)
    (folder / "models/wrong.bin").write_bytes(BODY[1:])
    options = ["--assets-from", folder]
    absent = entry(server.url + "right", name="b", assets="models/absent.bin")
    assert run(root, entry(server.url + "right"), absent, options=options) == 3
    assert (root / "new/file.bin").read_bytes() == BODY
    assert (root / "new/file.bin").stat().st_mode & 0o200  # the copy is the user's own
    out, err = capsys.readouterr()
    assert out == "copied   new/file.bin\n"
    assert err.startswith("fetch.py: missing: b (not in the folder") and err.count("\n") == 1
    wrong = entry(server.url + "right", name="w", assets="models/wrong.bin")
    assert run(root, wrong, options=options) == 1
    assert (new_files(root), server.requests) == (["new/file.bin"], [])


def test_a_folder_that_is_missing_is_a_usage_error(root, capsys):
    assert run(root, entry(), options=["--assets-from", "absent"]) == 2
    assert "--assets-from: absent is not a folder" in capsys.readouterr().err


def test_an_error_of_the_disk_is_one_line(server, root, capsys):
    (root / "new").write_text("a file where a folder is needed", encoding="utf-8")
    assert run(root, entry(server.url + "right")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(root / "new") in line


def test_a_reader_that_stops_early_is_no_error_of_a_file(server, root):
    manifest = json.dumps({"files": [entry(server.url + "right")]})
    (root / "data/manifest.json").write_text(manifest, encoding="utf-8")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "data/fetch.py"]
    done = subprocess.run(command, cwd=root, stdout=writer, stderr=-1, encoding="utf-8")
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_transfer_leaves_nothing(number, code, server, root):
    manifest = json.dumps({"files": [entry(server.url + "stalls")]})
    (root / "data/manifest.json").write_text(manifest, encoding="utf-8")
    process = start([sys.executable, "data/fetch.py"], root)
    wait_for(lambda: list(root.glob("new/.fetch-*/*")), process)
    process.send_signal(number)
    ended, _, err = finish(process)
    assert (ended, err.count("\n")) == (code, number == signal.SIGINT), err
    assert new_files(root) == []


def test_without_torch_it_says_what_to_run_first(root):
    command = [sys.executable, "-S", "data/fetch.py"]  # -S: without installed packages
    code, _, err = finish(start(command, root))
    assert code == 2
    assert re.fullmatch("fetch.py: error: torch .* run `bash setup.sh` first\n", err)


COMMITTED = json.loads((ROOT / "data/manifest.json").read_text(encoding="utf-8"))["files"]


def test_the_manifest_lists_what_the_scripts_need():
    splits = [f"data/{c}-{s}.txt" for c in ("sst", "cfimdb") for s in ("train", "dev", "test")]
    files = ("stories260K.pt", "stories260K.bin", "tok512.model")
    small = [f"models/stories260K/{name}" for name in files]
    names = [*splits, "tokenizer.model", "sanity_check.data", *small, "stories42M.pt"]
    assert [file["name"] for file in COMMITTED] == names


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file["name"])
def test_an_entry_of_the_manifest_is_complete_and_describes_the_file_in_shared(file):
    assert list(file) == ["name", "urls", "sha256", "bytes", "license", "note", "assets"]
    assert all(url.startswith("https://") for url in file["urls"])
    assert file["license"] and file["note"]
    assert (file["sha256"] is None) == (file["bytes"] is None) == (file["name"] == "stories42M.pt")
    if file["sha256"] and (SHARED / file["assets"]).is_file():
        content = (SHARED / file["assets"]).read_bytes()
        assert len(content) == file["bytes"]
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
