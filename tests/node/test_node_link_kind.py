"""Kinds of links, read off what Linux and macOS say; recorded, but for this machine's own."""

from pathlib import Path

import pytest

from kvferry.node.interfaces import link_kind
from kvferry.node.link_kind import hardware_ports, linux_kind, port_kind

# `networksetup -listallhardwareports` of a MacBook Pro and a Mac Studio, MACs changed.
HARDWARE_PORTS = """
Hardware Port: Ethernet Adapter (en4)
Device: en4
Ethernet Address: 02:00:00:00:00:04

Hardware Port: USB 10/100/1000 LAN
Device: en7
Ethernet Address: 02:00:00:00:00:07

Hardware Port: Thunderbolt Ethernet Slot 1
Device: en8
Ethernet Address: 02:00:00:00:00:08

Hardware Port: Wi-Fi
Device: en0
Ethernet Address: 02:00:00:00:00:00

Hardware Port: Thunderbolt 1
Device: en1
Ethernet Address: 02:00:00:00:00:01

Hardware Port: Thunderbolt Bridge
Device: bridge0
Ethernet Address: N/A

Hardware Port: iPhone USB
Device: en9
Ethernet Address: 02:00:00:00:00:09

VLAN Configurations
===================
"""


def test_a_macs_hardware_ports() -> None:
    assert hardware_ports(HARDWARE_PORTS) == {
        "lo0": "loopback",
        "en4": "ethernet",
        "en7": "ethernet",
        "en8": "ethernet",
        "en0": "wifi",
        "en1": "thunderbolt",
        "bridge0": "thunderbolt",
        "en9": "unknown",
    }


@pytest.mark.parametrize("text", ["", "Device: en0\n", "Hardware Port:\nDevice:\n", "\x00\n:::\n"])
def test_what_is_no_list_of_ports_gives_none(text: str) -> None:
    assert "en0" not in hardware_ports(text)
    assert port_kind("") == "unknown"


class Tree:
    """A /sys/class/net as the kernel lays it out."""

    def __init__(self, folder: Path) -> None:
        self.net = folder / "class" / "net"
        self._devices = folder / "devices"
        self.net.mkdir(parents=True)

    def add(self, name: str, bus: str = "", driver: str = "", kind: str = "1", **more: str) -> None:
        """``bus``: of the device behind it; none: a virtual interface."""
        made = self.net / name
        made.mkdir()
        (made / "type").write_text(f"{kind}\n")
        if bus:
            device = self._devices / name
            for part, target in (("subsystem", f"bus/{bus}"), ("driver", f"drivers/{driver}")):
                (self._devices / target).mkdir(parents=True, exist_ok=True)
                device.mkdir(parents=True, exist_ok=True)
                (device / part).symlink_to(self._devices / target)
            (made / "device").symlink_to(device)
        for path, text in more.items():
            file = made / path.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)


def test_linux_interfaces(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.add("lo", kind="772")
    tree.add("enp3s0", "pci", "igc")
    tree.add("wlp2s0", "pci", "iwlwifi", wireless__x="")
    tree.add("wlan1", "usb", "mt76x2u", phy80211__index="1")
    tree.add("thunderbolt0", "thunderbolt", "thunderbolt-net")
    tree.add("tailscale0", kind="65534")
    tree.add("wwan0", "usb", "cdc_mbim", kind="65534")
    tree.add("br0", brif__thunderbolt0__x="", brif__thunderbolt1__x="")
    tree.add("thunderbolt1", "thunderbolt", "thunderbolt-net")
    tree.add("br1", brif__enp3s0__x="", brif__wlp2s0__x="")
    tree.add("bond0", bonding__slaves="enp3s0\n")
    tree.add("loop", brif__loop__x="")
    kinds = {
        "lo": "loopback",
        "enp3s0": "ethernet",
        "wlp2s0": "wifi",
        "wlan1": "wifi",
        "thunderbolt0": "thunderbolt",
        "tailscale0": "virtual",
        "wwan0": "unknown",
        "br0": "thunderbolt",
        "br1": "virtual",
        "bond0": "ethernet",
        "loop": "virtual",
        "none": "unknown",
        "": "unknown",
        "../net": "unknown",
    }
    assert {name: linux_kind(name, tree.net) for name in kinds} == kinds


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1:7800", "loopback"),
        ("[::1]:7800", "loopback"),
        ("localhost:7800", "loopback"),
        ("no such host:7800", "unknown"),
        ("127.0.0.1:x", "unknown"),
        ("", "unknown"),
    ],
)
def test_the_way_to_an_address_on_this_machine(address: str, kind: str) -> None:
    assert link_kind(address) == kind
