"""SavedModels that tests make for themselves."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np

VOCABULARY = ("a", "fine", "dull", "film", "one")


def text(folder: Path) -> Path:
    """A text embedding of three dimensions with a vocabulary table: strings in, (B, 3) out."""
    import tensorflow as tf

    class Embedding(tf.Module):
        def __init__(self):
            super().__init__()
            words = tf.constant(VOCABULARY)
            numbers = tf.lookup.KeyValueTensorInitializer(words, tf.range(5, dtype=tf.int64))
            self.table = tf.lookup.StaticVocabularyTable(numbers, num_oov_buckets=1)
            values = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")
            self.embeddings = tf.Variable(values, name="embeddings")

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def __call__(self, sentences):
            words = tf.strings.split(sentences)
            vectors = tf.nn.embedding_lookup(self.embeddings, self.table.lookup(words.values))
            return tf.math.segment_mean(vectors, words.value_rowids())

    tf.saved_model.save(Embedding(), str(folder))
    return folder


# --- As the image modules of TensorFlow Hub were made ------------------------------------------


def tower(folder: Path) -> Path:
    """By tf_keras: two blocks of convolution and BatchNormalization, dropout and a dense layer, all
    with L2: images (B, 8, 8, 3) in, (B, 4) out."""
    layers, initializers, tf_keras = _tf_keras()
    l2 = tf_keras.regularizers.l2
    inputs = x = tf_keras.Input((8, 8, 3))
    for block in ("block1", "block2"):
        x = layers.Conv2D(4, 3, 2, name=f"{block}_conv", kernel_regularizer=l2(0.01))(x)
        x = layers.BatchNormalization(
            momentum=0.5,
            name=f"{block}_bn",
            gamma_initializer=initializers.RandomUniform(0.5, 1.5),
            moving_mean_initializer=initializers.RandomUniform(-0.2, 0.2),
            moving_variance_initializer=initializers.RandomUniform(0.5, 1.5),
        )(x)
        x = layers.Activation("tanh")(x)
    x = layers.Dropout(0.5)(layers.Flatten()(x))
    x = layers.Dense(4, name="top", kernel_regularizer=l2(0.02))(x)
    tf_keras.Model(inputs, x).save(folder, save_format="tf")
    return folder


def mobilenet(folder: Path) -> Path:
    """MobileNetV2 without its classifier, random: images (B, 32, 32, 3) in, (B, 1, 1, 1280) out."""
    model = _tf_keras()[2].applications.MobileNetV2(
        (32, 32, 3), alpha=0.35, include_top=False, weights=None
    )
    _save_reusable(
        folder,
        lambda x, training: model(x, training=training),
        [None, 32, 32, 3],
        variables=model.variables,
        trainable_variables=model.trainable_variables,
    )
    return folder


def _tf_keras():
    with warnings.catch_warnings():  # of its own dependencies
        warnings.simplefilter("ignore")
        import tf_keras
    tf_keras.utils.set_random_seed(1)
    return tf_keras.layers, tf_keras.initializers, tf_keras


# --- The interface of reusable SavedModels, by hand --------------------------------------------


def reusable(folder: Path) -> Path:
    """Dense, BatchNormalization and dense, with L2 and without dropout: (B, 4) in, (B, 3) out.

    It also takes `times`, 1 or 2, by which it multiplies its output."""
    import tensorflow as tf

    held = _normalised_dense()
    _save_reusable(
        folder,
        lambda x, training, times=1: times * _run_normalised_dense(held, x, training),
        [None, 4],
        variables=list(vars(held).values()),
        trainable_variables=[held.kernel, held.gamma, held.beta, held.top],
        losses=[
            tf.function(lambda: 0.01 * tf.reduce_sum(held.kernel**2), input_signature=[]),
            tf.function(lambda: 0.02 * tf.reduce_sum(held.top**2), input_signature=[]),
        ],
        times=(1, 2),
    )
    return folder


def _normalised_dense():
    import tensorflow as tf

    random = np.random.default_rng(3)

    def variable(name, *shape):
        values = random.uniform(0.2, 1.2, shape).astype("float32")
        if "moving" not in name:
            return tf.Variable(values, name=name)
        return tf.Variable(  # as TensorFlow's own: each replica's own, and their mean to a reader
            values,
            name=name,
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.MEAN,
        )

    return SimpleNamespace(
        top=variable("top/kernel", 5, 3),  # before what is read before it
        kernel=variable("low/kernel", 4, 5),
        gamma=variable("norm/gamma", 5),
        beta=variable("norm/beta", 5),
        mean=variable("norm/moving_mean", 5),
        variance=variable("norm/moving_variance", 5),
    )


def _run_normalised_dense(held, x, training):
    import tensorflow as tf

    x = x @ held.kernel
    mean, variance = held.mean + 0.0, held.variance + 0.0
    if training:
        mean, variance = tf.nn.moments(x, [0])
        held.mean.assign(0.5 * held.mean + 0.5 * mean)
        held.variance.assign(0.5 * held.variance + 0.5 * variance)
    x = tf.nn.batch_normalization(x, mean, variance, held.beta, held.gamma, 1e-3)
    return tf.tanh(x) @ held.top


def _save_reusable(
    folder, run, shape, *, variables, trainable_variables, losses=(), times=None
) -> None:
    import tensorflow as tf

    spec = tf.TensorSpec(shape, name="inputs")
    module = tf.train.Checkpoint()
    module.variables = variables
    module.trainable_variables = trainable_variables
    module.regularization_losses = list(losses)
    if times is None:
        function = tf.function(lambda inputs, training=False: run(inputs, training))
    else:
        function = tf.function(
            lambda inputs, training=False, times=1: run(inputs, training, times),
        )
    for training in (False, True):
        for each in times or [None]:
            more = {} if each is None else {"times": each}
            function.get_concrete_function(spec, training=training, **more)
    module.__call__ = function
    tf.saved_model.save(module, str(folder))


# --- Bare modules ------------------------------------------------------------------------------


def bare(folder: Path) -> Path:
    """A tf.Module whose variables have no names, its attributes in the reverse of the order in
    which it reads them: (B, 4) in, (B, 3) out."""
    import tensorflow as tf

    class Bare(tf.Module):
        def __init__(self):
            super().__init__()
            random = np.random.default_rng(4)
            self.a_top = tf.Variable(random.normal(size=(5, 3)).astype("float32"))
            self.b_middle = [tf.Variable(tf.fill([5], 0.5)), tf.Variable(tf.fill([5], 0.25))]
            self.c_low = tf.Variable(random.normal(size=(4, 5)).astype("float32"))

        @tf.function(input_signature=[tf.TensorSpec([None, 4])])
        def __call__(self, x):
            x = tf.tanh(x @ self.c_low)
            return (x * self.b_middle[0] + self.b_middle[1]) @ self.a_top

    tf.saved_model.save(Bare(), str(folder))
    return folder


def dict_output(folder: Path) -> Path:
    """Images (B, 8, 8, 3) in, a dict out: a feature map (B, 6, 6, 4) and its mean (B, 4)."""
    import tensorflow as tf

    class TwoOutputs(tf.Module):
        def __init__(self):
            super().__init__()
            values = np.random.default_rng(5).normal(size=(3, 3, 3, 4)).astype("float32")
            self.kernel = tf.Variable(values, name="conv/kernel")

        @tf.function(input_signature=[tf.TensorSpec([None, 8, 8, 3])])
        def __call__(self, images):
            features = tf.nn.conv2d(images, self.kernel, 1, "VALID")
            return {"map": features, "default": tf.reduce_mean(features, [1, 2])}

    tf.saved_model.save(TwoOutputs(), str(folder))
    return folder


def feature_map(folder: Path) -> Path:
    """Images (B, 6, 6, 3) in, a feature map (B, 4, 4, 4) out."""
    import tensorflow as tf

    class FeatureMap(tf.Module):
        def __init__(self):
            super().__init__()
            values = np.random.default_rng(6).normal(size=(3, 3, 3, 4)).astype("float32")
            self.kernel = tf.Variable(values / 255, name="conv/kernel")

        @tf.function(input_signature=[tf.TensorSpec([None, 6, 6, 3])])
        def __call__(self, images):
            return tf.nn.conv2d(images, self.kernel, 1, "VALID")

    tf.saved_model.save(FeatureMap(), str(folder))
    return folder


def dict_input(folder: Path) -> Path:
    """A dict of numbers (B, 2) and strings (B,) in, (B, 2) out."""
    import tensorflow as tf

    class TwoInputs(tf.Module):
        def __init__(self):
            super().__init__()
            self.kernel = tf.Variable([[1.0, 2.0], [3.0, 4.0]], name="kernel")

        @tf.function(
            input_signature=[
                {"numbers": tf.TensorSpec([None, 2]), "words": tf.TensorSpec([None], tf.string)}
            ]
        )
        def __call__(self, inputs):
            lengths = tf.cast(tf.strings.length(inputs["words"]), tf.float32)
            return inputs["numbers"] @ self.kernel + lengths[:, None]

    tf.saved_model.save(TwoInputs(), str(folder))
    return folder


def list_input(folder: Path) -> Path:
    """A list of (B, 2) and (B, 3) in, (B, 2) out."""
    import tensorflow as tf

    class ListOfInputs(tf.Module):
        def __init__(self):
            super().__init__()
            self.kernel = tf.Variable(tf.reshape(tf.range(6.0), (3, 2)), name="kernel")

        @tf.function(input_signature=[[tf.TensorSpec([None, 2]), tf.TensorSpec([None, 3])]])
        def __call__(self, inputs):
            return inputs[0] + inputs[1] @ self.kernel

    tf.saved_model.save(ListOfInputs(), str(folder))
    return folder


def ragged(folder: Path) -> Path:
    """Ragged numbers of words (B, None) in, their mean embedding (B, 2) out."""
    import tensorflow as tf

    class Ragged(tf.Module):
        def __init__(self):
            super().__init__()
            self.embeddings = tf.Variable(tf.reshape(tf.range(12.0), (6, 2)), name="embeddings")

        @tf.function(input_signature=[tf.RaggedTensorSpec([None, None], tf.int64, 1)])
        def __call__(self, words):
            return tf.reduce_mean(tf.nn.embedding_lookup(self.embeddings, words), axis=1)

    tf.saved_model.save(Ragged(), str(folder))
    return folder


def shapeless(folder: Path) -> Path:
    """(B, 3) in, twice that out, without a word on its shape."""
    import tensorflow as tf

    class Shapeless(tf.Module):
        def __init__(self):
            super().__init__()
            self.rank = tf.Variable(2, trainable=False)
            self.scale = tf.Variable(2.0, name="scale")

        @tf.function(input_signature=[tf.TensorSpec([None, 3])])
        def __call__(self, x):
            return tf.reshape(x * self.scale, tf.shape(x)[: self.rank])

    tf.saved_model.save(Shapeless(), str(folder))
    return folder


def counting(folder: Path) -> Path:
    """(B, 3) in, twice that out; nothing trains, and a variable counts the calls."""
    import tensorflow as tf

    class Counting(tf.Module):
        def __init__(self):
            super().__init__()
            self.calls = tf.Variable(0, name="calls", trainable=False)

        @tf.function(input_signature=[tf.TensorSpec([None, 3])])
        def __call__(self, x):
            self.calls.assign_add(1)
            return 2 * x

    tf.saved_model.save(Counting(), str(folder))
    return folder


def resizable(folder: Path) -> Path:
    """(B, 2) in, that and a row more out, from a variable that may get more rows."""
    import tensorflow as tf

    class Resizable(tf.Module):
        def __init__(self):
            super().__init__()
            self.rows = tf.Variable([[1.0, 2.0]], shape=[None, 2], name="rows")

        @tf.function(input_signature=[tf.TensorSpec([None, 2])])
        def __call__(self, x):
            return tf.concat([x, self.rows], axis=0)

    tf.saved_model.save(Resizable(), str(folder))
    return folder


# --- What cannot be called, or not trained -----------------------------------------------------


def signatures(folder: Path) -> Path:
    """Two signatures and nothing else: "serving_default", x (B, 3) in, and "pair", left and right
    in; "sum" and "product" out."""
    import tensorflow as tf

    module = tf.Module()
    module.kernel = kernel = tf.Variable([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], name="kernel")

    @tf.function(input_signature=[tf.TensorSpec([None, 3], name="x")])
    def serving_default(x):
        return {"sum": tf.reduce_sum(x, 1, keepdims=True), "product": x @ kernel}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, 3], name="left"),
            tf.TensorSpec([None, 3], name="right"),
        ]
    )
    def pair(left, right):
        return {"sum": left + right, "product": left * right @ kernel}

    tf.saved_model.save(
        module, str(folder), signatures={"serving_default": serving_default, "pair": pair}
    )
    return folder


def exported(folder: Path) -> Path:
    """What `model.export()` of Keras 3 writes: (B, 4) in, (B, 2) out."""
    import keras

    inputs = keras.Input((4,))
    x = keras.layers.BatchNormalization(name="bn")(keras.layers.Dense(3, name="low")(inputs))
    keras.Model(inputs, keras.layers.Dense(2, name="high")(x)).export(folder, verbose=False)
    return folder


def tf1(folder: Path) -> Path:
    """The mark of TensorFlow 1's format, beside a graph that nobody reads."""
    folder.mkdir()
    (folder / "saved_model.pb").write_bytes(b"")
    (folder / "tfhub_module.pb").write_bytes(b"\x08\x03")
    return folder
