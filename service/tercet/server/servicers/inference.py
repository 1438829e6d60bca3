"""inference.GRPCInferenceService: the Open Inference Protocol, for every model."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.metadata import version
from time import perf_counter
from typing import Any

import msgspec

from tercet.card import Card, Tensor
from tercet.errors import InvalidInputError, ModelUnavailableError, answers, known, refuse_unreadable, streams
from tercet.proto import inference_pb2_grpc
from tercet.proto.inference_pb2 import (
    InferBatchStatistics,
    InferStatistics,
    ModelConfig,
    ModelConfigRequest,
    ModelConfigResponse,
    ModelDynamicBatching,
    ModelInferRequest,
    ModelInferResponse,
    ModelInput,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelOutput,
    ModelParameter,
    ModelReadyRequest,
    ModelReadyResponse,
    ModelStatistics,
    ModelStatisticsRequest,
    ModelStatisticsResponse,
    ModelStreamInferResponse,
    RepositoryIndexRequest,
    RepositoryIndexResponse,
    RepositoryModelLoadRequest,
    RepositoryModelLoadResponse,
    RepositoryModelUnloadRequest,
    RepositoryModelUnloadResponse,
    ServerLiveRequest,
    ServerLiveResponse,
    ServerMetadataRequest,
    ServerMetadataResponse,
    ServerReadyRequest,
    ServerReadyResponse,
    StatisticDuration,
)
from tercet.server.config import Config
from tercet.server.repository import Model, Repository
from tercet.server.servicers import Face
from tercet.server.statistics import Duration
from tercet.server.tensors import WHERE, decode, encode

VERSION = version("tercet")  # now: it is read from the disk, where another may be installed meanwhile
STREAM_WINDOW = 64  # requests of one stream that are answered at a time; more are not read


class InferenceServicer(Face, inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers with whichever model is asked for."""

    def __init__(self, repository: Repository, command: Callable[[str], Awaitable[None]]) -> None:
        """`command` obeys `load NAME` and `unload NAME`."""
        super().__init__(repository)
        self._command = command

    @answers
    async def ServerLive(self, _request: ServerLiveRequest, _context: Any) -> ServerLiveResponse:  # noqa: N802
        """Yes, when it answers at all."""
        return ServerLiveResponse(live=True)

    @answers
    async def ServerReady(self, _request: ServerReadyRequest, _context: Any) -> ServerReadyResponse:  # noqa: N802
        """Whether every model is loaded, save those that were unloaded by request."""
        return ServerReadyResponse(ready=self._repository.ready)

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
        return ServerMetadataResponse(name="tercet", version=VERSION)

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

    @answers
    async def ModelConfig(self, request: ModelConfigRequest, _context: Any) -> ModelConfigResponse:  # noqa: N802
        """How a model is batched, and what its card says to people."""
        model, config = self._repository.get(request.name, request.version), self._repository.config
        return ModelConfigResponse(config=describe(model, config))

    @answers
    async def ModelStatistics(self, request: ModelStatisticsRequest, _context: Any) -> ModelStatisticsResponse:  # noqa: N802
        """What one model or, without a name, each has done in this process."""
        names = [request.name] if request.name else self._repository.names()
        return ModelStatisticsResponse(model_stats=[count(self._repository.get(name, request.version)) for name in names])

    @answers
    async def RepositoryIndex(self, request: RepositoryIndexRequest, _context: Any) -> RepositoryIndexResponse:  # noqa: N802
        """All models of the folder."""
        served = self._repository.names()
        return RepositoryIndexResponse(
            models=[
                RepositoryIndexResponse.ModelIndex(
                    name=name,
                    version=self._repository.get(name).card.version if name in served else "",
                    state="READY" if name in served else "UNAVAILABLE",
                    reason=self._repository.reason(name),
                )
                for name in (served if request.ready else self._repository.known)
            ]
        )

    @answers
    async def RepositoryModelLoad(  # noqa: N802
        self, request: RepositoryModelLoadRequest, _context: Any
    ) -> RepositoryModelLoadResponse:
        """Serve what now lies in a model's folder."""
        refuse_parameters(request)
        await self._command(f"load {request.model_name}")
        return RepositoryModelLoadResponse()

    @answers
    async def RepositoryModelUnload(  # noqa: N802
        self, request: RepositoryModelUnloadRequest, _context: Any
    ) -> RepositoryModelUnloadResponse:
        """Serve a model no more."""
        refuse_parameters(request)
        await self._command(f"unload {request.model_name}")
        return RepositoryModelUnloadResponse()

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
        refuse_unreadable(request)  # those of a stream come one by one
        model = self._repository.get(request.model_name, request.model_version)
        rows = await model.infer(decode(request, model.card), WHERE)
        return encode(rows, request, model.card)


def metadata(tensor: Tensor) -> ModelMetadataResponse.TensorMetadata:
    """A tensor with its batch axis."""
    return ModelMetadataResponse.TensorMetadata(name=tensor.name, datatype=tensor.datatype, shape=[-1, *tensor.shape])


def refuse_parameters(request: RepositoryModelLoadRequest | RepositoryModelUnloadRequest) -> None:
    """Raise InvalidInputError for a parameter that would be ignored; Triton's `unload_dependents` means nothing here."""
    for name in request.parameters:
        if name != "unload_dependents":
            raise InvalidInputError(f"parameters[{name!r}]", "not known: models come from the service's folder as they are")


def describe(model: Model, config: Config) -> ModelConfig:
    """A model as Triton's configuration would have it."""
    card = model.card
    return ModelConfig(
        name=card.name,
        platform=model.engine.platform,
        backend=config.engine,
        max_batch_size=config.max_request_rows,
        input=[ModelInput(name=card.input.name, data_type=f"TYPE_{card.input.datatype}", dims=card.input.shape)],
        output=[ModelOutput(name=card.output.name, data_type=f"TYPE_{card.output.datatype}", dims=card.output.shape)],
        dynamic_batching=ModelDynamicBatching(max_queue_delay_microseconds=round(config.max_delay * 1e6)),
        parameters={name: ModelParameter(string_value=value) for name, value in introduce(card).items()},
    )


def introduce(card: Card) -> dict[str, str]:
    """What a card says to people; lists are JSON."""
    lists = {"labels": card.labels, "features": card.input.features}
    texts = {"description": card.description, "intended_use": card.intended_use, "warning": card.warning}
    return texts | {name: msgspec.json.encode(value).decode() for name, value in lists.items()}


def count(model: Model) -> ModelStatistics:
    """A model's statistics in Triton's terms. Input and output are not copied apart from the run: their durations stay empty."""
    found = model.statistics
    batches = found.batches.copy()  # the engine's thread goes on counting
    return ModelStatistics(
        name=model.card.name,
        version=model.card.version,
        last_inference=round(found.last * 1e3),
        inference_count=found.rows,
        execution_count=sum(batch.count for batch in batches.values()),
        inference_stats=InferStatistics(
            success=duration(found.success),
            fail=duration(found.fail),
            queue=duration(found.queue),
            compute_infer=duration(found.compute),
        ),
        batch_stats=[
            InferBatchStatistics(batch_size=rows, compute_infer=duration(batch)) for rows, batch in sorted(batches.items())
        ],
    )


def duration(found: Duration) -> StatisticDuration:
    """How often, and nanoseconds in all."""
    return StatisticDuration(count=found.count, ns=round(found.seconds * 1e9))
