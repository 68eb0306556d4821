import subprocess
import sys

import pytest

from halfstep import RecipeError
from halfstep.compare import Settings, compare, load_recipe, write_template
from halfstep.recipes import BUILT_IN

FUNCTIONS = ("make_model", "make_optimizer", "batches", "loss", "evaluate")


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_recipe_loads_by_its_name(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    _, _, last = name.rpartition("-")
    assert recipe.framework == (last if last in ("jax", "keras") else "torch")
    assert recipe.constant("METRIC") is not None
    assert not recipe.title.endswith(".")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_missing_function_is_named_with_arguments_result_and_file(recipe, name):
    with pytest.raises(RecipeError) as error:
        recipe(f"del {name}")
    said = str(error.value)
    assert f"no function {name}(" in said
    assert "must return" in said
    assert "tiny.py" in said


def test_a_misspelt_function_is_guessed(recipe):
    with pytest.raises(RecipeError, match="Did you mean 'evalute'"):
        recipe("evalute = evaluate; evalute.__name__ = 'evalute'; del evaluate")


@pytest.mark.parametrize(
    ("added", "said"),
    [
        (
            "def make_model(width): return None",
            r"make_model\(width\) must be callable as make_mode",
        ),
        ("def loss(model): return None", r"must be callable as loss\(model, batch\)"),
        ("def setup(): return None", r"must be callable as setup\(seed, device\)"),
        ("evaluate = 3", r"no function evaluate\(model\)"),
    ],
)
def test_a_function_with_other_arguments_is_refused(recipe, added, said):
    with pytest.raises(RecipeError, match=said):
        recipe(added)


def test_more_arguments_with_defaults_are_welcome(recipe):
    recipe("def make_model(width=3, *, depth=1): return nn.Linear(width, 1)")


@pytest.mark.parametrize(
    "line",
    ["STEPS = 0", "STEPS = '9'", "STEPS = True", "EPOCHS = 1.5", "METRIC = 1",
     "HIGHER_IS_BETTER = 'yes'", "SAME_WITHIN = -1", "TITLE = 3"],
)  # fmt: skip
def test_a_constant_of_the_wrong_kind_is_refused(recipe, line):
    with pytest.raises(RecipeError, match=line.split(" =")[0]):
        recipe(line)


def test_another_framework_is_said_to_be_missing(recipe):
    with pytest.raises(RecipeError, match=r"FRAMEWORK = 'jaxx'.*Allowed are 'torch', 'jax'.*Did"):
        recipe("FRAMEWORK = 'jaxx'")


def test_the_functions_are_those_of_the_framework(recipe):
    with pytest.raises(RecipeError, match=r"no function init\(key\), which must return the param"):
        recipe("FRAMEWORK = 'jax'")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1 / 0", r"line \d+: this recipe does not run: ZeroDivisionError"),
        ("import no_such_module", r"line \d+: No module named 'no_such_module'.*Install"),
        ("def (", "SyntaxError"),
    ],
)
def test_a_file_that_does_not_run_is_refused_with_the_line(recipe, line, said):
    with pytest.raises(RecipeError, match=said):
        recipe(line)


def test_a_file_that_is_not_there_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(RecipeError, match="Did you mean 'pydoc-gpt'"):
        load_recipe("pydoc-gtp")
    with pytest.raises(RecipeError, match="nor a Python file"):
        load_recipe(tmp_path / "nothing.py")


def test_a_recipe_may_import_its_neighbour_and_hold_dataclasses(recipe, tmp_path):
    (tmp_path / "neighbour_of_tiny.py").write_text("WIDTH = 5\n")
    made = recipe(
        """
        from dataclasses import dataclass
        from neighbour_of_tiny import WIDTH
        @dataclass
        class Batch:
            x: "torch.Tensor"
        """
    )
    assert made.module.WIDTH == 5
    sys.path.remove(str(tmp_path))


def test_the_title_is_the_first_line_of_the_docstring(tmp_path, recipe):
    assert recipe("TITLE = 'One line'").title == "One line"
    assert recipe(source='"""First line.\n\nMore."""\n' + recipe().file.read_text()).title == (
        "First line"
    )


def test_the_template_runs_as_it_is_and_learns(tmp_path):
    path = write_template(tmp_path / "mine.py")
    summary = compare(str(path), "float32,mixed_bfloat16", Settings(memory=False))
    [recipe] = summary["recipes"]
    assert summary["status"] == "finished"
    for policy in recipe["policies"].values():
        assert policy["final_metric"] > 0.9
    # its accuracy is a share of its test examples
    assert "binomial" in recipe["same_rule"]


def test_a_template_of_another_framework_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="'jaxx'.*Did you mean 'jax'"):
        write_template(tmp_path / "mine.py", "jaxx")


def test_the_template_is_not_written_over_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("precious")
    with pytest.raises(RecipeError, match="exists already"):
        write_template(path)
    assert path.read_text() == "precious"
    with pytest.raises(RecipeError, match="cannot write"):
        write_template(tmp_path / "no" / "folder.py")


def test_the_template_comments_every_function(tmp_path):
    text = write_template(tmp_path / "mine.py").read_text()
    for name in (*FUNCTIONS, "setup"):
        after = text.split(f"def {name}(")[1]
        assert '"""' in after.split("\n", 2)[1]


def test_listing_recipes_imports_no_framework():
    code = (
        "import sys, halfstep.cli.compare, halfstep.compare.trainers, halfstep.recipes; "
        "sys.exit(bool({'torch', 'jax', 'keras', 'tensorflow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
