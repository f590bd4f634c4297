"""`HubModule`: a SavedModel of TensorFlow Hub as a layer of Keras 3."""

import contextlib
import contextvars
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, Literal, Self

import keras

# Whether a file is being loaded, and under which `safe_mode`, has no public name: Keras's own
# TFSMLayer asks here. Tried on Keras 3.15.1.
from keras.src.saving.serialization_lib import in_safe_mode

from keras_xfer import freezing, handles, saved_model
from keras_xfer.blocks import Block
from keras_xfer.blocks import blocks as find_blocks
from keras_xfer.handles.local import path_of
from keras_xfer.live_config import LiveConfig
from keras_xfer.variable_group import grouped

_POLICIES = ("frozen", "train")
# Old handle -> new, while layers are reloaded.
_elsewhere: contextvars.ContextVar[Mapping[str, str] | None] = contextvars.ContextVar(
    "_elsewhere", default=None
)


@keras.saving.register_keras_serializable(package="keras_xfer")
class HubModule(freezing.ExactTrainable, keras.layers.Layer):
    """A SavedModel of TensorFlow Hub as a layer that trains, saves and reloads.

    `tensorflow_hub.KerasLayer` is a layer of Keras 2: Keras 3 refuses it, or runs it without ever
    training it. HubModule takes the same arguments and gives the same answers; its variables are the
    SavedModel's own, known to Keras one by one, in the order in which the forward pass reads them.
    Its regularisation losses count while the variables that they read are trained. TensorFlow
    backend only.

    Args:
        handle: str, path or callable: a folder that holds a SavedModel, a `.tar.gz` of one, an
            address on the web (downloaded once, see `keras_xfer.handles.resolve`), a
            `kaggle://owner/model/framework/variation/version`, or an object that was loaded
            already (which cannot be saved with the model, and whose variables are shared by all
            layers over it: what trains in one trains in all).
        trainable: bool, whether all variables start thawed. Refused for a signature and for what
            `model.export()` wrote, which know inference alone. Defaults to `False`.
        arguments: dict or None, further keyword arguments of the module's call; values that JSON
            has, if the layer is to be saved.
        tags: str, set of str or None, which graph of a SavedModel of TensorFlow 1 to load.
        signature: str or None, the signature to call in place of the module itself.
        signature_outputs_as_dict: bool or None, True to return all outputs of the signature.
        output_key: str or None, which output to return where the module gives a dict.
        output_shape: tuple, or nest of tuples like the output, without the batch: for a SavedModel
            that does not say the shape of its output.
        load_options: `tf.saved_model.LoadOptions` or None; not saved with the layer.
        batch_norm: what happens inside while it trains. `"frozen"`: all thawed weights train, and
            the statistics of BatchNormalization and dropout stay as in inference; `"train"`: as
            the module was written, which is called whole, so that all its statistics move as soon
            as one of its variables trains. Defaults to `"frozen"`. (A `Backbone` around it with
            `batch_norm="frozen"` freezes gamma and beta too.)
        sha256: str or None, the SHA-256 that an archive must have, in hexadecimal digits.
        name: str or None, the layer's name.
        dtype: the dtype of floating outputs, to which they are cast; inside, the SavedModel keeps
            what it was written in. `tf.string`, which belongs to the input, is taken as None.

    Input shape:
        Whatever the SavedModel takes: a tensor, or a nest of them. Strings for text modules, as
        tensors, arrays or a list. Floating inputs are cast to what it was written for; the value
        range is the module's own (images for TensorFlow Hub: `[0, 1]`).

    Output shape:
        Whatever the SavedModel gives.

    Raises:
        RuntimeError: the backend is not TensorFlow.
        OSError: the SavedModel cannot be had.
        ValueError: it is in the TF1 Hub format, is not callable without a signature, has no such
            signature, or cannot be trained although `trainable=True`.

    Example:

    >>> import tempfile
    >>> import numpy as np
    >>> import tensorflow as tf
    >>> class Doubled(tf.Module):
    ...     @tf.function(input_signature=[tf.TensorSpec([None, 2])])
    ...     def __call__(self, x):
    ...         return 2 * x
    >>> folder = tempfile.mkdtemp()
    >>> tf.saved_model.save(Doubled(), folder)
    >>> model = keras.Sequential([keras.Input((2,)), HubModule(folder)])
    >>> model.predict(np.array([[1.0, 2.0]]), verbose=0).tolist()
    [[2.0, 4.0]]

    Reference:
        https://www.tensorflow.org/hub/api_docs/python/hub/KerasLayer
    """

    def __init__(
        self,
        handle: Any,
        *,
        trainable: bool = False,
        arguments: dict[str, Any] | None = None,
        tags: Any = None,
        signature: str | None = None,
        signature_outputs_as_dict: bool | None = None,
        output_key: str | None = None,
        output_shape: Any = None,
        load_options: Any = None,
        batch_norm: Literal["frozen", "train"] = "frozen",
        sha256: str | None = None,
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        _check_backend()
        _check_arguments(batch_norm, signature, signature_outputs_as_dict, output_key)
        super().__init__(name=name, dtype=_dtype_of_layer(dtype), autocast=False)
        self.supports_jit = False  # XLA has no strings, tables or tf.py_function
        self.handle = os.fspath(handle) if isinstance(handle, os.PathLike) else handle
        # Keras would turn dicts and lists into tracking ones, which JSON does not know.
        self._settings = SimpleNamespace(
            arguments=dict(arguments or {}),
            tags=tags if tags is None or isinstance(tags, str) else sorted(tags),
            signature=signature,
            signature_outputs_as_dict=signature_outputs_as_dict,
            output_key=output_key,
            output_shape=_as_shapes(output_shape),
            sha256=sha256,
        )
        self.batch_norm = batch_norm
        # As an attribute, so that `model.export()` finds tables and files by it.
        self.resolved_object = _load(self.handle, tags, load_options, sha256)
        self._endpoint = saved_model.Endpoint(self.resolved_object, signature, self._described)
        if trainable and (problem := self.why_not_trainable):
            raise ValueError(
                f"Expected trainable=False, for {problem} Received: trainable=True for "
                f"{self._described}."
            )
        self.groups = grouped(
            saved_model.variables(self.resolved_object, self._endpoint, self._described), self.name
        )
        for group in self.groups:
            group.statistics_move = self._statistics_move
        self._attach_losses()
        self._warned = False
        self.built = True  # its variables came with it
        self.trainable = trainable
        if trainable:
            self._check_trainable()

    @staticmethod
    @contextlib.contextmanager
    def relocated(handles: Mapping[str, str | os.PathLike[str]]) -> Iterator[None]:
        """While it holds, a layer that is loaded from a file looks for its SavedModel elsewhere.

        For a model whose SavedModel has moved since, or came from another machine. The layer keeps
        the new handle; a `sha256` that it was made with holds for an archive, not for a folder.

        Args:
            handles: dict of each old handle, as the error about it writes it, to the new one.

        Example:

        >>> with HubModule.relocated({"/old/place": "/new/place"}):
        ...     pass  # keras.saving.load_model("model.keras", safe_mode=False)
        """
        new = {old: os.fspath(path) for old, path in handles.items()}
        token = _elsewhere.set({**(_elsewhere.get() or {}), **new})
        try:
            yield
        finally:
            _elsewhere.reset(token)

    # --- Freezing ----------------------------------------------------------------------------

    def freeze(self) -> None:
        """Freeze all variables.

        Example:

        >>> module = HubModule(lambda x: 2 * x)
        >>> module.freeze()
        >>> module.trainable
        False
        """
        self.trainable = False

    def unfreeze(self, start: freezing.Start = "all") -> None:
        """Train the variables from `start` on, in the order in which the forward pass reads them,
        and freeze those before it.

        Args:
            start: `"all"`; an index into `module.groups`; the name of a variable, of its scope or
                of a block; a regular expression over such names (`re.fullmatch`; the first match
                and all after it); or a float in (0, 1), the top fraction of the trainable
                variables. Variables of one scope (kernel and bias) thaw together.

        Raises:
            TypeError: `start` is none of these.
            ValueError: `start` matches nothing, or nothing that trains; or the module cannot be
                trained at all.

        Example:

        >>> import tensorflow as tf
        >>> class Tower(tf.Module):
        ...     def __init__(self):
        ...         self.low = tf.Variable(1.0, name="low")
        ...         self.high = tf.Variable(1.0, name="high")
        ...     @tf.function(input_signature=[tf.TensorSpec([None])])
        ...     def __call__(self, x):
        ...         return x * self.low * self.high
        >>> module = HubModule(Tower())
        >>> module.unfreeze(0.5)
        >>> [variable.name for variable in module.trainable_variables]
        ['high']
        """
        blocks = self.blocks if isinstance(start, str) and start != "all" else ()
        freezing.thaw(self, freezing.select(self, start, batch_norm="affine", blocks=blocks))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the module, by the numbers in the names of its scopes."""
        return find_blocks(self)

    @property
    def why_not_trainable(self) -> str | None:
        """What stands against training it; None where it can be trained."""
        return self._endpoint.why_not_trainable

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images that the SavedModel takes; None where it takes no images
        or those of any size."""
        return self._endpoint.image_size()

    # --- Calling -----------------------------------------------------------------------------

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The outputs for `inputs`, of which lists and strings become tensors."""
        return super().__call__(self._endpoint.as_tensors(inputs), *args, **kwargs)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The outputs of the SavedModel for `inputs`."""
        self._check_trainable()
        self._check_strategy()
        return self._run(inputs, bool(training) and self._statistics_move())

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> Any:  # noqa: ARG002  # Keras's signature
        """Shapes and dtypes of the outputs, without running the SavedModel."""
        import tensorflow as tf

        self._check_strategy()
        self._endpoint.check_symbolic(inputs)
        traced = tf.function(lambda x: self._run(x, training=False), autograph=False)
        outputs = traced.get_concrete_function(
            tf.nest.map_structure(self._endpoint.spec_of, inputs)
        ).structured_outputs
        return tf.nest.map_structure(self._as_keras_tensor, outputs)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Shapes of the outputs."""
        inputs = self._endpoint.keras_tensors(input_shape)
        return keras.tree.map_structure(lambda each: each.shape, self.compute_output_spec(inputs))

    def _statistics_move(self) -> bool:
        """Whether training moves statistics: all of them, for the SavedModel is called whole."""
        return self.batch_norm == "train" and any(weight.trainable for weight in self.weights)

    def _run(self, inputs: Any, training: bool) -> Any:
        import tensorflow as tf

        outputs = self._endpoint(inputs, self._settings.arguments, training)
        outputs = self._chosen(outputs)
        if self._settings.output_shape is not None:
            batch = tf.nest.flatten(inputs)[0].shape[:1]
            outputs = _with_shapes(outputs, self._settings.output_shape, batch)
        return tf.nest.map_structure(self._cast, outputs)

    def _chosen(self, outputs: Any) -> Any:
        key = self._settings.output_key
        if key is None:
            return outputs
        if not isinstance(outputs, Mapping):
            raise ValueError(
                "Expected a module that gives a dict, for output_key to choose from. Received: "
                f"output_key={key!r}, and a {type(outputs).__name__} from {self._described}."
            )
        if key not in outputs:
            raise ValueError(
                f"Expected output_key to be one of {sorted(outputs)}. Received: "
                f"output_key={key!r} for {self._described}."
            )
        return outputs[key]

    def _cast(self, output: Any) -> Any:
        import tensorflow as tf

        if output is None or not output.dtype.is_floating:
            return output
        return tf.cast(output, self.compute_dtype)

    def _as_keras_tensor(self, spec: Any) -> Any:
        if spec is None:
            return None
        if spec.shape.rank is None:
            raise ValueError(
                "Expected a SavedModel that says the rank of its output; this one does not. "
                f"Received: {self._described}. Give output_shape=, without the batch, such as "
                "output_shape=(1280,)."
            )
        return keras.KerasTensor(tuple(spec.shape), spec.dtype.name, **_kind(spec))

    def _attach_losses(self) -> None:
        """Let each regularisation loss count, once, while a variable that it reads is trained."""
        weights = {id(weight.value): weight for weight in self.weights}
        losses: dict[int, list[Any]] = {}
        for loss, read in saved_model.losses(self.resolved_object, self._described):
            known = [key for key in map(id, read) if key in weights]
            trained = [key for key, weight in weights.items() if weight.trainable]
            for key in (known or trained)[:1]:
                losses.setdefault(key, []).append(loss)
        for key, those in losses.items():
            weights[key].regularizer = lambda _, those=those: sum(
                keras.ops.cast(loss(), keras.config.floatx()) for loss in those
            )

    def _check_trainable(self) -> None:
        """Refuse what would go wrong, and warn of what would do nothing, while `trainable`."""
        if not self.trainable:
            return
        if problem := self.why_not_trainable:
            raise ValueError(
                f"Expected a frozen layer, for {problem} Received: {self._described} with "
                f"trainable=True. Set layer.trainable = False on layer {self.name!r}."
            )
        if not self.trainable_weights and not self._warned:
            self._warned = True
            warnings.warn(
                f"HubModule {self.name!r} is trainable but trains nothing: {self._described} has "
                "no trainable variables, or another layer over the same object has frozen them.",
                stacklevel=3,
            )

    def _check_strategy(self) -> None:
        """Refuse variables that a distribution strategy in force knows nothing of."""
        import tensorflow as tf

        if not tf.distribute.has_strategy():
            return
        strategy = tf.distribute.get_strategy()
        created = strategy.extended.variable_created_in_scope
        strangers = [weight for weight in self.weights if not created(weight.value)]
        if strangers:
            raise ValueError(
                f"Expected HubModule {self.name!r} to be made within the scope of the "
                f"{type(strategy).__name__} that it runs under, so that each device has its "
                f"variables. Received: {self._described}, loaded outside of it. Make the layer "
                "and the model inside `with strategy.scope():`."
            )

    @property
    def _described(self) -> str:
        return f"handle={self.handle!r}"

    # --- Saving ------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The configuration: the handle and how to call it, not the SavedModel itself."""
        if not isinstance(self.handle, str):
            raise NotImplementedError(
                "Expected a handle that another process can load again: a path or an address. "
                f"Received: handle={self.handle!r} of type {type(self.handle).__name__}. Save it "
                "(tf.saved_model.save(obj, folder)) and make the layer from the folder, or save "
                "the model's weights alone."
            )
        settings = {
            key: value for key, value in vars(self._settings).items() if value not in (None, {})
        }
        try:
            json.dumps(settings)
        except TypeError as error:
            raise ValueError(
                "Expected arguments that JSON can hold, to save the layer. Received: "
                f"arguments={self._settings.arguments!r} ({error})."
            ) from error
        config = LiveConfig(
            {
                **super().get_config(),
                "handle": self.handle,
                "batch_norm": self.batch_norm,
                **settings,
            }
        )
        thawed = freezing.thawed(self)
        if 0 < len(thawed["layers"]) <= len(self.groups) or thawed["weights"]:
            config["thawed"] = thawed  # not none and not all
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:  # noqa: ARG003  # Keras's signature
        """A layer from `get_config`, refused where nobody has said that the source is trusted."""
        safe = in_safe_mode()
        if safe or (safe is None and not isinstance(config, LiveConfig)):
            raise ValueError(
                "Refused to load a HubModule: its SavedModel is code, which runs with all your "
                f"rights. Received: handle={config.get('handle')!r}. If you trust where it comes "
                "from, pass safe_mode=False to the loading function (keras.saving.load_model("
                "path, safe_mode=False)), or call keras.config.enable_unsafe_deserialization() (so "
                "too for keras.models.clone_model, where the layer is within another model)."
            )
        config = dict(config)
        thawed = config.pop("thawed", None)
        old = config["handle"]
        config["handle"] = (_elsewhere.get() or {}).get(old, old)
        if config["handle"] != old and path_of(config["handle"]).is_dir():
            config.pop("sha256", None)  # it pins an archive; who names a folder has looked at it
        try:
            layer = cls(**config)
        except OSError as error:
            raise OSError(
                f"Cannot reload the layer {config.get('name')!r}: {error} If its SavedModel is "
                f"elsewhere now: with keras_xfer.HubModule.relocated({{{old!r}: 'its new "
                "place'}): load the model again."
            ) from error
        if thawed is not None:
            freezing.restore_thawed(layer, thawed)
        return layer


def _check_backend() -> None:
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "Expected the TensorFlow backend, which alone can run a SavedModel. Received: "
            f"KERAS_BACKEND={keras.backend.backend()!r}. Set KERAS_BACKEND=tensorflow, or use a "
            "model of keras.applications or keras-hub."
        )


def _check_arguments(
    batch_norm: str, signature: str | None, as_dict: bool | None, output_key: str | None
) -> None:
    if batch_norm not in _POLICIES:
        raise ValueError(
            f"Expected batch_norm to be one of {_POLICIES}. Received: batch_norm={batch_norm!r}."
        )
    if signature is not None and (output_key is not None) == bool(as_dict):
        raise ValueError(
            "Expected, with a signature, either output_key or signature_outputs_as_dict=True. "
            f"Received: signature={signature!r}, output_key={output_key!r}, "
            f"signature_outputs_as_dict={as_dict!r}."
        )
    if signature is None and as_dict:
        raise ValueError(
            "Expected signature_outputs_as_dict together with a signature. Received: "
            f"signature=None, signature_outputs_as_dict={as_dict!r}."
        )


def _load(handle: Any, tags: Any, options: Any, sha256: str | None) -> Any:
    if isinstance(handle, str):
        folder = handles.resolve(handle, sha256=sha256)
        return saved_model.load(handle, folder, tags=tags, options=options)
    if isinstance(handle, keras.Layer) or not (callable(handle) or hasattr(handle, "signatures")):
        raise TypeError(
            "Expected handle to be a path, an address, or an object that was loaded from a "
            "SavedModel (for a Keras model: keras_xfer.Backbone). Received: "
            f"handle={handle!r} of type {type(handle).__name__}."
        )
    given = {"tags": tags, "load_options": options, "sha256": sha256}
    if any(value is not None for value in given.values()):
        raise ValueError(
            f"Expected {', '.join(given)} for a handle that is yet to be loaded alone. Received: "
            f"handle={handle!r}, {', '.join(f'{key}={value!r}' for key, value in given.items())}."
        )
    return handle


def _dtype_of_layer(dtype: Any) -> Any:
    """`dtype`, but None for `tf.string`, which tutorials pass for text."""
    return None if getattr(dtype, "name", dtype) == "string" else dtype


def _as_shapes(output_shape: Any) -> Any:
    """`output_shape` with lists and tf.TensorShapes as tuples, so that JSON gives it back."""
    if output_shape is None:
        return None
    if isinstance(output_shape, Mapping):
        return {key: _as_shapes(each) for key, each in output_shape.items()}
    if all(size is None or isinstance(size, int) for size in output_shape):
        return tuple(output_shape)
    return [_as_shapes(each) for each in output_shape]


def _kind(output: Any) -> dict[str, bool]:
    """What a symbolic output of TensorFlow is besides dense."""
    import tensorflow as tf

    return {
        "ragged": isinstance(output, (tf.RaggedTensor, tf.RaggedTensorSpec)),
        "sparse": isinstance(output, (tf.SparseTensor, tf.SparseTensorSpec)),
    }


def _with_shapes(outputs: Any, shapes: Any, batch: Any) -> Any:
    """`outputs`, of which each is told its shape without the batch."""
    import tensorflow as tf

    if isinstance(outputs, Mapping):
        return {key: _with_shapes(each, shapes[key], batch) for key, each in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return [_with_shapes(*each, batch) for each in zip(outputs, shapes, strict=True)]
    return tf.ensure_shape(outputs, batch.concatenate(shapes))
