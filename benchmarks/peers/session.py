# Runs in the environments of the peers, whose packages are not here.
# mypy: ignore-errors
"""onnxruntime for every peer: on the CPU, with one thread."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it is on by default, from 1.29 on
import onnxruntime as ort


def load(path: str | Path) -> Callable[[np.ndarray], np.ndarray]:
    """Load an ONNX file with one input and one output. The function maps (batch, *input shape) to (batch, *output shape)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs, name = [session.get_outputs()[0].name], session.get_inputs()[0].name
    return lambda rows: session.run(outputs, {name: rows})[0]
