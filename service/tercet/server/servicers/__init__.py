"""The gRPC servicers, one module per .proto file. This table is the only place that names the services."""

from collections.abc import Callable
from typing import Any, NamedTuple

from tercet.proto import diabetes_pb2_grpc, digits_pb2_grpc, fizzbuzz_pb2_grpc, inference_pb2_grpc
from tercet.server.rpc import Backend, BaseServicer
from tercet.server.servicers.diabetes import DiabetesServicer
from tercet.server.servicers.digits import DigitsServicer
from tercet.server.servicers.fizzbuzz import FizzBuzzServicer
from tercet.server.servicers.inference import InferenceServicer

__all__ = ["SERVICES", "Backend", "BaseServicer", "Service"]


class Service(NamedTuple):
    """A gRPC service and what implements it."""

    name: str  # with its package
    add_to_server: Callable[[Any, Any], None]  # generated: (servicer, server)
    servicer: type[BaseServicer]


SERVICES = (
    Service("inference.GRPCInferenceService", inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server, InferenceServicer),
    Service("tercet.v1.Diabetes", diabetes_pb2_grpc.add_DiabetesServicer_to_server, DiabetesServicer),
    Service("tercet.v1.Digits", digits_pb2_grpc.add_DigitsServicer_to_server, DigitsServicer),
    Service("tercet.v1.FizzBuzz", fizzbuzz_pb2_grpc.add_FizzBuzzServicer_to_server, FizzBuzzServicer),
)
