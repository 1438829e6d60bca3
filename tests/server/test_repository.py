"""Loading and reloading: new files are served without a failed request, and files that do not pass change nothing."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import grpc
import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from onnx import TensorProto, helper, numpy_helper
from tercet.card import Card, Rows, read_card
from tercet.client import Client
from tritonclient.grpc import service_pb2 as triton_pb2
from tritonclient.utils import InferenceServerException

from tests.conftest import Service, serving
from tests.server.support import refusal
from tests.server.test_workers import children, connect, connected, until

pytestmark = pytest.mark.slow

MODEL = "diabetes"
FILES = ("card.json", "model.onnx", "model.pt")
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def place(source: Path, target: Path) -> None:
    """Put a model's files into a folder, each atomically, as `dvc checkout` does; the card comes last."""
    target.mkdir(parents=True, exist_ok=True)
    for name in reversed(FILES):
        shutil.copyfile(source / name, target / f"{name}.new")
        (target / f"{name}.new").replace(target / name)


def forge(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
    """Change the card and update its hashes to the files in the folder."""
    card = json.loads((folder / "card.json").read_text())
    for name in FILES[1:]:
        if (folder / name).is_file():
            card["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    change(card)
    (folder / "card.json").write_text(json.dumps(card))


def other_answers(folder: Path) -> None:
    """Make another valid version: one weight of the graph differs, and the card has its outputs."""
    edit(lambda graph: scale(graph, 0.5))(folder)
    card, session = read_card(folder), onnxruntime.InferenceSession(folder / "model.onnx")
    [answers] = session.run(None, {card.input.name: card.example_rows()})

    def tell(raw: dict[str, Any]) -> None:
        for example, answer in zip(raw["examples"], answers.tolist(), strict=True):
            example["output"] = answer

    forge(folder, tell)


def expected(folder: Path) -> Rows:
    """The outputs of the examples in a folder's card."""
    return np.array([example.output for example in read_card(folder).examples])


def versions(workspace: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two versions of a model, each in a folder of its own."""
    old, new = (tmp_path / which / MODEL for which in ("old", "new"))
    for folder in (old, new):
        shutil.copytree(workspace / "models" / MODEL, folder, ignore=lambda _, names: {*names} - {*FILES})
    other_answers(new)
    assert np.abs(expected(old) - expected(new)).max() > 0.01
    return old, new


class Asking:
    """A client that sends requests all the time, over its own connection, and records every output and error."""

    def __init__(self, address: str, rows: Rows) -> None:
        self.answers: list[Rows] = []
        self.errors: list[Exception] = []
        self._address, self._rows, self._stop = address, rows, threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        with Client(self._address) as client:
            while not self._stop.is_set():
                try:
                    self.answers.append(client.infer(MODEL, self._rows))
                except grpc.RpcError as error:
                    self.errors.append(error)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def is_near(answers: Rows, right: Rows) -> bool:
    """Whether outputs are equal, except for rounding."""
    return np.allclose(answers, right, rtol=0, atol=1e-5)


def test_new_files_take_over_and_old_ones_come_back(workspace: Path, tmp_path: Path) -> None:
    """New files are served without a failed request or a wrong output, and so are the old ones when they are put back."""
    old, new = versions(workspace, tmp_path)
    place(old, folder := tmp_path / "models" / MODEL)
    rows, both = read_card(old).example_rows(), [expected(old), expected(new)]
    with serving(folder.parent, "--watch", "0.02") as service, Asking(service.address, rows) as asking:
        for turn in range(6):
            place((new, old)[turn % 2], folder)
            until(lambda: asking.errors or (asking.answers and is_near(asking.answers[-1], both[1 - turn % 2])))  # noqa: B023  runs now
    assert not asking.errors
    assert all(any(is_near(answers, right) for right in both) for answers in asking.answers)


def test_all_workers_follow(workspace: Path, tmp_path: Path) -> None:
    """SIGHUP, and a load or unload by one worker, reach every worker, including one that is started later."""
    old, new = versions(workspace, tmp_path)
    shutil.copytree(workspace / "models" / "fizzbuzz", tmp_path / "models" / "fizzbuzz")
    place(old, folder := tmp_path / "models" / MODEL)
    rows = read_card(old).example_rows()
    with serving(folder.parent, "--workers", "2", "--watch", "0") as service:
        first, *others = clients(service)

        def all_say(right: Rows) -> bool:
            return all(is_near(ask(client, rows, old), right) for client in (first, *others))

        assert all_say(expected(old))
        place(new, folder)
        service.process.send_signal(signal.SIGHUP)
        until(lambda: all_say(expected(new)))
        place(old, folder)
        assert all_say(expected(new))
        first.load_model(MODEL)
        until(lambda: all_say(expected(old)))
        first.unload_model(MODEL)
        until(lambda: not any(client.is_model_ready(MODEL) for client in (first, *others)))
        for client in (first, *others):
            client.close()
        workers = children(service)
        for worker in workers:
            worker.kill()
        until(lambda: len(children(service)) == 2 and not {*children(service)} & {*workers})
        first, *others = clients(service)
        until(lambda: not any(client.is_model_ready(MODEL) for client in (first, *others)))
        first.load_model(MODEL)
        until(lambda: all(client.is_model_ready(MODEL) for client in (first, *others)))
        for client in (first, *others):
            client.close()


def clients(service: Service) -> list[Any]:
    """Triton's clients, enough for each of two workers to have a connection."""
    found: list[Any] = []

    def more() -> bool:
        found.append(triton.InferenceServerClient(service.address, channel_args=[("grpc.use_local_subchannel_pool", 1)]))
        return bool(found[-1].is_server_live()) and len(connected(service)) == 2

    connect(service).close()  # somebody listens
    until(more)
    return found


def ask(client: Any, rows: Rows, folder: Path) -> Rows:
    """The service's output for rows of the model in a folder."""
    card = read_card(folder)
    tensor = triton.InferInput(card.input.name, rows.shape, card.input.datatype)
    tensor.set_data_from_numpy(rows)
    answers: Rows = client.infer(card.name, [tensor]).as_numpy(card.output.name)
    return answers


def test_a_model_that_appears_is_served(workspace: Path, tmp_path: Path) -> None:
    """A folder that appears later is served, health and index report it, and the whole models folder may vanish and return."""
    shutil.copytree(workspace / "models" / "fizzbuzz", tmp_path / "models" / "fizzbuzz")
    with serving(tmp_path / "models", "--watch", "0.02") as service, grpc.insecure_channel(service.address) as channel:
        with triton.InferenceServerClient(service.address) as client:
            with pytest.raises(InferenceServerException, match="there is no model"):
                client.load_model(MODEL)
            (tmp_path / "models").rename(tmp_path / "away")
            until(lambda: "is missing" in reasons(client)["fizzbuzz"])
            (tmp_path / "away").rename(tmp_path / "models")
            until(lambda: not reasons(client)["fizzbuzz"])
            shutil.copytree(workspace / "models" / MODEL, tmp_path / "models" / MODEL)
            until(lambda: reasons(client) == {MODEL: "", "fizzbuzz": ""})
            assert client.is_server_ready()
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(service=MODEL)).status == SERVING
        with Client(service.address) as ours:
            card = read_card(workspace / "models" / MODEL)
            assert is_near(ours.infer(MODEL, card.example_rows()), expected(workspace / "models" / MODEL))


def reasons(client: Any) -> dict[str, str]:
    """The reason of each model in the repository index."""
    return {model.name: model.reason for model in client.get_model_repository_index().models}


class Refusing(NamedTuple):
    """A service that does not watch its files, Triton's client of it, and the valid files of its model."""

    client: Any
    folder: Path
    good: Path
    answers: Rows


@contextmanager
def refusing(workspace: Path, place_: Path, engine: str) -> Iterator[Refusing]:
    """Serve two models; MODEL is the one to damage."""
    for name in (MODEL, "fizzbuzz"):
        for target in ("models", "good"):
            shutil.copytree(workspace / "models" / name, place_ / target / name)
    for file in (workspace / "models").glob("*.py"):  # for the torch engine
        shutil.copyfile(file, place_ / "models" / file.name)
    folder, good = place_ / "models" / MODEL, place_ / "good" / MODEL
    with serving(folder.parent, "--watch", "0", engine=engine) as service, triton.InferenceServerClient(service.address) as client:
        yield Refusing(client, folder, good, ask(client, read_card(good).example_rows(), good))


@pytest.fixture(scope="module")
def services(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Refusing]]:
    """One service per engine."""
    with (
        refusing(workspace, tmp_path_factory.mktemp("onnxruntime"), "onnxruntime") as onnx_,
        refusing(workspace, tmp_path_factory.mktemp("torch"), "torch") as torch_,
    ):
        yield {"onnxruntime": onnx_, "torch": torch_}


Change = Callable[[Path], Any]


def edit(change: Callable[[onnx.ModelProto], Any]) -> Change:
    """Change the graph and update the card."""

    def edited(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx")
        change(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        forge(folder)

    return edited


def scale(model: onnx.ModelProto, factor: float) -> None:
    """Multiply the largest weight of a graph."""
    weight = max(
        (part for part in model.graph.initializer if part.data_type == TensorProto.FLOAT), key=lambda part: part.ByteSize()
    )
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), weight.name))


def rename(kind: str) -> Callable[[onnx.ModelProto], None]:
    """Give the input or the output of a graph another name."""

    def renamed(model: onnx.ModelProto) -> None:
        [tensor] = getattr(model.graph, kind)
        for node in model.graph.node:
            names = getattr(node, kind)
            names[:] = ["nope" if name == tensor.name else name for name in names]
        tensor.name = "nope"

    return renamed


def to_double(model: onnx.ModelProto) -> None:
    """Make a graph return FP64; the numbers stay the same."""
    [output] = model.graph.output
    name, output.name = output.name, output.name
    for node in model.graph.node:
        node.output[:] = ["single" if each == name else each for each in node.output]
    model.graph.node.append(helper.make_node("Cast", ["single"], [name], to=TensorProto.DOUBLE))
    output.type.tensor_type.elem_type = TensorProto.DOUBLE


def more(kind: str) -> Callable[[onnx.ModelProto], None]:
    """Give a graph a second input or output."""

    def added(model: onnx.ModelProto) -> None:
        getattr(model.graph, kind).append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["batch", 1]))
        if kind == "output":
            model.graph.node.append(
                helper.make_node("Constant", [], ["more"], value=numpy_helper.from_array(np.zeros((1, 1), "f4")))
            )

    return added


def fixed(model: onnx.ModelProto) -> None:
    """Make a graph accept batches of one size only."""
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = 1


def columns(model: onnx.ModelProto) -> None:
    """Make a graph take nine columns and use the first eight."""
    [given] = model.graph.input
    for node in model.graph.node:
        node.input[:] = ["eight" if each == given.name else each for each in node.input]
    bounds = [numpy_helper.from_array(np.array([value]), name) for name, value in (("start", 0), ("stop", 8), ("axis", 1))]
    model.graph.initializer.extend(bounds)
    model.graph.node.insert(0, helper.make_node("Slice", [given.name, "start", "stop", "axis"], ["eight"]))
    given.type.tensor_type.shape.dim[1].dim_value = 9


def external(location: str) -> Callable[[onnx.ModelProto], None]:
    """Keep the largest weight outside of the graph."""

    def moved(model: onnx.ModelProto) -> None:
        weight = max(model.graph.initializer, key=lambda part: part.ByteSize())
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
        weight.ClearField("raw_data")

    return moved


def with_external_weights(location: str) -> Change:
    """A graph whose weights are in another file, which exists and is right."""

    def split(folder: Path) -> None:
        weight = max(onnx.load(folder / "model.onnx").graph.initializer, key=lambda part: part.ByteSize())
        (folder / "weights").write_bytes(numpy_helper.to_array(weight).tobytes())
        edit(external(location.format(folder=folder)))(folder)

    return split


def write(name: str, content: Callable[[bytes], bytes], *, honest: bool = False) -> Change:
    """Change the bytes of a file; `honest` updates the card."""

    def written(folder: Path) -> None:
        (folder / name).write_bytes(content((folder / name).read_bytes()))
        if honest:
            forge(folder)

    return written


def cut(share: float) -> Callable[[bytes], bytes]:
    """The first part of a file."""
    return lambda content: content[: int(len(content) * share)]


def flip(share: float) -> Callable[[bytes], bytes]:
    """Flip one bit at a position in a file."""

    def flipped(content: bytes) -> bytes:
        found = bytearray(content)
        found[int(len(content) * share)] ^= 1
        return bytes(found)

    return flipped


def card_says(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Change the card, with the right hashes."""
    return lambda folder: forge(folder, change)


def set_example(key: str, value: Any) -> Change:
    """A card whose first example is changed."""
    return card_says(lambda card: card["examples"][0].__setitem__(key, value))


def state(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """Change the state_dict in model.pt and update the card."""

    def saved(folder: Path) -> None:
        torch.save(change(torch.load(folder / "model.pt", weights_only=True)), folder / "model.pt")
        forge(folder)

    return saved


def graph_as_state(folder: Path) -> None:
    """Save the graph as model.pt."""
    shutil.copyfile(folder / "model.onnx", folder / "model.pt")
    forge(folder)


class Evil:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


def evil(folder: Path, *, zipped: bool) -> None:
    """Save a malicious pickle as model.pt."""
    if zipped:
        torch.save({"weight": Evil(folder / "evil")}, folder / "model.pt")
    else:
        (folder / "model.pt").write_bytes(pickle.dumps(Evil(folder / "evil")))
    forge(folder)


def foreign(name: str, *files: str) -> Change:
    """Files of another model, under the name of this one."""

    def copied(folder: Path) -> None:
        source = folder.parent / name
        for file in files:
            shutil.copyfile(source / file, folder / file)
        forge(folder, lambda card: card.update(name=folder.name))

    return copied


def without(name: str) -> Change:
    """Delete a file."""
    return lambda folder: (folder / name).unlink()


SHARES = [0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
CARD, GRAPH, STATE = "diabetes/card.json", "diabetes/model.onnx", "diabetes/model.pt"
FIELDS = [field.name for field in msgspec.structs.fields(Card) if field.required]

Case = tuple[Change, str]  # what is done to the folder, and what the refusal names
ONNX_CASES: dict[str, Case] = {
    **{f"graph cut at {share}": (write("model.onnx", cut(share)), GRAPH) for share in SHARES},
    **{f"graph cut at {share}, honest": (write("model.onnx", cut(share), honest=True), GRAPH) for share in SHARES},
    **{f"graph with a bit turned at {share}": (write("model.onnx", flip(share)), GRAPH) for share in SHARES},
    **{f"card cut at {share}": (write("card.json", cut(share)), CARD) for share in SHARES},
    **{f"card without {field}": (card_says(lambda card, field=field: card.pop(field)), CARD) for field in FIELDS},  # type: ignore[misc]
    "no graph": (without("model.onnx"), f"{GRAPH} is missing"),
    "no card": (without("card.json"), f"{CARD} is missing"),
    "graph empty": (write("model.onnx", lambda _: b""), GRAPH),
    "graph empty, honest": (write("model.onnx", lambda _: b"", honest=True), GRAPH),
    "graph of text": (write("model.onnx", lambda _: b"version https://git-lfs\n", honest=True), GRAPH),
    "card empty": (write("card.json", lambda _: b""), CARD),
    "card of bytes": (write("card.json", lambda _: b"\xff\x00"), CARD),
    "card a list": (write("card.json", lambda _: b"[]"), CARD),
    "card too deep": (write("card.json", lambda _: b'{"params":' + b"[" * 100_000), "diabetes"),
    "hash of another file": (write("card.json", lambda content: content.replace(b'"model.onnx": "', b'"model.onnx": "0')), GRAPH),
    "no hash": (card_says(lambda card: card["files"].clear()), GRAPH),
    "NaN weights": (edit(lambda model: scale(model, np.nan)), "diabetes: the model does not return the outputs"),
    "NaN weights, card too": (
        lambda folder: (edit(lambda model: scale(model, np.nan))(folder), set_example("output", [None, None])(folder)),
        "diabetes",
    ),
    "infinite weights": (edit(lambda model: scale(model, np.inf)), "diabetes: the model does not return the outputs"),
    "weights of 0": (edit(lambda model: scale(model, 0)), "diabetes: the model does not return the outputs"),
    "weights a little off": (edit(lambda model: scale(model, 1.01)), "diabetes: the model does not return the outputs"),
    "input of another name": (edit(rename("input")), f"{GRAPH} is not the graph"),
    "output of another name": (edit(rename("output")), f"{GRAPH} is not the graph"),
    "second input": (edit(more("input")), "'more'"),
    "second output": (edit(more("output")), "'more'"),
    "answers in FP64": (edit(to_double), "tensor(double)"),
    "batches of one size": (edit(fixed), "[1, 8]"),
    "more columns": (edit(columns), "[-1, 9]"),
    "weights in another file": (with_external_weights("weights"), GRAPH),
    "weights in another file, absolute": (with_external_weights("{folder}/weights"), GRAPH),
    "weights above": (with_external_weights("../diabetes/weights"), GRAPH),
    "weights in a system file": (edit(external("/etc/passwd")), GRAPH),
    "weights in memory": (edit(external("*/_ORT_MEM_ADDR_/*")), GRAPH),
    "another model": (foreign("fizzbuzz", *FILES), "its tensors or labels differ from those that are served"),
    "another model's graph": (foreign("fizzbuzz", "model.onnx"), f"{GRAPH} is not the graph"),
    "another model's card": (foreign("fizzbuzz", "card.json"), f"{GRAPH} is not the graph"),
    "another name": (card_says(lambda card: card.update(name="fizzbuzz")), "is the card of 'fizzbuzz'"),
    "other labels": (card_says(lambda card: card.update(labels=["no", "yes"])), "its tensors or labels differ"),
    "other tensor, card only": (card_says(lambda card: card["input"].update(name="nope")), f"{GRAPH} is not the graph"),
    "other shape, card only": (card_says(lambda card: card["output"].update(shape=[3])), f"{GRAPH} is not the graph"),
    "unknown datatype": (card_says(lambda card: card["input"].update(datatype="FP8")), CARD),
    "too few features": (card_says(lambda card: card["input"]["features"].pop()), "features: 7 features for a row of shape [8]"),
    "no features": (card_says(lambda card: card["input"].update(features=[])), "features: 0 features"),
    "range without a value": (
        card_says(lambda card: card["input"]["features"][0].update(minimum=99, maximum=0)),
        "minimum 99 is greater than maximum 0",
    ),
    "examples out of range": (
        card_says(lambda card: card["input"]["features"][7].update(minimum=129)),
        "diabetes cannot be loaded: examples[0]",
    ),
    "no examples": (card_says(lambda card: card.update(examples=[])), "diabetes"),
    "example of text": (set_example("input", "text"), "diabetes cannot be loaded"),
    "example too short": (set_example("input", [0] * 7), "diabetes cannot be loaded"),
    "answer of text": (set_example("output", ["no", "yes"]), "diabetes cannot be loaded"),
    "answer too short": (set_example("output", [1]), "diabetes cannot be loaded"),
    "another answer": (set_example("output", [0.5, 0.5]), "diabetes: the model does not return the outputs"),
}
TORCH_CASES: dict[str, Case] = {
    **{f"state cut at {share}": (write("model.pt", cut(share)), STATE) for share in SHARES[::3]},
    **{f"state cut at {share}, honest": (write("model.pt", cut(share), honest=True), STATE) for share in SHARES},
    **{f"state with a bit turned at {share}": (write("model.pt", flip(share)), STATE) for share in SHARES[::3]},
    "no state": (without("model.pt"), f"{STATE} is missing"),
    "state empty, honest": (write("model.pt", lambda _: b"", honest=True), STATE),
    "state of text": (write("model.pt", lambda _: b"version https://git-lfs\n", honest=True), STATE),
    "a pickle": (lambda folder: evil(folder, zipped=False), STATE),
    "a pickle as torch saves it": (lambda folder: evil(folder, zipped=True), STATE),
    "a module": (state(lambda _: torch.nn.Linear(8, 2)), STATE),
    "a list": (state(lambda found: list(found.values())), STATE),
    "a tensor": (state(lambda _: torch.zeros(3)), STATE),
    "numbers for names": (state(lambda found: dict(enumerate(found.values()))), STATE),
    "numbers for weights": (state(lambda found: dict.fromkeys(found, 1.0)), STATE),
    "state of other names": (state(lambda found: {f"x.{name}": part for name, part in found.items()}), STATE),
    "state of other shapes": (state(lambda found: {name: part[None, None] for name, part in found.items()}), STATE),
    "state with NaN": (
        state(lambda found: {name: part * np.nan for name, part in found.items()}),
        "diabetes: the model does not return",
    ),
    "a graph": (graph_as_state, STATE),
    "another model's state": (foreign("fizzbuzz", "model.pt"), STATE),
    "another network": (card_says(lambda card: card["params"]["train"].update(network={"nope": 1})), STATE),
    "no parameters": (card_says(lambda card: card.update(params={})), STATE),
}
CASES = {
    **{("onnxruntime", name): case for name, case in ONNX_CASES.items()},
    **{("torch", name): case for name, case in TORCH_CASES.items()},
}


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_damaged_files_are_refused(services: dict[str, Refusing], engine: str, name: str) -> None:
    """Damaged or foreign files are refused with a reason that names what is wrong, and the old version is still served."""
    (change, text), found = CASES[engine, name], services[engine]
    rows = read_card(found.good).example_rows()
    change(found.folder)
    try:
        with pytest.raises(InferenceServerException) as caught:
            found.client.load_model(MODEL)
        assert caught.value.status() == "StatusCode.FAILED_PRECONDITION"
        assert text in caught.value.message()
        assert caught.value.message().endswith("the previous version is still served")
        assert reasons(found.client)[MODEL][:100] in caught.value.message()  # a long message is shortened
        assert reasons(found.client)["fizzbuzz"] == ""
        assert found.client.is_server_ready()
        np.testing.assert_array_equal(ask(found.client, rows, found.good), found.answers)
        assert not (found.folder / "evil").exists()
    finally:
        shutil.rmtree(found.folder)
        shutil.copytree(found.good, found.folder)


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
@pytest.mark.parametrize("change", [lambda _: None, forge, edit(lambda _: None), state(lambda found: found)])
def test_valid_files_are_not_refused(services: dict[str, Refusing], engine: str, change: Change) -> None:
    """The same edits without damage are loaded, so the files above are refused only for the damage."""
    found = services[engine]
    change(found.folder)
    found.client.load_model(MODEL)
    assert reasons(found.client)[MODEL] == ""
    assert is_near(ask(found.client, read_card(found.good).example_rows(), found.good), expected(found.good))


def test_repository_requests(workspace: Path, tmp_path: Path) -> None:
    """A model is listed, unloaded and loaded again; its configuration and statistics are right; other models are untouched."""
    for name in (MODEL, "fizzbuzz"):
        shutil.copytree(workspace / "models" / name, tmp_path / name)
    rows = read_card(tmp_path / MODEL).example_rows()
    with serving(tmp_path, "--max-delay", "0.002") as service, connect(service) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        with triton.InferenceServerClient(service.address) as client:
            ask(client, rows, tmp_path / MODEL)
            ask(client, rows[:2], tmp_path / MODEL)
            with pytest.raises(InferenceServerException):
                ask(client, rows - 1e9, tmp_path / MODEL)
            [found] = client.get_inference_statistics(MODEL).model_stats
            assert (found.inference_count, found.execution_count) == (len(rows) + 2, 2)
            stats = found.inference_stats
            assert [each.count for each in (stats.success, stats.fail, stats.queue, stats.compute_infer)] == [2, 1, 2, 2]
            assert {batch.batch_size: batch.compute_infer.count for batch in found.batch_stats} == {len(rows): 1, 2: 1}
            assert 0 < stats.compute_infer.ns + stats.queue.ns <= stats.success.ns
            assert found.last_inference > 0
            assert [each.name for each in client.get_inference_statistics().model_stats] == [MODEL, "fizzbuzz"]

            config = client.get_model_config(MODEL).config
            assert (config.name, config.backend, config.max_batch_size) == (MODEL, "onnxruntime", 4096)
            assert [(each.name, each.data_type, list(each.dims)) for each in config.input] == [("features", 11, [8])]
            assert [(each.name, each.data_type, list(each.dims)) for each in config.output] == [("probabilities", 11, [2])]
            assert config.dynamic_batching.max_queue_delay_microseconds == 2000

            client.unload_model(MODEL)
            index = client.get_model_repository_index().models
            assert [(each.name, each.state) for each in index] == [(MODEL, "UNAVAILABLE"), ("fizzbuzz", "READY")]
            assert "load it" in reasons(client)[MODEL]
            assert not client.is_model_ready(MODEL)
            assert client.is_server_ready()  # as it was asked to be
            assert health.Check(health_pb2.HealthCheckRequest(service=MODEL)).status == NOT_SERVING
            with pytest.raises(InferenceServerException, match="unloaded by request") as caught:
                ask(client, rows, tmp_path / MODEL)
            assert caught.value.status() == "StatusCode.UNAVAILABLE"
            ready = client._client_stub.RepositoryIndex(triton_pb2.RepositoryIndexRequest(ready=True)).models  # noqa: SLF001  it has no flag
            assert [each.name for each in ready] == ["fizzbuzz"]

            client.load_model(MODEL)
            assert reasons(client) == {MODEL: "", "fizzbuzz": ""}
            assert health.Check(health_pb2.HealthCheckRequest(service=MODEL)).status == SERVING
            assert is_near(ask(client, rows, tmp_path / MODEL), expected(tmp_path / MODEL))


@pytest.mark.parametrize("name", ["", "nope", "../models/diabetes", "nope\nunload diabetes", " diabetes"])
def test_unknown_models_are_not_loaded(services: dict[str, Refusing], name: str) -> None:
    """A name that is not a model's is NOT_FOUND and changes nothing."""
    client = services["onnxruntime"].client
    for call in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException, match="there is no model") as caught:
            call(name)
        assert caught.value.status() == "StatusCode.NOT_FOUND"
    assert client.is_model_ready(MODEL)


@pytest.mark.parametrize("given", [{"config": "{}"}, {"files": {"file:1/model.onnx": b"bytes"}}])
def test_files_and_settings_are_not_taken_from_a_request(services: dict[str, Refusing], given: dict[str, Any]) -> None:
    """Files and settings in a load request are refused."""
    with pytest.raises(InferenceServerException, match="is not supported: models are loaded from the service's folder") as caught:
        services["onnxruntime"].client.load_model(MODEL, **{"config": "{}", **given})
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def damage_file(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change a file of the trained folder."""

    def damaged(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damaged


def with_other_answers(content: bytes) -> bytes:
    """A card whose first example has the output of its third."""
    card = json.loads(content)
    card["examples"][0]["output"] = card["examples"][2]["output"]
    return json.dumps(card).encode()


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (shutil.rmtree, "no trained model in {folder}: run `dvc repro`"),
        (lambda folder: (folder / "model.onnx").unlink(), "{folder}/fizzbuzz/model.onnx is missing: run `dvc repro`"),
        (
            damage_file("model.onnx", lambda content: content[:-1]),
            "{folder}/fizzbuzz/model.onnx is not the file that its card.json describes",
        ),
        (damage_file("card.json", lambda content: content[:-9]), "{folder}/fizzbuzz/card.json is not a model card"),
        (damage_file("card.json", lambda _: b"\xff"), "{folder}/fizzbuzz/card.json is not a model card"),
        (damage_file("card.json", with_other_answers), "{folder}/fizzbuzz: the model does not return the outputs in its card"),
        (lambda folder: folder.rename(folder.with_name("buzz")), "{folder}/buzz/card.json is the card of 'fizzbuzz'"),
    ],
)
def test_damaged_models(workspace: Path, tmp_path: Path, prepare: Callable[[Path], Any], text: str) -> None:
    """A folder with missing or damaged models is not served, and the error names the file."""
    shutil.copytree(workspace / "models" / "fizzbuzz", tmp_path / "fizzbuzz")
    prepare(tmp_path / "fizzbuzz")
    assert text.format(folder=tmp_path) in refusal("--models", str(tmp_path), "--port", "0")
