"""HubModule called: the answers of tensorflow_hub.KerasLayer, and the shapes before any call."""

import re

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("SavedModels are TensorFlow's", allow_module_level=True)

import tensorflow as tf  # not where the backend is another

from keras_xfer import HubModule
from tests.layers.hub import assert_same, inputs_of, kerashub, numbers, weights

KINDS = [
    "text",
    "tower",
    "reusable",
    "bare",
    "dict_output",
    "dict_input",
    "list_input",
    "ragged",
    "shapeless",
    "counting",
]


def oracle(folder, inputs, **kwargs):
    """What tensorflow_hub's own layer answers."""
    return kerashub().KerasLayer(str(folder), **kwargs)(inputs)


def symbolic_like(inputs):
    if isinstance(inputs, dict):
        return {key: symbolic(each, name=key) for key, each in inputs.items()}
    return keras.tree.map_structure(symbolic, inputs)


def symbolic(array, name=None):
    return keras.Input(array.shape[1:], dtype=tf.as_dtype(array.dtype).name, name=name)


# --- the same answers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_it_answers_as_tensorflow_hub_does(saved, name):
    inputs = inputs_of(name)
    expected = oracle(saved(name), inputs)
    assert_same(HubModule(saved(name))(inputs), expected)


@pytest.mark.parametrize("name", [each for each in KINDS if each not in ("ragged", "shapeless")])
def test_it_answers_so_in_a_functional_model(saved, name):
    inputs = inputs_of(name)
    symbolic = symbolic_like(inputs)
    layer = HubModule(saved(name))
    model = keras.Model(symbolic, layer(symbolic))
    expected = oracle(saved(name), inputs)
    shapes = keras.tree.map_structure(lambda each: (None, *each.shape[1:]), expected)
    assert keras.tree.map_structure(lambda each: each.shape, model.output) == shapes
    model.summary(print_fn=lambda *_, **__: None)
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    batches = tf.data.Dataset.from_tensor_slices((inputs,)).batch(2)
    assert_same(model.predict(batches, verbose=0), expected, rtol=1e-5, atol=1e-6)
    assert model.count_params() == sum(each.size for each in weights(layer).values())


def test_every_form_of_handle_is_the_same_module(saved):
    folder, x = saved("reusable"), inputs_of("reusable")
    loaded = tf.saved_model.load(str(folder))
    expected = loaded(x, training=False)
    for handle in (str(folder), folder, folder.as_uri(), loaded):
        assert_same(HubModule(handle)(x), expected)


def test_a_function_is_a_module():
    layer = HubModule(lambda x: 3 * x)
    assert_same(layer(numbers(2, 3)), 3 * numbers(2, 3), rtol=1e-6)
    assert layer.weights == []
    nest = {"a": numbers(2), "b": numbers(2, seed=1)}
    assert_same(HubModule(lambda x: x["a"] - x["b"])(nest), nest["a"] - nest["b"])


@pytest.mark.parametrize("handle", [3, None, keras.layers.Identity()])
def test_what_is_no_handle_is_refused(handle):
    with pytest.raises(TypeError, match="Expected handle to be a path.*Received: handle="):
        HubModule(handle)


def test_arguments_reach_the_call(saved):
    x = inputs_of("reusable")
    expected = oracle(saved("reusable"), x, arguments={"times": 2})
    mine = HubModule(saved("reusable"), arguments={"times": 2})(x)
    assert_same(mine, expected)
    assert not np.allclose(mine, HubModule(saved("reusable"))(x))


def test_one_output_is_chosen(saved):
    x = inputs_of("dict_output")
    for key in ("default", "map"):
        mine = HubModule(saved("dict_output"), output_key=key)(x)
        assert_same(mine, oracle(saved("dict_output"), x, output_key=key))
    with pytest.raises(ValueError, match=re.escape("one of ['default', 'map']")):
        HubModule(saved("dict_output"), output_key="top")(x)
    with pytest.raises(ValueError, match="output_key='default'"):
        HubModule(saved("bare"), output_key="default")(inputs_of("bare"))


@pytest.mark.parametrize("how", [{"output_key": "product"}, {"signature_outputs_as_dict": True}])
def test_a_signature_is_called(saved, how):
    x = inputs_of("signatures")
    kwargs = {"signature": "serving_default", **how}
    expected = oracle(saved("signatures"), x, **kwargs)
    layer = HubModule(saved("signatures"), **kwargs)
    assert_same(layer(x), expected)
    assert_same(layer({"x": x}), expected)
    inputs = keras.Input((3,))
    assert_same(keras.Model(inputs, layer(inputs)).predict(x, verbose=0), expected)


@pytest.mark.parametrize("how", [{"output_key": "product"}, {"signature_outputs_as_dict": True}])
def test_a_signature_of_several_inputs_is_called_by_their_names(saved, how):
    nest = {"left": numbers(4, 3), "right": numbers(4, 3, seed=1)}
    kwargs = {"signature": "pair", **how}
    expected = oracle(saved("signatures"), nest, **kwargs)
    layer = HubModule(saved("signatures"), **kwargs)
    assert_same(layer(nest), expected)
    symbolic = {key: keras.Input((3,), name=key) for key in nest}
    assert_same(keras.Model(symbolic, layer(symbolic)).predict(nest, verbose=0), expected)


def test_what_keras_exports_is_called(saved):
    x = inputs_of("exported")
    loaded = tf.saved_model.load(str(saved("exported")))
    expected = loaded.serve(x)
    assert_same(HubModule(saved("exported"))(x), expected)
    kwargs = {"signature": "serving_default", "output_key": "output_0"}
    assert_same(HubModule(saved("exported"), **kwargs)(x), expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, re.escape("one of ['pair', 'serving_default']")),
        ({"signature": "none", "output_key": "sum"}, re.escape("['pair', 'serving_default']")),
        ({"signature": "pair"}, "either output_key or signature_outputs_as_dict"),
        (
            {"signature": "pair", "output_key": "sum", "signature_outputs_as_dict": True},
            "either output_key or signature_outputs_as_dict",
        ),
        ({"signature_outputs_as_dict": True}, "together with a signature"),
        ({"batch_norm": "affine"}, "batch_norm='affine'"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(saved, kwargs, message):
    with pytest.raises(ValueError, match=message):
        HubModule(saved("signatures"), **kwargs)


def test_a_signature_has_no_other_outputs(saved):
    layer = HubModule(saved("signatures"), signature="pair", output_key="mean")
    nest = {"left": numbers(4, 3), "right": numbers(4, 3)}
    with pytest.raises(ValueError, match=re.escape("['product', 'sum']")):
        layer(nest)


def test_the_format_of_tensorflow_1_is_refused(saved):
    with pytest.raises(ValueError, match="TF1 Hub format.*later version"):
        HubModule(saved("tf1"))


def test_how_to_load_can_be_said(saved):
    x = inputs_of("bare")
    options = tf.saved_model.LoadOptions(experimental_io_device="/job:localhost")
    layer = HubModule(saved("bare"), tags={"serve"}, load_options=options)
    assert_same(layer(x), oracle(saved("bare"), x))
    assert layer.get_config()["tags"] == ["serve"]
    with pytest.raises(ValueError, match="other"):
        HubModule(saved("bare"), tags={"other"})


@pytest.mark.parametrize(
    "kwargs", [{"tags": {"serve"}}, {"sha256": 64 * "0"}, {"load_options": object()}]
)
def test_how_to_load_is_for_what_is_yet_to_be_loaded(kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))}.*handle"):
        HubModule(lambda x: x, **kwargs)


def test_a_folder_has_no_hash(saved):
    with pytest.raises(ValueError, match="sha256"):
        HubModule(saved("bare"), sha256=64 * "0")


def test_a_variable_of_no_fixed_shape_is_refused(saved):
    with pytest.raises(ValueError, match=r"variables of fixed shape.*resizable"):
        HubModule(saved("resizable"))


def test_a_damaged_savedmodel_says_so(saved, tmp_path):
    (tmp_path / "saved_model.pb").write_bytes((saved("bare") / "saved_model.pb").read_bytes())
    with pytest.raises(OSError, match=rf"{re.escape(str(tmp_path))}[\s\S]*damaged or incomplete"):
        HubModule(tmp_path)


# --- what it is called on --------------------------------------------------------------------


def test_strings_come_as_lists_arrays_and_tensors(saved):
    sentences = ["a fine film", "dull"]
    layer = HubModule(saved("text"), dtype=tf.string)  # as the tutorials write it
    expected = oracle(saved("text"), tf.constant(sentences))
    for inputs in (
        sentences,
        tuple(sentences),
        np.array(sentences),
        np.array(sentences, dtype=object),
        [each.encode() for each in sentences],
        tf.constant(sentences),
    ):
        assert_same(layer(inputs), expected)
    assert layer(sentences).dtype == tf.float32


def test_a_model_predicts_strings(saved):
    sentences = np.array(["a fine film", "dull", "one"], dtype=object)
    model = keras.Sequential([keras.Input((), dtype="string"), HubModule(saved("text"))])
    expected = oracle(saved("text"), tf.constant(sentences))
    data = tf.data.Dataset.from_tensor_slices(sentences).batch(2)
    assert_same(model.predict(data, verbose=0), expected)
    assert_same(model.predict(tf.constant(sentences), verbose=0), expected)


def test_numbers_come_as_lists(saved):
    x = inputs_of("bare")
    assert_same(HubModule(saved("bare"))(x.tolist()), oracle(saved("bare"), x), rtol=1e-6)
    nest = [each.tolist() for each in inputs_of("list_input")]
    expected = oracle(saved("list_input"), inputs_of("list_input"))
    assert_same(HubModule(saved("list_input"))(nest), expected, rtol=1e-6)
    nest = {"numbers": [[1.0, 2.0]], "words": ["fine"]}
    assert_same(HubModule(saved("dict_input"))(nest), np.array([[11.0, 14.0]]))


@pytest.mark.parametrize(("dtype", "atol"), [("float64", 1e-6), ("float16", 3e-3)])
def test_floats_are_cast_to_what_it_takes(saved, dtype, atol):
    x = inputs_of("bare")
    output = HubModule(saved("bare"))(x.astype(dtype))
    assert output.dtype == tf.float32
    assert_same(output, oracle(saved("bare"), x), atol=atol)


@pytest.mark.parametrize(
    "inputs",
    [
        np.zeros((4, 5), "float32"),
        np.zeros((4, 4), "uint8"),
        np.zeros((4, 4), "int64"),
        np.zeros(4, "float32"),
        np.zeros((4, 4, 1), "float32"),
    ],
)
def test_other_inputs_are_refused(saved, inputs):
    received = re.escape(f"{inputs.dtype}{inputs.shape}")
    layer = HubModule(saved("bare"))
    with pytest.raises(ValueError, match=rf"float32\(None, 4\).*Received: inputs={received}"):
        layer(inputs)
    symbolic = keras.Input(inputs.shape[1:], dtype=inputs.dtype.name)
    with pytest.raises(ValueError, match=rf"float32\(None, 4\).*Received: inputs={inputs.dtype}"):
        layer(symbolic)


def test_a_nest_of_other_keys_is_refused(saved):
    layer = HubModule(saved("dict_input"))
    with pytest.raises((ValueError, TypeError), match="words"):
        layer({"numbers": numbers(4, 2), "letters": tf.constant(["a"] * 4)})


# --- what is known before it is called -------------------------------------------------------


def test_shapes_are_known_without_a_run(saved):
    layer = HubModule(saved("counting"))
    spec = layer.compute_output_spec(keras.KerasTensor((None, 3)))
    assert (spec.shape, spec.dtype) == ((None, 3), "float32")
    assert layer.compute_output_shape((5, 3)) == (5, 3)
    model = keras.Sequential([keras.Input((3,)), layer])
    assert layer.get_weights() == [0]
    model(numbers(2, 3))
    assert layer.get_weights() == [1]


def test_shapes_of_nests(saved):
    assert HubModule(saved("dict_output")).compute_output_shape((2, 8, 8, 3)) == {
        "default": (2, 4),
        "map": (2, 6, 6, 4),
    }
    shapes = {"numbers": (None, 2), "words": (None,)}
    assert HubModule(saved("dict_input")).compute_output_shape(shapes) == (None, 2)
    assert HubModule(saved("list_input")).compute_output_shape([(7, 2), (7, 3)]) == (7, 2)
    assert HubModule(saved("text")).compute_output_shape((None,)) == (None, 3)


def test_an_unknown_shape_can_be_told(saved):
    x = inputs_of("shapeless")
    with pytest.raises(ValueError, match="does not.*output_shape="):
        HubModule(saved("shapeless"))(keras.Input((3,)))
    for shape in ((3,), [3], tf.TensorShape([3])):
        layer = HubModule(saved("shapeless"), output_shape=shape)
        model = keras.Sequential([keras.Input((3,)), layer, keras.layers.Flatten()])
        assert model.output_shape == (None, 3)
        assert_same(model.predict(x, verbose=0), 2 * x)
    assert_same(layer(x), oracle(saved("shapeless"), x, output_shape=[3]))
    wrong = HubModule(saved("shapeless"), output_shape=(5,))
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="shape"):
        wrong(x)


def test_shapes_of_a_nest_can_be_told(saved):
    shapes = {"default": (4,), "map": [6, 6, 4]}
    layer = HubModule(saved("dict_output"), output_shape=shapes)
    assert_same(layer(inputs_of("dict_output")), oracle(saved("dict_output"), inputs_of("tower")))
    assert layer.compute_output_shape((None, 8, 8, 3)) == {
        "default": (None, 4),
        "map": (None, 6, 6, 4),
    }


def test_ragged_input(saved):
    inputs = keras.Input((None,), dtype="int64", ragged=True)
    layer = HubModule(saved("ragged"), output_shape=(2,))
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == (None, 2)
    words = inputs_of("ragged")
    assert_same(model(words), oracle(saved("ragged"), words))
    assert_same(model(words)[1], np.array([5.0, 6.0]))  # the mean of (4, 5) and (6, 7)


def test_its_weights_are_those_of_the_savedmodel(saved):
    loaded = tf.saved_model.load(str(saved("tower")))
    layer = HubModule(saved("tower"))
    assert layer.count_params() == sum(int(tf.size(each)) for each in loaded.variables)
    expected = {each.name.removesuffix(":0"): each.numpy() for each in loaded.variables}
    mine = weights(layer)
    assert mine.keys() == expected.keys()
    assert all(np.array_equal(mine[name], expected[name]) for name in mine)

    changed = [each + 0.5 for each in layer.get_weights()]
    layer.set_weights(changed)
    assert_same(layer.get_weights(), changed)
    for variable in loaded.variables:
        variable.assign_add(tf.fill(variable.shape, 0.5))
    x = inputs_of("tower")
    assert_same(layer(x), loaded(x, training=False))


def test_the_size_of_the_images_is_read(saved):
    assert HubModule(saved("tower")).image_size == (8, 8)
    assert HubModule(saved("text")).image_size is None
    assert HubModule(saved("bare")).image_size is None


# --- how it is run ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "dtype"), [("mixed_float16", "float16"), ("mixed_bfloat16", "bfloat16")]
)
def test_mixed_precision(saved, policy, dtype):
    expected = oracle(saved("tower"), inputs_of("tower"))
    keras.config.set_dtype_policy(policy)
    layer = HubModule(saved("tower"), trainable=True)
    output = layer(inputs_of("tower"))
    assert output.dtype == dtype
    assert_same(tf.cast(output, "float32"), expected, atol=0.05)
    assert {each.dtype for each in layer.weights} == {"float32"}
    model = keras.Sequential([keras.Input((8, 8, 3)), layer])
    assert model.outputs[0].dtype == dtype
    model.compile("adam", "mse")
    before = weights(layer)
    history = model.fit(inputs_of("tower"), numbers(4, 4), epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert not np.array_equal(before["top/kernel"], weights(layer)["top/kernel"])


def test_the_dtype_is_of_the_output_alone(saved):
    layer = HubModule(saved("bare"), dtype="float64")
    output = layer(inputs_of("bare"))
    assert output.dtype == tf.float64
    assert {each.dtype for each in layer.weights} == {"float32"}
    assert HubModule(lambda x: tf.cast(x, "int32"), dtype="float16")(numbers(2)).dtype == tf.int32


def test_the_way_a_step_is_run_does_not_show(saved):
    trained = []
    for way in ({}, {"run_eagerly": True}, {"steps_per_execution": 2}):
        layer = HubModule(saved("reusable"), trainable=True, batch_norm="train")
        model = keras.Sequential([keras.Input((4,)), layer])
        model.compile(keras.optimizers.SGD(0.1), "mse", **way)
        model.fit(numbers(8, 4), numbers(8, 3), batch_size=2, shuffle=False, verbose=0)
        trained.append(layer.get_weights())
    assert_same(trained[1], trained[0], atol=1e-6)
    assert_same(trained[2], trained[0], atol=1e-6)
    before = HubModule(saved("reusable")).get_weights()
    assert not any(np.allclose(*pair) for pair in zip(before, trained[0], strict=True))


def test_a_model_with_it_is_not_compiled_by_xla(saved):
    model = keras.Sequential([keras.Input((), dtype="string"), HubModule(saved("text"))])
    model.compile("sgd", "mse")
    assert model.jit_compile is False


# --- what tf_keras and TensorFlow make besides dense tensors -----------------------------------


def test_a_vocabulary_that_was_adapted_is_no_variable(tmp_path):
    import tf_keras

    vocabulary = tf_keras.layers.TextVectorization(output_sequence_length=4)
    vocabulary.adapt(["a fine film"])
    text = tf_keras.Input((1,), dtype="string")
    mean = tf_keras.layers.GlobalAveragePooling1D()
    outputs = mean(tf_keras.layers.Embedding(10, 4)(vocabulary(text)))
    tf_keras.Model(text, outputs).save(tmp_path / "text", save_format="tf")
    x = tf.constant([["a film"], ["fine"]])
    layer = HubModule(tmp_path / "text")
    assert_same(layer(x), tf.saved_model.load(str(tmp_path / "text"))(x))
    assert layer.count_params() == 40


def test_ragged_outputs_go_into_ragged_inputs():
    spec = tf.RaggedTensorSpec([None, None], tf.float32)
    cut = tf.function(
        lambda x: tf.RaggedTensor.from_tensor(x, padding=0.0),
        input_signature=[tf.TensorSpec([None, 3])],
    )
    total = tf.function(lambda x: tf.reduce_sum(x, axis=1), input_signature=[spec])
    inputs = keras.Input((3,))
    between = HubModule(cut)(inputs)
    assert between.ragged
    model = keras.Model(inputs, HubModule(total)(between))
    assert_same(
        model(np.array([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]], "float32")), np.array([3.0, 3.0])
    )


def test_sparse_inputs_stay_sparse():
    spec = tf.SparseTensorSpec([None, 3], tf.float32)
    total = tf.function(lambda x: tf.sparse.reduce_sum(x, axis=1), input_signature=[spec])
    inputs = keras.Input((3,), sparse=True)
    model = keras.Model(inputs, HubModule(total, output_shape=())(inputs))
    assert_same(model(tf.sparse.from_dense([[1.0, 0.0, 2.0]])), np.array([3.0]))


def test_nothing_among_the_outputs_stays_nothing():
    def split(x):
        return {"one": x, "none": None}

    module = HubModule(tf.function(split, input_signature=[tf.TensorSpec([None, 3])]))
    assert module(numbers(2, 3))["none"] is None
    assert module.compute_output_spec(keras.KerasTensor((None, 3)))["none"] is None


def test_channels_first_says_no_image_size():
    def mean(x):
        return tf.reduce_mean(x, axis=(2, 3))

    shape = tf.TensorSpec([None, 3, 16, 16])
    assert HubModule(tf.function(mean, input_signature=[shape])).image_size is None


# --- what Keras 3 does without it: when one of these fails, a workaround may go ------------------


def test_keras_3_still_refuses_the_layer_of_tensorflow_hub(saved):
    """https://github.com/tensorflow/tensorflow/issues/65419, https://github.com/tensorflow/hub/pull/930"""
    layer = kerashub().KerasLayer(str(saved("bare")))
    with pytest.raises(ValueError, match=r"[Oo]nly instances of `?keras\.Layer`?"):
        keras.Sequential([keras.Input((4,)), layer])


def test_kerass_own_layer_still_cannot_be_trained_with_adam(saved):
    """Its variables keep the name that TensorFlow gave them, colon included."""
    layer = keras.layers.TFSMLayer(str(saved("bare")), call_endpoint="__call__")
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(keras.optimizers.Adam(), "mse", jit_compile=False)
    with pytest.raises(ValueError, match="not a valid"):
        model.fit(inputs_of("bare"), np.zeros((4, 3), "float32"), verbose=0)


def test_keras_still_will_not_clone_a_layer_that_runs_code(saved):
    """Why the configuration of a layer that exists is told from one that was read."""
    layer = keras.layers.TFSMLayer(str(saved("bare")), call_endpoint="__call__")
    with pytest.raises(ValueError, match="safe_mode=False"):
        keras.models.clone_model(keras.Sequential([keras.Input((4,)), layer]))


def test_keras_still_calls_a_product_sparse():
    """Why a symbolic tensor is taken for sparse only where the SavedModel takes such."""
    assert (2 * keras.KerasTensor((None, 4))).sparse
