"""Times and sizes as people write them."""

import re

from kvferry.errors import ConfigError

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_BYTES = {"": 1, "B": 1}
_BYTES |= {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("kMGT")}
_BYTES |= {f"{p}iB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}


def seconds(name: str, text: str) -> int:
    """``90s``, ``15m``, ``12h``, ``7d`` or ``2w`` in seconds. Raises: ConfigError."""
    found = re.fullmatch(r"([0-9]{1,9})([smhdw]?)", text)
    if not found or not int(found[1]):
        raise ConfigError(name, text, "a time as 90s, 15m, 12h, 7d or 2w")
    return int(found[1]) * _SECONDS[found[2] or "s"]


def size(name: str, text: str) -> int:
    """``500MB``, ``10GiB`` or plain bytes. Raises: ConfigError."""
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?) ?([A-Za-z]*)", text)
    if not found or found[2] not in _BYTES:
        raise ConfigError(name, text, "a size as 500MB, 10GiB, or a number of bytes")
    return int(float(found[1].replace("_", "").replace(",", "")) * _BYTES[found[2]])
