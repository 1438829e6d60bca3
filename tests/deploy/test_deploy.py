"""The files in deploy/ are what the programs that read them accept; docs/deploy.md says what was tried beyond that."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from lightkube.models.apps_v1 import Deployment
from lightkube.models.autoscaling_v2 import HorizontalPodAutoscaler
from lightkube.models.core_v1 import Container, Service
from lightkube.models.policy_v1 import PodDisruptionBudget
from tercet.server.config import Config

from tests.conftest import BIN, REPOSITORY, run, serving
from tests.conftest import Service as Running

DEPLOY = REPOSITORY / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
KSERVE = REPOSITORY / "benchmarks/.environments/kserve"  # `python -m benchmarks.peers --install` makes it
KINDS = {
    "Deployment": Deployment,
    "HorizontalPodAutoscaler": HorizontalPodAutoscaler,
    "PodDisruptionBudget": PodDisruptionBudget,
    "Service": Service,
}
STARTING = ["base/deployment.yaml", "kserve/runtime.yaml"]
FILES = sorted(path for path in (KUBERNETES / "base").glob("*.yaml") if path.name != "kustomization.yaml")


def program(name: str) -> str:
    """The path of a program, or the test is skipped with the reason."""
    return shutil.which(name, path=f"{BIN}:/usr/sbin:/usr/bin:/bin:/usr/local/bin") or pytest.skip(f"{name} is not installed")


def known(resource: Any, kind: Any) -> Any:
    """What Kubernetes knows of a resource; raises msgspec.ValidationError for a wrong type or a field that is missing."""
    return strip(msgspec.to_builtins(msgspec.convert(resource, kind)))


def strip(tree: Any) -> Any:
    """Without what was not said."""
    if isinstance(tree, dict):
        return {key: strip(value) for key, value in tree.items() if value is not None}
    return [strip(entry) for entry in tree] if isinstance(tree, list) else tree


@dataclass(frozen=True)
class Overlay:
    """What kustomize makes of an overlay, by kind."""

    resources: dict[str, Any]


@pytest.fixture(params=["cpu", "gpu"])
def overlay(request: pytest.FixtureRequest) -> Overlay:
    """Each overlay."""
    built = run(program("kubectl"), "kustomize", str(KUBERNETES / "overlays" / request.param), cwd=REPOSITORY).stdout
    return Overlay({resource["kind"]: resource for resource in yaml.safe_load_all(built)})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kubernetes_knows_all_that_is_said(path: Path) -> None:
    """Every field is one of Kubernetes', with a value of its type, and none that it needs is missing."""
    resource = yaml.safe_load(path.read_text())
    assert known(resource, KINDS[resource["kind"]]) == resource


def test_what_kubernetes_does_not_know_is_found() -> None:
    """The test above can fail: an unknown field is lost on the way, a missing one or one of another type is an error."""
    resource = yaml.safe_load((KUBERNETES / "base/deployment.yaml").read_text())
    container = resource["spec"]["template"]["spec"]["containers"][0]
    container["livenessProbe"]["grcp"] = {}
    assert known(resource, Deployment) != resource
    container["livenessProbe"]["grpc"] = {"port": "8001"}
    with pytest.raises(msgspec.ValidationError, match=r"livenessProbe\.grpc\.port"):
        known(resource, Deployment)
    container["livenessProbe"]["grpc"] = {"port": 8001}
    del resource["spec"]["selector"]
    with pytest.raises(msgspec.ValidationError, match="selector"):
        known(resource, Deployment)


def test_the_overlays_are_whole(overlay: Overlay) -> None:
    """What kustomize makes of each overlay is known to Kubernetes, and its selectors find its pods."""
    assert set(overlay.resources) == set(KINDS)
    for kind, resource in overlay.resources.items():
        assert known(resource, KINDS[kind]) == resource
        assert resource["metadata"]["namespace"] == "tercet"
    deployment = overlay.resources["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"].items()
    budget = overlay.resources["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    for selector in (deployment["selector"]["matchLabels"], overlay.resources["Service"]["spec"]["selector"], budget):
        assert selector.items() <= labels
    pod = deployment["template"]["spec"]
    for reference in (pod["containers"][0]["image"], pod["volumes"][0]["image"]["reference"]):
        assert re.fullmatch(r"registry\.example\.com/[a-z-]+:[\w.-]+", reference)


def test_pods_drain(overlay: Overlay) -> None:
    """There is time for the pre-stop pause and for the grace of the service before a pod is killed."""
    pod = overlay.resources["Deployment"]["spec"]["template"]["spec"]
    pause = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > pause + Config().grace


def first_container(path: str) -> Any:
    """The container that a manifest starts."""
    spec = yaml.safe_load((KUBERNETES / path).read_text())["spec"]
    return (spec if "containers" in spec else spec["template"]["spec"])["containers"][0]


@pytest.mark.parametrize("path", STARTING)
def test_the_variables_are_ours(path: str) -> None:
    """Every TERCET_* variable is an option of `tercet serve`, and the ports are those that it listens on."""
    container = first_container(path)
    given = {entry["name"].removeprefix("TERCET_").lower(): entry["value"] for entry in container["env"]}
    assert set(given) <= {field.name for field in fields(Config)}
    config = msgspec.convert(given, Config, strict=False, dec_hook=lambda kind, value: kind(value))
    ports = [port["containerPort"] for port in container["ports"]]
    assert ports == [port for port in (config.port, config.metrics_port) if port]
    assert {probe["grpc"]["port"] for name, probe in container.items() if name.endswith("Probe")} == {config.port}


@pytest.mark.parametrize("path", STARTING)
def test_a_container_starts(workspace: Path, path: str) -> None:
    """With a manifest's variables, but for the folder and the ports, the service starts and is well on every address."""
    environment = {entry["name"]: entry["value"] for entry in first_container(path)["env"]}
    with serving(workspace / "models", "--metrics-port", "0", **environment) as service:
        port = service.address.rpartition(":")[2]
        assert run(sys.executable, "-m", "tercet.cli.health", f"127.0.0.1:{port}", cwd=REPOSITORY).stdout == "SERVING\n"


@pytest.mark.parametrize("name", ["runtime", "service"])
def test_kserve_knows_all_that_is_said(name: str) -> None:
    """Every field is one of KServe's own classes' or, in the containers, of Kubernetes'."""
    resource = yaml.safe_load((KUBERNETES / f"kserve/{name}.yaml").read_text())
    for container in resource["spec"].get("containers", []):
        assert known(container, Container) == container
    if not (KSERVE / "installed").is_file():
        pytest.skip("KServe is not installed: run `python -m benchmarks.peers --install`")
    command = [str(KSERVE / "bin/python"), str(REPOSITORY / "tests/deploy/kserve_kinds.py")]
    done = subprocess.run(command, input=json.dumps(resource), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == resource


@pytest.mark.parametrize("name", ["Dockerfile", "models.Dockerfile"])
def test_the_dockerfiles_are_clean(name: str) -> None:
    """Nothing is found by hadolint."""
    run("hadolint", str(DEPLOY / name), cwd=REPOSITORY)


def test_the_image_has_what_it_copies() -> None:
    """What the Dockerfile copies is there, and the context lets it through."""
    copied = re.findall(r"^COPY (?!--)(.*) \S+$", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    let_through = {line[1:].partition("/")[0] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    assert names == let_through
    assert all((REPOSITORY / name).exists() for name in names)


def test_the_unit_is_one_that_systemd_accepts(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say, with a program that exists; the unit waits for longer than the grace."""
    unit = (DEPLOY / "tercet.service").read_text()
    assert float(re.findall(r"TimeoutStopSec=(\d+)", unit)[0]) > Config().grace
    (tmp_path / "tercet.service").write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", unit))
    assert run(program("systemd-analyze"), "verify", str(tmp_path / "tercet.service"), cwd=tmp_path).stdout == ""


def test_haproxy_accepts_its_file() -> None:
    """`haproxy -c` finds the configuration valid, without a warning."""
    found = run(program("haproxy"), "-c", "-f", str(DEPLOY / "haproxy.cfg"), cwd=REPOSITORY).stdout
    assert "WARNING" not in found


def test_nginx_accepts_its_file(tmp_path: Path) -> None:
    """`nginx -t` finds the configuration valid, without a warning."""
    (tmp_path / "nginx.conf").write_text((DEPLOY / "nginx.conf").read_text().replace("/run/", f"{tmp_path}/"))
    found = run(program("nginx"), "-t", "-q", "-c", str(tmp_path / "nginx.conf"), cwd=tmp_path).stdout
    assert not [line for line in found.splitlines() if "[warn]" in line or "[emerg]" in line]


@pytest.mark.parametrize("name", ["haproxy", "nginx"])
def test_a_balancer_passes_calls_on(workspace: Path, name: str) -> None:
    """Through either balancer, small and large calls to two services are answered, and rightly."""
    program(name)
    if os.geteuid():
        pytest.skip("only root may start a balancer that takes another user")
    flags = (name, "--fault", "none", "--seconds", "1", "--models", str(workspace / "models"))
    row = run(sys.executable, "-m", "benchmarks.balancers", *flags, cwd=REPOSITORY).stdout.splitlines()[-1].split()
    assert (row[:2], row[3:6]) == ([name, "none"], ["0", "0", "0"])
    assert int(row[2]) > 10


def frames() -> Iterator[bytes]:
    """What HAProxy sends to see whether a service is well."""
    for sent in re.findall(r"tcp-check send-binary (\w+)", (DEPLOY / "haproxy.cfg").read_text()):
        yield bytes.fromhex(sent)


@pytest.mark.parametrize("name", ["", "nosuch"])
def test_haproxys_question_is_answered(default_service: Running, name: str) -> None:
    """The frames that HAProxy sends are a health check: a service that is well gives the answer that HAProxy expects."""
    *head, data = frames()
    if name:  # the same for a model that there is not: no such answer
        message = b"\x0a" + bytes([len(name)]) + name.encode()
        data = (5 + len(message)).to_bytes(3) + data[3:9] + b"\0" + len(message).to_bytes(4) + message
    expected = bytes.fromhex(re.findall(r"tcp-check expect binary (\w+)", (DEPLOY / "haproxy.cfg").read_text())[0])
    host, _, port = default_service.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=2) as connection:
        connection.sendall(b"".join([*head, data]))
        answer = b""
        while b"grpc-status" not in answer and (part := connection.recv(65536)):
            answer += part
    assert (expected in answer) == (not name)


def test_the_pages_commands_run(workspace: Path, tmp_path: Path, default_service: Running) -> None:
    """Each `sh` command of docs/deploy.md exits with 0 in a trained clone, beside a running service."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (REPOSITORY / "docs/deploy.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    folder = shutil.copytree(workspace, tmp_path / "tercet")
    commands = [line for block in blocks for line in block.splitlines()]
    assert commands
    for command in commands:
        run("sh", "-c", command.replace("127.0.0.1:8001", default_service.address), cwd=folder)


@pytest.mark.parametrize(("name", "said", "status"), [("", "SERVING", 0), ("mnist", "SERVING", 0), ("nosuch", "NOT_FOUND", 1)])
def test_health_from_a_shell(default_service: Running, name: str, said: str, status: int) -> None:
    """`python -m tercet.cli.health` says how a service, or a model, is, and its exit code says it too."""
    command = [sys.executable, "-m", "tercet.cli.health", default_service.address, *filter(None, [name])]
    done = run(*command, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stdout.split(":")[0].strip()) == (status, said)


def test_health_of_nothing() -> None:
    """Where nothing listens, the exit code is 1 and the reason is said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        done = run(sys.executable, "-m", "tercet.cli.health", f"127.0.0.1:{free.getsockname()[1]}", cwd=REPOSITORY, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("UNAVAILABLE: ")
