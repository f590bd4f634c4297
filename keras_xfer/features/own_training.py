"""Whether a layer acts otherwise while training by code of its user's own."""

import ast
import inspect
import textwrap
import types
from typing import Any

import keras

from keras_xfer import freezing
from keras_xfer.features import code


def acts_by_own_code(layer: keras.Layer) -> bool:
    """Whether code of the user's own may do other things while `layer` is trained.

    Code that does nothing with `training` but hand it on to layers does not act itself: those
    layers answer for themselves. Code that cannot be read is taken to act.
    """
    if isinstance(layer, keras.layers.Lambda):
        return _takes_training(layer.function)
    if freezing.holds_back_training(vars(layer).get("call")):
        return False
    functions = [
        inspect.unwrap(getattr(value, "python_function", value))  # of tf.function, of decorators
        for cls in type(layer).__mro__
        if not code.is_of_the_stack(cls.__module__)
        for value in vars(cls).values()
        if callable(value) or isinstance(value, staticmethod | classmethod)
    ]
    return any(
        isinstance(function, types.FunctionType)
        and _takes_training(function)
        and not _only_hands_it_on(function, layer)
        for function in functions
    )


def _takes_training(function: Any) -> bool:
    try:
        return "training" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # built in
        return False


def _only_hands_it_on(function: types.FunctionType, layer: keras.Layer) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return False
    handed_on = {
        id(keyword.value)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and _is_of_a_layer(call.func, function, layer)
        for keyword in call.keywords
        if keyword.arg == "training"
    }
    names = [each for each in ast.walk(tree) if isinstance(each, ast.Name)]
    return all(id(each) in handed_on for each in names if each.id == "training")


def _is_of_a_layer(called: ast.expr, function: types.FunctionType, layer: keras.Layer) -> bool:
    """Whether what is called is a layer, or a method of `layer`, which is read by itself."""
    known = function.__code__.co_varnames
    match called:
        case ast.Attribute(ast.Name(name), attribute) if name == known[0]:  # self
            value = getattr(layer, attribute, None)
            own = isinstance(value, types.MethodType) and value.__self__ is layer
            return own or value is None or isinstance(value, keras.Layer)  # None is not called
    while not isinstance(called, ast.Name):
        if isinstance(called, ast.Attribute | ast.Subscript):
            called = called.value
        elif isinstance(called, ast.Call):
            called = called.func
        else:
            return False
    return called.id in (*known, "super")  # what is held in a list, for one
