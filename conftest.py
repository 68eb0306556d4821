"""What must be set before a framework is imported, for every test of the tree."""

from __future__ import annotations

import os

# Keras chooses its backend once in a process; `make test` runs tests/keras on the other two too.
os.environ.setdefault("KERAS_BACKEND", "torch")
# one line of TensorFlow's log for each fact about this CPU otherwise
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
