"""What two sides of a socket say to each other, written once and free of any socket.

A conversation is a generator: it yields bytes to have them sent, or a number to be given exactly that many received bytes, and returns
its result. `converse` holds one on a socket and blocks; `acceptor.Acceptor` holds hundreds in one thread. Nobody ever reads more than
was asked for, so whoever gets the socket afterwards finds its first byte.

After `authentication.handshake` conversations speak in frames: version u16, kind u16, nbytes u32, payload. Nothing is pickled. Frames are
not encrypted: the network of a job may be listened to, but not joined without its secret.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Generator
from typing import Any, TypeVar

from ringfold.collectives.errors import CommunicationError

Result = TypeVar("Result")
Conversation = Generator[bytes | int, bytes, Result]

VERSION = 1
MAX_PAYLOAD_NBYTES = 1 << 20  # the largest is a value of the store; a length beyond it is noise or an attack
_HEADER = struct.Struct("<HHI")


def converse(sock: socket.socket, conversation: Conversation[Result], deadline: float) -> Result:
    """Hold a conversation on a blocking socket, until the `time.monotonic` deadline.

    The conversation sees TimeoutError at the deadline and EOFError when the other side is gone, and may turn them into something that
    says more. The socket is blocking again afterwards.
    """
    try:
        request = next(conversation)
        while True:
            try:
                answer = _perform(sock, request, deadline)
            except (TimeoutError, EOFError) as error:
                request = conversation.throw(error)
            else:
                request = conversation.send(answer)
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        conversation.close()
        sock.settimeout(None)


def _perform(sock: socket.socket, request: bytes | int, deadline: float) -> bytes:
    try:
        if isinstance(request, bytes):
            sock.settimeout(_remaining_s(deadline))
            sock.sendall(request)
            return b""
        received = bytearray()
        while len(received) < request:
            sock.settimeout(_remaining_s(deadline))
            piece = sock.recv(request - len(received))
            if not piece:
                raise EOFError("the other side closed the connection")
            received += piece
        return bytes(received)
    except TimeoutError:
        raise
    except OSError as error:
        raise EOFError(f"the connection broke: {error.strerror or error}") from None


def _remaining_s(deadline: float) -> float:
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:  # settimeout(0) would mean something else
        raise TimeoutError("the deadline has passed")
    return remaining_s


def frame(kind: int, payload: bytes = b"") -> bytes:
    """Return a message as it is sent.

    Raises: CommunicationError, if the payload is over the limit.
    """
    if len(payload) > MAX_PAYLOAD_NBYTES:
        raise CommunicationError(f"a message of {len(payload)} bytes was to be sent, the limit is {MAX_PAYLOAD_NBYTES}")
    return _HEADER.pack(VERSION, kind, len(payload)) + payload


def receive_frame() -> Conversation[tuple[int, bytes]]:
    """Receive one message: its kind and its payload.

    Raises: CommunicationError, if it is of another version or over the limit.
    """
    version, kind, nbytes = _HEADER.unpack((yield _HEADER.size))
    if version != VERSION:
        raise CommunicationError(f"a message of version {version} arrived, expected {VERSION}: install the same ringfold everywhere")
    if nbytes > MAX_PAYLOAD_NBYTES:
        raise CommunicationError(f"a message of {nbytes} bytes was announced, the limit is {MAX_PAYLOAD_NBYTES}")
    return kind, (yield nbytes) if nbytes else b""


def pack_record(record: dict[str, Any]) -> bytes:
    """Return a mapping of plain values as the payload of a message."""
    return json.dumps(record, separators=(",", ":")).encode()


def unpack_record(payload: bytes, **expected: type) -> dict[str, Any]:
    """Return the mapping in a payload, with at least the expected keys, each of its type.

    Raises: CommunicationError, if it is not one.
    """
    try:
        record = json.loads(payload)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in expected.items()):
        raise CommunicationError(f"a message was not understood: {payload[:80]!r}, expected JSON with {', '.join(expected)}")
    return record
