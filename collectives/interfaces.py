"""The network addresses of this host, and by which of another's it is reached: the kernel's routes decide, names are never resolved.

A host's own name is no way to its address: Debian maps it to 127.0.1.1, a cloud to whatever its DNS says. So every rank publishes the
addresses of its interfaces, and who calls it asks the kernel for the route to each (a connected UDP socket: nothing is sent). An address
that both hosts have is skipped, since it leads back here: virtual bridges have the same one everywhere.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ringfold.collectives.errors import ConfigError, nearest

__all__ = ["Address", "HostAddress", "choose", "local_addresses", "order", "source_towards"]

HostAddress = ipaddress.IPv4Interface | ipaddress.IPv6Interface

_IFF_LOOPBACK, _IFF_RUNNING = 0x8, 0x40  # netdevice(7); running means up, and with a carrier
_DISCARD = 9  # a port, since connect wants one


@dataclass(frozen=True, slots=True)
class Address:
    """One address of one interface, with its network."""

    interface: str
    host: HostAddress

    def __str__(self) -> str:
        return f"{self.interface} {self.host}"


class _Ifaddrs(ctypes.Structure):
    """struct ifaddrs of getifaddrs(3), as far as it is needed."""


_Ifaddrs._fields_ = [
    ("next", ctypes.POINTER(_Ifaddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
    ("netmask", ctypes.c_void_p),
]
# Where the address begins in a struct sockaddr_in and sockaddr_in6, and its length.
_PLACES = {int(socket.AF_INET): (4, 4), int(socket.AF_INET6): (8, 16)}


def local_addresses() -> list[Address]:
    """Return the addresses of every interface that is up and no loopback, in the kernel's order; not IPv6's link-local ones."""
    return [address for address in _all_addresses() if not (address.host.version == 6 and address.host.is_link_local)]


def choose(chosen: str) -> list[Address]:
    """Return the addresses of the interface with that name, or those in that network, such as 10.1.0.0/16.

    Raises: ConfigError, listing what there is.
    """
    addresses = local_addresses()
    try:
        network = ipaddress.ip_network(chosen, strict=False)
    except ValueError:
        found = [address for address in addresses if address.interface == chosen]
    else:
        found = [address for address in addresses if address.host.version == network.version and address.host.ip in network]
    if not found:
        meant = nearest(chosen, {address.interface for address in addresses})
        raise ConfigError(
            f"interface {chosen}: this host ({socket.gethostname()}) has no such interface that is up, and no address in such a network"
            + (f"; did you mean {meant}?" if meant else "")
            + f"\n  There is: {', '.join(map(str, addresses)) or 'none but the loopback'}"
        )
    return found


def source_towards(host: str) -> str | None:
    """Return the own address from which the kernel would send to that one; None if it knows no way."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((host, _DISCARD))
        except OSError:
            return None
        source: str = sock.getsockname()[0]
        return source


def order(theirs: Sequence[HostAddress], ours: Sequence[Address], only: Sequence[Address] | None = None) -> list[str]:
    """Return those of another host's addresses to which there is a route, the likeliest to work first.

    theirs: in the order in which the other host prefers them. ours: all of this host's. only: leave this host by one of these addresses.
    First come neighbours, in a network of the interface that leads to them, then what is routed by an interface that is up.
    """
    own = {address.host.ip for address in ours}
    networks = {str(address.host.ip): address.host.network for address in ours}
    allowed = None if only is None else {str(address.host.ip) for address in only}
    found: list[tuple[int, str]] = []
    for their in theirs:
        source = None if their.ip in own else source_towards(str(their.ip))
        if source is None or (allowed is not None and source not in allowed):
            continue
        distance = 2 if source not in networks else 0 if their.ip in networks[source] else 1
        found.append((distance, str(their.ip)))
    return [host for _, host in sorted(found, key=lambda each: each[0])]


def _all_addresses() -> Iterator[Address]:
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_Ifaddrs)()
    if libc.getifaddrs(ctypes.byref(first)) != 0:
        raise OSError(ctypes.get_errno(), f"the network interfaces cannot be listed: {os.strerror(ctypes.get_errno())}")
    try:
        entry = first
        while entry:
            one = entry.contents
            entry = one.next
            if one.flags & _IFF_LOOPBACK or not one.flags & _IFF_RUNNING or not one.address or not one.netmask:
                continue
            place = _PLACES.get(ctypes.c_uint16.from_address(one.address).value)
            if place is not None:
                at, nbytes = place
                ip = ipaddress.ip_address(ctypes.string_at(one.address + at, nbytes))
                prefix = int.from_bytes(ctypes.string_at(one.netmask + at, nbytes), "big").bit_count()
                yield Address(one.name.decode(), ipaddress.ip_interface(f"{ip}/{prefix}"))
    finally:
        libc.freeifaddrs(first)
