"""Who may import whom, and that generated code is what its sources say."""

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest
from tercet.proto import inference_pb2
from tritonclient.grpc import model_config_pb2, service_pb2

from proto.generate import generate
from tests.conftest import REPOSITORY

MAY_IMPORT: dict[str, set[str]] = {"models": set(), "proto": set(), "pipeline": {"models"}, "service": {"proto"}}
OURS = {*MAY_IMPORT, "tests", "examples"}
TORCH_ENGINE = Path("service", "engine.py"), "TorchEngine"  # alone in the service may use a model's Python, and torch


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Top-level packages that some code imports, at the top or inside a function."""
    found: set[str] = set()
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def split_off_torch_engine(path: Path) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """The statements of a file, and those of the torch engine when it is there."""
    body = ast.parse((REPOSITORY / path).read_text()).body
    engine = [node for node in body if (path, getattr(node, "name", None)) == TORCH_ENGINE]
    return [node for node in body if node not in engine], engine


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_they_may(room: str) -> None:
    """Models and proto import nothing of ours, the pipeline models, the service proto; never service <-> pipeline."""
    files = [path.relative_to(REPOSITORY) for path in (REPOSITORY / room).rglob("*.py")]
    forbidden = OURS - MAY_IMPORT[room] - {room} | ({"torch"} if room == "service" else set())
    found = {str(path): sorted(imported(split_off_torch_engine(path)[0]) & forbidden) for path in files}
    assert {path: names for path, names in found.items() if names} == {}
    assert set().union(*(imported(split_off_torch_engine(path)[0]) for path in files)) >= MAY_IMPORT[room]


def test_only_the_torch_engine_uses_a_models_python() -> None:
    """The one exception to the rule is still needed, and is no larger than it must be."""
    assert imported(split_off_torch_engine(TORCH_ENGINE[0])[1]) & {*OURS, "torch"} == {"models", "torch"}


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    """The committed Python code of every .proto file is what protoc makes of it now."""
    generate(tmp_path)
    fresh = {path.name: path.read_text() for path in (tmp_path / "proto").iterdir()}
    assert fresh == {path.name: path.read_text() for path in (REPOSITORY / "proto").glob("*_pb2*")}


def test_our_messages_and_tritons_live_in_one_process() -> None:
    """Every message of ours is Triton's, field by field, though both are imported here."""
    messages = {**service_pb2.DESCRIPTOR.message_types_by_name, **model_config_pb2.DESCRIPTOR.message_types_by_name}
    for name, message in inference_pb2.DESCRIPTOR.message_types_by_name.items():
        theirs = messages[name].fields_by_name
        for field in message.fields:
            other = theirs[field.name]
            assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated), field.full_name
