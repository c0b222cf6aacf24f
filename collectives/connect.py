"""Connections between the ranks of one generation: who calls, who listens, and how they tell connections apart.

Of two ranks the lower listens and the higher calls. After the handshake the caller says which connection this is,

    hello = {generation, purpose, rank}

and the listener answers with its own, so both know that they reached the right rank of the right generation; purposes ("link",
"comm 7 collective") are agreed on by the ranks. A call that nobody has asked for yet is kept until somebody does, so ranks may come
in any order. Addresses are "host:port", "[host]:port" or "unix:NAME" (Linux's abstract namespace: no file, nothing to leave behind).
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ringfold.collectives.acceptor import Acceptor, Admitted, Reception
from ringfold.collectives.authentication import handshake
from ringfold.collectives.conversation import Conversation, converse, frame, pack_record, receive_frame, unpack_record
from ringfold.collectives.errors import CommunicationError, ConfigError, ConnectError

LOOPBACK = "127.0.0.1"
SILENCE_S = 3.0  # of a host, after which it counts as lost

_HELLO = 32
_BACKLOG = 1024


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of "host:port" or "[host]:port".

    Raises: ConfigError, if it is neither.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ConfigError(f"{address!r} is not an address, expected HOST:PORT such as 10.0.0.7:29501")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    """Return the inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen_everywhere(port: int) -> socket.socket:
    """Return a listening TCP socket on all addresses of this host, of both families where the kernel has both; port 0 is any free one."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
    return listen("0.0.0.0", port)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening TCP socket; port 0 is any free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)


def listen_unix(name: str) -> socket.socket:
    """Return a listening socket with that name in the abstract namespace of this network namespace."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(f"\0{name}")
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def dial(address: str, deadline: float) -> socket.socket:
    """Return a connected, blocking socket.

    Raises: ConnectError, if nobody listens there, or not before the `time.monotonic` deadline.
    """
    while True:
        remaining_s = deadline - time.monotonic()
        try:
            if remaining_s <= 0:
                raise TimeoutError("timed out")
            return _dial_once(address, remaining_s)
        except BlockingIOError:  # a unix listener with a full backlog
            time.sleep(min(0.001, remaining_s))
        except OSError as error:
            raise ConnectError(f"no connection to {address}: {error.strerror or error}") from None


def _dial_once(address: str, timeout_s: float) -> socket.socket:
    if address.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect("\0" + address.removeprefix("unix:"))
        except OSError:
            sock.close()
            raise
    else:
        sock = socket.create_connection(split_address(address), timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A free port among those that the system hands out to callers can be handed to this very call, which then reaches itself.
        if sock.getsockname() == sock.getpeername():
            sock.close()
            raise ConnectionRefusedError("the call reached itself")
    sock.settimeout(None)
    return sock


def keep_watch(sock: socket.socket) -> None:
    """Have the kernel break an idle or busy connection a few seconds after the other host has fallen silent: a cut cable, a dead host.

    Only for connections that the other side reads at all times, as it reads links: the same option ends one whose receiver has merely been
    too busy to read for that long (tcp(7): TCP_USER_TIMEOUT; the kernel counts probes of a closed window too).
    """
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SILENCE_S)),
    ):
        sock.setsockopt(level, option, value)


def call(
    address: str, secret: bytes, generation: str, purpose: str, rank: int, peer: int, deadline: float, patience_s: float = float("inf")
) -> socket.socket:
    """Connect to a rank's listener and agree with it on what the connection is for; it has `patience_s` to pick up, and then until the deadline.

    Raises: AuthenticationError, if it holds another secret. ConnectError, if it cannot be reached, or is not who we meant.
    """
    sock = dial(address, min(deadline, time.monotonic() + patience_s))
    try:
        answer = converse(sock, _introduce(secret, generation, purpose, rank), deadline)
        if answer != (generation, purpose, peer):
            raise ConnectError(f"{address} answered as rank {answer[2]} of {answer[0]} for {answer[1]!r}, expected rank {peer} of {generation}")
    except BaseException as error:
        sock.close()
        if isinstance(error, TimeoutError):
            raise ConnectError(f"rank {peer} at {address} did not answer in time") from None
        if isinstance(error, EOFError):
            raise ConnectError(f"rank {peer} at {address} went away while we connected for {purpose!r} of {generation}: {error}") from None
        raise
    return sock


def _introduce(secret: bytes, generation: str, purpose: str, rank: int) -> Conversation[tuple[str, str, int]]:
    yield from handshake(secret, "client")
    yield _hello(generation, purpose, rank)
    return (yield from _receive_hello())


def _hello(generation: str, purpose: str, rank: int) -> bytes:
    return frame(_HELLO, pack_record({"generation": generation, "purpose": purpose, "rank": rank}))


def _receive_hello() -> Conversation[tuple[str, str, int]]:
    kind, payload = yield from receive_frame()
    if kind != _HELLO:
        raise CommunicationError(f"a message of kind {kind} arrived, expected a hello ({_HELLO})")
    hello = unpack_record(payload, generation=str, purpose=str, rank=int)
    return hello["generation"], hello["purpose"], hello["rank"]


class Listener:
    """One rank's front door: a TCP socket at `port` and a unix socket at `unix_address`, both until `close`.

    The TCP socket is on the loopback, or `everywhere`. Every connection that comes in is authenticated and kept for whoever asks for its
    purpose and rank.
    """

    def __init__(self, secret: bytes, generation: str, rank: int, everywhere: bool) -> None:
        self._secret = secret
        self._generation = generation
        self._rank = rank
        self._arrived: dict[tuple[str, int], socket.socket] = {}
        self._changed = threading.Condition()
        name = f"ringfold-{secrets.token_hex(16)}"
        with _closing_on_error(listen_everywhere(0) if everywhere else listen(LOOPBACK, 0)) as tcp, _closing_on_error(listen_unix(name)) as unix:
            self.port: int = tcp.getsockname()[1]
            self.unix_address = f"unix:{name}"
            self._acceptor = Acceptor(f"ringfold-listener-{rank}", {tcp: self._receive, unix: self._receive})

    def collect(self, purpose: str, ranks: Iterable[int], deadline: float) -> dict[int, socket.socket]:
        """Wait for a connection for that purpose from every rank; the sockets are the caller's.

        Raises: ConnectError, naming the ranks that did not call before the deadline.
        """
        wanted = set(ranks)
        with self._changed:
            self._changed.wait_for(lambda: all((purpose, rank) in self._arrived for rank in wanted), deadline - time.monotonic())
            missing = sorted(rank for rank in wanted if (purpose, rank) not in self._arrived)
            if not missing:
                return {rank: self._arrived.pop((purpose, rank)) for rank in sorted(wanted)}
        raise ConnectError(f"{name_ranks(missing)} did not connect to rank {self._rank} for {purpose!r}")

    def close(self) -> None:
        """Stop listening, and close what nobody has asked for."""
        self._acceptor.close()
        self._close_arrived()

    def close_descriptors(self) -> None:
        """Close everything that a forked child has inherited, without a word to anybody."""
        self._acceptor.close_descriptors()
        self._close_arrived()

    def _close_arrived(self) -> None:
        for sock in self._arrived.values():
            sock.close()
        self._arrived.clear()

    def _receive(self, _: socket.socket) -> Reception:
        yield from handshake(self._secret, "server")
        generation, purpose, peer = yield from _receive_hello()
        yield Admitted()
        if generation != self._generation or (purpose, peer) in self._arrived:
            return None
        yield _hello(self._generation, purpose, self._rank)

        def take_over(sock: socket.socket) -> None:
            with self._changed:
                self._arrived[purpose, peer] = sock
                self._changed.notify_all()

        return take_over


def name_ranks(ranks: Iterable[int]) -> str:
    """Return "rank 3" or "ranks 3, 5"."""
    listed = list(ranks)
    return ("rank " if len(listed) == 1 else "ranks ") + ", ".join(map(str, listed))


@contextmanager
def _closing_on_error(sock: socket.socket) -> Iterator[socket.socket]:
    try:
        yield sock
    except BaseException:
        sock.close()
        raise
