"""The faces of the service, asked over a real channel."""

import io
import signal
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from PIL import Image
from tercet.card import Card, Rows, read_card
from tercet.client import MEASUREMENTS, Client
from tercet.proto.fizzbuzz_pb2 import AnswerRequest, CountRequest
from tercet.proto.fizzbuzz_pb2_grpc import FizzBuzzStub
from tercet.proto.inference_pb2 import ModelInferRequest
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub
from tercet.server.app import SERVICES
from tercet.server.config import Config
from tercet.server.engine import ENGINES, load_engine
from tercet.server.tensors import CONTENTS

import models
from tests.conftest import BIN, Service, run, serving


@pytest.fixture
def cards(workspace: Path) -> dict[str, Card]:
    """The cards of the trained models, by name."""
    return {name: read_card(workspace / "models" / name) for name in models.names()}


def answers(card: Card) -> Rows:
    """The probabilities of a card's examples, (examples, classes)."""
    return np.array([example.output for example in card.examples])


def labels(card: Card) -> list[str]:
    """The labels that the model of a card gives its examples."""
    return [card.labels[i] for i in answers(card).argmax(axis=1)]


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("batch", [1, 2, 7, 1000])
def test_every_model_answers_batches(service: Service, cards: dict[str, Card], name: str, batch: int) -> None:
    """Any model gives the answers of its card, at any batch size, with either engine."""
    card = cards[name]
    rows = np.resize(card.example_rows(), (batch, *card.input.shape))
    expected = np.resize(answers(card), (batch, *card.output.shape))
    with Client(service.address) as client:
        np.testing.assert_allclose(client.infer(name, rows), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", models.names())
def test_the_ends_of_every_range_are_accepted(default_service: Service, cards: dict[str, Card], name: str) -> None:
    """A value exactly at a feature's minimum or maximum is answered, with probabilities that sum to one."""
    card = cards[name]
    ends = [[feature.minimum for feature in card.input.features], [feature.maximum for feature in card.input.features]]
    rows = np.stack([np.broadcast_to(np.squeeze(end), card.input.shape) for end in ends])
    with Client(default_service.address) as client:
        np.testing.assert_allclose(client.infer(name, rows).sum(axis=1), 1, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", models.names())
def test_typed_contents(channel: grpc.Channel, cards: dict[str, Card], name: str) -> None:
    """Typed contents in, typed contents out, with the card's answers."""
    card, rows = cards[name], cards[name].example_rows()
    request = ModelInferRequest(model_name=name)
    given = request.inputs.add(name=card.input.name, datatype=card.input.datatype, shape=rows.shape)
    getattr(given.contents, CONTENTS[card.input.datatype]).extend(rows.ravel().tolist())
    response = GRPCInferenceServiceStub(channel).ModelInfer(request)
    [output] = response.outputs
    assert not response.raw_output_contents
    found = np.reshape(getattr(output.contents, CONTENTS[card.output.datatype]), tuple(output.shape))
    np.testing.assert_allclose(found, answers(card), rtol=0, atol=1e-5)


def encoded(picture: Image.Image, kind: str) -> bytes:
    """The bytes of a picture's file."""
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def test_digits(service: Service, cards: dict[str, Card]) -> None:
    """Real digits are read alike from pixels, PNG and JPEG, also when they are large and black on white."""
    card = cards["mnist"]
    pictures = [Image.fromarray(row) for row in card.example_rows()]
    large = [Image.fromarray(255 - row).resize((280, 280), Image.Resampling.BICUBIC) for row in card.example_rows()]
    with Client(service.address) as client:
        for images in (list(card.example_rows()), [encoded(picture, "PNG") for picture in pictures]):
            found = client.classify(images)
            np.testing.assert_allclose([digit.probabilities for digit in found], answers(card), rtol=0, atol=1e-5)
            assert [str(digit.digit) for digit in found] == labels(card)
        for kind, some in (("JPEG", pictures), ("PNG", large), ("JPEG", large)):
            found = client.classify([encoded(picture, kind) for picture in some])
            assert [str(digit.digit) for digit in found] == [example.target for example in card.examples]


def test_diabetes(service: Service, cards: dict[str, Card]) -> None:
    """Patients get the probability and the label of their row; what is left out is NaN, and 0 where 0 cannot be measured."""
    card, column = cards["diabetes"], cards["diabetes"].labels.index("positive")
    patients = [dict(zip(MEASUREMENTS, row.tolist(), strict=True)) for row in card.example_rows()]
    with Client(service.address) as client:
        found = client.assess(patients)
        np.testing.assert_allclose([each.probability for each in found], answers(card)[:, column], rtol=0, atol=1e-5)
        assert [each.label for each in found] == labels(card)
        for missing in ([name] for name in MEASUREMENTS):
            rows = np.where(np.isin(MEASUREMENTS, missing), np.nan, card.example_rows())
            left_out = client.assess([{k: v for k, v in patient.items() if k not in missing} for patient in patients])
            expected = client.infer("diabetes", rows)[:, column]
            np.testing.assert_allclose([each.probability for each in left_out], expected, rtol=0, atol=1e-6)
        [nothing] = client.assess([{}])
        zeros = {"glucose_mg_per_dl", "blood_pressure_mm_hg", "skin_thickness_mm", "insulin_mu_u_per_ml", "bmi_kg_per_m2"}
        assert client.assess([dict.fromkeys(zeros, 0.0)]) == [nothing]


def said(number: int, label: str) -> str:
    """What a person says for a number."""
    return str(number) if label == "number" else label


def test_fizzbuzz_answer(service: Service, cards: dict[str, Card]) -> None:
    """The words are the labels, or the number itself, in the order that was asked."""
    numbers = cards["fizzbuzz"].example_rows().tolist()
    expected = [said(number, label) for number, label in zip(numbers, labels(cards["fizzbuzz"]), strict=True)]
    with Client(service.address) as client:
        assert client.answer(numbers) == expected
        assert client.answer(numbers[::-1]) == expected[::-1]


@pytest.mark.parametrize(
    ("start", "stop", "step"),
    [(1, 30, 1), (0, 1023, 1), (1, 30, None), (15, 1, -2), (1, 30, 7), (7, 7, 1), (7, 7, -1), (2, 1, 1), (1, 2, -1), (0, 9, 2**62)],
)
def test_fizzbuzz_count(service: Service, channel: grpc.Channel, start: int, stop: int, step: int | None) -> None:
    """A count says what an answer would, forward and backward, from the first to the last, and nothing for an empty range."""
    counted = [(found.number, found.word) for found in FizzBuzzStub(channel).Count(CountRequest(start=start, stop=stop, step=step))]
    numbers = list(range(start, stop + (1 if (step or 1) > 0 else -1), step or 1))
    with Client(service.address) as client:
        assert counted == list(zip(numbers, client.answer(numbers) if numbers else [], strict=True))


@pytest.mark.parametrize("numbers", [[5, 1024, 15, -30, 7], [2**63 - 1, -(2**63), 0, 1023, 2**62 + 1], [-1]])
def test_fizzbuzz_answers_every_integer(service: Service, channel: grpc.Channel, numbers: list[int]) -> None:
    """Numbers of any size are answered in the order that was asked: those of ten bits by fizzbuzz, the others by fizzbuzz_any."""
    expected = ["fizz" * (number % 3 == 0) + "buzz" * (number % 5 == 0) or str(number) for number in numbers]
    response = FizzBuzzStub(channel).Answer(AnswerRequest(numbers=numbers))
    assert list(response.words) == expected
    assert list(response.models) == ["fizzbuzz" if 0 <= number < 1024 else "fizzbuzz_any" for number in numbers]
    with Client(service.address) as client:
        assert client.answer(numbers) == expected


@pytest.mark.parametrize(
    ("start", "stop", "step", "models"),
    [
        (1021, 1026, 1, ["fizzbuzz"] * 3 + ["fizzbuzz_any"] * 3),
        (2, -2, -1, ["fizzbuzz"] * 3 + ["fizzbuzz_any"] * 2),
        (2**63 - 3, 2**63 - 1, 1, ["fizzbuzz_any"] * 3),
        (-(2**63), 2**63 - 1, 2**63 - 1, ["fizzbuzz_any"] * 3),
    ],
)
def test_fizzbuzz_counts_as_far_as_64_bits_go(channel: grpc.Channel, start: int, stop: int, step: int, models: list[str]) -> None:
    """A count passes from one model to the other, and says which speaks."""
    found = list(FizzBuzzStub(channel).Count(CountRequest(start=start, stop=stop, step=step)))
    assert [each.number for each in found] == [start + i * step for i in range(len(models))]
    assert [each.model for each in found] == models


def test_a_count_without_end_begins_at_once(channel: grpc.Channel) -> None:
    """A count of more numbers than any memory holds is made as it is read, and ends when the client leaves."""
    call = FizzBuzzStub(channel).Count(CountRequest(start=1, stop=2**63 - 1))
    assert [next(call).word for _ in range(5)] == ["1", "2", "fizz", "4", "buzz"]
    call.cancel()


def test_health(channel: grpc.Channel) -> None:
    """Health knows every model by its name, and all of them by none."""
    stub = health_pb2_grpc.HealthStub(channel)
    for name in ("", *models.names()):
        assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
        stub.Check(health_pb2.HealthCheckRequest(service="nope"))


def test_reflection(channel: grpc.Channel) -> None:
    """Reflection lists every service, describes its methods, and a message down to its fields."""
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = DescriptorPool(database)
    assert sorted(database.get_services()) == sorted(SERVICES)
    for name in SERVICES:
        assert pool.FindServiceByName(name).methods
    found = pool.FindMessageTypeByName("inference.ModelInferRequest")
    assert found.fields_by_name.keys() == ModelInferRequest.DESCRIPTOR.fields_by_name.keys()


def test_sigterm_loses_nothing(workspace: Path, cards: dict[str, Card]) -> None:
    """What is in flight when SIGTERM comes is answered; a call is refused only if it was never accepted; the exit code is 0."""
    card = cards["mnist"]
    rows = np.resize(card.example_rows(), (512, *card.input.shape))
    request = ModelInferRequest(model_name="mnist", raw_input_contents=[rows.tobytes()])
    request.inputs.add(name=card.input.name, datatype=card.input.datatype, shape=rows.shape)
    first = threading.Event()
    with serving(workspace / "models") as service, grpc.insecure_channel(service.address) as channel:
        calls = [GRPCInferenceServiceStub(channel).ModelInfer.future(request) for _ in range(32)]
        for call in calls:
            call.add_done_callback(lambda _: first.set())
        assert first.wait(60)
        service.process.send_signal(signal.SIGTERM)
        before = sum(call.done() for call in calls)
        errors = [error for error in (call.exception() for call in calls) if error]
        assert service.process.wait(60) == 0
    assert before < len(calls) - len(errors)
    for error in errors:
        assert isinstance(error, grpc.Call)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert "failed to connect" in error.details()  # it never came to the service


def test_serves_without_torch(workspace: Path, tmp_path: Path, cards: dict[str, Card]) -> None:
    """Where torch and dvc are not installed the service runs and never asks for them; --engine torch says what to install."""
    for module in ("torch", "dvc"):
        (tmp_path / f"{module}.py").write_text("open(__file__ + '.imported', 'w').close()\nraise ImportError('not installed')\n")
    with serving(workspace / "models", PYTHONPATH=str(tmp_path)) as service, Client(service.address) as client:
        for name, card in cards.items():
            np.testing.assert_allclose(client.infer(name, card.example_rows()), answers(card), rtol=0, atol=1e-5)
    assert not list(tmp_path.glob("*.imported"))
    command = (str(BIN / "tercet"), "serve", "--engine", "torch", "--port", "0")
    done = run(*command, cwd=workspace, check=False, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["tercet: the torch engine needs torch: pip install 'tercet[torch]' (not installed)"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("engine", ENGINES)
def test_cuda_gives_the_answers_of_the_cpu(workspace: Path, cards: dict[str, Card], name: str, engine: str) -> None:
    """On CUDA an engine gives what it gives on the CPU, at any batch size."""
    if not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    folder, card = workspace / "models" / name, cards[name]
    cpu, cuda = (load_engine(folder, card, Config(engine=engine, device=device)) for device in ("cpu", "cuda"))
    assert (cpu.device, cuda.device) == ("cpu", "cuda")
    for batch in (1, 2, 7, 1000):
        rows = np.resize(card.example_rows(), (batch, *card.input.shape))
        np.testing.assert_allclose(cuda.run(rows), cpu.run(rows), rtol=0, atol=1e-4)
