"""The Keras mixed precision guide on the JAX backend: the same words, JAX's gradients.

A step under ``jit`` is a pure function: variables go in and come out, and the optimizer's own,
the loss scale among them, go with them.

Run it: ``python examples/keras_guide_jax.py``
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
from keras import layers
from sklearn.datasets import load_digits

from halfstep.keras import experimental as mixed_precision

# -- the policy: every layer built from here on computes in float16, with float32 variables
policy = mixed_precision.Policy("mixed_float16")
mixed_precision.set_policy(policy)
print(f"Compute dtype: {policy.compute_dtype}")
print(f"Variable dtype: {policy.variable_dtype}")

# -- the model
inputs = keras.Input(shape=(64,), name="digits")
dense1 = layers.Dense(64, activation="relu", name="dense_1")
x = dense1(inputs)
x = layers.Dense(64, activation="relu", name="dense_2")(x)
print(f"x.dtype: {x.dtype}")
print(f"dense1.kernel.dtype: {dense1.kernel.dtype}")

# the last softmax computes in float32, whatever comes before it
x = layers.Dense(10, name="dense_logits")(x)
outputs = layers.Activation("softmax", dtype="float32", name="predictions")(x)
print(f"Outputs dtype: {outputs.dtype}")
model = keras.Model(inputs=inputs, outputs=outputs)

digits = load_digits()
images, labels = (digits.data / 16).astype("float32"), digits.target
x_train, y_train, x_test, y_test = images[:1500], labels[:1500], images[1500:], labels[1500:]
initial_weights = model.get_weights()

# -- fit scales the loss by itself
model.compile(
    loss="sparse_categorical_crossentropy",
    optimizer=keras.optimizers.RMSprop(),
    metrics=["accuracy"],
)
model.fit(x_train, y_train, batch_size=250, epochs=5, verbose=0)
test_loss, fit_accuracy = model.evaluate(x_test, y_test, verbose=0)
print(f"Test accuracy after fit: {fit_accuracy:.3f}")

# -- the loss scale belongs to the policy, and shows what it is now
print(f"Loss scale: {policy.loss_scale}")
new_policy = mixed_precision.Policy("mixed_float16", loss_scale=1024)
print(new_policy)

# -- a loop of one's own
optimizer = keras.optimizers.RMSprop()
optimizer = mixed_precision.LossScaleOptimizer(optimizer, loss_scale="dynamic")
optimizer.build(model.trainable_variables)
loss_object = keras.losses.SparseCategoricalCrossentropy()


@jax.jit
def train_step(trainable, fixed, state, x, y):
    def scaled_loss(trainable):
        predictions, _ = model.stateless_call(trainable, fixed, x, training=True)
        loss = loss_object(y, predictions)
        # the scale of this step is in the state that came in
        with keras.StatelessScope(zip(optimizer.variables, state, strict=True)):
            return optimizer.get_scaled_loss(loss), loss

    scaled_gradients, loss = jax.grad(scaled_loss, has_aux=True)(trainable)
    # this unscales, skips what is not finite, and moves the scale
    trainable, state = optimizer.stateless_apply(state, scaled_gradients, trainable)
    return trainable, state, loss


model.set_weights(initial_weights)
trainable = [variable.value for variable in model.trainable_variables]
fixed = [variable.value for variable in model.non_trainable_variables]
state = [variable.value for variable in optimizer.variables]
for _epoch in range(5):
    for first in range(0, len(x_train), 250):
        batch = x_train[first : first + 250], y_train[first : first + 250]
        trainable, state, loss = train_step(trainable, fixed, state, *batch)
for variable, value in zip(model.trainable_variables, trainable, strict=True):
    variable.assign(value)
for variable, value in zip(optimizer.variables, state, strict=True):
    variable.assign(value)
predictions = keras.ops.convert_to_numpy(model(x_test, training=False)).argmax(-1)
loop_accuracy = float((predictions == y_test).mean())
print(f"Test accuracy after the loop: {loop_accuracy:.3f}")
