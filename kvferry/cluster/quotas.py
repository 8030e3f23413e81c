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
            value = json.loads(self._path.read_bytes())
            found = {
                int(tag, 16): Quota(str(entry["name"]), int(entry["bytes"]))
                for tag, entry in value["quotas"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
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
            quotas = dict(self._quotas)
            quotas.pop(tag, None)
            if quota_bytes:
                if len(quotas) >= MAX_QUOTAS:
                    raise QueueFullError("quotas", MAX_QUOTAS)
                quotas[tag] = Quota(name, quota_bytes)
            if self._path is not None:
                self._save(self._path, quotas)
            self._quotas = quotas

    def _save(self, path: Path, quotas: Mapping[int, Quota]) -> None:
        value = {f"{t:016x}": {"name": q.name, "bytes": q.bytes} for t, q in quotas.items()}
        try:
            write_durably(path, (json.dumps({"quotas": value}, indent=1) + "\n").encode())
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
