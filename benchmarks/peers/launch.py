"""Become a server that does not say when it is ready, and let another process say it: launch.py PORT LOG COMMAND...

The process that is started becomes the server, so that its id, time and memory are the server's alone. The one that waits is
no child of it, prints `ready at host:port` once ServerReady answers so, and ends. Nothing is printed when the server ends
first or needs more than PATIENCE seconds; then it is killed. What the server itself prints goes to the file LOG.
"""

import os
import signal
import sys
import time

PATIENCE = 120.0  # seconds


def announce(address: str, server: int) -> None:
    """Print the address when the server there is ready."""
    import grpc  # noqa: PLC0415  not in the process that becomes the server
    import psutil  # noqa: PLC0415
    from tercet.proto import inference_pb2_grpc  # noqa: PLC0415
    from tercet.proto.inference_pb2 import ServerReadyRequest  # noqa: PLC0415

    options = [(f"grpc.{which}_reconnect_backoff_ms", 20) for which in ("initial", "min", "max")]
    stub = inference_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(address, options=options))
    end, process = time.monotonic() + PATIENCE, psutil.Process(server)
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
    """Fork twice, so that the waiting process belongs to init."""
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
