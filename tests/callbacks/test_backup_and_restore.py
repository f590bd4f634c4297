import keras
import numpy as np
import pytest

import keras_xfer
from keras_xfer import (
    Backbone,
    BackupAndRestore,
    BestCheckpoint,
    EpochTiming,
    Stage,
    StagedUnfreezing,
)
from keras_xfer.bundle import read_bundle, write_bundle
from keras_xfer.callbacks.backup_and_restore import BackupError
from keras_xfer.retarget import capture
from tests import schedules
from tests.callbacks.test_resuming import differing
from tests.schedules import BATCH

pytestmark = pytest.mark.core

BACKEND = keras.backend.backend()


class CutError(Exception):
    """The run is cut off."""


def cut(epoch):
    """Cuts the run off at the beginning of `epoch`."""

    def at(number, logs=None):
        if number == epoch:
            raise CutError

    return keras.callbacks.LambdaCallback(on_epoch_begin=at)


def stages(**last):
    return [
        Stage(epochs=1, learning_rate=1e-2),
        Stage("high", epochs=1, learning_rate=5e-3),
        Stage("all", **{"learning_rate": 1e-3, "layer_decay": 0.5, **last}),
    ]


# What is kept and brought back does not depend on how a step is run, and TensorFlow traces it anew
# in each stage, which takes longer than the run.
EAGER = {"run_eagerly": True} if BACKEND == "tensorflow" else {}


def compiled(optimizer=None, **kwargs):
    return schedules.compiled(optimizer or keras.optimizers.Adam(1e-2), **{**EAGER, **kwargs})


def traced():
    return compiled(run_eagerly=False)


def run(folder, *, until=None, epochs=4, model=None, callbacks=None, **kwargs):
    """A fit with a backup in `folder`; cut off at `until`."""
    keras.utils.set_random_seed(1)
    model = compiled() if model is None else model
    if callbacks is None:
        callbacks = [StagedUnfreezing(stages())]
    callbacks = [BackupAndRestore(folder, **kwargs), *callbacks, *([cut(until)] if until else [])]
    x, y = schedules.data()
    data = {"validation_data": (x, y), **BATCH}
    if until is None:
        return model, model.fit(x, y, epochs=epochs, callbacks=callbacks, **data)
    with pytest.raises(CutError):
        model.fit(x, y, epochs=epochs, callbacks=callbacks, **data)
    return model, None


def state(model):
    """Its state but for the optimizer's name, which Keras counts up."""
    captured = capture(model)
    for member in captured["optimizer"]["members"]:
        del member["config"]["name"]
    return captured


def outcome(ran):
    model, history = ran
    return {"state": state(model), "epochs": history.epoch, "history": history.history}


def check_equal(one, other):
    assert not differing(outcome(one), outcome(other))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that is never cut off gives."""
    return outcome(run(tmp_path_factory.mktemp("whole"), model=traced()))


@pytest.mark.parametrize("until", [1, 3])
def test_it_goes_on_as_if_nothing_had_been(tmp_path, until, whole):
    """Cut off within a stage and between two; oracle: the run that is not."""
    run(tmp_path, until=until, model=traced())
    assert not differing(outcome(run(tmp_path, model=traced())), whole)


def in_the_list(folder, at, name, *more):
    """A run with the backup at that place among other callbacks, and what it came to."""
    x, y = schedules.data()
    timing = EpochTiming()
    callbacks = [
        StagedUnfreezing(stages(patience=1), monitor="loss", min_delta=0.01),
        keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=1.0),
        BestCheckpoint(folder / f"{name}.keras", monitor="val_loss", resume=False),
        timing,
    ]
    callbacks.insert(at, BackupAndRestore(folder / name))
    model, data = traced(), {"validation_data": (x, y), "epochs": 4, **BATCH}
    history = model.fit(x, y, callbacks=[*callbacks, *more], **data).history
    shown = {k: v for k, v in history.items() if "seconds" not in k and "samples" not in k}
    return [state(model), shown, [row["stage"] for row in timing.rows]]


@pytest.fixture(scope="module")
def whole_in_the_list(tmp_path_factory):
    return in_the_list(tmp_path_factory.mktemp("whole"), 0, "whole")


@pytest.mark.parametrize("at", [0, 4])  # before, and behind each of the others
def test_it_works_wherever_it_stands_in_the_list(tmp_path, at, whole_in_the_list):
    with pytest.raises(CutError):
        in_the_list(tmp_path, at, "one", cut(3))
    assert not differing(in_the_list(tmp_path, at, "one"), whole_in_the_list)


def test_a_run_that_stopped_early_stays_stopped(tmp_path):
    def callbacks():
        return [keras.callbacks.EarlyStopping("loss", patience=1, min_delta=100.0, mode="min")]

    first = run(tmp_path, epochs=9, callbacks=callbacks(), delete_checkpoint=False)
    assert first[1].epoch == [0, 1]
    again = run(tmp_path, epochs=9, callbacks=callbacks(), delete_checkpoint=False)
    check_equal(again, first)


def test_keras_own_callbacks_remember(tmp_path):
    def callbacks(name):
        return [
            keras.callbacks.EarlyStopping("val_loss", patience=3, restore_best_weights=True),
            keras.callbacks.ReduceLROnPlateau("val_loss", patience=2, min_delta=10.0),
            keras.callbacks.ModelCheckpoint(
                str(tmp_path / f"{name}.keras"), monitor="val_loss", save_best_only=True
            ),
        ]

    run(tmp_path / "one", until=2, callbacks=callbacks("one"))
    made = callbacks("one")
    resumed = run(tmp_path / "one", callbacks=made)
    whole = callbacks("two")
    check_equal(resumed, run(tmp_path / "two", callbacks=whole))
    assert len(set(resumed[1].history["learning_rate"])) > 1
    assert made[0].best == whole[0].best
    assert made[2].best == whole[2].best


def test_the_averages_that_swap_ema_weights_has_put_in(tmp_path):
    if BACKEND == "jax":
        pytest.skip("Keras on JAX: a fit with use_ema donates a buffer twice")

    def once(folder, **kwargs):
        model = compiled(keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.9))
        callbacks = [
            keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
            StagedUnfreezing(stages()),
        ]
        return run(folder, model=model, callbacks=callbacks, **kwargs)

    once(tmp_path / "one", until=3)
    check_equal(once(tmp_path / "one"), once(tmp_path / "two"))


def test_the_loss_scale_goes_on(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    scaled = lambda: keras.optimizers.LossScaleOptimizer(  # noqa: E731
        keras.optimizers.Adam(1e-2), initial_scale=8.0, dynamic_growth_steps=3
    )
    run(tmp_path / "one", until=3, model=compiled(scaled()))
    resumed = run(tmp_path / "one", model=compiled(scaled()))
    assert float(keras.ops.convert_to_numpy(resumed[0].optimizer.dynamic_scale)) > 8.0
    check_equal(resumed, run(tmp_path / "two", model=compiled(scaled())))


def test_a_model_that_is_built_by_its_first_step(tmp_path):
    def model():
        keras.utils.set_random_seed(1)
        base = schedules.model().get_layer("base")
        made = keras.Sequential([base, keras.layers.Dense(3, name="head")])
        made.compile(keras.optimizers.Adam(1e-2), schedules.LOSS(from_logits=True))
        return made

    run(tmp_path / "one", until=3, model=model())
    check_equal(run(tmp_path / "one", model=model()), run(tmp_path / "two", model=model()))


def test_a_callback_of_the_user(tmp_path):
    class Counting(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.counts = np.zeros(2, "int64")

        def on_epoch_end(self, epoch, logs=None):
            self.counts += 1

        def state_dict(self):
            return {"counts": self.counts}

        def load_state_dict(self, state):
            self.counts = state["counts"]

    run(tmp_path, until=2, callbacks=[Counting()])
    counting = [Counting(), Counting()]
    run(tmp_path, callbacks=counting)
    assert [each.counts.tolist() for each in counting] == [[4, 4], [2, 2]]


def test_a_later_fit_begins_where_it_is_told(tmp_path):
    run(tmp_path, until=2, callbacks=[])
    model, history = run(tmp_path, callbacks=[])
    assert history.epoch == list(range(4))
    assert not tmp_path.exists()  # deleted at the end, with its folder
    x, y = schedules.data()
    assert model.fit(x, y, epochs=2, **BATCH).epoch == [0, 1]


def test_what_a_user_asks_it(tmp_path):
    backup = BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
    assert backup.next_epoch == 0
    run(tmp_path / "backup", epochs=2, callbacks=[], delete_checkpoint=False)
    assert backup.next_epoch == 2
    (tmp_path / "backup" / "mine.txt").write_text("stays")
    backup.delete()
    assert [path.name for path in (tmp_path / "backup").iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match="save_freq='epoch'"):
        BackupAndRestore(tmp_path, save_freq=100)
    with pytest.raises(ValueError, match="backup_dir"):
        BackupAndRestore("")


def test_another_bundle_is_no_backup(tmp_path):
    write_bundle(tmp_path / "training_state.zip", {"epoch": 3})
    with pytest.raises(BackupError, match="it has no callbacks, compiled_rate"):
        run(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "half", "foreign"])
def test_a_damaged_backup_is_never_a_silent_restart(tmp_path, damage):
    run(tmp_path, until=2)
    path = tmp_path / "training_state.zip"
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "foreign": b"hi"}[damage])
    left = path.read_bytes()
    model = compiled()
    before = capture(model)
    with pytest.raises(BackupError, match="training_state.zip.*delete it"):
        run(tmp_path, model=model)
    assert path.read_bytes() == left
    assert not differing(before["variables"], capture(model)["variables"])


def test_another_schedule_is_refused_unless_asked_for(tmp_path):
    run(tmp_path, until=3)
    other = [*stages()[:2], Stage("all", learning_rate=2e-3, layer_decay=0.5)]
    with pytest.raises(
        BackupError, match=r"learning_rate of stage 3 was 0.001 and is 0.002.*accept_changes"
    ):
        run(tmp_path, callbacks=[StagedUnfreezing(other)])
    with pytest.raises(BackupError, match="had 3 stages and has 2"):
        run(tmp_path, callbacks=[StagedUnfreezing(stages()[:2])])
    with pytest.raises(BackupError, match="there is no StagedUnfreezing any more"):
        run(tmp_path, callbacks=[])
    with pytest.raises(BackupError, match="monitor was 'val_loss' and is 'loss'"):
        run(tmp_path, callbacks=[StagedUnfreezing(stages(), monitor="loss")])
    _, history = run(tmp_path, callbacks=[StagedUnfreezing(other)], accept_changes=True)
    assert history.history["stage"] == [0, 1, 2, 2]
    np.testing.assert_allclose(history.history["learning_rate"][2:], [1e-3, 2e-3], rtol=1e-6)


def test_a_run_that_was_over_goes_on_by_a_longer_schedule(tmp_path):
    run(tmp_path, callbacks=[StagedUnfreezing(stages()[:2])], delete_checkpoint=False)
    told = {"delete_checkpoint": False, "accept_changes": True}
    _, same = run(tmp_path, callbacks=[StagedUnfreezing(stages()[:2])], **told)
    assert same.epoch == [0, 1]
    _, longer = run(tmp_path, **told)
    assert longer.history["stage"] == [0, 1, 2, 2]


def test_a_schedule_where_there_was_none_is_refused(tmp_path):
    run(tmp_path, until=2, callbacks=[])
    with pytest.raises(BackupError, match="there was no StagedUnfreezing"):
        run(tmp_path)


def test_another_optimizer_is_refused_unless_asked_for(tmp_path):
    run(tmp_path, until=3)
    with pytest.raises(BackupError, match="was Adam and is SGD"):
        run(tmp_path, model=compiled(keras.optimizers.SGD(0.1)))
    with pytest.raises(BackupError, match="beta_1 of Adam was 0.9 and is 0.8"):
        run(tmp_path, model=compiled(keras.optimizers.Adam(1e-2, beta_1=0.8)))
    sgd = compiled(keras.optimizers.SGD(0.1))
    model, history = run(tmp_path, model=sgd, accept_changes=True)
    assert history.epoch == list(range(4))
    # The stage's rate, not that of compile.
    assert history.history["learning_rate"][3] == pytest.approx(1e-3)
    assert "SGD" in type(keras_xfer.retarget.carrying.members_of(model.optimizer)[0]).__name__


def test_another_model_is_refused(tmp_path):
    run(tmp_path, until=2, callbacks=[])
    base = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5)])
    model = keras.Sequential([keras.Input((6,)), Backbone(base), keras.layers.Dense(3)])
    model.compile(keras.optimizers.Adam(1e-2), schedules.LOSS(from_logits=True))
    with pytest.raises(BackupError, match="parameters.*Choose another backup_dir"):
        run(tmp_path, model=model, callbacks=[])


def test_the_last_good_one_stays_until_the_next_is_complete(tmp_path, monkeypatch, whole):
    write = np.lib.format.write_array

    def fail(file, array, **kwargs):
        write(file, array[:1] if array.ndim else array, **kwargs)
        raise OSError(28, "No space left on device")

    class Fill(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2:
                monkeypatch.setattr(np.lib.format, "write_array", fail)

    with pytest.raises(OSError, match="No space"):
        run(tmp_path, callbacks=[StagedUnfreezing(stages()), Fill()])
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["training_state.zip"]
    assert read_bundle(tmp_path / "training_state.zip")["epoch"] == 1
    assert not differing(outcome(run(tmp_path)), whole)


def test_a_state_that_is_no_plain_data_is_told(tmp_path):
    class Odd(keras.callbacks.Callback):
        def state_dict(self):
            return {"model": object()}

        def load_state_dict(self, state):
            raise AssertionError

    with pytest.raises(TypeError, match=r"object in content\['callbacks'\]\['Odd 1'\]\['model'\]"):
        run(tmp_path, callbacks=[Odd()])


def test_what_is_in_the_file_is_found_by_variable_and_not_by_position(tmp_path, whole):
    """Two variables of one shape change places in the optimizer: their slots follow them."""
    run(tmp_path, until=3)
    path = tmp_path / "training_state.zip"
    content = read_bundle(path)
    for member in content["model"]["optimizer"]["members"]:
        member["variables"].reverse()
        for name, slot in member["slots"].items():
            if isinstance(slot, list):
                member["slots"][name] = slot[::-1]
    write_bundle(path, content)
    mine = outcome(run(tmp_path))["state"]["variables"]
    assert not differing(mine, whole["state"]["variables"])


def test_another_rate_at_compile_is_refused(tmp_path):
    run(tmp_path, until=2, callbacks=[])
    with pytest.raises(BackupError, match="learning rate of compile was 0.01 and is 1e-05"):
        run(tmp_path, model=compiled(keras.optimizers.Adam(1e-5)), callbacks=[])


def test_the_same_model_goes_on_in_the_same_process(tmp_path):
    """As in a notebook: interrupted, and the cell with `fit` is run once more."""
    model, _ = run(tmp_path, until=2)
    run(tmp_path, until=3, model=model)
    assert run(tmp_path)[1].epoch == list(range(4))  # and in another one after that


def test_layers_that_are_numbered_otherwise_are_the_same(tmp_path):
    """As in a notebook: all cells are run once more, and Keras goes on counting."""

    def model():
        base = keras.Sequential([keras.Input((6,)), *(keras.layers.Dense(4) for _ in range(3))])
        made = keras.Sequential([keras.Input((6,)), Backbone(base), keras.layers.Dense(3)])
        made.compile(keras.optimizers.Adam(1e-2), schedules.LOSS(from_logits=True))
        return made

    def schedule(model):
        top = model.layers[0].model.layers[-1].name  # dense_12, say
        return [
            StagedUnfreezing([Stage(epochs=1, learning_rate=1e-2), Stage(top, learning_rate=1e-3)])
        ]

    first, again = model(), model()
    run(tmp_path, until=2, model=first, callbacks=schedule(first))
    _, history = run(tmp_path, model=again, callbacks=schedule(again))
    assert history.history["stage"] == [0, 1, 1, 1]
    assert schedule(first)[0].stages[1].unfreeze != schedule(again)[0].stages[1].unfreeze


def test_the_rows_of_csv_logger(tmp_path):
    path = tmp_path / "log.csv"
    first = keras.callbacks.CSVLogger(path)
    run(tmp_path / "backup", until=2, callbacks=[first])
    first.csv_file.close()  # which the end of a process does
    _, history = run(tmp_path / "backup", callbacks=[keras.callbacks.CSVLogger(path)])
    rows = [line.split(",") for line in path.read_text().splitlines()]
    assert rows[0][:2] == ["epoch", "loss"]
    assert [int(row[0]) for row in rows[1:]] == [0, 1, 2, 3]
    np.testing.assert_allclose([float(row[1]) for row in rows[1:]], history.history["loss"])


def test_best_weights_of_a_model_with_a_weight_without_axes(tmp_path):
    normalization = keras.layers.Normalization()
    normalization.adapt(schedules.data()[0])
    base = schedules.model().get_layer("base")

    def stopping():
        return [keras.callbacks.EarlyStopping("loss", patience=9, restore_best_weights=True)]

    def model():
        head = keras.layers.Dense(3)
        made = keras.Sequential([keras.Input((6,)), normalization, base, head])
        made.compile(keras.optimizers.SGD(1e-2), schedules.LOSS(from_logits=True))
        return made

    run(tmp_path, until=2, model=model(), callbacks=stopping())
    made, _ = run(tmp_path, model=model(), callbacks=stopping())
    assert () in [weight.shape for weight in made.get_weights()]


def test_two_of_them(tmp_path):
    one, two = (BackupAndRestore(tmp_path / name, delete_checkpoint=False) for name in "ab")
    x, y = schedules.data()
    compiled().fit(x, y, epochs=2, callbacks=[one, two, EpochTiming()], **BATCH)
    assert one.next_epoch == two.next_epoch == 2
    assert "EpochTiming 1" in read_bundle(one.filepath)["callbacks"]


def test_a_loop_of_ones_own(tmp_path):
    """A CallbackList driven by hand saves the state of the others too."""
    model = compiled()
    backup = BackupAndRestore(tmp_path, delete_checkpoint=False)
    callbacks = keras.callbacks.CallbackList(
        [backup, StagedUnfreezing(stages())], model=model, epochs=4
    )
    x, y = schedules.data()
    callbacks.on_train_begin()
    for epoch in range(2):
        callbacks.on_epoch_begin(epoch)
        logs = model.train_on_batch(x, y, return_dict=True)
        callbacks.on_epoch_end(epoch, logs)
    saved = read_bundle(backup.filepath)["callbacks"]["StagedUnfreezing 1"]
    assert saved["progress"]["stage"] == 1


def test_optimizers_of_the_models_own(tmp_path):
    def model():
        made = compiled()
        made.extra = keras.optimizers.Adam(1e-3)
        made.extra.build(made.trainable_variables)
        return made

    first = model()
    gradients = [keras.ops.ones(v.shape) for v in first.trainable_variables]
    first.extra.apply(gradients)
    run(tmp_path, until=1, model=first, callbacks=[])
    resumed, _ = run(tmp_path, model=model(), callbacks=[])
    assert int(keras.ops.convert_to_numpy(resumed.extra.iterations)) == 1
    np.testing.assert_allclose(schedules.value(resumed.extra._momentums[0]), 0.1, rtol=1e-6)


class Unregistered(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that cannot be saved."""

    def __call__(self, step):
        return 1e-3 + 0.0 * keras.ops.cast(step, "float32")


def test_a_schedule_that_cannot_be_saved_is_told_before_training(tmp_path):
    planned = [Stage(epochs=1, learning_rate=1e-2), Stage("all", learning_rate=Unregistered())]
    with pytest.raises(ValueError, match="register_keras_serializable"):
        run(tmp_path, callbacks=[StagedUnfreezing(planned)])
    assert not (tmp_path / "training_state.zip").exists()
    x, y = schedules.data()
    schedule = StagedUnfreezing(planned, monitor="loss", mode="max", restore_best=True)
    assert compiled().fit(x, y, epochs=3, callbacks=[schedule], **BATCH).epoch == [0, 1, 2]


def test_a_state_that_is_no_dict_is_told_before_training(tmp_path):
    class Odd(keras.callbacks.Callback):
        def state_dict(self):
            return 3

        def load_state_dict(self, state):
            raise AssertionError

    with pytest.raises(TypeError, match=r"Odd.state_dict\(\) to return a dict. Received: 3"):
        run(tmp_path, callbacks=[Odd()])


def test_callbacks_come_back_from_their_configurations(tmp_path):
    cosine = keras.optimizers.schedules.CosineDecay(1e-3, 10)
    for made in (
        BackupAndRestore(str(tmp_path), accept_changes=True),
        StagedUnfreezing(stages(), monitor="loss", restore_best=True),
        StagedUnfreezing.gradual(learning_rate={"head": cosine, "backbone": 1e-4}, num_stages=2),
    ):
        data = keras.saving.serialize_keras_object(made)
        again = keras.saving.deserialize_keras_object(data)
        assert type(again) is type(made)
        assert again.get_config() == made.get_config()
