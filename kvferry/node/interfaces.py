"""Over which of this machine's interfaces an address is reached, and of what kind that is."""

import ipaddress
import socket
import subprocess
import sys

import psutil

from kvferry.node.link_kind import LOOPBACK, UNKNOWN, VIRTUAL, hardware_ports, linux_kind

NETWORKSETUP = "/usr/sbin/networksetup"
TIMEOUT_S = 5.0
MAX_OUTPUT_CHARS = 1 << 16


def link_kind(address: str) -> str:
    """The kind of the way to HOST:PORT: "loopback", "thunderbolt", "ethernet", ... Blocks.

    The system's routing decides; nothing is sent but, for a name, a question to DNS.
    """
    here = _own_address(address)
    if not here:
        return UNKNOWN
    if ipaddress.ip_address(here).is_loopback:
        return LOOPBACK
    interface = _interface_of(here)
    if sys.platform == "darwin":
        kind = hardware_ports(_hardware_ports()).get(interface, "")
        return kind or (VIRTUAL if interface.startswith(("utun", "vmnet")) else UNKNOWN)
    return linux_kind(interface)


def _own_address(address: str) -> str:
    """The address of ours that packets to ``address`` would carry; empty: no way there."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
    except (OSError, ValueError):
        return ""
    for family, kind, protocol, _, target in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                own: str = probe.getsockname()[0]
        except OSError:
            continue
        # An address of this very machine is reached over loopback, whatever has it.
        if own.partition("%")[0] == str(target[0]).partition("%")[0]:
            return "127.0.0.1"
        return own.partition("%")[0]
    return ""


def _interface_of(own: str) -> str:
    try:
        interfaces = psutil.net_if_addrs()
    except OSError:  # a service without AF_NETLINK may not ask
        return ""
    for name, addresses in interfaces.items():
        if any(found.address.partition("%")[0] == own for found in addresses):
            return name
    return ""


def _hardware_ports() -> str:
    command = [NETWORKSETUP, "-listallhardwareports"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout[:MAX_OUTPUT_CHARS]
