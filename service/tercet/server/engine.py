"""Engines: one array in, one array out. They know nothing of requests, queues or gRPC."""

import ctypes
import io
import logging
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from tercet.card import Card, Rows, Tensor, verify
from tercet.errors import StartupError
from tercet.server.config import Config

log = logging.getLogger(__name__)

SMALLEST_BATCH = 32  # rows, where `measure` starts
BATCH_SECONDS = 2e-3  # to start a batch takes about a twentieth of this
INLINE_SECONDS = 1e-3  # a batch that is quicker than this on the CPU is not worth a thread
PAUSE = 1e-3  # seconds before each step of loading: the event loop waits through many short calls as if they were one
TOLERANCE = 1e-4  # how far an answer may be from the card's; devices and versions differ in the last digits


class Engine(Protocol):
    """Runs one model."""

    platform: str  # as the Open Inference Protocol names it
    name: str  # and version, as in onnxruntime 1.31.1
    device: str  # cpu or cuda

    def run(self, rows: Rows) -> Rows:
        """(batch, *input shape) -> (batch, *output shape), both as the model's card describes them."""


ONNX_TYPES = {"UINT8": "tensor(uint8)", "INT64": "tensor(int64)", "FP32": "tensor(float)"}


@cache
def _tell(name: str, device: str, reason: str) -> None:
    """Log on which device an engine runs, and why: once, not for each model."""
    log.info("%s on %s: %s", name, device, reason)


class OnnxEngine:
    """Runs model.onnx with onnxruntime; on CUDA when that really loads."""

    platform = "onnxruntime_onnx"

    def __init__(self, folder: Path, card: Card, config: Config) -> None:
        """Raise StartupError when the file cannot be loaded or is another contract's, or CUDA is demanded and does not load."""
        try:
            import onnxruntime as ort  # noqa: PLC0415  the torch engine does without
        except ImportError as error:
            raise StartupError(f"the onnxruntime engine needs onnxruntime: pip install 'tercet[serve]' ({error})") from error
        content = verify(folder, card, "model.onnx")
        cuda, reason = _cuda_for_onnxruntime(config.device)
        options = ort.SessionOptions()
        options.intra_op_num_threads = config.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/dev/null")  # none from elsewhere
        options.log_severity_level = 3
        providers = ["CUDAExecutionProvider"] * cuda + ["CPUExecutionProvider"]
        try:
            self._session = ort.InferenceSession(content, options, providers=providers)
        except Exception as error:  # its exceptions share no base of their own
            raise StartupError(f"{folder / 'model.onnx'} cannot be loaded by onnxruntime: {error}") from error
        _fits(folder / "model.onnx", "input", self._session.get_inputs(), card.input)
        _fits(folder / "model.onnx", "output", self._session.get_outputs(), card.output)
        self.device = "cuda" if self._session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
        if cuda and self.device == "cpu":
            reason = "its CUDA provider did not load; pip install 'tercet[cuda]' brings what it needs"
        if config.device == "cuda" and self.device == "cpu":
            raise StartupError(f"device cuda is demanded, but onnxruntime cannot use it: {reason}")
        self.name = f"onnxruntime {ort.__version__}"
        _tell(self.name, self.device, reason)
        self._names = [card.output.name], card.input.name

    def run(self, rows: Rows) -> Rows:
        """(batch, *input shape) -> (batch, *output shape)."""
        outputs, name = self._names
        result: Rows = self._session.run(outputs, {name: rows})[0]
        return result


def _fits(path: Path, kind: str, found: Sequence[Any], expected: Tensor) -> None:
    """Raise StartupError unless a graph's inputs, or its outputs, are the one tensor of the card, with a batch axis of any size."""
    wanted = (None, *expected.shape)
    fit = [
        (tensor.name, tensor.type) == (expected.name, ONNX_TYPES[expected.datatype])
        and len(tensor.shape) == len(wanted)
        and all(size == right or isinstance(size, str | None) for size, right in zip(tensor.shape, wanted, strict=True))
        for tensor in found
    ]
    if fit != [True]:
        tensors = ", ".join(f"{tensor.name!r} {tensor.type} {tensor.shape}" for tensor in found)
        right = f"{expected.name!r} {expected.datatype} {[-1, *expected.shape]}"
        raise StartupError(f"{path} is not the graph that its card describes: its {kind} is {tensors}, and has to be {right}")


@cache
def _cuda_for_onnxruntime(wish: str) -> tuple[bool, str]:
    """Whether to try CUDA, and why."""
    import onnxruntime as ort  # noqa: PLC0415

    if wish == "cpu":
        return False, "as demanded"
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return False, "this onnxruntime is built without CUDA; pip install onnxruntime-gpu"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False, "there is no NVIDIA driver: libcuda.so.1 is not found"
    ort.preload_dlls()  # from the nvidia-* packages, when they are installed
    return True, "an NVIDIA driver is there"


class TorchEngine:
    """Runs model.pt with the model's own network.py."""

    platform = "pytorch_libtorch"

    def __init__(self, folder: Path, card: Card, config: Config) -> None:
        """Raise StartupError when torch or the network is missing, the weights do not fit, or CUDA is demanded and not there."""
        try:
            import torch  # noqa: PLC0415  a service with onnxruntime does without
        except ImportError as error:
            raise StartupError(f"the torch engine needs torch: pip install 'tercet[torch]' ({error})") from error
        import models.network  # noqa: PLC0415

        if config.device == "cuda" and not torch.cuda.is_available():
            raise StartupError("device cuda is demanded, but torch sees no GPU")
        self._torch = torch
        self.device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
        torch.set_num_threads(config.threads)
        content = verify(folder, card, "model.pt")
        try:
            network = models.network.build(card.name, card.params["train"].get("network", {}))
            network.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
        except Exception as error:  # a damaged file makes torch raise whatever comes first
            raise StartupError(f"{folder / 'model.pt'} does not fit models/{card.name}/network.py: {error}") from error
        self._network = network.eval().to(self.device)
        reason = "as demanded" if config.device != "auto" else "torch sees a GPU" if self.device == "cuda" else "torch sees no GPU"
        self.name = f"torch {torch.__version__}"
        _tell(self.name, self.device, reason)

    def run(self, rows: Rows) -> Rows:
        """(batch, *input shape) -> (batch, *output shape)."""
        with self._torch.inference_mode():
            result: Rows = self._network(self._torch.tensor(rows, device=self.device)).cpu().numpy()
        return result


ENGINES: dict[str, type[OnnxEngine | TorchEngine]] = {"onnxruntime": OnnxEngine, "torch": TorchEngine}


def load_engine(folder: Path, card: Card, config: Config) -> Engine:
    """Load a trained model, warm it up on the card's examples, and make sure that it gives the card's answers.

    Raises StartupError when it cannot be loaded or answers otherwise.
    """
    time.sleep(PAUSE)
    engine = ENGINES[config.engine](folder, card, config)
    time.sleep(PAUSE)
    try:
        for rows in (card.example_rows()[:1], card.example_rows()):
            answers = engine.run(rows)
    except Exception as error:
        raise StartupError(f"{folder}: the model does not run on the examples of its card: {error}") from error
    expected = np.array([example.output for example in card.examples])
    same = answers.shape == expected.shape and answers.dtype == card.output.dtype
    if not same or not np.allclose(answers, expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise StartupError(f"{folder}: the model does not give the answers of its card; run `dvc repro` to write both anew")
    return engine


class Pace(NamedTuple):
    """How fast an engine runs a model here."""

    batch_rows: int  # a batch so large that what it costs to start it does not count; larger ones only take memory
    inline_rows: int  # the largest batch that is not worth a thread; 0 on a GPU, whose time is spent waiting


def measure(engine: Engine, example: Rows, most: int) -> Pace:
    """Run `example`, (rows, *shape), at doubled batch sizes up to `most` rows, until a batch takes BATCH_SECONDS."""
    size = min(SMALLEST_BATCH, most)
    while True:
        batch = np.resize(example, (size, *example.shape[1:]))
        seconds = min(_seconds(engine, batch) for _ in range(3))
        if seconds >= BATCH_SECONDS or size == most:
            return Pace(size, int(INLINE_SECONDS / seconds * size) if engine.device == "cpu" else 0)
        size = min(2 * size, most)


def _seconds(engine: Engine, batch: Rows) -> float:
    """How long one run takes."""
    time.sleep(PAUSE)
    started = time.perf_counter()
    engine.run(batch)
    return time.perf_counter() - started
