"""A synchronous client of the service, as the command line uses it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc
import numpy as np

from proto import diabetes_pb2_grpc, digits_pb2_grpc, fizzbuzz_pb2_grpc, inference_pb2_grpc
from proto.diabetes_pb2 import AssessRequest, Patient
from proto.digits_pb2 import ClassifyRequest, Image
from proto.fizzbuzz_pb2 import AnswerRequest, CountRequest
from proto.inference_pb2 import ModelInferRequest, ModelMetadataRequest

DTYPES = {"UINT8": "u1", "INT64": "<i8", "FP32": "<f4"}
SERVICE_CONFIG = json.dumps(  # gRPC's standard retry policy, for any client: the channel option `grpc.service_config`
    {
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
)
OPTIONS = {
    "grpc.service_config": SERVICE_CONFIG,
    "grpc.per_rpc_retry_buffer_size": 2**26,  # bytes; a call that has sent more is not tried again, and the default is 256 KiB
    "grpc.max_receive_message_length": -1,
}
MEASUREMENTS = tuple(Patient.DESCRIPTOR.fields_by_name)


class Digit(NamedTuple):
    """A digit that was read, and the probabilities of all ten."""

    digit: int
    probabilities: list[float]


class Assessment(NamedTuple):
    """The probability of a positive diabetes test, and the label that follows from it."""

    probability: float
    label: str


class Client:
    """Calls a service at `address`, host:port. Use it as a context manager. Every method raises grpc.RpcError.

    A call that a dying worker or a service that shuts down does not answer is tried again: see SERVICE_CONFIG.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls_ca: Path | None = None,
        tls_certificate: Path | None = None,
        tls_key: Path | None = None,
        timeout: float = 30.0,
    ) -> None:
        """`token` is sent with each call when the service wants one; `timeout` is each call's deadline in seconds.

        With `tls_ca`, a PEM file of the authorities to trust, calls go over TLS; with `tls_certificate` and `tls_key`, mTLS.
        Raises OSError when one of the files cannot be read, ValueError when one is missing: nothing goes in plain text by mistake.
        """
        if (tls_certificate is None) != (tls_key is None) or (tls_key and not tls_ca):
            raise ValueError("a certificate and its key go together, and need the authorities to trust")
        options = list(OPTIONS.items())
        if tls_ca:
            files = [path.read_bytes() if path else None for path in (tls_ca, tls_key, tls_certificate)]
            self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(*files), options)
        else:
            self._channel = grpc.insecure_channel(address, options)
        self._call: dict[str, Any] = {"timeout": timeout, "metadata": [("authorization", f"Bearer {token}")] if token else None}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._channel.close()

    def health(self, name: str = "") -> str:
        """SERVING, NOT_SERVING or UNKNOWN: the whole service, or a model."""
        from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415  a client alone does without

        response = health_pb2_grpc.HealthStub(self._channel).Check(health_pb2.HealthCheckRequest(service=name), **self._call)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))

    def classify(self, images: Sequence[bytes | np.ndarray]) -> list[Digit]:
        """Read digits: PNG or JPEG files given as their bytes, or arrays, (28, 28) uint8, 0 = paper, 255 = ink."""
        pictures = [Image(encoded=image) if isinstance(image, bytes) else Image(pixels=image.tobytes()) for image in images]
        request = ClassifyRequest(images=pictures)
        response = digits_pb2_grpc.DigitsStub(self._channel).Classify(request, **self._call)
        return [Digit(digit.digit, list(digit.probabilities)) for digit in response.digits]

    def assess(self, patients: Sequence[Mapping[str, float]]) -> list[Assessment]:
        """Assess patients; each maps names of MEASUREMENTS to values, and leaves out what was not measured."""
        request = AssessRequest(patients=[Patient(**patient) for patient in patients])
        response = diabetes_pb2_grpc.DiabetesStub(self._channel).Assess(request, **self._call)
        return [Assessment(assessment.probability, assessment.label) for assessment in response.assessments]

    def answer(self, numbers: Sequence[int]) -> list[str]:
        """What to say for each number."""
        return list(fizzbuzz_pb2_grpc.FizzBuzzStub(self._channel).Answer(AnswerRequest(numbers=numbers), **self._call).words)

    def count(self, start: int, stop: int, step: int = 1) -> Iterator[tuple[int, str]]:
        """Count from start to stop, both included: pairs of number and word, as the service sends them."""
        request = CountRequest(start=start, stop=stop, step=step)
        for response in fizzbuzz_pb2_grpc.FizzBuzzStub(self._channel).Count(request, **self._call):
            yield response.number, response.word

    def infer(self, model: str, rows: Any) -> np.ndarray:
        """Ask any model over the Open Inference Protocol: (batch, *input shape) -> (batch, *output shape)."""
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        tensor = stub.ModelMetadata(ModelMetadataRequest(name=model), **self._call).inputs[0]
        array = np.asarray(rows, dtype=DTYPES[tensor.datatype])
        request = ModelInferRequest(model_name=model, raw_input_contents=[array.tobytes()])
        request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=array.shape)
        response = stub.ModelInfer(request, **self._call)
        output = response.outputs[0]
        return np.frombuffer(response.raw_output_contents[0], DTYPES[output.datatype]).reshape(tuple(output.shape))
