"""How workers of one host that share nothing but a launcher's numbers get the address and the secret of rank 0's store.

Rank 0 listens on a unix socket in the abstract namespace whose name derives from the user id and the generation, and tells what it
has to every caller that the kernel says is the same user (SO_PEERCRED); callers check the listener likewise, since anybody may take
a name. Nothing is written to a file. It does not reach beyond one host, nor beyond one network namespace.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import struct
import time

from ringfold.collectives.acceptor import Acceptor, Admitted, Reception
from ringfold.collectives.connect import dial, listen_unix
from ringfold.collectives.conversation import converse, frame, pack_record, receive_frame, unpack_record
from ringfold.collectives.errors import AuthenticationError, CommunicationError, ConnectError

_HANDOFF = 48
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
FIRST_PAUSE_S = 0.0005
LONGEST_PAUSE_S = 0.02


class Handoff:
    """Rank 0's side: tells every caller of the same user the address and the secret, until `close`.

    Raises: ConnectError, if another process holds the name until the deadline.
    """

    def __init__(self, generation: str, address: str, secret: bytes, deadline: float) -> None:
        self._message = frame(_HANDOFF, pack_record({"address": address, "secret": secret.hex()}))
        listener = _listen(generation, deadline)
        try:
            self._acceptor = Acceptor("ringfold-handoff", {listener: self._tell})
        except BaseException:
            listener.close()
            raise

    def close(self) -> None:
        """Stop telling."""
        self._acceptor.close()

    def _tell(self, sock: socket.socket) -> Reception:
        if _credentials(sock)[1] == os.geteuid():
            yield Admitted()
            yield self._message
        return None


def receive_handoff(generation: str, deadline: float) -> tuple[str, bytes] | None:
    """Return address and secret as rank 0 tells them; None if it did not appear before the deadline.

    Raises: AuthenticationError, if the name is held by another user.
    """
    pause_s = FIRST_PAUSE_S
    while time.monotonic() < deadline:
        try:
            sock = dial(f"unix:{_name(generation)}", deadline)
        except ConnectError:  # rank 0 is yet to start, or stops just now
            time.sleep(min(pause_s, max(0.0, deadline - time.monotonic())))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            continue
        with sock:
            pid, uid, _ = _credentials(sock)
            if uid != os.geteuid():
                raise AuthenticationError(
                    f"the name {_name(generation)} of this job is held by process {pid} of user {uid}, expected user {os.geteuid()}: "
                    "set RINGFOLD_JOB to something else, or RINGFOLD_SECRET and RINGFOLD_STORE"
                )
            try:
                _, payload = converse(sock, receive_frame(), deadline)
            except (EOFError, TimeoutError):
                continue
            told = unpack_record(payload, address=str, secret=str)
            try:
                return told["address"], bytes.fromhex(told["secret"])
            except ValueError:
                raise CommunicationError("rank 0 handed out a secret that is not hexadecimal") from None
    return None


def _name(generation: str) -> str:
    return f"ringfold-{os.geteuid()}-{hashlib.sha256(generation.encode()).hexdigest()[:32]}"


def _listen(generation: str, deadline: float) -> socket.socket:
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return listen_unix(_name(generation))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        if time.monotonic() >= deadline:
            raise ConnectError(
                f"rank 0 of {generation} cannot serve its host: another process holds the name {_name(generation)}. "
                "Is a second job with the same id running, or a second process with rank 0?"
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return pid, user and group of the process at the other end, as the kernel noted them when it connected or listened."""
    pid, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid, gid
