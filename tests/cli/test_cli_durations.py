"""Times and sizes as people write them."""

import pytest

from kvferry.cli.durations import seconds, size
from kvferry.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "found"),
    [("90", 90), ("90s", 90), ("15m", 900), ("12h", 43_200), ("7d", 604_800), ("2w", 1_209_600)],
)
def test_times(text: str, found: int) -> None:
    assert seconds("--ttl", text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1000", 1000), ("1_000", 1000), ("5B", 5), ("2kB", 2000), ("500MB", 500_000_000),
        ("1.5GiB", 3 << 29), ("2 TiB", 2 << 40), ("64KiB", 65_536),
    ],
)  # fmt: skip
def test_sizes(text: str, found: int) -> None:
    assert size("BYTES", text) == found


@pytest.mark.parametrize("text", ["", "0", "0s", "-5m", "soon", "1y", "1.5h", "9" * 20])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--ttl"):
        seconds("--ttl", text)


@pytest.mark.parametrize("text", ["", "GB", "-5", "5XB", "5 GB GB", "1e9", "many"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="BYTES"):
        size("BYTES", text)
