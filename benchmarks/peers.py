"""Measure the service beside KServe, MLServer and Triton, all with the same ONNX file and one onnxruntime thread.

    python benchmarks/peers.py fizzbuzz mnist --rows 1

Each peer is installed with pip into an environment of its own, once (some 1.4 GB in all). Everything serves one model, with one
instance. KServe has no batching in the server, MLServer's always waits and stays off as it is by default, Triton's dynamic
batching is on; latency logs, metrics and Triton's HTTP port are off. First each server is started alone: `ready s`, from start
to the first line it prints (to ServerReady of a peer), and `PSS MB`, its process tree after 100 requests; medians of STARTS.
Then all run at once and rounds alternate, as in benchmarks.load.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import click
import grpc
import numpy as np
import psutil
from tercet.card import Card, read_card
from tercet.cli.export_triton import export
from tercet.proto import inference_pb2_grpc
from tercet.proto.inference_pb2 import ModelInferRequest
from tercet.server.engine import TOLERANCE

from benchmarks.load import Load, Result, build_request, drive, median, started, table

HERE = Path(__file__).parent
OURS = HERE / "peers"  # what runs in the environments
STARTS = 3


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a peer may use: its environment, the model, an empty folder, and two free ports."""

    environment: Path
    model: Path  # folder of model.onnx and card.json
    card: Card
    folder: Path
    grpc_port: int
    http_port: int

    @property
    def packages(self) -> Path:
        """The environment's site-packages."""
        return Path(sysconfig.get_path("platlib", vars={"base": str(self.environment), "platbase": str(self.environment)}))


def kserve(site: Site) -> list[str]:
    """The command of KServe."""
    model = [site.card.name, site.card.output.name, str(site.model / "model.onnx")]
    server = [str(site.environment / "bin/python"), str(OURS / "kserve_server.py")]
    return [*server, *model, str(site.http_port), str(site.grpc_port)]


def mlserver(site: Site) -> list[str]:
    """The command of MLServer; writes its settings."""
    ports = {"http_port": site.http_port, "grpc_port": site.grpc_port, "host": "127.0.0.1", "metrics_endpoint": None}
    settings = {"debug": False, "parallel_workers": 0, "grpc_max_message_length": 2**24, **ports}
    parameters = {"uri": str((site.model / "model.onnx").absolute()), "extra": {"output": site.card.output.name}}
    model = {"name": site.card.name, "implementation": "mlserver_runtime.OnnxModel", "parameters": parameters}
    (site.folder / "settings.json").write_text(json.dumps(settings))
    (site.folder / "model-settings.json").write_text(json.dumps(model))
    return ["env", f"--chdir={site.folder}", f"PYTHONPATH={OURS}", str(site.environment / "bin/mlserver"), "start", "."]


def triton(site: Site) -> list[str]:
    """The command of tritonserver; writes its model repository, and its stub for this version of Python into the backend."""
    home = site.packages / "pytriton/tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(home / "python_backend_stubs" / version / "triton_python_backend_stub", home / "backends/python")
    export(site.model.parent, site.folder, backend="python")
    with (site.folder / site.card.name / "config.pbtxt").open("a") as config:
        config.write("instance_group [ { count: 1 kind: KIND_CPU } ]\n")
    libraries = f"{sysconfig.get_config_var('LIBDIR')}:{site.packages}/nvidia_pytriton.libs"
    search = [f"LD_LIBRARY_PATH={libraries}", f"PYTHONPATH={site.packages}"]
    ports = ["--grpc-address=127.0.0.1", f"--grpc-port={site.grpc_port}", "--allow-http=false", "--allow-metrics=false"]
    folders = [f"--model-repository={site.folder}", f"--backend-directory={home / 'backends'}", "--disable-auto-complete-config"]
    path = f"PATH={site.environment / 'bin'}:{os.environ['PATH']}"
    return ["env", *search, path, str(home / "bin/tritonserver"), *folders, *ports]


PEERS: Mapping[str, tuple[Sequence[str], Callable[[Site], list[str]]]] = {
    "KServe": (["kserve==0.21.0", "onnxruntime"], kserve),
    "MLServer": (["mlserver==1.7.1", "uvloop<0.22", "onnxruntime"], mlserver),  # a newer uvloop leaves it without an event loop
    "Triton": (["nvidia-pytriton==0.7.0", "onnxruntime"], triton),
}


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server to measure."""

    command: Sequence[str]
    load: Load
    log: Path | None = None  # where a peer writes


def install(environment: Path, requirements: Sequence[str]) -> None:
    """Make an environment, once. Raises subprocess.CalledProcessError."""
    stamp, wanted = environment / "installed", "\n".join(requirements)
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True, capture_output=True, text=True)  # noqa: S603
    pip = [str(environment / "bin/python"), "-m", "pip", "install", "--quiet", *requirements]
    subprocess.run(pip, check=True, capture_output=True, text=True)  # noqa: S603
    stamp.write_text(wanted)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def peer(name: str, load: Load, model: Path, environments: Path, folder: Path) -> Server:
    """Install a peer and write what it needs into `folder`. Raises subprocess.CalledProcessError and OSError."""
    requirements, command = PEERS[name]
    environment, card = (environments / name.lower()).absolute(), read_card(model)
    install(environment, requirements)
    (at := folder / name).mkdir()
    site = Site(environment=environment, model=model, card=card, folder=at, grpc_port=free_port(), http_port=free_port())
    launcher = [sys.executable, str(OURS / "launch.py"), str(site.grpc_port), str(log := folder / f"{name}.log")]
    return Server(command=[*launcher, *command(site)], load=columns(load) if name == "Triton" else load, log=log)


def columns(load: Load) -> Load:
    """The load for Triton, which knows no rows without axes: (batch,) becomes (batch, 1)."""
    request = ModelInferRequest.FromString(load.request.SerializeToString())
    if len(request.inputs[0].shape) == 1:
        request.inputs[0].shape.append(1)
    return replace(load, request=request)


def verify(address: str, request: ModelInferRequest, card: Card) -> None:
    """Make sure that a server answers what the card says. Raises RuntimeError when not, grpc.RpcError when it does not answer."""
    with grpc.insecure_channel(address) as channel:
        response = inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=30)
    found = np.frombuffer(response.raw_output_contents[0], card.output.dtype).reshape(tuple(response.outputs[0].shape))
    expected = np.resize([example.output for example in card.examples], (request.inputs[0].shape[0], *card.output.shape))
    if found.shape != expected.shape or np.abs(found - expected).max() > TOLERANCE:
        raise RuntimeError(f"answers {found}, the card says {expected}")


def alone(server: Server, card: Card | None) -> tuple[float, float]:
    """Start one server: seconds until it is ready, MB of its process tree after 100 requests.

    Raises RuntimeError, grpc.RpcError; the answer is compared with `card`, unless that is None.
    """
    begun = time.perf_counter()
    with started(*server.command) as (address, pid):
        ready = time.perf_counter() - begun
        if card:
            verify(address, server.load.request, card)
        drive(address, pid, replace(server.load, requests=100, in_flight=4))
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return ready, sum(process.memory_full_info().pss for process in tree) / 1e6


def rounds_of(servers: Mapping[str, Server], rounds: int) -> dict[str, Result]:
    """The median of each figure over rounds that alternate between servers, after one that warms up; each has its own load."""
    results: dict[str, list[Result]] = {name: [] for name in servers}
    with ExitStack() as stack:
        running = {name: stack.enter_context(started(*server.command)) for name, server in servers.items()}
        for _ in range(1 + rounds):
            for name, (address, pid) in running.items():
                results[name].append(drive(address, pid, servers[name].load))
    return {name: median(found[1:]) for name, found in results.items()}


def reason(error: Exception, log: Path | None) -> str:
    """Why a server cannot be measured, in one line: the error, and the last line that it or pip wrote."""
    if isinstance(error, subprocess.CalledProcessError):
        said, written = "could not be installed", error.stderr
    else:
        said = (error.details() if isinstance(error, grpc.Call) else str(error)) or type(error).__name__
        said = "did not start" if said.endswith("did not start") else said.splitlines()[0]  # without the long command
        written = log.read_text() if log and log.exists() else ""
    return ": ".join([said, *written.strip().splitlines()[-1:]])


def measure(model: Path, rows: int, rounds: int, environments: Path, folder: Path) -> str:
    """The table of one model; `folder` is a temporary one. A server that does not work is reported and left out."""
    shutil.copytree(model, served := folder / "models" / model.name, ignore=lambda _, names: {*names} - {"card.json", "model.onnx"})
    card = read_card(served)
    load = Load(request=build_request(card, rows), requests=6000)
    tercet = [str(Path(sys.executable).with_name("tercet")), "serve", "--port=0", "--device=cpu", f"--models={served.parent}"]
    servers = {"tercet": Server(command=tercet, load=load)}
    servers["echo"] = Server(command=[sys.executable, "-m", "benchmarks.load"], load=load)
    figures: dict[str, tuple[float, float]] = {}
    for name in [*servers, *PEERS]:
        try:
            if name in PEERS:
                servers[name] = peer(name, load, served, environments, folder)
            times, sizes = zip(*(alone(servers[name], None if name == "echo" else card) for _ in range(STARTS)), strict=True)
            figures[name] = statistics.median(times), statistics.median(sizes)
        except (OSError, RuntimeError, subprocess.CalledProcessError, grpc.RpcError, psutil.Error) as error:
            print(f"{name} is left out: {reason(error, servers[name].log if name in servers else None)}", flush=True)
    results = rounds_of({name: servers[name] for name in figures}, rounds)
    header, *lines = table(results, rows).splitlines()
    extra = (f"{ready:8.2f} {size:7.0f}" for ready, size in figures.values())
    return "\n".join([f"{header} {'ready s':>8} {'PSS MB':>7}", *map(" ".join, zip(lines, extra, strict=True))])


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("models", nargs=-1)
@click.option("--rows", default=1, help="Rows of a request.")
@click.option("--rounds", default=5, help="Rounds that count; the figures are their medians.")
@click.option("--environments", type=Path, default=HERE / ".environments", help="Where the peers are installed.")
def main(models: Sequence[str], rows: int, rounds: int, environments: Path) -> None:
    """Measure the trained MODELS, fizzbuzz unless named, in the service and in its peers."""
    for name in models or ["fizzbuzz"]:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name}, {rows} rows a request", flush=True)
            print(measure(HERE.parent / "models" / name, rows, rounds, environments, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
