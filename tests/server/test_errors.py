"""Every case of the design's table of status codes over a real channel, and every way in which a start is refused."""

import asyncio
import json
import re
import secrets
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import Mock

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from tercet.card import Card, Rows, read_card
from tercet.client import Client
from tercet.errors import DeadlinePassedError, admit
from tercet.proto.diabetes_pb2 import AssessRequest, Patient
from tercet.proto.diabetes_pb2_grpc import DiabetesStub
from tercet.proto.digits_pb2 import ClassifyRequest, Image
from tercet.proto.digits_pb2_grpc import DigitsStub
from tercet.proto.fizzbuzz_pb2 import AnswerRequest, CountRequest
from tercet.proto.fizzbuzz_pb2_grpc import FizzBuzzStub
from tercet.proto.inference_pb2 import ModelInferRequest, ModelReadyRequest, ServerReadyRequest
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub
from tercet.server.app import Server
from tercet.server.batcher import Batcher
from tercet.server.config import Config
from tercet.server.engine import Pace
from tercet.server.tensors import CONTENTS

import models
from tests.conftest import BIN, Service, run, serving

MOST = Config().max_request_rows
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def refused(call: Callable[[], Any]) -> Any:
    """The error that a call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def unpack(error: Any, kind: Any) -> list[Any]:
    """The details of one kind that an error carries."""
    found, status = kind(), rpc_status.from_call(error)
    return [found for detail in status.details if detail.Unpack(found)] if status else []


def fields(error: Any) -> list[str]:
    """The fields that an error complains of."""
    return [violation.field for details in unpack(error, BadRequest) for violation in details.field_violations]


def infer_request(card: Card, rows: Rows) -> ModelInferRequest:
    """A request that is right, with raw contents."""
    request = ModelInferRequest(model_name=card.name, raw_input_contents=[rows.tobytes()])
    request.inputs.add(name=card.input.name, datatype=card.input.datatype, shape=rows.shape)
    return request


def batch(request: ModelInferRequest, card: Card, size: int) -> None:
    """Send so many rows of zeros."""
    request.CopyFrom(infer_request(card, np.zeros((size, *card.input.shape), card.input.dtype)))


def typed(request: ModelInferRequest, field: str) -> None:
    """Send a single zero in a typed field, nothing raw."""
    request.ClearField("raw_input_contents")
    getattr(request.inputs[0].contents, field).append(0)


def other(card: Card) -> str:
    """A typed field that is not the one of the card's datatype."""
    return next(field for field in sorted(CONTENTS.values()) if field != CONTENTS[card.input.datatype])


Spoil = Callable[[ModelInferRequest, Card], Any]
# how a request (r) for the model of a card (c) is spoilt, the field that the client is told (none: NOT_FOUND), what would be right
WRONG: dict[str, tuple[Spoil, str, str]] = {
    "model": (lambda r, _: setattr(r, "model_name", "nope"), "", "known are {known}"),
    "version": (lambda r, _: setattr(r, "model_version", "nope"), "", "version {version!r} is served"),
    "no tensor": (lambda r, _: r.ClearField("inputs"), "inputs", "one tensor {input!r}"),
    "two tensors": (lambda r, _: r.inputs.append(r.inputs[0]), "inputs", "one tensor {input!r}"),
    "tensor": (lambda r, _: setattr(r.inputs[0], "name", "nope"), "inputs", "one tensor {input!r}"),
    "datatype": (lambda r, _: setattr(r.inputs[0], "datatype", "FP64"), "inputs[0].datatype", "{input!r} is {datatype}"),
    "rank": (lambda r, _: r.inputs[0].shape.append(1), "inputs[0].shape", "{input!r} is {shape}"),
    "no shape": (lambda r, _: r.inputs[0].ClearField("shape"), "inputs[0].shape", "{input!r} is {shape}"),
    "negative batch": (lambda r, _: r.inputs[0].shape.__setitem__(0, -1), "inputs[0].shape", "{input!r} is {shape}"),
    "batch 0": (lambda r, c: batch(r, c, 0), "inputs[0]", "1 to {most}"),
    "batch too large": (lambda r, c: batch(r, c, MOST + 1), "inputs[0]", "1 to {most}"),
    "batch of 2^62": (lambda r, _: r.inputs[0].shape.__setitem__(0, 2**62), "raw_input_contents[0]", "bytes of {datatype}"),
    "raw too short": (
        lambda r, _: r.raw_input_contents.__setitem__(0, b"."),
        "raw_input_contents[0]",
        "{bytes} bytes of {datatype}",
    ),
    "too many raw": (lambda r, _: r.raw_input_contents.append(b""), "raw_input_contents", "one entry an input: 1"),
    "too few raw": (lambda r, _: r.ClearField("raw_input_contents"), "inputs[0].contents.{field}", "needs {values} values"),
    "raw and typed": (lambda r, _: r.inputs[0].contents.fp32_contents.append(0), "inputs[0].contents", "must be empty"),
    "typed too short": (lambda r, c: typed(r, CONTENTS[c.input.datatype]), "inputs[0].contents.{field}", "needs {values} values"),
    "wrong typed": (lambda r, c: typed(r, other(c)), "inputs[0].contents.{other}", "{datatype} goes into {field}"),
    "shared": (
        lambda r, _: r.inputs[0].parameters["shared_memory_region"].SetInParent(),
        "inputs[0].parameters",
        "send the contents",
    ),
    "output": (lambda r, _: r.outputs.add(name="nope"), "outputs[0].name", "it has {output!r}"),
    "output twice": (lambda r, c: [r.outputs.add(name=c.output.name) for _ in range(2)], "outputs", "once is enough"),
}


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests(channel: grpc.Channel, workspace: Path, name: str, case: str) -> None:
    """Whatever is wrong with a request for any model, the client gets the code, the field, and what would be right."""
    card = read_card(workspace / "models" / name)
    rows = card.example_rows()
    request = infer_request(card, rows)
    spoil, field, text = WRONG[case]
    spoil(request, card)
    error = refused(lambda: GRPCInferenceServiceStub(channel).ModelInfer(request))
    right = {
        "known": ", ".join(models.names()),
        "version": card.version,
        "input": card.input.name,
        "output": card.output.name,
        "datatype": card.input.datatype,
        "shape": [-1, *card.input.shape],
        "bytes": rows.nbytes,
        "values": rows.size,
        "field": CONTENTS[card.input.datatype],
        "other": other(card),
        "most": MOST,
    }
    assert error.code() == (StatusCode.INVALID_ARGUMENT if field else StatusCode.NOT_FOUND)
    assert fields(error) == ([field.format(**right)] if field else [])
    assert text.format(**right) in error.details()


@pytest.mark.parametrize("name", models.names())
def test_values_outside_the_domain(channel: grpc.Channel, workspace: Path, name: str) -> None:
    """A value that its datatype could hold and its feature cannot is refused, with the row, the feature and the range."""
    card = read_card(workspace / "models" / name)
    checked = card.input.dtype.kind in "iu" and all(
        (feature.minimum, feature.maximum) == (np.iinfo(card.input.dtype).min, np.iinfo(card.input.dtype).max)
        for feature in card.input.features
    )  # then there is no such value
    for column, feature in enumerate(card.input.features):
        for value in (feature.minimum - 1, feature.maximum + 1):
            if card.input.dtype.kind in "iu" and not np.iinfo(card.input.dtype).min <= value <= np.iinfo(card.input.dtype).max:
                continue
            rows = np.array(card.example_rows())
            rows.reshape(len(rows), -1)[1, column] = value
            error = refused(partial(GRPCInferenceServiceStub(channel).ModelInfer, infer_request(card, rows)))
            assert (error.code(), fields(error)) == (StatusCode.INVALID_ARGUMENT, [f"inputs[0][1].{feature.name}"])
            assert f"{feature.minimum:g} to {feature.maximum:g}" in error.details()
            checked = True
    assert checked


def digits(*images: Image) -> Callable[[grpc.Channel], Any]:
    """A call of Digits.Classify."""
    return lambda channel: DigitsStub(channel).Classify(ClassifyRequest(images=images))


def diabetes(*patients: Patient) -> Callable[[grpc.Channel], Any]:
    """A call of Diabetes.Assess."""
    return lambda channel: DiabetesStub(channel).Assess(AssessRequest(patients=patients))


def answer(*numbers: int) -> Callable[[grpc.Channel], Any]:
    """A call of FizzBuzz.Answer."""
    return lambda channel: FizzBuzzStub(channel).Answer(AnswerRequest(numbers=numbers))


def count(start: int, stop: int, step: int) -> Callable[[grpc.Channel], Any]:
    """A call of FizzBuzz.Count that reads its first message."""
    return lambda channel: next(FizzBuzzStub(channel).Count(CountRequest(start=start, stop=stop, step=step)))


def reflect(channel: grpc.Channel) -> Any:
    """A call of the reflection service."""
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    return next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request])))


PIXELS = bytes(28 * 28)


@pytest.fixture(scope="module")
def small_service(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with the model fizzbuzz alone."""
    folder = tmp_path_factory.mktemp("small")
    shutil.copytree(workspace / "models" / "fizzbuzz", folder / "fizzbuzz")
    with serving(folder) as running:
        yield running


@pytest.mark.parametrize(
    ("call", "field", "text"),
    [
        (digits(), "images", f"1 to {MOST}"),
        (digits(*[Image(pixels=PIXELS)] * (MOST + 1)), "images", f"1 to {MOST}"),
        (digits(Image(pixels=PIXELS[1:])), "images[0].pixels", f"{len(PIXELS)} bytes"),
        (digits(Image(pixels=PIXELS), Image()), "images[1]", "set pixels or encoded"),
        (digits(Image(pixels=PIXELS), Image(encoded=b"no picture")), "images[1].encoded", "PNG or JPEG"),
        (diabetes(), "patients", f"1 to {MOST}"),
        (diabetes(Patient(), Patient(glucose_mg_per_dl=-1)), "patients[1].glucose_mg_per_dl", "0 to 1000 mg/dL"),
        (diabetes(Patient(age_years=np.inf)), "patients[0].age_years", "0 to 130 years"),
        (answer(), "numbers", f"1 to {MOST}"),
        (answer(*[0] * MOST, 1024), "numbers", f"1 to {MOST}"),
        (count(1, 10, 0), "step", "leave it out for 1"),
    ],
)
def test_wrong_typed_requests(channel: grpc.Channel, call: Callable[[grpc.Channel], Any], field: str, text: str) -> None:
    """The typed services name the field of their own message, and what would be right, before the first answer."""
    error = refused(lambda: call(channel))
    assert (error.code(), fields(error)) == (StatusCode.INVALID_ARGUMENT, [field])
    assert text in error.details()


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (answer(1, 1024), "numbers[1]"),
        (answer(2**63 - 1), "numbers[0]"),
        (count(-1, 10, 1), "start"),
        (count(1, 1024, 1), "stop"),
    ],
)
def test_numbers_that_no_model_knows(small_service: Service, call: Callable[[grpc.Channel], Any], field: str) -> None:
    """Without fizzbuzz_any, a number of more than ten bits or below zero is refused, before the first answer."""
    with grpc.insecure_channel(small_service.address) as channel:
        error = refused(lambda: call(channel))
    assert (error.code(), fields(error)) == (StatusCode.INVALID_ARGUMENT, [field])
    assert "0 to 1023" in error.details()


class HeldEngine:
    """Says `number` to every row of fizzbuzz, when the test lets it."""

    platform, device = "held", "cpu"

    def __init__(self) -> None:
        self.executed: list[int] = []
        self.begun, self.open = threading.Event(), threading.Event()
        self.fails = False

    def run(self, rows: Rows) -> Rows:
        """(n,) -> (n, 4)."""
        self.executed += rows.tolist()
        self.begun.set()
        if self.fails or not self.open.wait(60):
            raise OSError("/secret/path")
        return np.tile(np.array([1, 0, 0, 0], np.float32), (len(rows), 1))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> HeldEngine:
    """The engine of every model of a server that is started in this process."""
    held = HeldEngine()
    monkeypatch.setattr("tercet.server.repository.load_engine", lambda *_: held)
    monkeypatch.setattr("tercet.server.repository.measure", lambda *_: Pace(batch_rows=4, inline_rows=0))
    return held


class Visits:
    """Counts the calls that come to a batcher's queue and leave it, however they leave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.came, self.left = asyncio.Semaphore(0), asyncio.Semaphore(0)
        infer = Batcher.infer

        async def watched(batcher: Batcher, rows: Rows) -> Rows:
            self.came.release()
            try:
                return await infer(batcher, rows)
            finally:
                self.left.release()

        monkeypatch.setattr(Batcher, "infer", watched)


@asynccontextmanager
async def inside(folder: Path, **settings: Any) -> AsyncIterator[tuple[Server, Any]]:
    """A server in this process and a channel to it."""
    server = Server(Config(port=0, models=folder, **settings))
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.config.address) as channel:
            yield server, channel
    finally:
        await server.stop()


def test_full_queue(workspace: Path, engine: HeldEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full queue refuses at once, tells when to try again, and those that wait are answered."""

    async def main() -> None:
        visits = Visits(monkeypatch)
        async with inside(workspace / "models", max_request_rows=2, max_queue_rows=2) as (_, channel):
            stub = FizzBuzzStub(channel)
            running = stub.Answer(AnswerRequest(numbers=[1]))
            await asyncio.to_thread(engine.begun.wait)
            waiting = stub.Answer(AnswerRequest(numbers=[2, 3]))
            for _ in range(2):
                await visits.came.acquire()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Answer(AnswerRequest(numbers=[4]))
            assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED
            [info] = unpack(caught.value, RetryInfo)
            assert info.retry_delay.ToTimedelta().total_seconds() > 0
            engine.open.set()
            assert [list((await call).words) for call in (running, waiting)] == [["1"], ["2", "3"]]
        assert engine.executed == [1, 2, 3]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("deadline", "queue_timeout", "cancel", "code"),
    [
        (0.5, 60, False, StatusCode.DEADLINE_EXCEEDED),
        (None, 0.05, False, StatusCode.DEADLINE_EXCEEDED),
        (None, 60, True, StatusCode.CANCELLED),
    ],
    ids=["deadline", "queue_timeout", "cancelled"],
)
def test_left_while_queued(
    workspace: Path,
    engine: HeldEngine,
    monkeypatch: pytest.MonkeyPatch,
    *,
    deadline: float | None,
    queue_timeout: float,
    cancel: bool,
    code: StatusCode,
) -> None:
    """A call that ends while it waits, by its deadline, the queue's or its client, has its code and is never started."""

    async def main() -> None:
        visits = Visits(monkeypatch)
        async with inside(workspace / "models", queue_timeout=queue_timeout) as (_, channel):
            stub = FizzBuzzStub(channel)
            running = stub.Answer(AnswerRequest(numbers=[1]))
            await asyncio.to_thread(engine.begun.wait)
            call = stub.Answer(AnswerRequest(numbers=[2]), timeout=deadline)
            for _ in range(2):
                await visits.came.acquire()
            if cancel:
                call.cancel()
            assert await call.code() == code
            await visits.left.acquire()
            engine.open.set()
            assert list((await running).words) == ["1"]
        assert engine.executed == [1]

    asyncio.run(main())


def test_drain(workspace: Path, engine: HeldEngine) -> None:
    """A server that stops says so in its health first, finishes what it has accepted, and then takes no more calls."""

    async def main() -> None:
        async with inside(workspace / "models") as (server, channel):
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="fizzbuzz"))
            assert (await watch.read()).status == SERVING
            running = FizzBuzzStub(channel).Answer(AnswerRequest(numbers=[1]))
            await asyncio.to_thread(engine.begun.wait)
            stopping = asyncio.create_task(server.stop())
            assert (await watch.read()).status == NOT_SERVING
            watch.cancel()
            assert not stopping.done()
            engine.open.set()
            assert list((await running).words) == ["1"]
            await stopping
            assert await FizzBuzzStub(channel).Answer(AnswerRequest(numbers=[2])).code() == StatusCode.UNAVAILABLE

    asyncio.run(main())


def test_late_calls(workspace: Path, engine: HeldEngine) -> None:
    """While a server ends, a new call of any kind is refused at once, and what was accepted is answered."""

    async def main() -> None:
        async with inside(workspace / "models") as (server, channel):
            stub = FizzBuzzStub(channel)
            running = stub.Answer(AnswerRequest(numbers=[1]))
            await asyncio.to_thread(engine.begun.wait)
            server.repository.closing = True
            for call in (stub.Answer(AnswerRequest(numbers=[2])), stub.Count(CountRequest(start=2, stop=3))):
                assert await call.code() == StatusCode.UNAVAILABLE
                assert "ask another one" in await call.details()
            engine.open.set()
            assert list((await running).words) == ["1"]
        assert engine.executed == [1]

    asyncio.run(main())


@pytest.mark.parametrize(("remaining", "starts"), [(None, True), (0.5, True), (0.0, False)])
def test_deadline_that_has_passed(remaining: float | None, *, starts: bool) -> None:
    """A call whose deadline has passed when it is read is not started, though gRPC has not cancelled it yet."""
    servicer, context = Mock(), Mock(time_remaining=lambda: remaining)
    if starts:
        admit(servicer, context)
    else:
        with pytest.raises(DeadlinePassedError):
            admit(servicer, context)
    servicer.admit.assert_called_once_with()


@pytest.mark.parametrize("broken", ["engine", "tercet.server.servicers.fizzbuzz.words"])
@pytest.mark.parametrize("stream", [False, True])
def test_internal_errors_are_opaque(
    workspace: Path,
    engine: HeldEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    broken: str,
    stream: bool,
) -> None:
    """An error that nobody foresaw gives the client a fixed text and an id; the log has the cause under that id."""

    def fail(*_: Any) -> NoReturn:
        raise OSError("/secret/path")

    async def main() -> None:
        engine.open.set()
        async with inside(workspace / "models") as (_, channel):
            stub = FizzBuzzStub(channel)
            with monkeypatch.context() as patch:
                patch.setattr(engine, "fails", True) if broken == "engine" else patch.setattr(broken, fail)
                call = stub.Count(CountRequest(start=1, stop=2)) if stream else stub.Answer(AnswerRequest(numbers=[1]))
                assert await call.code() == StatusCode.INTERNAL
                details = await call.details()
            assert list((await stub.Answer(AnswerRequest(numbers=[1]))).words) == ["1"]
        [error] = [record for record in caplog.records if record.levelname == "ERROR"]
        said = re.fullmatch(r"(internal error [0-9a-f]{12}); the service's log has the cause under this id", details)
        assert said
        assert said[1] == error.getMessage()
        assert "/secret/path" in caplog.text

    asyncio.run(main())


def test_known_but_not_trained(workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model that has only its contract is UNAVAILABLE and not ready, says what to do, and does not disturb the others."""
    shutil.copytree(workspace / "models" / "fizzbuzz", tmp_path / "fizzbuzz")
    (tmp_path / "mnist").mkdir()
    shutil.copy(workspace / "models" / "mnist" / "contract.py", tmp_path / "mnist")
    card = read_card(workspace / "models" / "mnist")

    async def main() -> None:
        async with inside(tmp_path) as (_, channel):
            stub = GRPCInferenceServiceStub(channel)
            for call in (stub.ModelInfer(infer_request(card, card.example_rows())), digits(Image(pixels=PIXELS))(channel)):
                assert await call.code() == StatusCode.UNAVAILABLE
                assert "dvc repro" in await call.details()
            assert [(await stub.ModelReady(ModelReadyRequest(name=name))).ready for name in ("fizzbuzz", "mnist")] == [True, False]
            assert not (await stub.ServerReady(ServerReadyRequest())).ready
            health = health_pb2_grpc.HealthStub(channel)
            checks = [await health.Check(health_pb2.HealthCheckRequest(service=name)) for name in ("fizzbuzz", "mnist")]
            assert [check.status for check in checks] == [SERVING, NOT_SERVING]
            assert (await answer(15)(channel)).words == ["fizzbuzz"]

    asyncio.run(main())
    assert "mnist: not trained" in caplog.text


def test_token(workspace: Path, tmp_path: Path) -> None:
    """With --token-file every call but health needs the token; a wrong one is as good as none."""
    token = secrets.token_hex()
    (tmp_path / "token").write_text(f"{token}\n")
    with serving(workspace / "models", "--token-file", str(tmp_path / "token")) as service:
        with grpc.insecure_channel(service.address) as channel:
            assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == SERVING
            for call in (answer(1), count(1, 2, 1), reflect):
                error = refused(partial(call, channel))
                assert error.code() == StatusCode.UNAUTHENTICATED
                assert "authorization: Bearer" in error.details()
        for wrong in (token[:-1], f"{token}s", ""):
            with Client(service.address, token=wrong) as client:
                assert refused(partial(client.infer, "fizzbuzz", [1])).code() == StatusCode.UNAUTHENTICATED
        with Client(service.address, token=token) as client:
            assert client.answer([3]) == [word for _, word in client.count(3, 3)] == ["fizz"]


def damage(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change a file of the trained folder."""

    def damaged(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damaged


def other_answers(content: bytes) -> bytes:
    """A card whose first example has the answer of its third."""
    card = json.loads(content)
    card["examples"][0]["output"] = card["examples"][2]["output"]
    return json.dumps(card).encode()


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (shutil.rmtree, "no trained model in {folder}: run `dvc repro`"),
        (lambda folder: (folder / "model.onnx").unlink(), "{folder}/fizzbuzz/model.onnx is missing: run `dvc repro`"),
        (
            damage("model.onnx", lambda content: content[:-1]),
            "{folder}/fizzbuzz/model.onnx is not the file that its card.json describes",
        ),
        (damage("card.json", lambda content: content[:-9]), "{folder}/fizzbuzz/card.json is no model card"),
        (damage("card.json", lambda _: b"\xff"), "{folder}/fizzbuzz/card.json is no model card"),
        (damage("card.json", other_answers), "{folder}/fizzbuzz: the model does not give the answers of its card"),
        (lambda folder: folder.rename(folder.with_name("buzz")), "{folder}/buzz/card.json is the card of 'fizzbuzz'"),
    ],
)
def test_damaged_models(workspace: Path, tmp_path: Path, prepare: Callable[[Path], Any], text: str) -> None:
    """A folder whose models are missing or damaged is not served, and the sentence names the file."""
    shutil.copytree(workspace / "models" / "fizzbuzz", tmp_path / "fizzbuzz")
    prepare(tmp_path / "fizzbuzz")
    assert text.format(folder=tmp_path) in refusal("--models", str(tmp_path), "--port", "0")


def refusal(*flags: str, **environment: str) -> str:
    """What `tercet serve` says last when it refuses to start: a sentence, and never a traceback."""
    done = run(str(BIN / "tercet"), "serve", *flags, cwd=Path("/"), check=False, **environment)
    assert done.returncode in (1, 2), done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--models", "nowhere"], "nowhere is no folder"),
        (["--port", "70000"], "use 0 to 65535"),
        (["--port", "x"], "'x' is not a valid integer"),
        (["--host", "nowhere.invalid"], "cannot listen on nowhere.invalid:0"),
        (["--engine", "nope"], "use onnxruntime or torch"),
        (["--device", "nope"], "use auto or cpu or cuda"),
        (["--threads", "0"], "use 1 to"),
        (["--max-queue-rows", "1"], f"use {MOST} or more"),
        (["--max-message-bytes", str(2**31)], "use 1 to"),
        (["--queue-timeout", "nan"], "use 0.001 or more"),
        (["--max-delay", "-1"], "use 0 or more"),
        (["--token-file", "nowhere"], "nowhere cannot be read"),
        (["--token-file", "/dev/null"], "/dev/null is empty"),
        (["--token-file", str(BIN / "python")], "cannot be read"),
        (["--nope"], "No such option '--nope'"),
    ],
)
def test_wrong_flags(workspace: Path, flags: list[str], text: str) -> None:
    """A flag or value that cannot be is refused in one sentence that says what can."""
    assert text in refusal("--models", str(workspace / "models"), "--port", "0", *flags)


def test_wrong_environment() -> None:
    """A value from the environment is refused as a flag is, and the sentence names the variable."""
    assert "env var: 'TERCET_PORT'" in refusal(TERCET_PORT="x")


@pytest.mark.parametrize("engine_name", ["onnxruntime", "torch"])
def test_cuda_demanded_without_gpu(workspace: Path, engine_name: str) -> None:
    """With --device cuda and no GPU to be seen the service does not fall back to the CPU."""
    flags = ["--models", str(workspace / "models"), "--port", "0", "--device", "cuda", "--engine", engine_name]
    assert "device cuda is demanded" in refusal(*flags, CUDA_VISIBLE_DEVICES="")


def test_port_in_use(workspace: Path) -> None:
    """A port that is taken is named, with what to do, and the exit code is not 0."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal("--models", str(workspace / "models"), "--port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}: address already in use" in said
    assert "--port" in said
