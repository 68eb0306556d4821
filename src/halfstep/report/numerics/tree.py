"""The policy of every module, as a tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Branch:
    """A module and what is in it.

    Attributes:
        name: the last part of its path; the model's class for the root.
        title: its class.
        dtype: the dtype it computes in, empty without a policy.
        policy: the name of its policy, empty without one.
        children: the modules in it.
    """

    name: str
    title: str
    dtype: str
    policy: str
    children: list[Branch] = field(default_factory=list)

    @property
    def mixed(self) -> bool:
        """Whether something in it computes in another dtype than it does itself."""
        return any(child.mixed or child.dtype != self.dtype for child in self.children)

    @property
    def size(self) -> int:
        """How many modules there are in it, itself counted."""
        return 1 + sum(child.size for child in self.children)


def tree(layers: Sequence[dict[str, Any]]) -> Branch:
    """Return the root of the modules in the header of a record."""
    by_path: dict[str, Branch] = {}
    for layer in layers:
        path = layer["path"]
        branch = Branch(
            path.rpartition(".")[2] or layer["class"], layer["class"],
            layer["compute_dtype"] or "", layer["policy"] or "",
        )  # fmt: skip
        by_path[path] = branch
        if path:
            by_path[_parent(path, by_path)].children.append(branch)
    return by_path.get("") or Branch("", "", "", "")


def _parent(path: str, known: dict[str, Branch]) -> str:
    parent = path.rpartition(".")[0]
    while parent not in known and parent:
        parent = parent.rpartition(".")[0]
    return parent
