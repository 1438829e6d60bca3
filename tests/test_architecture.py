"""Who may import whom, and that generated code is what its sources say."""

import sys
from pathlib import Path

from tercet.proto import inference_pb2
from tritonclient.grpc import model_config_pb2, service_pb2

from tests.conftest import REPOSITORY, run


def test_import_contracts_hold() -> None:
    """The import contracts of pyproject.toml are kept."""
    run("lint-imports", cwd=REPOSITORY)


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    """The committed Python code of every .proto file is what protoc makes of it now."""
    (tmp_path / "tercet/proto").mkdir(parents=True)
    run(sys.executable, "proto/generate.py", str(tmp_path), cwd=REPOSITORY)
    fresh = {path.name: path.read_text() for path in (tmp_path / "tercet/proto").iterdir()}
    committed = REPOSITORY / "service/tercet/proto"
    assert fresh == {path.name: path.read_text() for path in committed.glob("*_pb2*")}


def test_our_messages_and_tritons_live_in_one_process() -> None:
    """Every message of ours is Triton's, field by field, though both are imported here."""
    messages = {**service_pb2.DESCRIPTOR.message_types_by_name, **model_config_pb2.DESCRIPTOR.message_types_by_name}
    for name, message in inference_pb2.DESCRIPTOR.message_types_by_name.items():
        theirs = messages[name].fields_by_name
        for field in message.fields:
            other = theirs[field.name]
            assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated), field.full_name
