"""What the tests of HubModule share: inputs for each SavedModel, and the oracles."""

import warnings

import keras
import numpy as np


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0, 1, shape).astype("float32")


def kerashub():
    """The module tensorflow_hub, imported."""
    with warnings.catch_warnings():  # of pkg_resources
        warnings.simplefilter("ignore")
        import tensorflow_hub
    return tensorflow_hub


def inputs_of(name):
    """A batch of four for the SavedModel of that name in `tests.saved_models`."""
    import tensorflow as tf

    return {
        "text": lambda: tf.constant(["a fine film", "dull", "one unheard-of", "film film"]),
        "tower": lambda: numbers(4, 8, 8, 3),
        "mobilenet": lambda: numbers(4, 32, 32, 3),
        "reusable": lambda: numbers(4, 4),
        "bare": lambda: numbers(4, 4),
        "dict_output": lambda: numbers(4, 8, 8, 3),
        "dict_input": lambda: {
            "numbers": numbers(4, 2),
            "words": tf.constant(["a", "fine", "", "film"]),
        },
        "list_input": lambda: [numbers(4, 2), numbers(4, 3, seed=1)],
        "ragged": lambda: tf.ragged.constant([[1], [2, 3], [4, 5, 0], [5]], dtype=tf.int64),
        "shapeless": lambda: numbers(4, 3),
        "counting": lambda: numbers(4, 3),
        "signatures": lambda: numbers(4, 3),
        "exported": lambda: numbers(4, 4),
    }[name]()


def assert_same(mine, theirs, **kwargs):
    """Equal nests, to the bit unless `atol` or `rtol` is given."""
    kwargs = {"rtol": 0, "atol": 0, **kwargs}
    mine, theirs = (keras.tree.map_structure(np.asarray, each) for each in (mine, theirs))
    keras.tree.assert_same_structure(mine, theirs)
    for one, other in zip(keras.tree.flatten(mine), keras.tree.flatten(theirs), strict=True):
        np.testing.assert_allclose(one, other, **kwargs)


def weights(layer):
    """Its weights by the names that the SavedModel gives them, as arrays."""
    named = {}
    for group in layer.groups:
        count = len(group.weights)
        for i, name in enumerate(group.aliases[-count:]):
            named[name] = np.array(getattr(group, f"variable_{i}"))
    return named


def moved(before, after):
    """The names of what is not the same any more."""
    assert before.keys() == after.keys()
    return {name for name in before if not np.array_equal(before[name], after[name])}
