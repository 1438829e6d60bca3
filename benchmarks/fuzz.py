"""Fuzz a running server: `python -m benchmarks.fuzz`, with trained models; `--requests 20000` for a minute.

Valid requests of every method are damaged, as messages (fields cleared, repeated, set to other values) or as bytes (flipped bits,
extreme numbers, pieces removed, repeated or taken from another request), and sent. Parsing the same bytes here tells which answers
are right: INVALID_ARGUMENT for bytes that are not a message, NOT_FOUND for unknown models and versions, OK for a request whose
meaning is unchanged, and as many rows as requested with every OK. Every tenth request is undamaged and must be answered as before.
The server must not answer INTERNAL or UNKNOWN, log a traceback or exit. A request with a wrong answer is printed as hex.
"""

import asyncio
import contextlib
import io
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import grpc
import numpy as np
import psutil
from google.protobuf.message import DecodeError, Message
from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from PIL import Image
from tercet.card import DATATYPES, Card, find_models, read_card
from tercet.proto import diabetes_pb2, digits_pb2, fizzbuzz_pb2, inference_pb2

from benchmarks.load import MODELS, build_request, connect, serve

REFUSED = {StatusCode.INVALID_ARGUMENT}
EXTREMES = [0, 1, -1, 127, 128, 1023, 1024, 4096, 4097, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63)]
TOLERANCE = 1e-4
MAX_FAILURES = 20


@dataclass(frozen=True)
class Seed:
    """A valid request of a method."""

    method: str
    request: Message
    response: type[Message]
    stream: str = ""  # `out`: one request, many responses; `both`: many of each
    allowed: frozenset[StatusCode] = frozenset()  # in addition to OK and INVALID_ARGUMENT, whatever the request contains


def seeds(cards: dict[str, Card]) -> list[Seed]:
    """Return valid requests of all methods. Those that load and unload name a model that does not exist."""
    inference, missing = "/inference.GRPCInferenceService/", frozenset({StatusCode.NOT_FOUND})
    valid = [
        Seed("/tercet.v1.FizzBuzz/Answer", fizzbuzz_pb2.AnswerRequest(numbers=[3, 15, 1024]), fizzbuzz_pb2.AnswerResponse),
        Seed("/tercet.v1.FizzBuzz/Count", fizzbuzz_pb2.CountRequest(start=1, stop=5), fizzbuzz_pb2.CountResponse, "out"),
        Seed("/tercet.v1.Diabetes/Assess", assess_request(cards["diabetes"]), diabetes_pb2.AssessResponse),
        *(
            Seed("/tercet.v1.Digits/Classify", request, digits_pb2.ClassifyResponse)
            for request in classify_requests(cards["mnist"])
        ),
        Seed("/grpc.health.v1.Health/Check", HealthCheckRequest(service="mnist"), HealthCheckResponse, allowed=missing),
        Seed(f"{inference}ServerLive", inference_pb2.ServerLiveRequest(), inference_pb2.ServerLiveResponse),
        Seed(f"{inference}ServerReady", inference_pb2.ServerReadyRequest(), inference_pb2.ServerReadyResponse),
        Seed(f"{inference}ServerMetadata", inference_pb2.ServerMetadataRequest(), inference_pb2.ServerMetadataResponse),
        Seed(
            f"{inference}RepositoryIndex", inference_pb2.RepositoryIndexRequest(ready=True), inference_pb2.RepositoryIndexResponse
        ),
    ]
    for kind in ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"):
        request, response = (getattr(inference_pb2, f"{kind}{end}") for end in ("Request", "Response"))
        valid.append(Seed(inference + kind, request(name="fizzbuzz"), response, allowed=missing))
    for kind in ("Load", "Unload"):
        request, response = (getattr(inference_pb2, f"RepositoryModel{kind}{end}") for end in ("Request", "Response"))
        valid.append(Seed(f"{inference}RepositoryModel{kind}", request(model_name="none such"), response, allowed=missing))
    for card in cards.values():
        raw = build_request(card, 2)
        raw.outputs.add(name=card.output.name)
        raw.parameters["priority"].int64_param = 1
        typed = inference_pb2.ModelInferRequest(model_name=card.name, model_version=card.version, id="1", inputs=raw.inputs)
        contents = getattr(typed.inputs[0].contents, DATATYPES[card.input.datatype].contents_field)
        contents.extend(card.example_rows()[:2].ravel().tolist())
        for request in (raw, typed):
            valid.append(Seed(f"{inference}ModelInfer", request, inference_pb2.ModelInferResponse, allowed=missing))
            valid.append(Seed(f"{inference}ModelStreamInfer", request, inference_pb2.ModelStreamInferResponse, "both"))
    return valid


def assess_request(card: Card) -> Message:
    names = [feature.name for feature in card.input.features]
    rows = [{name: v for name, v in zip(names, row, strict=True) if v == v} for row in card.example_rows()[:2].tolist()]  # noqa: PLR0124  not NaN
    return diabetes_pb2.AssessRequest(patients=[diabetes_pb2.Patient(**row) for row in rows])


def classify_requests(card: Card) -> list[Message]:
    """Return a digit as pixels, and in files of several formats."""
    pixels, files = card.example_rows()[0], []
    large = Image.fromarray(255 - pixels).resize((60, 90))
    for mode, kind in (("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("L", "JPEG"), ("RGB", "JPEG")):
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = 6
        large.convert(mode).save(file, kind, exif=exif, progressive=mode == "RGB")
        files.append(digits_pb2.Image(encoded=file.getvalue()))
    files.append(digits_pb2.Image(pixels=pixels.tobytes()))
    return [digits_pb2.ClassifyRequest(images=[file]) for file in files]


def varint(number: int) -> bytes:
    """Encode a number as protobuf does."""
    number, encoded = number & (2**64 - 1), bytearray()
    while number > 127:  # noqa: PLR2004  seven bits per byte
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes(encoded) + bytes([number])


def damage_bytes(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """Damage the bytes of a request in one to three ways."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        start, stop = sorted(rng.choices(range(len(damaged) + 1), k=2))
        stop = min(stop, start + 64)
        match rng.randrange(7):
            case 0 if damaged:
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            case 1 if damaged:
                damaged[rng.randrange(len(damaged))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
            case 2:
                damaged[start : start + rng.choice((0, 1))] = varint(rng.choice(EXTREMES))
            case 3:
                del damaged[start:stop]
            case 4:
                damaged[start:start] = damaged[start:stop] * rng.choice((1, 1, 2, 50))
            case 5:
                del damaged[start:]
            case 6:
                damaged += other if rng.random() < 0.5 else rng.randbytes(rng.randrange(8))  # noqa: PLR2004
    return bytes(damaged)


def damage_fields(rng: random.Random, request: Message) -> bytes:
    """Change one to three fields of a request, at any depth."""
    damaged = type(request).FromString(request.SerializeToString())
    for _ in range(rng.randint(1, 3)):
        message: Any = damaged
        while (inner := children(message)) and rng.random() < 0.7:  # noqa: PLR2004  most have one child, with most of the content
            message = rng.choice(inner)
        field = rng.choice(message.DESCRIPTOR.fields or [None])
        if field is None:
            continue
        if rng.random() < 0.2 or (field.message_type and field.message_type.GetOptions().map_entry):  # noqa: PLR2004
            message.ClearField(field.name)
        elif field.message_type:
            part = getattr(message, field.name)
            part.add() if field.is_repeated else part.SetInParent()
        else:
            with contextlib.suppress(ValueError, TypeError):  # not every number fits
                value = random_value(rng, field)
                getattr(message, field.name).append(value) if field.is_repeated else setattr(message, field.name, value)
    return bytes(damaged.SerializeToString())


def children(message: Any) -> list[Any]:
    """Return the messages in a message, except those of maps."""
    inner = []
    for field, value in message.ListFields():
        if field.message_type and not field.message_type.GetOptions().map_entry:
            inner += list(value) if field.is_repeated else [value]
    return inner


def random_value(rng: random.Random, field: Any) -> Any:
    if field.cpp_type == field.CPPTYPE_STRING:
        content = rng.choice((b"", b"fizzbuzz", b"mnist", b"1", b"INT64", b"FP32", b"\0", b"a" * 9000, rng.randbytes(8)))
        return content if field.type == field.TYPE_BYTES else content.decode("latin-1")
    return rng.choice((*EXTREMES, float("nan"), float("inf"), 1e300, -0.5, True))


class Fuzzer:
    """Sends requests and checks the answers."""

    def __init__(self, channels: list[grpc.aio.Channel], cards: dict[str, Card], seed: int) -> None:
        self.channels, self.cards, self.seeds = channels, cards, seeds(cards)
        self.contents = [seed.request.SerializeToString() for seed in self.seeds]
        self.rng = random.Random(seed)  # noqa: S311  not a secret
        self.codes: Counter[tuple[str, str]] = Counter()
        self.undamaged = 0
        self.failures: list[str] = []
        self.expected: dict[tuple[str, bytes], list[Message]] = {}

    async def learn(self) -> None:
        """Send all valid requests once and keep the answers."""
        for seed, content in zip(self.seeds, self.contents, strict=True):
            code, answers = await self.send(seed, content)
            if code != StatusCode.OK and not (code in seed.allowed and "RepositoryModel" in seed.method):
                raise SystemExit(f"{seed.method} answers {code} to a valid request")
            self.expected[seed.method, content] = answers

    async def run(self, remaining: Any) -> None:
        """Send a request for each number of an iterator that several tasks share."""
        for number in remaining:
            which = self.rng.randrange(len(self.seeds))
            seed, content = self.seeds[which], self.contents[which]
            damaged = content
            if number % 10:
                damaged = damage_fields(self.rng, seed.request) if number % 3 else content
                damaged = damage_bytes(self.rng, damaged, self.rng.choice(self.contents)) if number % 3 != 1 else damaged
            if "RepositoryModel" in seed.method and any(name.encode() in damaged for name in self.cards):
                continue  # the server would do it
            code, answers = await self.send(seed, damaged)
            self.codes[seed.method.rpartition("/")[2], code.name] += 1
            self.undamaged += damaged == content
            if wrong := self.check(seed, content, damaged, code, answers):
                self.failures.append(f"{seed.method} {code.name}: {wrong}: {damaged[:4096].hex()}")
                if len(self.failures) >= MAX_FAILURES:
                    return

    async def send(self, seed: Seed, content: bytes) -> tuple[StatusCode, list[Message]]:
        """Return the code and the responses, at most three of a stream."""
        channel: Any = self.rng.choice(self.channels)
        coders = {"request_serializer": bytes, "response_deserializer": seed.response.FromString}
        answers: list[Message] = []
        try:
            if not seed.stream:
                return StatusCode.OK, [await channel.unary_unary(seed.method, **coders)(content, timeout=60)]
            if seed.stream == "out":
                call = channel.unary_stream(seed.method, **coders)(content, timeout=60)
            else:
                call = channel.stream_stream(seed.method, **coders)(iter([content]), timeout=60)
            async for answer in call:
                answers.append(answer)
                if len(answers) == 3:  # noqa: PLR2004  a damaged count may be very long
                    call.cancel()
                    break
        except grpc.aio.AioRpcError as error:
            return error.code(), answers
        return StatusCode.OK, answers

    def check(self, seed: Seed, content: bytes, damaged: bytes, code: StatusCode, answers: list[Message]) -> str:
        """Return what is wrong with an answer, if anything."""
        try:
            request = type(seed.request).FromString(damaged)
        except DecodeError:
            in_band = seed.stream == "both" and code == StatusCode.OK and [a.error_message[:8] for a in answers] == ["request:"]  # type: ignore[attr-defined]
            return "" if code == StatusCode.INVALID_ARGUMENT or in_band else "not a message"
        expected = self.expected_codes(seed, request)
        if request == seed.request:
            return self.compare(code, answers, self.expected[seed.method, content], expected)
        if seed.stream == "both":
            return "" if code == StatusCode.OK and len(answers) == 1 else "the stream ended"
        if code not in expected:
            return f"expected {' or '.join(sorted(c.name for c in expected))}"
        return self.check_row_count(request, answers) if code == StatusCode.OK else ""

    def expected_codes(self, seed: Seed, request: Any) -> set[StatusCode]:
        """Return the codes that an answer to a request may have."""
        if "RepositoryModel" in seed.method:
            return REFUSED if set(request.parameters) - {"unload_dependents"} else {StatusCode.NOT_FOUND}
        name = getattr(request, "model_name", getattr(request, "name", None))
        if isinstance(request, HealthCheckRequest):
            return {StatusCode.OK} if request.service in {"", *self.cards} else {StatusCode.NOT_FOUND}
        if name is not None and not (name == "" and isinstance(request, inference_pb2.ModelStatisticsRequest)):
            version = getattr(request, "model_version", getattr(request, "version", ""))
            if name not in self.cards or version not in ("", self.cards[name].version):
                return {StatusCode.NOT_FOUND}
        return EXACT[type(request)](request, self.cards) if type(request) in EXACT else {StatusCode.OK, *REFUSED, *seed.allowed}

    def compare(self, code: StatusCode, answers: list[Message], before: list[Message], codes: set[StatusCode]) -> str:
        """Return how answers differ from those to the same request before."""
        if not before:
            return "" if code in codes else "a valid request"
        if code != StatusCode.OK or len(answers) != len(before):
            return "a valid request"
        same = all(
            isinstance(a, inference_pb2.ModelStatisticsResponse) or is_close(a, b) for a, b in zip(answers, before, strict=True)
        )
        return "" if same else "another answer"

    def check_row_count(self, request: Any, answers: list[Any]) -> str:
        """Return what is wrong with the number of rows in the response to a valid request, if anything."""
        sent, received = 0, 0
        match answers:
            case [inference_pb2.ModelInferResponse() as response]:
                sent, received = request.inputs[0].shape[0], response.outputs[0].shape[0]
                if response.id != request.id:
                    return "another id"
            case [fizzbuzz_pb2.AnswerResponse() as response]:
                sent, received = len(request.numbers), len(response.words)
            case [diabetes_pb2.AssessResponse() as response]:
                sent, received = len(request.patients), len(response.assessments)
            case [digits_pb2.ClassifyResponse() as response]:
                sent, received = len(request.images), len(response.digits)
        return "" if sent == received else f"{sent} rows sent, {received} answered"


def ok_if(condition: bool) -> set[StatusCode]:  # noqa: FBT001  its only argument
    """Return the only possible code."""
    return {StatusCode.OK} if condition else REFUSED


def expected_of_patients(request: Any, cards: dict[str, Card]) -> set[StatusCode]:
    """OK if each measurement is in its range or NaN."""
    features = {feature.name: feature for feature in cards["diabetes"].input.features}
    values = [(features[field.name], value) for patient in request.patients for field, value in patient.ListFields()]
    valid = all(value != value or f.minimum <= value <= f.maximum for f, value in values)  # noqa: PLR0124  NaN
    return ok_if(valid and bool(request.patients))


EXACT: dict[type[Message], Callable[[Any, dict[str, Card]], set[StatusCode]]] = {
    fizzbuzz_pb2.AnswerRequest: lambda request, _: ok_if(1 <= len(request.numbers) <= 4096),  # noqa: PLR2004
    fizzbuzz_pb2.CountRequest: lambda request, _: ok_if(not request.HasField("step") or request.step != 0),
    diabetes_pb2.AssessRequest: expected_of_patients,
}


def is_close(one: Any, other: Any) -> bool:
    """Compare responses except for the last digits, in which batches of different sizes differ."""
    if isinstance(one, inference_pb2.ModelStreamInferResponse):
        return one.error_message == other.error_message and is_close(one.infer_response, other.infer_response)
    if isinstance(one, inference_pb2.ModelInferResponse):
        pairs: list[Any] = [
            (a.contents.fp32_contents, b.contents.fp32_contents) for a, b in zip(one.outputs, other.outputs, strict=True)
        ]
        raws = zip(one.raw_output_contents, other.raw_output_contents, strict=True)
        pairs += [(np.frombuffer(a, "<f4"), np.frombuffer(b, "<f4")) for a, b in raws]
        return one.id == other.id and all(len(a) == len(b) and np.allclose(a, b, atol=TOLERANCE) for a, b in pairs)
    if isinstance(one, digits_pb2.ClassifyResponse):
        return [digit.digit for digit in one.digits] == [digit.digit for digit in other.digits]
    if isinstance(one, diabetes_pb2.AssessResponse):
        return np.allclose([a.probability for a in one.assessments], [a.probability for a in other.assessments], atol=TOLERANCE)
    return bool(one == other)


async def fuzz(address: str, requests: int, seed: int, in_flight: int) -> Fuzzer:
    cards = {name: read_card(MODELS / name) for name in find_models(MODELS)}
    channels = [connect(address, retry=False) for _ in range(4)]
    fuzzer = Fuzzer(channels, cards, seed)
    await fuzzer.learn()
    remaining = iter(range(requests))
    await asyncio.gather(*(fuzzer.run(remaining) for _ in range(in_flight)))
    await asyncio.gather(*(channel.close() for channel in channels))
    return fuzzer


@click.command()
@click.option("--requests", default=1_000_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--in-flight", default=32, show_default=True)
def main(requests: int, seed: int, in_flight: int) -> None:
    """Fuzz `tercet serve` with the trained models; exit with 1 when an answer was wrong."""
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(serve(), stdout=subprocess.PIPE, stderr=log, text=True) as process:  # noqa: S603
        address = process.stdout.readline().split()[-1] if process.stdout else ""
        start, before = time.perf_counter(), psutil.Process(process.pid).memory_info().rss
        try:
            fuzzer = asyncio.run(fuzz(address, requests, seed, in_flight))
            seconds, after = time.perf_counter() - start, psutil.Process(process.pid).memory_info().rss
        finally:
            process.terminate()
        if process.wait(60):
            fuzzer.failures.append(f"the server ended with {process.returncode}")
        log.seek(0)
        fuzzer.failures += [line for line in log if "internal error" in line or "Traceback" in line][:MAX_FAILURES]
    for (method, code), count in sorted(fuzzer.codes.items()):
        print(f"{method:24} {code:20} {count:8}")
    print(f"{fuzzer.codes.total()} requests in {seconds:.0f} s, {fuzzer.undamaged} of them undamaged")
    print(f"memory: {before >> 20} MB before, {after >> 20} after")
    print(*fuzzer.failures, f"{len(fuzzer.failures)} failures", sep="\n")
    sys.exit(bool(fuzzer.failures))


if __name__ == "__main__":
    main()
