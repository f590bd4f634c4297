import copy

import keras
import pytest

from keras_xfer import Backbone, Stage, StagedUnfreezing
from keras_xfer.freezing import find_backbone
from keras_xfer.stages import gradual
from keras_xfer.stages.current import current_stage, set_current_stage
from keras_xfer.stages.planning import group_rates, resolve, stage_at
from tests import schedules
from tests.stages import residual

pytestmark = pytest.mark.core


@pytest.fixture
def backbone():
    layers = [keras.layers.Dense(2, name=name) for name in ("a", "b", "c")]
    return Backbone(keras.Sequential([keras.Input((2,)), *layers]))


@pytest.mark.parametrize(
    ("stages", "error", "match"),
    [
        ([], ValueError, "at least one stage"),
        (Stage(), TypeError, "list of keras_xfer.Stage"),
        ([None], TypeError, "list of keras_xfer.Stage"),
        ([Stage(), Stage("all", learning_rate=1)], ValueError, "in stage 1 of 2"),
        ([Stage(epochs=1), Stage("all")], ValueError, r"learning_rate=None.*stage 2"),
        ([Stage("all")], ValueError, "learning_rate=None"),
        (
            [Stage("b", epochs=1, learning_rate=1), Stage("c", learning_rate=1)],
            ValueError,
            "freezes again",
        ),
        (
            [Stage("b", epochs=1, learning_rate=1), Stage(None, learning_rate=1)],
            ValueError,
            "freezes again",
        ),
        ([Stage(epochs=1), Stage("bb", learning_rate=1)], ValueError, r"Stage 2: .*'b'"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(backbone, stages, error, match):
    with pytest.raises(error, match=match):
        resolve(stages, backbone)


def test_stages_are_placed_in_epochs_and_layers(backbone):
    planned = resolve(
        [
            Stage(epochs=2, name="head"),
            Stage("c", epochs=3, learning_rate=1e-3),
            Stage("c", epochs=1),
            Stage("all", learning_rate=1e-4),
        ],
        backbone,
    )
    assert [(p.first_epoch, p.end_epoch, p.position) for p in planned] == [
        (0, 2, None),
        (2, 5, 2),
        (5, 6, 2),
        (6, None, 0),
    ]
    assert [stage_at(planned, epoch).index for epoch in range(8)] == [0, 0, 1, 1, 1, 2, 3, 3]
    assert planned[0].label == "stage 1 (head)"


def test_resolving_changes_nothing(backbone):
    resolve([Stage(epochs=1), Stage("all", learning_rate=1e-4)], backbone)
    assert not backbone.trainable_variables


def test_the_current_stage_is_told_for_a_model():
    model = keras.Sequential()
    assert current_stage(model) is None
    set_current_stage(model, 0)
    assert current_stage(model) == 0
    set_current_stage(model, None)
    assert current_stage(model) is None


# --- Gradual unfreezing ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "starts", "names"),
    [
        ({}, [None, "two", "one", "all"], ["head", "from two", "from one", "everything"]),
        ({"blocks_per_stage": 2}, [None, "one", "all"], ["head", "from one", "everything"]),
        ({"blocks_per_stage": 9}, [None, "all"], ["head", "everything"]),
        ({"num_stages": 1}, [None], ["head"]),
        ({"num_stages": 2}, [None, "two"], ["head", "from two"]),
        ({"num_stages": 9}, [None, "two", "one", "all"], ["head", "from two", "from one", "everything"]),
        ({"name": "mine"}, [None, "two", "one", "all"], ["mine"] * 4),
    ],
)  # fmt: skip
def test_gradual_unfreezing_goes_block_by_block(arguments, starts, names):
    backbone = residual.model().get_layer("base")
    stages = gradual(backbone, learning_rate=1e-3, epochs_per_stage=3, patience=2, **arguments)
    assert [stage.unfreeze for stage in stages] == starts
    assert [stage.name for stage in stages] == names
    assert {(stage.epochs, stage.patience, stage.learning_rate) for stage in stages} == {
        (3, 2, 1e-3)
    }
    resolve(stages, backbone)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the graph is the same on every backend"
)
def test_gradual_unfreezing_of_an_application():
    backbone = Backbone.from_application("MobileNetV2", weights=None, input_shape=(32, 32, 3))
    stages = gradual(backbone, learning_rate=1e-3, blocks_per_stage=4)
    assert [stage.unfreeze for stage in stages] == [None, "block_13", "block_9", "block_5", "block_1", "all"]  # fmt: skip
    assert len(backbone.blocks) == 17
    counts = []
    for stage in stages[1:]:
        backbone.unfreeze(stage.unfreeze)
        counts.append(len(backbone.trainable_variables))
    # Inverted bottlenecks of three convolutions each, the last convolution of the model, the first
    # bottleneck of two, which has no join to end at, and the stem.
    assert counts == [3 * 4 + 1, 3 * 8 + 1, 3 * 12 + 1, 3 * 16 + 1 + 2, 3 * 16 + 1 + 2 + 1]


def test_a_layer_elsewhere_may_have_the_name_of_a_block():
    inputs = keras.Input((4,))
    x = keras.layers.Dense(4, name="two")(inputs)  # the name that the last block would have
    for name in ("one", "two"):
        added = keras.layers.Dense(4, name=f"{name}_dense")(x)
        x = keras.layers.Add(name=f"{name}_add")([x, added])
    backbone = Backbone(keras.Model(inputs, x))
    trained = []
    for stage in gradual(backbone, learning_rate=1e-3)[1:]:
        backbone.unfreeze(stage.unfreeze)
        trained.append(len(backbone.trainable_variables))
    assert trained == [2, 4, 6]


class _Block:
    """A block that a user's own `Thawable` names as some layer elsewhere."""

    def __init__(self, name, layers):
        self.name, self.layers = name, layers


class _Renamed(Backbone):
    @property
    def blocks(self):
        low, bn, high = self.model.layers
        return (_Block("high", (low, bn)), _Block("low", (high,)))


def test_a_block_that_is_called_like_a_layer_elsewhere_is_said_by_its_first_layer():
    backbone = _Renamed(schedules.model().get_layer("base").model)
    assert [stage.unfreeze for stage in gradual(backbone, learning_rate=1.0)] == [None, "high", "all"]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"learning_rate": None}, ValueError, "learning_rate for gradual"),
        ({"blocks_per_stage": 0}, ValueError, "blocks_per_stage of at least 1"),
        ({"blocks_per_stage": 1.0}, TypeError, "blocks_per_stage to be an int"),
        ({"num_stages": 0}, ValueError, "num_stages of at least 1"),
        ({"num_stages": True}, TypeError, "num_stages to be an int"),
        ({"epochs_per_stage": None}, ValueError, "epochs_per_stage=None, patience=None"),
        ({"epochs_per_stage": 0}, ValueError, "epochs"),
        ({"layer_decay": 2}, ValueError, "layer_decay"),
    ],
)
def test_what_is_wrong_with_gradual_unfreezing_is_said_at_once(arguments, error, match):
    arguments = {"learning_rate": 1e-3, **arguments}
    with pytest.raises(error, match=match):
        gradual(residual.model().get_layer("base"), **arguments)
    with pytest.raises(error, match=match):
        StagedUnfreezing.gradual(**arguments)


# --- Rates -----------------------------------------------------------------------------------


def test_every_variable_has_the_rate_of_its_block():
    model = residual.model()
    stage = Stage("all", learning_rate=1.0, layer_decay=0.5)
    rates = {
        variable.path.split("/")[-2]: group.rate(0)
        for group in group_rates(stage, model, model.get_layer("base"))
        for variable in group.variables
    }
    assert rates == {"head": 1.0, "two_dense": 0.5, "one_dense": 0.25, "stem": 0.125}


def test_a_weight_outside_of_all_layers_trains_as_the_lowest_block():
    """As the class token of a vision transformer."""

    class Transformer(keras.Model):
        def __init__(self):
            super().__init__()
            self.token = self.add_weight(shape=(1, 4), name="token")
            self.low = keras.layers.Dense(4, name="low")
            self.high = keras.layers.Dense(4, name="high")

        def call(self, inputs):
            return self.high(self.low(inputs + self.token))

    inner = Transformer()
    inner(keras.ops.ones((1, 4)))
    model = keras.Sequential([keras.Input((4,)), Backbone(inner, name="base")])
    groups = group_rates(
        Stage("all", learning_rate=1.0, layer_decay=0.5), model, find_backbone(model)
    )
    rates = {v.path.split("/", 1)[-1]: g.rate(0) for g in groups for v in g.variables}
    assert {path.split("/")[-1]: rate for path, rate in rates.items() if "token" in path} == {
        "token": 0.25
    }
    assert {id(v) for g in groups for v in g.variables} == {id(v) for v in model.weights}


def test_a_layer_that_two_blocks_share_has_one_rate():
    inputs = keras.Input((4,))
    shared = keras.layers.Dense(4, name="shared")
    x = keras.layers.Add(name="one_add")([inputs, shared(inputs)])
    x = keras.layers.Add(name="two_add")([x, keras.layers.Dense(4, name="two_dense")(shared(x))])
    model = keras.Sequential([keras.Input((4,)), Backbone(keras.Model(inputs, x), name="base")])
    stage = Stage("all", learning_rate=1.0, layer_decay=0.5)
    groups = group_rates(stage, model, model.get_layer("base"))
    variables = [id(variable) for group in groups for variable in group.variables]
    assert len(variables) == len(set(variables)) == 4


# --- The dry run -----------------------------------------------------------------------------

SCHEDULE = [
    Stage(epochs=2, learning_rate=1e-2, name="head"),
    Stage(
        "high",
        epochs=3,
        patience=2,
        learning_rate=keras.optimizers.schedules.CosineDecay(0.1, 10),
        warmup_epochs=1,
    ),
    Stage("high", patience=1),
    Stage(0, epochs=4, learning_rate={"head": 1e-3, "backbone": 1e-4}),
    Stage("all"),
]


def test_the_plan_is_what_one_counts_by_hand():
    model = schedules.model()
    low, norm, high, head = 6 * 8 + 8, 4 * 8, 8 * 4 + 4, 4 * 3 + 3
    everything = low + norm + high + head
    plan = StagedUnfreezing(SCHEDULE).plan(model)
    assert plan.columns == (
        "stage", "epochs", "unfreeze", "blocks", "layers", "parameters", "trainable", "batch_norm",
        "learning_rate",
    )  # fmt: skip
    assert list(plan.rows) == [
        ("1 head", "1 to 2", "-", "0 of 1", "0 of 3", everything, head, "frozen", "0.01"),
        ("2", "3 to 5, patience 2", "high", "1 of 1", "1 of 3", everything, head + high, "frozen",
         "CosineDecay, warm-up 1 epochs"),
        ("3", "from 6, patience 1", "high", "1 of 1", "1 of 3", everything, head + high, "frozen",
         "as before"),
        ("4", "up to 4", "0", "1 of 1", "3 of 3", everything, head + high + low, "frozen",
         "head 0.001, backbone 0.0001"),
        ("5", "to the end", "all", "1 of 1", "3 of 3", everything, head + high + low, "frozen",
         "as before"),
    ]  # fmt: skip


def test_the_plan_of_layer_decay():
    plan = StagedUnfreezing(
        [
            Stage(learning_rate=1e-2, layer_decay=0.5, patience=1),
            Stage("two", learning_rate=1e-3, layer_decay=0.5, patience=1),
            Stage("all", learning_rate={"head": 1e-2, "backbone": 1e-3}, layer_decay=0.5),
        ]
    ).plan(residual.model())
    assert [(row[1], row[3], row[6], row[8]) for row in plan.rows] == [
        ("from 1, patience 1", "0 of 3", 15, "head 0.01"),
        ("as many as help, patience 1", "1 of 3", 35, "head 0.001, two 0.0005"),
        ("to the end", "3 of 3", 83, "head 0.01, two 0.001, ... stem 0.00025"),
    ]


@pytest.mark.parametrize("batch_norm", ["frozen", "affine", "train"])
def test_the_plan_changes_nothing(batch_norm):
    keras.utils.set_random_seed(1)
    inner = schedules.model().get_layer("base").model
    model = keras.Sequential(
        [
            keras.Input((6,)),
            Backbone(inner, name="base", batch_norm=batch_norm),
            keras.layers.Dense(3, name="head"),
            keras.layers.Dense(3, name="frozen_head", trainable=False),
        ]
    )
    model.get_layer("base").unfreeze("bn")
    inner.get_layer("high").bias.trainable = False
    model.compile("adam", schedules.LOSS(from_logits=True))
    x, y = schedules.data()
    model.fit(x, y, **schedules.BATCH)

    def state():
        return (
            [layer.trainable for layer in [model, *model.layers, *inner.layers]],
            [weight.trainable for weight in model.weights],
            [id(weight) for weight in model.trainable_variables],
            id(model.optimizer),
            [id(weight) for weight in model.optimizer.variables],
            id(model.train_function),
            model.get_layer("base").get_config()["trainable"],
        )

    before = copy.deepcopy(state())
    assert StagedUnfreezing(SCHEDULE).plan(model).rows[-1][6] < model.count_params() - 12
    assert state() == before


def test_the_plan_says_what_batch_normalization_does():
    for policy, state in (("frozen", "frozen"), ("affine", "affine"), ("train", "train")):
        inner = schedules.model().get_layer("base").model
        model = keras.Sequential([keras.Input((6,)), Backbone(inner, batch_norm=policy)])
        model.add(keras.layers.Dense(3))
        plan = StagedUnfreezing([Stage(epochs=1), Stage("all", learning_rate=1.0)]).plan(model)
        assert [row[7] for row in plan.rows] == ["frozen", state]


def test_a_plan_that_cannot_be_is_refused():
    model = schedules.model()
    with pytest.raises(ValueError, match=r"Stage 1: .*'high'"):
        StagedUnfreezing([Stage("hihg", learning_rate=1.0)]).plan(model)
    with pytest.raises(ValueError, match="freezes again"):
        StagedUnfreezing(
            [Stage("all", epochs=1, learning_rate=1.0), Stage("high", learning_rate=1.0)]
        ).plan(model)
    unbuilt = keras.Sequential([model.get_layer("base"), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="Expected a built model"):
        StagedUnfreezing([Stage()]).plan(unbuilt)
