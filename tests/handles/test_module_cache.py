"""The cache: what is kept, checked, shared by processes, and cleaned up after them."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import filelock
import pytest

from keras_xfer.handles import downloads, module_cache, resolve
from tests.handles.conftest import (
    MODEL,
    QUICK_START,
    archive_of,
    key_of,
    names_in,
    ok,
    paused,
    status,
    tree,
    write,
)  # fmt: skip

DATA = archive_of(MODEL)
SHA256 = hashlib.sha256(DATA).hexdigest()


def test_the_cache_lasts_in_the_folder_of_keras(server, monkeypatch, tmp_path):
    handle = server.script("/m", ok(DATA))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "k"))
    assert resolve(handle) == str(tmp_path / "k" / "tfhub_modules" / key_of(handle))
    monkeypatch.delenv("KERAS_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    expected = tmp_path / "home" / ".keras" / "tfhub_modules" / key_of(handle)
    assert resolve(handle) == str(expected)
    monkeypatch.setenv("TFHUB_CACHE_DIR", "~/modules")
    assert resolve(handle) == str(tmp_path / "home" / "modules" / key_of(handle))
    assert tree(expected) == MODEL


def test_the_record_and_the_note(server, cache):
    handle = server.script("/m", ok(DATA))
    resolve(handle)
    record = json.loads((cache / f"{key_of(handle)}.json").read_text("utf-8"))
    assert record == {
        "handle": handle,
        "archive_sha256": SHA256,
        "files": {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in MODEL.items()
        },
    }
    note = (cache / f"{key_of(handle)}.descriptor.txt").read_text("utf-8")
    assert note.startswith(f"Module: {handle}\nDownload Time: ")


def test_a_copy_of_tensorflow_hub_is_found(server, cache):
    handle = server.script("/m", ok(DATA))
    folder = write(cache / key_of(handle), MODEL)
    assert resolve(handle) == str(folder)
    assert server.requests == []


def test_a_copy_is_found_by_tensorflow_hub(server, cache):
    hub = pytest.importorskip("tensorflow_hub")
    handle = server.script("/m", ok(DATA))
    folder = resolve(handle)
    assert hub.resolve(handle) == folder
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "variables/variables.index").unlink(),
        lambda folder: (folder / "variables/variables.index").write_bytes(b"ind"),
        lambda folder: (folder / "saved_model.pb").unlink(),
        lambda folder: shutil.rmtree(folder / "variables"),
        shutil.rmtree,
    ],
    ids=["file gone", "file truncated", "graph gone", "folder gone", "all gone"],
)
def test_a_damaged_copy_is_downloaded_again(server, cache, damage):
    handle = server.script("/m", ok(DATA))
    folder = Path(resolve(handle))
    damage(folder)
    assert resolve(handle) == str(folder)
    assert tree(folder) == MODEL
    assert len(server.requests) == 2
    assert len(names_in(cache)) == 3
    resolve(handle)
    assert len(server.requests) == 2


def test_a_folder_that_the_system_has_emptied(server, cache):
    # https://github.com/tensorflow/hub/issues/896
    handle = server.script("/m", ok(DATA))
    (cache / key_of(handle) / "variables").mkdir(parents=True)
    assert tree(resolve(handle)) == MODEL


# --- pins -----------------------------------------------------------------------------------------


def test_the_right_pin(server, cache):
    handle = server.script("/m", ok(DATA))
    folder = resolve(handle, sha256=SHA256)
    assert tree(folder) == MODEL
    assert resolve(handle, sha256=SHA256.upper()) == folder
    assert len(server.requests) == 1


def test_the_wrong_pin(server, cache, monkeypatch):
    handle = server.script("/m", ok(DATA))
    monkeypatch.setattr(downloads.archives, "unpack_module", None)  # nothing is unpacked
    with pytest.raises(OSError, match=f"is {'0' * 64}, but that from .* has {SHA256}"):
        resolve(handle, sha256="0" * 64)
    assert names_in(cache) == []
    assert len(server.requests) == 1


def test_a_kept_copy_of_another_archive_stays_unless_the_new_one_matches(server, cache):
    other = archive_of({"saved_model.pb": b"another"})
    handle = server.script("/m", ok(DATA), ok(DATA), ok(other))
    folder = Path(resolve(handle))
    pin = hashlib.sha256(other).hexdigest()
    with pytest.raises(OSError, match=pin):
        resolve(handle, sha256=pin)
    assert tree(folder) == MODEL
    assert resolve(handle) == str(folder)
    assert len(server.requests) == 2
    assert resolve(handle, sha256=pin) == str(folder)
    assert tree(folder) == {"saved_model.pb": b"another"}
    assert len(names_in(cache)) == 3


def test_a_kept_copy_without_a_record_is_not_taken_for_the_pinned_one(server, cache):
    handle = server.script("/m", status(404), ok(DATA))
    folder = write(cache / key_of(handle), {"saved_model.pb": b"of tensorflow_hub"})
    with pytest.raises(OSError, match="404"):
        resolve(handle, sha256=SHA256)
    assert tree(folder) == {"saved_model.pb": b"of tensorflow_hub"}
    assert resolve(handle, sha256=SHA256) == str(folder)
    assert tree(folder) == MODEL


@pytest.mark.parametrize("way", ["same size", "one more file"])
def test_a_tampered_copy_is_not_taken_for_the_pinned_one(server, cache, way):
    handle = server.script("/m", ok(DATA))
    folder = Path(resolve(handle))
    if way == "same size":
        content = MODEL["saved_model.pb"]
        (folder / "saved_model.pb").write_bytes(bytes([content[0] ^ 1]) + content[1:])
    else:
        (folder / "assets" / "more.txt").write_bytes(b"more")
    resolve(handle)
    assert len(server.requests) == 1, "without a pin only sizes are looked at"
    assert tree(resolve(handle, sha256=SHA256)) == MODEL
    assert len(server.requests) == 2


# --- several processes ----------------------------------------------------------------------------


def start(handle, cache, before=""):
    code = f"{QUICK_START}{before}print('ready', flush=True); print(resolve({handle!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"TFHUB_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_four_processes_download_once(server, cache):
    handle = server.script("/m", paused(DATA))
    processes = [start(handle, cache) for _ in range(4)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
    assert server.halfway.wait(20)
    time.sleep(0.3)  # for the others to find the lock taken
    assert [process.poll() for process in processes] == [None] * 4
    server.go_on.set()
    expected = str(cache / key_of(handle))
    assert [process.communicate(timeout=20)[0] for process in processes] == [f"{expected}\n"] * 4
    assert [process.returncode for process in processes] == [0] * 4
    assert len(server.requests) == 1
    assert tree(expected) == MODEL
    assert len(names_in(cache)) == 3


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_the_place_of_a_killed_process_is_taken_at_once(server, cache):
    handle = server.script("/m", paused(DATA), ok(DATA))
    process = start(handle, cache)
    assert server.halfway.wait(20)
    waiting = start(handle, cache)
    assert waiting.stdout.readline() == "ready\n"
    left = [name for name in names_in(cache) if ".tmp-" in name]
    assert len(left) == 1
    process.send_signal(signal.SIGKILL)
    process.communicate()
    start_time = time.monotonic()
    folder = Path(resolve(handle))
    assert time.monotonic() - start_time < 3
    assert waiting.communicate(timeout=20)[0] == f"{folder}\n"
    assert tree(folder) == MODEL
    assert len(server.requests) == 2
    assert not (cache / left[0]).exists()
    assert len(names_in(cache)) == 3


def test_leftovers_of_other_modules_stay(server, cache):
    handle = server.script("/m", ok(DATA))
    ours = write(cache / f".{key_of(handle)}.tmp-dead", {"archive": b"half"})
    others = write(cache / f".{'0' * 40}.tmp-maybe-alive", {"archive": b"half"})
    resolve(handle)
    assert not ours.exists()
    assert tree(others) == {"archive": b"half"}


def test_a_wait_is_announced_in_a_terminal(server, cache, terminal, monkeypatch):
    handle = server.script("/m", ok(DATA))
    cache.mkdir()
    monkeypatch.setattr(module_cache, "ANNOUNCED_AFTER_SECONDS", 0.05)
    written = terminal()
    with filelock.FileLock(cache / f".{key_of(handle)}.filelock"):
        thread = threading.Thread(target=resolve, args=(handle,))
        thread.start()
        deadline = time.monotonic() + 10
        while not written.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert written.getvalue() == f"Waiting for another process that fetches {handle}\n"
        assert server.requests == []
    thread.join(10)
    assert len(server.requests) == 1


def test_a_lock_of_tensorflow_hub_is_not_made(server, cache):
    # Its resolver waits for ten minutes for <key>.lock to go.
    resolve(server.script("/m", ok(DATA)))
    assert not list(cache.glob("*.lock"))


# --- a cache that cannot be written ---------------------------------------------------------------


@pytest.fixture
def readable_only(monkeypatch):
    """A function that makes a folder read-only, also for a test that root runs."""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    folder.chmod(0o755)
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(folder))
    root = os.name == "posix" and os.geteuid() == 0

    def make():
        for each in [folder, *folder.rglob("*")]:
            each.chmod(0o555 if each.is_dir() else 0o444)
        if root:
            os.seteuid(65534)
        return folder

    yield make
    if root:
        os.seteuid(0)
    for each in [folder, *folder.rglob("*")]:
        each.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.skipif(os.name != "posix", reason="modes of folders are those of POSIX")
def test_a_cache_that_cannot_be_written(server, readable_only):
    handle = server.script("/m", ok(DATA))
    cache = readable_only()
    with pytest.raises(PermissionError, match="set TFHUB_CACHE_DIR to a folder") as caught:
        resolve(handle)
    assert f"Received: handle={handle!r}" in str(caught.value)
    assert str(cache) in str(caught.value)
    assert server.requests == []


@pytest.mark.skipif(os.name != "posix", reason="modes of folders are those of POSIX")
def test_a_module_in_a_cache_that_cannot_be_written(server, readable_only):
    handle = server.script("/m", ok(DATA))
    folder = resolve(handle)
    cache = readable_only()
    for lock in cache.glob(".*.filelock"):
        assert not os.access(lock, os.W_OK, effective_ids=True)
    assert resolve(handle) == folder
    assert resolve(handle, sha256=SHA256) == folder
    assert len(server.requests) == 1


def test_a_file_where_the_cache_should_be(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(OSError, match="Cannot write .*file.*Received: handle="):
        resolve(server.script("/m", ok(DATA)))


def test_a_failure_while_the_module_is_moved_in_keeps_the_former_one(server, cache, monkeypatch):
    other = archive_of({"saved_model.pb": b"another"})
    handle = server.script("/m", ok(DATA), ok(other))
    folder = resolve(handle)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module_cache.files, "write_json", full)
        with pytest.raises(OSError, match="No space left on device"):
            resolve(handle, sha256=hashlib.sha256(other).hexdigest())
    assert tree(folder) == MODEL
    assert resolve(handle) == folder
    assert len(server.requests) == 2
    assert len(names_in(cache)) == 3


def test_the_wait_for_an_archive_shows_its_name_as_text(tmp_path, cache, terminal, monkeypatch):
    archive = tmp_path / "\x1b[31mred.tar.gz"
    archive.write_bytes(DATA)
    cache.mkdir()
    monkeypatch.setattr(module_cache, "ANNOUNCED_AFTER_SECONDS", 0.01)
    written = terminal()
    with filelock.FileLock(cache / f".{hashlib.sha256(DATA).hexdigest()}.filelock"):
        thread = threading.Thread(target=resolve, args=(str(archive),))
        thread.start()
        deadline = time.monotonic() + 10
        while not written.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    thread.join(10)
    assert r"\x1b[31mred.tar.gz" in written.getvalue()
    assert written.getvalue().removesuffix("\n").isprintable()
