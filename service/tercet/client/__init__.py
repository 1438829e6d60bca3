"""The client of the service; its twin for asyncio is in aio.py, and the conversion of rows to messages and back in codecs.py."""

import json
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import grpc

from tercet.client import codecs
from tercet.client.codecs import MEASUREMENTS, Assessment, Chunk, Codec, Digit, Prediction, Row, Word
from tercet.proto import inference_pb2 as oip
from tercet.proto.fizzbuzz_pb2 import CountRequest
from tercet.proto.fizzbuzz_pb2_grpc import FizzBuzzStub
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub

if TYPE_CHECKING:
    import numpy as np

    from tercet.client.codecs import Picture

__all__ = ["BALANCED", "MEASUREMENTS", "OPTIONS", "SERVICE_CONFIG", "Assessment", "Client", "Digit", "Word"]

AHEAD = 1024  # rows
_RETRY_POLICY = {
    "maxAttempts": 5,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],  # the latter is what gRPC returns while a server stops
}
_RETRIES = {"methodConfig": [{"name": [{}], "retryPolicy": _RETRY_POLICY}]}  # of every method: all are safe to repeat
SERVICE_CONFIG = json.dumps(_RETRIES)  # the channel option `grpc.service_config`, for any gRPC client
OPTIONS = {
    "grpc.service_config": SERVICE_CONFIG,
    "grpc.per_rpc_retry_buffer_size": 2**26,  # bytes; a call that has sent more is not retried (gRPC default: 256 KiB)
    "grpc.max_receive_message_length": -1,
    "grpc.keepalive_time_ms": 10_000,  # detect a vanished peer while a call is waiting (gRPC default: never)
    "grpc.keepalive_timeout_ms": 5_000,  # on Linux this also limits how long sent data may stay unacknowledged
    "grpc.http2.max_pings_without_data": 0,  # no limit (gRPC default: the third ping would come a minute later)
    "grpc.http2.ping_timeout_ms": 15_000,  # of bandwidth probes, which hold back keepalive pings until they end
}
_ROUND_ROBIN = {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}
BALANCED = {  # for an address that names several hosts
    **OPTIONS,
    "grpc.service_config": json.dumps({**_RETRIES, **_ROUND_ROBIN}),
    "grpc.max_reconnect_backoff_ms": 10_000,  # to find a host again soon after it returns (gRPC default: 2 min)
}


class BaseClient:
    """What both clients share: the channel, the options of each call, and the models' configurations."""

    _grpc: Any  # the module that opens channels
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
        """Connect lazily to `address`, host:port. `token` is sent with each call; `timeout` is the deadline of a call in seconds.

        `tls_ca`, a PEM file of trusted CAs, enables TLS; `tls_certificate` and `tls_key` add a client certificate (mTLS).

        `balanced` spreads calls over all hosts of an address such as `ipv4:10.0.0.1:8001,10.0.0.2:8001` or `dns:tercet:8001` whose
        health is SERVING. Leave it off for a single service or behind a load balancer, where one host that stops would speak for
        all. With TLS use a DNS name, since no certificate matches a list of addresses.

        Raises OSError for a file that cannot be read, and ValueError for an incomplete set of TLS files.
        """
        if (tls_certificate is None) != (tls_key is None) or (tls_key and not tls_ca):
            raise ValueError("a client certificate and its key go together, and need the CAs to trust")
        options = list((BALANCED if balanced else OPTIONS).items())
        if tls_ca:
            files = [path.read_bytes() if path else None for path in (tls_ca, tls_key, tls_certificate)]
            self._channel = self._grpc.secure_channel(address, grpc.ssl_channel_credentials(*files), options)
        else:
            self._channel = self._grpc.insecure_channel(address, options)
        self._oip: Any = GRPCInferenceServiceStub(self._channel)
        self._options = {"timeout": timeout, "metadata": [("authorization", f"Bearer {token}")] if token else None}
        self._configs: dict[str, oip.ModelConfig] = {}  # by model
        self._config_lock = self._lock()  # several first calls request a configuration once

    def _check_health(self, name: str) -> Any:
        """The response, or for asyncio a call to await."""
        from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415  not in a plain client install

        return health_pb2_grpc.HealthStub(self._channel).Check(health_pb2.HealthCheckRequest(service=name), **self._options)

    def _count(self, start: int, stop: int, step: int) -> Any:
        return FizzBuzzStub(self._channel).Count(CountRequest(start=start, stop=stop, step=step), **self._options)

    @contextmanager
    def _errors_of(self, codec: Codec[Any, Any], chunk: Chunk) -> Iterator[None]:
        """Rewrite the error of a chunk's call to refer to the whole batch."""
        try:
            yield
        except grpc.RpcError as error:
            self._configs.pop(codec.model, None)  # the service may have restarted with other limits
            raise codecs.with_batch_indices(error, codec.field, chunk) from None


class Client(BaseClient):
    """A client of the service. Use it as a context manager; threads may share it.

    Rows that cannot be sent raise ValueError or TypeError; a call that fails raises grpc.RpcError, with code() and details().
    Calls that a stopping service leaves unanswered are retried until their deadline: see SERVICE_CONFIG. A batch with more rows
    than the service accepts per request is sent in chunks, each a call with its own deadline.

    The `*_each` methods are for input of any length: they read rows from an iterator and yield predictions in order. They read at
    most `ahead` rows past the last prediction you consumed (back-pressure); with `ahead=1` each row is answered before the next is
    read. They make unary calls: a gRPC stream could not be retried, has one deadline for everything, and reads ahead without limit.
    """

    _grpc, _lock = grpc, threading.Lock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def health(self, name: str = "") -> str:
        """SERVING, NOT_SERVING or UNKNOWN, of a model or of the whole service."""
        response = self._check_health(name)
        return str(response.ServingStatus.Name(response.status))

    def models(self) -> list[str]:
        """Names of all models that the service knows, loaded or not."""
        return [model.name for model in self._oip.RepositoryIndex(oip.RepositoryIndexRequest(), **self._options).models]

    def config(self, model: str) -> oip.ModelConfig:
        """The tensors of a model, its limit of rows per request, and texts of its card; requested once per model."""
        with self._config_lock:
            if model not in self._configs:
                self._configs[model] = self._oip.ModelConfig(oip.ModelConfigRequest(name=model), **self._options).config
            return self._configs[model]

    def classify(self, images: Iterable["Picture"]) -> list[Digit]:
        """Recognise digits in pictures.

        A picture is a path or the bytes of a PNG or JPEG file, a PIL image, or an array, (28, 28) uint8, 0 = paper, 255 = ink.
        Raises OSError for a path that cannot be read.
        """
        return list(chain.from_iterable(self._batch(codecs.DigitsCodec(), images)))

    def classify_each(self, images: Iterable["Picture"], *, ahead: int = AHEAD) -> Iterator[Digit]:
        return self._stream(codecs.DigitsCodec(), images, ahead)

    def assess(self, patients: Iterable[Mapping[str, float | None]]) -> list[Assessment]:
        """Estimate the probability of diabetes; a patient maps names of MEASUREMENTS to values, None or absent: not measured."""
        return list(chain.from_iterable(self._batch(codecs.DiabetesCodec(), patients)))

    def assess_each(self, patients: Iterable[Mapping[str, float | None]], *, ahead: int = AHEAD) -> Iterator[Assessment]:
        return self._stream(codecs.DiabetesCodec(), patients, ahead)

    def answer(self, numbers: Iterable[int]) -> list[Word]:
        """The FizzBuzz word of each 64-bit integer."""
        return list(chain.from_iterable(self._batch(codecs.FizzBuzzCodec(), numbers)))

    def answer_each(self, numbers: Iterable[int], *, ahead: int = AHEAD) -> Iterator[Word]:
        return self._stream(codecs.FizzBuzzCodec(), numbers, ahead)

    def count(self, start: int, stop: int, step: int = 1) -> Iterator[tuple[int, Word]]:
        """Count from start to stop, both included, in one server stream with one deadline; yields pairs of number and word."""
        call = self._count(start, stop, step)
        try:
            for response in call:
                yield response.number, Word(response.word, response.model)
        finally:
            call.cancel()

    def infer(self, model: str, rows: Any) -> "np.ndarray":
        """Run any model over the Open Inference Protocol: (batch, *input shape) -> (batch, *output shape)."""
        import numpy as np  # noqa: PLC0415  the typed methods start sooner without it

        return np.concatenate([np.asarray(outputs) for outputs in self._batch(codecs.TensorCodec(self.config(model)), rows)])

    def infer_each(self, model: str, rows: Iterable[Any], *, ahead: int = AHEAD) -> Iterator["np.ndarray"]:
        """Run any model on rows as they come: each (*input shape) -> (*output shape)."""
        yield from self._stream(codecs.TensorCodec(self.config(model)), rows, ahead)

    def _batch(self, codec: Codec[Row, Prediction], rows: Iterable[Row]) -> Iterator[Iterable[Prediction]]:
        """The predictions for a batch, chunk by chunk."""
        batch = codec.chunks(rows, self.config(codec.model).max_batch_size)
        if len(batch) > 1:
            yield from self._call(codec, iter(batch), codecs.CALLS_IN_FLIGHT)
        else:  # a blocking call costs less CPU time than a future
            with self._errors_of(codec, batch[0]):
                yield codec.decode(codec.method(self._channel)(batch[0].request, **self._options))

    def _stream(self, codec: Codec[Row, Prediction], rows: Iterable[Row], ahead: int) -> Iterator[Prediction]:
        max_rows, calls = codecs.stream_limits(self.config(codec.model).max_batch_size, ahead)
        for predictions in self._call(codec, codecs.chunks(codec, rows, max_rows), calls):
            yield from predictions

    def _call(self, codec: Codec[Any, Prediction], chunks: Iterator[Chunk], calls: int) -> Iterator[Iterable[Prediction]]:
        """Predictions per chunk, in order, with at most `calls` calls in flight."""
        method, in_flight = codec.method(self._channel), deque[tuple[Chunk, Any]]()
        try:
            while True:
                while len(in_flight) < calls and (chunk := next(chunks, None)):
                    in_flight.append((chunk, method.future(chunk.request, **self._options)))
                if not in_flight:
                    return
                chunk, call = in_flight.popleft()
                with self._errors_of(codec, chunk):
                    predictions = codec.decode(call.result())
                yield predictions
        finally:
            for _, call in in_flight:
                call.cancel()
