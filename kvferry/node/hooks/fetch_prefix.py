"""Rows and the states at their end on their way together: without one the other is no use."""

from collections.abc import Collection, Sequence

from kvferry.node.hooks.fetch_rows import RowsFetch
from kvferry.node.hooks.fetch_states import StateFetch
from kvferry.node.hooks.loaded import Data, Loaded
from kvferry.proto.keys import BlobKey


class PrefixFetch:
    """One prefix: the rows of its tokens, and the states after the last one.

    Args:
        rows, states: None where the model, or this rank's layers, have none.
        otherwise: tokens of the prefix to fall back to, if the states cannot be had.
    """

    def __init__(
        self, rows: RowsFetch | None, states: StateFetch | None, tokens: int, otherwise: int
    ) -> None:
        self._rows, self._states = rows, states
        self._tokens, self._otherwise = tokens, otherwise
        if rows is not None:
            rows.warm()

    @property
    def keys(self) -> Sequence[BlobKey]:
        """Rows first: they take longer to decode, while the states are still coming."""
        return [key for part in self._parts() for key in part.keys]

    @property
    def wanted(self) -> Collection[BlobKey]:
        """What is not there yet and still of use."""
        return [key for part in self._parts() for key in part.wanted]

    def _parts(self) -> list[RowsFetch | StateFetch]:
        return [part for part in (self._rows, self._states) if part is not None]

    def came(self, key: BlobKey, data: Data) -> None:
        """Hand it to the part that it belongs to."""
        for part in self._parts():
            if key in part.wanted:
                part.came(key, data)

    def failed(self, key: BlobKey, reason: str) -> None:
        """Wait no longer for what is of no use without it."""
        for part in self._parts():
            if key in part.wanted:
                part.failed(key, reason)
        if self._rows is None or self._states is None:
            return
        if self._states.reason:
            self._rows.upto(self._otherwise)
        elif self._rows.reach < self._tokens:
            self._states.give_up(reason)

    def finish(self, loaded: Loaded) -> None:
        """Wait for the threads, and say in ``loaded`` what came of it."""
        if self._rows is None:
            loaded.tokens = self._tokens
        else:
            self._rows.finish()
        if self._states is not None:
            self._states.finish()
