# Runs in Triton's python backend, whose packages are not installed here; `tercet export-triton --backend python` copies it.
# mypy: ignore-errors
"""The model.py of Triton's python backend: concatenates the requests of a batch, runs onnxruntime once, splits the output."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # on by default from 1.29; read at import
import onnxruntime as ort


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        """Load the model.onnx next to this file."""
        config = json.loads(args["model_config"])
        self._input, self._output = config["input"][0]["name"], config["output"][0]["name"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(config["parameters"]["intra_op_thread_count"]["string_value"])
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        providers = ["CUDAExecutionProvider"] * (args["model_instance_kind"] == "GPU") + ["CPUExecutionProvider"]
        self._session = ort.InferenceSession(Path(__file__).with_name("model.onnx"), options, providers=providers)

    def execute(self, requests: list[Any]) -> list[Any]:
        inputs = [pb.get_input_tensor_by_name(request, self._input).as_numpy() for request in requests]
        batch = np.concatenate(inputs) if len(inputs) > 1 else inputs[0]
        y = self._session.run([self._output], {self._input: batch})[0]  # (rows of all, *output shape)
        parts = np.split(y, np.cumsum([len(rows) for rows in inputs[:-1]])) if len(inputs) > 1 else [y]
        return [pb.InferenceResponse([pb.Tensor(self._output, part)]) for part in parts]
