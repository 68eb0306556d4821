"""Lists of operations by kind, as data: every entry has its reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ...errors import PolicyError, nearest
from .graph import Kind

ON_NO_LIST = "on no list"
ASKED = {"allow": "allow= asked for it", "deny": "deny= asked for it"}
"""The reasons of operations that a user has moved, by where to."""


@dataclass(frozen=True)
class OperationLists:
    """The kind of every operation that a door knows, with the reason.

    Args:
        allow, deny, infer, clear: reason by operation name.
        opaque: operations that must stay as they are, with the reason. What is on no list is
            opaque too.

    Raises:
        PolicyError: an operation on two lists.

    >>> lists = OperationLists(allow={"dot": "matrix units"}, deny={"exp": "grows fast"})
    >>> lists.kind("dot")
    (<Kind.ALLOW: 'allow'>, 'matrix units')
    >>> lists.changed(deny=["dot"]).kind("dot")
    (<Kind.DENY: 'deny'>, 'deny= asked for it')
    >>> lists.kind("fft")
    (<Kind.OPAQUE: 'opaque'>, 'on no list')
    """

    allow: Mapping[str, str]
    deny: Mapping[str, str]
    infer: Mapping[str, str] | None = None
    clear: Mapping[str, str] | None = None
    opaque: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        seen: dict[str, Kind] = {}
        for kind, entries in self._by_kind().items():
            for name in entries:
                if name in seen:
                    raise PolicyError(
                        f"the operation {name!r} is on two lists, {seen[name].value} and "
                        f"{kind.value}: give it one kind."
                    )
                seen[name] = kind

    def _by_kind(self) -> dict[Kind, Mapping[str, str]]:
        return {
            Kind.ALLOW: self.allow,
            Kind.DENY: self.deny,
            Kind.INFER: self.infer or {},
            Kind.CLEAR: self.clear or {},
            Kind.OPAQUE: self.opaque or {},
        }

    @property
    def names(self) -> set[str]:
        """Every operation on a list."""
        return {name for entries in self._by_kind().values() for name in entries}

    def kind(self, name: str) -> tuple[Kind, str]:
        """Return the kind of an operation and the reason."""
        for kind, entries in self._by_kind().items():
            if name in entries:
                return kind, entries[name]
        return Kind.OPAQUE, ON_NO_LIST

    def changed(self, allow: Iterable[str] = (), deny: Iterable[str] = ()) -> OperationLists:
        """Return lists with these operations moved to allow and to deny.

        Raises:
            PolicyError: a name in both.
        """
        moved = {
            "allow": dict.fromkeys(allow, ASKED["allow"]),
            "deny": dict.fromkeys(deny, ASKED["deny"]),
        }
        lists = {
            kind.value: {
                name: why
                for name, why in entries.items()
                if name not in moved["allow"] and name not in moved["deny"]
            }
            for kind, entries in self._by_kind().items()
        }
        for name in ("allow", "deny"):
            lists[name] = {**lists[name], **moved[name]}
        return OperationLists(**lists)

    def matrix_products_only(self) -> OperationLists:
        """Return lists with nothing but allow: each product is cast around, nothing follows it."""
        return replace(self, deny={}, infer={}, clear={})

    def check_known(self, argument: str, names: Iterable[str], others: Iterable[str] = ()) -> None:
        """Raise for a name that is on no list and none of ``others``.

        Raises:
            PolicyError: with the nearest names.
        """
        known = self.names | set(others)
        for name in names:
            if name not in known:
                raise PolicyError(
                    f"{argument}=...{name!r}...: no operation of this name, neither on the lists "
                    f"nor in the function." + nearest(name, known)
                )
