"""Archives that were made to do harm, or came to it."""

import io
import re
import tarfile

import pytest

from keras_xfer.handles import resolve
from tests.handles.conftest import MODEL, archive_of, names_in, ok, tree


def member(name, kind=tarfile.REGTYPE, link="", content=b""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    return info, io.BytesIO(content)


def attack(*members):
    """A sound archive with more members in its middle."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        tar.addfile(*member("saved_model.pb", content=b"graph"))
        for info, content in members:
            tar.addfile(info, content)
        tar.addfile(*member("variables/variables.index", content=b"index"))
    return stream.getvalue()


ATTACKS = {
    "parent": [member("../outside.txt", content=b"!")],
    "parent in the middle": [member("variables/../../outside.txt", content=b"!")],
    "parent folder": [member("../outside.txt", tarfile.DIRTYPE)],
    "absolute": [member("OUTSIDE", content=b"!")],
    "symbolic link": [member("out", tarfile.SYMTYPE, "..")],
    "file through a link": [
        member("out", tarfile.SYMTYPE, "OUTSIDE_FOLDER"), member("out/outside.txt", content=b"!")],
    "hard link": [member("out", tarfile.LNKTYPE, "OUTSIDE_SECRET")],
    "hard link inside": [member("out", tarfile.LNKTYPE, "saved_model.pb")],
    "character device": [member("null", tarfile.CHRTYPE)],
    "block device": [member("disk", tarfile.BLKTYPE)],
    "fifo": [member("pipe", tarfile.FIFOTYPE)],
    "contiguous unknown type": [member("odd", b"Z")],
    "duplicate": [member("saved_model.pb", content=b"!")],
    "duplicate otherwise written": [member("./saved_model.pb", content=b"!")],
    "file for a folder": [member("a/b", content=b"1"), member("a", content=b"!")],
    "folder for a file": [member("a", content=b"1"), member("a/b", content=b"!")],
    "the folder itself": [member(".", content=b"!")],
}  # fmt: skip


@pytest.mark.parametrize("way", ["local", "http"])
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_leaves_everything_clean(tmp_path, cache, server, name, way):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    places = {
        "OUTSIDE": outside / "outside.txt",
        "OUTSIDE_FOLDER": outside,
        "OUTSIDE_SECRET": outside / "secret",
    }
    members = []
    for info, content in ATTACKS[name]:
        info = tarfile.TarInfo.frombuf(info.tobuf(), "utf-8", "strict")
        info.name = str(places.get(info.name, info.name))
        info.linkname = str(places.get(info.linkname, info.linkname))
        members.append((info, io.BytesIO(content.getvalue())))
    data = attack(*members)
    if way == "local":
        handle = str(tmp_path / "attack.tar.gz")
        (tmp_path / "attack.tar.gz").write_bytes(data)
    else:
        handle = server.script("/attack", ok(data))
    culprit = members[-1][0].name if "through" not in name else "out"
    with pytest.raises(OSError, match=re.escape(f"its member {culprit!r} ")) as caught:
        resolve(handle)
    assert ("is a link to" in str(caught.value)) == ("link" in name)
    assert tree(outside) == {"secret": b"secret"}
    assert names_in(cache) == []
    assert sorted(each.name for each in tmp_path.iterdir() if each.suffix != ".gz") == [
        "cache", "outside"
    ]  # fmt: skip
    assert len(server.requests) == (way == "http"), "an archive is not refused by chance"


def test_folders_may_stand_twice(tmp_path, cache):
    archive = tmp_path / "m.tar.gz"
    archive.write_bytes(
        attack(member("variables", tarfile.DIRTYPE), member("./variables/", tarfile.DIRTYPE))
    )
    assert set(tree(resolve(archive))) == {"saved_model.pb", "variables/variables.index"}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_a_truncated_archive_is_refused_wherever_it_ends(tmp_path, cache, mode):
    small = {"saved_model.pb": b"graph", "variables/variables.index": b"x" * 1000}
    data = archive_of(small, mode)
    # A plain archive is whole with its first block of zeros: what follows pads it.
    whole = 512 * (1 + 1 + 1 + 2) + 512 if mode == "w" else len(data)
    step = 128 if mode == "w" else 7
    archive = tmp_path / "m.tar"
    for keep in [*range(0, whole - 1, step), whole - 1]:
        archive.write_bytes(data[:keep])
        with pytest.raises(OSError, match="Expected a (whole )?tar archive"):
            resolve(archive)
        assert names_in(cache) == [], keep
    archive.write_bytes(data[:whole])
    assert tree(resolve(archive)) == small


def test_a_damaged_archive_is_refused(tmp_path, cache):
    data = bytearray(archive_of(MODEL))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "m.tar.gz").write_bytes(data)
    with pytest.raises(OSError, match="ends too early or is damaged"):
        resolve(tmp_path / "m.tar.gz")
    assert names_in(cache) == []
