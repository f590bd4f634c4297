"""What other libraries fetch: Kaggle's models and the file systems that TensorFlow knows."""

import os
import re
import urllib.parse
from pathlib import Path
from typing import Any

from keras_xfer.handles.failures import BY_HAND, HandleError
from keras_xfer.handles.saved_models import saved_model_in

KAGGLE_FORM = "kaggle://owner/model/framework/variation or .../variation/version"

# https://www.tensorflow.org/io lists those that come with tensorflow-io.
FILE_SYSTEMS = ("gs", "s3", "hdfs", "viewfs", "har", "webhdfs", "az", "ram")

# The two forms in use, with the version or without:
# https://github.com/Kaggle/kagglehub/blob/main/README.md and https://pypi.org/project/kagglehub/0.1.8
_KAGGLE_PAGES = (
    r"/models/([^/]+)/([^/]+)/([^/]+)/([^/]+)(?:/(\d+))?/?",
    r"/models/([^/]+)/([^/]+)/frameworks/([^/]+)/variations/([^/]+)(?:/versions/(\d+))?/?",
)


def kaggle_name(handle: str) -> str:
    """Return the name that kagglehub takes, of a `kaggle://` handle.

    Args:
        handle: String that begins with `kaggle://`.

    Returns:
        String, `"owner/model/framework/variation"`, with the version if the handle has one.

    Raises:
        ValueError: it has another form.

    Example:
    >>> kaggle_name("kaggle://google/nnlm/tensorFlow2/en-dim128/1")
    'google/nnlm/tensorFlow2/en-dim128/1'

    Reference:
        https://github.com/Kaggle/kagglehub
    """
    name = handle.partition("://")[2].rstrip("/")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+){3}(/[1-9]\d*)?", name) or _climbs(name):
        raise ValueError(
            f"Expected a handle of the form {KAGGLE_FORM}. Received: handle={handle!r}. The page "
            "of the model on https://www.kaggle.com/models shows these names in its address."
        )
    return name


def kaggle_name_of_page(address: str) -> str | None:
    """Return the name that kagglehub takes, of the address of a model's page on kaggle.com.

    Args:
        address: String, an address.

    Returns:
        String, or `None` if it is another address.

    Example:
    >>> kaggle_name_of_page("https://www.kaggle.com/models/google/nnlm/TensorFlow2/en-dim128/1")
    'google/nnlm/TensorFlow2/en-dim128/1'

    Reference:
        https://github.com/Kaggle/kagglehub
    """
    parts = urllib.parse.urlsplit(address)
    if (parts.hostname or "").removeprefix("www.") != "kaggle.com":
        return None
    for form in _KAGGLE_PAGES:
        match = re.fullmatch(form, parts.path)
        if match:
            name = "/".join(part for part in match.groups() if part is not None)
            return None if _climbs(name) else name
    return None


def _climbs(name: str) -> bool:
    """Whether a part of it is no name, but leads out of the folder that kagglehub makes for it."""
    return not {".", ".."}.isdisjoint(name.split("/"))


def kagglehub_if_installed() -> Any:
    """Return the module kagglehub, or `None`."""
    try:
        import kagglehub
    except ImportError:
        return None
    return kagglehub


def resolve_with_kagglehub(name: str) -> str:
    """Let kagglehub download a model, into its own cache.

    Args:
        name: String, as `kaggle_name` returns it.

    Returns:
        String, the folder of the SavedModel.

    Raises:
        ImportError: kagglehub is not installed.
        HandleError: kagglehub could not get it, or it is no SavedModel.
    """
    kagglehub = kagglehub_if_installed()
    if kagglehub is None:
        raise ImportError(
            f"Models of Kaggle are fetched by kagglehub, which is not installed. "
            f"Received: handle='kaggle://{name}'. Install it with: pip install 'keras-xfer[kaggle]'"
        )
    try:
        folder = kagglehub.model_download(name)
    except Exception as error:  # requests' errors, kagglehub's own, and ValueError
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise HandleError(
            f"Expected the model {name!r} from Kaggle, but kagglehub could not get it: "
            f"{_one_line(error)}.",
            f"{_KAGGLE_REMEDIES.get(status or 0, 'Try again, or check the name and the network.')} "
            f"{BY_HAND}",
        ) from error
    return str(saved_model_in(Path(folder)))


_KAGGLE_REMEDIES = {
    401: "Log in: https://github.com/Kaggle/kagglehub#authenticate.",
    403: "Log in (https://github.com/Kaggle/kagglehub#authenticate) and accept the licence on the "
    "model's page at https://www.kaggle.com/models; or the name is wrong.",
    404: "Check the name and the version on the model's page at https://www.kaggle.com/models.",
}


def is_left_to_tensorflow_hub() -> bool:
    """Tell whether the environment asks for what tensorflow_hub alone does with addresses.

    That is to read modules where they lie, without a download, or to keep them on a remote file
    system.
    """
    return os.environ.get("TFHUB_MODEL_LOAD_FORMAT") == "UNCOMPRESSED" or "://" in os.environ.get(
        "TFHUB_CACHE_DIR", ""
    )


def resolve_with_tensorflow_hub(handle: str) -> str:
    """Let tensorflow_hub resolve a handle.

    Args:
        handle: String.

    Returns:
        String, a folder, maybe on a remote file system.

    Raises:
        HandleError: it could not.
    """
    import tensorflow_hub

    try:
        return str(tensorflow_hub.resolve(handle))
    except Exception as error:  # OSError, ValueError, RuntimeError, and TensorFlow's own
        raise HandleError(
            f"Expected a SavedModel, but tensorflow_hub could not resolve it: {_one_line(error)}.",
            f"Check the address and what it takes to read it (login, tensorflow-io). {BY_HAND}",
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
