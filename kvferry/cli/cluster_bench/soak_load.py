"""The load of a soak: pages that are put, looked up and read back, and what was promised."""

import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from kvferry.cluster.repository import LookupQuery
from kvferry.errors import FerryError
from kvferry.node.client import NodeClient
from kvferry.proto import container
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import blob_pb2

MODEL = blake3(b"kvferry soak").digest()
PAGES = 12
_LAYERS, _HEADS, _PAGE = 4, 2, 256
_SIZES = (4_000, 48_000)


def soak_blob(chain: int, page: int) -> tuple[BlobKey, bytes]:
    """One page of a chain: whole, valid, and always the same bytes for the same numbers."""
    keys = [_digest("page", chain, i) for i in (page - 1, page)]
    size = random.Random(chain * 1000 + page).randrange(*_SIZES)  # noqa: S311 - sizes, no secret
    data = blake3(repr((chain, page)).encode()).digest(length=size)
    header = blob_pb2.BlobHeader(
        kind=blob_pb2.BLOB_KIND_PAGE,
        model_id=MODEL,
        page_key=keys[1],
        previous_key=keys[0] if page else root_of(chain),
        token_start=page * _PAGE,
        token_end=(page + 1) * _PAGE,
        layer_start=0,
        layer_end=_LAYERS,
        head_start=0,
        head_end=_HEADS,
        model_layers=_LAYERS,
        model_heads=_HEADS,
        codec=blob_pb2.CodecSpec(name="raw", version=1, params_json="{}"),
    )
    raw = container.pack(header, [container.SectionData("k", data, len(data))])
    return container.key_of(container.read_header(raw)), raw


def root_of(chain: int) -> bytes:
    """What a chain's first page hangs on."""
    return _digest("root", chain)


def _digest(*parts: object) -> bytes:
    return blake3(repr(parts).encode()).digest()


@dataclass(slots=True)
class Ledger:
    """What nodes have accepted, and what came back. For several threads.

    Attributes:
        accepted: chain -> how many of its pages, from the first on, were accepted.
        counts: what happened: puts, gets, lookups, and errors by reason.
        wrong: what was wrong, in words; must stay empty.
    """

    accepted: dict[int, int] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    _next: int = 0

    def count(self, what: str) -> None:
        """One more of it."""
        with self.lock:
            self.counts[what] += 1

    def new_chain(self) -> int:
        """A number that no chain has."""
        with self.lock:
            self._next += 1
            return self._next

    def any_chain(self, dice: random.Random) -> int:
        """One with accepted pages; 0: there is none yet."""
        with self.lock:
            return dice.choice(list(self.accepted)) if self.accepted else 0

    def blame(self, what: str) -> None:
        """Something that must never happen."""
        with self.lock:
            self.wrong.append(what)

    def all_pages(self) -> list[tuple[int, int]]:
        """(chain, page) of every blob that was accepted."""
        with self.lock:
            return [
                (chain, page) for chain, pages in self.accepted.items() for page in range(pages)
            ]


class Load(threading.Thread):
    """One hook's traffic on one node, until `stop` is set."""

    def __init__(
        self,
        socket: Path,
        ledger: Ledger,
        stop: threading.Event,
        seed: int,
        ops_per_s: float,
    ) -> None:
        super().__init__(name=f"soak-{seed}", daemon=True)
        self._socket, self._ledger, self._stopped = socket, ledger, stop
        self._dice = random.Random(seed)  # noqa: S311 - load, no secret
        self._pause_s = 1.0 / ops_per_s
        self._chain, self._pages = 0, PAGES

    def run(self) -> None:
        """The thread."""
        with NodeClient(self._socket, timeout_s=5.0) as client:
            while not self._stopped.wait(self._pause_s * self._dice.uniform(0.5, 1.5)):
                act = self._dice.choices([self._put, self._get, self._look_up], [45, 40, 15])[0]
                self._try(act, client)

    def _try(self, act: Callable[[NodeClient], None], client: NodeClient) -> None:
        name = act.__name__.strip("_")
        try:
            act(client)
            self._ledger.count(name)
        except FerryError as exc:
            self._ledger.count(f"{name}_{exc.reason}")
        except Exception as exc:
            self._ledger.blame(f"{name}: {exc!r}")

    def _put(self, client: NodeClient) -> None:
        if self._pages >= PAGES:
            self._chain, self._pages = self._ledger.new_chain(), 0
        key, data = soak_blob(self._chain, self._pages)
        client.put(key, data)
        self._pages += 1
        with self._ledger.lock:
            self._ledger.accepted[self._chain] = self._pages

    def _get(self, client: NodeClient) -> None:
        chain = self._ledger.any_chain(self._dice)
        if chain:
            page = self._dice.randrange(self._ledger.accepted[chain])
            check_blob(client, self._ledger, chain, page)

    def _look_up(self, client: NodeClient) -> None:
        chain = self._ledger.any_chain(self._dice)
        if not chain:
            return
        keys = [soak_blob(chain, page)[0] for page in range(PAGES)]
        query = LookupQuery(root=root_of(chain), page_keys=[key.page_key for key in keys])
        found = client.lookup(query)
        for key, page in zip(keys, found.pages, strict=False):
            if [info.key for info in page] != [key]:
                self._ledger.blame(f"a lookup of {key} answered {[info.key for info in page]}")


def check_blob(client: NodeClient, ledger: Ledger, chain: int, page: int) -> None:
    """Read a page back; bytes that differ are blamed. Raises: FerryError."""
    key, data = soak_blob(chain, page)
    if client.get(key) != data:
        ledger.blame(f"{key} came back with other bytes")
