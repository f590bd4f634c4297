"""Folders and archives on this machine."""

import hashlib
import os
import re
from pathlib import Path

import pytest

from keras_xfer.handles import resolve
from tests.handles.conftest import MODEL, archive_of, names_in, tree, write


def test_a_folder_is_returned_as_it_is(tmp_path, cache):
    folder = write(tmp_path / "my model", MODEL)
    assert resolve(str(folder)) == str(folder)
    assert resolve(folder) == str(folder)
    assert names_in(cache) == []


def test_a_folder_by_way_of_home_and_relative(tmp_path, monkeypatch):
    folder = write(tmp_path / "home" / "model", MODEL)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert resolve("~/model") == str(folder)
    assert resolve(Path("~/model")) == str(folder)
    monkeypatch.chdir(tmp_path / "home")
    assert Path(resolve("model")).samefile(folder)
    assert Path(resolve("model")).is_absolute()


@pytest.mark.parametrize("form", ["file://{}", "file://localhost{}", "file:{}", "FILE://{}"])
def test_a_file_address(tmp_path, form):
    folder = write(tmp_path / "my mod%el #1", MODEL)
    quoted = str(folder).replace("%", "%25").replace(" ", "%20").replace("#", "%23")
    assert resolve(form.format(quoted)) == str(folder)


def test_a_file_address_of_another_machine(tmp_path):
    with pytest.raises(ValueError, match="names 'fileserver'.*Received: handle='file://fileserver"):
        resolve("file://fileserver/model")


@pytest.mark.parametrize("name", ["saved_model.pb", "saved_model.pbtxt", "tfhub_module.pb"])
def test_what_makes_a_folder_a_saved_model(tmp_path, name):
    assert resolve(write(tmp_path / "model", {name: b""})) == str(tmp_path / "model")


def test_a_folder_in_a_folder(tmp_path):
    outer = write(tmp_path / "export", {"1/saved_model.pb": b"", "notes/readme.txt": b""})
    assert resolve(outer) == str(outer / "1")
    write(outer, {"2/saved_model.pb": b""})
    with pytest.raises(OSError, match=r"there are 2 in this folder: 1/, 2/"):
        resolve(outer)


def test_names_do_not_command_the_terminal(tmp_path, cache):
    folder = write(tmp_path / "\x1b[31mred", {"\x1b[32mgreen": b""})
    for handle in (folder, folder / "none", folder / "\x1b[32mgreen"):
        with pytest.raises(OSError, match=r"Received: handle=") as caught:
            resolve(handle)
        assert str(caught.value).isprintable()
        assert r"\x1b[3" in str(caught.value)


def test_a_folder_without_a_saved_model_says_what_lies_there(tmp_path, cache):
    folder = write(tmp_path / "model", {"model.keras": b"", "variables/a": b""})
    with pytest.raises(OSError, match=r"are only: model.keras, variables/") as caught:
        resolve(folder)
    assert f"Received: handle={str(folder)!r}" in str(caught.value)
    assert str(cache) in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="there is nothing"):
        resolve(tmp_path / "empty")


def test_nothing_there(tmp_path):
    with pytest.raises(OSError, match=re.escape(f"at {tmp_path / 'model'}, but there is nothing")):
        resolve(tmp_path / "model")
    with pytest.raises(OSError, match="Give an address as a string"):
        resolve(Path("https://example.com/model"))


def test_the_file_in_the_folder(tmp_path):
    folder = write(tmp_path / "model", MODEL)
    with pytest.raises(OSError, match=re.escape(f"Give its folder, {folder}.")):
        resolve(folder / "saved_model.pb")


@pytest.mark.parametrize("handle", [None, 3, b"/model", ["model"]])
def test_neither_a_string_nor_a_path(handle):
    with pytest.raises(TypeError, match="`handle` must be a string or a path. Received: handle="):
        resolve(handle)


@pytest.mark.parametrize("handle", ["", "ftp://example.com/model", "tfhub://google/nnlm"])
def test_an_unknown_form_lists_the_known_ones(handle):
    with pytest.raises(
        ValueError, match="kaggle://owner/model/framework/variation.*gs://"
    ) as caught:
        resolve(handle)
    assert f"Received: handle={handle!r}" in str(caught.value)


# --- archives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["", "./", "model/", "./model/"])
@pytest.mark.parametrize(
    ("name", "mode"),
    [("m.tar.gz", "w:gz"), ("m.tgz", "w:gz"), ("m.tar", "w"), ("m.tar.xz", "w:xz"),
     ("m.tar.bz2", "w:bz2")],
)  # fmt: skip
def test_an_archive_is_unpacked(tmp_path, cache, name, mode, top):
    archive = tmp_path / name
    archive.write_bytes(archive_of(MODEL, mode, top))
    folder = Path(resolve(archive))
    assert tree(folder) == MODEL
    assert folder.parent == cache
    assert resolve(f"file://{archive}") == str(folder)
    key = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert names_in(cache) == [key, f"{key}.descriptor.txt", f"{key}.json"]


def test_an_archive_is_unpacked_once_and_anew_when_it_is_edited(tmp_path, cache):
    archive = tmp_path / "m.tar.gz"
    archive.write_bytes(archive_of(MODEL))
    first = Path(resolve(archive))
    before = (first / "saved_model.pb").stat().st_mtime_ns
    assert resolve(archive) == str(first)
    assert (first / "saved_model.pb").stat().st_mtime_ns == before
    archive.write_bytes(archive_of(MODEL | {"saved_model.pb": b"another"}))
    second = Path(resolve(archive))
    assert second != first
    assert (second / "saved_model.pb").read_bytes() == b"another"
    assert tree(first) == MODEL


def test_a_file_that_is_no_archive(tmp_path, cache):
    page = tmp_path / "m.tar.gz"
    page.write_bytes(b"<html>" + b"x" * 2000)
    with pytest.raises(OSError, match="Expected a tar archive.*but m.tar.gz is none"):
        resolve(page)
    assert names_in(cache) == []


def test_an_archive_without_a_saved_model(tmp_path, cache):
    archive = tmp_path / "m.tar.gz"
    archive.write_bytes(archive_of({"readme.txt": b"hello"}))
    with pytest.raises(OSError, match="are only: readme.txt"):
        resolve(archive)
    assert names_in(cache) == []


def test_the_pin_of_an_archive(tmp_path, cache):
    archive = tmp_path / "m.tar.gz"
    archive.write_bytes(archive_of(MODEL))
    right = hashlib.sha256(archive.read_bytes()).hexdigest()
    with pytest.raises(OSError, match=f"SHA-256 is {'0' * 64}, but that of .* is {right}"):
        resolve(archive, sha256="0" * 64)
    assert names_in(cache) == []
    assert tree(resolve(archive, sha256=right.upper())) == MODEL


@pytest.mark.parametrize("sha256", ["", "0" * 63, "g" * 64, " " + "0" * 64, 7])
def test_a_pin_that_is_no_number(tmp_path, sha256):
    with pytest.raises(
        ValueError, match="`sha256` must be 64 hexadecimal digits.*Received: sha256="
    ):
        resolve(write(tmp_path / "m", MODEL), sha256=sha256)


def test_a_folder_cannot_be_pinned(tmp_path):
    with pytest.raises(ValueError, match="`sha256` pins an archive"):
        resolve(write(tmp_path / "m", MODEL), sha256="0" * 64)


def test_files_get_the_modes_of_new_files(tmp_path, cache):
    import io
    import tarfile

    archive = tmp_path / "m.tar"
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo("saved_model.pb")
        member.mode = 0o6777  # set user and group id
        tar.addfile(member, io.BytesIO())
    plain = tmp_path / "plain"
    plain.touch()
    mode = os.stat(Path(resolve(archive)) / "saved_model.pb").st_mode  # noqa: PTH116
    assert mode == plain.stat().st_mode
