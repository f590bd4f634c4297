"""What `fit_staged` gives to `fit` beside the data."""

import keras
import numpy as np
import pytest

from keras_xfer import StagedUnfreezing
from tests.features.test_fit_staged import EAGER, SCHEDULE, cached, compiled, data
from tests.schedules import assert_equal_weights, weights

pytestmark = pytest.mark.core


@pytest.mark.parametrize("is_one_hot", [False, True])
def test_a_class_that_class_weight_leaves_out_counts_as_one(is_one_hot):
    """As in `Model.fit` on arrays; the oracle weighs each row itself."""
    x, y = data()
    labels = np.eye(3, dtype="float32")[y] if is_one_hot else y
    expected, found = compiled(), compiled()
    if is_one_hot:
        for model in (expected, found):
            loss = keras.losses.CategoricalCrossentropy(from_logits=True)
            model.compile(keras.optimizers.Adam(1e-2), loss, **EAGER)
    before = weights(found)
    expected.fit(
        x, labels, sample_weight=np.where(y == 0, 3.0, 1.0), batch_size=8, shuffle=False, verbose=0,
        callbacks=[StagedUnfreezing(SCHEDULE[:1])],
    )  # fmt: skip
    cached(found, SCHEDULE[:1], x=x, y=labels, batch_size=8, epochs=1, class_weight={0: 3.0})
    assert_equal_weights(expected, found, rtol=1e-4, atol=1e-7)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(before, weights(found), strict=True))
