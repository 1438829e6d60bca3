"""The gRPC service: request bytes -> servicer -> batcher -> engine -> rows back to their callers."""

import os

# From 1.29 on onnxruntime reports to its makers unless it is told not to, and keeps an id in the user's home.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
