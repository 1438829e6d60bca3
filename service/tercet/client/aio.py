"""The client for asyncio: methods and errors are those of tercet.client.Client."""

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import grpc.aio
import numpy as np

from tercet.client import AHEAD, BaseClient, codecs
from tercet.client.codecs import Assessment, Chunk, Chunker, Codec, Digit, Prediction, Row, Word
from tercet.proto.fizzbuzz_pb2 import CountRequest
from tercet.proto.fizzbuzz_pb2_grpc import FizzBuzzStub
from tercet.proto.inference_pb2 import ModelConfig, ModelConfigRequest, RepositoryIndexRequest
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub

if TYPE_CHECKING:
    from tercet.client.codecs import Picture

Patient: TypeAlias = Mapping[str, float | None]
Rows: TypeAlias = AsyncIterable[Row] | Iterable[Row]


class AsyncClient(BaseClient):
    """tercet.Client for asyncio. Create it in a running loop: `async with AsyncClient(address) as client`. Tasks may share it.

    The `*_each` methods take an asynchronous iterator, or an ordinary one that does not block.
    """

    _grpc, _lock = grpc.aio, asyncio.Lock

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._channel.close()

    async def health(self, name: str = "") -> str:
        from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415  not in a plain client install

        stub = health_pb2_grpc.HealthStub(self._channel)
        response = await stub.Check(health_pb2.HealthCheckRequest(service=name), **self._options)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    async def models(self) -> list[str]:
        stub = GRPCInferenceServiceStub(self._channel)
        return [model.name for model in (await stub.RepositoryIndex(RepositoryIndexRequest(), **self._options)).models]

    async def config(self, model: str) -> ModelConfig:
        async with self._config_lock:
            if model not in self._configs:
                stub = GRPCInferenceServiceStub(self._channel)
                self._configs[model] = (await stub.ModelConfig(ModelConfigRequest(name=model), **self._options)).config
            return self._configs[model]

    async def classify(self, images: Iterable["Picture"]) -> list[Digit]:
        return list(chain.from_iterable(await self._batch(codecs.DigitsCodec(), images)))

    def classify_each(self, images: Rows["Picture"], *, ahead: int = AHEAD) -> AsyncIterator[Digit]:
        return self._stream(codecs.DigitsCodec(), images, ahead)

    async def assess(self, patients: Iterable[Patient]) -> list[Assessment]:
        return list(chain.from_iterable(await self._batch(codecs.DiabetesCodec(), patients)))

    def assess_each(self, patients: Rows[Patient], *, ahead: int = AHEAD) -> AsyncIterator[Assessment]:
        return self._stream(codecs.DiabetesCodec(), patients, ahead)

    async def answer(self, numbers: Iterable[int]) -> list[Word]:
        return list(chain.from_iterable(await self._batch(codecs.FizzBuzzCodec(), numbers)))

    def answer_each(self, numbers: Rows[int], *, ahead: int = AHEAD) -> AsyncIterator[Word]:
        return self._stream(codecs.FizzBuzzCodec(), numbers, ahead)

    async def count(self, start: int, stop: int, step: int = 1) -> AsyncIterator[tuple[int, Word]]:
        call = FizzBuzzStub(self._channel).Count(CountRequest(start=start, stop=stop, step=step), **self._options)
        try:
            async for response in call:
                yield response.number, Word(response.word, response.model)
        finally:
            call.cancel()

    async def infer(self, model: str, rows: Any) -> np.ndarray:
        batch = await self._batch(codecs.TensorCodec(await self.config(model)), rows)
        return np.concatenate([np.asarray(outputs) for outputs in batch])

    async def infer_each(self, model: str, rows: Rows[Any], *, ahead: int = AHEAD) -> AsyncIterator[np.ndarray]:
        async for output in self._stream(codecs.TensorCodec(await self.config(model)), rows, ahead):
            yield output

    async def _batch(self, codec: Codec[Row, Prediction], rows: Iterable[Row]) -> list[Iterable[Prediction]]:
        batch = codec.chunks(rows, (await self.config(codec.model)).max_batch_size)
        return [predictions async for predictions in self._call(codec, _each(batch), codecs.CALLS_IN_FLIGHT)]

    async def _stream(self, codec: Codec[Row, Prediction], rows: Rows[Row], ahead: int) -> AsyncIterator[Prediction]:
        max_rows, calls = codecs.stream_limits((await self.config(codec.model)).max_batch_size, ahead)
        async for predictions in self._call(codec, _chunks(Chunker(codec, max_rows), rows), calls):
            for prediction in predictions:
                yield prediction

    async def _call(
        self, codec: Codec[Any, Prediction], requests: AsyncIterable[Chunk], calls: int
    ) -> AsyncIterator[Iterable[Prediction]]:
        method, waiting = codec.method(self._channel), deque[tuple[Chunk, Any]]()
        try:
            async for chunk in requests:
                waiting.append((chunk, method(chunk.request, **self._options)))
                if len(waiting) == calls:
                    yield await self._result(codec, *waiting.popleft())
            while waiting:
                yield await self._result(codec, *waiting.popleft())
        finally:
            for _, call in waiting:
                call.cancel()

    async def _result(self, codec: Codec[Any, Prediction], chunk: Chunk, call: Any) -> Iterable[Prediction]:
        with self._errors_of(codec, chunk):
            return codec.decode(await call)


async def _each(rows: Rows[Row]) -> AsyncIterator[Row]:
    if isinstance(rows, AsyncIterable):
        async for row in rows:
            yield row
    else:
        for row in rows:
            yield row


async def _chunks(chunker: Chunker, rows: Rows[Any]) -> AsyncIterator[Chunk]:
    async for row in _each(rows):
        if chunk := chunker.add(row):
            yield chunk
    if chunk := chunker.flush():
        yield chunk
