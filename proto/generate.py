"""Generate the Python code of every .proto file in this folder: `python -m proto.generate [OUT]`."""

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).parent


def generate(out: Path) -> None:
    """Write *_pb2.py, *_pb2.pyi and *_pb2_grpc.py to `out`/proto, in the descriptor pool of this package."""
    sources = sorted(str(path.relative_to(HERE.parent)) for path in HERE.glob("*.proto"))
    includes = [f"-I{HERE.parent}", f"-I{files('grpc_tools') / '_proto'}"]
    if protoc.main(["protoc", *includes, f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}", *sources]):
        sys.exit("protoc failed")
    for path in (out / "proto").glob("*_pb2.py"):
        code = path.read_text()
        code = code.replace(
            "from google.protobuf import descriptor_pool as _descriptor_pool\n", "from proto import POOL as _pool\n"
        )
        path.write_text(code.replace("_descriptor_pool.Default()", "_pool"))
    for path in (*(out / "proto").glob("*_pb2_grpc.py"), *(out / "proto").glob("*_pb2.pyi")):
        path.write_text("# mypy: ignore-errors\n" + path.read_text())


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent)
