"""From raw data to a verified model: one module per DVC stage, `python -m pipeline STAGE MODEL`."""

import os

# Read by OpenMP and onnxruntime when they are loaded, so set before any module of the pipeline imports torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of OpenMP slow each other down on a busy machine
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # since 1.29 onnxruntime sends telemetry and stores an id in the user's home
