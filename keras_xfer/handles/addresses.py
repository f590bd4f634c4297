"""Where an archive is asked for: the query that tensorflow_hub adds, and hosts that have moved."""

import re
import urllib.parse

from keras_xfer.handles.failures import without_secret

# What the addresses of former hosts became, tried in this order; `{path}` is what follows the host.
#
# tfhub.dev itself answers by redirecting to the model's place on Kaggle Models, and its owners
# promise to keep that up: https://github.com/tensorflow/hub/blob/master/README.md
# Kaggle's names do not follow from tfhub.dev's (deepmind/i3d-kinetics-400/1 became
# deepmind/i3d-kinetics/tensorFlow1/400/1), so that only the redirect knows them:
# https://github.com/tensorflow/hub/issues/932
# Where it fails (as it did there with 403), the bucket that tfhub.dev redirected to before holds
# the archives under tfhub.dev's own names: https://github.com/junxnone/tio/issues/176
# The last one is tensorflow_hub's own rewriting, see its compressed_module_resolver.py.
FORMER_HOSTS = {
    "tfhub.dev": (
        "https://tfhub.dev/{path}",
        "https://storage.googleapis.com/tfhub-modules/{path}.tar.gz",
    ),
    "hub.tensorflow.google.cn": ("https://gcs.tensorflow.google.cn/tfhub-modules/{path}.tar.gz",),
}

MOVED = (
    "tfhub.dev has moved to Kaggle Models: look the model up at https://www.kaggle.com/models and "
    "give its name there, such as 'kaggle://google/bert/tensorFlow2/answer-equivalence-bem/1'."
)
_FORMAT = ("tf-hub-format", "compressed")


def addresses(handle: str) -> tuple[str, ...]:
    """List the addresses that an archive is asked for at, the first one first.

    Args:
        handle: String, an address that begins with `http://` or `https://`.

    Returns:
        Tuple of strings, each with the query that asks for the compressed module.

    Raises:
        ValueError: it is no address, or one with a password.

    Example:
    >>> addresses("https://example.com/model?version=2")
    ('https://example.com/model?version=2&tf-hub-format=compressed',)

    Reference:
        https://www.tensorflow.org/hub/hosting
    """
    parts = _checked_parts(handle)
    templates = FORMER_HOSTS.get(_host(handle))
    if templates is None:
        return (_asking_for_archive(handle),)
    path = parts.path.strip("/")
    # An address without a version leads to the latest one, which the buckets do not know.
    with_version = re.search(r"/\d+$", path) is not None
    places = [each for each in templates if with_version or not each.endswith(".tar.gz")]
    query = f"?{parts.query}" if parts.query else ""
    return tuple(
        _asking_for_archive(each.format(path=path) + ("" if each.endswith(".tar.gz") else query))
        for each in places or templates
    )


def has_moved(handle: str) -> bool:
    """Tell whether `handle` names a host that no longer holds modules itself."""
    return _host(handle) in FORMER_HOSTS


def _checked_parts(handle: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(handle)
        is_sound = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # brackets or a port that is no number
        is_sound = False
    if not is_sound or not handle.isascii() or re.search(r"[\x00-\x20\x7f]", handle):
        raise ValueError(
            "Expected an address such as https://host/path, with spaces and letters beyond ASCII "
            f"written as %20 and the like. Received: handle={without_secret(handle)!r}"
        )
    if "@" in parts.netloc:  # urllib takes it for a part of the host
        raise ValueError(
            "Expected an address without a user name and a password. Received: "
            f"handle={without_secret(handle)!r}. Fetch the archive with a program that logs in, "
            "and give its path as the handle."
        )
    return parts


def _host(handle: str) -> str:
    return (urllib.parse.urlsplit(handle).hostname or "").removeprefix("www.")


def _asking_for_archive(address: str) -> str:
    parts = urllib.parse.urlsplit(address)
    if _FORMAT in urllib.parse.parse_qsl(parts.query):
        return address
    query = "=".join(_FORMAT)
    query = f"{parts.query}&{query}" if parts.query else query
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path, query, ""))
