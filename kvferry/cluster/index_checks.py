"""When each blob was last read again: a scrub takes first what waits longest.

Scrubs are numbered, and a blob carries the number of the last one that read it. So one that was
broken off, by a restart too, goes on where it was: the next one begins with what it left.
"""

import sqlite3
from collections.abc import Iterable

from kvferry.cluster.index_rows import CodecTable, Held, held_of, units_in

BATCH = 256


def last_scrub(db: sqlite3.Connection) -> int:
    """Number of the last scrub that read anything."""
    return int(db.execute("SELECT COALESCE(MAX(checked), 0) FROM blobs").fetchone()[0])


def unchecked(db: sqlite3.Connection, codecs: CodecTable, scrub: int) -> list[Held]:
    """Some of what scrub number ``scrub`` has not read yet, what waits longest first."""
    query = "SELECT id, unit_id FROM blobs WHERE checked < ? ORDER BY checked, id LIMIT ?"
    places = dict(db.execute(query, (scrub, BATCH)).fetchall())
    units = units_in(db, "id", list(dict.fromkeys(places.values())))
    held = {h.blob_id: h for part in held_of(db, codecs, units).values() for h in part}
    return [held[blob_id] for blob_id in places]


def note_checked(db: sqlite3.Connection, held: Iterable[Held], scrub: int) -> None:
    """These were read."""
    query = "UPDATE blobs SET checked = ? WHERE id = ?"
    db.executemany(query, [(scrub, blob.blob_id) for blob in held])
