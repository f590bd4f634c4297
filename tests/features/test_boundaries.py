"""Where stages are cut, against costs summed by hand."""

import itertools

import keras
import numpy as np
import pytest

from keras_xfer import Backbone, Stage
from keras_xfer.features import boundaries
from keras_xfer.features.boundaries import Boundary, choose
from keras_xfer.stages import planning

pytestmark = [
    pytest.mark.core,
    # Keras's convert_to_numpy calls np.array on torch tensors, whose `__array__` does not take
    # NumPy 2's `copy` yet.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning"),
]

layers = keras.layers
PLENTY = 1e12


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def stack(widths, name="d"):
    """Dense layers named after their place, on an input of the first width."""
    first, *rest = widths
    return keras.Sequential(
        [keras.Input((first,)), *(layers.Dense(n, name=f"{name}{i}") for i, n in enumerate(rest))]
    )


def model_of(base, *below, above=None, shape=None, **kwargs):
    """A model with `base` as backbone and a head."""
    shape = base.input_shape[1:] if shape is None else shape
    above = [layers.Dense(3, name="head")] if above is None else above
    return keras.Sequential(
        [keras.Input(shape), *below, Backbone(base, name="base", **kwargs), *above]
    )


def stage(unfreeze=None, epochs=5):
    return Stage(unfreeze, epochs=epochs, learning_rate=0.1)


def chosen(model, *stages, epochs=None, images=100, budget_bytes=PLENTY, **kwargs):
    backbone = model.get_layer("base")
    planned = planning.resolve(stages, backbone)
    if epochs is None:
        epochs = sum(each.epochs for each in stages)
    return choose(
        model, backbone, planned, epochs=epochs, images=images, budget_bytes=budget_bytes, **kwargs
    )


# 256 -> d0 512 -> d1 16 -> d2 256 -> d3 8
WIDTHS = (256, 512, 16, 256, 8)


def costs(widths):
    """The FLOPs of each layer of `stack`, two for each weight."""
    return [2 * (above * below + above) for below, above in itertools.pairwise(widths)]


SHARES = np.cumsum(costs(WIDTHS)) / sum(costs(WIDTHS))


# --- Where ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_the_head_is_always_cached(mode):
    for epochs in (2, 50):
        (only,) = chosen(model_of(stack(WIDTHS)), stage(epochs=epochs), mode=mode)
        assert (only.at, only.bytes_per_image) == ("head", 8 * 4)
    tiny = model_of(stack((2, 2)))  # however little there is to save
    assert chosen(tiny, stage(epochs=2), mode=mode)[0].at == "head"


def test_stages_are_cut_where_an_epoch_costs_least():
    model = model_of(stack(WIDTHS))
    found = chosen(model, stage(), stage("d3"), stage("d2"), stage("d1"), stage("all"))
    assert [each.stage for each in found] == [0, 1, 2, 3, 4]
    # d3 begins with 256 numbers, of which 16 were made: those are kept
    assert [each.at for each in found] == ["head", "after d1", "before d2", "before d1", None]
    assert [each.bytes_per_image for each in found] == [32, 64, 64, 2048, None]
    shares = [each.flops_share for each in found]
    assert shares[:4] == pytest.approx([1.0, SHARES[1], SHARES[1], SHARES[0]])
    assert shares[4] is None
    assert "nothing of the backbone is frozen" in found[4].reason


def cheapest(widths):
    """Where `stack(widths)` is best cut if its last layer trains, summed by hand."""
    flops = costs(widths)
    share = np.cumsum(flops) / sum(flops)
    cost = [1 - share[i] + 100 * 4 * widths[i + 1] / sum(flops) for i in range(len(flops) - 1)]
    best = int(np.argmin(cost))
    if share[best] < 0.1:
        return None
    return f"before d{best + 1}" if best == len(cost) - 1 else f"after d{best}"


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX compiles for each size")
def test_the_cheapest_of_all_cuts_by_hand():
    rng = np.random.default_rng(0)
    drawn = [tuple(map(int, rng.choice([4, 16, 64, 256, 1024], size=5))) for _ in range(200)]
    places = {}
    for widths in drawn:
        places.setdefault(cheapest(widths), []).append(widths)
    assert set(places) == {None, "after d0", "after d1", "before d3"}
    for expected, those in places.items():
        for widths in those[:3]:
            (found,) = chosen(model_of(stack(widths)), stage("d3"))
            assert found.at == expected, widths


def test_a_cut_at_which_skips_cross_counts_all_of_them():
    inputs = keras.Input((64,))
    low = layers.Dense(64, name="low")(inputs)
    x = layers.Dense(48, name="mid")(low)
    x = layers.Concatenate(name="both")([layers.Dense(32, name="top")(x), low])
    model = model_of(keras.Model(inputs, x))
    (found,) = chosen(model, stage("top"), mode="always")
    total = sum(costs((64, 64, 48, 32))) + 96  # the join is one FLOP an element
    before = 1 - sum(costs((64, 64, 48))) / total + 100 * 4 * (48 + 64) / total
    after_low = 1 - sum(costs((64, 64))) / total + 100 * 4 * 64 / total
    assert after_low < before
    assert (found.at, found.bytes_per_image) == ("after low", 256)
    (found,) = chosen(model_of(keras.Model(inputs, x)), stage("mid"), mode="always")
    assert found.bytes_per_image == 256


def test_halves_are_those_of_the_cut():
    model = model_of(stack(WIDTHS))
    x = np.random.default_rng(0).normal(size=(3, 256)).astype("float32")
    found = chosen(model, stage(), stage("d3"), stage("d1"))
    for each, shape in zip(found, [(None, 8), (None, 16), (None, 512)], strict=True):
        assert each.halves[0].output_shape == shape
        np.testing.assert_allclose(
            to_numpy(each.halves[1](to_numpy(each.halves[0](x)))), to_numpy(model(x)), rtol=1e-4
        )


def test_pooling_on_top_of_a_backbone_is_below_the_cut_at_the_head():
    base = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3, name="conv")])
    above = [
        *(layers.GlobalAveragePooling2D(), layers.Dropout(0.5), layers.Dense(3, name="top")),
    ]
    (found,) = chosen(model_of(base, above=above), stage())
    assert (found.at, found.bytes_per_image) == ("head", 4 * 4)
    assert found.halves[0].output_shape == (None, 4)
    assert {each.name for each in found.halves[1].layers} >= {"top", above[1].name}
    above = [layers.MaxPooling2D(2), layers.Flatten(), layers.Dense(3)]
    (found,) = chosen(model_of(base, above=above), stage())
    assert found.bytes_per_image == 3 * 3 * 4 * 4
    (found,) = chosen(model_of(base, above=[layers.Conv2D(2, 3), layers.MaxPooling2D(2)]), stage())
    assert found.bytes_per_image == 6 * 6 * 4 * 4  # the pooling is above what trains


def test_pooling_that_begins_a_nested_head_is_below_the_cut_too():
    base = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3, name="conv")])
    head = keras.Sequential([layers.GlobalAveragePooling2D(), layers.Dense(3)])
    (found,) = chosen(model_of(base, above=[head]), stage())
    assert found.bytes_per_image == 4 * 4


def test_narrow_dtypes_take_fewer_bytes():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = model_of(stack(WIDTHS), dtype="mixed_bfloat16")
    keras.config.set_dtype_policy("float32")
    found = chosen(model, stage(), stage("d3"))
    assert [each.bytes_per_image for each in found] == [16, 32]


# --- The same choice every time ---------------------------------------------------------------------


def test_the_choice_is_the_same_again():
    model = model_of(stack(WIDTHS))
    stages = [stage(), stage("d3"), stage("d1")]
    assert chosen(model, *stages) == chosen(model, *stages) == chosen(model, *stages)


def test_the_choice_is_the_same_for_a_model_made_again():
    def facts(found):
        return [
            (each.bytes_per_image, each.flops_share, len(each.halves[0].weights)) for each in found
        ]

    def made():
        base = keras.Sequential([keras.Input((256,)), *(layers.Dense(n) for n in WIDTHS[1:])])
        return model_of(base)

    stages = [stage(), stage(3), stage(-2), stage(0.75)]
    one = made()
    layers.Dense(1)  # numbers are taken
    other = made()
    inside = [each.get_layer("base").model.layers[0].name for each in (one, other)]
    assert inside[0] != inside[1]
    first = facts(chosen(one, *stages))
    assert first == facts(chosen(other, *stages))
    assert [row[2] for row in first] == [8, 4, 4, 2]


@pytest.mark.parametrize("start", ["all", "d2"])
def test_the_choice_does_not_depend_on_what_trained_before(start):
    model = model_of(stack(WIDTHS))
    stages = [stage(), stage("d3")]
    expected = chosen(model, *stages)
    model.get_layer("base").unfreeze(start)  # as an earlier schedule leaves it
    assert chosen(model, *stages) == expected


# --- What speaks against it -------------------------------------------------------------------------


def test_a_single_epoch_is_not_cached():
    model = model_of(stack(WIDTHS))
    found = chosen(model, stage(epochs=1), stage("d3", epochs=2))
    assert [each.at for each in found] == [None, "after d1"]
    assert "single epoch" in found[0].reason
    found = chosen(model, stage(epochs=1), stage("d3", epochs=1), mode="always")
    assert [each.at for each in found] == ["head", "after d1"]


def test_stages_that_train_the_same_share_their_epochs():
    found = chosen(model_of(stack(WIDTHS)), stage(epochs=1), stage(epochs=1))
    assert [each.at for each in found] == ["head", "head"]
    assert [each.stage for each in found] == [0, 1]
    assert found[0].halves is found[1].halves


def test_a_last_stage_without_epochs_lasts_as_long_as_the_fit():
    model = model_of(stack(WIDTHS))
    open_ended = Stage("d3", learning_rate=0.1)
    assert [each.at for each in chosen(model, stage(), open_ended, epochs=7)] == [
        *("head", "after d1")
    ]
    assert chosen(model, stage(), open_ended, epochs=6)[1].at is None


def test_a_stage_that_the_fit_cuts_short_lasts_as_long_as_the_fit():
    model = model_of(stack(WIDTHS))
    found = chosen(model, stage(epochs=5), stage("d3", epochs=5), epochs=6)
    assert [each.at for each in found] == ["head", None]


def test_a_small_share_is_not_worth_its_bytes():
    tiny = stack((16, 16, 512))
    share = costs((16, 16))[0] / sum(costs((16, 16, 512)))
    assert share < boundaries.LEAST_SHARE
    (found,) = chosen(model_of(tiny), stage("d1"))
    assert found == Boundary(0, None, None, None, found.reason)
    assert "only 3% of the forward pass is frozen, less than 10%" in found.reason
    (found,) = chosen(model_of(stack((16, 16, 512))), stage("d1"), mode="always")
    assert (found.at, found.bytes_per_image) == ("before d1", 64)
    assert found.flops_share == pytest.approx(share)


def test_the_budget_holds_for_each_stage():
    model = model_of(stack(WIDTHS))
    stages = [stage(), stage("d3"), stage("d1")]  # 32, 64 and 2048 bytes an image
    found = chosen(model, *stages, images=1000, budget_bytes=64_000)
    assert [each.at for each in found] == ["head", "after d1", None]
    assert "1.95 MiB of features are more than the 62.5 KiB" in found[2].reason
    found = chosen(model, *stages, images=1000, budget_bytes=63_999)
    assert [each.at for each in found] == ["head", None, None]
    found = chosen(model, *stages, images=1000, budget_bytes=1, mode="always")
    assert [each.at for each in found] == ["head", "after d1", "before d1"]


def test_what_is_not_known_beforehand():
    model = model_of(stack(WIDTHS))
    (found,) = chosen(model, stage(), images=None)
    assert found.at is None
    assert "the number of images is not known" in found.reason
    assert chosen(model, stage(), images=None, mode="always")[0].at == "head"

    def any_size():
        return keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(4, 3, name="conv")])

    above = [layers.Conv2D(2, 1)]
    (found,) = chosen(model_of(any_size(), above=above), stage())
    assert found.at is None
    assert "the size of its features is not known" in found.reason
    above = [layers.GlobalMaxPooling2D(), layers.Dense(2)]
    (found,) = chosen(model_of(any_size(), above=above), stage())
    assert (found.at, found.bytes_per_image) == ("head", 16)


def test_images_of_the_size_that_the_model_takes():
    """Where the backbone takes any size, FLOPs and bytes are those of the model's own."""
    base = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            layers.Conv2D(4, 3, strides=2, padding="same", name="one"),
            layers.Conv2D(8, 3, padding="same", name="two"),
        ]
    )
    (found,) = chosen(model_of(base, shape=(8, 8, 3)), stage("two"))
    assert found.at == "before two"
    assert found.bytes_per_image == 4 * 4 * 4 * 4
    one, two = 16 * (27 * 4 + 4), 16 * (36 * 8 + 8)
    assert found.flops_share == pytest.approx(one / (one + two))


def test_never_is_never():
    found = chosen(model_of(stack(WIDTHS)), stage(), stage("d3"), mode="never")
    assert [each.at for each in found] == [None, None]
    assert {each.reason for each in found} == {"boundary='never'"}
    assert [each.stage for each in found] == [0, 1]


def test_a_backbone_without_a_graph_is_cut_at_its_end_alone():
    model = model_of(own(), shape=(4,))
    (found,) = chosen(model, stage())
    assert (found.at, found.bytes_per_image) == ("head", 16)
    assert chosen(model, stage("top"))[0].at is None


def own():
    class Own(keras.Model):
        def __init__(self):
            super().__init__(name="mine")
            self.low, self.top = layers.Dense(4, name="low"), layers.Dense(4, name="top")

        def call(self, inputs):
            return self.top(self.low(inputs))

    model = Own()
    model(np.ones((1, 4), "float32"))
    return model


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_why_a_backbone_without_a_graph_is_not_cut_inside(mode):
    model = model_of(own(), shape=(4,))
    if mode == "always":
        with pytest.raises(ValueError, match="graph"):
            chosen(model, stage("top"), mode=mode)
    else:
        assert "graph" in chosen(model, stage("top"))[0].reason


# --- What would change ------------------------------------------------------------------------------


class Shaky(layers.Layer):
    def call(self, inputs, training=False):
        return inputs + keras.random.normal(keras.ops.shape(inputs)) if training else inputs


LIVE = {
    "augmentation": (
        lambda: layers.GaussianNoise(0.1, name="wobble"),
        r"'wobble' \(GaussianNoise\) below the cut act randomly.*views=K",
    ),
    "nested augmentation": (
        lambda: keras.Sequential([layers.GaussianNoise(0.1, name="wobble")]),
        r"'wobble' \(GaussianNoise\) below the cut act randomly.*views=K",
    ),
    "normalization": (
        lambda: layers.BatchNormalization(name="bn"),
        r"'bn' \(BatchNormalization\) below the cut write to their weights.*inside the Backbone",
    ),
    "code of one's own": (
        lambda: Shaky(name="wobble"),
        r"'wobble' \(Shaky\) below the cut may act while training.*SeedGenerator.*inside the Backbone",
    ),
    "what trains": (
        lambda: layers.Dense(256, name="low"),
        r"low/kernel' below the cut trains.*trainable to False",
    ),
}


@pytest.mark.parametrize("what", LIVE)
@pytest.mark.parametrize("start", [None, "d3"])
def test_what_changes_below_a_cut_is_refused_by_name(what, start):
    make, message = LIVE[what]
    model = model_of(stack(WIDTHS), make(), shape=(256,))
    (found,) = chosen(model, stage(start))
    assert found == Boundary(0, None, None, None, found.reason)
    assert found.halves is None
    with pytest.raises(ValueError, match=message) as raised:
        chosen(model, stage(start), mode="always")
    assert found.reason == str(raised.value)
    assert chosen(model, stage(start), mode="never")[0].reason == "boundary='never'"


def test_what_is_mended_is_cached():
    for what in ("normalization", "what trains"):
        layer = LIVE[what][0]()
        model = model_of(stack(WIDTHS), layer, shape=(256,))
        layer.trainable = False
        assert chosen(model, stage())[0].at == "head"


def test_views_allow_augmentation_and_nothing_else():
    model = model_of(stack(WIDTHS), LIVE["augmentation"][0]())
    assert chosen(model, stage(), augments=True)[0].at == "head"
    below = [LIVE["augmentation"][0](), LIVE["normalization"][0]()]
    with pytest.raises(ValueError, match="'bn'") as raised:
        chosen(model_of(stack(WIDTHS), *below), stage(), augments=True, mode="always")
    assert "wobble" not in str(raised.value)


def test_what_acts_inside_or_above_the_backbone_does_not_matter():
    base = keras.Sequential(
        [
            *(keras.Input((64,)), layers.Dense(64, name="a"), layers.Dropout(0.5)),
            *(layers.BatchNormalization(), layers.Dense(8, name="b")),
        ]
    )
    above = [layers.Dropout(0.5), layers.BatchNormalization(), layers.Dense(2)]
    found = chosen(model_of(base, above=above, batch_norm="train"), stage(), stage("b"))
    assert None not in [each.at for each in found]


# --- What is said -----------------------------------------------------------------------------------


def test_boundaries_explain_themselves():
    model = model_of(stack(WIDTHS))
    found = chosen(model, stage(), stage("d3", epochs=1), stage("d1"))
    assert [str(each) for each in found] == [
        "stage 1: cached at the head, 100% of the forward pass done once, 32 B an image",
        "stage 2: uncached, it lasts a single epoch, which would use each feature once",
        "stage 3: cached before d1, 90% of the forward pass done once, 2 KiB an image",
    ]


def test_mistakes_of_sizes_are_readable():
    model = model_of(stack(WIDTHS))
    for images, expected in ((2**21, "64 MiB"), (2**26, "2 GiB"), (2**35, "1 TiB")):
        (found,) = chosen(model, stage(), images=images, budget_bytes=0)
        assert f"{expected} of features are more than the 0 B" in found.reason
