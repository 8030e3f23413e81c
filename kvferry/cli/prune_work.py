"""What `kvferry prune` picks and deletes."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvferry.cluster.client import BlobStoreClient
from kvferry.cluster.repository import BlobInfo
from kvferry.proto.keys import BlobKey

DELETE_BATCH = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """All of them must fit; what is empty or 0 fits everything.

    Attributes:
        model: hex digits that a model id begins with.
        stored_before, used_before: unix time in s.
        namespace_tag: see `kvferry.proto.keys.namespace_tag`.
        calibrations: these too. Blobs that were written with one cannot be read without.
    """

    model: str = ""
    stored_before: float = 0.0
    used_before: float = 0.0
    namespace_tag: int = 0
    calibrations: bool = False

    def fits(self, info: BlobInfo) -> bool:
        """Whether a blob is to go."""
        return (
            (self.calibrations or info.key.kind != "calibration")
            and info.model_id.hex().startswith(self.model)
            and (not self.stored_before or info.stored_unix_s < self.stored_before)
            and (not self.used_before or info.used_unix_s < self.used_before)
            and (not self.namespace_tag or info.namespace_tag == self.namespace_tag)
        )


@dataclass(frozen=True, slots=True)
class Doomed:
    """What is to go, in the order in which it does. ``bytes`` by kind."""

    keys: Sequence[BlobKey]
    kinds: dict[str, tuple[int, int]]

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(size for _, size in self.kinds.values())


def doomed(blobs: Iterable[tuple[BlobKey, int]]) -> Doomed:
    """Of keys and sizes, in the order given."""
    counts, sizes = Counter[str](), Counter[str]()
    keys = []
    for key, size in blobs:
        keys.append(key)
        counts[key.kind] += 1
        sizes[key.kind] += size
    return Doomed(keys, {kind: (counts[kind], sizes[kind]) for kind in sorted(counts)})


async def pick(client: BlobStoreClient, filters: Filters) -> Doomed:
    """Blobs that fit, ends of chains before their beginnings: whatever is left when somebody
    breaks off can still be found."""
    picked: list[tuple[bool, int, BlobKey, int]] = []
    async for batch in client.list():
        picked += [
            (info.key.kind == "calibration", -info.tokens[0], info.key, info.size)
            for info in batch
            if filters.fits(info)
        ]
    picked.sort()
    return doomed((key, size) for _, _, key, size in picked)


async def delete(
    clients: Sequence[BlobStoreClient], keys: Sequence[BlobKey], tell: Callable[[int], None]
) -> int:
    """From all of them; how many the first one had. Raises: StoreUnavailableError."""
    deleted = 0
    for at in range(0, len(keys), DELETE_BATCH):
        batch = keys[at : at + DELETE_BATCH]
        deleted += await clients[0].delete(batch)
        for other in clients[1:]:
            await other.delete(batch)
        tell(min(at + DELETE_BATCH, len(keys)))
    return deleted
