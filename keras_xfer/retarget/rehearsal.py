"""Training steps that leave no trace: a model trains with an optimizer of its own kind for a while,
and is afterwards what it was, to the bit."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

# What `fit` itself makes its batches with has no public name. Tried on Keras 3.15.1.
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR
from keras.src.trainers.data_adapters import (
    array_data_adapter,
    get_data_adapter,
    is_grain_dataset,
    is_tf_dataset,
    is_torch_dataloader,
)
from keras.src.utils.tracking import DotNotTrackScope

from keras_xfer.retarget.carrying import fresh, grouped, loss_scaled
from keras_xfer.retarget.grouped_optimizer import GroupedOptimizer, StageRate, number
from keras_xfer.retarget.random_state import random_state, set_random_state
from keras_xfer.retarget.trainer import distribution_scope, own_train_step, sync
from keras_xfer.retarget.training_state import other_optimizers


@contextlib.contextmanager
def rehearsal(
    model: keras.Model, learning_rate: float
) -> Iterator[Callable[[float, tuple[Any, ...]], dict[str, Any]]]:
    """Lend a built and compiled `model` for training steps that leave no trace.

    They are taken by a fresh optimizer with the configuration of the model's, but for its rate,
    which is a number, and for gradient accumulation, which is off. The groups of a
    `GroupedOptimizer` keep their proportion to the first. All is put back at the end, also after an
    exception: the optimizer, which has not been touched, and others that the model has; all
    variables, with metrics and seeds; the train function; the gradients and generators of torch.

    Args:
        model: not inside of `fit`.
        learning_rate: float > 0, the rate to begin at.

    Returns:
        A function of a rate and of a batch `(x, y, sample_weight, class_weight)`, that takes one
        step and gives its logs.

    Raises:
        ValueError: the first group of a `GroupedOptimizer` trains at a rate of 0, or what trains is
            not what its groups were made for.
    """
    sync(model)
    variables = {id(v): v for v in [*model.variables, *model.metrics_variables]}
    values = {
        key: np.array(keras.ops.convert_to_numpy(v), copy=True) for key, v in variables.items()
    }
    optimizer, train_function = model.optimizer, getattr(model, "train_function", None)
    own = other_optimizers(model)
    others = {name: getattr(model, name) for name in ("steps_per_execution", "stop_training")}
    gradients, compiled = _gradients(model), _compiled(model)
    with kept_random_state():
        try:
            with distribution_scope(model):
                model.optimizer = _like(optimizer, model.trainable_variables, learning_rate)
                for name, other in own.items():
                    setattr(model, name, type(other).from_config(other.get_config()))
            model.steps_per_execution = 1
            _set_compiled(model, *map(_unbuilt_copy, compiled))
            with own_train_step(model):
                model.make_train_function(force=True)
                yield lambda rate, batch: _step(model, rate, batch)
        finally:
            if keras.backend.backend() == "jax":
                # What an interrupted step has left there would be written over what follows.
                model._jax_state, model._jax_state_synced = None, True
            model.optimizer, model.train_function = optimizer, train_function
            for name, value in {**own, **others}.items():
                setattr(model, name, value)
            model.reset_metrics()  # also those that the first step has built
            _set_compiled(model, *compiled)
            with distribution_scope(model):
                for key, variable in variables.items():
                    variable.assign(values[key])
            for value, gradient in gradients:
                value.grad = gradient


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Bring the global random number generators back to where they were."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
        if "keras" not in state:  # it is made on first use, from Python's generator
            global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, None)


def build_from(model: keras.Model, batch: tuple[Any, ...]) -> None:
    """Make the weights of `model` from the shapes of a batch `(x, y, sample_weight)`, where it has
    none yet, as `fit` would, and leave its optimizer unbuilt."""
    if all(layer.built for layer in model._flatten_layers()):
        return
    optimizer, compiled = model.optimizer, _compiled(model)
    model.optimizer = None
    _set_compiled(model, None, None)
    try:
        with distribution_scope(model):
            model._symbolic_build(data_batch=batch)
    finally:
        model.optimizer = optimizer
        _set_compiled(model, *compiled)


def batches(
    x: Any, y: Any, sample_weight: Any, batch_size: int | None, shuffle: bool
) -> Iterator[tuple[Any, Any, Any]]:
    """The batches `(x, y, sample_weight)` that `fit` would train on, from the beginning again after
    the last; what can be read only once ends."""
    again, one_pass = _passes(x, y, sample_weight, batch_size, shuffle)
    for _ in itertools.count():
        found = False
        for batch in one_pass():
            found = True
            yield keras.utils.unpack_x_y_sample_weight(batch)
        if not found or not again:
            return


def _passes(
    x: Any, y: Any, sample_weight: Any, batch_size: int | None, shuffle: bool
) -> tuple[bool, Callable[[], Iterable[Any]]]:
    """Whether the data can be read again, and a function that begins to read it."""
    if isinstance(x, Iterator):
        generator = (batch for batch in x)
        return False, get_data_adapter(generator, y, sample_weight).get_numpy_iterator
    if isinstance(x, keras.utils.PyDataset):
        get_data_adapter(x, y, sample_weight)  # refuses y and sample_weight
        return True, lambda: _of_py_dataset(x, shuffle)
    if array_data_adapter.can_convert_arrays((x, y, sample_weight)):
        adapter = get_data_adapter(x, y, sample_weight, batch_size=batch_size, shuffle=shuffle)
        # Not the backend's own pipeline: TensorFlow's would draw from the generator that shuffles
        # the `fit` to come, whose state cannot be put back.
        return True, adapter.get_numpy_iterator
    if is_tf_dataset(x) or is_torch_dataloader(x) or is_grain_dataset(x):
        adapter = get_data_adapter(x, y, sample_weight)
        if is_tf_dataset(x) and keras.backend.backend() == "tensorflow":
            return True, lambda: x  # ragged and distributed batches stay what they are
        return True, adapter.get_numpy_iterator
    if isinstance(x, Iterable):
        return True, lambda: get_data_adapter(
            (batch for batch in x), y, sample_weight
        ).get_numpy_iterator()
    raise ValueError(
        "Expected arrays, a tf.data.Dataset, a keras.utils.PyDataset, a torch DataLoader, or an "
        f"iterable of batches. Received: x={x!r} of type {type(x).__name__}."
    )


def _of_py_dataset(data: keras.utils.PyDataset, shuffle: bool) -> Iterator[Any]:
    # Item by item, without workers and without telling `data` that an epoch has ended: it would
    # shuffle itself.
    if data.num_batches is None:
        return (data[i] for i in itertools.count())
    order = range(data.num_batches)
    return (data[int(i)] for i in (np.random.permutation(order) if shuffle else order))


def _step(model: keras.Model, rate: float, batch: tuple[Any, ...]) -> dict[str, Any]:
    model.optimizer.learning_rate = rate
    x, y, sample_weight, class_weight = batch
    logs: dict[str, Any] = model.train_on_batch(
        x, y, sample_weight=sample_weight, class_weight=class_weight, return_dict=True
    )
    return logs


def _like(old: Any, variables: list[Any], learning_rate: float) -> keras.optimizers.Optimizer:
    """A new optimizer of `variables` with the configuration of `old`."""
    if isinstance(old, keras.optimizers.LossScaleOptimizer):
        return loss_scaled(old, _like(old.inner_optimizer, variables, learning_rate))
    single: dict[str, Any] = {"gradient_accumulation_steps": None}
    if not isinstance(old, GroupedOptimizer):
        return fresh(old, variables, learning_rate=learning_rate, **single)
    if len(variables) != len(old._groups):
        raise ValueError(
            f"Expected the {len(old._groups)} trainable variables that the optimizer was made for. "
            f"Received: {len(variables)}. Compile the model again."
        )
    rates = [
        number(member.learning_rate if rate is None else rate(old._last_step()))
        for member, rate in zip(old._members, old._rates, strict=True)
    ]
    if not rates[0]:
        raise ValueError(
            "Expected a learning rate other than 0 to keep the groups' proportion to. Received: "
            f"the rates {rates} of the groups, of which the first is at the end of its schedule."
        )
    split = old._split(variables)
    members = [
        fresh(member, of_member, f"_{i}" if i else "", learning_rate=learning_rate, **single)
        for i, (member, of_member) in enumerate(zip(old._members, split, strict=True))
    ]
    constant = [StageRate(learning_rate * rate / rates[0]) for rate in rates]
    return grouped(members, variables, constant, old.global_clipnorm, 0)


def _compiled(model: keras.Model) -> tuple[Any, Any]:
    """What `compile` was told of loss and metrics."""
    return model._compile_loss, model._compile_metrics


def _set_compiled(model: keras.Model, loss: Any, metrics: Any) -> None:
    with DotNotTrackScope():  # as in `compile`
        model._compile_loss, model._compile_metrics = loss, metrics


def _unbuilt_copy(compiled: Any) -> Any:
    """Loss or metrics for the first step to build, where that has not been done.

    On JAX and torch a `fit` that builds them looks at a batch before it begins, and so shuffles
    once more than one that does not.
    """
    if compiled is None or compiled.built:
        return compiled
    if isinstance(compiled, keras.Loss):
        return type(compiled)(
            compiled._user_loss, compiled._user_loss_weights, output_names=compiled.output_names
        )
    return type(compiled)(
        compiled._user_metrics, compiled._user_weighted_metrics, output_names=compiled.output_names
    )


def _gradients(model: keras.Model) -> list[tuple[Any, Any]]:
    """The tensors of torch that the model trains, each with its gradient."""
    if keras.backend.backend() != "torch":
        return []
    return [(variable.value, variable.value.grad) for variable in model.trainable_variables]
