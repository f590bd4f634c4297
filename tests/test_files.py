"""Atomic files: old content or new, never a part; left-overs go, work in progress stays."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_xfer import files

_FLOATS = st.floats(allow_nan=True, allow_infinity=True)


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def _child(code, *arguments):
    """Runs `code` in a process of its own and returns how it ended."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(files.__file__).parents[1],
    )


@pytest.mark.parametrize("name", ["best.keras", "best.v2.weights.h5", "plain", "two words.json"])
def test_temporary_has_the_folder_and_the_full_suffix_of_its_target(tmp_path, name):
    with files.replacing(tmp_path / name) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.endswith("".join(Path(name).suffixes))
        assert not temporary.exists()
        temporary.write_text("new")
        assert not (tmp_path / name).exists()
    assert (tmp_path / name).read_text() == "new"
    assert _names(tmp_path) == [name]


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_content_and_no_temporary(tmp_path, exception):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write_half():
        with files.replacing(target) as temporary:
            temporary.write_text("ne")
            raise exception

    with pytest.raises(exception):
        write_half()
    assert target.read_text() == "old"
    assert _names(tmp_path) == ["a.txt"]


def test_a_failed_move_leaves_the_old_content_and_no_temporary(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(target, "new")
    assert target.read_text() == "old"
    assert _names(tmp_path) == ["a.txt"]


def test_file_then_folder_are_flushed_to_the_disk_around_the_move(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        events.append(("fsync", os.path.isdir(f"/proc/self/fd/{descriptor}")))  # noqa: PTH112
        fsync(descriptor)

    def record_replace(source, target):
        events.append(("replace", False))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    files.write_text(tmp_path / "a.txt", "new")
    assert events == [("fsync", False), ("replace", False), ("fsync", True)]


def test_several_files_are_complete_before_the_first_is_moved(tmp_path, monkeypatch):
    replace, seen = os.replace, []

    def record(source, target):
        seen.append((Path(target).name, sorted(p.read_text() for p in tmp_path.glob(".*"))))
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    with files.replacing_all(tmp_path / "a", tmp_path / "b") as (a, b):
        a.write_text("1")
        b.write_text("2")
    assert seen == [("a", ["1", "2"]), ("b", ["2"])]


@pytest.mark.parametrize("after", [False, True])
def test_interrupted_at_the_first_of_several_moves(tmp_path, monkeypatch, after):
    """Once the first is moved, the others are complete beside their targets, and stay."""
    replace = os.replace

    def interrupted(source, target):
        if after:
            replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)

    def write():
        with files.replacing_all(tmp_path / "a", tmp_path / "b") as (a, b):
            a.write_text("1")
            b.write_text("2")

    with pytest.raises(KeyboardInterrupt):
        write()
    left = [path.read_text() for path in files.temporaries(tmp_path / "b")]
    assert (left, (tmp_path / "a").exists()) == (["2"] if after else [], after)
    assert not files.temporaries(tmp_path / "a")


def test_a_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "real" / "file.txt")
    files.write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real" / "file.txt").read_text() == "new"


def test_errors_name_the_target_and_say_how_to_mend(tmp_path):
    missing = tmp_path / "missing" / "a.txt"
    with pytest.raises(FileNotFoundError, match=r"Create it.*Received: filepath=.*a\.txt"):
        files.write_text(missing, "new")
    with pytest.raises(FileNotFoundError, match="Create it"):
        files.check_writable(missing)
    with pytest.raises(IsADirectoryError, match="there is a folder"):
        files.write_text(tmp_path, "new")
    with (
        pytest.raises(FileNotFoundError, match="nothing was written"),
        files.replacing(tmp_path / "a.txt"),
    ):
        pass
    assert _names(tmp_path) == []


def test_unwritable_folder_fails_before_anything_is_computed(tmp_path, monkeypatch):
    def refuse(self, *_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)  # root may write anywhere, so chmod shows nothing
    with (
        pytest.raises(PermissionError, match="Cannot write in the folder"),
        files.replacing(tmp_path / "a.txt"),
    ):
        pytest.fail("the block ran")


def test_leftovers_of_the_dead_go_and_work_in_progress_stays(tmp_path):
    target = tmp_path / "best.keras"
    target.write_text("old")
    ended = _child(
        """
        import os, signal, sys
        from keras_xfer.files import replacing
        with replacing(sys.argv[1]) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        target,
    )
    assert ended.returncode == -signal.SIGKILL
    (left,) = files.temporaries(target)
    with files.replacing(target) as mine:
        mine.write_text("new")
        assert files.temporaries(target) == sorted([left, mine])
        assert files.remove_leftovers(target) == [left]
        assert mine.exists()
    assert files.remove_leftovers(tmp_path / "other.keras") == []
    assert _names(tmp_path) == ["best.keras"]


def test_temporary_of_another_living_process_stays(tmp_path):
    target = tmp_path / "a.txt"
    code = (
        "import sys\nfrom keras_xfer.files import replacing\n"
        "with replacing(sys.argv[1]) as t:\n"
        "    t.write_text('theirs'); print('writing', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(files.__file__).parents[1],
    ) as process:
        assert process.stdout.readline() == "writing\n"
        assert files.remove_leftovers(target) == []
        assert len(files.temporaries(target)) == 1
        process.communicate("")
    assert target.read_text() == "theirs"


def test_same_pid_in_a_new_container_is_told_by_its_token(tmp_path):
    target = tmp_path / "a.txt"
    with files.replacing(target) as mine:
        mine.write_text("new")
        earlier = tmp_path / (mine.name[: -len("0123456789abcdef.txt")] + "0123456789abcdef.txt")
        earlier.write_text("half")
        assert files.remove_leftovers(target) == [earlier]


def test_another_machine_is_given_a_day(tmp_path):
    target = tmp_path / "a.txt"
    foreign = tmp_path / ".a.txt.tmp-00000000-1-0123456789abcdef.txt"
    foreign.write_text("half")
    assert files.remove_leftovers(target) == []
    old = foreign.stat().st_mtime - 25 * 60 * 60
    os.utime(foreign, (old, old))
    assert files.remove_leftovers(target) == [foreign]


@given(st.dictionaries(st.text(), _FLOATS))
def test_floats_round_trip_through_valid_json(values):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = files.to_json(values)
    read = {k: float(v) for k, v in json.loads(text, parse_constant=refuse).items()}
    assert read.keys() == values.keys()
    for name, value in values.items():
        assert read[name] == value or (math.isnan(value) and math.isnan(read[name]))


def test_json_of_arrays_scalars_and_paths(tmp_path):
    value = {
        "f": np.float32(0.5),
        "i": np.int64(3),
        "a": np.array([[1.0, np.nan]]),
        "t": (1, None, True),
        "p": tmp_path,
        "n": "NaN",
    }
    files.write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "f": 0.5,
        "i": 3,
        "a": [[1.0, "NaN"]],
        "t": [1, None, True],
        "p": str(tmp_path),
        "n": "NaN",
    }
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"a": object()})
    assert _names(tmp_path) == ["a.json"]


def test_text_is_utf8_whatever_the_locale(tmp_path):
    files.write_text(tmp_path / "a.txt", "Katze, Löwe, 猫\n")
    assert (tmp_path / "a.txt").read_bytes() == "Katze, Löwe, 猫\n".encode()
