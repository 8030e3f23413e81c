"""Plain values of a scenario file, checked."""

import re
from collections.abc import Mapping
from typing import Any

from kvferry.cluster.optimizer.holder import Range
from kvferry.errors import ConfigError

NAME = re.compile(r"[^\s]{1,64}")
_SPAN = re.compile(r"([0-9]{1,6})-([0-9]{1,6})")


def table_of(table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A table within a table. Raises: ConfigError."""
    value = table.get(name, {})
    if not isinstance(value, dict):
        raise ConfigError(name, value, f"a table, under [{name}]")
    return value


def tables_of(value: object, where: str) -> list[Mapping[str, Any]]:
    """A list of tables. Raises: ConfigError."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ConfigError(where, value, f"tables, each under [[{where}]]")
    return value


def known_keys(table: Mapping[str, Any], keys: tuple[str, ...], prefix: str) -> None:
    """Whether a table has no other keys. Raises: ConfigError."""
    for key in table:
        if key not in keys:
            shown = key if NAME.fullmatch(key) else ascii(key[:64])
            raise ConfigError(
                f"{prefix}{shown}", table[key], f"left out: known are {', '.join(keys)}"
            )


def number(
    table: Mapping[str, Any], name: str, default: float, where: str, low: float, high: float
) -> float:
    """A number within bounds. Raises: ConfigError."""
    value = table.get(name, default)
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not low <= value <= high:
        raise ConfigError(f"{where}{name}", value, f"a number from {low:g} to {high:g}")
    return float(value)


def numbers(value: object, where: str) -> list[float]:
    """A list of numbers. Raises: ConfigError."""
    plain = isinstance(value, list) and all(
        isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e30 for n in value
    )
    if not plain or not isinstance(value, list):
        raise ConfigError(where, value, "a list of numbers")
    return [float(n) for n in value]


def span(value: object, where: str) -> Range:
    """A range of layers or heads. Raises: ConfigError."""
    found = _SPAN.fullmatch(value) if isinstance(value, str) else None
    if found is None or int(found[1]) >= int(found[2]):
        raise ConfigError(where, value, '"0-15", half-open: 0 to 14')
    return int(found[1]), int(found[2])
