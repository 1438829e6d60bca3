"""Measure the service, KServe, MLServer and Triton with the same ONNX file and one onnxruntime thread.

    python -m benchmarks.peers --install                # once: the environments that measurements and tests need
    python -m benchmarks.peers fizzbuzz mnist --rows 1

Every server serves one model with one instance. KServe has no batching in the server; MLServer's always waits and stays off, as by
default; Triton's dynamic batching is on. Latency logs, metrics and Triton's HTTP port are off. First each server is started alone:
`ready s` is the time to the first line it prints (of a peer: to ServerReady), `PSS MB` the memory of its process tree after 100
requests; both are medians of STARTS. Then all run at once in alternating rounds, as in benchmarks.load.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import grpc
import psutil
from tercet.card import Card, read_card
from tercet.proto.inference_pb2 import ModelInferRequest
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub

from benchmarks.load import ECHO, Load, build_request, compare, drive, free_port, is_correct, pss_megabytes, serve, started, table
from deploy.triton.export import export

HERE = Path(__file__).parent
SCRIPTS = HERE / "peers"  # what runs in the environments of the peers
ENVIRONMENTS = HERE / ".environments"
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
        """The site-packages of the environment."""
        return Path(sysconfig.get_path("platlib", vars={"base": str(self.environment), "platbase": str(self.environment)}))


def kserve(site: Site) -> list[str]:
    """Return the command that starts KServe."""
    model = [site.card.name, site.card.output.name, str(site.model / "model.onnx")]
    server = [str(site.environment / "bin/python"), str(SCRIPTS / "kserve_server.py")]
    return [*server, *model, str(site.http_port), str(site.grpc_port)]


def mlserver(site: Site) -> list[str]:
    """Write the settings of MLServer and return the command that starts it."""
    ports = {"http_port": site.http_port, "grpc_port": site.grpc_port, "host": "127.0.0.1", "metrics_endpoint": None}
    settings = {"debug": False, "parallel_workers": 0, "grpc_max_message_length": 2**24, **ports}
    parameters = {"uri": str((site.model / "model.onnx").absolute()), "extra": {"output": site.card.output.name}}
    model = {"name": site.card.name, "implementation": "mlserver_runtime.OnnxModel", "parameters": parameters}
    (site.folder / "settings.json").write_text(json.dumps(settings))
    (site.folder / "model-settings.json").write_text(json.dumps(model))
    return ["env", f"--chdir={site.folder}", f"PYTHONPATH={SCRIPTS}", str(site.environment / "bin/mlserver"), "start", "."]


def triton(site: Site) -> list[str]:
    """Write Triton's model repository, add the stub for this Python version to its backend, and return the command."""
    home = site.packages / "pytriton/tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(home / "python_backend_stubs" / version / "triton_python_backend_stub", home / "backends/python")
    export(site.model.parent, site.folder, "python")
    with (site.folder / site.card.name / "config.pbtxt").open("a") as config:
        config.write("instance_group [ { count: 1 kind: KIND_CPU } ]\n")
    libraries = f"{sysconfig.get_config_var('LIBDIR')}:{site.packages}/nvidia_pytriton.libs"
    search = [f"LD_LIBRARY_PATH={libraries}", f"PYTHONPATH={site.packages}"]
    ports = ["--grpc-address=127.0.0.1", f"--grpc-port={site.grpc_port}", "--allow-http=false", "--allow-metrics=false"]
    folders = [f"--model-repository={site.folder}", f"--backend-directory={home / 'backends'}", "--disable-auto-complete-config"]
    path = f"PATH={site.environment / 'bin'}:{os.environ['PATH']}"
    return ["env", *search, path, str(home / "bin/tritonserver"), *folders, *ports]


PEERS: Mapping[str, Callable[[Site], list[str]]] = {"KServe": kserve, "MLServer": mlserver, "Triton": triton}


def install(name: str) -> Path:
    """Install peers/NAME.txt into benchmarks/.environments/NAME, unless it is up to date; return it. Raises CalledProcessError."""
    environment, requirements = ENVIRONMENTS / name, SCRIPTS / f"{name}.txt"
    stamp = environment / "installed"
    if not stamp.is_file() or stamp.read_text() != requirements.read_text():
        start = time.perf_counter()
        python = str(environment / "bin/python")
        uv = shutil.which("uv")  # several times as fast
        pip = [uv, "pip", "install", "--python", python] if uv else [python, "-m", "pip", "install"]
        for command in ([sys.executable, "-m", "venv", "--clear", str(environment)], [*pip, "--quiet", "-r", str(requirements)]):
            subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
        stamp.write_text(requirements.read_text())
        size = sum(path.lstat().st_size for path in environment.rglob("*")) / 1e6
        print(f"{name}: {size:.0f} MB in {environment} after {time.perf_counter() - start:.0f} s", flush=True)
    return environment.absolute()


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server to measure."""

    command: Sequence[str]
    load: Load
    log: Path | None = None  # where a peer writes


def prepare(name: str, load: Load, model: Path, folder: Path) -> Server:
    """Install a peer and write what it needs into `folder`. Raises CalledProcessError and OSError."""
    (own := folder / name).mkdir()
    ports = {"grpc_port": free_port(), "http_port": free_port()}
    site = Site(environment=install(name.lower()), model=model, card=read_card(model), folder=own, **ports)
    launcher = [sys.executable, str(SCRIPTS / "launch.py"), str(site.grpc_port), str(log := folder / f"{name}.log")]
    return Server(command=[*launcher, *PEERS[name](site)], load=with_columns(load) if name == "Triton" else load, log=log)


def with_columns(load: Load) -> Load:
    """Change rows without axes, (batch,), to (batch, 1) for Triton, which requires an axis."""
    request = ModelInferRequest.FromString(load.request.SerializeToString())
    if len(request.inputs[0].shape) == 1:
        request.inputs[0].shape.append(1)
    return replace(load, request=request)


def measure_start(server: Server, card: Card | None) -> tuple[float, float]:
    """Start one server alone: seconds until it is ready, MB of its process tree after 100 requests.

    The answer is checked against `card`, if given. Raises RuntimeError, grpc.RpcError.
    """
    start = time.perf_counter()
    with started(*server.command) as (address, pid):
        ready = time.perf_counter() - start
        if card:
            with grpc.insecure_channel(address) as channel:
                response = GRPCInferenceServiceStub(channel).ModelInfer(server.load.request, timeout=30)
            if not is_correct(response, card, server.load.request.inputs[0].shape[0]):
                raise RuntimeError("its answers differ from the card's")
        drive(address, pid, replace(server.load, requests=100, in_flight=4))
        return ready, pss_megabytes(pid)


def describe_failure(error: Exception, log: Path | None) -> str:
    """Return one line: the error, and the last line that the server or pip wrote."""
    if isinstance(error, subprocess.CalledProcessError):
        reason, output = "installation failed", error.stderr
    else:
        reason = (error.details() if isinstance(error, grpc.Call) else str(error)) or type(error).__name__
        reason = "did not start" if reason.endswith("did not start") else reason.splitlines()[0]  # without the long command
        output = log.read_text() if log and log.exists() else ""
    return ": ".join([reason, *output.strip().splitlines()[-1:]])


def measure(model: Path, rows: int, rounds: int, folder: Path) -> str:
    """Return the table of one model; `folder` is a temporary one. A server that does not work is reported and left out."""
    shutil.copytree(model, served := folder / "models" / model.name, ignore=lambda _, names: {*names} - {"card.json", "model.onnx"})
    card = read_card(served)
    load = Load(request=build_request(card, rows), requests=6000)
    servers = {
        "tercet": Server(command=serve("--device=cpu", models=served.parent), load=load),
        "echo": Server(command=ECHO, load=load),
    }
    starts: dict[str, tuple[float, float]] = {}
    for name in [*servers, *PEERS]:
        try:
            if name in PEERS:
                servers[name] = prepare(name, load, served, folder)
            times, sizes = zip(
                *(measure_start(servers[name], None if name == "echo" else card) for _ in range(STARTS)), strict=True
            )
            starts[name] = statistics.median(times), statistics.median(sizes)
        except (OSError, RuntimeError, subprocess.CalledProcessError, grpc.RpcError, psutil.Error) as error:
            print(f"{name} is left out: {describe_failure(error, servers[name].log if name in servers else None)}", flush=True)
    results = compare({name: servers[name].command for name in starts}, {name: servers[name].load for name in starts}, rounds)
    header, *lines = table(results, rows).splitlines()
    columns = (f"{ready:8.2f} {size:7.0f}" for ready, size in starts.values())
    return "\n".join([f"{header} {'ready s':>8} {'PSS MB':>7}", *map(" ".join, zip(lines, columns, strict=True))])


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("models", nargs=-1)
@click.option("--rows", default=1, help="Rows per request.")
@click.option("--rounds", default=5, help="Rounds that count; the figures are their medians.")
@click.option("--install", "only_install", is_flag=True, help="Only install what is missing in benchmarks/.environments.")
def main(models: Sequence[str], rows: int, rounds: int, *, only_install: bool) -> None:
    """Measure the trained MODELS (default: fizzbuzz) in the service and in its peers."""
    if only_install:
        for requirements in sorted(SCRIPTS.glob("*.txt")):
            install(requirements.stem)
        return
    for model in models or ["fizzbuzz"]:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{model}, {rows} rows per request", flush=True)
            print(measure(HERE.parent / "models" / model, rows, rounds, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
