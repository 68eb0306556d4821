from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from halfstep.keras import Policy, PolicyMap, policy_scope, set_global_policy

X, Y = np.ones((2, 4), "float32"), np.ones((2, 1), "float32")


def functional():
    inputs = keras.Input((4,))
    body = layers.Dense(3, name="body")(inputs)
    logits = layers.Dense(2, name="logits")(body)
    return keras.Model(inputs, layers.Softmax(name="end", dtype="float32")(logits), name="net")


def sequential():
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, name="body"),
            layers.Dense(2, name="logits"),
            layers.Softmax(name="end", dtype="float32"),
        ],
        name="net",
    )


@keras.saving.register_keras_serializable("tests")
class Own(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.dense = layers.Dense(1, name="body", dtype=self.dtype_policy)

    def call(self, x):
        return self.dense(x)


MODELS = [functional, sequential]
POLICIES = [
    Policy("mixed_float16", 64),
    Policy("mixed_bfloat16"),
    keras.DTypePolicy("mixed_float16"),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{type(policy).__qualname__}")
@pytest.mark.parametrize("make", MODELS)
def test_a_loaded_model_and_its_layers_have_the_policies_they_were_saved_with(
    make, policy, tmp_path
):
    keras.config.set_dtype_policy(policy)
    model = make()
    model.save(tmp_path / "net.keras")
    set_global_policy("float32")
    loaded = keras.models.load_model(tmp_path / "net.keras")
    assert loaded.dtype_policy == model.dtype_policy == policy
    found = {layer.name: layer.dtype_policy for layer in loaded.layers}
    assert found["body"] == found["logits"] == policy
    assert type(found["body"]) is type(policy)
    assert found["end"].name == "float32"
    assert np.array_equal(model.predict(X, verbose=0), loaded.predict(X, verbose=0))


def test_loading_under_another_global_policy_gives_no_layer_that_one(tmp_path):
    model = functional()
    model.save(tmp_path / "net.keras")
    set_global_policy("mixed_float16")
    loaded = keras.models.load_model(tmp_path / "net.keras")
    assert loaded.dtype_policy.name == "float32"
    assert {layer.compute_dtype for layer in loaded.layers[1:]} == {"float32"}


def test_a_model_of_ones_own_keeps_its_policy(tmp_path):
    with policy_scope(Policy("mixed_float16", 64)):
        model = Own(name="own")
    model(X)
    model.save(tmp_path / "own.keras")
    loaded = keras.models.load_model(tmp_path / "own.keras")
    assert loaded.dtype_policy == loaded.dense.dtype_policy == Policy("mixed_float16", 64)


def test_cloned_models_keep_their_policies_too():
    with policy_scope(Policy("mixed_float16", 64)):
        model = functional()
    clone = keras.models.clone_model(model)
    assert [layer.dtype_policy for layer in clone.layers[1:]] == [
        layer.dtype_policy for layer in model.layers[1:]
    ]


def test_a_map_survives_for_the_layers_inside_of_a_layer(tmp_path):
    with policy_scope(PolicyMap("mixed_float16", {"mha/query": "float32"})):
        inputs = keras.Input((2, 4))
        outputs = layers.MultiHeadAttention(1, 2, name="mha")(inputs, inputs)
    model = keras.Model(inputs, outputs)
    model.save(tmp_path / "net.keras")
    loaded = keras.models.load_model(tmp_path / "net.keras")
    found = {layer.name: layer.compute_dtype for layer in loaded._flatten_layers()}
    assert (found["query"], found["key"]) == ("float32", "float16")


OPENING = """
import sys
sys.modules["halfstep"] = None  # as if it were not installed
import keras

def load():
    for file in {files!r}:
        try:
            model = keras.models.load_model(file)
        except Exception as error:
            print(type(error).__name__, repr(str(error)[-60:]))
        else:
            print(model.layers[0].dtype_policy)

load()
del sys.modules["halfstep"]  # installed, but nobody has imported it
load()
keras.config.set_dtype_policy("mixed_bfloat16")
import halfstep.keras
load()
print(halfstep.keras.global_policy().name, keras.layers.Dense(1).compute_dtype)
"""


def test_in_another_process_a_file_opens_or_says_what_to_import(tmp_path, run_python):
    files = [str(tmp_path / f"{name}.keras") for name in ("policy", "map")]
    policies = [Policy("mixed_float16", 64), PolicyMap("mixed_bfloat16", {"net/end": "float16"})]
    for file, policy in zip(files, policies, strict=True):
        with policy_scope(policy):
            # a layer that is not built still has its map
            model = keras.Sequential([layers.Dense(3, name="body")], name="net")
        with pytest.warns(UserWarning, match="not yet been built"):
            model.save(file)
    said = run_python(OPENING.format(files=files)).splitlines()
    for line in said[:4]:
        assert line.startswith("TypeError")
        assert "got an unexpected keyword argument 'import halfstep.keras'" in eval(line[10:])
    assert said[4:] == [
        '<Policy "mixed_float16", loss_scale=FixedLossScale(64.0)>',
        "PolicyMap('mixed_bfloat16', {'net/end': 'float16'})",
        # what Keras was told before the import holds
        "mixed_bfloat16 bfloat16",
    ]
