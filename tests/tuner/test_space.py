"""What is searched, over which values, and when: told by KerasTuner's own HyperParameters."""

import re

import keras_tuner
import pytest

from keras_xfer.tuner.space import NAMES, TUNED, SearchSpace
from tests.tuner.hypermodels import hypermodel, tiny


def space(told=None, *, tune=(), max_stages=2, backbones=("one", "two")):
    return SearchSpace(backbones, max_stages, tune, told)


def declared(of, hp=None):
    """What a search space declares, by name."""
    hp = hp or keras_tuner.HyperParameters()
    of.values(hp)
    return {each.name: each for each in hp.space}


def drawn(of, **values):
    """The values where these are drawn, of whatever is declared."""
    hp = keras_tuner.HyperParameters()
    of.values(hp)
    hp.values.update(values)
    return of.values(hp), hp


# --- Fixed, narrowed, searched ---------------------------------------------------------------


def test_nothing_searched_are_the_usual_values():
    of = space()
    assert declared(of) == {}
    values = of.values(keras_tuner.HyperParameters())
    assert tuple(values) == NAMES
    assert values["backbone"] == "one"
    assert values["stages"] == 2
    assert values["optimizer"] == "adam"
    assert values["learning_rate"] == pytest.approx(1e-3)
    assert values["backbone_learning_rate"] == pytest.approx(1e-4)
    assert values["batch_size"] is None
    assert values["augment"] == 0


def test_what_tune_names_is_searched():
    assert set(declared(space(tune=TUNED))) == set(TUNED)
    found = declared(space(tune=("learning_rate", "dropout", "optimizer", "stages"), max_stages=4))
    assert set(found) == {"learning_rate", "dropout", "optimizer", "stages"}
    assert isinstance(found["learning_rate"], keras_tuner.engine.hyperparameters.Float)
    assert found["learning_rate"].sampling == "log"
    assert (found["stages"].min_value, found["stages"].max_value) == (1, 4)
    assert found["optimizer"].values == ["adam", "adamw", "rmsprop", "sgd"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dropout", 0.45),
        ("optimizer", "lion"),
        ("learning_rate", 0.02),
        ("backbone", "two"),
        ("unfreeze", "block_13"),
        ("stages", 1),
        ("batch_size", 24),
        ("weight_decay", None),
        ("augment", 0.0),
    ],
)
def test_a_single_value_fixes_one(name, value):
    of = space({name: value}, tune=("dropout", name))
    assert name not in declared(of)
    assert of.values(keras_tuner.HyperParameters())[name] == value


def test_a_list_is_chosen_from():
    of = space({"image_size": [96, 160], "dropout": [0.1, 0.3], "backbone": ["two"]})
    found = declared(of)
    assert {name: each.values for name, each in found.items()} == {
        "image_size": [96, 160],
        "dropout": [0.1, 0.3],
    }
    values, _ = drawn(of, image_size=160, dropout=0.3)
    assert (values["image_size"], values["dropout"], values["backbone"]) == (160, 0.3, "two")


def test_a_list_keeps_the_usual_value_as_its_default():
    assert declared(space({"optimizer": ["sgd", "adam"]}))["optimizer"].default == "adam"
    assert declared(space({"optimizer": ["sgd", "adamw"]}))["optimizer"].default == "sgd"


def test_a_range_is_narrowed():
    found = declared(
        space({"dropout": (0.3, 0.35), "head_layers": (1, 4), "learning_rate": (1, 2)})
    )
    dropout, layers, rate = (found[name] for name in ("dropout", "head_layers", "learning_rate"))
    assert (dropout.min_value, dropout.max_value, dropout.default) == (0.3, 0.35, 0.3)
    assert (layers.min_value, layers.max_value, layers.default) == (1, 4, 1)
    assert type(layers.min_value) is int
    assert (rate.min_value, rate.max_value, rate.sampling) == (1.0, 2.0, "log")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("dropout", (0.0, 0.5), [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        ("dropout", (0.05, 0.3), [0.05, 0.15, 0.25, 0.3]),
        ("layer_decay", (0.8, 1.0), [0.8, 0.85, 0.9, 0.95, 1.0]),
        ("label_smoothing", (0.0, 0.15), [0.0, 0.05, 0.1, 0.15]),
        ("augment", (0, 1), [0.0, 0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_each_tuner_comes_to_both_ends_of_a_range(name, value, expected):
    """At random, one after the other as the grid search, and as the Bayesian one."""
    found = declared(space({name: value}))[name]
    assert list(found.values) == expected
    assert {found.random_sample(seed) for seed in range(100)} == set(expected)
    assert {found.prob_to_value(i / 100) for i in range(101)} == set(expected)
    assert [found.prob_to_value(found.value_to_prob(each)) for each in expected] == expected
    assert found.default in expected


@pytest.mark.parametrize(
    ("name", "value"), [("dropout", 0.6), ("learning_rate", 1), ("head_layers", 1)]
)
def test_a_range_of_one_value_fixes_it(name, value):
    of = space({name: (value, value)})
    assert declared(of) == {}
    assert of.values(keras_tuner.HyperParameters())[name] == value


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight_decay", 1e-3), ("head_epochs", 3), ("backbone_learning_rate", 1e-2)],
)
def test_a_range_of_one_value_fixes_what_has_no_usual_value(name, value):
    of = space({name: (value, value)})
    assert of.values(keras_tuner.HyperParameters())[name] == value


def test_what_is_not_drawn_yet_is_the_usual_value():
    """As of the first trial, and of all of them with `tune_new_entries=False`."""
    values = space(tune=("backbone_learning_rate",)).values(keras_tuner.HyperParameters())
    assert values["backbone_learning_rate"] == pytest.approx(1e-4)


# --- What cannot be --------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["tune", "space"])
def test_a_wrong_name_is_told_the_nearest(where):
    arguments = {"tune": ("droput",)} if where == "tune" else {"told": {"droput": 0.1}}
    with pytest.raises(ValueError, match="'droput'; nearest is 'dropout'"):
        space(**arguments)


@pytest.mark.parametrize(
    ("told", "error", "message"),
    [
        ({"dropout": (0.5, 0.1)}, ValueError, r"\(low, high\) for 'dropout'"),
        ({"dropout": (0.1, 0.2, 0.3)}, ValueError, r"\(low, high\) for 'dropout'"),
        ({"dropout": []}, ValueError, "values to choose from"),
        ({"dropout": {0.1, 0.2}}, TypeError, "a list of choices"),
        ({"optimizer": ("adam", "sgd")}, TypeError, "a list of choices for 'optimizer'"),
        ({"image_size": (96, 160)}, TypeError, "a list of choices for 'image_size'"),
        pytest.param(
            {"backbone": "three"},
            ValueError,
            "'one', 'two'.*'three'",
        ),
        ({"backbone": ["one", "three"]}, ValueError, "'three'"),
    ],
)
def test_values_that_cannot_be(told, error, message):
    with pytest.raises(error, match=message):
        space(told)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("unfreeze", 1.7, "a number in (0.0, 1.0]"),
        ("unfreeze", [0.5, 0.0], "a number in (0.0, 1.0]"),
        ("image_size", 0, "a whole number of at least 1"),
        ("image_size", [96.5, 128.0], "a whole number of at least 1"),
        ("head_epochs", 0, "a whole number of at least 1"),
        ("weight_decay", -1, "a number of at least 0.0"),
        ("augment", 3.0, "a number in [0.0, 1.0]"),
        ("dropout", (0.0, 2.0), "a number in [0.0, 1.0)"),
        ("dropout", 1.0, "a number in [0.0, 1.0)"),
        ("dropout", float("nan"), "a number in [0.0, 1.0)"),
        ("dropout", "much", "a number in [0.0, 1.0)"),
        ("label_smoothing", 1.0, "a number in [0.0, 1.0)"),
        ("stages", 0, "a whole number of at least 1"),
        ("head_layers", -1, "a whole number of at least 0"),
        ("head_units", 0, "a whole number of at least 1"),
        ("learning_rate", -1, "a number above 0.0"),
        ("learning_rate", float("inf"), "a number above 0.0"),
        ("backbone_learning_rate", 0, "a number above 0.0"),
        ("layer_decay", 0, "a number in (0.0, 1.0]"),
        ("warmup_epochs", -1, "a whole number of at least 0"),
        ("batch_size", [0, 16], "a whole number of at least 1"),
    ],
)
def test_numbers_that_cannot_be(name, value, expected):
    with pytest.raises(ValueError, match=re.escape(f"Expected {name} to be {expected}. Received")):
        space({name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("unfreeze", ["all", -20, 1.0, 0.01]),
        ("weight_decay", [0, None]),
        ("augment", [0, 1]),
        ("dropout", [0, 0.99]),
        ("layer_decay", [1, 0.01]),
        ("warmup_epochs", [0]),
        ("learning_rate", [1e-9, 10]),
        ("stages", [1, 2]),
    ],
)
def test_numbers_at_the_end_of_what_can_be(name, values):
    for value in values:
        assert space({name: value}).values(keras_tuner.HyperParameters())[name] == value


def test_what_has_no_usual_values_asks_for_some():
    with pytest.raises(ValueError, match="image_size.*give space="):
        space(tune=("image_size",))


# --- When each acts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("child", "parent", "off", "on"),
    [
        ("head_units", "head_layers", 0, 1),
        ("head_units", "head_layers", 0, 2),
        ("unfreeze", "stages", 1, 2),
        ("backbone_learning_rate", "stages", 1, 3),
        ("layer_decay", "stages", 1, 2),
        ("batch_norm", "stages", 1, 2),
        ("head_epochs", "stages", 1, 2),
        ("pooling", "backbone", "two", "one"),
    ],
)
def test_one_acts_only_where_the_other_lets_it(child, parent, off, on):
    of = space(tune=(parent, child), max_stages=3)
    of.without_maps(["two"])
    other = {"unfreeze": 0.5, "batch_norm": "train", "pooling": "max", "head_units": 128}
    value = other.get(child, 2 if child == "head_epochs" else 0.7)
    for parent_value, active in ((off, False), (on, True)):
        values, hp = drawn(of, **{parent: parent_value, child: value})
        assert hp.is_active(child) is active
        assert (values[child] == value) is active
        assert values[parent] == parent_value


@pytest.mark.parametrize(
    ("told", "tune", "never"),
    [
        ({"head_layers": 0}, ("head_layers", "head_units"), {"head_units"}),
        (
            {"stages": 1},
            ("stages", "unfreeze", "batch_norm", "layer_decay"),
            {"unfreeze", "batch_norm", "layer_decay"},
        ),
    ],
)
def test_what_can_never_act_is_not_searched(told, tune, never):
    found = declared(space(told, tune=(*tune, "dropout")))
    assert "dropout" in found
    assert not never & set(found)


def test_what_always_acts_has_no_condition():
    found = declared(space({"stages": 2, "head_layers": 1}, tune=("unfreeze", "head_units")))
    assert set(found) == {"unfreeze", "head_units"}
    assert not any(each.conditions for each in found.values())


def test_one_backbone_without_maps_has_nothing_to_pool():
    of = space(tune=TUNED, backbones=("one",))
    of.without_maps(["one"])
    assert "pooling" not in declared(of)
    assert "pooling" in declared(space(tune=TUNED, backbones=("one",)))


# --- The user's own --------------------------------------------------------------------------


def test_the_users_own_are_taken():
    hp = keras_tuner.HyperParameters()
    hp.Choice("optimizer", ["lion", "ftrl"])
    hp.Fixed("dropout", 0.33)
    hp.Float("head_units", 10, 20)  # also where none acts
    hp.Int("batch_size", 7, 9)  # also where it was not searched
    before = {each.name: each.get_config() for each in hp.space}
    of = space(tune=TUNED)
    values = of.values(hp)
    after = {each.name: each.get_config() for each in hp.space if each.name in before}
    assert after == before
    assert [each.name for each in hp.space].count("optimizer") == 1
    assert (values["optimizer"], values["dropout"]) == ("lion", 0.33)
    assert (values["head_units"], values["batch_size"]) == (10, 7)
    hp.values.update(optimizer="ftrl", batch_size=9)
    values = of.values(hp)
    assert (values["optimizer"], values["batch_size"]) == ("ftrl", 9)


def test_a_wider_parent_of_the_users_keeps_its_children():
    hp = keras_tuner.HyperParameters()
    hp.Int("head_layers", 0, 4, default=4)
    declared(space(tune=TUNED), hp)
    assert "head_units" in hp.values
    assert hp.is_active("head_units")


def test_a_parent_that_the_user_searches_declares_its_children():
    hp = keras_tuner.HyperParameters()
    hp.Int("stages", 1, 2, default=1)
    found = declared(space(tune=("unfreeze",)), hp)
    assert "unfreeze" in found
    assert found["unfreeze"].conditions


def test_a_conditional_one_of_the_users_is_taken():
    hp = keras_tuner.HyperParameters()
    hp.Boolean("wide", default=True)
    with hp.conditional_scope("wide", [True]):
        hp.Float("dropout", 0.6, 0.9, default=0.7)
    values = space(tune=TUNED).values(hp)
    assert values["dropout"] == 0.7
    assert [each.name for each in hp.space].count("dropout") == 1


# --- With KerasTuner -------------------------------------------------------------------------


def test_hyperparameters_survive_the_wire():
    """As a worker gets them from its chief."""
    of = space({"image_size": [96, 160]}, tune=NAMES, max_stages=3)
    values, hp = drawn(of, stages=3, head_layers=2, head_units=128, image_size=160, dropout=0.4)
    again = keras_tuner.HyperParameters.from_proto(hp.to_proto())
    assert of.values(again) == pytest.approx(values)
    assert values["head_units"] == 128
    assert len(again.space) == len(hp.space)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"head_layers": 2, "head_units": 64, "stages": 1},
        {"head_layers": 0, "stages": 3},
        {"backbone": "vectors", "stages": 2, "head_layers": 1, "head_units": 64},
    ],
)
def test_everything_is_declared_before_it_is_built(values):
    made = hypermodel(
        backbones={"maps": tiny(), "vectors": tiny(pooled=True)},
        tune=tuple(name for name in NAMES if name != "image_size"),
        space=None,
        max_stages=3,
    )
    hp = keras_tuner.HyperParameters()
    made.declare_hyperparameters(hp)
    names = [each.name for each in hp.space]
    assert len(names) == len(set(names)) == len(NAMES) - 1
    hp.values.update(values)  # all that acts: as an oracle draws them
    model = made.build(hp)
    made.stages(hp, model, epochs=4)
    assert [each.name for each in hp.space] == names
    given = {name: value for name, value in values.items() if hp.values[name] != value}
    assert not given
