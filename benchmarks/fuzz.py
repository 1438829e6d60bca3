"""Fuzz a live server: `python benchmarks/fuzz.py`, with trained models; `--requests 20000` for a minute.

Right requests of every method are damaged, as messages (fields cleared, doubled, set to something else) or as bytes (bits, extreme
numbers, pieces cut, doubled or of another request), and sent. What the answer has to be is told by the same bytes read here: bytes
that are no message are INVALID_ARGUMENT, unknown models and versions NOT_FOUND, a request that means what it did before is OK, and
what is OK has as many rows as were asked for. Every tenth request is a right one, and its answer must be the known one. The server
must not answer INTERNAL or UNKNOWN, write a traceback or end. A request that was not answered so is printed, as hex.
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
from pathlib import Path
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

from benchmarks.load import build_request

MODELS = Path("models")
REFUSED = {StatusCode.INVALID_ARGUMENT}
EXTREMES = [0, 1, -1, 127, 128, 1023, 1024, 4096, 4097, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63)]
TOLERANCE = 1e-4
MOST_FAILURES = 20


@dataclass(frozen=True)
class Seed:
    """A right request of a method."""

    method: str
    request: Message
    response: type[Message]
    stream: str = ""  # `out`: one request, many responses; `both`: many of each
    allowed: frozenset[StatusCode] = frozenset()  # besides OK and INVALID_ARGUMENT, whatever the request says


def seeds(cards: dict[str, Card]) -> list[Seed]:
    """Right requests of all methods but those that change which models are served, whose models do not exist."""
    inference, missing = "/inference.GRPCInferenceService/", frozenset({StatusCode.NOT_FOUND})
    found = [
        Seed("/tercet.v1.FizzBuzz/Answer", fizzbuzz_pb2.AnswerRequest(numbers=[3, 15, 1024]), fizzbuzz_pb2.AnswerResponse),
        Seed("/tercet.v1.FizzBuzz/Count", fizzbuzz_pb2.CountRequest(start=1, stop=5), fizzbuzz_pb2.CountResponse, "out"),
        Seed("/tercet.v1.Diabetes/Assess", assess(cards["diabetes"]), diabetes_pb2.AssessResponse),
        *(Seed("/tercet.v1.Digits/Classify", request, digits_pb2.ClassifyResponse) for request in pictures(cards["mnist"])),
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
        found.append(Seed(inference + kind, request(name="fizzbuzz"), response, allowed=missing))
    for kind in ("Load", "Unload"):
        request, response = (getattr(inference_pb2, f"RepositoryModel{kind}{end}") for end in ("Request", "Response"))
        found.append(Seed(f"{inference}RepositoryModel{kind}", request(model_name="none such"), response, allowed=missing))
    for card in cards.values():
        raw = build_request(card, 2)
        raw.outputs.add(name=card.output.name)
        raw.parameters["priority"].int64_param = 1
        typed = inference_pb2.ModelInferRequest(model_name=card.name, model_version=card.version, id="1", inputs=raw.inputs)
        getattr(typed.inputs[0].contents, DATATYPES[card.input.datatype].contents_field).extend(
            card.example_rows()[:2].ravel().tolist()
        )
        for request in (raw, typed):
            found.append(Seed(f"{inference}ModelInfer", request, inference_pb2.ModelInferResponse, allowed=missing))
            found.append(Seed(f"{inference}ModelStreamInfer", request, inference_pb2.ModelStreamInferResponse, "both"))
    return found


def assess(card: Card) -> Message:
    """Two patients."""
    names = [feature.name for feature in card.input.features]
    rows = [{name: v for name, v in zip(names, row, strict=True) if v == v} for row in card.example_rows()[:2].tolist()]  # noqa: PLR0124  no NaN
    return diabetes_pb2.AssessRequest(patients=[diabetes_pb2.Patient(**row) for row in rows])


def pictures(card: Card) -> list[Message]:
    """A digit as pixels, and in files of several kinds."""
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
    """A number as protobuf writes it."""
    number, out = number & (2**64 - 1), bytearray()
    while number > 127:  # noqa: PLR2004  seven bits a byte
        out.append(number & 127 | 128)
        number >>= 7
    return bytes(out) + bytes([number])


def damage(chance: random.Random, content: bytes, other: bytes) -> bytes:
    """Do one to three things to a request."""
    damaged = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        start, stop = sorted(chance.choices(range(len(damaged) + 1), k=2))
        stop = min(stop, start + 64)
        match chance.randrange(7):
            case 0 if damaged:
                damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
            case 1 if damaged:
                damaged[chance.randrange(len(damaged))] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
            case 2:
                damaged[start : start + chance.choice((0, 1))] = varint(chance.choice(EXTREMES))
            case 3:
                del damaged[start:stop]
            case 4:
                damaged[start:start] = damaged[start:stop] * chance.choice((1, 1, 2, 50))
            case 5:
                del damaged[start:]
            case 6:
                damaged += other if chance.random() < 0.5 else chance.randbytes(chance.randrange(8))  # noqa: PLR2004
    return bytes(damaged)


def twist(chance: random.Random, request: Message) -> bytes:
    """Do one to three things to the fields of a request, at any depth."""
    twisted = type(request).FromString(request.SerializeToString())
    for _ in range(chance.randint(1, 3)):
        message: Any = twisted
        while (inner := children(message)) and chance.random() < 0.7:  # noqa: PLR2004  most have one child, and much in it
            message = chance.choice(inner)
        field = chance.choice(message.DESCRIPTOR.fields or [None])
        if field is None:
            continue
        if chance.random() < 0.2 or (field.message_type and field.message_type.GetOptions().map_entry):  # noqa: PLR2004
            message.ClearField(field.name)
        elif field.message_type:
            part = getattr(message, field.name)
            part.add() if field.is_repeated else part.SetInParent()
        else:
            with contextlib.suppress(ValueError, TypeError):  # not every number fits
                value = anything(chance, field)
                getattr(message, field.name).append(value) if field.is_repeated else setattr(message, field.name, value)
    return bytes(twisted.SerializeToString())


def children(message: Any) -> list[Any]:
    """The messages in a message, but for those of maps."""
    found = []
    for field, value in message.ListFields():
        if field.message_type and not field.message_type.GetOptions().map_entry:
            found += list(value) if field.is_repeated else [value]
    return found


def anything(chance: random.Random, field: Any) -> Any:
    """A value for a field."""
    if field.cpp_type == field.CPPTYPE_STRING:
        content = chance.choice((b"", b"fizzbuzz", b"mnist", b"1", b"INT64", b"FP32", b"\0", b"a" * 9000, chance.randbytes(8)))
        return content if field.type == field.TYPE_BYTES else content.decode("latin-1")
    return chance.choice((*EXTREMES, float("nan"), float("inf"), 1e300, -0.5, True))


class Fuzzer:
    """Sends requests and judges the answers."""

    def __init__(self, channels: list[grpc.aio.Channel], cards: dict[str, Card], seed: int) -> None:
        self.channels, self.cards, self.seeds = channels, cards, seeds(cards)
        self.contents = [found.request.SerializeToString() for found in self.seeds]
        self.chance = random.Random(seed)  # noqa: S311  nothing secret
        self.codes: Counter[tuple[str, str]] = Counter()
        self.right = 0
        self.failures: list[str] = []
        self.known: dict[tuple[str, bytes], list[Message]] = {}

    async def learn(self) -> None:
        """Ask all right requests once."""
        for seed, content in zip(self.seeds, self.contents, strict=True):
            code, answers = await self.ask(seed, content)
            if code != StatusCode.OK and not (code in seed.allowed and "RepositoryModel" in seed.method):
                raise SystemExit(f"{seed.method} answers {code} to a right request")
            self.known[seed.method, content] = answers

    async def run(self, remaining: Any) -> None:
        """Take numbers from an iterator and send a request for each."""
        for number in remaining:
            which = self.chance.randrange(len(self.seeds))
            seed, content = self.seeds[which], self.contents[which]
            damaged = content
            if number % 10:
                damaged = twist(self.chance, seed.request) if number % 3 else content
                damaged = damage(self.chance, damaged, self.chance.choice(self.contents)) if number % 3 != 1 else damaged
            if "RepositoryModel" in seed.method and any(name.encode() in damaged for name in self.cards):
                continue  # it would be obeyed
            code, answers = await self.ask(seed, damaged)
            self.codes[seed.method.rpartition("/")[2], code.name] += 1
            self.right += damaged == content
            if wrong := self.judge(seed, content, damaged, code, answers):
                self.failures.append(f"{seed.method} {code.name}: {wrong}: {damaged[:4096].hex()}")
                if len(self.failures) >= MOST_FAILURES:
                    return

    async def ask(self, seed: Seed, content: bytes) -> tuple[StatusCode, list[Message]]:
        """The code and the responses, three of a stream at most."""
        channel: Any = self.chance.choice(self.channels)
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

    def judge(self, seed: Seed, content: bytes, damaged: bytes, code: StatusCode, answers: list[Message]) -> str:
        """What is wrong with an answer; empty when nothing is."""
        try:
            request = type(seed.request).FromString(damaged)
        except DecodeError:
            in_band = seed.stream == "both" and code == StatusCode.OK and [a.error_message[:8] for a in answers] == ["request:"]  # type: ignore[attr-defined]
            return "" if code == StatusCode.INVALID_ARGUMENT or in_band else "no message"
        expected = self.expect(seed, request)
        if request == seed.request:
            return self.compare(code, answers, self.known[seed.method, content], expected)
        if seed.stream == "both":
            return "" if code == StatusCode.OK and len(answers) == 1 else "the stream ended"
        if code not in expected:
            return f"expected {' or '.join(sorted(c.name for c in expected))}"
        return self.count(request, answers) if code == StatusCode.OK else ""

    def expect(self, seed: Seed, request: Any) -> set[StatusCode]:
        """The codes that an answer to a request may have."""
        if "RepositoryModel" in seed.method:
            return REFUSED if set(request.parameters) - {"unload_dependents"} else {StatusCode.NOT_FOUND}
        name = getattr(request, "model_name", getattr(request, "name", None))
        if isinstance(request, HealthCheckRequest):
            return {StatusCode.OK} if request.service in {"", *self.cards} else {StatusCode.NOT_FOUND}
        if name is not None and not (name == "" and isinstance(request, inference_pb2.ModelStatisticsRequest)):
            asked = getattr(request, "model_version", getattr(request, "version", ""))
            if name not in self.cards or asked not in ("", self.cards[name].version):
                return {StatusCode.NOT_FOUND}
        return EXACT[type(request)](request, self.cards) if type(request) in EXACT else {StatusCode.OK, *REFUSED, *seed.allowed}

    def compare(self, code: StatusCode, answers: list[Message], known: list[Message], expected: set[StatusCode]) -> str:
        """What differs from the known answers."""
        if not known:
            return "" if code in expected else "a right request"
        if code != StatusCode.OK or len(answers) != len(known):
            return "a right request"
        same = all(isinstance(a, inference_pb2.ModelStatisticsResponse) or alike(a, b) for a, b in zip(answers, known, strict=True))
        return "" if same else "another answer"

    def count(self, request: Any, answers: list[Any]) -> str:
        """What is wrong with the rows of a response to a request that was accepted."""
        asked, got = 0, 0
        match answers:
            case [inference_pb2.ModelInferResponse() as response]:
                asked, got = request.inputs[0].shape[0], response.outputs[0].shape[0]
                if response.id != request.id:
                    return "another id"
            case [fizzbuzz_pb2.AnswerResponse() as response]:
                asked, got = len(request.numbers), len(response.words)
            case [diabetes_pb2.AssessResponse() as response]:
                asked, got = len(request.patients), len(response.assessments)
            case [digits_pb2.ClassifyResponse() as response]:
                asked, got = len(request.images), len(response.digits)
        return "" if asked == got else f"{asked} rows asked for, {got} answered"


def all_when(condition: bool) -> set[StatusCode]:  # noqa: FBT001  its only argument
    """OK or INVALID_ARGUMENT, exactly."""
    return {StatusCode.OK} if condition else REFUSED


def patients_are_right(request: Any, cards: dict[str, Card]) -> set[StatusCode]:
    """Whether each measurement is in its range or not a number."""
    features = {feature.name: feature for feature in cards["diabetes"].input.features}
    values = [(features[field.name], value) for patient in request.patients for field, value in patient.ListFields()]
    right = all(value != value or f.minimum <= value <= f.maximum for f, value in values)  # noqa: PLR0124  NaN
    return all_when(right and bool(request.patients))


EXACT: dict[type[Message], Callable[[Any, dict[str, Card]], set[StatusCode]]] = {
    fizzbuzz_pb2.AnswerRequest: lambda request, _: all_when(1 <= len(request.numbers) <= 4096),  # noqa: PLR2004
    fizzbuzz_pb2.CountRequest: lambda request, _: all_when(not request.HasField("step") or request.step != 0),
    diabetes_pb2.AssessRequest: patients_are_right,
}


def alike(one: Any, other: Any) -> bool:
    """Whether two responses say the same but for the last digits, in which batches of different sizes differ."""
    if isinstance(one, inference_pb2.ModelStreamInferResponse):
        return one.error_message == other.error_message and alike(one.infer_response, other.infer_response)
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
    """Send so many requests."""
    cards = {name: read_card(MODELS / name) for name in find_models(MODELS)}
    channels = [grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(4)]
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
    """Fuzz `tercet serve` on the trained models; exit with 1 when an answer was wrong."""
    command = [str(Path(sys.executable).with_name("tercet")), "serve", "--port", "0", "--models", str(MODELS)]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:  # noqa: S603
        address = process.stdout.readline().split()[-1] if process.stdout else ""
        begun, before = time.perf_counter(), psutil.Process(process.pid).memory_info().rss
        try:
            fuzzer = asyncio.run(fuzz(address, requests, seed, in_flight))
            seconds, after = time.perf_counter() - begun, psutil.Process(process.pid).memory_info().rss
        finally:
            process.terminate()
        if process.wait(60):
            fuzzer.failures.append(f"the server ended with {process.returncode}")
        log.seek(0)
        fuzzer.failures += [line for line in log if "internal error" in line or "Traceback" in line][:MOST_FAILURES]
    for (method, code), count in sorted(fuzzer.codes.items()):
        print(f"{method:24} {code:20} {count:8}")
    print(f"{fuzzer.codes.total()} requests in {seconds:.0f} s, {fuzzer.right} of them undamaged")
    print(f"memory: {before >> 20} MB before, {after >> 20} after")
    print(*fuzzer.failures, f"{len(fuzzer.failures)} failures", sep="\n")
    sys.exit(bool(fuzzer.failures))


if __name__ == "__main__":
    main()
