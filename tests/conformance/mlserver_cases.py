"""MLServer's own stubs, converters and codecs against a service: `python mlserver_cases.py ADDRESS FOLDER`, in its environment."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from mlserver.codecs import NumpyCodec
from mlserver.grpc import converters
from mlserver.grpc import dataplane_pb2 as pb
from mlserver.grpc.dataplane_pb2_grpc import GRPCInferenceServiceStub
from mlserver.types import InferenceRequest

DTYPES = {"UINT8": np.uint8, "INT64": np.int64, "FP32": np.float32}


def main(address: str, folder: Path) -> None:
    """Make the calls of MLServer's own tests (tests/grpc/test_servicers.py); exit with 1 at the first wrong response."""
    with grpc.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        check(stub.ServerLive(pb.ServerLiveRequest()).live, "server live")
        check(stub.ServerReady(pb.ServerReadyRequest()).ready, "server ready")
        check(stub.ServerMetadata(pb.ServerMetadataRequest()).name == "tercet", "server metadata")
        for path in sorted(folder.glob("*/card.json")):
            model(stub, json.loads(path.read_text()))
        names = [each.name for each in stub.RepositoryIndex(pb.RepositoryIndexRequest()).models]
        check(names == sorted(path.parent.name for path in folder.glob("*/card.json")), "repository index")
        stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=names[0]))
        check(stub.ModelReady(pb.ModelReadyRequest(name=names[0])).ready, "repository load")
        for call, request in (
            (stub.ModelInfer, pb.ModelInferRequest(model_name="nope")),
            (stub.ModelMetadata, pb.ModelMetadataRequest(name="nope")),
            (stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name="nope")),
            (stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name="nope")),
        ):
            check_fails(call, request, grpc.StatusCode.NOT_FOUND)
        check_fails(stub.ModelInfer, pb.ModelInferRequest(model_name=names[0]), grpc.StatusCode.INVALID_ARGUMENT)


def model(stub: GRPCInferenceServiceStub, card: dict[str, Any]) -> None:
    """Check one model: ready, metadata, and the examples in its card."""
    name, tensor = card["name"], card["input"]
    check(stub.ModelReady(pb.ModelReadyRequest(name=name)).ready, f"{name} ready")
    check(stub.ModelMetadata(pb.ModelMetadataRequest(name=name)).inputs[0].name == tensor["name"], f"{name} metadata")
    rows = np.array([example["input"] for example in card["examples"]], DTYPES[tensor["datatype"]])
    request = InferenceRequest(id="7", inputs=[NumpyCodec.encode_input(tensor["name"], rows)])
    request.inputs[0].parameters = None
    for raw in (False, True):
        given = converters.ModelInferRequestConverter.from_types(request, model_name=name, model_version="", use_raw=raw)
        given.inputs[0].shape[:] = rows.shape  # MLServer's codec makes (n,) to (n, 1)
        response = converters.ModelInferResponseConverter.to_types(stub.ModelInfer(given))
        values = NumpyCodec.decode_output(response.outputs[0])
        right = np.allclose(values, [example["output"] for example in card["examples"]], rtol=0, atol=1e-5)
        check(right and response.id == "7" and response.model_name == name, f"{name} infers {'raw' if raw else 'typed'} contents")


def check_fails(call: Callable[[Any], Any], request: object, code: grpc.StatusCode) -> None:
    """Check that a call fails with a status code."""
    try:
        call(request)
        check(condition=False, what=f"{type(request).__name__} fails")
    except grpc.RpcError as error:
        check(error.code() == code, f"{type(request).__name__} fails: {error.details()}")


def check(condition: bool, what: str) -> None:  # noqa: FBT001  the condition is the point
    """Print a check that passed, or exit with 1."""
    print(f"{'ok' if condition else 'WRONG'}: {what}", flush=True)
    if not condition:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
