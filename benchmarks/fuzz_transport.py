"""Throw broken connections at server/transport: python benchmarks/fuzz_transport.py --connections 1000000 --processes 2.

Each connection is a valid conversation (calls of all kinds, with metadata, compression, padding, CONTINUATION, pings, resets) with
its bytes or its frames mutated: bits flipped, frames dropped, repeated, swapped, cut, lengths and ids changed, junk put in between,
cut into reads at chance. It goes straight into the protocol object, with a transport that writes into memory, so that thousands of
connections a second are tried, and a failure can be repeated by its seed. Checked after each:

    no exception leaves the protocol, nothing is logged as an error, no task or call is left
    what the server sent is valid HTTP/2 as nghttp2's client reads it, and no status is INTERNAL, except the one that gRPC demands
    a call on a new connection is answered (every thousand), and the memory does not grow (every tenth of the run)
"""

import argparse
import asyncio
import contextlib
import gzip
import logging
import os
import random
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import grpc
import hpack
import ngh2
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from tercet.server import transport
from tercet.server.transport.connection import Connection

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
METHODS = ("Echo", "Twice", "Join", "Upper", "Sleep", "None")
DEMANDED = b"marked%20as%20compressed"  # "Compression" demands INTERNAL for that
TICKS = 12  # of the loop, in which handlers must have ended


class Errors(logging.Handler):
    """What was logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.lines.append(self.format(record))


class Memory:
    """A transport that goes nowhere."""

    def __init__(self) -> None:
        self.output = bytearray()
        self.closed = False

    def write(self, data: bytes) -> None:
        """Keep it, unless the connection is closed."""
        if not self.closed:
            self.output += data

    def get_extra_info(self, name: str) -> Any:
        """An address."""
        return ("192.0.2.1", 1) if name == "peername" else None

    def is_closing(self) -> bool:
        """Whether it is closed."""
        return self.closed

    def can_write_eof(self) -> bool:
        """As with TLS."""
        return False

    def close(self) -> None:
        """Close."""
        self.closed = True

    abort = close


async def echo(request: bytes, context: Any) -> bytes:
    """Answer with the request; read the metadata, which may be broken."""
    context.set_trailing_metadata((("n", str(len(context.invocation_metadata()))),))
    return request


async def twice(request: bytes, _context: Any) -> AsyncIterator[bytes]:
    """Answer twice."""
    yield request
    yield request


async def join(requests: AsyncIterator[bytes], _context: Any) -> bytes:
    """Answer at the end."""
    return b"".join([request async for request in requests])


async def upper(requests: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
    """Answer each."""
    async for request in requests:
        yield request.upper()


async def sleep(_request: bytes, _context: Any) -> bytes:
    """Do not answer."""
    await asyncio.sleep(3600)
    return b""


def handlers() -> dict[str, Any]:
    """A method of each kind."""
    return {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Twice": grpc.unary_stream_rpc_method_handler(twice),
        "Join": grpc.stream_unary_rpc_method_handler(join),
        "Upper": grpc.stream_stream_rpc_method_handler(upper),
        "Sleep": grpc.unary_unary_rpc_method_handler(sleep),
    }


def conversation(chance: random.Random) -> list[bytes]:
    """What a client could send, as frames; the first is the preface."""
    encoder = hpack.Encoder()
    frames: list[Frame] = [
        SettingsFrame(settings={chance.choice((1, 3, 4, 5, 6)): chance.choice((0, 100, 65_535))} if happens(chance, 0.3) else {})
    ]
    for number in range(chance.randrange(1, 6)):
        frames += call(chance, encoder, 2 * number + 1)
        frames += list(extras(chance, 2 * number + 1))
    return [PREFACE, *[frame.serialize() for frame in frames]]


def call(chance: random.Random, encoder: hpack.Encoder, stream_id: int) -> Iterator[Frame]:
    """One call."""
    headers = [(":method", "POST"), (":scheme", "http"), (":path", f"/fuzz.Fuzz/{chance.choice(METHODS)}"), (":authority", "x")]
    headers += [
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("grpc-encoding", chance.choice(("gzip", "identity", "deflate"))),
    ]
    optional = [
        ("grpc-timeout", "10S"),
        ("x-bin", "AAEC"),
        ("grpc-accept-encoding", "gzip"),
        ("user-agent", "fuzz"),
        ("long", "v" * 300),
    ]
    headers += [header for header in optional if happens(chance, 0.4)]
    if happens(chance, 0.2):
        at = chance.randrange(len(headers))
        headers[at] = (headers[at][0], garble(chance, headers[at][1].encode()).decode("latin1"))
    block = encoder.encode(headers)
    if happens(chance, 0.2):
        cut = chance.randrange(len(block))
        yield HeadersFrame(stream_id, block[:cut])
        yield ContinuationFrame(stream_id, block[cut:], flags=["END_HEADERS"])
    else:
        yield HeadersFrame(stream_id, block, flags=["END_HEADERS"])
    content = b""
    for _ in range(chance.choice((1, 1, 1, 0, 2, 3))):
        message, compressed = (
            chance.randbytes(chance.choice((0, 3, 50, 400))),
            ("grpc-encoding", "gzip") in headers and happens(chance, 0.5),
        )
        message = gzip.compress(message) if compressed else message
        content += struct.pack(">BI", compressed, len(message)) + message
    if happens(chance, 0.2):
        content = garble(chance, content or b"x")
    size = chance.choice((1, 7, 100, 10_000))
    pieces = [content[start : start + size] for start in range(0, len(content), size)][:40]
    for piece in pieces:
        padded = happens(chance, 0.1)
        yield DataFrame(stream_id, piece, flags=["PADDED"] if padded else [], pad_length=5 if padded else 0)
    yield DataFrame(stream_id, flags=["END_STREAM"])


def happens(chance: random.Random, probability: float) -> bool:
    """Whether it does this time."""
    return chance.random() < probability


def garble(chance: random.Random, content: bytes) -> bytes:
    """Some bytes changed, lost or added."""
    broken = bytearray(content)
    for _ in range(chance.randrange(1, 3)):
        at = chance.randrange(len(broken) + 1)
        broken[at : at + chance.randrange(2)] = chance.randbytes(chance.randrange(3))
    return bytes(broken)


def extras(chance: random.Random, stream_id: int) -> Iterator[Frame]:
    """What may stand between calls."""
    choices: list[Frame] = [
        PingFrame(opaque_data=bytes(8)),
        WindowUpdateFrame(chance.choice((0, stream_id)), window_increment=1000),
        RstStreamFrame(stream_id, error_code=8),
        PriorityFrame(stream_id, depends_on=0),
        SettingsFrame(flags=["ACK"]),
        SettingsFrame(settings={4: chance.choice((0, 10, 2**31 - 1))}),
        GoAwayFrame(last_stream_id=0),
    ]
    if happens(chance, 0.5):
        yield chance.choice(choices)


MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (  # of a frame
    lambda chance, frame: replace(frame, at := chance.randrange(len(frame)), frame[at] ^ 1 << chance.randrange(8)),
    lambda chance, frame: replace(frame, chance.randrange(len(frame)), chance.randrange(256)),
    lambda chance, frame: replace(
        frame, chance.randrange(min(9, len(frame))), chance.randrange(256)
    ),  # length, type, flags, stream
    lambda chance, frame: frame[: chance.randrange(len(frame))],
    lambda _, frame: b"",  # noqa: ARG005
    lambda _, frame: frame * 2,
    lambda chance, frame: frame + chance.randbytes(chance.randrange(1, 40)),
    lambda chance, frame: frame[:9] + garble(chance, frame[9:]),  # the length no longer fits
)


def replace(frame: bytes, at: int, byte: int) -> bytes:
    """One byte changed."""
    return frame[:at] + bytes([byte]) + frame[at + 1 :]


def mutate(chance: random.Random, frames: list[bytes]) -> bytes:
    """The conversation, broken in up to four ways."""
    for _ in range(chance.choice((0, 1, 1, 2, 4))):
        at = chance.randrange(1, len(frames))
        if happens(chance, 0.1):
            other = chance.randrange(1, len(frames))
            frames[at], frames[other] = frames[other], frames[at]
        else:
            frames[at] = chance.choice(MUTATIONS)(chance, frames[at] or b"\0")
    content = b"".join(frames)
    return MUTATIONS[0](chance, content) if happens(chance, 0.05) else content


async def converse(server: Any, chance: random.Random, content: bytes) -> Memory:
    """Send it in reads of any size, and go away."""
    memory, connection = Memory(), Connection(server)
    connection.connection_made(memory)  # type: ignore[arg-type]
    position = 0
    while position < len(content) and not memory.closed:
        size = chance.choice((1, 9, 100, 5_000, len(content)))
        connection.data_received(content[position : position + size])
        position += size
        if happens(chance, 0.3):
            await asyncio.sleep(0)
        if happens(chance, 0.02):
            connection.pause_writing()
            await asyncio.sleep(0)
            connection.resume_writing()
    for _ in range(chance.choice((0, 1, TICKS))):
        await asyncio.sleep(0)
    if happens(chance, 0.05):
        connection.drain(b"fuzz")
    if happens(chance, 0.05):
        connection.check(time.monotonic() + 1e4)
    memory.close()
    connection.connection_lost(None)
    return memory


def read_output(output: bytes) -> tuple[str, list[str]]:
    """How the server ended it, and what is wrong with what it sent."""
    if output.startswith(b"HTTP/1.1 "):
        return "http1", []
    outcome, wrong, decoder, position = "open", [], hpack.Decoder(), 0
    while position < len(output):
        frame, length = Frame.parse_frame_header(memoryview(output)[position : position + 9])
        body = memoryview(output)[position + 9 : position + 9 + length]
        if len(body) < length:
            wrong.append("a frame is cut")
            break
        frame.parse_body(body)
        position += 9 + length
        if isinstance(frame, HeadersFrame):
            headers = dict(decoder.decode(frame.data, raw=True))
            if headers.get(b"grpc-status") == b"13" and DEMANDED.replace(b"%20", b" ") not in headers.get(b"grpc-message", b""):
                wrong.append(f"INTERNAL: {headers.get(b'grpc-message')!r}")
        elif isinstance(frame, GoAwayFrame):
            outcome = f"GOAWAY {frame.error_code}"
            if frame.error_code == ngh2.ErrorCode.INTERNAL_ERROR:
                wrong.append("GOAWAY INTERNAL_ERROR")
        elif isinstance(frame, RstStreamFrame) and frame.error_code == ngh2.ErrorCode.INTERNAL_ERROR:
            wrong.append("RST_STREAM INTERNAL_ERROR")
    return outcome, wrong


async def alive(server: Any) -> bool:
    """Whether a good call on a new connection is answered."""
    memory, connection = Memory(), Connection(server)
    connection.connection_made(memory)  # type: ignore[arg-type]
    connection.data_received(PREFACE + SettingsFrame().serialize())
    block = hpack.Encoder().encode(
        [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/fuzz.Fuzz/Echo"),
            (":authority", "x"),
            ("content-type", "application/grpc"),
        ]
    )
    message = struct.pack(">BI", 0, 10) + b"still here"
    call_frames = (
        HeadersFrame(1, block, flags=["END_HEADERS"]).serialize() + DataFrame(1, message, flags=["END_STREAM"]).serialize()
    )
    connection.data_received(call_frames)
    for _ in range(TICKS):
        await asyncio.sleep(0)
    memory.close()
    connection.connection_lost(None)
    return b"still here" in memory.output


def resident_mib() -> float:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def fuzz(first: int, connections: int) -> tuple[Counter[str], list[str], list[float]]:
    """Outcomes, failures with their seeds, and memory over time."""
    errors, loop_errors = Errors(), []
    logging.getLogger().addHandler(errors)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: loop_errors.append(str(context)))
    server = transport.server(options=[("grpc.max_concurrent_streams", 100), ("grpc.max_receive_message_length", 10_000)])
    server.add_registered_method_handlers("fuzz.Fuzz", handlers())
    await server.start()
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    memory: list[float] = []
    for seed in range(first, first + connections):
        chance = random.Random(seed)  # noqa: S311
        try:
            output = (await converse(server, chance, mutate(chance, conversation(chance)))).output
            outcome, wrong = read_output(bytes(output))
            outcomes[outcome] += 1
        except Exception:  # noqa: BLE001  that is what is looked for
            wrong = [traceback.format_exc(limit=-4)]
        for _ in range(TICKS):
            if len(asyncio.all_tasks()) <= 2:  # noqa: PLR2004  this one and the server's clock
                break
            await asyncio.sleep(0)
        else:
            wrong.append(f"{len(asyncio.all_tasks()) - 2} tasks are left")
        if server.active_calls or server.connections:
            wrong.append(f"{server.active_calls} calls and {len(server.connections)} connections are left")
        wrong += errors.lines + loop_errors
        errors.lines.clear()
        loop_errors.clear()
        if (seed - first) % 1000 == 0 and not await alive(server):
            wrong.append("a good call is not answered")
        failures += [f"seed {seed}: {line}" for line in wrong]
        if (seed - first) % max(1, connections // 10) == 0:
            memory.append(resident_mib())
    await server.stop(0)
    return outcomes, failures, memory


def work(arguments: tuple[int, int]) -> tuple[Counter[str], list[str], list[float]]:
    """One process's part."""
    logging.disable(logging.WARNING)
    return asyncio.run(fuzz(*arguments))


def main() -> None:
    """Fuzz, print what happened, and fail when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    each = -(-arguments.connections // arguments.processes)
    parts = [(arguments.seed + number * each, each) for number in range(arguments.processes)]
    begun = time.perf_counter()
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(get_context("spawn").Pool(arguments.processes)) if arguments.processes > 1 else None
        results = pool.map(work, parts) if pool else [work(part) for part in parts]
    outcomes: Counter[str] = sum((result[0] for result in results), Counter())
    failures = [failure for result in results for failure in result[1]]
    print(f"{sum(outcomes.values())} connections in {time.perf_counter() - begun:.0f} s")
    print(*[f"  {count:8} {outcome}" for outcome, count in outcomes.most_common()], sep="\n")
    for _, _, memory in results:
        print("  MiB over the run:", *[f"{mib:.0f}" for mib in memory])
    print(f"{len(failures)} failures", *failures[:20], sep="\n  ")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
