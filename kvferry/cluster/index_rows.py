"""Rows of the index as our dataclasses, and the questions asked of them."""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvferry.cluster.blob_name import blob_name, name_of
from kvferry.cluster.repository import (
    BlobInfo,
    CodecInfo,
    ListQuery,
)
from kvferry.proto.keys import BlobKey

LIST_UNITS = 256

_BLOB_COLUMNS = (
    "b.unit_id, b.layer_start, b.layer_end, b.head_start, b.head_end, b.codec_ref, b.size, "
    "b.stored_s, b.expires_s, b.id, b.charged, b.namespace"
)
_UNIT_COLUMNS = (
    "id, kind, page_key, model_id, previous_key, token_start, token_end, "
    "model_layers, model_heads, complete, used_ns"
)


@dataclass(frozen=True, slots=True)
class Unit:
    """What all blobs of a page (tail, calibration) share."""

    id: int
    kind: str
    page_key: bytes
    model_id: bytes
    previous_key: bytes
    token_start: int
    token_end: int
    model_layers: int
    model_heads: int
    complete: int
    used_ns: int


@dataclass(frozen=True, slots=True)
class Held:
    """A blob in the index, and where its engine has it."""

    info: BlobInfo
    blob_id: int
    unit_id: int
    charged: int
    expires_s: int

    @property
    def name(self) -> str:
        """Its name in the engine."""
        return blob_name(self.info.key, self.expires_s)


class CodecTable:
    """The codecs of the index, in memory: they are few, and every row names one."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._by_id: dict[int, tuple[str, CodecInfo]] = {}
        self._ids: dict[tuple[str, CodecInfo], int] = {}
        for row in db.execute(
            "SELECT id, codec_id, name, version, params_json, calibration_id FROM codecs"
        ):
            self._keep(row[0], row[1], CodecInfo(
                name=row[2], version=row[3], params_json=row[4], calibration_id=row[5]
            ))  # fmt: skip

    def _keep(self, ref: int, codec_id: str, codec: CodecInfo) -> None:
        self._by_id[ref] = (codec_id, codec)
        self._ids[codec_id, codec] = ref

    def ref(self, db: sqlite3.Connection, codec_id: str, codec: CodecInfo) -> int:
        """Number of a codec; it is added where it is new."""
        known = self._ids.get((codec_id, codec))
        if known is not None:
            return known
        values = (codec_id, codec.name, codec.version, codec.params_json, codec.calibration_id)
        db.execute(
            "INSERT OR IGNORE INTO codecs (codec_id, name, version, params_json, calibration_id) "
            "VALUES (?, ?, ?, ?, ?)",
            values,
        )
        ref: int = db.execute(
            "SELECT id FROM codecs WHERE codec_id = ? AND name = ? AND version = ? "
            "AND params_json = ? AND calibration_id = ?",
            values,
        ).fetchone()[0]
        self._keep(ref, codec_id, codec)
        return ref

    def __getitem__(self, ref: int) -> tuple[str, CodecInfo]:
        return self._by_id[ref]


_SIGNED, _WIDTH = 1 << 63, 1 << 64


def tag_to_row(tag: int) -> int:
    """A namespace's tag as SQLite's signed 64 bits."""
    return tag - _WIDTH if tag >= _SIGNED else tag


def tag_of_row(value: int) -> int:
    """And back."""
    return value % _WIDTH


def marks(values: Sequence[object]) -> str:
    """As many question marks as there are values, for an IN clause."""
    return ",".join("?" * len(values))


def units_where(db: sqlite3.Connection, clause: str, values: Sequence[Any]) -> list[Unit]:
    """Units that a WHERE clause of ours picks; ``values`` fill its marks."""
    query = f"SELECT {_UNIT_COLUMNS} FROM units WHERE {clause}"  # noqa: S608 - clause is ours
    return [Unit(*row) for row in db.execute(query, values)]


def units_in(
    db: sqlite3.Connection, column: Literal["id", "page_key"], values: Sequence[Any]
) -> list[Unit]:
    """Units whose column has one of any number of values."""
    found: list[Unit] = []
    for at in range(0, len(values), 500):
        part = values[at : at + 500]
        found += units_where(db, f"{column} IN ({marks(part)})", part)
    return found


def held_of(
    db: sqlite3.Connection, codecs: CodecTable, units: Iterable[Unit]
) -> dict[int, list[Held]]:
    """unit id -> its blobs, expired ones too."""
    by_id = {unit.id: unit for unit in units}
    found: dict[int, list[Held]] = {unit_id: [] for unit_id in by_id}
    ids = list(by_id)
    for at in range(0, len(ids), 500):
        part = ids[at : at + 500]
        query = (
            f"SELECT {_BLOB_COLUMNS} FROM blobs b "  # noqa: S608 - only marks are put in
            f"WHERE b.unit_id IN ({marks(part)}) ORDER BY b.layer_start, b.head_start, b.id"
        )
        for row in db.execute(query, part):
            found[row[0]].append(_held(by_id[row[0]], row, codecs))
    return found


def _held(unit: Unit, row: Sequence[int], codecs: CodecTable) -> Held:
    layers, heads = (row[1], row[2]), (row[3], row[4])
    codec_id, codec = codecs[row[5]]
    if unit.kind == "calibration":
        key = BlobKey(unit.kind, unit.page_key)
    else:
        key = BlobKey(unit.kind, unit.page_key, layers, heads, codec_id)
    info = BlobInfo(
        key=key,
        size=row[6],
        codec=codec,
        model_id=unit.model_id,
        previous_key=unit.previous_key,
        tokens=(unit.token_start, unit.token_end),
        layers=layers,
        heads=heads,
        model_layers=unit.model_layers,
        model_heads=unit.model_heads,
        stored_unix_s=row[7],
        used_unix_s=unit.used_ns // 1_000_000_000,
        expires_unix_s=row[8],
        namespace_tag=tag_of_row(row[11]),
    )
    return Held(info, row[9], unit.id, row[10], row[8])


def names_where(
    db: sqlite3.Connection, codecs: CodecTable, clause: str, values: Sequence[Any]
) -> dict[str, int]:
    """Name -> size of the blobs of units that a WHERE clause of ours picks.

    Without the objects in between: at start this is asked of every blob there is.
    """
    query = (
        "SELECT u.kind, u.page_key, b.layer_start, b.layer_end, b.head_start, b.head_end, "  # noqa: S608
        "b.codec_ref, b.expires_s, b.size FROM units u JOIN blobs b ON b.unit_id = u.id "
        f"WHERE {clause}"
    )
    return {
        name_of(kind, page, (a, b), (c, d), codecs[ref][0], expires): size
        for kind, page, a, b, c, d, ref, expires, size in db.execute(query, values)
    }


def list_units(
    db: sqlite3.Connection, query: ListQuery, after: tuple[int, int, int]
) -> tuple[list[Unit], tuple[int, int, int]]:
    """The next units of a listing, oldest use first, and where to go on after them."""
    clauses, values = ["(evict_last, used_ns, id) > (?, ?, ?)"], list[Any](after)
    for column, value in (
        ("page_key", query.page_key),
        ("model_id", query.model_id),
        ("kind", query.kind),
        ("previous_key", query.previous_key),
    ):
        if value:
            clauses.append(f"{column} = ?")
            values.append(value)
    clause = f"{' AND '.join(clauses)} ORDER BY evict_last, used_ns, id LIMIT {LIST_UNITS}"
    units = units_where(db, clause, values)
    if not units:
        return [], after
    last = units[-1]
    return units, (int(last.kind == "calibration"), last.used_ns, last.id)


def ancestors(db: sqlite3.Connection, page_key: bytes) -> Iterator[bytes]:
    """``page_key`` and the pages before it that are held."""
    query = (
        "WITH RECURSIVE chain(k) AS (SELECT ? UNION SELECT u.previous_key FROM units u "
        "JOIN chain ON u.page_key = chain.k AND u.kind = 'page') SELECT k FROM chain"
    )
    for row in db.execute(query, (page_key,)):
        yield row[0]
