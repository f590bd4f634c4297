"""A SavedModel, or an object that was loaded: what of it is called, what it takes, and its
variables in the order in which the forward pass reads them. TensorFlow alone."""

import collections
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np


def load(handle: str, folder: str, *, tags: Any = None, options: Any = None) -> Any:
    """The object that the SavedModel in `folder` holds, to which `handle` led.

    Raises:
        ValueError: it is in the TF1 Hub format, or its graphs carry other tags.
        OSError: its files cannot be read, or it holds operations that are not registered.
    """
    import tensorflow as tf

    if (Path(folder) / "tfhub_module.pb").exists():
        raise ValueError(
            "Expected a SavedModel of TensorFlow 2. There is a module in the TF1 Hub format "
            f"(tfhub_module.pb) in {folder}, which has one graph for training and one for "
            f"inference and cannot be called. Received: handle={handle!r}. Use a later version of "
            "the same module (on tfhub.dev and Kaggle those for TensorFlow 2), or its successor in "
            "keras.applications or keras-hub."
        )
    try:
        return tf.saved_model.load(folder, tags=tags, options=options)
    except ValueError as error:  # tags, mostly
        if "0 MetaGraphs" in str(error):
            raise OSError(
                f"Cannot load the SavedModel in {folder}: it is empty. Received: "
                f"handle={handle!r}. Its files are damaged: remove the folder and get it again."
            ) from error
        raise ValueError(
            f"Cannot load the SavedModel in {folder}: {error} Received: handle={handle!r}, "
            f"tags={tags!r}."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # RuntimeError, IndexError, KeyError, OSError and tf.errors alike
        if "Op type not registered" in str(error):
            operation = str(error).split("'")[1]
            raise OSError(
                f"Expected a SavedModel of TensorFlow's own operations. There is {operation!r} in "
                f"{folder}, which another library brings. Received: handle={handle!r}. Import that "
                "library first; for text it is mostly tensorflow-text: pip install "
                "tensorflow-text, and import tensorflow_text."
            ) from error
        what = str(error).partition("\n")[0].rstrip(".")
        raise OSError(
            f"Cannot load the SavedModel in {folder}: {what}. Received: handle={handle!r}. Its "
            "files are damaged or incomplete: remove the folder and get it again."
        ) from error


class Endpoint:
    """What of a loaded object is called, and what it takes.

    Args:
        loaded: a callable, or an object with signatures.
        signature: str or None, which signature to call in place of the object.
        described: str, how error messages call it.

    Attributes:
        function: what is called.
        concrete: its concrete functions; empty for a Python function.
        why_not_trainable: str, or None where it can be trained.
        takes_training: bool, whether it wants to be told.

    Raises:
        ValueError: no such signature, or nothing that can be called.
    """

    def __init__(self, loaded: Any, signature: str | None, described: str) -> None:
        self._described = described
        self._signature = signature
        self.function, self.why_not_trainable = self._find(loaded)
        self.concrete = self._concrete()
        self.takes_training = signature is None and "training" in _parameters(self.function)
        self.accepted = self._accepted()

    def _find(self, loaded: Any) -> tuple[Callable[..., Any], str | None]:
        signatures = getattr(loaded, "signatures", None) or {}
        if self._signature is not None:
            if self._signature not in signatures:
                raise ValueError(
                    f"Expected signature to be one of {sorted(signatures)}. Received: "
                    f"signature={self._signature!r} for {self._described}."
                )
            return signatures[self._signature], (
                "a signature knows inference alone: no training mode, no updates of statistics, "
                "no regularisation losses."
            )
        if callable(loaded):
            return loaded, None
        if callable(serve := getattr(loaded, "serve", None)):
            return serve, (
                "what Keras 3's model.export() wrote is a serving function, fixed in inference "
                "mode. Fine-tune the model itself, from its .keras file."
            )
        names = f"Give signature=, one of {sorted(signatures)}." if signatures else "It has none."
        raise ValueError(
            "Expected a SavedModel that can be called, or the name of a signature. Received: "
            f"{self._described}, which cannot be called. {names}"
        )

    def _concrete(self) -> tuple[Any, ...]:
        if self._signature is not None:
            return (self.function,)
        for each in _itself_and_call(self.function):
            if hasattr(each, "concrete_functions"):  # restored
                return tuple(each.concrete_functions)
            if getattr(each, "input_signature", None) is not None:
                return (each.get_concrete_function(),)
        return ()

    def _accepted(self) -> list[Any]:
        """What each concrete function takes as its inputs: nests of tf.TypeSpec."""
        import tensorflow as tf

        found: list[Any] = []
        for each in self.concrete:
            args, kwargs = each.structured_input_signature
            inputs = dict(kwargs) if self._signature is not None else args[0] if args else None
            leaves = tf.nest.flatten(inputs)
            known = bool(leaves) and all(isinstance(leaf, tf.TypeSpec) for leaf in leaves)
            if known and inputs not in found:
                found.append(inputs)
        if self._signature is not None:  # a single input needs no name
            found += [next(iter(each.values())) for each in found if len(each) == 1]
        return found

    # --- Calling -----------------------------------------------------------------------------

    def __call__(self, inputs: Any, arguments: Mapping[str, Any], training: bool) -> Any:
        """The outputs for `inputs`, tensors or nests of them."""
        kwargs = dict(arguments)
        if self.takes_training:
            kwargs.setdefault("training", training)
        if self.accepted:
            inputs = self._matched(inputs)
        if self._signature is not None and isinstance(inputs, Mapping):
            return self.function(**kwargs, **inputs)
        return self.function(inputs, **kwargs)

    def as_tensors(self, inputs: Any) -> Any:
        """`inputs` with lists, strings and arrays made tensors, as far as a tensor is expected."""
        import tensorflow as tf

        def is_tensor(value: Any) -> bool:
            return tf.is_tensor(value) or isinstance(value, (keras.KerasTensor, keras.Variable))

        def convert(value: Any) -> Any:
            return value if is_tensor(value) else tf.convert_to_tensor(value)

        if is_tensor(inputs):
            return inputs
        leaves = tf.nest.flatten(inputs)
        if not any(isinstance(leaf, keras.KerasTensor) for leaf in leaves):
            text = any(isinstance(leaf, (str, bytes)) for leaf in leaves)
            one = any(isinstance(each, tf.TypeSpec) for each in self.accepted)
            if not isinstance(inputs, Mapping) and (one or (text and not self.accepted)):
                return convert(inputs)
        for nest in self.accepted:
            if _same_structure(nest, inputs, up_to=True):
                return keras.tree.map_structure_up_to(
                    nest, lambda _, value: convert(value), nest, inputs
                )
        return tf.nest.map_structure(
            lambda value: convert(value) if isinstance(value, np.ndarray) else value, inputs
        )

    def keras_tensors(self, shapes: Any) -> Any:
        """Symbolic tensors of these shapes, in the dtypes that the module takes."""
        import tensorflow as tf

        for nest in self.accepted:
            if isinstance(nest, tf.TypeSpec) and not isinstance(shapes, Mapping):
                return keras.KerasTensor(shapes, nest.dtype.name)
            if isinstance(nest, Mapping) and isinstance(shapes, Mapping):
                return {key: keras.KerasTensor(shapes[key], nest[key].dtype.name) for key in nest}
        return keras.tree.map_shape_structure(keras.KerasTensor, shapes)

    def spec_of(self, tensor: Any) -> Any:
        """The tf.TypeSpec of a tensor, symbolic or not."""
        import tensorflow as tf

        if not isinstance(tensor, keras.KerasTensor):
            return tf.type_spec_from_value(tensor)
        if tensor.ragged:
            return tf.RaggedTensorSpec(tensor.shape, tensor.dtype)
        leaves = [leaf for nest in self.accepted for leaf in tf.nest.flatten(nest)]
        # Keras marks `2 * tensor` sparse, which it is not. Tried on Keras 3.15.1.
        sparse = tensor.sparse and any(isinstance(leaf, tf.SparseTensorSpec) for leaf in leaves)
        kind = tf.SparseTensorSpec if sparse else tf.TensorSpec
        return kind(tensor.shape, tensor.dtype)

    def check_symbolic(self, inputs: Any) -> None:
        """Refuse, in the way that a Sequential without an Input understands, numbers for strings.

        Such a model takes its input for floating, and goes on without shapes where a layer says
        NotImplementedError.
        """
        import tensorflow as tf

        wanted = {leaf.dtype for nest in self.accepted for leaf in tf.nest.flatten(nest)}
        given = {leaf.dtype for leaf in keras.tree.flatten(inputs)}
        if wanted == {tf.string} and "string" not in given:
            raise NotImplementedError(
                f"Expected strings, which is what {self._described} takes. Received: "
                f"inputs={inputs}. Begin the model with keras.Input((), dtype='string')."
            )

    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images that the module takes, where it says them."""
        for nest in self.accepted:
            shape = getattr(nest, "shape", None)
            if shape is None or shape.rank != 4 or None in shape[1:3]:
                continue
            if shape[3] in (None, 1, 3, 4):  # else the channels are elsewhere
                return int(shape[1]), int(shape[2])
        return None

    def _matched(self, inputs: Any) -> Any:
        """`inputs`, cast to what the first concrete function that can take them was written for."""
        import tensorflow as tf

        alike = [nest for nest in self.accepted if _same_structure(nest, inputs)]
        for nest in alike:
            if all(map(_takes, tf.nest.flatten(nest), tf.nest.flatten(inputs))):
                return tf.nest.map_structure(_cast, nest, inputs)
        # A nest of another structure may still be what the function makes of its arguments.
        if not alike and not any(isinstance(nest, tf.TypeSpec) for nest in self.accepted):
            return inputs
        received = tf.nest.map_structure(_written, inputs)
        known = " or ".join(str(tf.nest.map_structure(_written, nest)) for nest in self.accepted)
        raise ValueError(
            f"Expected inputs of {known}, which is what {self._described} was written for. "
            f"Received: inputs={received}. Give the layer before it that shape and dtype (integer "
            "images: keras.layers.Rescaling(1 / 255) for the range [0, 1], which most modules take)."
        )


def _parameters(function: Any) -> set[str]:
    """The names of the arguments of `function`, a Python function or a restored one."""
    names: set[str] = set()
    for each in _itself_and_call(function):
        try:
            names.update(inspect.signature(each).parameters)
        except (TypeError, ValueError):  # built in: it does not say
            continue
    return names


def _itself_and_call(function: Any) -> tuple[Any, ...]:
    """A function, and the method that it has if it is an object that can be called."""
    return function, getattr(function, "__call__")  # noqa: B004, B009  # TensorFlow puts it there


def _same_structure(nest: Any, inputs: Any, *, up_to: bool = False) -> bool:
    import tensorflow as tf

    try:
        if up_to:
            keras.tree.map_structure_up_to(nest, lambda *_: None, nest, inputs)
        else:
            tf.nest.assert_same_structure(nest, inputs)
    except (TypeError, ValueError):  # how tf.nest says no
        return False
    return True


def _takes(spec: Any, value: Any) -> bool:
    """Whether `value`, cast if it is floating, is a `spec`."""
    same = value.dtype == spec.dtype or (value.dtype.is_floating and spec.dtype.is_floating)
    return bool(same and spec.shape.is_compatible_with(value.shape))


def _cast(spec: Any, value: Any) -> Any:
    import tensorflow as tf

    return value if value.dtype == spec.dtype else tf.cast(value, spec.dtype)


def _written(spec: Any) -> str:
    return (
        f"{spec.dtype.name}{tuple(spec.shape) if spec.shape.rank is not None else ' of any shape'}"
    )


# --- Variables -------------------------------------------------------------------------------


def variables(loaded: Any, endpoint: Endpoint, described: str) -> list[tuple[str, Any, bool]]:
    """The variables of a loaded object, as the forward pass first reads them.

    Returns:
        list of (name with slashes and without `:0`, tf.Variable, whether it is to be trained).

    Raises:
        ValueError: one has no fixed shape.
    """
    read = {id(variable): variable for each in endpoint.concrete for variable in each.variables}
    declared = getattr(loaded, "variables", None)
    # Of a TextVectorization tf_keras declares what is no variable.
    every = list(read.values()) if declared is None else _unique(_of_tensorflow(declared))
    known = {id(variable) for variable in every}
    # What no function reads goes first: it thaws with the whole alone.
    position = {key: i for i, key in enumerate(read)}
    every += [variable for variable in read.values() if id(variable) not in known]
    every.sort(key=lambda variable: position.get(id(variable), -1))
    trained = _of_tensorflow(getattr(loaded, "trainable_variables", None))
    if trained is None:
        trained = [variable for variable in every if variable.trainable]
    training = set() if endpoint.why_not_trainable else {id(variable) for variable in trained}
    names = _names(loaded, every)
    for name, variable in zip(names, every, strict=True):
        if not variable.shape.is_fully_defined():
            raise ValueError(
                f"Expected variables of fixed shape, which Keras alone can save. Received: {name!r} "
                f"of shape {variable.shape} in {described}. Save the module again with "
                "tf.Variable(…) of one shape, or call it in a tf.data map."
            )
    return [(name, v, id(v) in training) for name, v in zip(names, every, strict=True)]


def losses(loaded: Any, described: str) -> list[tuple[Callable[[], Any], list[Any]]]:
    """The regularisation losses of a loaded object, each with the variables that it reads.

    Raises:
        ValueError: one of them is no callable.
    """
    import tensorflow as tf

    found: list[tuple[Callable[[], Any], list[Any]]] = []
    for loss in getattr(loaded, "regularization_losses", None) or ():
        if not callable(loss):
            raise ValueError(
                "Expected regularization_losses to be callables that give a scalar. Received: "
                f"{loss!r} among those of {described}."
            )
        concrete = getattr(loss, "concrete_functions", ())
        read = [variable for each in concrete for variable in each.variables]
        if not concrete:  # written in Python
            with tf.GradientTape() as tape:
                loss()
            read = list(tape.watched_variables())
        found.append((loss, read))
    return found


def _of_tensorflow(items: Any) -> list[Any] | None:
    import tensorflow as tf

    return None if items is None else [item for item in items if isinstance(item, tf.Variable)]


def _unique(items: Any) -> list[Any]:
    return list({id(item): item for item in items}.values())


def _names(loaded: Any, every: list[Any]) -> list[str]:
    """Their own names, which a tf.Module often leaves at "Variable": then the attribute's."""
    own = [variable.name.partition(":")[0] for variable in every]
    count = collections.Counter(own)
    unclear = {name for name in own if count[name] > 1 or name == "Variable"}
    if not unclear:
        return own
    paths = {id(variable): path for path, variable in _attributes(loaded)}
    return [
        paths.get(id(variable), name) if name in unclear else name
        for name, variable in zip(own, every, strict=True)
    ]


def _attributes(loaded: Any) -> Iterator[tuple[str, Any]]:
    """The variables that attributes of `loaded` hold, however deep, with their paths."""
    import tensorflow as tf

    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", loaded)]
    while waiting:
        path, item = waiting.pop(0)
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, tf.Variable):
            yield path, item
        elif isinstance(item, Mapping):
            waiting += [(f"{path}/{key}".strip("/"), each) for key, each in item.items()]
        elif isinstance(item, (list, tuple)):
            waiting += [(f"{path}/{i}".strip("/"), each) for i, each in enumerate(item)]
        elif isinstance(item, tf.Module) or type(item).__name__ == "_UserObject":
            waiting += [
                (f"{path}/{name}".strip("/"), each)
                for name, each in vars(item).items()
                if not name.startswith("_") and name not in ("variables", "trainable_variables")
            ]
