"""A small table that prints itself, for the core, which needs Keras and NumPy alone."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a header; `print` it, or read `rows`.

    Args:
        columns: names of the columns.
        rows: one tuple a row, a value a column. Numbers are aligned to the right.

    Example:

    >>> print(Table(("block", "parameters"), [("stem", 896), ("top", 147584)]))
    block  parameters
    stem          896
    top       147,584

    Reference:
        https://docs.python.org/3/library/string.html#format-specification-mini-language
    """

    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]

    def __str__(self) -> str:
        cells = [self.columns, *([self._text(value) for value in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        right = [
            all(isinstance(value, int | float) for value in column)
            for column in (zip(*self.rows, strict=True) if self.rows else [()] * len(widths))
        ]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(row, widths, right, strict=True)
            ).rstrip()
            for row in cells
        )

    @staticmethod
    def _text(value: Any) -> str:
        return (
            f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        )
