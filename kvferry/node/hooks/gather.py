"""A calibration from live traffic, for a model that has none.

Until it is there pages are coded by 8-bit ``affine``. Three threads have a part in it:
the model's thread only hands over what it has anyway (`LiveCalibration.offered`) and,
when it has nothing to do, runs bounded pieces of work (`idle`); a low-priority thread
adds up covariances at a bounded rate, fits, and finishes. Where nobody calls `idle`
weights are identity and the curve is an estimate: larger blobs, still half of 8 bits.

A rank of a group cannot run the model alone, so its weights are identity too, and it
fits only if it holds whole layer groups; a rank that holds a part of one counts
``gather_split_group`` and leaves calibration to ``kvferry calibrate``.
"""

import contextlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvferry.codec.calibration import GroupCalibration, RateDistortion, fit_group
from kvferry.codec.lab.gathered import Gathered
from kvferry.codec.mlx.adapters import CacheSnapshot
from kvferry.codec.mlx.device import device_products
from kvferry.errors import FerryError
from kvferry.node.background import lower_priority
from kvferry.node.hooks.gather_idle import HELD_MIN_TOKENS, IdleWork, Sample
from kvferry.node.hooks.options import HookOptions
from kvferry.proto.keys import DEFAULT_PAGE_TOKENS, page_keys, root_key

log = logging.getLogger(__name__)

SOURCE = "live traffic"
HELD_SAMPLES = 2
# How long to hope for idle time that does not come, once there are tokens enough.
IDLE_WAIT_S = 600.0
_TICK_S = 1.0
_CLOSE_S = 2.0
_WORKING_SHARE = 0.1  # of one core, for covariances
_RIDGE = 1.0
_ROOT = root_key(bytes(16), bytes(32))


@dataclass(frozen=True, slots=True)
class Made:
    """What was gathered: fitted groups, and a curve where one was measured."""

    groups: Sequence[GroupCalibration]
    rates: RateDistortion | None
    tokens: int


class LiveCalibration:
    """Gathers one calibration of one model, then is done.

    Args:
        alone: the whole model is on this rank, so that `idle` can run it.
        wanted: whether a calibration is still missing; may ask the network.
        finish: saves and publishes; called on the gathering thread. Raises: FerryError.
        counters: gets ``gather_tokens``, ``gather_passes``, ``gather_held`` (texts kept for
            the curve), ``gather_done``, and why there is no more.
    """

    def __init__(
        self,
        gathered: Gathered,
        options: HookOptions,
        counters: Counter[str],
        *,
        model: Any | None,
        wanted: Callable[[], bool],
        finish: Callable[[Made], None],
    ) -> None:
        self._gathered, self._options = gathered, options
        self._counters, self._wanted, self._finish = counters, wanted, finish
        self._idle = IdleWork(model, gathered, options.gather_passes)
        self._queue: queue.Queue[tuple[tuple[int, ...], CacheSnapshot, int]] = queue.Queue(1)
        self._seen: set[bytes] = set()
        self._held: list[Sample] = []
        self._busy_at = time.monotonic()
        self._closing = threading.Event()
        self._finishing = False
        self.done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvferry-gather", daemon=True)
        self._thread.start()

    # -- the model's thread --------------------------------------------------------

    def touch(self) -> None:
        """A request is being served: what can wait does."""
        self._busy_at = time.monotonic()

    def offered(self, tokens: Sequence[int], snapshot: CacheSnapshot, restored: int) -> None:
        """A cache of ``tokens``, of which ``restored`` came out of the store. Never blocks."""
        if self.done.is_set():
            return
        try:
            self._queue.put_nowait((tuple(tokens), snapshot, restored))
        except queue.Full:
            self._counters["gather_skipped"] += 1

    def idle(self, budget_s: float) -> bool:
        """At most one piece of work that needs the model. True: there is more to do."""
        if self.done.is_set():
            return False
        return self._idle.run(budget_s)

    def close(self, timeout_s: float) -> None:
        """Stop; what was gathered and is not finished is lost."""
        self._closing.set()
        # A fit cannot be interrupted, and nobody needs it any more.
        self._thread.join(timeout_s if self._finishing else min(timeout_s, _CLOSE_S))

    def pause(self, seconds: float) -> bool:
        """For ``finish``: wait; True: it is being closed."""
        return self._closing.wait(seconds)

    # -- the gathering thread ------------------------------------------------------

    def _run(self) -> None:
        lower_priority()
        try:
            self._work()
        except (FerryError, OSError) as exc:
            reason = exc.reason if isinstance(exc, FerryError) else "disk"
            self._counters[f"gather_{reason}"] += 1
            log.warning("no calibration from live traffic: %s", exc)
        except Exception:
            # A bug here must cost a calibration, never the generation beside it.
            self._counters["gather_bug"] += 1
            log.exception("no calibration from live traffic")
        finally:
            self.done.set()
            self._idle.drop()

    def _work(self) -> None:
        if not self._gather():
            return
        tokens = self._gathered.covered
        groups = self._fit()
        if groups is None:
            return
        rates = self._measure(groups)
        if not self._closing.is_set() and self._wanted():
            self._finishing = True
            self._finish(Made(groups, rates, tokens))
            self._counters["gather_done"] += 1

    def _gather(self) -> bool:
        """Until there is enough. False: closed, or somebody else has made one."""
        enough_at = 0.0
        while not self._closing.is_set():
            with contextlib.suppress(queue.Empty):
                tokens, snapshot, restored = self._queue.get(timeout=_TICK_S)
                if not self._wanted():
                    return False
                self._take(tokens, snapshot, restored)
                del snapshot
            if self._gathered.covered < self._options.gather_tokens:
                continue
            enough_at = enough_at or time.monotonic()
            self._counters["gather_passes"] = self._gathered.fisher.passes
            waited = time.monotonic() - enough_at >= IDLE_WAIT_S
            if not self._idle.called or self._idle.weighed or waited:
                self._idle.enough()
                return True
        return False

    def _take(self, tokens: tuple[int, ...], snapshot: CacheSnapshot, restored: int) -> None:
        """The pages of an offer that were not seen and that this machine computed."""
        if restored < HELD_MIN_TOKENS <= len(tokens) and self._take_sample(tokens, snapshot):
            return
        keys = page_keys(_ROOT, tokens)
        for index in range(-(-restored // DEFAULT_PAGE_TOKENS), len(keys)):
            if self._closing.is_set() or self._gathered.covered >= self._options.gather_tokens:
                return
            if keys[index] in self._seen:
                continue
            self._seen.add(keys[index])
            started = time.monotonic()
            span = (index * DEFAULT_PAGE_TOKENS, (index + 1) * DEFAULT_PAGE_TOKENS)
            pages = [snapshot.page(group.layers, span) for group in self._gathered.groups]
            self._gathered.add(pages, None, self._gathered.covered + DEFAULT_PAGE_TOKENS)
            self._counters["gather_tokens"] = self._gathered.covered
            self._closing.wait((time.monotonic() - started) * (1 / _WORKING_SHARE - 1))

    def _take_sample(self, tokens: tuple[int, ...], snapshot: CacheSnapshot) -> bool:
        """Keep what `idle` needs; True: as held-out text, which is not to be fitted on."""
        first = page_keys(_ROOT, tokens)[:1]
        if not self._idle.possible or first[0] in self._seen:
            return False
        sample = Sample.of(tokens, snapshot)
        if len(self._held) < HELD_SAMPLES:
            self._seen.update(page_keys(_ROOT, tokens))
            self._held.append(sample)
            self._counters["gather_held"] = len(self._held)
            return True
        self._idle.weigh(sample)
        return False

    def _fit(self) -> list[GroupCalibration] | None:
        made = []
        # A few passes know too little of too many directions.
        weighed = 2 * self._gathered.fisher.passes >= self._options.gather_passes
        while self._gathered.groups:
            if not self._wait_until_quiet():
                return None
            seen = self._gathered.groups[0]
            weights = self._gathered.weights(seen, _RIDGE) if weighed else None
            fitted = fit_group(seen, weights=weights, source=SOURCE)
            made.append(fitted.using(device_products()))
            del self._gathered.groups[0]
        return made

    def _wait_until_quiet(self) -> bool:
        """Until no request came for a while, or none did for very long. False: closed."""
        end = time.monotonic() + IDLE_WAIT_S
        while time.monotonic() < end:
            left = self._busy_at + self._options.gather_idle_s - time.monotonic()
            if left <= 0:
                break
            if self._closing.wait(min(left, _TICK_S)):
                return False
        return not self._closing.is_set()

    def _measure(self, groups: Sequence[GroupCalibration]) -> RateDistortion | None:
        """The curve, measured in idle time; None where there is none of it."""
        if not (self._idle.called and self._held):
            return None
        result = self._idle.measure(groups, self._held)
        end = time.monotonic() + IDLE_WAIT_S
        while time.monotonic() < end and not self._closing.is_set():
            if result.wait(_TICK_S):
                return result.rates
        self._counters["gather_estimated"] += 1
        return None
