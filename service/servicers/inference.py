"""inference.GRPCInferenceService: the Open Inference Protocol, for every model."""

from importlib.metadata import version
from typing import Any

from proto import inference_pb2_grpc
from proto.inference_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelReadyRequest,
    ModelReadyResponse,
    ServerLiveRequest,
    ServerLiveResponse,
    ServerMetadataRequest,
    ServerMetadataResponse,
    ServerReadyRequest,
    ServerReadyResponse,
)
from service.card import Tensor
from service.errors import ModelUnavailableError, answers
from service.repository import Repository
from service.tensors import WHERE, decode, encode


class InferenceServicer(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers with whichever model is asked for."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    @answers
    async def ServerLive(self, _request: ServerLiveRequest, _context: Any) -> ServerLiveResponse:  # noqa: N802
        """Yes, when it answers at all."""
        return ServerLiveResponse(live=True)

    @answers
    async def ServerReady(self, _request: ServerReadyRequest, _context: Any) -> ServerReadyResponse:  # noqa: N802
        """Whether every known model is loaded."""
        return ServerReadyResponse(ready=self._repository.names() == self._repository.known)

    @answers
    async def ModelReady(self, request: ModelReadyRequest, _context: Any) -> ModelReadyResponse:  # noqa: N802
        """Whether one model is loaded; NOT_FOUND when there is no such model."""
        try:
            self._repository.get(request.name, request.version)
        except ModelUnavailableError:
            return ModelReadyResponse(ready=False)
        return ModelReadyResponse(ready=True)

    @answers
    async def ServerMetadata(self, _request: ServerMetadataRequest, _context: Any) -> ServerMetadataResponse:  # noqa: N802
        """Name and version of this service; it has no extensions of the protocol."""
        return ServerMetadataResponse(name="trefoil", version=version("trefoil"))

    @answers
    async def ModelMetadata(self, request: ModelMetadataRequest, _context: Any) -> ModelMetadataResponse:  # noqa: N802
        """Names, datatypes and shapes of a model's tensors."""
        model = self._repository.get(request.name, request.version)
        card, platform = model.card, model.engine.platform
        return ModelMetadataResponse(
            name=card.name,
            versions=[card.version],
            platform=platform,
            inputs=[metadata(card.input)],
            outputs=[metadata(card.output)],
        )

    @answers
    async def ModelInfer(self, request: ModelInferRequest, _context: Any) -> ModelInferResponse:  # noqa: N802
        """One batch in, one batch out."""
        model = self._repository.get(request.model_name, request.model_version)
        rows = await model.infer(decode(request, model.card), WHERE)
        return encode(rows, request, model.card)


def metadata(tensor: Tensor) -> ModelMetadataResponse.TensorMetadata:
    """A tensor with its batch axis."""
    return ModelMetadataResponse.TensorMetadata(name=tensor.name, datatype=tensor.datatype, shape=[-1, *tensor.shape])
