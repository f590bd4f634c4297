"""What code reads, as its bytecode tells it."""

import dis
import importlib.util
import types
from collections.abc import Mapping
from typing import Any, NamedTuple


class Reads(NamedTuple):
    """What a code object reads, with all that is nested in it.

    Attributes:
        globals: the globals that it reads and never sets.
        names: all names in it: globals, attributes, and what is imported.
        imports: what it imports itself, as level and name.
    """

    globals: set[str]
    names: set[str]
    imports: set[tuple[int, str]]


def reads_of(code: types.CodeType) -> Reads:
    """What `code` reads.

    Example:

    >>> def scaled(x):
    ...     from math import pi
    ...     return x * pi * FACTOR
    >>> reads_of(scaled.__code__).globals, reads_of(scaled.__code__).imports
    ({'FACTOR'}, {(0, 'math')})
    """
    read: set[str] = set()
    written: set[str] = set()
    names = set(code.co_names)
    imports: set[tuple[int, str]] = set()
    # The first half of a long argument stands between what belongs together.
    instructions = [each for each in dis.get_instructions(code) if each.opname != "EXTENDED_ARG"]
    for i, instruction in enumerate(instructions):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            read.add(instruction.argval)
        elif instruction.opname == "STORE_GLOBAL":  # state, such as a count of calls
            written.add(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":  # it follows the level and what is taken of it
            imports.add((instructions[i - 2].argval, instruction.argval))
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            inner = reads_of(each)
            read |= inner.globals
            names |= inner.names
            imports |= inner.imports
    return Reads(read - written, names, imports)


def modules(imports: set[tuple[int, str]], space: Mapping[str, Any]) -> set[str]:
    """The names of modules that code with the globals `space` imports, and of the packages that it
    gets by that.

    Example:

    >>> sorted(modules({(0, "os.path"), (1, "ops")}, {"__package__": "birds"}))
    ['birds', 'birds.ops', 'os', 'os.path']
    """
    found = set()
    for level, name in imports:
        whole = name
        if level:
            package = space.get("__package__") or space.get("__name__", "").rpartition(".")[0]
            try:
                whole = importlib.util.resolve_name("." * level + name, package)
            except ImportError:  # there is no such package
                continue
        found |= {whole, whole.partition(".")[0]}  # `import a.b` gives a
    return found
