"""Blobs on their way: one request for all that a restore needs, decoded while more is coming."""

import contextlib
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from kvferry.errors import FerryError
from kvferry.node.hooks.loaded import Data, LoadClient, WarmSource
from kvferry.proto.keys import BlobKey

_MOST_THREADS = 4


@dataclass(frozen=True, slots=True)
class BlobSource:
    """Where blobs come from, and what they are decoded with."""

    client: LoadClient
    calibrations: WarmSource
    rope: Mapping[int, bytes]
    model_id: bytes


class Awaiting(Protocol):
    """What a restore needs. What it no longer wants is not waited for."""

    @property
    def keys(self) -> Sequence[BlobKey]:
        """All its blobs, in the order to be fetched."""

    @property
    def wanted(self) -> Collection[BlobKey]:
        """Those that it still waits for."""

    def came(self, key: BlobKey, data: Data) -> None:
        """One of ``wanted`` is there."""

    def failed(self, key: BlobKey, reason: str) -> None:
        """One of ``wanted`` is not to be had."""


def fetch(client: LoadClient, awaiting: Awaiting, end: float) -> None:
    """Hand over every blob, or say why not, until ``end`` (monotonic clock) or none is wanted."""
    answers = client.get_each(awaiting.keys, max(end - time.monotonic(), 0.0))
    with contextlib.closing(answers):
        for key, answer in answers:
            if key in awaiting.wanted:
                if isinstance(answer, FerryError):
                    awaiting.failed(key, answer.reason)
                else:
                    awaiting.came(key, answer)
            if not awaiting.wanted:
                return
    while awaiting.wanted:
        awaiting.failed(next(iter(awaiting.wanted)), "not_found")


@contextmanager
def decoding_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads for one restore; what still runs at the end is not waited for."""
    threads = ThreadPoolExecutor(max(2, min(_MOST_THREADS, os.cpu_count() or 1)), "kvferry-decode")
    try:
        yield threads
    finally:  # a calibration that is still being read serves the next restore
        threads.shutdown(wait=False, cancel_futures=True)
