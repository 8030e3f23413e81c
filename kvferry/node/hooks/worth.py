"""Whether a restore pays: ``bytes / bandwidth + decode < tokens / prefill rate``.

Design sections 10 and 11, with figures that this process has seen itself. A prefix that
the model computes sooner is not fetched; where only a part of it pays, that part is. Now
and then one blob is fetched all the same, beside the prefill, so that a link that got
better is noticed.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvferry.cluster.repository import BlobInfo
from kvferry.errors import FerryError
from kvferry.node.hooks.loaded import LoadClient, Loaded
from kvferry.node.hooks.rates import Rate
from kvferry.node.hooks.steps import Step

log = logging.getLogger(__name__)

# Rates move by so much from one request to the next: a restore must be quicker than
# prefill by more than that to be begun.
MARGIN = 1.2
MIN_BYTES = 4096
MIN_VALUES = 1 << 12
MOST_RETRY_S = 300.0
PROBE_DEADLINE_S = 10.0
# A link that is so many times quicker or slower than before has changed.
JUMP = 1.3
# Of the offers that do not pay, one in so many is stored all the same: what is fetched of it
# tells when that has changed.
STORED_ANYWAY = 16


@dataclass(frozen=True, slots=True)
class Cost:
    """What is known of this machine and its links, in units per second; None: not yet."""

    prefill: float | None
    link: float | None
    near: float | None
    decode: float | None

    def seconds(self, step: Step) -> float:
        """To have the prefix that ends with ``step``; what is not known counts nothing."""
        times = [(step.far_bytes, self.link), (step.near_bytes, self.near)]
        times.append((step.tokens, self.decode))
        return sum(amount / rate for amount, rate in times if rate)


def pays_to_store(tokens: int, cost: Cost, bytes_per_token: float, wait_s: float) -> bool:
    """Whether a prefix may be had sooner than it is computed, by the best way to it.

    What is not known speaks for storing, and so does `MARGIN`: others may be nearer to it.
    """
    rates = [rate for rate in (cost.link, cost.near) if rate]
    if not (cost.prefill and rates and bytes_per_token):
        return True
    each = bytes_per_token / max(rates) + (1 / cost.decode if cost.decode else 0.0)
    return wait_s + tokens * each <= MARGIN * tokens / cost.prefill


def best_step(steps: Sequence[Step], cost: Cost, wait_s: float = 0.0, at_hand: int = 0) -> int:
    """Tokens of the prefix that saves most time; 0: none saves any.

    Args:
        steps: prefixes that can be had, of growing length.
        wait_s: what a fetch takes before its first byte comes.
        at_hand: tokens that need no prefill even if nothing is fetched.
    """
    if not steps or not cost.prefill:
        return steps[-1].tokens if steps else 0
    best, tokens = 0.0, 0
    for step in steps:
        saved = (step.tokens - at_hand) / cost.prefill - MARGIN * (wait_s + cost.seconds(step))
        if saved > best:
            best, tokens = saved, step.tokens
    return tokens


class Worth:
    """What restores of this process have taken, and what to fetch in view of that.

    Belongs to the model's thread, but for what a probe has seen.

    Args:
        prefill: of the model, in tokens; kept by the caller.
        always: all that is stored is fetched, whatever prefill would take.
        retry_s: at first, between two blobs that are fetched to see whether the link got
            better; twice as long each time that it did not, up to `MOST_RETRY_S`.
    """

    def __init__(
        self,
        prefill: Rate,
        retry_s: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        always: bool = False,
    ) -> None:
        self._prefill, self._clock, self._always = prefill, clock, always
        self._link, self._near = Rate(MIN_BYTES, JUMP), Rate(MIN_BYTES, JUMP)
        self._decode = Rate()
        self._by_codec: dict[str, Rate] = {}
        self._bytes_per_token = self._wait_s = 0.0
        self._not_stored = 0
        self._lock = threading.Lock()
        self._first_retry_s = self._retry_s = retry_s
        self._retry_at = 0.0
        self._probing: threading.Thread | None = None

    @property
    def cost(self) -> Cost:
        """What is known now."""
        with self._lock:
            link, near = self._link.per_s, self._near.per_s
        return Cost(self._prefill.per_s, link, near, self._decode.per_s)

    @property
    def decode_values_per_s(self) -> dict[str, float]:
        """By codec, of those that were measured."""
        return {codec: rate.per_s for codec, rate in self._by_codec.items() if rate.per_s}

    def choose(self, steps: Sequence[Step], wait_s: float, at_hand: int) -> int:
        """Tokens to fetch. See `best_step`."""
        return steps[-1].tokens if self._always else best_step(steps, self.cost, wait_s, at_hand)

    def stores(self, tokens: int) -> bool:
        """Whether an offer of so many tokens is to be stored."""
        if self._always or pays_to_store(tokens, self.cost, self._bytes_per_token, self._wait_s):
            return True
        self._not_stored += 1
        return self._not_stored % STORED_ANYWAY == 0

    def learn(self, loaded: Loaded) -> None:
        """What a load took: its bytes, and whether they came over a link."""
        seconds = loaded.seconds
        fetch = seconds.get("fetch", 0.0)
        with self._lock:
            if 4 * loaded.far_bytes >= loaded.bytes > 0:
                self._link.add(loaded.far_bytes, fetch)
            elif loaded.bytes and not loaded.far_bytes:
                self._near.add(loaded.bytes, fetch)
            elif "timeout" in loaded.problems and loaded.first_bytes:
                # Nothing came in all that time: the link is slower than this.
                self._link.add(loaded.first_bytes, fetch)
        if loaded.tokens and "decode" in seconds:
            took = seconds["decode"] + seconds.get("commit", 0.0)
            self._decode.add(loaded.tokens, took)
            self._learn_codecs(loaded, took)
        if loaded.tokens and loaded.bytes:
            self._bytes_per_token = loaded.bytes / loaded.tokens
            self._wait_s = seconds.get("lookup", 0.0)
        if loaded.far_bytes:
            self._retry_s = self._first_retry_s

    def _learn_codecs(self, loaded: Loaded, took: float) -> None:
        """What a restore had to wait for decoding, shared out by what each codec took of it."""
        busy = sum(seconds for _, seconds in loaded.decoded.values())
        for codec, (values, seconds) in loaded.decoded.items():
            rate = self._by_codec.setdefault(codec, Rate(MIN_VALUES))
            rate.add(values, took * seconds / busy if busy else 0.0)

    # -- a link that got better -----------------------------------------------------

    def probe(self, client: LoadClient, blobs: Sequence[BlobInfo]) -> bool:
        """Fetch one of ``blobs`` in the background, if it is time. Returns: whether."""
        now = self._clock()
        if now < self._retry_at or (self._probing is not None and self._probing.is_alive()):
            return False
        # One that was fetched before is near now, and would tell nothing of the link.
        info = next((b for b in blobs if not b.near and b.size >= MIN_BYTES), None)
        if info is None:
            return False
        self._retry_at = now + self._retry_s
        self._retry_s = min(2 * self._retry_s, max(MOST_RETRY_S, self._first_retry_s))
        self._probing = threading.Thread(
            target=self._fetch, args=(client, info), name="kvferry-probe", daemon=True
        )
        self._probing.start()
        return True

    def wait_probe(self, timeout_s: float) -> None:
        """Until the probe under way, if any, has ended."""
        if self._probing is not None:
            self._probing.join(timeout_s)

    def _fetch(self, client: LoadClient, info: BlobInfo) -> None:
        started = time.monotonic()
        try:
            with contextlib.closing(client.get_each([info.key], PROBE_DEADLINE_S)) as answers:
                for _, answer in answers:
                    if isinstance(answer, FerryError):
                        log.debug("probe: %s", answer)
                        return
                    with self._lock:
                        self._link.add(len(answer), time.monotonic() - started)
        except Exception:
            log.exception("probe failed")


class Together:
    """One collective of a restore: entered once on every rank, whatever fails there.

    Args:
        all_min: the group's.
        choose: this rank's answer, asked where the rank gets that far.

    Attributes:
        agreed: tokens that all ranks fetch, once it was entered.
    """

    def __init__(
        self,
        all_min: Callable[[Sequence[int]], list[int]],
        choose: Callable[[Sequence[Step], float, int], int],
    ) -> None:
        self._all_min, self._choose = all_min, choose
        self._entered = False
        self.agreed = 0

    def __call__(self, steps: Sequence[Step], wait_s: float, at_hand: int) -> tuple[int, int]:
        """(what this rank would fetch, what all ranks fetch), in tokens."""
        mine = 0
        try:
            mine = self._choose(steps, wait_s, at_hand)
        finally:
            self._enter(mine)
        return mine, self.agreed

    def settle(self) -> None:
        """A rank that did not get that far has nothing."""
        if not self._entered:
            self._enter(0)

    def _enter(self, mine: int) -> None:
        self._entered = True
        self.agreed = self._all_min([mine])[0]
