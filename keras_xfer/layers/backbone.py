"""`Backbone`: a pretrained feature extractor as one layer of any model."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Self

import keras

from keras_xfer import applications, freezing
from keras_xfer.blocks import Block, Cut
from keras_xfer.blocks import blocks as find_blocks
from keras_xfer.blocks import cuts as find_cuts
from keras_xfer.layers.hub_module import HubModule
from keras_xfer.layers.preprocessing import BackbonePreprocessing
from keras_xfer.live_config import LiveConfig
from keras_xfer.tables import Table

_POOLING = {
    "avg": keras.layers.GlobalAveragePooling2D,
    "max": keras.layers.GlobalMaxPooling2D,
}


@dataclasses.dataclass(frozen=True)
class _Expected:
    """The images that a SavedModel was trained on."""

    image_size: int | Sequence[int] | None
    input_range: Sequence[float]


@keras.saving.register_keras_serializable(package="keras_xfer")
class Backbone(freezing.ExactTrainable, keras.layers.Layer):
    """A pretrained feature extractor as one layer of any model.

    It freezes and thaws exactly, keeps BatchNormalization to a policy whatever is later set on
    `trainable`, and runs what is frozen in inference mode. In Keras alone, thawing a model lets
    its BatchNormalization move its statistics even where it was called with `training=False`,
    and frozen dropout and stochastic depth still act while training.

    Args:
        model: a built `keras.Model` or `keras.layers.Layer`: from keras.applications, from
            keras-hub, or your own. It is saved whole, architecture and weights, never rebuilt
            from its name.
        batch_norm: what BatchNormalization inside `model` may do, now and after any thawing:
            `"frozen"`, neither update its statistics nor train gamma and beta; `"affine"`, train
            gamma and beta where thawed, with fixed statistics; `"train"`, Keras's default.
            Statistics are held wherever else `model` or its layers are called, until another
            Backbone is made around it. Defaults to `"frozen"`.
        trainable: bool, whether all layers start thawed. Defaults to `False`.
        pooling: `"avg"`, `"max"` or None, global pooling of a feature map `(B, H, W, C)`.
            Defaults to `None`.
        name: str or None, the layer's name.
        dtype: the dtype of the output, to which it is cast; `model` keeps its own policies.

    Input shape:
        Whatever `model` takes. What value range a model of keras.applications expects:
        see `preprocessing()`.

    Output shape:
        Whatever `model` gives; `(B, C)` where `pooling` is set.

    Raises:
        TypeError: `model` is not a Keras layer.
        ValueError: `model` is not built, or an argument is not one of its choices.

    Example:

    >>> backbone = Backbone.from_application(
    ...     "MobileNetV2", input_shape=(32, 32, 3), weights=None, alpha=0.35
    ... )
    >>> model = keras.Sequential(
    ...     [keras.Input((32, 32, 3)), backbone.preprocessing(), backbone, keras.layers.Dense(5)]
    ... )
    >>> len(model.trainable_variables)  # the head alone
    2
    >>> backbone.unfreeze("block_16")
    >>> len(model.trainable_variables)  # and four convolutions, BatchNormalization still frozen
    6

    Reference:
        https://keras.io/guides/transfer_learning/
    """

    def __init__(
        self,
        model: keras.Layer,
        *,
        batch_norm: freezing.BatchNormPolicy = "frozen",
        trainable: bool = False,
        pooling: str | None = None,
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        if not isinstance(model, keras.Layer):
            raise TypeError(
                "Expected a built keras.Model or keras.layers.Layer. Received: "
                f"model={model!r} of type {type(model).__name__}."
            )
        if not model.built:
            raise ValueError(
                "Expected a built model, so that its weights exist. Received: model="
                f"{model.name!r}, which is not built yet: call it once on an input, or "
                "model.build(input_shape)."
            )
        if pooling is not None and pooling not in _POOLING:
            raise ValueError(
                f"Expected pooling to be one of {tuple(_POOLING)} or None. "
                f"Received: pooling={pooling!r}."
            )
        freezing.check_batch_norm(batch_norm)
        # The output alone is cast: the inner model casts its own inputs and variables.
        super().__init__(name=name, dtype=dtype, autocast=False)
        self.model = model
        self.batch_norm = batch_norm
        self.pooling = pooling
        self._pool = (
            _POOLING[pooling](data_format=_data_format(model), autocast=False) if pooling else None
        )
        self._batch_norm_guard = freezing.BatchNormGuard(model, batch_norm)
        self._expected: _Expected | None = None  # where the model itself does not say
        self.trainable = trainable

    @classmethod
    def from_application(
        cls,
        application: str,
        /,
        *,
        input_shape: tuple[int | None, ...] | None = None,
        weights: str | None = "imagenet",
        pooling: str | None = "avg",
        batch_norm: freezing.BatchNormPolicy = "frozen",
        trainable: bool = False,
        name: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """A model of keras.applications without its classifier, as a backbone.

        Args:
            application: str, a model function of keras.applications, such as `"MobileNetV2"`.
            input_shape: tuple `(height, width, channels)`; None for the application's own.
            weights: `"imagenet"` (downloaded once), None (random), or a path.
            pooling: `"avg"`, `"max"` or None, as the application understands it.
            batch_norm: see `Backbone`.
            trainable: see `Backbone`.
            name: str or None, the layer's name.
            **kwargs: passed to the model function, such as `alpha=0.35`.

        Returns:
            Backbone.

        Raises:
            ValueError: no application of that name (the nearest are named), or an input shape
                that it cannot take.
            OSError: the weights cannot be had (see `keras_xfer.applications`).

        Example:

        >>> Backbone.from_application("VGG16", weights=None).blocks[0].name
        'block1'

        Reference:
            https://keras.io/api/applications/
        """
        model = applications.build(
            application, input_shape=input_shape, weights=weights, pooling=pooling, **kwargs
        )
        return cls(model, batch_norm=batch_norm, trainable=trainable, name=name)

    @classmethod
    def from_hub(
        cls,
        handle: Any,
        /,
        *,
        image_size: int | tuple[int, int] | None = None,
        input_range: tuple[float, float] = (0.0, 1.0),
        pooling: str | None = None,
        batch_norm: freezing.BatchNormPolicy = "frozen",
        trainable: bool = False,
        name: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """A SavedModel of TensorFlow Hub as a backbone (TensorFlow backend).

        It loads again with `safe_mode=False` alone, see `HubModule`.

        Args:
            handle: str, path or callable, see `HubModule`.
            image_size: int, tuple `(height, width)`, or None: what the SavedModel says, if it does.
            input_range: tuple of two floats, the lowest and the highest value of the images that
                the SavedModel was trained on; `(0, 1)` is what TensorFlow Hub asks of its modules.
            pooling: see `Backbone`.
            batch_norm: see `Backbone`.
            trainable: see `Backbone`.
            name: str or None, the layer's name.
            **kwargs: passed to `HubModule`, such as `output_key="default"` or `sha256=…`.

        Returns:
            Backbone, whose `preprocessing()` brings images to that size and range.

        Raises:
            OSError: the SavedModel cannot be had.
            ValueError: it cannot be called so, or `input_range` is not two ascending numbers.

        Example:

        >>> import tensorflow as tf
        >>> mean = tf.function(
        ...     lambda x: tf.reduce_mean(x, axis=(1, 2)),
        ...     input_signature=[tf.TensorSpec([None, 32, 32, 3])],
        ... )
        >>> backbone = Backbone.from_hub(mean)
        >>> backbone.preprocessing()(255 * keras.ops.ones((1, 8, 8, 3))).shape
        TensorShape([1, 32, 32, 3])

        Reference:
            https://www.tensorflow.org/hub/common_signatures/images
        """
        low, high = (float(each) for each in input_range)
        if not low < high:
            raise ValueError(
                "Expected input_range to be the lowest and the highest value of an image, such as "
                f"(0, 1) or (-1, 1). Received: input_range={input_range!r}."
            )
        inside: Literal["frozen", "train"] = "train" if batch_norm == "train" else "frozen"
        module = HubModule(handle, trainable=trainable, batch_norm=inside, **kwargs)
        backbone = cls(
            module, batch_norm=batch_norm, trainable=trainable, pooling=pooling, name=name
        )
        size: Any = module.image_size if image_size is None else image_size
        size = tuple(size) if isinstance(size, Sequence) else size
        backbone._expected = _Expected(size, (low, high))
        return backbone

    # --- Freezing ----------------------------------------------------------------------------

    @property
    def trainable(self) -> bool:
        """Whether anything inside may train; setting it sets every layer inside."""
        if not hasattr(self, "model"):  # Keras reads it while it makes the layer
            return False
        return any(layer.trainable for layer in freezing.walk(self.model)) or any(
            weight.trainable for weight in self.model.weights
        )

    @trainable.setter
    def trainable(self, value: bool) -> None:
        freezing.set_trainable(self.model, bool(value))
        self._batch_norm_guard.enforce()

    def freeze(self) -> None:
        """Freeze every layer inside.

        Example:

        >>> backbone = Backbone(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))
        >>> backbone.unfreeze()
        >>> backbone.freeze()
        >>> backbone.trainable_variables
        []
        """
        self.trainable = False

    def unfreeze(self, start: freezing.Start = "all") -> None:
        """Train the layers from `start` on and freeze those before it.

        Call it between two `fit` and compile the model again; within one `fit` use
        `keras_xfer.callbacks.StagedUnfreezing`.

        Args:
            start: `"all"`; an index into `backbone.model.layers` (100: layers 100 and later
                train; -20: the last twenty); the name of a layer or of a block; a regular
                expression over layer names, of which the first full match counts; or a float in
                (0, 1), the top fraction of the layers.

        Raises:
            TypeError: `start` is none of these.
            ValueError: `start` matches nothing, or only layers that have nothing to train; the
                nearest candidates are named.

        Example:

        >>> dense = [keras.layers.Dense(2, name=name) for name in ("low", "high")]
        >>> backbone = Backbone(keras.Sequential([keras.Input((4,)), *dense]))
        >>> backbone.unfreeze("high")
        >>> [layer.trainable for layer in dense]
        [False, True]
        """
        blocks = self.blocks if isinstance(start, str) and start != "all" else ()
        position = freezing.select(self.model, start, batch_norm=self.batch_norm, blocks=blocks)
        freezing.thaw(self.model, position)
        self._batch_norm_guard.enforce()

    # Keras collects what to train, to save and to count by these two, from the model above too:
    # the one place that every road to the optimizer passes.

    @property
    def variables(self) -> list[Any]:
        """All variables of the layer, after holding BatchNormalization to its policy."""
        self._batch_norm_guard.enforce()
        return super().variables

    @property
    def weights(self) -> list[Any]:
        """All weights of the layer, after holding BatchNormalization to its policy."""
        self._batch_norm_guard.enforce()
        return super().weights

    def enforce_batch_norm(self) -> None:
        """Take back what contradicts `batch_norm`, for whoever calls the layers inside by hand."""
        self._batch_norm_guard.enforce()

    # --- Looking inside ----------------------------------------------------------------------

    def cuts(self, input_shape: tuple[int, ...] | None = None) -> list[Cut]:
        """The articulation points of the model's graph: the names of the layers whose output
        alone crosses to what follows, in order, and what it costs and saves to keep that output.

        Args:
            input_shape: tuple `(height, width, channels)` of the images, for a model that takes
                any size; None for what the model was built for.

        Returns:
            list of str with the attributes `shape`, `bytes_per_image`, `flops` (estimated, of one
            image up to here) and `flops_share` (of the whole model); None where shapes are not
            known. Empty where the model has no graph (its `call` is its own code).

        Raises:
            ValueError: the model does not take `input_shape`.

        Example:

        >>> backbone = Backbone.from_application("VGG16", weights=None, pooling=None)
        >>> cut = backbone.cuts((224, 224, 3))[-1]
        >>> cut, cut.shape, cut.bytes_per_image, cut.flops_share
        ('block5_pool', (7, 7, 512), 100352, 1.0)

        Reference:
            https://en.wikipedia.org/wiki/Biconnected_component
        """
        return find_cuts(self.model, input_shape)

    def cuts_summary(self, input_shape: tuple[int, ...] | None = None) -> Table:
        """What it costs and saves to keep the output of each of `cuts()`.

        Args:
            input_shape: see `cuts`.

        Returns:
            A table that prints itself, with `rows` of (cut, shape, KiB an image, share of FLOPs up
            to there); "-" for what is not known.

        Raises:
            ValueError: the model does not take `input_shape`.

        Example:

        >>> dense = [keras.layers.Dense(n, name=f"dense{n}") for n in (768, 256)]
        >>> print(Backbone(keras.Sequential([keras.Input((256,)), *dense])).cuts_summary().rows[1:])
        [('dense768', (768,), 3.0, 0.501), ('dense256', (256,), 1.0, 1.0)]

        Reference:
            https://en.wikipedia.org/wiki/Biconnected_component
        """
        return Table(
            ("cut", "shape", "KiB an image", "share of FLOPs"),
            [
                (
                    str(cut),
                    cut.shape,
                    "-" if cut.bytes_per_image is None else round(cut.bytes_per_image / 1024, 1),
                    "-" if cut.flops_share is None else round(cut.flops_share, 3),
                )
                for cut in self.cuts(input_shape)
            ],
        )

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the model, in order; together they hold every layer once."""
        return find_blocks(self.model)

    @property
    def spec(self) -> applications.ApplicationSpec | None:
        """What is known of the expected input; None for a model that is not of
        keras.applications."""
        return applications.identify(self.model)

    def preprocessing(self, **kwargs: Any) -> BackbonePreprocessing:
        """The layer that brings images into the range that this backbone was trained on.

        Args:
            **kwargs: passed to `BackbonePreprocessing`, such as `image_size=224`.

        Returns:
            BackbonePreprocessing, the identity where the model preprocesses by itself.

        Raises:
            ValueError: the model is neither one of keras.applications nor from `from_hub`.

        Example:

        >>> backbone = Backbone.from_application("MobileNetV2", weights=None)
        >>> float(backbone.preprocessing()(255.0 * keras.ops.ones((8, 8, 3)))[0, 0, 0])
        1.0
        """
        if self._expected is not None:
            low, high = self._expected.input_range
            kwargs = {"image_size": self._expected.image_size, **kwargs}
            return BackbonePreprocessing((high - low) / 255, low, **kwargs)
        spec = self.spec
        if spec is None:
            raise ValueError(
                "Expected a backbone built by keras.applications, whose input range is known. "
                f"Received: model={self.model.name!r}. Say what it was trained on: "
                "keras_xfer.BackbonePreprocessing(scale=…, offset=…)."
            )
        return BackbonePreprocessing.from_spec(spec, **kwargs)

    def trainable_summary(self) -> Table:
        """What trains, block by block.

        Returns:
            A table that prints itself, with `rows` of (block, layers, parameters, trainable
            parameters, BatchNormalization state) and a last row for the whole.

        Example:

        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="top")])
        >>> print(Backbone(model, trainable=True).trainable_summary())
        block  layers  parameters  trainable  batch_norm
        top         1          10         10  -
        total       1          10         10  -
        """
        self._batch_norm_guard.enforce()
        parts = [(block.name, block.layers) for block in self.blocks]
        parts.append(("total", tuple(freezing.units(self.model))))
        return Table(
            ("block", "layers", "parameters", "trainable", "batch_norm"),
            [
                (
                    name,
                    len(layers),
                    freezing.parameters(layers),
                    freezing.parameters(layers, trainable_only=True),
                    freezing.batch_norm_state(layers, self.batch_norm),
                )
                for name, layers in parts
            ],
        )

    # --- Calling and saving ------------------------------------------------------------------

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The features of `inputs`."""
        self._batch_norm_guard.enforce()
        return self.finish(freezing.call(self.model, inputs, training))

    def finish(self, outputs: Any) -> Any:
        """What the layer makes of what its model gives: pooled, in the dtype of the layer."""
        if self._pool is not None:
            outputs = self._pool(outputs)
        return keras.tree.map_structure(self._cast, outputs)

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> Any:  # noqa: ARG002  # Keras's signature
        """Shape and dtype of the features, without running the model."""
        return self.finish_spec(freezing.output_spec(self.model, inputs))

    def finish_spec(self, outputs: Any) -> Any:
        """Shape and dtype of what `finish` gives."""
        if self._pool is not None:
            outputs = self._pool.compute_output_spec(outputs)
        return keras.tree.map_structure(
            lambda output: keras.KerasTensor(output.shape, self._dtype_of(output)), outputs
        )

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Shape of the features."""
        shape = self.model.compute_output_shape(input_shape)
        return shape if self._pool is None else self._pool.compute_output_shape(shape)

    def _cast(self, output: Any) -> Any:
        return keras.ops.cast(output, self._dtype_of(output))

    def _dtype_of(self, output: Any) -> str:
        """The dtype that `output` leaves with."""
        dtype: str = keras.backend.standardize_dtype(output.dtype)
        return self.compute_dtype if "float" in dtype else dtype

    def build(self, input_shape: Any) -> None:  # noqa: ARG002  # Keras's signature
        """Nothing to make: the model was built when it came."""
        self.built = True

    def get_config(self) -> dict[str, Any]:
        """The configuration, with the whole model and what of it trains."""
        self._batch_norm_guard.enforce()
        config = {
            **super().get_config(),
            "model": keras.saving.serialize_keras_object(self.model),
            "batch_norm": self.batch_norm,
            "pooling": self.pooling,
            "thawed": freezing.thawed(self.model),
        }
        if self._expected is not None:
            config["expected"] = dataclasses.asdict(self._expected)
        return LiveConfig(config)

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """A backbone from `get_config`."""
        trusted = isinstance(config, LiveConfig)
        config = copy.deepcopy(dict(config))  # Keras empties the parts that it reads
        thawed = config.pop("thawed")
        expected = config.pop("expected", None)
        config["model"] = keras.saving.deserialize_keras_object(
            config["model"], custom_objects=custom_objects, safe_mode=not trusted
        )
        backbone: Self = super().from_config(config)
        freezing.restore_thawed(backbone.model, thawed)
        if expected is not None:
            size = expected["image_size"]
            backbone._expected = _Expected(
                tuple(size) if isinstance(size, list) else size, tuple(expected["input_range"])
            )
        return backbone


def _data_format(model: keras.Layer) -> str | None:
    """Where the feature maps of `model` have their channels; None, as Keras is configured, where
    no layer says it."""
    formats = [getattr(layer, "data_format", None) for layer in freezing.walk(model)]
    return next((each for each in reversed(formats) if each is not None), None)
