"""Finding the policy of each layer of a torch model by short training runs."""

from .tune import tune as tune
