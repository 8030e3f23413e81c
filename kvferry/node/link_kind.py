"""What kind of link a network interface is, from what the system says. Pure, but for /sys."""

from collections.abc import Mapping, Sequence
from pathlib import Path

LOOPBACK, THUNDERBOLT, ETHERNET, WIFI = "loopback", "thunderbolt", "ethernet", "wifi"
VIRTUAL, UNKNOWN = "virtual", "unknown"

_ARPHRD_LOOPBACK, _ARPHRD_ETHER = "772", "1"
MAX_MEMBERS = 64


def linux_kind(
    interface: str, sys_net: Path = Path("/sys/class/net"), *, bridges: bool = True
) -> str:
    """The kind of a Linux interface. ``sys_net``: where the kernel tells.

    A bridge or bond is what its members are, where they are of one kind; no deeper than
    that (``bridges``). Blocks.
    """
    if not interface or "/" in interface or interface in (".", ".."):
        return UNKNOWN
    folder = sys_net / interface
    if not folder.is_dir():
        return UNKNOWN
    if _read(folder / "type") == _ARPHRD_LOOPBACK:
        return LOOPBACK
    if bridges and (names := _members(folder)):
        members = {linux_kind(name, sys_net, bridges=False) for name in names}
        return members.pop() if len(members) == 1 else VIRTUAL
    if (folder / "wireless").exists() or (folder / "phy80211").exists():
        return WIFI
    if not (folder / "device").exists():
        return VIRTUAL
    if _is_thunderbolt(folder / "device"):
        return THUNDERBOLT
    return ETHERNET if _read(folder / "type") == _ARPHRD_ETHER else UNKNOWN


def _members(folder: Path) -> Sequence[str]:
    """Ports of a bridge, slaves of a bond."""
    if (folder / "brif").is_dir():
        return sorted(path.name for path in (folder / "brif").iterdir())[:MAX_MEMBERS]
    return _read(folder / "bonding" / "slaves").split()[:MAX_MEMBERS]


def _is_thunderbolt(device: Path) -> bool:
    """IP over Thunderbolt: the device hangs on that bus, or its driver is the bus's own."""
    bus, driver = device / "subsystem", device / "driver"
    return "thunderbolt" in f"{bus.resolve().name} {driver.resolve().name}"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def hardware_ports(text: str) -> Mapping[str, str]:
    """Kind of each device in what macOS's ``networksetup -listallhardwareports`` prints."""
    kinds: dict[str, str] = {"lo0": LOOPBACK}
    port = ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == "Hardware Port":
            port = value.strip()
        elif name == "Device" and port:
            kinds[value.strip()] = port_kind(port)
            port = ""
    return kinds


def port_kind(port: str) -> str:
    """The kind of a macOS hardware port by its name.

    "Thunderbolt Bridge" and "Thunderbolt 1" carry IP over Thunderbolt; "Thunderbolt Ethernet
    Slot 1" is a network card in a Thunderbolt box.
    """
    words = port.lower()
    if "wi-fi" in words or "airport" in words:
        return WIFI
    if "ethernet" in words or words.split()[-1:] == ["lan"] or " lan" in words:
        return ETHERNET
    if words.startswith("thunderbolt"):
        return THUNDERBOLT
    return UNKNOWN
