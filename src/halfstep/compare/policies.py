"""Reading the policies to compare: names, or JSON files that hold a policy or a policy map."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..core.policy import NAMES, Policy, PolicyMap, as_policy_map
from ..core.policy_names import suggestion
from ..errors import PolicyError

DEFAULT = ("float32", "mixed_float16", "mixed_bfloat16")
"""What is compared when nothing is said; the first one is what the others are held against."""


def is_plain_float32(policy: Policy | PolicyMap) -> bool:
    """Whether a policy is float32 everywhere, without a loss scale: training as it always was.

    >>> is_plain_float32(Policy("float32")), is_plain_float32(Policy("float32", loss_scale=8))
    (True, False)
    """
    given = as_policy_map(policy)
    return given.default == Policy("float32") and not given.overrides


def is_low(policy: Policy | PolicyMap) -> bool:
    """Whether a policy, or one of a map's, computes in 16 bits."""
    given = as_policy_map(policy)
    return any(each.is_low for each in (given.default, *given.overrides.values()))


def policy_from_config(config: Mapping[str, Any]) -> Policy | PolicyMap:
    """Return the policy or the policy map that a config describes.

    >>> policy_from_config({"name": "mixed_float16", "loss_scale": 1024})
    Policy('mixed_float16', loss_scale=1024)
    >>> policy_from_config({"default": {"name": "mixed_float16"}, "overrides": {}})
    PolicyMap('mixed_float16', {})
    """
    return PolicyMap.from_config(config) if "default" in config else Policy.from_config(config)


def parse_policies(
    arguments: str | Iterable[str], *, option: str = "--policies"
) -> dict[str, Policy | PolicyMap]:
    """Return the policies by the label that they are shown under, in order.

    Args:
        arguments: names or paths of JSON files, separated by commas or in an iterable. A file
            holds what ``get_config()`` of a policy or a policy map returns and is shown under
            its name without the ending.
        option: where they were given, for the messages.

    Raises:
        PolicyError: an unknown name, a file that holds no policy, or one label twice.

    >>> parse_policies("float32, mixed_bfloat16")
    {'float32': Policy('float32'), 'mixed_bfloat16': Policy('mixed_bfloat16')}
    """
    parts = arguments.split(",") if isinstance(arguments, str) else arguments
    policies: dict[str, Policy | PolicyMap] = {}
    for argument in filter(None, (part.strip() for part in parts)):
        label, policy = _parse(argument, option)
        if label in policies:
            raise PolicyError(f"{option}: {label!r} is there twice; each needs a name of its own.")
        policies[label] = policy
    if not policies:
        raise PolicyError(f"{option}: none given. Allowed are {', '.join(NAMES)} or JSON files.")
    return policies


def _parse(argument: str, option: str) -> tuple[str, Policy | PolicyMap]:
    if argument in NAMES:
        return argument, Policy(argument)
    path = Path(argument)
    if path.suffix != ".json" and not path.is_file():
        raise PolicyError(
            f"{option}: {argument!r} is neither a policy ({', '.join(NAMES)}) nor a JSON file."
            + suggestion(argument)
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise PolicyError("it holds no JSON object")
        return path.stem, policy_from_config(config)
    except (OSError, ValueError) as error:
        raise PolicyError(f"{option}: {path} holds no policy: {error}") from None
