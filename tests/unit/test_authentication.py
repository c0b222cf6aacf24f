"""The handshake: both sides prove themselves, and nobody else gets anywhere."""

import contextlib
import hashlib
import hmac
import secrets
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from ringfold.collectives.authentication import authenticate
from ringfold.collectives.errors import AuthenticationError, ConnectError

SECRET = secrets.token_bytes(32)


@pytest.fixture
def pair():
    left, right = socket.socketpair()
    yield left, right
    left.close()
    right.close()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(3) as pool:
        yield pool


def served(pool: ThreadPoolExecutor, sock: socket.socket, secret: bytes, role: str, timeout_s: float = 10.0) -> Future:
    """Hold the handshake in a thread and close the socket if it fails, as every caller does."""

    def run() -> float:
        try:
            authenticate(sock, secret, role, timeout_s)
        except BaseException:
            sock.close()
            raise
        return time.monotonic()

    return pool.submit(run)


def receive(sock: socket.socket, nbytes: int) -> bytes:
    sock.settimeout(10)
    received = b""
    while len(received) < nbytes and (piece := sock.recv(nbytes - len(received))):
        received += piece
    return received


def test_equal_secrets_get_through_and_leave_a_blocking_socket(pair, pool):
    client, server = served(pool, pair[0], SECRET, "client"), served(pool, pair[1], SECRET, "server")
    client.result(10), server.result(10)
    assert [sock.gettimeout() for sock in pair] == [None, None]
    pair[0].sendall(b"after")
    assert receive(pair[1], 5) == b"after"


def test_nothing_after_the_handshake_is_swallowed(pair, pool):
    server = served(pool, pair[1], SECRET, "server")

    def client() -> None:
        authenticate(pair[0], SECRET, "client", 10)
        pair[0].sendall(b"x" * 1001)

    pool.submit(client).result(10)
    server.result(10)
    assert receive(pair[1], 1001) == b"x" * 1001


@pytest.mark.parametrize("wrong", [b"", b"\0" * 32, SECRET[:-1], SECRET + b"\0"], ids=["empty", "zeros", "shorter", "longer"])
@pytest.mark.parametrize("wrong_role", ["client", "server"])
def test_wrong_secret_is_told_to_both_sides_within_a_second(pair, pool, wrong, wrong_role):
    began = time.monotonic()
    ends = [served(pool, sock, wrong if role == wrong_role else SECRET, role) for sock, role in zip(pair, ("client", "server"), strict=True)]
    for end in ends:
        with pytest.raises(AuthenticationError, match="holds a different secret"):
            end.result(10)
    assert time.monotonic() - began < 1.0


def test_server_shows_nothing_to_who_fails(pair, pool):
    server = served(pool, pair[1], SECRET, "server")
    greeting = receive(pair[0], 40)
    assert greeting[:8] == b"RFAUTH01"
    pair[0].sendall(b"RFAUTH01" + bytes(32) + bytes(32))
    assert receive(pair[0], 33) == bytes(32)
    with pytest.raises(AuthenticationError):
        server.result(10)


def test_reflected_handshake_does_not_authenticate(pair, pool):
    def echo() -> None:
        while piece := pair[1].recv(4096):
            pair[1].sendall(piece)

    mirror = pool.submit(echo)
    with pytest.raises(AuthenticationError):
        served(pool, pair[0], SECRET, "client").result(10)
    mirror.result(10)


def test_two_clients_cannot_be_made_to_prove_each_other(pool):
    # Whoever sits between two clients and passes on what they say gets two client proofs, and none of a server.
    left, right = socket.socketpair()
    ends = [served(pool, sock, SECRET, "client") for sock in (left, right)]
    for end in ends:
        with pytest.raises(AuthenticationError):
            end.result(10)


def test_recorded_client_cannot_be_replayed(pair, pool):
    first = served(pool, pair[1], SECRET, "server")
    challenge = receive(pair[0], 40)[8:]
    own = secrets.token_bytes(32)
    proof = hmac.digest(hashlib.sha256(SECRET).digest(), b"ringfold client" + challenge + own, "sha256")
    recorded = b"RFAUTH01" + own + proof
    pair[0].sendall(recorded)
    first.result(10)  # a right client, so far
    again, server = socket.socketpair()
    with again, server:
        second = served(pool, server, SECRET, "server")
        again.sendall(recorded)
        with pytest.raises(AuthenticationError):
            second.result(10)


@pytest.mark.parametrize("greeting", [b"GET / HTTP/1.1\r\nHost: node-a\r\nAccept: */*\r\n\r\n", bytes(200)], ids=["http", "zeros"])
@pytest.mark.parametrize("role", ["client", "server"])
def test_something_else_is_told_at_once(pair, pool, greeting, role):
    end = served(pool, pair[1], SECRET, role)
    pair[0].sendall(greeting)
    with pytest.raises(AuthenticationError, match="it is not ringfold"):
        end.result(1.0)


@pytest.mark.parametrize("role", ["client", "server"])
def test_silence_ends_at_the_deadline(pair, pool, role):
    with pytest.raises(ConnectError, match=r"within 0\.2 s"):
        served(pool, pair[1], SECRET, role, timeout_s=0.2).result(5)


def test_slow_bytes_do_not_move_the_deadline(pair, pool):
    end = served(pool, pair[1], SECRET, "server", timeout_s=0.5)
    began = time.monotonic()
    pause = threading.Event()
    with contextlib.suppress(BrokenPipeError):
        for _ in range(40):
            pair[0].send(b"R")
            pause.wait(0.05)
    with pytest.raises(ConnectError):
        end.result(5)
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize("said", [40, 71])
def test_server_that_goes_away_is_not_taken_for_a_refusal(pair, pool, said):
    end = served(pool, pair[1], SECRET, "client")
    pair[0].sendall((b"RFAUTH01" + bytes(64))[:said])
    receive(pair[0], 72)
    pair[0].close()
    with pytest.raises(ConnectError, match="was not finished"):
        end.result(10)


@pytest.mark.parametrize("said", [0, 3, 40, 41])
def test_client_that_goes_away_is_a_connect_error(pair, pool, said):
    end = served(pool, pair[1], SECRET, "server")
    pair[0].sendall((b"RFAUTH01" + bytes(64))[:said])
    pair[0].close()
    with pytest.raises(ConnectError, match="was not finished"):
        end.result(10)
