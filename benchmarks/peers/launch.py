"""Start a server and print a line when it is ready, for servers that do not print one: launch.py PORT LOG COMMAND...

This process becomes the server, so that its id, time and memory are the server's alone. Another process, which is not a child of
it, polls ServerReady and then prints `ready at host:port`. Nothing is printed when the server ends first or needs more than
READY_TIMEOUT_SECONDS; then it is killed. The server's own output goes to the file LOG.
"""

import os
import signal
import sys
import time

READY_TIMEOUT_SECONDS = 120.0


def announce(address: str, server: int) -> None:
    """Print the address once the server is ready."""
    import grpc  # noqa: PLC0415  not in the process that becomes the server
    import psutil  # noqa: PLC0415
    from tercet.proto import inference_pb2_grpc  # noqa: PLC0415
    from tercet.proto.inference_pb2 import ServerReadyRequest  # noqa: PLC0415

    options = [(f"grpc.{which}_reconnect_backoff_ms", 20) for which in ("initial", "min", "max")]
    stub = inference_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(address, options=options))
    end, process = time.monotonic() + READY_TIMEOUT_SECONDS, psutil.Process(server)
    while time.monotonic() < end and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        try:
            if stub.ServerReady(ServerReadyRequest(), timeout=1).ready:
                print(f"ready at {address}", flush=True)
                return
        except grpc.RpcError:
            pass
        time.sleep(0.01)
    os.kill(server, signal.SIGKILL)


def main() -> None:
    """Fork twice, so that the polling process belongs to init."""
    port, log, *command = sys.argv[1:]
    server = os.getpid()
    if os.fork() == 0:
        if os.fork() == 0:
            announce(f"127.0.0.1:{port}", server)
        os._exit(0)
    os.wait()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.execvp(command[0], command)  # noqa: S606  our own command


if __name__ == "__main__":
    main()
