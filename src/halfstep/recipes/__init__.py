"""The built-in recipes: plain files, of the kind that a user writes.

``digits-mlp`` is the file ``digits_mlp.py``, and so on; :mod:`halfstep.compare` loads them by their
path, as it loads a user's. They train on real data that is already on the machine.
``template.py`` is what ``halfstep compare --new`` copies, ``template_jax.py`` and
``template_keras.py`` what it copies with ``--framework``.
"""

from __future__ import annotations

from pathlib import Path

TEMPLATES = {
    "torch": Path(__file__).with_name("template.py"),
    "jax": Path(__file__).with_name("template_jax.py"),
    "keras": Path(__file__).with_name("template_keras.py"),
}
"""The recipe that ``--new`` writes, by framework."""

_NAMES = ("digits-mlp", "digits-conv", "pydoc-gpt", "blog-conv", "digits-jax", "digits-keras")

BUILT_IN = {name: Path(__file__).with_name(name.replace("-", "_") + ".py") for name in _NAMES}
"""The file of every built-in recipe, by its name."""
