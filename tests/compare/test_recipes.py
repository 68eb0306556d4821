"""What the built-in recipes say about themselves, on a few steps of float32."""

import pytest
import torch

from halfstep.compare import Settings, compare, load_recipe


def first_and_last(name, steps):
    summary = compare(name, "float32", Settings(steps=steps, memory=False))
    [recipe] = summary["recipes"]
    evaluations = recipe["policies"]["float32"]["evaluations"]
    return recipe, [e["metrics"][recipe["metric"]] for e in (evaluations[0], evaluations[-1])]


@pytest.mark.parametrize(("name", "steps"), [("digits-mlp", 60), ("digits-conv", 40)])
def test_digits_are_learnt(name, steps):
    recipe, (before, after) = first_and_last(name, steps)
    assert before < 0.3
    assert after > 0.85
    assert "450 test examples" in recipe["same_rule"]


def test_the_digits_of_test_and_training_are_different_and_all_classes_are_in_both():
    images, test_images, labels, test_labels = load_recipe("digits-mlp").call("split")
    assert (len(images), len(test_images)) == (1347, 450)
    assert set(labels.tolist()) == set(test_labels.tolist()) == set(range(10))
    seen = {image.numpy().tobytes() for image in images}
    assert not any(image.numpy().tobytes() in seen for image in test_images)


def test_the_gpt_learns_from_the_text_of_pydoc():
    recipe, (before, after) = first_and_last("pydoc-gpt", 40)
    assert before == pytest.approx(5.55, abs=0.2)  # ln 256
    assert after < 3.4
    assert recipe["metric"] == "validation loss (nats/byte)"


def test_the_gpt_cannot_see_the_future_nor_the_held_out_text():
    recipe = load_recipe("pydoc-gpt")
    torch.manual_seed(0)
    model = recipe.call("make_model").eval()
    tokens = torch.randint(256, (1, 20))
    changed = tokens.clone()
    changed[0, 10:] = 0
    assert torch.equal(model(tokens)[0, :10], model(changed)[0, :10])
    train, held_out = recipe.call("text")
    assert len(held_out) == pytest.approx(len(train) / 9, rel=0.01)
    assert bytes(train[:22].tolist()) == b'The "assert" statement'


def test_the_blogs_benchmark_is_scaled_down_on_a_cpu_and_says_so():
    recipe, _ = first_and_last("blog-conv", 2)
    assert "Scaled down" in recipe["note"]
    assert "800 of 256x256" in recipe["note"]


def test_the_blogs_benchmark_is_the_blogs_on_a_gpu():
    recipe = load_recipe("blog-conv")
    module = recipe.module
    assert (module.IMAGES, module.SIZE, module.BATCH, module.EPOCHS) == (800, 256, 50, 10)
    with torch.device("meta"):
        model = recipe.call("make_model")
        shape = model(torch.empty(50, 3, 256, 256)).shape
    assert shape == (50, 1)
    convolutions = [layer for layer in model if isinstance(layer, torch.nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size[0]) for c in convolutions] == [
        (128, 2),
        (128, 1),
        (128, 1),
    ]


def test_the_blogs_sigmoid_is_float32():
    sigmoid = load_recipe("blog-conv").module.Probability()
    assert sigmoid(torch.ones(2, dtype=torch.float16)).dtype == torch.float32
