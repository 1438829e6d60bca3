"""The gRPC servicers, one module per .proto file, and the generated functions (servicer, server) that add them to a server."""

from collections.abc import Callable
from typing import Any

from tercet.proto import diabetes_pb2_grpc, digits_pb2_grpc, fizzbuzz_pb2_grpc, inference_pb2_grpc
from tercet.server.rpc import BaseServicer
from tercet.server.servicers.diabetes import DiabetesServicer
from tercet.server.servicers.digits import DigitsServicer
from tercet.server.servicers.fizzbuzz import FizzBuzzServicer
from tercet.server.servicers.inference import InferenceServicer

SERVICES: dict[Callable[[Any, Any], None], type[BaseServicer]] = {
    inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server: InferenceServicer,
    diabetes_pb2_grpc.add_DiabetesServicer_to_server: DiabetesServicer,
    digits_pb2_grpc.add_DigitsServicer_to_server: DigitsServicer,
    fizzbuzz_pb2_grpc.add_FizzBuzzServicer_to_server: FizzBuzzServicer,
}
