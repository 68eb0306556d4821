"""Loading a recipe from its file, checked for what its framework wants, and writing a new one."""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..errors import RecipeError, nearest
from ..recipes import BUILT_IN, TEMPLATES
from .frameworks import FRAMEWORKS, Function, framework_of, takes
from .recipe import CONSTANTS, Recipe

_OPTIONAL = {"setup": Function(("seed", "device"), "None, or a note to show with the result")}


def load_recipe(name: str | os.PathLike[str]) -> Recipe:
    """Load a built-in recipe by its name, or a user's by its file.

    Args:
        name: for instance ``"digits-conv"`` or ``"my_recipe.py"``.

    Raises:
        RecipeError: no such recipe, a file that does not run, or one that lacks a function: the
            message names the function, its arguments, what it must return and the file.

    >>> load_recipe("digits-conf")
    Traceback (most recent call last):
    halfstep.errors.RecipeError: 'digits-conf' is neither a built-in recipe (digits-mlp, ...)
    nor a Python file. Did you mean 'digits-conv'...?
    """
    name = os.fspath(name)
    file = BUILT_IN.get(name) or Path(name)
    if not file.is_file():
        raise RecipeError(
            f"{name!r} is neither a built-in recipe ({', '.join(BUILT_IN)}) nor a Python file."
            + nearest(name, BUILT_IN)
        )
    recipe = Recipe(name, file.resolve(), _run_file(file.resolve()))
    _check(recipe)
    return replace(recipe, defaults=FRAMEWORKS[recipe.framework].defaults)


def _run_file(file: Path) -> types.ModuleType:
    """Run the file as a module; it may import its neighbours, as a script may."""
    module = types.ModuleType(f"halfstep_recipe_{file.stem}")
    module.__file__ = str(file)
    # registered: dataclasses and pickle look a class's module up there
    sys.modules[module.__name__] = module
    if str(file.parent) not in sys.path and file not in BUILT_IN.values():
        sys.path.insert(0, str(file.parent))
    recipe = Recipe(file.name, file, module)
    try:
        exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), module.__dict__)
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"{recipe.where(error)}: {error}. Install what this recipe imports"
            + (", for instance with pip install 'halfstep[demo]'." if file in _built_in() else ".")
        ) from error
    except Exception as error:  # a user's file may raise anything
        raise RecipeError(
            f"{recipe.where(error)}: this recipe does not run: {type(error).__name__}: {error}"
        ) from error
    return module


def _built_in() -> set[Path]:
    return {path.resolve() for path in BUILT_IN.values()}


def _check(recipe: Recipe) -> None:
    for name in CONSTANTS:
        recipe.constant(name)
    framework = FRAMEWORKS[framework_of(recipe)]
    optional = {**_OPTIONAL, **framework.optional}
    for name, wanted in {**framework.functions(recipe.module), **optional}.items():
        function = getattr(recipe.module, name, None)
        if function is None and name in optional:
            continue
        form = f"{name}({', '.join(wanted.arguments)})"
        if not callable(function):
            raise RecipeError(
                f"{recipe.file}: this recipe has no function {form}, which must return "
                f"{wanted.returns}.{_misspelt(name, recipe.module)}"
            )
        if not any(takes(function, count) for count in wanted.counts):
            raise RecipeError(
                f"{recipe.file}: {name}{inspect.signature(function)} must be callable as "
                f"{form}, and return {wanted.returns}."
            )


def _misspelt(name: str, module: types.ModuleType) -> str:
    own: Iterable[str] = [
        key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"
    ]
    return nearest(name, own)


def write_template(path: str | os.PathLike[str], framework: str = "torch") -> Path:
    """Write a commented recipe that runs as it is.

    Args:
        path: where to.
        framework: ``"torch"``, ``"jax"`` or ``"keras"``.

    Raises:
        RecipeError: the file is there already (it is left alone), or cannot be written.
    """
    if framework not in TEMPLATES:
        raise RecipeError(
            f"no template for {framework!r}. Allowed are {', '.join(map(repr, TEMPLATES))}."
            + nearest(framework, TEMPLATES)
        )
    path = Path(path)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATES[framework].read_text(encoding="utf-8"))
    except FileExistsError:
        raise RecipeError(f"{path} exists already; it was left as it is.") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot write a recipe there: {error}.") from None
    return path
