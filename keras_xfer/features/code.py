"""What code does, in JSON that another process finds again: by content, not by where it stands.

Code of Python's own library and of the packages that features are computed by goes by its name.
That of users may be edited between two runs, so it goes by its bytecode and all that it reads.
"""

import collections
import datetime
import decimal
import enum
import fractions
import functools
import json
import os
import re
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from keras_xfer.features import bytecode, digests

# Those that compute: their functions go by name, and they change with their versions.
_COMPUTING = {"keras", "keras_xfer", "tensorflow", "torch", "jax", "jaxlib", "numpy"}
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
# Of Python itself, and said by their repr.
_PLAIN = (
    *(slice, range, bytearray, decimal.Decimal, fractions.Fraction),
    *(datetime.date, datetime.time, datetime.timedelta),
)
# Of what is written in double underscores, this alone computes.
_CALLED = {"__init__", "__call__"}


def is_of_the_stack(module: str | None) -> bool:
    """Whether that is a module of Python itself or of a package that features are computed by.

    Example:

    >>> is_of_the_stack("keras.src.layers"), is_of_the_stack("math"), is_of_the_stack("birds")
    (True, True, False)
    """
    package = (module or "").partition(".")[0]
    return package in _COMPUTING or (package in sys.stdlib_module_names and package != "__main__")


class Fingerprints:
    """Fingerprints of callables and classes: equal for equal code, wherever it is written.

    Args:
        config: called with an object that has `get_config()`; what it is, in JSON.

    Example:

    >>> def scaled(factor):
    ...     return lambda x: x * factor
    >>> of = Fingerprints(lambda each: each.get_config())
    >>> of(scaled(2)) == of(scaled(2)), of(scaled(2)) == of(scaled(3))
    (True, False)
    """

    def __init__(self, config: Callable[[Any], Any]) -> None:
        self._config = config
        self._known: dict[int, tuple[Any, str]] = {}  # with what it is of, which keeps its id

    def __call__(self, thing: Any) -> str:
        """The fingerprint of a callable, a class or a value."""
        if id(thing) not in self._known:
            said = _Reader(self._config).of(thing)
            self._known[id(thing)] = thing, digests.of_json(said)
        return self._known[id(thing)][1]


def of_code(code: types.CodeType) -> list[Any]:
    """A code object but for its place in a file."""
    return _Reader(lambda _: None).code(code)


class _Reader:
    """Reads one callable with all that it reaches."""

    def __init__(self, config: Callable[[Any], Any]) -> None:
        self._config = config
        self._met: dict[int, int] = {}  # what was read already: the number of it
        self._kept: list[Any] = []  # so that no other object gets the id of one of them
        self._open: list[types.ModuleType] = []  # those being read, which may name each other

    def of(self, value: Any) -> Any:
        """Anything, in JSON."""
        if value is None or value is Ellipsis or isinstance(value, bool | int | float | complex):
            return [type(value).__name__, repr(value)]
        if isinstance(value, str | bytes):
            return [type(value).__name__, value if isinstance(value, str) else value.hex()]
        if id(value) in self._met:
            return ["met", self._met[id(value)]]
        self._met[id(value)] = len(self._kept)
        self._kept.append(value)
        found = self._of(value)
        if not isinstance(value, types.FunctionType | type):  # the same value may be met again
            del self._met[id(value)]
        return found

    def _of(self, value: Any) -> Any:
        for kinds, read in _READ:
            if isinstance(value, kinds):
                return read(self, value)
        for inner in ("python_function", "__wrapped__"):  # of tf.function, jax.jit and others
            if callable(getattr(value, inner, None)) and not isinstance(value, keras.Layer):
                return [path_of(type(value)), self.of(getattr(value, inner))]
        return self._object(value)

    # --- Code -----------------------------------------------------------------------------------

    def code(self, code: types.CodeType) -> list[Any]:
        """Bytecode, constants and names."""
        counts = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount]
        constants = [
            self.code(each) if isinstance(each, types.CodeType) else self.of(each)
            for each in code.co_consts
        ]
        return [code.co_code.hex(), counts, constants, list(code.co_names)]

    def _function(self, function: types.FunctionType) -> Any:
        module = function.__module__
        if is_of_the_stack(module) and _named(module, function.__qualname__) is function:
            return ["function", path_of(function)]
        code = function.__code__
        told = [
            "code",
            self.code(code),
            self.of(function.__defaults__),
            self.of(function.__kwdefaults__),
        ]
        reads = bytecode.reads_of(code)
        cells = [self._cell(cell, reads.names) for cell in function.__closure__ or ()]
        if _is_installed(module):  # what it reads changes with the version of its package
            return [*told, cells, path_of(function), _version(module)]
        space = function.__globals__
        read = [
            [name, self._read(space[name], reads.names)]
            for name in sorted(reads.globals & space.keys())
        ]
        imported = [
            [name, self._read(sys.modules.get(name), reads.names)]
            for name in sorted(bytecode.modules(reads.imports, space))
        ]
        return [*told, cells, read, imported]

    def _read(self, value: Any, names: set[str]) -> Any:
        """A value that code with these names in it reads."""
        return self._module(value, names) if isinstance(value, types.ModuleType) else self.of(value)

    def _cell(self, cell: types.CellType, names: set[str]) -> Any:
        try:
            return self._read(cell.cell_contents, names)
        except ValueError:  # it is empty
            return "empty"

    def _module(self, module: types.ModuleType, names: set[str]) -> Any:
        """A module: one of the user by what is read of it."""
        name = module.__name__
        if is_of_the_stack(name) or _is_installed(name):
            return ["module", name, _version(name)]
        if module in self._open:
            return ["module", name]
        self._open.append(module)
        space = vars(module)
        read = {each: self._read(space[each], names) for each in sorted(names & space.keys())}
        self._open.remove(module)
        return ["module", name, read]

    def _class(self, cls: type) -> Any:
        if is_of_the_stack(cls.__module__):
            return ["class", path_of(cls)]
        items = {
            name: self.of(value)
            for name, value in sorted(vars(cls).items())
            if name in _CALLED or not (name.startswith("__") and name.endswith("__"))
        }
        bases = [self.of(base) for base in cls.__bases__ if base is not object]
        return ["class", cls.__qualname__, items, bases]

    # --- Values ---------------------------------------------------------------------------------

    def _array(self, array: np.ndarray) -> Any:
        if array.dtype.hasobject:
            return ["objects", list(array.shape), [self.of(each) for each in array.ravel()]]
        return ["array", digests.of_arrays([np.asarray(array)])]

    def _mapping(self, value: Mapping[Any, Any]) -> Any:
        items = [[self.of(key), self.of(item)] for key, item in value.items()]
        return ["mapping", sorted(items, key=json.dumps)]

    def _object(self, value: Any) -> Any:
        """An object by what it says of itself."""
        path = path_of(type(value))
        if hasattr(value, "get_config"):
            try:
                told = [path, self._config(value)]
                if isinstance(value, keras.Layer):
                    weights = map(keras.ops.convert_to_numpy, value.weights)
                    told.append(digests.of_arrays(np.asarray(each) for each in weights))
                return [*told, self.of(type(value))]
            except Exception:
                return [path, self.of(type(value))]
        if hasattr(value, "__array__") or hasattr(value, "detach"):  # of a backend
            try:
                return [path, self._array(np.asarray(keras.ops.convert_to_numpy(value)))]
            except Exception:
                return [path]
        ours = not (
            is_of_the_stack(type(value).__module__) or _is_installed(type(value).__module__)
        )
        if ours or isinstance(value, types.SimpleNamespace):
            return [self.of(type(value)), self._mapping(getattr(value, "__dict__", {}))]
        if callable(value) and hasattr(value, "__qualname__"):  # built in
            return [path, path_of(value)]
        return [path]


_READ: tuple[tuple[Any, Callable[[_Reader, Any], Any]], ...] = (
    (types.FunctionType, _Reader._function),
    (types.MethodType, lambda the, each: ["method", the.of(each.__func__), the.of(each.__self__)]),
    (types.CodeType, _Reader.code),
    (types.ModuleType, lambda the, each: the._module(each, set())),
    (functools.partial, lambda the, each: [
        "partial", the.of(each.func), the.of(each.args), the.of(each.keywords)
    ]),
    ((staticmethod, classmethod), lambda the, each: [
        type(each).__name__, the.of(each.__func__)
    ]),
    (property, lambda the, each: ["property", the.of(each.fget)]),
    (functools.cached_property, lambda the, each: ["property", the.of(each.func)]),
    (enum.Enum, lambda _, each: ["enum", path_of(type(each)), each.name]),
    (type, _Reader._class),
    ((list, tuple, collections.deque), lambda the, each: [
        type(each).__name__, [the.of(item) for item in each]
    ]),
    ((set, frozenset), lambda the, each: [
        "set", sorted((the.of(item) for item in each), key=json.dumps)
    ]),
    (Mapping, _Reader._mapping),
    (np.ndarray, _Reader._array),
    (np.generic, lambda the, each: the._array(np.asarray(each))),
    (np.dtype, lambda _, each: ["dtype", str(each)]),
    (keras.DTypePolicy, lambda _, each: ["dtype policy", each.name]),
    (_PLAIN, lambda _, each: [type(each).__name__, repr(each)]),
    (re.Pattern, lambda the, each: ["pattern", the.of(each.pattern), each.flags]),
    (os.PathLike, lambda the, each: ["path", the.of(os.fspath(each))]),
)  # fmt: skip


def path_of(thing: Any) -> str:
    """Module and name of a function or a class."""
    return f"{getattr(thing, '__module__', None)}.{getattr(thing, '__qualname__', '')}"


def _named(module: str, qualname: str) -> Any:
    """What goes by that name; None where nothing does."""
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def _is_installed(module: str | None) -> bool:
    package = sys.modules.get((module or "").partition(".")[0])
    file = getattr(package, "__file__", None) or ""
    return any(folder in file for folder in _INSTALLED)


def _version(module: str) -> str:
    package = sys.modules.get(module.partition(".")[0])
    return str(getattr(package, "__version__", ""))
