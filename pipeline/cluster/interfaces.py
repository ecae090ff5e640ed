"""Network interface of gloo and NCCL: the one of the address by which Ray knows the node, unless the user chose one.

Both otherwise take the address that the host name resolves to, or the first interface that they find. Where
`/etc/hosts` maps the name to 127.0.1.1, as Debian does, no node then reaches another.
"""

from __future__ import annotations

import ipaddress
import os

_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def interface_of(address: str) -> str | None:
    """Return the name of the network interface of this machine that has this IP address, or None."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return str(name)
    return None


def chosen_interface(address: str) -> str | None:
    """Return the interface that gloo is to use on the node with this address; None leaves the choice to gloo."""
    return os.environ.get(_GLOO) or interface_of(address)


def choose_interface(address: str) -> None:
    """Set the variables that gloo and NCCL read for the node with this address, where the user set none.

    This must be done before the first process group.
    """
    interface = interface_of(address)
    if interface is None:
        return
    os.environ.setdefault(_GLOO, interface)
    # NCCL needs no network within one machine. With the equals sign it takes no other interface with the same beginning.
    if not ipaddress.ip_address(address).is_loopback:
        os.environ.setdefault(_NCCL, f"={interface}")
