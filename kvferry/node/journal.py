"""What was accepted for upload, on disk: a daemon that was killed goes on where it was.

SQLite with every commit on disk before it is answered. The bytes are elsewhere: in the
disk tier, or in the spool where there is none.
"""

import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvferry.errors import InvalidKeyError, StoreUnavailableError
from kvferry.proto.keys import BlobKey

_SCHEMA = """
CREATE TABLE IF NOT EXISTS uploads (
    key TEXT PRIMARY KEY,
    size INTEGER NOT NULL,
    expires_unix_s REAL NOT NULL,
    replaces TEXT NOT NULL,
    lease TEXT NOT NULL
)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A blob accepted for upload.

    Attributes:
        size: bytes.
        expires_unix_s: end of its time to live; 0: none.
        replaces: an older tail whose place it takes.
        lease: what keeps it in the disk tier; empty where that is not needed.
    """

    key: BlobKey
    size: int
    expires_unix_s: float = 0.0
    replaces: BlobKey | None = None
    lease: str = ""


class Journal:
    """Blocks; usable from any thread. Raises: StoreUnavailableError where the disk fails."""

    def __init__(self, path: Path) -> None:
        """Opens or makes it; one that is damaged is set aside and begun anew."""
        self._path = path
        self._lock = threading.Lock()
        try:
            self._db = self._open()
        except sqlite3.DatabaseError:
            for suffix in ("", "-wal", "-shm"):
                damaged = path.with_name(path.name + suffix)
                if damaged.exists():
                    damaged.replace(damaged.with_name(f"{damaged.name}.damaged"))
            self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute(_SCHEMA)
            db.execute("SELECT key, size, expires_unix_s, replaces, lease FROM uploads LIMIT 1")
        except sqlite3.DatabaseError:
            db.close()
            raise
        self._path.chmod(0o600)
        return db

    def _write(self, statement: str, rows: Iterable[tuple[object, ...]]) -> None:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    self._db.executemany(statement, rows)
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.Error as exc:
                raise StoreUnavailableError(f"upload journal {self._path}", str(exc)) from exc

    def add(self, items: Sequence[Pending]) -> None:
        """On disk when this returns. One that is there already is overwritten."""
        self._write(
            "INSERT OR REPLACE INTO uploads VALUES (?, ?, ?, ?, ?)",
            [(str(p.key), p.size, p.expires_unix_s, str(p.replaces or ""), p.lease) for p in items],
        )

    def remove(self, keys: Sequence[BlobKey]) -> None:
        """Uploaded, or dropped for good."""
        self._write("DELETE FROM uploads WHERE key = ?", [(str(key),) for key in keys])

    def load(self) -> list[Pending]:
        """What is still to be uploaded, oldest first; rows that make no sense are left out."""
        with self._lock:
            rows = self._db.execute(
                "SELECT key, size, expires_unix_s, replaces, lease FROM uploads ORDER BY rowid"
            ).fetchall()
        found: list[Pending] = []
        for key, size, expires, replaces, lease in rows:
            try:
                found.append(
                    Pending(
                        key=BlobKey.parse(key),
                        size=size,
                        expires_unix_s=expires,
                        replaces=BlobKey.parse(replaces) if replaces else None,
                        lease=lease,
                    )
                )
            except InvalidKeyError:
                continue
        return found

    def close(self) -> None:
        """May be called twice."""
        with self._lock:
            self._db.close()
