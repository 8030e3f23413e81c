"""The store's index: which blobs there are, which pages are complete, who used what when.

SQLite in WAL mode: one connection writes, one reads, each under its lock, and all calls
come from worker threads. It holds nothing that the files do not say, except use times
and leases, and can be deleted at any time.
"""

import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from kvferry.cluster import index_checks, index_lookup
from kvferry.cluster import index_rows as rows
from kvferry.cluster.index_changes import Changes
from kvferry.cluster.index_memo import PageMemo
from kvferry.cluster.index_rows import CodecTable, Held, Unit
from kvferry.cluster.index_schema import connect, open_database
from kvferry.cluster.index_units import (
    Chain,
    Record,
    check_agreement,
    held_under,
    unit_of,
    victims,
)
from kvferry.cluster.repository import BlobInfo, ListQuery, LookupQuery, LookupResult
from kvferry.errors import QueueFullError
from kvferry.proto.keys import BlobKey

MAX_LEASES = 10_000
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Totals:
    """Of all blobs. ``charged``: bytes of the medium."""

    blobs: int
    size: int
    charged: int


class Index:
    """Blocks; usable from any thread. Raises sqlite3.Error as it comes."""

    def __init__(self, path: str) -> None:
        """Raises: IndexDamagedError: delete the file and make the index anew."""
        self.path = path
        self._db, self.fresh = open_database(path)
        self._lock = threading.RLock()
        if path == ":memory:":
            self._reader, self._read_lock = self._db, self._lock
        else:
            self._reader, self._read_lock = connect(path), threading.RLock()
        self._codecs = CodecTable(self._db)
        self._scrub = index_checks.last_scrub(self._db)
        self._memo = PageMemo()

    def close(self) -> None:
        """May be called twice."""
        with self._lock, self._read_lock:
            self._reader.close()
            self._db.close()

    @contextmanager
    def _write(self) -> Iterator[Changes]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            changes = Changes(self._db, self._codecs, self._scrub)
            try:
                yield changes
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                # Codecs added in what was rolled back must not be known.
                self._codecs = CodecTable(self._db)
                raise
            self._db.execute("COMMIT")
            if changes.touched:
                self._memo.changed(changes.touched)

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._read_lock:
            nested = self._reader.in_transaction
            if not nested:
                self._reader.execute("BEGIN")
            try:
                yield self._reader
            finally:
                if not nested and self._reader.in_transaction:
                    self._reader.execute("COMMIT")

    def check_agreement(self, info: BlobInfo) -> None:
        """Raises: IdentityMismatchError where the page's other blobs say otherwise."""
        with self._read() as db:
            unit = unit_of(db, info.key)
        if unit is not None:
            check_agreement(unit, info)

    def insert(self, records: Sequence[Record], now_s: float) -> list[Held]:
        """Add blobs, all or none; returns those of tails whose place they took.

        Raises: IdentityMismatchError.
        """
        dropped: list[Held] = []
        with self._write() as changes:
            for unit_id in dict.fromkeys(changes.add(record, now_s) for record in records):
                dropped += changes.settle(unit_id, now_s)
        return dropped

    def find(self, key: BlobKey) -> Held | None:
        """A blob, although it may have expired."""
        with self._read() as db:
            return held_under(db, self._codecs, key)

    def present(self, keys: Sequence[BlobKey], now_s: float) -> list[bool]:
        """Which are held and have not expired."""
        with self._read() as db:
            pages = list({key.page_key for key in keys})
            units = rows.units_in(db, "page_key", pages)
            held = rows.held_of(db, self._codecs, units).values()
            live = {h.info.key for part in held for h in part if not 0 < h.expires_s <= now_s}
        return [key in live for key in keys]

    def lookup(self, query: LookupQuery, now_s: float) -> tuple[LookupResult, list[Unit]]:
        """See `index_lookup.lookup`."""
        version = self._memo.version()
        with self._read() as db:
            return index_lookup.lookup(db, self._codecs, query, now_s, self._memo, version)

    def listing(
        self, query: ListQuery, after: tuple[int, int, int] = (-1, 0, 0)
    ) -> tuple[list[Held], tuple[int, int, int]]:
        """Some blobs, oldest use first, and where to go on; none: the end."""
        with self._read() as db:
            units, after = rows.list_units(db, query, after)
            held = rows.held_of(db, self._codecs, units)
            return [h for unit in units for h in held[unit.id]], after

    def delete(self, keys: Sequence[BlobKey], now_s: float) -> list[Held]:
        """Those that were there."""
        with self._write() as changes:
            found = [h for key in keys if (h := changes.find(key)) is not None]
            changes.remove(found, now_s)
            return list({h.blob_id: h for h in found}.values())

    def take_expired(self, now_s: float, limit: int = 500) -> list[Held]:
        """Remove blobs whose time to live is over, except leased ones; also old leases."""
        with self._write() as changes:
            changes.db.execute("DELETE FROM leases WHERE expires_s <= ?", (now_s,))
            ended = dict(
                changes.db.execute(
                    "SELECT id, unit_id FROM blobs WHERE expires_s > 0 AND expires_s <= ? "
                    "AND id NOT IN (SELECT blob_id FROM lease_blobs) LIMIT ?",
                    (now_s, limit),
                ).fetchall()
            )
            ids = list(set(ended.values()))
            units = rows.units_in(changes.db, "id", ids)
            held = rows.held_of(changes.db, self._codecs, units).values()
            over = [h for part in held for h in part if h.blob_id in ended]
            changes.remove(over, now_s)
            return over

    def take_victims(
        self, need: int, chain: Chain | None, now_s: float, namespace: int | None = None
    ) -> list[Held]:
        """Remove least recently used units of ``need`` charged bytes in all.

        Never leased ones, nor those of ``chain``. Calibrations last. ``namespace``: tag of
        the only one whose blobs may go.
        Empty where so much is not to be had: nothing is removed then.
        """
        with self._write() as changes:
            chosen = victims(changes.db, need, chain, now_s, namespace)
            return changes.drop(rows.units_in(changes.db, "id", chosen))

    def set_expiry(self, blob_id: int, expires_s: int) -> None:
        """Another end of life; 0: none."""
        with self._write() as changes:
            changes.db.execute("UPDATE blobs SET expires_s = ? WHERE id = ?", (expires_s, blob_id))
        self._memo.clear()

    def touch(self, used_ns: Mapping[int, int]) -> None:
        """Note uses: unit id -> time in ns."""
        with self._write() as changes:
            changes.db.executemany(
                "UPDATE units SET used_ns = MAX(used_ns, ?) WHERE id = ?",
                [(at, unit_id) for unit_id, at in used_ns.items()],
            )

    def pin(self, keys: Sequence[BlobKey], expires_s: int, now_s: float) -> tuple[str, int]:
        """A lease on those that are held. Raises: QueueFullError: too many leases."""
        lease = secrets.token_hex(16)
        with self._write() as changes:
            changes.db.execute("DELETE FROM leases WHERE expires_s <= ?", (now_s,))
            if changes.db.execute("SELECT COUNT(*) FROM leases").fetchone()[0] >= MAX_LEASES:
                raise QueueFullError("leases", MAX_LEASES)
            found = {h.blob_id for key in keys if (h := changes.find(key)) is not None}
            changes.db.execute(
                "INSERT INTO leases (id, expires_s) VALUES (?, ?)", (lease, expires_s)
            )
            changes.db.executemany(
                "INSERT INTO lease_blobs (lease_id, blob_id) VALUES (?, ?)",
                [(lease, blob_id) for blob_id in found],
            )
        return lease, len(found)

    def unpin(self, lease_id: str, now_s: float) -> bool:
        """False: there was no such lease (any more)."""
        with self._write() as changes:
            query = "DELETE FROM leases WHERE id = ? RETURNING expires_s"
            found = changes.db.execute(query, (lease_id,)).fetchone()
            return found is not None and found[0] > now_s

    def totals(self) -> Totals:
        """Sums over all blobs."""
        with self._read() as db:
            query = "SELECT COUNT(*), COALESCE(SUM(size), 0), COALESCE(SUM(charged), 0) FROM blobs"
            return Totals(*db.execute(query).fetchone())

    def counts(self, now_s: float) -> tuple[int, int]:
        """(complete pages, leased blobs)."""
        with self._read() as db:
            pages = db.execute("SELECT COUNT(*) FROM units WHERE kind = 'page' AND complete = 1")
            leased = (
                "SELECT COUNT(DISTINCT blob_id) FROM lease_blobs JOIN leases ON id = lease_id "
                "WHERE expires_s > ?"
            )
            return pages.fetchone()[0], db.execute(leased, (now_s,)).fetchone()[0]

    def begin_scrub(self) -> int:
        """Number of a new scrub."""
        with self._lock:
            self._scrub += 1
            return self._scrub

    def unchecked(self, scrub: int) -> list[Held]:
        """See `index_checks.unchecked`."""
        with self._read() as db:
            return index_checks.unchecked(db, self._codecs, scrub)

    def note_checked(self, held: Sequence[Held], scrub: int) -> None:
        """These were read by a scrub."""
        with self._write() as changes:
            index_checks.note_checked(changes.db, held, scrub)

    def sums(self, question: Callable[[sqlite3.Connection], T]) -> T:
        """Ask one of the questions of `index_sums`."""
        with self._read() as db:
            return question(db)

    def names_under(self, first_byte: int) -> dict[str, int]:
        """Name -> size in bytes, of all blobs whose page key begins with this byte."""
        low, high = bytes([first_byte]), bytes([first_byte + 1]) if first_byte < 255 else b""
        clause = "page_key >= ? AND page_key < ?" if high else "page_key >= ?"
        with self._read() as db:
            return rows.names_where(db, self._codecs, clause, (low, high) if high else (low,))

    def tidy(self) -> None:
        """Give unused pages of the database back, some at a time."""
        with self._lock:
            self._db.execute("PRAGMA incremental_vacuum(256)").fetchall()
