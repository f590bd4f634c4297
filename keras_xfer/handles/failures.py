"""What went wrong, as the parts of one message: the fact and the remedy.

The files beside this one raise `HandleError`; `resolving.resolve` adds the handle and the cache.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

BY_HAND = (
    "Without a network, fetch the archive elsewhere and give its path, or that of the unpacked "
    "folder, as the handle."
)


def shown(text: str) -> str:
    r"""Write what a terminal would obey, such as the escapes that colour it, as its code.

    Servers, archives and files of others choose words that end in messages.

    Args:
        text: String.

    Returns:
        String, all of it printable.

    Example:
    >>> shown("ch\u00e2teau \x1b[31m")
    'château \\x1b[31m'
    """
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def without_secret(handle: str) -> str:
    """Leave the user name and the password out of an address, for a message.

    Args:
        handle: String.

    Returns:
        String.

    Example:
    >>> without_secret("https://me:secret@host/model")
    'https://***@host/model'
    """
    # A password may hold a slash; what follows a port is a path.
    return re.sub(r"://(?:[^/@:]*:(?!\d*/).*|[^/]*)@", "://***@", handle, flags=re.DOTALL)


class HandleError(OSError):
    """What was expected and what came instead, and how to mend it.

    Why and when: raised inside this package only; users see the `OSError` made of it.

    Args:
        fact: String, what was expected and what came instead.
        remedy: String, how to mend it.
        may_pass: Boolean, whether the same request may succeed a moment later.
        of_source: Boolean, whether another address of the same content is worth a try; `False`
            for what is wrong on this machine, and for an archive that is not to be trusted.
        errno: Integer, the system's number of the error, where there is one.

    Example:
    >>> raise HandleError("Expected an archive, got a page.", "Check the address.")
    Traceback (most recent call last):
        ...
    keras_xfer.handles.failures.HandleError: Expected an archive, got a page.
    """

    def __init__(
        self,
        fact: str,
        remedy: str,
        *,
        may_pass: bool = False,
        of_source: bool = True,
        errno: int | None = None,
    ) -> None:
        super().__init__(fact)
        self.fact = fact
        self.remedy = remedy
        self.may_pass = may_pass
        self.of_source = of_source
        self.number = errno

    def told(self, handle: str, cache: Path | None) -> OSError:
        """Make the error that the user sees."""
        where = "" if cache is None else f" Cache: {cache}."
        received = f"Received: handle={without_secret(handle)!r}."
        text = shown(f"{self.fact} {received}{where} {self.remedy}")
        return OSError(text) if self.number is None else OSError(self.number, text)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors of writing into a `HandleError` that names the cache and the way out."""
    try:
        yield
    except HandleError:
        raise
    except OSError as error:
        raise HandleError(
            f"Cannot write {path} ({error.strerror or error}).",
            "Make room there or make it writable, or set TFHUB_CACHE_DIR to a folder that has "
            "room and is writable, or give a folder that holds the SavedModel as the handle.",
            of_source=False,
            errno=error.errno,
        ) from error
