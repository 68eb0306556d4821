"""Tables of the docs that are made from the library's own data, so that they cannot go stale.

In a page: ``{halfstep-table} formats``. Each table is a function that returns Markdown.
"""

import re
from collections.abc import Callable, Iterable, Sequence

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from torch import nn

from halfstep import FORMATS
from halfstep.core.accelerators import TENSOR_CORES
from halfstep.core.cpu import INSTRUCTIONS
from halfstep.torch import rules

MANY = 8
"""Past this many classes a row of the rules gives a pattern instead of the names."""


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def formats() -> str:
    """What every format can hold."""
    head = (
        "format", "bits", "exponent", "mantissa", "largest", "smallest normal",
        "smallest subnormal", "epsilon", "infinity",
    )  # fmt: skip
    return markdown(
        head,
        (
            (
                f"`{name}`", f.bits, f.exponent_bits, f.mantissa_bits, f"{f.max:.5g}",
                f"{f.smallest_normal:.3g}", f"{f.smallest_subnormal:.3g}", f"{f.epsilon:.3g}",
                "yes" if f.has_infinity else "no",
            )
            for name, f in FORMATS.items()
        ),
    )  # fmt: skip


_INPUTS = {
    "keep": "as they are",
    "cast": "cast",
    "cast finite": "cast, finite stays finite",
    "float32": "float32",
    "float32 on cpu": "float32 on a CPU, else cast",
}
_WEIGHTS = {
    "low": "{compute}",
    "low on cpu": "{compute} on a CPU; elsewhere autocast casts them",
    "low off cpu": "float32 on a CPU, else {compute}",
    "low off cpu or transformed": "float32 on a CPU, else {compute}",
    "rows": "float32, then the rows are cast",
    "float32": "float32",
}
_INSIDE = {
    "as it is": "as it is",
    "functional": "as `functional=` says",
    "on": "on",
    "off": "off",
}


def module_rules() -> str:
    """How each kind of torch module runs under a 16-bit policy."""
    rows = [(_class_names(classes), rule) for classes, rule in rules.RULES]
    leaves = ", ".join(f"`{name}`" for name in _short([cls.__name__ for cls in rules.LEAVES]))
    rows += [
        (leaves, rules.LEAF),
        ("every other module that owns weights", rules.LAYER),
        ("every module without weights", rules.PLAIN),
    ]
    return markdown(
        ("module", "floating inputs", "weights are read in", "autocast inside", "why"),
        (
            (
                name,
                *_uses(rule),
                _why(rule),
            )
            for name, rule in rows
        ),
    )


def _why(rule: rules.Rule) -> str:
    if rule is rules.PLAIN:
        return "there is nothing to read in 16 bits"
    return rule.why.format(compute="compute dtype")


def _uses(rule: rules.Rule) -> tuple[str, str, str]:
    if rule is rules.HOLDER:
        return "–", "–", "–"
    weights = _WEIGHTS[rule.weights].format(compute="compute dtype")
    if rule.name in ("plain", "loss"):
        weights = "–"
    return _INPUTS[rule.inputs], weights, _INSIDE[rule.inside]


def _class_names(classes: tuple[type[nn.Module], ...]) -> str:
    public = [
        name
        for name in dir(nn)
        if isinstance(found := getattr(nn, name), type)
        and issubclass(found, classes)
        and not name.startswith("Lazy")
    ]
    if len(public) > MANY:
        ending = re.findall(r"[A-Z][a-z]+$", public[0])[0]
        return f"`*{ending}` of `torch.nn` ({len(public)} modules)"
    return ", ".join(f"`{name}`" for name in _short(public))


def _short(names: Iterable[str]) -> list[str]:
    """``Conv1d``, ``Conv2d`` and ``Conv3d`` become ``Conv*d``."""
    return sorted({re.sub(r"\dd$", "*d", name) for name in names})


def left_alone() -> str:
    """Which modules a policy leaves alone, with the reason that the summary gives."""
    return "\n".join(f"- {reason}" for _, reason in rules.UNTOUCHABLE)


def tensor_cores() -> str:
    """From which compute capability on NVIDIA's tensor cores multiply a format."""
    return markdown(
        ("format", "compute capability"),
        ((f"`{name}`", "{}.{}".format(*least)) for name, least in TENSOR_CORES.items()),
    )


def cpu_instructions() -> str:
    """Which instruction sets of CPUs speed up a format."""
    return markdown(
        ("instruction set", "flag on Linux", "speeds up", "kind"),
        (
            (i.name, f"`{i.flag}`", f"`{i.format}`", "matrix" if i.matrix else "vector")
            for i in INSTRUCTIONS
            if i.format is not None
        ),
    )


TABLES: dict[str, Callable[[], str]] = {
    "formats": formats,
    "module-rules": module_rules,
    "left-alone": left_alone,
    "tensor-cores": tensor_cores,
    "cpu-instructions": cpu_instructions,
}


class HalfstepTable(SphinxDirective):
    """``{halfstep-table} NAME``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse the Markdown in the page's own parser."""
        made = self.parse_text_to_nodes(TABLES[self.arguments[0]]())
        wide = nodes.container("", *made, classes=["halfstep-table"])
        return [wide]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("halfstep-table", HalfstepTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
