"""data/fetch.py against a small server on this machine: nothing here leaves it."""

import contextlib
import hashlib
import importlib.util
import json
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "data" / "fetch.py"
MANIFEST = REPOSITORY / "data" / "manifest.json"
SHARED = REPOSITORY.parent / "shared"
BODY = bytes(range(256)) * 4096  # 1 MiB: several chunks


def _load_script():
    spec = importlib.util.spec_from_file_location("fetch", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch"] = module  # where dataclasses look a module up
    spec.loader.exec_module(module)
    return module


fetch = _load_script()


class Handler(BaseHTTPRequestHandler):
    """Each address shows one habit of a server; the rest of it is BODY."""

    def do_GET(self):
        start = int(re.findall(r"\d+", self.headers.get("Range", "0"))[0])
        self.server.requests.append((self.path, start))
        with contextlib.suppress(ConnectionError):  # the other side may have had enough
            getattr(self, "serve_" + self.path.strip("/").replace("-", "_"))(start)

    def answer(self, code, body, n_promised=None, **headers):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) if n_promised is None else n_promised))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def serve_ranges(self, start):
        if start >= len(BODY):
            self.answer(416, b"")
        elif start:
            span = f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
            self.answer(206, BODY[start:], Content_Range=span)
        else:
            self.answer(200, BODY)

    def serve_no_ranges(self, start):
        self.answer(200, BODY)

    def serve_other_range(self, start):
        if start:
            self.answer(206, BODY[7:], Content_Range=f"bytes 7-{len(BODY) - 1}/{len(BODY)}")
        else:
            self.answer(200, BODY)

    def serve_breaks_off(self, start):
        self.answer(200, BODY[:500_000], n_promised=len(BODY))

    def serve_drips(self, start):
        self.answer(200, b"", n_promised=len(BODY))
        while True:  # one byte in time, again and again
            self.wfile.write(b"x")
            time.sleep(0.01)

    def serve_only_another_part(self, start):
        self.answer(206, BODY[7:], Content_Range=f"bytes 7-{len(BODY) - 1}/{len(BODY)}")

    def serve_to_port_99999(self, start):
        self.answer(302, b"", Location="http://127.0.0.1:99999/ranges")

    def serve_escape(self, start):
        self.wfile.write(b"\x1b[31mnonsense\r\n\r\n")

    def serve_stalls(self, start):
        self.answer(200, BODY[:500_000], n_promised=len(BODY))
        self.rfile.read(1)  # until the other side hangs up

    def serve_broken_chunks(self, start):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"ffff\r\nless than that")

    def serve_short(self, start):
        self.answer(200, BODY[:500_000])

    def serve_long(self, start):
        self.answer(200, BODY + b"x")

    def serve_endless(self, start):
        self.answer(200, b"x", n_promised=10**15)

    def serve_long_unannounced(self, start):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(BODY + b"x")

    def serve_altered(self, start):
        self.answer(200, b"\1" + BODY[1:])

    def serve_gone(self, start):
        self.answer(404, b"no such file")

    def serve_to_plain_http(self, start):
        self.answer(302, b"", Location="http://plain.invalid/ranges")

    def serve_to_here(self, start):
        self.answer(302, b"", Location="/ranges")

    def serve_to_here_with_much(self, start):
        self.answer(302, b"x", n_promised=10**15, Location="/ranges")

    def serve_to_here_with_more(self, start):
        self.answer(302, b"x", n_promised=10**30, Location="/ranges")

    def serve_to_nonsense(self, start):
        self.answer(302, b"", Location="https://[nonsense")

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def loopback():
    """Skips where not even this machine can be reached, as in an empty network namespace."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        try:
            socket.create_connection(listener.getsockname(), timeout=5).close()
        except OSError as error:
            pytest.skip(f"needs the loopback network: {error}")


@pytest.fixture(scope="module")
def running_server(loopback):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server(running_server, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running_server.requests = []
    running_server.url = f"http://127.0.0.1:{running_server.server_port}/"
    return running_server


@pytest.fixture
def closed_url(loopback):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # bound, so that nobody else gets it, but not listening
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/file"


@pytest.fixture
def hosts(monkeypatch):
    """Every host that anything tries to connect to, in order."""
    seen, create_connection = [], socket.create_connection

    def record(address, *args, **kwargs):
        seen.append(address[0])
        return create_connection(address, *args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", record)
    return seen


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "shared/models").mkdir(parents=True)
    (tmp_path / "shared/models/file.bin").write_bytes(BODY)
    return tmp_path / "shared"


def entry(*urls, name="data/file.bin", **changes):
    plain = {
        "name": name,
        "urls": list(urls) or ["https://host.invalid/file"],
        "sha256": hashlib.sha256(BODY).hexdigest(),
        "bytes": len(BODY),
        "licence": "none",
        "assets": "models/file.bin",
    }
    return plain | changes


UNPUBLISHED = {"sha256": None, "bytes": None, "max_bytes": len(BODY)}


def run(root, *entries, options=()):
    """Exit code of main() on a manifest of these entries."""
    manifest = root.parent / "manifest.json"
    manifest.write_text(json.dumps({"files": entries}), encoding="utf-8")
    return code_of(["--manifest", str(manifest), "--root", str(root), *options])


def code_of(argv):
    try:
        return fetch.main(argv)
    except SystemExit as stop:  # argparse
        return stop.code


def files_in(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def error_lines(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("fetch.py: ") for line in lines)
    return lines


REDIRECTS = ["to-here", "to-here-with-much", "to-here-with-more"]


@pytest.mark.parametrize("path", ["ranges", "no-ranges", *REDIRECTS])
def test_a_missing_file_is_downloaded_and_leaves_nothing_else(path, server, root, capfd):
    assert run(root, entry(server.url + path)) == 0
    assert (root / "data/file.bin").read_bytes() == BODY
    assert files_in(root) == ["data/file.bin"]
    out, err = capfd.readouterr()
    assert out == "fetched  data/file.bin\n"
    assert err == ""  # no progress bar where there is no terminal


def test_a_file_that_is_right_is_not_asked_for_again(server, root, capsys):
    assert run(root, entry(server.url + "ranges")) == 0
    server.requests.clear()
    assert run(root, entry(server.url + "ranges")) == 0
    assert server.requests == []
    assert capsys.readouterr().out.splitlines()[-1] == "ok       data/file.bin"


def test_of_two_at_work_in_one_folder_the_second_is_refused(server, root, capsys):
    pytest.importorskip("fcntl")
    with fetch.alone(root):
        assert run(root, entry(server.url + "ranges")) == 2
    (line,) = error_lines(capsys)
    assert "another fetch.py is at work there; wait for it" in line
    assert run(root, entry(server.url + "ranges")) == 0


@pytest.mark.parametrize("content", [b"mine", b"\1" + BODY[1:], b""])
@pytest.mark.parametrize("from_folder", [True, False])
def test_a_file_that_differs_is_left_as_it_is(content, from_folder, server, root, capsys):
    (root / "data").mkdir()
    (root / "data/file.bin").write_bytes(content)
    options = ["--assets-from", str(root)] if from_folder else []
    assert run(root, entry(server.url + "ranges"), options=options) == 1
    assert (root / "data/file.bin").read_bytes() == content
    assert files_in(root) == ["data/file.bin"]
    assert server.requests == []
    out, err = capsys.readouterr()
    assert out == "differs  data/file.bin\n"
    assert re.search("data/file.bin: found .* expected .*; delete it to fetch it again\n$", err)


@pytest.mark.parametrize(
    ("content", "code"), [(b"whatever a user put there", 0), (b"", 1)], ids=["some", "none"]
)
def test_without_a_published_checksum_any_content_counts_as_there(content, code, root, capsys):
    (root / "w.pt").write_bytes(content)
    assert run(root, entry(name="w.pt", **UNPUBLISHED)) == code
    assert (root / "w.pt").read_bytes() == content
    assert ("sanity_check.py" in capsys.readouterr().out) == (code == 0)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("altered", "found sha256 [0-9a-f]{64}, expected " + hashlib.sha256(BODY).hexdigest()),
        ("short", f"found 500000 bytes, expected {len(BODY)}"),
        ("long", f"found {len(BODY) + 1} bytes, expected {len(BODY)} at most"),
        ("endless", f"found {10**15} bytes, expected {len(BODY)} at most"),
        ("long-unannounced", f"found {len(BODY) + 1} bytes, expected {len(BODY)} at most"),
    ],
)
def test_a_wrong_file_is_reported_in_a_line_and_removed(path, found, server, root, capsys):
    assert run(root, entry(server.url + path)) == 1
    assert files_in(root) == []
    out, err = capsys.readouterr()
    assert out == "failed   data/file.bin\n"
    assert re.fullmatch(f"fetch.py: data/file.bin: {found} .*\n", err)


def test_a_file_without_checksum_is_bounded_by_max_bytes(server, folder, root):
    assert run(root, entry(server.url + "long-unannounced", **UNPUBLISHED)) == 1
    (folder / "models/file.bin").write_bytes(BODY + b"x")
    assert run(root, entry(**UNPUBLISHED), options=["--assets-from", str(folder)]) == 1
    assert files_in(root) == []


@pytest.mark.parametrize(
    "path",
    [
        *("altered", "gone", "breaks-off", "stalls", "broken-chunks", "to-plain-http"),
        *("to-nonsense", "to-port-99999", "drips"),
    ],
)
def test_the_next_address_is_tried(path, server, root, monkeypatch):
    if path in ("stalls", "drips"):
        monkeypatch.setattr(fetch, "TIMEOUT_S", 1)
    assert run(root, entry(server.url + path, server.url + "ranges")) == 0
    assert [path for path, _ in server.requests] == ["/" + path, "/ranges"]
    assert (root / "data/file.bin").read_bytes() == BODY
    assert files_in(root) == ["data/file.bin"]


def test_a_broken_download_is_resumed_where_it_broke_off(server, root, capsys):
    assert run(root, entry(server.url + "breaks-off", **UNPUBLISHED)) == 3
    assert files_in(root) == ["data/file.bin.part"]
    assert f"broke off after 500000 of {len(BODY)} bytes" in error_lines(capsys)[0]
    server.requests.clear()
    assert run(root, entry(server.url + "ranges", **UNPUBLISHED)) == 0
    assert server.requests == [("/ranges", 500_000)]
    assert (root / "data/file.bin").read_bytes() == BODY


@pytest.mark.parametrize("path", ["ranges", "no-ranges", "other-range"])
@pytest.mark.parametrize("n_had", [1000, len(BODY), len(BODY) + 5])
def test_a_part_never_spoils_the_file(path, n_had, server, root, capsys):
    (root / "data").mkdir()
    (root / "data/file.bin.part").write_bytes((BODY + b"extra")[:n_had])
    assert run(root, entry(server.url + path, **UNPUBLISHED)) == 0
    assert (root / "data/file.bin").read_bytes() == BODY
    assert files_in(root) == ["data/file.bin"]
    assert error_lines(capsys) == []


def test_a_server_that_sends_another_part_twice_is_given_up(server, root, capsys):
    assert run(root, entry(server.url + "only-another-part", **UNPUBLISHED)) == 3
    assert len(server.requests) == 2 and files_in(root) == []
    assert "a part of the file that was not asked for" in error_lines(capsys)[0]


def test_a_part_of_something_else_is_given_up_and_the_file_downloaded_whole(server, root, capsys):
    (root / "data").mkdir()
    (root / "data/file.bin.part").write_bytes(b"\1" * 1000)
    assert run(root, entry(server.url + "ranges")) == 0
    assert server.requests == [("/ranges", 1000), ("/ranges", 0)]
    assert (root / "data/file.bin").read_bytes() == BODY
    assert len(error_lines(capsys)) == 1


def test_the_beginning_from_one_address_is_never_joined_to_the_end_from_another(server, root):
    urls = [server.url + "gone", server.url + "breaks-off"]
    assert run(root, entry(*urls, **UNPUBLISHED)) == 3
    assert len(files_in(root)) == 1
    server.requests.clear()
    assert run(root, entry(server.url + "ranges", urls[1], **UNPUBLISHED)) == 0
    assert server.requests == [("/ranges", 0)]
    assert files_in(root) == ["data/file.bin"]


def test_a_redirect_to_plain_http_is_refused_before_any_connection(server, root, hosts, capsys):
    assert run(root, entry(server.url + "to-plain-http")) == 3
    assert hosts == ["127.0.0.1"]
    assert "redirect to http://plain.invalid/ranges is refused" in error_lines(capsys)[0]
    assert files_in(root) == []


def test_what_a_server_says_reaches_the_terminal_as_text(server, root, capsys):
    assert run(root, entry(server.url + "escape")) == 3
    assert r"\x1b[31mnonsense" in error_lines(capsys)[0]


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://example.org/file", True),
        ("http://127.0.0.1:80/file", True),
        ("http://localhost/file", True),
        ("http://[::1]/file", True),
        ("http://example.org/file", False),
        ("http://localhost.example.org/file", False),
        ("http://127.0.0.1@example.org/file", False),
        ("ftp://127.0.0.1/file", False),
        ("file:///etc/passwd", False),
        ("https:///file", False),
        ("http://127.0.0.1:99999/file", False),
        ("http://127.0.0.1:port/file", False),
        ("https://[::1/file", False),
        ("https://exam\nple.org/file", False),
        ("https://example.org/a file", False),
        ("https://example.org/\u00e9", False),
        ("file", False),
    ],
)
def test_https_anywhere_and_plain_http_only_here(url, allowed):
    assert fetch.is_allowed(url) == allowed


def test_without_a_network_each_host_is_tried_once_and_two_lines_say_what_is_missing(
    closed_url, server, root, hosts, capsys
):
    entries = [entry(closed_url, name=name) for name in ("a", "b", "c")]
    assert run(root, *entries, entry(server.url + "ranges", name="d")) == 3
    assert hosts == ["127.0.0.1", "127.0.0.1"]  # the closed port once, and the server
    assert files_in(root) == ["d"]
    what, how = error_lines(capsys)
    assert what.startswith("fetch.py: missing: a, b, c (127.0.0.1:") and what.count("refused") == 1
    assert "data/fetch.py" in how and "--assets-from DIR" in how


def test_a_server_that_stays_silent_makes_the_file_missing(loopback, root, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.1)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts, but never answers
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/file"
        assert run(root, entry(url)) == 3
    assert "timed out" in error_lines(capsys)[0]


def test_a_wrong_file_outranks_a_missing_one(closed_url, server, root):
    wrong, missing = entry(server.url + "altered", name="a"), entry(closed_url, name="b")
    assert run(root, wrong, missing) == 1


def test_names_choose_the_files(server, root, capsys):
    entries = [entry(server.url + "ranges", name=name) for name in ("a", "b", "c")]
    assert run(root, *entries, options=["c", "a"]) == 0
    assert files_in(root) == ["a", "c"]
    assert run(root, *entries, options=["d"]) == 2
    assert "d: not in" in error_lines(capsys)[0]


def test_from_a_folder_files_are_copied_without_any_connection(folder, server, root, hosts, capsys):
    source = folder / "models/file.bin"
    source.chmod(0o444)
    options = ["--assets-from", str(folder)]
    absent = entry(server.url + "ranges", name="b", assets="models/absent.bin")
    assert run(root, entry(server.url + "ranges"), absent, options=options) == 3
    assert (root / "data/file.bin").read_bytes() == source.read_bytes() == BODY
    assert files_in(root) == ["data/file.bin"]
    assert hosts == []
    out, err = capsys.readouterr()
    assert out == "copied   data/file.bin\n"
    assert err.startswith(f"fetch.py: missing: b (not in {folder})\n") and err.count("\n") == 2


@pytest.mark.parametrize("content", [b"\1" + BODY[1:], BODY[1:], BODY + b"x"])
def test_a_corrupt_file_is_not_copied(content, folder, root, capsys):
    (folder / "models/file.bin").write_bytes(content)
    assert run(root, entry(), options=["--assets-from", str(folder)]) == 1
    assert files_in(root) == []
    out, err = capsys.readouterr()
    assert out == "failed   data/file.bin\n"
    assert re.fullmatch("fetch.py: data/file.bin: found .* expected .*\n", err)


def test_a_folder_that_is_none_is_a_usage_error(folder, root, capsys):
    for path in (folder / "absent", folder / "models/file.bin"):
        assert run(root, entry(), options=["--assets-from", str(path)]) == 2
        assert error_lines(capsys) == [f"fetch.py: error: {path}: no such folder"]


def without(key):
    return {name: value for name, value in entry().items() if name != key}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file"),
        ("", "line 1 column 1"),
        ("{'files': []}", "line 1 column 2"),
        ("[]", "not of the form"),
        ("{}", "the key 'files' is missing"),
        ({"files": 3}, "not of the form"),
        ({"files": ["name"]}, "not of the form"),
        *(
            ({"files": [without(key)]}, f"the key '{key}' is missing")
            for key in ("name", "urls", "sha256", "bytes", "assets")
        ),
        ({"files": [entry(bytes=None)]}, "the key 'max_bytes' is missing"),
        ({"files": [entry(bytes="7")]}, "'7' is not a number of bytes"),
        ({"files": [entry(sha256="abc")]}, "'abc' is not a sha256"),
        ({"files": [entry(urls=[])]}, "no address"),
        ({"files": [entry("http://example.org/file")]}, "is not an https address"),
        ({"files": [entry(name="/etc/file")]}, "'/etc/file' is not a plain path"),
        ({"files": [entry(name="data/../../file")]}, "'data/../../file' is not a plain path"),
        ({"files": [entry(name="")]}, "'' is not a plain path"),
        ({"files": [entry(assets="../file")]}, "'../file' is not a plain path"),
        ({"files": [entry(name="a\0b")]}, r"'a\x00b' is not a plain path"),
        ({"files": [entry(name="a\nb")]}, r"'a\nb' is not a plain path"),
        ({"files": [entry(name="\ud800")]}, r"'\ud800' is not a plain path"),
        ({"files": [entry(assets="\x1b[31m")]}, r"'\x1b[31m' is not a plain path"),
        ({"files": [entry(), entry()]}, "data/file.bin is listed twice"),
        ({"files": [entry("https://[::1/file")]}, "is not an https address"),
        ("[" * 100_000, "not of the form"),
    ],
)
def test_a_bad_manifest_is_one_line_that_says_what_is_wrong(content, complaint, root, capsys):
    manifest = root / "given.json"
    if content is not None:
        manifest.write_text(
            content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
        )
    assert code_of(["--manifest", str(manifest), "--root", str(root)]) == 2
    (line,) = error_lines(capsys)
    assert str(manifest) in line and complaint in line


def test_an_unknown_option_is_one_line(capsys):
    assert code_of(["--nonsense"]) == 2
    assert len(error_lines(capsys)) == 1


def test_as_a_script_it_passes_on_its_exit_code_and_shows_no_traceback(folder, root):
    manifest = root.parent / "manifest.json"
    absent = entry(name="b", assets="models/absent.bin")
    manifest.write_text(json.dumps({"files": [entry(), absent]}), encoding="utf-8")
    command = [sys.executable, SCRIPT, "--manifest", manifest, "--root", root]
    done = subprocess.run(
        [*command, "--assets-from", folder], capture_output=True, encoding="utf-8"
    )
    assert (done.returncode, done.stdout) == (3, "copied   data/file.bin\n")
    assert done.stderr.count("\n") == 2 and "Traceback" not in done.stderr


def test_without_tqdm_it_says_what_to_run_first():
    done = subprocess.run(
        [sys.executable, "-S", SCRIPT], capture_output=True, encoding="utf-8"
    )  # -S: bare
    assert done.returncode == 2
    assert re.fullmatch("fetch.py: error: tqdm .* run `bash setup.sh` first\n", done.stderr)


def test_ctrl_c_is_one_line_and_keeps_what_has_come(server, root, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    (root / "data").mkdir()
    (root / "data/file.bin.part").write_bytes(BODY[:1000])
    monkeypatch.setattr(fetch, "_read", interrupt)
    assert run(root, entry(server.url + "ranges")) == 130
    assert len(error_lines(capsys)) == 1
    assert (root / "data/file.bin.part").read_bytes() == BODY[:1000]


def test_a_root_that_cannot_hold_the_file_is_one_line(server, root, capsys):
    (root / "data").write_text("a file where a folder is needed", encoding="utf-8")
    assert run(root, entry(server.url + "ranges")) == 2
    assert len(error_lines(capsys)) == 1


COMMITTED = json.loads(MANIFEST.read_text(encoding="utf-8"))["files"]
KEYS = ["name", "urls", "sha256", "bytes", "max_bytes", "licence", "note", "assets"]


def test_the_manifest_lists_what_the_scripts_need():
    splits = [f"data/{c}-{s}.txt" for c in ("sst", "cfimdb") for s in ("train", "dev", "test")]
    small = [
        f"models/stories260K/{n}" for n in ("stories260K.pt", "stories260K.bin", "tok512.model")
    ]
    names = [*splits, "tokenizer.model", "sanity_check.data", *small, "stories42M.pt"]
    assert [file["name"] for file in COMMITTED] == names
    assert [asset.name for asset in fetch.load_manifest(MANIFEST)] == names


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file["name"])
def test_an_entry_of_the_manifest_is_complete(file):
    assert list(file) == [key for key in KEYS if key != "max_bytes" or file["bytes"] is None]
    assert all(url.startswith("https://") for url in file["urls"])
    assert file["licence"] and file["note"]
    assert (file["sha256"] is None) == (file["bytes"] is None) == (file["name"] == "stories42M.pt")


def test_the_manifest_warns_of_placeholder_labels():
    (test_split,) = [file for file in COMMITTED if file["name"] == "data/cfimdb-test.txt"]
    assert "placeholders (all 0)" in test_split["note"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder ../shared beside the repository")
@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file["name"])
def test_the_manifest_describes_the_files_in_shared(file):
    source = SHARED / file["assets"]
    if not source.is_file():
        pytest.skip(f"../shared has no {file['assets']}")
    assert source.stat().st_size == (file["bytes"] or source.stat().st_size)
    assert fetch.sha256_of(source) == (file["sha256"] or fetch.sha256_of(source))
