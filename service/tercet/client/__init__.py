"""Clients of the service: `Client`, and `AsyncClient` for asyncio. What is sent and what comes back is in messages.py."""

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc
import grpc.aio
import numpy as np

from tercet.client.codecs import (
    CALLS,
    MEASUREMENTS,
    Answer,
    Assessment,
    Digit,
    Digits,
    Face,
    Numbers,
    Part,
    Patients,
    Row,
    Tensors,
    Word,
    each,
    located,
    split,
    split_async,
    window,
)
from tercet.proto.fizzbuzz_pb2 import CountRequest
from tercet.proto.fizzbuzz_pb2_grpc import FizzBuzzStub
from tercet.proto.inference_pb2 import ModelConfig, ModelConfigRequest
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub

if TYPE_CHECKING:
    from tercet.client.codecs import Picture

__all__ = ["BALANCED", "MEASUREMENTS", "OPTIONS", "SERVICE_CONFIG", "Assessment", "AsyncClient", "Client", "Digit", "Word"]

AHEAD = 1024  # rows
_CALLS = {
    "methodConfig": [
        {
            "name": [{}],  # every method: to repeat one does no harm
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],  # the latter is gRPC's answer as a server ends
            },
        }
    ]
}
SERVICE_CONFIG = json.dumps(_CALLS)  # gRPC's standard retry policy, for any client: the channel option `grpc.service_config`
OPTIONS = {
    "grpc.service_config": SERVICE_CONFIG,
    "grpc.per_rpc_retry_buffer_size": 2**26,  # bytes; a call that has sent more is not tried again, and the default is 256 KiB
    "grpc.max_receive_message_length": -1,
    "grpc.keepalive_time_ms": 10_000,  # a peer that vanished is noticed while a call waits for it; never in gRPC
    "grpc.keepalive_timeout_ms": 5_000,  # Linux also gives up what it has sent and nobody acknowledged for so long
    "grpc.http2.max_pings_without_data": 0,  # no limit; with gRPC's, the third would come a minute later
    "grpc.http2.ping_timeout_ms": 15_000,  # of a ping that measures the network: none for keepalive is sent before it is over
}
BALANCED = {  # for an address of several hosts
    **OPTIONS,
    "grpc.service_config": json.dumps(
        {**_CALLS, "loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}
    ),
    "grpc.max_reconnect_backoff_ms": 10_000,  # a host that is back is found so soon; 2 min in gRPC
}


class _Connected:
    """A channel, and what a client has learnt over it."""

    _grpc: Any  # opens channels
    _lock: Any

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls_ca: Path | None = None,
        tls_certificate: Path | None = None,
        tls_key: Path | None = None,
        timeout: float = 30.0,
        balanced: bool = False,
    ) -> None:
        """`token` is sent with each call when the service wants one; `timeout` is the deadline of each call, in seconds.

        `balanced` spreads calls over all services that the address names, `ipv4:10.0.0.1:8001,10.0.0.2:8001` or `dns:tercet:8001`,
        but for those whose health is not SERVING. Leave it off for one service and behind a balancer, where one that ends would
        speak for all. Over TLS give a name: no certificate is for a list.

        With `tls_ca`, a PEM file of the authorities to trust, calls go over TLS; with `tls_certificate` and `tls_key`, mTLS.
        Raises OSError when one of the files cannot be read, ValueError when one is missing: nothing goes in plain text by mistake.
        """
        if (tls_certificate is None) != (tls_key is None) or (tls_key and not tls_ca):
            raise ValueError("a certificate and its key go together, and need the authorities to trust")
        options = list((BALANCED if balanced else OPTIONS).items())
        if tls_ca:
            files = [path.read_bytes() if path else None for path in (tls_ca, tls_key, tls_certificate)]
            self._channel = self._grpc.secure_channel(address, grpc.ssl_channel_credentials(*files), options)
        else:
            self._channel = self._grpc.insecure_channel(address, options)
        self._call: dict[str, Any] = {"timeout": timeout, "metadata": [("authorization", f"Bearer {token}")] if token else None}
        self._configs: dict[str, ModelConfig] = {}  # by model
        self._asking = self._lock()  # for one of them: once is enough

    @contextmanager
    def _part(self, face: Face[Any, Any], part: Part) -> Iterator[None]:
        """Where a part's answers are waited for: an error is told as of the whole."""
        try:
            yield
        except grpc.RpcError as error:
            self._configs.pop(face.model, None)  # another one may have come
            raise located(error, face, part) from None


class Client(_Connected):
    """Calls a service at `address`, host:port. Use it as a context manager; threads may share it.

    Values that cannot be sent raise ValueError or TypeError before any row is sent; a call that fails raises grpc.RpcError, with
    code() and details(). A call that a dying worker or a service that shuts down does not answer is tried again until its deadline:
    see SERVICE_CONFIG. A batch of more rows than the service takes at a time goes in parts, each a call with its own deadline.

    The methods `..._each` are for input without an end: they read rows from an iterator, ask for some at a time, and yield the
    answers in order, until a call fails. They read at most `ahead` rows beyond those whose answers have been taken, so a slow
    consumer holds the producer back; where rows come slowly, a small `ahead` brings answers sooner: with 1 each row is answered
    before the next is read. These are unary calls too and no stream of gRPC, which would not be tried again, has one deadline for
    all, and reads on in a thread for as long as buffers of unknown size take more.
    """

    _grpc, _lock = grpc, threading.Lock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._channel.close()

    def health(self, name: str = "") -> str:
        """SERVING, NOT_SERVING or UNKNOWN: the whole service, or a model."""
        from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415  a client alone does without

        response = health_pb2_grpc.HealthStub(self._channel).Check(health_pb2.HealthCheckRequest(service=name), **self._call)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    def classify(self, images: Iterable["Picture"]) -> list[Digit]:
        """Read digits: paths of PNG or JPEG files, their bytes, PIL images, or arrays, (28, 28) uint8, 0 = paper, 255 = ink.

        Raises OSError for a path that cannot be read.
        """
        return list(chain.from_iterable(self._batch(Digits(), images)))

    def classify_each(self, images: Iterable["Picture"], *, ahead: int = AHEAD) -> Iterator[Digit]:
        """Read digits as they come."""
        return self._stream(Digits(), images, ahead)

    def assess(self, patients: Iterable[Mapping[str, float | None]]) -> list[Assessment]:
        """Assess patients; each maps names of MEASUREMENTS to values, and leaves out what was not measured, or has None for it."""
        return list(chain.from_iterable(self._batch(Patients(), patients)))

    def assess_each(self, patients: Iterable[Mapping[str, float | None]], *, ahead: int = AHEAD) -> Iterator[Assessment]:
        """Assess patients as they come."""
        return self._stream(Patients(), patients, ahead)

    def answer(self, numbers: Iterable[int]) -> list[Word]:
        """What to say for each number: a str whose `model` names the model that says so."""
        return list(chain.from_iterable(self._batch(Numbers(), numbers)))

    def answer_each(self, numbers: Iterable[int], *, ahead: int = AHEAD) -> Iterator[Word]:
        """What to say for numbers as they come."""
        return self._stream(Numbers(), numbers, ahead)

    def count(self, start: int, stop: int, step: int = 1) -> Iterator[tuple[int, Word]]:
        """Count from start to stop, both included: pairs of number and word, as the service sends them, within one deadline."""
        call = FizzBuzzStub(self._channel).Count(CountRequest(start=start, stop=stop, step=step), **self._call)
        try:
            for response in call:
                yield response.number, Word(response.word, response.model)
        finally:
            call.cancel()

    def infer(self, model: str, rows: Any) -> np.ndarray:
        """Ask any model over the Open Inference Protocol: (batch, *input shape) -> (batch, *output shape)."""
        return np.concatenate([np.asarray(part) for part in self._batch(Tensors(self.config(model)), rows)])

    def infer_each(self, model: str, rows: Iterable[Any], *, ahead: int = AHEAD) -> Iterator[np.ndarray]:
        """Ask any model for rows as they come: each (*input shape) -> (*output shape)."""
        yield from self._stream(Tensors(self.config(model)), rows, ahead)

    def config(self, model: str) -> ModelConfig:
        """What the service says of a model: tensors, the most rows of a call, and what its card tells people; asked once."""
        with self._asking:
            if model not in self._configs:
                stub = GRPCInferenceServiceStub(self._channel)
                self._configs[model] = stub.ModelConfig(ModelConfigRequest(name=model), **self._call).config
            return self._configs[model]

    def _batch(self, face: Face[Row, Answer], rows: Iterable[Row]) -> Iterator[Iterable[Answer]]:
        """The answers to all rows, part by part."""
        parts = face.split(rows, self.config(face.model).max_batch_size)
        if len(parts) > 1:
            return self._ask(face, parts, CALLS)
        with self._part(face, parts[0]):  # a call that is not shared with another thread takes less time
            return iter([face.read(face.method(self._channel)(parts[0].request, **self._call))])

    def _stream(self, face: Face[Row, Answer], rows: Iterable[Row], ahead: int) -> Iterator[Answer]:
        """The answers to rows as they come."""
        most, calls = window(self.config(face.model).max_batch_size, ahead)
        yield from chain.from_iterable(self._ask(face, split(face, rows, most), calls))

    def _ask(self, face: Face[Any, Answer], parts: Iterable[Part], calls: int) -> Iterator[Iterable[Answer]]:
        """The answers to parts, in order, with at most so many calls in flight."""
        method, waiting = face.method(self._channel), deque[tuple[Part, Any]]()
        try:
            for part in parts:
                waiting.append((part, method.future(part.request, **self._call)))
                if len(waiting) == calls:
                    yield self._wait(face, *waiting.popleft())
            while waiting:
                yield self._wait(face, *waiting.popleft())
        finally:
            for _, call in waiting:
                call.cancel()

    def _wait(self, face: Face[Any, Answer], part: Part, call: Any) -> Iterable[Answer]:
        """The answers to a part."""
        with self._part(face, part):
            return face.read(call.result())


class AsyncClient(_Connected):
    """What Client is, for asyncio: made in a running loop, `async with AsyncClient(address) as client`, and tasks may share it.

    Methods that take input without an end take an asynchronous iterator, or an ordinary one that does not block.
    """

    _grpc, _lock = grpc.aio, asyncio.Lock

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._channel.close()

    async def health(self, name: str = "") -> str:
        """As Client.health."""
        from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415  a client alone does without

        response = await health_pb2_grpc.HealthStub(self._channel).Check(health_pb2.HealthCheckRequest(service=name), **self._call)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    async def classify(self, images: Iterable["Picture"]) -> list[Digit]:
        """As Client.classify."""
        return list(chain.from_iterable(await self._batch(Digits(), images)))

    def classify_each(self, images: AsyncIterable["Picture"] | Iterable["Picture"], *, ahead: int = AHEAD) -> AsyncIterator[Digit]:
        """As Client.classify_each."""
        return self._stream(Digits(), images, ahead)

    async def assess(self, patients: Iterable[Mapping[str, float | None]]) -> list[Assessment]:
        """As Client.assess."""
        return list(chain.from_iterable(await self._batch(Patients(), patients)))

    def assess_each(
        self,
        patients: AsyncIterable[Mapping[str, float | None]] | Iterable[Mapping[str, float | None]],
        *,
        ahead: int = AHEAD,
    ) -> AsyncIterator[Assessment]:
        """As Client.assess_each."""
        return self._stream(Patients(), patients, ahead)

    async def answer(self, numbers: Iterable[int]) -> list[Word]:
        """As Client.answer."""
        return list(chain.from_iterable(await self._batch(Numbers(), numbers)))

    def answer_each(self, numbers: AsyncIterable[int] | Iterable[int], *, ahead: int = AHEAD) -> AsyncIterator[Word]:
        """As Client.answer_each."""
        return self._stream(Numbers(), numbers, ahead)

    async def count(self, start: int, stop: int, step: int = 1) -> AsyncIterator[tuple[int, Word]]:
        """As Client.count."""
        call = FizzBuzzStub(self._channel).Count(CountRequest(start=start, stop=stop, step=step), **self._call)
        try:
            async for response in call:
                yield response.number, Word(response.word, response.model)
        finally:
            call.cancel()

    async def infer(self, model: str, rows: Any) -> np.ndarray:
        """As Client.infer."""
        return np.concatenate([np.asarray(part) for part in await self._batch(Tensors(await self.config(model)), rows)])

    async def infer_each(
        self, model: str, rows: AsyncIterable[Any] | Iterable[Any], *, ahead: int = AHEAD
    ) -> AsyncIterator[np.ndarray]:
        """As Client.infer_each."""
        async for answer in self._stream(Tensors(await self.config(model)), rows, ahead):
            yield answer

    async def config(self, model: str) -> ModelConfig:
        """As Client.config."""
        async with self._asking:
            if model not in self._configs:
                stub = GRPCInferenceServiceStub(self._channel)
                self._configs[model] = (await stub.ModelConfig(ModelConfigRequest(name=model), **self._call)).config
            return self._configs[model]

    async def _batch(self, face: Face[Row, Answer], rows: Iterable[Row]) -> list[Iterable[Answer]]:
        parts = face.split(rows, (await self.config(face.model)).max_batch_size)
        return [answers async for answers in self._ask(face, each(parts), CALLS)]

    async def _stream(self, face: Face[Row, Answer], rows: AsyncIterable[Row] | Iterable[Row], ahead: int) -> AsyncIterator[Answer]:
        most, calls = window((await self.config(face.model)).max_batch_size, ahead)
        async for answers in self._ask(face, split_async(face, rows, most), calls):
            for answer in answers:
                yield answer

    async def _ask(self, face: Face[Any, Answer], parts: AsyncIterable[Part], calls: int) -> AsyncIterator[Iterable[Answer]]:
        method, waiting = face.method(self._channel), deque[tuple[Part, Any]]()
        try:
            async for part in parts:
                waiting.append((part, method(part.request, **self._call)))
                if len(waiting) == calls:
                    yield await self._wait(face, *waiting.popleft())
            while waiting:
                yield await self._wait(face, *waiting.popleft())
        finally:
            for _, call in waiting:
                call.cancel()

    async def _wait(self, face: Face[Any, Answer], part: Part, call: Any) -> Iterable[Answer]:
        with self._part(face, part):
            return face.read(await call)
