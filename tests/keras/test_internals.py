"""What this door leans on inside of Keras; one test for each, to say which one moved."""

from __future__ import annotations

import importlib
import inspect

import keras
from keras import layers

from halfstep.keras import _internals


def source_of(module):
    return inspect.getsource(importlib.import_module(module))


def test_the_functions_of_the_global_policy_find_their_store_in_their_own_module():
    source = source_of("keras.src.dtype_policies.dtype_policy")
    assert 'global_state.set_global_attribute("dtype_policy", policy)' in source
    assert 'global_state.get_global_attribute("dtype_policy", None)' in source
    assert source.count("global_state.") == 2
    assert type(_internals.seated()).__name__ == "_Store"


def test_nobody_else_reads_the_policy_of_a_thread():
    assert ".dtype_policy" not in source_of("keras.src.backend.common.global_state")


def test_a_loaded_operation_becomes_a_name_unless_it_has_a_map():
    source = source_of("keras.src.ops.operation")
    assert "not isinstance(policy, dtype_policies.DTypePolicyMap)" in source
    # what stands in for that name has to have all that is used of it
    used = {part.split("(")[0].split(")")[0] for part in source.split("dtype_policies.")[1:]}
    assert {name.strip() for name in used} <= {"deserialize", "DTypePolicyMap"}


def test_layers_know_their_paths_and_their_parts():
    inner = layers.Dense(2, name="inner")
    model = keras.Sequential([keras.Input((2,)), inner, layers.Dropout(0.5, name="drop")], name="m")
    assert _internals.paths_of(model)[inner] == "m/inner"
    assert _internals.parts_of(model) == {inner: "m/inner", model.layers[1]: "m/drop"}
    assert _internals.is_functional(keras.Model(inner.input, inner.output))


def test_a_layer_has_its_policy_and_variables_where_they_are_looked_for():
    layer = layers.BatchNormalization(dtype="mixed_float16")
    layer.build((None, 2))
    assert _internals.own_policy(layer) is layer.dtype_policy
    cast = {variable.name: _internals.is_cast(variable) for variable in layer.variables}
    assert cast == {"gamma": False, "beta": False, "moving_mean": False, "moving_variance": False}
    assert [v.name for v in _internals.own_variables(layer)] == [v.name for v in layer.variables]


def test_states_that_keras_does_not_track_are_found():
    layer = layers.LSTM(2, stateful=True)
    layer.build((1, 3, 4))
    assert len(_internals.own_variables(layer)) == 2


def test_the_outputs_of_a_graph_are_known_and_those_of_other_models_not():
    inputs = keras.Input((2,))
    dense = layers.Dense(1, dtype="mixed_float16")
    model = keras.Model(inputs, [dense(inputs), keras.ops.exp(inputs)])
    found = _internals.outputs_of(model)
    assert [dtype for _, dtype in found] == ["float16", "float32"]
    assert found[0][0] is dense

    class Own(keras.Model):
        pass

    assert _internals.outputs_of(Own()) is None
