# Runs in the environment of KServe, whose packages are not here.
# mypy: ignore-errors
"""One ONNX model served by KServe, which has no batching of its own: kserve_server.py NAME OUTPUT FILE HTTP_PORT GRPC_PORT."""

import sys
from typing import Any

from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from session import load


class OnnxModel(Model):
    """One tensor in, one tensor out."""

    def __init__(self, name: str, output: str, path: str) -> None:
        super().__init__(name)
        self._output, self._run, self.ready = output, load(path), True

    def predict(self, payload: InferRequest, _headers: Any = None, _response_headers: Any = None) -> InferResponse:
        """(batch, *input shape) -> (batch, *output shape)."""
        y = self._run(payload.inputs[0].as_numpy())
        output = InferOutput(self._output, list(y.shape), "FP32")
        output.set_data_from_numpy(y, binary_data=True)
        return InferResponse(payload.id, self.name, [output])


if __name__ == "__main__":
    name, output, path, http_port, grpc_port = sys.argv[1:]
    ports = {"http_port": int(http_port), "grpc_port": int(grpc_port)}
    server = ModelServer(**ports, workers=1, enable_latency_logging=False, grace_period=1)
    server.start([OnnxModel(name, output, path)])
