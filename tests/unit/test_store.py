"""The store: what is set is got, waiting ends, and strangers get nothing."""

import os
import secrets
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from ringfold.collectives import acceptor
from ringfold.collectives.connect import split_address
from ringfold.collectives.errors import AuthenticationError, CommunicationError, ConfigError, ConnectError
from ringfold.collectives.store import Store, StoreServer

SECRET = secrets.token_bytes(32)


@pytest.fixture
def server():
    with StoreServer(SECRET) as server:
        yield server


@pytest.fixture
def store(server):
    with Store(server.address, SECRET, 10) as store:
        yield store


def raw(server: StoreServer) -> socket.socket:
    return socket.create_connection(split_address(server.address), 10)


def open_descriptors() -> set[int]:
    # Listing opens one more, which is gone when it is looked for.
    return {int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}


def descriptors_and_threads() -> tuple[set[int], int]:
    return open_descriptors(), threading.active_count()


@pytest.mark.parametrize("key", ["a", "", "job 1/ränk/3", "k" * 1001])
@pytest.mark.parametrize("nbytes", [0, 1, 3, 4097, 1_000_003])
def test_what_is_set_is_got_by_another_client(server, store, key, nbytes):
    value = secrets.token_bytes(nbytes)
    store.set(key, value)
    with Store(server.address, SECRET, 10) as another:
        assert another.get(key, 0) == value
    store.set(key, b"changed")
    assert store.get(key) == b"changed"


def test_get_waits_until_the_key_is_set(server, store):
    with Store(server.address, SECRET, 10) as another, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(another.get, "later", 10)
        assert store.get("later", 0.05) is None  # by now the other one waits as well
        assert not waiting.done()
        store.set("later", b"now")
        assert waiting.result(10) == b"now"


def test_one_set_wakes_everybody_who_waits(server, store):
    clients = [Store(server.address, SECRET, 10) for _ in range(17)]
    with ThreadPoolExecutor(len(clients)) as pool:
        waiting = [pool.submit(client.get, "start", 10) for client in clients]
        store.set("start", b"!")
        assert [end.result(10) for end in waiting] == [b"!"] * 17
    for client in clients:
        client.close()


def test_get_ends_at_its_deadline_with_nothing(store):
    began = time.monotonic()
    assert store.get("never", 0.1) is None
    assert 0.1 <= time.monotonic() - began < 1.0
    store.set("never", b"but still usable")
    assert store.get("never", 0) == b"but still usable"


def test_add_is_one_step_whoever_else_adds(server):
    def add() -> list[int]:
        with Store(server.address, SECRET, 10) as client:
            return [client.add("counter", 3) for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        sums = [total for end in [pool.submit(add) for _ in range(4)] for total in end.result(30)]
    assert sorted(sums) == list(range(3, 601, 3))


def test_add_wakes_who_waits_and_goes_below_zero(server, store):
    with Store(server.address, SECRET, 10) as another, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(another.get, "debt", 10)
        assert store.add("debt", -5) == -5
        assert waiting.result(10) == b"-5"


def test_add_to_what_is_no_number_is_refused_and_changes_nothing(store):
    store.set("name", b"ada")
    with pytest.raises(CommunicationError, match="'name' holds b'ada', expected a number"):
        store.add("name", 1)
    assert store.get("name", 0) == b"ada"


def test_delete_takes_exactly_the_prefix(store):
    for key in ("job/1/a", "job/1/b", "job/10/a", "job"):
        store.set(key, b"x")
    assert store.delete("job/1/") == 2
    assert [store.get(key, 0) for key in ("job/1/a", "job/1/b", "job/10/a", "job")] == [None, None, b"x", b"x"]
    assert store.delete("job/1/") == 0


def test_value_over_the_limit_is_refused_before_it_is_sent(store):
    with pytest.raises(CommunicationError, match="the limit is 1048576"):
        store.set("big", bytes(1 << 20))
    store.set("small", b"x")
    assert store.get("small", 0) == b"x"


def test_wrong_secret_is_told_within_a_second(server, store):
    began = time.monotonic()
    with pytest.raises(AuthenticationError, match=f"the store at {server.address} did not let us in"):
        Store(server.address, secrets.token_bytes(32), 10)
    assert time.monotonic() - began < 1.0
    assert store.get("anything", 0) is None  # the server has finished with the stranger, and serves on
    assert server.refused == 1


def test_nobody_there_is_told_at_once():
    with StoreServer(SECRET) as gone:
        pass
    with pytest.raises(ConnectError, match=f"no connection to {gone.address}"):
        Store(gone.address, SECRET, 10)


@pytest.mark.parametrize("address", ["node-a", "node-a:", ":29501", "node-a:x", "node-a:65536"])
def test_address_that_is_none_is_refused(address):
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        Store(address, SECRET, 1)


def test_slow_stranger_is_cut_off_and_others_are_served_meanwhile(monkeypatch):
    monkeypatch.setattr(acceptor, "HANDSHAKE_TIMEOUT_S", 0.5)
    with StoreServer(SECRET) as server, raw(server) as silent, raw(server) as slow:
        began = time.monotonic()
        with Store(server.address, SECRET, 10) as good:
            good.set("a", b"1")
            while time.monotonic() < began + 5:
                try:
                    slow.sendall(b"R")
                except OSError:
                    break
                assert good.get("not there", 0.05) is None
            took_s = time.monotonic() - began
            assert 0.4 < took_s < 3.0
            assert silent.recv(40)  # the server's greeting, then its end
            assert silent.recv(40) == b""
            assert good.get("a", 0) == b"1"


def test_crowd_of_strangers_does_not_shut_out_a_member(monkeypatch):
    monkeypatch.setattr(acceptor, "MAX_STRANGERS", 8)
    with StoreServer(SECRET) as server:
        crowd = [raw(server) for _ in range(30)]
        with Store(server.address, SECRET, 10) as good:
            good.set("a", b"1")
            assert good.get("a", 0) == b"1"
        assert sum(sock.recv(41)[:8] == b"RFAUTH01" for sock in crowd) == 30
        for sock in crowd[:20]:  # 22 were let go, the oldest first
            assert sock.recv(1) == b""
        for sock in crowd:
            sock.close()


@pytest.mark.parametrize(
    "noise",
    [
        struct.pack("<HHI", 2, 1, 0),  # another version
        struct.pack("<HHI", 1, 1, 0xFFFFFFFF),  # a length that nobody has memory for
        struct.pack("<HHI", 1, 99, 2) + b"\0\0",  # an unknown request
        struct.pack("<HHI", 1, 1, 3) + struct.pack("<H", 500) + b"k",  # a key that is cut off
        struct.pack("<HHI", 1, 1, 1) + b"k",
        struct.pack("<HHI", 1, 2, 3) + struct.pack("<H", 1) + b"k",  # a get without a time
        struct.pack("<HHI", 1, 1, 3) + struct.pack("<H", 1) + b"\xff",  # a key that is not text
    ],
)
def test_noise_from_a_member_ends_its_connection_only(server, store, noise):
    broken = Store(server.address, SECRET, 10)
    broken._sock.sendall(noise)
    with pytest.raises(ConnectError, match="was lost"):
        broken.get("a", 0)
    with pytest.raises(ConnectError, match="was closed"):
        broken.get("a", 0)
    store.set("a", b"1")
    assert store.get("a", 0) == b"1"


def test_client_that_dies_waiting_leaves_nothing(server, store):
    before = descriptors_and_threads()
    for _ in range(5):
        doomed = Store(server.address, SECRET, 10)
        request = struct.pack("<HHI", 1, 2, 11) + struct.pack("<H", 1) + b"k" + struct.pack("<d", 60)
        doomed._sock.sendall(request)
        doomed.close()
    deadline = time.monotonic() + 10
    while descriptors_and_threads() != before and time.monotonic() < deadline:
        store.get("nothing", 0.01)
    assert descriptors_and_threads() == before
    store.set("k", b"1")


def test_server_that_closes_wakes_who_waits():
    server = StoreServer(SECRET)
    with Store(server.address, SECRET, 10) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.get, "never", 60)
        with Store(server.address, SECRET, 10) as another:
            another.get("never", 0.05)
        server.close()
        with pytest.raises(ConnectError, match=f"the store at {server.address} was lost during the request for 'never'"):
            waiting.result(10)


def test_two_hundred_servers_leave_no_descriptor_and_no_thread():
    before = descriptors_and_threads()
    for _ in range(200):
        with StoreServer(SECRET) as server:
            client = Store(server.address, SECRET, 10)
            client.set("a", b"1")
        client.close()
        server.close()
    assert descriptors_and_threads() == before


def test_descriptors_are_not_inherited():
    before = open_descriptors()
    with StoreServer(SECRET) as server, Store(server.address, SECRET, 10) as store:
        assert store.get("answered, so the server's end is open as well", 0) is None
        new = open_descriptors() - before
        assert len(new) == 4  # listener, bell, two ends
        assert not any(os.get_inheritable(fd) for fd in new)
