"""One thread that accepts connections and holds a conversation on each, never blocking in any.

Until a conversation says `Admitted` it is a stranger's: it has HANDSHAKE_TIMEOUT_S in all, however it spreads its bytes, and there
are at most MAX_STRANGERS at a time. A conversation may `Pause` until a key is woken. It ends by returning None (the connection is
closed) or a function that takes the connected, blocking socket over.

It moves no tensors: links go to the native core as soon as they are authenticated.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field

from ringfold.collectives.errors import AuthenticationError, CommunicationError

HANDSHAKE_TIMEOUT_S = 5.0
MAX_STRANGERS = 256


@dataclass(frozen=True, slots=True)
class Admitted:
    """Yielded once the other side has proven itself: the conversation may last."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Yielded to go on when the key is woken, or at the deadline."""

    key: str
    deadline: float


@dataclass(frozen=True, slots=True)
class Wake:
    """Yielded to let every conversation go on that pauses for the key."""

    key: str


TakeOver = Callable[[socket.socket], None]
Reception = Generator[bytes | int | Admitted | Pause | Wake, bytes, TakeOver | None]


@dataclass(eq=False, slots=True)
class _Guest:
    sock: socket.socket
    reception: Reception
    deadline: float
    is_stranger: bool = True
    outgoing: memoryview = field(default_factory=lambda: memoryview(b""))
    wanted: int = 0
    received: bytearray = field(default_factory=bytearray)
    pause: Pause | None = None


class Acceptor:
    """Accepts on every listener until `close`; each listener comes with the function that receives its guests.

    `refused` counts the guests that did not hold the secret.
    """

    def __init__(self, name: str, listeners: Mapping[socket.socket, Callable[[socket.socket], Reception]]) -> None:
        self.refused = 0
        self._listeners = dict(listeners)
        self._guests: dict[socket.socket, _Guest] = {}
        self._waiting: defaultdict[str, list[_Guest]] = defaultdict(list)
        self._woken: list[_Guest] = []
        self._is_closing = False
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # Not epoll: its kernel object would be shared with forked children.
        self._selector = selectors.PollSelector()
        self._selector.register(self._bell, selectors.EVENT_READ)
        for listener in self._listeners:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, then every conversation, then the listeners."""
        if self._bell < 0:
            return
        self._is_closing = True
        os.eventfd_write(self._bell, 1)
        self._thread.join()
        for guest in self._guests.values():
            guest.reception.close()
        self.close_descriptors()

    def close_descriptors(self) -> None:
        """Close everything that a forked child has inherited, without a word to anybody: its parent goes on."""
        self._selector.close()
        for sock in [*self._listeners, *self._guests]:
            sock.close()
        self._guests.clear()
        self._listeners.clear()  # their functions are methods of whoever owns us: a cycle, which only a full garbage collection would end
        if self._bell >= 0:
            os.close(self._bell)
            self._bell = -1

    def _run(self) -> None:
        while not self._is_closing:
            for key, events in self._selector.select(self._timeout_s()):
                if isinstance(key.fileobj, socket.socket):
                    if key.fileobj in self._listeners:
                        self._accept(key.fileobj)
                    elif guest := self._guests.get(key.fileobj):
                        self._handle(guest, events)
                    self._resume_woken()  # also after an accept: a guest whose words came with its call may have woken others
            self._expire()

    def _resume_woken(self) -> None:
        while self._woken:
            self._advance(self._woken.pop(), b"")

    def _timeout_s(self) -> float | None:
        deadline = min((guest.pause.deadline if guest.pause else guest.deadline for guest in self._guests.values()), default=float("inf"))
        return None if deadline == float("inf") else max(0.0, deadline - time.monotonic())

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError:
            time.sleep(0.01)  # out of descriptors: the caller stays in the backlog, and this thread must not spin on it
            return
        strangers = [guest for guest in self._guests.values() if guest.is_stranger]
        if len(strangers) >= MAX_STRANGERS:
            self._dismiss(strangers[0])
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        guest = _Guest(sock, self._listeners[listener](sock), time.monotonic() + HANDSHAKE_TIMEOUT_S)
        self._guests[sock] = guest
        self._selector.register(sock, selectors.EVENT_READ)
        self._advance(guest, None)

    def _handle(self, guest: _Guest, events: int) -> None:
        if guest.pause is not None:  # it was to wait for our answer: this is its end, or it does not keep to the protocol
            self._dismiss(guest)
        elif guest.outgoing:
            if self._flush(guest):
                self._selector.modify(guest.sock, selectors.EVENT_READ)
                self._advance(guest, b"")
        elif events & selectors.EVENT_READ and self._fill(guest):
            self._advance(guest, bytes(guest.received))

    def _expire(self) -> None:
        now = time.monotonic()
        for guest in list(self._guests.values()):
            if guest.pause is None:
                if now >= guest.deadline:
                    self._dismiss(guest)
            elif now >= guest.pause.deadline:
                self._end_pause(guest)
                self._advance(guest, b"")
                self._resume_woken()

    def _advance(self, guest: _Guest, answer: bytes | None) -> None:
        """Run the conversation on, until it needs something that is not there yet."""
        try:
            while True:
                request = next(guest.reception) if answer is None else guest.reception.send(answer)
                answer = b""
                if isinstance(request, Admitted):
                    guest.is_stranger, guest.deadline = False, float("inf")
                elif isinstance(request, Pause):
                    guest.pause = request
                    self._waiting[request.key].append(guest)
                    return
                elif isinstance(request, Wake):
                    for sleeper in self._waiting.pop(request.key, []):
                        sleeper.pause = None
                        self._woken.append(sleeper)
                elif isinstance(request, bytes):
                    guest.outgoing = memoryview(request)
                    if not self._flush(guest):
                        if guest.sock in self._guests:
                            self._selector.modify(guest.sock, selectors.EVENT_WRITE)
                        return
                else:
                    guest.wanted = request
                    guest.received.clear()
                    if not self._fill(guest):
                        return
                    answer = bytes(guest.received)
        except StopIteration as end:
            self._part(guest, end.value)
        except AuthenticationError:
            self.refused += 1
            self._dismiss(guest)
        except CommunicationError:
            self._dismiss(guest)

    def _flush(self, guest: _Guest) -> bool:
        """Send what the socket takes; tell whether nothing is left."""
        try:
            while guest.outgoing:
                guest.outgoing = guest.outgoing[guest.sock.send(guest.outgoing) :]
            return True
        except BlockingIOError:
            return False
        except OSError:
            self._dismiss(guest)
            return False

    def _fill(self, guest: _Guest) -> bool:
        """Receive what is there, up to what was asked for; tell whether that is complete."""
        try:
            while len(guest.received) < guest.wanted:
                piece = guest.sock.recv(guest.wanted - len(guest.received))
                if not piece:
                    self._dismiss(guest)
                    return False
                guest.received += piece
            return True
        except BlockingIOError:
            return False
        except OSError:
            self._dismiss(guest)
            return False

    def _part(self, guest: _Guest, take_over: TakeOver | None) -> None:
        self._selector.unregister(guest.sock)
        del self._guests[guest.sock]
        if take_over is None:
            guest.sock.close()
        else:
            guest.sock.setblocking(True)
            take_over(guest.sock)

    def _dismiss(self, guest: _Guest) -> None:
        self._end_pause(guest)
        guest.reception.close()
        self._part(guest, None)

    def _end_pause(self, guest: _Guest) -> None:
        if guest.pause is not None:
            waiting = self._waiting[guest.pause.key]
            waiting.remove(guest)
            if not waiting:
                del self._waiting[guest.pause.key]
            guest.pause = None
