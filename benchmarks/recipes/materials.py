"""What the recipes are made of: data and weights from the network, or small ones of the same form.

A recipe is a function of `given`, one of the two classes below, and of the folder that it writes to;
`run` is its command line.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from PIL import Image

from benchmarks import machine

Recipe = Callable[["Materials", Path], Any]


class Materials:
    """What a recipe asks for, as a user with a network gets it."""

    smoke = False
    weights: str | None = "imagenet"
    mixed_precision = "mixed_float16"

    def epochs(self, number: int) -> int:
        """As many as the recipe says."""
        return number

    def pixels(self, number: int) -> int:
        """Image size, as the recipe says."""
        return number

    def flowers(self) -> Path:
        """3,670 photos in five folders, one a kind."""
        origin = "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz"
        return _fetched("flower_photos", origin) / "flower_photos"

    def cats_dogs(self) -> Path:
        """3,000 photos: train/ and validation/ with cats/ and dogs/."""
        origin = "https://storage.googleapis.com/mledu-datasets/cats_and_dogs_filtered.zip"
        return _fetched("cats_and_dogs", origin) / "cats_and_dogs_filtered"

    def fruits(self) -> Path:
        """Fruits-360: Training/ and Test/ with a folder a kind, 100 x 100 pixels."""
        origin = "https://github.com/fruits-360/fruits-360-100x100/archive/refs/heads/main.zip"
        return next(_fetched("fruits_360", origin).rglob("Training")).parent

    def food101(self) -> tuple[Any, Any, Sequence[str]]:
        """75,750 and 25,250 photos of any size as `tf.data` of `(image, label)`, and class names."""
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ImportError(
                "food101 needs tensorflow-datasets: pip install keras-xfer[datasets]"
            ) from error

        (train, test), info = tfds.load(
            "food101", split=["train", "validation"], as_supervised=True, with_info=True
        )
        return train, test, info.features["label"].names

    def reviews(self) -> Path:
        """50,000 film reviews: train/ and test/ with neg/ and pos/."""
        folder = _fetched(
            "reviews", "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
        )
        shutil.rmtree(folder / "aclImdb" / "train" / "unsup", ignore_errors=True)  # has no labels
        return folder / "aclImdb"

    def fashion_mnist(self) -> Any:
        """`(x, y), (x, y)`: 60,000 and 10,000 grey images of 28 x 28, in [0, 255]."""
        return keras.datasets.fashion_mnist.load_data()

    def image_module(self) -> str:
        """The handle of a ResNet that gives vectors of images of range [0, 1]."""
        return "https://tfhub.dev/google/imagenet/resnet_v2_50/feature_vector/5"

    def text_module(self) -> str:
        """The handle of an embedding of sentences."""
        return "https://tfhub.dev/google/nnlm-en-dim50/2"


class Smoke(Materials):
    """Small data of the same form, made here: coloured handwritten digits, random weights.

    Mostly a split is one batch, so that TensorFlow traces no second shape, which takes longer than
    all steps.

    Args:
        folder: where they are written.
    """

    smoke = True
    weights = None
    mixed_precision = "mixed_bfloat16"  # processors compute float16 in software

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def epochs(self, number: int) -> int:  # the same call
        """Two: the first of a stage compiles, the second is timed."""
        return 2

    def pixels(self, number: int) -> int:
        """A quarter, and no less than every application takes."""
        return max(-(-number // 4), 32)

    def flowers(self) -> Path:
        """Five folders."""
        names = ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
        return self._images("flowers", {"": 8}, names)

    def cats_dogs(self) -> Path:
        """train/ and validation/ with cats/ and dogs/."""
        return self._images("cats_dogs", {"train": 16, "validation": 8}, ["cats", "dogs"])

    def fruits(self) -> Path:
        """Training/ and Test/ with a folder a kind."""
        names = [f"Fruit {number:02}" for number in range(16)]
        return self._images("fruits", {"Training": 5, "Test": 2}, names)

    def food101(self) -> tuple[Any, Any, Sequence[str]]:
        """Images of two sizes as `tf.data` of `(image, label)`."""
        import tensorflow as tf

        def photos(first: int, count: int) -> Any:
            for number in range(first, first + count):
                side = 80 + 20 * (number % 2)
                yield _digit(number % 101, number, side), number % 101

        spec = (tf.TensorSpec((None, None, 3), tf.uint8), tf.TensorSpec((), tf.int64))
        train, test = (
            tf.data.Dataset.from_generator(
                photos, args=(first, count), output_signature=spec
            ).apply(tf.data.experimental.assert_cardinality(count))
            for first, count in ((0, 32), (101, 32))
        )
        return train, test, [f"dish_{number}" for number in range(101)]

    def reviews(self) -> Path:
        """train/ and test/ with neg/ and pos/."""
        for split in ("train", "test"):
            for label, word in (("neg", "dull"), ("pos", "fine")):
                folder = self.folder / "reviews" / split / label
                folder.mkdir(parents=True, exist_ok=True)
                for number in range(40):
                    (folder / f"{number}.txt").write_text(f"a {word} film one", "utf-8")
        return self.folder / "reviews"

    def fashion_mnist(self) -> Any:
        """`(x, y), (x, y)` of 28 x 28."""
        labels = np.arange(64) % 10
        grey = [_digit(int(label), i, 28).mean(-1) for i, label in enumerate(labels)]
        images = np.stack(grey).astype("uint8")
        return (images[:32], labels[:32]), (images[32:], labels[32:])

    def image_module(self) -> str:
        """A SavedModel as `export` writes it."""
        size = self.pixels(224)
        layers = keras.layers
        model = keras.Sequential(
            [keras.Input((size, size, 3)), layers.Conv2D(16, 5, 4), layers.GlobalMaxPooling2D()]
        )
        model.export(self.folder / "image_module", verbose=False)
        return str(self.folder / "image_module")

    def text_module(self) -> str:
        """The mean of a vector a word."""
        import tensorflow as tf

        class Embedding(tf.Module):
            def __init__(self) -> None:
                super().__init__()
                words = tf.constant(["a", "fine", "dull", "film", "one"])
                numbers = tf.lookup.KeyValueTensorInitializer(words, tf.range(5, dtype=tf.int64))
                self.table = tf.lookup.StaticVocabularyTable(numbers, num_oov_buckets=1)
                vectors = np.random.default_rng(0).normal(size=(6, 8)).astype("float32")
                self.embeddings = tf.Variable(vectors, name="embeddings")

            @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
            def __call__(self, sentences: Any) -> Any:
                words = tf.strings.split(sentences)
                vectors = tf.nn.embedding_lookup(self.embeddings, self.table.lookup(words.values))
                return tf.math.segment_mean(vectors, words.value_rowids())

        tf.saved_model.save(Embedding(), str(self.folder / "text_module"))
        return str(self.folder / "text_module")

    def _images(self, name: str, splits: dict[str, int], classes: Sequence[str]) -> Path:
        for split, count in splits.items():
            for kind, label in enumerate(classes):
                folder = self.folder / name / split / label
                folder.mkdir(parents=True, exist_ok=True)
                for number in range(count):
                    image = _digit(kind, number + 1000 * len(split), 100)
                    Image.fromarray(image).save(folder / f"{number}.png")
        return self.folder / name


def _digit(kind: int, number: int, side: int) -> np.ndarray:
    """A handwritten digit, uint8 `(side, side, 3)`: the tenth kind and those after it in colour."""
    from sklearn.datasets import load_digits

    global _DIGITS
    if _DIGITS is None:
        bunch = load_digits()
        _DIGITS = [bunch.images[bunch.target == digit] for digit in range(10)]
    own = _DIGITS[kind % 10]
    paper = Image.fromarray((255 - own[number % len(own)] * 255 / 16).round().astype("uint8"))
    grey = np.asarray(paper.resize((side, side), Image.Resampling.BICUBIC), "float32")
    colour = np.random.default_rng(kind // 10).uniform(0.2, 1, 3) if kind > 9 else np.ones(3)
    return (grey[..., None] * colour).astype("uint8")


_DIGITS: list[np.ndarray] | None = None


def _fetched(name: str, origin: str) -> Path:
    return Path(keras.utils.get_file(name, origin=origin, extract=True))


def run(recipe: Recipe, arguments: Sequence[str] | None = None) -> Any:
    """The command line of a recipe.

    Args:
        recipe: a function `main(given, output)` of a module of this package; what it returns, an
            `EpochTiming`, is printed by stage and written to `timing.json`.
        arguments: in place of those of the process.
    """
    name = Path(sys.modules[recipe.__module__].__file__ or "").stem
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.recipes.{name}")
    parser.add_argument("--smoke", action="store_true", help="on small data that it makes itself")
    parser.add_argument("--output", default=f"runs/recipes/{name}", help="a folder")
    options = parser.parse_args(arguments)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    keras.utils.disable_interactive_logging()  # a line an epoch
    keras.utils.set_random_seed(0)
    policy = keras.config.dtype_policy()
    try:
        with tempfile.TemporaryDirectory() as folder:
            timing = recipe(Smoke(Path(folder)) if options.smoke else Materials(), output)
    except Exception as error:
        if options.smoke or not _is_of_network(error):
            raise
        why = " ".join(str(error).split())
        sys.exit(f"{name}: its data or weights cannot be had: {why} (--smoke needs no network)")
    finally:
        keras.config.set_dtype_policy(policy)
    print(timing.by_stage().to_string())
    machine.write(str(output / "timing.json"), timing.rows)
    return timing


def _is_of_network(error: Exception) -> bool:
    """`get_file` raises a bare Exception; handles and tensorflow-datasets, OSError and its like."""
    return "URL fetch failure" in str(error) or isinstance(error, OSError | ImportError)
