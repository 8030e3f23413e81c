"""Codec options from a command line or a policy, where every value may be text."""

from collections.abc import Mapping

from kvferry.errors import ConfigError


def check_names(codec: str, options: Mapping[str, object], known: tuple[str, ...]) -> None:
    """Raises: ConfigError for an option that ``codec`` does not have."""
    for name, value in options.items():
        if name not in known:
            have = f"one of {', '.join(known)}" if known else "left out: it has no options"
            raise ConfigError(f"{codec} option {name}", value, have)


def whole_number(name: str, value: object, allowed: tuple[int, ...]) -> int:
    """One of ``allowed``. Raises: ConfigError."""
    span = f"{allowed[0]} to {allowed[-1]}" if len(allowed) > 6 else ", ".join(map(str, allowed))
    try:
        number = int(str(value))
    except ValueError as exc:
        raise ConfigError(name, value, span) from exc
    if number not in allowed:
        raise ConfigError(name, value, span)
    return number


def whole_within(name: str, value: object, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``. Raises: ConfigError."""
    allowed = f"a whole number from {low} to {high}"
    try:
        number = int(str(value))
    except ValueError as exc:
        raise ConfigError(name, value, allowed) from exc
    if not low <= number <= high:
        raise ConfigError(name, value, allowed)
    return number


def positive_number(name: str, value: object) -> float:
    """A number of a sane size above 0. Raises: ConfigError."""
    try:
        number = float(str(value))
    except ValueError as exc:
        raise ConfigError(name, value, "a number above 0") from exc
    if not 1e-30 < number < 1e30:
        raise ConfigError(name, value, "a number above 0")
    return number


def number_within(name: str, value: object, low: float, high: float) -> float:
    """A number from ``low`` to ``high``. Raises: ConfigError."""
    allowed = f"a number from {low:g} to {high:g}"
    try:
        number = float(str(value))
    except ValueError as exc:
        raise ConfigError(name, value, allowed) from exc
    if not low <= number <= high:
        raise ConfigError(name, value, allowed)
    return number
