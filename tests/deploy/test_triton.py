"""`tercet export-triton`: the model repository, and predictions of the real tritonserver from it."""

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import msgspec
import numpy as np
import pytest
import tritonclient.grpc as triton
from google.protobuf import text_format
from tercet.card import Card, Rows, read_card
from tercet.server.engine import TOLERANCE
from tritonclient.grpc import model_config_pb2

import models
from tests.conftest import BIN, REPOSITORY, run

ENVIRONMENT = REPOSITORY / "benchmarks/.environments/triton"  # `python -m benchmarks.peers --install` makes it
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

pytestmark = pytest.mark.slow


def export(workspace: Path, target: Path, backend: str) -> Path:
    """The model repository that the command writes."""
    flags = ("--models", str(workspace / "models"), "--backend", backend)
    run(str(BIN / "tercet"), "export-triton", str(target), *flags, cwd=workspace)
    return target


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("backend", ["onnxruntime", "python"])
def test_a_model_is_described(workspace: Path, tmp_path: Path, backend: str, name: str) -> None:
    """The configuration is one that Triton's own message can read, with the tensors and labels of the card."""
    card, folder = read_card(workspace / "models" / name), export(workspace, tmp_path / "triton", backend) / name
    config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size, config.HasField("dynamic_batching")) == (name, backend, 4096, True)
    for tensor, expected in ((config.input[0], card.input), (config.output[0], card.output)):
        assert (tensor.name, list(tensor.dims)) == (expected.name, list(expected.shape) or [1])
        assert model_config_pb2.DataType.Name(tensor.data_type) == f"TYPE_{expected.datatype}"
        assert tensor.HasField("reshape") == (not expected.shape)
    assert tuple((folder / config.output[0].label_filename).read_text().splitlines()) == card.labels
    assert (folder / "1/model.onnx").read_bytes() == (workspace / "models" / name / "model.onnx").read_bytes()
    assert (folder / "1/model.py").is_file() == (backend == "python")


def test_nothing_is_overwritten(workspace: Path, tmp_path: Path) -> None:
    """A folder that is not empty is rejected."""
    (tmp_path / "precious").touch()
    done = run(str(BIN / "tercet"), "export-triton", str(tmp_path), cwd=workspace, check=False)
    assert (done.returncode, done.stdout) == (1, f"tercet: {tmp_path} is not empty: name a new folder\n")


@pytest.mark.parametrize("damage", ["version", "hash", "none"])
def test_what_triton_cannot_serve_is_rejected(workspace: Path, tmp_path: Path, damage: str) -> None:
    """A version that is not a number, a file that is not the card's, and a folder without models are one-line errors."""
    (tmp_path / "models").mkdir()
    if damage != "none":
        folder = Path(shutil.copytree(workspace / "models/fizzbuzz", tmp_path / "models/fizzbuzz"))
        if damage == "hash":
            os.truncate(folder / "model.onnx", 9)
        else:
            card = msgspec.json.decode((folder / "card.json").read_bytes())
            (folder / "card.json").write_bytes(msgspec.json.encode({**card, "version": "1.0"}))
    flags = ("--models", str(tmp_path / "models"))
    done = run(str(BIN / "tercet"), "export-triton", str(tmp_path / "triton"), *flags, cwd=REPOSITORY, check=False)
    messages = {
        "version": "expected a version of 1, 2, 3 ... for Triton, got '1.0'",
        "hash": "is not the file that its card.json",
        "none": "no trained model",
    }
    assert (done.returncode, len(done.stdout.splitlines())) == (1, 1)
    assert messages[damage] in done.stdout
    assert not (tmp_path / "triton").exists()


@contextmanager
def tritonserver(repository: Path, folder: Path) -> Iterator[Any]:
    """A client of the real server on a model repository; `folder` is an empty one."""
    packages = Path(sysconfig.get_path("platlib", vars={"base": str(ENVIRONMENT), "platbase": str(ENVIRONMENT)}))
    home, backend = packages / "pytriton/tritonserver", folder / "backends/python"
    shutil.copytree(home / "backends/python", backend)
    shutil.copy(home / f"python_backend_stubs/{PYTHON}/triton_python_backend_stub", backend)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    variables = {
        "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{packages}/nvidia_pytriton.libs",
        "PYTHONPATH": str(packages),
        "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}",
    }
    flags = ["--grpc-address=127.0.0.1", f"--grpc-port={address.rpartition(':')[2]}", "--allow-http=false", "--allow-metrics=false"]
    folders = [f"--model-repository={repository}", f"--backend-directory={folder / 'backends'}", "--disable-auto-complete-config"]
    command = [str(home / "bin/tritonserver"), *folders, *flags]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **variables}) as server,
    ):
        try:
            with triton.InferenceServerClient(address) as client:
                wait(client, server, folder / "log")
                yield client
        finally:
            server.terminate()


def wait(client: Any, server: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the server is ready."""
    deadline = monotonic() + 120
    while monotonic() < deadline:
        try:
            if client.is_server_ready():
                return
        except triton.InferenceServerException:
            pass
        assert server.poll() is None, log.read_text()
        sleep(0.2)  # it does not say when it is ready
    raise TimeoutError(log.read_text())


@pytest.mark.skipif(
    not (ENVIRONMENT / "installed").is_file(), reason="tritonserver is not installed: run `python -m benchmarks.peers --install`"
)
def test_triton_answers_as_the_cards_do(workspace: Path, tmp_path: Path) -> None:
    """The real server loads what was written and gives the cards' answers and labels, one row or many at a time."""
    with tritonserver(export(workspace, tmp_path / "triton", "python"), tmp_path) as client:
        for name in models.names():
            card = read_card(workspace / "models" / name)
            rows, expected = card.example_rows(), np.array([example.output for example in card.examples])
            np.testing.assert_allclose(ask(client, card, rows), expected, rtol=0, atol=TOLERANCE)
            for row, answer in zip(rows, expected, strict=True):
                np.testing.assert_allclose(ask(client, card, row[np.newaxis]), [answer], rtol=0, atol=TOLERANCE)
            value, column, label = ask(client, card, rows[:1], classes=1)[0, 0].decode().split(":")
            assert (int(column), label) == (expected[0].argmax(), card.labels[expected[0].argmax()])
            assert abs(float(value) - expected[0].max()) < TOLERANCE


def ask(client: Any, card: Card, rows: Rows, classes: int = 0) -> Rows:
    """What Triton answers to rows, (n, *input shape), as a client gives them; rows of a single number get an axis."""
    rows = rows if card.input.shape else rows[:, np.newaxis]
    given = triton.InferInput(card.input.name, rows.shape, card.input.datatype)
    given.set_data_from_numpy(rows)
    outputs = [triton.InferRequestedOutput(card.output.name, class_count=classes)]
    answers: Rows = client.infer(card.name, [given], outputs=outputs).as_numpy(card.output.name)
    return answers
