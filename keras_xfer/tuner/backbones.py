"""The backbones of a search: what may be given as one, and one model of each for all trials."""

import inspect
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_xfer import applications, freezing
from keras_xfer.layers import Backbone
from keras_xfer.retarget.rehearsal import kept_random_state
from keras_xfer.retarget.training_state import values_of

Shape = tuple[int | None, ...]

# Of what a function makes with random weights: the same in every process of a search.
_SEED = 0


class Taken(NamedTuple):
    """A backbone for one trial.

    Attributes:
        backbone: `Backbone`, frozen, with the weights that it came with.
        preprocessing: function of the keyword arguments of `Backbone.preprocessing` that returns
            the layer for it; None where nothing is known of what it was trained on.
        input_shape: shape of the images that it takes, None where it takes any.
    """

    backbone: Backbone
    preprocessing: Callable[..., keras.layers.Layer] | None
    input_shape: Shape


class Backbones:
    """The backbones to choose from, each built once and used by trial after trial.

    A trial gets a new `Backbone` around a model that earlier trials trained, brought back to the
    weights that it came with, bit for bit. So memory does not grow by a backbone a trial, and none
    is built twice. While somebody still holds the Backbone of an earlier trial, its model is left
    alone and another one is built. A model that is there already, given or returned by a function,
    stays as it is: trials train a copy.

    Args:
        backbones: iterable, or mapping by name, of names of applications, handles of SavedModels,
            built models or `Backbone`s, and functions that return one.
        weights: `"imagenet"`, None or a path, of the applications.

    Raises:
        TypeError: one is none of these.
        ValueError: there are none, two have one name, there is no such application, or a model is
            not built.
    """

    def __init__(self, backbones: Any, weights: str | os.PathLike[str] | None) -> None:
        self._weights = weights
        self._makers: dict[str, _Maker] = {}
        for name, given in _named(backbones):
            if name in self._makers:
                raise ValueError(
                    f"Expected backbones of different names. Received: two named {name!r}. Give a "
                    "dict of names to backbones."
                )
            self._makers[name] = _maker(name, given, weights)
        if not self._makers:
            raise ValueError("Expected at least one backbone. Received: none.")
        self._kept: dict[tuple[Any, ...], _Kept] = {}
        self._pristine: weakref.WeakKeyDictionary[Backbone, list[np.ndarray]] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order in which they were given."""
        return tuple(self._makers)

    def without_maps(self) -> list[str]:
        """The names of those that are known to give vectors, which need no pooling."""
        return [name for name, maker in self._makers.items() if not maker.gives_maps]

    def sizes(self) -> dict[str, Shape]:
        """Height and width that each takes of which they are known before it is made, None for any."""
        return {name: maker.size for name, maker in self._makers.items() if maker.size is not None}

    def take(
        self, name: str, input_shape: Shape | None, *, batch_norm: Any, pooling: str, hp: Any
    ) -> Taken:
        """Return a backbone for a trial.

        Args:
            name: str, one of `names`.
            input_shape: shape of its images; None for its own.
            batch_norm: see `Backbone`.
            pooling: `"avg"` or `"max"`, of one that gives feature maps.
            hp: `keras_tuner.HyperParameters`, for a function that asks for it.

        Returns:
            Taken.
        """
        maker = self._makers[name]
        if maker.asks_for_hp:  # another one by whatever it reads there
            kept = _Kept(maker.make(input_shape, batch_norm, hp))
        else:
            kept = self._keep(maker, input_shape, batch_norm)
        model, made = kept.model, kept.made
        own_pooling = getattr(made, "pooling", None)
        if own_pooling is None and _gives_maps(model, input_shape):
            own_pooling = pooling
        backbone = Backbone(
            model,
            batch_norm=batch_norm,
            pooling=own_pooling,
            dtype=made.dtype_policy if maker.is_own else None,
            name="backbone",
        )
        kept.given_to = weakref.ref(backbone)
        self._pristine[backbone] = kept.pristine
        told = maker.like or made
        return Taken(backbone, told.preprocessing if _is_known(told) else None, _input_shape(model))

    def pristine_of(self, backbone: Backbone) -> list[np.ndarray] | None:
        """The values of the variables of a backbone of `take`, as it came; None of another."""
        return self._pristine.get(backbone)

    def _keep(self, maker: "_Maker", input_shape: Shape | None, batch_norm: str) -> "_Kept":
        key: tuple[Any, ...] = (maker.name, input_shape, keras.config.dtype_policy().name)
        if maker.is_hub:  # which keeps BatchNormalization to a policy inside
            key = (*key, batch_norm == "train")
        kept = self._kept.get(key)
        if kept is None or not kept.is_free():
            # One that is somebody's stays theirs.
            kept = _Kept(
                maker.make(input_shape, batch_norm, None), None if kept is None else kept.pristine
            )
            self._kept[key] = kept
        kept.restore()
        return kept


class _Kept:
    """A model that trials share, one after the other."""

    def __init__(self, made: Backbone, pristine: list[np.ndarray] | None = None) -> None:
        self.made = made  # for what it knows of its input; trials train Backbones of their own
        self.model = made.model
        self.pristine = values_of(self.model.variables) if pristine is None else pristine
        self.given_to: Callable[[], Any] = _nobody

    def is_free(self) -> bool:
        return self.given_to() is None

    def restore(self) -> None:
        for variable, value in zip(self.model.variables, self.pristine, strict=True):
            variable.assign(value)


class _Maker:
    """Makes a backbone of one of those that were given."""

    is_own = False  # whether it was given as a `Backbone`
    is_hub = False
    asks_for_hp = False
    gives_maps = True
    size: Shape | None = None  # height and width that it takes, where they are known by now
    like: Backbone | None = None  # what else knows what images it takes

    def __init__(self, name: str, make: Callable[..., Backbone]) -> None:
        self.name = name
        self._make = make

    def make(self, input_shape: Shape | None, batch_norm: Any, hp: Any) -> Backbone:
        with kept_random_state():
            keras.utils.set_random_seed(_SEED)
            return self._make(input_shape, batch_norm, hp)


def _maker(name: str, given: Any, weights: Any) -> _Maker:
    if isinstance(given, str) and not _is_handle(given):
        size = applications.spec_for(given).default_image_size  # an unknown name is told now

        def make(input_shape: Shape | None, batch_norm: Any, hp: Any) -> Backbone:  # noqa: ARG001
            shape = input_shape or image_shape(3, size)
            if weights is not None:  # are those of three channels
                shape = image_shape(3, *size_of(shape))
            return Backbone.from_application(
                given, input_shape=shape, weights=weights, pooling=None
            )

        return _Maker(name, make)
    if isinstance(given, str | os.PathLike):
        maker = _Maker(
            name,
            lambda input_shape, batch_norm, hp: Backbone.from_hub(  # noqa: ARG005
                given, batch_norm=batch_norm, image_size=_fixed_size(input_shape)
            ),
        )
        maker.is_hub = True
        return maker
    if isinstance(given, keras.Layer):
        return _of_model(name, given)
    if callable(given):
        asked = inspect.signature(given).parameters
        maker = _Maker(name, lambda *args: _called(name, given, asked, *args))
        maker.asks_for_hp = "hp" in asked
        return maker
    raise TypeError(
        "Expected backbones to be names of keras.applications, handles of SavedModels, built "
        f"models, keras_xfer.Backbone or functions that return one. Received: {given!r}."
    )


def _of_model(name: str, given: keras.Layer) -> _Maker:
    model = given.model if isinstance(given, Backbone) else given
    _check_built(name, model)
    pristine = values_of(model.variables)  # the user may train it meanwhile
    more = {}
    if isinstance(given, Backbone):
        more = {"pooling": given.pooling, "dtype": given.dtype_policy}

    def make(input_shape: Shape | None, batch_norm: Any, hp: Any) -> Backbone:  # noqa: ARG001
        return Backbone(_copied(name, model, pristine), **more)

    maker = _Maker(name, make)
    maker.is_own = True
    maker.size = size_of(_input_shape(model))
    maker.like = given if isinstance(given, Backbone) else None
    maker.gives_maps = not more.get("pooling") and _gives_maps(model, None)
    return maker


def _called(
    name: str,
    function: Callable[..., Any],
    asked: Mapping[str, Any],
    input_shape: Shape | None,
    batch_norm: Any,  # noqa: ARG001  # the trial's own Backbone holds it
    hp: Any,
) -> Backbone:
    known = {"input_shape": input_shape, "hp": hp}
    made = function(**{key: value for key, value in known.items() if key in asked})
    model = made.model if isinstance(made, Backbone) else made
    if not isinstance(model, keras.Layer):
        raise TypeError(
            f"Expected the function of backbone {name!r} to return a built keras.Model or a "
            f"keras_xfer.Backbone. Received: {made!r}."
        )
    _check_built(name, model)
    # Trials train a copy: whether somebody else holds the model, or a model that shares its layers,
    # is not to be seen, and its next trial has to find it as it is now. What was built for this call
    # alone goes with it; without `hp` there is one call for all trials.
    copy = _copied(name, model, values_of(model.variables))
    if not isinstance(made, Backbone):
        return Backbone(copy)
    backbone = Backbone(copy, pooling=made.pooling)
    backbone._expected = made._expected  # of a SavedModel, which does not say it
    return backbone


def _check_built(name: str, model: keras.Layer) -> None:
    if not model.built:
        raise ValueError(
            "Expected a built model, so that its weights exist. Received: backbone "
            f"{name!r} with {model.name!r}, which is not built yet: call it once on an input."
        )


def _copied(name: str, model: keras.Layer, values: Sequence[np.ndarray]) -> keras.Layer:
    """A model as `model`, which shares nothing with it, with these values."""
    try:
        if freezing.graph_of(model) is not None or isinstance(model, keras.Sequential):
            copy = keras.models.clone_model(model)
        else:
            copy = type(model).from_config(model.get_config())
            if not copy.built:
                copy.build_from_config(model.get_build_config())
    except (NotImplementedError, TypeError) as error:
        raise ValueError(
            "Expected a backbone that can be made again from its configuration: trials train a copy "
            f"of it. Received: backbone {name!r}, {model.name!r} of type {type(model).__name__}, of "
            "which that fails. Give its class a get_config, by which it is saved too."
        ) from error
    for variable, value in zip(copy.variables, values, strict=True):
        variable.assign(value)
    for layer in freezing.walk(copy):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # it computes with constants, made of its variables when it loads
    return copy


def _named(backbones: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(backbones, Mapping):
        yield from ((str(name), given) for name, given in backbones.items())
        return
    if isinstance(backbones, str | os.PathLike | keras.Layer) or callable(backbones):
        backbones = (backbones,)
    for index, given in enumerate(backbones):
        if isinstance(given, str | os.PathLike):
            yield os.fspath(given), given
        else:
            name = getattr(given, "name", None) or getattr(given, "__name__", "")
            yield (name if name and name != "<lambda>" else f"backbone_{index}"), given


def _is_handle(text: str) -> bool:
    if text in applications.APPLICATIONS:  # whatever lies in the working directory
        return False
    return "/" in text or os.sep in text or Path(text).exists()


def size_of(shape: Shape) -> Shape:
    """Height and width of images of `shape`."""
    return shape[1:] if keras.config.image_data_format() == "channels_first" else shape[:2]


def channels_of(shape: Shape) -> int:
    """Channels of images of `shape`."""
    is_first = keras.config.image_data_format() == "channels_first"
    return shape[0 if is_first else -1] or 3


def image_shape(channels: int, height: int | None, width: int | None = None) -> Shape:
    """The shape of images; square ones where no width is given."""
    size = (height, height if width is None else width)
    if keras.config.image_data_format() == "channels_first":
        return (channels, *size)
    return (*size, channels)


def _input_shape(model: keras.Layer) -> Shape:
    shape = getattr(model, "input_shape", None)
    return tuple(shape[1:]) if isinstance(shape, tuple) else image_shape(3, None)


def _fixed_size(input_shape: Shape | None) -> Any:
    if input_shape is None or None in size_of(input_shape):
        return None
    return size_of(input_shape)


def _gives_maps(model: keras.Layer, input_shape: Shape | None) -> bool:
    outputs = getattr(model, "outputs", None)
    if outputs is None:
        shape = (None, *(input_shape or (None, None, 3)))
        outputs = keras.tree.flatten(
            freezing.output_spec(model, keras.KerasTensor(shape, "float32"))
        )
    return len(outputs) == 1 and len(outputs[0].shape) == 4


def _is_known(backbone: Backbone) -> bool:
    try:
        backbone.preprocessing()
    except ValueError:  # neither of keras.applications nor from a hub handle
        return False
    return True


def _nobody() -> None:
    return None
