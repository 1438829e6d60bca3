# Runs in Triton's python backend, whose packages are not here.
# mypy: ignore-errors
"""The model.py of Triton's python backend: the requests of a batch concatenated, run once by onnxruntime, split again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb
from session import load


class TritonPythonModel:
    """One tensor in, one tensor out."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model.onnx that lies beside this file."""
        config = json.loads(args["model_config"])
        self._input, self._output = config["input"][0]["name"], config["output"][0]["name"]
        self._run = load(Path(__file__).with_name("model.onnx"))

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response for each request, in their order."""
        inputs = [pb.get_input_tensor_by_name(request, self._input).as_numpy() for request in requests]
        y = self._run(np.concatenate(inputs) if len(inputs) > 1 else inputs[0])  # (rows of all, *output shape)
        parts = np.split(y, np.cumsum([len(rows) for rows in inputs[:-1]])) if len(inputs) > 1 else [y]
        return [pb.InferenceResponse([pb.Tensor(self._output, part)]) for part in parts]
