"""Several processes: FSDP2's policy from ours, and one object to checkpoint.

Not imported by ``halfstep.torch``: torch.distributed's own parts take seconds to import.
"""

from .gathering import fsdp_policy as fsdp_policy
from .training_state import TrainingState as TrainingState
