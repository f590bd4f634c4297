"""`StandIn`: trains a model by another forward pass, such as that of its upper part on features."""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

# What `compile` leaves on a model, and what steps read of it. Tried on Keras 3.15.1.
_COMPILED = (
    "_compile_config",
    "_compile_loss",
    "_compile_metrics",
    "_distribute_reduction_method",
    "_distribute_strategy",
    "_jit_compile",
    "_loss_tracker",
    "_run_eagerly",
    "compiled",
    "loss",
    "steps_per_execution",
    "unrolled_steps_per_execution",
)
# What a model may have of its own that a stand-in would not run.
_STEPS = (
    "compute_loss",
    "compute_metrics",
    "evaluate",
    "fit",
    "get_metrics_result",
    "make_test_function",
    "make_train_function",
    "metrics",
    "reset_metrics",
    "test_step",
    "train_step",
)


def why_no_stand_in(model: keras.Model) -> str | None:
    """Why nothing can train in place of `model`: it has steps or metrics of its own. None where it
    can."""
    for name in _STEPS:
        if name in vars(model) or getattr(type(model), name) is not getattr(keras.Model, name):
            return f"{type(model).__name__} has a {name} of its own"
    compiled = [model._loss_tracker, model._compile_metrics]
    if model._compile_loss is not None:
        compiled += model._compile_loss.metrics
    for metric in model.metrics:
        if not any(metric is each for each in compiled):
            return f"{model.name!r} has a metric of its own, {metric.name!r}"
    return None


class StandIn(keras.Model):
    """Runs the `fit` of `model` with `upper` in place of its forward pass.

    Everything else is the model's own: its variables, its optimizer at any time, loss, metrics, how
    it was compiled, whether it is to stop. So callbacks that hold `model` see it train, and `save`,
    `evaluate` and `predict` it on its own inputs meanwhile.

    Args:
        model: a built and compiled `keras.Model` for which `why_no_stand_in` is None.
        upper: a layer that gives what `model` gives, of the inputs that `fit` will get. It holds
            every variable of `model` that trains.
    """

    # What it stands for, which Keras is not to count among its parts.
    _model: Any

    def __init__(self, model: keras.Model, upper: keras.Layer) -> None:
        super().__init__(name=f"{model.name}_stand_in", autocast=False)
        self.upper = upper
        object.__setattr__(self, "_model", model)
        object.__setattr__(self, "_over", False)
        for name in _COMPILED:
            if hasattr(model, name):
                object.__setattr__(self, name, getattr(model, name))
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """What `model` would answer."""
        return self.upper(inputs, training=training)

    def end(self) -> None:
        """From `on_epoch_end`: the `fit` that runs ends after this epoch, and the training goes on.

        `fit` would put the averages of the weights in the place of the weights, as at the end of
        all training, if it found an optimizer that keeps them.
        """
        object.__setattr__(self, "_over", True)

    @property
    def optimizer(self) -> Any:
        """The model's optimizer."""
        return None if self._over else self._model.optimizer

    @optimizer.setter
    def optimizer(self, _: Any) -> None:
        """Keras's constructor sets it to None."""

    @property
    def stop_training(self) -> bool:
        """Whether the model is to stop."""
        return bool(getattr(self._model, "stop_training", False))

    @stop_training.setter
    def stop_training(self, value: bool) -> None:
        self._model.stop_training = value

    @property
    def history(self) -> Any:
        """The History of the model's training."""
        return self._model.history

    # In the model's order, by which JAX's optimizers know them.

    @property
    def trainable_variables(self) -> list[Any]:
        """What of the model's variables trains."""
        inside = {id(variable) for variable in self.upper.variables}
        return [each for each in self._model.trainable_variables if id(each) in inside]

    @property
    def trainable_weights(self) -> list[Any]:
        """What of the model's weights trains."""
        return self.trainable_variables


@contextlib.contextmanager
def standing_in(model: keras.Model, stand_in: StandIn) -> Iterator[None]:
    """Within it, whoever asks `model` for the values that JAX holds during an epoch gets them."""
    if keras.backend.backend() != "jax":
        yield
        return
    own = model.jax_state_sync

    def sync() -> None:
        own()  # where a callback evaluates the model meanwhile
        stand_in.jax_state_sync()

    object.__setattr__(model, "jax_state_sync", sync)
    try:
        yield
    finally:
        object.__delattr__(model, "jax_state_sync")
