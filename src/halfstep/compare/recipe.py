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

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RecipeError

CONSTANTS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "TITLE": (str, "a string"),
    "FRAMEWORK": (str, "a string"),
    "BATCH_SIZE": (int, "a whole number above 0"),
    "STEPS": (int, "a whole number above 0"),
    "EPOCHS": (int, "a whole number above 0"),
    "METRIC": (str, "a key of the dict that evaluate() returns"),
    "HIGHER_IS_BETTER": (bool, "True or False"),
    "SAME_WITHIN": ((int, float), "a share, for instance 0.01, not below 0"),
}
"""What a recipe may say, each of which kind, in types and in words."""


@dataclass(frozen=True)
class Recipe:
    """A recipe that was loaded and has every function it needs.

    Attributes:
        name: how the user named it, for instance ``"digits-conv"`` or ``"mine/recipe.py"``.
        file: where it lies.
        module: the module that the file became. What ``setup`` changes in it holds afterwards,
            so constants are looked up when they are needed.
        defaults: what stands for a function that the file leaves out; called with the recipe first.
    """

    name: str
    file: Path
    module: types.ModuleType
    defaults: Mapping[str, Callable[..., Any]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def constant(self, name: str, default: Any = None) -> Any:
        """Return what the file says about ``name`` now.

        Raises:
            RecipeError: it is there and of the wrong kind.
        """
        value = getattr(self.module, name, None)
        if value is None:
            return default
        kind, allowed = CONSTANTS[name]
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
        default = self.defaults.get(function)
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
