"""Both clients: batches, streams, retries and errors, with a real service or one that misbehaves."""

import asyncio
import inspect
import io
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import BadRequest
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_status import rpc_status
from PIL import Image
from tercet import AsyncClient, Client
from tercet.card import Card, read_card
from tercet.client.codecs import CALLS_IN_FLIGHT
from tercet.proto.fizzbuzz_pb2 import AnswerRequest, AnswerResponse
from tercet.proto.fizzbuzz_pb2_grpc import FizzBuzzServicer, add_FizzBuzzServicer_to_server
from tercet.proto.inference_pb2 import ModelConfig, ModelConfigRequest, ModelConfigResponse
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceServicer, add_GRPCInferenceServiceServicer_to_server

from tests.conftest import REPOSITORY, Service, run, serving
from tests.server.test_security import issue

pytestmark = pytest.mark.slow
LIMIT = 10  # rows of a request
SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
SEVEN = REPOSITORY / "examples" / "seven.png"
Kind = type[Client] | type[AsyncClient]
both = pytest.mark.parametrize("kind", [Client, AsyncClient])


@pytest.fixture(scope="module")
def limited(workspace: Path) -> Iterator[Service]:
    """A service that takes few rows at a time, and messages as large as any gRPC server does."""
    with serving(workspace / "models", "--max-request-rows", str(LIMIT), "--max-message-bytes", str(4 * 2**20)) as running:
        yield running


def ask(kind: Kind, address: str, method: str, *arguments: Any, **options: Any) -> Any:
    """What one method of a client of either kind gives; answers that come one by one as a list."""
    if kind is Client:
        with Client(address, **options) as client:
            found = getattr(client, method)(*arguments)
            return list(found) if isinstance(found, Iterator) else found

    async def main() -> Any:
        async with AsyncClient(address, **options) as client:
            found = getattr(client, method)(*arguments)
            return await found if inspect.isawaitable(found) else [each async for each in found]

    return asyncio.run(main())


def card(workspace: Path, name: str) -> Card:
    """The card of a model."""
    return read_card(workspace / "models" / name)


@both
@pytest.mark.parametrize("method", ["infer", "infer_each"])
@pytest.mark.parametrize("name", ["mnist", "diabetes", "fizzbuzz"])
def test_tensors_of_any_length(limited: Service, workspace: Path, kind: Kind, method: str, name: str) -> None:
    """More rows than the service takes at a time are answered, each with its own answer, as one batch and as a stream."""
    known = card(workspace, name)
    rows, outputs = known.example_rows(), np.array([example.output for example in known.examples])
    order = np.random.default_rng(0).integers(len(rows), size=3 * LIMIT + 1)
    found = ask(kind, limited.address, method, name, rows[order])
    np.testing.assert_allclose(found, outputs[order], rtol=0, atol=1e-5)


@both
@pytest.mark.parametrize("suffix", ["", "_each"])
def test_typed_rows_of_any_length(limited: Service, workspace: Path, kind: Kind, suffix: str) -> None:
    """Typed services too answer more rows than they take at a time, in order."""
    images = card(workspace, "mnist").example_rows()
    digits = [str(digit.digit) for digit in ask(kind, limited.address, f"classify{suffix}", itertools.chain(*[images] * 3))]
    assert digits == [example.target for example in card(workspace, "mnist").examples] * 3
    patients: list[dict[str, float | None]] = [{"glucose_mg_per_dl": float(60 + i), "age_years": None} for i in range(3 * LIMIT)]
    found = ask(kind, limited.address, f"assess{suffix}", patients)
    assert found == [ask(kind, limited.address, "assess", [{"glucose_mg_per_dl": 60.0 + i}])[0] for i in range(3 * LIMIT)]
    assert len({each.probability for each in found}) > LIMIT
    numbers = range(990, 1060)
    said = ask(kind, limited.address, f"answer{suffix}", numbers)
    assert said == ["fizz" * (number % 3 == 0) + "buzz" * (number % 5 == 0) or str(number) for number in numbers]
    assert [word.model for word in said] == ["fizzbuzz" if number < 1024 else "fizzbuzz_any" for number in numbers]


def noise(side: int) -> bytes:
    """A PNG file that takes about side * side bytes."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side), np.uint8)).save(file, "PNG")
    return file.getvalue()


@both
def test_large_pictures(limited: Service, kind: Kind) -> None:
    """A few pictures that are too much for one message together are answered; one that is too much alone is refused."""
    large = noise(1000)
    assert 5 * len(large) > 4 * 2**20
    digits = ask(kind, limited.address, "classify", [large] * 4 + [SEVEN] + [large] * 2)
    assert digits[4].digit == 7
    assert digits[4] not in digits[:4]
    assert digits[:4] + digits[5:] == [digits[0]] * 6
    with pytest.raises(grpc.RpcError, match="larger than max"):
        ask(kind, limited.address, "classify", [noise(2100)])


@both
@pytest.mark.parametrize(
    ("method", "arguments", "field"),
    [
        ("assess", ([{}] * 14 + [{"age_years": -1}],), "patients[14].age_years"),
        ("assess_each", ([{}] * 14 + [{"age_years": -1}],), "patients[14].age_years"),
        ("classify", ([SEVEN] * 14 + [b"no picture"],), "images[14].encoded"),
        ("infer", ("fizzbuzz", [1] * 14 + [1024]), "inputs[0][14].number"),
        ("infer", ("fizzbuzz", [1] * 4 + [1024] * 20), "inputs[0][4].number"),
    ],
)
def test_errors_name_the_callers_row(limited: Service, kind: Kind, method: str, arguments: Any, field: str) -> None:
    """What is wrong with a row is told with its place in the whole batch or stream, to a person and to a program."""
    with pytest.raises(grpc.RpcError) as caught:
        ask(kind, limited.address, method, *arguments)
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith(f"{field}: ")
    status = rpc_status.from_call(error)
    request = BadRequest()
    assert status.message == error.details()
    assert status.details[0].Unpack(request)
    assert [violation.field for violation in request.field_violations] == [field]
    assert "in a call with" in error.__notes__[0]


@both
def test_an_empty_batch_is_refused_by_the_service(limited: Service, kind: Kind) -> None:
    """A batch without rows is INVALID_ARGUMENT, whoever counts; a stream without rows has no answers."""
    for method, arguments in (("answer", ([],)), ("classify", ([],)), ("infer", ("fizzbuzz", np.array([], np.int64)))):
        with pytest.raises(grpc.RpcError, match="0 rows"):
            ask(kind, limited.address, method, *arguments)
    assert ask(kind, limited.address, "answer_each", []) == []


def turned(path: Path) -> Path:
    """The picture of a seven as a camera that was held sideways writes it: the pixels lie, EXIF says how."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90° to see it
    with Image.open(SEVEN) as seven:
        seven.convert("L").resize((300, 300)).transpose(Image.Transpose.ROTATE_90).save(path, "JPEG", exif=exif)
    return path


@both
def test_every_kind_of_picture(limited: Service, tmp_path: Path, kind: Kind) -> None:
    """A path, its text, the file's bytes and what PIL opens are read alike; pixels of MNIST's form as the file that has them."""
    camera = turned(tmp_path / "camera.jpg")
    with Image.open(SEVEN) as opened, Image.open(camera) as sideways:
        pictures = [opened, opened.convert("RGBA"), opened.convert("P"), sideways]
        found = ask(kind, limited.address, "classify", [SEVEN, str(SEVEN), SEVEN.read_bytes(), camera, *pictures])
    assert {digit.digit for digit in found} == {7}
    assert found[0] == found[1] == found[2] == found[4]
    np.testing.assert_allclose(found[3].probabilities, found[-1].probabilities, atol=0.01)
    pixels = np.zeros((28, 28), np.uint8)
    pixels[4:24, 13:15] = 255
    one, same = ask(kind, limited.address, "classify", [pixels, Image.fromarray(pixels)])
    assert (one.digit, one) == (1, same)


def test_pil_is_not_needed(limited: Service, tmp_path: Path) -> None:
    """Without PIL the client sends paths and arrays."""
    (tmp_path / "PIL.py").write_text("raise ImportError('not installed')\n")
    program = f"""
import numpy as np
from tercet.client import Client
with Client("{limited.address}") as client:
    print(client.classify(["{SEVEN}", np.eye(28, dtype=np.uint8) * 255])[0].digit)
"""
    assert run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{REPOSITORY / 'service'}").stdout == "7\n"


@both
def test_counts_say_who_speaks(limited: Service, kind: Kind) -> None:
    """A count gives numbers, words, and with each word the model that says so."""
    found = ask(kind, limited.address, "count", 1022, 1025)
    assert found == [(1022, "1022"), (1023, "fizz"), (1024, "1024"), (1025, "buzz")]
    assert [word.model for _, word in found] == ["fizzbuzz"] * 2 + ["fizzbuzz_any"] * 2


@both
def test_models_are_listed(limited: Service, kind: Kind) -> None:
    """`models` names what the service knows."""
    assert ask(kind, limited.address, "models") == ["diabetes", "fizzbuzz", "fizzbuzz_any", "mnist"]


@both
def test_health(limited: Service, kind: Kind) -> None:
    """Health is that of the whole service or of a model."""
    assert ask(kind, limited.address, "health") == ask(kind, limited.address, "health", "mnist") == "SERVING"


class Numbered:
    """The numbers from 1 on; `read` of them have been requested."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[int]:
        while True:
            self.read += 1
            yield self.read


@pytest.mark.parametrize("ahead", [1, 2, 7, 20, 1000])
def test_a_slow_consumer_holds_the_producer_back(limited: Service, ahead: int) -> None:
    """A stream never reads more than `ahead` rows past the last prediction that was consumed."""
    numbers, ahead_of_consumer, words = Numbered(), list[int](), list[str]()
    with Client(limited.address) as client:
        for word in itertools.islice(client.answer_each(numbers, ahead=ahead), 5 * LIMIT):
            ahead_of_consumer.append(numbers.read - len(words))
            words.append(word)
    assert words == ["fizz" * (i % 3 == 0) + "buzz" * (i % 5 == 0) or str(i) for i in range(1, 5 * LIMIT + 1)]
    assert max(ahead_of_consumer) == rows_ahead(ahead)


def rows_ahead(ahead: int) -> int:
    """How many rows a stream reads ahead: full chunks of at most LIMIT rows, as many as calls may be in flight."""
    return min(ahead // CALLS_IN_FLIGHT * CALLS_IN_FLIGHT or 1, CALLS_IN_FLIGHT * LIMIT)


class Unsteady(FizzBuzzServicer, GRPCInferenceServiceServicer):
    """Repeats numbers as words; `answer` is called with each request first, and may fail."""

    def __init__(self, answer: Callable[[AnswerRequest, Any], object], limit: int = LIMIT) -> None:
        self.answer, self.limit, self.asked, self.calls = answer, limit, 0, 0
        self.health = HealthServicer()
        self.health.set("", SERVING)

    def ModelConfig(self, request: ModelConfigRequest, _context: Any) -> ModelConfigResponse:
        """A limit of rows."""
        self.asked += 1
        return ModelConfigResponse(config=ModelConfig(name=request.name, max_batch_size=self.limit))

    def Answer(self, request: AnswerRequest, context: Any) -> AnswerResponse:
        """The numbers."""
        self.calls += 1
        if len(request.numbers) > self.limit:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "too many rows")
        self.answer(request, context)
        return AnswerResponse(words=map(str, request.numbers), models=["x"] * len(request.numbers))


@contextmanager
def running(servicer: Unsteady) -> Iterator[str]:
    """Its address."""
    with ThreadPoolExecutor(16) as threads:
        server = grpc.server(threads)
        add_FizzBuzzServicer_to_server(servicer, server)
        add_GRPCInferenceServiceServicer_to_server(servicer, server)
        add_HealthServicer_to_server(servicer.health, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(0).wait()


@both
@pytest.mark.parametrize("method", ["answer", "answer_each"])
def test_unavailable_is_tried_again(kind: Kind, method: str) -> None:
    """Calls that fail with UNAVAILABLE are made again, without a word of ours, and so are the parts of a batch or a stream."""
    failures = iter([True, True])

    def answer(_: AnswerRequest, context: Any) -> None:
        if next(failures, False):
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")

    with running(servicer := Unsteady(answer)) as address:
        assert ask(kind, address, method, range(3 * LIMIT)) == [str(number) for number in range(3 * LIMIT)]
    assert servicer.calls == 3 + 2


@both
def test_balanced(kind: Kind) -> None:
    """Calls are spread over all services that the address names and whose health is SERVING."""
    services = [Unsteady(lambda *_: None) for _ in range(2)]
    with running(services[0]) as one, running(services[1]) as other:

        def calls() -> list[int]:
            before = [service.calls for service in services]
            ask(kind, f"ipv4:{one},{other}", "answer", range(4 * LIMIT), balanced=True)
            return [service.calls - already for service, already in zip(services, before, strict=True)]

        for well, found in ((0, [4, 0]), (1, [0, 4])):
            services[well].health.set("", SERVING)
            services[1 - well].health.set("", NOT_SERVING)
            assert calls() == found
        services[0].health.set("", SERVING)
        while 0 in calls():  # a service that is not connected yet gets none
            pass


@both
def test_deadline(kind: Kind) -> None:
    """A call that is not answered in time ends with DEADLINE_EXCEEDED."""
    over = threading.Event()
    with running(Unsteady(lambda *_: over.wait(60))) as address:
        with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
            ask(kind, address, "answer", [1], timeout=0.3)
        over.set()


@both
def test_parts_go_together_but_not_all_at_once(kind: Kind) -> None:
    """CALLS_IN_FLIGHT chunks of a batch are in flight at a time, no more and no fewer."""
    barrier, lock, present = threading.Barrier(CALLS_IN_FLIGHT, timeout=60), threading.Lock(), []
    most = 0

    def answer(request: AnswerRequest, _: Any) -> None:
        nonlocal most
        with lock:
            present.append(request)
            most = max(most, len(present))
        barrier.wait()
        with lock:
            present.remove(request)

    with running(Unsteady(answer)) as address:
        assert len(ask(kind, address, "answer", range(6 * CALLS_IN_FLIGHT * LIMIT))) == 6 * CALLS_IN_FLIGHT * LIMIT
    assert most == CALLS_IN_FLIGHT


@both
def test_who_leaves_a_stream_cancels_its_calls(kind: Kind) -> None:
    """When the consumer goes, the call that is in flight is cancelled, and no more rows are read."""
    begun, cancelled, numbers = threading.Event(), threading.Event(), Numbered()

    def answer(request: AnswerRequest, context: Any) -> None:
        if request.numbers[0] > 1:
            context.add_callback(cancelled.set)
            begun.set()
            cancelled.wait(60)

    async def main() -> None:
        async with AsyncClient(address) as client:
            async for _ in client.answer_each(numbers, ahead=2):
                await asyncio.to_thread(begun.wait, 60)
                break
            assert await asyncio.to_thread(cancelled.wait, 60)

    with running(Unsteady(answer)) as address:
        if kind is AsyncClient:
            asyncio.run(main())
        else:
            with Client(address) as client:
                with closing(client.answer_each(numbers, ahead=2)) as words:  # type: ignore[type-var]  # a generator
                    next(words)
                    assert begun.wait(60)
                assert cancelled.wait(60)
    assert numbers.read == 2


@both
def test_the_limit_is_asked_for_once(kind: Kind) -> None:
    """However many calls there are, and however many at once, a client asks for a model's limit once."""

    async def main() -> None:
        async with AsyncClient(address) as client:
            await asyncio.gather(*(client.answer([number]) for number in range(20)))

    with running(servicer := Unsteady(lambda *_: None)) as address:
        if kind is AsyncClient:
            asyncio.run(main())
        else:
            with Client(address) as client, ThreadPoolExecutor(4) as threads:
                list(threads.map(client.answer, [[number] for number in range(20)]))
    assert (servicer.asked, servicer.calls) == (1, 20)


@both
def test_a_limit_that_has_changed_is_asked_for_again(kind: Kind) -> None:
    """When the service restarts with a lower limit, one call fails, and the next one is split accordingly."""

    async def main() -> None:
        async with AsyncClient(address) as client:
            assert len(await client.answer(range(LIMIT))) == LIMIT
            servicer.limit = 3
            with pytest.raises(grpc.RpcError, match="too many rows"):
                await client.answer(range(LIMIT))
            assert len(await client.answer(range(LIMIT))) == LIMIT

    with running(servicer := Unsteady(lambda *_: None)) as address:
        if kind is AsyncClient:
            asyncio.run(main())
        else:
            with Client(address) as client:
                assert len(client.answer(range(LIMIT))) == LIMIT
                servicer.limit = 3
                with pytest.raises(grpc.RpcError, match="too many rows"):
                    client.answer(range(LIMIT))
                assert len(client.answer(range(LIMIT))) == LIMIT


@both
def test_tls_and_token(workspace: Path, tmp_path: Path, kind: Kind) -> None:
    """Both clients speak TLS with a token, and neither without."""
    authority = issue("authority")
    authority.write(tmp_path, "ca")
    certificate, key = issue("service", authority).write(tmp_path, "service")
    (tmp_path / "tokens").write_text("secret\n")
    flags = ("--tls-certificate", certificate, "--tls-key", key, "--token-file", tmp_path / "tokens")
    with serving(workspace / "models", *map(str, flags)) as service:
        safe: dict[str, Any] = {"tls_ca": tmp_path / "ca.pem", "timeout": 20}
        assert ask(kind, service.address, "answer", [15], token="secret", **safe) == ["fizzbuzz"]  # noqa: S106
        with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
            ask(kind, service.address, "answer", [15], **safe)
    with pytest.raises(ValueError, match="go together"):
        ask(kind, "127.0.0.1:1", "health", tls_certificate=certificate)
