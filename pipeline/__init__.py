"""From raw data to a verified model: one module a DVC stage, `python -m pipeline.<stage> <model>`."""

import os

# OpenMP's threads wait for each other by spinning, for so long by default that a busy neighbour slows training tenfold.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# onnxruntime would write into the home folder, and tell its makers.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
