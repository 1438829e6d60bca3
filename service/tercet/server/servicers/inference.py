"""inference.GRPCInferenceService: the Open Inference Protocol, for every model."""

import asyncio
from collections.abc import AsyncIterator
from importlib.metadata import version
from time import perf_counter
from typing import Any

import msgspec

from tercet.errors import InvalidInputError, ModelUnavailableError
from tercet.proto import inference_pb2 as pb
from tercet.proto import inference_pb2_grpc
from tercet.server.repository import Model
from tercet.server.rpc import BaseServicer, as_service_error
from tercet.server.telemetry import Duration
from tercet.server.tensors import INPUT_FIELD, decode_request, encode_response

VERSION = version("tercet")  # read at import: another version may be installed while this one runs
STREAM_WINDOW = 64  # requests of one stream in work at a time; the stream is not read any further


class InferenceServicer(BaseServicer, inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers with any model."""

    async def ServerLive(self, _request: pb.ServerLiveRequest, _context: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, _request: pb.ServerReadyRequest, _context: Any) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self.repository.ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, _context: Any) -> pb.ModelReadyResponse:
        """Return whether a model is loaded. An unknown one is an error."""
        try:
            self.repository.get(request.name, request.version)
        except ModelUnavailableError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def ServerMetadata(self, _request: pb.ServerMetadataRequest, _context: Any) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="tercet", version=VERSION)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, _context: Any) -> pb.ModelMetadataResponse:
        model = self.repository.get(request.name, request.version)
        card = model.card
        response = pb.ModelMetadataResponse(name=card.name, versions=[card.version], platform=model.batcher.engine.platform)
        for tensors, tensor in ((response.inputs, card.input), (response.outputs, card.output)):
            tensors.add(name=tensor.name, datatype=tensor.datatype, shape=[-1, *tensor.shape])
        return response

    async def ModelInfer(self, request: pb.ModelInferRequest, _context: Any) -> pb.ModelInferResponse:
        model = self.repository.get(request.model_name, request.model_version)
        output = await model.infer(decode_request(request, model.card), INPUT_FIELD)
        return encode_response(output, request, model.card)

    async def ModelConfig(self, request: pb.ModelConfigRequest, _context: Any) -> pb.ModelConfigResponse:
        """Return a model's configuration in Triton's terms. The parameters are what clients show to people; lists are JSON."""
        model = self.repository.get(request.name, request.version)
        card = model.card
        config = pb.ModelConfig(
            name=card.name,
            platform=model.batcher.engine.platform,
            backend=model.batcher.engine.name.partition(" ")[0],  # without the version
            max_batch_size=model.config.max_request_rows,
            input=[pb.ModelInput(name=card.input.name, data_type=f"TYPE_{card.input.datatype}", dims=card.input.shape)],
            output=[pb.ModelOutput(name=card.output.name, data_type=f"TYPE_{card.output.datatype}", dims=card.output.shape)],
            dynamic_batching=pb.ModelDynamicBatching(max_queue_delay_microseconds=round(model.config.max_delay * 1e6)),
        )
        for name in ("description", "intended_use", "warning"):
            config.parameters[name].string_value = getattr(card, name)
        config.parameters["labels"].string_value = msgspec.json.encode(card.labels).decode()
        config.parameters["features"].string_value = msgspec.json.encode(card.input.features).decode()
        return pb.ModelConfigResponse(config=config)

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, _context: Any) -> pb.ModelStatisticsResponse:
        names = [request.name] if request.name else self.repository.loaded_names()
        models = [self.repository.get(name, request.version) for name in names]
        return pb.ModelStatisticsResponse(model_stats=map(model_statistics, models))

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, _context: Any) -> pb.RepositoryIndexResponse:
        loaded, response = self.repository.loaded_names(), pb.RepositoryIndexResponse()
        for name in loaded if request.ready else self.repository.all_names():
            served, state = (self.repository.get(name).card.version, "READY") if name in loaded else ("", "UNAVAILABLE")
            response.models.add(name=name, version=served, state=state, reason=self.repository.reason(name))
        return response

    async def RepositoryModelLoad(self, request: pb.RepositoryModelLoadRequest, _context: Any) -> pb.RepositoryModelLoadResponse:
        await self._command("load", request)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, _context: Any
    ) -> pb.RepositoryModelUnloadResponse:
        await self._command("unload", request)
        return pb.RepositoryModelUnloadResponse()

    async def _command(self, verb: str, request: pb.RepositoryModelLoadRequest | pb.RepositoryModelUnloadRequest) -> None:
        """Load or unload a model. Raises InvalidInputError for a parameter, except Triton's `unload_dependents`."""
        if unsupported := sorted(request.parameters.keys() - {"unload_dependents"}):
            text = "is not supported: models are loaded from the service's folder as they are"
            raise InvalidInputError(f"parameters[{unsupported[0]!r}]", text)
        await self.command(f"{verb} {request.model_name}")

    async def ModelStreamInfer(self, requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Answer a stream in order, up to STREAM_WINDOW requests at a time; errors go in band."""
        try:
            async with asyncio.TaskGroup() as tasks:
                started: asyncio.Queue[asyncio.Task[pb.ModelStreamInferResponse] | None] = asyncio.Queue(STREAM_WINDOW)

                async def start_requests() -> None:
                    async for content in requests:
                        await started.put(tasks.create_task(self._infer_in_band(content)))
                    await started.put(None)

                starting = tasks.create_task(start_requests())
                try:
                    while task := await started.get():
                        yield await task
                finally:
                    starting.cancel()
        except* GeneratorExit:  # the client left during a write, and gRPC closes this generator
            pass

    async def _infer_in_band(self, content: bytes) -> pb.ModelStreamInferResponse:
        """Answer one request of a stream; raises only when cancelled."""
        started, request = perf_counter(), pb.ModelInferRequest()
        try:
            request.ParseFromString(content)
            response = pb.ModelStreamInferResponse(infer_response=await self.ModelInfer(request, None))
        except Exception as error:  # noqa: BLE001  any exception ends this request and not the stream
            failure = as_service_error(error)
            self.telemetry.call_failed("ModelStreamInfer", failure.code.name)
            answer = pb.ModelInferResponse(id=request.id)
            return pb.ModelStreamInferResponse(error_message=str(failure), infer_response=answer)
        self.telemetry.call_answered("ModelStreamInfer", perf_counter() - started)
        return response


def model_statistics(model: Model) -> pb.ModelStatistics:
    """A model's statistics in Triton's terms. Input and output are not copied separately, so their durations stay empty."""
    recorded = model.telemetry
    batches = sorted(recorded.batches.copy().items())  # a copy, as the engine's thread may add to it meanwhile
    requests = {"success": recorded.success, "fail": recorded.fail, "queue": recorded.queue, "compute_infer": recorded.compute}
    return pb.ModelStatistics(
        name=model.card.name,
        version=model.card.version,
        last_inference=round(recorded.last_inference * 1e3),
        inference_count=sum(rows * batch.count for rows, batch in batches),
        execution_count=sum(batch.count for _, batch in batches),
        inference_stats=pb.InferStatistics(**{name: statistic_duration(each) for name, each in requests.items()}),
        batch_stats=[pb.InferBatchStatistics(batch_size=rows, compute_infer=statistic_duration(batch)) for rows, batch in batches],
    )


def statistic_duration(duration: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=duration.count, ns=round(duration.seconds * 1e9))
