"""A recipe: a Python file with plain functions that says what to train, on what, and how to judge.

What a recipe holds (torch; this list is the interface, and the template is an example of it):

====================================== =======================================================
``make_model() -> nn.Module``          a new model, float32, on the CPU; the weights may be random,
                                       every policy starts from the same ones
``make_optimizer(model) -> Optimizer`` an optimizer over ``model.parameters()``
``batches(epoch, seed) -> iterable``   the training batches of one epoch, the same for the same
                                       arguments; tensors, or tuples, lists and dicts of them. They
                                       are moved to the device for you
``loss(model, batch) -> Tensor``       the training loss, a scalar; the model is in training mode
``evaluate(model) -> dict``            numbers by name; the model is in evaluation mode, without
                                       gradients. A key ``examples`` says how many examples the
                                       metric is a share of, and is no metric itself
====================================== =======================================================

A JAX recipe says ``FRAMEWORK = "jax"`` and holds instead:

====================================== =======================================================
``init(key) -> params``                the parameters, a pytree of float32 arrays
``tx() -> GradientTransformation``     an optax optimizer
``batches(epoch, seed) -> iterable``   as above, of any pytrees of arrays
``loss(params, batch) -> Array``       the training loss, a scalar array; with a third argument
                                       ``key`` if it draws random numbers
``evaluate(params) -> dict``           as above; under the policy, if JAX can trace it
``init_state(key) -> state``           optional, what the model keeps without training it. Then it
                                       is ``loss(params, state, batch)``, which returns a pair, the
                                       loss and the new state, and ``evaluate(params, state)``
====================================== =======================================================

A Keras recipe says ``FRAMEWORK = "keras"`` and holds instead:

====================================== =======================================================
``make_model() -> keras.Model``        a new model, compiled. The policy is the global one while
                                       this runs
``data() -> (x_train, y_train,``       arrays, or dicts and tuples of them; batches of
``x_test, y_test)``                    ``BATCH_SIZE`` (32) are drawn from them, and
                                       ``model.evaluate`` gives the metrics
``batches(epoch, seed) -> iterable``   instead of ``data``, or beside it: ``(x, y)`` or
                                       ``(x, y, sample_weight)`` each
``evaluate(model) -> dict``            likewise
====================================== =======================================================

and, optional, in all of them:

===================================== =======================================================
``setup(seed, device) -> str | None`` runs once, before all else; what it returns is a note that
                                      is shown with the result
``STEPS`` or ``EPOCHS``               how long to train when the command does not say; 1 epoch
``METRIC``                            the metric that counts; else the first one of ``evaluate``
``HIGHER_IS_BETTER``                  whether more of it is better; False
``SAME_WITHIN``                       two metrics that differ by no more than this share of the
                                      first are the same; 0.01. A metric with ``examples`` is judged
                                      by its binomial standard error instead
``TITLE``                             one line for the page; else the file's first line
``FRAMEWORK``                         ``"torch"`` (the default), ``"jax"`` or ``"keras"``
===================================== =======================================================
"""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecipeError, nearest
from ..recipes import BUILT_IN, TEMPLATES
from .frameworks import Function, framework_of

_OPTIONAL = {"setup": Function(("seed", "device"), "None, or a note to show with the result")}

_CONSTANTS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "TITLE": (str, "a string"),
    "FRAMEWORK": (str, "a string"),
    "BATCH_SIZE": (int, "a whole number above 0"),
    "STEPS": (int, "a whole number above 0"),
    "EPOCHS": (int, "a whole number above 0"),
    "METRIC": (str, "a key of the dict that evaluate() returns"),
    "HIGHER_IS_BETTER": (bool, "True or False"),
    "SAME_WITHIN": ((int, float), "a share, for instance 0.01, not below 0"),
}


@dataclass(frozen=True)
class Recipe:
    """A recipe that was loaded and has every function it needs.

    Attributes:
        name: how the user named it, for instance ``"digits-conv"`` or ``"mine/recipe.py"``.
        file: where it lies.
        module: the module that the file became. What ``setup`` changes in it holds afterwards,
            so constants are looked up when they are needed.
    """

    name: str
    file: Path
    module: types.ModuleType

    def constant(self, name: str, default: Any = None) -> Any:
        """Return what the file says about ``name`` now.

        Raises:
            RecipeError: it is there and of the wrong kind.
        """
        value = getattr(self.module, name, None)
        if value is None:
            return default
        kind, allowed = _CONSTANTS[name]
        wrong_bool = isinstance(value, bool) and kind is not bool
        if not isinstance(value, kind) or wrong_bool or not _in_range(name, value):
            raise RecipeError(f"{self.file}: {name} = {value!r} must be {allowed}.")
        return value

    @property
    def framework(self) -> str:
        """What trains it, ``"torch"`` when it does not say."""
        return str(self.constant("FRAMEWORK", "torch"))

    @property
    def title(self) -> str:
        """``TITLE``, else the first line of the file's docstring, else the name."""
        first_line = (self.module.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        return str(self.constant("TITLE", first_line or self.name))

    def call(self, function: str, *arguments: Any) -> Any:
        """Call one of the recipe's functions; with ``setup`` left out, nothing happens.

        Raises:
            RecipeError: from an error inside, with its place in the recipe.
        """
        found: Callable[..., Any] | None = getattr(self.module, function, None)
        if found is not None:
            return found(*arguments)
        default = framework_of(self).defaults.get(function)
        return default(self, *arguments) if default is not None else None

    def numbers(self, metrics: Any, argument: str) -> dict[str, float]:
        """Return what ``evaluate(argument)`` returned, as Python numbers.

        Raises:
            RecipeError: it is no dict of numbers.
        """
        try:
            return {str(name): float(value) for name, value in metrics.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise RecipeError(
                f"{self.file}: evaluate({argument}) returned {metrics!r}; it must return a "
                f"dict of numbers: {error}."
            ) from None

    def where(self, error: BaseException) -> str:
        """Return the place of an error, as deep inside this recipe's file as its traceback goes.

        The file alone where the error arose outside of it.
        """
        trace, line = error.__traceback__, None
        while trace is not None:
            if Path(trace.tb_frame.f_code.co_filename) == self.file:
                line = trace.tb_lineno
            trace = trace.tb_next
        return str(self.file) if line is None else f"{self.file}, line {line}"


def _in_range(name: str, value: Any) -> bool:
    if name in ("BATCH_SIZE", "STEPS", "EPOCHS"):
        return bool(value > 0)
    if name == "SAME_WITHIN":
        return bool(value >= 0)
    return True


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
    return recipe


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
    for name in _CONSTANTS:
        recipe.constant(name)
    framework = framework_of(recipe)
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


def takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many positional arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True


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
