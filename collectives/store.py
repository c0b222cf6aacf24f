"""A small key-value store, by which processes that do not know each other yet agree on where they are.

Keys are text, values bytes. `get` waits until the key is there, so a store is also how one process waits for another. One server
thread holds every client (`acceptor.Acceptor`); who does not hold the secret gets nothing from it. It keeps what it is given until it
is deleted or the server closes: users delete what they no longer need by prefix. It is no database: nothing is written to disk,
nothing is replicated, and a value has at most 1 MiB.

Request and answer are frames. Request payload: key length u16, key, then the value (SET), seconds f64 (GET) or a decimal number (ADD).
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from types import TracebackType
from typing import Self

from ringfold.collectives.acceptor import HANDSHAKE_TIMEOUT_S, Acceptor, Admitted, Pause, Reception, Wake
from ringfold.collectives.authentication import authenticate, handshake
from ringfold.collectives.connect import dial, join_address, listen
from ringfold.collectives.conversation import Conversation, converse, frame, receive_frame
from ringfold.collectives.errors import CommunicationError, ConnectError

_SET, _GET, _ADD, _DELETE = 1, 2, 3, 4
_VALUE, _NOTHING, _REFUSED = 16, 17, 18
_KEY_NBYTES = struct.Struct("<H")
_SECONDS = struct.Struct("<d")

# A server answers a get at its deadline; this is how much later than that the answer may arrive before the server counts as lost.
_ANSWER_TIMEOUT_S = 5.0


class StoreServer:
    """Serves a store at `address` from construction until `close`; `refused` counts callers without the secret.

    Raises: OSError, if the port is taken.
    """

    def __init__(self, secret: bytes, host: str = "127.0.0.1", port: int = 0) -> None:
        self._secret = secret
        self._values: dict[str, bytes] = {}
        listener = listen(host, port)
        self.address = join_address(*listener.getsockname()[:2])
        try:
            self._acceptor = Acceptor("ringfold-store", {listener: self._serve})
        except BaseException:
            listener.close()
            raise

    @property
    def refused(self) -> int:
        return self._acceptor.refused

    def close(self) -> None:
        """End the thread and every connection; the values are gone."""
        self._acceptor.close()

    def close_descriptors(self) -> None:
        """Close everything that a forked child has inherited, without a word to anybody."""
        self._acceptor.close_descriptors()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _serve(self, _: socket.socket) -> Reception:
        yield from handshake(self._secret, "server")
        yield Admitted()
        while True:
            kind, payload = yield from receive_frame()
            key, value = _unpack(payload)
            if kind == _SET:
                self._values[key] = value
                yield Wake(key)
                yield frame(_VALUE)
            elif kind == _GET:
                deadline = time.monotonic() + _unpack_seconds(value)
                while key not in self._values and time.monotonic() < deadline:
                    yield Pause(key, deadline)
                yield frame(_VALUE, self._values[key]) if key in self._values else frame(_NOTHING)
            elif kind == _ADD:
                try:
                    total = int(self._values.get(key, b"0")) + int(value)
                except ValueError:
                    yield frame(_REFUSED, f"{key!r} holds {self._values.get(key)!r}, expected a number to add to".encode())
                else:
                    self._values[key] = b"%d" % total
                    yield Wake(key)
                    yield frame(_VALUE, self._values[key])
            elif kind == _DELETE:
                doomed = [name for name in self._values if name.startswith(key)]
                for name in doomed:
                    del self._values[name]
                yield frame(_VALUE, b"%d" % len(doomed))
            else:
                raise CommunicationError(f"a request of kind {kind} arrived, expected {_SET} to {_DELETE}")


class Store:
    """A client of a store. Threads may share it; they wait for each other, also for a `get`."""

    def __init__(self, address: str, secret: bytes, timeout_s: float) -> None:
        """Connect, and prove to each other to hold the secret.

        Raises: AuthenticationError, if the server holds another secret. ConnectError, if it cannot be reached in `timeout_s`.
        """
        self.address = address
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._sock: socket.socket | None = dial(address, time.monotonic() + timeout_s)
        self.local_host: str = self._sock.getsockname()[0]  # of the interface that leads to the server
        try:
            authenticate(self._sock, secret, "client", min(timeout_s, HANDSHAKE_TIMEOUT_S))
        except CommunicationError as error:
            self.close()
            raise type(error)(f"the store at {address} did not let us in: {error}") from None

    def set(self, key: str, value: bytes) -> None:
        """Store a value under a key, whatever was there."""
        self._request(_SET, key, value, self._timeout_s)

    def get(self, key: str, timeout_s: float | None = None) -> bytes | None:
        """Return the value of a key, waiting for it up to `timeout_s` (as given to the constructor); None if it was not set by then."""
        wait_s = self._timeout_s if timeout_s is None else timeout_s
        return self._request(_GET, key, _SECONDS.pack(wait_s), max(0.0, wait_s) + _ANSWER_TIMEOUT_S)

    def add(self, key: str, amount: int) -> int:
        """Add to a number, 0 if it is not there, and return the sum: one step, whoever else adds."""
        return int(self._request(_ADD, key, b"%d" % amount, self._timeout_s) or b"0")

    def delete(self, prefix: str) -> int:
        """Delete every key that begins so, and return how many there were."""
        return int(self._request(_DELETE, prefix, b"", self._timeout_s) or b"0")

    def close(self) -> None:
        """Close the connection; what was set stays."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _request(self, kind: int, key: str, value: bytes, timeout_s: float) -> bytes | None:
        request = frame(kind, _pack(key, value))
        with self._lock:
            if self._sock is None:
                raise ConnectError(f"the store at {self.address} was asked for {key!r} after the connection to it was closed")
            try:
                answer, payload = converse(self._sock, _exchange(request), time.monotonic() + timeout_s)
            except (TimeoutError, EOFError, CommunicationError) as error:
                self.close()  # half an exchange may be on the wire: nothing that follows could be told apart from it
                raise ConnectError(f"the store at {self.address} was lost during the request for {key!r}: {error}") from None
        if answer == _REFUSED:
            raise CommunicationError(f"the store at {self.address} refused: {payload.decode(errors='replace')}")
        return payload if answer == _VALUE else None


def _exchange(request: bytes) -> Conversation[tuple[int, bytes]]:
    yield request
    return (yield from receive_frame())


def _pack(key: str, value: bytes) -> bytes:
    name = key.encode()
    return _KEY_NBYTES.pack(len(name)) + name + value


def _unpack(payload: bytes) -> tuple[str, bytes]:
    try:
        (nbytes,) = _KEY_NBYTES.unpack_from(payload)
        end = _KEY_NBYTES.size + nbytes
        if end > len(payload):
            raise ValueError("the key is cut off")
        return payload[_KEY_NBYTES.size : end].decode(), payload[end:]
    except (struct.error, ValueError) as error:
        raise CommunicationError(f"a request was not understood: {error}") from None


def _unpack_seconds(value: bytes) -> float:
    if len(value) != _SECONDS.size:
        raise CommunicationError(f"a time of {len(value)} bytes arrived, expected {_SECONDS.size}")
    seconds: float = _SECONDS.unpack(value)[0]
    return seconds
