"""The main job: the same training under several policies, side by side.

::

    halfstep compare digits-conv --policies float32,mixed_float16,mixed_bfloat16

Every policy starts from the same weights and sees the same batches and the same random numbers;
the steps are interleaved, so that their times can be compared on a noisy machine. A run leaves a
record (:mod:`halfstep.core.record`), of which the summary is a pure function; the page
(:mod:`halfstep.report`) is one of the summary.
"""

from .loading import load_recipe as load_recipe
from .loading import write_template as write_template
from .policies import parse_policies as parse_policies
from .recipe import Recipe as Recipe
from .results import Summary as Summary
from .run import Settings as Settings
from .run import compare as compare
from .summary import summarise as summarise
from .verdict import verdict as verdict
