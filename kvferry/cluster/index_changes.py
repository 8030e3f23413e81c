"""What blobs that come and go do to their units: the changes of one transaction.

A unit is judged anew whenever its blobs change: whether it is complete, whether it is still
there, and whether it takes the place of another.
"""

import sqlite3
from collections.abc import Sequence

from kvferry.cluster import index_rows as rows
from kvferry.cluster.coverage import covers
from kvferry.cluster.index_rows import CodecTable, Held, Unit
from kvferry.cluster.index_units import (
    Record,
    check_agreement,
    held_under,
    new_unit,
    replaced_by,
    unit_of,
)
from kvferry.proto.keys import BlobKey


class Changes:
    """Blobs added and removed within one transaction, which the index begins and ends.

    Args:
        scrub: number of the last scrub; what comes in is verified, and counts as read by it.

    Attributes:
        db: the connection that writes.
        touched: page keys of units that were changed.
    """

    def __init__(self, db: sqlite3.Connection, codecs: CodecTable, scrub: int) -> None:
        self.db, self._codecs, self._scrub = db, codecs, scrub
        self.touched: set[bytes] = set()

    def add(self, record: Record, now_s: float) -> int:
        """Put a blob in, in place of one with its key; its unit, to be settled.

        Raises: IdentityMismatchError.
        """
        info, db = record.info, self.db
        self.touched.add(info.key.page_key)
        unit = unit_of(db, info.key)
        if unit is None:
            unit_id = new_unit(db, record)
        else:
            check_agreement(unit, info)
            unit_id = unit.id
        if record.replaces:
            db.execute("UPDATE units SET replaces = ? WHERE id = ?", (record.replaces, unit_id))
        old = self.find(info.key) if unit is not None else None
        if old is not None:
            db.execute("DELETE FROM blobs WHERE id = ?", (old.blob_id,))
        db.execute(
            "INSERT INTO blobs (unit_id, layer_start, layer_end, head_start, head_end, codec_ref, "
            "size, charged, stored_s, expires_s, namespace, checked) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                unit_id,
                *info.layers,
                *info.heads,
                self._codecs.ref(db, info.key.codec_id, info.codec),
                info.size,
                record.charged,
                info.stored_unix_s or int(now_s),
                record.expires_s,
                rows.tag_to_row(info.namespace_tag),
                self._scrub,
            ),
        )
        return unit_id

    def settle(self, unit_id: int, now_s: float) -> list[Held]:
        """Judge a unit anew after its blobs changed; drop what a complete tail replaces."""
        found = rows.units_where(self.db, "id = ?", (unit_id,))
        if not found:
            return []
        unit = found[0]
        self.touched.add(unit.page_key)
        held = rows.held_of(self.db, self._codecs, [unit])[unit_id]
        if not held:
            self.db.execute("DELETE FROM units WHERE id = ?", (unit_id,))
            return []
        parts = [(h.info.layers, h.info.heads) for h in held]
        complete = unit.kind == "calibration" or covers(parts, unit.model_layers, unit.model_heads)
        self.db.execute("UPDATE units SET complete = ? WHERE id = ?", (int(complete), unit_id))
        if not complete or unit.kind not in ("tail", "state"):
            return []
        return self.drop(replaced_by(self.db, unit, now_s))

    def drop(self, units: Sequence[Unit]) -> list[Held]:
        """Remove units with all their blobs, which are returned."""
        held = [h for part in rows.held_of(self.db, self._codecs, units).values() for h in part]
        self.db.executemany("DELETE FROM units WHERE id = ?", [(unit.id,) for unit in units])
        self.touched.update(unit.page_key for unit in units)
        return held

    def remove(self, held: Sequence[Held], now_s: float) -> None:
        """Remove blobs, and settle their units."""
        self.db.executemany("DELETE FROM blobs WHERE id = ?", [(h.blob_id,) for h in held])
        for unit_id in {h.unit_id for h in held}:
            self.settle(unit_id, now_s)

    def find(self, key: BlobKey) -> Held | None:
        """A blob as this transaction sees it, although it may have expired."""
        return held_under(self.db, self._codecs, key)
