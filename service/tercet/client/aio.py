"""The client for asyncio: methods and errors are those of tercet.client.Client."""

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import grpc.aio
import numpy as np

from tercet.client import AHEAD, BaseClient, codecs
from tercet.client.codecs import Assessment, Chunk, Codec, Digit, Prediction, Row, Word
from tercet.proto import inference_pb2 as oip

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

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def health(self, name: str = "") -> str:
        response = await self._check_health(name)
        return str(response.ServingStatus.Name(response.status))

    async def models(self) -> list[str]:
        return [model.name for model in (await self._oip.RepositoryIndex(oip.RepositoryIndexRequest(), **self._options)).models]

    async def config(self, model: str) -> oip.ModelConfig:
        async with self._config_lock:
            if model not in self._configs:
                self._configs[model] = (await self._oip.ModelConfig(oip.ModelConfigRequest(name=model), **self._options)).config
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
        call = self._count(start, stop, step)
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
        chunks = codec.chunks(rows, (await self.config(codec.model)).max_batch_size)
        return [predictions async for predictions in self._call(codec, _each(chunks), codecs.CALLS_IN_FLIGHT)]

    async def _stream(self, codec: Codec[Row, Prediction], rows: Rows[Row], ahead: int) -> AsyncIterator[Prediction]:
        max_rows, calls = codecs.stream_limits((await self.config(codec.model)).max_batch_size, ahead)
        async for predictions in self._call(codec, _chunks(codec, rows, max_rows), calls):
            for prediction in predictions:
                yield prediction

    async def _call(
        self, codec: Codec[Any, Prediction], chunks: AsyncIterator[Chunk], calls: int
    ) -> AsyncIterator[Iterable[Prediction]]:
        method, in_flight = codec.method(self._channel), deque[tuple[Chunk, Any]]()
        try:
            while True:
                while len(in_flight) < calls and (chunk := await anext(chunks, None)):
                    in_flight.append((chunk, method(chunk.request, **self._options)))
                if not in_flight:
                    return
                chunk, call = in_flight.popleft()
                with self._errors_of(codec, chunk):
                    predictions = codec.decode(await call)
                yield predictions
        finally:
            for _, call in in_flight:
                call.cancel()


async def _each(rows: Rows[Row]) -> AsyncIterator[Row]:
    if isinstance(rows, AsyncIterable):
        async for row in rows:
            yield row
    else:
        for row in rows:
            yield row


async def _chunks(codec: Codec[Row, Any], rows: Rows[Row], max_rows: int) -> AsyncIterator[Chunk]:
    chunker = codecs.Chunker(codec, max_rows)
    async for row in _each(rows):
        if chunk := chunker.add(row):
            yield chunk
    if chunk := chunker.flush():
        yield chunk
