"""Engines run a model: one array in, one array out. They know nothing of requests, queues or gRPC."""

import ctypes
import io
import logging
import sys
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from tercet.card import DATATYPES, Card, Rows, verify_file
from tercet.errors import StartupError
from tercet.server.config import Config

log = logging.getLogger(__name__)
_log_once = cache(log.info)  # all models have the same engine

MIN_CALIBRATION_ROWS = 32  # the first batch size that `calibrate` tries
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
    max_batch_rows: int = 1  # larger batches would not be cheaper, and take memory
    inline_rows: int = 0  # the largest batch that is not worth a thread; 0 on a GPU, where the CPU only waits


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
    for kind, tensors, expected in (("input", session.get_inputs(), card.input), ("output", session.get_outputs(), card.output)):
        right = [(expected.name, DATATYPES[expected.datatype].onnx_type, [-1, *expected.shape])]
        actual = [
            (tensor.name, tensor.type, [size if isinstance(size, int) else -1 for size in tensor.shape]) for tensor in tensors
        ]
        if actual != right:
            raise StartupError(f"{path} is not the graph that its card describes: expected {kind} {right}, got {actual}")
    device = "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
    if try_cuda and device == "cpu":
        reason = "its CUDA provider did not load; pip install '.[cuda]' installs the libraries that it needs"
    outputs, name = [card.output.name], card.input.name

    def run(rows: Rows) -> Rows:
        output: Rows = session.run(outputs, {name: rows})[0]
        return output

    return Engine(run=run, name=f"onnxruntime {ort.__version__}", platform="onnxruntime_onnx", device=device, reason=reason)


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
    sys.path.insert(0, str(folder.parent.resolve().parent))
    try:
        from models.network import build  # noqa: PLC0415
    except ImportError as error:
        raise StartupError(f"the torch engine needs models/network.py in the checkout of {folder.parent}: {error}") from error
    finally:
        sys.path.pop(0)
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


ENGINES = {"onnxruntime": (load_onnx, "serve"), "torch": (load_torch, "torch")}  # with the extra that it needs


def load_engine(folder: Path, card: Card, config: Config) -> Engine:
    """Load a trained model, check that it returns the outputs in the card for the card's examples, and set its batch sizes.

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
    examples = card.example_rows()
    try:
        engine.run(examples[:1])
        output = engine.run(examples)
    except Exception as error:
        raise StartupError(f"{folder}: the model cannot run the examples in its card: {error}") from error
    expected = np.array([example.output for example in card.examples])
    comparable = output.shape == expected.shape and output.dtype == card.output.dtype
    if not comparable or not np.allclose(output, expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise StartupError(f"{folder}: the model does not return the outputs in its card; run `dvc repro` to write both again")
    return calibrate(engine, examples, config.max_batch_rows)


def calibrate(engine: Engine, example: Rows, max_rows: int) -> Engine:
    """Set an engine's limits: double the batch of `example`, (rows, *shape), until it takes MIN_BATCH_SECONDS or has `max_rows`."""
    size = min(MIN_CALIBRATION_ROWS, max_rows)
    while True:
        batch = np.resize(example, (size, *example.shape[1:]))
        seconds = min(timeit.repeat(partial(engine.run, batch), partial(time.sleep, YIELD_SECONDS), repeat=3, number=1))
        if seconds >= MIN_BATCH_SECONDS or size == max_rows:
            inline_rows = int(MAX_INLINE_SECONDS / seconds * size) if engine.device == "cpu" else 0
            return replace(engine, max_batch_rows=size, inline_rows=inline_rows)
        size = min(2 * size, max_rows)
