"""What a rewritten module is, once it is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import OptimizedModule

REASON = "halfstep.torch.autocast paints graphs of its own: in another's they would be float32"


class RewrittenModule(OptimizedModule):
    """What ``torch.compile`` returns, with three differences.

    Compiled code that calls it leaves its own graph for that, which would not be painted. The
    first call is followed by a look at what came of it. And a copy, or what a pickle gives back,
    is compiled for its own module.
    """

    @torch.compiler.disable(recursive=False, reason=REASON)  # type: ignore[no-untyped-call,untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; look at what was painted when the first call is over."""
        self.__dict__[_BEFORE]()
        result = super().__call__(*args, **kwargs)
        after = self.__dict__.pop(_AFTER, None)
        if after is not None:
            after()
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        make, argument = self.__dict__[_MADE_BY]
        return make, (argument,)


_BEFORE, _AFTER, _MADE_BY = (
    "_halfstep_before_call",
    "_halfstep_after_first_call",
    "_halfstep_made_by",
)
_NOTED_BY_FABRIC = "_compile_kwargs"


def become_rewritten(
    module: Any,
    before: Callable[[], None],
    after: Callable[[], None],
    make: Callable[[Any], Any],
    argument: Any,
) -> None:
    """Turn what ``torch.compile`` returned into a rewritten module.

    Args:
        module: it.
        before: called before every call.
        after: called when the first call is over.
        make: makes such a module anew, from a copy of ``argument``.
        argument: what it was made from.
    """
    object.__setattr__(module, "__class__", RewrittenModule)
    # past the module's own __setattr__, which would write to the model
    module.__dict__.update({_BEFORE: before, _AFTER: after, _MADE_BY: (make, argument)})
    # and so it did for Fabric, whose torch.compile notes its arguments: a backend is in them, and
    # the model could be saved no more
    noted = module._orig_mod.__dict__.pop(_NOTED_BY_FABRIC, None)
    if noted is not None:
        module.__dict__[_NOTED_BY_FABRIC] = noted
