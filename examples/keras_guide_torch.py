"""The Keras mixed precision guide on the torch backend: the same words, torch's gradients.

Run it: ``python examples/keras_guide_torch.py``
"""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
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
loss_object = keras.losses.SparseCategoricalCrossentropy()
examples = torch.utils.data.TensorDataset(torch.tensor(x_train), torch.tensor(y_train))
train = torch.utils.data.DataLoader(examples, batch_size=250, shuffle=True)


def train_step(x, y):
    predictions = model(x, training=True)
    loss = loss_object(y, predictions)
    scaled_loss = optimizer.get_scaled_loss(loss)
    parameters = [variable.value for variable in model.trainable_variables]
    scaled_gradients = torch.autograd.grad(scaled_loss, parameters)
    gradients = optimizer.get_unscaled_gradients(scaled_gradients)
    with torch.no_grad():
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    return loss


model.set_weights(initial_weights)
for _epoch in range(5):
    for x, y in train:
        train_step(x, y)
predictions = keras.ops.convert_to_numpy(model(x_test, training=False)).argmax(-1)
loop_accuracy = float((predictions == y_test).mean())
print(f"Test accuracy after the loop: {loop_accuracy:.3f}")
