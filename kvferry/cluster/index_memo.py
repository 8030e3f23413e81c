"""Complete pages as lookups found them last, for as long as nothing about them changes.

Most lookups ask for prefixes that were asked for a moment ago (a system prompt, the turn
before). Remembered, a page costs neither SQL nor a new object for each of its blobs, and
its part of the answer is put into bytes once.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kvferry.cluster.index_rows import Held, Unit
from kvferry.cluster.listing import Listed
from kvferry.cluster.repository import BlobInfo, LookupQuery

# Measured, a page takes 1.5 KB and each of its blobs 0.8 KB: 55 MiB in all, whatever the pages;
# up to twice that where many kinds of readers ask, each of which is answered otherwise.
MOST_UNITS = 65_536
_UNITS_A_PAGE = 2
_MOST_QUESTIONS = 8

_Question = tuple[frozenset[str], tuple[int, int], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class KnownPage:
    """A complete page and its blobs."""

    unit: Unit
    held: Sequence[Held]
    _answers: dict[_Question, Listed | None] = field(default_factory=dict)

    @property
    def units(self) -> int:
        """How much of a memo it takes."""
        return _UNITS_A_PAGE + len(self.held)

    def answer(
        self, query: LookupQuery, judge: Callable[[], list[BlobInfo] | None]
    ) -> list[BlobInfo] | None:
        """What ``judge`` says of the page for a query; asked once, unless blobs of it end."""
        if any(h.expires_s for h in self.held):
            return judge()
        question = (query.codecs, query.layers, query.heads)
        if question in self._answers:
            return self._answers[question]
        found = judge()
        answer = None if found is None else Listed(found)
        if len(self._answers) < _MOST_QUESTIONS:
            self._answers[question] = answer
        return answer


class PageMemo:
    """Usable from any thread. Whoever changes pages calls `changed` after the commit.

    Args:
        most: what it holds at most; a page with two blobs counts four.
    """

    def __init__(self, most: int = MOST_UNITS) -> None:
        self._most, self._units = most, 0
        self._lock = threading.Lock()
        self._held: OrderedDict[bytes, KnownPage] = OrderedDict()
        self._changes = 0

    def version(self) -> int:
        """To be asked before the index is read, and given to `keep`."""
        return self._changes

    def get(self, page_keys: Iterable[bytes]) -> dict[bytes, KnownPage]:
        """Those that are remembered."""
        found: dict[bytes, KnownPage] = {}
        with self._lock:
            for key in page_keys:
                page = self._held.get(key)
                if page is not None:
                    self._held.move_to_end(key)
                    found[key] = page
        return found

    def keep(self, pages: Iterable[KnownPage], version: int) -> None:
        """Remember pages, unless anything changed since ``version``: they may be old."""
        with self._lock:
            if version != self._changes:
                return
            for page in pages:
                self._drop(page.unit.page_key)
                self._held[page.unit.page_key] = page
                self._units += page.units
            while self._units > self._most:
                self._drop(next(iter(self._held)))

    def changed(self, page_keys: Iterable[bytes]) -> None:
        """Forget pages whose rows changed."""
        with self._lock:
            self._changes += 1
            for key in page_keys:
                self._drop(key)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._changes += 1
            self._held.clear()
            self._units = 0

    def __len__(self) -> int:
        return len(self._held)

    def _drop(self, page_key: bytes) -> None:
        page = self._held.pop(page_key, None)
        if page is not None:
            self._units -= page.units
