"""A server on the loopback that does what a test tells it to, and archives made by tarfile."""

import contextlib
import hashlib
import http.server
import io
import os
import random
import socket
import struct
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from keras_xfer.handles import downloads

MODEL = {
    "saved_model.pb": b"\x08\x01\x12 not a graph, and nobody here reads it",
    "variables/variables.index": b"index",
    "variables/variables.data-00000-of-00001": random.Random(0).randbytes(300_000),  # noqa: S311 - no secret
    "assets/words.txt": "chat, château\n".encode(),
}

# The package skips its imports where it is a command: these processes need no framework.
QUICK_START = "import sys; sys.argv = ['keras-xfer']; from keras_xfer.handles import resolve; "


def archive_of(files, mode="w:gz", top=""):
    """The bytes of a tar archive of `files`; with `top`, below that folder."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(top + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def tree(folder):
    """Every file below `folder` with its content."""
    return {
        (Path(where) / name).relative_to(folder).as_posix(): (Path(where) / name).read_bytes()
        for where, _, names in os.walk(folder)
        for name in names
    }


def key_of(handle):
    """The name of a module's folder, as tensorflow_hub's compressed_module_resolver.py has it."""
    return hashlib.sha1(handle.encode()).hexdigest()  # noqa: S324 - not for safety


def names_in(cache):
    """What lies in the cache, but for the locks, which stay."""
    if not cache.exists():
        return []
    return sorted(each.name for each in cache.iterdir() if each.suffix != ".filelock")


def write(folder, files):
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _apart_from_the_world(monkeypatch, tmp_path):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "TFHUB_MODEL_LOAD_FORMAT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.delenv("TFHUB_CACHE_DIR", raising=False)
    monkeypatch.setattr(downloads, "RETRY_WAITS_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(downloads, "TIMEOUT_SECONDS", 20.0)


@pytest.fixture
def terminal(monkeypatch):
    """A function that makes a terminal of stdout and returns what is written to it."""

    def make():
        stream = io.StringIO()
        stream.isatty = lambda: True
        monkeypatch.setattr(sys, "stdout", stream)
        return stream

    return make


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = {}
        self.requests = []
        self.halfway = threading.Event()
        self.go_on = threading.Event()

    def handle_error(self, request, client_address):
        """Clients that hang up are what some tests are about."""

    def script(self, path, *answers):
        """What to do at each GET of `path`; the last one is repeated. Returns the address."""
        self.answers[path] = list(answers)
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests.append(self.path)
        answers = self.server.answers.get(self.path.partition("?")[0])
        if not answers:
            self.send_error(404)
            return
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        with contextlib.suppress(ConnectionError):
            answer(self)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


# --- what the server can do -----------------------------------------------------------------------


def _head(handler, data, length, content_type="application/gzip"):
    handler.send_response(200)
    handler.send_header("Content-Type", content_type)
    if length:
        handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()


def ok(data, length=True, content_type="application/gzip"):
    def answer(handler):
        _head(handler, data, length, content_type)
        handler.wfile.write(data)

    return answer


def status(code):
    return lambda handler: handler.send_error(code)


def redirect(to, code=302):
    def answer(handler):
        handler.send_response(code)
        handler.send_header("Location", to)
        handler.end_headers()

    return answer


def reset_in_the_middle(data):
    def answer(handler):
        _head(handler, data, True)
        handler.wfile.write(data[: len(data) // 2])
        handler.wfile.flush()
        # Closing with a linger of 0 s sends a reset instead of an end.
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.rfile.close()
        handler.connection.close()

    return answer


def truncated(data, keep, length=True):
    def answer(handler):
        _head(handler, data, length)
        handler.wfile.write(data[:keep])

    return answer


def paused(data):
    """Send one half, tell the test, and the other half when the test says so."""

    def answer(handler):
        _head(handler, data, True)
        handler.wfile.write(data[: len(data) // 2])
        handler.wfile.flush()
        handler.server.halfway.set()
        handler.server.go_on.wait(30)
        handler.wfile.write(data[len(data) // 2 :])

    return answer


def dripping(data, pieces, pause):
    def answer(handler):
        _head(handler, data, True)
        size = -(-len(data) // pieces)
        for start in range(0, len(data), size):
            handler.wfile.write(data[start : start + size])
            handler.wfile.flush()
            handler.server.go_on.wait(pause)

    return answer
