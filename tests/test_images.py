import json
import os
import struct
import subprocess
import sys
import unicodedata
import zlib

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from sklearn.utils.class_weight import compute_class_weight

from keras_xfer.images import (
    ImageDataset,
    ImageFolderError,
    ImageReadError,
    Sample,
    Skipped,
    class_weights,
    list_images,
    load_image,
    pixels,
    readable_images,
    scan,
)


def gradient(width, height):
    """A smooth colour picture in which every corner differs, so that any turn or flip shows."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return np.stack([255 * x, 255 * y, 255 * (1 - x) * y], -1).round().astype("uint8")


def write(path, width=12, height=9, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(gradient(width, height)).save(path, **kwargs)
    return path


def fill(root, counts, suffix=".png"):
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            write(root / name / f"{i}{suffix}")
    return root


def names(folder, samples):
    return [sample.path.relative_to(folder).as_posix() for sample in samples]


# Layouts


def test_one_folder_a_class(tmp_path):
    fill(tmp_path, {"dog": 10, "cat": 5})
    found = scan(tmp_path)
    assert found.class_names == ("cat", "dog")
    assert found.counts() == {"train": [4, 8], "validation": [1, 2], "test": [0, 0]}
    for sample in found.train + found.validation:
        assert sample.path.parent.name == found.class_names[sample.label]
    assert found.skipped == ()


@pytest.mark.parametrize("validation", ["validation", "val", "valid", "Val"])
def test_one_folder_a_split(tmp_path, validation):
    for split, count in (("train", 3), (validation, 2), ("test", 1)):
        fill(tmp_path / split, {"a": count, "b": count})
    found = scan(tmp_path, validation_split=0.5, test_split=0.4)
    assert found.counts() == {"train": [3, 3], "validation": [2, 2], "test": [1, 1]}
    assert {name.split("/")[0] for name in names(tmp_path, found.validation)} == {validation}


def test_all_splits_as_datasets(tmp_path):
    fill(tmp_path, {"a": 10, "b": 10})
    found = scan(tmp_path, validation_split=0.2)
    train, validation, test = found.datasets(8, batch_size=4, seed=3)
    assert (len(train.files), len(validation.files), test) == (16, 4, None)
    assert train.order.tolist() == found.dataset("train", 8, shuffle=True, seed=3).order.tolist()
    assert validation.order.tolist() == [0, 1, 2, 3]  # as they are listed
    assert train[0][0].shape == (4, 8, 8, 3)
    assert not found.datasets(8, shuffle=False)[0].shuffle


def test_splits_have_other_names_too(tmp_path):
    fill(tmp_path / "Training", {"a": 5, "b": 5})
    fill(tmp_path / "testing", {"a": 2, "b": 2})
    found = scan(tmp_path)
    assert found.counts() == {"train": [4, 4], "validation": [1, 1], "test": [2, 2]}
    assert all(name.startswith("testing/") for name in names(tmp_path, found.test))


def test_validation_is_drawn_from_train_where_only_test_is_given(tmp_path):
    fill(tmp_path / "train", {"a": 5, "b": 5})
    fill(tmp_path / "test", {"a": 2, "b": 2})
    found = scan(tmp_path)
    assert found.counts() == {"train": [4, 4], "validation": [1, 1], "test": [2, 2]}
    assert all(name.startswith("train/") for name in names(tmp_path, found.validation))


@pytest.mark.parametrize(
    "counts",
    [
        {"test": 3, "cat": 3},
        {"train": 3, "bus": 3},
        {"test": 2, "validation": 2},
        {"test/nested": 3, "cat": 3},
    ],
)
def test_a_class_may_be_called_like_a_split(tmp_path, counts):
    fill(tmp_path, counts)
    expected = sorted({name.split("/")[0] for name in counts})
    assert list(scan(tmp_path, validation_split=0).class_names) == expected


def test_a_stray_image_makes_no_class_of_a_split(tmp_path):
    fill(tmp_path, {"train/a": 2, "train/b": 2, "train": 1, "val/a": 1, "val/b": 1, "val": 1})
    found = scan(tmp_path)
    assert found.counts() == {"train": [2, 2], "validation": [1, 1], "test": [0, 0]}
    assert found.skipped == (
        ("train/0.png", "outside every class folder"),
        ("val/0.png", "outside every class folder"),
    )


def test_subfolders_belong_to_their_class(tmp_path):
    fill(tmp_path, {"a/one": 1, "a/two/deep": 1, "b": 2})
    found = scan(tmp_path, validation_split=0)
    assert names(tmp_path, found.train) == ["a/one/0.png", "a/two/deep/0.png", "b/0.png", "b/1.png"]


def test_links_to_folders_are_followed_once(tmp_path):
    fill(tmp_path / "elsewhere", {"dogs": 2})
    root = fill(tmp_path / "root", {"cat": 2})
    (root / "dog").symlink_to(tmp_path / "elsewhere" / "dogs")
    (root / "cat" / "loop").symlink_to(root / "cat")
    found = scan(root, validation_split=0)
    assert found.counts()["train"] == [2, 2]


def test_hidden_files_litter_and_other_files_are_ignored(tmp_path):
    fill(tmp_path, {"a": 2, "b": 2, ".cache": 1, "__MACOSX": 1})
    for name in ("a/Thumbs.db", "a/.DS_Store", "b/notes.txt", "a/._0.png", "b/.hidden/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = scan(tmp_path, validation_split=0)
    assert found.class_names == ("a", "b")
    assert found.skipped == ()


def test_extensions_in_capitals_count(tmp_path):
    for name in ("a/0.JPG", "a/1.Jpeg", "b/0.PNG", "b/1.WEBP"):
        write(tmp_path / name)
    assert scan(tmp_path, validation_split=0).counts()["train"] == [2, 2]


def test_one_name_in_two_classes_and_with_two_extensions(tmp_path):
    for name in ("cat/1.jpg", "cat/1.png", "dog/1.jpg", "dog/1.JPG"):
        write(tmp_path / name)
    data = scan(tmp_path, validation_split=0).dataset("train", 8)
    assert data.files == ["cat/1.jpg", "cat/1.png", "dog/1.JPG", "dog/1.jpg"]


def test_class_names_with_spaces_and_other_letters(tmp_path):
    decomposed = unicodedata.normalize("NFD", "Äpfel süß")
    fill(tmp_path, {"猫": 2, decomposed: 2, "hot dog": 2, "#1 & <b>": 2})
    found = scan(tmp_path, validation_split=0)
    assert found.class_names == ("#1 & <b>", "hot dog", "Äpfel süß", "猫")
    assert all(sample.path.exists() for sample in found.train)


def test_split_folders_may_write_accents_differently(tmp_path):
    fill(tmp_path / "train", {"é": 2, "b": 2})
    fill(tmp_path / "val", {unicodedata.normalize("NFD", "é"): 2, "b": 2})
    assert scan(tmp_path).counts()["validation"] == [2, 2]


# Bad folders: one line that says what, where and how to mend it


def missing(root):
    return root / "nowhere", r"No such folder: .*nowhere.*Check the path"


def a_file(root):
    return write(root / "x.png"), r"is a file. Give the folder"


def no_class_folders(root):
    return write(root / "only.png").parent, r"No class folders in .*Sort the images"


def one_class(root):
    return fill(root, {"cat": 3}), r"Only one class in .*'cat'.*add another class"


def no_images(root):
    return fill(root, {"a": 0, "b": 0}), r"No readable image in 'a', 'b' of"


def an_empty_class(root):
    return fill(root, {"a": 3, "b": 0}), r"No readable image in 'b' of .*Add images to it"


def an_empty_class_after_skipping(root):
    fill(root, {"a": 3, "b": 0})
    (root / "b" / "0.jpg").write_text("text")
    return root, r"No readable image in 'b' of .*\(1 skipped, such as 'b/0.jpg': not a JPEG"


def an_empty_class_in_validation(root):
    fill(root, {"train/a": 3, "train/b": 3, "val/a": 3, "val/b": 0})
    return root, r"No readable image in 'val/b' of"


def other_classes_in_test(root):
    fill(root, {"train/a": 3, "train/b": 3, "test/a": 3, "test/c": 3})
    return root, r"same classes in .*train.* and .*test.* lacks 'b' and has besides 'c'"


def splits_without_classes(root):
    fill(root, {"train": 3, "test": 3})
    return (
        root,
        r"No class folders in .*train': expected one folder a class.*a table of labels is not",
    )


def a_test_without_classes(root):
    fill(root, {"train/a": 3, "train/b": 3, "test": 3})
    return root, r"No class folders in .*test': expected those of .*train'.*keras-xfer predict"


def no_train(root):
    fill(root, {"val/a": 1, "val/b": 1, "test/a": 1, "test/b": 1})
    return root, r"holds 'test' but no 'train'"


def splits_and_more(root):
    fill(root, {"train/a": 1, "train/b": 1, "unlabelled": 3})
    return root, r"holds both 'train' and 'unlabelled'.*Move 'unlabelled' elsewhere"


def two_validations(root):
    fill(root, {"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 1, "valid/a": 1, "valid/b": 1})
    return root, r"several folders for the validation split: 'val', 'valid'"


def too_few(root):
    return fill(root, {"a": 1, "b": 1}), r"No image is left for the validation split"


def one_name_twice(root):
    fill(root, {"é": 2, unicodedata.normalize("NFD", "é"): 2})
    return root, r"Two class folders in .*Merge them"


def not_utf8(root):
    fill(root, {"a": 2, "b": 2})
    (root / os.fsdecode(b"\xff")).mkdir()
    return root, r"is not valid UTF-8. Rename it"


@pytest.mark.parametrize(
    "case",
    [
        missing,
        a_file,
        no_class_folders,
        one_class,
        no_images,
        an_empty_class,
        an_empty_class_after_skipping,
        an_empty_class_in_validation,
        other_classes_in_test,
        splits_without_classes,
        a_test_without_classes,
        no_train,
        splits_and_more,
        two_validations,
        too_few,
        one_name_twice,
        not_utf8,
    ],
)
def test_a_folder_that_cannot_be_trained_on(tmp_path, case):
    folder, message = case(tmp_path)
    with pytest.raises(ImageFolderError, match=message) as caught:
        scan(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert text.encode()  # can be printed


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_without_read_permission(tmp_path):
    fill(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "b").chmod(0)
    try:
        with pytest.raises(ImageFolderError, match=r"Cannot read .*b.*Permission denied"):
            scan(tmp_path)
    finally:
        (tmp_path / "b").chmod(0o700)


def test_a_folder_that_the_system_will_not_list(tmp_path, monkeypatch):
    fill(tmp_path, {"a": 2, "b": 2})
    real = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("b"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ImageFolderError, match=r"Cannot read .*b.*Permission denied"):
        scan(tmp_path)


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0), (0, -0.1), (1, 0), (0.5, 0.5)])
def test_impossible_fractions(tmp_path, validation, test):
    with pytest.raises(ValueError, match=f"Received: validation_split={validation}"):
        scan(tmp_path, validation_split=validation, test_split=test)


# Unreadable files


def png_bomb(path):
    """A PNG of 20 gigapixels in its header."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 200_000, 100_000, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 99)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_unreadable_files_are_skipped_with_a_reason(tmp_path):
    fill(tmp_path, {"a": 3, "b": 3})
    jpeg = write(tmp_path / "whole.jpg", 400, 300).read_bytes()
    png = write(tmp_path / "whole.png", 400, 300).read_bytes()
    gif = write(tmp_path / "whole.gif", 400, 300).read_bytes()
    webp = write(tmp_path / "whole.webp", 400, 300).read_bytes()
    bmp = write(tmp_path / "whole.bmp", 400, 300).read_bytes()
    bad = tmp_path / "b"
    for name, data in {
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut_at_the_end.jpg": jpeg[:-200],
        "cut.png": png[: len(png) // 2],
        "cut.gif": gif[: len(gif) // 2],
        "cut.webp": webp[: len(webp) // 2],
        "cut.bmp": bmp[: len(bmp) // 2],
        "empty.jpg": b"",
        "text.jpg": b"not an image at all",
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }.items():
        (bad / name).write_bytes(data)
    png_bomb(bad / "bomb.png")
    (bad / "folder.jpg").mkdir()
    (bad / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(bad / "pipe.jpg")
    (bad / "photo.heic").write_bytes(b"x")
    (tmp_path / "b" / os.fsdecode(b"\xff.png")).write_bytes(png)

    found = scan(tmp_path, validation_split=0)
    assert found.counts()["train"] == [3, 3]
    reasons = dict(found.skipped)
    for name in ("cut.jpg", "cut_at_the_end.jpg", "cut.png", "cut.gif", "cut.webp", "cut.bmp"):
        assert reasons.pop(f"b/{name}").startswith("damaged: "), name
    assert "pixels" in reasons.pop("b/bomb.png")
    outside = {f"whole.{kind}" for kind in ("jpg", "png", "gif", "webp", "bmp")}
    assert {reasons.pop(name) for name in outside} == {"outside every class folder"}
    assert reasons == {
        "b/empty.jpg": "empty file",
        "b/text.jpg": "not a JPEG, PNG, BMP, GIF or WebP image",
        "b/postscript.jpg": "not a JPEG, PNG, BMP, GIF or WebP image",
        "b/folder.jpg": "a folder, not an image",
        "b/link.jpg": "broken link",
        "b/pipe.jpg": "not a regular file",
        "b/photo.heic": "HEIC is not read: convert it to JPEG or PNG",
        "b/\\xff.png": "file name is not valid UTF-8",
    }
    assert found.skipped == tuple(sorted(found.skipped))
    assert all("\n" not in line for skipped in found.skipped for line in skipped)


def test_a_file_without_read_permission(tmp_path, monkeypatch):
    path = write(tmp_path / "a.png")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pixels.Image, "open", refuse)
    assert readable_images([path], root=tmp_path) == ([], [Skipped("a.png", "Permission denied")])


def test_an_image_of_more_pixels_than_pillow_allows(tmp_path, monkeypatch):
    path = write(tmp_path / "a.png", 40, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow itself only warns below 2000
    readable, skipped = readable_images([path])
    assert readable == []
    assert skipped[0].reason == "40x30: more than 1000 pixels"


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "WEBP"]))
def test_no_damaged_file_crashes(tmp_path_factory, data, kind):
    path = tmp_path_factory.mktemp("fuzz") / "x.jpg"
    Image.fromarray(gradient(20, 15)).save(path, kind)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    readable, skipped = readable_images([path])
    assert len(readable) + len(skipped) == 1


def test_progress_is_told_of_every_file(tmp_path):
    fill(tmp_path, {"a": 3, "b": 4})
    calls = []
    scan(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 7) for i in range(1, 8)]


# The split


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("many"), {"a": 23, "b": 7, "c": 2, "d": 1}, ".bmp")


@settings(max_examples=40, deadline=None)
@given(
    validation=st.floats(0.01, 0.6),
    test=st.one_of(st.just(0.0), st.floats(0.01, 0.39)),
    seed=st.integers(0, 2**31),
)
def test_every_image_is_in_one_split_and_each_class_gives_its_share(many, validation, test, seed):
    found = scan(many, validation_split=validation, test_split=test, seed=seed)
    paths = [sample.path for sample in found.train + found.validation + found.test]
    assert sorted(paths) == sorted(many.rglob("*.bmp"))
    counts = found.counts()
    for label, total in enumerate((23, 7, 2, 1)):
        assert counts["train"][label] >= 1
        assert abs(counts["validation"][label] - total * validation) < 1
        assert abs(counts["test"][label] - total * test) < 1
    assert counts["train"][2] == 1  # of two images one is held out


def test_the_split_depends_on_the_seed_alone(many):
    script = (
        "import json, os, random, sys\n"
        "real = os.walk\n"
        "def walk(*args, **kwargs):\n"
        "    for parent, folders, files in real(*args, **kwargs):\n"
        "        random.shuffle(files)\n"
        "        yield parent, folders, files\n"
        "os.walk = walk\n"
        "from keras_xfer.images import scan\n"
        "found = scan(sys.argv[1], seed=7)\n"
        "print(json.dumps([str(sample.path) for sample in found.validation]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, many], capture_output=True, text=True, check=True
    )
    own = [str(sample.path) for sample in scan(many, seed=7).validation]
    assert json.loads(done.stdout.splitlines()[-1]) == own
    assert own != [str(sample.path) for sample in scan(many, seed=8).validation]


def test_a_new_class_moves_no_other_classes_images(tmp_path):
    fill(tmp_path, {"b": 20, "c": 20})
    before = names(tmp_path, scan(tmp_path).validation)
    fill(tmp_path, {"a": 20})
    after = names(tmp_path, scan(tmp_path).validation)
    assert [name for name in after if not name.startswith("a/")] == before


def test_no_split_where_none_is_asked_for(many):
    assert scan(many, validation_split=0).counts()["train"] == [23, 7, 2, 1]


def test_the_fingerprint_tells_images_that_were_replaced(tmp_path):
    fill(tmp_path, {"cat": 3, "dog": 3})
    path = tmp_path / "cat" / "1.png"
    first, when = scan(tmp_path).fingerprint(), path.stat()
    assert scan(tmp_path).fingerprint() == first
    # Another picture of the same time and name.
    write(path, 30, 20)
    os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))
    larger = scan(tmp_path).fingerprint()
    # The same bytes, written later.
    os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns + 1_000_000))
    later = scan(tmp_path).fingerprint()
    path.rename(tmp_path / "dog" / "3.png")
    moved = scan(tmp_path).fingerprint()
    assert len({first, larger, later, moved}) == 4


# Decoding: what each mode must look like, from arrays written by hand


def test_formats(tmp_path):
    for kind, tolerance in (("png", 0), ("bmp", 0), ("webp", 12), ("jpg", 12), ("gif", 30)):
        path = write(tmp_path / f"x.{kind}", 64, 48, quality=95)
        got = load_image(path)
        assert got.shape == (48, 64, 3)
        assert got.dtype == np.uint8
        assert np.abs(got.astype(int) - gradient(64, 48)).max() <= tolerance, kind


def test_gray_is_repeated(tmp_path):
    gray = gradient(9, 7)[..., 0]
    for mode in ("L", "1"):
        path = tmp_path / f"{mode}.png"
        Image.fromarray(gray).convert(mode).save(path)
        got = load_image(path)
        assert (got == got[..., :1]).all()
        assert set(np.unique(got)) <= ({0, 255} if mode == "1" else set(gray.ravel().tolist()))
    np.testing.assert_array_equal(load_image(tmp_path / "L.png")[..., 0], gray)


def test_sixteen_bits_are_scaled_over_their_range(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], "uint16")
    Image.fromarray(values).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png")[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    pixels = np.zeros((1, 3, 4), "uint8")
    pixels[0, :, 3] = (255, 0, 128 if mode != "P" else 255)
    image = Image.fromarray(pixels)
    if mode == "LA":
        image = image.convert("LA")
    if mode == "P":
        image = Image.fromarray(np.array([[1, 0, 1]], "uint8"), "L").convert("P")
        image.putpalette([9, 9, 9, 0, 0, 0])
        image.info["transparency"] = 0
    image.save(tmp_path / "x.png")
    got = load_image(tmp_path / "x.png")[0, :, 0]
    half = 127 if mode != "P" else 0  # 255 * (1 - 128 / 255)
    np.testing.assert_allclose(got, [0, 255, half], atol=1)


def test_cmyk(tmp_path):
    ink = np.zeros((16, 16, 4), "uint8")
    ink[..., 0] = 255  # cyan
    Image.fromarray(ink, "CMYK").save(tmp_path / "x.jpg", quality=100)
    np.testing.assert_allclose(load_image(tmp_path / "x.jpg")[8, 8], [0, 255, 255], atol=6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    # How a camera stores an upright picture for each value of the tag, by the EXIF standard.
    upright = gradient(64, 48)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x.jpg", exif=exif, quality=95)
    got = load_image(tmp_path / "x.jpg")
    assert got.shape == (48, 64, 3)
    assert np.abs(got.astype(int) - upright).max() <= 12


def test_damaged_exif_data_leave_the_pixels(tmp_path):
    Image.new("RGB", (8, 4), "red").save(tmp_path / "x.png", exif=b"Exif\0\0no TIFF header")
    with Image.open(tmp_path / "x.png") as image, pytest.raises(SyntaxError):
        image.getexif()
    got = load_image(tmp_path / "x.png")
    assert (got.shape, got[2, 4].tolist()) == ((4, 8, 3), [255, 0, 0])


def test_a_picture_is_turned_whatever_else_its_exif_data_hold(tmp_path):
    entries = [(0x0112, 3, 1, 6), (0x0100, 2, 4, 0)]  # turned; its width is a text
    data = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    data += b"".join(struct.pack("<HHII", *entry) for entry in entries) + struct.pack("<I", 0)
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg", exif=data)
    with Image.open(tmp_path / "x.jpg") as image, pytest.raises(struct.error):
        ImageOps.exif_transpose(image)  # which writes all of it again
    assert load_image(tmp_path / "x.jpg").shape == (8, 4, 3)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("gif", "webp", "png"):
        path = tmp_path / f"x.{kind}"
        frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
        assert load_image(path)[0, 0].tolist() == [255, 0, 0]


def test_a_phones_picture_in_two_parts(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(load_image(tmp_path / "x.jpg")[0, 0], [255, 0, 0], atol=3)


def test_load_image_says_what_is_wrong(tmp_path):
    (tmp_path / "x.jpg").write_text("text")
    with pytest.raises(ImageReadError, match=r"x\.jpg.*not a JPEG") as caught:
        load_image(tmp_path / "x.jpg")
    assert caught.value.path == tmp_path / "x.jpg"
    path = write(tmp_path / "y.png")
    with pytest.raises(ValueError, match="resize='zoom'"):
        load_image(path, 8, resize="zoom")
    with pytest.raises(ValueError, match=r"image_size=\(0, 8\)"):
        load_image(path, (0, 8))


# Resizing: the oracle is Keras's own layer, which a model has inside


@pytest.mark.core
@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("size", [(64, 64), (32, 80)])
@pytest.mark.parametrize(
    "shape", [(300, 200), (201, 303), (50, 50), (7, 900), (1, 1), (1600, 1200), (1603, 1201)]
)
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_resizing_is_what_keras_does(tmp_path, resize, size, shape, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 5, 3), "uint8")
    picture = Image.fromarray(pixels).resize(shape, Image.Resampling.BICUBIC)
    picture.save(tmp_path / f"x.{kind}", quality=95)
    layer = keras.layers.Resizing(
        *size,
        antialias=True,
        crop_to_aspect_ratio=resize == "crop",
        pad_to_aspect_ratio=resize == "pad",
        data_format="channels_last",
    )
    full = load_image(tmp_path / f"x.{kind}")
    assert full.shape == (shape[1], shape[0], 3)
    expected = keras.ops.convert_to_numpy(layer(full.astype("float32")))
    got = load_image(tmp_path / f"x.{kind}", size, resize=resize)
    difference = np.abs(got - expected)
    # Exact but for rounding; a JPEG of 1600x1200 is decoded at a reduced size.
    reduced = kind == "jpg" and shape == (1600, 1200)
    assert difference.mean() < (1.0 if reduced else 0.5)
    if not reduced:
        assert difference.max() < 1.5


# The dataset


@pytest.fixture
def samples(tmp_path):
    made = []
    for i in range(10):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (20 + i, 30), (i, i, i)).save(path)
        made.append(Sample(path, i % 3))
    return made


def seen(data):
    """The picture numbers and labels of one pass."""
    batches = [data[i] for i in range(len(data))]
    return (
        np.concatenate([images[:, 0, 0, 0] for images, _ in batches]).tolist(),
        np.concatenate([labels for _, labels in batches]).tolist(),
    )


@pytest.mark.core
@pytest.mark.parametrize("max_cache_bytes", [0, 2**30])
def test_batches(samples, max_cache_bytes, tmp_path):
    data = ImageDataset(samples, 16, 4, root=tmp_path, max_cache_bytes=max_cache_bytes)
    assert [len(data[i][0]) for i in range(len(data))] == [4, 4, 2]
    for _ in range(2):
        pictures, labels = seen(data)
        assert pictures == list(range(10))
        assert labels == [i % 3 for i in range(10)] == data.labels.tolist()
        data.on_epoch_end()
    assert data[0][0].dtype == np.uint8
    assert data[0][1].dtype == np.int32
    assert data.files == [f"{i}.png" for i in range(10)]
    with pytest.raises(IndexError):
        data[3]


def test_shuffling_depends_on_seed_and_epoch(samples):
    data = ImageDataset(samples, 16, 4, shuffle=True, seed=1)
    first = seen(data)
    assert first[0] != list(range(10))
    assert first[0] == data.order.tolist()
    assert first[1] == [picture % 3 for picture in first[0]]
    data.on_epoch_end()
    second = seen(data)
    assert second[0] != first[0]
    assert sorted(second[0]) == list(range(10))
    again = ImageDataset(samples, 16, 4, shuffle=True, seed=1)
    again.epoch = 1
    assert seen(again) == second
    assert seen(ImageDataset(samples, 16, 4, shuffle=True, seed=2)) != first


@pytest.mark.core
def test_fit_sees_every_image_once_an_epoch(samples):
    class Note(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.total = self.add_weight(shape=(), initializer="zeros", trainable=False)
            self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, images, training=False):
            images = keras.ops.cast(images, "float32")
            if training:
                self.total.assign_add(keras.ops.sum(images[:, 0, 0, 0] ** 2))
                self.count.assign_add(keras.ops.cast(keras.ops.shape(images)[0], "float32"))
            return keras.ops.mean(images, axis=(1, 2))

    note = Note()
    inputs = keras.Input((16, 16, 3), dtype="uint8")
    outputs = keras.layers.Dense(3, activation="softmax")(note(inputs))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "sparse_categorical_crossentropy")
    data = ImageDataset(samples, 16, 4, shuffle=True)
    history = model.fit(data, validation_data=ImageDataset(samples, 16, 4), epochs=3, verbose=0)
    assert set(history.history) == {"loss", "val_loss"}
    assert float(note.count) == 30
    assert float(note.total) == 3 * sum(i * i for i in range(10))
    assert data.epoch >= 3


@pytest.mark.core
def test_predict_without_labels(samples):
    data = ImageDataset([sample.path for sample in samples], (8, 12), 4)
    assert data.labels is None
    assert data[0][0].shape == (4, 8, 12, 3)
    model = keras.Sequential([keras.Input((8, 12, 3), dtype="uint8"), keras.layers.Rescaling(1.0)])
    assert model.predict(data, verbose=0)[:, 0, 0, 0].tolist() == list(range(10))


def test_images_are_decoded_once_where_they_fit(samples, monkeypatch):
    data = ImageDataset(samples, 16, 4, max_cache_bytes=10 * 16 * 16 * 3)
    first = seen(data)
    monkeypatch.setattr(pixels, "_decode", None)
    assert seen(data) == first
    over = ImageDataset(samples, 16, 4, max_cache_bytes=10 * 16 * 16 * 3 - 1)
    with pytest.raises(TypeError):
        seen(over)


def test_a_batch_may_be_changed_in_place(samples):
    data = ImageDataset(samples, 16, 4)
    data[0][0][:] = 99
    assert seen(data)[0] == list(range(10))


def test_an_image_that_has_gone_since(samples):
    data = ImageDataset(samples, 16, 4)
    samples[0].path.unlink()
    with pytest.raises(ImageReadError, match="No such file"):
        data[0]


@pytest.mark.parametrize(
    "arguments",
    [{"samples": []}, {"batch_size": 0}, {"seed": -1}, {"resize": "zoom"}, {"image_size": 0}],
)
def test_dataset_arguments(samples, arguments):
    with pytest.raises(ValueError, match=rf"Received: .*{next(iter(arguments))}="):
        ImageDataset(**{"samples": samples, "image_size": 8, **arguments})


def test_the_dataset_of_a_split(tmp_path):
    fill(tmp_path, {"a": 5, "b": 5})
    found = scan(tmp_path)
    data = found.dataset("validation", 8, batch_size=1)
    assert data.files == names(tmp_path, found.validation)
    assert data.labels.tolist() == [sample.label for sample in found.validation]
    with pytest.raises(ValueError, match="split='dev'"):
        found.dataset("dev", 8)


# The rest


def test_list_images(tmp_path):
    fill(tmp_path, {"b": 2, "a/deep": 1})
    odd = write(tmp_path / "noext.png").rename(tmp_path / "noext")
    got = list_images([odd, tmp_path, tmp_path / "b" / "0.png"])
    assert [path.relative_to(tmp_path).as_posix() for path in got] == [
        "noext",
        "a/deep/0.png",
        "b/0.png",
        "b/1.png",
    ]
    (tmp_path / "b" / "2.HEIC").write_bytes(b"a phone's")  # named, and then reported as unreadable
    assert list_images([tmp_path / "b"])[-1] == tmp_path / "b" / "2.HEIC"
    with pytest.raises(ImageFolderError, match=r"No such file or folder.*gone"):
        list_images([tmp_path / "gone"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageFolderError, match="No image in"):
        list_images([tmp_path / "empty"])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_class_weights_are_scikit_learns(labels):
    classes = np.unique(labels)
    expected = compute_class_weight("balanced", classes=classes, y=labels)
    assert class_weights(labels) == pytest.approx(
        dict(zip(classes.tolist(), expected, strict=True))
    )
