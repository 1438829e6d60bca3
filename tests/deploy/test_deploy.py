"""The files in deploy/ are accepted by the programs that read them; docs/deploy.md says what was tested beyond that."""

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
    """The path of a program; skips the test when it is not installed."""
    return shutil.which(name, path=f"{BIN}:/usr/sbin:/usr/bin:/bin:/usr/local/bin") or pytest.skip(f"{name} is not installed")


def known_fields(resource: Any, kind: Any) -> Any:
    """A resource without the fields unknown to Kubernetes. Raises msgspec.ValidationError for a wrong type or a missing field."""
    return strip(msgspec.to_builtins(msgspec.convert(resource, kind)))


def strip(tree: Any) -> Any:
    """Drop fields that were not set."""
    if isinstance(tree, dict):
        return {key: strip(value) for key, value in tree.items() if value is not None}
    return [strip(entry) for entry in tree] if isinstance(tree, list) else tree


@dataclass(frozen=True)
class Overlay:
    """The resources that kustomize builds from an overlay, by kind."""

    resources: dict[str, Any]


@pytest.fixture(params=["cpu", "gpu"])
def overlay(request: pytest.FixtureRequest) -> Overlay:
    """Each overlay."""
    built = run(program("kubectl"), "kustomize", str(KUBERNETES / "overlays" / request.param), cwd=REPOSITORY).stdout
    return Overlay({resource["kind"]: resource for resource in yaml.safe_load_all(built)})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kubernetes_knows_every_field(path: Path) -> None:
    """Every field exists in Kubernetes and has a value of its type, and no required field is missing."""
    resource = yaml.safe_load(path.read_text())
    assert known_fields(resource, KINDS[resource["kind"]]) == resource


def test_unknown_fields_are_found() -> None:
    """The test above can fail: an unknown field is dropped; a missing one, or one of another type, is an error."""
    resource = yaml.safe_load((KUBERNETES / "base/deployment.yaml").read_text())
    container = resource["spec"]["template"]["spec"]["containers"][0]
    container["livenessProbe"]["grcp"] = {}
    assert known_fields(resource, Deployment) != resource
    container["livenessProbe"]["grpc"] = {"port": "8001"}
    with pytest.raises(msgspec.ValidationError, match=r"livenessProbe\.grpc\.port"):
        known_fields(resource, Deployment)
    container["livenessProbe"]["grpc"] = {"port": 8001}
    del resource["spec"]["selector"]
    with pytest.raises(msgspec.ValidationError, match="selector"):
        known_fields(resource, Deployment)


@pytest.mark.slow
def test_overlays(overlay: Overlay) -> None:
    """Kubernetes knows every field that kustomize builds from each overlay, and its selectors match its pods."""
    assert set(overlay.resources) == set(KINDS)
    for kind, resource in overlay.resources.items():
        assert known_fields(resource, KINDS[kind]) == resource
        assert resource["metadata"]["namespace"] == "tercet"
    deployment = overlay.resources["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"].items()
    budget = overlay.resources["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    for selector in (deployment["selector"]["matchLabels"], overlay.resources["Service"]["spec"]["selector"], budget):
        assert selector.items() <= labels
    pod = deployment["template"]["spec"]
    for reference in (pod["containers"][0]["image"], pod["volumes"][0]["image"]["reference"]):
        assert re.fullmatch(r"registry\.example\.com/[a-z-]+:[\w.-]+", reference)


@pytest.mark.slow
def test_pods_drain(overlay: Overlay) -> None:
    """A pod is not killed before its preStop pause and the grace of the service are over."""
    pod = overlay.resources["Deployment"]["spec"]["template"]["spec"]
    pause = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > pause + Config().grace


def first_container(path: str) -> Any:
    """The container that a manifest starts."""
    spec = yaml.safe_load((KUBERNETES / path).read_text())["spec"]
    return (spec if "containers" in spec else spec["template"]["spec"])["containers"][0]


@pytest.mark.parametrize("path", STARTING)
def test_variables(path: str) -> None:
    """Every TERCET_* variable is an option of `tercet serve`, and the ports are those that it listens on."""
    container = first_container(path)
    given = {entry["name"].removeprefix("TERCET_").lower(): entry["value"] for entry in container["env"]}
    assert set(given) <= {field.name for field in fields(Config)}
    config = msgspec.convert(given, Config, strict=False, dec_hook=lambda kind, value: kind(value))
    ports = [port["containerPort"] for port in container["ports"]]
    assert ports == [port for port in (config.port, config.metrics_port) if port]
    assert {probe["grpc"]["port"] for name, probe in container.items() if name.endswith("Probe")} == {config.port}


@pytest.mark.slow
@pytest.mark.parametrize("path", STARTING)
def test_a_container_starts(workspace: Path, path: str) -> None:
    """With a manifest's variables, except the folder and the ports, the service starts and is healthy on every address."""
    environment = {entry["name"]: entry["value"] for entry in first_container(path)["env"]}
    with serving(workspace / "models", "--metrics-port", "0", **environment) as service:
        port = service.address.rpartition(":")[2]
        assert run(sys.executable, "-m", "tercet.cli.health", f"127.0.0.1:{port}", cwd=REPOSITORY).stdout == "SERVING\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["runtime", "service"])
def test_kserve_knows_every_field(name: str) -> None:
    """Every field exists in KServe's classes or, in containers, in Kubernetes'."""
    resource = yaml.safe_load((KUBERNETES / f"kserve/{name}.yaml").read_text())
    for container in resource["spec"].get("containers", []):
        assert known_fields(container, Container) == container
    if not (KSERVE / "installed").is_file():
        pytest.skip("KServe is not installed: run `python -m benchmarks.peers --install`")
    command = [str(KSERVE / "bin/python"), str(REPOSITORY / "tests/deploy/kserve_kinds.py")]
    done = subprocess.run(command, input=json.dumps(resource), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == resource


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Dockerfile", "models.Dockerfile"])
def test_the_dockerfiles_are_clean(name: str) -> None:
    """Hadolint finds nothing."""
    run("hadolint", str(DEPLOY / name), cwd=REPOSITORY)


def test_the_image_has_what_it_copies() -> None:
    """What the Dockerfile copies exists and is in the build context."""
    copied = re.findall(r"^COPY (?!--)(.*) \S+$", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    in_context = {line[1:].partition("/")[0] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    assert names == in_context
    assert all((REPOSITORY / name).exists() for name in names)


def test_the_unit_is_one_that_systemd_accepts(tmp_path: Path) -> None:
    """`systemd-analyze verify` reports nothing, given a program that exists; the unit waits longer than the grace."""
    unit = (DEPLOY / "tercet.service").read_text()
    assert float(re.findall(r"TimeoutStopSec=(\d+)", unit)[0]) > Config().grace
    (tmp_path / "tercet.service").write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", unit))
    assert run(program("systemd-analyze"), "verify", str(tmp_path / "tercet.service"), cwd=tmp_path).stdout == ""


def test_haproxy_accepts_its_file() -> None:
    """`haproxy -c` finds the configuration valid, without a warning."""
    output = run(program("haproxy"), "-c", "-f", str(DEPLOY / "haproxy.cfg"), cwd=REPOSITORY).stdout
    assert "WARNING" not in output


def test_nginx_accepts_its_file(tmp_path: Path) -> None:
    """`nginx -t` finds the configuration valid, without a warning."""
    (tmp_path / "nginx.conf").write_text((DEPLOY / "nginx.conf").read_text().replace("/run/", f"{tmp_path}/"))
    output = run(program("nginx"), "-t", "-q", "-c", str(tmp_path / "nginx.conf"), cwd=tmp_path).stdout
    assert not [line for line in output.splitlines() if "[warn]" in line or "[emerg]" in line]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["haproxy", "nginx"])
def test_a_balancer_passes_calls_on(workspace: Path, name: str) -> None:
    """Through either balancer, small and large calls to two services get the right answers."""
    program(name)
    if os.geteuid():
        pytest.skip("only root may start a balancer that takes another user")
    flags = (name, "--fault", "none", "--seconds", "1", "--models", str(workspace / "models"))
    row = run(sys.executable, "-m", "benchmarks.balancers", *flags, cwd=REPOSITORY).stdout.splitlines()[-1].split()
    assert (row[:2], row[3:6]) == ([name, "none"], ["0", "0", "0"])
    assert int(row[2]) > 10


def frames() -> Iterator[bytes]:
    """The frames of HAProxy's health check."""
    for sent in re.findall(r"tcp-check send-binary (\w+)", (DEPLOY / "haproxy.cfg").read_text()):
        yield bytes.fromhex(sent)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "nosuch"])
def test_haproxy_health_check(default_service: Running, name: str) -> None:
    """HAProxy's frames are a health check: a healthy service gives the response that HAProxy expects."""
    *head, data = frames()
    if name:  # an unknown model gives another response
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


@pytest.mark.slow
def test_the_pages_commands_run(workspace: Path, tmp_path: Path, default_service: Running) -> None:
    """Each `sh` command of docs/deploy.md exits with 0 in a trained clone, next to a running service."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (REPOSITORY / "docs/deploy.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    folder = shutil.copytree(workspace, tmp_path / "tercet")
    commands = [line for block in blocks for line in block.splitlines()]
    assert commands
    for command in commands:
        run("sh", "-c", command.replace("127.0.0.1:8001", default_service.address), cwd=folder)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "printed", "status"), [("", "SERVING", 0), ("mnist", "SERVING", 0), ("nosuch", "NOT_FOUND", 1)])
def test_health_from_a_shell(default_service: Running, name: str, printed: str, status: int) -> None:
    """`python -m tercet.cli.health` prints the health of a service or model, and exits accordingly."""
    command = [sys.executable, "-m", "tercet.cli.health", default_service.address, *filter(None, [name])]
    done = run(*command, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stdout.split(":")[0].strip()) == (status, printed)


@pytest.mark.slow
def test_health_of_nothing() -> None:
    """When nothing listens, it exits with 1 and prints the reason."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        done = run(sys.executable, "-m", "tercet.cli.health", f"127.0.0.1:{free.getsockname()[1]}", cwd=REPOSITORY, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("UNAVAILABLE: ")
