"""Several processes: FSDP2's policy from ours, sums in float32, and one object to checkpoint.

Not imported by ``halfstep.torch``: torch.distributed's own parts take seconds to import.
"""

from .gathering import fsdp_policy as fsdp_policy
from .reducing import float32_allreduce_hook as float32_allreduce_hook
from .training_state import TrainingState as TrainingState
