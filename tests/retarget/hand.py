"""Training by hand: bare variables, gradients made by a formula, and Keras's own optimizers."""

import keras
import numpy as np

HEAD = {"head_kernel": (4, 2), "head_bias": (2,)}
LATE = {"late_kernel": (3, 4), "late_bias": (4,)}


def variables(shapes):
    """Variables with the same values whenever they are made."""
    return [
        keras.Variable(_values(i + len(shape), shape), name=name)
        for i, (name, shape) in enumerate(shapes.items())
    ]


def _values(seed, shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def gradients(step, of, scale=1.0):
    """The gradients of the variables `of` in step `step`, the same for the same names."""
    return [scale * _values(100 * step + sum(map(ord, v.name)), tuple(v.shape)) for v in of]


def clipped(grads, norm):
    """`grads` under a global norm of `norm`, as NumPy says it."""
    total = np.sqrt(sum(float((grad.astype("float64") ** 2).sum()) for grad in grads))
    return [(grad * min(1.0, norm / total)).astype("float32") for grad in grads]


def apply(optimizer, grads, of=None):
    optimizer.apply([keras.ops.convert_to_tensor(grad) for grad in grads], of)


def values(of):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in of]


def assert_same(one, other, **tolerance):
    """Bit for bit, but for a `tolerance`."""
    for mine, theirs in zip(one, other, strict=True):
        mine, theirs = values([mine, theirs])
        if tolerance:
            np.testing.assert_allclose(mine, theirs, **{"rtol": 0, **tolerance})
        else:
            np.testing.assert_array_equal(mine, theirs)
