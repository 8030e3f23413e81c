"""Units of the index: what the blobs of one page, tail, state or calibration share."""

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvferry.cluster import index_rows as rows
from kvferry.cluster.index_rows import Unit
from kvferry.cluster.repository import BlobInfo
from kvferry.errors import IdentityMismatchError
from kvferry.proto.keys import BlobKey

_NOT_PINNED = (
    "NOT EXISTS (SELECT 1 FROM blobs p JOIN lease_blobs lb ON lb.blob_id = p.id "
    "JOIN leases l ON l.id = lb.lease_id WHERE p.unit_id = units.id AND l.expires_s > ?)"
)


@dataclass(frozen=True, slots=True)
class Record:
    """A blob to be indexed. ``replaces``: page key of the tail or state whose place it takes."""

    info: BlobInfo
    charged: int
    expires_s: int = 0
    replaces: bytes = b""
    used_ns: int = 0


def unit_of(db: sqlite3.Connection, key: BlobKey) -> Unit | None:
    """The unit that a blob of this key belongs to."""
    found = rows.units_where(db, "page_key = ? AND kind = ?", (key.page_key, key.kind))
    return found[0] if found else None


def held_under(db: sqlite3.Connection, codecs: rows.CodecTable, key: BlobKey) -> rows.Held | None:
    """The blob of this very key, although it may have expired."""
    unit = unit_of(db, key)
    if unit is None:
        return None
    held = rows.held_of(db, codecs, [unit])[unit.id]
    return next((h for h in held if h.info.key == key), None)


def new_unit(db: sqlite3.Connection, record: Record) -> int:
    """Add the unit of a blob; its number."""
    info = record.info
    cursor = db.execute(
        "INSERT INTO units (kind, page_key, model_id, previous_key, token_start, token_end, "
        "model_layers, model_heads, evict_last, used_ns) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            info.key.kind,
            info.key.page_key,
            info.model_id,
            info.previous_key,
            *info.tokens,
            info.model_layers,
            info.model_heads,
            int(info.key.kind == "calibration"),
            record.used_ns,
        ),
    )
    if cursor.lastrowid is None:
        raise sqlite3.InterfaceError("no row id")
    return cursor.lastrowid


Identity = tuple[bytes, bytes, tuple[int, int], tuple[int, int]]


def identity_of(info: BlobInfo) -> Identity:
    """What all blobs of a unit have in common."""
    model = (info.model_layers, info.model_heads)
    return info.model_id, info.previous_key, info.tokens, model


def _compare(found: Identity, wanted: Identity) -> None:
    names = ("model", "previous page", "tokens", "a model of layers x heads")
    for field, ours, theirs in zip(names, found, wanted, strict=True):
        if ours != theirs:
            raise IdentityMismatchError(field, _shown(ours), _shown(theirs))


def _shown(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def check_agreement(unit: Unit, info: BlobInfo) -> None:
    """All blobs of a page are of one model, one place in one chain, one size of model.

    Raises: IdentityMismatchError.
    """
    tokens, model = (unit.token_start, unit.token_end), (unit.model_layers, unit.model_heads)
    _compare(identity_of(info), (unit.model_id, unit.previous_key, tokens, model))


def check_all_agree(infos: Iterable[BlobInfo]) -> None:
    """The same among blobs that are not in the index yet. Raises: IdentityMismatchError."""
    first: dict[tuple[str, bytes], Identity] = {}
    for info in infos:
        identity = identity_of(info)
        _compare(identity, first.setdefault((info.key.kind, info.key.page_key), identity))


def replaced_by(db: sqlite3.Connection, unit: Unit, now_s: float) -> list[Unit]:
    """The older tail or state whose place ``unit`` takes, unless it is leased."""
    clause = (
        "kind = ? AND id != ? AND model_id = ? AND page_key = "  # noqa: S608
        f"(SELECT replaces FROM units WHERE id = ?) AND {_NOT_PINNED}"
    )
    return rows.units_where(db, clause, (unit.kind, unit.id, unit.model_id, unit.id, now_s))


@dataclass(frozen=True, slots=True)
class Chain:
    """What comes before a blob that is being written.

    Attributes:
        writing: pages before it that are being written too.
        before: the page before those.
        whole: those begin the sequence, so ``before`` is its root and no page.
    """

    writing: Sequence[bytes]
    before: bytes
    whole: bool


def victims(
    db: sqlite3.Connection,
    need: int,
    chain: Chain | None,
    now_s: float,
    namespace: int | None = None,
) -> list[int]:
    """Least recently used units that charge ``need`` bytes in all; none if not to be had.

    Pages of ``chain`` are spared. Where its last page is not here, the blob to be written
    could not be found, and nothing goes for it. ``namespace``: tag of the only one whose
    blobs may go, and count.
    """
    kept: set[bytes] = set()
    if chain is not None:
        here = chain.whole or rows.units_where(
            db, "page_key = ? AND kind = 'page'", (chain.before,)
        )
        if not here:
            return []
        kept = {*chain.writing, *rows.ancestors(db, chain.before)}
    whose: str = ""
    values: list[float] = [now_s]
    if namespace is not None:
        whose, values = " AND namespace = ?", [rows.tag_to_row(namespace), now_s]
    query = (
        "SELECT id, page_key, "  # noqa: S608
        f"(SELECT SUM(charged) FROM blobs WHERE unit_id = units.id{whose}) "
        f"FROM units WHERE {_NOT_PINNED} ORDER BY evict_last, used_ns, id"
    )
    chosen: list[int] = []
    freed = 0
    for unit_id, page_key, charged in db.execute(query, values):
        if freed >= need:
            break
        if page_key not in kept and (charged or namespace is None):
            chosen.append(unit_id)
            freed += charged or 0
    return chosen if freed >= need else []
