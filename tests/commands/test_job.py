import io
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from keras_xfer.commands import job, training
from keras_xfer.commands.recipe import Recipe, UsageError
from keras_xfer.commands.runs import RunFolder
from keras_xfer.commands.screen import Screen
from keras_xfer.stages import Stage


class Interrupt(keras.callbacks.Callback):
    def __init__(self, hook, epoch=0):
        super().__init__()
        self.epoch = epoch
        setattr(self, hook, self._interrupt)

    def _interrupt(self, epoch=None, logs=None):
        if self.epoch == epoch or not isinstance(epoch, int):  # hooks of the whole fit have none
            raise KeyboardInterrupt


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose training is that of one layer."""
    monkeypatch.setattr(training, "schedule", lambda *_: [Stage(name="all")])
    monkeypatch.setattr(job, "EpochLines", lambda *_: keras.callbacks.Callback())
    monkeypatch.setattr(job, "save", lambda *_: None)
    return RunFolder(tmp_path / "run")


def fit(run, monkeypatch, *, epochs=2, optimizer="adam", callbacks=()):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse", metrics=["accuracy"])
    x, y = np.ones((4, 2), "float32"), np.ones((4, 1), "float32")

    def of_one_layer(classifier, folder, recipe, checkpoint, on_epoch, callbacks, cache):
        rows = training._Rows(on_epoch)
        added = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: logs.update(stage=0)
        )
        model.fit(
            x, y, validation_data=(x, y), epochs=epochs, verbose=0,
            callbacks=[interrupts, added, checkpoint, rows, *others, *callbacks],
        )  # fmt: skip
        return training.Fitted(rows.rows, 0, stopped_by_nan=False)

    interrupts, *others = callbacks or [keras.callbacks.Callback()]
    monkeypatch.setattr(training, "fit", of_one_layer)
    out = io.StringIO()
    folder = SimpleNamespace(skipped=())
    classifier = SimpleNamespace(backbone=None)
    with run.writing({}, resume=True):
        job.fit(classifier, folder, Recipe(), run, Screen(out), resumable=True)
    return out.getvalue()


def interrupted(run, monkeypatch, *interrupts):
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(run, monkeypatch, callbacks=interrupts)
    return str(caught.value)


def test_interrupted_in_the_first_epoch_nothing_is_left(run, monkeypatch):
    nothing = "Interrupted before the first epoch was over"
    assert interrupted(run, monkeypatch, Interrupt("on_train_begin")) == nothing
    assert not run.path.exists()
    # Also after the first model was saved, where there is no row of history yet.
    late = (keras.callbacks.Callback(), Interrupt("on_epoch_end"))
    monkeypatch.setattr(training._Rows, "on_epoch_end", lambda *_: None)
    assert interrupted(run, monkeypatch, *late) == nothing
    assert not run.path.exists()


def test_without_a_backup_nothing_is_said_of_resume(run, monkeypatch):
    """Interrupted between the first row of history and the first backup."""
    late = (keras.callbacks.Callback(), Interrupt("on_epoch_end"))
    said = interrupted(run, monkeypatch, *late)
    assert "keeps the model of epoch 1" in said
    assert "--resume" not in said


def test_a_run_interrupted_again_and_again_goes_on(run, monkeypatch):
    said = interrupted(run, monkeypatch, Interrupt("on_epoch_begin", 1))
    assert "keeps the model of epoch 1" in said
    assert "--resume goes on" in said
    # Before it came to an epoch, before and after it has found what the first one left.
    for hook in ("on_train_begin", "on_epoch_begin"):
        said = interrupted(run, monkeypatch, Interrupt(hook, 1))
        assert "before the first epoch" not in said
        assert "--resume goes on" in said
        assert run.is_unfinished()
    assert "Resumed  after epoch 1" in fit(run, monkeypatch)
    assert {path.name for path in run.path.iterdir()} == {"run.json", "history.csv", "skipped.csv"}


def test_errors_of_the_backup_speak_of_the_command(run, monkeypatch):
    interrupted(run, monkeypatch, Interrupt("on_epoch_begin", 1))
    state = run / "unfinished" / "training_state.zip"
    content = state.read_bytes()
    damaged = content[: len(content) // 2]
    for found, optimizer in ((content, "sgd"), (damaged, "adam")):
        state.write_bytes(found)
        with pytest.raises(UsageError, match=r"^--resume: .*training_state\.zip") as caught:
            fit(run, monkeypatch, optimizer=optimizer)
        said = str(caught.value)
        assert said.endswith("; leave out --resume to begin anew")
        assert "accept_changes" not in said
        assert "backup_dir" not in said
        assert state.read_bytes() == found


def test_a_run_that_is_begun_anew_says_what_it_discards(run, monkeypatch, tmp_path):
    class Enough(Exception):  # noqa: N818  # ends the command, is no error
        pass

    def enough(*args, **kwargs):
        raise Enough

    interrupted(run, monkeypatch, Interrupt("on_epoch_begin", 1))
    monkeypatch.setattr(job, "look_at", lambda *_: SimpleNamespace(
        class_names=("a", "b"), fingerprint=lambda: ""
    ))  # fmt: skip
    monkeypatch.setattr(training, "build", lambda *_: None)
    monkeypatch.setattr(job, "show_model", lambda *_: None)
    monkeypatch.setattr(job, "fit", enough)
    said = []
    for _ in range(2):
        out = io.StringIO()
        with pytest.raises(Enough):
            job.train(tmp_path / "images", run.path, Recipe(), Screen(out))
        said.append(out.getvalue().splitlines())
    assert [len(lines) for lines in said] == [1, 0]
    assert "Discarded the unfinished run" in said[0][0]


def test_what_a_killed_end_left_is_cleared_away(run, monkeypatch, tmp_path):
    """Killed after the backup was deleted and before the best model was."""
    monkeypatch.setattr(job, "look_at", lambda *_: SimpleNamespace(fingerprint=lambda: ""))
    monkeypatch.setattr(job, "show_result", lambda *_: None)
    monkeypatch.setattr(RunFolder, "check_resumable", lambda *_: None)
    with run.writing({}):
        run.write_json("metrics.json", {"accuracy": 1})
    (run / "unfinished").mkdir()
    (run / "unfinished" / "best.keras").touch()
    out = Screen(io.StringIO())
    assert job.train(tmp_path / "images", run.path, Recipe(), out, resume=True) == {"accuracy": 1}
    assert {path.name for path in run.path.iterdir()} == {"run.json", "metrics.json"}
