# Runs in the environment of MLServer, whose packages are not here.
# mypy: ignore-errors
"""The runtime class that MLServer loads: one ONNX model, named by `parameters.uri` of its settings."""

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from session import load


class OnnxModel(MLModel):
    """One tensor in, one tensor out."""

    async def load(self) -> bool:
        """Load the ONNX file."""
        self._run = load(self.settings.parameters.uri)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """(batch, *input shape) -> (batch, *output shape)."""
        y = self._run(NumpyCodec.decode_input(payload.inputs[0]))
        output = NumpyCodec.encode_output(self.settings.parameters.extra["output"], y)
        return InferenceResponse(model_name=self.name, id=payload.id, outputs=[output])
