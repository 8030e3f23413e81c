"""The states of one position on their way: each decoded, on a thread, as soon as it is there."""

from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from kvferry.codec.base import PageTensors
from kvferry.codec.blob import decode_blob
from kvferry.codec.state_parts import StateLayout
from kvferry.errors import CodecError
from kvferry.node.hooks.fetch import BlobSource
from kvferry.node.hooks.loaded import Data, Loaded
from kvferry.node.restore import StatePlan
from kvferry.proto.keys import BlobKey


class StateFetch:
    """All states of a position, or none.

    Args:
        layout: which part of them this rank has; None: all.
    """

    def __init__(
        self,
        source: BlobSource,
        layout: StateLayout | None,
        plan: StatePlan,
        loaded: Loaded,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._source, self._layout, self._plan = source, layout, plan
        self._loaded, self._threads = loaded, threads
        self._infos = {piece.info.key: piece.info for piece in plan.pieces}
        self._wanted = set(self._infos)
        self._decoding: dict[BlobKey, list[Future[PageTensors]]] = {}
        self.reason = ""

    @property
    def keys(self) -> Sequence[BlobKey]:
        """Of all states."""
        return list(self._infos)

    @property
    def wanted(self) -> Collection[BlobKey]:
        """Those that are not there yet; none once one of them is not to be had."""
        return self._wanted

    def came(self, key: BlobKey, data: Data) -> None:
        """Decode it."""
        self._wanted.discard(key)
        self._loaded.came(self._infos[key], len(data))
        cuts = [piece.cut for piece in self._plan.pieces if piece.info.key == key]
        self._decoding[key] = [self._threads.submit(self._decode, key, data, cut) for cut in cuts]

    def failed(self, key: BlobKey, reason: str) -> None:
        """The others are of no use without it."""
        self._loaded.problems.append(reason)
        self.give_up(reason)

    def give_up(self, reason: str) -> None:
        """The position is of no use to the caller."""
        self.reason = self.reason or reason
        self._wanted.clear()

    def _decode(self, key: BlobKey, data: Data, cut: tuple[int, int]) -> PageTensors:
        return decode_blob(
            data,
            key=key,
            model_id=self._source.model_id,
            tokens=(self._plan.start, self._plan.tokens),
            cut=cut,
            calibrations=self._source.calibrations,
        )

    def finish(self) -> bool:
        """Wait for the threads; whether ``loaded`` has the states of the position now."""
        if self.reason:
            return False
        pages = []
        for key in self._infos:
            for future in self._decoding[key]:
                try:
                    pages.append(future.result())
                except CodecError as exc:
                    self.failed(key, exc.reason)
                    return False
        joined = pages if self._layout is None else self._layout.join(pages, self._plan.parts)
        if joined is None:
            self.failed(self.keys[0], "state_split")
            return False
        self._loaded.states[self._plan.tokens] = joined
        return True
