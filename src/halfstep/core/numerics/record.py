"""The events of a record of numerics: what a monitor writes, and what a report reads.

The lines are those of :mod:`halfstep.core.record`; the header has ``kind = "numerics"`` and the
version of the events below under ``numerics``. All counts are whole numbers and exact.

``header``
    ``numerics`` (1), ``library`` (``"torch 2.13.0"``), ``halfstep`` (its version), ``device``,
    ``model`` (the class's name), ``every``, ``policy`` (name of the model's policy, None without
    one), ``loss_scale`` (the rule's ``get_config()``, None without one), ``formats`` (the names
    that rows may have counters for), and ``layers``: one ``{"path", "class", "policy",
    "compute_dtype"}`` for each module in the order of the model, the root's path being ``""``;
    the last two are None in a module without a policy. Path and class make the tree.

``tensor``
    Once for each thing that is counted, before the first row that refers to it: ``id``, ``kind``,
    ``path`` (the module's), ``name`` (of the parameter within the module, or of the output where
    a module has several, else ``""``), ``class`` (the module's), ``dtype``, ``shape`` (of the
    first time). The kinds are

    - ``activation``: what a module returned;
    - ``activation_gradient``: the gradient of that, divided by the loss scale;
    - ``weight``: a parameter before the step;
    - ``weight_gradient``: its gradient, divided by the loss scale, before clipping;
    - ``update``: ``|step| / |weight|`` for each element of a parameter that the step changed; an
      element that did not change is a zero, one that was 0 before is an infinity.

``numerics``
    One for each recorded step: ``step`` (counted from 1), ``seconds`` (since the header), ``loss``
    (None where the monitor does not see one), ``scale`` (what the gradients of this step were
    multiplied by, 1.0 without loss scaling), ``skipped`` (no ``update`` rows then), ``rows``, and
    ``weight_gradients``, ``activation_gradients``: the exact histograms of all of them together
    (:meth:`ExponentHistogram.to_plain`), from which :func:`advise_loss_scale` answers; None
    where none was seen.

    A row is one tensor: ``id``, ``count`` (of elements), ``low`` and ``counts`` (``counts[i]``
    elements have an absolute value of at least ``2**(low + i)`` and less than twice that),
    ``zeros``, ``infinities``, ``nans``. What is 0 is left out, an empty ``counts`` too. Then, for
    each name in ``formats``, ``[overflow, flushed, subnormal]``: how many finite elements would
    become infinite (NaN where there is no infinity), how many non-zero ones zero, and how many
    subnormal, if they were rounded to that format; left out where all three are 0. Rows of
    gradients have ``scaled`` too: the same counters, by format, of the gradients as they were,
    multiplied by ``scale``. Rows of updates have ``lost`` instead: by format, how many of the
    elements that changed would have stayed as they are if the weight were stored in that format.

``skip``
    One for each step that was skipped because a gradient was not finite, also between recorded
    steps: ``step``, ``scale`` (that the gradients were multiplied by), ``next_scale``, ``in_a_row``
    (this one counted), ``loss``, ``parameters`` (the names of those whose gradients were not
    finite, at most :data:`MOST_NAMES`, in the order of the model), ``not_finite`` (how many there
    are), ``of`` (how many had a gradient), ``verdict`` (``"probe"`` or ``"fault"``), ``reason`` (a
    key of :data:`halfstep.core.numerics.skips.REASONS`) and ``text`` (the same in words). It is
    what is known at that step.

``skips``
    One for each run of skipped steps, when it is over: ``first``, ``last``, ``count``,
    ``verdict``, ``reason``, ``text``. It is what is known afterwards, and the better judgement.

``scale``
    A change of the loss scale without a skipped step: ``step``, ``scale`` (from then on).

``not_finite``
    A recorded step of a run without loss scaling whose gradients were not finite: ``step``,
    ``loss``, ``parameters``, ``not_finite``, ``of`` as in ``skip``.

``end``
    The last line of a run that was not killed: ``steps``, ``recorded``, ``skipped``, ``seconds``,
    ``scale``, ``error`` (the exception that ended it, in words, or None), ``advice`` (for gradients
    in float16, of all recorded steps together: :meth:`LossScaleAdvice.to_plain`, or None).

Steps that a model of 300 layers records are long lines (about 0.4 MB). Each begins with
``{"event": "numerics", "step": N,`` so that a reader of a long run can choose the lines that it
parses.
"""

from __future__ import annotations

KIND = "numerics"
"""What the header of such a record has under ``kind``."""

VERSION = 1
"""The version of the events, under ``numerics`` in the header."""

KINDS = ("activation", "activation_gradient", "weight", "weight_gradient", "update")
"""The kinds of tensors."""

COUNTED_FORMATS = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
"""The formats that rows have counters for."""

MOST_NAMES = 32
"""The most names of parameters in one event."""
