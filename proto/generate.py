"""Generate service/tercet/proto from the .proto files in this folder: `python proto/generate.py [OUT]`."""

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "service"


def generate(out: Path) -> None:
    """Write *_pb2.py, *_pb2.pyi and *_pb2_grpc.py to `out`/tercet/proto.

    `-Itercet/proto=proto` makes the generated code import from tercet.proto; its messages use that package's descriptor pool.
    """
    sources = sorted(f"tercet/proto/{path.name}" for path in HERE.glob("*.proto"))
    includes = [f"-Itercet/proto={HERE}", f"-I{files('grpc_tools') / '_proto'}"]
    if protoc.main(["protoc", *includes, f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}", *sources]):
        sys.exit("protoc failed")
    package = out / "tercet" / "proto"
    for path in package.glob("*_pb2.py"):
        code = path.read_text()
        code = code.replace(
            "from google.protobuf import descriptor_pool as _descriptor_pool\n", "from tercet.proto import POOL as _pool\n"
        )
        path.write_text(code.replace("_descriptor_pool.Default()", "_pool"))
    for path in (*package.glob("*_pb2_grpc.py"), *package.glob("*_pb2.pyi")):
        path.write_text("# mypy: ignore-errors\n" + path.read_text())


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
