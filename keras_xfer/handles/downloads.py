"""Archives fetched over HTTP: streamed to the disk, checked, tried again where it may pass."""

import hashlib
import http.client
import os
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from keras_xfer.handles import archives
from keras_xfer.handles.addresses import MOVED, addresses, has_moved
from keras_xfer.handles.failures import BY_HAND, HandleError, shown, writing

# No byte for so long is a failure; a slow server that goes on sending is none.
TIMEOUT_SECONDS = 60.0

# Waits before the second and the third attempt.
RETRY_WAITS_SECONDS = (0.5, 2.0)

_BLOCK_BYTES = 1 << 20
_MOST_DIGITS = 18
_SECONDS_BETWEEN_LINES = 0.2


def fetch(handle: str, pin: str | None, temporary: Path) -> archives.Unpacked:
    """Download the archive that `handle` names and unpack it.

    Args:
        handle: String, an address that begins with `http://` or `https://`.
        pin: String, the SHA-256 that the archive must have, or `None`.
        temporary: `pathlib.Path`, an empty folder to work in.

    Returns:
        An `archives.Unpacked` inside `temporary`.

    Raises:
        HandleError: it could not be had.
    """
    failures = []
    for address in addresses(handle):
        try:
            return _fetch_with_retries(address, handle, pin, temporary)
        except HandleError as failure:
            if not failure.of_source:
                raise
            failures.append(failure)
    facts = " ".join(failure.fact for failure in failures)
    remedy = f"{MOVED} {BY_HAND}" if has_moved(handle) else failures[0].remedy
    raise HandleError(facts, remedy) from (failures[-1].__cause__ or failures[-1])


def _fetch_with_retries(
    address: str, handle: str, pin: str | None, temporary: Path
) -> archives.Unpacked:
    for wait in RETRY_WAITS_SECONDS:
        try:
            return _fetch_once(address, handle, pin, temporary)
        except HandleError as failure:
            if not failure.may_pass:
                raise
        time.sleep(wait)
    return _fetch_once(address, handle, pin, temporary)


def _fetch_once(address: str, handle: str, pin: str | None, temporary: Path) -> archives.Unpacked:
    archive, content = temporary / "archive", temporary / "content"
    shutil.rmtree(content, ignore_errors=True)
    sha256, headers, has_length = _download(address, handle, archive)
    if pin is not None and sha256 != pin:
        raise HandleError(
            f"Expected an archive whose SHA-256 is {pin}, but that from {address} has {sha256}.",
            "If the model was published anew on purpose, give the new number as `sha256`.",
            may_pass=not has_length,
        )
    try:
        return archives.unpack_module(archive, sha256, content)
    except archives.NotAnArchiveError as error:
        kind = headers.get("Content-Type") or "no content type"
        raise HandleError(
            f"Expected a tar archive from {address}, but what came is none ({kind}).",
            "Check the address in a browser: it must lead to the archive itself, not to a page "
            f"about it or to a login. {BY_HAND}",
        ) from error
    except archives.TruncatedArchiveError as error:
        raise HandleError(
            f"Expected a whole tar archive from {address}, but it ends too early or is damaged.",
            f"{archives.REMEDY} {BY_HAND}",
            may_pass=not has_length,  # else it is as damaged at its source
        ) from (error.__cause__ or error)


def _download(address: str, handle: str, archive: Path) -> tuple[str, Any, bool]:
    """Stream the answer to a file; return its SHA-256, its headers, whether its length is known."""
    digest = hashlib.sha256()
    received = 0
    try:
        response = _opener().open(address, timeout=TIMEOUT_SECONDS)
    except Exception as error:  # urllib raises ValueError, too, at what a server says
        raise _failure(address, error) from error
    with response:
        length = _announced_bytes(response, address)
        with writing(archive), archive.open("wb") as file, _Progress(handle, length) as progress:
            while received != length:
                try:
                    block = response.read1(_BLOCK_BYTES)
                except Exception as error:  # as above
                    raise _failure(address, error) from error
                if not block:
                    break
                file.write(block)
                digest.update(block)
                received += len(block)
                progress.show(received)
    if received != length and (length is not None or received == 0):
        raise HandleError(
            f"Expected {length or 'some'} bytes from {address}, but the connection ended after "
            f"{received}.",
            f"Try again. {BY_HAND}",
            may_pass=True,
        )
    return digest.hexdigest(), response.headers, length is not None


def _announced_bytes(response: Any, address: str) -> int | None:
    length = response.headers.get("Content-Length", "")
    if len(length) > _MOST_DIGITS:
        raise _failure(address, ValueError(f"a Content-Length of {len(length)} digits"))
    return int(length) if length.isdecimal() else None


def _opener() -> urllib.request.OpenerDirector:
    """A new one each time: urllib's own keeps the proxies that the environment named at first."""
    # Under the very name and value by which tensorflow_hub does it, see its resolver.py.
    if os.environ.get("TFHUB_DISABLE_CERT_VALIDATION") != "true":
        return urllib.request.build_opener(_Redirects)
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return urllib.request.build_opener(_Redirects, urllib.request.HTTPSHandler(context=context))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """urllib's own, which leaves the connection open at an address that it cannot read."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except ValueError:
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _failure(address: str, error: Exception) -> HandleError:
    """Say what went wrong on the network and what can be done about it."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        error.msg = shown(" ".join(error.msg.split()))  # a traceback shows it as well
        return _refusal(address, error)
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    expected = f"Expected an archive from {address}, but "
    if isinstance(reason, TimeoutError):
        return HandleError(
            f"{expected}no byte came for {TIMEOUT_SECONDS:g} s.",
            f"Try again later, or look whether a proxy or firewall is in the way. {BY_HAND}",
        )
    if isinstance(reason, http.client.IncompleteRead) or (
        isinstance(reason, ConnectionError) and not isinstance(reason, ConnectionRefusedError)
    ):
        return HandleError(
            f"{expected}the connection broke ({reason}).", f"Try again. {BY_HAND}", may_pass=True
        )
    if isinstance(reason, ValueError | http.client.HTTPException) and not isinstance(
        reason, OSError
    ):
        return HandleError(
            f"{expected}its address or the answer of its server is malformed ({reason}).",
            f"Check the address; if it is right, tell whoever runs the server. {BY_HAND}",
        )
    return HandleError(
        f"{expected}there is no connection to it ({reason}).",
        f"Check the address and the network (proxies: HTTPS_PROXY, HTTP_PROXY). {BY_HAND}",
    )


def _refusal(address: str, error: urllib.error.HTTPError) -> HandleError:
    if 300 <= error.code < 400:
        return _lost(address, error)
    if error.code in (401, 403):
        remedy = (
            "The model may want a login or an accepted licence: log in at https://www.kaggle.com, "
            f"accept the licence on the model's page, and give its kaggle:// name. {BY_HAND}"
        )
    elif error.code in (404, 410):
        remedy = f"Check the address and the version at its end. {BY_HAND}"
    else:
        remedy = f"Try again later. {BY_HAND}"
    return HandleError(
        f"Expected an archive from {address}, but the server answered {error.code} "
        f"({error.reason}).",
        remedy,
        may_pass=error.code == 429 or error.code >= 500,
    )


def _lost(address: str, error: urllib.error.HTTPError) -> HandleError:
    """A redirect that urllib does not follow."""
    if "infinite loop" in error.reason:
        where = "in a circle"
    elif target := error.headers.get("Location"):
        where = f"to {target!r}, where no archive is fetched from"
    else:
        where = "without saying where to"
    return HandleError(
        f"Expected an archive from {address}, but the server answered {error.code} and redirects "
        f"{where}.",
        "Give the http:// or https:// address of the archive itself; another attempt would end "
        f"there too. {BY_HAND}",
    )


class _Progress:
    """One line in a terminal that says how far a download is; nothing elsewhere."""

    def __init__(self, handle: str, total: int | None) -> None:
        name = shown(handle.partition("://")[2].partition("?")[0])
        self._name = name if len(name) <= 40 else f"…{name[-39:]}"
        self._total = total
        self._in_terminal = sys.stdout.isatty()
        self._start = self._shown = time.monotonic()
        self._width = 0

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._width:
            sys.stdout.write("\n")
            sys.stdout.flush()

    def show(self, received: int) -> None:
        now = time.monotonic()
        is_last = received == self._total
        if not self._in_terminal or (now - self._shown < _SECONDS_BETWEEN_LINES and not is_last):
            return
        self._shown = now
        line = f"{self._name}: {received / 1e6:.1f} MB"
        if self._total is not None:
            left = (now - self._start) / received * (self._total - received)
            line += f" of {self._total / 1e6:.1f} MB, {left:.0f} s left"
        sys.stdout.write("\r" + line.ljust(self._width))
        sys.stdout.flush()
        self._width = len(line)
