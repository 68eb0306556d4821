"""The painter: which operations of a graph run in 16 bits, and why.

It knows no framework. A door turns its graph into a :class:`Graph`, :func:`paint` answers with a
:class:`Painting`, and the door evaluates its graph with the casts that follow from it.
"""

from .explanation import Explanation as Explanation
from .explanation import Row as Row
from .graph import Graph as Graph
from .graph import Kind as Kind
from .graph import Node as Node
from .graph import Value as Value
from .lists import ON_NO_LIST as ON_NO_LIST
from .lists import OperationLists as OperationLists
from .passes import Painting as Painting
from .passes import Rule as Rule
from .passes import Verdict as Verdict
from .passes import paint as paint
