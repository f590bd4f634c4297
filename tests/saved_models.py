"""SavedModels that tests make for themselves."""

from pathlib import Path

import numpy as np


def text(folder: Path) -> Path:
    """A text embedding of three dimensions with a vocabulary table: strings in, (B, 3) out."""
    import tensorflow as tf

    class Embedding(tf.Module):
        def __init__(self):
            super().__init__()
            words = tf.constant(["a", "fine", "dull", "film", "one"])
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
