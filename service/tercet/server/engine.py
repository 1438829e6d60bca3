"""Engines run a model: one array in, one array out. They know nothing of requests, queues or gRPC."""

import ctypes
import io
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tercet.card import DATATYPES, Card, Rows, Tensor, verify_file
from tercet.errors import StartupError
from tercet.server.config import Config

log = logging.getLogger(__name__)
_log_once = cache(log.info)  # all models have the same engine

MIN_CALIBRATION_ROWS = 32  # the first batch size that `calibrate_batch_size` tries
MIN_BATCH_SECONDS = 2e-3  # starting a batch takes about 5 % of this
MAX_INLINE_SECONDS = 1e-3  # a faster batch on the CPU is not worth a thread
YIELD_SECONDS = 1e-3  # sleep before each step of loading, for the event loop of the service: the steps hold the GIL
TOLERANCE = 1e-4  # relative and absolute difference from the outputs in the card; devices and versions differ in the last digits


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Runs one model: `run` maps (batch, *input shape) to (batch, *output shape), both as the model's card describes them."""

    run: Callable[[Rows], Rows]
    name: str  # with its version: onnxruntime 1.31.1
    platform: str  # as the Open Inference Protocol names it
    device: str  # cpu or cuda
    reason: str = ""  # why it runs on this device


def load_onnx(folder: Path, card: Card, config: Config) -> Engine:
    """Load model.onnx with onnxruntime; on CUDA when that loads. Raises StartupError when it does not match the card."""
    import onnxruntime as ort  # noqa: PLC0415  the torch engine works without it

    path, content = folder / "model.onnx", verify_file(folder, card, "model.onnx")
    try_cuda, reason = _cuda_for_onnxruntime(config.device)
    options = ort.SessionOptions()
    options.intra_op_num_threads = config.threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/dev/null")  # no external data
    options.log_severity_level = 3
    providers = ["CUDAExecutionProvider"] * try_cuda + ["CPUExecutionProvider"]
    try:
        session = ort.InferenceSession(content, options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise StartupError(f"onnxruntime cannot load {path}: {error}") from error
    _check_graph(path, "input", session.get_inputs(), card.input)
    _check_graph(path, "output", session.get_outputs(), card.output)
    device = "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
    if try_cuda and device == "cpu":
        reason = "its CUDA provider did not load; pip install '.[cuda]' installs the libraries that it needs"
    outputs, name = [card.output.name], card.input.name

    def run(rows: Rows) -> Rows:
        output: Rows = session.run(outputs, {name: rows})[0]
        return output

    return Engine(run=run, name=f"onnxruntime {ort.__version__}", platform="onnxruntime_onnx", device=device, reason=reason)


def _check_graph(path: Path, kind: str, tensors: Sequence[Any], expected: Tensor) -> None:
    """Raise StartupError unless a graph's inputs, or its outputs, are the card's one tensor with a batch axis of any size."""
    shape = (None, *expected.shape)
    matches = [
        (tensor.name, tensor.type, len(tensor.shape)) == (expected.name, DATATYPES[expected.datatype].onnx_type, len(shape))
        and all(size == right or isinstance(size, str | None) for size, right in zip(tensor.shape, shape, strict=True))
        for tensor in tensors
    ]
    if matches != [True]:
        actual = ", ".join(f"{tensor.name!r} {tensor.type} {tensor.shape}" for tensor in tensors)
        right = f"{expected.name!r} {expected.datatype} {[-1, *expected.shape]}"
        raise StartupError(f"{path} is not the graph that its card describes: expected {kind} {right}, got {actual}")


@cache
def _cuda_for_onnxruntime(device: str) -> tuple[bool, str]:
    """Whether to try CUDA, and why."""
    import onnxruntime as ort  # noqa: PLC0415

    if device == "cpu":
        return False, "as configured"
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return False, "this onnxruntime is built without CUDA; pip install onnxruntime-gpu"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False, "no NVIDIA driver: libcuda.so.1 is missing"
    ort.preload_dlls()  # from the nvidia-* packages, when they are installed
    return True, "there is an NVIDIA driver"


def load_torch(folder: Path, card: Card, config: Config) -> Engine:
    """Load model.pt into the model's network.py, from the checkout. Raises StartupError when the weights do not fit the network."""
    import torch  # noqa: PLC0415  the onnxruntime engine works without it

    gpu = torch.cuda.is_available()
    device = "cuda" if gpu and config.device != "cpu" else "cpu"
    reason = "as configured" if config.device == "cpu" else f"torch sees {'a' if gpu else 'no'} GPU"
    torch.set_num_threads(config.threads)
    build = _import_build(folder.parent)
    content = verify_file(folder, card, "model.pt")
    try:
        network = build(card.name, card.params["train"].get("network", {}))
        network.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
    except Exception as error:  # torch raises exceptions of any kind for a damaged file
        raise StartupError(f"{folder / 'model.pt'} does not fit models/{card.name}/network.py: {error}") from error
    network = network.eval().to(device)

    def run(rows: Rows) -> Rows:
        with torch.inference_mode():
            output: Rows = network(torch.tensor(rows, device=device)).cpu().numpy()
        return output

    return Engine(run=run, name=f"torch {torch.__version__}", platform="pytorch_libtorch", device=device, reason=reason)


def _import_build(models_folder: Path) -> Callable[..., Any]:
    """The function that builds a network, from the checkout that holds the models folder. Raises StartupError."""
    sys.path.insert(0, str(models_folder.resolve().parent))
    try:
        from models.network import build  # noqa: PLC0415
    except ImportError as error:
        raise StartupError(
            f"the torch engine needs models/network.py of the checkout that holds {models_folder}: {error}"
        ) from error
    finally:
        sys.path.pop(0)
    return build


ENGINES = {"onnxruntime": (load_onnx, "serve"), "torch": (load_torch, "torch")}  # with the extra that it needs


def load_engine(folder: Path, card: Card, config: Config) -> Engine:
    """Load a trained model, warm it up with the card's examples, and check that it returns the outputs in the card.

    Raises StartupError when it cannot be loaded, returns other outputs, or CUDA is required and not available.
    """
    load, extra = ENGINES[config.engine]
    time.sleep(YIELD_SECONDS)
    try:
        engine = load(folder, card, config)
    except ImportError as error:
        raise StartupError(f"the {config.engine} engine needs {config.engine}: pip install '.[{extra}]' ({error})") from error
    if config.device == "cuda" and engine.device == "cpu":
        raise StartupError(f"--device cuda: {engine.name} cannot use CUDA: {engine.reason}")
    _log_once(f"{engine.name} on {engine.device}: {engine.reason}")
    time.sleep(YIELD_SECONDS)
    try:
        for rows in (card.example_rows()[:1], card.example_rows()):
            output = engine.run(rows)
    except Exception as error:
        raise StartupError(f"{folder}: the model cannot run the examples in its card: {error}") from error
    expected = np.array([example.output for example in card.examples])
    comparable = output.shape == expected.shape and output.dtype == card.output.dtype
    if not comparable or not np.allclose(output, expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise StartupError(f"{folder}: the model does not return the outputs in its card; run `dvc repro` to write both again")
    return engine


class BatchLimits(NamedTuple):
    """Batch sizes that suit an engine on this machine."""

    max_batch_rows: int  # the start of a batch costs nothing by comparison; larger ones only take memory
    inline_rows: int  # the largest batch that is not worth a thread; 0 on a GPU, where the CPU only waits


def calibrate_batch_size(engine: Engine, example: Rows, max_rows: int) -> BatchLimits:
    """Run `example`, (rows, *shape), at doubling batch sizes up to `max_rows` rows until a batch takes MIN_BATCH_SECONDS."""
    size = min(MIN_CALIBRATION_ROWS, max_rows)
    while True:
        batch = np.resize(example, (size, *example.shape[1:]))
        seconds = min(_run_seconds(engine, batch) for _ in range(3))
        if seconds >= MIN_BATCH_SECONDS or size == max_rows:
            return BatchLimits(size, int(MAX_INLINE_SECONDS / seconds * size) if engine.device == "cpu" else 0)
        size = min(2 * size, max_rows)


def _run_seconds(engine: Engine, batch: Rows) -> float:
    time.sleep(YIELD_SECONDS)
    started = time.perf_counter()
    engine.run(batch)
    return time.perf_counter() - started
