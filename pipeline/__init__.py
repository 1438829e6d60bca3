"""From raw data to a verified model: one module a DVC stage, `python -m pipeline.<stage> <model>`."""

import os

# OpenMP's threads wait for each other by spinning, for so long by default that a busy neighbour slows training tenfold.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# From 1.29 on onnxruntime reports to its makers unless it is told not to, and keeps an id in the user's home.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
