"""inference.GRPCInferenceService: the Open Inference Protocol, for every model."""

import asyncio
from collections.abc import AsyncIterator
from importlib.metadata import version
from time import perf_counter
from typing import Any

from proto import inference_pb2_grpc
from proto.inference_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelReadyRequest,
    ModelReadyResponse,
    ModelStreamInferResponse,
    ServerLiveRequest,
    ServerLiveResponse,
    ServerMetadataRequest,
    ServerMetadataResponse,
    ServerReadyRequest,
    ServerReadyResponse,
)
from service.card import Tensor
from service.errors import ModelUnavailableError, answers, known, streams
from service.servicers import Face
from service.tensors import WHERE, decode, encode

STREAM_WINDOW = 64  # requests of one stream that are answered at a time; more are not read


class InferenceServicer(Face, inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers with whichever model is asked for."""

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
        return await self._infer(request)

    @streams
    async def ModelStreamInfer(  # noqa: N802
        self, requests: AsyncIterator[ModelInferRequest], _context: Any
    ) -> AsyncIterator[ModelStreamInferResponse]:
        """Answer a stream in order, up to STREAM_WINDOW requests at a time; errors go in band."""
        try:
            async with asyncio.TaskGroup() as tasks:
                started: asyncio.Queue[asyncio.Task[ModelStreamInferResponse] | None] = asyncio.Queue(STREAM_WINDOW)

                async def start() -> None:
                    async for request in requests:
                        await started.put(tasks.create_task(self._infer_in_band(request)))
                    await started.put(None)

                reading = tasks.create_task(start())
                try:
                    while task := await started.get():
                        yield await task
                finally:
                    reading.cancel()
        except* GeneratorExit:  # the client has gone while it was written to, and gRPC lets go of this generator
            pass

    async def _infer_in_band(self, request: ModelInferRequest) -> ModelStreamInferResponse:
        """Answer one request of a stream; never raises but when cancelled."""
        started = perf_counter()
        try:
            response = ModelStreamInferResponse(infer_response=await self._infer(request))
        except Exception as error:  # noqa: BLE001  whatever it is, it ends this request and not the stream
            failure = known(error)
            self.metrics.failed("ModelStreamInfer", failure.code.name)
            return ModelStreamInferResponse(error_message=str(failure), infer_response=ModelInferResponse(id=request.id))
        self.metrics.answered("ModelStreamInfer", perf_counter() - started)
        return response

    async def _infer(self, request: ModelInferRequest) -> ModelInferResponse:
        """Decode, infer, encode."""
        model = self._repository.get(request.model_name, request.model_version)
        rows = await model.infer(decode(request, model.card), WHERE)
        return encode(rows, request, model.card)


def metadata(tensor: Tensor) -> ModelMetadataResponse.TensorMetadata:
    """A tensor with its batch axis."""
    return ModelMetadataResponse.TensorMetadata(name=tensor.name, datatype=tensor.datatype, shape=[-1, *tensor.shape])
