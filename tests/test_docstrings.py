"""Every exported name says what it is, in one order, with an example and its source."""

import inspect
import re
from pathlib import Path

import keras
import pytest

import keras_xfer
from keras_xfer import callbacks, features, layers, reports, stages, tuner

NAMESPACES = (keras_xfer, layers, callbacks, features, stages, reports, tuner)
EXPORTED = {
    f"{name}": getattr(namespace, name)
    for namespace in NAMESPACES
    for name in getattr(namespace, "__all__", ("Stage",))
    if callable(getattr(namespace, name))
}
ORDER = ["Args:", "Input shape:", "Output shape:", "Returns:", "Raises:", "Example:", "Reference:"]


@pytest.mark.parametrize("name", sorted(EXPORTED))
def test_an_exported_name_is_documented(name):
    doc = inspect.getdoc(EXPORTED[name])
    assert doc
    sections = re.findall(rf"^({'|'.join(ORDER)})$", doc, re.MULTILINE)
    assert sections == [each for each in ORDER if each in sections], "sections out of order"
    assert "Example:" in sections
    assert ">>>" in doc
    arguments = set(inspect.signature(EXPORTED[name]).parameters) - {"args", "kwargs"}
    if arguments:
        assert "Args:" in sections
        described = doc.split("Args:")[1]
        assert not {each for each in arguments if not re.search(rf"\b{each}\b", described)}
    if issubclass(type(EXPORTED[name]), type) and issubclass(EXPORTED[name], keras.Layer):
        assert {"Input shape:", "Output shape:"} <= set(sections)


def test_the_readme_names_every_component():
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    classes = [name for name in keras_xfer.__all__ if inspect.isclass(getattr(keras_xfer, name))]
    assert not [name for name in classes if f"`{name}`" not in text]
