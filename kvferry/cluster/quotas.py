"""How much each namespace may hold, and what happened to its blobs.

Quotas are kept here, in one small file beside the store's blobs, and not in its settings or
with the coordinator's policy: a store knows namespaces by the tags of their blobs only (names
and salts are the coordinator's), a quota must hold from the moment it is set, and it must
still hold when the store comes up and nobody else is there.
"""

import json
import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from kvferry.cluster.durable import write_durably
from kvferry.cluster.repository import NamespaceStat
from kvferry.errors import ConfigError, QueueFullError, StoreUnavailableError

log = logging.getLogger(__name__)

FILE_NAME = "quotas.json"
MAX_QUOTAS = 1000
MAX_NAME_CHARS = 128
MAX_QUOTA_BYTES = 1 << 62
# Namespaces whose events are told apart; those of more are counted together, under tag 0.
MAX_COUNTED = 256


@runtime_checkable
class KeepsQuotas(Protocol):
    """A repository that does."""

    async def set_quota(self, tag: int, name: str, quota_bytes: int) -> int:
        """How much a namespace may hold, 0: no quota; how many of its blobs went for it."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What the operator set. ``bytes`` of the medium, as budgets are."""

    name: str
    bytes: int


def parse_quotas(data: bytes) -> dict[int, Quota]:
    """What `dump_quotas` wrote. Raises: ValueError."""
    try:
        found = json.loads(data)["quotas"].items()
        return {int(tag, 16): Quota(str(e["name"]), int(e["bytes"])) for tag, e in found}
    except (KeyError, TypeError, AttributeError) as exc:
        raise ValueError(f"no quotas: {exc!r}") from exc


def dump_quotas(quotas: Mapping[int, Quota]) -> bytes:
    """JSON that a person can read."""
    value = {f"{t:016x}": {"name": q.name, "bytes": q.bytes} for t, q in quotas.items()}
    return (json.dumps({"quotas": value}, indent=1) + "\n").encode()


def with_quota(
    quotas: Mapping[int, Quota], tag: int, name: str, quota_bytes: int
) -> dict[int, Quota]:
    """The same with one set; 0 bytes: without it. Raises: QueueFullError: too many."""
    changed = {t: quota for t, quota in quotas.items() if t != tag}
    if quota_bytes:
        if len(changed) >= MAX_QUOTAS:
            raise QueueFullError("quotas", MAX_QUOTAS)
        changed[tag] = Quota(name, quota_bytes)
    return changed


class QuotaBook:
    """Quotas by tag, durable where there is a disk. Usable from any thread."""

    def __init__(self, path: Path | None) -> None:
        """``path``: the file; None: they last as long as the process."""
        self._path = path
        self._lock = threading.Lock()
        self._quotas: dict[int, Quota] = {}

    def load(self) -> None:
        """Read the file. Raises: ConfigError: it is damaged: no quota is dropped silently."""
        if self._path is None or not self._path.exists():
            return
        try:
            found = parse_quotas(self._path.read_bytes())
        except (OSError, ValueError) as exc:
            allowed = f"whole ({exc}): mend or delete it and set the quotas again"
            raise ConfigError("quotas", str(self._path), allowed) from exc
        with self._lock:
            self._quotas = found

    def get(self, tag: int) -> Quota | None:
        """The quota of a namespace."""
        with self._lock:
            return self._quotas.get(tag)

    def all(self) -> Mapping[int, Quota]:
        """All of them."""
        with self._lock:
            return dict(self._quotas)

    def set(self, tag: int, name: str, quota_bytes: int) -> None:
        """Durable when this returns; 0 bytes: no quota any more.

        Raises: QueueFullError: too many; StoreUnavailableError: the disk refuses.
        """
        with self._lock:
            quotas = with_quota(self._quotas, tag, name, quota_bytes)
            if self._path is not None:
                self._save(self._path, quotas)
            self._quotas = quotas

    def _save(self, path: Path, quotas: Mapping[int, Quota]) -> None:
        try:
            write_durably(path, dump_quotas(quotas))
        except OSError as exc:
            raise StoreUnavailableError(str(path), str(exc.strerror)) from exc


class NamespaceEvents:
    """Counts of what happened, by namespace. Usable from any thread."""

    def __init__(self) -> None:
        self._counts: dict[int, Counter[str]] = {}
        self._lock = threading.Lock()

    def add(self, tag: int, **events: int) -> None:
        """Count events by name."""
        with self._lock:
            if tag not in self._counts and len(self._counts) >= MAX_COUNTED:
                tag = 0
            self._counts.setdefault(tag, Counter()).update(events)

    def of(self, tag: int) -> dict[str, int]:
        """Those of one namespace."""
        with self._lock:
            return dict(self._counts.get(tag, {}))

    def tags(self) -> list[int]:
        """Whose events were counted."""
        with self._lock:
            return list(self._counts)


def described(
    held: Sequence[NamespaceStat], quotas: Mapping[int, Quota], events: NamespaceEvents
) -> list[NamespaceStat]:
    """What is held, with quotas and events; namespaces that hold nothing (any more) as well."""
    by_tag = {use.tag: use for use in held}
    for tag in (*quotas, *events.tags()):
        by_tag.setdefault(tag, NamespaceStat(tag=tag))
    none = Quota("", 0)
    return [
        replace(
            use,
            name=quotas.get(use.tag, none).name,
            quota_bytes=quotas.get(use.tag, none).bytes,
            counters=events.of(use.tag),
        )
        for use in by_tag.values()
    ]
