"""Looking at a model under a policy, with one batch, for what could go wrong or be better."""

from .audit import audit as audit
