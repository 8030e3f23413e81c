"""When units were used last: noted in memory, written as one small object a minute.

So a lookup costs no request, and a use is known to a few minutes, which is enough to decide
what goes first. A server that is killed loses its last minute of notes; what nobody noted
counts as used when it was put.
"""

import secrets
from collections.abc import Iterable, Mapping

from google.protobuf.message import DecodeError

from kvferry.cluster.bucket.layout import USES, UnitKey
from kvferry.cluster.bucket.objects import Bucket
from kvferry.proto.keys import DIGEST_BYTES, kind_name, kind_number
from kvferry.proto.v1 import bucket_pb2

MOST_NOTED = 100_000
MOST_KNOWN = 2_000_000
_LOGS_A_SWEEP = 500
_LOG_BYTES = 128 << 20


def stamp(now_s: float, token_start: int, grain_s: int = 60) -> int:
    """Time of use in ns: coarse, and the earlier in its chain the later."""
    return int(now_s // grain_s * grain_s) * 1_000_000_000 - min(token_start, 999_999_999)


def _pack(uses: Mapping[UnitKey, int]) -> bytes:
    return bucket_pb2.UseLog(
        uses=[
            bucket_pb2.UnitUse(kind=kind_number(u.kind), page_key=u.page_key, used_ns=at)
            for u, at in uses.items()
        ]
    ).SerializeToString()


def _parse(data: bytes) -> dict[UnitKey, int]:
    try:
        log = bucket_pb2.UseLog.FromString(data)
    except DecodeError:
        return {}
    return {
        UnitKey(kind_name(use.kind), use.page_key): use.used_ns
        for use in log.uses
        if len(use.page_key) == DIGEST_BYTES
    }


class Uses:
    """What this server saw used. For one event loop."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._noted: dict[UnitKey, int] = {}
        self._server = secrets.token_hex(4)

    def note(self, uses: Iterable[tuple[UnitKey, int]], now_s: float) -> None:
        """(unit, its first token). Beyond `MOST_NOTED` units, notes are dropped and counted."""
        for unit, token_start in uses:
            if unit in self._noted or len(self._noted) < MOST_NOTED:
                self._noted[unit] = stamp(now_s, token_start)
            else:
                self._bucket.counters["uses_dropped"] += 1

    async def flush(self, now_s: float) -> None:
        """Write what was noted. Keeps it where that fails."""
        noted, self._noted = self._noted, {}
        if not noted:
            return
        try:
            path = f"uses/{int(now_s):012d}-{self._server}-{secrets.token_hex(4)}"
            await self._bucket.put(path, _pack(noted))
        except BaseException:
            self._noted = noted | self._noted
            raise

    async def merged(self) -> tuple[dict[UnitKey, int], list[str]]:
        """All that is known of all servers, and the logs that `keep` will make superfluous."""
        known = _parse(await self._bucket.get(USES, _LOG_BYTES) or b"")
        logs = [entry.path for entry in await self._bucket.names("uses", _LOGS_A_SWEEP)]
        for path in logs:
            for unit, at in _parse(await self._bucket.get(path, _LOG_BYTES) or b"").items():
                known[unit] = max(at, known.get(unit, 0))
        return known, logs

    async def keep(self, known: Mapping[UnitKey, int], logs: list[str]) -> None:
        """Write what is known in one piece, then delete the logs that are in it."""
        if len(known) > MOST_KNOWN:
            latest = sorted(known.items(), key=lambda item: item[1])[-MOST_KNOWN:]
            known = dict(latest)
        await self._bucket.put(USES, _pack(known))
        await self._bucket.delete(logs)
