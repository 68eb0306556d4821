"""What trains a JAX recipe: parameters, one optimizer state and one policy each."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from ..core.loss_scale import NoLossScale
from ..core.policy import Policy, PolicyMap
from ..errors import HalfstepError, PolicyError, RecipeError
from .engine import first_batch
from .frameworks import STATE, takes
from .jax_device import describe as describe
from .jax_device import device_named
from .jax_device import pick_device as pick_device
from .jax_device import threads as threads
from .jax_memory import METHOD, planned
from .policies import is_plain_float32
from .recipe import Recipe
from .trainee import Policies, StepResult

if TYPE_CHECKING:
    from halfstep.jax import Explanation

# JAX leaves this function without types
wait: Callable[[Any], Any] = jax.block_until_ready


class Training(NamedTuple):
    """All that a step changes; it is donated to the step."""

    params: Any
    state: Any
    optimizer: Any


class Outcome(NamedTuple):
    """What a step says about itself."""

    loss: jax.Array
    skipped: jax.Array
    scale: jax.Array


@dataclass(frozen=True)
class Functions:
    """A recipe's functions under one policy, all with a state and a key, whatever they take.

    Attributes:
        loss: from parameters, state, batch and key to the loss and the new state.
        evaluate: from parameters and state to the metrics.
    """

    loss: Callable[..., tuple[Any, Any]]
    evaluate: Callable[[Any, Any], Any]


def functions_of(recipe: Recipe) -> Functions:
    """Return a recipe's functions as they are."""
    module = recipe.module
    stateful = hasattr(module, STATE)
    keyed = _wants_key(module.loss, 3 if stateful else 2)

    def loss(params: Any, state: Any, batch: Any, key: Any) -> tuple[Any, Any]:
        given = (params, *((state,) if stateful else ()), batch, *((key,) if keyed else ()))
        found = recipe.call("loss", *given)
        if not stateful:
            return _checked_loss(recipe, found), state
        if not isinstance(found, tuple) or len(found) != 2:
            raise RecipeError(
                f"{recipe.file}: loss(params, state, batch) returned {found!r}; with init_state it "
                "must return a pair, the loss and the new state."
            )
        return _checked_loss(recipe, found[0]), found[1]

    def evaluate(params: Any, state: Any) -> Any:
        return recipe.call("evaluate", params, *((state,) if stateful else ()))

    return Functions(loss, evaluate)


def _wants_key(loss: Callable[..., Any], others: int) -> bool:
    """Whether a loss takes a key: one argument more that is required, or is called so."""
    if not takes(loss, others):
        return True
    names = list(inspect.signature(loss).parameters)
    return takes(loss, others + 1) and names[others : others + 1] == ["key"]


def _checked_loss(recipe: Recipe, loss: Any) -> jax.Array:
    is_array = isinstance(loss, jax.Array)
    if is_array and loss.shape == () and jnp.issubdtype(loss.dtype, jnp.floating):
        return jnp.asarray(loss)
    given = f"an array of shape {loss.shape} and dtype {loss.dtype}" if is_array else repr(loss)
    raise RecipeError(
        f"{recipe.file}: loss(params, batch) returned {given}; it must return a scalar array of "
        "real numbers."
    )


class JaxTrainee:
    """One set of parameters under one policy.

    Args:
        recipe: what makes, trains and judges the parameters.
        policy: what :func:`halfstep.jax.autocast` is given, and the optimizer's loss scale.
        params: the parameters to start from.
        state: the model's state that is not trained.
        device: where it trains.
        compiled: compiled steps of this recipe and policy, by the shapes of their batches.

    Attributes:
        notes: what there is to say about this policy on this model, one string each.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy | PolicyMap,
        params: Any,
        state: Any,
        device: str,
        compiled: dict[Any, Any],
    ) -> None:
        self._recipe, self._device = recipe, device_named(device)
        self.notes: list[str] = []
        self._functions = functions_of(recipe)
        self._loss: Callable[..., tuple[Any, Any]] = self._functions.loss
        # Any: what a recipe returns as its optimizer is only checked by what it can do
        self._tx: Any = recipe.call("tx")
        self._rule = policy.loss_scale
        self._is_plain = is_plain_float32(policy)
        if not self._is_plain:
            import halfstep.jax as door

            self._loss = door.autocast(self._loss, policy)
            self._tx = door.loss_scaled(self._tx, self._rule)
        # copies: a step is given its arguments to keep
        own = jax.tree_util.tree_map(jnp.array, (params, state))
        self._training = jax.device_put(
            Training(own[0], own[1], self._tx.init(own[0])), self._device
        )
        self._evaluate = self._evaluation(policy)
        self._compiled = compiled

    def _evaluation(self, policy: Policy | PolicyMap) -> Callable[[Any, Any], Any]:
        """The metrics under the policy, where ``evaluate`` is a function that JAX can trace."""
        function = self._functions.evaluate
        if not self._is_plain:
            import halfstep.jax as door

            function = door.autocast(function, policy)
        compiled = jax.jit(function)
        try:
            jax.eval_shape(compiled, self._training.params, self._training.state)
        except (HalfstepError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            if not self._is_plain:
                self.notes.append(f"evaluate() ran in float32, as it is written: {reason}")
            return self._functions.evaluate
        return compiled

    def _one_step(self, training: Training, batch: Any, key: Any) -> tuple[Training, Outcome]:
        import optax

        if self._is_plain:
            differentiated = jax.value_and_grad(self._loss, has_aux=True)
            (loss, state), grads = differentiated(training.params, training.state, batch, key)
            skipped, scale = jnp.asarray(False), jnp.asarray(1.0)
        else:
            loss, state, grads = self._scaled_gradients(training, batch, key)
        updates, optimizer = self._tx.update(grads, training.optimizer, training.params)
        params = optax.apply_updates(training.params, updates)
        if not self._is_plain:
            skipped, scale = optimizer.last_step_skipped, optimizer.loss_scale.scale
            # a forward pass that overflowed must not leave its mark on the statistics either
            keep = partial(jnp.where, skipped)
            state = jax.tree_util.tree_map(keep, training.state, state)
        return Training(params, state, optimizer), Outcome(loss, skipped, scale)

    def _scaled_gradients(self, training: Training, batch: Any, key: Any) -> tuple[Any, Any, Any]:
        import halfstep.jax as door

        def scaled(params: Any) -> tuple[Any, tuple[Any, Any]]:
            loss, state = self._loss(params, training.state, batch, key)
            return door.scale_loss(loss, training.optimizer), (loss, state)

        grads, (loss, state) = jax.grad(scaled, has_aux=True)(training.params)
        return loss, state, grads

    def compiled(self, batch: Any, key: Any) -> Any:
        """The step for batches of this shape, compiled once, outside of any clock."""
        leaves, treedef = jax.tree_util.tree_flatten(batch)
        shapes = (treedef, *((leaf.shape, leaf.dtype) for leaf in leaves))
        if shapes not in self._compiled:
            step = jax.jit(self._one_step, donate_argnums=0)
            self._compiled[shapes] = step.lower(self._training, batch, key).compile()
        return self._compiled[shapes]

    def inputs(self, batch: Any, seed: int) -> tuple[Any, Any]:
        """Return the batch, as arrays on the device, and the key of this step."""
        arrays = jax.tree_util.tree_map(jnp.asarray, batch)
        arrays, key = jax.device_put((arrays, jax.random.key(seed)), self._device)
        return arrays, key

    def step(self, batch: Any, seed: int) -> StepResult:
        """Train on one batch and time it: forward, backward, update, in one compiled program."""
        given = self.inputs(batch, seed)
        run = self.compiled(*given)
        wait(given)
        start = time.perf_counter()
        self._training, outcome = run(self._training, *given)
        wait((self._training, outcome))
        seconds = time.perf_counter() - start
        # read after the clock has stopped
        result = StepResult(
            seconds=seconds,
            loss=float(outcome.loss),
            skipped=bool(outcome.skipped),
            scale=None if isinstance(self._rule, NoLossScale) else float(outcome.scale),
        )
        if not self._is_plain:
            import halfstep.jax as door

            door.check_loss_scale(self._training.optimizer, self._rule)
        return result

    def evaluate(self) -> dict[str, float]:
        """Return the recipe's metrics under the policy, as Python numbers."""
        metrics = self._evaluate(self._training.params, self._training.state)
        return self._recipe.numbers(metrics, "params")


def initial(recipe: Recipe, seed: int) -> tuple[Any, Any]:
    """Return the parameters that every policy starts from, and the state that is not trained.

    Raises:
        RecipeError: ``init`` or ``init_state`` raised, or the parameters are not float32.
    """
    key = jax.random.key(seed)
    params, state = _made(recipe, "init", key), _made(recipe, STATE, key)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype != jnp.float32:
            raise RecipeError(
                f"{recipe.file}: init(key) returned {dtype or repr(leaf)} at "
                f"params{jax.tree_util.keystr(path)}; parameters must be float32 arrays."
            )
    return params, state


def _made(recipe: Recipe, function: str, key: Any) -> Any:
    try:
        return recipe.call(function, key)
    except Exception as error:  # a user's function may raise anything
        raise RecipeError(
            f"{recipe.where(error)}: {function}(key): {type(error).__name__}: {error}"
        ) from error


class Starter:
    """What makes the trainees of a JAX recipe; it compiles each policy's step once for all."""

    def __init__(self, recipe: Recipe, device: str, seed: int) -> None:
        self.recipe, self.device, self.seed = recipe, device, seed
        self._params, self._state = initial(recipe, seed)
        self._compiled: dict[Policy | PolicyMap, dict[Any, Any]] = {}

    def __call__(self, policy: Policy | PolicyMap) -> JaxTrainee:
        """Return a trainee under a policy, with the parameters that all start from."""
        compiled = self._compiled.setdefault(policy, {})
        return JaxTrainee(
            self.recipe, policy, self._params, self._state, self.device, compiled
        )  # fmt: skip

    def anew(self) -> Starter:
        """Return another one that makes all again, the parameters that all start from too."""
        return Starter(self.recipe, self.device, self.seed)

    def measure_memory(self, policies: Policies, steps: int) -> Iterator[dict[str, Any]]:
        """Yield what the compiled training step of each policy needs, on any device.

        ::

            arguments + results - results in the place of arguments + temporaries

        XLA plans these buffers before the step runs; it need not run. Parameters, the optimizer's
        state and the batch are arguments, activations kept for the backward pass are temporaries.
        """
        for label, policy in policies.items():
            try:
                trainee = self(policy)
                batch = first_batch(self.recipe, self.seed)
                run = trainee.compiled(*trainee.inputs(batch, self.seed))
            except Exception as error:  # noqa: BLE001 - the run itself will say more about it
                reason = f"{type(error).__name__}: {error}"
                yield {"policy": label, "error": reason, "method": METHOD}
                continue
            yield {"policy": label, **planned(run.memory_analysis())}


def starter(recipe: Recipe, device: str, seed: int) -> Starter:
    """Return what makes the trainees of a recipe; all start from the same parameters."""
    return Starter(recipe, device, seed)


def explain(recipe: Recipe, policy: Policy | PolicyMap, seed: int) -> Explanation:
    """Return what each operation of the recipe's loss runs in, and why.

    Raises:
        PolicyError: nothing would run in 16 bits.
    """
    import halfstep.jax as door

    params, state = initial(recipe, seed)
    batch = jax.tree_util.tree_map(jnp.asarray, first_batch(recipe, seed))
    loss = functions_of(recipe).loss
    try:
        return door.explain(loss, policy)(params, state, batch, jax.random.key(seed))
    except PolicyError as error:
        raise PolicyError(f"{recipe.name}: {error}") from None
