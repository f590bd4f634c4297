"""Archives over HTTP, from servers that work and servers that do not."""

import errno
import os
import re
import shutil
import ssl
import subprocess
import time
from pathlib import Path

import pytest

from keras_xfer.handles import addresses, downloads, resolve
from tests.handles.conftest import (
    MODEL,
    archive_of,
    dripping,
    key_of,
    names_in,
    ok,
    redirect,
    reset_in_the_middle,
    status,
    tree,
    truncated,
)  # fmt: skip

DATA = archive_of(MODEL)


def test_an_archive_is_downloaded_once(server, cache):
    handle = server.script("/google/model/1", ok(DATA))
    folder = Path(resolve(handle))
    assert tree(folder) == MODEL
    assert folder == cache / key_of(handle)
    assert server.requests == ["/google/model/1?tf-hub-format=compressed"]
    assert resolve(handle) == str(folder)
    assert len(server.requests) == 1


def test_the_query_is_added_to_one_that_is_there(server, cache):
    resolve(server.script("/m.tar.gz", ok(DATA)) + "?a=1&b=")
    assert server.requests == ["/m.tar.gz?a=1&b=&tf-hub-format=compressed"]


@pytest.mark.parametrize("top", ["", "./", "model/"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("length", [True, False])
def test_kinds_of_archives(server, cache, top, mode, length):
    handle = server.script("/m", ok(archive_of(MODEL, mode, top), length))
    assert tree(resolve(handle)) == MODEL


def test_redirects_are_followed(server, cache):
    target = server.script("/there", ok(DATA))
    handle = server.script("/here", redirect(target + "?signed=1"))
    assert tree(resolve(handle)) == MODEL
    assert server.requests == ["/here?tf-hub-format=compressed", "/there?signed=1"]


@pytest.mark.parametrize(
    "trouble",
    [
        reset_in_the_middle(DATA),
        truncated(DATA, len(DATA) // 2),
        truncated(DATA, len(DATA) // 2, length=False),
        truncated(DATA, 0, length=False),
        status(500),
        status(503),
        status(429),
    ],
    ids=["reset", "truncated", "truncated-no-length", "empty", "500", "503", "429"],
)
def test_what_may_pass_is_tried_again(server, cache, trouble):
    handle = server.script("/m", trouble, trouble, ok(DATA))
    assert tree(resolve(handle)) == MODEL
    assert len(server.requests) == 3

    again = server.script("/again", trouble)
    with pytest.raises(OSError, match=f"Received: handle={re.escape(repr(again))}"):
        resolve(again)
    assert len(server.requests) == 6
    key = key_of(handle)
    assert names_in(cache) == [key, f"{key}.descriptor.txt", f"{key}.json"]


def test_a_truncated_plain_archive_without_a_length(server, cache):
    # Cut between two members: tarfile itself would take it for a whole one.
    plain = archive_of({"saved_model.pb": b"graph", "variables/variables.index": b"index"}, "w")
    handle = server.script("/m", truncated(plain, 1024, length=False))
    with pytest.raises(OSError, match="ends too early or is damaged"):
        resolve(handle)
    assert len(server.requests) == 3
    assert names_in(cache) == []


def test_an_archive_that_is_damaged_at_its_source_is_not_tried_again(server, cache):
    with pytest.raises(OSError, match="ends too early or is damaged"):
        resolve(server.script("/m", ok(DATA[:-100])))
    assert len(server.requests) == 1
    assert names_in(cache) == []


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (404, "Check the address and the version"),
        (410, "Check the address and the version"),
        (401, "log in at https://www.kaggle.com"),
        (403, "log in at https://www.kaggle.com"),
        (400, "Try again later"),
    ],
)
def test_a_refusal_is_final_and_says_what_to_do(server, cache, code, remedy):
    handle = server.script("/m", status(code))
    with pytest.raises(OSError, match=remedy) as caught:
        resolve(handle)
    text = str(caught.value)
    assert f"the server answered {code}" in text
    assert f"Received: handle={handle!r}" in text
    assert str(cache) in text
    assert "fetch the archive elsewhere" in text
    assert len(server.requests) == 1
    assert names_in(cache) == []


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("/m", "answered 302 and redirects in a circle"),
        ("file:///etc/passwd", "redirects to 'file:///etc/passwd', where no archive"),
        (None, "redirects without saying where to"),
    ],
)
def test_a_redirect_to_nowhere(server, cache, location, words):
    answer = status(302) if location is None else redirect(location)
    with pytest.raises(OSError, match=words) as caught:
        resolve(server.script("/m", answer))
    assert "address of the archive itself" in str(caught.value)
    assert "Try again" not in str(caught.value)


def answer_of(*lines):
    """The very bytes of an answer, with whatever in them."""
    return lambda handler: handler.wfile.write("\r\n".join([*lines, "", ""]).encode())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (redirect("http://[::1"), "malformed"),
        (redirect("http://a..b/m"), "malformed"),
        (answer_of("HTTP/1.1 200 OK", "Content-Length: " + "9" * 5000), "5000 digits"),
        (answer_of("HTTP/1.1 200 OK", "Content-Length: " + "9" * 20), "20 digits"),
        (answer_of("no HTTP"), "malformed"),
    ],
    ids=["redirect", "host", "5000-digits", "20-digits", "no-http"],
)
def test_an_answer_that_makes_no_sense(server, cache, answer, words):
    handle = server.script("/m", answer)
    with pytest.raises(OSError, match=f"{words}.*Received: handle={re.escape(repr(handle))}"):
        resolve(handle)
    assert names_in(cache) == []


@pytest.mark.parametrize(
    "answer",
    [
        answer_of("HTTP/1.1 500 \x1b[31mred"),
        answer_of("HTTP/1.1 200 OK", "Content-Type: \x1b[31mred", "Content-Length: 4", "", "page"),
        redirect("file:///\x1b[31mred"),
        ok(archive_of({"\x1b[31mred/a.txt": b"a"})),
        ok(archive_of({"../\x1b[31mred": b"a"})),
    ],
    ids=["reason", "content-type", "location", "folder", "member"],
)
def test_words_of_others_do_not_command_the_terminal(server, cache, answer):
    with pytest.raises(OSError, match=re.escape(r"\x1b[31mred")) as caught:
        resolve(server.script("/m", answer))
    assert str(caught.value).isprintable()


def test_a_page_instead_of_an_archive(server, cache):
    page = b"<!doctype html><title>Sign in</title>" + b" " * 2000
    handle = server.script("/m", ok(page, content_type="text/html; charset=utf-8"))
    with pytest.raises(OSError, match=r"what came is none \(text/html; charset=utf-8\)"):
        resolve(handle)
    assert len(server.requests) == 1
    assert names_in(cache) == []


def test_slow_but_progressing(server, cache, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT_SECONDS", 0.5)
    handle = server.script("/m", dripping(DATA, pieces=8, pause=0.1))
    start = time.monotonic()
    assert tree(resolve(handle)) == MODEL
    assert time.monotonic() - start > 0.6, "the server was not slower than the timeout"
    assert len(server.requests) == 1


def test_a_stalled_server(server, cache, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT_SECONDS", 0.2)
    handle = server.script("/m", dripping(DATA, pieces=2, pause=20))
    start = time.monotonic()
    with pytest.raises(OSError, match="no byte came for 0.2 s.*Received: handle="):
        resolve(handle)
    assert time.monotonic() - start < 5
    assert names_in(cache) == []


def test_a_server_that_never_answers(server, cache, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT_SECONDS", 0.2)
    handle = server.script("/m", lambda handler: handler.server.go_on.wait(20))
    with pytest.raises(OSError, match="no byte came for 0.2 s"):
        resolve(handle)


def test_no_connection(cache):
    with pytest.raises(OSError, match="there is no connection to it.*fetch the archive elsewhere"):
        resolve("http://127.0.0.1:9/model")
    assert names_in(cache) == []


@pytest.mark.parametrize(
    "handle",
    ["http://", "https:///model/1", "http://[::1/m", "http://host:port/m", "http://host/my model",
     "http://host/mod\u00e8le"],
)  # fmt: skip
def test_what_is_no_address(cache, handle):
    with pytest.raises(ValueError, match=f"Received: handle={re.escape(repr(handle))}"):
        resolve(handle)
    assert names_in(cache) == []


@pytest.mark.parametrize(
    "handle",
    [
        "http://user:secret@host/m",
        "http://secret@host/m",
        "https://user:sec/ret@host/m",
        "http://user:secret@host:port/m",
        "http://user:secret@[::1/m",
        "ftp://user:secret@host/m",
    ],
)
def test_a_password_is_refused_and_not_shown(cache, handle):
    with pytest.raises(ValueError, match=r"Received: handle='\w+://\*\*\*@") as caught:
        resolve(handle)
    assert "secret" not in str(caught.value)
    assert "ret@" not in str(caught.value)
    assert names_in(cache) == []


def test_an_at_sign_in_a_path_is_no_password(server, cache):
    handle = server.script("/@me/m@2", status(404))
    with pytest.raises(OSError, match=f"Received: handle={re.escape(repr(handle))}"):
        resolve(handle)


def test_a_proxy_from_the_environment(server, cache, monkeypatch):
    proxy = server.script("http://model.invalid/m", ok(DATA)).removesuffix("http://model.invalid/m")
    monkeypatch.setenv("http_proxy", proxy)
    assert tree(resolve("http://model.invalid/m")) == MODEL
    assert server.requests == ["http://model.invalid/m?tf-hub-format=compressed"]


def test_a_certificate_is_checked_unless_that_is_switched_off(server, cache, monkeypatch, tmp_path):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the command openssl to make a certificate")
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost",
         "-days", "1", "-keyout", tmp_path / "key", "-out", tmp_path / "cert"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    handle = server.script("/m", ok(DATA)).replace("http:", "https:")
    with pytest.raises(OSError, match="certificate verify failed"):
        resolve(handle)
    monkeypatch.setenv("TFHUB_DISABLE_CERT_VALIDATION", "true")
    assert tree(resolve(handle)) == MODEL


@pytest.mark.parametrize("phase", ["archive", "variables.data-00000-of-00001"])
def test_a_full_disk(server, cache, monkeypatch, phase):
    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, block):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real_open = Path.open

    def open_full(path, mode="r", *args, **kwargs):
        file = real_open(path, mode, *args, **kwargs)
        return Full(file) if path.name == phase and mode[0] in "wx" else file

    monkeypatch.setattr(Path, "open", open_full)
    handle = server.script("/m", ok(DATA))
    with pytest.raises(OSError, match="No space left on device.*Make room") as caught:
        resolve(handle)
    assert caught.value.errno == errno.ENOSPC
    assert f"handle={handle!r}" in str(caught.value)
    assert names_in(cache) == []
    assert len(server.requests) == 1
    monkeypatch.undo()
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(cache))
    assert tree(resolve(handle)) == MODEL


@pytest.mark.parametrize("phase", ["download", "unpacking"])
def test_an_interruption_leaves_nothing(server, cache, monkeypatch, phase):
    handle = server.script("/m", ok(DATA))
    seen = []

    def interrupt(*_):
        seen.extend(names_in(cache))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if phase == "download":
            patch.setattr(downloads._Progress, "show", interrupt)
        else:
            patch.setattr(downloads.archives, "unpack_module", interrupt)
        with pytest.raises(KeyboardInterrupt):
            resolve(handle)
    assert len(seen) == 1, "there was something to leave"
    assert names_in(cache) == []
    assert tree(resolve(handle)) == MODEL


def test_progress_in_a_terminal(server, cache, terminal, monkeypatch):
    monkeypatch.setattr(downloads, "_SECONDS_BETWEEN_LINES", 0.0)
    written = terminal()
    resolve(server.script("/m", dripping(DATA, pieces=3, pause=0.05)))
    first, *lines = written.getvalue().split("\r")
    assert first == ""
    name = re.escape(f"127.0.0.1:{server.server_port}/m")
    form = re.compile(rf"{name}: (0\.\d) MB of 0\.3 MB, \d+ s left *\n?")
    amounts = [float(form.fullmatch(line)[1]) for line in lines]
    assert amounts == sorted(amounts)
    assert {0.1, 0.2, 0.3} <= set(amounts)
    assert lines[-1].rstrip(" \n").endswith("0.3 MB of 0.3 MB, 0 s left")
    assert lines[-1].endswith("\n")


def test_no_progress_elsewhere(server, cache, capsys):
    resolve(server.script("/m", ok(DATA)))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


# --- hosts that have moved ------------------------------------------------------------------------

BUCKET = "https://storage.googleapis.com/tfhub-modules"


@pytest.mark.parametrize(
    ("handle", "expected"),
    [
        (
            "https://tfhub.dev/google/nnlm-en-dim50/2",
            ("https://tfhub.dev/google/nnlm-en-dim50/2?tf-hub-format=compressed",
             f"{BUCKET}/google/nnlm-en-dim50/2.tar.gz?tf-hub-format=compressed"),
        ),
        (
            "http://www.tfhub.dev/google/nnlm-en-dim50/2/?lite=1",
            ("https://tfhub.dev/google/nnlm-en-dim50/2?lite=1&tf-hub-format=compressed",
             f"{BUCKET}/google/nnlm-en-dim50/2.tar.gz?tf-hub-format=compressed"),
        ),
        (
            "https://tfhub.dev/google/nnlm-en-dim50/2?tf-hub-format=compressed",
            ("https://tfhub.dev/google/nnlm-en-dim50/2?tf-hub-format=compressed",
             f"{BUCKET}/google/nnlm-en-dim50/2.tar.gz?tf-hub-format=compressed"),
        ),
        (
            "https://tfhub.dev/google/nnlm-en-dim50",  # the latest: no file of a bucket
            ("https://tfhub.dev/google/nnlm-en-dim50?tf-hub-format=compressed",),
        ),
        (
            "https://hub.tensorflow.google.cn/google/nnlm-en-dim50/2",
            ("https://gcs.tensorflow.google.cn/tfhub-modules/google/nnlm-en-dim50/2.tar.gz"
             "?tf-hub-format=compressed",),
        ),
        (
            "https://example.com/tfhub.dev/2",
            ("https://example.com/tfhub.dev/2?tf-hub-format=compressed",),
        ),
    ],
)  # fmt: skip
def test_where_an_archive_is_asked_for(handle, expected):
    assert addresses.addresses(handle) == expected


@pytest.fixture
def moved(server, monkeypatch):
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setitem(
        addresses.FORMER_HOSTS,
        "tfhub.dev",
        (here + "/hub/{path}", here + "/bucket/{path}.tar.gz"),
    )
    return server


def test_tfhub_dev_is_asked_first(moved, cache):
    kaggle = moved.script("/kaggle/nnlm", ok(DATA))
    moved.script("/hub/google/nnlm/2", redirect(kaggle))
    handle = "https://tfhub.dev/google/nnlm/2"
    folder = Path(resolve(handle))
    assert tree(folder) == MODEL
    assert folder.name == key_of(handle)
    assert moved.requests == ["/hub/google/nnlm/2?tf-hub-format=compressed", "/kaggle/nnlm"]


@pytest.mark.parametrize("trouble", [status(403), ok(b"<html>" * 500, content_type="text/html")])
def test_the_bucket_is_asked_where_tfhub_dev_fails(moved, cache, trouble):
    moved.script("/hub/google/nnlm/2", trouble)
    moved.script("/bucket/google/nnlm/2.tar.gz", ok(DATA))
    assert tree(resolve("https://tfhub.dev/google/nnlm/2")) == MODEL
    assert len(moved.requests) == 2


def test_what_can_no_longer_be_had_says_where_it_went(moved, cache):
    moved.script("/hub/google/nnlm/2", status(403))
    with pytest.raises(OSError, match="tfhub.dev has moved to Kaggle Models") as caught:
        resolve("https://tfhub.dev/google/nnlm/2")
    text = str(caught.value)
    assert "kaggle://google/bert/tensorFlow2/answer-equivalence-bem/1" in text
    assert "/hub/google/nnlm/2?tf-hub-format=compressed, but the server answered 403" in text
    assert (
        "/bucket/google/nnlm/2.tar.gz?tf-hub-format=compressed, but the server answered 404" in text
    )
    assert names_in(cache) == []
