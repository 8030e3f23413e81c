"""Sums over the index: what each namespace holds, and which leases are in force."""

import sqlite3

from kvferry.cluster.index_rows import tag_of_row, tag_to_row
from kvferry.cluster.repository import LeaseStat, NamespaceStat

MAX_NAMESPACES = 1000
MAX_LEASES_TOLD = 100


def charged_to(db: sqlite3.Connection, namespace: int) -> int:
    """Bytes of the medium that a namespace's blobs take."""
    query = "SELECT charged FROM namespaces WHERE tag = ?"
    found = db.execute(query, (tag_to_row(namespace),)).fetchone()
    return int(found[0]) if found else 0


def namespaces(db: sqlite3.Connection) -> list[NamespaceStat]:
    """What each holds, the largest first, at most `MAX_NAMESPACES`."""
    query = "SELECT tag, blobs, charged FROM namespaces ORDER BY charged DESC LIMIT ?"
    return [
        NamespaceStat(tag=tag_of_row(tag), blobs=blobs, bytes=charged)
        for tag, blobs, charged in db.execute(query, (MAX_NAMESPACES,))
    ]


def leases(db: sqlite3.Connection, now_s: float) -> list[LeaseStat]:
    """Those in force that end first, at most `MAX_LEASES_TOLD`."""
    query = (
        "SELECT l.id, l.expires_s, COUNT(b.id), COALESCE(SUM(b.size), 0), MAX(u.model_id), "
        "COALESCE(MAX(u.token_end), 0) "
        "FROM (SELECT * FROM leases WHERE expires_s > ? ORDER BY expires_s, id LIMIT ?) l "
        "LEFT JOIN lease_blobs lb ON lb.lease_id = l.id "
        "LEFT JOIN blobs b ON b.id = lb.blob_id LEFT JOIN units u ON u.id = b.unit_id "
        "GROUP BY l.id ORDER BY l.expires_s, l.id"
    )
    return [
        LeaseStat(
            lease_id=row[0],
            expires_unix_s=row[1],
            blobs=row[2],
            bytes=row[3],
            model_id=row[4] or b"",
            token_end=row[5],
        )
        for row in db.execute(query, (now_s, MAX_LEASES_TOLD))
    ]
