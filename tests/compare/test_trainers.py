import json
import subprocess
import sys

import pytest

from halfstep.compare.frameworks import FRAMEWORKS
from halfstep.compare.recipe import Recipe
from halfstep.compare.trainers import TRAINERS, trainer_of
from halfstep.errors import RecipeError


def test_every_framework_whose_recipes_can_be_read_has_a_trainer():
    assert list(TRAINERS) == list(FRAMEWORKS)


def test_a_framework_that_nothing_trains_is_refused(recipe):
    odd = recipe()
    odd.module.FRAMEWORK = "troch"
    with pytest.raises(RecipeError, match="Did you mean 'torch'"):
        trainer_of(Recipe(odd.name, odd.file, odd.module))


@pytest.mark.parametrize(("framework", "others"), [("torch", ["jax", "keras"]), ("jax", ["torch"])])
def test_a_trainer_imports_its_own_framework_alone(framework, others):
    code = (
        "import json, sys\n"
        "from halfstep.compare.trainers import TRAINERS\n"
        f"TRAINERS[{framework!r}]()\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert framework in loaded
    assert not set(others) & set(loaded)
