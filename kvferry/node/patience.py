"""Offers outlast a restart of the node daemon: what was lost with it is done again."""

import threading
import time
from collections.abc import Callable

from kvferry.errors import FerryError
from kvferry.node.offer import OfferClient

# A service manager starts it again after 2 s, and it has an index to read.
RESTART_S = 20.0
# Of one that stayed away: it may be back, with only a part of the connections made anew.
AWAY_S = 1.0
_STEP_S = 0.2
_PAUSE_S = 0.1


class Patience:
    """Does work for a daemon, and does it again when a daemon that it lost is back.

    One that stays away costs one wait: until it has answered once more, work that does not
    find it fails within a second. Belongs to one thread, but for `close`.

    Args:
        most_s: of waiting for the daemon, for one piece of work.
    """

    def __init__(self, client: OfferClient, most_s: float = RESTART_S) -> None:
        self._client, self._most_s = client, most_s
        self._away = False
        self._closed = threading.Event()

    def run(self, work: Callable[[], None]) -> None:
        """``work`` may be done several times. Raises: what it raises in the end."""
        end: float | None = None
        while True:
            try:
                work()
            except FerryError as error:
                lost = self._client.lost(error)
                if end is None:
                    end = time.monotonic() + (
                        min(AWAY_S, self._most_s) if self._away else self._most_s
                    )
                back = lost and self._wait(end)
                self._away = lost and not back
                if not back:
                    raise
            else:
                self._away = False
                return

    def close(self) -> None:
        """Wait no more, also where it is waited now. From any thread."""
        self._closed.set()

    def _wait(self, end: float) -> bool:
        while not self._closed.is_set() and time.monotonic() < end:
            # An attempt that fails although it is there must not be followed by another at once.
            if self._client.connected(_STEP_S) and not self._closed.wait(_PAUSE_S):
                return True
        return False
