"""What a check says: fine, of note, or broken, and what to do about it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvferry.errors import FerryError

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a report.

    Attributes:
        name: what was looked at.
        state: `OK`, `WARN` (it works, but) or `FAIL`.
        text: what was found.
        remedy: what to do; empty where nothing is to be done.
    """

    name: str
    state: str
    text: str
    remedy: str = ""


Check = Callable[[], Iterator[Finding]]


def run_checks(checks: Sequence[tuple[str, Check]]) -> Iterator[Finding]:
    """All findings of all checks; one that breaks down is a finding, not the end."""
    for name, check in checks:
        try:
            yield from check()
        except FerryError as exc:
            yield Finding(name, FAIL, str(exc))
        except Exception as exc:
            remedy = "the other checks went on; please report this"
            yield Finding(name, FAIL, f"the check itself failed: {exc!r}", remedy)


def size(count: float) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
