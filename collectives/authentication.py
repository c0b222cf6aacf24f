"""Mutual proof that both ends of a connection hold the job's secret, before anything else is said.

    both     magic, 32 fresh random bytes
    client   HMAC-SHA256(SHA256(secret), "ringfold client" + server's bytes + client's bytes)
    server   HMAC-SHA256(SHA256(secret), "ringfold server" + client's bytes + server's bytes), or zeros if the client's was wrong

Fresh bytes from both ends make a recorded handshake worthless, the two labels make a reflected one worthless, and a client that
fails learns nothing from the server but that (which tells it from a server that just ends). What follows is neither encrypted nor signed.
(Challenge and response as in RFC 2195; HMAC: RFC 2104.)
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import time
from typing import Literal

from ringfold.collectives.conversation import Conversation, converse
from ringfold.collectives.errors import AuthenticationError, ConnectError

Role = Literal["client", "server"]

_MAGIC = b"RFAUTH01"
_NONCE_NBYTES = 32
_PROOF_NBYTES = hashlib.sha256().digest_size


def handshake(secret: bytes, role: Role) -> Conversation[None]:
    """Prove to the other side that we hold the secret, and have it do the same.

    Raises: AuthenticationError, if it does not. EOFError and TimeoutError, if it went away or fell silent before it could tell.
    """
    own = secrets.token_bytes(_NONCE_NBYTES)
    yield _MAGIC + own
    greeting = yield len(_MAGIC) + _NONCE_NBYTES
    if greeting[: len(_MAGIC)] != _MAGIC:
        raise AuthenticationError(f"the other side began with {greeting[:8]!r}, expected {_MAGIC!r}: it is not ringfold")
    theirs = greeting[len(_MAGIC) :]
    if role == "client":
        yield _proof(secret, "client", own, theirs)
        proof = yield _PROOF_NBYTES
        expected = _proof(secret, "server", own, theirs)
    else:
        proof = yield _PROOF_NBYTES
        expected = _proof(secret, "client", theirs, own)
    is_right = hmac.compare_digest(proof, expected)
    if role == "server":
        yield _proof(secret, "server", theirs, own) if is_right else bytes(_PROOF_NBYTES)
    if not is_right:
        raise AuthenticationError(f"the {'server' if role == 'client' else 'client'} at the other side holds a different secret")


def authenticate(sock: socket.socket, secret: bytes, role: Role, timeout_s: float) -> None:
    """Hold the handshake on a connected socket, which is blocking afterwards; the caller closes it if this fails.

    Raises: AuthenticationError, if the other side holds a different secret. ConnectError, if it went away or fell silent.
    """
    try:
        converse(sock, handshake(secret, role), time.monotonic() + timeout_s)
    except TimeoutError:
        raise ConnectError(f"the other side did not finish the handshake within {timeout_s:.1f} s") from None
    except EOFError as error:
        raise ConnectError(f"the handshake was not finished: {error}") from None


def _proof(secret: bytes, role: Role, client_nonce: bytes, server_nonce: bytes) -> bytes:
    first, second = (server_nonce, client_nonce) if role == "client" else (client_nonce, server_nonce)
    # HMAC pads a short key with zeros, which would make a secret and the same secret with a zero behind it equal.
    key = hashlib.sha256(secret).digest()
    return hmac.digest(key, f"ringfold {role}".encode() + first + second, "sha256")
