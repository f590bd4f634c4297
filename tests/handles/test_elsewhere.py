"""What kagglehub and tensorflow_hub fetch."""

import json
import re
import sys
import types

import pytest

from keras_xfer.handles import resolve
from keras_xfer.handles.elsewhere import kaggle_name_of_page
from tests.handles.conftest import MODEL, archive_of, names_in, ok, tree, write

DATA = archive_of(MODEL)


@pytest.fixture
def kagglehub(tmp_path, monkeypatch):
    """A stand-in that remembers what it was asked for."""
    module = types.ModuleType("kagglehub")
    module.asked = []
    module.folder = write(tmp_path / "kaggle", MODEL)

    def model_download(name):
        module.asked.append(name)
        return str(module.folder)

    module.model_download = model_download
    monkeypatch.setitem(sys.modules, "kagglehub", module)
    return module


@pytest.fixture
def no_kagglehub(monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)


@pytest.mark.parametrize(
    ("handle", "name"),
    [
        ("kaggle://google/nnlm/tensorFlow2/en-dim128", "google/nnlm/tensorFlow2/en-dim128"),
        ("kaggle://google/nnlm/tensorFlow2/en-dim128/12", "google/nnlm/tensorFlow2/en-dim128/12"),
        ("KAGGLE://google/nnlm/tensorFlow2/en-dim128/1/", "google/nnlm/tensorFlow2/en-dim128/1"),
        ("https://www.kaggle.com/models/google/nnlm/TensorFlow2/en-dim128/1?tfhub-redirect=true",
         "google/nnlm/TensorFlow2/en-dim128/1"),
        ("https://kaggle.com/models/google/nnlm/TensorFlow2/en-dim128",
         "google/nnlm/TensorFlow2/en-dim128"),
        ("https://www.kaggle.com/models/google/nnlm/frameworks/TensorFlow2/variations/en-dim128",
         "google/nnlm/TensorFlow2/en-dim128"),
        ("https://www.kaggle.com/models/google/nnlm/frameworks/TensorFlow2/variations/en-dim128"
         "/versions/3", "google/nnlm/TensorFlow2/en-dim128/3"),
    ],
)  # fmt: skip
def test_names_of_kaggle(kagglehub, cache, handle, name):
    assert resolve(handle) == str(kagglehub.folder)
    assert kagglehub.asked == [name]
    assert names_in(cache) == []


@pytest.mark.parametrize(
    "handle",
    ["kaggle://", "kaggle://google/nnlm", "kaggle://google/nnlm/tensorFlow2",
     "kaggle://google/nnlm/tensorFlow2/en/latest", "kaggle://google/nnlm/tensorFlow2/en/1/2",
     "kaggle://google//tensorFlow2/en", "kaggle://google/nnlm/tensor flow/en",
     "kaggle://../../../..", "kaggle://google/./tensorFlow2/en", "kaggle://google/nnlm/tf/../1"],
)  # fmt: skip
def test_a_malformed_name_of_kaggle(kagglehub, handle):
    with pytest.raises(ValueError, match="of the form kaggle://owner/model/framework/variation"):
        resolve(handle)
    assert kagglehub.asked == []


def test_a_page_whose_names_climb_is_no_model():
    assert kaggle_name_of_page("https://www.kaggle.com/models/../../../..") is None


def test_without_kagglehub_the_extra_is_named(no_kagglehub):
    with pytest.raises(ImportError, match=r"pip install 'keras-xfer\[kaggle\]'"):
        resolve("kaggle://google/nnlm/tensorFlow2/en-dim128/1")


def test_without_kagglehub_a_page_is_asked_for_the_archive(
    no_kagglehub, server, cache, monkeypatch
):
    page = "http://www.kaggle.com/models/google/nnlm/TensorFlow2/en-dim128/1"
    proxy = server.script(page, ok(DATA)).removesuffix(page)
    monkeypatch.setenv("http_proxy", proxy)
    assert tree(resolve(page)) == MODEL
    assert server.requests == [f"{page}?tf-hub-format=compressed"]


def test_a_pinned_page_is_asked_for_the_archive(kagglehub, server, cache, monkeypatch):
    import hashlib

    page = "http://www.kaggle.com/models/google/nnlm/TensorFlow2/en-dim128/1"
    monkeypatch.setenv("http_proxy", server.script(page, ok(DATA)).removesuffix(page))
    folder = resolve(page, sha256=hashlib.sha256(DATA).hexdigest())
    assert tree(folder) == MODEL
    assert resolve(page) == folder, "what is kept is used first"
    assert kagglehub.asked == []


def test_another_page_of_kaggle_is_an_address_as_any(kagglehub, server, cache, monkeypatch):
    page = "http://www.kaggle.com/api/v1/models/google/nnlm/tensorFlow2/en-dim128/1/download"
    monkeypatch.setenv("http_proxy", server.script(page, ok(DATA)).removesuffix(page))
    assert tree(resolve(page)) == MODEL
    assert kagglehub.asked == []


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(403, "accept the licence"), (404, "Check the name and the version"), (None, "Try again")],
)
def test_what_kagglehub_cannot_get(kagglehub, cache, code, remedy):
    class KaggleError(Exception):
        response = types.SimpleNamespace(status_code=code) if code else None

    def fail(name):
        raise KaggleError("no such luck")

    kagglehub.model_download = fail
    with pytest.raises(OSError, match=f"kagglehub could not get it: no such luck.*{remedy}") as it:
        resolve("kaggle://google/nnlm/tensorFlow2/en-dim128/1")
    assert isinstance(it.value.__cause__, KaggleError)
    assert "Received: handle='kaggle://google/nnlm/tensorFlow2/en-dim128/1'" in str(it.value)


def test_a_model_of_kaggle_that_is_no_saved_model(kagglehub):
    (kagglehub.folder / "saved_model.pb").rename(kagglehub.folder / "model.keras")
    with pytest.raises(OSError, match="Expected a SavedModel.*model.keras"):
        resolve("kaggle://google/nnlm/keras/en-dim128/1")


@pytest.mark.parametrize("handle", ["kaggle://a/b/c/d", "gs://bucket/model"])
def test_what_cannot_be_pinned(kagglehub, handle):
    with pytest.raises(ValueError, match="`sha256` pins an archive.*Received: handle="):
        resolve(handle, sha256="0" * 64)


def test_the_real_kagglehub(server, tmp_path, monkeypatch):
    pytest.importorskip("kagglehub", reason="needs keras-xfer[kaggle]")
    from kagglesdk import kaggle_env

    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, here)
    for name in ("KAGGLEHUB_CACHE", "KAGGLE_CONFIG_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    asked = []

    def answer(handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        asked.append((handler.path.rpartition("/")[2], body))
        if handler.path.endswith("/ListModelInstanceVersionFiles"):
            content = json.dumps({"files": [{"name": name} for name in MODEL]}).encode()
            ok(content, content_type="application/json")(handler)
        else:
            ok(MODEL[body["path"]], content_type="application/octet-stream")(handler)

    monkeypatch.setattr(
        server.RequestHandlerClass, "do_POST", lambda handler: answer(handler), raising=False
    )
    folder = resolve("kaggle://google/nnlm/tensorFlow2/en-dim128/1")
    assert tree(folder) == MODEL
    assert folder.startswith(str(tmp_path / "KAGGLEHUB_CACHE"))
    assert asked[0][1]["modelSlug"] == "nnlm"


# --- tensorflow_hub -------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for tensorflow_hub, which takes seconds to import."""
    module = types.ModuleType("tensorflow_hub")
    module.resolve = lambda handle: f"resolved {handle}"
    monkeypatch.setitem(sys.modules, "tensorflow_hub", module)
    return module


@pytest.mark.parametrize("scheme", ["gs", "s3", "hdfs", "GS"])
def test_file_systems_of_tensorflow(hub, scheme):
    assert resolve(f"{scheme}://bucket/model") == f"resolved {scheme}://bucket/model"


def test_addresses_are_left_to_tensorflow_hub_where_the_environment_says_so(
    hub, server, cache, monkeypatch
):
    handle = server.script("/m", ok(DATA))
    monkeypatch.setenv("TFHUB_MODEL_LOAD_FORMAT", "UNCOMPRESSED")
    assert resolve(handle) == f"resolved {handle}"
    with pytest.raises(ValueError, match="`sha256` pins an archive"):
        resolve(handle, sha256="0" * 64)
    monkeypatch.setenv("TFHUB_MODEL_LOAD_FORMAT", "COMPRESSED")
    monkeypatch.setenv("TFHUB_CACHE_DIR", "gs://bucket/cache")
    assert resolve(handle) == f"resolved {handle}"
    assert server.requests == []


def test_what_tensorflow_hub_cannot_resolve(hub):
    def fail(handle):
        raise RuntimeError("no credentials")

    hub.resolve = fail
    with pytest.raises(OSError, match="could not resolve it: no credentials") as caught:
        resolve("gs://bucket/model")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert re.search("Received: handle='gs://bucket/model'", str(caught.value))


def test_the_real_tensorflow_hub(tmp_path):
    pytest.importorskip("tensorflow_hub")
    with pytest.raises(OSError, match="tensorflow_hub could not resolve it"):
        resolve("ram://nothing/here")


def test_nothing_heavy_is_imported_for_a_plain_address(server, cache):
    import os
    import subprocess

    from tests.handles.conftest import QUICK_START

    handle = server.script("/m", ok(DATA))
    code = (
        f"{QUICK_START}resolve({handle!r}); "
        "print(sorted({'keras', 'tensorflow', 'tensorflow_hub', 'kagglehub'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
    assert len(server.requests) == 1
