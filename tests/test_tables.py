import dataclasses

import pytest

from keras_xfer.tables import Table


def test_it_prints_aligned_columns():
    table = Table(("name", "count", "state"), [("stem", 7, "-"), ("a longer one", 1234567, "on")])
    assert str(table) == (
        "name              count  state\nstem                  7  -\na longer one  1,234,567  on"
    )
    assert table.rows[1] == ("a longer one", 1234567, "on")


def test_wide_headers_and_mixed_columns():
    table = Table(("a wide header", "value"), [(1, 0.5), (22, "none")])
    assert str(table) == "a wide header  value\n            1  0.5\n           22  none"


def test_booleans_and_floats_are_written_as_python_does():
    assert str(Table(("yes", "rate"), [(True, 0.001)])).splitlines()[1].split() == ["True", "0.001"]


def test_without_rows_it_is_the_header():
    assert str(Table(("a", "bc"), [])) == "a  bc"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="zip"):
        str(Table(("a", "b"), [(1,)]))


def test_it_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Table(("a",), []).rows = [(1,)]
