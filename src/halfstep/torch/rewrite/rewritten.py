"""What a rewritten module is, once it is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._dynamo import OptimizedModule

from .watch import Watch, untraced


class RewrittenModule(OptimizedModule):
    """What ``torch.compile`` returns, with three differences.

    Compiled code that calls it leaves its own graph for that, which would not be painted. Every
    call is followed by a look at what came of it. And a copy, or what a pickle gives back, is
    compiled for its own module.
    """

    @untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; look at what ran when the call is over."""
        watch: Watch = self.__dict__[_WATCH]
        before, around = watch.begin(), watch.around()
        if around is None:
            result = super().__call__(*args, **kwargs)
        else:
            with around:
                result = super().__call__(*args, **kwargs)
        watch.end(before)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        make, argument = self.__dict__[_MADE_BY]
        return make, (argument,)


_WATCH, _MADE_BY = "_halfstep_watch", "_halfstep_made_by"
_NOTED_BY_FABRIC = "_compile_kwargs"


def become_rewritten(module: Any, watch: Watch, make: Callable[[Any], Any], argument: Any) -> None:
    """Turn what ``torch.compile`` returned into a rewritten module.

    Args:
        module: it.
        watch: looks at its calls.
        make: makes such a module anew, from a copy of ``argument``.
        argument: what it was made from.
    """
    object.__setattr__(module, "__class__", RewrittenModule)
    # past the module's own __setattr__, which would write to the model
    module.__dict__.update({_WATCH: watch, _MADE_BY: (make, argument)})
    # and so it did for Fabric, whose torch.compile notes its arguments: a backend is in them, and
    # the model could be saved no more
    noted = module._orig_mod.__dict__.pop(_NOTED_BY_FABRIC, None)
    if noted is not None:
        module.__dict__[_NOTED_BY_FABRIC] = noted
