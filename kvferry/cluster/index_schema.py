"""The tables of the store's index, and how a database is opened or found unusable."""

import sqlite3
from pathlib import Path

SCHEMA_VERSION = 2

_SCHEMA = """
CREATE TABLE units (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    page_key BLOB NOT NULL,
    model_id BLOB NOT NULL,
    previous_key BLOB NOT NULL,
    token_start INTEGER NOT NULL,
    token_end INTEGER NOT NULL,
    model_layers INTEGER NOT NULL,
    model_heads INTEGER NOT NULL,
    complete INTEGER NOT NULL DEFAULT 0,
    evict_last INTEGER NOT NULL,
    used_ns INTEGER NOT NULL,
    replaces BLOB,
    UNIQUE (page_key, kind)
);
CREATE INDEX units_by_use ON units (evict_last, used_ns);
CREATE INDEX units_by_previous ON units (previous_key, kind);
CREATE TABLE codecs (
    id INTEGER PRIMARY KEY,
    codec_id TEXT NOT NULL,
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    params_json TEXT NOT NULL,
    calibration_id BLOB NOT NULL,
    UNIQUE (codec_id, name, version, params_json, calibration_id)
);
CREATE TABLE blobs (
    id INTEGER PRIMARY KEY,
    unit_id INTEGER NOT NULL REFERENCES units (id) ON DELETE CASCADE,
    layer_start INTEGER NOT NULL,
    layer_end INTEGER NOT NULL,
    head_start INTEGER NOT NULL,
    head_end INTEGER NOT NULL,
    codec_ref INTEGER NOT NULL REFERENCES codecs (id),
    size INTEGER NOT NULL,
    charged INTEGER NOT NULL,
    stored_s INTEGER NOT NULL,
    expires_s INTEGER NOT NULL,
    namespace INTEGER NOT NULL DEFAULT 0,
    checked INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX blobs_of_unit ON blobs (unit_id);
CREATE INDEX blobs_by_check ON blobs (checked);
CREATE INDEX blobs_expiring ON blobs (expires_s) WHERE expires_s > 0;
CREATE TABLE leases (id TEXT PRIMARY KEY, expires_s INTEGER NOT NULL);
CREATE TABLE lease_blobs (
    lease_id TEXT NOT NULL REFERENCES leases (id) ON DELETE CASCADE,
    blob_id INTEGER NOT NULL REFERENCES blobs (id) ON DELETE CASCADE,
    PRIMARY KEY (lease_id, blob_id)
) WITHOUT ROWID;
CREATE INDEX lease_of_blob ON lease_blobs (blob_id);
-- Sums that every put asks for. Tags are 64 bits without a sign, kept as SQLite has them.
CREATE TABLE namespaces (
    tag INTEGER PRIMARY KEY,
    blobs INTEGER NOT NULL DEFAULT 0,
    charged INTEGER NOT NULL DEFAULT 0
);
CREATE TRIGGER blob_comes AFTER INSERT ON blobs BEGIN
    INSERT INTO namespaces (tag, blobs, charged) VALUES (NEW.namespace, 1, NEW.charged)
        ON CONFLICT (tag) DO UPDATE SET blobs = blobs + 1, charged = charged + NEW.charged;
END;
CREATE TRIGGER blob_goes AFTER DELETE ON blobs BEGIN
    UPDATE namespaces SET blobs = blobs - 1, charged = charged - OLD.charged
        WHERE tag = OLD.namespace;
    DELETE FROM namespaces WHERE tag = OLD.namespace AND blobs = 0;
END;
"""


class IndexDamagedError(Exception):
    """The index cannot be used; it is to be made anew from the files."""


def is_damage(exc: sqlite3.Error) -> bool:
    """Whether an error means that the database, not the statement, is bad."""
    code = getattr(exc, "sqlite_errorcode", None)
    if code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return True
    return "no such table" in str(exc) or "no such column" in str(exc)


def connect(path: str) -> sqlite3.Connection:
    """A connection for use under a lock of the caller's, in autocommit mode."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
    for pragma in (
        "journal_mode = WAL",
        "synchronous = NORMAL",
        "foreign_keys = ON",
        "wal_autocheckpoint = 128",
        "journal_size_limit = 524288",
        "cache_size = -8192",
        "temp_store = MEMORY",
    ):
        db.execute(f"PRAGMA {pragma}")
    return db


def open_database(path: str) -> tuple[sqlite3.Connection, bool]:
    """Open or create; True: it is new and empty.

    Raises: IndexDamagedError: not SQLite, damaged, or of another schema version.
    """
    fresh = path == ":memory:" or not Path(path).exists()
    db: sqlite3.Connection | None = None
    try:
        if fresh and path != ":memory:":
            _prepare(path)
        db = connect(path)
        if fresh:
            db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
            return db, True
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version != SCHEMA_VERSION:
            raise IndexDamagedError(f"schema version {version}, {SCHEMA_VERSION} wanted")
        problem = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise IndexDamagedError(problem)
        return db, False
    except IndexDamagedError:
        if db is not None:
            db.close()
        raise
    except sqlite3.DatabaseError as exc:
        if db is not None:
            db.close()
        raise IndexDamagedError(str(exc)) from exc


def _prepare(path: str) -> None:
    """A new file, for its owner only, that can give pages back; old logs do not fit it."""
    for suffix in ("-wal", "-shm"):
        Path(path + suffix).unlink(missing_ok=True)
    Path(path).touch(mode=0o600)
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.execute("VACUUM")
    db.close()


def remove_database(path: str) -> None:
    """Delete a database and its logs."""
    if path != ":memory:":
        for suffix in ("", "-wal", "-shm"):
            Path(path + suffix).unlink(missing_ok=True)
