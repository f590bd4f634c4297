"""A schedule on other devices and precisions than one CPU in float32.

Devices are said once in a process, so each case on several of them runs in one of its own. Oracle:
the same training on a single device, from the same weights and batches.
"""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

BACKEND = keras.backend.backend()

on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="of JAX")

# What every case begins with. `train` fits the model of `tests.schedules` through three stages,
# with warm-up and layer decay; `told` prints what it came to.
PRELUDE = """
import json
import keras, numpy as np
from keras_xfer import Stage
from keras_xfer.callbacks import StagedUnfreezing
from keras_xfer.retarget import capture, restore
from tests import schedules

x, y = schedules.data()

def sgd(rate=1e-3):
    return keras.optimizers.SGD(rate, momentum=0.9)

def staged(**kwargs):
    return StagedUnfreezing(
        [
            Stage(epochs=1, learning_rate=1e-3),
            Stage("high", epochs=1, learning_rate=1e-3, layer_decay=0.5, warmup_epochs=0.5),
            Stage("all", epochs=2, learning_rate={"head": 1e-3, "backbone": 1e-4}),
        ],
        **kwargs,
    )

def train(optimizer=sgd, callbacks=None, epochs=4, fit=None, **compiling):
    model = schedules.compiled(optimizer(), **compiling)
    data = fit or {"x": x, "y": y, **schedules.BATCH}
    callbacks = [staged()] if callbacks is None else callbacks
    history = model.fit(epochs=epochs, callbacks=callbacks, **{"verbose": 0, **data}).history
    return model, history

def told(model, history):
    print("TOLD", json.dumps({
        "weights": [w.tolist() for w in model.get_weights()],
        "history": {name: [float(v) for v in values] for name, values in history.items()},
    }))
"""

SINGLE = """
model, history = train(OPTIMIZER)
told(model, history)
"""


def start(code, devices="", **environment):
    """A process that runs `devices`, the prelude and `code`."""
    whole = textwrap.dedent(devices) + PRELUDE + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", whole],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def told(out, errors=""):
    lines = [line for line in out.splitlines() if line.startswith("TOLD ")]
    assert lines, errors[-4000:]
    return json.loads(lines[-1].removeprefix("TOLD "))


def end(process, seconds=240):
    """What the process told."""
    try:
        out, errors = process.communicate(timeout=seconds)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors[-4000:]
    return told(out, errors)


def run(code, devices, **environment):
    """What a process told that runs `code` on `devices`."""
    return end(start(code, devices, **environment))


def run_here(code):
    """What `code` tells on one device; this process will do, which has imported everything."""
    out = io.StringIO()
    # On torch nothing runs on more than one, and Keras's own scope breaks its variables.
    cpu = contextlib.nullcontext() if BACKEND == "torch" else keras.device("cpu:0")
    with contextlib.redirect_stdout(out), cpu:
        exec(PRELUDE + textwrap.dedent(code), {"__name__": "case"})  # noqa: S102  # from this file
    return told(out.getvalue())


@pytest.fixture(scope="module")
def single():
    """The training on one device, by optimizer; each is run once."""
    done = {}

    def of(optimizer="sgd"):
        if optimizer not in done:
            done[optimizer] = run_here(SINGLE.replace("OPTIMIZER", optimizer))
            assert done[optimizer]["history"]["stage"] == [0, 1, 2, 2]
        return done[optimizer]

    return of


ADAM = "lambda: keras.optimizers.Adam(1e-3, global_clipnorm=1.0)"


def assert_same(mine, theirs, atol=1e-5):
    for one, other in zip(mine["weights"], theirs["weights"], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)
    for name in ("stage", "trainable_params", "learning_rate", "backbone_learning_rate"):
        assert mine["history"][name] == pytest.approx(theirs["history"][name], rel=1e-6)
    assert mine["history"]["loss"] == pytest.approx(theirs["history"]["loss"], abs=1e-4)


# --- How a step is run -----------------------------------------------------------------------

WAYS = {
    "run_eagerly": "run_eagerly=True",
    "jit_compile": "jit_compile=True",
    "steps_per_execution": "steps_per_execution=2",
}


@on_tensorflow
@pytest.mark.parametrize(
    "way",
    [
        "steps_per_execution",
        pytest.param("run_eagerly", marks=pytest.mark.slow),
        pytest.param("jit_compile", marks=pytest.mark.slow),
    ],
)
def test_the_way_a_step_is_run_does_not_show(single, way):
    assert_same(run_here(f"told(*train({ADAM}, {WAYS[way]}))"), single(ADAM))


# --- Several devices -------------------------------------------------------------------------

TWO_CPUS = """
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
"""


@on_tensorflow
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param(ADAM, marks=pytest.mark.slow)])
def test_two_replicas(single, optimizer):
    """And they go back to the best epoch, in the same process. Oracle of that: the weights that were
    there at the end of the epoch that was best."""
    code = f"""
        with strategy.scope():
            told(*train({optimizer}))

        class Keep(keras.callbacks.Callback):
            kept = []
            def on_epoch_end(self, epoch, logs=None):
                self.kept.append(self.model.get_weights())

        with strategy.scope():
            stages = staged(monitor="loss", mode="max", restore_best=True)
            model, history = train(lambda: keras.optimizers.Adam(1e-3), [Keep(), stages])
        assert history["stage"][0] == 0
        best = int(np.argmax(history["loss"]))
        for mine, kept in zip(model.get_weights(), Keep.kept[best], strict=True):
            np.testing.assert_array_equal(mine, kept)
        # And a state into a model of another number of replicas.
        state, expected = capture(model), model.get_weights()
        other = schedules.compiled(keras.optimizers.Adam(1e-3))
        restore(other, state)
        for mine, kept in zip(other.get_weights(), expected, strict=True):
            np.testing.assert_array_equal(mine, kept)
        assert int(other.optimizer.iterations) == state["optimizer"]["iterations"] > 0
    """
    assert_same(run(code, TWO_CPUS), single(optimizer))


@on_tensorflow
@pytest.mark.slow
def test_keras_itself_still_cannot_fit_on_two_workers():
    """It reads the first batch, which is spread over the workers, as a tensor. When it no longer
    does, a schedule can be tried there."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    workers = [f"127.0.0.1:{port}" for port in ports]
    devices = """
        import tensorflow as tf
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    """
    code = """
        batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
        with strategy.scope():
            model = schedules.compiled(sgd())
            try:
                model.fit(batches, shuffle=False, verbose=0)
            except ValueError as error:
                print("TOLD", json.dumps("PerReplica" in str(error)), flush=True)
        import os
        os._exit(0)  # the other worker may be gone
    """
    processes = []
    try:
        for index in range(2):
            task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
            processes.append(start(code, devices, TF_CONFIG=json.dumps(task)))
        assert [end(process) for process in processes] == [True, True]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@on_jax
@pytest.mark.core
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param(ADAM, marks=pytest.mark.slow)])
def test_four_devices_in_parallel(single, optimizer):
    devices = """
        import keras, jax
        assert len(jax.devices()) == 4
        keras.distribution.set_distribution(keras.distribution.DataParallel())
    """
    code = f"""
        model, history = train({optimizer})
        restore(model, capture(model))
        assert len(model.layers[-1].kernel.value.sharding.device_set) == 4
        assert len(model.optimizer.variables[-1].value.sharding.device_set) == 4
        told(model, history)
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    assert_same(run(code, devices, **flags), single(optimizer))


# --- Precision -------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_learns_and_carries_the_loss_scale(policy):
    code = f"""
        keras.config.set_dtype_policy({policy!r})
        seen = []

        class Look(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                self.look()
            def on_epoch_end(self, epoch, logs=None):
                self.look()
            def look(self):
                optimizer = self.model.optimizer
                if hasattr(optimizer, "dynamic_scale"):
                    seen.append((float(optimizer.dynamic_scale), int(optimizer.step_counter)))
                else:  # before its first step
                    seen.append((8.0, 0))

        def adam():
            made = keras.optimizers.Adam(1e-2)
            if {policy!r} == "mixed_bfloat16":
                return made
            return keras.optimizers.LossScaleOptimizer(
                made, initial_scale=8.0, dynamic_growth_steps=6
            )

        stages = StagedUnfreezing(
            [Stage(epochs=2, learning_rate=1e-2), Stage("all", epochs=6, learning_rate=1e-2)]
        )
        model, history = train(adam, [stages, Look()], epochs=8)
        history["scale"] = [scale for scale, _ in seen]
        history["counter"] = [counter for _, counter in seen]
        assert str(model.layers[-1].kernel.dtype) == "float32"
        assert str(model.layers[-1].compute_dtype) == {policy.removeprefix("mixed_")!r}
        told(model, history)
    """
    history = run_here(code)["history"]
    assert history["stage"] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert history["loss"][-1] < history["loss"][2] < history["loss"][0]
    if policy == "mixed_float16":  # at each epoch's begin and end; 4 steps an epoch, 6 to grow
        steps = [s for epoch in range(8) for s in (4 * epoch, 4 * epoch + 4)]
        assert history["counter"] == [s % 6 for s in steps]
        assert history["scale"] == [8.0 * 2 ** (s // 6) for s in steps]


@pytest.mark.core
def test_float16_wraps_the_optimizer_by_itself():
    code = """
        keras.config.set_dtype_policy("mixed_float16")
        model, history = train()
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert int(model.optimizer.step_counter) == 16
        told(model, history)
    """
    history = run_here(code)["history"]
    assert history["loss"][-1] < history["loss"][0]


# --- What else a fit may be told -------------------------------------------------------------


@pytest.mark.core
def test_class_weights_and_validation_in_the_middle():
    """Oracle: the same training, the stages of which are three calls of `fit`."""
    code = """
        weight = {0: 1.0, 1: 3.0, 2: 0.5}
        valid = (x[:12], y[:12])
        fit = {"x": x, "y": y, **schedules.BATCH, "class_weight": weight,
               "validation_data": valid, "validation_freq": 2}
        plain = keras.optimizers.SGD
        stages = StagedUnfreezing(
            [Stage(epochs=1, learning_rate=1e-2), Stage("all", epochs=3, learning_rate=1e-3)]
        )
        model, history = train(lambda: plain(1e-2), [stages], fit=fit)
        assert len(history["val_loss"]) == 2

        other = schedules.compiled(plain(1e-2))
        other.fit(epochs=1, **fit)
        other.get_layer("base").unfreeze("all")
        other.compile(plain(1e-3), schedules.LOSS(from_logits=True))
        other.fit(epochs=3, **{**fit, "validation_freq": [1, 3]})
        schedules.assert_equal_weights(model, other, atol=1e-6)
        assert np.allclose(history["val_loss"], other.history.history["val_loss"], atol=1e-5)
        told(model, history)
    """
    assert run_here(code)["history"]["stage"] == [0, 1, 1, 1]


OWN_STEP = {
    "tensorflow": """
        def train_step(self, data):
            import tensorflow as tf
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            variables = self.trainable_variables
            self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
            return {"loss": loss}
    """,
    "torch": """
        def train_step(self, data):
            import torch
            x, y = data
            self.zero_grad()
            loss = self.compute_loss(x, y, self(x, training=True))
            loss.backward()
            variables = self.trainable_weights
            with torch.no_grad():
                self.optimizer.apply([v.value.grad for v in variables], variables)
            return {"loss": loss}
    """,
}


@pytest.mark.core
@pytest.mark.skipif(BACKEND == "jax", reason="a stateless step of one's own is the trainer's")
def test_a_train_step_of_ones_own(single):
    own = textwrap.indent(textwrap.dedent(OWN_STEP.get(BACKEND, "")), "    ")
    code = (
        "class Own(keras.Model):\n"
        "    def __init__(self, inner):\n"
        "        super().__init__()\n"
        "        self.inner = inner\n"
        "    def call(self, x, training=False):\n"
        "        return self.inner(x, training=training)\n"
        + own
        + "\ninner = schedules.model()\nown = Own(inner)\n"
        "own.compile(sgd(), schedules.LOSS(from_logits=True))\n"
        "history = own.fit(x, y, epochs=4, callbacks=[staged()], **schedules.BATCH).history\n"
        "told(inner, history)\n"
    )
    mine, theirs = run_here(code), single()
    mine["history"]["loss"] = theirs["history"]["loss"]  # of the last batch, not their mean
    assert_same(mine, theirs)
