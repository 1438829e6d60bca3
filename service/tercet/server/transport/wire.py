"""How gRPC writes things: messages, compression, metadata, timeouts, status texts. No state, no I/O."""

import base64
import binascii
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes

from grpc import Compression, StatusCode

Headers = tuple[tuple[bytes, bytes], ...]

PREFIX = struct.Struct(">BI")  # before each message: compressed (0 or 1), length in bytes
UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}  # of grpc-timeout, in seconds
TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
RESERVED = re.compile(rb":|(?:te|content-type|host|grpc-(?:timeout|encoding|accept-encoding|message-type|status|message))$")
KEY, VALUE = re.compile(rb"[0-9a-z_.-]+"), re.compile(rb"(?! )[ -~]*(?<! )")  # legal metadata
UNQUOTED = " !\"#$&'()*+,/:;<=>?@[\\]^`{|}"  # printable ASCII but %; quote_from_bytes adds letters, digits and -._~
ENCODINGS = {Compression.Deflate: b"deflate", Compression.Gzip: b"gzip"}
WINDOW_BITS = {b"deflate": 15, b"gzip": 31}  # for zlib: RFC 1950 and RFC 1952
ACCEPTED = b"identity,deflate,gzip"
STATUS: dict[StatusCode, Headers] = {code: ((b"grpc-status", b"%d" % code.value[0]),) for code in StatusCode}
MAX_METADATA_BYTES = 2**15  # of what a handler sends; nghttp2 sends no more than 64 KiB of headers
MAX_DETAILS = 4096  # characters of a status' text


class Metadatum(NamedTuple):
    """One entry of metadata, as grpc.aio has it; the value is bytes where the key ends in -bin."""

    key: str
    value: str | bytes


class CallError(Exception):
    """Ends a call with a status."""

    def __init__(self, code: StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details


def encode_message(message: bytes, encoding: bytes | None = None) -> bytes:
    """A message with its prefix; compressed when there is an encoding and it makes the message smaller."""
    if encoding:
        engine = zlib.compressobj(wbits=WINDOW_BITS[encoding])
        compressed = engine.compress(message) + engine.flush()
        if len(compressed) < len(message):
            return PREFIX.pack(1, len(compressed)) + compressed
    return PREFIX.pack(0, len(message)) + message


def check_encoding(encoding: bytes) -> bytes:
    """The grpc-encoding of a request. Raises CallError unless it is known."""
    if encoding in WINDOW_BITS or encoding in (b"", b"identity"):
        return encoding
    text = encoding[:20].decode(errors="replace")
    raise CallError(StatusCode.UNIMPLEMENTED, f"grpc-encoding: expected one of {ACCEPTED.decode()}, got {text!r}")


def decompress(message: bytes, encoding: bytes, limit: int) -> bytes:
    """The message itself; memory stays bounded whatever a few bytes would expand to. Raises CallError."""
    if encoding in (b"", b"identity"):  # "Compression": the one status that the standard demands here
        raise CallError(StatusCode.INTERNAL, "a message is marked as compressed, but the call has no grpc-encoding")
    engine = zlib.decompressobj(WINDOW_BITS[encoding])
    try:
        plain = engine.decompress(message, limit + 1)
    except zlib.error as error:
        raise CallError(StatusCode.INVALID_ARGUMENT, f"a message is not {encoding.decode()}: {error}") from error
    if len(plain) > limit:
        raise CallError(StatusCode.RESOURCE_EXHAUSTED, f"Received message larger than max (decompressed, {limit} bytes)")
    if not engine.eof:
        raise CallError(StatusCode.INVALID_ARGUMENT, f"a message is not {encoding.decode()}: it is incomplete")
    return plain


def decode_timeout(value: bytes) -> float:
    """Seconds of a grpc-timeout such as 100m. Raises CallError, also when it is over already."""
    match = TIMEOUT.fullmatch(value)
    if match is None:
        text = value[:20].decode(errors="replace")
        raise CallError(StatusCode.INVALID_ARGUMENT, f"grpc-timeout: expected up to 8 digits and one of HMSmun, got {text!r}")
    if not int(match[1]):
        raise CallError(StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
    return int(match[1]) * UNITS[match[2]]


def decode_metadata(headers: Iterable[tuple[bytes, bytes]]) -> tuple[Metadatum, ...]:
    """What a handler sees of a call's headers. Raises CallError.

    Values of keys that end in -bin are base64, with or without padding; a proxy may have joined several with commas.
    """
    metadata = []
    for name, value in headers:
        if RESERVED.match(name):
            continue
        key = name.decode("ascii", "replace")
        if not key.endswith("-bin"):
            metadata.append(Metadatum(key, value.decode("utf-8", "replace")))
            continue
        for part in value.split(b","):
            try:
                metadata.append(Metadatum(key, base64.b64decode(part.strip() + b"=" * (-len(part.strip()) % 4), validate=True)))
            except binascii.Error as error:
                raise CallError(StatusCode.INVALID_ARGUMENT, f"metadata {key}: expected base64: {error}") from error
    return tuple(metadata)


def encode_metadata(metadata: Sequence[tuple[str, str | bytes]] | Any) -> Headers:
    """Headers of what a handler sends. Raises ValueError for what HTTP/2 or gRPC do not allow."""
    headers = []
    for key, value in metadata or ():
        name = key.encode()
        if name.endswith(b"-bin"):
            content = base64.b64encode(value.encode() if isinstance(value, str) else value).rstrip(b"=")
        else:
            content = value.encode() if isinstance(value, str) else value
        if not KEY.fullmatch(name) or RESERVED.match(name) or not VALUE.fullmatch(content):
            raise ValueError(f"metadata: expected a lower-case key and a value of printable ASCII, got {key!r}: {value!r}")
        headers.append((name, content))
    if header_bytes(headers) > MAX_METADATA_BYTES:
        raise ValueError(f"metadata: expected at most {MAX_METADATA_BYTES} bytes, got {header_bytes(headers)}")
    return tuple(headers)


def header_bytes(headers: Sequence[tuple[bytes, bytes]]) -> int:
    """The size of a header list as SETTINGS_MAX_HEADER_LIST_SIZE counts it: 32 more per field (RFC 9113, 6.5.2)."""
    return 32 * len(headers) + sum(map(len, chain.from_iterable(headers)))


def status_headers(code: StatusCode, details: str) -> Headers:
    """grpc-status and grpc-message, the latter percent-encoded UTF-8."""
    if not details:
        return STATUS[code]
    text = details[:MAX_DETAILS].encode(errors="replace")
    return (*STATUS[code], (b"grpc-message", quote_from_bytes(text, UNQUOTED).encode()))
