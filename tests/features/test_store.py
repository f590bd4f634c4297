"""The folder of the cache: whose it is, what in it is damaged, who may remove what."""

import errno
import gc
import json
import multiprocessing
import os
import stat
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_xfer import files
from keras_xfer.features.cache import FeatureCache
from keras_xfer.features.store import MARKER, Store

X = np.arange(80, dtype="float32").reshape(20, 4)
Y = np.arange(20)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr("keras_xfer.features.manifest._MOST_ROWS", 6)


def extractor():
    return keras.Sequential([keras.Input((4,)), keras.layers.Rescaling(3.0)])


def features(folder, **kwargs):
    return FeatureCache(folder, **kwargs).features(extractor(), (X, Y), batch_size=6)


def check(data):
    batches = [data[i] for i in range(len(data))]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), 3 * X)
    assert np.concatenate([y for _, y in batches]).tolist() == Y.tolist()


@pytest.fixture
def rows_computed(monkeypatch):
    """The rows that are computed from now on."""
    counted = []
    original = keras.Model.predict_on_batch

    def counting(self, x):
        counted.extend((x[:, 0] // 4).astype(int).tolist())
        return original(self, x)

    monkeypatch.setattr(keras.Model, "predict_on_batch", counting)
    return counted


@pytest.fixture(scope="module")
def processes():
    """Starts processes, forked from one that has imported Keras."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.features.killed_extraction"])
    return context


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def truncate(path):
    os.truncate(path, path.stat().st_size - 5)


# Damage


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink, lambda path: path.write_text("")])
def test_a_damaged_shard_is_named_and_it_alone_is_computed_again(tmp_path, damage, rows_computed):
    features(tmp_path)
    rows_computed.clear()
    damage(only(tmp_path, "*/features-0-view-0-00001.npy"))
    with pytest.warns(UserWarning, match="features-0-view-0-00001.npy") as warned:
        check(features(tmp_path))
    assert len([each for each in warned if each.category is UserWarning]) == 1
    assert sorted(set(rows_computed)) == [6, 7, 8, 9, 10, 11]
    rows_computed.clear()
    check(features(tmp_path))
    assert rows_computed == []


def test_damaged_labels_cost_no_computation(tmp_path, rows_computed):
    features(tmp_path)
    rows_computed.clear()
    flip(only(tmp_path, "*/rest-0-00002.npy"))
    with pytest.warns(UserWarning, match="rest-0-00002.npy"):
        check(features(tmp_path))
    assert rows_computed == []


def edit(path):
    manifest = json.loads(path.read_text())
    manifest["feature_leaves"][0]["dtype"] = "int32"
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", [truncate, edit, lambda path: path.write_text("[]")])
def test_a_damaged_manifest_is_named_and_all_is_computed_again(tmp_path, damage):
    features(tmp_path)
    damage(only(tmp_path, "*/manifest.json"))
    assert FeatureCache(tmp_path).info().table.rows[0][1] == "damaged"
    with pytest.warns(UserWarning, match="manifest.json.*damaged"):
        check(features(tmp_path))
    assert FeatureCache(tmp_path).info().table.rows[0][-1] == "yes"


def test_what_a_pickle_says_is_never_read(tmp_path):
    features(tmp_path)
    path = only(tmp_path, "*/rest-0-00000.npy")
    np.save(path, np.array([print] * 6, dtype=object), allow_pickle=True)
    entry, manifest = path.parent, json.loads((path.parent / "manifest.json").read_text())
    manifest.pop("sha256")
    manifest["shards"]["0"]["files"][path.name] = [path.stat().st_size, files.sha256(path)]
    from keras_xfer.features import digests

    manifest["sha256"] = digests.of_json(manifest)
    (entry / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="Python objects"):
        features(tmp_path)


# Whose folder


def test_a_folder_of_another_version_is_refused(tmp_path):
    features(tmp_path)
    (tmp_path / MARKER).write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 1.*format 99.*choose another"):
        FeatureCache(tmp_path)
    (tmp_path / MARKER).write_text("?")
    with pytest.raises(ValueError, match="damaged"):
        FeatureCache(tmp_path)


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="'thesis.tex'.*new folder"):
        FeatureCache(tmp_path)
    with pytest.raises(NotADirectoryError, match="thesis.tex"):
        FeatureCache(tmp_path / "thesis.tex")


def test_no_folder_is_made_before_it_is_needed(tmp_path):
    cache = FeatureCache(tmp_path / "deep" / "cache")
    assert cache.info().total_bytes == 0
    assert cache.clear() == (0, ())
    assert not (tmp_path / "deep").exists()
    check(cache.features(extractor(), (X, Y), batch_size=6))


# A full disk, a folder that cannot be written


def test_a_full_disk_says_so_and_keeps_what_is_complete(tmp_path, monkeypatch, rows_computed):
    original = Path.write_bytes

    def full(self, content):
        if "00002.npy" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        OSError, match="Expected room for [0-9,]+ bytes.*disk is full.*bytes free"
    ) as e:
        features(tmp_path)
    assert e.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(e.value)
    monkeypatch.setattr(Path, "write_bytes", original)
    rows_computed.clear()
    check(features(tmp_path))
    assert {12, 17} <= set(rows_computed) <= set(range(12, 20))


def limited(folder, sender):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))
    try:
        FeatureCache(folder).features(extractor(), np.zeros((20_000, 4), "float32"))
    except OSError as error:
        sender.send(str(error))
    sender.close()


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_limit_on_files_says_so(tmp_path, processes):
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=limited, args=(tmp_path, sender), daemon=True)
    process.start()
    sender.close()
    assert "Expected room for" in receiver.recv()
    process.join(60)


def read_only(folder, monkeypatch):
    """Let nothing be written in `folder`, whoever asks: modes do not bind the superuser."""
    paths = [*folder.rglob("*"), folder]
    for path in paths:
        path.chmod(stat.S_IRUSR | (stat.S_IXUSR if path.is_dir() else 0))
    if not os.access(folder, os.W_OK):
        return
    opened, path_open = os.open, Path.open

    def refused(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(folder)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *args, **kwargs)

    def touch(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    def path_refused(path, mode="r", *args, **kwargs):
        return touch() if set(mode) & set("wxa+") else path_open(path, mode, *args, **kwargs)

    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr(os, "utime", touch)
    monkeypatch.setattr(Path, "open", path_refused)


def test_a_folder_that_can_only_be_read(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    features(folder)
    with monkeypatch.context() as patched:
        read_only(folder, patched)
        data = features(folder)
        with pytest.raises(OSError, match="can be written.*another directory"):
            FeatureCache(folder).features(extractor(), X)
    check(data)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)


# Who may remove what


def hold_open(folder, ready, done):
    data = features(folder)
    ready.set()
    done.wait(60)
    check(data)


@pytest.mark.skipif(os.name != "posix", reason="fcntl")
def test_what_another_process_has_open_is_not_removed(tmp_path, processes):
    ready, done = processes.Event(), processes.Event()
    process = processes.Process(target=hold_open, args=(tmp_path, ready, done), daemon=True)
    process.start()
    try:
        assert ready.wait(120)
        cache = FeatureCache(tmp_path, max_bytes=4000)
        (kept,) = cache.clear().kept
        big = np.zeros((200, 4), "float32")
        with pytest.raises(ValueError, match="is open"):
            cache.features(extractor(), big)
        assert [each.key for each in Store(tmp_path).stored() if each.key == kept]
    finally:
        done.set()
        process.join(60)
    assert process.exitcode == 0
    cache.features(extractor(), big)
    assert kept not in [each.key for each in Store(tmp_path).stored()]


def test_one_that_is_dropped_is_no_longer_open(tmp_path):
    data = features(tmp_path)
    cache = FeatureCache(tmp_path)
    assert len(cache.clear().kept) == 1
    del data
    gc.collect()
    assert cache.clear().kept == ()
    assert cache.info().total_bytes == 0


def test_what_dead_processes_left_goes(tmp_path):
    data = features(tmp_path)
    entry = only(tmp_path, "*/manifest.json").parent
    path = entry / "features-0-view-0-00001.npy"
    path.unlink()
    (entry / ".features-0-view-0-00001.npy.tmp-0-1-2.npy").write_text("half")
    (tmp_path / ".removed-1").mkdir()
    with pytest.warns(UserWarning, match="00001"):
        check(features(tmp_path))
    assert not list(tmp_path.rglob(".*tmp-*"))
    assert not (tmp_path / ".removed-1").exists()
    check(data)


def test_an_entry_that_vanishes_while_it_is_listed_is_no_error(tmp_path, monkeypatch):
    features(tmp_path)
    listed = Path.iterdir

    def vanishing(self):
        if len(self.name) == 64:
            raise FileNotFoundError
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", vanishing)
    assert Store(tmp_path).stored() == []
