"""What a chain of page keys finds in the index: pages, tails at their end, and states."""

import sqlite3
from collections.abc import Sequence
from functools import partial

from kvferry.cluster.index_memo import KnownPage, PageMemo
from kvferry.cluster.index_rows import CodecTable, Held, Unit, held_of, marks, units_where
from kvferry.cluster.listing import MAX_STATES, MAX_TAILS, listed, of_states, tail_anchors
from kvferry.cluster.repository import BlobInfo, LookupQuery, LookupResult, StateFound, TailFound

PAGE_BATCH = 128


def _listing(
    unit: Unit, held: Sequence[Held], query: LookupQuery, now_s: float
) -> list[BlobInfo] | None:
    """The blobs to list of one unit; None where it is not complete for this caller."""
    live = [h.info for h in held if not h.expires_s or h.expires_s > now_s]
    whole = bool(unit.complete) and len(live) == len(held)
    return listed(query, live, whole)


def lookup(
    db: sqlite3.Connection,
    codecs: CodecTable,
    query: LookupQuery,
    now_s: float,
    memo: PageMemo,
    version: int,
) -> tuple[LookupResult, list[Unit]]:
    """The longest run of complete pages, the tails at its end, states, and their units.

    ``version``: of ``memo``, from before ``db`` was read.
    """
    pages: list[list[BlobInfo]] = []
    used: list[Unit] = []
    previous = query.root
    for at in range(0, len(query.page_keys), PAGE_BATCH):
        batch = query.page_keys[at : at + PAGE_BATCH]
        known = _complete(db, codecs, batch, memo, version)
        for page_key in batch:
            page = known.get(page_key)
            if page is None or page.unit.previous_key != previous:
                break
            listing = page.answer(query, partial(_listing, page.unit, page.held, query, now_s))
            if listing is None:
                break
            pages.append(listing)
            used.append(page.unit)
            previous = page_key
        if len(pages) < at + len(batch):
            break
    tails, tail_units = _tails(db, codecs, tail_anchors(query, len(pages)), query, now_s)
    states, state_units = _states(db, codecs, query, now_s)
    return LookupResult(pages=pages, tails=tails, states=states), used + tail_units + state_units


def _complete(
    db: sqlite3.Connection,
    codecs: CodecTable,
    page_keys: Sequence[bytes],
    memo: PageMemo,
    version: int,
) -> dict[bytes, KnownPage]:
    """Which of these pages are complete: remembered ones, and the others by the index."""
    known = memo.get(page_keys)
    missing = [key for key in page_keys if key not in known]
    if not missing:
        return known
    clause = f"kind = 'page' AND complete = 1 AND page_key IN ({marks(missing)})"
    units = units_where(db, clause, missing)
    held = held_of(db, codecs, units)
    fresh = {u.page_key: KnownPage(u, held[u.id]) for u in units}
    memo.keep(fresh.values(), version)
    return known | fresh


# Of one conversation the longest is wanted; of many that hang on one anchor the newest is
# likelier to be the caller's. A store cannot tell them apart, so that both kinds are listed.
_STATE_ORDERS = ("token_start DESC, token_end DESC, id DESC", "token_start DESC, id DESC")


def _states(
    db: sqlite3.Connection, codecs: CodecTable, query: LookupQuery, now_s: float
) -> tuple[list[StateFound], list[Unit]]:
    """Those nearest to the end, of one anchor the longest and the newest, whether or not
    the pages before them are complete."""
    if query.states == (0, 0):
        return [], []
    wanted = of_states(query)
    anchors = [query.root, *query.page_keys]
    used: dict[int, tuple[Unit, StateFound]] = {}
    for order in _STATE_ORDERS:
        found = 0
        for end in range(len(anchors), 0, -PAGE_BATCH):
            batch = {anchors[i]: i for i in range(max(0, end - PAGE_BATCH), end)}
            clause = (
                f"kind = 'state' AND complete = 1 AND previous_key IN ({marks(list(batch))}) "
                f"AND (? = 0 OR token_end <= ?) ORDER BY {order} LIMIT ?"
            )
            values = (*batch, query.tokens, query.tokens, MAX_STATES - found)
            units = units_where(db, clause, values)
            held = held_of(db, codecs, units)
            for unit in units:
                listing = _listing(unit, held[unit.id], wanted, now_s)
                if listing is not None:
                    found += 1
                    used[unit.id] = unit, _state_found(unit, batch[unit.previous_key], listing)
            if found >= MAX_STATES:
                break
    nearest = sorted(used.values(), key=lambda pair: pair[0].token_end, reverse=True)
    return [state for _, state in nearest], [unit for unit, _ in nearest]


def _state_found(unit: Unit, pages: int, listing: Sequence[BlobInfo]) -> StateFound:
    tokens = unit.token_end - unit.token_start
    return StateFound(key=unit.page_key, pages=pages, tokens=tokens, blobs=listing)


def _tails(
    db: sqlite3.Connection,
    codecs: CodecTable,
    anchors: Sequence[bytes],
    query: LookupQuery,
    now_s: float,
) -> tuple[list[TailFound], list[Unit]]:
    clause = (
        f"kind = 'tail' AND complete = 1 AND previous_key IN ({marks(anchors)}) "
        "ORDER BY token_start DESC, id DESC LIMIT ?"
    )
    units = units_where(db, clause, (*anchors, MAX_TAILS))
    held = held_of(db, codecs, units)
    found: list[TailFound] = []
    used: list[Unit] = []
    for unit in units:
        listing = _listing(unit, held[unit.id], query, now_s)
        if listing is not None:
            tokens = unit.token_end - unit.token_start
            found.append(TailFound(tail_key=unit.page_key, tokens=tokens, blobs=listing))
            used.append(unit)
    return found, used
