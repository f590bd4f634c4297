"""`retarget`: give a model that is training other variables to train."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_xfer.retarget.carrying import optimizer_for
from keras_xfer.retarget.grouped_optimizer import Rates, StageRate
from keras_xfer.running_fit import locals_of_fit


def retarget(
    model: keras.Model,
    change: Callable[[], None],
    *,
    learning_rate: float | StageRate | Rates | None = None,
) -> None:
    """Run `change`, which sets trainable flags, and train from now on what is trainable then.

    Variables that were already training keep their optimizer, the object itself where it can be,
    with its slots and its step count. Newly thawed ones get a fresh optimizer of the same class
    and configuration, whose step count begins at 0: under the old step count Adam's first update
    would be several times the learning rate.

    Call it between two steps: in a callback's `on_epoch_begin`, `on_epoch_end` or
    `on_train_batch_end`, on TensorFlow, JAX or torch, with any optimizer; outside of `fit` too.

    Args:
        model: a built and compiled `keras.Model`.
        change: called once, with the model's variables up to date.
        learning_rate: float or `StageRate`, the rate of all that trains; or a list of
            `(variables, StageRate)`, the rate of each group, of which the first is what
            `model.optimizer.learning_rate` reads; None keeps the rates in force. The `first_step`
            of a rate counts from now.

    Raises:
        ValueError: the model is not built or not compiled, nothing is trainable after `change`, a
            trainable variable is in none of the groups, or the optimizer keeps its state elsewhere
            than in attributes.

    Example:

    >>> class ThawLater(keras.callbacks.Callback):
    ...     def on_epoch_begin(self, epoch, logs=None):
    ...         if epoch == 5:
    ...             base = self.model.get_layer("backbone")
    ...             retarget(self.model, lambda: base.unfreeze(-20), learning_rate=1e-5)

    Reference:
        https://keras.io/guides/transfer_learning/
    """
    if getattr(model, "optimizer", None) is None:
        raise ValueError(
            "Expected a compiled model. Received: model="
            f"{model.name!r}, which has no optimizer: call model.compile(...) first."
        )
    if not model.built:
        raise ValueError(
            f"Expected a built model. Received: model={model.name!r}, whose weights do not exist "
            "yet: begin it with keras.Input, call model.build(input_shape), or call it on a batch."
        )
    sync(model)
    change()
    variables = model.trainable_variables
    if not variables:
        raise ValueError(
            "Expected something to train. Received: a model of which every layer is frozen: "
            "add a head, or let the first stage thaw some of the backbone."
        )
    if isinstance(learning_rate, int | float):
        learning_rate = StageRate(float(learning_rate))
    if isinstance(learning_rate, StageRate):
        learning_rate = [(variables, learning_rate)]
    with distribution_scope(model):
        optimizer = optimizer_for(model.optimizer, variables, learning_rate)
    if optimizer is not model.optimizer:
        install(model, optimizer)


def sync(model: keras.Model) -> None:
    """Bring the values of `model`'s variables up to date.

    On JAX, between two steps of an epoch, they live outside of the model, in the order in which
    its variables went out: call this before that order changes.
    """
    if keras.backend.backend() == "jax":
        model.jax_state_sync()


def distribution_scope(model: keras.Model) -> contextlib.AbstractContextManager[Any]:
    """Under tf.distribute variables must be made inside the strategy's scope."""
    if keras.backend.backend() == "tensorflow":
        return model.distribute_strategy.scope()
    return contextlib.nullcontext()


def install(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
    """Give `model` another optimizer and a train step that uses it."""
    model.optimizer = optimizer
    # What `save` writes as the compiled optimizer has no public setter but `compile`, which
    # would reset metrics and loss in the middle of `fit`.
    model._compile_config.config["optimizer"] = optimizer
    if getattr(model, "train_function", None) is not None:
        with own_train_step(model):
            model.make_train_function(force=True)
    # Made for what trained before, and made again when they are used: on JAX for one split into
    # trainable and other variables, on TensorFlow with the losses of the regularisers that counted.
    model.test_function = None
    model.predict_function = None


@contextlib.contextmanager
def own_train_step(model: keras.Model) -> Iterator[None]:
    """On JAX give `model` a train step that is another function than before.

    `jax.jit` finds what it has compiled by the function, and all `model.train_step` are equal: the
    old one, which is kept, would be run with its old optimizer where the shapes are the same.
    """
    if keras.backend.backend() != "jax":
        yield
        return
    bound = model.train_step
    own = vars(model).get("train_step")
    model.train_step = lambda state, data: bound(state, data)
    try:
        yield
    finally:
        if own is None:
            del model.train_step
        else:
            model.train_step = own


def build_for_fit(model: keras.Model) -> None:
    """Make the weights of `model` now, from the data of the `fit` that is running.

    On TensorFlow a model that does not begin with an Input would be built in its first step, after
    a schedule's first stage has begun.
    """
    iterator = locals_of_fit(model).get("epoch_iterator")
    if not model.built and iterator is not None:
        # What JAX and torch do at the beginning of every fit. Tried on Keras 3.15.1.
        model._symbolic_build(iterator=iterator)
        iterator.reset()


def begin_at(model: keras.Model, epoch: int | None) -> None:
    """From `on_train_begin`: let the `fit` that is running begin at `epoch`, whatever it was told.

    From `on_epoch_begin`, with None: let no later `fit` do so, which Keras's own BackupAndRestore
    forgets. Tried on Keras 3.15.1.
    """
    model._initial_epoch = epoch


def begins_at(model: keras.Model, epoch: int) -> int:
    """The epoch at which a `fit` that was told `epoch` begins, after `on_train_begin`."""
    return int(model._initial_epoch or epoch)


def is_chief(model: keras.Model) -> bool:
    """Whether this process is the one, of those that train `model` together, that writes files."""
    if keras.backend.backend() == "tensorflow":
        return bool(model.distribute_strategy.extended.should_checkpoint)
    if keras.backend.backend() == "jax":
        import jax

        return bool(jax.process_index() == 0)
    return True
