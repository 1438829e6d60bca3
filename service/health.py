"""Whether a service is well, for whatever starts it: `python -m service.health HOST:PORT [NAME]` exits with 0 when it is SERVING.

NAME is a model, or `workers`; without one the whole service is meant.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT = 4.0  # seconds


def main(address: str, name: str = "") -> int:
    """Ask once, say what the answer is; 0 for SERVING, else 1."""
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=name)
        try:
            status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT).status
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}")
            return 1
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(status))
    return int(status != health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
